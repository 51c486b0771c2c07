"""Kangaroo against its formulas in plain float64, and its drafts against whole texts without a
cache."""

from __future__ import annotations

import math

import pytest
import torch

from tests.toys.drafted_text import (
    PROMPTS,
    TOKENS,
    check_lossless,
    tokens_of_a_step,
    train,
    written,
)
from tests.toys.eagle import MODELS, SIZE, knobs, llama, made, rms, rotated
from tests.toys.packed_rows import APART, PACKED, ROWS, output_of
from trainer.decoding import trees
from trainer.decoding.policies import confidence_policy
from trainer.decoding.speculative import generate
from trainer.drafters import DrafterError, Target, TargetUpdate, io
from trainer.drafters.kangaroo import Kangaroo, first_layers
from trainer.models.heads import captured_layers, decoder_of

K = 3


def kangaroo(model, **changes):
    return made(Kangaroo, model, **knobs("kangaroo", **({"offsets": K, "depth": 4} | changes)))


def adapted(drafter, f):
    """m (T, d) of the states f (T, d) of one row."""
    w = {name: tensor.double() for name, tensor in drafter.state().items()}
    config = drafter.family.config
    eps, size, theta = config.rms_norm_eps, config.head_dim, config.rope_parameters["rope_theta"]
    places = list(range(len(f)))
    x = rms(f, w["layer.input_layernorm.weight"], eps)

    def heads(name):
        return (x @ w[f"layer.self_attn.{name}_proj.weight"].T).unflatten(-1, (-1, size))

    q = rotated(heads("q").transpose(0, 1), places, theta)
    k = rotated(heads("k").transpose(0, 1), places, theta)
    v = heads("v").transpose(0, 1)
    groups = len(q) // len(k)
    k, v = k.repeat_interleave(groups, 0), v.repeat_interleave(groups, 0)
    scores = q @ k.transpose(1, 2) / math.sqrt(size)
    scores = scores.masked_fill(torch.ones(len(f), len(f)).triu(1).bool(), -math.inf)
    mixed = (scores.softmax(-1) @ v).transpose(0, 1).flatten(1)
    f = f + mixed @ w["layer.self_attn.o_proj.weight"].T
    return rms(f, w["norm.weight"], eps)


@pytest.mark.parametrize("packs", [APART, PACKED], ids=["apart", "packed"])
def test_loss_and_numbers_are_those_of_a_loop_over_rows(packs):
    model = llama()
    drafter = kangaroo(model, weight=0.7)
    output, states = output_of(packs, SIZE, SIZE)
    total, numbers = drafter.loss(output, Target(model), 3)
    head = model.get_output_embeddings().weight.detach().double()
    expected, counts = 0.0, torch.zeros(K, 7, dtype=torch.float64)
    for (ids, first), (hidden, f) in zip(ROWS, states, strict=True):
        m = adapted(drafter, f.double())
        for t in range(len(ids)):
            unbroken = product = 1.0
            for k in range(1, K + 1):
                goal = t + 1 + k
                if goal >= len(ids) or goal < first:
                    unbroken = product = 0.0  # a draft is whole from its first token on
                    continue
                p = torch.softmax(head @ hidden[goal - 1].double(), 0)
                q = torch.softmax(head @ m[goal - 1], 0)
                alpha, ce = float(torch.minimum(p, q).sum()), -float((p * q.log()).sum())
                expected += 0.7 * ce if k == 1 else 0.0
                best = float(p.argmax() == q.argmax())
                among = float(int(p.argmax()) in q.topk(5).indices.tolist())
                unbroken, product = unbroken * best, product * alpha
                counts[k - 1] += torch.tensor([ce, 1, best, among, unbroken, alpha, product])
    assert float(total.detach()) == pytest.approx(expected, rel=1e-4)
    torch.testing.assert_close(numbers.double(), counts, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def whole(drafter, model, text):
    """The logits after each token of a text, without any cache."""
    decoder = decoder_of(model)
    with captured_layers(decoder, drafter.layers) as states:
        decoder(input_ids=torch.tensor([text]))
    return model.get_output_embeddings()(adapted(drafter, states[0][0].double()).float())


@torch.no_grad()
@pytest.mark.parametrize("kind", MODELS)
def test_trees_are_drafted_as_whole_texts_whatever_was_accepted_before(kind):
    model = MODELS[kind]()
    drafter, target = kangaroo(model), Target(model)
    memory, text, nothing = drafter.start(target), [5], torch.zeros(0, 0)
    for step, fresh in enumerate(([9, 13, 7, 30], [2], [8, 8, 1, 40])):
        text += fresh
        first = None if step else torch.tensor(5)
        update = TargetUpdate(nothing, nothing, torch.tensor(fresh), first)
        growth = drafter.grow(memory, target, update)
        torch.testing.assert_close(
            growth.first(), whole(drafter, model, text)[-1], rtol=1e-4, atol=1e-4
        )
        paths = []
        for parents, tokens in (([-1, -1], [3, 9]), ([0, 1, 1], [7, 1, 7]), ([3], [4])):
            logits = growth.extend(torch.tensor(tokens), torch.tensor(parents))
            for row, (parent, token) in enumerate(zip(parents, tokens, strict=True)):
                paths.append([*(paths[parent] if parent >= 0 else []), token])
                expected = whole(drafter, model, text + paths[-1])[-1]
                torch.testing.assert_close(logits[row], expected, rtol=1e-4, atol=1e-4)
    assert memory.length == len(text)
    assert len(decoder_of(model).layers) == 2


SHAPES = {
    "chain": None,
    "chain that ends early": trees.chain(4, confidence_policy(0.6)),
    "static": trees.Levels([(0,), (1,), (0, 0), (0, 1), (1, 0)]),
    "eagle2": trees.eagle2(3, 3, 8),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_texts_are_the_targets(shape):
    model = llama()
    check_lossless(kangaroo(model), Target(model), SHAPES[shape])


def test_it_learns_what_the_target_does_next():
    model = llama()
    target = Target(model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        drafter = Kangaroo(model, **knobs("kangaroo", offsets=K, depth=4))
    text, output = written(target, drafter.layers)
    before = tokens_of_a_step(drafter, output, target)
    untrained = len(generate(target, drafter, PROMPTS[0], TOKENS, []).drafts)
    train(drafter, output, target, 80, 1e-2)
    after = tokens_of_a_step(drafter, output, target)
    result = generate(target, drafter, PROMPTS[0], TOKENS, [])
    assert after > before + 0.8
    assert result.tokens == text
    assert len(result.drafts) < untrained - 5


def test_its_folder_gives_it_back(tmp_path):
    model = llama()
    drafter = kangaroo(model)
    settings = {"_target_": "trainer.drafters.kangaroo.Kangaroo", "_partial_": True}
    io.save(drafter, settings | knobs("kangaroo"), {}, tmp_path / "draft")
    other = kangaroo(model, depth=2)
    io.fill(other, tmp_path / "draft")
    for name, tensor in drafter.state().items():
        assert torch.equal(tensor, other.state()[name]), name
    assert not any("mlp" in name for name in drafter.state())


def test_layers_that_are_not_there_are_refused():
    model = llama()
    with pytest.raises(DrafterError, match=r"drafter\.exit=2: .* has 2: expected 1 \.\. 1"):
        kangaroo(model, exit=2)
    assert kangaroo(model).exit == 1
    with pytest.raises(ValueError, match="stop"), first_layers(decoder_of(model), 1):
        raise ValueError("stop")
    assert len(decoder_of(model).layers) == 2
