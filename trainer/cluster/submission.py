"""SLURM jobs from a command line: check it, choose resources, make the batch file."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from trainer.cluster.batch_file import script
from trainer.config import compose, schema
from trainer.config.errors import ConfigError, explain
from trainer.config.secrets import redact

_ID = len("-4294967295-4294967295")  # what a job's numbers add to a name
# Options of sbatch that have a setting of their own, or that a run could not go on without.
_TAKEN = {
    "partition": "slurm.partition",
    "p": "slurm.partition",
    "account": "slurm.account",
    "A": "slurm.account",
    "qos": "slurm.qos",
    "q": "slurm.qos",
    "time": "slurm.time",
    "t": "slurm.time",
    "signal": "slurm.signal_before",
    "cpus-per-task": "slurm.cpus_per_task",
    "c": "slurm.cpus_per_task",
    "gpus-per-node": "slurm.gpus",
    "mem": "slurm.memory",
    "constraint": "slurm.constraint",
    "C": "slurm.constraint",
    "exclude": "slurm.exclude",
    "x": "slurm.exclude",
    "mail-user": "slurm.mail",
    "nodes": "lightning.num_nodes",
    "N": "lightning.num_nodes",
    "ntasks": "lightning.devices",
    "n": "lightning.devices",
    "ntasks-per-node": "lightning.devices",
    "job-name": "name",
    "J": "name",
    "array": "--multirun",
    "a": "--multirun",
    "output": "runs",
    "o": "runs",
    "error": "runs",
    "e": "runs",
    "requeue": "requeue",
    "no-requeue": "requeue",
    "open-mode": "resume",
}


def seconds(limit: str) -> float:
    """The seconds of a time limit as sbatch takes it: M, M:S, H:M:S, D-H, D-H:M, D-H:M:S, or
    UNLIMITED.

    Raises:
        ValueError: it is none of these.
    """
    if limit.upper() in ("UNLIMITED", "INFINITE"):
        return float("inf")
    found = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", limit)
    if found is None:
        raise ValueError(limit)
    days, *rest = found.groups()
    numbers = [int(part) for part in rest if part is not None]
    if days is not None:
        units: tuple[int, ...] = (3600, 60, 1)
    else:
        units = {1: (60,), 2: (60, 1), 3: (3600, 60, 1)}[len(numbers)]
    # Days may come without minutes and seconds. A limit of nothing is none.
    return int(days or 0) * 86400 + sum(
        number * unit for number, unit in zip(numbers, units, strict=False)
    ) or float("inf")


def settings(given: dict[str, str], file: str | None) -> dict[str, Any]:
    """The values of conf/slurm.yaml under those of a file and of the command line.

    Raises:
        ConfigError: lists every fault.
    """
    table = schema.load("slurm")
    result: Any = OmegaConf.to_container(OmegaConf.load(schema.CONF / "slurm.yaml"))
    asked: dict[str, Any] = {}
    if file is not None:
        try:
            # As text: YAML reads a limit of 1:30:00 as a number, which would be minutes to SLURM.
            read = yaml.load(Path(file).read_text("utf-8"), Loader=yaml.BaseLoader) or {}
        except (OSError, UnicodeError, yaml.YAMLError) as error:
            raise ConfigError(f"slurm={file} cannot be read: {error}") from None
        if not isinstance(read, dict):
            raise ConfigError(
                f"slurm={file}: a file of KEY: VALUE is expected, with the keys of conf/slurm.yaml"
            )
        asked |= read
    asked |= given
    faults = []
    for key, value in asked.items():
        leaf = table.children.get(key)
        if leaf is None:
            faults.append(
                f"slurm.{key}: there is no such key. {schema.nearest(str(key), table.children)}"
                " (conf/slurm.yaml)"
            )
            continue
        try:
            result[key] = _typed(value, leaf.type)
        except Exception:
            faults.append(f"slurm.{key}={value} cannot be read as {leaf.type}")
    faults += schema.problems(result, table, "slurm")
    if not faults:
        faults += _faults(result)
    if faults:
        raise ConfigError("\n".join(faults))
    return result


def _typed(value: Any, type_: str) -> Any:
    """A value's text as its type has it: node lists and constraints hold characters that Hydra
    would want quoted."""
    if not isinstance(value, str):
        return value
    if type_.startswith("list"):
        read = yaml.load(value, Loader=yaml.BaseLoader)
        return [read] if isinstance(read, str) else read
    if value.lower() in ("null", "~", "") and "null" in type_:
        return None
    return int(value) if "int" in type_ and re.fullmatch(r"-?\d+", value) else value


def _faults(asked: dict[str, Any]) -> Iterator[str]:
    """What the types alone do not tell."""
    for key, value in asked.items():
        lines = value if isinstance(value, list) else [value]
        if any(isinstance(line, str) and not line.isprintable() for line in lines):
            yield f"slurm.{key} holds a line break or another character that cannot be printed"
    if asked["time"] is not None:
        try:
            limit = seconds(asked["time"])
        except ValueError:
            yield (
                f"slurm.time={asked['time']} is no time limit. Write MINUTES, MINUTES:SECONDS,"
                " HOURS:MINUTES:SECONDS, DAYS-HOURS, DAYS-HOURS:MINUTES or"
                " DAYS-HOURS:MINUTES:SECONDS"
            )
        else:
            if asked["signal_before"] >= limit:
                yield (
                    f"slurm.signal_before={asked['signal_before']} seconds leave nothing of"
                    f" slurm.time={asked['time']} ({limit:g} seconds) to train in: ask for more"
                    " time, or for a later signal"
                )
    if asked["memory"] is not None and not re.fullmatch(r"\d+[KMGT]?", asked["memory"]):
        yield (
            f"slurm.memory={asked['memory']} is no memory. Write a number with its unit, as 64G"
            " (without a unit: megabytes)"
        )
    for option in asked["extra"]:
        found = re.match(r"--([a-z][a-z-]*)|-([A-Za-z])", option)
        if found is None:
            yield f"slurm.extra has {option!r}, but holds options of sbatch, as --reservation=NAME"
        elif taken := _TAKEN.get(found.group(1) or found.group(2)):
            yield f"slurm.extra has {option}, which {taken} sets"


def combinations(overrides: list[str], sweep: bool) -> tuple[list[str], list[list[str]]]:
    """(arguments that all tasks share, for each task of the array those of its own; one empty list
    without an array).

    Raises:
        ConfigError: there are several values without --multirun, or nothing that could be told
        apart.
    """
    shared, swept = [], []
    for text in overrides:
        try:
            override = OverridesParser.create().parse_override(text)
        except HydraException as error:
            raise ConfigError(f"{text}: {explain(error)}") from None
        if not override.is_sweep_override():
            shared.append(text)
            continue
        if not sweep:
            raise ConfigError(
                f"{text}: several values need --multirun, which makes an array of jobs of them"
            )
        if _key(text) in ("name", "resume", "runs"):
            raise ConfigError(
                f"{text}: the tasks of an array differ in other things; each is named by its number"
            )
        if not override.is_discrete_sweep():
            raise ConfigError(
                f"{text}: an array has a task for each value, so the values must be listed"
            )
        swept.append(
            [f"{override.get_key_element()}={value}" for value in override.sweep_string_iterator()]
        )
    if sweep and not swept:
        raise ConfigError("--multirun, but no key has several values: write KEY=VALUE1,VALUE2")
    return shared, [list(picked) for picked in itertools.product(*swept)]


def composed(overrides: list[str], folder: str | None) -> dict[str, Any]:
    """The checked config that a task would have, resolved.

    Raises:
        ConfigError and what Hydra raises: it could not be run.
    """
    search = [f"hydra.searchpath=[{_quoted('file://' + folder)}]"] if folder is not None else []
    plain: Any = OmegaConf.to_container(compose.compose([*search, *overrides]), resolve=True)
    return plain  # type: ignore[no-any-return]


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "\\'") + "'"


def _key(override: str) -> str:
    return override.lstrip("+~").partition("=")[0].partition("@")[0]


def resources(plain: dict[str, Any], asked: dict[str, Any]) -> dict[str, Any]:
    """What a config says about nodes and processes: `nodes`, `tasks` and `gpus` of each node,
    `requeue`.

    Raises:
        ConfigError: SLURM cannot be told.
    """
    lightning = plain["lightning"]
    devices = lightning["devices"]
    tasks = (
        len(devices)
        if isinstance(devices, list)
        else int(devices)
        if str(devices).isdecimal()
        else 0
    )
    if tasks < 1:
        raise ConfigError(
            f"lightning.devices={devices}: SLURM has to be told how many processes a node has. Give"
            " a number"
        )
    gpus = asked["gpus"]
    if gpus == "auto":
        if lightning["accelerator"] not in ("cpu", "gpu", "cuda"):
            raise ConfigError(
                f"lightning.accelerator={lightning['accelerator']}: SLURM has to be asked for GPUs."
                " Say lightning=gpu or lightning=cpu, or give their number on a node with"
                " slurm.gpus=N"
            )
        gpus = 0 if lightning["accelerator"] == "cpu" else tasks
    elif lightning["accelerator"] in ("gpu", "cuda") and gpus < tasks:
        raise ConfigError(
            f"slurm.gpus={gpus}, but lightning.devices={devices} needs {tasks} on each node"
        )
    requeue = str(plain.get("requeue", "auto")).lower() != "false"
    return {"nodes": lightning["num_nodes"], "tasks": tasks, "gpus": gpus, "requeue": requeue}


def arguments(argv: list[str]) -> tuple[dict[str, str], dict[str, str], list[str], str | None]:
    """(`slurm` and `dry`, slurm.KEY: VALUE, what is the trainer's, the folder of --config-dir) of a
    command line.

    Raises:
        ConfigError: a word is not an argument.
    """
    options, given, overrides, folder = {"dry": "false"}, {}, [], None
    words = iter(argv)
    for word in words:
        key, equals, value = word.partition("=")
        if key in ("--config-dir", "-cd"):
            folder = str(Path(value if equals else next(words, "")).absolute())
            if not Path(folder).is_dir():
                raise ConfigError(f"{word}: {folder} is no folder")
        elif not equals and not word.startswith("~"):
            raise ConfigError(f"{word}: not an argument. Arguments are written key=value.")
        elif key in ("dry", "slurm"):
            options[key] = value
        elif key.lstrip("+").startswith("slurm."):
            given[key.lstrip("+").removeprefix("slurm.")] = value
        elif re.match(r"\W*hydra\b", key):
            raise ConfigError(f"{word}: the job has its folder and its launcher from SLURM")
        else:
            overrides.append(word)
    if options["dry"] not in ("true", "false"):
        raise ConfigError(f"dry={options['dry']}: true or false")
    return options, given, overrides, folder


@dataclass(frozen=True)
class Job:
    """What is to be queued: `run` is the run's folder, without the job's number where it is
    `numbered`."""

    script: str
    name: str
    logs: Path
    run: str
    numbered: bool
    array: bool
    dry: bool


def _needs(
    shared: list[str], own: list[list[str]], folder: str | None, asked: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the resources that each task of an array needs, and the config of the last task.

    Raises:
        ConfigError: a task cannot run, or tasks need different resources.
    """
    needs, plain, task = None, {}, ""
    for words in own:
        try:
            plain = composed([*shared, *words], folder)
            these = resources(plain, asked)
        except (
            HydraException,
            OmegaConfBaseException,
            yaml.YAMLError,
            OSError,
            ValueError,
        ) as error:
            raise ConfigError((f"{' '.join(words)}: " if words else "") + explain(error)) from None
        if needs is not None and these != needs:
            raise ConfigError(
                f"the tasks of an array ask for the same nodes and GPUs, but {task} for {needs} and"
                f" {' '.join(words)} for {these}"
            )
        needs, task = these, " ".join(words)
    assert needs is not None
    return needs, plain


def prepared(argv: list[str], sweep: bool) -> Job:
    """The job that a command line asks for.

    Raises:
        ConfigError: it could not run.
    """
    options, given, overrides, folder = arguments(argv)
    asked = settings(given, options.get("slurm"))
    shared, own = combinations(overrides, sweep)
    if asked["parallel"] is not None and not sweep:
        raise ConfigError(
            f"slurm.parallel={asked['parallel']} is for arrays, which --multirun makes"
        )
    resumed = next(
        (word.partition("=")[2] for word in reversed(shared) if _key(word) == "resume"), "auto"
    )
    if resumed == "never":
        raise ConfigError(
            "resume=never: a job that is started again goes on with its run. Leave it out"
        )
    if resumed == "auto":  # as the batch file says it
        shared = [*(word for word in shared if _key(word) != "resume"), "resume=auto"]
    needs, plain = _needs(shared, own, folder, asked)
    name, runs = str(plain["name"]), Path(plain["runs"])
    if resumed == "auto":
        if len(name) + _ID > 100:
            raise ConfigError(
                f"name={name}: the job's numbers are added to it, so it has at most {100 - _ID}"
                " characters"
            )
        shared = [word for word in shared if _key(word) not in ("name", "resume")]
    logs = (runs / "slurm").absolute()
    text = script(
        name, logs, asked, needs, [*([f"--config-dir={folder}"] if folder else []), *shared], own
    )
    if redact(text) != text:
        raise ConfigError(
            "the script would hold what looks like a secret. Export it instead: jobs are given the"
            " environment"
        )
    run = str(runs / name) if resumed == "auto" else resumed
    return Job(text, name, logs, run, resumed == "auto", sweep, options["dry"] == "true")
