"""Conversations whose answers the target writes itself: what a drafter is distilled on, and what is
measured with.

    python -m trainer.respond base=NAME|run=FOLDER[@last|best|STEP] prompts=FILE|task=NAME
    out=FOLDER [split=train] [field=null]
                              [answers=last|all] [per=conversation|answer] [skip=0] [rows=null]
                              [batch_size=16] [max_new_tokens=512] [temperature=0] [top_p=1]
                              [top_k=0] [seed=0] [cut=keep|drop] [template.OPTION=VALUE ...]
                              [base.KEY=VALUE task.KEY=VALUE precision=...]

The target is a base of conf/base, or a run's base with its adapter as it is, unmerged. prompts= is
a file that task=sft would read, or one with a `prompt`, `question` or `turns` (Spec-Bench; each
turn is answered in turn), or any `field`; task= takes a task's own rows. answers=last writes the
last answer anew, all every one but those with tool calls: only what the target wrote should train a
drafter, so train with task.train_on=last after answers=last. per=answer writes a row for every
answer, to train with task.train_on=last where the template takes the reasoning out of earlier
answers. `skip` and `rows` count rows of the file.

temperature=0 is greedy. Else every answer is drawn with random numbers of its own, from (seed, row,
turn): its text depends neither on the rows beside it nor on where a stopped command went on, but
for near ties that batched products round differently. The model's own generation settings (a
repetition penalty, say) are not used, since a decoder does not verify against them.

template.enable_thinking=false and the like are what the chat template is given, as the server will
give it; OUT/chat_template.jinja is the template with those set, to train with:
task.chat_template=OUT/chat_template.jinja.

OUT/rows.jsonl         {"messages": [...], "row": 7}, as task=sft reads it, batch by batch; "cut": true where the last answer met
                       max_new_tokens before its end; "inexact": true where the text, tokenised
                       again, is not what was generated
OUT/left_out.jsonl     rows that have no answer, and why: empty, cut (cut=drop), long (no room in the model), refused (by the template)
OUT/provenance.json    target, settings, template, versions, the prompts' digest, counts

The same command goes on where it was stopped, with other settings it is refused; batch_size and
rows may change.
"""

from __future__ import annotations

import hashlib
import json
import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from tasks import reading
from trainer.assembly import quiet
from trainer.assembly.build import instantiate
from trainer.cluster import slurm_job
from trainer.cluster.signals import Signals
from trainer.data import prompts
from trainer.data.prompts import PromptRow
from trainer.evaluation import responses
from trainer.evaluation.responses import Responder
from trainer.storage.answers import AnswersFolder
from trainer.storage.atomic import write_text
from trainer.storage.progress import Progress

KNOWN: dict[str, Any] = {
    "base": None,
    "run": None,
    "prompts": None,
    "task": None,
    "out": ...,
    "split": "train",
    "field": None,
    "answers": "last",
    "skip": 0,
    "rows": None,
    "batch_size": 16,
    "max_new_tokens": 512,
    "temperature": 0.0,
    "top_p": 1.0,
    "top_k": 0,
    "seed": 0,
    "cut": "keep",
    "per": "conversation",
}
# of conf/task/sft, what has a meaning for the prompts of a file
_ROWS = ("system", "columns", "format", "chat_template")


def _arguments(argv: list[str]) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
    """(the verb's own options, those of the chat template, settings of conf/).

    Raises:
        SystemExit: as trainer.config.options.arguments.
    """
    import yaml

    from trainer.config.errors import bad
    from trainer.config.options import arguments

    jinja: dict[str, Any] = {}
    given, own = [], []
    for word in argv:
        key, equals, value = word.partition("=")
        if equals and key.startswith("template."):
            jinja[key.removeprefix("template.")] = yaml.safe_load(value)
        elif equals and (key.startswith(("task.", "base.")) or key == "precision"):
            given.append(word)
        else:
            own.append(word)
    options = arguments(own, KNOWN, __doc__ or "")
    faults = []
    if (options["base"] is None) == (options["run"] is None):
        faults.append("give the target: either base=NAME, of conf/base, or run=FOLDER")
    if (options["prompts"] is None) == (options["task"] is None):
        faults.append("give what is answered: either prompts=FILE or task=NAME, of conf/task")
    if options["run"] is not None and (
        own_base := [word for word in given if not word.startswith("task.")]
    ):
        faults.append(f"{own_base[0]}: a run brings its base and precision along")
    if options["prompts"] is not None:
        keys = [word.partition("=")[0] for word in given]
        faults += [
            f"{key} does nothing to prompts={options['prompts']}"
            for key in keys
            if key.startswith("task.") and key[5:] not in _ROWS
        ]
    elif options["field"] is not None:
        faults.append("field= names a column of prompts=FILE")
    try:
        options["rows"] = None if options["rows"] is None else int(options["rows"])
    except ValueError:
        faults.append(f"rows={options['rows']}: a whole number")
        options["rows"] = None
    for name, fits, said in (
        ("skip", options["skip"] >= 0, "at least 0"),
        ("rows", options["rows"] is None or options["rows"] >= 1, "at least 1"),
        ("batch_size", options["batch_size"] >= 1, "at least 1"),
        ("max_new_tokens", options["max_new_tokens"] >= 1, "at least 1"),
        ("temperature", options["temperature"] >= 0, "at least 0"),
        ("top_p", 0 < options["top_p"] <= 1, "above 0, at most 1"),
        ("top_k", options["top_k"] >= 0, "at least 0; 0 takes all tokens"),
        ("seed", options["seed"] >= 0, "at least 0"),
        ("answers", options["answers"] in ("last", "all"), "last or all"),
        ("cut", options["cut"] in ("keep", "drop"), "keep or drop"),
        ("split", options["split"] in ("train", "eval"), "train or eval"),
        ("per", options["per"] in ("conversation", "answer"), "conversation or answer"),
    ):
        if not fits:
            faults.append(f"{name}={options[name]}: {said}")
    if options["temperature"] == 0 and (options["top_p"] < 1 or options["top_k"]):
        faults.append("top_p and top_k do nothing with temperature=0, which is greedy")
    if faults:
        raise SystemExit(bad("\n".join(faults)))
    return options, jinja, given


def _composed(options: dict[str, Any], given: list[str]) -> dict[str, Any]:
    """The settings of base, task and precision."""
    from omegaconf import OmegaConf

    from trainer.config import compose

    words = [f"task={options['task'] or 'sft'}", *given]
    if options["base"] is not None:
        words.insert(0, f"base={options['base']}")
    if options["prompts"] is not None:
        words += [
            f"task.path={json.dumps(options['prompts'], ensure_ascii=False)}",
            "task.eval_fraction=0",
        ]
    plain: Any = OmegaConf.to_container(compose.compose(words), resolve=True)
    return plain


def main(argv: list[str]) -> int:
    """The verb; see the module's text."""
    from trainer.config import errors as errors_module
    from trainer.session import failures

    options, jinja, given = _arguments(argv)
    try:
        plain = _composed(options, given)
    except Exception as error:  # a ConfigError, or Hydra's own: an unknown base or task
        return errors_module.bad(errors_module.explain(error))
    quiet.quiet()
    written: AnswersFolder | None = None
    count, signals = 0, Signals()
    try:
        with signals:
            if options["prompts"] is not None:
                # before the task, which would call it task.path
                reading.Source(options["prompts"], "train", False, "prompts")
            task = instantiate(plain["task"])
            found, key = prompts.load(options, plain, task)
            count = len(found)
            keeps_template = any(word.startswith("task.chat_template=") for word in given)
            responder = responses.make_responder(options, plain, task, keeps_template, jinja)
            with AnswersFolder(
                Path(options["out"]).expanduser(), *_described(options, responder, key, jinja)
            ) as written:
                if isinstance(responder.renderer.template, str):
                    write_text(written.path / "chat_template.jinja", responder.renderer.template)
                _write(responder, found, written, options)
    except (SystemExit, KeyboardInterrupt) as stop:
        if written is not None:
            said = f"stopped with {len(written.done)} of {count} conversations in {written.path}"
            print(f"{said}: the same command goes on", file=sys.stderr)
        if signals.received is not None:
            return slurm_job.exit_code(plain, signals.received, None, None)
        return stop.code if isinstance(stop, SystemExit) and isinstance(stop.code, int) else 130
    except Exception as error:
        return failures.report_and_exit_code(error)
    if not written.counts["rows"]:
        print(
            f"{written.rows}: no conversation has an answer ({_listed(written.counts)})",
            file=sys.stderr,
        )
        return 1
    print(f"{written.rows}: {_listed(written.counts)}")
    return 0


def _described(
    options: dict[str, Any], responder: Responder, key: str, jinja: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the rows depend on, and what is recorded besides."""
    settings = {
        **{
            name: value
            for name, value in options.items()
            if name not in ("out", "run", "base", "prompts", "task")
        },
        "prompts": key,
        "target": responder.described,
        "stops": responder.stops,
        "template": hashlib.sha256(json.dumps(responder.renderer.template).encode()).hexdigest(),
        "template_options": jinja,
    }
    described = {
        "base": responder.base.path,
        "run": options["run"],
        "prompts": options["prompts"] or f"task={options['task']}",
        "device": responder.device.type,
        "python": platform.python_version(),
        "versions": {
            name: metadata.version(name) for name in ("torch", "transformers", "tokenizers")
        },
    }
    return settings, described


def _write(
    responder: Responder, found: list[PromptRow], written: AnswersFolder, options: dict[str, Any]
) -> None:
    with Progress("respond", len(found), "conversations", done=len(written.done)) as progress:
        for batch in prompts.batches(found, options["batch_size"], written.done):
            written.add(responses.respond(responder, batch, options))
            progress.advance(len(batch))


def _listed(counts: dict[str, int]) -> str:
    return ", ".join(
        f"{name} {count:,}" for name, count in counts.items() if count or name == "rows"
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
