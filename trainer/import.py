"""Turn a config of Axolotl, LLaMA-Factory, torchtune, LitGPT or TRL into an experiment.

    graft import FILE [out=FILE]

FILE is YAML or JSON. Each key is converted, or listed with the reason why it has no counterpart, or
listed as unknown. The lists are comments of the experiment. Check it with graft preflight.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from trainer.config import paths
from trainer.config.options import exit_with, option, parse, places
from trainer.config.shown import say


@dataclass(frozen=True)
class Options:
    """The options of the command line."""

    of: Literal["auto", "axolotl", "llama-factory", "torchtune", "litgpt", "trl"] = option(
        "whose config it is; trl is TRL and PEFT", "auto"
    )
    out: Path | None = option(
        "the experiment to write, by default experiments/experiment/NAME.yaml", None, value="FILE"
    )
    files: tuple[str, ...] = places("the config", "FILE")

    def faults(self) -> Iterator[str]:
        """Yield what is wrong with the file."""
        if len(self.files) != 1:
            yield "expected one config: graft import FILE"
        elif fault := paths.file_fault(self.files[0]):
            yield f"{self.files[0]}: {fault}"


def main(argv: list[str]) -> int:
    """Run the command; see the module's text."""
    options = parse(Options, argv, __doc__, "graft import")
    from trainer.config import imported
    from trainer.evaluation.tables import Table
    from trainer.session import failures
    from trainer.storage import atomic

    source = Path(options.files[0]).expanduser()
    try:
        content = imported.read(source)
        kind = imported.kind_of(content) if options.of == "auto" else options.of
        if kind is None:
            raise imported.ConfigError(
                f"{source}: it is not known whose config that is; say so with of=axolotl,"
                " llama-factory, torchtune, litgpt or trl"
            )
        result = imported.convert(content, kind)
        name = "".join(c if c.isalnum() or c in "._-" else "-" for c in source.stem) or "imported"
        out = options.out or Path("experiments/experiment") / f"{name}.yaml"
        rows = [[key, "carried", ", ".join(f"{k}={v}" for k, v in settings.items())]
                for key, settings in result.carried.items()]  # fmt: skip
        rows += [[key, "not carried", why] for key, why in result.explained.items()]
        rows += [[key, "unknown", ""] for key in result.unknown]
        Table([f"key of {kind}", "", ""], rows, frozenset({0, 1, 2})).show(longest=90)
        out.parent.mkdir(parents=True, exist_ok=True)
        atomic.write_output(out, imported.experiment(result, name))
    except Exception as error:
        return failures.report_and_exit_code(error)
    say(f"{len(result.carried)} carried, {len(result.explained)} explained,"
        f" {len(result.unknown)} unknown of {len(rows)} keys")  # fmt: skip
    say(f"{out}\nCheck it: graft preflight --config-dir={out.parent.parent} experiment={out.stem}")
    return 0


if __name__ == "__main__":
    exit_with(main)
