"""Hydra's own options on the command line, such as --multirun and --config-dir."""

from __future__ import annotations

import argparse
import difflib

from trainer.config.errors import ConfigError


def parse(argv: list[str], commands: list[str]) -> argparse.Namespace:
    """Read Hydra's options; `overrides` holds the other words.

    Raises:
        ConfigError: an option does not exist or is not allowed, or a word is no override.
    """
    from hydra._internal.utils import get_args_parser

    parser = get_args_parser()
    flags, unknown = parser.parse_known_args(argv)
    if unknown:
        names = list(parser._option_string_actions)
        close = difflib.get_close_matches(unknown[0], names, n=1, cutoff=0.6)
        hint = f"Did you mean {close[0]}?" if close else "graft --hydra-help lists the options."
        raise ConfigError(f"{unknown[0]}: there is no such option. {hint}")
    if flags.experimental_rerun is not None:
        raise ConfigError(
            "--experimental-rerun loads a pickle, which can run any code. Use resume=RUN_FOLDER."
        )
    for word in flags.overrides:
        if "=" not in word and not word.startswith("~"):
            hint = f". The command comes first: graft {word} ..." if word in commands else ""
            raise ConfigError(f"{word}: expected KEY=VALUE, in quotes if it has spaces{hint}")
    if flags.config_path is not None or flags.config_name is not None:
        raise ConfigError(
            "conf/ is the schema of all configs. Put your own into FOLDER/experiment/NAME.yaml, and"
            " give --config-dir=FOLDER"
        )
    launcher = [word for word in flags.overrides if word.startswith("hydra/launcher=")]
    if launcher and launcher[0] != "hydra/launcher=basic" and not flags.multirun:
        raise ConfigError(
            f"{launcher[0]} starts the runs of a sweep: add --multirun. One run as a SLURM job:"
            " graft submit"
        )
    return flags
