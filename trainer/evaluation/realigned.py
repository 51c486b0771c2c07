"""Continue a draft head on a fine-tuned target and measure it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

KNOWN: dict[str, Any] = {
    "draft": ...,
    "target.run": ...,
    "name": None,
    "runs": None,
    "dry": "false",
}
# What the new run takes from the one that trained the head, as far as it differs from the files of
# conf/.
TAKEN = ("task", "schedule", "optimizer", "lightning", "callbacks", "logger")
_OWN = ("name", "runs", "resume", "export")  # root settings that are the new run's own
STAGES = ("before fine-tuning", "after fine-tuning, the same head", "after fine-tuning, re-aligned")
MEASURED_AT_ONCE = 16  # held-out rows


def arguments(options: dict[str, Any], more: list[str]) -> tuple[Path, list[str]]:
    """(the folder of the new run, arguments of `python -m trainer`) that continue a head on a
    target.

    Raises:
        ConfigError, FolderError, DrafterError: the head or the target cannot be used, or they do
        not belong together.
    """
    from trainer.assembly.build import instantiate
    from trainer.config import compose, run_name
    from trainer.drafters import io
    from trainer.storage import run_folder

    place = io.folder_of(options["draft"])
    settings, about = io.read(place)
    path, tuned, _ = run_folder.read(options["target.run"])
    io.check(place, instantiate(tuned["config"]["base"]))
    asked = {_key(word) for word in more}
    trained_by = _run_of(place, about)
    given = [] if trained_by is None or "experiment" in asked else _as_there(trained_by, asked)
    name = (
        options["name"]
        or f"{place.parent.name if place.name == 'drafter' else place.name}-{path.name}"
    )
    runs = options["runs"] or str(path.parent)
    compose.register_resolvers()
    run = Path(run_name.run_folder(runs, name, "never"))
    return run, [
        *given,
        *_judged(settings, given, asked),
        "objective=distill",
        "adapter=none",
        "penalty=none",
        *_drafter(settings),
        f"target.run={options['target.run']}",
        f"target.draft={place}",
        f"name={run.name}",
        f"runs={runs}",
        *more,
    ]


def _run_of(place: Path, about: dict[str, Any]) -> dict[str, Any] | None:
    """The record of the run that trained a head, if it is still there."""
    from trainer.storage import run_folder

    for run in (place.parent, Path(str(about.get("run")))):
        try:
            return run_folder.read(str(run))[1]
        except run_folder.FolderError:
            continue
    return None


def _judged(settings: dict[str, Any], given: list[str], asked: set[str]) -> list[str]:
    """What the head is judged by during training, unless it is asked for."""
    if "callbacks" in asked or "callbacks.evaluation=null" in given:
        return []
    monitor = "expected" if settings.get("loss", "labels") != "labels" else "accepted"
    wanted = {
        "callbacks.evaluation.monitor": monitor,
        "callbacks.evaluation.mode": "max",
        "export": "best",
    }
    return (
        []
        if "callbacks.evaluation.monitor" in asked
        else [f"{key}={value}" for key, value in wanted.items() if key not in asked]
    )


def _as_there(record: dict[str, Any], asked: set[str]) -> list[str]:
    """Overrides that make a config as a run's, where it differs from the files of conf/; nothing
    that was `asked` for otherwise."""
    from omegaconf import OmegaConf

    from trainer.config import groups, schema

    settings, choices = record["config"], record["identity"]["choices"]
    given: list[str] = []
    asked = asked | {
        "callbacks.evaluation.monitor",
        "callbacks.evaluation.mode",
        "callbacks.evaluation.generate",
    }
    root: Any = OmegaConf.to_container(OmegaConf.load(schema.CONF / "config.yaml"))
    usual = groups.default_choices()
    for group in TAKEN:
        if group in asked:
            continue  # the file of the group is another one, and the run's values may not fit it
        choice = str(choices.get(group))
        # Hydra does not say which files a list took
        choice = choice if choice in schema.options(group) else usual[group]
        given += [f"{group}={choice}"] if choice != usual[group] else []
        given += _differing(_content(group, choice), settings[group], group, asked)
    plain = {key: value for key, value in root.items() if not isinstance(value, dict | list)}
    own = {key: settings[key] for key in plain if key in settings and key not in _OWN}
    return given + _differing({key: plain[key] for key in own}, own, "", asked)


def _content(group: str, choice: str) -> dict[str, Any]:
    """A file of conf/ with those that it varies."""
    from omegaconf import OmegaConf

    from trainer.config import schema

    own: Any = OmegaConf.to_container(OmegaConf.load(schema.CONF / group / f"{choice}.yaml"))
    found: dict[str, Any] = {}
    for entry in own.pop("defaults", []):
        if isinstance(entry, str) and entry != "_self_":
            found |= _content(group, entry)
    return found | own


def _differing(
    usual: dict[str, Any], node: dict[str, Any], where: str, asked: set[str]
) -> list[str]:
    given = []
    for key, value in node.items():
        place = f"{where}.{key}" if where else key
        if place in asked or (key in usual and usual[key] == value) or key not in usual:
            continue
        if isinstance(value, dict) and isinstance(usual[key], dict) and value:
            given += _differing(usual[key], value, place, asked)
        else:
            given.append(f"{place}={_written(value)}")
    return given


def _written(value: Any) -> str:
    """A value as Hydra's command line takes it."""
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
    """The head's file of conf/drafter, and its settings."""
    from trainer.config import schema

    names = [
        name
        for name in schema.options("drafter")
        if schema.load(f"drafter/{name}").target == settings["_target_"]
    ]
    # Of the files of one method the one with the fewest values to change.
    ways = [
        [f"drafter={name}", *_differing(_content("drafter", name), settings, "drafter", set())]
        for name in names
    ]
    return min(ways, key=len)


def measure(run: Path, draft: Path, batch_size: int) -> list[dict[str, Any]]:
    """What a head finds on the held-out rows of a run, see trainer.drafters.metrics: on the target
    that it was trained for, on the run's target, and the run's own head there. A target that is
    gone is left out, with the reason.

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
    from trainer.training.distill import DraftLoss

    place, content, _ = run_folder.read(str(run))
    config, identity = content["config"], content["identity"]
    base = instantiate(config["base"])
    held_out = load_data(config, base, instantiate(config["task"]), train=False).held_out
    if held_out is None:
        raise DataError(
            f"{run} has no held-out rows to measure on: it had task.eval_fraction=0 and no"
            " task.eval_path"
        )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype, _, _ = compute(identity["precision"], config["base"]["dtype"], False, False)
    before, after = io.read(draft)[1].get("adapter"), identity["target"]
    found = []
    for stage, head, adapter in zip(
        STAGES, (draft, draft, place / "drafter"), (before, after, after), strict=True
    ):
        row: dict[str, Any] = {
            "stage": stage,
            "target": _named(base.path, adapter),
            "head": str(head),
        }
        found.append(row)
        try:
            tuned = None if adapter is None else load_recorded_target(adapter, head.parent)
        except (run_folder.FolderError, CheckpointError) as error:
            row["not_measured"] = str(error)
            continue
        model = base.load(dtype, None, device)
        drafter = io.load(head, model, base.fingerprint)
        model = model if tuned is None else tuned.attach(model)
        loss = DraftLoss(model, config["objective"]["logits_chunk"], drafter, Target(model))
        row |= losses(loss, held_out, batch_size, device)
    return found


def table(rows: list[dict[str, Any]]) -> str:
    """The rows of `measure` as text: accepted tokens of a greedy step, expected ones of a sampled
    step where the head is taught by the target's distributions, and the acceptance of each offset,
    Σ min(p, q) there and else how often its best guess is the row's token."""
    offsets = sorted(
        {int(key[6:].partition("/")[0]) for row in rows for key in row if key.startswith("offset")}
    )
    lines = [
        "| | target | accepted | expected |" + "".join(f" {k} |" for k in offsets),
        "|---|---|" + "---|" * (2 + len(offsets)),
    ]
    for row in rows:
        each = [row.get(f"offset{k}/acceptance", row.get(f"offset{k}/top1")) for k in offsets]
        values = [row.get("accepted"), row.get("expected"), *each]
        shown = " | ".join("" if value is None else f"{value:.3f}" for value in values)
        lines.append(f"| {row['stage']} | {row['target']} | {shown} |")
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
