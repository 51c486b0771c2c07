"""The head of a base is never replaced by one that is accepted less often."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.conftest import sums, write_rows
from tests.toys.heads import llama, make, stirred
from tests.toys.mtp_bases import tiny_of
from trainer.assembly import guarded
from trainer.assembly.trained import load_trained
from trainer.drafters import DrafterError
from trainer.drafters.native import NativeModule
from trainer.exporting import mtp_layers
from trainer.models.tiny import byte_tokenizer

SETTINGS = {"offsets": 1, "weights": None, "beta": 0.6, "weight": 1.0, "lr_scale": 1.0}


def written(folder, model, drafter):
    """A base's folder with an MTP layer."""
    mtp_layers.check(drafter, model)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    mtp_layers.append(folder, mtp_layers.tensors(drafter, model, torch.float32), {})
    return folder, {name: tensor.clone() for name, tensor in drafter.state_dict().items()}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A Mellum with an MTP layer in its files, and that layer."""
    folder = tmp_path_factory.mktemp("base") / "mellum"
    model = tiny_of("mellum", vocab_size=len(byte_tokenizer()), max_position_embeddings=512)
    return written(folder, model, stirred(make("sequential", model, offsets=1)))


def test_the_layer_is_the_base_s_own_and_is_restored(base):
    folder, stock = base
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    drafter = NativeModule(model, **SETTINGS).eval()
    assert {name: tensor.tolist() for name, tensor in drafter.state_dict().items()} == {
        name: tensor.tolist() for name, tensor in stock.items()
    }
    ids = torch.randint(3, 200, (2, 9), generator=torch.Generator().manual_seed(1))
    expected = mtp_layers.transformers_logits(model, ids)
    torch.testing.assert_close(
        mtp_layers.own_logits(drafter, model, ids), expected, rtol=0, atol=2e-5
    )
    with torch.no_grad():
        next(drafter.parameters()).add_(1.0)
    drafter.restore()
    assert torch.equal(mtp_layers.own_logits(drafter, model, ids).argmax(-1), expected.argmax(-1))


def test_a_base_without_the_layer_is_refused(base, tmp_path):
    with pytest.raises(DrafterError, match=r"LlamaForCausalLM \(llama\) has none"):
        NativeModule(llama(), **SETTINGS)
    bare = tiny_of("mellum", num_mtp_layers=1)
    bare.save_pretrained(tmp_path)
    with pytest.raises(DrafterError, match="no MTP layer that can be read"):
        NativeModule(AutoModelForCausalLM.from_pretrained(tmp_path), **SETTINGS)
    several = tiny_of("mellum")
    several.config.num_mtp_layers = 2
    with pytest.raises(DrafterError, match="num_mtp_layers=2"):
        NativeModule(several, **SETTINGS)


def write_evaluations(run, values):
    rows = [
        {"kind": "evaluation", "step": step, "time": 0.0, "loss": 1.0, "accepted": value}
        for step, value in values.items()
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize(
    ("values", "steps", "kept"),
    [
        ({0: 1.740, 5: 1.655, 10: 1.60}, [5, 10], 0),
        ({0: 1.740, 5: 1.755, 10: 1.60}, [5, 10], 5),
        ({0: 1.740, 5: 1.755, 10: 1.60}, [10], 0),  # the better one no longer exists
        ({0: 1.740, 5: 1.740}, [5], 0),
        ({0: 1.740, 5: 1.8, 10: 1.8}, [5, 10], 5),
        ({0: 1.740}, [], 0),
    ],
)
def test_the_best_measured_head_is_kept(tmp_path, caplog, values, steps, kept):
    write_evaluations(tmp_path, values)
    with caplog.at_level(logging.INFO, "trainer"):
        verdict = guarded.judge(tmp_path, steps)
    assert (verdict.kept, verdict.stock) == (kept, 1.740)
    assert guarded.read(tmp_path) == verdict
    (record,) = caplog.records
    assert record.levelno == (logging.INFO if kept else logging.WARNING)
    assert ("The stock head is kept" in record.message) == (not kept)
    assert ("made the stock head worse" in record.message) == (
        not kept and max([values[step] for step in steps], default=9) < values[0]
    )


def test_nothing_is_judged_without_a_measurement_before(tmp_path):
    write_evaluations(tmp_path, {5: 2.0})
    assert guarded.judge(tmp_path, [5]) is None
    assert guarded.read(tmp_path) is None


def test_a_run_exports_and_decodes_with_the_better_head(train, base, tmp_path, caplog):
    rows = write_rows(tmp_path / "chats.jsonl", sums(40))
    words = (
        f"task.path={rows}",
        "task.eval_fraction=0.2",
        "base=hf",
        "adapter=none",
        "objective=distill",
        "drafter=native",
        "batch_size=4",
        "max_steps=6",
        "callbacks.evaluation.every=3",
        "callbacks.evaluation.monitor=accepted",
        "callbacks.evaluation.mode=max",
        "export=best",
    )
    # A head of no use becomes better. Then the better one is the stock head, and becomes worse.
    for name, rate in (("better", "2e-2"), ("worse", "1e3")):
        caplog.clear()
        folder, stock = base
        run = train(*words, f"base.path={folder}", f"name={name}", f"optimizer.lr={rate}")
        verdict, better = guarded.read(run), name == "better"
        assert bool(verdict.kept) == better, verdict
        exported = load_file(run / "drafter" / "model.safetensors")
        same = all(torch.equal(tensor, stock[key]) for key, tensor in exported.items())
        assert same != better
        loaded = load_trained(str(run))
        for key, tensor in loaded.drafter.state().items():
            assert torch.equal(tensor, exported[key])
        warned = any(verdict.text() == record.message for record in caplog.records)
        assert warned or better
        assert verdict.text().partition(":")[0] in (run / "report.html").read_text()
        if better:
            base = written(tmp_path / "second", loaded.model, loaded.drafter)
    assert verdict.stock > 1.2
    assert "made the stock head worse" in verdict.text()
