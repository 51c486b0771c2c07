"""What is trained of rows of every shape under the templates of well-known models, against what a
person reads off each model's documentation: how an answer begins, how calls and thoughts are
written, and what ends it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from tests.toys.chat_templates import (
    A2,
    NAMES,
    ODD,
    SHAPES,
    A,
    outcome,
    renderer,
    trained,
)

Calls = list[tuple[str, str]]  # city and the identity of each call
EMPTY = "<think>\n\n</think>\n\n"
LOST = "leaves out"
NO_TOOLS = dict.fromkeys(("tool call", "parallel calls", "tool result"), LOST)
NO_THOUGHTS = {"reasoning": r"leaves out message 2 \(assistant\): reasoning 'Look up.'"}
NO_CALLS = dict.fromkeys(NO_TOOLS, r"leaves out message 2 \(assistant\): tool_calls")
NEITHER = NO_TOOLS | NO_THOUGHTS
ALTERNATING = NEITHER | {"tool result": "Roles must alternate"}
NO_SYSTEM = dict.fromkeys(("system", "developer"), "System role not supported")
UNOPENED = dict.fromkeys(
    [name for name in SHAPES if name not in ("reasoning", "empty answer", "ends in a question")],
    "opens a thought before message",
)


@dataclass(frozen=True)
class Family:
    """How a model writes its answers: `start` and `end` of each, with calls or without, and the
    reasons for which shapes are refused. With `apart`, answers of several turns are trained in
    texts of their own; `calls_apart` says so of an answer after the result of a call. Answers with
    calls have `before_calls` and `after_calls` in place of `start` and `end`."""

    end: str
    start: str = ""
    calls: Callable[[Calls], str] | None = None
    thought: Callable[[str, str], str] | None = None
    refused: dict[str, str] = field(default_factory=dict)
    apart: bool = False
    calls_apart: bool = False
    thoughts_apart: bool = False  # as `apart`, for answers with thoughts
    before_calls: str = ""
    after_calls: str | None = None  # the end of an answer with calls
    last: str | None = None  # the end of a text's last answer

    def expected(self, shape: str) -> list[str]:
        """The trained texts of each sequence of a shape that is not refused."""
        end = self.end if self.last is None else self.last
        plain = [f"{self.start}{A}", f"{self.start}{A2}"]
        if shape in ("single turn", "system", "developer"):
            return [plain[0] + end]
        if shape == "several turns":
            return self._turns(plain, self.apart)
        if shape == "last answer only":
            return [plain[1] + end]
        if shape == "odd text":
            return [f"{self.start}y{ODD}y{end}"]
        if shape == "reasoning":
            assert self.thought is not None
            parts = [self.thought("Look up.", A), self.thought("Same zone.", A2)]
            return self._turns(parts, self.apart or self.thoughts_apart)
        assert self.calls is not None
        calls = [("Paris", "abcdefgh1"), ("Rome", "abcdefgh2")]
        called = self.before_calls + self.calls(calls if shape == "parallel calls" else calls[:1])
        closed = called + (end if self.after_calls is None else self.after_calls)
        if shape != "tool result":
            return [closed]
        return [closed, plain[0] + end] if self.calls_apart else [f"{closed}|{plain[0]}{end}"]

    def _turns(self, parts: list[str], apart: bool) -> list[str]:
        end = self.end if self.last is None else self.last
        if apart:
            return [part + end for part in parts]
        return [f"{parts[0]}{self.end}|{parts[1]}{end}"]


def arguments(city: str) -> str:
    return json.dumps({"city": city})


def hermes(calls: Calls) -> str:
    return "\n".join(
        f'<tool_call>\n{{"name": "get_time", "arguments": {arguments(city)}}}\n</tool_call>'
        for city, _ in calls
    )


def coder(calls: Calls) -> str:
    return "\n".join(
        f"<tool_call>\n<function=get_time>\n<parameter=city>\n{city}\n</parameter>\n</function>\n"
        "</tool_call>"
        for city, _ in calls
    )


def listed(space: str) -> Callable[[Calls], str]:
    def of(calls: Calls) -> str:
        items = ", ".join(
            f'{{"name": "get_time", "arguments": {arguments(city)}, "id": "{identity}"}}'
            for city, identity in calls
        )
        return f"[TOOL_CALLS]{space}[{items}]"

    return of


def glm(calls: Calls) -> str:
    return "".join(
        f"\n<tool_call>get_time\n<arg_key>city</arg_key>\n<arg_value>{city}</arg_value>\n</tool_call>"
        for city, _ in calls
    )


def deepseek(calls: Calls) -> str:
    inner = "".join(
        f"<\uff5ctool▁call▁begin\uff5c>get_time<\uff5ctool▁sep\uff5c>{arguments(city)}"
        "<\uff5ctool▁call▁end\uff5c>"
        for city, _ in calls
    )
    return f"<\uff5ctool▁calls▁begin\uff5c>{inner}<\uff5ctool▁calls▁end\uff5c>"


def llama(calls: Calls) -> str:
    return "".join(f'{{"name": "get_time", "parameters": {arguments(city)}}}' for city, _ in calls)


def block(thought: str, answer: str) -> str:
    return f"<think>\n{thought}\n</think>\n\n{answer}"


def opened(thought: str, answer: str) -> str:
    return f"{thought}\n</think>\n\n{answer}"


SENTENCE = "<\uff5cend▁of▁sentence\uff5c>"
CHATML = Family("<|im_end|>", refused=NEITHER)
FAMILIES: dict[str, Family] = {
    "chatml": CHATML,
    "chatml-marked": CHATML,
    "command-r": Family("<|END_OF_TURN_TOKEN|>", refused=ALTERNATING),
    "deepseek-r1": Family(SENTENCE, thought=block, refused=NO_TOOLS, thoughts_apart=True),
    "deepseek-r1-distill": Family(SENTENCE, thought=opened, refused=UNOPENED, apart=True),
    "deepseek-v3": Family(SENTENCE, refused=NEITHER),
    "deepseek-v3.1": Family(
        SENTENCE, calls=deepseek, refused={"reasoning": "closes the thought before message 4"}
    ),
    "exaone-3.5": Family("[|endofturn|]", refused=NEITHER),
    "gemma-1": Family("<end_of_turn>", refused=ALTERNATING | NO_SYSTEM),
    "gemma-2": Family("<end_of_turn>", refused=ALTERNATING | NO_SYSTEM),
    "gemma-3": Family("<end_of_turn>", refused=ALTERNATING),
    "glm-4.5": Family(
        "",
        "\n<think></think>\n",
        calls=glm,
        thought=lambda thought, answer: f"\n<think>{thought}</think>\n{answer}",
        thoughts_apart=True,
        before_calls="\n<think></think>",
    ),
    "gpt-oss": Family(
        "<|return|>",
        "<|channel|>final<|message|>",
        calls=lambda calls: (
            " to=functions.get_time<|channel|>commentary json<|message|>" + arguments(calls[0][0])
        ),
        thought=lambda thought, answer: (
            f"<|channel|>analysis<|message|>{thought}<|end|><|start|>assistant<|channel|>final"
            f"<|message|>{answer}"
        ),
        refused={"parallel calls": r"tool_calls, argument get_time.city 'Rome'"},
        apart=True,
        after_calls="<|call|>",
    ),
    "granite-3.1": Family("<|end_of_text|>", refused=NO_CALLS | NO_THOUGHTS),
    "granite-4": Family("<|end_of_text|>", calls=hermes, refused=NO_THOUGHTS),
    "hermes-3": Family("<|im_end|>", calls=hermes, refused=NO_THOUGHTS),
    "kimi-k2": Family("<|im_end|>", refused=NO_CALLS | NO_THOUGHTS),
    "lfm-2": Family("<|im_end|>", refused=NO_CALLS | NO_THOUGHTS),
    "llama-2": Family(" </s>", " ", refused=ALTERNATING),
    "llama-3": Family("<|eot_id|>", refused=NEITHER),
    "llama-3.1": Family(
        "<|eot_id|>",
        calls=llama,
        refused=NO_THOUGHTS | {"parallel calls": "only supports single tool-calls at once"},
    ),
    "llama-4": Family(
        "<|eot|>",
        calls=lambda calls: f"<|python_start|><|python_end|>{llama(calls)}",
        refused=NO_THOUGHTS,
    ),
    "mistral-v1": Family("</s>", " ", refused=ALTERNATING),
    "mistral-v3": Family("</s>", " ", calls=listed(" "), refused=NO_THOUGHTS),
    "mistral-v3-tekken": Family("</s>", calls=listed(""), refused=NO_THOUGHTS),
    "mistral-v7": Family("</s>", " ", calls=listed(" "), refused=NO_THOUGHTS),
    "mistral-v11": Family(
        "</s>",
        calls=lambda calls: "".join(
            f"[TOOL_CALLS]get_time[CALL_ID]{identity}[ARGS]{arguments(city)}"
            for city, identity in calls
        ),
        refused=NO_THOUGHTS,
    ),
    "mistral-v13": Family(
        "</s>",
        calls=lambda calls: "".join(
            f"[TOOL_CALLS]get_time[ARGS]{arguments(city)}" for city, _ in calls
        ),
        thought=lambda thought, answer: f"[THINK]{thought}[/THINK]{answer}",
    ),
    "nemotron-nano-2": Family("\n<SPECIAL_12>", thought=opened, refused=UNOPENED, apart=True),
    "olmo-2": Family("<|endoftext|>", refused=NEITHER),
    "phi-3": Family("<|end|>", refused=NEITHER, last="<|end|>\n<|endoftext|>"),
    "phi-4": Family("<|im_end|>", refused=NEITHER),
    "phi-4-mini": Family("<|end|>", refused=NEITHER),
    "qwen-2.5": Family("<|im_end|>", calls=hermes, refused=NO_THOUGHTS),
    "qwen-3": Family(
        "<|im_end|>",
        EMPTY,
        calls=hermes,
        thought=block,
        apart=True,
        calls_apart=True,
        before_calls=EMPTY,
    ),
    "qwen-3-2507-thinking": Family(
        "<|im_end|>",
        "\n</think>\n\n",
        calls=hermes,
        thought=opened,
        apart=True,
        calls_apart=True,
        before_calls="\n</think>\n\n",
    ),
    "qwen-3-coder": Family("<|im_end|>", calls=coder, refused=NO_THOUGHTS),
    "qwen-3.5": Family(
        "<|im_end|>",
        "\n</think>\n\n",
        calls=coder,
        thought=opened,
        apart=True,
        before_calls="\n</think>\n\n",
    ),
    "smollm-2": Family("<|im_end|>", refused=NEITHER),
    "smollm-3": Family("<|im_end|>", thought=block, refused=NO_TOOLS, thoughts_apart=True),
    "zephyr": Family("</s>", refused=NEITHER),
}
ALWAYS = {"empty answer": "the answer is empty", "ends in a question": "must end in an answer"}


def test_every_template_has_an_expectation():
    assert sorted(FAMILIES) == NAMES
    assert len(NAMES) > 30


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", NAMES)
def test_a_row_trains_what_the_model_should_write_or_is_refused_by_name(name, shape):
    row, family = outcome(name, shape), FAMILIES[name]
    reason = (ALWAYS | family.refused).get(shape)
    if reason is not None:
        assert isinstance(row, str), [trained(name, sequence) for sequence in row]
        assert re.search(reason, row)
        return
    assert not isinstance(row, str), row
    assert [trained(name, sequence) for sequence in row] == family.expected(shape)


@pytest.mark.parametrize("name", NAMES)
def test_each_trained_answer_follows_the_prompt_of_inference(name):
    """The ids before an answer are those of the generation prompt, which is not trained."""
    for shape in SHAPES:
        row = outcome(name, shape)
        if isinstance(row, str):
            continue
        last, messages = row[-1], SHAPES[shape]["messages"]
        tools = SHAPES[shape].get("tools")
        prompt = renderer(name).chat(messages[:-1]) if tools is None else None
        if prompt is not None:
            assert last.ids[: len(prompt)] == prompt
            assert last.trained[len(prompt)]
            assert not last.trained[len(prompt) - 1]
