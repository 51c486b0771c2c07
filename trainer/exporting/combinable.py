"""Runs whose adapters can be combined: what their records say, before any weights are loaded."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from adapters.errors import AdapterError
from adapters.lora import VARIANTS
from adapters.peft_fields import CHANGES_BASE, config_class
from trainer.storage import run_folder

OURS = (
    "adapters.bilora.BiLoRAAdapter",
    "adapters.increlora.IncreLoRAAdapter",
    "adapters.lora.LoRAAdapter",
    "adapters.mos.MoSAdapter",
    "adapters.rosa.RoSAAdapter",
    "adapters.spiel.SpIEL",
)
ALLOWED = "LoRA, rsLoRA, BiLoRA, IncreLoRA, MoS, RoSA, sparse adapters and SpIEL can be combined"
_EXPORT = "graft export to=merged writes the model of one run"
# Adapters that are no update of fixed weights -> why, and what to do instead
OTHERS = {
    "adapters.full.Full": "trained all weights of the base, so there is no update to add"
    f" up. {_EXPORT}",
    "adapters.full.Nothing": "trained nothing. Give runs that trained an adapter",
    "adapters.mola.MoLAAdapter": "chooses among its experts token by token, so no fixed update has"
    " its effect. graft serve answers from the run's folder",
    "adapters.pst.PSTAdapter": "removed weights of the base, which the update of another run would"
    f" bring back. {_EXPORT}",
    "adapters.sr_ste.SrSte": "trained the base's weights in the pattern 2:4, which a sum of runs"
    f" would break. {_EXPORT}",
}
SAME_RANK = ("linear", "ties", "dare_linear", "dare_ties", "magnitude_prune")


def read(runs: list[str]) -> list[dict[str, Any]]:
    """Return the run.yaml of each run.

    Raises:
        FolderError: one is no run's folder.
        AdapterError: their adapters cannot be combined; the message says which, and why.
    """
    contents = []
    for run in runs:
        folder, content, _ = run_folder.read(run)
        for fault in faults_of(content):
            raise AdapterError(f"{run} {fault}")
        contents.append(content | {"template": _template(folder)})
    for run, content in zip(runs[1:], contents[1:], strict=True):
        for fault in differences(contents[0], content):
            raise AdapterError(f"{runs[0]} and {run} {fault}")
    return contents


def faults_of(content: dict[str, Any]) -> Iterator[str]:
    """Yield why the adapter of a run can be combined with none."""
    config, identity = content["config"], content["identity"]
    adapter = config["adapter"]
    if identity.get("target") is not None:
        yield "trained a draft head. Give runs that trained an adapter"
    kind = adapter["_target_"]
    if kind == "adapters.peft.Peft":
        yield from _peft_faults(adapter)
    elif kind not in OURS:
        name = identity["choices"].get("adapter", kind.rpartition(".")[2].lower())
        yield f"has adapter={name}, which {OTHERS[kind]}. {ALLOWED}"
    if identity["labels"] is not None:
        yield (
            "trained a classification head, and heads of several tasks have no sum. Combine runs"
            " that write text"
        )
    for key, names in (
        ("adapter.train_modules", adapter.get("train_modules")),
        ("adapter.modules_to_save", adapter.get("modules_to_save")),
        ("adapter.trainable_token_indices", adapter.get("trainable_token_indices")),
        ("adapter.target_parameters", adapter.get("target_parameters")),
        ("base.add_tokens", config["base"].get("add_tokens")),
    ):
        if names:
            yield (
                f"has {key}={names}: whole modules, rows and experts are not combined, only updates"
                f" of linear layers. Train it without {key}"
            )


def _peft_faults(adapter: dict[str, Any]) -> Iterator[str]:
    entry = config_class(adapter["peft_type"])
    kind = entry.peft_type if entry else adapter["peft_type"]
    if kind != "LORA":
        yield f"has adapter.peft_type={kind}, which PEFT does not combine. {ALLOWED}"
    variants = [
        key
        for key, value in adapter.items()
        if value and (key in VARIANTS or key == "lora_bias" or key.startswith("use_"))
    ]
    for key in variants:
        if key != "use_rslora":
            yield f"has adapter.{key}={adapter[key]}, which is no sum of updates. {ALLOWED}"
    if adapter.get("bias", "none") != "none":
        yield f"has adapter.bias={adapter['bias']}, and biases are not combined. {ALLOWED}"


def differences(first: dict[str, Any], other: dict[str, Any]) -> Iterator[str]:
    """Yield how two runs differ in what their combination has only once."""
    one, two = first["config"]["base"], other["config"]["base"]
    for key, a, b in (
        ("weights", first["identity"]["base"], other["identity"]["base"]),
        ("base.quantization", one.get("quantization"), two.get("quantization")),
    ):
        if a != b:
            names = f"{one.get('path', '?')} ({a}) and {two.get('path', '?')} ({b})"
            yield (
                f"have different bases: {key} differ, {names}. An update fits the weights that it"
                " was trained on: give runs of one base"
            )
    if first["template"] != other["template"]:
        yield (
            f"have different chat templates: {_first_difference(first, other)}. The result has one:"
            " train them with the same task.chat_template"
        )
    ends = first.get("answer_ends") or {}, other.get("answer_ends") or {}
    if all(ends) and ends[0].keys() != ends[1].keys():
        yield (
            f"end answers in different tokens: {', '.join(ends[0])} and {', '.join(ends[1])}. The"
            " result ends in one: train them with the same task.chat_template"
        )


def _template(folder: Path) -> str | None:
    file = folder / run_folder.TEMPLATE
    return file.read_text("utf-8") if file.is_file() else None


def _first_difference(first: dict[str, Any], other: dict[str, Any]) -> str:
    texts = [content["template"] for content in (first, other)]
    if None in texts:
        return "one of them has none"
    lines = [text.splitlines() for text in texts]
    changed = [line for line in difflib.ndiff(*lines) if line[:2] in ("- ", "+ ")]
    return f"the first line that differs is {changed[0][2:].strip()[:80]!r}" if changed else "ends"


def rank(adapter: dict[str, Any]) -> int | None:
    """Return the rank of a run's saved low-rank part, from its config: the largest of its layers,
    or a bound of it. None if it has none."""
    if adapter["_target_"] == "adapters.peft.Peft":
        largest = max([adapter.get("r") or 8, *(adapter.get("rank_pattern") or {}).values()])
        doubled = str(adapter.get("init_lora_weights", "")).startswith(CHANGES_BASE)
        return 2 * largest if doubled else largest
    if adapter.get("schedule") == "spa_only":
        return None
    return adapter.get("rank", adapter.get("max_rank"))


def _ranks_differ(adapter: dict[str, Any]) -> bool:
    """Return whether the layers of a run's low-rank part have several ranks."""
    return "max_rank" in adapter or bool(adapter.get("rank_pattern"))


def check_method(
    runs: list[str], contents: list[dict[str, Any]], method: str, new_rank: int | None
) -> None:
    """Check that a method can combine adapters of these ranks.

    Raises:
        AdapterError: it cannot; the message names one that can.
    """
    ranks = [rank(content["config"]["adapter"]) for content in contents]
    low = {r for r in ranks if r is not None}
    differ = [_ranks_differ(content["config"]["adapter"]) for content in contents]
    if method in SAME_RANK and (len(low) > 1 or any(differ)):
        texts = ", ".join(
            f"{run} has {'several ranks' if several else f'rank {r}'}"
            for run, r, several in zip(runs, ranks, differ, strict=True)
            if r
        )
        raise AdapterError(
            f"method={method} adds the factors, which must have one rank, and {texts}. Use"
            f" method=cat, or method={'svd' if method == 'linear' else f'{method}_svd'}"
        )
    if method.endswith("svd") and not low:
        raise AdapterError(
            f"method={method} cuts a low-rank update, and none of the runs has one: use method="
            f"{'cat' if method == 'svd' else method.removesuffix('_svd')}"
        )
    if new_rank is not None and new_rank > sum(low for low in ranks if low):
        raise AdapterError(
            f"rank={new_rank}: the sum of the runs' updates has rank"
            f" {sum(r for r in ranks if r)} at most. Leave rank out, or use method=cat"
        )
