"""lm-eval on the model of a run, against a plain computation of the same tasks."""

from __future__ import annotations

import importlib.util
import json
import math
import statistics
from types import SimpleNamespace

import pytest
import torch

from tests.conftest import sums, write_rows
from tests.toys import harness as toys
from tests.toys.commands import exit_code
from trainer import evaluate
from trainer.assembly.trained import load_trained
from trainer.config.errors import ConfigError
from trainer.data.render import Renderer
from trainer.data.stops import Stops
from trainer.evaluation import harness
from trainer.models.tiny import tiny
from trainer.storage import journal

if importlib.util.find_spec("lm_eval") is None:
    pytest.skip(f"lm-eval is not installed: {harness.INSTALL}", allow_module_level=True)

INCLUDE, ROWS = "include", len(toys.CHOICES)


@pytest.fixture(scope="module")
def base():
    loaded = tiny(0, 2, 16, 512, "float32", "sdpa", "none", False, [])
    task = SimpleNamespace(kind="conversation", train_on="answers", chat_template=None)
    return loaded.load(torch.float32, None, "cpu").eval(), Renderer(loaded.tokenizer, task)


@torch.no_grad()
def logprob(model, tokenizer, context, continuation):
    """log p(continuation | context), a token at a time."""
    ids = tokenizer(context, add_special_tokens=False).input_ids
    total = 0.0
    for token in tokenizer(continuation, add_special_tokens=False).input_ids:
        logits = model(input_ids=torch.tensor([ids])).logits[0, -1].double()
        total += float(logits.log_softmax(-1)[token])
        ids.append(token)
    return total


@torch.no_grad()
def continued(model, tokenizer, prompt, tokens, until, stops=()):
    """The greedy continuation of a prompt up to a text or a token that ends it."""
    ids, new = tokenizer(prompt, add_special_tokens=False).input_ids, []
    for _ in range(tokens):
        new.append(int(model(input_ids=torch.tensor([ids + new])).logits[0, -1].argmax()))
        text = tokenizer.decode(new, skip_special_tokens=True)
        if new[-1] in stops:
            break
        if until in text:
            return text.partition(until)[0]
    return tokenizer.decode(new, skip_special_tokens=True)


def naive_choices(model, tokenizer, ask=lambda question: f"Q: {question}\nA:", gap=" "):
    """Whether the likeliest choice is right: by its probability, and by that per character."""
    right, right_by_length = [], []
    for question, choices, answer in toys.CHOICES:
        scores = [logprob(model, tokenizer, ask(question), gap + choice) for choice in choices]
        by_length = [score / len(choice) for score, choice in zip(scores, choices, strict=True)]
        right.append(float(max(range(3), key=scores.__getitem__) == answer))
        right_by_length.append(float(max(range(3), key=by_length.__getitem__) == answer))
    return right, right_by_length


def error_of(values):
    """The standard error of a mean: sd / √n."""
    return statistics.stdev(values) / math.sqrt(len(values))


@pytest.mark.parametrize("batch_size", [1, 4])
def test_choices_are_graded_as_a_loop_over_their_tokens_grades_them(base, tmp_path, batch_size):
    model, renderer = base
    include = toys.folder(tmp_path)
    settings = harness.Settings(("toy_choice",), str(include), batch_size=batch_size)
    before = torch.get_rng_state()
    scores = harness.evaluate(model, renderer, Stops(), settings, harness.find(settings))
    assert torch.equal(torch.get_rng_state(), before)  # that of a training run
    right, by_length = naive_choices(model, renderer.tokenizer)
    assert scores.numbers == {
        "toy_choice/acc": pytest.approx(statistics.mean(right)),
        "toy_choice/acc/stderr": pytest.approx(error_of(right)),
        "toy_choice/acc_norm": pytest.approx(statistics.mean(by_length)),
        "toy_choice/acc_norm/stderr": pytest.approx(error_of(by_length)),
    }
    assert 0 < statistics.mean(right) < 1
    assert scores.rows == {"toy_choice": ROWS}


def test_generated_answers_are_those_of_a_greedy_loop_up_to_where_the_run_ends_them(base, tmp_path):
    model, renderer = base
    tokenizer = renderer.tokenizer
    free = [continued(model, tokenizer, prompt, 6, "q") for prompt in toys.ANSWERS]
    token = tokenizer(free[0], add_special_tokens=False).input_ids[2]  # ends answers from now on
    stopped = [continued(model, tokenizer, prompt, 6, "q", [token]) for prompt in toys.ANSWERS]
    assert free != stopped
    expected = [free[0], "-", free[2], free[3], "-"]
    include = toys.folder(tmp_path, expected)
    settings = harness.Settings(("toy_generate",), str(include), batch_size=2)
    tasks = harness.find(settings)
    grades = [float(text == reference) for text, reference in zip(free, expected, strict=True)]
    scores = harness.evaluate(model, renderer, Stops(), settings, tasks)
    assert scores.numbers == {
        "toy_generate/exact_match": pytest.approx(statistics.mean(grades)),
        "toy_generate/exact_match/stderr": pytest.approx(error_of(grades)),
    }
    with_ends = harness.evaluate(model, renderer, Stops([token]), settings, tasks)
    answers = [row["filtered_resps"][0] for row in with_ends.samples["toy_generate"]]
    assert answers == stopped


def test_a_limit_and_solved_examples(base, tmp_path):
    model, renderer = base
    include = toys.folder(tmp_path, ["one", "two", "three", "four", "five"])
    settings = harness.Settings(("toy_generate",), str(include), limit=2, num_fewshot=1)
    scores = harness.evaluate(model, renderer, Stops(), settings, harness.find(settings))
    assert scores.rows == {"toy_generate": 2}
    prompts = [row["arguments"][0][0] for row in scores.samples["toy_generate"]]
    assert all(
        any(f" {answer}\n\n" in prompt for answer in ("one", "two", "three", "four", "five"))
        for prompt in prompts
    )


def test_chats_are_written_by_the_template_of_the_run(base, tmp_path):
    model, renderer = base
    include = toys.folder(tmp_path)
    settings = harness.Settings(("toy_choice",), str(include), chat=True)
    scores = harness.evaluate(model, renderer, Stops(), settings, harness.find(settings))

    def ask(question):
        return f"<|im_start|>user\nQ: {question}\nA:<|im_end|>\n<|im_start|>assistant\n"

    assert scores.samples["toy_choice"][0]["arguments"][0][0] == ask(toys.CHOICES[0][0])
    right, _ = naive_choices(model, renderer.tokenizer, ask, gap="")
    assert scores.numbers["toy_choice/acc"] == pytest.approx(statistics.mean(right))


def test_what_cannot_be_asked_is_one_message(base, tmp_path):
    model, renderer = base
    include = toys.folder(tmp_path)
    good = harness.Settings(("toy_choice",), str(include))
    with pytest.raises(harness.Interrupted):
        harness.evaluate(model, renderer, Stops(), good, harness.find(good), lambda: True)
    untemplated = SimpleNamespace(tokenizer=renderer.tokenizer, templates={})
    chat = harness.Settings(("toy_choice",), str(include), chat=True)
    with pytest.raises(ConfigError, match="chat=true: this run was trained without"):
        harness.evaluate(model, untemplated, Stops(), chat, harness.find(good))
    (tmp_path / "choice.jsonl").unlink()
    with pytest.raises(ConfigError, match="lm-eval cannot evaluate toy_choice: "):
        harness.evaluate(model, renderer, Stops(), good, harness.find(good))


@pytest.fixture(scope="module")
def run(train_in, tmp_path_factory):
    """A run that was measured during training, and its tasks."""
    place = tmp_path_factory.mktemp("harness")
    include = toys.folder(place)
    rows = write_rows(place / "rows.jsonl", sums(40))
    folder = train_in(
        place,
        f"task.path={rows}",
        f"task.eval_path={rows}",
        "max_steps=6",
        "optimizer.lr=0.02",
        "callbacks.evaluation.every=2",
        "callbacks.evaluation.harness=[toy_choice]",
        "callbacks.evaluation.harness_every=2",
        "callbacks.evaluation.harness_limit=5",
        f"callbacks.evaluation.harness_include={include}",
        "callbacks.evaluation.monitor=toy_choice/acc_norm",
        "callbacks.evaluation.mode=max",
    )
    return folder, include


def test_a_run_measures_its_base_and_its_steps(run):
    folder, include = run
    rows = [row for row in journal.read(folder / "metrics.jsonl") if row["kind"] == "harness"]
    assert [(row["step"], row["model"]) for row in rows] == [
        (0, "base"), (2, "adapted"), (6, "adapted"),
    ]  # fmt: skip
    settings = harness.Settings(("toy_choice",), str(include), 5)
    trained = load_trained(str(folder))
    after = harness.evaluate(
        trained.model, trained.renderer, trained.stops, settings, harness.find(settings)
    )
    assert {name: rows[-1][name] for name in after.numbers} == pytest.approx(after.numbers)
    with trained.adapter.disabled(trained.model):
        before = harness.evaluate(
            trained.model, trained.renderer, trained.stops, settings, harness.find(settings)
        )
    assert {name: rows[0][name] for name in before.numbers} == pytest.approx(before.numbers)
    page = (folder / "report.html").read_text()
    assert "Benchmarks" in page
    assert f"{rows[-1]['toy_choice/acc']:.4f} ± " in page
    assert "5 rows" in page


def test_the_command_shows_both_models_and_records_them(run, tmp_path, capsys):
    folder, include = run
    file, lines = tmp_path / "scores.json", tmp_path / "rows.jsonl"
    words = [
        "harness=toy_*", f"run={folder}", f"include={include}", f"json={file}", f"rows={lines}",
    ]  # fmt: skip
    assert evaluate.main(words) == 0
    shown = capsys.readouterr().out
    assert "difference" in shown
    assert "toy_generate/exact_match" in shown
    scores = json.loads(file.read_text())
    trained = load_trained(str(folder))
    right, _ = naive_choices(trained.model, trained.base.tokenizer)
    with trained.adapter.disabled(trained.model):
        right_before, _ = naive_choices(trained.model, trained.base.tokenizer)
    assert scores["adapted"]["toy_choice/acc"] == pytest.approx(statistics.mean(right))
    assert scores["base"]["toy_choice/acc"] == pytest.approx(statistics.mean(right_before))
    assert scores["adapted"]["rows"] == {"toy_choice": ROWS, "toy_generate": len(toys.ANSWERS)}
    written = [json.loads(line) for line in lines.read_text().splitlines()]
    assert len(written) == 2 * (ROWS + len(toys.ANSWERS))
    choices = [row for row in written if (row["model"], row["task"]) == ("adapted", "toy_choice")]
    assert [row["scores"]["acc"] for row in choices] == right
    recorded = [row for row in journal.read(folder / "metrics.jsonl") if row["kind"] == "harness"]
    assert [row["model"] for row in recorded[-2:]] == ["base", "adapted"]
    assert recorded[-1]["toy_choice/acc"] == scores["adapted"]["toy_choice/acc"]
    assert "toy_generate/exact_match" in (folder / "report.html").read_text()
    card = (folder / "adapter" / "README.md").read_text()
    assert card.count("## Benchmarks") == 1
    assert "| toy_generate/exact_match | " in card
    assert "name: toy_choice (lm-eval)" in card


def test_faults_of_the_command_come_before_the_model_is_loaded(run, tmp_path, capsys, monkeypatch):
    folder, include = run
    monkeypatch.setattr("trainer.evaluation.harness_run.load_trained", pytest.fail)
    here = [f"run={folder}", f"include={include}"]
    for words, message in [
        (["harness=", *here], "harness=: expected names of tasks"),
        (["harness=a", f"run={folder}", "include=/nowhere"], "include=/nowhere: there is no such"),
        (["harness=a", *here, "limit=2.5"], "limit=2.5: expected whole rows"),
        (["harness=a", *here, "chat=maybe"], "chat=maybe: expected true or false"),
        (["harness=a", *here, "shots=2"], "shots=2: there is no such option"),
    ]:
        assert exit_code(evaluate.main, words) == 2
        assert message in capsys.readouterr().err
