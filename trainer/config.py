"""From a command line to a config that is known to be right, before torch is imported.

`install` hooks the checks into Hydra's composition, so that they see exactly what Hydra will use, its own node included,
before Hydra instantiates a callback or configures a logger from it.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
import re
import sys
import tempfile
import traceback
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf, grammar_parser, open_dict
from omegaconf.errors import OmegaConfBaseException

from trainer import requeue, schema, target, untrusted
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
    redact_logs()
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
    given: Any = OmegaConf.to_container(config.base, resolve=False)
    if not isinstance(given, dict):
        return
    asked = [override.lstrip("+") for override in config.hydra.overrides.task]
    usual = next(entry["base"] for entry in OmegaConf.load(schema.CONF / "config.yaml").defaults if "base" in entry)
    free = [f"base.{key}" for key in target.FREE]
    named = {override.partition("=")[0] for override in asked if re.match(r"base\b", override)}
    own = [place.partition(".")[2] for place in named & {*free}]
    if config.hydra.runtime.choices.base != usual or named - {*free}:
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
    faults = [*_foreign_targets(config), *_looks_secret(config), *_remote_code(config)]
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


def _plain(config: DictConfig) -> dict[str, Any]:
    """The config without Hydra's node as plain containers; `???` stays."""
    bare = OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
    try:
        with untrusted.limited(RESOLVED_WITHIN, "resolving them"):  # they can double a text each
            return OmegaConf.to_container(bare, resolve=True)  # type: ignore[return-value]
    except Exception as error:
        raise ConfigError(f"an interpolation of the config cannot be resolved: {error}") from None


def _strings(node: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """All leaves with their paths; interpolations stay unresolved, since their text is what matters here."""
    if isinstance(node, dict):
        for key, value in node.items():
            yield from _strings(value, (*path, str(key)))
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from _strings(value, (*path, str(index)))
    else:
        yield path, node


# What Hydra itself may make: its sweeper and launchers. What logging.config may make: the handlers that our files name.
_HYDRA_TARGETS = {
    "hydra._internal.core_plugins.basic_launcher.BasicLauncher",
    "hydra._internal.core_plugins.basic_sweeper.BasicSweeper",
    "hydra_plugins.hydra_submitit_launcher.submitit_launcher.LocalLauncher",
    "hydra_plugins.hydra_submitit_launcher.submitit_launcher.SlurmLauncher",
}
_LOGGING_CLASSES = {"logging.StreamHandler", "logging.FileHandler", "rich.logging.RichHandler"}
_LOG_STREAMS = ("ext://sys.stdout", "ext://sys.stderr")
_LOG_FILE = "${hydra.runtime.output_dir}/${hydra.job.name}.log"
_RESOLVERS = {"run_folder", "hydra", "now", "oc.select", "oc.env"}
_PUBLIC_VARIABLES = re.compile(r"(SLURM_\w+|USER|HOME|HOSTNAME|TMPDIR|SCRATCH|CUDA_VISIBLE_DEVICES)")


@functools.cache
def shipped_targets() -> frozenset[str]:
    """The exact `_target_` names in the YAML files of conf/: nothing else is ever instantiated."""
    pattern = re.compile(r"^\s*_target_:\s*([\w.]+)\s*(?:#.*)?$", re.MULTILINE)
    return frozenset(name for path in schema.CONF.rglob("*.yaml") for name in pattern.findall(path.read_text("utf-8")))


def _foreign_targets(config: DictConfig) -> Iterator[str]:
    """A config from a stranger runs nothing: every name that anything would import, over the whole composed config."""
    for path, value in _strings(OmegaConf.to_container(config, resolve=False)):
        place, key = ".".join(path), path[-1] if path else ""
        allowed = _HYDRA_TARGETS if path[:1] == ("hydra",) else shipped_targets()
        if "_target_" in path and value not in allowed:
            yield f"{place} is {value!r}. Only what the files of conf/ name may be made; to add a method, put its file there."
        elif "_args_" in path:
            yield f"{place}: positional arguments are not taken from a config."
        elif path[:1] == ("hydra",):
            yield from _hydra_faults(path[1:], place, key, value)
        if isinstance(value, str) and "${" in value:
            yield from _interpolation_faults(place, value)


def _hydra_faults(path: tuple[str, ...], place: str, key: str, value: Any) -> Iterator[str]:
    """What may not stand in Hydra's own node, whose settings reach beyond the run folder."""
    if path[:2] in (("job", "env_set"), ("job", "env_copy")):
        yield f"{place}: the environment is not set from a config, since it decides what other programs run. Export it instead."
    elif path == ("output_subdir",) and not (value is None or re.fullmatch(r"\.?\w+", str(value))):
        yield f"{place} is {value!r}. It is a folder's name within the run folder, or null."
    elif path == ("job", "name") and not re.fullmatch(r"\w+", str(value)):
        yield f"{place} is {value!r}. It names the log file, and has letters, digits and '_' only."
    elif path[:1] in (("job_logging",), ("hydra_logging",)):
        if (key == "class" and value not in _LOGGING_CLASSES) or "()" in path or "." in path:
            yield f"{place} is {value!r}. Log handlers are one of: {', '.join(sorted(_LOGGING_CLASSES))}."
        elif key == "filename" and value != _LOG_FILE:
            yield f"{place} is {value!r}, but the log is always {_LOG_FILE}."
        elif re.match(r"(ext|cfg)://", str(value)) and value not in _LOG_STREAMS:
            yield f"{place} is {value!r}. Only {' and '.join(_LOG_STREAMS)} may stand there."


def _interpolation_faults(place: str, text: str) -> Iterator[str]:
    """Resolvers that a config may not call, found by OmegaConf's own parser: their names can hold interpolations, too."""
    nodes: list[Any] = [grammar_parser.parse(text)]
    while nodes:
        node = nodes.pop()
        nodes += getattr(node, "children", None) or []
        if type(node).__name__ != "InterpolationResolverContext":
            continue
        name = node.resolverName().getText()
        first = re.split(r"[\s,]", node.sequence().getText().strip())[0] if node.sequence() else ""
        if name not in _RESOLVERS:
            yield f"{place} uses the resolver {name!r}; known: {', '.join(sorted(_RESOLVERS))}."
        elif name == "oc.env" and not _PUBLIC_VARIABLES.fullmatch(first):
            yield f"{place} reads the environment variable {first}, which would end up in logs. Export it where it is used."


def _remote_code(config: DictConfig) -> Iterator[str]:
    """What runs code that is not in conf/ nor in the packages: only where the person who starts the run says so, not where a file does."""
    asked = OmegaConf.select(config, "base.trust_remote_code")
    given = OmegaConf.select(config, "hydra.overrides.task")  # not there in a run.yaml
    if asked and given is not None and not any(re.fullmatch(r"(?i)\+*base\.trust_remote_code=true", o) for o in given):
        yield "base.trust_remote_code=true is taken from the command line only, since it lets the model's repository run code."
    computed = str(OmegaConf.select(config, "base.attn_implementation"))
    if not re.fullmatch(r"\w+", computed):
        # transformers takes a repository's name here, and fetches its code.
        yield f"base.attn_implementation is {computed!r}. Attention is one of transformers' own: sdpa, eager, flash_attention_2 ..."
    yield from _launched(config)


# What a launcher hands to a shell, or to another program as options.
_SHELL = ("setup", "python", "srun_args", "additional_parameters", "additional_pip_args")


def _launched(config: DictConfig) -> Iterator[str]:
    given = OmegaConf.select(config, "hydra.overrides.hydra")
    launcher = OmegaConf.select(config, "hydra.launcher") if given is not None else None
    for path, value in _strings(OmegaConf.to_container(launcher, resolve=False) if isinstance(launcher, DictConfig) else {}):
        place = ".".join(("hydra", "launcher", *path))
        if path and path[0] in _SHELL and value and not any(re.match(rf"\+*hydra\.launcher\.{path[0]}\b", o) for o in given):
            yield f"{place} runs commands, and is taken from the command line only."
        elif isinstance(value, str) and not value.isprintable():
            yield f"{place} is {value!r}: a line of its own would be one of the job's script."


_SECRET_VALUE = re.compile(
    # 40 hex digits are a W&B key, but as a folder's name a commit in the hub's cache.
    r"(hf_[A-Za-z0-9]{20,}|sk-[A-Za-z0-9_-]{20,}|(?<![0-9a-f/])[0-9a-f]{40}(?![0-9a-f])|wandb_v\d_\w{20,}|gh[pousr]_\w{30,}"
    r"|github_pat_\w{20,}|glpat-[\w-]{20,}|xox[abprs]-[\w-]{10,}|AKIA[0-9A-Z]{16}|eyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]{10,}"
    r"|(?<=://)[^/\s:@]*:[^/\s@]+(?=@)|-----BEGIN [A-Z ]*PRIVATE KEY-----)"
)
_SECRET_KEY = re.compile(r"(^|_)((api|access|private|secret)_?key|token|secret|password|passwd|credentials?)$", re.IGNORECASE)


def _looks_secret(config: DictConfig) -> Iterator[str]:
    """Secrets come from the environment: what stands in a config is logged, stored and sent to dashboards."""
    exported = list(_exported())
    for path, value in _strings(OmegaConf.to_container(config, resolve=False)):
        place = ".".join(path)
        if not isinstance(value, str) or not value or re.match(r"hydra\.(overrides|runtime|job\.override_dirname)\b", place):
            continue  # what Hydra notes of the others
        named = any(_SECRET_KEY.search(key) for key in path) and path[:1] != ("hydra",)
        if named or (_SECRET_VALUE.search(value) and path[-1] not in ("sha256", "revision")):
            yield f"{place} looks like a secret. Configs are logged: export it (WANDB_API_KEY, HF_TOKEN) instead."
        for name in (name for name, secret in exported if secret in value):
            yield f"{place} holds the value of the environment variable {name}, which is a secret by its name. Configs are logged: take it out."


def _exported() -> Iterator[tuple[str, str]]:
    """(name, value) of the environment's secrets, by their names."""
    for name, value in os.environ.items():
        if _SECRET_KEY.search(name) and len(value) >= 8:
            yield name, value


def redact(text: str) -> str:
    """The text with everything that looks like a secret, and every secret of the environment, taken out."""
    for _, value in _exported():
        text = text.replace(value, "[redacted]")
    return _SECRET_VALUE.sub("[redacted]", text)


def redact_logs() -> None:
    """Make every log record of this process pass through `redact`, its traceback too."""
    make = logging.getLogRecordFactory()
    if getattr(make, "redacts", False):
        return

    @functools.wraps(make)
    def redacting(*args: Any, **kwargs: Any) -> logging.LogRecord:
        record = make(*args, **kwargs)
        try:
            said = record.getMessage()
        except Exception:  # its arguments do not fit, which logging tells itself
            return record
        if (kept := redact(said)) != said:
            record.msg, record.args = kept, ()
        if record.exc_info and record.exc_info[1] is not None:
            trace = "".join(traceback.format_exception(record.exc_info[1])).rstrip()
            if (kept := redact(trace)) != trace:
                record.exc_text, record.exc_info = kept, None
        return record

    redacting.redacts = True  # type: ignore[attr-defined]
    logging.setLogRecordFactory(redacting)


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
    print(redact(message), file=sys.stderr)
    return EXIT_BAD_INPUT
