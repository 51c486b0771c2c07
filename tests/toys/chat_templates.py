"""Chat templates of well-known models, a tokenizer for all of them, and rows of every shape.

The templates are in tests/data/templates. Each is written from public facts about its model: the
same markers in the same places, in fewer words than the original. Its first line names the tokens
that begin a text and end an answer.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tasks import conversation
from tasks.reading import DataError
from trainer.data.render import Refused, Renderer, Tokens

FOLDER = Path(__file__).parents[1] / "data" / "templates"
NAMES = sorted(file.stem for file in FOLDER.glob("*.jinja"))
_MARKS = re.compile(
    r"<\|[\w/]+\|>|<\uff5c[^\uff5c<>]+\uff5c>|\[\|\w+\|\]|\[/?[A-Z_]{3,}\]|</?(?:s|bos|eos|sop|think)>"
    r"|<(?:start|end)_of_turn>|<SPECIAL_\d+>|<BOS_TOKEN>|\[gMASK\]"
)

U, A = "What is the time?", "It is noon."
U2, A2 = "And in Rome?", "Also noon."
ODD = "Zeile 1\n\n  漢字 🙂 <b> & \"q\" 'r' \\n"
TOOL = {
    "type": "function",
    "function": {
        "name": "get_time",
        "description": "Tells the time of a city.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "description": "Its name."},
                "unit": {"type": "string", "enum": ["hours", "minutes"]},
            },
            "required": ["city"],
        },
    },
}


def call(city: str, identity: str, as_text: bool = False) -> dict[str, Any]:
    """A call of TOOL, with arguments as an object or as JSON text."""
    arguments: Any = f'{{"city": "{city}"}}' if as_text else {"city": city}
    function = {"name": "get_time", "arguments": arguments}
    return {"id": identity, "type": "function", "function": function}


def said(role: str, content: str, **more: Any) -> dict[str, Any]:
    """A message."""
    return {"role": role, "content": content} | more


TWO = [said("user", U), said("assistant", A), said("user", U2), said("assistant", A2)]
# The rows as a file has them; `train_on` is all, and last in the last shape.
SHAPES: dict[str, dict[str, Any]] = {
    "single turn": {"messages": TWO[:2]},
    "several turns": {"messages": TWO},
    "system": {"messages": [said("system", "Be brief."), *TWO[:2]]},
    "developer": {"messages": [said("developer", "Be brief."), *TWO[:2]]},
    "tool call": {
        "messages": [
            said("user", U),
            said("assistant", "", tool_calls=[call("Paris", "abcdefgh1", as_text=True)]),
        ],
        "tools": [TOOL],
    },
    "parallel calls": {
        "messages": [
            said("user", U),
            said(
                "assistant",
                "",
                tool_calls=[call("Paris", "abcdefgh1"), call("Rome", "abcdefgh2")],
            ),
        ],
        "tools": [TOOL],
    },
    "tool result": {
        "messages": [
            said("user", U),
            said("assistant", "", tool_calls=[call("Paris", "abcdefgh1")]),
            said("tool", '{"time": "noon"}', tool_call_id="abcdefgh1", name="get_time"),
            said("assistant", A),
        ],
        "tools": [TOOL],
    },
    "reasoning": {
        "messages": [
            said("user", U),
            said("assistant", A, reasoning_content="Look up."),
            said("user", U2),
            said("assistant", A2, reasoning_content="Same zone."),
        ]
    },
    "empty answer": {"messages": [said("user", U), said("assistant", ""), *TWO[2:]]},
    "odd text": {"messages": [said("user", f"x{ODD}x"), said("assistant", f"y{ODD}y")]},
    "ends in a question": {"messages": TWO[:3]},
    "last answer only": {"messages": TWO},
}


def source(name: str) -> str:
    """The Jinja text of a template."""
    return (FOLDER / f"{name}.jinja").read_text("utf-8")


@functools.cache
def tokenizer(name: str) -> Any:
    """A tokenizer with a token for each byte and for each marker of a template."""
    text = source(name)
    first, last = re.findall(r"(?:bos|eos): (\S+)", text.partition("\n")[0])
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    over_bytes = Tokenizer(models.BPE({token: i for i, token in enumerate(alphabet)}, []))
    over_bytes.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    over_bytes.decoder = decoders.ByteLevel()
    marks = sorted({*_MARKS.findall(text), last, *([first] if first != "none" else [])})
    over_bytes.add_special_tokens([AddedToken(mark, special=True) for mark in marks])
    return PreTrainedTokenizerFast(
        tokenizer_object=over_bytes,
        eos_token=last,
        pad_token=last,
        bos_token=None if first == "none" else first,
        chat_template=text,
    )


@functools.cache
def renderer(name: str, train_on: str = "all", **options: Any) -> Renderer:
    """A renderer with one of the templates."""
    task = SimpleNamespace(kind="conversation", chat_template=None, train_on=train_on, **options)
    return Renderer(tokenizer(name), task)


def rendered(name: str, row: dict[str, Any], **options: Any) -> list[Tokens] | str:
    """The sequences of a row as a file has it, or the reason why it is refused."""
    try:
        example = conversation.convert(row, conversation.detect(row, {}), {}, None, "here")
        return renderer(name, **options).render(example).sequences
    except (DataError, Refused) as error:
        return str(error)


def outcome(name: str, shape: str) -> list[Tokens] | str:
    """What becomes of a row of SHAPES."""
    train_on = "last" if shape == "last answer only" else "all"
    return rendered(name, SHAPES[shape], train_on=train_on)


def trained(name: str, row: Tokens) -> str:
    """The trained text of a sequence, with a bar between answers."""
    parts: list[list[int]] = []
    last = -2
    for i, token in enumerate(row.ids):
        if row.trained[i]:
            if last != i - 1:
                parts.append([])
            parts[-1].append(token)
            last = i
    return "|".join(tokenizer(name).decode(part) for part in parts)


def cells() -> Iterator[tuple[str, str, list[Tokens] | str]]:
    """Yield (template, shape, what becomes of the row) of the whole table."""
    for name in NAMES:
        for shape in SHAPES:
            yield name, shape, outcome(name, shape)
