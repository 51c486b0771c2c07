"""From a command line to a config that is known to be right, before torch is imported.

`install` hooks the checks into Hydra's composition, so that they see exactly what Hydra will use, its own node included,
before Hydra instantiates a callback or configures a logger from it.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from trainer import foreign, redaction, requeue, schema, target, untrusted
from trainer.combinations import combinations, schedule_free

EXIT_BAD_INPUT = 2  # config or data; see README, exit codes
RESOLVED_WITHIN = 2.0  # seconds of computing


class ConfigError(ValueError):
    """The config cannot be run. The message lists every fault: what, where, how to mend it."""


def rewrite(argv: list[str]) -> list[str]:
    """Arguments as Hydra takes them: `experiment=x` works like `+experiment=x`, and an unknown key reaches our own check,
    which suggests the right one, instead of Hydra's."""
    result = []
    for argument in argv:
        key = argument.partition("=")[0]
        if "=" in argument and re.match(r"[A-Za-z_]", argument) and not key.startswith("hydra"):
            if key == "experiment":
                argument = "+" + argument
            elif "@" not in key and not (schema.CONF / key).is_dir():
                argument = "++" + argument
        result.append(argument)
    return result


def install(incomplete: bool = False) -> None:
    """Make every composition of this process pass through `check`.

    Raises:
        ConfigError: from within Hydra's composition.
    """
    from hydra._internal.config_loader_impl import ConfigLoaderImpl
    from hydra._internal.sources_registry import SourcesRegistry
    from hydra.core.plugins import Plugins

    Plugins.instance()  # loads the sources' modules anew, and with them the class that is asked for here
    file_source: Any = SourcesRegistry.instance().resolve("file")
    register_resolvers()
    redaction.redact_logs()
    compose = ConfigLoaderImpl.load_configuration
    if getattr(compose, "checked", False):
        return

    @functools.wraps(compose)
    def checked(self: Any, config_name: str | None, overrides: list[str], *args: Any, **kwargs: Any) -> DictConfig:
        for override in overrides:
            # A package on the search path is imported, before there is a config to check.
            if re.match(r"\W*hydra\.searchpath\b.*(pkg:|\$)", override, re.DOTALL):
                raise ConfigError(f"{override}: only folders can be searched for configs")
            group, _, value = override.partition("=")
            if value == "null" and (schema.CONF / group).is_dir():
                raise ConfigError(f"{override}: choose one of {', '.join(schema.options(group))}")
        config = compose(self, config_name, overrides, *args, **kwargs)
        noted = OmegaConf.to_container(config.hydra.overrides, resolve=False)
        if sorted(noted["hydra"] + noted["task"]) != sorted(overrides):  # type: ignore[index, call-overload]
            raise ConfigError("hydra.overrides is what the command line says, and is not taken from a config")
        _take_base(config)
        check(config, incomplete=incomplete)
        return config

    read = file_source.load_config

    @functools.wraps(read)
    def bounded(self: Any, config_path: str) -> Any:
        file = Path(self.path, config_path if config_path.endswith(".yaml") else f"{config_path}.yaml")
        if file.exists() and not file.resolve().is_relative_to(schema.CONF.resolve()):
            try:
                untrusted.refuse_bomb(file.read_text("utf-8"), str(file))
            except untrusted.TooMuch as error:
                raise ConfigError(str(error)) from None
        return read(self, config_path)

    checked.checked = True  # type: ignore[attr-defined]
    ConfigLoaderImpl.load_configuration = checked  # type: ignore[method-assign]
    file_source.load_config = bounded


def _take_base(config: DictConfig) -> None:
    """Where the config names a run as the target, put that run's base into it.

    Raises:
        ConfigError: the run is no target, or another base was asked for.
    """
    path = OmegaConf.select(config, "target.run")
    if not isinstance(path, str):
        return  # none, or one that `check` refuses
    try:
        theirs, choice = target.base_of(path)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if choice in schema.options("base") and isinstance(theirs, dict):
        schema.complete(theirs, schema.load(f"base/{choice}"), "base")
    given: Any = OmegaConf.to_container(config.base, resolve=False)
    if not isinstance(given, dict):
        return
    asked = [override.lstrip("+") for override in config.hydra.overrides.task]
    free = [f"base.{key}" for key in target.FREE]
    named = {override.partition("=")[0] for override in asked if re.match(r"base\b", override)}
    own = [place.partition(".")[2] for place in named & {*free}]
    if config.hydra.runtime.choices.base != usual()["base"] or named - {*free}:
        own = list(target.FREE)
        if fault := target.other_base(path, theirs, given):
            raise ConfigError(fault)
    with open_dict(config):
        config.base = theirs | {key: given[key] for key in own if key in given}
        config.hydra.runtime.choices.base = choice


def register_resolvers() -> None:
    """`${run_folder:RUNS,NAME,RESUME}` is where a run lives; see `run_folder`."""
    OmegaConf.register_new_resolver("run_folder", run_folder, use_cache=True, replace=True)


def run_folder(runs: str, name: str, resume: str) -> str:
    """RUNS/NAME, the first of NAME, NAME-2, NAME-3 ... that holds no run yet; with resume=auto the newest of them that
    does; with resume=FOLDER that folder."""
    if resume not in ("never", "auto"):
        if not any((Path(resume) / file).exists() for file in ("run.yaml", "multirun.yaml")):
            raise ConfigError(f"resume={resume}: that folder holds no run. Give one that does, or auto, or never")
        return resume
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name):
        raise ConfigError(
            f"name is {name!r}. A run's name has at most 100 letters, digits, '.', '_' and '-', and starts with none of those three"
        )
    rank = os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or "0"
    if rank != "0":  # started by torchrun or srun: the first process says where the run lives, see trainer.run
        return str(Path(tempfile.gettempdir()) / f"graft-{os.getpid()}-rank-{rank}")
    candidate, newest, number = Path(runs) / name, None, 2
    while (candidate / "run.yaml").exists() or (candidate / "multirun.yaml").exists():
        newest, candidate, number = candidate, Path(runs) / f"{name}-{number}", number + 1
    if newest is not None and os.environ.get("SLURM_RESTART_COUNT", "0") != "0":
        # The job is started again with the same command, and what it had begun is in the newest folder that it made.
        own = newest / "job"
        if own.exists() and own.read_text().strip() == requeue.job():
            return str(newest)
    return str(newest if resume == "auto" and newest else candidate)


def _run_folder(plain: dict[str, Any]) -> Iterator[str]:
    try:
        run_folder(plain["runs"], plain["name"], plain["resume"])
    except ConfigError as error:
        yield str(error)


def check(config: DictConfig, choices: dict[str, Any] | None = None, incomplete: bool = False) -> None:
    """Refuse a composed config that cannot be run. Which file each group took stands in Hydra's node, or in `choices`.
    `incomplete` is for a config that is only shown: values may be missing.

    Raises:
        ConfigError: lists every fault found.
    """
    faults = [*foreign.faults(config), *redaction.faults(config)]
    composed = choices is None  # a run folder's config is only read: it asks for no package of its training
    if not faults and choices is None:
        if config.hydra.job.config_name is None:  # Hydra's own, for --hydra-help
            return
        choices = OmegaConf.to_container(config.hydra.runtime.choices)  # type: ignore[assignment]
    if not faults:
        plain = _plain(config)
        faults = schema.problems(plain, root_schema(choices or {}), "", incomplete)
        if not faults:
            faults = [*_run_folder(plain), *combinations(plain)]
        if not faults and composed and schedule_free(plain) and importlib.util.find_spec("schedulefree") is None:
            faults = ["optimizer=schedulefree needs a package that is not installed: pip install schedulefree"]
        launched = composed and (choices or {}).get("hydra/launcher") == "slurm"
        if not faults and launched and importlib.util.find_spec("submitit") is None:
            faults = [
                "hydra/launcher=slurm needs a package that is not installed: pip install 'hydra-submitit-launcher>=1.2,<2'. Without it: "
                "python -m trainer.submit --multirun"
            ]
    if faults:
        # An override stands in Hydra's node once more.
        raise ConfigError("\n".join([fault for fault in faults if not fault.startswith("hydra.overrides.")] or faults))


def root_schema(choices: dict[str, Any]) -> schema.Table:
    """The schema of the whole config, given which file each group took.

    Raises:
        ConfigError: a group took a file that is not in conf/.
    """
    root = schema.load("config")
    children = dict(root.children)
    for group in sorted(path.name for path in schema.CONF.iterdir() if any(path.glob("*.yaml"))):
        if group == "experiment":
            continue
        known, chosen = schema.options(group), choices.get(group)
        if chosen is not None and chosen not in known:
            raise ConfigError(f"{group}={chosen}: conf/{group} has {', '.join(known)}. To add one, put its file there")
        # Hydra does not say which files a list such as logger=[wandb,tensorboard] took.
        tables = [schema.load(f"{group}/{name}") for name in ([chosen] if chosen is not None else known)]
        if len({table.target for table in tables}) > 1:
            raise ConfigError(f"{group}: choose one of {', '.join(known)}")
        merged: dict[str, Any] = {}
        for table in tables:
            merged |= table.children
        children[group] = replace(tables[-1], children=merged)
    return schema.Table(children, None, root.file)


def complete(plain: dict[str, Any], choices: dict[str, Any]) -> list[str]:
    """Give a config that an older version recorded, in place, what has come since: keys as the files have them that its groups took,
    groups as conf/config.yaml takes them. Returns the dotted places. `check` refuses what is missing still."""
    for group, name in usual().items():
        if group not in plain:
            choices.setdefault(group, name)
    try:
        known = root_schema(choices)
    except ConfigError:  # which `check` raises again
        return []
    return schema.complete(plain, known)


def usual() -> dict[str, str]:
    """Which file of each group conf/config.yaml takes."""
    entries: Any = OmegaConf.to_container(OmegaConf.load(schema.CONF / "config.yaml").defaults)
    return {group: name for entry in entries if isinstance(entry, dict) for group, name in entry.items() if " " not in group}


def _plain(config: DictConfig) -> dict[str, Any]:
    """The config without Hydra's node as plain containers; `???` stays."""
    bare = OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
    try:
        with untrusted.limited(RESOLVED_WITHIN, "resolving them"):  # they can double a text each
            return OmegaConf.to_container(bare, resolve=True)  # type: ignore[return-value]
    except Exception as error:
        raise ConfigError(f"an interpolation of the config cannot be resolved: {error}") from None


def compose(argv: list[str]) -> DictConfig:
    """Compose and check a config from command-line arguments without starting a run, for the other verbs."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir

    install()
    with initialize_config_dir(config_dir=str(schema.CONF), version_base="1.3", job_name="trainer"):
        config = hydra_compose("config", overrides=rewrite(argv), return_hydra_config=False)
    return config


def arguments(argv: list[str], known: dict[str, Any], usage: str) -> dict[str, Any]:
    """Parse the `key=value` arguments of a verb. `known` maps each key to its default; `...` marks a required one.

    Raises:
        SystemExit: 0 after `--help`; 2 on an unknown or missing key, with the usage.
    """
    if any(word in ("-h", "--help") for word in argv):
        print(usage)
        raise SystemExit(0)
    given: dict[str, Any] = {}
    for word in argv:
        key, equals, value = word.partition("=")
        if not equals or key not in known:
            fault = schema.nearest(key, known) if equals else "Arguments are written key=value."
            raise SystemExit(bad(f"{word}: not an argument. {fault}\n\n{usage}"))
        try:
            given[key] = _typed(value, known[key])
        except ValueError:
            raise SystemExit(bad(f"{word}: {key} takes {type(known[key]).__name__}\n\n{usage}")) from None
    missing = [key for key, default in known.items() if default is ... and key not in given]
    if missing:
        raise SystemExit(bad(f"missing: {', '.join(missing)}\n\n{usage}"))
    return {**known, **given}


def _typed(value: str, default: Any) -> Any:
    if value == "null" and default is None:
        return None
    if isinstance(default, bool):
        if value.lower() not in ("true", "false"):
            raise ValueError(value)
        return value.lower() == "true"
    return type(default)(value) if isinstance(default, int | float) else value


def told(error: Exception) -> str:
    """What is wrong, without a traceback, when composing a config or making the run folder fails."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename} cannot be written: {error.strerror}. Choose another place with runs=FOLDER"
    text = str(error).partition("\nConfig search path:")[0]
    override = getattr(error, "override", None)  # of an OverrideParseException, which does not always name it
    if override is not None and override not in text:
        text = f"{override}: {text}"
    return f"{text}\n{error.__cause__}" if isinstance(error.__cause__, OmegaConfBaseException) else text


def bad(message: str) -> int:
    """Say what is wrong with what was asked for; returns the exit code."""
    print(redaction.redact(message), file=sys.stderr)
    return EXIT_BAD_INPUT
