"""EAGLE-1's head against a plain float64 reference with one dense mask, while training and while
decoding."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from tests.toys import adapters as toys
from tests.toys.eagle import (
    MODELS,
    SIZE,
    attended,
    by_row,
    drafts_as_it_trains,
    eagle,
    fed,
    knobs,
    llama,
    rms,
    stirred,
    token_of,
    weights_of,
)
from tests.toys.packed_rows import APART, PACKED, ROWS, output_of
from trainer.decoding import trees
from trainer.decoding.speculative import Strategy, generate
from trainer.drafters import DrafterError, Target, TargetOutput, TargetUpdate
from trainer.drafters.eagle import Eagle
from trainer.drafters.unrolled import attend
from trainer.models.losses import CausalLoss


def naive(w, model, hidden, ids, passes, window=None):
    """What each pass gives for the T slots of a row."""
    config, embedding = model.config, model.get_input_embeddings().weight.detach().double()
    keys, values, actual = [], [], []
    for k in range(passes):
        embedded = torch.stack([token_of(embedding, ids, t + 1 + k) for t in range(len(ids))])
        entering = torch.cat([embedded, hidden], 1) @ w["fc.weight"].T + w.get("fc.bias", 0)
        states = entering + attended(w, config, entering, k, keys, values, window)
        states = states + fed(
            w, rms(states, w["layers.0.post_attention_layernorm.weight"], config.rms_norm_eps)
        )
        actual.append(states)
        hidden = states.detach()
    return actual


def smooth_l1(a, b):
    apart = (a - b).abs()
    return torch.where(apart < 1, apart**2 / 2, apart - 0.5).mean()


@pytest.mark.long
@pytest.mark.parametrize("packs", [APART, PACKED], ids=["apart", "packed"])
@pytest.mark.parametrize(
    ("kind", "passes", "bias"),
    [("llama", 1, True), ("llama", 3, False), ("mistral", 3, True), ("eager", 3, False)],
)
def test_states_loss_and_gradient_are_those_of_the_reference(kind, passes, bias, packs):
    model = MODELS[kind]()
    drafter = eagle(model, offsets=passes, bias=bias, weights=[1.0, 0.5, 0.25][:passes], weight=0.7)
    target = Target(model)
    output, rows = output_of(packs, SIZE)
    w, window = weights_of(drafter), getattr(model.config, "sliding_window", None)
    reference = [
        naive(w, model, hidden.double(), ids, passes, window)
        for (hidden, _), (ids, _) in zip(rows, ROWS, strict=True)
    ]

    for k, states in enumerate(drafter.states(output, target)):
        assert states.isfinite().all()
        for row, actual in enumerate(by_row(packs, states)):
            there = max(0, len(actual) - 1 - k)
            torch.testing.assert_close(
                actual[:there].double(), reference[row][k][:there], rtol=1e-4, atol=1e-4
            )

    total, numbers = drafter.loss(output, target, 4)
    total.backward()
    table = model.get_output_embeddings().weight.detach().double()
    expected, counts = torch.zeros((), dtype=torch.float64), [0] * passes
    for (hidden, _), states, (ids, first) in zip(rows, reference, ROWS, strict=True):
        for k in range(passes):
            for t in range(len(ids)):
                if t + k + 2 < len(ids) and t + k + 2 >= first:
                    feature = hidden[t + k + 1].double()
                    p = torch.softmax(table @ feature, 0)
                    ce = -(p * torch.log_softmax(table @ states[k][t], 0)).sum()
                    expected = expected + 0.7 * 0.5**k * (
                        smooth_l1(states[k][t], feature) + 0.1 * ce
                    )
                    counts[k] += 1
    expected.backward()
    assert numbers[:, 1].tolist() == counts
    torch.testing.assert_close(total.double(), expected.detach(), rtol=1e-5, atol=1e-5)
    own = {name.replace("midlayer.", "layers.0."): p.grad for name, p in drafter.named_parameters()}
    assert own.keys() == w.keys()
    for name, gradient in own.items():
        torch.testing.assert_close(
            gradient.double(), w[name].grad, rtol=1e-3, atol=1e-3 * float(w[name].grad.abs().max())
        )


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_keys_of_one_place_only_are_attended_to_as_with_a_mask_for_all(dtype, tolerance):
    """Value and gradient, with scores of some ten, where rounding one by 2^-8 of itself would
    show."""
    draw, length, later = torch.Generator().manual_seed(2), 7, 3
    query = 3 * torch.randn(2, 4, length, 8, generator=draw)
    key, value = (
        size * torch.randn(2, 2, length * (1 + later), 8, generator=draw) for size in (3, 1)
    )
    mask = torch.rand(2, 1, length, length, generator=draw) < 0.6
    mask[..., 0] = True
    tensors = [one.to(dtype).requires_grad_(True) for one in (query, key, value)]
    layer = nn.Module()
    layer.num_key_value_groups = 2
    actual, _ = attend(layer, *tensors, mask, scaling=0.3)
    actual.float().pow(2).sum().backward()

    exact = [one.detach().double().requires_grad_(True) for one in tensors]
    whole = torch.cat(
        [mask, *[torch.eye(length, dtype=torch.bool).expand(2, 1, -1, -1)] * later], -1
    )
    keys, values = (one.repeat_interleave(2, 1) for one in exact[1:])
    scores = (0.3 * exact[0] @ keys.transpose(2, 3)).masked_fill(~whole, -math.inf)
    reference = (scores.softmax(-1) @ values).transpose(1, 2)
    reference.pow(2).sum().backward()
    assert scores.detach().max() > 10
    torch.testing.assert_close(actual.double(), reference, rtol=tolerance, atol=tolerance)
    for one, other in zip(tensors, exact, strict=True):
        largest = float(other.grad.abs().max())
        torch.testing.assert_close(
            one.grad.double(), other.grad, rtol=0, atol=2 * tolerance * largest
        )


@pytest.mark.parametrize("kind", MODELS)
def test_a_tree_is_drafted_as_passes_are_trained(kind):
    model = MODELS[kind]()
    with torch.no_grad():
        drafts_as_it_trains(eagle(model, offsets=4), model)


@pytest.mark.parametrize("shape", [None, trees.eagle2(3, 4, 12)], ids=["chain", "tree"])
def test_decoding_with_it_gives_the_targets_text(shape):
    model = llama()
    ids = torch.tensor([3, 1, 4, 1, 5])
    plain = generate(Target(model), None, ids, 12, [])
    actual = generate(Target(model), eagle(model), ids, 12, [], strategy=Strategy(shape))
    assert actual.tokens == plain.tokens
    assert max(proposed for proposed, _ in actual.drafts) > 1


def test_depth_is_a_knob_of_its_own():
    model = llama()
    assert (eagle(model, depth=5).depth, eagle(model, offsets=2, depth=None).depth) == (5, 2)
    with pytest.raises(DrafterError, match=r"drafter\.depth=0"):
        eagle(model, depth=0)


def test_noise_is_there_while_training_only_and_of_the_generator():
    model = llama()
    drafter, target = eagle(model, noise=0.5), Target(model)
    output, _ = output_of(APART, SIZE)

    def drawn(seed, training):
        torch.manual_seed(seed)
        with torch.no_grad():
            return next(iter(drafter.train(training).states(output, target)))

    assert torch.equal(drawn(1, True), drawn(1, True))
    assert not torch.allclose(drawn(1, True), drawn(2, True))
    assert torch.equal(drawn(1, False), drawn(2, False))
    zeros = torch.zeros(100, 40)
    noise = drafter.train().first_input(zeros, None)
    assert 0.24 < float(noise.abs().max()) <= 0.25
    assert abs(float(noise.mean())) < 0.01


def test_from_the_last_layer_it_starts_as_that_without_its_first_norm():
    model = llama()
    drafter, target = Eagle(model, **knobs("eagle", init="last_layer")).eval(), Target(model)
    output, rows = output_of(APART, SIZE)
    layer = model.model.layers[-1]
    layer.input_layernorm = nn.Identity()
    with torch.no_grad():
        states = next(iter(drafter.states(output, target)))
        for actual, (hidden, _) in zip(by_row(APART, states), rows, strict=True):
            hidden = hidden[None]
            at = torch.arange(hidden.shape[1])[None]
            reference = layer(
                hidden, position_embeddings=model.model.rotary_emb(hidden, at), attention_mask=None
            )
            torch.testing.assert_close(
                actual, (reference if isinstance(reference, torch.Tensor) else reference[0])[0]
            )


def test_bf16_states_train_fp32_weights():
    model = llama().bfloat16()
    drafter, target = eagle(model, offsets=2), Target(model)
    output, _ = output_of(PACKED, SIZE)
    output = TargetOutput(
        output.hidden.bfloat16(),
        output.ids,
        output.labels,
        output.positions,
        output.extra.bfloat16(),
    )
    total, _ = drafter.loss(output, target, 5)
    total.backward()
    assert all(
        p.dtype == p.grad.dtype == torch.float32 and p.grad.isfinite().all()
        for p in drafter.parameters()
    )
    tree = drafter.grow(
        drafter.start(target),
        target,
        TargetUpdate(output.hidden[0, :4], output.hidden[0, :4, :0], output.ids[0, 1:5]),
    )
    assert (
        tree.extend(torch.tensor([1, 2]), torch.tensor([-1, -1])).dtype
        == tree.first().dtype
        == torch.bfloat16
    )


def test_it_learns_what_the_target_does_next():
    """A row of a few tokens again and again: the next feature is soon known from the token."""
    model = llama()
    drafter = eagle(model, noise=0.0).train()
    ids = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6] * 4])
    batch = {"input_ids": ids, "labels": ids.clone()}
    loss = CausalLoss(model.requires_grad_(False), 64, drafter, Target(model))
    optimizer = torch.optim.AdamW(drafter.parameters(), 3e-3)
    actual = []
    for _ in range(25):
        total, sums = loss(batch)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        actual.append(sums["offsets"])
    assert float(actual[-1][0, 2]) > float(actual[0][0, 2])
    assert float(actual[-1][0, 5]) > float(actual[0][0, 5])


def test_its_state_is_named_as_engines_name_it_and_comes_back():
    model = llama()
    drafter, other = eagle(model), stirred(eagle(model), 9)
    state = {name: tensor.clone() for name, tensor in drafter.state().items()}
    names = (
        [f"self_attn.{n}_proj" for n in "qkvo"]
        + [f"mlp.{n}_proj" for n in ("gate", "up", "down")]
        + ["post_attention_layernorm"]
    )
    assert state.keys() == {"fc.weight"} | {f"layers.0.{name}.weight" for name in names}
    other.load_state(state)
    assert all(torch.equal(other.state()[name], tensor) for name, tensor in state.items())
    with pytest.raises(DrafterError, match=r"of another model or of other settings: fc\.weight"):
        other.load_state(state | {"fc.weight": torch.zeros(1)})


def test_models_that_it_cannot_be_built_for_are_named():
    with pytest.raises(DrafterError, match="drafter=none"):
        eagle(toys.gpt2(torch.float32))


def test_hass_adds_its_loss_to_that_between_distributions():
    model = llama()
    output, _ = output_of(APART, SIZE)
    losses = {}
    for name, settings in {
        "plain": {},
        "hass": {"topk": 5, "topk_weight": 2.0},
        "no features": {"feature_weight": 0.0, "token_weight": 1.0},
        "top alone": {"feature_weight": 0.0, "token_weight": 1.0, "topk": 5, "topk_weight": 2.0},
    }.items():
        torch.manual_seed(0)
        drafter = Eagle(model, **knobs("eagle", noise=0.0, **settings))
        losses[name] = float(drafter.loss(output, Target(model), 8)[0].detach())
    added = losses["hass"] - losses["plain"]
    assert added > 0
    assert added == pytest.approx(losses["top alone"] - losses["no features"], rel=1e-4)
    with pytest.raises(DrafterError, match=r"topk=null"):
        Eagle(model, **knobs("eagle", token_weight=0.0, topk=5))
