"""Where heads of a target's last layers start: as these layers, run by transformers."""

from __future__ import annotations

import pytest
import torch

from tests.exporting.test_engines import model_of
from tests.toys import adapters as toys
from tests.toys.eagle import SIZE, TINY, knobs, llama, qwen3
from tests.toys.packed_rows import APART, output_of
from trainer.config import history
from trainer.drafters import DrafterError, Target, TargetUpdate
from trainer.drafters.block import Block
from trainer.drafters.block_layer import keys_values
from trainer.drafters.eagle3 import Eagle3
from trainer.drafters.layers import rotations
from trainer.drafters.peagle import PEagle

TOY = {"offsets": 3, "aux_layers": [0, 1], "markov_rank": 4, "init": "last_layer"}
STATES = torch.randn(6, 2 * SIZE, generator=torch.Generator().manual_seed(2))


def block(model, **changes):
    return Block(model, **knobs("dspark", **TOY | changes)).eval()


def qkv(layer, states):
    """A layer's own queries, keys and values (T, heads, c) of states, before they are turned."""
    attention, x = layer.self_attn, layer.input_layernorm(states)
    actual = [
        getattr(attention, f"{name}_proj")(x).unflatten(-1, (-1, attention.head_dim))
        for name in "qkv"
    ]
    if hasattr(attention, "q_norm"):
        actual[:2] = attention.q_norm(actual[0]), attention.k_norm(actual[1])
    return actual


@torch.no_grad()
def test_one_layer_is_the_targets_last_over_the_last_state_and_the_block():
    """Of Qwen3, whose layer is the block's."""
    model = qwen3()
    drafter, target = block(model, draft_layers=1), Target(model)
    ids = torch.tensor([4, 8, 2, 9, 1, 7, 5])
    update = TargetUpdate(STATES[:, :SIZE], STATES, ids[1:], ids[0])
    growth = drafter.grow(drafter.start(target), target, update)
    mask = int(drafter.mask_token)
    z = model.get_input_embeddings()(torch.tensor([5, mask, mask]))
    rows = torch.cat([STATES[:, SIZE:], z])[None]
    at = torch.arange(9)[None]
    sees = torch.ones(9, 9).tril()
    sees[6:, 6:] = 1
    out = model.model.layers[-1](
        rows,
        position_embeddings=model.model.rotary_emb(rows, at),
        attention_mask=torch.zeros(9, 9).masked_fill(sees == 0, -1e9)[None, None],
    )
    expected = model.model.norm(out if isinstance(out, torch.Tensor) else out[0])[0, 6:]
    torch.testing.assert_close(growth.u, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("kind", [llama, qwen3])
def test_layers_have_the_keys_and_values_of_the_targets_last_ones(kind):
    model = kind()
    drafter = block(model, draft_layers=2)
    c = drafter.context(STATES[None])
    turn = rotations(drafter.family, c, torch.zeros(1, 6, dtype=torch.long))  # turns nothing
    for ours, theirs in zip(drafter.blocks, model.model.layers, strict=True):
        q, k, v = qkv(theirs, STATES[:, SIZE:])
        keys, values = keys_values(ours, c, turn)
        torch.testing.assert_close(values[0], v.transpose(0, 1), rtol=1e-4, atol=1e-5)
        x = ours.input_layernorm(STATES[:, SIZE:])
        queries = ours.self_attn.q_proj(x).unflatten(-1, (-1, 8))
        pairs = ((ours.self_attn.q_norm(queries), q), (keys[0].transpose(0, 1), k))
        for (actual, own), name in zip(pairs, "qk", strict=True):
            if kind is llama:  # of one length here, and of the right one on average
                torch.testing.assert_close(
                    torch.nn.functional.normalize(actual, dim=-1),
                    torch.nn.functional.normalize(own, dim=-1),
                    rtol=1e-3,
                    atol=1e-4,
                )
                length = own.square().mean().sqrt()
                scale = getattr(ours.self_attn, f"{name}_norm").weight
                torch.testing.assert_close(scale, length.expand(8), rtol=0.25, atol=0)
            else:
                torch.testing.assert_close(actual, own, rtol=1e-4, atol=1e-5)
        for name in ("self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"):
            assert torch.equal(ours.get_submodule(name).weight, theirs.get_submodule(name).weight)
        after = ours.post_attention_layernorm.weight
        assert torch.equal(after, theirs.post_attention_layernorm.weight)
    assert torch.equal(drafter.norm.weight, model.model.norm.weight)


def test_what_is_no_such_layer_is_refused_with_the_way_out():
    narrow = llama()
    narrow.model.layers[0].mlp = type(narrow.model.layers[0].mlp)(
        llama(intermediate_size=40).config
    )
    for model, changes, text in (
        (
            narrow,
            {},
            r"mlp\.gate_proj\.weight is of shape \(40, 32\), .* \(48, 32\): set drafter\.i",
        ),
        (llama(), {"draft_layers": 3}, "last 3 layers, and LlamaForCausalLM has 2: set fewer"),
        (model_of("gemma"), {}, "GemmaForCausalLM's are of the kind gemma: set drafter.init=rand"),
        (model_of(hidden_act="gelu"), {}, "are of the kind gelu: set drafter.init=random"),
    ):
        with pytest.raises(DrafterError, match=text):
            block(model, **changes)
        block(model, **changes, init="random")
    with pytest.raises(DrafterError, match=r"mlp\.gate_proj\.weight is of shape"):
        PEagle(narrow, **knobs("peagle", draft_layers=2, init="last_layer"))


def test_peagles_layers_are_the_targets_last_ones():
    model = llama()
    expected = Eagle3(model, **knobs("eagle3", init="last_layer", draft_vocab_size=None)).state()
    changes = {"init": "last_layer", "draft_vocab_size": None}
    one = PEagle(model, **knobs("peagle", draft_layers=1, **changes))
    for name, tensor in expected.items():
        assert torch.equal(one.state()[name], tensor), name
    model = llama(num_hidden_layers=3)
    three = PEagle(model, **knobs("peagle", draft_layers=3, **changes))
    first, *others = model.model.layers
    v = three.midlayer.self_attn.v_proj.weight
    assert torch.equal(v, torch.nn.functional.pad(first.self_attn.v_proj.weight, (SIZE, 0)))
    assert torch.equal(three.midlayer.mlp.up_proj.weight, first.mlp.up_proj.weight)
    for ours, theirs in zip(three.more, others, strict=True):
        for name, tensor in ours.named_parameters():
            assert torch.equal(tensor, theirs.get_parameter(name)), name
    output, _ = output_of(APART, SIZE, 3 * SIZE)
    assert three.loss(output, Target(model), 5)[0].isfinite()


def test_a_model_without_weights_is_enough_for_the_sizes():
    with torch.device("meta"):
        model = toys.llama(torch.float32, **TINY)
    assert block(model, draft_layers=2).fc.weight.is_meta
    PEagle(model, **knobs("peagle", draft_layers=2, init="last_layer"))


@pytest.mark.parametrize("name", ["block.Block", "peagle.PEagle"])
def test_runs_and_folders_of_before_keep_their_random_start(name):
    old = {"_target_": f"trainer.drafters.{name}", "offsets": 2}
    config = {"drafter": old | {"init": "last_layer"}}
    history.adopt_layer(config, {"drafter": dict(old)})
    assert config["drafter"]["init"] == "random"
    config = {"drafter": old | {"init": "last_layer"}}
    history.adopt_layer(config, {"drafter": old | {"init": "random"}})
    assert config["drafter"]["init"] == "last_layer"  # and the run is refused as another one
    history.keep_head(old)
    assert old["init"] == "random"
