"""Model cards: README.md of a result, with the metadata that the Hub reads.

A card is made of the run's record, its journal and the files next to it. It names no folder of
this machine and no secret, and the same run gives the same card.
"""

from __future__ import annotations

import base64
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from trainer.config import files
from trainer.evaluation.pictures import Curve, picture
from trainer.evaluation.run_summary import Summary, points, summary
from trainer.evaluation.tables import Table, duration
from trainer.exporting import card_benchmarks, card_loading
from trainer.exporting.card_metadata import FILE, LARGEST, MARK, Origin, base_text, ours, put, word
from trainer.storage import atomic, door

PICTURE = "loss.svg"
_SPLIT = {"kept?": (int, type(None)), "*": object}
_COUNTS = {
    "data?": {"train?": _SPLIT, "eval?": _SPLIT, "*": object},
    "model?": {"parameters": int, "trainable": (int, type(None)), "*": object},
    "*": object,
}
# formats of draft heads
ENGINES = ("drafter", "speculators", "sglang", "medusa", "gguf_draft")
_TARGETS = {
    "adapter": "stock PEFT",
    "merged": "transformers",
    "drafter": "Graft",
    "mtp": "transformers",
}


def write(
    folder: Path,
    to: str,
    run: Path,
    parity: float | None,
    step: int | None = None,
    base: str | None = None,
) -> None:
    """Write README.md, and the picture that it shows, into a result's folder. A README.md that
    Graft has not written stays as it is.

    Args:
        to: the format of the export; adapter and drafter are those that a run writes itself.
        run: the run folder.
        parity: the distance of the logits that were compared, None if none were.
        step: the checkpoint's step, None for the last.
        base: the base's name on the Hub, by default that of the run if it has one.
    """
    if not ours(folder / FILE):
        return
    kind = "adapter" if to in ("peft", "shira") else to
    source = summary(run)
    origin = Origin.of(source.settings)
    origin = origin if base is None else replace(origin, base=base)
    curves = _curves(source)
    facts = _facts(source, step)
    body = _body(folder, kind, source, origin.base, (facts, bool(curves), _parity(kind, parity)))
    if curves:
        atomic.write_text(
            folder / PICTURE, base64.b64decode(picture("loss", curves)["data"]).decode("utf-8")
        )
    put(folder, _metadata(kind, source, origin), f"\n\n{body}\n")


def refresh(folder: Path, kind: str, run: Path) -> None:
    """Write what lm-eval has measured since into a card that Graft has written."""
    file = folder / FILE
    if not file.is_file() or not ours(file):
        return
    source = summary(run)
    body = files.read_text(file, LARGEST).partition(MARK)[2]
    data = _metadata(kind, source, Origin.of(source.settings))
    put(folder, data, card_benchmarks.replaced(body, source))


def _curves(source: Summary) -> list[Curve]:
    drawn = [
        Curve("training", points(source.rows["step"], "loss")),
        Curve("held out", points(source.rows["evaluation"], "loss"), "o-"),
    ]
    return [curve for curve in drawn if curve.points]


def _body(
    folder: Path, kind: str, source: Summary, base: str | None, parts: tuple[Any, bool, str]
) -> str:
    """Return the text. `parts` are the facts of the training, whether there is a picture, and what
    was compared."""
    facts, drawn, checked = parts
    lines = [
        f"# {word(source.name)}",
        "",
        _first_sentence(kind, source, base),
        "",
        *card_loading.section(folder, kind, base, source),
        "## Held-out numbers",
        "",
        *_numbers(source),
        *(["", f"![loss]({PICTURE})"] if drawn else []),
        "",
        *card_benchmarks.section(source),
        card_benchmarks.NEXT,
        "",
        Table(["", ""], facts, frozenset({0, 1})).markdown().rstrip(),
        "",
        "## Checked",
        "",
        checked,
    ]
    return "\n".join(line.rstrip() for line in lines)


def _first_sentence(kind: str, source: Summary, base: str | None) -> str:
    method = word(source.choices.get("adapter"))
    of = base_text(source.settings, base, source.choices.get("base"))
    if kind == "adapter":
        return f"An adapter ({method}) for {of}, trained with Graft."
    if kind == "gguf_lora":
        return f"An adapter ({method}) for {of} as a GGUF file, trained with Graft."
    if kind in ("merged", "mtp", "gguf"):
        return f"{of} with an adapter ({method}) merged into it, trained with Graft."
    merged = ""
    if source.choices.get("drafter_adapter") == "lora":
        merged = " by a LoRA on an earlier head, which is merged into it here"
    drafter = word(source.choices.get("drafter"))
    return f"A draft head ({drafter}) for {of}, trained with Graft{merged}."


def _metadata(kind: str, source: Summary, origin: Origin) -> ModelCardData:
    labels = source.record["identity"].get("labels")
    task = "text-classification" if labels is not None else "text-generation"
    relation = {"adapter": "adapter", "gguf_lora": "adapter", "merged": "finetune",
                "mtp": "finetune", "gguf": "finetune"}  # fmt: skip
    values = {name: source.final(name) for name in source.metrics if not name.startswith("offset")}
    results = origin.results(task, values, str(source.choices.get("task")))
    library = "gguf" if kind.startswith("gguf") else "transformers"
    library = "peft" if kind == "adapter" else library
    return origin.metadata(
        library,
        task,
        _tags(kind, source),
        relation.get(kind),
        source.name,
        results + card_benchmarks.results(source, task),
    )


def _tags(kind: str, source: Summary) -> list[str]:
    names = [str(source.choices.get("adapter"))] if kind not in ENGINES else []
    if kind == "mtp" or kind in ENGINES:
        names += ["speculative-decoding", str(source.choices.get("drafter"))]
    return names


def _numbers(source: Summary) -> list[str]:
    rows = []
    for name in source.metrics:
        values = (source.first(name), source.final(name), source.best(name))
        rows.append([name, *("" if v is None else f"{v:.4f}" for v in values)])
    if not rows:
        return ["Nothing was held out."]
    best = source.best_row.get("step")
    columns = ["", "before", "after", f"best (step {best})" if best is not None else "best"]
    return [Table(columns, rows).markdown().rstrip()]


def _facts(source: Summary, step: int | None) -> list[list[str]]:
    counts = door.decoration(source.folder / "preflight.json", _COUNTS, {})
    data, model = counts.get("data", {}), counts.get("model", {})
    setting = source.settings.get
    rows = [["method", _method(source, "adapter")]]
    if source.choices.get("drafter") not in (None, "none"):
        rows.append(["draft head", _method(source, "drafter")])
    if source.choices.get("drafter_adapter") == "lora":
        rows.append(["trained of the head", _method(source, "drafter_adapter")])
    if model.get("trainable") is not None:
        share = f"{model['trainable']:,} of {model['parameters']:,}"
        rows.append(["trained parameters", share])
    rows.append(["data", Origin.of(source.settings).data or str(source.choices.get("task"))])
    for split, title in (("train", "rows trained on"), ("eval", "rows held out")):
        if data.get(split, {}).get("kept") is not None:
            rows.append([title, f"{data[split]['kept']:,}"])
    tokens, seconds = source.last("tokens"), source.last("seconds")
    rows += [
        ["steps", f"{source.steps:,}" + (f", this is step {step:,}" if step is not None else "")],
        ["tokens", f"{tokens:,}" if tokens is not None else ""],
        ["batch", f"{setting('batch_size')} × {setting('accumulate')} rows"],  # noqa: RUF001
        ["longest row", f"{setting('max_length') or 'as the base allows'}"],
        ["learning rate", f"{setting('optimizer.lr')}, schedule {source.choices.get('schedule')}"],
        ["precision", str(source.record["identity"].get("precision") or "")],
        ["quantised base", str(setting("base.quantization") or "none")],
        ["seed", str(source.seed)],
        ["training time", duration(seconds)],
        ["versions", _versions(source)],
    ]
    return [[name, word(value)] for name, value in rows if value]


def _method(source: Summary, group: str) -> str:
    """The choice of a group with its settings, without paths and what is unset."""
    own = {
        key.removeprefix(f"{group}."): value
        for key, value in source.settings.items()
        if key.startswith(f"{group}.") and not key.rpartition(".")[2].startswith("_")
    }
    words = [
        f"{key}={value if not isinstance(value, list) else '+'.join(map(str, value))}"
        for key, value in own.items()
        if value not in (None, False, "", [], {}) and "/" not in str(value)
    ]
    return ", ".join([str(source.choices.get(group)), *words])


def _versions(source: Summary) -> str:
    recorded = source.record["starts"][-1].get("versions", {})
    return ", ".join(f"{name} {recorded[name]}" for name in ("torch", "transformers", "peft")
                     if recorded.get(name))  # fmt: skip


def _parity(kind: str, parity: float | None) -> str:
    if parity is None:
        return (
            "No comparison of this folder is recorded: `graft export` writes one that is loaded"
            " back and compared."
        )
    if kind == "drafter":
        return "The folder was loaded back, and every tensor is the trained one."
    if kind == "gguf":
        return (
            "The file was loaded back by transformers and computes what the merged model does with"
            f" weights rounded alike. The rounding moves the logits by {parity:.1e} of their spread"
            " (root mean square)."
        )
    if kind == "gguf_lora":
        return (
            "The file was read back, and each layer's update is that of the merged model, within"
            f" {parity:.1e} of its size."
        )
    who = _TARGETS.get(kind, "code that reads the files as the engine does")
    library = {"stock PEFT": "peft", "transformers": "transformers"}.get(who)
    named = f"{who} {version(library)}" if library else who
    return (
        f"The folder was loaded back by {named}, and its logits in fp32 differ from those of the"
        f" trained model by {parity:.1e} of their spread (root mean square)."
    )
