"""Exports of real runs, loaded back by stock libraries."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from adapters.delta import AdapterError
from tests.conftest import write_rows
from trainer import assembly, export
from trainer.checkpoint import CheckpointError
from trainer.export import Mismatch

SHORT = ["max_steps=4", "callbacks.evaluation.every=null", "optimizer.lr=3e-2"]


@pytest.fixture
def labels(tmp_path: Path) -> Path:
    rows = [{"text": ("good " if i % 2 else "bad ") * (1 + i % 5), "label": str(i % 2)} for i in range(60)]
    return write_rows(tmp_path / "labels.jsonl", rows)


@torch.no_grad()
def outputs(model: Any) -> Tensor:
    ids = torch.randint(3, 259, (3, 20), generator=torch.Generator().manual_seed(5))
    found = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.float()
    return found[:, -20:]  # virtual tokens stand before the row's own


def of_run(run: Path, which: str = "last") -> Any:
    return assembly.trained(f"{run}@{which}", exact=True)


def run_with(train: Any, chats: Path, labels: Path, kind: str) -> Path:
    data = ["task=classification", f"task.path={labels}"] if kind.endswith("classification") else [f"task.path={chats}"]
    settings = {
        "lora": [],
        "pissa": ["adapter=pissa", "adapter.r=4", "adapter.lora_alpha=4"],
        "loha": ["adapter=peft", "adapter.peft_type=LOHA", "adapter.r=4", "adapter.target_modules=all-linear"],
        "adalora": ["adapter=adalora", "adapter.init_r=4", "adapter.target_r=2"],
        "prompt_tuning": ["adapter=prompt_tuning", "adapter.num_virtual_tokens=4", "callbacks.evaluation.samples=0"],
        "full": ["adapter=full"],
        "classification": [],
        "full-classification": ["adapter=full"],
        "nf4": ["base.quantization=nf4", "base.hidden_size=64"],
    }[kind]
    return train(*SHORT, *data, *settings)


@pytest.mark.filterwarnings("ignore:The following rank_pattern keys.*lora_E:RuntimeWarning")  # of PEFT's own AdaLoRA files
@pytest.mark.parametrize("kind", ["lora", "pissa", "loha", "adalora", "prompt_tuning", "classification", "nf4"])
def test_an_exported_adapter_is_the_runs_model_in_stock_peft(train, chats, labels, kind):
    run = run_with(train, chats, labels, kind)
    out, difference = export.export(str(run), "peft", None, "float32")
    assert out == run / "peft"
    assert difference < 1e-4
    found = of_run(run)
    classes = found.task.labels if kind == "classification" else None
    base = found.base.load(torch.float32, classes)
    plain = outputs(base)
    loaded = peft.PeftModel.from_pretrained(base, out).eval()
    wanted = outputs(found.model)
    torch.testing.assert_close(outputs(loaded), wanted, rtol=0, atol=1e-4)
    assert (wanted - plain).abs().max() > 1e-3
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == found.base.path
    assert config["task_type"] == ("SEQ_CLS" if kind == "classification" else "CAUSAL_LM")
    # What the run itself wrote at its end.
    own, again = load_file(run / "adapter" / "adapter_model.safetensors"), load_file(out / "adapter_model.safetensors")
    assert own.keys() == again.keys()
    assert all(torch.equal(tensor, again[name]) for name, tensor in own.items())


@pytest.mark.parametrize("kind", ["lora", "pissa", "full", "classification", "full-classification", "nf4"])
def test_a_merged_export_is_the_runs_model_in_stock_transformers(train, chats, labels, tmp_path, kind):
    run = run_with(train, chats, labels, kind)
    out, difference = export.export(str(run), "merged", tmp_path / "deep" / "merged", "float32")
    assert difference < 1e-4
    saved = load_file(out / "model.safetensors")
    assert not any("lora" in name or "delta" in name for name in saved)
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    auto: Any = AutoModelForSequenceClassification if kind.endswith("classification") else AutoModelForCausalLM
    loaded = auto.from_pretrained(out).eval()
    assert loaded.dtype == torch.float32
    wanted = outputs(of_run(run).model)
    torch.testing.assert_close(outputs(loaded), wanted, rtol=0, atol=1e-4)
    if kind.endswith("classification"):
        assert loaded.config.id2label == {0: "0", 1: "1"}
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.decode(tokenizer("1+1=").input_ids) == "1+1="
    assert tokenizer.chat_template

    half, _ = export.export(str(run), "merged", tmp_path / "half", "bfloat16")
    rounded = load_file(half / "model.safetensors")
    assert rounded.keys() == saved.keys()
    assert all(torch.equal(rounded[name], tensor.to(torch.bfloat16)) for name, tensor in saved.items())
    loaded = auto.from_pretrained(half).eval()
    assert loaded.dtype == torch.bfloat16
    assert (outputs(loaded) - wanted).abs().mean() < 0.05 * wanted.abs().mean()


def test_which_checkpoint_is_exported_can_be_chosen(train, chats, tmp_path):
    run = train(
        f"task.path={chats}",
        "max_steps=6",
        "optimizer.lr=3e-2",
        "callbacks.checkpoints.every=2",
        "callbacks.checkpoints.keep=5",
        "callbacks.evaluation=null",
    )
    (run / "checkpoints" / "best.json").write_text(json.dumps({"step": 4}))
    found = {}
    for which in ("2", "4", "6", "last", "best"):
        out, _ = export.export(f"{run}@{which}", "peft", tmp_path / which, "float32")
        found[which] = load_file(out / "adapter_model.safetensors")
        assert of_run(run, which).step == {"last": 6, "best": 4}.get(which) or int(which)

    def same(a: str, b: str) -> bool:
        return all(torch.equal(tensor, found[b][name]) for name, tensor in found[a].items())

    assert same("last", "6")
    assert same("best", "4")
    assert not same("2", "4")
    assert not same("4", "6")
    with pytest.raises(CheckpointError, match="no checkpoint '3'; it has the steps 2, 4, 6"):
        export.export(f"{run}@3", "peft", tmp_path / "3", "float32")


def test_an_export_that_answers_differently_is_refused_and_leaves_nothing(train, chats, tmp_path, monkeypatch):
    run = run_with(train, chats, chats, "lora")
    save, write = export.save_adapter, type(of_run(run).model).save_pretrained

    def spoilt_adapter(adapter: Any, model: Any, base: Any, task: Any, folder: Path, pair: bool = False) -> None:
        save(adapter, model, base, task, folder)
        file = folder / "adapter_model.safetensors"
        tensors = load_file(file)
        tensors["base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"][0] += 1.0
        save_file(tensors, file)

    def spoilt_model(model: Any, folder: Path, **kwargs: Any) -> None:
        write(model, folder, **kwargs)
        tensors = load_file(folder / "model.safetensors")
        tensors["model.embed_tokens.weight"][5:] *= 1.5
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    monkeypatch.setattr(export, "save_adapter", spoilt_adapter)
    monkeypatch.setattr(type(of_run(run).model), "save_pretrained", spoilt_model)
    place = tmp_path / "exports"
    with pytest.raises(
        Mismatch, match=r"differs from the run's model by .* of the logits' spread.*first to do so is decoder layer 1"
    ):
        export.export(str(run), "peft", place / "adapter", "float32")
    with pytest.raises(Mismatch, match="the first to do so is the embedding"):
        export.export(str(run), "merged", place / "merged", "float32")
    assert list(place.iterdir()) == []


def test_an_export_with_nan_is_refused(train, chats, tmp_path, monkeypatch):
    run = run_with(train, chats, chats, "lora")
    save = export.save_adapter

    def spoilt(adapter: Any, model: Any, base: Any, task: Any, folder: Path, pair: bool = False) -> None:
        save(adapter, model, base, task, folder)
        tensors = load_file(folder / "adapter_model.safetensors")
        next(iter(tensors.values())).fill_(torch.nan)
        save_file(tensors, folder / "adapter_model.safetensors")

    monkeypatch.setattr(export, "save_adapter", spoilt)
    with pytest.raises(Mismatch, match="differs from the run's model by nan"):
        export.export(str(run), "peft", tmp_path / "adapter", "float32")
    assert not list(tmp_path.glob("*adapter*"))


def test_what_cannot_be_exported_says_why(train, chats, tmp_path, capsys):
    run = train(
        *SHORT,
        f"task.path={chats}",
        "adapter=prompt_tuning",
        "adapter.num_virtual_tokens=4",
        "callbacks.evaluation.samples=0",
        "name=prompt",
    )
    with pytest.raises(
        AdapterError, match=r"PROMPT_TUNING cannot be merged into weights: it works on activations. Export it with to=peft"
    ):
        export.export(str(run), "merged", tmp_path / "out" / "merged", "float32")
    assert list((tmp_path / "out").iterdir()) == []
    assert export.main([f"run={run}", "to=merged"]) != 0
    assert "works on activations" in capsys.readouterr().err
    full = train(*SHORT, f"task.path={chats}", "adapter=full", "name=full")
    with pytest.raises(AdapterError, match="to=merged"):
        export.export(str(full), "peft", None, "float32")
    assert not list(full.glob("*peft*"))


def test_what_is_there_is_not_overwritten(train, chats, tmp_path):
    run = run_with(train, chats, chats, "lora")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "note").write_text("kept")
    with pytest.raises(CheckpointError, match=r"mine exists. Remove it, or choose another place with out=FOLDER"):
        export.export(str(run), "peft", tmp_path / "mine", "float32")
    assert (tmp_path / "mine" / "note").read_text() == "kept"


def test_the_verb(train, chats, tmp_path, capsys):
    run = run_with(train, chats, chats, "lora")
    assert export.main([f"run={run}", "to=peft", f"out={tmp_path / 'out'}"]) == 0
    assert "loaded back and compared: logits differ by" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    assert oct((tmp_path / "out").stat().st_mode)[-3:] == "755"
    for wrong, message in (
        (["to=gguf"], "choose one of peft, merged"),
        (["to=peft", "dtype=int4"], "float32, bfloat16, float16"),
    ):
        assert export.main([f"run={run}", *wrong]) == 2
        assert message in capsys.readouterr().err
