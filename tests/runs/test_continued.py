"""Runs with added tokens and with modules that are trained whole, and runs that continue an earlier
run's adapter."""

from __future__ import annotations

import shutil

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from adapters.delta import AdapterError
from tests.conftest import sums, write_rows
from trainer.assembly.trained import load_trained
from trainer.exporting import formats
from trainer.storage import journal

TOKENS = "base.add_tokens=['<call>','</call>']"


@pytest.fixture
def calls(tmp_path):
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"call {word}"},
                {"role": "assistant", "content": f"<call>{word}</call>"},
            ]
        }
        for word in ("ab", "cd", "ef", "gh", "ij", "kl", "mn", "op")
    ]
    return write_rows(tmp_path / "calls.jsonl", rows)


def losses(run):
    rows = journal.read(run / "metrics.jsonl")
    return [row["loss"] for row in rows if row["kind"] == "evaluation"]


def test_added_tokens_are_trained_and_travel_with_the_exports(train, calls, tmp_path):
    files = (f"task.path={calls}", f"task.eval_path={calls}")
    run = train(*files, TOKENS, "max_steps=6", "optimizer.lr=0.01", "name=tokens")
    assert losses(run)[-1] < losses(run)[0]
    trained = load_trained(str(run))
    ids = trained.base.tokenizer("<call>ab</call>", add_special_tokens=False)["input_ids"]
    assert len(ids) == 4
    stored = peft.PeftConfig.from_pretrained(run / "adapter").trainable_token_indices
    assert stored == {"model.embed_tokens": [ids[0], ids[-1]]}

    # as a user loads them
    with torch.no_grad():
        expected = trained.model(input_ids=torch.tensor([ids])).logits
        formats.export(str(run), "merged", tmp_path / "merged", "float32")
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
        assert tokenizer("<call>ab</call>", add_special_tokens=False)["input_ids"] == ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == "<call>ab</call>"
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
        actual = merged.eval()(input_ids=torch.tensor([ids])).logits
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
        base = AutoModelForCausalLM.from_pretrained(trained.base.path, dtype=torch.float32)
        base.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        stock = peft.PeftModel.from_pretrained(base, run / "adapter").eval()
        actual = stock(input_ids=torch.tensor([ids])).logits
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def with_embeddings(rows):
    """The settings of a run that trains the embeddings too, and keeps every checkpoint."""
    files = (f"task.path={rows}", f"task.eval_path={rows}", "optimizer.lr=0.01")
    more = (*files, "adapter.train_modules=[embed_tokens]", "callbacks.checkpoints.every=2")
    more += ("callbacks.evaluation.max_new_tokens=8",)
    return (*more, "callbacks.checkpoints.keep=null")


@pytest.fixture(scope="module")
def run_with_embeddings(tmp_path_factory, train_in):
    folder = tmp_path_factory.mktemp("first")
    rows = write_rows(folder / "rows.jsonl", sums(60))
    return train_in(folder, *with_embeddings(rows), "max_steps=4", "name=first")


@pytest.mark.parametrize("source", ["{run}", "{run}@2", "{run}/adapter"])
def test_a_run_starts_from_an_earlier_ones_adapter(
    train, chats, source, run_with_embeddings, tmp_path
):
    first = shutil.copytree(run_with_embeddings, tmp_path / "runs" / "first", symlinks=True)
    more = with_embeddings(chats)
    step = 2 if "@" in source else 4
    evaluated = {
        row["step"]: row["loss"]
        for row in journal.read(first / "metrics.jsonl")
        if row["kind"] == "evaluation"
    }
    words = (*more, "max_steps=2", f"adapter.from={source.format(run=first)}", "seed=1")
    second = train(*words, "name=second")
    if step in evaluated:
        assert losses(second)[0] == pytest.approx(evaluated[step], rel=1e-5)
    assert losses(second)[0] < evaluated[0]
    assert losses(second)[-1] < losses(second)[0]

    # a resumed run does not read it again
    shutil.rmtree(first)
    assert train(*words, "name=second", "resume=auto") == second


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ("adapter.rank=3", "adapter.rank=3 here, 16 there"),
        ("adapter.target_modules=[q_proj]", "adapter.target_modules=.* here, all-linear there"),
        ("base.seed=7", "the weights of the base differ"),
        (TOKENS, r"base.add_tokens=\['<call>', '</call>'\] here, \[\] there"),
        ("adapter=rosa", "adapter._target_=adapters.rosa.RoSAAdapter here, adapters.lora.LoRA"),
    ],
)
def test_another_adapter_or_base_is_refused_by_name_before_rows(
    train, chats, monkeypatch, changed, says, run_of_lora
):
    monkeypatch.setattr(
        "trainer.assembly.rows.tokenise", lambda *_, **__: pytest.fail("rows were read")
    )
    with pytest.raises(AdapterError, match=says):
        train(f"task.path={chats}", changed, f"adapter.from={run_of_lora}", "name=second")


@pytest.fixture(scope="module")
def run_of_lora(tmp_path_factory, train_in, chats_once):
    return train_in(
        tmp_path_factory.mktemp("lora"), f"task.path={chats_once}", "max_steps=1", "name=lora"
    )


@pytest.fixture(scope="module")
def chats_once(tmp_path_factory):
    rows = [
        {"messages": [{"role": "user", "content": c}, {"role": "assistant", "content": c}]}
        for c in "abcdef"
    ]
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", rows)


def test_a_mask_of_its_own_is_needed_to_continue_rosa(train, chats):
    words = (f"task.path={chats}", "adapter=rosa", "adapter.warmup_steps=1", "max_steps=4")
    words += ("adapter.density=0.05", f"task.eval_path={chats}")
    first = train(*words, "name=first")
    with pytest.raises(AdapterError, match=r"set adapter\.mask to the masks\.safetensors"):
        train(*words, f"adapter.from={first}", "name=second")
    second = train(
        *words, f"adapter.from={first}", f"adapter.mask={first}/masks.safetensors", "name=second"
    )
    assert losses(second)[0] == pytest.approx(losses(first)[-1], rel=1e-5)
