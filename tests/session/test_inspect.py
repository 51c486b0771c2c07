"""What is said before training is what happens in it, and it is said without the weights."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import pytest
from omegaconf import OmegaConf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from adapters.delta import AdapterError
from tests.conftest import write_rows
from tests.toys.commands import exit_code
from trainer import preflight
from trainer.assembly.build import instantiate
from trainer.assembly.early_checks import refuse_early
from trainer.assembly.rows import load_data, resolve_length
from trainer.data.render import Renderer
from trainer.models.base import Base, BaseError
from trainer.session import inspect, preview
from trainer.storage import journal

pytestmark = pytest.mark.long

AROUND = 21  # tokens of tiny's chat template around a question and its answer


def chat(question, answer):
    return {
        "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
    }


LENGTHS = [(3, 2), (10, 1), (4, 30), (60, 5), (2, 2), (50, 50), (1, 7), (3, 3), (8, 8), (90, 1)]
CHATS = [
    chat("q" * question, "abcdefghij"[i] * answer) for i, (question, answer) in enumerate(LENGTHS)
]


@pytest.fixture
def weightless(monkeypatch):
    """A base whose weights cannot be loaded."""

    def refuse(*_, **__):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(Base, "load", refuse)


@pytest.fixture
def check(weightless, tmp_path):
    """Runs the verb on the smoke experiment; returns (exit code, what --json wrote)."""

    def checked(*arguments):
        file = tmp_path / "found.json"
        file.unlink(missing_ok=True)
        common = [
            "+experiment=smoke",
            f"runs={tmp_path / 'runs'}",
            "precision=fp32",
            "lightning=cpu",
            "--json",
            str(file),
        ]
        code = exit_code(preflight.main, [*common, *arguments])
        return code, json.loads(file.read_text()) if file.exists() else None

    return checked


@pytest.fixture
def rows(tmp_path):
    return write_rows(tmp_path / "rows.jsonl", CHATS)


@pytest.mark.parametrize("overlong", ["drop", "truncate"])
@pytest.mark.parametrize("limit", [30, 60, 512])
def test_rows_are_counted_as_they_are(check, rows, overlong, limit):
    settings = (
        f"task.path={rows}",
        "task.eval_path=" + str(rows),
        f"max_length={limit}",
        f"overlong={overlong}",
    )
    code, actual = check(*settings)
    assert code == 0
    # all, prompt, trained
    whole = [
        (AROUND + question + answer, question + 19, answer + 1) for question, answer in LENGTHS
    ]
    longer = [row for row in whole if row[0] > limit]
    lost = [row for row in longer if row[1] >= limit] if overlong == "truncate" else longer
    stored = [row for row in whole if row not in lost]
    train = actual["data"]["train"]
    assert (train["rows"], train["kept"]) == (10, len(stored))
    assert (train["dropped"], train["answers_lost"]) == (
        (len(lost), 0) if overlong == "drop" else (0, len(lost))
    )
    assert train["truncated"] == len(longer) - len(lost)
    assert train["tokens"] == sum(min(limit, all_) for all_, _, _ in stored)
    assert train["trained_tokens"] == sum(
        min(limit, prompt + trained) - prompt for _, prompt, trained in stored
    )
    assert train["trained_share"] == pytest.approx(train["trained_tokens"] / train["tokens"])
    assert train["longest"] == max(min(limit, all_) for all_, _, _ in stored)
    ends = sum(prompt + trained <= limit for _, prompt, trained in stored)
    assert train["ends_trained"] == ends
    text = "\n".join(actual["warnings"])
    assert (
        f"train: {1 - ends / len(stored):.0%} of the answers end without a trained end token"
        in text
    ) == (ends < len(stored))
    assert (f"train: {len(lost)} of 10 rows are left out" in text) == (len(lost) > 1)
    assert actual["data"]["eval"] == train


def test_broken_rows_are_named_with_their_reason(check, tmp_path):
    broken = [{"messages": []}, {"messages": [{"role": "user", "content": "a"}]}, {"nothing": 1}]
    path = write_rows(tmp_path / "rows.jsonl", [*CHATS[:3], broken[0], *CHATS[3:], *broken[1:]])
    code, actual = check(f"task.path={path}", "task.on_bad=skip", f"task.eval_path={path}")
    train = actual["data"]["train"]
    assert code == 0
    assert (train["rows"], train["kept"], train["skipped"]) == (13, 10, 3)
    assert [line.partition(": ")[0] for line in train["bad"]] == [
        f"{path}:{line}" for line in (4, 12, 13)
    ]
    assert all(line.partition(": ")[2] for line in train["bad"])


def test_duplicates_are_counted_within_and_between(check, tmp_path):
    train = write_rows(tmp_path / "train.jsonl", [*CHATS, CHATS[0], CHATS[0], CHATS[3]])
    held_out = write_rows(
        tmp_path / "eval.jsonl", [CHATS[0], CHATS[5], CHATS[5], chat("new", "x"), chat("new", "y")]
    )
    code, actual = check(f"task.path={train}", f"task.eval_path={held_out}")
    assert code == 0
    assert (actual["data"]["train"]["duplicates"], actual["data"]["eval"]["duplicates"]) == (3, 1)
    assert actual["data"]["shared"] == 2
    assert (
        "2 rows of evaluation are in the training data too: its numbers will be too good"
        in actual["warnings"]
    )


def test_labels_tell_rows_of_the_same_text_apart(check, tmp_path):
    path = write_rows(
        tmp_path / "rows.jsonl", [{"text": "a", "label": str(i % 2)} for i in range(4)]
    )
    _, actual = check("task=classification", f"task.path={path}", f"task.eval_path={path}")
    assert actual["data"]["train"]["duplicates"] == 2
    assert actual["data"]["shared"] == 2


@pytest.mark.parametrize(
    ("epochs", "batch_size", "accumulate", "steps", "expected"),
    [
        (1, 4, 1, None, 3),
        (1, 2, 2, None, 3),
        (2, 5, 1, None, 4),
        (1.5, 2, 1, None, 8),
        (None, 3, 1, 9, 9),
        (1, 4, 1, 2, 2),
    ],
)
def test_steps_and_epochs(check, rows, epochs, batch_size, accumulate, steps, expected):
    end = [f"max_epochs={'null' if epochs is None else epochs}", f"max_steps={steps or 'null'}"]
    sizes = [f"batch_size={batch_size}", f"accumulate={accumulate}"]
    _, actual = check(f"task.path={rows}", f"task.eval_path={rows}", *end, *sizes)
    run, train = actual["run"], actual["data"]["train"]
    assert run["steps"] == expected
    assert run["steps_per_epoch"] == math.ceil(10 / (batch_size * accumulate))
    used = expected * batch_size * accumulate
    assert run["epochs"] == pytest.approx(min(used / 10, epochs or 99))
    assert (run["tokens_per_epoch"], run["trained_tokens_per_epoch"]) == (
        train["tokens"],
        train["trained_tokens"],
    )


def test_a_share_of_the_rows_makes_epochs_shorter(check, rows):
    _, actual = check(
        f"task.path={rows}", f"task.eval_path={rows}", "repeat_random=0.3", "batch_size=1",
        "max_epochs=4", "max_steps=null",
    )  # fmt: skip
    run = actual["run"]
    assert (run["steps"], run["steps_per_epoch"], run["epochs"]) == (12, 3, 4)
    assert (run["sequences"], run["drawn_from"]) == (3, 10)
    assert 0 < run["tokens_per_epoch"] < actual["data"]["train"]["tokens"]


def test_padding_is_what_shorter_rows_leave_of_a_batch(check, tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [chat("q" * 9, "a"), chat("q" * 29, "a")])
    settings = (f"task.path={path}", f"task.eval_path={path}", "max_epochs=1")
    _, actual = check(*settings, "batch_size=2")
    assert actual["run"]["padding_share"] == pytest.approx(1 - (31 + 51) / (2 * 51))
    _, actual = check(*settings, "batch_size=1")
    assert actual["run"]["padding_share"] == 0


def test_packing_fills_sequences(check, rows):
    _, actual = check(
        f"task.path={rows}", f"task.eval_path={rows}", "packing=true", "max_length=128"
    )
    run, tokens = actual["run"], sum(AROUND + question + answer for question, answer in LENGTHS)
    assert math.ceil(tokens / 128) <= run["sequences"] < 10
    assert run["packing_efficiency"] == pytest.approx(tokens / (run["sequences"] * 128))
    assert run["packing_efficiency"] > 0.8
    assert (
        "packing_efficiency" not in check(f"task.path={rows}", f"task.eval_path={rows}")[1]["run"]
    )


@pytest.mark.parametrize("schedule", ["cooldown", "cosine"])
def test_the_rates_are_those_that_training_has(check, train, chats, schedule, monkeypatch):
    monkeypatch.undo()  # this one needs weights
    settings = (
        f"task.path={chats}",
        f"schedule={schedule}",
        "max_steps=21",
        "optimizer.lr=0.003",
        "batch_size=1",
    )
    run = train(*settings, "callbacks.evaluation=null", "callbacks.checkpoints.every=null")
    _, actual = check(*settings, "callbacks.evaluation=null", "callbacks.checkpoints.every=null")
    had = {
        row["step"] - 1: row["lr"]
        for row in journal.read(run / "metrics.jsonl")
        if row["kind"] == "step"
    }
    assert [step for step, _ in actual["schedule"]["rates"]] == list(range(21))
    assert [rate for _, rate in actual["schedule"]["rates"]] == pytest.approx(
        [had[step] for step in range(21)]
    )
    assert actual["schedule"]["peak"] == 0.003
    inside = json.loads((run / "preflight.json").read_text())
    for name in ("memory_free", "disk_free"):
        del inside["model"][name], actual["model"][name]
    assert inside == actual  # a run checks the same


FAULTS = {
    "too long": (("max_length=513",), "max_length=513 is more than the 512 tokens that"),
    "no such metric": (
        ("callbacks.evaluation.monitor=f1",),
        "monitor=f1 is no metric of this task; the metrics are: loss, accuracy, perplexity",
    ),
    "not graded": (
        ("callbacks.evaluation.monitor=exact_match",),
        "(set callbacks.evaluation.generate)",
    ),
    "seldom graded": (
        ("callbacks.evaluation.monitor=exact_match", "callbacks.evaluation.generate=2"),
        "set callbacks.evaluation.generate_every=1",
    ),
    "no such module": (("adapter.target_modules=[q_proj,nothing]",), "'nothing', which matches no"),
    "no such module of PEFT": (
        ("adapter=dora", "adapter.target_modules=[nothing]"),
        "'nothing', which matches no",
    ),
    "no such module to leave out": (
        ("adapter.exclude_modules=[q_porj]",),
        "'q_porj', which matches no",
    ),
}


@pytest.mark.parametrize("case", FAULTS)
def test_what_the_config_shows_is_refused_before_rows_are_read(
    check, train, rows, capsys, monkeypatch, case
):
    overrides, message = FAULTS[case]
    monkeypatch.setattr(
        "trainer.assembly.rows.tokenise", lambda *_, **__: pytest.fail("rows were read")
    )
    code, _ = check(f"task.path={rows}", f"task.eval_path={rows}", *overrides)
    assert code == 2
    assert message in capsys.readouterr().err
    with pytest.raises((BaseError, AdapterError)) as refusal:
        train(f"task.path={rows}", f"task.eval_path={rows}", *overrides)
    assert message in str(refusal.value)


@pytest.mark.parametrize(
    ("overrides", "length"),
    [
        (("base.max_length=64",), 64),  # a short base needs no number
        (("base.max_length=4096",), 1024),  # a long one is not filled
        (("base.max_length=4096", "max_length=2000"), 2000),
    ],
)
def test_max_length_is_what_the_base_allows(compose, chats, overrides, length):
    cfg = compose("+experiment=smoke", f"task.path={chats}", "max_length=null", *overrides)
    config = OmegaConf.to_container(cfg, resolve=False)
    base = instantiate(config["base"])
    resolve_length(config, base)
    assert config["max_length"] == length
    refuse_early(config, base, instantiate(config["adapter"]))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("task.path=nowhere.jsonl",), "nowhere.jsonl"),
        (("task.path=ROWS", "max_length=8"), "no row of train is left"),
        (("task.path=ROWS", "overlong=raise", "max_length=64"), "more than max_length=64"),
        (("task.path=ROWS", "no_such_key=1"), "no_such_key"),
        (("task.path=ROWS", "adapter=nothing"), "nothing"),
        (("task.path=ROWS", "base=hf", "base.path=./nowhere"), "there is no such folder"),
    ],
)
def test_what_cannot_be_read_is_exit_code_2_without_a_traceback(
    check, rows, capsys, overrides, message
):
    code, actual = check(
        "task.eval_path=" + str(rows),
        *(override.replace("ROWS", str(rows)) for override in overrides),
    )
    assert (code, actual) == (2, None)
    err = capsys.readouterr().err
    assert message in err
    assert "Traceback" not in err


def test_help_is_no_check(capsys):
    assert exit_code(preflight.main, ["--help"]) == 0
    assert "graft preflight" in capsys.readouterr().out


def test_the_table_says_what_the_file_says(check, rows, capsys):
    _, actual = check(
        f"task.path={rows}",
        f"task.eval_path={rows}",
        "max_length=60",
        "packing=true",
        "--samples",
        "0",
    )
    out = capsys.readouterr().out
    train, run, model = actual["data"]["train"], actual["run"], actual["model"]
    for text in (
        f"10 read, {train['kept']} kept, {train['dropped']} too long, dropped",
        (
            f"{train['tokens']:,}, {train['trained_share']:.1%} trained; longest row"
            f" {train['longest']}"
        ),
        f"in train and eval             {actual['data']['shared']}",
        f"{run['tokens_per_epoch']:,}, {run['trained_tokens_per_epoch']} of them trained",
        f"packed sequences {run['packing_efficiency']:.1%} full",
        f"{model['parameters']:,}, {model['trainable']:,} trained; fp32, base in float32",
        "peak 0.01",
    ):
        assert " ".join(text.split()) in " ".join(out.split())
    assert "abc" not in out


def test_a_schedule_is_drawn_from_low_to_high(check, chats, capsys):
    check(f"task.path={chats}", "schedule=linear", "schedule.warmup=0.5", "max_steps=21")
    line = next(line for line in capsys.readouterr().out.splitlines() if "learning rate" in line)
    bars = [
        " ▁▂▃▄▅▆▇█".index(bar) for bar in line.split("rate", 1)[1].rpartition("  peak")[0].strip()
    ]
    top = bars.index(8)
    assert bars[: top + 1] == sorted(bars[: top + 1])
    assert bars[top:] == sorted(bars[top:], reverse=True)
    assert 5 < top < 15


# the preview


@pytest.fixture
def actual(compose, tmp_path):
    """The tokenised rows of some overrides."""

    def built(*overrides):
        config = OmegaConf.to_container(compose("+experiment=smoke", *overrides), resolve=False)
        return load_data(config, instantiate(config["base"]), instantiate(config["task"]))

    return built


@pytest.mark.parametrize("train_on", ["all", "last", "everything"])
def test_the_preview_marks_exactly_what_is_trained(actual, tmp_path, train_on):
    turns = [
        ("user", "one [b]?"),
        ("assistant", "zwei é"),
        ("user", "three?"),
        ("assistant", "vier"),
    ]
    path = write_rows(
        tmp_path / "rows.jsonl", [{"messages": [{"role": r, "content": c} for r, c in turns]}] * 2
    )
    data = actual(f"task.path={path}", f"task.eval_path={path}", f"task.train_on={train_on}")
    first, *others = preview.samples(data, 1)
    assert others == []
    whole = "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in turns)
    assert first.plain == f"{path}:1\n{whole}"
    marked = [
        first.plain[span.start : span.end] for span in first.spans if "green" in str(span.style)
    ]
    assert (
        marked
        == {
            "all": ["zwei é<|im_end|>", "vier<|im_end|>"],
            "last": ["vier<|im_end|>"],
            "everything": [whole],
        }[train_on]
    )
    # each token is one or the other
    assert sum(span.end - span.start for span in first.spans) == len(whole)
    assert {str(span.style) for span in first.spans} <= {"black on green", "dim"}


def test_a_preview_of_more_than_there_is(actual, rows):
    data = actual(f"task.path={rows}", f"task.eval_path={rows}")
    assert len(preview.samples(data, 99)) == 10
    assert preview.samples(data, 0) == []


def test_a_stream_is_checked_without_being_read(check, rows):
    settings = ("task.streaming=true", "max_steps=4", f"task.eval_path={rows}")
    code, actual = check(f"task.path={rows}", *settings)
    assert code == 0
    assert "train" not in actual["data"]
    assert actual["data"]["eval"]["kept"] == 10
    assert "run" not in actual
    assert actual["schedule"]["rates"][-1][0] == 3


def test_prompts_are_compared_with_those_at_inference(check, rows, tmp_path):
    _, actual = check(f"task.path={rows}", f"task.eval_path={rows}")
    assert actual["data"]["prompts"] == {"tried": 10, "as_at_inference": 10}
    assert actual["warnings"] == [
        "10 rows of evaluation are in the training data too: its numbers will be too good"
    ]
    template = tmp_path / "template.jinja"
    template.write_text(
        "{% for m in messages %}{% if m.role == 'assistant' %}A:{% generation %}{{ m.content"
        " }}<|im_end|>{% endgeneration %}{% else %}U:{{ m.content }}{% endif %}{% endfor %}{% if"
        " add_generation_prompt %}B:{% endif %}"
    )
    _, actual = check(
        f"task.path={rows}", f"task.eval_path={rows}", f"task.chat_template={template}"
    )
    assert actual["data"]["prompts"] == {"tried": 10, "as_at_inference": 0}
    assert any(
        "in 10 of 10 rows the last answer is trained after other tokens" in line
        for line in actual["warnings"]
    )


def test_the_text_of_a_special_token_is_noticed(check, tmp_path):
    path = write_rows(
        tmp_path / "rows.jsonl", [*CHATS, chat("a <|im_end|> b", "c"), chat("d", "<|pad|>")]
    )
    _, actual = check(f"task.path={path}", f"task.eval_path={path}")
    assert actual["data"]["special_text"] == 2
    assert any(
        "2 rows have the text of a special token in a message" in line
        for line in actual["warnings"]
    )


@pytest.mark.parametrize("blank", [True, False])
def test_a_blank_between_prompt_and_answer_is_said(blank):
    words = Tokenizer(models.WordLevel({"▁1": 0, "1": 1, "</s>": 2}, "</s>"))
    if blank:
        words.pre_tokenizer, words.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>")
    if not blank:
        tokenizer.backend_tokenizer.decoder = decoders.Fuse()
    none = Renderer(tokenizer, SimpleNamespace(kind="conversation", chat_template="none"))
    assert len(inspect._blank(none)) == blank


def test_an_end_that_the_tokenizer_splits_is_shown(check, rows, tmp_path):
    template = tmp_path / "pieces.jinja"
    template.write_text(
        "{% for m in messages %}{{ m.role }}: {% generation %}{{ m.content }}</end>{% endgeneration"
        " %}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    _, actual = check(f"task.path={rows}", f"task.chat_template={template}")
    assert "writes '</end>' after an answer, for which this tokenizer has no special" in "".join(
        actual["warnings"]
    )
    _, actual = check(f"task.path={rows}")
    assert "no special" not in "".join(actual["warnings"])


def test_a_drafters_rows_need_the_template_of_its_target(tmp_path, monkeypatch):
    monkeypatch.setattr(inspect.run_folder, "read", lambda run: (tmp_path, {}, "last"))
    warnings = []

    def warned(run="somewhere"):
        warnings.clear()
        renderer = SimpleNamespace(template="this")
        inspect._template_of_target({"target": {"run": run}}, renderer, warnings)
        return "".join(warnings)

    assert warned() == ""  # of an older version
    (tmp_path / "chat_template.jinja").write_text("this")
    assert warned() == ""
    (tmp_path / "chat_template.jinja").write_text("other")
    assert f"set task.chat_template={tmp_path / 'chat_template.jinja'}" in warned()
    assert warned(None) == ""


def test_what_engines_can_do_with_a_head_is_said_before_it_is_trained(check, rows, capsys):
    words = [f"task.path={rows}", "adapter=none", "objective=distill", "drafter.offsets=1"]
    _, actual = check(*words, "drafter=eagle")
    message = "a layer of the target's own class; engines load it: to=sglang"
    assert actual["model"]["draft_head"] == message
    assert "engines load it: to=sglang" in " ".join(capsys.readouterr().out.split())
    _, actual = check(*words, "drafter=eagle", "drafter.layer=qwen3")
    assert "SGLang's draft layer is Llama's" in actual["model"]["draft_head"]
    words += ["drafter.draft_vocab_size=null", "drafter.layer=qwen3"]
    _, actual = check(*words, "drafter=eagle3")
    message = "a layer of qwen3's class; engines load it: to=speculators"
    assert actual["model"]["draft_head"] == message
