"""Settings that a config may not have, because it may come from a stranger.

A config may not choose which code is imported or instantiated, change anything outside of the run
folder, read the environment, or pass text to a shell.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from typing import Any

from omegaconf import DictConfig, OmegaConf, grammar_parser

from trainer.config import schema

# Hydra may instantiate its sweeper and launchers; logging.config may instantiate these handlers.
_HYDRA_TARGETS = {
    "hydra._internal.core_plugins.basic_launcher.BasicLauncher",
    "hydra._internal.core_plugins.basic_sweeper.BasicSweeper",
    "hydra_plugins.hydra_submitit_launcher.submitit_launcher.LocalLauncher",
    "hydra_plugins.hydra_submitit_launcher.submitit_launcher.SlurmLauncher",
    "hydra_plugins.hydra_optuna_sweeper.optuna_sweeper.OptunaSweeper",
    "optuna.samplers.TPESampler",
    "optuna.samplers.RandomSampler",
    "optuna.samplers.GridSampler",
    "optuna.samplers.CmaEsSampler",
}
_LOGGING_CLASSES = {"logging.StreamHandler", "logging.FileHandler", "rich.logging.RichHandler"}
_LOG_STREAMS = ("ext://sys.stdout", "ext://sys.stderr")
_LOG_FILE = "${hydra.runtime.output_dir}/${hydra.job.name}.log"
# settings of Optuna's sweeper that import a function, or open a database or any file
_OF_SWEEPER = ("custom_search_space", "storage", "constraints_func")
_RESOLVERS = {"run_folder", "hydra", "now", "oc.select", "oc.env"}
_PUBLIC_VARIABLES = re.compile(
    r"(SLURM_\w+|USER|HOME|HOSTNAME|TMPDIR|SCRATCH|CUDA_VISIBLE_DEVICES)"
)


@functools.cache
def shipped_targets() -> frozenset[str]:
    """Return the `_target_` names in the YAML files of conf/. Nothing else is instantiated."""
    pattern = re.compile(r"^\s*_target_:\s*([\w.]+)\s*(?:#.*)?$", re.MULTILINE)
    return frozenset(
        name
        for path in schema.CONF.rglob("*.yaml")
        for name in pattern.findall(path.read_text("utf-8"))
    )


def forbidden_settings(config: DictConfig) -> Iterator[str]:
    """Yield a message for each forbidden setting of a config, with its key and its fix."""
    yield from _targets(config)
    yield from _remote_code(config)
    yield from _launcher_faults(config)
    yield from _places(config)


def _targets(config: DictConfig) -> Iterator[str]:
    """Yield faults of names that Hydra or logging would import, in the whole composed config."""
    for path, value in schema.leaves(OmegaConf.to_container(config, resolve=False)):
        place, key = ".".join(path), path[-1] if path else ""
        allowed = _HYDRA_TARGETS if path[:1] == ("hydra",) else shipped_targets()
        if "_target_" in path and value not in allowed:
            yield (
                f"{place} is {value!r}. Only classes that conf/ names are instantiated; to add a"
                " method, put its file there."
            )
        elif "_args_" in path:
            yield f"{place}: positional arguments are not taken from a config."
        elif path[:1] == ("hydra",):
            yield from _hydra_faults(path[1:], place, key, value)
        if isinstance(value, str) and "${" in value:
            yield from _interpolation_faults(place, value)


def _hydra_faults(path: tuple[str, ...], place: str, key: str, value: Any) -> Iterator[str]:
    """Yield faults of settings of Hydra's node that act outside of the run folder."""
    if path[:2] in (("job", "env_set"), ("job", "env_copy")):
        yield (
            f"{place}: the environment is not set from a config, since it decides what other"
            " programs run. Export it instead."
        )
    elif path[:1] == ("sweeper",) and {*path} & {*_OF_SWEEPER} and value is not None:
        yield (
            f"{place} is {value!r}. It names code or a database of Optuna, which no config chooses:"
            " leave it out."
        )
    elif path == ("output_subdir",) and not (value is None or re.fullmatch(r"\.?\w+", str(value))):
        yield f"{place} is {value!r}. It is a folder's name within the run folder, or null."
    elif path == ("job", "name") and not re.fullmatch(r"\w+", str(value)):
        yield f"{place} is {value!r}. It names the log file, and has letters, digits and '_' only."
    elif path[:1] in (("job_logging",), ("hydra_logging",)):
        if (key == "class" and value not in _LOGGING_CLASSES) or "()" in path or "." in path:
            yield (
                f"{place} is {value!r}. Log handlers are one of:"
                f" {', '.join(sorted(_LOGGING_CLASSES))}."
            )
        elif key == "filename" and value != _LOG_FILE:
            yield f"{place} is {value!r}, but the log is always {_LOG_FILE}."
        elif re.match(r"(ext|cfg)://", str(value)) and value not in _LOG_STREAMS:
            yield f"{place} is {value!r}. Only {' and '.join(_LOG_STREAMS)} may stand there."


def _interpolation_faults(place: str, text: str) -> Iterator[str]:
    """Yield faults of resolvers that a config may not call."""
    for name, variable in _resolvers(text):
        if name not in _RESOLVERS:
            yield f"{place} uses the resolver {name!r}; known: {', '.join(sorted(_RESOLVERS))}."
        elif name == "oc.env" and not _PUBLIC_VARIABLES.fullmatch(variable):
            yield (
                f"{place} reads the environment variable {variable}, which would end up in logs."
                " Export it where it is used."
            )


@functools.lru_cache(maxsize=256)  # parsing takes 1 ms, and Hydra's own node has many of these
def _resolvers(text: str) -> tuple[tuple[str, str], ...]:
    """Return (name, first argument) of each resolver that a text calls.

    OmegaConf's parser lists them, because a resolver's name can contain interpolations too.
    """
    nodes: list[Any] = [grammar_parser.parse(text)]
    calls = []
    while nodes:
        node = nodes.pop()
        nodes += getattr(node, "children", None) or []
        if type(node).__name__ == "InterpolationResolverContext":
            arguments = node.sequence().getText().strip() if node.sequence() else ""
            calls.append((node.resolverName().getText(), re.split(r"[\s,]", arguments)[0]))
    return tuple(calls)


def _remote_code(config: DictConfig) -> Iterator[str]:
    """Yield faults of settings that run a repository's code: only the command line may set them."""
    requested = OmegaConf.select(config, "base.trust_remote_code")
    overrides = OmegaConf.select(config, "hydra.overrides.task")  # missing in a run.yaml
    if (
        requested
        and overrides is not None
        and not any(re.fullmatch(r"(?i)\+*base\.trust_remote_code=true", o) for o in overrides)
    ):
        yield (
            "base.trust_remote_code=true is taken from the command line only, since it lets the"
            " model's repository run code."
        )
    include = OmegaConf.select(config, "callbacks.evaluation.harness_include")
    if (
        include is not None
        and overrides is not None
        and not any(re.match(r"\+*callbacks\.evaluation\.harness_include=", o) for o in overrides)
    ):
        yield (
            f"callbacks.evaluation.harness_include={include} is taken from the command line only,"
            " since tasks of lm-eval may run code."
        )
    attention = str(OmegaConf.select(config, "base.attn_implementation"))
    if not re.fullmatch(r"\w+", attention):
        # transformers accepts a repository's name here, and downloads its code
        yield (
            f"base.attn_implementation is {attention!r}. Attention is one of transformers' own:"
            " sdpa, eager, flash_attention_2 ..."
        )


# settings that a launcher passes to a shell, or to another program as options
_SHELL = ("setup", "python", "srun_args", "additional_parameters", "additional_pip_args")


def _launcher_faults(config: DictConfig) -> Iterator[str]:
    """Yield faults of a launcher's settings that a shell would run."""
    overrides = OmegaConf.select(config, "hydra.overrides.hydra")
    launcher = OmegaConf.select(config, "hydra.launcher") if overrides is not None else None
    for path, value in schema.leaves(
        OmegaConf.to_container(launcher, resolve=False) if isinstance(launcher, DictConfig) else {}
    ):
        place = ".".join(("hydra", "launcher", *path))
        if (
            path
            and path[0] in _SHELL
            and value
            and not any(re.match(rf"\+*hydra\.launcher\.{path[0]}\b", o) for o in overrides)
        ):
            yield f"{place} runs commands, and is taken from the command line only."
        elif isinstance(value, str) and not value.isprintable():
            yield f"{place} is {value!r}: a new line would become a command of the job's script."


# where a run writes, and how often it runs
_PLACES = (
    "runs",
    "resume",
    "target.features",
    "hydra.run.dir",
    "hydra.sweep.dir",
    "hydra.sweep.subdir",
    "hydra.output_subdir",
    "hydra.mode",
    "hydra.job.chdir",
    "hydra.launcher.submitit_folder",
)


def is_hydras_own(config: DictConfig) -> bool:
    """Return whether this is Hydra's own config, which it composes for --hydra-help."""
    job = OmegaConf.select(config, "hydra.job")
    return isinstance(job, DictConfig) and "config_name" in job and job.config_name is None


def _places(config: DictConfig) -> Iterator[str]:
    """Places that neither the command line nor a file of conf/ has set: a file of --config-dir may
    come from a stranger."""
    hydra = OmegaConf.select(config, "hydra")
    if hydra is None or "overrides" not in hydra:  # a run.yaml, which chooses no place
        return
    if is_hydras_own(config):
        return
    recorded: Any = OmegaConf.to_container(hydra.overrides, resolve=False)
    words = [*recorded.get("hydra", []), *recorded.get("task", [])]
    named = {re.sub(r"^[+~]+", "", word.partition("=")[0]) for word in words}
    for place in _PLACES:
        value = _raw(config, place)
        parts = place.split(".")
        if value is None or any(".".join(parts[:end]) in named for end in range(1, len(parts) + 1)):
            continue
        if not any(_raw(file, place) == value for file in _own_files(config)):
            yield (
                f"{place}={value} is taken from the command line or a file of conf/ only, since it"
                " chooses where files are written. Give it on the command line."
            )


def _own_files(config: DictConfig) -> Iterator[Any]:
    """The files of conf/ that may set a place, each below the name of its group: config.yaml, and
    the chosen experiment, launcher and target."""
    yield _of_conf("config.yaml")
    choices = config.hydra.runtime.choices
    for group, below in (
        ("experiment", ""),
        ("target", "target"),
        ("hydra/launcher", "hydra.launcher"),
    ):
        file = schema.CONF / group / f"{choices.get(group)}.yaml"
        if choices.get(group) in schema.options(group) and file.is_file():
            content = _of_conf(f"{group}/{choices[group]}.yaml")
            for key in reversed(below.split(".") if below else []):
                content = OmegaConf.create({key: content})
            yield content


@functools.cache
def _of_conf(file: str) -> Any:
    return OmegaConf.load(schema.CONF / file)


def _raw(node: Any, place: str) -> Any:
    """The value at a dotted path, without resolving it; None if there is none."""
    for key in place.split("."):
        child = node._get_node(key) if isinstance(node, DictConfig) and key in node else None
        if child is None:
            return None
        node = child
        if isinstance(node, DictConfig) and isinstance(node._value(), str):
            return node._value()  # an interpolation
    value = node._value()
    return None if value == "???" else getattr(value, "name", value)
