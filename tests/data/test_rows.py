"""Rows are kept or counted, cached by all that they depend on, and packed without touching each
other."""

from __future__ import annotations

import copy
import inspect
import json
import os
import random
import shutil
import signal
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from tokenizers import AddedToken
from transformers import AutoModelForCausalLM

from tasks.classification import Classification
from tasks.completion import Completion
from tasks.reading import DataError
from tasks.sft import SFT
from tests.conftest import sums, write_rows
from tests.toys import tasks as toys
from trainer.data import rows as rows_module
from trainer.data.batches import Collate, Pick, Sequences
from trainer.data.lengths import SHOWN
from trainer.data.packing import pack
from trainer.data.render import Rendered, Renderer, Tokens
from trainer.data.rendering import render_one, rendered, special_text
from trainer.data.rows import Rows, tokenise

BROKEN = '{"messages": [{"role": "user", "content": "1+1="}]}'


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of each test's own."""
    monkeypatch.setenv("GRAFT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "tokens"


def sft(path: Path, **changes: Any) -> SFT:
    return SFT(str(path), **toys.SFT | changes)


def text_file(path: Path, lengths: list[int]) -> Path:
    return write_rows(
        path, [{"text": chr(97 + i % 26) * length} for i, length in enumerate(lengths)]
    )


def texts(path: Path, **changes: Any) -> Completion:
    options = {
        "columns": {},
        "streaming": False,
        "shuffle_block": 10,
    }
    return Completion(str(path), **toys.SPLITS | options | changes)


def listed(rows: Rows) -> list[Tokens]:
    return [rows[i] for i in range(len(rows))]


def built(
    tiny: Any,
    task: Any,
    max_length: int = 512,
    overlong: str = "raise",
    processes: int = 1,
    split: str = "train",
) -> Rows:
    return tokenise(task, split, Renderer(tiny.tokenizer, task), max_length, overlong, processes)


def key(
    tiny: Any,
    task: Any,
    split: str = "train",
    max_length: int = 64,
    overlong: str = "drop",
    tokenizer: Any = None,
) -> str:
    return rows_module.cache_key(
        task, split, Renderer(tokenizer or tiny.tokenizer, task), max_length, overlong
    )


def test_rows_are_those_of_the_renderer_in_order_with_their_places(tiny, chats):
    task = sft(chats)
    rows, renderer = built(tiny, task), Renderer(tiny.tokenizer, task)
    examples = list(task.examples("train"))
    assert listed(rows) == [renderer(example) for example in examples]
    assert [rows.where(i) for i in range(60)] == [f"{chats}:{i + 1}" for i in range(60)]
    assert rows.examples() == list(range(60))
    assert rows.lengths.tolist() == [len(row.ids) for row in listed(rows)]
    assert rows.trained.tolist() == [sum(row.trained[1:]) for row in listed(rows)]
    assert rows.prompts.tolist() == [
        next((at for at, flag in enumerate(row.trained) if at and flag), len(row.ids))
        for row in listed(rows)
    ]
    report = rows.report
    assert (report.rows, report.kept, report.ends_trained) == (60, 60, 60)
    assert report.tokens == rows.lengths.sum()
    assert report.trained_tokens == sum(sum(row.trained) for row in listed(rows))
    assert report.longest == rows.lengths.max()


def test_labels_are_kept_with_their_rows(tiny, tmp_path):
    listed_ = [{"text": f"row {i}", "label": ["no", "yes", "so"][i % 3]} for i in range(9)]
    task = Classification(
        str(write_rows(tmp_path / "c.jsonl", listed_)),
        **toys.SPLITS | {"columns": {}, "labels": None},
    )
    assert [row.label for row in listed(built(tiny, task))] == [0, 2, 1] * 3


LENGTHS = [3, 9, 10, 11, 20, 30, 5]  # of the texts; a row has one more token


@pytest.mark.parametrize("max_length", [4, 10, 11, 12, 100])
@pytest.mark.parametrize("overlong", ["drop", "truncate"])
def test_overlong_rows_are_dropped_or_cut_and_counted(tiny, tmp_path, overlong, max_length):
    task = texts(text_file(tmp_path / "t.jsonl", LENGTHS))
    whole = [Renderer(tiny.tokenizer, task)(example) for example in task.examples("train")]
    rows = built(tiny, task, max_length, overlong)
    longer = [row for row in whole if len(row.ids) > max_length]
    if overlong == "drop":
        assert listed(rows) == [row for row in whole if len(row.ids) <= max_length]
        assert (rows.report.dropped, rows.report.truncated, rows.report.tokens_cut) == (
            len(longer),
            0,
            0,
        )
    else:
        assert listed(rows) == [
            Tokens(row.ids[:max_length], row.trained[:max_length]) for row in whole
        ]
        cut = sum(len(row.ids) - max_length for row in longer)
        assert (rows.report.dropped, rows.report.truncated, rows.report.tokens_cut) == (
            0,
            len(longer),
            cut,
        )
    assert rows.trained.tolist() == [len(row.ids) - 1 for row in listed(rows)]
    assert rows.prompts.tolist() == [
        next((at for at, flag in enumerate(row.trained) if at and flag), len(row.ids))
        for row in listed(rows)
    ]
    assert rows.report.answers_lost == 0
    assert (rows.report.rows, rows.report.kept) == (len(whole), len(rows))
    assert rows.report.ends_trained == len(whole) - len(longer)
    assert rows.report.longest == max(len(row.ids) for row in listed(rows)) <= max_length
    assert (f"{len(longer)} longer" in rows.report.summary()) == (
        overlong == "drop" and len(longer) > 0
    )


def test_a_row_that_truncation_leaves_no_answer_is_dropped_and_counted_apart(tiny, tmp_path):
    chats = [
        [
            {"role": "user", "content": "q" * question},
            {"role": "assistant", "content": "a" * answer},
        ]
        for question, answer in [(5, 5), (60, 5), (5, 60), (6, 6), (70, 70)]
    ]
    task = sft(write_rows(tmp_path / "c.jsonl", [{"messages": messages} for messages in chats]))
    whole = [Renderer(tiny.tokenizer, task)(example) for example in task.examples("train")]
    rows = built(tiny, task, 50, "truncate")
    assert [rows.examples(), rows.report.answers_lost, rows.report.truncated] == [[0, 2, 3], 2, 1]
    assert rows[1] == Tokens(whole[2].ids[:50], whole[2].trained[:50])
    assert rows.report.tokens_cut == len(whole[2].ids) - 50
    assert "2 lost their answer" in rows.report.summary()


def test_a_row_of_which_only_the_first_token_is_trained_has_nothing_to_learn(tiny, tmp_path):
    # Nothing predicts the first token.
    task = texts(
        write_rows(tmp_path / "t.jsonl", [{"text": "<|im_end|>"}, {"text": "ab"}]), on_bad="skip"
    )
    rows = built(tiny, task)
    assert (rows.examples(), rows.report.bad) == (
        [1],
        [(f"{tmp_path}/t.jsonl:1", "it has no trained token")],
    )
    with pytest.raises(
        DataError, match=r"no row of train is left: .*1 lost their answer to truncation"
    ):
        built(tiny, task, 1, "truncate")


def test_a_labelled_row_that_is_cut_keeps_its_class(tiny, tmp_path):
    file = write_rows(
        tmp_path / "c.jsonl", [{"text": "x" * 30, "label": 1}, {"text": "y", "label": 0}]
    )
    task = Classification(str(file), **toys.SPLITS, columns={}, labels=None)
    rows = built(tiny, task, 10, "truncate")
    assert [(len(row.ids), row.label) for row in listed(rows)] == [(10, 1), (1, 0)]
    assert rows.report.answers_lost == 0


def test_an_overlong_row_is_an_error_where_asked_and_names_its_place(tiny, tmp_path):
    task = texts(text_file(tmp_path / "t.jsonl", [3, 20]))
    with pytest.raises(DataError, match=r"t\.jsonl:2: 21 tokens, more than max_length=20"):
        built(tiny, task, 20, "raise")
    assert len(built(tiny, task, 21, "raise")) == 2


def test_nothing_left_is_an_error_that_counts_why(tiny, tmp_path):
    task = texts(text_file(tmp_path / "t.jsonl", [20, 30]))
    for _ in range(2):  # and is not cached as a result
        with pytest.raises(
            DataError, match=r"no row of train is left: 0 of 2 rows kept; 2 longer than max_length"
        ):
            built(tiny, task, 8, "drop")


def test_only_broken_rows_are_an_error_even_where_they_are_skipped(tiny, tmp_path):
    (tmp_path / "broken.jsonl").write_text(f"{BROKEN}\n" * 3, "utf-8")
    with pytest.raises(
        DataError, match=r"no row of train is left: 0 of 3 rows kept; 3 broken, skipped"
    ):
        built(tiny, sft(tmp_path / "broken.jsonl", on_bad="skip"))


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    """Ten chats, of which the third, sixth and ninth are broken, each in its way."""
    lines = [json.dumps(row) for row in sums(10)]
    lines[2], lines[5], lines[8] = BROKEN, "{not JSON", '{"messages": []}'
    file = tmp_path / "broken.jsonl"
    file.write_text("\n".join(lines) + "\n", "utf-8")
    return file


def test_broken_rows_are_all_named_at_once(tiny, broken):
    with pytest.raises(DataError) as raised:
        built(tiny, sft(broken))
    message = str(raised.value)
    assert [f"broken.jsonl:{line}: " in message for line in range(1, 11)] == [
        line in (3, 6, 9) for line in range(1, 11)
    ]
    assert "on_bad=skip" in message


def test_broken_rows_are_skipped_and_counted_where_asked(tiny, broken):
    task = sft(broken, on_bad="skip")
    rows = built(tiny, task)
    assert rows.examples() == [0, 1, 3, 4, 6, 7, 9]
    assert (rows.report.rows, rows.report.kept, rows.report.skipped) == (10, 7, 3)
    assert [where for where, _ in rows.report.bad] == [f"{broken}:{line}" for line in (3, 6, 9)]
    assert "3 broken, skipped" in rows.report.summary()
    renderer = Renderer(tiny.tokenizer, task)
    stored = [render_one(example, renderer)[1] for example in task.examples("train")]
    assert listed(rows) == [
        sequence for row in stored if not isinstance(row, str) for sequence in row.sequences
    ]


def test_many_broken_rows_end_the_reading_early(tiny, tmp_path):
    file = tmp_path / "broken.jsonl"
    file.write_text("\n".join([json.dumps(sums(1)[0]), *[BROKEN] * 100]) + "\n", "utf-8")
    with pytest.raises(DataError, match=f"and at least {SHOWN - 5} more broken rows"):
        built(tiny, sft(file))
    rows = built(tiny, sft(file, on_bad="skip"))
    assert (len(rows), rows.report.skipped, len(rows.report.bad)) == (1, 100, SHOWN)


def test_several_processes_give_what_one_gives(tiny, tmp_path, own_cache, worker_processes):
    chats = sums(600)  # more than a process takes at once
    for row in chats[:256]:  # the first share takes the longest
        row["messages"][0]["content"] *= 500
    lines = [json.dumps(row) for row in chats]
    lines[300] = BROKEN
    (tmp_path / "many.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
    task = sft(tmp_path / "many.jsonl", on_bad="skip")
    several = built(tiny, task, 10_000, processes=worker_processes)
    actual = listed(several), several.report, several.examples()
    del several
    shutil.rmtree(own_cache)
    one = built(tiny, task, 10_000)
    assert actual == (listed(one), one.report, one.examples())
    assert actual[2] == [i for i in range(600) if i != 300]


class Killed:
    """A renderer whose process the system kills, as it does when out of memory."""

    def prepare(self, examples: Any) -> None:
        pass

    def render(self, example: Any) -> Rendered:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError


def test_a_killed_process_is_said_and_not_waited_for(chats, worker_processes):
    with pytest.raises(
        DataError, match="one of the 2 processes that tokenise the rows was killed from outside"
    ):
        list(rendered(sft(chats).examples("train"), cast(Renderer, Killed()), worker_processes))


def columns_of_no_known_format(tiny, tmp_path, processes):
    file = write_rows(tmp_path / "odd.jsonl", [{"question": "1+1=", "answer": "2"}])
    task = sft(file)
    message = r"odd\.jsonl:1: the columns \(question, answer\) are of no known format"
    with pytest.raises(DataError, match=message):
        list(rendered(task.examples("train"), Renderer(tiny.tokenizer, task), processes))
    with pytest.raises(DataError, match=message):
        built(tiny, task)


def test_columns_of_no_known_format_are_named(tiny, tmp_path):
    columns_of_no_known_format(tiny, tmp_path, 1)


def test_columns_of_no_known_format_are_named_whoever_reads_them(tiny, tmp_path, worker_processes):
    columns_of_no_known_format(tiny, tmp_path, worker_processes)


def test_training_data_without_a_row_is_an_error_and_evaluation_without_one_is_not(tiny, tmp_path):
    file = tmp_path / "blank.jsonl"
    file.write_text("\n \n")
    with pytest.raises(DataError, match="the training data has no row"):
        built(tiny, texts(file))
    assert len(built(tiny, texts(file), split="eval")) == 0


# The cache


def test_cached_rows_equal_fresh_ones_and_are_not_made_again(tiny, chats, monkeypatch):
    fresh = built(tiny, sft(chats), 30, "drop")
    assert fresh.report.dropped == 0

    calls = []
    monkeypatch.setattr(
        rows_module, "rendered", lambda *arguments: calls.append(arguments) or rendered(*arguments)
    )
    cached = built(tiny, sft(chats), 30, "drop")
    assert listed(cached) == listed(fresh)
    assert asdict(cached.report) == asdict(fresh.report)
    assert cached.lengths.tolist() == fresh.lengths.tolist()
    assert not calls
    built(tiny, sft(chats), 31, "drop")
    assert len(calls) == 1


@pytest.mark.long
@pytest.mark.parametrize("suffix", ["json", "arrow"])
@pytest.mark.parametrize("content", [b"", b"{", b"[1]", None])
def test_a_broken_cache_entry_is_made_again(tiny, chats, own_cache, suffix, content):
    fresh = built(tiny, sft(chats))
    expected, report = listed(fresh), asdict(fresh.report)
    actual = list(own_cache.rglob(f"*.{suffix}"))
    assert actual
    del fresh
    for file in actual:
        if suffix == "json" and file.name == "dataset_info.json":
            continue
        file.unlink()
        if content is not None:
            file.write_bytes(content)
    again = built(tiny, sft(chats))
    assert listed(again) == expected
    assert asdict(again.report) == report
    assert listed(built(tiny, sft(chats))) == expected


def test_a_cache_entry_with_another_number_of_rows_is_made_again(tiny, chats, own_cache):
    expected = listed(built(tiny, sft(chats)))
    whole = next(own_cache.rglob("*.arrow"))
    built(tiny, sft(chats, limit=5))
    fewer = next(file for file in own_cache.rglob("*.arrow") if file != whole)
    content = fewer.read_bytes()
    whole.unlink()
    whole.write_bytes(content)
    assert listed(built(tiny, sft(chats))) == expected


def test_an_interrupted_making_leaves_no_entry_behind(tiny, chats, own_cache, monkeypatch):
    with monkeypatch.context() as patch:

        def stops(*arguments: Any) -> Any:
            yield from list(rendered(*arguments))[:7]
            raise KeyboardInterrupt

        patch.setattr(rows_module, "rendered", stops)
        with pytest.raises(KeyboardInterrupt):
            built(tiny, sft(chats))
    assert not list(own_cache.glob("*.json"))
    assert len(built(tiny, sft(chats))) == 60


def test_equal_settings_and_contents_share_a_cache_key(tiny, chats, tmp_path):
    first = key(tiny, sft(chats))
    copied = tmp_path / "elsewhere.jsonl"
    copied.write_bytes(chats.read_bytes())
    assert key(tiny, sft(chats)) == first
    assert key(tiny, sft(copied)) == first
    assert key(tiny, sft(chats), tokenizer=copy.deepcopy(tiny.tokenizer)) == first
    # What only grading or streaming reads.
    assert key(tiny, sft(chats, metric="bleu", shuffle_block=99)) == first


@pytest.mark.parametrize(
    "changes",
    [
        {"system": "Add."},
        {"columns": {"messages": "chats"}},
        {"format": "messages"},
        {"train_on": "last"},
        {"train_on": "everything"},
        {"chat_template": "none"},
        {"limit": 5},
        {"on_bad": "skip"},
        {"eval_fraction": 0.5},
    ],
)
def test_the_cache_key_changes_with_each_setting_that_the_rows_depend_on(tiny, chats, changes):
    assert key(tiny, sft(chats, **changes)) != key(tiny, sft(chats))


def test_the_cache_key_has_the_code_of_all_that_reads_rows():
    from tasks import conversation, hub, messages, reading
    from trainer.data import cache_key

    used = {
        value.__module__
        for part in (conversation, hub, messages, reading)
        for value in vars(part).values()
        if str(getattr(value, "__module__", "")).startswith("tasks.")
    }
    known = {value.__name__ for value in vars(cache_key).values() if inspect.ismodule(value)}
    assert used - known <= {"tasks.task"}  # imported as tasks


def test_the_cache_key_changes_with_the_lengths_the_split_and_the_file(tiny, chats):
    keys = [
        key(tiny, sft(chats)),
        key(tiny, sft(chats), max_length=65),
        key(tiny, sft(chats), overlong="truncate"),
        key(tiny, sft(chats, eval_fraction=0.1), "train"),
        key(tiny, sft(chats, eval_fraction=0.1), "eval"),
    ]
    content = chats.read_text("utf-8")
    for changed in (
        content.replace("+", "-", 1),
        content + content.splitlines()[0] + "\n",
        content.replace('"role"', ' "role"'),
    ):
        chats.write_text(changed, "utf-8")
        keys.append(key(tiny, sft(chats)))
    assert len(set(keys)) == len(keys)


def test_the_cache_key_changes_with_the_template_and_the_tokenizer(tiny, chats, tmp_path):
    (tmp_path / "a.jinja").write_text(tiny.tokenizer.chat_template + " ", "utf-8")
    own, special, token, eos = (copy.deepcopy(tiny.tokenizer) for _ in range(4))
    own.chat_template += "\n"
    special.add_special_tokens({"additional_special_tokens": ["<|extra|>"]})
    token.add_tokens([AddedToken("12")])
    eos.eos_token = "<|pad|>"
    keys = [key(tiny, sft(chats)), key(tiny, sft(chats, chat_template=str(tmp_path / "a.jinja")))]
    keys += [key(tiny, sft(chats), tokenizer=tokenizer) for tokenizer in (own, special, token, eos)]
    assert len(set(keys)) == 6


def test_digests_tell_equal_rows_from_others(tiny, tmp_path):
    task = texts(
        write_rows(tmp_path / "t.jsonl", [{"text": text} for text in ["a", "b", "a", "ab"]])
    )
    digests = list(built(tiny, task).digests())
    assert digests[0] == digests[2]
    assert len(set(digests)) == 3


def test_messages_that_hold_a_special_tokens_text_are_counted(tiny, tmp_path):
    held = [
        {"messages": [{"role": "user", "content": c}, {"role": "assistant", "content": "4"}]}
        for c in ["<|pad|>", "|pad|", "x<|im_end|>"]
    ]
    assert (
        special_text(sft(write_rows(tmp_path / "s.jsonl", held)).examples("train"), tiny.tokenizer)
        == 2
    )


# Packing


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("capacity", [16, 50, 512])
@pytest.mark.parametrize("count", [0, 1, 10, 500])
def test_packing_splits_loses_and_doubles_no_row_and_stays_within_max_length(count, capacity, seed):
    lengths = np.random.default_rng(seed + count).integers(1, capacity + 1, count)
    packs = pack(lengths, capacity, seed)
    assert sorted(row for held in packs for row in held) == list(range(count))
    assert all(held for held in packs)
    assert all(sum(int(lengths[row]) for row in held) <= capacity for held in packs)
    assert pack(lengths, capacity, seed) == packs
    # As a plain search for the fullest pack that still fits does it.
    spaces: list[int] = []
    for length in sorted(lengths.tolist(), reverse=True):
        fitting = [i for i, space in enumerate(spaces) if space >= length]
        if fitting:
            spaces[min(fitting, key=lambda i: spaces[i])] -= length
        else:
            spaces.append(capacity - length)
    assert sorted(capacity - sum(int(lengths[row]) for row in held) for held in packs) == sorted(
        spaces
    )


def test_packing_draws_among_equal_lengths_by_the_seed():
    lengths = np.full(40, 5)
    assert pack(lengths, 20, 0) != pack(lengths, 20, 1)
    assert len(pack(lengths, 20, 0)) == 10


@pytest.mark.parametrize("max_length", [32, 64, 128])
def test_a_packed_row_has_the_logits_that_it_has_alone(tiny, tmp_path, max_length):
    draw = random.Random(max_length)
    task = texts(text_file(tmp_path / "t.jsonl", [draw.randint(1, 30) for _ in range(12)]))
    rows = built(tiny, task, max_length, "raise")
    sequences = Sequences(rows, pack(rows.lengths, max_length, 0))
    assert len(sequences) < len(rows)
    batch = Collate(0, True, False)([sequences[Pick(i, True, 1)] for i in range(len(sequences))])
    model = AutoModelForCausalLM.from_pretrained(
        tiny.path, dtype=torch.float32, attn_implementation="sdpa"
    ).eval()
    with torch.no_grad():
        packed = model(
            input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False
        ).logits
        ignorant = model(input_ids=batch["input_ids"], use_cache=False).logits
        apart = 0.0
        for i in range(len(sequences)):
            at = 0
            for row in sequences.members(i):
                here = slice(at, at + int(rows.lengths[row]))
                alone = model(input_ids=torch.tensor([rows[row].ids]), use_cache=False).logits[0]
                torch.testing.assert_close(packed[i, here], alone, rtol=1e-5, atol=1e-6)
                apart = max(apart, float((ignorant[i, here] - alone).abs().max()))
                at += int(rows.lengths[row])
    assert apart > 1e-4  # this test would notice rows that see each other
