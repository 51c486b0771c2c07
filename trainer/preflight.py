"""What can be known before weights are loaded: what becomes of the rows, what is trained, how long
it takes, whether it fits.

    python -m trainer.preflight +experiment=NAME ... [--config-dir FOLDER] [--json FILE] [--samples
    N]

reads the whole data set and prints a table and a preview, trained tokens in one colour and masked
ones in another. Errors make the exit code 2. Training runs the same checks before it loads
anything.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from pathlib import Path
from typing import Any

from rich import get_console
from rich.text import Text

from trainer.assembly import quiet
from trainer.assembly.build import instantiate
from trainer.assembly.recipe import Recipe
from trainer.session import preview
from trainer.session.inspect import inspect


def main(argv: list[str]) -> int:
    """The verb; see the module's text."""
    from omegaconf import OmegaConf

    from trainer.config import compose as configs
    from trainer.config.errors import EXIT_BAD_INPUT, bad, told
    from trainer.session import failures

    parser = argparse.ArgumentParser(
        "python -m trainer.preflight", add_help=False, allow_abbrev=False
    )
    parser.add_argument("-h", "--help", action="store_true")
    parser.add_argument("--config-dir", metavar="FOLDER")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--samples", metavar="N", type=int, default=2)
    options, arguments = parser.parse_known_args(argv)
    if options.help:
        print(__doc__)
        return 0
    if options.json and not Path(options.json).parent.is_dir():
        return bad(f"--json {options.json}: there is no such folder")
    if options.config_dir:
        arguments.append(f"hydra.searchpath=['file://{Path(options.config_dir).resolve()}']")
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        config: dict[str, Any] = OmegaConf.to_container(configs.compose(arguments), resolve=True)  # type: ignore[assignment]
    except Exception as error:  # a ConfigError, or Hydra's own: an unknown group or experiment
        return bad(told(error))
    quiet.quiet()
    try:
        devices = config["lightning"]["devices"]
        ranks = (devices if isinstance(devices, int) else 1) * config["lightning"]["num_nodes"]
        recipe = Recipe.of(config, instantiate(config["adapter"]), ranks=ranks)
        result = inspect(recipe, Path(config["runs"]) / config["name"])
    except Exception as error:
        return failures.report_and_exit_code(error, config)
    if options.json:
        Path(options.json).write_text(json.dumps(result, indent=2) + "\n")
    console = get_console()
    console.print(preview.table(result))
    for text in preview.samples(recipe.data, options.samples):
        console.print(text)
    for kind, style in (("warnings", "yellow"), ("errors", "red")):
        for line in result[kind]:
            console.print(Text.assemble((kind[:-1], style), f": {line}"))
    return EXIT_BAD_INPUT if result["errors"] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
