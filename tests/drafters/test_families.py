"""A head's layer is of a class that engines can load, unless the target's own is asked for."""

from __future__ import annotations

import pytest
import torch
import transformers
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer

from tests.exporting.test_engines import (
    D,
    F,
    drafter_of,
    model_of,
    own_logits,
    states_and_ids,
    written,
)
from tests.toys.eagle import knobs
from tests.toys.speculative import alone
from trainer.config import history
from trainer.decoding.speculative import generate
from trainer.drafters import DrafterError, Target, io
from trainer.drafters.eagle import Eagle
from trainer.drafters.eagle3 import Eagle3
from trainer.drafters.families import kind_of, layer_config
from trainer.exporting import draft_head, engines

EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
PROMPT = torch.tensor([5, 9, 13, 7, 30, 22, 11])


def moe():
    return model_of("qwen3_moe", **EXPERTS)


@pytest.mark.parametrize(
    ("family", "changes", "biases", "expected"),
    [
        ("llama", {}, True, "target"),
        ("mistral", {}, True, "target"),
        ("qwen3", {}, True, "target"),
        ("qwen2", {}, False, "target"),
        ("qwen2", {}, True, "llama"),  # whose biases engines drop
        ("llama", {"attention_bias": True}, True, "llama"),
        ("mistral", {"sliding_window": 8}, True, "llama"),
        ("llama", {"hidden_act": "gelu"}, True, "llama"),
        ("gemma", {}, True, "llama"),
        ("qwen3_moe", EXPERTS, False, "llama"),
    ],
)
def test_auto_is_the_targets_own_where_engines_load_it(family, changes, biases, expected):
    config = model_of(family, **changes).config
    assert kind_of("auto", config, biases) == expected
    assert kind_of("target", config, biases) == "target"
    assert kind_of("qwen3", config, biases) == "qwen3"


@pytest.mark.parametrize("name", ["eagle", "eagle3"])
@pytest.mark.parametrize("layer", ["auto", "qwen3", "target"])
def test_a_head_for_experts_has_a_layer_that_engines_load(name, layer, tmp_path):
    model = moe()
    drafter = drafter_of(name, model, layer=layer)
    built = {"auto": LlamaDecoderLayer, "qwen3": Qwen3DecoderLayer}.get(layer)
    assert isinstance(drafter.midlayer, built or type(model.model.layers[-1]))
    message = draft_head.described(drafter, model)
    if layer == "target":
        assert "this one is of qwen3_moe's" in message
        with pytest.raises(DrafterError, match="qwen3_moe"):
            draft_head.check(drafter, "sglang", model)
        return
    assert drafter.midlayer.mlp.up_proj.out_features == 2 * 24
    ways = {"auto": {"eagle": ["sglang"], "eagle3": ["speculators", "sglang"]}}
    ways["qwen3"] = {"eagle": [], "eagle3": ["speculators"]}
    if ways[layer][name]:
        assert message.endswith(
            "engines load it: " + ", ".join(f"to={to}" for to in ways[layer][name])
        )
    for to in ways[layer][name]:
        written(drafter, model, to, tmp_path / to)
        states, ids = states_and_ids(drafter)
        drafted = torch.tensor([7, 1, 30])[: drafter.depth - 1]
        torch.testing.assert_close(
            engines.logits(tmp_path / to, to, model, states, ids[1:], drafted),
            own_logits(drafter, model, states, ids, drafted),
            rtol=0,
            atol=1e-5,
        )


@pytest.mark.parametrize("name", ["eagle", "eagle3"])
def test_its_drafts_leave_the_text_as_it_is(name):
    model = moe()
    expected = alone(model, PROMPT, 12)
    for layer in ("llama", "qwen3"):
        drafter = drafter_of(name, model, layer=layer)
        assert generate(Target(model), drafter, PROMPT, 12, []).tokens == expected


def test_its_sizes_and_table_are_the_targets():
    llama = model_of().config
    same = layer_config(llama, "llama")
    for key in ("hidden_size", "intermediate_size", "head_dim", "rope_parameters", "rms_norm_eps"):
        assert getattr(same, key) == getattr(llama, key), key
    gpt2 = transformers.GPT2Config(n_embd=D, n_head=4, n_positions=64, vocab_size=41)
    other = layer_config(gpt2, "llama")
    assert (other.hidden_size, other.intermediate_size) == (D, 4 * D)
    assert other.max_position_embeddings == 64
    assert other.rope_parameters == {"rope_type": "default", "rope_theta": 1e4}
    half = model_of(rope_parameters={"rope_type": "default", "rope_theta": 5e3}).config
    half.rope_parameters["partial_rotary_factor"] = 0.5
    assert layer_config(half, "qwen3").rope_parameters == {
        "rope_type": "default",
        "rope_theta": 5e3,
    }
    assert layer_config(model_of("mixtral", num_experts_per_tok=2).config, "llama").to_dict()[
        "intermediate_size"
    ] == (2 * F)


def test_a_layer_of_another_class_cannot_start_as_the_targets_last():
    for head in (Eagle, Eagle3):
        name = head.__name__.lower()
        with pytest.raises(
            DrafterError, match=r"set drafter\.init=random, or drafter\.layer=target"
        ):
            head(moe(), **knobs(name, layer="auto", init="last_layer"))


def test_a_record_of_an_older_version_keeps_the_targets_layer():
    old = {"_target_": "trainer.drafters.eagle3.Eagle3", "offsets": 2}
    now = old | {"layer": "auto"}
    config = {"drafter": dict(now)}
    history.adopt_layer(config, {"drafter": dict(old)})
    assert config["drafter"]["layer"] == "target"
    config = {"drafter": now | {"layer": "llama"}}
    history.adopt_layer(config, {"drafter": dict(old)})
    assert config["drafter"]["layer"] == "llama"  # and the run is refused as another one
    config = {"drafter": dict(now)}
    for other in ({"drafter": {}}, {"drafter": None}, {"drafter": {"_target_": "x"}}, None):
        history.adopt_layer(config, other)
    assert config["drafter"]["layer"] == "auto"
    medusa = {"_target_": "trainer.drafters.medusa.Medusa"}
    history.keep_head(medusa)
    assert "layer" not in medusa


def test_a_folder_of_the_targets_layer_continues_under_auto(tiny, tmp_path):
    model = tiny.load(torch.float32)
    settings = {"_target_": "trainer.drafters.eagle.Eagle", "_partial_": True} | knobs("eagle")
    old = {key: value for key, value in settings.items() if key != "layer"}
    target = io.trained_for(tiny, tmp_path, 1, None)
    io.save(Eagle(model, **knobs("eagle")), old, target, tmp_path / "head")
    assert io.read(tmp_path / "head")[0]["layer"] == "target"
    io.check(tmp_path / "head", tiny, settings | {"layer": "auto"})
    with pytest.raises(DrafterError, match=r"drafter\.layer: 'target' there, 'qwen3' here"):
        io.check(tmp_path / "head", tiny, settings | {"layer": "qwen3"})
