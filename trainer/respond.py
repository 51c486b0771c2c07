"""Conversations whose answers the target writes itself: what a drafter is distilled on, and what is measured with.

    python -m trainer.respond base=NAME|run=FOLDER[@last|best|STEP] prompts=FILE|task=NAME out=FOLDER [split=train] [field=null]
                              [answers=last|all] [per=conversation|answer] [skip=0] [rows=null] [batch_size=16] [max_new_tokens=512]
                              [temperature=0] [top_p=1] [top_k=0] [seed=0] [cut=keep|drop] [template.OPTION=VALUE ...]
                              [base.KEY=VALUE task.KEY=VALUE precision=...]

The target is a base of conf/base, or a run's base with its adapter as it is, unmerged. prompts= is a file that task=sft would read, or
one with a `prompt`, `question` or `turns` (Spec-Bench; each turn is answered in turn), or any `field`; task= takes a task's own rows.
answers=last writes the last answer anew, all every one but those with tool calls: only what the target wrote should train a drafter,
so train with task.train_on=last after answers=last. per=answer writes a row for every answer, to train with task.train_on=last where the
template takes the reasoning out of earlier answers. `skip` and `rows` count rows of the file.

temperature=0 is greedy. Else every answer is drawn with random numbers of its own, from (seed, row, turn): its text depends neither
on the rows beside it nor on where a stopped command went on, but for near ties that batched products round differently. The
model's own generation settings (a repetition penalty, say) are not used, since a decoder does not verify against them.

template.enable_thinking=false and the like are what the chat template is given, as the server will give it; OUT/chat_template.jinja is
the template with those set, to train with: task.chat_template=OUT/chat_template.jinja.

OUT/rows.jsonl         {"messages": [...], "row": 7}, as task=sft reads it, batch by batch; "cut": true where the last answer met
                       max_new_tokens before its end; "inexact": true where the text, tokenised again, is not what was generated
OUT/left_out.jsonl     rows that have no answer, and why: empty, cut (cut=drop), long (no room in the model), refused (by the template)
OUT/provenance.json    target, settings, template, versions, the prompts' digest, counts

The same command goes on where it was stopped, with other settings it is refused; batch_size and rows may change.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import platform
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from tasks import conversation, reading
from tasks.reading import Bad, DataError
from tasks.task import Conversation
from tasks.wheel import sha256
from trainer import assembly, evaluate, requeue
from trainer import base as bases
from trainer.base import Base
from trainer.checkpoint import write_text
from trainer.signals import Signals
from trainer.tokens import Refused, Renderer, stop_ids
from trainer.written import Written

KNOWN: dict[str, Any] = {
    "base": None, "run": None, "prompts": None, "task": None, "out": ..., "split": "train", "field": None, "answers": "last", "skip": 0,
    "rows": None, "batch_size": 16, "max_new_tokens": 512, "temperature": 0.0, "top_p": 1.0, "top_k": 0, "seed": 0, "cut": "keep",
    "per": "conversation",
}  # fmt: skip
_ROWS = ("system", "columns", "format", "chat_template")  # of conf/task/sft, what has a meaning for the prompts of a file
TELL = 10  # seconds between lines that say how far it is
SPAN = 50  # batches' worth of rows, within which those of similar length share a batch


@dataclass(frozen=True)
class Ask:
    """A conversation to be answered: assistant messages whose content is None are written by the target."""

    row: int
    where: str
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None


@dataclass(frozen=True)
class Speaker:
    """A target with all that its answers depend on."""

    model: Any
    base: Base
    renderer: Renderer
    stops: list[int]
    device: torch.device
    described: dict[str, Any]  # of its weights, for the provenance


def asks(
    rows: Iterator[tuple[str, Any]], read: dict[str, Any], field: str | None, every: bool, skip: int, limit: int | None
) -> Iterator[Ask]:
    """The conversations of some (where, row) of a file, read by the `columns`, `format` and `system` of conf/task/sft.

    Raises:
        DataError: a row has nothing to answer, or is broken.
    """
    for index, (where, row) in enumerate(itertools.islice(rows, None if limit is None else skip + limit)):
        if index < skip:
            continue
        if isinstance(row, Bad):
            raise DataError(f"{row.where}: {row.reason}")
        try:
            messages, tools = _messages(row, field, **read)
        except DataError as error:
            raise DataError(f"{where}: {error}") from None
        yield Ask(index, where, _open(messages, every or "turns" in row), tools)


def _messages(
    row: dict[str, Any], field: str | None, columns: dict[str, str], format: str, system: str | None
) -> tuple[list[dict[str, Any]], Any]:
    """A row's messages, checked as task=sft checks them, with some answer wherever one is to be written."""
    name = field or next((name for name in ("messages", "turns", "prompt", "question") if name in row), None)
    if name is None or (field is None and (columns or format != "auto")):
        kind = conversation.detect(row, columns) if format == "auto" else format
        found = conversation.convert(row, kind, columns, system, "")
        return found.messages, found.tools
    if name not in row:
        raise DataError(f"no column {name!r}; the row has: {', '.join(map(str, row))}")
    value = row[name] if isinstance(row[name], list) else [row[name]]
    if all(isinstance(item, str) for item in value):
        if not all(text.strip() for text in value):
            raise DataError(f"{name} is empty")
        given = [
            message for text in value for message in ({"role": "user", "content": text}, {"role": "assistant", "content": "."})
        ]
    else:
        given = list(value)
        if isinstance(given[-1], dict) and given[-1].get("role") != "assistant":
            given.append({"role": "assistant", "content": "."})
    found = conversation.convert({"messages": given, "tools": row.get("tools")}, "messages", {}, system, "")
    return found.messages, found.tools


def _open(messages: list[dict[str, Any]], every: bool) -> list[dict[str, Any]]:
    """The messages with None where the target writes."""
    return [
        {"role": "assistant", "content": None}
        if message["role"] == "assistant" and (place == len(messages) or (every and not message.get("tool_calls")))
        else message
        for place, message in enumerate(messages, 1)
    ]


class Drawn(LogitsProcessor):
    """Leaves of each row's scores the one token that the row's own random number falls on: `u` (B, n) in [0, 1), one for each new token.

    The token is the first in order of ids whose cumulative probability exceeds u, so that it is the same on every device but where
    rounding moves that boundary over u.
    """

    def __init__(self, u: Float[np.ndarray, "B n"], prompt: int):
        self.u, self.prompt = u, prompt

    def __call__(self, input_ids: Int[Tensor, "B T"], scores: Float[Tensor, "B V"]) -> Float[Tensor, "B V"]:
        upto = scores.double().softmax(-1).cumsum(-1)
        at = torch.as_tensor(self.u[:, input_ids.shape[1] - self.prompt], device=scores.device).unsqueeze(-1)
        # The sum may end a rounding below 1, and a token without a chance must not be hit at either end.
        whole = upto[:, -1:].contiguous()
        token = torch.minimum(torch.searchsorted(upto, at * whole, right=True), torch.searchsorted(upto, whole))
        return torch.full_like(scores, -torch.inf).scatter_(-1, token, 0.0)


def drawing(options: dict[str, Any], seeds: list[tuple[int, int]], prompt: int) -> LogitsProcessorList:
    """What turns scores into a choice: nothing where greedy, else temperature, top_k and top_p in transformers' order and one draw for
    each (row, turn)."""
    if options["temperature"] == 0:
        return LogitsProcessorList()
    made: list[LogitsProcessor] = [TemperatureLogitsWarper(options["temperature"])]
    if options["top_k"]:
        made.append(TopKLogitsWarper(options["top_k"]))
    if options["top_p"] < 1:
        made.append(TopPLogitsWarper(options["top_p"]))
    u = np.stack([np.random.default_rng([options["seed"], row, turn]).random(options["max_new_tokens"]) for row, turn in seeds])
    return LogitsProcessorList([*made, Drawn(u, prompt)])


@torch.no_grad()
def answers(
    speaker: Speaker, prompts: list[list[int]], seeds: list[tuple[int, int]], options: dict[str, Any]
) -> list[list[int]]:
    """The ids of an answer to each prompt, with the token that ended it, which one that was cut lacks."""
    choose = drawing(options, seeds, max(map(len, prompts)))
    pad = speaker.base.tokenizer.pad_token_id
    found = evaluate.continuations(
        speaker.model, prompts, pad, speaker.stops, options["max_new_tokens"], speaker.device, choose
    )
    ends = ([i for i, token in enumerate(ids) if token in speaker.stops] for ids in found)
    return [ids[: end[0] + 1] if end else ids for ids, end in zip(found, ends, strict=True)]


@dataclass
class _Talk:
    """A conversation on its way: what is written, what stands before the next answer, and what comes after it."""

    ask: Ask
    rest: list[dict[str, Any]]
    written: list[dict[str, Any]] = field(default_factory=list)  # up to the last answer of the target's
    given: list[dict[str, Any]] = field(default_factory=list)
    answers: list[tuple[int, dict[str, bool]]] = field(default_factory=list)  # where in `written` each ends, and its marks
    ended: dict[str, str] = field(default_factory=dict)

    def advance(self) -> bool:
        """Go to the next answer; False where there is none."""
        self.given = list(itertools.takewhile(lambda message: message["content"] is not None, self.rest))
        self.rest = self.rest[len(self.given) :]
        return bool(self.rest)

    def example(self, text: str) -> Conversation:
        """The conversation with this as its last answer."""
        messages = [*self.written, *self.given, {"role": "assistant", "content": text}]
        return Conversation(messages, self.ask.where, self.ask.tools)

    def lines(self, each: bool) -> list[dict[str, Any]]:
        """Of rows.jsonl, for each answer or for all together; or of left_out.jsonl, with a `why`, where the target wrote nothing."""
        tools = {"tools": self.ask.tools} if self.ask.tools else {}
        if not self.answers:
            return [{"row": self.ask.row, **self.ended, "messages": self.given, **tools}]
        if not each:
            marks = {name: True for _, found in self.answers for name in found}
            return [{"messages": self.written, **tools, "row": self.ask.row, **marks}]
        return [
            {"messages": self.written[:end], **tools, "row": self.ask.row, "answer": number, "of": len(self.answers), **marks}
            for number, (end, marks) in enumerate(self.answers, 1)
        ]


def respond(speaker: Speaker, batch: list[Ask], options: dict[str, Any]) -> list[dict[str, Any]]:
    """The lines of rows.jsonl, and those of left_out.jsonl, which have a `why`, of some conversations.

    A conversation ends where an answer is empty, cut, has no room or is refused: what was answered before stays.
    """
    talks = [_Talk(ask, list(ask.messages)) for ask in batch]
    open_ = talks
    for turn in itertools.count():
        open_ = [talk for talk in open_ if not talk.ended and talk.advance()]
        prompts = [_prompt(speaker, talk, options["max_new_tokens"]) for talk in open_]
        open_, prompts = [talk for talk in open_ if not talk.ended], [prompt for prompt in prompts if prompt]
        if not open_:
            return [line for talk in talks for line in talk.lines(options["per"] == "answer")]
        said = answers(speaker, prompts, [(talk.ask.row, turn) for talk in open_], options)
        for talk, prompt, ids in zip(open_, prompts, said, strict=True):
            _take(speaker, talk, prompt, ids, options["cut"] == "drop")
    raise AssertionError


def _prompt(speaker: Speaker, talk: _Talk, more: int) -> list[int]:
    try:
        prompt = speaker.renderer.prompt(talk.example(""))
    except Refused as refusal:
        talk.ended = {"why": "refused", "reason": str(refusal)}
        return []
    if not prompt:
        talk.ended = {"why": "refused", "reason": "the prompt is empty"}
    elif len(prompt) + more > speaker.base.longest:
        talk.ended = {"why": "long"}
        return []
    return prompt


def _take(speaker: Speaker, talk: _Talk, prompt: list[int], ids: list[int], drops: bool) -> None:
    """Put an answer into its conversation."""
    text = speaker.base.tokenizer.decode(ids, skip_special_tokens=True)
    cut = ids[-1] not in speaker.stops
    if not text.strip() or (cut and drops):
        talk.ended = {"why": "cut" if text.strip() else "empty"}
        return
    example = talk.example(text)
    exact = _same(speaker, example, prompt + ids)
    talk.written, talk.given, talk.rest = example.messages, [], talk.rest[1:]
    talk.answers.append((len(talk.written), {**({} if exact else {"inexact": True}), **({"cut": True} if cut else {})}))
    if cut:
        talk.ended = {"why": "cut"}


def _same(speaker: Speaker, example: Conversation, ids: list[int]) -> bool:
    """Whether training on the text is training on the tokens that were generated."""
    try:
        return speaker.renderer(example).ids[: len(ids)] == ids
    except Refused:
        return False


def template_with(source: str | dict[str, str] | None, options: dict[str, Any]) -> str | dict[str, str] | None:
    """The chat template with its options set at its head.

    Raises:
        DataError: there is no template, or it never reads one of them.
    """
    if not options:
        return source
    if source is None:
        raise DataError(f"template.{next(iter(options))}: there is no chat template to give it to")
    whole = source if isinstance(source, str) else "".join(source.values())
    if unread := [name for name in options if name not in whole]:
        raise DataError(f"template.{unread[0]}: the chat template never reads {unread[0]!r}")
    # repr, since Jinja writes its constants as Python does.
    head = "".join(f"{{%- set {name} = {value!r} -%}}" for name, value in options.items())
    return head + source if isinstance(source, str) else {name: head + text for name, text in source.items()}


def batches(found: list[Ask], size: int, done: set[int]) -> Iterator[list[Ask]]:
    """Conversations that are missing, with those that share their batch: within spans of the file, those of similar length."""
    for start in range(0, len(found), SPAN * size):
        span = found[start : start + SPAN * size]
        if all(ask.row in done for ask in span):
            continue
        lengths = {ask.row: sum(len(message["content"] or "") for message in ask.messages) for ask in span}
        span.sort(key=lambda ask: -lengths[ask.row])
        for first in range(0, len(span), size):
            if any(ask.row not in done for ask in span[first : first + size]):
                yield span[first : first + size]


def speaker_of(
    options: dict[str, Any], plain: dict[str, Any], task: Any, keeps_template: bool, jinja: dict[str, Any]
) -> Speaker:
    """The target. A run is asked with its own task's chat template, unless `keeps_template` says that it is with `task`'s.

    Raises:
        as assembly.trained and Base.load; DataError, for a model that writes no text or a template option that does nothing.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if options["run"] is not None:
        found = assembly.trained(options["run"], device)
        if found.task.kind == "label":
            raise DataError(f"{found.folder} trained a classifier, which writes no text")
        model, base = found.model, found.base
        about = found.adapted or {}
        weights = {"run": about.get("id"), "step": about.get("step"), "adapter": about.get("sha256")}
        if found.task.kind == "conversation" and not keeps_template:
            task.chat_template = found.task.chat_template
    else:
        base = assembly.instantiate(plain["base"])
        computed, _, _ = bases.compute(plain["precision"], plain["base"]["dtype"], False, device.type == "cuda")
        model, weights = base.load(computed, None, device).eval(), {"run": None, "step": None, "adapter": None}
    renderer = Renderer(base.tokenizer, task)
    renderer.template, renderer.train_on = template_with(renderer.template, jinja), "last"
    example = Conversation([{"role": "user", "content": "1"}, {"role": "assistant", "content": "1"}], "")
    try:
        rows = [renderer(example)]  # a template may end answers in a token of its own
    except Refused:
        rows = []
    stops = stop_ids(base.tokenizer, model.generation_config.eos_token_id, rows)  # type: ignore[union-attr]
    for module in model.modules():
        if isinstance(getattr(module, "generation_config", None), GenerationConfig):
            module.generation_config = GenerationConfig()  # type: ignore[assignment]
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    weights = {"base": base.fingerprint, "quantization": base.quantization, "dtype": dtype, **weights}
    return Speaker(model, base, renderer, stops, device, weights)


def _arguments(argv: list[str]) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
    """(the verb's own options, those of the chat template, settings of conf/).

    Raises:
        SystemExit: as trainer.config.arguments.
    """
    import yaml

    from trainer import config

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
    options = config.arguments(own, KNOWN, __doc__ or "")
    faults = []
    if (options["base"] is None) == (options["run"] is None):
        faults.append("give the target: either base=NAME, of conf/base, or run=FOLDER")
    if (options["prompts"] is None) == (options["task"] is None):
        faults.append("give what is answered: either prompts=FILE or task=NAME, of conf/task")
    if options["run"] is not None and (own_base := [word for word in given if not word.startswith("task.")]):
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
        raise SystemExit(config.bad("\n".join(faults)))
    return options, jinja, given


def _composed(options: dict[str, Any], given: list[str]) -> dict[str, Any]:
    """The settings of base, task and precision."""
    from omegaconf import OmegaConf

    from trainer import config

    words = [f"task={options['task'] or 'sft'}", *given]
    if options["base"] is not None:
        words.insert(0, f"base={options['base']}")
    if options["prompts"] is not None:
        words += [f"task.path={json.dumps(options['prompts'], ensure_ascii=False)}", "task.eval_fraction=0"]
    plain: Any = OmegaConf.to_container(config.compose(words), resolve=True)
    return plain


def _found(options: dict[str, Any], plain: dict[str, Any], task: Any) -> tuple[list[Ask], str]:
    """(the conversations to be answered, a digest of what they come from).

    Raises:
        DataError: there are none, one is broken, or the task's rows are no conversations.
    """
    every, skip, limit = options["answers"] == "all", options["skip"], options["rows"]
    if options["prompts"] is not None:
        source = reading.Source(options["prompts"], "train", False, "prompts")
        read = {name: plain["task"][name] for name in ("columns", "format", "system")}
        found = list(asks(iter(source), read, options["field"], every, skip, limit))
        key = sha256(source.files[0]) if len(source.files) == 1 else source.fingerprint()
    else:
        if task.kind != "conversation":
            raise DataError(f"task={options['task']}: its rows are no conversations")
        examples = enumerate(task.examples(options["split"]))
        found = []
        for index, example in itertools.islice(examples, skip, None if limit is None else skip + limit):
            if isinstance(example, Bad):
                raise DataError(f"{example.where}: {example.reason}")
            found.append(Ask(index, example.where, _open(example.messages, every), example.tools))
        key = task.fingerprint(options["split"])
    if not found:
        raise DataError(f"{options['prompts'] or options['task']}: there is no row after the first {skip}")
    return found, hashlib.sha256(key.encode()).hexdigest() if options["prompts"] is None else key


def main(argv: list[str]) -> int:
    """The verb; see the module's text."""
    from trainer import config, failures

    options, jinja, given = _arguments(argv)
    try:
        plain = _composed(options, given)
    except Exception as error:  # a ConfigError, or Hydra's own: an unknown base or task
        return config.bad(config.told(error))
    assembly.quiet()
    written: Written | None = None
    count, signals = 0, Signals()
    try:
        with signals:
            if options["prompts"] is not None:
                reading.Source(options["prompts"], "train", False, "prompts")  # before the task, which would call it task.path
            task = assembly.instantiate(plain["task"])
            found, key = _found(options, plain, task)
            count = len(found)
            keeps_template = any(word.startswith("task.chat_template=") for word in given)
            speaker = speaker_of(options, plain, task, keeps_template, jinja)
            with Written(Path(options["out"]).expanduser(), *_described(options, speaker, key, jinja)) as written:
                if isinstance(speaker.renderer.template, str):
                    write_text(written.path / "chat_template.jinja", speaker.renderer.template)
                _write(speaker, found, written, options)
    except (SystemExit, KeyboardInterrupt) as stop:
        if written is not None:
            said = f"stopped with {len(written.done)} of {count} conversations in {written.path}"
            print(f"{said}: the same command goes on", file=sys.stderr)
        if signals.received is not None:
            return requeue.exit_code(plain, signals.received, None, None)
        return stop.code if isinstance(stop, SystemExit) and isinstance(stop.code, int) else 130
    except Exception as error:
        return failures.told(error)
    if not written.counts["rows"]:
        print(f"{written.rows}: no conversation has an answer ({_listed(written.counts)})", file=sys.stderr)
        return 1
    print(f"{written.rows}: {_listed(written.counts)}")
    return 0


def _described(
    options: dict[str, Any], speaker: Speaker, key: str, jinja: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the rows depend on, and what is recorded besides."""
    settings = {
        **{name: value for name, value in options.items() if name not in ("out", "run", "base", "prompts", "task")},
        "prompts": key, "target": speaker.described, "stops": speaker.stops,
        "template": hashlib.sha256(json.dumps(speaker.renderer.template).encode()).hexdigest(), "template_options": jinja,
    }  # fmt: skip
    described = {
        "base": speaker.base.path, "run": options["run"], "prompts": options["prompts"] or f"task={options['task']}",
        "device": speaker.device.type, "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in ("torch", "transformers", "tokenizers")},
    }  # fmt: skip
    return settings, described


def _write(speaker: Speaker, found: list[Ask], written: Written, options: dict[str, Any]) -> None:
    told = time.monotonic()
    for batch in batches(found, options["batch_size"], written.done):
        written.add(respond(speaker, batch, options))
        if time.monotonic() - told > TELL:
            print(f"{len(written.done)} of {len(found)} conversations", flush=True)
            told = time.monotonic()


def _listed(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in counts.items() if count or name == "rows")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
