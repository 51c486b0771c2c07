"""Let a model answer prompts, to train or measure a drafter on its own text.

    graft respond base=NAME|run=FOLDER[@last|best|STEP] prompts=FILE|task=NAME out=FOLDER [OPTIONS]

The target is a base of conf/base, or a run's base with its adapter as it is, unmerged. prompts= is
a file that task=sft would read, or one with a `prompt`, `question` or `turns` (Spec-Bench; turns
are answered one after another), or any `field`. task= takes a task's own rows.

answers=last replaces the last answer of a conversation, answers=all each answer without tool calls.
A drafter should learn the target's own text only, so train with task.train_on=last after
answers=last. per=answer writes a row for every answer, to train with task.train_on=last where the
template takes the reasoning out of earlier answers.

Each sampled answer has its own random numbers, drawn from (seed, row, turn). Its text depends
neither on the rows of its batch nor on where a stopped command resumed, except for near ties that
batched products round differently. The model's own generation settings (a repetition penalty, say)
are not used, because a decoder does not verify against them.

template.enable_thinking=false and the like are given to the chat template, as the server will give
them. OUT/chat_template.jinja is the template with those set; train with
task.chat_template=OUT/chat_template.jinja.

    OUT/rows.jsonl        {"messages": [...], "row": 7}, as task=sft reads it. "cut": true where the
                          last answer met max_new_tokens before its end; "inexact": true where the
                          text, tokenised again, is not what was generated
    OUT/left_out.jsonl    rows that have no answer, and why: empty, cut (cut=drop), long (no room in
                          the model), refused (by the template)
    OUT/provenance.json   target, settings, template, versions, the prompts' digest, counts

The same command resumes where it was stopped. With other settings it is refused, except for
batch_size and rows.
"""

from __future__ import annotations

import sys

from trainer.config import answer_options
from trainer.config.answer_options import AnswerOptions
from trainer.config.errors import bad, explain
from trainer.config.options import exit_with, parse
from trainer.config.shown import say


def main(argv: list[str]) -> int:
    """Run the command; see the module's text."""
    options = parse(AnswerOptions, argv, __doc__, "graft respond")
    try:
        config = answer_options.composed(options)
    except Exception as error:  # a ConfigError, or Hydra's own: an unknown base or task
        return bad(explain(error))
    from trainer.assembly import quiet
    from trainer.cluster import slurm_job
    from trainer.cluster.signals import Signals
    from trainer.session import failures

    quiet.quiet()
    work, signals = None, Signals()
    try:
        with signals:
            from trainer.evaluation import answer_prompts

            with answer_prompts.opened(options, config) as work:
                answer_prompts.write(work)
    except (SystemExit, KeyboardInterrupt) as stop:
        if work is not None:
            text = f"stopped with {len(work.folder.done)} of {len(work.rows)} conversations in"
            text += f" {work.folder.path}: run the same command again to resume"
            say(text, file=sys.stderr)
        if signals.received is not None:
            return slurm_job.exit_code(config, signals.received, None, None)
        return stop.code if isinstance(stop, SystemExit) and isinstance(stop.code, int) else 130
    except Exception as error:
        return failures.report_and_exit_code(error)
    counts = ", ".join(
        f"{name} {count:,}" for name, count in work.folder.counts.items() if count or name == "rows"
    )
    if not work.folder.counts["rows"]:
        text = f"{work.folder.rows}: no conversation has an answer ({counts}){work.folder.why}"
        say(text, file=sys.stderr)
        return 1
    say(f"{work.folder.rows}: {counts}{work.folder.why}")
    return 0


if __name__ == "__main__":
    exit_with(main)
