"""Low-rank updates of experts, against naive sums and stock PEFT."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn

from adapters import experts
from adapters.delta import AdapterError, Start
from tests.toys import adapters as toys
from tests.toys import sparse
from tests.toys.families import logits, model_of

MIXTURES = ["mixtral", "deepseek_v3", "gpt_oss", "llama4_text", "granitemoe", "qwen3_5_moe_text"]


def attached(name: str, **changes: Any) -> tuple[Any, Any]:
    """An adapter on linear layers and all experts, and the model, none of its matrices zero."""
    adapter = toys.lora(target_parameters="all-experts", **changes)
    model = adapter.attach(model_of(name), Start())
    draw = torch.Generator().manual_seed(1)
    for key, parameter in model.named_parameters():
        if key.endswith(".B"):
            nn.init.normal_(parameter, std=0.1, generator=draw)
    return adapter, model.eval()


@pytest.mark.parametrize("transposed", [False, True])
def test_each_expert_has_its_own_update(transposed):
    weight = torch.randn(3, 4, 6)
    delta = experts.ExpertLoRA(weight, 2, 0.5, torch.float32, transposed)
    nn.init.normal_(delta.B)
    for e in range(3):
        A, B = delta.A[2 * e : 2 * e + 2], delta.B[:, e::3]
        update = 0.5 * B @ A
        expected = weight[e] + (update.T if transposed else update)
        torch.testing.assert_close(delta.weight(weight)[e], expected)


@pytest.mark.long
@pytest.mark.parametrize("name", MIXTURES)
def test_stock_peft_loads_the_experts_updates(name, tmp_path):
    adapter, model = attached(name)
    expected, plain = logits(model), logits(model_of(name))
    adapter.save(model, tmp_path, "base", "CAUSAL_LM")
    loaded = PeftModel.from_pretrained(model_of(name), tmp_path).eval()
    assert float((logits(loaded) - expected).norm() / (expected - plain).norm()) < 1e-4
    # PEFT ignores a tensor that it does not know, and the export of a run refuses it.
    read = get_peft_model_state_dict(loaded, save_embedding_layers=False)
    assert load_file(tmp_path / "adapter_model.safetensors").keys() == read.keys()
    with adapter.disabled(model):
        torch.testing.assert_close(logits(model), plain)
    torch.testing.assert_close(logits(adapter.merge(model)), expected, rtol=1e-4, atol=1e-4)
    assert not experts.layers(model)


def rosa(name: str, **changes: Any) -> tuple[Any, Any]:
    """RoSA on linear layers and all experts, with no part zero, and the model."""
    changes = {"dtype": "float32", "sparse_dtype": "float32"} | changes
    adapter = sparse.make(target_parameters="all-experts", density=0.05, **changes)
    model = adapter.attach(model_of(name), Start(steps=4))
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith((".B", ".values")):
                parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.1)
    adapter.after_step(model, 2)
    return adapter, model.eval()


@pytest.mark.long
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "granitemoe"])
def test_stock_peft_loads_rosas_two_parts_and_its_experts(name, tmp_path):
    adapter, model = rosa(name)
    expected, plain = logits(model), logits(model_of(name))
    assert adapter.exportable
    adapter.save(model, tmp_path, "base", "CAUSAL_LM")
    loaded = adapter.load_stock(model_of(name), tmp_path).eval()
    assert float((logits(loaded) - expected).norm() / (expected - plain).norm()) < 1e-4
    for _, layer in experts.layers(model):  # they are a part of the effect
        for delta in layer.deltas.values():
            delta.scale = 0.0
    assert float((logits(model) - expected).norm() / (expected - plain).norm()) > 0.05
    for _, layer in experts.layers(model):
        for delta in layer.deltas.values():
            delta.scale = 1.5
    with adapter.disabled(model):
        torch.testing.assert_close(logits(model), plain)
    torch.testing.assert_close(logits(adapter.merge(model)), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("deepseek_v3", {}),  # PEFT takes the names of its dense MLP for experts
        ("mixtral", {"density_pattern": {"q_proj": 0.9}}),  # too dense for SHiRA
    ],
)
def test_rosa_that_no_pair_of_peft_holds_is_exported_merged(name, changes, tmp_path):
    adapter, model = rosa(name, **changes)
    assert not adapter.exportable
    with pytest.raises(AdapterError, match="to=merged"):
        adapter.save(model, tmp_path, "base", "CAUSAL_LM")
    expected = logits(model)
    torch.testing.assert_close(logits(adapter.merge(model)), expected, rtol=1e-4, atol=1e-4)


def test_rosas_restart_draws_the_experts_part_again():
    adapter, model = rosa("mixtral")
    adapter._restart_low_rank(model)
    deltas = [delta for _, layer in experts.layers(model) for delta in layer.deltas.values()]
    assert deltas
    assert not any(delta.B.any() for delta in deltas)


def test_experts_need_a_low_rank_part():
    with pytest.raises(AdapterError, match="Set adapter=rosa or adapter=lora"):
        rosa("mixtral", schedule="spa_only")


def test_only_the_updates_learn_and_a_state_holds_them():
    adapter, model = attached("mixtral")
    model(input_ids=torch.arange(3, 43)[None], use_cache=False).logits.square().sum().backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    assert trained == {name for name, p in model.named_parameters() if p.requires_grad}
    assert any("experts.deltas.gate_up_proj.A" in name for name in trained)
    state = adapter.state(model)
    assert any("experts.deltas.down_proj.B" in name for name in state["tensors"])
    _, other = attached("mixtral")
    adapter.load_state(other, state)
    assert torch.equal(logits(other), logits(model))


def test_the_tensors_of_a_model_are_listed():
    with pytest.raises(AdapterError, match=r"experts\.down_proj, experts\.gate_up_proj"):
        toys.lora(target_parameters=["w1"]).attach(model_of("mixtral"), Start())
    with pytest.raises(AdapterError, match="The model's: none"):
        toys.lora(target_parameters="all-experts").attach(model_of("llama"), Start())


def test_one_of_the_tensors(tmp_path):
    adapter = toys.lora(target_parameters=["experts.down_proj"])
    model = adapter.attach(model_of("mixtral", "meta"), Start())
    assert [list(layer.deltas) for _, layer in experts.layers(model)] == [["down_proj"]] * 2


def test_parameters_of_experts_are_counted():
    model = model_of("deepseek_v3", "meta")
    names = experts.expert_tensors(model)
    assert names
    assert all(".experts." in name for name in names)  # and no shared expert
    assert not experts.expert_tensors(model_of("mamba", "meta"))  # whose convolutions are 3-D
