"""Rates that papers recommend, by method.

A file of conf/adapter/ or conf/drafter/ states its own as comments. The first row that applies
counts:

    # rate 7e-4 if adapter.schedule=wl: of B A in the paper (arXiv 2401.04679)

Conditions are those of trainer.config.conflicts. A file with a `_target_` has rows for configs
whose adapter or drafter has the same `_target_`.
"""

from __future__ import annotations

import functools
import re
from typing import Any

import yaml

from trainer.config import schema
from trainer.config.conflicts import holds, value_of
from trainer.config.limits import LOADER

_ROW = re.compile(
    r"^# rate (?P<rate>[\d.e-]+)(?: if (?P<conditions>\S.*?))?: (?P<reason>.+)$", re.M
)


def recommended(config: dict[str, Any]) -> tuple[float, str] | None:
    """Return the recommended optimizer.lr of a plain config's method, and its source; None if
    conf/ has none."""
    for group, target, rate, conditions, reason in _table():
        fits = target is None or value_of(config, f"{group}._target_") == target
        if fits and all(holds(condition, config) for condition in conditions):
            return rate, reason
    return None


@functools.cache
def _table() -> tuple[tuple[str, str, float, tuple[str, ...], str], ...]:
    """Read all rows: (group, target, rate, conditions, reason).

    Raises:
        ValueError: a comment opens with `rate` and is no row.
    """
    rows: list[Any] = []
    files = [(schema.CONF / group).glob("*.yaml") for group in ("adapter", "drafter")]
    for path in [path for group in files for path in sorted(group)]:
        text = path.read_text("utf-8")
        matches = list(_ROW.finditer(text))
        if len(matches) != len(re.findall("^# rate ", text, re.M)):
            raise ValueError(f"{path.name}: a comment opens with `# rate` and cannot be read")
        target = (yaml.load(text, Loader=LOADER) or {}).get("_target_")
        for match in matches:
            conditions = tuple(filter(None, (match["conditions"] or "").split(" and ")))
            rows.append(
                (path.parent.name, target, float(match["rate"]), conditions, match["reason"])
            )
    return tuple(rows)
