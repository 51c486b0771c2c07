"""SLURM jobs from a command line: check the config, choose resources, write the batch file."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from trainer.cluster.batch_file import script
from trainer.config import compose, paths, schema
from trainer.config.errors import ConfigError, explain
from trainer.config.secrets import redact

_ID = len("-4294967295-4294967295")  # the longest suffix of job and task that a name gets
# Options of sbatch that slurm.extra may not have, and the setting that sets each: several of them
# are needed to requeue and resume a run.
_SET_BY = {
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
    """Convert a time limit of sbatch to seconds: M, M:S, H:M:S, D-H, D-H:M, D-H:M:S, or UNLIMITED.

    Raises:
        ValueError: it is none of these.
    """
    if limit.upper() in ("UNLIMITED", "INFINITE"):
        return float("inf")
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", limit)
    if match is None:
        raise ValueError(limit)
    days, *clock = match.groups()
    numbers = [int(number) for number in clock if number is not None]
    if days is not None:
        units: tuple[int, ...] = (3600, 60, 1)
    else:
        units = {1: (60,), 2: (60, 1), 3: (3600, 60, 1)}[len(numbers)]
    # Not strict: a limit in days may lack minutes and seconds. SLURM reads 0 as no limit.
    return int(days or 0) * 86400 + sum(
        number * unit for number, unit in zip(numbers, units, strict=False)
    ) or float("inf")


def slurm_settings(words: Iterable[str], file: str | None) -> dict[str, Any]:
    """Merge conf/slurm.yaml, the user's `file` and the command line's `slurm.KEY=VALUE` words. The
    later ones win.

    Raises:
        ConfigError: lists every fault.
    """
    table = schema.load("slurm")
    result: Any = OmegaConf.to_container(OmegaConf.load(schema.CONF / "slurm.yaml"))
    values: dict[str, Any] = {}
    if file is not None:
        try:
            # As text: YAML reads 1:30:00 as the number 5400, which SLURM would take as minutes.
            content = yaml.load(Path(file).read_text("utf-8"), Loader=yaml.BaseLoader) or {}
        except (OSError, UnicodeError, yaml.YAMLError) as error:
            raise ConfigError(f"slurm={file} cannot be read: {error}") from None
        if not isinstance(content, dict):
            raise ConfigError(
                f"slurm={file}: a file of KEY: VALUE is expected, with the keys of conf/slurm.yaml"
            )
        values |= content
    for word in words:
        key, _, value = word.lstrip("+").removeprefix("slurm.").partition("=")
        values[key] = value
    faults = []
    for key, value in values.items():
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
    """Convert a value's text to its type. Hydra's grammar is not used, since it would need quotes
    around node lists and constraints."""
    if not isinstance(value, str):
        return value
    if type_.startswith("list"):
        content = yaml.load(value, Loader=yaml.BaseLoader)
        return [content] if isinstance(content, str) else content
    if value.lower() in ("null", "~", "") and "null" in type_:
        return None
    return int(value) if "int" in type_ and re.fullmatch(r"-?\d+", value) else value


def _faults(slurm: dict[str, Any]) -> Iterator[str]:
    """Yield faults of settings whose types are right."""
    for key, value in slurm.items():
        lines = value if isinstance(value, list) else [value]
        if any(isinstance(line, str) and not line.isprintable() for line in lines):
            yield f"slurm.{key} holds a line break or another character that cannot be printed"
    if slurm["time"] is not None:
        try:
            limit = seconds(slurm["time"])
        except ValueError:
            yield (
                f"slurm.time={slurm['time']} is no time limit. Write MINUTES, MINUTES:SECONDS,"
                " HOURS:MINUTES:SECONDS, DAYS-HOURS, DAYS-HOURS:MINUTES or"
                " DAYS-HOURS:MINUTES:SECONDS"
            )
        else:
            if slurm["signal_before"] >= limit:
                yield (
                    f"slurm.signal_before={slurm['signal_before']} seconds leave nothing of"
                    f" slurm.time={slurm['time']} ({limit:g} seconds) to train in: set a longer"
                    " time, or a later signal"
                )
    if slurm["memory"] is not None and not re.fullmatch(r"\d+[KMGT]?", slurm["memory"]):
        yield (
            f"slurm.memory={slurm['memory']} is no memory size. Write number and unit, as 64G"
            " (without a unit: megabytes)"
        )
    for option in slurm["extra"]:
        match = re.match(r"--([a-z][a-z-]*)|-([A-Za-z])", option)
        if match is None:
            yield (
                f"slurm.extra has {option!r}, but holds options of sbatch, such as"
                " --reservation=NAME"
            )
        elif setting := _SET_BY.get(match.group(1) or match.group(2)):
            yield f"slurm.extra has {option}, which {setting} sets"


def combinations(overrides: Iterable[str], sweep: bool) -> tuple[list[str], list[list[str]]]:
    """Return (arguments of all tasks, further arguments of each task of the array). Without an
    array the second has one empty list.

    Raises:
        ConfigError: there are several values without --multirun, or --multirun without several
        values.
    """
    common, swept = [], []
    for text in overrides:
        try:
            override = OverridesParser.create().parse_override(text)
        except HydraException as error:
            raise ConfigError(f"{text}: {explain(error)}") from None
        if not override.is_sweep_override():
            common.append(text)
            continue
        if not sweep:
            raise ConfigError(
                f"{text}: several values need --multirun, which makes them an array of jobs"
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
    return common, [list(values) for values in itertools.product(*swept)]


def compose_task(overrides: list[str], folder: str | None) -> dict[str, Any]:
    """Compose, check and resolve the config of a task.

    Raises:
        ConfigError, and Hydra's errors: the config cannot be run.
    """
    search = [f"hydra.searchpath=[{_quoted('file://' + folder)}]"] if folder is not None else []
    plain: Any = OmegaConf.to_container(compose.compose([*search, *overrides]), resolve=True)
    return plain  # type: ignore[no-any-return]


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "\\'") + "'"


def _key(override: str) -> str:
    return override.lstrip("+~").partition("=")[0].partition("@")[0]


def resources(plain: dict[str, Any], slurm: dict[str, Any]) -> dict[str, Any]:
    """Return the resources that a config needs: `nodes`, `tasks` and `gpus` per node, `requeue`.

    Raises:
        ConfigError: the config leaves the number of processes or GPUs open, which SLURM needs.
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
            f"lightning.devices={devices}: SLURM needs the number of processes per node. Give a"
            " number"
        )
    gpus = slurm["gpus"]
    if gpus == "auto":
        if lightning["accelerator"] not in ("cpu", "gpu", "cuda"):
            raise ConfigError(
                f"lightning.accelerator={lightning['accelerator']}: SLURM needs the number of GPUs."
                " Set lightning=gpu or lightning=cpu, or slurm.gpus=N for N on each node"
            )
        gpus = 0 if lightning["accelerator"] == "cpu" else tasks
    elif lightning["accelerator"] in ("gpu", "cuda") and gpus < tasks:
        raise ConfigError(
            f"slurm.gpus={gpus}, but lightning.devices={devices} needs {tasks} on each node"
        )
    requeue = str(plain.get("requeue", "auto")).lower() != "false"
    return {"nodes": lightning["num_nodes"], "tasks": tasks, "gpus": gpus, "requeue": requeue}


@dataclass(frozen=True)
class Job:
    """A job before it is queued."""

    script: str
    name: str
    logs: Path
    run: str  # the run's folder
    numbered: bool  # whether the job's number is added to it
    array: bool
    missing: list[str]  # messages about paths that do not exist here


def _needs(
    common: list[str], per_task: list[list[str]], folder: str | None, slurm: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the resources that each task of an array needs, and the config of the last task.

    Raises:
        ConfigError: a task cannot run, or tasks need different resources.
    """
    needs, plain, task = None, {}, ""
    for words in per_task:
        try:
            plain = compose_task([*common, *words], folder)
            task_needs = resources(plain, slurm)
        except (
            HydraException,
            OmegaConfBaseException,
            yaml.YAMLError,
            OSError,
            ValueError,
        ) as error:
            raise ConfigError((f"{' '.join(words)}: " if words else "") + explain(error)) from None
        if needs is not None and task_needs != needs:
            raise ConfigError(
                f"the tasks of an array must need the same nodes and GPUs, but {task} needs {needs}"
                f" and {' '.join(words)} needs {task_needs}"
            )
        needs, task = task_needs, " ".join(words)
    assert needs is not None
    return needs, plain


def prepare(
    overrides: Iterable[str], slurm: dict[str, Any], folder: str | None, sweep: bool
) -> Job:
    """Check a job and write its script. `slurm` is from `slurm_settings`, `folder` is that of
    --config-dir, and with `sweep` the job is an array.

    Raises:
        ConfigError: the job could not run.
    """
    common, per_task = combinations(overrides, sweep)
    if slurm["parallel"] is not None and not sweep:
        raise ConfigError(
            f"slurm.parallel={slurm['parallel']} is for arrays, which --multirun makes"
        )
    resume = next(
        (word.partition("=")[2] for word in reversed(common) if _key(word) == "resume"), "auto"
    )
    if resume == "never":
        raise ConfigError("resume=never: a requeued job resumes its run. Leave it out")
    if resume == "auto":  # the batch file sets it
        common = [*(word for word in common if _key(word) != "resume"), "resume=auto"]
    needs, plain = _needs(common, per_task, folder, slurm)
    name, runs = str(plain["name"]), Path(plain["runs"])
    if resume == "auto":
        if len(name) + _ID > 100:
            raise ConfigError(
                f"name={name}: the job's numbers are added to it, so it has at most {100 - _ID}"
                " characters"
            )
        common = [word for word in common if _key(word) not in ("name", "resume")]
    logs = (runs / "slurm").absolute()
    arguments = [*([f"--config-dir={folder}"] if folder else []), *common]
    text = script(name, logs, slurm, needs, arguments, per_task)
    if redact(text) != text:
        raise ConfigError(
            "the script would hold what looks like a secret. Export it instead: jobs inherit the"
            " environment"
        )
    run, missing = str(runs / name) if resume == "auto" else resume, list(paths.problems(plain))
    return Job(text, name, logs, run, resume == "auto", sweep, missing)
