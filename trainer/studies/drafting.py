"""The steps of `graft draft`, each a command of its own, recorded so that a stopped one continues.

OUT/draft.json   {"settings": ..., "steps": {NAME: {"seconds": ...}}, "head": arguments}
OUT/answers      of graft respond
OUT/head, OUT/head-cooled   runs
OUT/speculation.json, OUT/stale.json   results
OUT/FORMAT       exports
OUT/draft.md     all of it on one page
"""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from trainer.assembly.build import instantiate
from trainer.config import compose
from trainer.config.errors import ConfigError
from trainer.config.shown import say
from trainer.drafters import io
from trainer.evaluation import realigned, stale
from trainer.exporting import heads
from trainer.session.branches import Branch, arguments, finished
from trainer.storage import atomic, run_folder
from trainer.studies import drafting_page
from trainer.studies.running import locked

FREE = ("to", "dry", "out", "dtype", "verifier")  # options that may differ in a repeated command
HEAD, COOLED = "head", "head-cooled"


@dataclass(frozen=True)
class Step:
    """A step: `words` of a command of its own, or a function to call here."""

    name: str
    words: Callable[[], list[str]] | None = None
    call: Callable[[], None] | None = None
    output: Path | None = None  # a folder that the step writes at once, as its last act


class Work:
    """The folder of one `graft draft`, and what is done there.

    Raises:
        ConfigError: it was started with other settings.
    """

    def __init__(self, options: Any):
        self.options, self.out = options, options.out
        self.file = self.out / "draft.json"
        settings = {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in asdict(options).items()
            if key not in FREE
        }
        self.record: dict[str, Any] = {"settings": settings, "steps": {}}
        if self.file.exists():
            try:
                self.record = json.loads(self.file.read_text("utf-8"))
                before, _ = dict(self.record["settings"]), dict(self.record["steps"])
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise ConfigError(
                    f"{self.file} cannot be read ({error}): give another out=FOLDER"
                ) from None
            different = [
                f"{key}={before.get(key)!r} there, {settings[key]!r} here"
                for key in settings
                if before.get(key) != settings[key]
            ]
            if different:
                raise ConfigError(
                    f"{self.out} was started with other settings: {'; '.join(different)}. Give"
                    " the same ones to continue, or another out=FOLDER"
                )

    def save(self) -> None:
        """Write draft.json."""
        self.out.mkdir(parents=True, exist_ok=True)
        atomic.write_text(self.file, json.dumps(self.record, indent=2) + "\n")

    @property
    def head(self) -> str:
        """The run that has the finished head."""
        return str(self.out / (COOLED if self.options.cooldown else HEAD))

    def steps(self) -> Iterator[Step]:
        """Yield all steps in their order."""
        yield Step("answers", self._answers)
        yield Step("head", self._head)
        if self.options.cooldown:
            yield Step("cooldown", self._cooldown)
        yield Step("evaluation", self._evaluation)
        if self.options.draft is not None:
            yield Step("stale", call=self._stale)
        for to in self.options.to.split(","):
            words = lambda to=to: self._export(to)  # noqa: E731
            yield Step(f"export {to}", words, output=self.out / to)

    def _answers(self) -> list[str]:
        o = self.options
        rows = [] if o.rows is None else [f"rows={o.rows}"]
        return [
            "respond",
            f"run={o.run}",
            f"prompts={o.prompts}",
            f"out={self.out / 'answers'}",
            f"max_new_tokens={o.max_new_tokens}",
            f"temperature={o.temperature}",
            f"batch_size={o.batch_size}",
            *rows,
        ]

    def _head(self) -> list[str]:
        if "head" not in self.record:
            self.record["head"] = self._new_head()
            self.save()
        return [*self.record["head"], "resume=auto"]

    def _new_head(self) -> list[str]:
        o, answers = self.options, self.out / "answers"
        template = answers / "chat_template.jinja"
        rows = [
            f"task.path={answers / 'rows.jsonl'}",
            "task.train_on=last",
            *([f"task.chat_template={template}"] if template.exists() else []),
        ]
        constant = ["schedule=constant"] if o.cooldown else []
        more = [*rows, *constant, *o.overrides]
        if o.draft is not None:
            more = ["task=sft", *more]
            return realigned.arguments(o.draft, o.run, HEAD, str(self.out), more)[1]
        words = [f"+experiment={o.experiment}", f"target.run={o.run}"]
        return [*words, f"name={HEAD}", f"runs={self.out}", *more]

    def _cooldown(self) -> list[str]:
        branch = Branch(f"{self.out / HEAD}@last", str(self.options.cooldown), name=COOLED)
        return [*arguments(branch, [])[1], "resume=auto"]

    def _evaluation(self) -> list[str]:
        o = self.options
        chosen = (
            [f"heldout={o.each or 16}"]
            if o.questions is None
            else [f"prompts={o.questions}", f"each={o.each}"]
        )
        return [
            "evaluate",
            "task=speculation",
            f"run={self.head}",
            *chosen,
            f"max_new_tokens={o.max_new_tokens}",
            f"json={self.out / 'speculation.json'}",
        ]

    def _stale(self) -> None:
        o = self.options
        rows = stale.measure(self.head, o.draft, o.questions, o.each, o.max_new_tokens)
        atomic.write_text(self.out / "stale.json", json.dumps(rows, indent=2) + "\n")

    def _export(self, to: str) -> list[str]:
        verifier = [] if self.options.verifier is None else [f"verifier={self.options.verifier}"]
        return [
            "export",
            f"run={self.head}",
            f"to={to}",
            f"out={self.out / to}",
            f"dtype={self.options.dtype}",
            *verifier,
        ]


def check(options: Any) -> None:
    """Refuse, before anything is written, a run or a head that cannot be used, and formats that the
    head will not fit.

    Raises:
        FolderError, ConfigError, DrafterError: the message says what.
    """
    _, content, _ = run_folder.read(options.run)
    base = instantiate(content["config"]["base"])
    if options.draft is None:
        words = [f"+experiment={options.experiment}", f"target.run={options.run}"]
        config: Any = compose.compose([*words, f"task.path={options.prompts}", *options.overrides])
        node: Any = OmegaConf.to_container(config.drafter, resolve=True)
    else:
        folder = io.folder_of(options.draft)
        io.check(folder, base)
        node = io.read(folder)[0]
    skeleton = base.skeleton(content["identity"]["labels"])
    drafter = instantiate(node)(model=skeleton)
    for to in options.to.split(","):
        heads.check_format(drafter, to, skeleton)


def run(options: Any) -> int:
    """Do the steps that are not done yet, and write the page. Return the exit code of the step that
    failed or was stopped, else 0.

    Raises:
        ConfigError: the folder was started with other settings, or another process works in it.
        Others: see `check`.
    """
    check(options)
    work = Work(options)
    if options.dry:
        for step in work.steps():
            say(f"{step.name}{': done' if step.name in work.record['steps'] else ''}")
        return 0
    with locked(options.out):
        work.save()
        for step in work.steps():
            if step.name in work.record["steps"]:
                continue
            started = time.monotonic()
            if code := _do(step):
                then = "failed: once that is fixed," if code in (1, 2) else f"ended with {code}:"
                say(f"{step.name} {then} the same command continues there", file=sys.stderr)
                return code
            work.record["steps"][step.name] = {"seconds": round(time.monotonic() - started, 1)}
            work.save()
        atomic.write_text(options.out / "draft.md", drafting_page.page(options.out, work.record))
    return 0


def _do(step: Step) -> int:
    if step.output is not None and step.output.exists():
        # It was stopped between the rename of the checked export and the record of it.
        say(f"{step.name}: {step.output} is complete", flush=True)
        return 0
    if step.call is not None:
        say(step.name, flush=True)
        step.call()
        return 0
    assert step.words is not None
    words = step.words()
    say(f"{step.name}: graft {shlex.join(words)}", flush=True)
    return finished([sys.executable, "-m", "trainer", *words])
