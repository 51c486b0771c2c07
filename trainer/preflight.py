"""Check a run before it loads weights: rows, what is trained, time, memory.

    graft preflight experiment=NAME [GROUP=CHOICE ...] [KEY=VALUE ...] [OPTIONS]

This command reads the whole data set and prints a table and a preview, with trained tokens in one
colour and masked tokens in another. Errors make the exit code 2. Training runs the same checks
before it loads anything. With probe=true the model is loaded, and two steps on the longest batch
show what memory and time the run really takes.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.config import paths
from trainer.config.errors import EXIT_BAD_INPUT, bad, explain
from trainer.config.options import exit_with, option, parse, rest
from trainer.config.overrides import is_override
from trainer.config.quoting import in_quotes

FLAGS = {
    "--json": "json",
    "--samples": "samples",
    "--config-dir": "--config-dir",
    "-cd": "--config-dir",
}


@dataclass(frozen=True)
class Options:
    """The options of the command line."""

    json: Path | None = option("write the result as JSON", None, value="FILE", writes=True)
    samples: int = option("rows to preview", 2, at_least=0)
    probe: bool = option("load the model and measure two steps on the longest batch", False)
    config_dir: Path | None = option(
        "a folder with your own experiments",
        None,
        key="--config-dir",
        value="FOLDER",
        reads=paths.config_dir_fault,
    )
    overrides: tuple[str, ...] = rest("the run's config", "KEY=VALUE", is_override)


def main(argv: list[str]) -> int:
    """Run the command; see the module's text."""
    options = parse(Options, list(_as_words(argv)), __doc__, "graft preflight")
    from omegaconf import OmegaConf

    from trainer.config import compose

    words = list(options.overrides)
    if options.config_dir:
        folder = in_quotes(f"file://{options.config_dir.resolve()}")
        words.append(f"hydra.searchpath=[{folder}]")
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        config: Any = OmegaConf.to_container(compose.compose(words), resolve=True)
        paths.check(config)
    except Exception as error:  # a ConfigError, or Hydra's own: an unknown group or experiment
        return bad(explain(error))
    from rich import get_console
    from rich.text import Text

    from trainer.assembly import quiet
    from trainer.assembly.build import instantiate
    from trainer.assembly.recipe import Recipe, local_device
    from trainer.session import failures, preview
    from trainer.session.inspect import inspect, refuse_monitor
    from trainer.storage import atomic

    quiet.quiet()
    try:
        devices = config["lightning"]["devices"]
        ranks = (devices if isinstance(devices, int) else 1) * config["lightning"]["num_nodes"]
        recipe = Recipe.of(
            config,
            instantiate(config["adapter"]),
            local_device(config) if options.probe else None,
            ranks,
            refuse_monitor,
        )
        result = inspect(recipe, Path(config["runs"]) / config["name"])
        if options.probe and not result["errors"]:
            from trainer.session.probe import probe

            result["probe"] = probe(recipe)
    except Exception as error:
        return failures.report_and_exit_code(error, config)
    if options.json:
        atomic.write_output(options.json, json.dumps(result, indent=2) + "\n")
    console = get_console()
    console.print(preview.table(result))
    for text in preview.samples(recipe.data, options.samples):
        console.print(text)
    for kind, style in (("warnings", "yellow"), ("errors", "red")):
        for line in result[kind]:
            console.print(Text.assemble((kind[:-1], style), f": {line}"))
    return EXIT_BAD_INPUT if result["errors"] else 0


def _as_words(argv: list[str]) -> Iterator[str]:
    """Yield `--json FILE` and `--json=FILE` as `json=FILE`, and the like."""
    words = iter(argv)
    for word in words:
        flag, equals, value = word.partition("=")
        if flag in FLAGS:
            yield f"{FLAGS[flag]}={value if equals else next(words, '')}"
        else:
            yield word


if __name__ == "__main__":
    exit_with(main)
