"""Ask a run's model one question, or those of a file.

    graft generate run=FOLDER[@last|best|STEP] prompt="..." [OPTIONS]
    graft generate run=FOLDER[@last|best|STEP] prompts=FILE.jsonl batch_size=8 [OPTIONS]

The answer streams. compare=true shows the base's answer next to it.

prompts=FILE.jsonl has one {"prompt": "..."} or {"messages": [...]} a line; the last answer of
messages is left out. batch_size of them are answered at once. The output has a line {"messages":
[...]} for each, with the model's answer.

If the run has a drafter, it drafts what the model then verifies: the same text in less time, or
when sampling a text of the same distribution. draft=false decodes without it.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from dataclasses import dataclass

from trainer.config import paths
from trainer.config.decoding_options import DrafterOptions, SamplingOptions
from trainer.config.options import exit_with, option, parse
from trainer.config.shown import say


@dataclass(frozen=True)
class Options(DrafterOptions, SamplingOptions):
    """The options of the command line."""

    run: str = option("the run folder", value="FOLDER[@last|best|STEP]", reads=paths.saved_fault)
    prompt: str | None = option("the question; - reads standard input", None, value="TEXT")
    prompts: str | None = option(
        "a file of prompts", None, value="FILE.jsonl", reads=paths.file_fault
    )
    batch_size: int = option("prompts of the file at once", 8, at_least=1)
    system: str | None = option("the system prompt", None, value="TEXT")
    compare: bool = option("show the base's answer as well", False)
    max_new_tokens: int = option("most tokens of the answer", 256, at_least=1)
    draft: bool = option("let a drafter draft", True)

    def faults(self) -> Iterator[str]:
        """Yield what does not go together."""
        yield from super().faults()
        if (self.prompt is None) == (self.prompts is None):
            yield "give one of prompt and prompts"
        if self.prompts is not None and (self.compare or self.system is not None):
            yield "compare and system are for prompt=TEXT, and prompts=FILE has messages of its own"


def main(argv: list[str]) -> int:
    """Run the command; see the module's text."""
    options = parse(Options, argv, __doc__, "graft generate")
    import torch

    from trainer.assembly import quiet
    from trainer.assembly.trained import load_trained
    from trainer.evaluation import answered_file, streamed_answer
    from trainer.session import failures

    quiet.quiet()
    drafter = options if options.draft else None
    try:
        run = load_trained(options.run, "cuda" if torch.cuda.is_available() else "cpu")
        if options.prompts is not None:
            batches = answered_file.Batches(options.batch_size, options.max_new_tokens)
            answered_file.answer_file(
                run, options.prompts, options, drafter, batches, functools.partial(say, flush=True)
            )
            return 0
        prompt = sys.stdin.read() if options.prompt == "-" else str(options.prompt)
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
