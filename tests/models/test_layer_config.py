"""Values that differ between layers are read from a layer's config."""

from __future__ import annotations

import torch
from transformers import AutoConfig

from trainer.drafters import families
from trainer.models.layer_config import of_layer
from trainer.speed import attention_choice


def gemma4(**changes):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "global_head_dim": 16}
    kinds = {"layer_types": ["sliding_attention", "full_attention"]}
    return AutoConfig.for_model("gemma4_unified_text", **sizes | heads | kinds | changes)


def test_each_layer_has_its_own_head_width():
    config = gemma4()
    assert [of_layer(config, index).head_dim for index in (0, 1, -1)] == [8, 16, 16]


def test_a_config_of_equal_layers_is_its_own():
    config = AutoConfig.for_model("llama", num_hidden_layers=2)
    assert of_layer(config) is config


def test_kernels_and_draft_layers_are_chosen_for_it():
    shape = attention_choice.shape_of(of_layer(gemma4(), 0), torch.float32)
    assert shape is not None
    assert (shape.heads, shape.width) == (2, 8)
    assert families.layer_config(gemma4(), "llama").head_dim == 16
