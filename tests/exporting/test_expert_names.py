"""Adapters on mixtures of experts, as stock PEFT reads them, and the check of an export."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from adapters import io
from tests.toys import adapters as toys
from tests.toys.families import folder_of, logits, model_of, moved
from trainer.exporting import adapter as exporting
from trainer.exporting.compare import Mismatch, compare, effect, outputs

# with dense MLPs or shared experts next to routed ones, and under PEFT's rewriting of names
REWRITTEN = ["deepseek_v3", "qwen3_next", "dots1", "glm4_moe", "ernie4_5_moe", "hunyuan_v1_moe"]


def stock(name: str, folder: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder_of(name, folder), dtype=torch.float32).eval()


@pytest.mark.long
@pytest.mark.parametrize("name", REWRITTEN)
def test_stock_peft_reads_an_adapter_beside_experts(name, tmp_path):
    adapter = toys.lora(target_modules="all-linear", dropout=0.1)
    model = moved(adapter, stock(name, tmp_path / "base"))
    expected = logits(model)
    adapter.save(model, tmp_path / "adapter", "base", "CAUSAL_LM")
    loaded = PeftModel.from_pretrained(model_of(name), tmp_path / "adapter").eval()
    plain = logits(model_of(name))
    assert float((logits(loaded) - expected).norm() / (expected - plain).norm()) < 1e-4
    assert exporting.check_tensors(loaded, tmp_path / "adapter") is None
    layers = [delta for delta, _ in io.deltas(model)]
    assert any(layer.endswith("down_proj") for layer in layers) or name == "ernie4_5_moe"


def old_folder(model: Any, adapter: Any, folder: Any) -> None:
    """The adapter as it would be with all layers in target_modules, which PEFT rewrites."""
    tensors, names, _ = io.delta_tensors(
        model, lambda delta: {"lora_A.weight": delta.A, "lora_B.weight": delta.B}
    )
    ends = sorted({name.rpartition(".")[2] for name in names})
    config = LoraConfig(r=adapter.rank, lora_alpha=adapter.alpha, target_modules=ends)
    io.write(folder, config, tensors)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:Found missing adapter keys:UserWarning")
@pytest.mark.filterwarnings("ignore:The following .*_pattern keys:RuntimeWarning")
@pytest.mark.parametrize("size", [0.2, 1e-4])
def test_an_adapter_that_peft_reads_wrongly_is_refused_whatever_its_size(tmp_path, size):
    base = stock("deepseek_v3", tmp_path / "base")
    adapter = toys.lora(target_modules="all-linear")
    model = moved(adapter, base, size)
    old_folder(model, adapter, tmp_path / "adapter")
    run = SimpleNamespace(
        model=model,
        adapter=adapter,
        base=SimpleNamespace(
            load=lambda *_: model_of("deepseek_v3"),
            config=model.config,
            longest=256,
            vocabulary=264,
        ),
        task=SimpleNamespace(kind="text", labels=None),
    )
    with pytest.raises(Mismatch, match=r"not in the file|not read|other values"):
        exporting.verify_adapter(run, tmp_path / "adapter")


def test_missing_and_unread_tensors_are_named(tmp_path):
    adapter = toys.lora(target_modules=["q_proj", "v_proj"])
    model = moved(adapter, model_of("llama"), 1e-5)
    adapter.save(model, tmp_path, "base", "CAUSAL_LM")
    loaded = PeftModel.from_pretrained(model_of("llama"), tmp_path)
    exporting.check_tensors(loaded, tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    first, *_ = sorted(tensors)
    save_file({n: t for n, t in tensors.items() if n != first} | {"other": torch.ones(2)}, file)
    with pytest.raises(Mismatch, match=r"1 tensors are not in the file.*1 of the file are not"):
        exporting.check_tensors(loaded, tmp_path)
    save_file(tensors | {first: tensors[first] + 1e-6}, file)
    with pytest.raises(Mismatch, match="1 have other values"):
        exporting.check_tensors(loaded, tmp_path)


@torch.no_grad()
@pytest.mark.parametrize(("size", "small"), [(1e-1, False), (1e-4, True)])
def test_a_lost_adapter_is_seen_at_any_size_above_rounding(size, small):
    adapter = toys.lora(target_modules="all-linear")
    base = model_of("llama")
    run: Any = SimpleNamespace(
        base=SimpleNamespace(config=base.config, longest=256, vocabulary=264),
        task=SimpleNamespace(kind="text", labels=None),
    )
    plain = outputs(base, run)
    expected = outputs(moved(adapter, base, size), run)
    moves = effect(expected[-1], plain[-1])
    assert moves > 1e-4
    assert (moves < 1e-3) is small
    assert compare(expected, expected, moves) == 0
    with pytest.raises(Mismatch, match="differs"):
        compare(expected, plain, moves)  # the base alone, without the adapter
    if small:
        assert compare(expected, plain) < 1e-3  # where its own effect is not known, it passes


def test_saved_names_stay_short_where_peft_rewrites_none(tmp_path):
    adapter = toys.lora(target_modules="all-linear", dropout=0.1)
    adapter.save(moved(adapter, model_of("llama")), tmp_path, "base", "CAUSAL_LM")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["target_modules"] == sorted(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )
    assert config["target_parameters"] is None
    assert config["lora_dropout"] == 0.1
