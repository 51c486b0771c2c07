"""From a command line to a config that is known to be right, before torch is imported.

`install` hooks the checks into Hydra's composition, so that they see exactly what Hydra will use, its own node included,
before Hydra instantiates a callback or configures a logger from it.
"""

from __future__ import annotations

import functools
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from trainer import schema

EXIT_BAD_INPUT = 2  # config or data; see README, exit codes


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


def install(exit_on_fault: bool = False) -> None:
    """Make every composition of this process pass through `check`.

    Raises:
        ConfigError: from within Hydra's composition; with `exit_on_fault`, SystemExit(2) after printing it, since Hydra
            would answer an exception with a traceback.
    """
    from hydra._internal.config_loader_impl import ConfigLoaderImpl

    register_resolvers()
    compose = ConfigLoaderImpl.load_configuration
    if getattr(compose, "checked", False):
        return

    @functools.wraps(compose)
    def checked(*args: Any, **kwargs: Any) -> DictConfig:
        config = compose(*args, **kwargs)
        try:
            check(config)
        except ConfigError as error:
            if not exit_on_fault:
                raise
            raise SystemExit(_bad(str(error))) from None
        return config

    checked.checked = True  # type: ignore[attr-defined]
    ConfigLoaderImpl.load_configuration = checked  # type: ignore[method-assign]


def register_resolvers() -> None:
    """`${run_folder:RUNS,NAME,RESUME}` is where a run lives; see `run_folder`."""
    OmegaConf.register_new_resolver("run_folder", run_folder, use_cache=True, replace=True)


def run_folder(runs: str, name: str, resume: str) -> str:
    """RUNS/NAME, the first of NAME, NAME-2, NAME-3 ... that holds no run yet; with resume=auto the newest of them that
    does; with resume=FOLDER that folder."""
    if resume not in ("never", "auto"):
        return resume
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise ConfigError(
            f"name is {name!r}. A run's name has letters, digits, '.', '_' and '-', and starts with none of those three."
        )
    candidate, newest, number = Path(runs) / name, None, 2
    while (candidate / "run.yaml").exists() or (candidate / "multirun.yaml").exists():
        newest, candidate, number = candidate, Path(runs) / f"{name}-{number}", number + 1
    return str(newest if resume == "auto" and newest else candidate)


def check(config: DictConfig, choices: dict[str, Any] | None = None) -> None:
    """Refuse a composed config that cannot be run. Which file each group took stands in Hydra's node, or in `choices`.

    Raises:
        ConfigError: lists every fault found.
    """
    faults = list(_foreign_targets(config)) + list(_looks_secret(config))
    if not faults:
        plain = _plain(config)
        if choices is None:
            choices = OmegaConf.to_container(config.hydra.runtime.choices)  # type: ignore[assignment]
        faults = schema.problems(plain, root_schema(choices or {}), "")
        if not faults:
            faults = list(combinations(plain))
    if faults:
        raise ConfigError("\n".join(faults))


def root_schema(choices: dict[str, Any]) -> schema.Table:
    """The schema of the whole config, given which file each group took."""
    root = schema.load("config")
    children = dict(root.children)
    for group, chosen in choices.items():
        if "/" in group or group == "experiment" or chosen is None:
            continue
        tables = [schema.load(f"{group}/{name}") for name in ([chosen] if isinstance(chosen, str) else chosen)]
        merged: dict[str, Any] = {}
        for table in tables:
            merged |= table.children
        children[group] = schema.Table(merged, tables[-1].target, tables[-1].file, any(table.open for table in tables))
    return schema.Table(children, None, root.file)


def _plain(config: DictConfig) -> dict[str, Any]:
    """The config without Hydra's node as plain containers; `???` stays."""
    bare = OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
    try:
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
_RESOLVERS = {"run_folder", "hydra", "now", "oc.select", "oc.env"}
_PUBLIC_VARIABLES = re.compile(r"(SLURM_\w+|USER|HOME|HOSTNAME|TMPDIR|SCRATCH|CUDA_VISIBLE_DEVICES)")


@functools.cache
def shipped_targets() -> frozenset[str]:
    """The exact `_target_` names in the YAML files of conf/: nothing else is ever instantiated."""
    pattern = re.compile(r"^\s*_target_:\s*([\w.]+)\s*(?:#.*)?$", re.MULTILINE)
    return frozenset(name for path in schema.CONF.rglob("*.yaml") for name in pattern.findall(path.read_text("utf-8")))


def _foreign_targets(config: DictConfig) -> Iterator[str]:
    """A config from a stranger runs nothing: every name that anything would import, over the whole composed config."""
    allowed = shipped_targets() | _HYDRA_TARGETS
    for path, value in _strings(OmegaConf.to_container(config, resolve=False)):
        place, key = ".".join(path), path[-1] if path else ""
        if "_target_" in path and value not in allowed:
            yield f"{place} is {value!r}. Only what the files of conf/ name may be made; to add a method, put its file there."
        elif key == "_args_" or "_args_" in path:
            yield f"{place}: positional arguments are not taken from a config."
        elif path[:1] == ("hydra",) and "logging" in place:
            if (key == "class" and value not in _LOGGING_CLASSES) or "()" in path:
                yield f"{place} is {value!r}. Log handlers are one of: {', '.join(sorted(_LOGGING_CLASSES))}."
            elif (
                isinstance(value, str)
                and re.match(r"(ext|cfg)://", value)
                and value not in ("ext://sys.stdout", "ext://sys.stderr")
            ):
                yield f"{place} is {value!r}. Only ext://sys.stdout and ext://sys.stderr may stand there."
        if isinstance(value, str):
            for name in re.findall(r"\$\{\s*([\w.]+)\s*:", value):
                if name not in _RESOLVERS:
                    yield f"{place} uses the resolver {name!r}; known: {', '.join(sorted(_RESOLVERS))}."
            for variable in re.findall(r"\$\{\s*oc\.env\s*:\s*([^,}\s]+)", value):
                if not _PUBLIC_VARIABLES.fullmatch(variable):
                    yield f"{place} reads the environment variable {variable}, which would end up in logs. Export it where it is used."


_SECRET_VALUE = re.compile(
    r"(hf_[A-Za-z0-9]{20,}|sk-[A-Za-z0-9_-]{20,}|(?<![0-9a-f])[0-9a-f]{40}(?![0-9a-f])|wandb_v\d_\w{20,}|gh[pousr]_\w{30,})"
)
_SECRET_KEY = re.compile(r"(^|_)(api_?key|token|secret|password|passwd|credentials?)$", re.IGNORECASE)


def _looks_secret(config: DictConfig) -> Iterator[str]:
    """Secrets come from the environment: what stands in a config is logged, stored and sent to dashboards."""
    for path, value in _strings(OmegaConf.to_container(config, resolve=False)):
        if path[:1] == ("hydra",) or not isinstance(value, str) or not value:
            continue
        if _SECRET_KEY.search(path[-1]) or (_SECRET_VALUE.search(value) and path[-1] not in ("sha256", "revision")):
            yield f"{'.'.join(path)} looks like a secret. Configs are logged: export it (WANDB_API_KEY, HF_TOKEN) instead."


def redact(text: str) -> str:
    """The text with everything that looks like a secret, and every secret of the environment, taken out."""
    for name, value in os.environ.items():
        if _SECRET_KEY.search(name) and len(value) >= 8:
            text = text.replace(value, "[redacted]")
    return _SECRET_VALUE.sub("[redacted]", text)


def combinations(c: dict[str, Any]) -> Iterator[str]:
    """Settings that are right one by one and wrong together. `c` is the plain config."""
    adapter = c["adapter"]["_target_"]
    task = c["task"]["_target_"]
    quantized = c["base"].get("quantization", "none") != "none"
    trains = adapter != "adapters.full.Nothing"
    if trains and c["max_epochs"] is None and c["max_steps"] is None and c["max_tokens"] is None and c["max_time"] is None:
        yield "the run has no end: set one of max_epochs, max_steps, max_tokens, max_time"
    if adapter == "adapters.full.Full" and quantized:
        yield "adapter=full trains the base's own weights, which quantisation has rounded: set base.quantization=none, or use an adapter"
    if c["packing"] and c["group_by_length"]:
        yield "packing=true already fills every sequence: set group_by_length=false"
    if c["packing"] and task.startswith("tasks.classification"):
        yield "packing=true cannot be used for classification, which reads one label per sequence: set packing=false"
    if c["task"].get("streaming"):
        if c["max_steps"] is None:
            yield "task.streaming=true has no known length: set max_steps (max_epochs and max_tokens may stay)"
        for key in ("packing", "group_by_length"):
            if c[key]:
                yield f"task.streaming=true sees one row at a time, {key}=true needs them all: set {key}=false"
        if c["workers"]:
            yield "task.streaming=true reads its rows in order, in one process: set workers=0"
        if c["task"]["eval_path"] is None and c["task"]["eval_fraction"] > 0:
            yield "task.streaming=true cannot hold rows out: set task.eval_path, or task.eval_fraction=0"
    if c["precision"] == "16-mixed":
        if c["lightning"]["accelerator"] == "cpu":
            yield "precision=16-mixed needs a GPU: use precision=bf16-true or fp32 with lightning.accelerator=cpu"
        if c["optimizer"].get("fused"):
            yield "precision=16-mixed unscales gradients before they are clipped, which a fused optimiser does not allow: set optimizer.fused=false"
    yield from _peft_combinations(c, quantized)


def _peft_combinations(c: dict[str, Any], quantized: bool) -> Iterator[str]:
    if c["adapter"]["_target_"] != "adapters.peft.Peft":
        return
    from adapters import peft_fields

    classification = c["task"]["_target_"].startswith("tasks.classification")
    yield from peft_fields.problems(
        c["adapter"], quantized, c["packing"], classification, c["objective"]["gradient_checkpointing"]
    )


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
            raise SystemExit(_bad(f"{word}: not an argument. {fault}\n\n{usage}"))
        try:
            given[key] = _typed(value, known[key])
        except ValueError:
            raise SystemExit(_bad(f"{word}: {key} takes {type(known[key]).__name__}\n\n{usage}")) from None
    missing = [key for key, default in known.items() if default is ... and key not in given]
    if missing:
        raise SystemExit(_bad(f"missing: {', '.join(missing)}\n\n{usage}"))
    return {**known, **given}


def _typed(value: str, default: Any) -> Any:
    if isinstance(default, bool):
        if value.lower() not in ("true", "false"):
            raise ValueError(value)
        return value.lower() == "true"
    return type(default)(value) if isinstance(default, int | float) else value


def _bad(message: str) -> int:
    print(message, file=sys.stderr)
    return EXIT_BAD_INPUT
