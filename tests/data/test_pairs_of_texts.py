"""Pairs of texts for classification, against the tokenizer's own encoding of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from scripts.zoo.families_encoder import tokenizer
from tasks.classification import Classification
from tasks.multi_label import MultiLabel
from tasks.reading import DataError
from tasks.regression import Regression
from tests.conftest import write_rows
from tests.toys import tasks as toys
from trainer.data.batches import Collate, Pick
from trainer.data.encoding import pair_ids
from trainer.data.lengths import Report, fit
from trainer.data.render import Renderer
from trainer.data.rows import Rows, tokenise
from trainer.data.tokens import Tokens
from trainer.models.losses import ClassLoss

STYLES = ["bert", "roberta", "t5", "gemma"]
MNLI = [
    {"premise": "A man plays a flute.", "hypothesis": "Music!", "label": "entailment"},
    {"premise": "No.", "hypothesis": "Two dogs run through snow.", "label": "contradiction"},
    {"premise": "Ærøskøbing", "hypothesis": "a town", "label": "neutral"},
]
COLUMNS = {"text": "premise", "text_pair": "hypothesis"}


def task(folder: Any, rows: Any = MNLI, **changes: Any) -> Classification:
    path = str(write_rows(folder / "rows.jsonl", rows))
    return Classification(path, **toys.SPLITS | {"columns": COLUMNS, "labels": None} | changes)


@pytest.mark.parametrize("style", STYLES)
def test_a_pair_is_encoded_as_the_tokenizer_does(style, tmp_path):
    words, source = tokenizer(style), task(tmp_path)
    renderer = Renderer(words, source)
    for example, row in zip(source.examples("train"), MNLI, strict=True):
        own = words(row["premise"], row["hypothesis"])
        tokens = renderer(example)
        assert tokens.ids == own["input_ids"]
        assert tokens.types == own.get("token_type_ids", [])
        assert tokens.label == source.labels.index(row["label"])
    assert (1 in tokens.types) == (style == "bert")


@pytest.mark.parametrize("style", STYLES)
def test_the_longer_text_is_cut(style, tmp_path):
    words = tokenizer(style)
    renderer = Renderer(words, task(tmp_path))
    for first, second in (("abcdefgh", "xyz"), ("ab", "tuvwxyz"), ("abcdef", "uvwxyz")):
        (example,) = task(
            tmp_path,
            [MNLI[0] | {"premise": first, "hypothesis": second}] * 1,
            labels=["entailment", "b"],
        ).examples("train")
        row, own = renderer(example), words.num_special_tokens_to_add(pair=True)
        for length in range(own + 2, len(row.ids)):
            cut = fit(row, renderer, length, "truncate", "here", Report())
            text = words.decode(cut.ids, skip_special_tokens=True)
            kept = [sum(letter in text for letter in side) for side in (first, second)]
            assert len(cut.ids) == len(cut.trained) == length
            assert len(cut.types) == (length if style == "bert" else 0)
            assert sum(kept) == length - own  # the special tokens stay
            assert text == first[: kept[0]] + second[: kept[1]]
            longer, shorter = (0, 1) if kept[0] > kept[1] else (1, 0)
            assert kept[longer] - kept[shorter] <= 1 or kept[shorter] == len(
                (first, second)[shorter]
            )


def test_a_length_without_room_for_both_is_refused(tmp_path):
    renderer = Renderer(tokenizer("bert"), task(tmp_path))
    row = renderer(next(iter(task(tmp_path).examples("train"))))
    with pytest.raises(DataError, match="max_length=4 has no room for two texts and the 3 special"):
        fit(row, renderer, 4, "truncate", "here", Report())


def test_a_column_called_text_pair_needs_no_mapping(tmp_path):
    rows = [
        {"text": "a", "text_pair": "b", "label": 0},
        {"text": "c", "text_pair": "d", "label": 1},
    ]
    assert [row.second for row in task(tmp_path, rows, columns={}).examples("train")] == ["b", "d"]
    alone = task(tmp_path, [{"text": "a", "label": 0}, {"text": "c", "label": 1}], columns={})
    assert not alone.pairs


@pytest.mark.parametrize(("value", "reason"), [(None, "text_pair must be text"), ("", "is empty")])
def test_a_pair_without_its_second_text_is_refused(tmp_path, value, reason):
    rows = [MNLI[0], MNLI[1] | {"hypothesis": value}]
    assert reason in list(task(tmp_path, rows).examples("train"))[1].reason


def test_numbers_and_several_classes_take_pairs_too(tmp_path):
    similar = str(write_rows(tmp_path / "sts.jsonl", [MNLI[0] | {"label": 3.5}]))
    (row,) = Regression(similar, **toys.SPLITS, columns=COLUMNS).examples("train")
    assert (row.second, row.label) == ("Music!", 3.5)
    tags = str(write_rows(tmp_path / "tags.jsonl", [MNLI[0] | {"labels": ["a", "b"]}]))
    (row,) = MultiLabel(tags, **toys.SPLITS, columns=COLUMNS, labels=None).examples("train")
    assert (row.second, row.label) == ("Music!", ["a", "b"])


def test_rows_keep_their_types_and_the_digest_depends_on_them(tmp_path, monkeypatch):
    monkeypatch.setenv("GRAFT_CACHE", str(tmp_path / "cache"))
    source = task(tmp_path)
    renderer = Renderer(tokenizer("bert"), source)
    for _ in range(2):  # made, then read from the cache
        rows = tokenise(source, "train", renderer, 64, "raise", 1)
        assert [rows[i].types for i in range(3)] == [
            renderer(example).types for example in source.examples("train")
        ]
    table = rows.table.with_format(None)
    other = table.map(lambda row: {"types": [0] * len(row["types"])}, keep_in_memory=True)
    assert Rows(other.cast(table.features), rows.report).digest != rows.digest


@pytest.mark.long
@pytest.mark.parametrize(
    ("family", "style", "reads"),
    [
        ("bert", "bert", True),
        ("electra", "bert", True),
        ("deberta_v2", "bert", False),  # by its config it knows no types
        ("distilbert", "bert", False),  # it takes none
        ("roberta", "roberta", False),  # it knows one type
        ("bart", "roberta", False),
    ],
)
def test_a_batch_gives_the_logits_of_the_tokenizers_own(family, style, reads, tmp_path):
    words, source = tokenizer(style), task(tmp_path)
    renderer = Renderer(words, source)
    collate = Collate(words.pad_token_id, packed=False, labelled=True)
    batch = collate(
        [(Pick(i, True, 1), [renderer(e)]) for i, e in enumerate(source.examples("train"))]
    )
    model = classifier(family)
    loss = ClassLoss(model)
    assert loss.reads_types is reads
    own = words(
        [row["premise"] for row in MNLI],
        [row["hypothesis"] for row in MNLI],
        padding=True,
        return_tensors="pt",
    )
    if not reads:
        own.pop("token_type_ids", None)
    with torch.no_grad():
        scores = loss(batch)[1]["scores"]
        torch.testing.assert_close(scores, model(**own).logits, rtol=1e-4, atol=1e-5)
        if reads:  # and they matter
            own.pop("token_type_ids")
            assert (model(**own).logits - scores).abs().max() > 1e-3


def classifier(family: str) -> Any:
    """A random classifier of three classes."""
    import transformers

    from scripts.zoo.families import every
    from scripts.zoo.making import spread

    name = "bart_classify" if family == "bart" else family
    config = every()[name].config()
    config.num_labels = 3
    config.pad_token_id = tokenizer(
        "roberta" if family in ("bart", "roberta") else "bert"
    ).pad_token_id
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.AutoModelForSequenceClassification.from_config(config)
        spread(model)
    return model.eval()


def test_a_pair_that_brings_the_first_token_has_it_once():
    words = tokenizer("roberta")
    assert pair_ids(words, ("<s>ab", "c")) == (words("ab", "c")["input_ids"], [])
    assert pair_ids(words, ("ab", "<s>c"))[0].count(0) == 2  # there it is a part of the text


def test_a_text_alone_is_as_before(tmp_path):
    words = tokenizer("bert")
    source = task(tmp_path, [{"text": "ab", "label": "a"}], columns={}, labels=["a", "b"])
    (example,) = source.examples("train")
    ids = words("ab")["input_ids"]
    assert Renderer(words, source)(example) == Tokens(ids, [False] * len(ids), 0)
