"""The loss mask against a naive one: each template is written again in Python as pieces of text
that are trained or not."""

from __future__ import annotations

import copy
import itertools
import random
import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from tasks.reading import DataError
from tasks.task import Conversation, Labelled, Text
from trainer.data.chat_template import Refused, has_markers, template
from trainer.data.encoding import continued_ids, plain_ids
from trainer.data.render import Renderer, Tokens
from trainer.models.base import BaseError
from trainer.models.tiny import CHATML
from trainer.storage.run_folder import use_template, write_template

Message = dict[str, Any]
Pieces = list[tuple[str, bool]]

UNMARKED = re.sub(r"\{% (end)?generation %\}", "", CHATML)
BRACKETS = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %} {{ m.content }}{{"
    " eos_token }}{% elif m.role == 'system' %}<<{{ m.content }}>>{% else %}[I]{{ m.content"
    " }}[/I]{% endif %}{% endfor %}"
)
NO_END = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n\n{% endfor %}{% if"
    " add_generation_prompt %}assistant: {% endif %}"
)
# Marks the content only, and closes it outside of the marker.
MARKED_CONTENT = (
    "{% for m in messages %}{% if m.role == 'assistant' %}A:{%- generation -%}{{ m.content }}{%-"
    " endgeneration -%};{% else %}U:{{ m.content }};{% endif %}{% endfor %}{% if"
    " add_generation_prompt %}A:{% endif %}"
)
# Leaves the thoughts of all turns but the last message out.
FORGETFUL = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{{ m.content if loop.last else"
    " m.content.split('</think>')[-1] }}{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt"
    " %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TOOLS = (
    "{% if tools %}TOOLS{{ tools | tojson }};{% endif %}{% for m in messages %}{{ m.role }}>{{"
    " m.content }}{% for c in m.tool_calls or [] %}CALL{{ c.function.name }}{% endfor %}{{"
    " eos_token }}{% endfor %}{% if add_generation_prompt %}assistant>{% endif %}"
)
TOOL = {
    "type": "function",
    "function": {"name": "add", "parameters": {"type": "object", "properties": {}}},
}

CALL = {"type": "function", "function": {"name": "add", "arguments": {}}}


def chatml(messages: list[Message]) -> Pieces:
    actual: Pieces = []
    for m in messages:
        actual += [
            (f"<|im_start|>{m['role']}\n", False),
            (f"{m['content']}<|im_end|>", m["role"] == "assistant"),
            ("\n", False),
        ]
    return actual


def brackets(messages: list[Message]) -> Pieces:
    actual: Pieces = [("<|im_start|>", False)]
    for m in messages:
        shape = {"assistant": " {}<|im_end|>", "system": "<<{}>>", "user": "[I]{}[/I]"}[m["role"]]
        actual.append((shape.format(m["content"]), m["role"] == "assistant"))
    return actual


def no_end(messages: list[Message]) -> Pieces:
    return [
        piece
        for m in messages
        for piece in [(f"{m['role']}: ", False), (f"{m['content']}\n\n", m["role"] == "assistant")]
    ]


def marked_content(messages: list[Message]) -> Pieces:
    actual: Pieces = []
    for m in messages:
        answer = m["role"] == "assistant"
        actual += [("A:" if answer else "U:", False), (m["content"], answer), (";", False)]
    return actual


SHAPES: dict[str, tuple[str, Callable[[list[Message]], Pieces]]] = {
    "marked": (CHATML, chatml),
    "unmarked": (UNMARKED, chatml),
    "brackets": (BRACKETS, brackets),
    "no end token": (NO_END, no_end),
    "marked content": (MARKED_CONTENT, marked_content),
}


def made(
    tokenizer: Any, source: str | None, train_on: str = "all", kind: str = "conversation"
) -> Renderer:
    """A renderer whose tokenizer has this template."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = source
    return Renderer(tokenizer, SimpleNamespace(kind=kind, chat_template=None, train_on=train_on))


def naive(tokenizer: Any, pieces: Pieces, train_on: str) -> tuple[list[int], list[bool]]:
    """Ids and mask, one special token or one character's bytes after another."""
    last = max(i for i, (_, trained) in enumerate(pieces) if trained)
    ids: list[int] = []
    mask: list[bool] = []
    for i, (text, trained) in enumerate(pieces):
        for part in re.findall(r"<\|(?:pad|im_start|im_end)\|>|.", text, re.DOTALL):
            new = tokenizer(part)["input_ids"]
            assert len(new) == (1 if part.startswith("<|") else len(part.encode()))
            ids += new
            mask += [
                train_on == "everything" or (trained and (train_on == "all" or i == last))
            ] * len(new)
    return ids, mask


def conversation(seed: int, turns: int, system: bool) -> Conversation:
    draw = random.Random(seed)

    def text() -> str:
        return (
            "x"
            + "".join(
                draw.choices(
                    ["a", " ", "é", "漢", "🙂", "\n", "7", "assistant", "<|im_end|>"],
                    k=draw.randint(0, 9),
                )
            )
            + "y"
        )

    messages = [{"role": "system", "content": text()}] if system else []
    for _ in range(turns):
        messages += [{"role": "user", "content": text()}, {"role": "assistant", "content": text()}]
    return Conversation(messages, f"row {seed}")


def chat(*contents: str) -> Conversation:
    roles = ["user", "assistant"] * len(contents)
    return Conversation(
        [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)], "here"
    )


@pytest.mark.long
@pytest.mark.parametrize("train_on", ["all", "last", "everything"])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_mask_equals_a_naive_one_over_the_rendered_text(tiny, shape, train_on):
    source, pieces_of = SHAPES[shape]
    renderer = made(tiny.tokenizer, source, train_on)
    for seed, turns, system in itertools.product(range(2), [1, 2, 4], [False, True]):
        example = conversation(seed, turns, system)
        pieces = pieces_of(example.messages)
        text = "".join(text for text, _ in pieces)
        assert text == renderer.tokenizer.apply_chat_template(example.messages, tokenize=False)
        assert renderer(example) == Tokens(*naive(tiny.tokenizer, pieces, train_on))


@pytest.mark.parametrize("train_on", ["all", "last"])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_prompt_of_a_row_is_the_rows_beginning_and_the_answer_follows_it(tiny, shape, train_on):
    renderer = made(tiny.tokenizer, SHAPES[shape][0], train_on)
    for seed in range(5):
        example = conversation(seed, 3, True)
        row, prompt = renderer(example), renderer.prompt(example)
        assert row.ids[: len(prompt)] == prompt
        assert row.trained[len(prompt)]
        assert any(row.trained[: len(prompt)]) == (train_on == "all")
        assert renderer.chat(example.messages[:-1]) == prompt


@pytest.mark.parametrize("shape", ["marked", "unmarked", "brackets"])
def test_the_end_token_is_trained_and_what_follows_it_is_not(tiny, shape):
    row = made(tiny.tokenizer, SHAPES[shape][0])(chat("Hi", "Ho", "Hi", "Ho"))
    ends = [
        i
        for i, token in enumerate(row.ids)
        if token == tiny.tokenizer.eos_token_id and row.trained[i]
    ]
    assert len(ends) == 2
    assert not any(row.trained[i + 1] for i in ends if i + 1 < len(row.ids))


@pytest.mark.parametrize("shape", ["marked", "unmarked"])
def test_an_answers_text_in_a_prompt_is_not_trained(tiny, shape):
    example = chat("<|im_start|>assistant\n4<|im_end|>\n4", "4", "4", "5")
    row = made(tiny.tokenizer, SHAPES[shape][0], "last")(example)
    assert (
        tiny.tokenizer.decode(
            [t for t, trained in zip(row.ids, row.trained, strict=True) if trained]
        )
        == "5<|im_end|>"
    )


def test_a_template_that_rewrites_earlier_turns_trains_each_after_its_own_prompt(tiny):
    renderer = made(tiny.tokenizer, FORGETFUL)
    rewritten = chat("1", "<think>one</think>2", "3", "<think>two</think>4")
    seen = [
        chat("1", "<think>one</think>2"),
        chat("1", "2", "3", "<think>two</think>4"),
    ]
    # In the second, only the last answer is trained: the first one is not as it was generated.
    assert renderer.render(rewritten).sequences == [
        Tokens(*naive(tiny.tokenizer, chatml(one.messages), "last")) for one in seen
    ]
    # Without thoughts, or with one answer, nothing is rewritten.
    for example in (chat("1", "2", "3", "4"), chat("1", "<think>one</think>2")):
        expected = naive(tiny.tokenizer, chatml(example.messages), "all")
        assert renderer.render(example).sequences == [Tokens(*expected)]


def test_training_the_last_answer_suits_a_template_that_rewrites_earlier_turns(tiny):
    row = made(tiny.tokenizer, FORGETFUL, "last")(
        chat("1", "<think>one</think>2", "3", "<think>two</think>4")
    )
    seen = chat("1", "2", "3", "<think>two</think>4")
    assert row == Tokens(*naive(tiny.tokenizer, chatml(seen.messages), "last"))


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (
            (
                "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt"
                " %}A:{% endif %}"
            ),
            "where the generation prompt has",
        ),
        (
            "{{ messages | length }}{% for m in messages %}{{ m.content }};{% endfor %}",
            "not additive",
        ),
        ("{{ raise_exception('only one turn') }}", "refuses it: only one turn"),
        (
            "{% if messages[0].role == 'never' %}{% generation %}x{% endgeneration %}{% endif %}x",
            "mark nothing",
        ),
    ],
)
def test_answers_without_an_exact_place_are_refused(tiny, source, reason):
    with pytest.raises(Refused, match=reason):
        made(tiny.tokenizer, source)(chat("1", "2"))


@pytest.fixture(scope="module")
def merging() -> PreTrainedTokenizerFast:
    """Characters, of which two colons in a row are one token."""
    vocabulary = {token: i for i, token in enumerate(["<e>", "a", "b", "c", ":", "::"])}
    inner = Tokenizer(models.BPE(vocabulary, [(":", ":")]))
    inner.pre_tokenizer = pre_tokenizers.Split("<e>", "isolated")
    inner.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<e>", pad_token="<e>")


MARKED_PLAIN = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{%"
    " endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
)


SEPARATED = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{%"
    " endgeneration %}{% else %}<e>{{ m.content }}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize(
    "source", [MARKED_PLAIN, re.sub(r"\{% (end)?generation %\}", "", MARKED_PLAIN)]
)
@pytest.mark.parametrize(
    ("contents", "reason"),
    [
        (["a:", ":b"], "prompt alone ends"),
        (["a", "b:", ":a", "c"], "across the end"),
        (["a", "b", "c:", ":a"], "prompt alone ends"),
    ],
)
def test_a_token_across_an_answers_border_is_refused(merging, source, contents, reason):
    with pytest.raises(Refused, match=reason):
        made(merging, source)(chat(*contents))


@pytest.mark.parametrize(
    "source", [MARKED_PLAIN, re.sub(r"\{% (end)?generation %\}", "", MARKED_PLAIN)]
)
def test_a_token_within_an_answer_is_trained_whole(merging, source):
    row = made(merging, source)(chat("a::", "b::c", "::", "a"))
    assert (row.ids, row.trained) == (
        [1, 5, 2, 5, 3, 5, 1],
        [False, False, True, True, True, False, True],
    )


def test_a_tokenizer_that_places_no_token_takes_no_template():
    words = ByT5Tokenizer(extra_ids=0)
    with pytest.raises(BaseError, match="ByT5Tokenizer, which does not say where in a text"):
        made(words, CHATML)
    plain = Renderer(words, SimpleNamespace(kind="conversation", chat_template="none"))
    row = plain(chat("ab", "c"))
    assert row.ids[-2:] == [*words("c", add_special_tokens=False)["input_ids"], words.eos_token_id]


def test_a_text_to_continue_has_no_end(tiny):
    ends = copy.deepcopy(tiny.tokenizer)
    ends.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A <|im_end|>", special_tokens=[("<|im_end|>", 2)]
    )
    assert plain_ids(ends, "ab") == [*plain_ids(tiny.tokenizer, "ab"), 2]
    for tokenizer in (ends, tiny.tokenizer):
        assert continued_ids(tokenizer, "ab") == plain_ids(tiny.tokenizer, "ab")
    assert continued_ids(tiny.tokenizer, "a<|im_end|>") == plain_ids(tiny.tokenizer, "a<|im_end|>")


def test_a_tokenizer_without_a_template_asks_for_one(tiny, tmp_path):
    tokenizer = copy.deepcopy(tiny.tokenizer)
    tokenizer.chat_template = None
    with pytest.raises(DataError, match="no chat template"):
        template(None, tokenizer)
    with pytest.raises(DataError, match="no such file"):
        template(str(tmp_path / "missing.jinja"), tokenizer)
    (tmp_path / "mine.jinja").write_text(BRACKETS, "utf-8")
    assert template(str(tmp_path / "mine.jinja"), tokenizer) == BRACKETS
    assert template("chatml", tokenizer) == CHATML
    assert template("none", tiny.tokenizer) is None
    assert template(None, tiny.tokenizer) == tiny.tokenizer.chat_template


@pytest.mark.parametrize("train_on", ["all", "last", "everything"])
def test_without_a_template_a_row_is_its_prompt_its_answer_and_the_end(tiny, train_on):
    renderer = Renderer(
        tiny.tokenizer,
        SimpleNamespace(kind="conversation", chat_template="none", train_on=train_on),
    )
    example = Conversation(
        [
            {"role": r, "content": c}
            for r, c in [("system", "Add. "), ("user", "2+3="), ("assistant", "5é")]
        ],
        "here",
    )
    prompt_trained = train_on == "everything"
    expected = naive(tiny.tokenizer, [("Add. 2+3=", prompt_trained), ("5é<|im_end|>", True)], "all")
    assert renderer(example) == Tokens(*expected)
    assert renderer.prompt(example) == tiny.tokenizer("Add. 2+3=")["input_ids"]
    with pytest.raises(Refused, match="several answers"):
        renderer(chat("1", "2", "3", "4"))


@pytest.mark.parametrize("train_on", ["all", "last"])
def test_tools_and_calls_stand_in_the_row_and_calls_are_trained(tiny, train_on):
    call = {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": "{}"}}],
    }
    messages = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "U"},
        call,
        {"role": "tool", "content": "5"},
        {"role": "assistant", "content": "It is 5"},
    ]
    example = Conversation(messages, "here", [TOOL])
    renderer = made(tiny.tokenizer, TOOLS, train_on)
    row = renderer(example)
    text = renderer.tokenizer.decode(row.ids)
    assert text.startswith("TOOLS[{")
    assert '"name": "add"' in text.partition(";")[0]
    head, shown = text.partition("system>")[0], "S<|im_end|>user>U<|im_end|>assistant>"
    pieces = [
        (f"{head}system>{shown}", False),
        ("CALLadd<|im_end|>", True),
        ("tool>5<|im_end|>assistant>", False),
    ]
    assert row == Tokens(*naive(tiny.tokenizer, [*pieces, ("It is 5<|im_end|>", True)], train_on))
    assert row.ids[: len(renderer.prompt(example))] == renderer.prompt(example)


@pytest.mark.parametrize(
    ("example", "reason"),
    [
        (Conversation(chat("1", "2").messages, "here", [TOOL]), "leaves out tool 1: name 'add'"),
        (
            Conversation(
                [*chat("1").messages, {"role": "assistant", "content": "", "tool_calls": [CALL]}],
                "here",
            ),
            r"message 2 \(assistant\): tool_calls, name 'add'",
        ),
    ],
)
@pytest.mark.parametrize("source", [CHATML, UNMARKED])
def test_tools_that_a_template_does_not_show_are_refused(tiny, source, example, reason):
    with pytest.raises(Refused, match=reason):
        made(tiny.tokenizer, source)(example)


def test_of_several_templates_the_one_for_tools_is_taken_where_there_are_tools(tiny):
    renderer = made(tiny.tokenizer, None, kind="text")
    renderer.kind = "conversation"
    renderer.use({"default": UNMARKED, "tool_use": TOOLS})
    decode = renderer.tokenizer.decode
    assert decode(renderer(chat("1", "2")).ids).startswith("<|im_start|>user")
    assert decode(renderer(Conversation(chat("1", "2").messages, "here", [TOOL])).ids).startswith(
        "TOOLS"
    )


@pytest.mark.parametrize("text", ["abc", "é 漢", "a<|im_end|>"])
def test_plain_text_is_trained_whole_and_ends_once(tiny, text):
    row = made(tiny.tokenizer, None, kind="text")(Text(text, "here"))
    assert tiny.tokenizer.decode(row.ids) == text.removesuffix("<|im_end|>") + "<|im_end|>"
    assert row.trained == [True] * len(row.ids)


def test_a_labelled_text_trains_no_token_and_has_the_index_of_its_class(tiny):
    renderer = Renderer(tiny.tokenizer, SimpleNamespace(kind="label", labels=["no", "yes"]))
    ids = tiny.tokenizer("fine")["input_ids"]
    assert renderer(Labelled("fine", "yes", "here")) == Tokens(ids, [False] * 4, 1)
    assert renderer(Labelled("fine", "no", "here")).label == 0


@pytest.mark.parametrize(
    ("source", "marked"),
    [(CHATML, True), (MARKED_CONTENT, True), (UNMARKED, False), ("generation", False)],
)
def test_markers_are_found_however_they_are_written(source, marked):
    assert has_markers(source) is marked


def outcome(renderer: Renderer, example: Conversation) -> Tokens | str:
    try:
        return renderer(example)
    except Refused as refusal:
        return str(refusal)


@pytest.fixture(scope="module")
def unknowing() -> PreTrainedTokenizerFast:
    """Words, of which those that it does not know get the id of the special token <e>, as BERT's
    get that of [UNK]."""
    inner = Tokenizer(models.WordLevel({"<e>": 0, "a": 1, "b": 2, ":": 3}, unk_token="<e>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<e>", unk_token="<e>", pad_token="<e>"
    )


@pytest.mark.long
@pytest.mark.parametrize("train_on", ["all", "last"])
@pytest.mark.parametrize("shape", [*SHAPES, "merging", "unknowing"])
def test_prompts_that_are_not_tokenised_again_give_what_those_that_are_give(
    request, tiny, shape, train_on
):
    if shape in SHAPES:
        quick, whole = (made(tiny.tokenizer, SHAPES[shape][0], train_on) for _ in range(2))
    else:
        quick, whole = (made(request.getfixturevalue(shape), SEPARATED, train_on) for _ in range(2))
    assert quick.anchors
    whole.anchors = {}
    draw = random.Random(0)
    examples = [conversation(seed, 1 + seed % 4, seed % 2 == 0) for seed in range(20)]
    letters = ["a", ":", "b", "<e>", "c", " ", "<", "e>", "<|im_", "start|>"]
    examples += [
        chat(*("".join(draw.choices(letters, k=1 + draw.randrange(5))) for _ in range(4)))
        for _ in range(40)
    ]
    actual = [outcome(quick, example) for example in examples]
    assert actual == [outcome(whole, example) for example in examples]
    assert sum(isinstance(one, Tokens) for one in actual) > 10
    if shape == "merging":
        assert any(isinstance(one, str) for one in actual)


@pytest.mark.parametrize("shape", SHAPES)
def test_rows_prepared_together_are_those_rendered_alone(tiny, shape):
    """Their texts are tokenised in one call; a row that was not prepared is as good."""
    template = SHAPES[shape][0]
    alone, together = made(tiny.tokenizer, template), made(tiny.tokenizer, template)
    examples = [conversation(seed, 1 + seed % 3, seed % 2 == 0) for seed in range(12)]
    examples += [chat("same", "words"), chat("same", "words")]
    calls = []
    tokenise = together._encode._all
    together._encode._all = lambda texts: calls.append(len(texts)) or tokenise(texts)
    together.prepare(examples)
    assert calls == [len(together._encode._known)]
    assert calls[0] >= 12
    order = [*reversed(examples), conversation(99, 2, True)]
    assert [outcome(together, one) for one in order] == [outcome(alone, one) for one in order]
    assert not together._prepared


def test_a_prompt_is_tokenised_from_its_last_special_token_on_and_once(tiny, monkeypatch):
    renderer = made(tiny.tokenizer, UNMARKED)
    asked: list[str] = []
    encode = renderer._encode
    monkeypatch.setattr(renderer, "_encode", lambda text: asked.append(text) or encode(text))
    examples = [chat("1", "2", "3", "4"), chat("5", "6")]
    rows = [renderer(example) for example in examples]
    texts = [
        renderer.tokenizer.apply_chat_template(example.messages, tokenize=False)
        for example in examples
    ]
    assert asked == [texts[0], "<|im_start|>assistant\n", texts[1]]
    assert all(any(row.trained) for row in rows)


def test_a_tail_that_begins_otherwise_on_its_own_is_not_taken(tiny):
    expected, renderer = (
        made(tiny.tokenizer, UNMARKED)(chat("1", "2")),
        made(tiny.tokenizer, UNMARKED),
    )
    renderer._tails["<|im_start|>assistant\n"] = [
        5,
        *renderer._encode("<|im_start|>assistant\n")[0],
    ]
    assert renderer(chat("1", "2")) == expected


def test_a_set_of_named_templates_is_written_and_read_whole(tmp_path, tiny):
    """As a run folder keeps it, and as transformers writes and reads it."""
    named = {"default": UNMARKED, "tool_use": TOOLS, "../outside": "{{ x }}"}
    (tmp_path / "run").mkdir()
    write_template(tmp_path / "run", named)
    assert not list(tmp_path.rglob("outside*"))
    safe = {name: text for name, text in named.items() if name != "../outside"}
    file = tmp_path / "run" / "chat_template.jinja"
    assert template(str(file), tiny.tokenizer) == safe
    task = SimpleNamespace(kind="conversation", chat_template=None, train_on="all")
    use_template(tmp_path / "run", task)
    assert Renderer(tiny.tokenizer, task).template == safe
    words = copy.deepcopy(tiny.tokenizer)
    words.chat_template = safe
    words.save_pretrained(tmp_path / "saved")
    assert template(str(tmp_path / "saved" / "chat_template.jinja"), tiny.tokenizer) == safe
    alone = tmp_path / "alone.jinja"
    alone.write_text(UNMARKED)
    assert template(str(alone), tiny.tokenizer) == UNMARKED
