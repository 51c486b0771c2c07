"""Rates that papers recommend, by method.

A file of conf/adapter/ states its own as comments, and the first row that applies counts:

    # rate 7e-4 if adapter.schedule=wl: of B A in the paper (arXiv 2401.04679)

Conditions are those of trainer.config.conflicts. A file with a `_target_` has rows for configs
whose adapter has the same `_target_`.
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
    for target, rate, conditions, reason in _table():
        fits = target is None or value_of(config, "adapter._target_") == target
        if fits and all(holds(condition, config) for condition in conditions):
            return rate, reason
    return None


@functools.cache
def _table() -> tuple[tuple[str, float, tuple[str, ...], str], ...]:
    """Read all rows: (target, rate, conditions, reason).

    Raises:
        ValueError: a comment opens with `rate` and is no row.
    """
    rows: list[Any] = []
    for path in sorted((schema.CONF / "adapter").glob("*.yaml")):
        text = path.read_text("utf-8")
        matches = list(_ROW.finditer(text))
        if len(matches) != len(re.findall("^# rate ", text, re.M)):
            raise ValueError(f"{path.name}: a comment opens with `# rate` and cannot be read")
        target = (yaml.load(text, Loader=LOADER) or {}).get("_target_")
        for match in matches:
            conditions = tuple(filter(None, (match["conditions"] or "").split(" and ")))
            rows.append((target, float(match["rate"]), conditions, match["reason"]))
    return tuple(rows)
