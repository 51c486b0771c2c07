"""A study's file, read and checked.

    name: viggo                     names the study and its folder, RUNS/NAME
    overrides: [base=hf, ...]       settings of all runs
    data:
      viggo:
        overrides: [task=viggo]     settings of the runs on this data
        test: viggo_test.jsonl      rows for the table; without it those of validation
        generate: 100               answers that are generated to them and graded
    methods:
      lora: [adapter=lora]          settings of a method; or with further keys:
      rosa: {overrides: [adapter=rosa], share: 0.5, rates: [7e-4]}
    parameters: 4_900_000           of each method; ranks and densities are solved for it
    rates: [1e-4, 3e-4, 1e-3]       of optimizer.lr
    seeds: [0, 1, 2]

Further keys are in KEYS, with their meaning.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from trainer.config import limits
from trainer.config.errors import ConfigError

PRESETS = Path(__file__).with_name("presets")
# key -> (types, default, meaning)
KEYS: dict[str, tuple[tuple[type, ...], Any, str]] = {
    "name": ((str,), None, "names the study and its folder, RUNS/NAME"),
    "runs": ((str,), "runs", "where the folders of studies are made"),
    "folder": ((str, type(None)), None, "replaces {folder} in overrides and test"),
    "overrides": ((list,), [], "settings of all runs"),
    "data": ((dict,), None, "the data sets, by name"),
    "methods": ((dict,), None, "the methods, by name"),
    "parameters": ((int, type(None)), None, "trained parameters of each method; null: as set"),
    "rates": ((list,), None, "values of optimizer.lr, the same for all methods"),
    "widen": ((int,), 4, "further rates that a search may try while the best is at an edge"),
    "search": ((dict, type(None)), None, "overrides of shorter runs for the search, and its seed"),
    "seeds": ((list,), [0], "seeds of the runs with the chosen rate"),
    "choose": ((str,), "loss", "the metric on validation rows that chooses the rate"),
    "mode": ((str,), "min", "min or max: whether the metric is better when lower or higher"),
    "baseline": ((str, type(None)), None, "the method others are compared with; null: the first"),
    "keep": ((bool,), True, "keep the checkpoints of finished runs"),
}
DATA_KEYS: dict[str, tuple[tuple[type, ...], Any, str]] = {
    "overrides": ((list,), [], "settings of the runs on this data"),
    "test": ((str, list, type(None)), None, "rows for the table: a file, or settings of the task"),
    "generate": ((int,), 0, "answers that are generated to them and graded"),
    "max_new_tokens": ((int,), 128, "of a generated answer"),
    "batch_size": ((int,), 16, "rows at once when they are evaluated"),
}
METHOD_KEYS: dict[str, tuple[tuple[type, ...], Any, str]] = {
    "overrides": ((list,), [], "settings of the method"),
    "share": (
        (float, int, type(None)),
        None,
        "of the parameters that are of low rank, of methods with both; null: a half",
    ),
    "solve": ((bool,), True, "whether its rank or density is solved for `parameters`"),
    "rates": ((list, type(None)), None, "its own rates"),
}
SEARCH_KEYS: dict[str, tuple[tuple[type, ...], Any, str]] = {
    "overrides": ((list,), [], "settings of the search's runs, as max_steps=100"),
    "seed": ((int, type(None)), None, "of the search's runs; null: the first"),
}
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.]*")
_OURS = ("name", "runs", "seed", "resume", "optimizer.lr")  # what the study sets in each run


@dataclass(frozen=True)
class Data:
    """A data set of a study."""

    overrides: list[str]
    test: list[str]  # settings of the task, as task.eval_path=FILE; empty for none
    generate: int
    max_new_tokens: int
    batch_size: int


@dataclass(frozen=True)
class Method:
    """A method of a study."""

    overrides: list[str]
    share: float | None  # of the parameters that are of low rank; a half for None
    solve: bool
    rates: list[float]


@dataclass(frozen=True)
class Study:
    """A study, as its file says."""

    name: str
    runs: str
    overrides: list[str]
    data: dict[str, Data]
    methods: dict[str, Method]
    parameters: int | None
    widen: int
    search: list[str]  # overrides of the search's runs; empty if they are runs of the study
    search_seed: int
    seeds: list[int]
    choose: str
    mode: str
    baseline: str
    keep: bool
    solved: dict[str, list[str]] = field(default_factory=dict)  # overrides, by method
    counts: dict[str, int | None] = field(default_factory=dict)  # trained parameters, by method

    @property
    def folder(self) -> Path:
        """The study's folder."""
        return Path(self.runs) / self.name


def read(file: str, changes: dict[str, Any], overrides: list[str]) -> Study:
    """Read a study's file, or a preset by its name. `changes` replace keys, and `overrides` follow
    those of the file.

    Raises:
        ConfigError: lists every fault.
    """
    content = _load(file) | changes
    faults = list(_faults(content, KEYS, ""))
    if not faults:
        faults = list(_nested_faults(content))
    if not faults:
        faults = list(_value_faults(content))
    if faults:
        raise ConfigError("\n".join(f"{file}: {fault}" for fault in faults))
    full = {key: content.get(key, default) for key, (_, default, _) in KEYS.items()}
    search = full["search"] or {}
    rates = [float(rate) for rate in full["rates"] or []]

    def words(values: list[str]) -> list[str]:
        return [word.replace("{folder}", str(full["folder"])) for word in values]

    return Study(
        full["name"],
        full["runs"],
        [*words(full["overrides"]), *overrides],
        {name: _data(node, words) for name, node in full["data"].items()},
        {name: _method(node, words, rates) for name, node in full["methods"].items()},
        full["parameters"],
        full["widen"],
        words(search.get("overrides", [])),
        full["seeds"][0] if search.get("seed") is None else search["seed"],
        full["seeds"],
        full["choose"],
        full["mode"],
        full["baseline"] or next(iter(full["methods"])),
        full["keep"],
    )


def presets() -> list[str]:
    """Return the names of the studies that Graft has."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def file_fault(file: str) -> str | None:
    """Say what is wrong with the name of a study's file, if anything is."""
    if Path(file).is_file() or file in presets():
        return None
    close = difflib.get_close_matches(file, presets(), n=1, cutoff=0.6)
    hint = f"did you mean {close[0]}?" if close else f"or one of {', '.join(presets())}"
    return f"there is no such file, {hint}"


def _load(file: str) -> dict[str, Any]:
    path = Path(file) if Path(file).is_file() else PRESETS / f"{file}.yaml"
    try:
        content = limits.load_yaml(path, unique=True)
    except (OSError, UnicodeDecodeError, limits.LimitExceeded, yaml.YAMLError) as error:
        raise ConfigError(f"{file} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{file}: expected a mapping with the keys {', '.join(KEYS)}")
    return content


def _faults(
    node: dict[str, Any], keys: dict[str, tuple[tuple[type, ...], Any, str]], where: str
) -> Iterator[str]:
    for key in node:
        if key not in keys:
            close = difflib.get_close_matches(str(key), keys, n=1, cutoff=0.6)
            hint = f"did you mean {close[0]}?" if close else f"known: {', '.join(keys)}"
            yield f"{where}{key}: there is no such key; {hint}"
    for key, (types, default, meaning) in keys.items():
        value = node.get(key, default)
        if key not in node and default is None and type(None) not in types:
            if key != "rates":
                yield f"{where}{key} is missing: {meaning}"
        elif not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            names = " or ".join("null" if t is type(None) else t.__name__ for t in types)
            yield f"{where}{key} is {value!r}, expected {names}: {meaning}"


def _nested_faults(content: dict[str, Any]) -> Iterator[str]:
    for group, keys in (("data", DATA_KEYS), ("methods", METHOD_KEYS)):
        if not content[group]:
            yield f"{group} is empty: name one at least"
        for name, node in content[group].items():
            if not _NAME.fullmatch(str(name)):
                yield f"{group}.{name}: a name has letters, digits, dots and underscores"
            if isinstance(node, list):
                node = {"overrides": node}
            if not isinstance(node, dict):
                yield f"{group}.{name} is {node!r}, expected a list of settings, or a mapping"
                continue
            yield from _faults(node, keys, f"{group}.{name}.")
    if content.get("search"):
        yield from _faults(content["search"], SEARCH_KEYS, "search.")


def _value_faults(content: dict[str, Any]) -> Iterator[str]:
    if not _NAME.fullmatch(content["name"]):
        yield f"name is {content['name']!r}: a name has letters, digits, dots and underscores"
    seeds = content.get("seeds", [0])
    if not seeds or not all(type(seed) is int and seed >= 0 for seed in seeds):
        yield f"seeds is {seeds!r}, expected whole numbers from 0 on, as [0, 1, 2]"
    elif len(set(seeds)) < len(seeds):
        yield f"seeds is {seeds!r}: a seed occurs twice"
    if content.get("mode", "min") not in ("min", "max"):
        yield f"mode is {content['mode']!r}, expected min or max"
    if content.get("parameters") is not None and content["parameters"] < 1:
        yield f"parameters is {content['parameters']}, expected 1 or more"
    if content.get("widen", 0) < 0:
        yield f"widen is {content['widen']}, expected 0 or more"
    for name, node in content["data"].items():
        for key, least in (("generate", 0), ("max_new_tokens", 1), ("batch_size", 1)):
            if isinstance(node, dict) and node.get(key, least) < least:
                yield f"data.{name}.{key} is {node[key]}, expected {least} or more"
    baseline = content.get("baseline")
    if baseline is not None and baseline not in content["methods"]:
        yield f"baseline is {baseline}, which is none of methods: {', '.join(content['methods'])}"
    for name, node in content["methods"].items():
        own = node.get("rates") if isinstance(node, dict) else None
        rates = own or content.get("rates") or []
        if not rates:
            yield f"methods.{name} has no rates: set rates, or rates of its own"
        for rate in rates:
            if isinstance(rate, bool) or not _is_rate(rate):
                yield f"methods.{name}: the rate {rate!r} is no number above 0"
        share = node.get("share") if isinstance(node, dict) else None
        if share is not None and not 0 < share < 1:
            yield f"methods.{name}.share is {share}, expected above 0 and below 1"
    yield from _word_faults(content)


def _is_rate(value: Any) -> bool:
    try:
        return 0 < float(value) < float("inf")
    except (TypeError, ValueError):
        return False


def _word_faults(content: dict[str, Any]) -> Iterator[str]:
    places = {"overrides": content.get("overrides", [])}
    for group in ("data", "methods"):
        for name, node in content[group].items():
            words = node if isinstance(node, list) else node.get("overrides", [])
            places[f"{group}.{name}"] = words
            if group == "data" and isinstance(node, dict):
                places[f"data.{name}.test"] = _test_words(node.get("test"))
    places["search.overrides"] = (content.get("search") or {}).get("overrides", [])
    for place, words in places.items():
        for word in words:
            if not isinstance(word, str) or "=" not in word:
                yield f"{place} has {word!r}, expected KEY=VALUE, as max_steps=100"
                continue
            key = word.lstrip("+").partition("=")[0]
            if key in _OURS:
                yield f"{place} has {word}: the study sets {key} in each run"
            if "{folder}" in word and content.get("folder") is None:
                yield f"{place} has {word}: set folder, or study.folder=FOLDER on the command line"


def _data(node: Any, words: Any) -> Data:
    node = {"overrides": node} if isinstance(node, list) else node
    full = {key: node.get(key, default) for key, (_, default, _) in DATA_KEYS.items()}
    test = words(_test_words(full["test"]))
    return Data(**full | {"overrides": words(full["overrides"]), "test": test})


def _test_words(test: Any) -> list[str]:
    if isinstance(test, str):
        return [f"task.eval_path={test}"]
    return list(test or [])


def _method(node: Any, words: Any, rates: list[float]) -> Method:
    node = {"overrides": node} if isinstance(node, list) else node
    full = {key: node.get(key, default) for key, (_, default, _) in METHOD_KEYS.items()}
    own = [float(rate) for rate in full["rates"]] if full["rates"] else rates
    share = None if full["share"] is None else float(full["share"])
    return Method(words(full["overrides"]), share, full["solve"], sorted(set(own)))
