"""Compose a config from a command line and check it, before torch is imported.

`install` hooks the checks into Hydra's composition. So they see exactly the config that Hydra uses,
its own node included, before Hydra instantiates a callback or configures a logger from it.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict

from trainer.config import (
    forbidden,
    hydra_hook,
    lengths,
    limits,
    paths,
    schema,
    secrets,
    target_base,
)
from trainer.config.conflicts import conflicts, schedule_free
from trainer.config.errors import ConfigError
from trainer.config.groups import default_choices, root_schema
from trainer.config.overrides import rewrite
from trainer.config.run_name import _run_folder, run_folder
from trainer.config.shown import protect_console

RESOLVE_SECONDS = 2.0  # limit on the CPU time of resolving interpolations
PATTERN_SECONDS = 1.0  # of computing, for one pattern on LAYERS
LAYERS = (
    "model.layers.31.self_attn.q_proj",
    "transformer.h.11.attn.c_attn",
    "gpt_neox.layers.5.mlp.dense_4h_to_h",
    "model.decoder.layers.10.fc1",
    "a" * 60,
)
_hidden_modes: list[str] = []  # what is wrong with the mode that a file sets
# Hydra composes twice, and ignores an error the first time: the error of some overrides.
_refused: dict[tuple[str, ...], ConfigError] = {}
_flags = {"incomplete": False, "reads_files": False}  # of the last `install`


def install(incomplete: bool = False, reads_files: bool = False) -> None:
    """Pass every composition of this process through `check`, which then raises ConfigError from
    within Hydra's composition. `incomplete`: see `check`. With `reads_files` the files that the
    config names must exist.
    """

    def check_config(config: DictConfig, overrides: list[str]) -> None:
        recorded: Any = OmegaConf.to_container(config.hydra.overrides, resolve=False)
        if sorted(recorded["hydra"] + recorded["task"]) != sorted(overrides):
            raise ConfigError(
                "hydra.overrides is Hydra's record of the command line, and no setting of a config:"
                " leave it out"
            )
        _take_base(config)
        # Hydra asks for the mode first, ignores an error there, and then sets the mode itself.
        _hidden_modes.extend(
            fault
            for fault in forbidden.forbidden_settings(config)
            if fault.startswith("hydra.mode=")
        )
        if _hidden_modes:
            raise ConfigError(_hidden_modes[0])
        # Without a sweep both compositions give the same config.
        once = not any(mark in override for override in overrides for mark in ",(")
        try:
            plain = check(config, incomplete=_flags["incomplete"])
            if _flags["reads_files"] and once and plain is not None:
                paths.check(plain)
        except ConfigError as error:
            if once:
                _refused[_without_mode(overrides)] = error
            raise
        protect_console()  # last, as it imports rich

    _flags.update(incomplete=incomplete, reads_files=reads_files)
    _hidden_modes.clear()
    _refused.clear()
    register_resolvers()
    secrets.redact_logs()
    hydra_hook.install(_check_overrides, check_config, _check_file)


def _without_mode(overrides: list[str]) -> tuple[str, ...]:
    """Return the overrides without the mode, which Hydra adds for the second composition."""
    return tuple(override for override in overrides if not override.startswith("hydra.mode="))


def _check_overrides(overrides: list[str]) -> None:
    if (error := _refused.get(_without_mode(overrides))) is not None:
        raise error
    for override in overrides:
        # A package on the search path is imported before there is a config to check.
        if re.match(r"\W*hydra\.searchpath\b.*(pkg:|\$)", override, re.DOTALL):
            raise ConfigError(f"{override}: only folders can be searched for configs")
        group, _, value = override.partition("=")
        if value == "null" and (schema.CONF / group).is_dir():
            raise ConfigError(f"{override}: choose one of {', '.join(schema.options(group))}")


def _check_file(file: Path) -> None:
    if file.exists() and not file.resolve().is_relative_to(schema.CONF.resolve()):
        try:
            limits.refuse_bomb(file.read_text("utf-8"), str(file))
        except limits.LimitExceeded as error:
            raise ConfigError(str(error)) from None


def _take_base(config: DictConfig) -> None:
    """Use the base of the target run, if the config has one.

    Raises:
        ConfigError: the run cannot be a target, or the config has another base.
    """
    path = OmegaConf.select(config, "target.run")
    if not isinstance(path, str):
        return  # no target, or a value that `check` refuses
    try:
        target, choice = target_base.base_of(path)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if choice in schema.options("base") and isinstance(target, dict):
        schema.complete(target, schema.load(f"base/{choice}"), "base")
    composed: Any = OmegaConf.to_container(config.base, resolve=False)
    if not isinstance(composed, dict):
        return
    overrides = [override.lstrip("+") for override in config.hydra.overrides.task]
    free = {f"base.{key}" for key in target_base.FREE}
    keys = {text.partition("=")[0] for text in overrides if re.match(r"base\b", text)}
    kept_keys = [key.partition(".")[2] for key in keys & free]
    # The command line names a base: it must be the target's, but for the free settings.
    if config.hydra.runtime.choices.base != default_choices()["base"] or keys - free:
        kept_keys = list(target_base.FREE)
        if fault := target_base.other_base(path, target, composed):
            raise ConfigError(fault)
    with open_dict(config):
        config.base = target | {key: composed[key] for key in kept_keys if key in composed}
        config.hydra.runtime.choices.base = choice


def register_resolvers() -> None:
    """Register `${run_folder:RUNS,NAME,RESUME}`, a run's folder; see `run_name.run_folder`."""
    OmegaConf.register_new_resolver("run_folder", run_folder, use_cache=True, replace=True)


def check(
    config: DictConfig, choices: dict[str, Any] | None = None, incomplete: bool = False
) -> dict[str, Any] | None:
    """Refuse a composed config that cannot be run. Return it without Hydra's node as plain
    containers; None for a config of Hydra's own.

    `choices` is the file that each group uses, for a config that a run folder records; None takes
    it from Hydra's node. With `incomplete` values may be missing: the config is only printed.

    Raises:
        ConfigError: lists every fault.
    """
    plain: dict[str, Any] = {}
    faults = [*forbidden.forbidden_settings(config), *secrets.secrets_in(config)]
    # A recorded config is only read, so packages that its training needed may be missing.
    composed = choices is None
    if not faults and choices is None:
        if forbidden.is_hydras_own(config):
            return None
        choices = OmegaConf.to_container(config.hydra.runtime.choices)  # type: ignore[assignment]
    if not faults:
        plain = _plain(config)
        faults = schema.problems(plain, root_schema(choices or {}), "", incomplete)
        if not faults:
            faults = [
                *_run_folder(plain, composed),
                *conflicts(plain),
                *lengths.problems(plain),
                *_peft_faults(plain),
                *_empty_paths(plain),
                *_slow_patterns(plain),
            ]
        if (
            not faults
            and composed
            and schedule_free(plain)
            and importlib.util.find_spec("schedulefree") is None
        ):
            faults = [
                "optimizer=schedulefree needs a package that is not installed: pip install"
                " schedulefree"
            ]
        launched = composed and (choices or {}).get("hydra/launcher") == "slurm"
        if not faults and launched and importlib.util.find_spec("submitit") is None:
            faults = [
                "hydra/launcher=slurm needs a package that is not installed: pip install"
                " 'hydra-submitit-launcher>=1.2,<2'. Without it: graft submit"
                " --multirun"
            ]
    if faults:
        # Hydra's node repeats each override, so the same fault would be reported twice.
        raise ConfigError(
            "\n".join(
                [fault for fault in faults if not fault.startswith("hydra.overrides.")] or faults
            )
        )
    return plain


def _plain(config: DictConfig) -> dict[str, Any]:
    """Convert the config without Hydra's node to plain containers; `???` stays."""
    bare = OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
    try:
        # Each interpolation can double a text, so a few lines can grow without bound.
        with limits.limited(RESOLVE_SECONDS, "resolving them"):
            return OmegaConf.to_container(bare, resolve=True)  # type: ignore[return-value]
    except Exception as error:
        raise ConfigError(f"an interpolation of the config cannot be resolved: {error}") from None


def compose(argv: list[str]) -> DictConfig:
    """Compose and check a config from command-line arguments without starting a run, for the
    commands."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir

    install()
    with initialize_config_dir(config_dir=str(schema.CONF), version_base="1.3", job_name="trainer"):
        config = hydra_compose("config", overrides=rewrite(argv), return_hydra_config=False)
    return config


def _empty_paths(plain: dict[str, Any]) -> Iterator[str]:
    """Paths of the data and the base that are empty, as a variable of a shell may be."""
    for group in ("task", "base"):
        for key in ("path", "eval_path"):
            value = plain[group].get(key)
            values = value if isinstance(value, list) else [value]
            if value == [] or any(isinstance(text, str) and not text.strip() for text in values):
                yield f"{group}.{key}={value!r}: expected a file, a folder or a name on the hub"


def _slow_patterns(plain: dict[str, Any]) -> Iterator[str]:
    """Patterns for the names of layers that take for ever on a name."""
    for key in ("target_modules", "exclude_modules", "modules_to_save"):
        pattern = plain["adapter"].get(key)
        if not isinstance(pattern, str):
            continue
        setting = f"adapter.{key}={pattern!r}"
        try:
            with limits.limited(PATTERN_SECONDS, f"{setting} on the name of a layer"):
                for name in LAYERS:
                    re.fullmatch(pattern, name)
        except re.error:
            continue  # the adapter reports it, with the layers that there are
        except limits.LimitExceeded as error:
            yield str(error)


def _peft_faults(plain: dict[str, Any]) -> Iterator[str]:
    """Yield faults of the fields of a PEFT method."""
    adapter = plain["adapter"]
    if adapter["_target_"] != "adapters.peft.Peft" or adapter["peft_type"] == "???":
        return
    from adapters import peft_fields

    yield from peft_fields.problems(
        adapter,
        plain["base"].get("quantization", "none") != "none",
        plain["packing"],
        plain["task"]["_target_"].startswith("tasks.classification"),
        plain["objective"]["gradient_checkpointing"],
    )
