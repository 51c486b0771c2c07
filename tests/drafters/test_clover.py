"""Clover-2 against its formulas, one row at a time as plain matrices."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from tests.toys.eagle import MODELS, SIZE, knobs, llama, made, rms
from tests.toys.packed_rows import APART, PACKED, ROWS, output_of
from tests.toys.speculative import tiny
from trainer.decoding import trees
from trainer.decoding.sampling import Sampling
from trainer.decoding.speculative import Strategy, generate
from trainer.drafters import Target, TargetUpdate
from trainer.drafters.clover import Clover

K = 3


def clover(model, **changes):
    return made(Clover, model, **knobs("clover", **({"offsets": K} | changes)))


def regressive(w, name, heads, eps, x, e):
    def linear(part, v):
        return v @ w[f"{name}.{part}.weight"].T + w[f"{name}.{part}.bias"]

    q, k = linear("q", rms(x, w[f"{name}.norm.weight"], eps)), linear("k", e)
    v, width, out = linear("v", e), SIZE // heads, x.clone()
    for head in range(heads):
        at = slice(head * width, (head + 1) * width)
        dot = (q[:, at] * k[:, at]).sum(-1)
        gamma = dot / (q[:, at].norm(dim=-1) * k[:, at].norm(dim=-1))
        out[:, at] += v[:, at] * gamma[:, None]
    return out


@torch.no_grad()
def naive_states(drafter, model, h, ids):
    """z_1 .. z_K (K, T, d) of a row; only positions whose tokens exist count."""
    w, config = dict(drafter.named_parameters()), model.config
    eps, heads = config.rms_norm_eps, config.num_attention_heads
    table = model.get_output_embeddings().weight
    length, result = len(ids), []

    def ahead(k):
        e = torch.zeros(length, SIZE)
        for t in range(length - k):
            e[t] = table[ids[t + k]]
        return e

    s = regressive(w, "before", heads, eps, h, ahead(1))[None]
    places = torch.arange(length)[None]
    around = model.model.rotary_emb(s, places)
    causal = torch.full((1, 1, length, length), float("-inf")).triu(1)
    for block in drafter.blocks:
        s = block(s, attention_mask=causal, position_ids=places, position_embeddings=around)
        s = s[0] if isinstance(s, tuple) else s
    m = rms(s[0], w["norm.weight"], eps)
    for k in range(1, drafter.offsets + 1):
        if k == 1:
            x = m @ w["first_input.weight"].T + w["first_input.bias"]
        else:
            m = regressive(w, "after", heads, eps, m, ahead(k))
            both = torch.cat([m, ahead(k)], -1)
            x = both @ w["later_input.weight"].T + w["later_input.bias"]
        result.append(rms(x, w["head_norm.weight"], eps))
    return torch.stack(result)


def with_features(packs):
    output, states = output_of(packs, SIZE, SIZE)
    return output, states


@pytest.mark.parametrize("packs", [APART, PACKED], ids=["apart", "packed"])
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_loss_is_that_of_the_formulas(kind, packs):
    model = MODELS[kind]()
    drafter = clover(model, weight=0.7).eval()
    output, states = with_features(packs)
    total, numbers = drafter.loss(output, Target(model), 3)
    head = model.get_output_embeddings().weight.detach()
    expected, counts = torch.zeros(()), torch.zeros(K, 2)
    for (ids, first), (f, h) in zip(ROWS, states, strict=True):
        z = naive_states(drafter, model, h, ids)
        for k in range(1, K + 1):
            for t in range(len(ids) - 1 - k):
                if t + k + 1 < first:
                    continue
                p = torch.softmax(head @ f[t + k], 0)
                q = torch.log_softmax(head @ z[k - 1, t], 0)
                ce = -(p * q).sum()
                near = F.smooth_l1_loss(z[k - 1, t], f[t + k])
                expected += 0.7 * 0.7 ** (k - 1) * (10 * near + ce)
                counts[k - 1] += torch.tensor([1.0, float(torch.minimum(p, q.exp()).sum())])
    torch.testing.assert_close(total.detach(), expected, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(numbers[:, 1], counts[:, 0])
    torch.testing.assert_close(numbers[:, 5], counts[:, 1], rtol=1e-4, atol=1e-4)


def test_decoding_predicts_what_training_did():
    model = llama()
    drafter, target = clover(model), Target(model)
    text = [5, 9, 3, 7, 11, 13, 2, 8, 21, 4]
    h = torch.randn(len(text), SIZE, generator=torch.Generator().manual_seed(1))
    memory, read = drafter.start(target), 0
    for length in (3, 4, 6):  # tokens with a state
        ids = torch.tensor(text[read + 1 : length + 1])
        first = torch.tensor(text[0]) if not read else None
        update = TargetUpdate(h[read:length], h[read:length], ids, first)
        growth, read = drafter.grow(memory, target, update), length
        expected = naive_states(drafter, model, h, text)[:, length - 1]
        got = [growth.first()]
        for depth, token in enumerate(text[length + 1 : length + K]):
            # with a sibling before it, which must not matter
            both = growth.extend(torch.tensor([1, token]), torch.tensor([2 * depth - 1] * 2))
            got.append(both[1])
        reference = target.head(expected)
        torch.testing.assert_close(torch.stack(got), reference, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "mistral, a window of 6"])
def test_the_text_is_the_targets(kind):
    model = tiny(kind)
    drafter, target = clover(model), Target(model)
    prompt = torch.tensor([5, 9, 13, 7, 30, 22, 11])
    plain = generate(target, None, prompt, 24, [])
    for shape in (trees.chain(K), trees.Levels([(0,), (1,), (0, 0), (0, 1), (1, 0), (0, 0, 0)])):
        result = generate(target, drafter, prompt, 24, [], Sampling(), Strategy(shape))
        assert result.tokens == plain.tokens


def test_it_starts_near_the_target_and_learns():
    """At the start z_1 is nearly the final norm of a copy of the last layer's output."""
    model = llama()
    torch.manual_seed(0)
    drafter = Clover(model, **knobs("clover", offsets=K))
    eye = drafter.first_input.weight.detach() - torch.eye(SIZE)
    assert 0.004 < float(eye.abs().max()) <= 0.005
    assert abs(float(eye.sum(1).mean())) < 0.01
    output, _ = with_features(APART)
    optimizer = torch.optim.Adam(drafter.parameters(), lr=3e-3)
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        total, _ = drafter.loss(output, Target(model), 64)
        total.backward()
        optimizer.step()
        losses.append(float(total.detach()))
    assert losses[-1] < 0.8 * losses[0]
    assert all(p.grad is not None for p in drafter.parameters())
