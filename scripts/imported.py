"""Count the keys that `graft import` carries, explains and does not know, over other trainers' own
configs for LoRA and QLoRA on texts.

    python -m scripts.imported AXOLOTL LLAMA_FACTORY TORCHTUNE LITGPT

Each argument is a git folder: a clone, or a bare one.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from typing import Any

import yaml

from trainer.config import imported

FILES = {
    "axolotl": r"examples/.*\.ya?ml",
    "llama-factory": r"examples/train_q?lora/.*sft.*\.yaml",
    "torchtune": r"recipes/configs/.*lora.*\.yaml",
    "litgpt": r"config_hub/finetune/.*lora\.yaml",
}


def git(folder: str, *words: str) -> str:
    """Return what git prints."""
    return subprocess.run(
        ["git", "-C", folder, *words], capture_output=True, text=True, check=True
    ).stdout


def configs(folder: str, kind: str) -> list[dict[str, Any]]:
    """Return a trainer's own configs, of text models with a LoRA."""
    names = git(folder, "ls-tree", "-r", "--name-only", "HEAD").splitlines()
    contents = []
    for name in filter(re.compile(FILES[kind]).fullmatch, names):
        content = yaml.safe_load(git(folder, "show", f"HEAD:{name}"))
        if kind == "axolotl":  # its examples hold all kinds of training
            if content.get("adapter") not in ("lora", "qlora"):
                continue
            if content.get("rl") or content.get("processor_type"):
                continue
        contents.append({str(key): value for key, value in content.items()})
    return contents


def main(folders: list[str]) -> None:
    """Print a row for each trainer, and the keys that are unknown most often."""
    unknown: Counter[str] = Counter()
    print("| trainer, commit | configs | keys | carried | explained | unknown |\n|" + "---|" * 6)
    for kind, folder in zip(FILES, folders, strict=True):
        commit = git(folder, "rev-parse", "--short=8", "HEAD").strip()
        contents = configs(folder, kind)
        results = [imported.convert(content, kind) for content in contents]
        counts = [
            sum(len(getattr(result, part)) for result in results)
            for part in ("carried", "explained", "unknown")
        ]
        unknown.update(f"{kind}: {key}" for result in results for key in result.unknown)
        cells = [f"{kind}, {commit}", len(contents), sum(counts), *counts]
        print("| " + " | ".join(f"{c:,}" if isinstance(c, int) else c for c in cells) + " |")
    for key, count in unknown.most_common(20):
        print(f"{count:4} {key}")


if __name__ == "__main__":
    main(sys.argv[1:])
