"""Runs next to each other: which settings differ, what each reached, and their curves."""

from __future__ import annotations

import bisect
import json
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.evaluation.pictures import Curve, picture
from trainer.evaluation.run_summary import NAMES, Summary, points
from trainer.evaluation.tables import Table, duration, mean_sd, size, spread
from trainer.session.report_html import page
from trainer.storage import atomic

COLOURS = (
    "#1f77b4", "#d95f02", "#1b9e77", "#7570b3", "#e7298a", "#66a61e", "#a6761d", "#666666",
    "#17becf", "#bcbd22",
)  # fmt: skip
MISSING = "–"  # noqa: RUF001 -- a setting that a run does not have
CURVES_OF_OFFSETS = "offset"


@dataclass(frozen=True)
class Group:
    """Runs that differ in their seed alone."""

    label: str
    runs: list[Summary]

    def each(self, name: str, *words: str) -> list[Any]:
        """The value of an attribute, or of a method of `words`, of each run."""
        values = [getattr(run, name) for run in self.runs]
        return [value(*words) if callable(value) else value for value in values]

    @property
    def settings(self) -> dict[str, Any]:
        """Choices of groups, and settings, which the runs share."""
        run = self.runs[0]
        own = {k: v for k, v in run.settings.items() if k not in NAMES and _shown_key(k)}
        return own | run.choices


def _shown_key(key: str) -> bool:
    return key.rpartition(".")[2] not in ("_target_", "_partial_")


def grouped(runs: list[Summary]) -> list[Group]:
    """Put runs that differ in their seed alone into one group, in the order of the first ones."""
    groups: dict[str, list[Summary]] = {}
    for run in runs:
        own = {key: value for key, value in run.settings.items() if key not in NAMES}
        key = json.dumps([own, run.choices], sort_keys=True, default=str)
        groups.setdefault(key, []).append(run)
    names = _names(runs)
    labels = [_label([names[id(run)] for run in members]) for members in groups.values()]
    counts = Counter(labels)
    return [
        Group(label if counts[label] == 1 else names[id(members[0])], members)
        for label, members in zip(labels, groups.values(), strict=True)
    ]


def _names(runs: list[Summary]) -> dict[int, str]:
    """Name each run by its folder, and by the one above where that is a number or not enough."""
    counts = Counter(run.folder.resolve().name for run in runs)
    names = {}
    for run in runs:
        place = run.folder.resolve()
        alone = counts[place.name] == 1 and not place.name.isdecimal()
        names[id(run)] = place.name if alone else f"{place.parent.name}/{place.name}"
    return names


def _label(names: list[str]) -> str:
    if len(names) == 1:
        return names[0]
    same = os.path.commonprefix(names)  # noqa: RUF071 -- of characters, as in small-seed0, small-seed1
    prefix = same.rstrip("-_./=").removesuffix("seed").rstrip("-_./=")
    return f"{prefix or names[0]} ×{len(names)}"  # noqa: RUF001


def differing(groups: list[Group]) -> dict[str, list[Any]]:
    """Return the values of each setting that differs, one for each group; `MISSING` where a group
    has none. Settings that only exist because of another choice, such as those of another adapter,
    are left out."""
    settings = [group.settings for group in groups]
    result = {}
    for key in dict.fromkeys(key for each in settings for key in each):
        values = [each.get(key, MISSING) for each in settings]
        texts = {json.dumps(value, sort_keys=True, default=str) for value in values}
        branch = key.partition(".")[0]
        chosen = {json.dumps(each.get(branch), default=str) for each in settings}
        caused = MISSING in values and len(chosen) > 1 and branch != key
        if len(texts) > 1 and not caused:
            result[key] = values
    return result


def settings_table(groups: list[Group]) -> Table | None:
    """The settings that differ, a row for each; None if none does."""
    rows = [[key, *map(_plain, values)] for key, values in differing(groups).items()]
    columns = ["setting", *(group.label for group in groups)]
    return Table(columns, rows, frozenset(range(len(columns)))) if rows else None


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def results_table(groups: list[Group], everything: bool = False) -> Table:
    """Steps, tokens, held-out numbers, time, memory and bytes, a row for each; a column for each
    group of runs, with mean ± sd over its seeds. Without `everything`, numbers of single offsets of
    a draft head are left out."""
    rows = [
        ["runs", *(str(len(group.runs)) for group in groups)],
        ["steps", *(spread(group.each("steps")) for group in groups)],
        ["tokens", *(spread(group.each("last", "tokens")) for group in groups)],
        ["training loss, last", *(mean_sd(group.each("last", "loss")) for group in groups)],
    ]
    names = dict.fromkeys(n for group in groups for run in group.runs for n in run.metrics)
    for name in names:
        if name.startswith(CURVES_OF_OFFSETS) and not everything:
            continue
        for title, attribute in (("before", "first"), ("last", "final"), ("best", "best")):
            cells = [mean_sd(group.each(attribute, name)) for group in groups]
            if any(cells):
                rows.append([f"{name}, {title}", *cells])
    steps = [spread([run.best_row.get("step") for run in group.runs]) for group in groups]
    for title, cells in (
        ("best step", steps),
        ("training time", [_mean(group.each("last", "seconds"), duration) for group in groups]),
        ("tokens/s", [mean_sd(_speeds(group), "{:,.0f}") for group in groups]),
        ("GPU memory", [_mean(group.each("memory"), size) for group in groups]),
        ("bytes of the result", [_mean(group.each("bytes"), size) for group in groups]),
    ):
        if any(cells):
            rows.append([title, *cells])
    return Table(["", *(group.label for group in groups)], rows)


def _mean(values: list[Any], form: Any) -> str:
    numbers = [value for value in values if value is not None]
    return form(sum(numbers) / len(numbers)) if numbers else ""


def _speeds(group: Group) -> list[float | None]:
    """The median speed of each run."""
    speeds: list[float | None] = []
    for run in group.runs:
        each = sorted(value for _, value in points(run.rows["step"], "tokens_per_s"))
        speeds.append(each[len(each) // 2] if each else None)
    return speeds


def write(groups: list[Group], file: Path) -> None:
    """Write the page: both tables and overlaid curves, in one file that needs no network."""
    text = page("compare.jinja").render(
        count=sum(len(group.runs) for group in groups),
        runs=[
            {"label": group.label, "colour": _colour(at), "names": _members(group)}
            for at, group in enumerate(groups)
        ],
        settings=settings_table(groups),
        results=results_table(groups, everything=True),
        plots=plots(groups),
    )
    atomic.write_output(file, text.encode("utf-8", "replace").decode("utf-8"))


def _members(group: Group) -> str:
    names = _names(group.runs)
    return ", ".join(
        names[id(run)] if run.seed is None else f"{names[id(run)]} (seed {run.seed})"
        for run in group.runs
    )


def _colour(at: int) -> str:
    return COLOURS[at % len(COLOURS)]


def plots(groups: list[Group]) -> list[dict[str, str]]:
    """Draw the curves of all runs over each other, the runs of a group in one colour."""
    names = dict.fromkeys(n for group in groups for run in group.runs for n in run.metrics)
    ways: list[tuple[str, str, str, str, bool]] = [
        ("held-out loss", "evaluation", "loss", "o-", False),
        ("training loss", "step", "loss", "-", False),
        ("learning rate", "step", "lr", "-", False),
        ("gradient norm", "step", "grad_norm", "-", True),
        ("tokens per second", "step", "tokens_per_s", "-", False),
        *((name, "evaluation", name, "o-", False) for name in names if name != "loss"),
    ]
    drawn = []
    for title, kind, key, style, logarithmic in ways:
        curves = _curves(groups, style, lambda run, kind=kind, key=key: points(run.rows[kind], key))
        if curves:
            drawn.append(picture(title, curves, logarithmic))
        if title == "held-out loss" and (timed := _curves(groups, style, _timed)):
            drawn.append(picture(f"{title} over time", timed, across="minutes of training"))
    return drawn


def _curves(groups: list[Group], style: str, of: Any) -> list[Curve]:
    curves = [
        Curve(group.label if run is group.runs[0] else "", of(run), style, _colour(at))
        for at, group in enumerate(groups)
        for run in group.runs
    ]
    return [curve for curve in curves if curve.points]


def _timed(run: Summary) -> list[tuple[float, float]]:
    """Return (minutes, held-out loss). An evaluation belongs to the last step before it."""
    seconds = points(run.rows["step"], "seconds")
    if not seconds:
        return []
    known = [step for step, _ in seconds]
    result = []
    for step, loss in points(run.rows["evaluation"], "loss"):
        at = bisect.bisect_right(known, step)
        result.append((seconds[at - 1][1] / 60 if at else 0.0, loss))
    return result


def as_json(groups: list[Group]) -> list[dict[str, Any]]:
    """The groups as plain values, for scripts."""
    return [
        {
            "label": group.label,
            "runs": [str(run.folder) for run in group.runs],
            "seeds": [run.seed for run in group.runs],
            "settings": {k: group.settings.get(k, None) for k in differing(groups)},
            "steps": group.each("steps"),
            "tokens": group.each("last", "tokens"),
            "seconds": group.each("last", "seconds"),
            "memory_bytes": group.each("memory"),
            "result_bytes": group.each("bytes"),
            "best_step": [run.best_row.get("step") for run in group.runs],
            "held_out": {
                name: {
                    way: group.each(attribute, name)
                    for way, attribute in (("before", "first"), ("last", "final"), ("best", "best"))
                }
                for name in dict.fromkeys(n for run in group.runs for n in run.metrics)
            },
        }
        for group in groups
    ]
