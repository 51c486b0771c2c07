"""Which layers an adapter is attached to: linear ones that a text calls."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from adapters.delta import Start
from adapters.errors import AdapterError
from adapters.linear import is_linear
from adapters.reached import text_part
from adapters.targets import targets
from tests.toys import adapters as toys
from tests.toys import sparse as toys_sparse
from tests.toys.families import model_of


def kinds(model: nn.Module) -> dict[str, nn.Module]:
    return {type(module).__name__: module for module in model.modules()}


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    ("family", "layer", "linear"),
    [
        ("falcon", "FalconLinear", True),  # x Wᵀ + b by its own forward
        ("llama4_text", "Llama4Router", False),  # an nn.Linear that returns a tuple
        ("phimoe", "PhimoeTopKRouter", False),
        ("gpt2", "Conv1D", True),
    ],
)
def test_a_layer_is_linear_if_its_forward_is(family, layer, linear, device):
    assert is_linear(kinds(model_of(family, device))[layer]) is linear


def test_an_own_forward_that_adds_something_is_no_linear_layer():
    class Shifted(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + 1

    assert not is_linear(Shifted(4, 4))


@pytest.mark.long
@pytest.mark.parametrize("family", ["gemma3", "qwen2_5_vl", "smolvlm", "mistral3", "llama4"])
def test_no_adapter_in_a_vision_tower(family):
    names = [name for name, _ in targets(model_of(family, "meta"), "all-linear")]
    assert names
    assert not [name for name in names if "vision" in name or "visual" in name]
    assert not [name for name in names if "projector" in name or "connector" in name]
    assert any(name.endswith("q_proj") for name in names)


def test_a_text_model_is_one_part():
    assert text_part(model_of("gemma3_text", "meta")) is None
    assert text_part(model_of("gemma3", "meta")) == "model.language_model."


@pytest.mark.long
@pytest.mark.parametrize(
    ("family", "left"),
    [
        ("mamba", {"dt_proj", "x_proj", "out_proj"}),
        ("mamba2", {"out_proj"}),
        ("gemma3n_text", {"correction_coefs"}),  # read while it trains only
        ("bloom", set()),
        ("t5", set()),
    ],
)
def test_layers_whose_weights_are_read_past_them_get_no_adapter(family, left):
    if family == "t5":  # its class reads weights to ask for their types
        from transformers import T5Config, T5ForConditionalGeneration

        with torch.device("meta"):
            sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_heads": 2}
            model = T5ForConditionalGeneration(T5Config(vocab_size=64, num_layers=1, **sizes))
    else:
        model = model_of(family, "meta")
    ends = {name.rpartition(".")[2] for name, _ in targets(model, "all-linear")}
    linears = {name.rpartition(".")[2] for name, m in model.named_modules() if is_linear(m)}
    assert linears - ends - {"lm_head"} == left


@pytest.mark.parametrize(
    "family",
    ["mamba", "gemma3", "llama4_text", "qwen3_5_text", "falcon", "gemma3n_text", "axk2"],
)
def test_every_attached_layer_gets_a_gradient(family):
    model = toys.lora().attach(model_of(family), Start())
    model.train()
    model(input_ids=torch.arange(3, 23)[None], use_cache=False).logits.square().sum().backward()
    deltas = {n: p for n, p in model.named_parameters() if n.endswith("delta.B")}
    assert deltas
    assert not [name for name, p in deltas.items() if p.grad is None]


def test_an_indexer_of_sparse_attention_gets_no_adapter():
    """It chooses positions under torch.no_grad, so an adapter on it would stay as it started."""
    model = model_of("axk2", "meta")
    inside = {name for name, layer in model.named_modules() if ".indexer." in name}
    assert [name for name in inside if is_linear(model.get_submodule(name))]
    assert not inside & {name for name, _ in targets(model, "all-linear")}


def test_a_layers_output_may_be_changed_in_place():
    """Falcon adds the output of its MLP to that of its attention in place."""
    model = toys.lora().attach(toys.llama(torch.float32), Start())
    layer = model.model.layers[0].self_attn.q_proj
    y = layer(torch.ones(1, 3, 64, requires_grad=True))
    y += 1
    y.sum().backward()
    assert layer.delta.B.grad is not None


def test_a_tiny_layer_without_an_entry_is_left_out():
    adapter = toys_sparse.make(density=0.05, schedule="lora_only")
    linears = [("small", nn.Linear(4, 4)), ("large", nn.Linear(64, 64))]
    assert [name for name, _ in adapter._large_enough(linears)] == ["large"]
    adapter.density = 0.07  # of 16 entries: one
    assert [name for name, _ in adapter._large_enough(linears)] == ["small", "large"]


def test_layers_that_share_a_weight_get_no_adapter():
    model = model_of("llama")
    names = [name for name, _ in targets(model, "all-linear")]
    first, second = (layer.self_attn.q_proj for layer in model.model.layers)
    second.weight = first.weight
    left = [name for name, _ in targets(model, "all-linear")]
    assert sorted(set(names) - set(left)) == [f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)]
    with pytest.raises(AdapterError, match=r"has one weight together with model\.layers\.1\."):
        targets(model, ["q_proj"])
    assert len(targets(model, ["q_proj", "k_proj"], ["q_proj"])) == 2
