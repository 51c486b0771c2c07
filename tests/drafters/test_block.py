"""Block drafters against a loop over anchors in plain float64, one block at a time without any
mask."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from tests.toys import adapters as toys
from tests.toys.drafted_text import check_it_learns, check_lossless
from tests.toys.eagle import SIZE, TINY, knobs, llama, made, rms, rotated
from tests.toys.packed_rows import APART, PACKED, ROWS, output_of
from trainer.decoding import trees
from trainer.decoding.policies import refusal_policy
from trainer.drafters import DrafterError, Target, TargetUpdate, io
from trainer.drafters.block import Block, context_layers

FEATURES = 3 * SIZE
# the changes of dspark's file that give a kind of block
OF = {
    "dspark": {},
    "dflash": {"markov_rank": 0, "confidence": None, "ce": 1.0, "l1": 0.0},
    "gated": {"markov": "gated"},
    "rnn": {"markov": "rnn"},
    "drafted": {"draft_vocab_size": 40, "coverage": 0.0},
    "drafted head": {"draft_vocab_size": 40, "coverage": 0.0, "train_head": True},
}
COUNTS = torch.arange(64) * 37 % 64  # the most frequent 40 tokens are spread over all
TOY = {"offsets": 3, "aux_layers": [0, 1, 2], "markov_rank": 6, "draft_layers": 2}


def block(model, name="dspark", **changes):
    drafter = made(Block, model, **knobs(name, **(TOY | changes)))
    if drafter.vocabulary is not None:
        drafter.calibrate(lambda: COUNTS)
    return drafter


def slots(drafter, model, context, tokens, place, anchor):
    """u (K, d) of one block, from the context's states (s, f) before the anchor."""
    w = {name: tensor.double() for name, tensor in drafter.state().items()}
    config = drafter.family.config
    eps, size = config.rms_norm_eps, config.head_dim
    theta = config.rope_parameters["rope_theta"]
    table = model.get_input_embeddings().weight.detach().double()
    count = drafter.offsets
    mask = int(drafter.mask_token)
    z = table[torch.tensor([tokens[anchor], *[mask] * (count - 1)])]
    c = rms(context.double() @ w["fc.weight"].T, w["context_norm.weight"], eps)
    places = [*range(place - len(context), place), *range(place, place + count)]
    for n in range(len(drafter.blocks)):
        p = {k.removeprefix(f"blocks.{n}."): v for k, v in w.items() if f"blocks.{n}." in k}
        x = rms(z, p["input_layernorm.weight"], eps)
        both = torch.cat([c, x])

        def heads(states, name, normed, p=p):
            out = (states @ p[f"self_attn.{name}_proj.weight"].T).unflatten(-1, (-1, size))
            return rms(out, p[f"self_attn.{name}_norm.weight"], eps) if normed else out

        q = rotated(heads(x, "q", True).transpose(0, 1), places[len(context) :], theta)
        k = rotated(heads(both, "k", True).transpose(0, 1), places, theta)
        v = heads(both, "v", False).transpose(0, 1)
        groups = len(q) // len(k)
        k, v = k.repeat_interleave(groups, 0), v.repeat_interleave(groups, 0)
        mixed = torch.softmax(q @ k.transpose(1, 2) / math.sqrt(size), -1) @ v
        z = z + mixed.transpose(0, 1).flatten(1) @ p["self_attn.o_proj.weight"].T
        x = rms(z, p["post_attention_layernorm.weight"], eps)
        gate = torch.nn.functional.silu(x @ p["mlp.gate_proj.weight"].T)
        z = z + (gate * (x @ p["mlp.up_proj.weight"].T)) @ p["mlp.down_proj.weight"].T
    return rms(z, w["norm.weight"], eps)


def corrections(w, kind, u, tokens):
    """What the Markov head adds to the logits of slots k = 0, 1 .. with the states u, whose tokens
    before are `tokens`."""
    y = w["markov.w1.weight"][torch.tensor(tokens)]
    rank, actual, s = y.shape[1], [], torch.zeros(y.shape[1], dtype=torch.float64)
    for k in range(len(tokens)):
        read = y[k]
        if kind == "gated":
            gate = w["markov.mix.weight"] @ torch.cat([u[k], y[k]]) + w["markov.mix.bias"]
            read = y[k] / (1 + torch.exp(-gate))
        if kind == "rnn":
            out = w["markov.mix.weight"] @ torch.cat([s, y[k], u[k]]) + w["markov.mix.bias"]
            keep = 1 / (1 + torch.exp(-out[:rank]))
            read = torch.tanh(out[2 * rank :])
            s = keep * s + (1 - keep) * torch.tanh(out[rank : 2 * rank])
        actual.append(w["markov.w2.weight"] @ read)
    return actual


def naive(drafter, model, states):
    """(loss, numbers) of all anchors of all rows."""
    w = {name: tensor.double() for name, tensor in drafter.state().items()}
    head = model.get_output_embeddings().weight.detach().double()
    drafted, own = range(len(head)), head
    if "lm_head.weight" in w:
        drafted, own = w["t2d"].nonzero()[:, 0].tolist(), w["lm_head.weight"]
    total = torch.zeros((), dtype=torch.float64)
    numbers = torch.zeros(drafter.offsets, 7, dtype=torch.float64)
    errors = torch.zeros(drafter.offsets, dtype=torch.float64)
    for (ids, first), (hidden, more) in zip(ROWS, states, strict=True):
        trained = [at > 0 and at >= first for at in range(len(ids))]
        for anchor in range(len(ids) - 1):
            if not (trained[anchor] and trained[anchor + 1]):
                continue
            u = slots(drafter, model, more[:anchor], ids, anchor, anchor)
            unbroken = product = 1.0
            before = ids[anchor : anchor + drafter.offsets]
            added = [0.0] * len(before)
            if drafter.markov is not None:
                added = corrections(w, drafter.markov.kind, u, before)
            for k in range(drafter.offsets):
                goal = anchor + 1 + k
                if goal >= len(ids):
                    break
                p = torch.softmax(head @ hidden[goal - 1].double(), 0)
                q = torch.softmax(own @ u[k] + added[k], 0)
                wide = torch.zeros_like(p)
                wide[torch.tensor(drafted)] = q
                alpha = torch.minimum(p, wide).sum()
                inside = p[torch.tensor(drafted)]
                ce = -(inside / inside.sum() * q.log()).sum()
                loss = drafter.ce * ce + drafter.l1 * (p - wide).abs().sum()
                # the target's best token cannot be drafted: the slot has no loss
                loss = loss * (int(p.argmax()) in drafted)
                weight = drafter.weights[k]
                total = total + weight * loss
                best = int(wide.argmax()) == int(p.argmax())
                unbroken, product = unbroken * best, product * float(alpha)
                among = int(p.argmax()) in [drafted[i] for i in q.topk(5).indices.tolist()]
                numbers[k] += torch.tensor(
                    [float(loss), 1, best, among, unbroken, float(alpha), product]
                )
                if drafter.confidence is not None:
                    z = torch.cat([u[k], w["markov.w1.weight"][ids[goal - 1]]])
                    c = torch.sigmoid(w["confidence.weight"][0] @ z + w["confidence.bias"][0])
                    bce = -(alpha * c.log() + (1 - alpha) * (1 - c).log())
                    total = total + drafter.confidence_weight * weight * bce
                    errors[k] += abs(float(c) - float(alpha))
    return total, numbers, errors


@pytest.mark.parametrize(
    ("name", "packs"),
    [
        *((name, packs) for name in ("dspark", "dflash") for packs in (APART, PACKED)),
        ("gated", PACKED),
        ("rnn", PACKED),
        ("drafted", PACKED),
        ("drafted head", APART),
    ],
)
def test_loss_and_numbers_are_those_of_a_loop_over_anchors(name, packs):
    model = llama()
    drafter = block(model, **OF[name], weight=0.7)
    output, states = output_of(packs, SIZE, FEATURES)
    total, numbers = drafter.eval().loss(output, Target(model), 3)
    expected, counts, errors = naive(drafter, model, states)
    torch.testing.assert_close(total.detach().double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(numbers[:, :7].double(), counts, rtol=1e-4, atol=1e-4)
    if name != "dflash":
        torch.testing.assert_close(numbers[:, 7].double(), errors, rtol=1e-4, atol=1e-4)
    assert counts[0, 1] > counts[2, 1] > 0
    trained, again = drafter.train().loss(output, Target(model), 3)  # with anchors enough for all
    torch.testing.assert_close(trained.detach(), total.detach(), rtol=1e-5, atol=1e-5)
    assert torch.equal(again[:, 1], numbers[:, 1])


@pytest.mark.parametrize("kind", ["dspark", "drafted head"])
def test_gradients_are_those_of_finite_differences(kind):
    model = llama()
    # The acceptance head's targets have no gradient, though they change with the parameters.
    drafter, target = block(model, **OF[kind], confidence=None).eval(), Target(model)
    output, _ = output_of(PACKED, SIZE, FEATURES)
    drafter.loss(output, target, 4)[0].backward()
    draw = torch.Generator().manual_seed(2)
    for name in (
        "fc.weight",
        "blocks.1.self_attn.k_proj.weight",
        "markov.w1.weight",
        "norm.weight",
        *(["lm_head.weight", "markov.w2.weight"] if "head" in kind else []),
    ):
        parameter = dict(drafter.named_parameters())[name]
        way = torch.randn(parameter.shape, generator=draw)
        slope = float((parameter.grad * way).sum())
        with torch.no_grad():
            parameter += 1e-3 * way
            up = float(drafter.loss(output, target, 4)[0])
            parameter -= 2e-3 * way
            down = float(drafter.loss(output, target, 4)[0])
            parameter += 1e-3 * way
        assert (up - down) / 2e-3 == pytest.approx(slope, rel=2e-2, abs=3e-2)


def test_nothing_at_or_after_an_anchor_reaches_its_block():
    model = llama()
    drafter, target = block(model).eval(), Target(model)
    output, _ = output_of(PACKED, SIZE, FEATURES)
    at = torch.tensor([[2, 4], [3, 6]])
    before = drafter.slots(output, target, at)
    changed = output.features.clone()
    ids = output.ids.clone()
    for row, places in enumerate(at.tolist()):
        changed[row, places[1] :] += 1.0
        ids[row, places[1] + 1 :] = 1
    after = drafter.slots(replace(output, features=changed, ids=ids), target, at)
    # Keys that no query sees have weight 0; a kernel may group the other terms differently.
    torch.testing.assert_close(before, after, rtol=1e-4, atol=1e-5)
    changed[:, 1] += 1.0  # the check notices what a block may read
    other = drafter.slots(replace(output, features=changed), target, at)
    assert float((before - other).detach().abs().max()) > 1e-2


def test_fewer_anchors_stand_for_all():
    model = llama()
    drafter = block(model, anchors=2).train()
    output, _ = output_of(APART, SIZE, FEATURES)
    torch.manual_seed(0)
    sums = torch.zeros(len(APART))
    seen = [set() for _ in APART]
    for _ in range(60):
        at, real, share = drafter.anchors_of(output)
        assert at.shape == (len(APART), 2)
        assert (at[:, 1:] > at[:, :-1])[real[:, 1:]].all()
        sums = real.sum(1) * share
        for row in range(len(APART)):
            seen[row] |= set(at[row][real[row]].tolist())
    valid = [len(ids) - 1 - first for ids, first in ROWS]
    assert sums.tolist() == valid
    assert [len(places) for places in seen] == valid
    fixed = [drafter.eval().anchors_of(output)[0] for _ in range(2)]
    assert torch.equal(*fixed)


def test_rows_without_trained_tokens_have_a_loss_of_zero_and_all_gradients():
    model = llama()
    drafter = block(model).train()
    output, _ = output_of(APART, SIZE, FEATURES)
    output = replace(output, labels=torch.full_like(output.labels, -100))
    total, numbers = drafter.loss(output, Target(model), 4)
    total.backward()
    assert float(total.detach()) == 0.0
    assert not numbers.any()
    used = {name for name, p in drafter.named_parameters() if p.grad is not None}
    assert {"fc.weight", "norm.weight", "blocks.0.mlp.up_proj.weight"} <= used


def test_a_context_that_grows_is_that_of_all_at_once():
    model = llama()
    drafter, target = block(model).eval(), Target(model)
    draw = torch.Generator().manual_seed(3)
    hidden = torch.randn(12, SIZE, generator=draw)
    states = torch.randn(12, FEATURES, generator=draw)
    ids = torch.randint(0, 64, (13,), generator=draw)
    whole, parts = drafter.start(target), drafter.start(target)
    at_once = drafter.grow(whole, target, TargetUpdate(hidden, states, ids[1:], ids[0]))
    start = 0
    for count in (3, 1, 5, 3):
        part = slice(start, start + count)
        update = TargetUpdate(hidden[part], states[part], ids[1:][part], ids[0])
        growth = drafter.grow(parts, target, update)
        start += count
    torch.testing.assert_close(growth.u, at_once.u, rtol=1e-5, atol=1e-5)
    for (keys, values), (others, more) in zip(whole, parts, strict=True):
        torch.testing.assert_close(keys, others, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(values, more, rtol=1e-5, atol=1e-5)
        assert keys.shape[2] == 12
    expected = slots(drafter, model, states, [0] * 12 + [int(ids[-1])], 12, 12)
    torch.testing.assert_close(at_once.u.double(), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", ["dspark", "gated", "rnn", "drafted"])
def test_a_tree_is_drafted_as_blocks_are_trained(name):
    model = llama()
    drafter, target = block(model, **OF[name]).eval(), Target(model)
    draw = torch.Generator().manual_seed(3)
    states = torch.randn(5, FEATURES, generator=draw)
    hidden, ids = states[:, :SIZE], torch.tensor([4, 8, 2, 9, 1, 7])
    growth = drafter.grow(
        drafter.start(target), target, TargetUpdate(hidden, states, ids[1:], ids[0])
    )
    w = {name: tensor.double() for name, tensor in drafter.state().items()}
    u = slots(drafter, model, states, ids.tolist(), 5, 5)
    head = model.get_output_embeddings().weight.double()
    if name == "drafted":
        head = head[COUNTS >= 64 - 40]
        assert torch.equal(growth.vocabulary, (COUNTS >= 64 - 40).nonzero()[:, 0])

    def logits(k, *before):
        return head @ u[k] + corrections(w, drafter.markov.kind, u, before)[k]

    def sure(k, before):
        z = torch.cat([u[k], w["markov.w1.weight"][before]])
        return torch.sigmoid(w["confidence.weight"][0] @ z + w["confidence.bias"][0])

    torch.testing.assert_close(growth.first().double(), logits(0, 7), rtol=1e-5, atol=1e-5)
    second = growth.extend(torch.tensor([3, 5]), torch.tensor([-1, -1]))
    for row, token in enumerate((3, 5)):
        torch.testing.assert_close(second[row].double(), logits(1, 7, token), rtol=1e-5, atol=1e-5)
    assert growth.confidence.tolist() == pytest.approx([float(sure(0, 7))] * 2, rel=1e-4)
    third = growth.extend(torch.tensor([6]), torch.tensor([1]))
    torch.testing.assert_close(third[0].double(), logits(2, 7, 5, 6), rtol=1e-5, atol=1e-5)
    assert growth.confidence.tolist() == pytest.approx([float(sure(1, 5))], rel=1e-4)


SHAPES = {
    "chain": None,
    "short chain": trees.chain(2),
    "static": trees.Levels([(0,), (1,), (0, 0), (0, 1), (1, 0)]),
    "eagle2": trees.eagle2(3, 3, 8),
    "dyspec": trees.dyspec(6),
    "refusal": trees.chain(3, refusal_policy(0.5)),
}


@pytest.mark.parametrize(
    ("name", "shape"),
    [(name, shape) for name in ("dspark", "dflash") for shape in SHAPES]
    + [("rnn", "eagle2"), ("drafted", "chain"), ("drafted", "eagle2")],
)
def test_texts_are_the_targets(name, shape):
    model = llama()
    drafter, target = block(model, **OF[name]).eval(), Target(model)
    alone, together = check_lossless(drafter, target, SHAPES[shape])
    assert together.drafts == alone.drafts


def test_it_learns_what_the_target_does_next():
    model = llama()
    check_it_learns(block(model, markov_rank=8), Target(model))


def test_the_states_that_are_read():
    assert context_layers(36, None) == (2, 10, 18, 26, 34)
    assert context_layers(30, None) == (2, 9, 15, 21, 28)
    assert context_layers(2, None) == (1, 2)
    assert context_layers(4, [0, 4]) == (0, 4)
    for wrong in ([], [2, 1], [5], [-1]):
        with pytest.raises(DrafterError, match="aux_layers"):
            context_layers(4, wrong)


@pytest.mark.parametrize("name", ["dspark", "drafted"])
def test_its_folder_gives_it_back(tmp_path, name):
    model = llama()
    drafter = block(model, **OF[name])
    drafter.calibrate(lambda: torch.tensor([1] * 60 + [0, 3, 0, 2]))
    assert int(drafter.mask_token) == 62
    settings = {"_target_": "trainer.drafters.block.Block", "_partial_": True}
    io.save(drafter, settings | knobs("dspark", **TOY, **OF[name]), {}, tmp_path / "draft")
    other = block(model, **OF[name])
    io.fill(other, tmp_path / "draft")
    for name, tensor in drafter.state().items():
        assert torch.equal(tensor, other.state()[name]), name


def test_bad_settings_are_refused_with_the_way_out():
    model = llama()
    for settings, text in (
        ({"markov_rank": 0}, r"confidence=1\.0 reads the Markov head"),
        ({"ce": 0.0, "l1": 0.0}, "leave no loss"),
        ({"mask_token": 64}, r"the model has tokens 0 \.\. 63"),
        ({"offsets": 0}, r"drafter\.offsets=0"),
        ({"markov": "lstm"}, "markov=lstm: one of vanilla, gated, rnn"),
        ({"train_head": True}, "train_head=true trains the rows of a draft vocabulary"),
        ({"draft_vocab_size": 8}, r"draft_vocab_size=8: these tokens are .* set \d+ tokens"),
        ({**OF["dflash"], "markov": "rnn"}, "drafter.markov=rnn is a kind of Markov head, and"),
    ):
        with pytest.raises(DrafterError, match=text):
            block(model, **settings)
    with pytest.raises(DrafterError, match="is trained 3 times"):
        block(model, mask_token=5).calibrate(lambda: torch.full((64,), 3))
    with pytest.raises(DrafterError, match="name one"):
        block(model).calibrate(lambda: torch.full((64,), 3))


def test_it_can_be_made_without_weights():
    with torch.device("meta"):
        model = toys.llama(torch.float32, **TINY)
        drafter = Block(model, **knobs("dspark", **TOY))
    assert all(parameter.device.type == "meta" for parameter in drafter.parameters())
