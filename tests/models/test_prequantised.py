"""Bases whose files are quantised already, adapters given as bases, and attention by default."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from tests.toys.families import folder_of, logits
from trainer.models.base import BaseError
from trainer.models.hub import from_hub
from trainer.models.prequantised import sharding_fault


def hub(path: Any, quantization: str = "none") -> Any:
    return from_hub(str(path), None, None, "auto", "auto", quantization, True, False, [])


@pytest.fixture
def copied(tiny, tmp_path):
    return Path(shutil.copytree(tiny.path, tmp_path / "model"))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"quant_method": "gptq", "bits": 4, "group_size": 128}, "gptq.*optimum"),
        ({"quant_method": "awq", "bits": 4, "group_size": 128}, "awq.*gptqmodel"),
        ({"quant_method": "hqq"}, "hqq.*HQQ"),
        ({"quant_method": "unheard"}, "unheard.*Unknown quantization type"),
    ],
)
def test_a_missing_package_is_named(copied, settings, said):
    file = copied / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": settings}))
    with pytest.raises(BaseError, match=rf"{said}.*base\.quantization=nf4"):
        hub(copied).config


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (None, None),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, None),
        ({"quant_method": "fp8"}, None),  # transformers dequantises it
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "quantised by bitsandbytes"),
        ({"quant_method": "gptq", "bits": 4}, "is quantised by gptq, and lightning.strategy=fsdp2"),
    ],
)
def test_what_fsdp2_can_shard(settings, says):
    fault = sharding_fault(SimpleNamespace(quantization_config=settings))
    assert fault is None if says is None else says in fault


def test_a_bitsandbytes_folder_is_a_base_of_4_bits(tiny, tmp_path):
    quantised = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = AutoModelForCausalLM.from_pretrained(tiny.path, quantization_config=quantised)
    model.save_pretrained(tmp_path)
    base = hub(tmp_path)
    assert base.is_quantized
    loaded = base.load(torch.float32)
    assert type(loaded.model.layers[0].self_attn.q_proj).__name__ == "Linear4bit"
    assert torch.isfinite(logits(loaded)).all()


def test_plain_weights_under_a_config_of_4_bits_are_refused(copied):
    file = copied / "config.json"
    settings = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": settings}))
    with pytest.raises(BaseError, match=r"plain weights in its files, such as model\.layers\.0"):
        hub(copied).load(torch.float32)


def test_an_adapter_is_no_base(copied):
    (copied / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')
    with pytest.raises(BaseError, match=r"adapter of PEFT.*set base\.path=org/base"):
        hub(copied).config


@pytest.mark.parametrize(
    ("family", "attention"),
    [("llama", "sdpa"), ("gemma2", "eager"), ("gpt_oss", "eager"), ("bloom", "eager")],
)
def test_attention_is_what_the_class_has(family, attention, tmp_path):
    model = hub(folder_of(family, tmp_path)).load(torch.float32)
    assert model.config._attn_implementation == attention


def test_a_vision_language_base_is_loaded_for_text(tmp_path):
    model = hub(folder_of("smolvlm", tmp_path)).load(torch.float32)
    assert type(model).__name__ == "SmolVLMForConditionalGeneration"
    assert torch.isfinite(logits(model)).all()
