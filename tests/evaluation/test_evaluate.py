"""Evaluation against a loop over the rows, one at a time, with the model's own logits."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.conftest import sums, write_rows
from tests.toys.commands import exit_code
from trainer import evaluate
from trainer.assembly import trained as trained_module
from trainer.assembly.rows import add_prompts, load_data
from trainer.evaluation.answers import answers, means
from trainer.evaluation.loss import evaluating, losses
from trainer.models.losses import CausalLoss, ClassLoss
from trainer.storage import journal

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    return tmp_path_factory.mktemp("kept")


@pytest.fixture
def trained(train, stored, tmp_path):
    """A run of a kind, made once, with its held-out rows."""

    def built(kind="sft", *overrides):
        note = stored / kind
        if not note.exists():
            if kind == "classification":
                labels = [
                    {
                        "text": "good " * (1 + i % 7) if i % 3 else "bad " * (1 + i % 5),
                        "label": "npu"[i % 3],
                    }
                    for i in range(40)
                ]
                rows = write_rows(stored / "labels.jsonl", labels)
            elif kind == "completion":
                rows = write_rows(
                    stored / "text.jsonl", [{"text": "abc " * (1 + i % 9)} for i in range(40)]
                )
            else:
                rows = write_rows(stored / "rows.jsonl", sums(40))
            extra = (
                f"task={kind}",
                f"task.path={rows}",
                f"task.eval_path={rows}",
                f"runs={stored}",
                f"name={kind}-run",
            )
            note.write_text(
                str(train(*extra, "max_steps=15", "callbacks.evaluation.every=null", *overrides))
            )
        return note.read_text()

    return built


def parts(path):
    actual = trained_module.load_trained(path)
    return actual, load_data(actual.config, actual.base, actual.task, train=False)


@torch.no_grad()
def naive(model, rows):
    """(loss per trained token, share of right guesses) in float64, a row at a time."""
    model = model.double()
    total = right = count = 0
    for row in rows:
        logits = model(input_ids=torch.tensor([row.ids])).logits[0].log_softmax(-1)
        for t in range(1, len(row.ids)):
            if row.trained[t]:
                total -= float(logits[t - 1, row.ids[t]])
                right += int(logits[t - 1].argmax()) == row.ids[t]
                count += 1
    return total / count, right / count


@pytest.mark.parametrize("kind", ["sft", "completion"])
@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_loss_perplexity_and_accuracy_are_those_of_a_loop_over_the_rows(trained, kind, batch_size):
    actual, data = parts(trained(kind))
    values = losses(CausalLoss(actual.model, 16), data.held_out, batch_size, CPU)
    rows = data.held_out.sequences.rows
    loss, accuracy = naive(actual.model, [rows[i] for i in range(len(rows))])
    assert values["loss"] == pytest.approx(loss, rel=1e-5)
    assert values["perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)
    assert values["accuracy"] == pytest.approx(accuracy, abs=1e-9)
    assert 0 < accuracy < 1


@pytest.mark.parametrize("batch_size", [1, 7])
def test_classes_are_judged_by_loss_accuracy_and_macro_f1(trained, batch_size):
    actual, data = parts(trained("classification"))
    values = losses(ClassLoss(actual.model), data.held_out, batch_size, CPU)
    rows = [data.held_out.sequences.rows[i] for i in range(len(data.held_out.sequences))]
    with torch.no_grad():
        logits = torch.cat([actual.model(input_ids=torch.tensor([row.ids])).logits for row in rows])
    expected = torch.tensor([row.label for row in rows])
    guessed = logits.argmax(-1)
    assert values["loss"] == pytest.approx(
        float(-logits.log_softmax(-1)[range(len(rows)), expected].mean()), rel=1e-5
    )
    assert values["accuracy"] == pytest.approx(float((guessed == expected).float().mean()))
    scores = []
    for label in range(3):
        hits = float(((guessed == label) & (expected == label)).sum())
        scores.append(
            2 * hits / max(1.0, float((guessed == label).sum() + (expected == label).sum()))
        )
    assert values["f1"] == pytest.approx(sum(scores) / 3, rel=1e-5)
    assert "perplexity" not in values
    assert values["f1"] != pytest.approx(values["accuracy"])


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_share_the_rows_and_their_sums(trained, ranks):
    actual, data = parts(trained())
    loss = CausalLoss(actual.model, 64)
    alone = losses(loss, data.held_out, 6, CPU)
    shares = []

    def keep(sums):
        shares.append(sums.clone())
        return sums

    for rank in range(ranks):
        losses(loss, data.held_out, 6, CPU, rank, ranks, keep)
    together = losses(loss, data.held_out, 6, CPU, 0, ranks, lambda _: sum(shares))
    assert together == {name: pytest.approx(value, rel=1e-6) for name, value in alone.items()}
    assert all(share[1] > 0 for share in shares)


def test_a_request_to_stop_ends_it_between_batches(trained):
    actual, data = parts(trained())
    requested = itertools.count()
    assert (
        losses(
            CausalLoss(actual.model, 64), data.held_out, 4, CPU, stop=lambda: next(requested) == 3
        )
        == {}
    )
    assert next(requested) == 4
    add_prompts(data, 4, actual.stops)
    requested = itertools.count()
    assert (
        answers(actual.model, data.held_out, 2, 1, CPU, stop=lambda: next(requested) == 1) is None
    )


def test_the_loops_order_is_from_long_to_short(trained):
    actual, data = parts(trained("completion"))
    seen = []

    def loss(batch):
        seen.append(batch["input_ids"].shape[1])
        return CausalLoss(actual.model, 64)(batch)

    losses(loss, data.held_out, 5, CPU)
    assert seen == sorted(seen, reverse=True)
    assert seen[0] > seen[-1]


# answers


@torch.no_grad()
def greedy(model, prompt, stops, count):
    """A continuation, token by token and without a cache."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(
            int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
        )
        if ids[-1] in stops:
            break
    return ids[len(prompt) :]


@pytest.mark.parametrize("batch_size", [1, 4, 32])
def test_answers_are_greedy_and_in_the_rows_order_whatever_the_batch(trained, batch_size):
    actual, data = parts(trained())
    add_prompts(data, 9, actual.stops)
    requested = answers(actual.model, data.held_out, batch_size, 6, CPU)
    tokenizer = actual.base.tokenizer
    examples = list(actual.task.examples("eval"))[:9]
    assert [row["where"] for row in requested] == [example.where for example in examples]
    for row, example in zip(requested, examples, strict=True):
        prompt = data.renderer.prompt(example)
        assert row["prompt"] == tokenizer.decode(prompt)
        assert row["prompt"].endswith("<|im_start|>assistant\n")
        assert row["expected"] == example.messages[-1]["content"]
        ids = greedy(actual.model, prompt, {tokenizer.eos_token_id}, 6)
        assert row["answer"] == tokenizer.decode(ids, skip_special_tokens=True)
        assert row["scores"] == {"exact_match": float(row["answer"].strip() == row["expected"])}
    assert len({len(prompt) for _, prompt in data.held_out.prompts}) > 1  # some were padded


class Oracle(torch.nn.Module):
    """A model that answers some prompts rightly: after the ids of a prompt come those of its
    answer."""

    def __init__(self, known, end):
        super().__init__()
        self.known, self.end = known, end
        self.config = SimpleNamespace(is_encoder_decoder=False)

    def generate(self, input_ids, attention_mask, generation_config, **_):
        out = []
        for ids, mask in zip(input_ids.tolist(), attention_mask.tolist(), strict=True):
            prompt = tuple(i for i, m in zip(ids, mask, strict=True) if m)
            out.append([*self.known.get(prompt, []), self.end])
        longest = max(map(len, out))
        return torch.cat(
            [input_ids, torch.tensor([row + [self.end] * (longest - len(row)) for row in out])], 1
        )


def test_exact_match_is_the_share_of_right_answers(trained):
    actual, data = parts(trained())
    add_prompts(data, 8, actual.stops)
    tokenizer = actual.base.tokenizer
    right = {
        tuple(prompt): tokenizer(example.messages[-1]["content"])["input_ids"]
        for i, (example, prompt) in enumerate(data.held_out.prompts)
        if i % 4 == 0
    }
    requested = answers(Oracle(right, tokenizer.eos_token_id), data.held_out, 3, 8, CPU)
    assert [row["scores"]["exact_match"] for row in requested] == [1.0, 0.0, 0.0, 0.0] * 2
    assert means(requested) == {"exact_match": 0.25}


def test_the_mean_of_no_answers_is_nothing():
    assert means([]) == {}
    assert means([{"scores": {"a": 1.0, "b": 0.5}}, {"scores": {"a": 0.0, "b": 0.5}}]) == {
        "a": 0.5,
        "b": 0.5,
    }


def test_only_rows_that_were_kept_are_asked(train, tmp_path):
    rows = sums(6)
    rows[1]["messages"][0]["content"] = "q" * 600  # longer than max_length
    path = write_rows(tmp_path / "rows.jsonl", rows)
    actual, data = parts(
        str(
            train(
                f"task.path={path}",
                f"task.eval_path={path}",
                "max_steps=1",
                "callbacks.evaluation=null",
            )
        )
    )
    add_prompts(data, 3, actual.stops)
    assert [example.where.rpartition(":")[2] for example, _ in data.held_out.prompts] == [
        "1",
        "3",
        "4",
    ]


def test_modes_are_as_they_were_also_after_an_error(tiny):
    model = tiny.load(torch.float32).train()
    model.model.layers[0].eval()
    before = [module.training for module in model.modules()]
    with pytest.raises(KeyError), evaluating(model):
        raise KeyError
    assert [module.training for module in model.modules()] == before
    with evaluating(model):
        assert not any(module.training for module in model.modules())


def test_rows_without_a_trained_token_give_no_numbers(trained):
    held_out = parts(trained())[1].held_out
    whole = held_out.collate
    held_out.collate = lambda items: whole(items) | {"labels": torch.full((len(items), 8), -100)}

    def loss(batch):
        assert (batch["labels"] == -100).all()
        return torch.zeros(()), {key: torch.zeros(()) for key in ("loss", "tokens", "right")}

    assert losses(loss, held_out, 8, CPU) == {}


# the verb


def test_the_verb_finds_what_the_run_found(trained, tmp_path, capsys):
    run = trained()
    file = tmp_path / "found.json"
    settings = ["compare=true", f"json={file}", "batch_size=3"]
    assert evaluate.main([f"run={run}", *settings]) == 0
    actual = json.loads(file.read_text())
    before, after = [
        row for row in journal.read(Path(run) / "metrics.jsonl") if row["kind"] == "evaluation"
    ]
    for name in ("loss", "accuracy", "perplexity"):
        assert actual["base"][name] == pytest.approx(before[name], rel=1e-5)
        assert actual["adapted"][name] == pytest.approx(after[name], rel=1e-5)
    assert actual["adapted"]["loss"] < actual["base"]["loss"]
    out = capsys.readouterr().out
    assert "base" in out
    assert f"{actual['base']['loss']:.4f}" in out
    assert f"{actual['adapted']['loss']:.4f}" in out


def test_the_verb_grades_answers_where_asked(trained, tmp_path):
    file = tmp_path / "found.json"
    assert (
        evaluate.main([f"run={trained()}", f"json={file}", "generate=3", "max_new_tokens=2"]) == 0
    )
    assert json.loads(file.read_text()).keys() == {"adapted"}
    assert "exact_match" in json.loads(file.read_text())["adapted"]


def test_the_verb_knows_classes(trained, tmp_path):
    file = tmp_path / "found.json"
    assert evaluate.main([f"run={trained('classification')}", f"json={file}"]) == 0
    assert json.loads(file.read_text())["adapted"].keys() == {"loss", "accuracy", "f1"}


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["run=nowhere"], 2, "is no run folder"),
        (["run=RUN@99"], 2, "has no checkpoint '99'; it has the steps"),
        (["run=RUN", "batch_size=0"], 2, "batch_size=0: expected a whole number, at least 1"),
        (
            ["run=RUN", "max_new_tokens=0"],
            2,
            "max_new_tokens=0: expected a whole number, at least 1",
        ),
        (["run=RUN", "generate=-1"], 2, "generate=-1: expected a whole number, at least 0"),
    ],
)
def test_what_cannot_be_evaluated_says_why(trained, capsys, arguments, code, message):
    run = trained()
    capsys.readouterr()
    words = [argument.replace("RUN", run) for argument in arguments]
    assert exit_code(evaluate.main, words) == code
    err = capsys.readouterr().err
    assert message in err
    assert "Traceback" not in err


def test_a_full_fine_tuning_has_no_base_to_compare_with(train, chats, capsys):
    run = train(f"task.path={chats}", "adapter=full", "max_steps=1", "callbacks.evaluation=null")
    assert evaluate.main([f"run={run}", "compare=true"]) == 2
    assert "there is no base to switch back to" in capsys.readouterr().err


def test_a_run_without_held_out_rows_says_so(train, chats, capsys):
    run = train(f"task.path={chats}", "task.eval_fraction=0", "max_steps=1")
    assert evaluate.main([f"run={run}"]) == 2
    assert "has no held-out rows" in capsys.readouterr().err
