"""Let a model answer prompts, to train or measure a drafter on its own text.

    graft respond base=NAME|run=FOLDER[@last|best|STEP] prompts=FILE|task=NAME out=FOLDER [OPTIONS]

The target is a base of conf/base, or a run's base with its adapter as it is, unmerged. prompts= is
a file that task=sft would read, or one with a `prompt`, `question` or `turns` (Spec-Bench; each
turn is answered in turn), or any `field`. task= takes a task's own rows.

answers=last writes the last answer again, all every answer except those with tool calls. Only what
the target wrote should train a drafter, so train with task.train_on=last after answers=last.
per=answer writes a row for every answer, to train with task.train_on=last where the template takes
the reasoning out of earlier answers.

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
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from trainer.config import paths
from trainer.config.decoding_options import SamplingOptions
from trainer.config.errors import bad, explain
from trainer.config.options import exit_with, option, parse, rest, values_of
from trainer.config.quoting import in_quotes
from trainer.config.shown import say

# settings of conf/task/sft that have a meaning for the prompts of a file
FILE_SETTINGS = ("system", "columns", "format", "chat_template")


@dataclass(frozen=True)
class Options(SamplingOptions):
    """What the command line says."""

    base: str | None = option("the target: a base of conf/base", None, value="NAME")
    run: str | None = option(
        "or a run", None, value="FOLDER[@last|best|STEP]", reads=paths.run_fault
    )
    prompts: str | None = option("a file of prompts", None, value="FILE")
    task: str | None = option("or a task of conf/task", None, value="NAME")
    out: Path = option("the folder to write", value="FOLDER")
    split: Literal["train", "eval"] = option("of the task", "train")
    field: str | None = option("the column of the file that holds the prompt", None, value="NAME")
    answers: Literal["last", "all"] = option("which answers to write again", "last")
    skip: int = option("rows of the file to skip", 0, at_least=0)
    rows: int | None = option("rows of the file to answer", None, value="N", at_least=1)
    batch_size: int = option("conversations at once", 16, at_least=1)
    max_new_tokens: int = option("of an answer", 512, at_least=1)
    top_k: int = option("draw from the k likeliest tokens; 0 takes all", 0, at_least=0)
    cut: Literal["keep", "drop"] = option("answers that meet max_new_tokens", "keep")
    per: Literal["conversation", "answer"] = option("what a row holds", "conversation")
    template: tuple[str, ...] = rest(
        "options of the chat template",
        "template.OPTION=VALUE",
        lambda key: key.startswith("template."),
    )
    settings: tuple[str, ...] = rest(
        "settings of the base and the task",
        "base.KEY=VALUE task.KEY=VALUE precision=...",
        lambda key: key.startswith(("task.", "base.")) or key == "precision",
    )

    def faults(self) -> Iterator[str]:
        """Yield what does not go together."""
        keys = [word.partition("=")[0] for word in self.settings]
        if (self.base is None) == (self.run is None):
            yield "give the target: either base=NAME, of conf/base, or run=FOLDER"
        if (self.prompts is None) == (self.task is None):
            yield "give what is answered: either prompts=FILE or task=NAME, of conf/task"
        if self.run is not None:
            for word in self.settings:
                if not word.startswith("task."):
                    yield f"{word}: a run brings its base and precision along"
        if self.prompts is not None:
            yield from paths.rows_problems(self.prompts, "prompts")
            for key in keys:
                if key.startswith("task.") and key[5:] not in FILE_SETTINGS:
                    yield f"{key} does nothing to prompts={self.prompts}"
        elif self.field is not None:
            yield "field= names a column of prompts=FILE"
        if self.temperature == 0 and (self.top_p < 1 or self.top_k):
            yield "top_p and top_k do nothing with temperature=0, which is greedy"


def main(argv: list[str]) -> int:
    """Run the command; see the module's text."""
    parsed = parse(Options, argv, __doc__, "graft respond")
    options = values_of(parsed) | {"out": str(parsed.out)}
    try:
        config = _composed(options, list(parsed.settings))
    except Exception as error:  # a ConfigError, or Hydra's own: an unknown base or task
        return bad(explain(error))
    import yaml

    from trainer.assembly import quiet
    from trainer.cluster import slurm_job
    from trainer.cluster.signals import Signals
    from trainer.session import failures
    from trainer.storage.answers import AnswersFolder
    from trainer.storage.atomic import write_text

    quiet.quiet()
    words = [word.partition("=") for word in parsed.template]
    jinja = {key.removeprefix("template."): yaml.safe_load(value) for key, _, value in words}
    folder: AnswersFolder | None = None
    count, signals = 0, Signals()
    try:
        with signals:
            from trainer.evaluation import answer_prompts

            keeps_template = any(word.startswith("task.chat_template=") for word in parsed.settings)
            rows, key, responder = _load(options, config, keeps_template, jinja)
            count = len(rows)
            with AnswersFolder(
                parsed.out, *answer_prompts.described(options, responder, key, jinja)
            ) as folder:
                if isinstance(responder.renderer.template, str):
                    write_text(folder.path / "chat_template.jinja", responder.renderer.template)
                answer_prompts.write(responder, rows, folder, options)
    except (SystemExit, KeyboardInterrupt) as stop:
        if folder is not None:
            text = f"stopped with {len(folder.done)} of {count} conversations in {folder.path}"
            say(f"{text}: run the same command again to resume", file=sys.stderr)
        if signals.received is not None:
            return slurm_job.exit_code(config, signals.received, None, None)
        return stop.code if isinstance(stop, SystemExit) and isinstance(stop.code, int) else 130
    except Exception as error:
        return failures.report_and_exit_code(error)
    counts = ", ".join(
        f"{name} {count:,}" for name, count in folder.counts.items() if count or name == "rows"
    )
    if not folder.counts["rows"]:
        say(f"{folder.rows}: no conversation has an answer ({counts})", file=sys.stderr)
        return 1
    say(f"{folder.rows}: {counts}")
    return 0


def _composed(options: dict[str, Any], settings: list[str]) -> dict[str, Any]:
    """The settings of base, task and precision."""
    from omegaconf import OmegaConf

    from trainer.config import compose

    words = [f"base={options['base']}"] if options["base"] is not None else []
    words += [f"task={options['task'] or 'sft'}", *settings]
    if options["prompts"] is not None:
        words += [f"task.path={in_quotes(options['prompts'])}", "task.eval_fraction=0"]
    config: Any = OmegaConf.to_container(compose.compose(words), resolve=True)
    paths.check(config)
    return config


def _load(
    options: dict[str, Any], config: dict[str, Any], keeps_template: bool, jinja: dict[str, Any]
) -> tuple[list[Any], str, Any]:
    """(the rows to answer, their digest, the target)."""
    from trainer.assembly.build import instantiate
    from trainer.data import prompts
    from trainer.evaluation import responses

    task = instantiate(config["task"])
    rows, key = prompts.load(options, config, task)
    responder = responses.make_responder(options, config, task, keeps_template, jinja)
    return rows, key, responder


if __name__ == "__main__":
    exit_with(main)
