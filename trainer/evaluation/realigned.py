"""A draft head that is trained further on a fine-tuned target, and its measurement."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

# Groups that the new run copies from the run that trained the head, where they differ from the
# files of conf/.
COPIED = ("task", "schedule", "optimizer", "lightning", "callbacks", "logger")
_OWN = ("name", "runs", "resume", "export")  # root settings that are not copied
STAGES = ("before fine-tuning", "after fine-tuning, the same head", "after fine-tuning, re-aligned")
MEASURED_AT_ONCE = 16  # held-out rows


def arguments(
    draft: str, target_run: str, name: str | None, runs: str | None, more: list[str]
) -> tuple[Path, list[str]]:
    """Return (the folder of the new run, arguments of `graft`) that continue a head on
    a target.

    Raises:
        ConfigError, FolderError, DrafterError: the head or the target cannot be used, they do not
        fit each other, or the new run's settings cannot be used.
    """
    from trainer.assembly.build import instantiate
    from trainer.config import compose, run_name
    from trainer.drafters import io
    from trainer.storage import run_folder

    head = io.folder_of(draft)
    settings, trained_for = io.read(head)
    path, tuned, _ = run_folder.read(target_run)
    io.check(head, instantiate(tuned["config"]["base"]))
    requested = {_key(word) for word in more}
    trained_by = _run_of(head, trained_for)
    copied = (
        [] if trained_by is None or "experiment" in requested else _copied(trained_by, requested)
    )
    name = name or f"{head.parent.name if head.name == 'drafter' else head.name}-{path.name}"
    runs = runs or str(path.parent)
    compose.register_resolvers()
    run = Path(run_name.run_folder(runs, name, "never"))
    words = [
        *copied,
        *_monitor(settings, copied, requested),
        "objective=distill",
        "adapter=none",
        "penalty=none",
        *_drafter(settings),
        f"target.run={target_run}",
        f"target.draft={head}",
        f"name={run.name}",
        f"runs={runs}",
        *more,
    ]
    _check(words)
    return run, words


def _check(words: list[str]) -> None:
    """Compose the new run's config, and put its LoRA on the head's shapes, before anything starts.

    Raises:
        ConfigError: the settings cannot be used.
        DrafterError: the head has no layers for a LoRA.
    """
    from omegaconf import OmegaConf

    from trainer.assembly import start_heads
    from trainer.assembly.build import instantiate
    from trainer.config import compose
    from trainer.config.errors import ConfigError, explain

    try:
        config: Any = OmegaConf.to_container(compose.compose(words), resolve=True)
    except Exception as error:  # a ConfigError, or Hydra's own: an unknown group or key
        raise ConfigError(explain(error)) from None
    if config["drafter_adapter"]:
        start_heads.make(config, instantiate(config["base"]).skeleton(), None)


def _run_of(head: Path, trained_for: dict[str, Any]) -> dict[str, Any] | None:
    """Return the record of the run that trained a head, if it still exists."""
    from trainer.storage import run_folder

    for run in (head.parent, Path(str(trained_for.get("run")))):
        try:
            return run_folder.read(str(run))[1]
        except run_folder.FolderError:
            continue
    return None


def _monitor(settings: dict[str, Any], copied: list[str], requested: set[str]) -> list[str]:
    """Return overrides for the metric that selects the best checkpoint, unless one is requested."""
    if "callbacks" in requested or "callbacks.evaluation=null" in copied:
        return []
    monitor = "expected" if settings.get("loss", "labels") != "labels" else "accepted"
    overrides = {
        "callbacks.evaluation.monitor": monitor,
        "callbacks.evaluation.mode": "max",
        "export": "best",
    }
    return (
        []
        if "callbacks.evaluation.monitor" in requested
        else [f"{key}={value}" for key, value in overrides.items() if key not in requested]
    )


def _copied(record: dict[str, Any], requested: set[str]) -> list[str]:
    """Return overrides that copy a run's config where it differs from the files of conf/, without
    what is `requested` otherwise."""
    from omegaconf import OmegaConf

    from trainer.config import groups, schema

    settings, choices = record["config"], record["identity"]["choices"]
    overrides: list[str] = []
    requested = requested | {
        "callbacks.evaluation.monitor",
        "callbacks.evaluation.mode",
        "callbacks.evaluation.generate",
    }
    root: Any = OmegaConf.to_container(OmegaConf.load(schema.CONF / "config.yaml"))
    usual = groups.default_choices()
    for group in COPIED:
        if group in requested:
            continue  # the run's values may not fit another file of the group
        choice = str(choices.get(group))
        # Hydra does not record which files a list contains
        choice = choice if choice in schema.options(group) else usual[group]
        overrides += [f"{group}={choice}"] if choice != usual[group] else []
        overrides += _differing(_content(group, choice), settings[group], group, requested)
    plain = {key: value for key, value in root.items() if not isinstance(value, dict | list)}
    recorded = {key: settings[key] for key in plain if key in settings and key not in _OWN}
    return overrides + _differing({key: plain[key] for key in recorded}, recorded, "", requested)


def _content(group: str, choice: str) -> dict[str, Any]:
    """Return the content of a file of conf/, including the files in its defaults list."""
    from omegaconf import OmegaConf

    from trainer.config import schema

    content: Any = OmegaConf.to_container(OmegaConf.load(schema.CONF / group / f"{choice}.yaml"))
    merged: dict[str, Any] = {}
    for entry in content.pop("defaults", []):
        if isinstance(entry, str) and entry != "_self_":
            merged |= _content(group, entry)
    return merged | content


def _differing(
    defaults: dict[str, Any], node: dict[str, Any], prefix: str, requested: set[str]
) -> list[str]:
    """Return overrides of the values that differ from the defaults."""
    overrides = []
    for name, value in node.items():
        key = f"{prefix}.{name}" if prefix else name
        if key in requested or name not in defaults or defaults[name] == value:
            continue
        if isinstance(value, dict) and isinstance(defaults[name], dict) and value:
            overrides += _differing(defaults[name], value, key, requested)
        else:
            overrides.append(f"{key}={_written(value)}")
    return overrides


def _written(value: Any) -> str:
    """Return a value in the syntax of Hydra's command line."""
    if isinstance(value, dict):
        return (
            "{"
            + ",".join(f"{json.dumps(str(key))}:{_written(item)}" for key, item in value.items())
            + "}"
        )
    if isinstance(value, list):
        return "[" + ",".join(map(_written, value)) + "]"
    return json.dumps(value, ensure_ascii=False)


def _drafter(settings: dict[str, Any]) -> list[str]:
    """Return overrides for the head's file of conf/drafter and its settings."""
    from trainer.config import schema

    names = [
        name
        for name in schema.options("drafter")
        if schema.load(f"drafter/{name}").target == settings["_target_"]
    ]
    # Several files may be of one method: use the one with the fewest values to change.
    choices = [
        [f"drafter={name}", *_differing(_content("drafter", name), settings, "drafter", set())]
        for name in names
    ]
    return min(choices, key=len)


def measure(run: Path, draft: Path, batch_size: int) -> list[dict[str, Any]]:
    """Evaluate a head on the held-out rows of a run, see trainer.drafters.metrics: on the target
    that it was trained for, on the run's target, and the run's own head there. A target that no
    longer exists is left out, with the reason.

    Raises:
        FolderError, DrafterError, DataError: the run or the head cannot be read, or there are no
        held-out rows.
    """
    import torch

    from tasks.reading import DataError
    from trainer.assembly.build import instantiate
    from trainer.assembly.rows import load_data
    from trainer.assembly.trained import load_recorded_target
    from trainer.drafters import Target, io
    from trainer.evaluation.loss import losses
    from trainer.models.precision import compute
    from trainer.storage import run_folder
    from trainer.storage.checkpoints import CheckpointError
    from trainer.storage.progress import Progress
    from trainer.training.distill import DraftLoss

    folder, content, _ = run_folder.read(str(run))
    config, identity = content["config"], content["identity"]
    base = instantiate(config["base"])
    held_out = load_data(config, base, instantiate(config["task"]), train=False).held_out
    if held_out is None:
        raise DataError(
            f"{run} has no held-out rows to measure on: it had task.eval_fraction=0 and no"
            " task.eval_path. Give rows with task.eval_path=FILE"
        )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype, _, _ = compute(identity["precision"], config["base"]["dtype"], False, False)
    before, after = io.read(draft)[1].get("adapter"), identity["target"]
    rows = []
    for stage, head, adapter in zip(
        STAGES, (draft, draft, folder / "drafter"), (before, after, after), strict=True
    ):
        row: dict[str, Any] = {
            "stage": stage,
            "target": _named(base.path, adapter),
            "head": str(head),
        }
        rows.append(row)
        try:
            tuned = None if adapter is None else load_recorded_target(adapter, head.parent)
        except (run_folder.FolderError, CheckpointError) as error:
            row["not_measured"] = str(error)
            continue
        with Progress(f"loading {base.path}"):
            model = base.load(dtype, None, device)
        drafter = io.load(head, model, base.fingerprint)
        model = model if tuned is None else tuned.attach(model)
        loss = DraftLoss(model, config["objective"]["logits_chunk"], drafter, Target(model))
        row |= losses(loss, held_out, batch_size, device)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows of `measure` as a Markdown table: accepted tokens of a greedy step, expected
    tokens of a sampled step if the head learned the target's distributions, and the acceptance of
    each offset: Σ min(p, q) there, otherwise how often its best guess is the row's token."""
    offsets = sorted(
        {int(key[6:].partition("/")[0]) for row in rows for key in row if key.startswith("offset")}
    )
    lines = [
        "| | target | accepted | expected |" + "".join(f" {k} |" for k in offsets),
        "|---|---|" + "---|" * (2 + len(offsets)),
    ]
    for row in rows:
        by_offset = [row.get(f"offset{k}/acceptance", row.get(f"offset{k}/top1")) for k in offsets]
        values = [row.get("accepted"), row.get("expected"), *by_offset]
        cells = " | ".join("" if value is None else f"{value:.3f}" for value in values)
        lines.append(f"| {row['stage']} | {row['target']} | {cells} |")
    lines += [
        f"\n{row['stage']}: not measured, since {row['not_measured']}"
        for row in rows
        if "not_measured" in row
    ]
    return "\n".join(lines) + "\n"


def _named(base: str, adapter: dict[str, Any] | None) -> str:
    name = Path(base).name
    return name if adapter is None else f"{name} + {Path(adapter['run']).name}@{adapter['step']}"


def _key(override: str) -> str:
    return re.sub(r"^[+~]*", "", override).partition("=")[0].partition("@")[0]
