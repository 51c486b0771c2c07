"""From a command line to a config that is known to be right, before torch is imported.

`install` hooks the checks into Hydra's composition, so that they see exactly what Hydra will use,
its own node included, before Hydra instantiates a callback or configures a logger from it.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict

from trainer.config import forbidden, hydra_hook, lengths, limits, schema, secrets, target_base
from trainer.config.conflicts import conflicts, schedule_free
from trainer.config.errors import ConfigError
from trainer.config.groups import default_choices, root_schema
from trainer.config.overrides import rewrite
from trainer.config.run_name import _run_folder, run_folder

RESOLVED_WITHIN = 2.0  # seconds of computing


def install(incomplete: bool = False) -> None:
    """Make every composition of this process pass through `check`.

    Raises:
        ConfigError: from within Hydra's composition.
    """

    def check_config(config: DictConfig, overrides: list[str]) -> None:
        recorded: Any = OmegaConf.to_container(config.hydra.overrides, resolve=False)
        if sorted(recorded["hydra"] + recorded["task"]) != sorted(overrides):
            raise ConfigError(
                "hydra.overrides is what the command line says, and is not taken from a config"
            )
        _take_base(config)
        check(config, incomplete=incomplete)

    register_resolvers()
    secrets.redact_logs()
    hydra_hook.install(_check_overrides, check_config, _check_file)


def _check_overrides(overrides: list[str]) -> None:
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
    """Where the config names a run as the target, put that run's base into it.

    Raises:
        ConfigError: the run is no target, or another base was asked for.
    """
    path = OmegaConf.select(config, "target.run")
    if not isinstance(path, str):
        return  # none, or one that `check` refuses
    try:
        theirs, choice = target_base.base_of(path)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if choice in schema.options("base") and isinstance(theirs, dict):
        schema.complete(theirs, schema.load(f"base/{choice}"), "base")
    given: Any = OmegaConf.to_container(config.base, resolve=False)
    if not isinstance(given, dict):
        return
    asked = [override.lstrip("+") for override in config.hydra.overrides.task]
    free = [f"base.{key}" for key in target_base.FREE]
    named = {override.partition("=")[0] for override in asked if re.match(r"base\b", override)}
    own = [place.partition(".")[2] for place in named & {*free}]
    if config.hydra.runtime.choices.base != default_choices()["base"] or named - {*free}:
        own = list(target_base.FREE)
        if fault := target_base.other_base(path, theirs, given):
            raise ConfigError(fault)
    with open_dict(config):
        config.base = theirs | {key: given[key] for key in own if key in given}
        config.hydra.runtime.choices.base = choice


def register_resolvers() -> None:
    """`${run_folder:RUNS,NAME,RESUME}` is where a run lives; see `run_folder`."""
    OmegaConf.register_new_resolver("run_folder", run_folder, use_cache=True, replace=True)


def check(
    config: DictConfig, choices: dict[str, Any] | None = None, incomplete: bool = False
) -> None:
    """Refuse a composed config that cannot be run. Which file each group took stands in Hydra's
    node, or in `choices`. `incomplete` is for a config that is only shown: values may be missing.

    Raises:
        ConfigError: lists every fault found.
    """
    faults = [*forbidden.forbidden_settings(config), *secrets.secrets_in(config)]
    # a run folder's config is only read: it asks for no package of its training
    composed = choices is None
    if not faults and choices is None:
        if config.hydra.job.config_name is None:  # Hydra's own, for --hydra-help
            return
        choices = OmegaConf.to_container(config.hydra.runtime.choices)  # type: ignore[assignment]
    if not faults:
        plain = _plain(config)
        faults = schema.problems(plain, root_schema(choices or {}), "", incomplete)
        if not faults:
            faults = [
                *_run_folder(plain),
                *conflicts(plain),
                *lengths.problems(plain),
                *_peft_faults(plain),
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
                " 'hydra-submitit-launcher>=1.2,<2'. Without it: python -m trainer.submit"
                " --multirun"
            ]
    if faults:
        # An override stands in Hydra's node once more.
        raise ConfigError(
            "\n".join(
                [fault for fault in faults if not fault.startswith("hydra.overrides.")] or faults
            )
        )


def _plain(config: DictConfig) -> dict[str, Any]:
    """The config without Hydra's node as plain containers; `???` stays."""
    bare = OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
    try:
        with limits.limited(RESOLVED_WITHIN, "resolving them"):  # they can double a text each
            return OmegaConf.to_container(bare, resolve=True)  # type: ignore[return-value]
    except Exception as error:
        raise ConfigError(f"an interpolation of the config cannot be resolved: {error}") from None


def compose(argv: list[str]) -> DictConfig:
    """Compose and check a config from command-line arguments without starting a run, for the other
    verbs."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir

    install()
    with initialize_config_dir(config_dir=str(schema.CONF), version_base="1.3", job_name="trainer"):
        config = hydra_compose("config", overrides=rewrite(argv), return_hydra_config=False)
    return config


def _peft_faults(plain: dict[str, Any]) -> Iterator[str]:
    """Faults of a method of PEFT's and its fields."""
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
