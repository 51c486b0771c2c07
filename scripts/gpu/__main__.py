"""Test and measure on a GPU, within eight minutes.

    python -m scripts.gpu [wheels=FOLDER] [out=runs/gpu] [seconds=470] [device=cuda] [parts=a,b]

It needs this checkout, a Python with a CUDA build of torch 2.11 or newer, and a folder of wheels of
everything else that Graft imports; no package index and no model hub. With `wheels` they are
installed into OUT/venv, next to the torch that is there. Without it, this Python has them already.

Parts, each in a process of its own: `pytest -m gpu`; LoRA, QLoRA and RoSA on random Llamas of 1B
and 8B, packed and padded, each against HF + PEFT; EAGLE-3 distilled and decoding. A part that fails
or takes too long keeps what it said in OUT/PART.log, and the others run. device=cpu is a dry run
with tiny shapes, of two steps a side; tests for a GPU are then collected and not run.

It writes OUT/results.json, OUT/gpu.md and OUT/PART.profile.txt. The exit code is 1 if a part
failed.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
DEFAULTS = {"wheels": "", "out": "runs/gpu", "seconds": "470", "device": "cuda", "parts": ""}
OWN = ("torch-", "torchvision-", "torchaudio-", "triton-", "nvidia_", "nvidia-")  # of the machine
# Name -> options of scripts.gpu.measure; the first ones are the ones that matter most.
PARTS: dict[str, list[str]] = {
    "lora_8b_packed": ["method=lora", "shape=8b", "packed=true"],
    "qlora_8b_packed": ["method=qlora", "shape=8b", "packed=true"],
    "rosa_1b_packed": ["method=rosa", "shape=1b", "packed=true"],
    "lora_1b_packed": ["method=lora", "shape=1b", "packed=true"],
    "lora_1b_padded": ["method=lora", "shape=1b", "packed=false"],
    "eagle3_1b": ["method=eagle3", "shape=1b", "packed=false"],
    "lora_8b_padded": ["method=lora", "shape=8b", "packed=false"],
}
TESTS = "tests"


def main(words: list[str]) -> int:
    """Run the parts, and write what they measured."""
    changes = dict(word.partition("=")[::2] for word in words)
    if unknown := set(changes) - set(DEFAULTS):
        print(f"no option {', '.join(sorted(unknown))}\n\n{__doc__}", file=sys.stderr)
        return 2
    options = DEFAULTS | changes
    known = [TESTS, *PARTS]
    parts = options["parts"].split(",") if options["parts"] else known
    if wrong := set(parts) - set(known):
        print(f"no part {', '.join(sorted(wrong))}; parts: {', '.join(known)}", file=sys.stderr)
        return 2
    out = Path(options["out"]).resolve()
    out.mkdir(parents=True, exist_ok=True)
    began, python = time.monotonic(), sys.executable
    results: list[dict[str, Any]] = []
    if options["wheels"]:
        result, python = install(Path(options["wheels"]).resolve(), out)
        results.append(result)
    for number, name in enumerate(parts):
        left = float(options["seconds"]) - (time.monotonic() - began)
        # A part may take the time that the earlier ones left over.
        limit = left / (len(parts) - number) if name != TESTS else min(left, 120)
        results.append(run(name, command(name, python, options["device"], limit, out), limit, out))
        write(out, results, options)
        print(f"{name}: {results[-1]['state']} after {results[-1]['seconds']:.0f} s", flush=True)
    print((out / "gpu.md").read_text("utf-8"))
    return int(any(result["state"] != "done" for result in results))


def install(wheels: Path, out: Path) -> tuple[dict[str, Any], str]:
    """Install all wheels but torch's into a new environment that sees the packages of this one.
    Return the result of the part and the environment's Python."""
    files = sorted(str(file) for file in wheels.glob("*.whl") if not file.name.startswith(OWN))
    venv = out / "venv"
    python = str(venv / "bin" / "python")
    script = (
        f"{sys.executable!r} -m venv --system-site-packages --clear {str(venv)!r} && "
        f"{python!r} -m pip install -q --no-index --no-deps " + " ".join(map(repr, files))
    )
    return run("install", ["sh", "-c", script], 150, out), python


def command(name: str, python: str, device: str, limit: float, out: Path) -> list[str]:
    """Return the command of a part."""
    if name == TESTS:
        dry = ["--collect-only"] if device == "cpu" else []
        words = ["-m", "pytest", "-m", "gpu", "-q", "-n", "0", "-p", "no:cacheprovider"]
        return [python, *words, *dry, *gpu_tests()]
    shapes = [word if device != "cpu" else _tiny(word) for word in PARTS[name]]
    budget = f"seconds={max(1.0, limit - 25 if device != 'cpu' else 1.0):.0f}"
    places = [f"json={out / f'{name}.json'}", f"profile={out / f'{name}.profile.txt'}"]
    return [python, "-m", "scripts.gpu.measure", *shapes, f"device={device}", budget, *places]


def gpu_tests() -> list[str]:
    """Return the files that have tests for a GPU. To collect all tests takes a minute or two."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    marked = [file for file in files if "pytest.mark.gpu\n" in file.read_text("utf-8")]
    return [str(file.relative_to(ROOT)) for file in marked]


def _tiny(word: str) -> str:
    return "shape=tiny" if word.startswith("shape=") else word


def run(name: str, words: list[str], limit: float, out: Path) -> dict[str, Any]:
    """Run a part for at most `limit` seconds. What it says goes to OUT/NAME.log, its last lines
    into the result."""
    log, file = out / f"{name}.log", out / f"{name}.json"
    file.unlink(missing_ok=True)
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "PYTORCH_ALLOC_CONF": "expandable_segments:True",
        "HF_HUB_OFFLINE": "1",
    }
    began = time.monotonic()
    with log.open("wb") as output:
        process = subprocess.Popen(
            words, cwd=ROOT, env=environment, stdout=output, stderr=output, start_new_session=True
        )
        try:
            code = process.wait(timeout=max(1.0, limit))
            state = "done" if code == 0 else f"failed with exit code {code}"
        except subprocess.TimeoutExpired:
            state = f"stopped after {limit:.0f} s"
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    lines = log.read_text("utf-8", "replace").splitlines()
    measured = json.loads(file.read_text("utf-8")) if file.exists() else None
    return {
        "part": name,
        "state": state,
        "seconds": time.monotonic() - began,
        "command": words,
        "last_lines": lines[-30:],
        "measured": measured,
    }


def write(out: Path, results: list[dict[str, Any]], options: dict[str, str]) -> None:
    """Write results.json and gpu.md, after each part: what stops the command loses nothing."""
    (out / "results.json").write_text(
        json.dumps({"options": options, "results": results}, indent=1)
    )
    (out / "gpu.md").write_text(table(results))


def table(results: list[dict[str, Any]]) -> str:
    """Return the results as Markdown."""
    about = next((r["measured"]["about"] for r in results if r["measured"]), "nothing was measured")
    lines = [
        about,
        "",
        "| part | side | tokens/s | ratio | peak GB | ratio | first loss | steps |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for result in results:
        measured = result["measured"]
        if measured is None:
            lines.append(f"| {result['part']} | {result['state']} |" + " |" * 6)
            continue
        for name, side in measured["sides"].items():
            lines.append(f"| {result['part']} | {name} | {_cells(side, measured)} |")
        for name, problem in measured["problems"].items():
            lines.append(f"| {result['part']} | {name}: {problem} |" + " |" * 6)
        lines += [f"| {result['part']} | {result['state']} |" + " |" * 6] * (
            result["state"] != "done"
        )
    failed = [result for result in results if result["state"] != "done"]
    for result in failed:
        lines += ["", f"{result['part']}: {result['state']}", "", "```text"]
        lines += [*result["last_lines"], "```"]
    return "\n".join(lines) + "\n"


def _cells(side: dict[str, Any], measured: dict[str, Any]) -> str:
    """Return the numbers of a side, with their ratios to its peer's. What was not measured is
    empty."""
    peer = measured["sides"].get(side.get("peer", measured["peer"]), {})
    cells = []
    for key, digits in (("tokens_per_s", 0), ("peak_gb", 2)):
        value, other = side[key], peer.get(key)
        cells.append("" if value is None else f"{value:.{digits}f}")
        cells.append(f"{value / other:.2f}" if value and other else "")
    loss = side["first_loss"]
    return " | ".join([*cells, "" if loss is None else f"{loss:.4f}", str(side["steps"])])


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
