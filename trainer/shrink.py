"""Make a smaller base from a base: zeros, fewer layers, narrower MLPs or states.

    graft shrink base.path=FOLDER|NAME task.path=ROWS to=FOLDER method=METHOD [OPTIONS] [KEY=VALUE]

    magnitude    zero the smallest weights: of every 4 inputs two stay (pattern=2:4)
    wanda        zero those of least weight times norm of the input (arXiv 2306.11695)
    sparsegpt    zero some and move the others to make up for it (arXiv 2301.00774)
    drop_layers  leave out the decoder layers that change the states least
    narrow       leave out neurons of the MLPs, as many in each layer
    slice        rotate the states and leave out the numbers that vary least (arXiv 2401.15024)

Rows of the task calibrate it. A device holds one decoder layer at a time. The result is a plain
folder of transformers with config, weights, tokenizer and chat template; its README.md says what
was removed and what that costs in held-out loss. It appears when it is complete: loaded back and
compared. The same command resumes a stopped one after its last finished layer.

Train the result as any base, to recover what was lost: base.path=FOLDER adapter=lora.
"""

from __future__ import annotations

from trainer.config import shrink_options
from trainer.config.errors import bad, explain
from trainer.config.options import exit_with, parse
from trainer.config.shown import say
from trainer.config.shrink_options import ShrinkOptions


def main(argv: list[str]) -> int:
    """Run the command; see the module's text."""
    options = parse(ShrinkOptions, argv, __doc__, "graft shrink")
    try:
        config = shrink_options.composed(options)
    except Exception as error:  # a ConfigError, or Hydra's own: an unknown base or task
        return bad(explain(error))
    from rich import get_console
    from rich.markdown import Markdown

    from trainer.assembly import quiet
    from trainer.session import failures
    from trainer.shrinking import card, making

    quiet.quiet()
    try:
        record = making.shrink(options, config)
    except Exception as error:
        return failures.report_and_exit_code(error)
    say(card.removed(record))
    get_console().print(Markdown(card.table(record)))
    say(options.to)
    return 0


if __name__ == "__main__":
    exit_with(main)
