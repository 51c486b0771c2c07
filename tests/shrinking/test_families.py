"""Laws of every family that can be shrunk: the walk's states, dropped layers, narrowed MLPs, zeros;
and the folder in stock transformers."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.toys.families import logits, model_of
from trainer.shrinking import drop_layers, narrow
from trainer.shrinking.drop_layers import Influence
from trainer.shrinking.families import FAMILIES, layers_of, linears_of, replace
from trainer.shrinking.narrow import Narrow
from trainer.shrinking.patterns import Pattern
from trainer.shrinking.sparse import Sparse
from trainer.shrinking.walk import Method, walk

CPU = torch.device("cpu")
ROWS = [torch.arange(3, 3 + count) for count in (9, 14, 9)]


class Seen(Method):
    """Notes the states after each layer."""

    changes = False

    def __init__(self):
        self.after, self.now = [], []

    def see(self, before, after):
        self.now.append(after)

    def change(self, layer):
        self.after.append(self.now)
        self.now = []
        return {}


@pytest.fixture(scope="module")
def models():
    """The families' models, each made once; tests copy them."""
    return {}


# One of each shape of a layer, or of its arguments; the others are slow tests.
OFTEN = ("cohere2", "gemma3_text", "gpt_neox", "llama", "opt", "phi3", "smollm3")


@pytest.fixture(
    params=[
        name if name in OFTEN else pytest.param(name, marks=pytest.mark.slow)
        for name in sorted(FAMILIES)
    ]
)
def family(request, models):
    """(name, a copy of the tiny model in fp32, its shape)."""
    name = request.param
    if name not in models:
        models[name] = model_of(name).float()
    return name, copy.deepcopy(models[name]), FAMILIES[name]


@torch.no_grad()
def test_the_walk_gives_the_models_own_states(family):
    _, model, shape = family
    layers, seen = layers_of(model, shape), Seen()
    expected = []
    handles = [
        layer.register_forward_hook(
            lambda _, __, out: expected.append(out[0] if isinstance(out, tuple) else out)
        )
        for layer in layers
    ]
    for row in ROWS:
        model(input_ids=row.unsqueeze(0), use_cache=False)
    for handle in handles:
        handle.remove()
    walk(model, layers, ROWS, seen, CPU)
    for index, states in enumerate(seen.after):
        for row, state in enumerate(states):
            assert torch.equal(state, expected[row * len(layers) + index])


@torch.no_grad()
def test_a_model_without_a_layer_is_the_model_that_skips_it(family, tmp_path):
    _, model, shape = family
    layers = layers_of(model, shape)
    skipping = copy.deepcopy(model)
    skipped = layers_of(skipping, shape)[0]
    kept = {}
    skipped.register_forward_pre_hook(lambda _, inputs: kept.update(state=inputs[0]))

    def same(_, __, out):
        return (kept["state"], *out[1:]) if isinstance(out, tuple) else kept["state"]

    skipped.register_forward_hook(same)
    expected = logits(skipping)
    drop_layers.drop(model, shape, [0])
    assert len(layers_of(model, shape)) == len(layers) - 1
    assert torch.allclose(logits(model), expected, atol=1e-6)
    assert torch.equal(logits(stock(model, tmp_path)), logits(model))


@pytest.mark.long
@torch.no_grad()
def test_a_narrowed_model_is_the_model_with_those_neurons_at_zero(family, tmp_path):
    name, model, shape = family
    if not shape.up:
        with pytest.raises(Exception, match=f"family '{name}' has the MLP's projections in one"):
            narrow.check(shape, name)
        return
    whole = copy.deepcopy(model)
    neurons = getattr(model.config, shape.width)
    kept = neurons // 2
    walk(model, layers_of(model, shape), ROWS, Narrow(kept, "activation_weight", shape), CPU)
    setattr(model.config, shape.width, kept)
    for layer in layers_of(whole, shape):  # in order: each sees the changed ones before it
        down, inputs = layer.get_submodule(shape.down), []
        handle = down.register_forward_pre_hook(lambda _, x, inputs=inputs: inputs.append(x[0]))
        for row in ROWS:
            whole(input_ids=row.unsqueeze(0), use_cache=False)
        handle.remove()
        h = torch.cat([x.flatten(0, -2) for x in inputs]).double()
        scores = [float(h[:, j].norm() * down.weight[:, j].double().norm()) for j in range(neurons)]
        for j in sorted(range(neurons), key=scores.__getitem__)[: neurons - kept]:
            down.weight[:, j] = 0
    assert torch.allclose(logits(model), logits(whole), atol=1e-5)
    assert torch.equal(logits(stock(model, tmp_path)), logits(model))


@torch.no_grad()
def test_every_linear_has_the_pattern_and_the_rest_stays(family):
    _, model, shape = family
    before = copy.deepcopy(model.state_dict())
    pattern = Pattern.of("2:4")
    layers = layers_of(model, shape)
    figures = walk(model, layers, ROWS, Sparse("wanda", pattern, "mlp", shape), CPU)
    assert [figure["density"] for figure in figures] == [0.5] * len(layers)
    pruned = {
        id(linear.weight) for layer in layers for linear in linears_of(layer, shape, "mlp").values()
    }
    for name, parameter in model.named_parameters():
        if id(parameter) in pruned:
            assert pattern.follows(parameter)
        else:
            assert torch.equal(parameter, before[name]), name
    parts = [set(linears_of(layers[0], shape, part)) for part in ("mlp", "attention", "all")]
    assert parts[0] | parts[1] == parts[2]
    assert parts[0]
    assert parts[1]


def stock(model, folder):
    """The model's folder as transformers loads it, with all of its weights."""
    model.save_pretrained(folder)
    loaded, info = AutoModelForCausalLM.from_pretrained(
        folder,
        output_loading_info=True,
        dtype=torch.float32,
        attn_implementation=model.config._attn_implementation,
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    return loaded.eval()


@torch.no_grad()
def test_influence_is_the_mean_angle_or_one_minus_the_cosine():
    model, shape = model_of("llama").float(), FAMILIES["llama"]
    for score in ("angular", "cosine"):
        figures = walk(model, layers_of(model, shape), ROWS, Influence(score), CPU)
        for index in range(len(layers_of(model, shape))):
            values = []
            for row in ROWS:
                states = model.model(
                    input_ids=row.unsqueeze(0), output_hidden_states=True, use_cache=False
                ).hidden_states
                if index + 1 == len(states) - 1:
                    break  # the last of them is normalised
                for a, b in zip(states[index][0], states[index + 1][0], strict=True):
                    cos = float(a.double() @ b.double() / a.double().norm() / b.double().norm())
                    angle = torch.tensor(cos).acos() / torch.pi
                    values.append(float(angle) if score == "angular" else 1 - cos)
            if values:
                expected = sum(values) / len(values)
                assert figures[index]["influence"] == pytest.approx(expected, abs=1e-5)
    assert drop_layers.least([{"influence": v} for v in (0.3, 0.1, 0.2, 0.05)], 2) == [1, 3]


def test_all_neurons_kept_is_the_same_weight_bit_for_bit():
    model, shape = model_of("llama").float(), FAMILIES["llama"]
    before = copy.deepcopy(model.state_dict())
    neurons = model.config.intermediate_size
    walk(model, layers_of(model, shape), ROWS, Narrow(neurons, "activation", shape), CPU)
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_layer_takes_tensors_of_other_sizes():
    layer = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.BatchNorm1d(6))
    replace(
        layer, {"0.weight": torch.ones(3, 4), "0.bias": torch.zeros(3), "1.weight": torch.ones(3)}
    )
    assert (layer[0].in_features, layer[0].out_features) == (4, 3)
    assert layer[0](torch.ones(1, 4)).tolist() == [[4.0, 4.0, 4.0]]
