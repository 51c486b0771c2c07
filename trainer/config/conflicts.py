"""Settings that are right one by one and wrong together, refused before torch is imported.

A method states its exclusions in its own file of conf/, as comments that open with `not with`:

    # not with optimizer._target_!=torch.optim.AdamW: adapter=spiel keeps an age for each entry,
    #   which other optimisers do not: set optimizer=adamw

Conditions stand between `not with` and the first `: `, joined by ` and `. The message follows, with
`{dotted.key}` for a value of the config. It ends in the fix. A file with a `_target_` has rows for
configs whose group has the same `_target_`; in other files the conditions alone decide.

    key          set: not null, false, 0 or empty    key=a|b*   one of these, as fnmatch reads them
    !key         not set                             key!=a|b*  none of these
    key<2        a number below it                   @fact      a function of FACTS

Conflicts that need arithmetic, such as a warm-up and a cooldown that overlap, are in
trainer.config.lengths.
"""

from __future__ import annotations

import functools
import operator
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import yaml

from trainer.config import schema
from trainer.config.limits import LOADER

Config = dict[str, Any]
_ROW = re.compile(r"^# not with (?P<conditions>.+?): (?P<message>.+)$")
_CONDITION = re.compile(r"^(?P<no>!?)(?P<key>@?[\w.]+)(?:(?P<sign>!=|=|<)(?P<value>\S+))?$")
_FIELD = re.compile(r"\{([\w.]+)\}")


@dataclass(frozen=True)
class Conflict:
    """One row: `file` of conf/ without its ending, the `_target_` there, conditions, message."""

    file: str
    target: str | None
    conditions: tuple[str, ...]
    message: str

    def applies(self, config: Config) -> bool:
        """Return whether all conditions hold for a plain config."""
        group = self.file.partition("/")[0]
        if self.target is not None and value_of(config, f"{group}._target_") != self.target:
            return False
        return all(holds(condition, config) for condition in self.conditions)

    def explain(self, config: Config) -> str:
        """Return the message with the config's values."""
        return _FIELD.sub(lambda match: as_yaml(value_of(config, match[1])), self.message)


def conflicts(config: Config) -> Iterator[str]:
    """Yield the message of each row that applies to a plain config, which the schema accepts."""
    for row in table():
        if row.applies(config):
            yield row.explain(config)


@functools.cache
def table() -> tuple[Conflict, ...]:
    """Read all rows of conf/.

    Raises:
        ValueError: a comment opens with `not with` and is no row.
    """
    rows = []
    for path in sorted(schema.CONF.rglob("*.yaml")):
        text = path.read_text("utf-8")
        if "# not with " not in text:
            continue
        content = yaml.load(text, Loader=LOADER) or {}
        file = path.relative_to(schema.CONF).with_suffix("").as_posix()
        target = content.get("_target_") if "/" in file else None
        for line in _joined(text):
            row = _ROW.match(line)
            conditions = tuple(row["conditions"].split(" and ")) if row else ()
            if row is None or not all(_CONDITION.match(part) for part in conditions):
                raise ValueError(f"conf/{file}.yaml: no row of conflicts: {line}")
            rows.append(Conflict(file, target, conditions, row["message"]))
    return tuple(rows)


def _joined(text: str) -> list[str]:
    """Join each comment that opens with `not with` to the indented comments that continue it."""
    rows: list[str] = []
    continues = False
    for line in text.splitlines():
        if line.startswith("# not with "):
            rows.append(line)
            continues = True
        elif continues and line.startswith("#   "):
            rows[-1] += " " + line[1:].strip()
        else:
            continues = False
    return rows


def holds(condition: str, config: Config) -> bool:
    """Return whether one condition holds; see the module's text."""
    match = _CONDITION.match(condition)
    assert match is not None
    negated, key, sign, expected = match.group("no", "key", "sign", "value")
    if key.startswith("@"):
        return FACTS[key[1:]](config) != bool(negated)
    value = value_of(config, key)
    if sign is None:
        return bool(value) != bool(negated)
    if sign == "<":
        return isinstance(value, int | float) and operator.lt(value, float(expected))
    matches = any(fnmatchcase(as_yaml(value), pattern) for pattern in expected.split("|"))
    return matches == (sign == "=")


def value_of(config: Config, key: str) -> Any:
    """Return the value at a dotted key; None if a name in it is missing."""
    value: Any = config
    for name in key.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return value


def as_yaml(value: Any) -> str:
    """Format a value as YAML writes it."""
    words = {None: "null", True: "true", False: "false"}
    return words[value] if value is None or isinstance(value, bool) else str(value)


def trains_adapter(config: Config) -> bool:
    """Return whether an adapter, or all of the base, is trained."""
    return bool(config["adapter"]["_target_"] != "adapters.full.Nothing")


def several_processes(config: Config) -> bool:
    """Return whether conf/lightning's settings request several processes. devices=auto is not
    known."""
    lightning = config["lightning"]
    devices = lightning["devices"]
    if isinstance(devices, str):
        return devices not in ("1", "auto") or lightning["num_nodes"] > 1
    count = len(devices) if isinstance(devices, list) else devices
    return lightning["num_nodes"] > 1 or count > 1


def schedule_free(config: Config) -> bool:
    """Return whether a plain config's optimiser is one of the package schedulefree."""
    return bool(config["optimizer"]["_target_"].startswith("schedulefree."))


FACTS: dict[str, Callable[[Config], bool]] = {
    "trains_adapter": trains_adapter,
    "trains": lambda config: trains_adapter(config) or bool(config.get("drafter")),
    "several_processes": several_processes,
    "schedule_free": schedule_free,
}
