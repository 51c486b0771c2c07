"""Ask a run's model one question.

    graft generate run=FOLDER[@last|best|STEP] prompt="..." [OPTIONS]

The answer streams. compare=true shows the base's answer next to it.

If the run has a drafter, it drafts what the model then verifies: the same text in less time, or
when sampling a text of the same distribution. draft=false decodes without it.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

from trainer.config import paths
from trainer.config.decoding_options import DrafterOptions, SamplingOptions
from trainer.config.options import exit_with, option, parse
from trainer.config.shown import say


@dataclass(frozen=True)
class Options(DrafterOptions, SamplingOptions):
    """The options of the command line."""

    run: str = option("the run folder", value="FOLDER[@last|best|STEP]", reads=paths.run_fault)
    prompt: str = option("the question; - reads standard input", value="TEXT")
    system: str | None = option("the system prompt", None, value="TEXT")
    compare: bool = option("show the base's answer as well", False)
    max_new_tokens: int = option("of the answer", 256, at_least=1)
    draft: bool = option("let a drafter draft", True)


def main(argv: list[str]) -> int:
    """Run the command; see the module's text."""
    options = parse(Options, argv, __doc__, "graft generate")
    import torch

    from trainer.assembly import quiet
    from trainer.assembly.trained import load_trained
    from trainer.evaluation import streamed_answer
    from trainer.session import failures

    quiet.quiet()
    drafter = options if options.draft else None
    try:
        run = load_trained(options.run, "cuda" if torch.cuda.is_available() else "cpu")
        prompt = sys.stdin.read() if options.prompt == "-" else options.prompt
        ids, stops = streamed_answer.prompt_ids(run, prompt, options.system)
        if options.compare:
            streamed_answer.compare(run, ids, stops, options, options.max_new_tokens, drafter)
            return 0
        with streamed_answer.drafting(run, drafter):
            streamed_answer.answer(
                run.model, ids, run.base.tokenizer, stops, options, options.max_new_tokens, _write
            )
        say()
    except Exception as error:
        return failures.report_and_exit_code(error)
    return 0


def _write(text: str) -> None:
    say(text, end="", flush=True)


if __name__ == "__main__":
    exit_with(main)
