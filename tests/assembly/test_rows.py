"""A task's rows: which are loaded, which have prompts, and what counts them."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

import pytest
from omegaconf import OmegaConf

from tasks.reading import DataError
from tests.conftest import composed, write_rows
from trainer.assembly.build import instantiate
from trainer.assembly.rows import add_prompts, batch_order, load_data, load_held_out, token_counts
from trainer.config.errors import ConfigError


def config_of(*overrides):
    cfg = composed("experiment=smoke", "base=tiny", *overrides)
    bare = OmegaConf.masked_copy(cfg, [key for key in cfg if key != "hydra"])
    return OmegaConf.to_container(bare, resolve=True)


@pytest.fixture
def loaded(tiny, chats):
    """(config, data) of the chats, a quarter of them held out."""

    def load(*overrides, train=True):
        config = config_of(f"task.path={chats}", "task.eval_fraction=0.25", *overrides)
        return config, load_data(config, tiny, instantiate(config["task"]), train=train)

    return load


@pytest.mark.long
def test_rows_are_trained_or_held_out_and_named_by_their_lines(loaded, chats):
    _, data = loaded()
    lines = {f"{chats}:{number}" for number in range(1, 61)}
    named = [data.rows_of([row])[0] for row in range(len(data.train))]
    held_out = [data.held_out.sequences.rows.where(i) for i in range(15)]
    assert {*named} | {*held_out} == lines
    assert (len(named), len(held_out)) == (45, 15)


def test_rows_of_a_packed_sequence_are_all_named(loaded):
    _, data = loaded("packing=true", "max_length=128")
    sequences = range(len(data.train))
    assert len(sequences) < 45
    assert len({*data.rows_of([*sequences])}) == 45
    assert len(data.held_out.sequences) == 15  # evaluation is never packed


def test_without_training_only_the_held_out_rows_are_read(loaded):
    _, data = loaded(train=False)
    assert data.train is None
    assert set(data.identity) == {"eval"}
    assert len(data.held_out.sequences) == 15


def test_a_task_without_held_out_rows_says_so(tiny, chats):
    config = config_of(f"task.path={chats}", "task.eval_fraction=0")
    with pytest.raises(DataError, match=r"has no held-out rows: it has task\.eval_fraction=0"):
        load_held_out(config, tiny, instantiate(config["task"]))


def test_prompts_are_the_first_held_out_conversations_without_their_answers(loaded, tiny):
    _, data = loaded()
    add_prompts(data, 4, [2, 7])
    examples = [*data.task.examples("eval")][:4]
    assert [example for example, _ in data.held_out.prompts] == examples
    texts = [tiny.tokenizer.decode(ids) for _, ids in data.held_out.prompts]
    for example, text in zip(examples, texts, strict=True):
        assert example.messages[0]["content"] in text
        assert not text.rstrip().endswith(example.reference)
    assert data.held_out.stops == [2, 7]
    assert data.held_out.grade(examples[0], examples[0].reference) == {data.task.metric: 1.0}
    add_prompts(data, 2, [2, 7])
    assert len(data.held_out.prompts) == 4  # they are there already


@pytest.mark.long
def test_a_classifiers_rows_count_one_trained_label_each(tiny, tmp_path):
    rows = [{"text": "a" * (i + 1), "label": "ab"[i % 2]} for i in range(12)]
    file = write_rows(tmp_path / "rows.jsonl", rows)
    config = config_of("task=classification", f"task.path={file}", "task.eval_fraction=0")
    data = load_data(config, tiny, instantiate(config["task"]))
    order = batch_order(config, data, 1)
    assert {*map(int, order.trained)} == {1}
    assert data.held_out is None


def test_tokens_are_counted_where_they_are_trained(loaded):
    config, data = loaded()
    rows = data.train.rows
    expected = Counter()
    for index in range(len(rows)):
        row = rows[index]
        expected.update(int(i) for i, t in zip(row.ids, row.trained, strict=True) if t)
    counts = token_counts(data, 512)
    assert {i: int(n) for i, n in enumerate(counts) if n} == dict(expected)
    assert batch_order(config, data, 2).ranks == 2


def test_a_streams_tokens_are_not_known_beforehand(loaded):
    _, data = loaded("task.streaming=true", "task.eval_fraction=0")
    assert data.rows_of(["a.jsonl:3"]) == ["a.jsonl:3"]
    with pytest.raises(ConfigError, match=r"which task\.streaming=true does not allow"):
        token_counts(data, 512)


def test_an_encoder_decoders_rows_are_not_packed():
    base = SimpleNamespace(decoder_start=0, path="t5-small")
    with pytest.raises(ConfigError, match=r"t5-small is an encoder-decoder.*set packing=false"):
        load_data({"packing": True, "max_length": 16}, base, None)
