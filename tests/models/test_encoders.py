"""Encoders and encoder-decoders: what is new in them, and what their batches and losses are."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch

from adapters.delta import Start
from adapters.io import trained_modules
from tasks.reading import DataError
from tasks.task import Conversation, Labelled
from tests.toys import adapters as toys
from tests.toys import encoders
from trainer.assembly.build import new_modules
from trainer.data.batches import Collate, Pick
from trainer.data.lengths import Report, fit
from trainer.data.render import Refused, Renderer
from trainer.evaluation.answers import continuations
from trainer.models.base import Base, BaseError
from trainer.models.losses import CausalLoss, ClassLoss

HEADS = {
    "bert": ("bert.pooler", "classifier"),
    "roberta": ("classifier",),
    "xlm_roberta": ("classifier",),
    "distilbert": ("classifier", "pre_classifier"),
    "electra": ("classifier",),
    "albert": ("albert.pooler", "classifier"),
    "deberta_v2": ("classifier", "pooler"),
    "modernbert": ("classifier",),
    "t5": ("classification_head",),
    "bart": ("classification_head",),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    @cache
    def loaded(family: str) -> Base:
        folder = encoders.made(family, tmp_path_factory.mktemp(family))
        return Base(str(folder), "auto", "auto", "none", True)

    return loaded


class Task:
    kind, train_on, chat_template = "conversation", "all", None

    def __init__(self, **changes):
        vars(self).update(changes)


def pair(prompt="12+30=", answer="42"):
    return Conversation(
        [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}], "here:1"
    )


def renderer(base, **changes):
    return Renderer(base.tokenizer, Task(**changes), base.decoder_start)


@pytest.mark.long
@pytest.mark.parametrize("family", HEADS)
def test_what_the_files_lack_is_trained_as_a_whole_and_saved_under_one_name(base, family):
    model = base(family).load(torch.float32, ["a", "b", "c"])
    assert new_modules(model, ["a", "b", "c"]) == HEADS[family]
    assert model.config.num_labels == 3
    adapted = toys.lora(target_modules="all-linear", exclude_modules=[]).attach(
        model, Start(new_modules=HEADS[family])
    )
    assert trained_modules(adapted) == sorted(HEADS[family])


def test_a_model_without_weights_counts_the_modules_outside_its_body(base):
    model = base("distilbert").skeleton(["a", "b"])
    assert new_modules(model, ["a", "b"]) == ("classifier", "pre_classifier")


def test_a_head_for_other_classes_is_made_again(base, tmp_path):
    trained = base("roberta").load(torch.float32, ["a", "b", "c"])
    trained.save_pretrained(tmp_path)
    base("roberta").tokenizer.save_pretrained(tmp_path)
    actual = Base(str(tmp_path), "auto", "auto", "none", True).load(torch.float32, ["x", "y"])
    assert actual.config.id2label == {0: "x", 1: "y"}
    assert actual.fresh_modules == ("classifier",)
    assert torch.equal(actual.classifier.dense.weight, trained.classifier.dense.weight)
    assert actual.classifier.out_proj.weight.shape[0] == 2


@pytest.mark.parametrize(
    ("family", "longest"), [("roberta", 64), ("xlm_roberta", 64), ("bert", 64), ("bart", 64)]
)
def test_the_longest_row_leaves_out_positions_that_no_token_gets(base, family, longest):
    actual = base(family)
    assert actual.longest == longest
    model = actual.load(torch.float32, ["a", "b"])
    ids = torch.full((1, longest + 1), 9)
    ids[:, -1] = actual.tokenizer.eos_token_id or 3
    model(input_ids=ids[:, 1:])
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=ids)


def test_a_tokenizer_without_an_end_classifies_and_does_not_write(base):
    actual = base("bert")
    assert actual.tokenizer.eos_token is None
    labels = Renderer(actual.tokenizer, Task(kind="label", labels=["a", "b"]))
    row = labels(Labelled("xy", "b", "here"))
    assert (row.ids, row.label) == (actual.tokenizer("xy")["input_ids"], 1)
    with pytest.raises(BaseError, match="no end-of-sequence token, so a model trained with it"):
        Renderer(actual.tokenizer, Task())


def test_a_cut_text_keeps_the_tokens_that_close_it(base):
    actual = base("bert")
    labels = Renderer(actual.tokenizer, Task(kind="label", labels=["a", "b"]))
    row = labels(Labelled("abcdefgh", "a", "here"))
    report = Report()
    cut = fit(row, labels, 6, "truncate", "here", report)
    assert cut.ids == [*row.ids[:5], row.ids[-1]]
    assert (report.truncated, report.tokens_cut) == (1, 4)


@pytest.mark.parametrize("family", encoders.PAIRS)
def test_a_pair_is_what_transformers_reads_and_what_it_is_taught_to_write(base, family):
    actual = base(family)
    row = renderer(actual)(pair())
    at = row.trained.index(True)
    read, written = row.ids[:at], row.ids[at:]
    assert all(row.trained[at:])
    assert read == actual.tokenizer("12+30=")["input_ids"]
    expected = actual.tokenizer(text_target="42")["input_ids"]
    if family == "t5gemma":  # its tokenizer opens a text with the decoder's first token
        expected = [*expected[1:], actual.tokenizer.eos_token_id]
    assert written == expected
    assert written[-1] == actual.tokenizer.eos_token_id


@pytest.mark.long
@pytest.mark.parametrize("family", encoders.PAIRS)
def test_the_loss_of_pairs_is_transformers_own(base, family):
    actual = base(family)
    render = renderer(actual)
    rows = [render(pair()), render(pair("a longer prompt, 7*8=", "fifty-six"))]
    batch = Collate(actual.tokenizer.pad_token_id, False, False, actual.decoder_start)(
        [(Pick(i, True, 1), [row]) for i, row in enumerate(rows)]
    )
    model = actual.load(torch.float32)
    labels = batch["labels"][:, 1:].contiguous()
    own = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels)
    summed, sums = CausalLoss(model, 16)(batch)
    assert (
        int(sums["tokens"]) == sum(sum(row.trained) for row in rows) == int((labels != -100).sum())
    )
    torch.testing.assert_close(summed / sums["tokens"], own.loss, rtol=1e-5, atol=1e-5)
    alone = 0.0
    model.requires_grad_(False)
    for row in rows:  # padding changes nothing
        at = row.trained.index(True)
        logits = model(
            input_ids=torch.tensor([row.ids[:at]]), labels=torch.tensor([row.ids[at:]])
        ).logits[0]
        alone += float(
            torch.nn.functional.cross_entropy(logits, torch.tensor(row.ids[at:]), reduction="sum")
        )
    assert float(summed.detach()) == pytest.approx(alone, rel=1e-4)


def test_a_filler_trains_nothing_and_counts_no_token(base):
    actual = base("t5")
    row = renderer(actual)(pair())
    batch = Collate(0, False, False, actual.decoder_start)(
        [(Pick(0, True, 3), [row]), (Pick(0, False, 3), [row])]
    )
    assert (batch["labels"][1] == -100).all()
    assert batch["decoder_lengths"].tolist() == [4, 0]
    assert batch["lengths"].tolist() == [7, 0]
    assert batch["tokens"] == len(row.ids)


def test_what_an_encoder_decoder_cannot_learn_is_refused_by_name(base):
    actual = base("flan_t5")
    with pytest.raises(DataError, match="task=completion trains a text from its first token"):
        renderer(actual, kind="text")
    with pytest.raises(DataError, match=r"task\.train_on=everything trains the prompts too"):
        renderer(actual, train_on="everything")
    twice = Conversation([*pair().messages, *pair("1+1=", "2").messages], "here:1")
    with pytest.raises(Refused, match="it has 2 answers, and an encoder-decoder writes one"):
        renderer(actual)(twice)


CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def test_with_a_chat_template_the_decoder_writes_the_last_answer(base, tmp_path):
    actual, file = base("flan_t5"), tmp_path / "chat.jinja"
    file.write_text(CHAT)
    twice = Conversation([*pair().messages, *pair("1+1=", "2").messages], "here:1")
    render = renderer(actual, chat_template=str(file), train_on="last")
    row = render(twice)
    at, decode = row.trained.index(True), actual.tokenizer.decode
    assert decode(row.ids[:at]) == "<user>12+30=</s><assistant>42</s><user>1+1=</s><assistant>"
    assert decode(row.ids[at:]) == "2</s>"
    assert row.ids[:at] == render.prompt(twice)


def test_a_long_pair_loses_the_end_of_its_prompt(base):
    actual = base("t5")
    render, report = renderer(actual), Report()
    row = render(pair("abcdefgh", "42"))
    cut = fit(row, render, 8, "truncate", "here", report)
    text = actual.tokenizer.decode(cut.ids)
    assert (text, cut.trained) == ("abcd</s>42</s>", [False] * 5 + [True] * 3)
    assert fit(row, render, 4, "truncate", "here", report) is None
    assert (report.truncated, report.answers_lost) == (1, 1)


def test_a_base_that_names_no_start_for_its_decoder_is_refused(base):
    actual = Base(base("t5").path, "auto", "auto", "none", True)
    actual.config.decoder_start_token_id = None
    with pytest.raises(BaseError, match="has no decoder_start_token_id"):
        actual.decoder_start
    assert Path(actual.path).is_dir()


@pytest.mark.parametrize(
    ("problem", "labels", "targets"),
    [
        ("regression", ["value"], [0.5, -2.0, 3.25]),
        ("multi_label_classification", ["a", "b", "c"], [["a", "c"], [], ["b"]]),
        ("single_label_classification", ["a", "b", "c"], ["a", "c", "b"]),
    ],
)
def test_the_loss_of_a_classifier_is_transformers_own(base, problem, labels, targets):
    actual = base("roberta")
    render = Renderer(actual.tokenizer, Task(kind="label", labels=labels))
    rows = [render(Labelled("ab" * (i + 1), label, "here")) for i, label in enumerate(targets)]
    picks = [(Pick(i, True, 3), [row]) for i, row in enumerate([*rows, rows[0]])]
    picks[-1] = (Pick(0, False, 3), [rows[0]])
    batch = Collate(actual.tokenizer.pad_token_id, False, True)(picks)
    model = actual.load(torch.float32, labels)
    model.config.problem_type = problem
    summed, sums = ClassLoss(model)(batch)
    own = model(
        input_ids=batch["input_ids"][:3],
        attention_mask=batch["attention_mask"][:3],
        labels=batch["classes"][:3].squeeze(-1) if len(labels) == 1 else batch["classes"][:3],
    )
    assert int(sums["tokens"]) == 3  # the filler does not count
    torch.testing.assert_close(summed / 3, own.loss)
    expected = {"regression": [[0.5], [-2.0], [3.25]], "single_label_classification": [0, 2, 1]}
    hot = [[1.0, 0.0, 1.0], [0.0, 0.0, 0.0], [0.0, 1.0, 0.0]]
    assert batch["classes"][:3].tolist() == expected.get(problem, hot)


def test_a_base_of_beams_and_forced_tokens_writes_one_greedy_answer(tmp_path, caplog):
    """BART's generation_config.json has four beams, a forced first token and no repeated 3-grams:
    the tokens stay, and beams are named as unused."""
    from transformers import AutoModelForSeq2SeqLM, GenerationConfig

    folder = encoders.made("bart", tmp_path)
    chosen = {"forced_bos_token_id": 7, "forced_eos_token_id": 2, "no_repeat_ngram_size": 3}
    beams = {"num_beams": 4, "early_stopping": True, "length_penalty": 2.0}
    own = {"decoder_start_token_id": 2, "eos_token_id": 2, "pad_token_id": 1, "bos_token_id": 0}
    GenerationConfig(**chosen, **beams, **own).save_pretrained(folder)
    model = Base(str(folder), "auto", "auto", "none", True).load(torch.float32)
    assert "num_beams" in caplog.text
    prompts = [[0, 40, 41, 42, 2], [0, 50, 2]]
    answers = continuations(model, prompts, 1, [2], 8, torch.device("cpu"))
    stock = AutoModelForSeq2SeqLM.from_pretrained(folder).eval()
    for prompt, answer in zip(prompts, answers, strict=True):
        expected = stock.generate(
            input_ids=torch.tensor([prompt]), num_beams=1, do_sample=False, max_new_tokens=8
        )[0, 1:].tolist()
        assert answer[0] == 7
        assert answer[: len(expected)] == expected
