"""Predicted acceptance: its loss against plain float64 loops over positions, what it says of a
tree's nodes, and drafts that it ends."""

from __future__ import annotations

import logging
import math

import pytest
import torch

from tests.toys.eagle import by_row, knobs, llama, made, stirred
from tests.toys.eagle3 import COUNTS, FEATURES
from tests.toys.packed_rows import APART, PACKED, ROWS, output_of
from trainer.decoding import trees
from trainer.decoding.drawing import Drawing
from trainer.decoding.policies import refusal_policy
from trainer.decoding.speculative import Strategy, generate
from trainer.drafters import DrafterError, Target, TargetOutput, TargetUpdate, io, metrics
from trainer.drafters.eagle import Eagle
from trainer.drafters.eagle3 import Eagle3
from trainer.drafters.hydra import Hydra
from trainer.exporting import draft_head

SIZE, K = 32, 3
METHODS = {
    "eagle": (Eagle, {}),
    "eagle3": (Eagle3, {"draft_vocab_size": 44, "coverage": 0.5}),
    "hydra": (Hydra, {"loss": "ce"}),
    "shared": (Hydra, {"loss": "kl", "own_head": False, "layers": 2}),
}


def settings_of(name, **changes):
    file = "hydra" if name == "shared" else name
    return knobs(
        file, **{"offsets": K, "weight": 0.7, "confidence": 0.4} | METHODS[name][1] | changes
    )


def make(model, name, **changes):
    drafter = made(METHODS[name][0], model, **settings_of(name, **changes))
    drafter.calibrate(lambda: COUNTS)
    return drafter


def features_of(name):
    return FEATURES if name == "eagle3" else 0


def without(drafter):
    drafter.confidence = None
    return drafter


def chance(w, k, z):
    """σ of the head for offset k, or of the only one, on one state."""
    at = f"confidence.{k - 1}" if f"confidence.{k - 1}.3.weight" in w else "confidence.0"
    for j in range(3):
        inner = w[f"{at}.{j}.linear.weight"] @ z + w[f"{at}.{j}.linear.bias"]
        z = z + inner / (1 + torch.exp(-inner))
    return 1 / (1 + torch.exp(-(w[f"{at}.3.weight"][0] @ z + w[f"{at}.3.bias"][0])))


@pytest.mark.long
@pytest.mark.parametrize("packs", [APART, PACKED], ids=["apart", "packed"])
@pytest.mark.parametrize("name", METHODS)
def test_its_loss_is_that_of_plain_loops_and_reaches_nothing_else(name, packs):
    model = llama()
    drafter, plain, target = make(model, name), without(make(model, name)), Target(model)
    output, rows = output_of(packs, SIZE, features_of(name))
    total, numbers = drafter.loss(output, target, 4)
    total.backward()
    alone, before = plain.loss(output, target, 4)
    alone.backward()

    w = {
        n: p.detach().double().requires_grad_(True)
        for n, p in drafter.named_parameters()
        if n.startswith("confidence.")
    }
    table = model.get_output_embeddings().weight.detach().double()
    with torch.no_grad():
        states = [by_row(packs, one) for one in drafter.states(output, target)]
    heads, stored, weights = drafter.draft_heads(target), drafter.vocabulary, drafter.weights
    expected, apart = torch.zeros((), dtype=torch.float64), torch.zeros(K, dtype=torch.float64)
    outside = 0
    for row, (ids, first) in enumerate(ROWS):
        for k in range(1, K + 1):
            for t in range(len(ids)):
                if t + k + 1 >= len(ids) or t + k + 1 < first:
                    continue
                p = torch.softmax(table @ rows[row][0][t + k].double(), 0)
                with torch.no_grad():
                    q = torch.softmax(
                        heads[(k - 1) % len(heads)](states[k - 1][row][t][None])[0].double(), 0
                    )
                outside += stored is not None and int(p.argmax()) not in stored.tolist()
                alpha = torch.minimum(p if stored is None else p[stored], q).sum()
                c = chance(w, k, states[k - 1][row][t].double())
                expected = expected - 0.4 * weights[k - 1] * (
                    alpha * torch.log(c) + (1 - alpha) * torch.log(1 - c)
                )
                apart[k - 1] += (c - alpha).abs().detach()
    expected.backward()
    assert outside > 0 or stored is None
    torch.testing.assert_close((total - alone).double(), expected.detach(), rtol=1e-4, atol=1e-4)
    assert numbers.shape == (K, 8)
    assert torch.equal(numbers[:, :7], before)
    torch.testing.assert_close(numbers[:, 7].double(), apart, rtol=1e-4, atol=1e-5)
    others = dict(plain.named_parameters())
    for n, p in drafter.named_parameters():
        if n in w:
            torch.testing.assert_close(
                p.grad.double(), w[n].grad, rtol=1e-3, atol=1e-3 * float(w[n].grad.abs().max())
            )
        elif p.requires_grad:
            assert torch.equal(p.grad, others[n].grad), n
    actual = metrics(numbers)
    assert actual["offset2/confidence_error"] == pytest.approx(
        float(apart[1] / numbers[1, 1]), rel=1e-4
    )
    assert actual.keys() - metrics(before).keys() == {
        f"offset{k}/confidence_error" for k in range(1, K + 1)
    }
    assert actual["expected"] == metrics(before)["expected"]


def row_of(name, known=6):
    """(the target's states at `known` positions, those of `layers`, the tokens up to the one after
    them)."""
    draw = torch.Generator().manual_seed(3)
    hidden, more = (
        torch.randn(known, SIZE, generator=draw),
        torch.randn(known, features_of(name), generator=draw),
    )
    return hidden, more, torch.randint(0, 64, (known + 1,), generator=draw)


def grown(drafter, target, name):
    hidden, more, ids = row_of(name)
    return drafter.grow(drafter.start(target), target, TargetUpdate(hidden, more, ids[1:], ids[0]))


@pytest.mark.parametrize("name", METHODS)
@torch.no_grad()
def test_nodes_have_the_chance_that_is_trained_for_what_they_are_drawn_from(name):
    model = llama()
    drafter, target = make(model, name), Target(model)
    hidden, more, ids = row_of(name)
    growth, known, paths = grown(drafter, target, name), len(hidden), [()]
    growth.first()
    assert growth.confidence is None
    w = {n: p.double() for n, p in drafter.state().items()}
    actual = []
    for parents, tokens in (([-1, -1], [3, 9]), ([1, 0, 1], [7, 1, 4])):
        growth.extend(torch.tensor(tokens), torch.tensor(parents))
        assert growth.confidence.shape == (len(tokens),)
        for parent, token, text in zip(parents, tokens, growth.confidence, strict=True):
            above = paths[parent + 1]
            paths.append((*above, token))
            row = torch.cat([ids, torch.tensor(above, dtype=torch.long)])[None]
            later = torch.zeros(len(above) + 1, SIZE + features_of(name))
            states = torch.cat([torch.cat([hidden, more], 1), later]).split(
                [SIZE, features_of(name)], 1
            )
            at = torch.arange(row.shape[1])[None]
            output = TargetOutput(
                states[0][None],
                row,
                row,
                at,
                states[0][None, :0],
                states[1][None] if name == "eagle3" else None,
            )
            z = list(drafter.states(output, target))[len(above)][0, known - 1]
            actual.append(float(text))
            assert float(text) == pytest.approx(
                float(chance(w, len(above) + 1, z.double())), abs=1e-5
            )
    # children of one node are drawn from the same logits
    assert actual[0] == pytest.approx(actual[1])
    # of the newest token and of both its children
    assert len({round(one, 4) for one in actual}) == 3


def forced(drafter, *chances):
    """Heads that always say the same, the last one for all others."""
    with torch.no_grad():
        for i, head in enumerate(drafter.confidence):
            text = chances[min(i, len(chances) - 1)]
            head[-1].weight.zero_()
            head[-1].bias.fill_(math.log(text / (1 - text)))
    return drafter


@pytest.mark.parametrize(
    ("name", "chances", "threshold", "length"),
    [
        ("eagle", (0.8,), 0.4, 3),  # 1 - 0.8^3 = 0.488
        ("eagle", (0.8,), 0.5, 4),  # 1 - 0.8^4 = 0.59
        ("eagle", (0.5,), 0.4, 1),
        ("eagle3", (0.8,), 0.4, 3),
        ("hydra", (0.9, 0.5), 0.2, 2),  # 1 - 0.9 = 0.1, 1 - 0.45 = 0.55
        ("hydra", (0.9, 0.9, 0.5), 0.2, 3),
    ],
)
def test_drafts_end_where_a_refusal_is_likely_enough(name, chances, threshold, length):
    model = llama()
    drafter, target = forced(make(model, name, offsets=6, confidence=1.0), *chances), Target(model)

    def drafted(policy):
        return len(trees.chain(6, policy)(grown(drafter, target, name), Drawing(64, 6)).tokens)

    assert drafted(None) == 6
    assert drafted(refusal_policy(threshold)) == length


@pytest.mark.parametrize("shape", ["chain", "eagle2"])
@pytest.mark.parametrize("name", METHODS)
def test_decoding_with_drafts_that_it_ends_gives_the_targets_text(name, shape):
    model = llama(initializer_range=0.5)  # whose text does not repeat one token
    drafter, target = make(model, name, offsets=4), Target(model)
    # Predictions that differ, so that some drafts are ended and some are not.
    with torch.no_grad():
        states = list(drafter.states(output_of(APART, SIZE, features_of(name))[0], target))
        for head, read in zip(drafter.confidence, states, strict=False):
            logits = head(read)
            head[-1].weight.mul_(2 / logits.std())
            head[-1].bias.sub_(logits.mean()).mul_(2 / logits.std()).add_(1)

    went_on, reported = [], refusal_policy(0.5)

    def policy(*level):
        went_on.append(reported(*level))
        return went_on[-1]

    how = trees.chain(4, policy) if shape == "chain" else trees.eagle2(3, 4, 12, policy)
    written = set()
    for ids in ([3, 1, 4, 1, 5], [9, 2, 6]):
        plain = generate(target, None, torch.tensor(ids), 8, [])
        assert (
            generate(target, drafter, torch.tensor(ids), 8, [], strategy=Strategy(how)).tokens
            == plain.tokens
        )
        written |= set(plain.tokens)
    assert len(written) > 5
    assert set(went_on) == {True, False}


def test_it_starts_at_a_usual_acceptance_and_leaves_the_draft_as_it_is():
    model = llama()
    made_so = []
    for confidence in (None, 1.0):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(4)
            made_so.append(Eagle(model, **settings_of("eagle", confidence=confidence)))
    plain, drafter = made_so
    assert drafter.state().keys() - plain.state().keys() == {
        n for n in drafter.state() if n.startswith("confidence.")
    }
    assert all(torch.equal(drafter.state()[n], tensor) for n, tensor in plain.state().items())
    assert drafter.predicted(1, torch.randn(5, SIZE)).tolist() == pytest.approx([0.7] * 5)
    assert plain.predicted(1, torch.randn(5, SIZE)) is None
    assert sum(len(group["params"]) for group in drafter.parameter_groups()) == len(
        list(drafter.parameters())
    )


def test_it_learns_what_is_taken():
    model = llama()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(4)  # so that positions differ
    drafter, target = make(model, "shared", confidence=1.0), Target(model)
    output, _ = output_of(APART, SIZE)
    drafter.requires_grad_(False).confidence.requires_grad_(True)
    optimizer = torch.optim.AdamW(drafter.confidence.parameters(), 5e-3)
    actual = []
    for _ in range(25):
        total, numbers = drafter.loss(output, target, 64)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        actual.append([metrics(numbers)[f"offset{k}/confidence_error"] for k in (1, 2, 3)])
    assert all(last < 0.4 * first for first, last in zip(actual[0], actual[-1], strict=True))


def test_rows_without_a_trained_token_give_it_a_gradient_of_zero():
    model = llama()
    drafter, ids = make(model, "eagle"), torch.tensor([[1, 2]])
    output = TargetOutput(
        torch.randn(1, 2, SIZE),
        ids,
        torch.full_like(ids, -100),
        torch.arange(2)[None],
        torch.zeros(1, 0, SIZE),
    )
    total, numbers = drafter.loss(output, Target(model), 4)
    total.backward()
    assert (float(total.detach()), metrics(numbers)) == (0, {})
    assert all((p.grad == 0).all() for p in drafter.confidence.parameters())


@pytest.mark.parametrize("name", ["eagle3", "hydra"])
def test_bf16_states_train_fp32_heads(name):
    model = llama().bfloat16()
    drafter, target = make(model, name), Target(model)
    output, _ = output_of(PACKED, SIZE, features_of(name))
    features = None if output.features is None else output.features.bfloat16()
    output = TargetOutput(
        output.hidden.bfloat16(),
        output.ids,
        output.labels,
        output.positions,
        output.extra.bfloat16(),
        features,
    )
    drafter.loss(output, target, 5)[0].backward()
    assert all(
        p.dtype == p.grad.dtype == torch.float32 and p.grad.isfinite().all()
        for p in drafter.confidence.parameters()
    )
    hidden, more, ids = row_of(name)
    growth = drafter.bfloat16().grow(
        drafter.start(target),
        target,
        TargetUpdate(hidden.bfloat16(), more.bfloat16(), ids[1:], ids[0]),
    )
    assert growth.extend(torch.tensor([1, 2]), torch.tensor([-1, -1])).dtype == torch.bfloat16
    assert growth.confidence.dtype == torch.float32
    assert ((growth.confidence > 0) & (growth.confidence < 1)).all()


@pytest.mark.parametrize("name", METHODS)
def test_its_folder_comes_back(name, tmp_path):
    model = llama()
    drafter = make(model, name)
    module = METHODS[name][0]
    node = {"_target_": f"{module.__module__}.{module.__name__}", "_partial_": True} | settings_of(
        name
    )
    sizes = model.config
    io.save(
        drafter,
        node,
        {"base": "x", "hidden_size": sizes.hidden_size, "vocab_size": sizes.vocab_size},
        tmp_path,
    )
    again = io.load(tmp_path, model)
    assert again.state().keys() == drafter.state().keys()
    assert all(torch.equal(again.state()[n], tensor) for n, tensor in drafter.state().items())
    assert any(n.startswith("confidence.") for n in drafter.state())
    states = torch.randn(4, SIZE)
    assert torch.equal(again.predicted(2, states), drafter.predicted(2, states))
    with pytest.raises(DrafterError, match=r"of other settings: confidence\.0\.0\.linear\.bias"):
        make(model, name, confidence=None).load_state(drafter.state())


@pytest.mark.parametrize("name", ["eagle", "eagle3"])
def test_engines_layouts_leave_it_out_and_say_so(name, caplog):
    model = llama()
    drafter = stirred(make(model, name), 9)
    with caplog.at_level(logging.WARNING, logger="trainer"):
        head = draft_head.canonical(drafter, model)
    assert "drafter.confidence) is left out" in caplog.text
    caplog.clear()
    plain = draft_head.canonical(without(drafter), model)
    assert caplog.text == ""
    assert head.own == plain.own
    assert head.tensors.keys() == plain.tensors.keys()
    assert all(torch.equal(head.tensors[n], tensor) for n, tensor in plain.tensors.items())


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("eagle", {"confidence": 0.0}, r"drafter\.confidence=0\.0: expected a weight above 0"),
        ("eagle3", {"confidence": -1.0}, r"drafter\.confidence=-1\.0: expected a weight above 0"),
        ("hydra", {"confidence": math.nan}, r"drafter\.confidence=nan: expected a weight above 0"),
        (
            "hydra",
            {"loss": "labels"},
            r"drafter\.confidence=0\.4, and with drafter\.loss=labels .* set drafter\.loss=ce",
        ),
    ],
)
def test_knobs_that_do_not_fit_are_named(name, changes, message):
    with pytest.raises(DrafterError, match=message):
        make(llama(), name, **changes)
