"""Medusa's heads with output layers of their own against plain loops in float64, and what its joint
training adds.

What all drafters keep, and the heads on the target's output head, are in test_heads.py.
"""

from __future__ import annotations

import inspect
import math

import pytest
import torch
import transformers
from omegaconf import OmegaConf

from tests.toys.finetuning import adapted
from tests.toys.heads import (
    APART,
    PACKED,
    ROWS,
    SIZE,
    SIZES,
    batch_of,
    hidden_states,
    llama,
    output_of,
    stirred,
)
from trainer.assembly.build import instantiate
from trainer.config import schema
from trainer.drafters import Drafter, DrafterError, Target, TargetOutput, TargetUpdate, io
from trainer.drafters.medusa import Medusa, ramp_factor
from trainer.models.losses import CausalLoss
from trainer.training.finetune import FineTune

SETTINGS = OmegaConf.to_container(OmegaConf.load(schema.CONF / "drafter" / "medusa.yaml"))


def make(model, **changes):
    return instantiate(SETTINGS | {"offsets": 3, "layers": 2, "weight": 0.7} | changes)(model=model)


def naive(w, head, blocks, hidden):
    """A head's logits (V,) at one position, from its weights."""
    for j in range(blocks):
        inner = w[f"heads.{head}.{j}.linear.weight"] @ hidden + w[f"heads.{head}.{j}.linear.bias"]
        hidden = hidden + inner / (1 + torch.exp(-inner))
    return w[f"heads.{head}.{blocks}.weight"] @ hidden


@pytest.mark.parametrize("packs", [APART, PACKED], ids=["apart", "packed"])
def test_loss_numbers_and_slopes_are_those_of_plain_loops(packs):
    model, hidden = llama(), hidden_states()
    drafter = stirred(make(model))
    total, numbers = drafter.loss(output_of(packs, hidden), Target(model), 4)
    total.backward()

    w = {name: tensor.double().requires_grad_(True) for name, tensor in drafter.state().items()}
    expected, reference = (
        torch.zeros(3, 5, dtype=torch.float64),
        torch.zeros((), dtype=torch.float64),
    )
    for states, (ids, first) in zip(hidden, ROWS, strict=True):
        for t in range(len(ids)):
            unbroken = True
            for k in (1, 2, 3):
                if t + 1 + k >= len(ids) or t + 1 + k < first:
                    unbroken = False
                    continue
                logits = naive(w, k - 1, 2, states[t].double())
                loss = torch.log(torch.exp(logits).sum()) - logits[ids[t + 1 + k]]
                better = int((logits > logits[ids[t + 1 + k]]).sum())
                unbroken = unbroken and better == 0
                expected[k - 1] += torch.tensor(
                    [loss.detach(), 1, better == 0, better < 5, unbroken]
                )
                reference = reference + 0.7 * 0.8**k * loss
    reference.backward()
    torch.testing.assert_close(numbers.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(total.detach().double(), reference.detach(), rtol=1e-5, atol=1e-5)
    for name, parameter in drafter.named_parameters():
        torch.testing.assert_close(parameter.grad.double(), w[name].grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "config",
    [
        transformers.LlamaConfig(**SIZES, tie_word_embeddings=True),
        transformers.CohereConfig(
            **{key: value for key, value in SIZES.items() if key != "head_dim"}, logit_scale=0.25
        ),
        transformers.GraniteConfig(
            **{key: value for key, value in SIZES.items() if key != "head_dim"}, logits_scaling=4.0
        ),
        transformers.Gemma2Config(**SIZES, final_logit_softcapping=3.0, query_pre_attn_scalar=8),
        transformers.PhiConfig(**{key: value for key, value in SIZES.items() if key != "head_dim"}),
    ],
    ids=lambda config: config.model_type,
)
@torch.no_grad()
def test_heads_start_as_a_copy_of_the_targets(config):
    """Scale, cap and bias of the output layer included; and the copy is no part of the target."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.get_output_embeddings().parameters():
        parameter.normal_(std=0.5)
    drafter, target = make(model), Target(model)
    hidden = torch.randn(1, 7, SIZE)
    reference = target.head(hidden)
    assert reference.std() > 0.1
    output = TargetOutput(
        hidden, *[torch.zeros(1, 7, dtype=torch.int64)] * 2, torch.arange(7)[None], hidden[:, :0]
    )
    for k, states in enumerate(drafter.states(output, target), 1):
        head, parameters = drafter.head_of(k, target)
        torch.testing.assert_close(head(states), reference)
        parameters[0].mul_(2)
        assert not torch.allclose(head(states), reference)
    torch.testing.assert_close(target.head(hidden), reference, rtol=0, atol=0)


@torch.no_grad()
def test_a_tree_has_the_heads_logits_and_runs_no_more_of_them_than_it_asks_for():
    model, hidden = llama(), hidden_states()[0]
    drafter, target = stirred(make(model)), Target(model)
    w = {name: tensor.double() for name, tensor in drafter.state().items()}
    reference = [naive(w, k, 2, hidden[-1].double()) for k in range(3)]
    ran = []
    for k, head in enumerate(drafter.heads):
        head[-1].register_forward_pre_hook(lambda *_, k=k: ran.append(k))
    growth = drafter.grow(
        drafter.start(target), target, TargetUpdate(hidden, hidden[:, :0], torch.arange(8))
    )
    assert (growth.depth, growth.branches, growth.vocabulary, growth.confidence) == (
        3,
        True,
        None,
        None,
    )
    torch.testing.assert_close(growth.first().double(), reference[0], rtol=1e-5, atol=1e-5)
    actual = growth.extend(torch.tensor([4, 9, 2]), torch.tensor([-1, -1, -1]))  # nodes 0, 1 and 2
    torch.testing.assert_close(actual.double(), reference[1].expand(3, -1), rtol=1e-5, atol=1e-5)
    assert ran == [0, 1]
    for parent in (1, 0):  # nodes 3 and 4
        deeper = growth.extend(torch.tensor([7]), torch.tensor([parent]))
        torch.testing.assert_close(deeper.double(), reference[2][None], rtol=1e-5, atol=1e-5)
    # a sibling that comes after deeper nodes
    late = growth.extend(torch.tensor([5]), torch.tensor([-1]))
    torch.testing.assert_close(late.double(), reference[1][None], rtol=1e-5, atol=1e-5)
    assert ran == [0, 1, 2]


def test_the_ramps():
    assert [ramp_factor(None, step, 4) for step in range(4)] == [1.0] * 4
    assert [ramp_factor("sine", step, 4) for step in range(5)] == pytest.approx(
        [math.sin(math.pi / 8), math.sin(math.pi / 4), math.sin(3 * math.pi / 8), 1, 1]
    )
    assert [ramp_factor(4, step, 100) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_the_heads_loss_rises_and_its_numbers_do_not():
    model = llama()
    drafter, target, output = (
        stirred(make(model, ramp="sine")),
        Target(model),
        output_of(PACKED, hidden_states()),
    )
    whole, numbers = drafter.loss(output, target, 4)
    drafter.on_step(1, 6)
    part, same = drafter.loss(output, target, 4)
    assert float(part.detach()) == pytest.approx(float(whole.detach()) * math.sin(math.pi / 6))
    assert torch.equal(numbers, same)


def test_a_run_tells_its_drafter_the_step():
    model = llama()
    adapter, model = adapted(model=model)
    reported = []

    class Watching(Drafter):
        def on_step(self, step, steps):
            reported.append((step, steps))

    module = FineTune(
        model,
        adapter,
        lambda groups: torch.optim.SGD(groups, lr=1.0),
        lambda step, steps: 1.0,
        7,
        False,
        2,
        0,
        None,
        8,
        False,
        3,
        repeat_smaller=False,
        drafter=Watching(),
    )
    module.step = 3
    module.on_train_batch_start({}, 1)
    assert reported == [(3, 7)]


@pytest.mark.long
@pytest.mark.parametrize("own_head", [True, False])
@pytest.mark.parametrize("detach", [True, False])
def test_the_adapter_learns_from_heads_only_where_it_may(own_head, detach):
    _, model = adapted(model=llama())
    drafter = stirred(make(model, own_head=own_head, detach=detach))

    def gradients(*more):
        model.zero_grad()
        CausalLoss(model, 4, *more)(batch_of(*PACKED))[0].backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}

    alone, together = gradients(), gradients(drafter, Target(model))
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in drafter.parameters())
    same = {name: torch.equal(alone[name], together[name]) for name in alone}
    assert all(same.values()) if detach else not any(same.values())


def test_a_batch_with_nothing_to_predict_gives_every_parameter_a_gradient():
    """Of zero: ranks without targets must not be waited for."""
    model = llama()
    drafter, hidden, ids = make(model), torch.randn(2, 2, SIZE), torch.ones(2, 2, dtype=torch.int64)
    total, numbers = drafter.loss(
        TargetOutput(hidden, ids, ids, torch.arange(2).expand(2, 2), hidden[:, :0]),
        Target(model),
        8,
    )
    total.backward()
    assert float(total.detach()) == 0.0
    assert not numbers.any()
    assert all(not p.grad.any() for p in drafter.parameters())


def test_half_precision_is_computed_from_whole_weights():
    model = llama(torch.bfloat16)
    drafter, whole = stirred(make(model)), stirred(make(llama()))
    whole.load_state(drafter.state())
    total, _ = drafter.loss(output_of(PACKED, hidden_states(), torch.bfloat16), Target(model), 4)
    reference, _ = whole.loss(output_of(PACKED, hidden_states()), Target(llama()), 4)
    total.backward()
    assert float(total.detach()) == pytest.approx(float(reference.detach()), rel=0.02)
    assert (
        {p.dtype for p in drafter.parameters()}
        == {p.grad.dtype for p in drafter.parameters()}
        == {torch.float32}
    )
    hidden = hidden_states()[0].bfloat16()
    actual = [
        one.grow(None, Target(model), TargetUpdate(hidden, hidden[:, :0], torch.arange(8))).first()
        for one in (drafter, drafter.bfloat16())  # the second, in bf16, as a decoder may have it
    ]
    assert {logits.dtype for logits in actual} == {torch.bfloat16}
    assert float((actual[0] - actual[1]).float().norm() / actual[0].float().norm()) < 0.03


def test_names_shapes_and_states(tmp_path):
    model = llama()
    one = stirred(make(model))
    shapes = {
        f"heads.{k}.{j}.linear.{name}": s
        for k in range(3)
        for j in range(2)
        for name, s in SHAPES.items()
    }
    shapes |= {f"heads.{k}.2.weight": (64, SIZE) for k in range(3)}
    assert {name: tuple(tensor.shape) for name, tensor in one.state().items()} == shapes
    with torch.device("meta"):
        skeleton = make(transformers.LlamaForCausalLM(model.config))
    assert {name: tuple(tensor.shape) for name, tensor in skeleton.state().items()} == shapes
    settings = SETTINGS | {"offsets": 3, "layers": 2}
    target = {
        "base": "some/base",
        "fingerprint": "abc",
        "run": "x",
        "step": 3,
        "hidden_size": SIZE,
        "vocab_size": 64,
    }
    io.save(one, settings, target, tmp_path)
    again = io.load(tmp_path, model, "abc")
    assert all(torch.equal(tensor, again.state()[name]) for name, tensor in one.state().items())
    assert make(model, own_head=False).state().keys() == {
        name for name in shapes if "linear" in name
    }
    with pytest.raises(DrafterError, match="other settings"):
        make(model, own_head=False).load_state(one.state())


SHAPES = {"weight": (SIZE, SIZE), "bias": (SIZE,)}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"offsets": 0}, "drafter.offsets=0"),
        ({"layers": 0}, "drafter.layers=0.*at least 1"),
        ({"weights": [1.0]}, "drafter.weights=.1.0. are 1, and drafter.offsets=3"),
        ({"ramp": 0}, "drafter.ramp=0: null, sine, or a number of steps"),
        ({"ramp": "cosine"}, "drafter.ramp=cosine"),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes, says):
    with pytest.raises(DrafterError, match=says):
        make(llama(), **changes)


def test_the_file_is_the_papers():
    assert (SETTINGS["offsets"], SETTINGS["layers"], SETTINGS["own_head"], SETTINGS["beta"]) == (
        5,
        1,
        True,
        0.8,
    )
    assert set(inspect.signature(Medusa).parameters) - {"model"} == SETTINGS.keys() - {
        "_target_",
        "_partial_",
    }
