"""Distillation in chunks against plain float64 autograd over whole distributions, one position at a
time."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.toys import adapters as toys
from tests.toys.packed_rows import APART, PACKED, ROWS, numbers_of, output_of
from trainer.drafters import DrafterError, Target, TargetOutput, metrics
from trainer.drafters.distillation import KINDS, Distillation, Shared, chunked_distillation
from trainer.drafters.distilled import Distilled
from trainer.models.heads import captured_layers

SIZE, VOCABULARY = 6, 24
SOME = torch.tensor([0, 2, 3, 5, 7, 8, 11, 12, 13, 17, 20, 21])  # a draft vocabulary


def material(count, heads, vocabulary, seed=0):
    draw = torch.Generator().manual_seed(seed)
    width = VOCABULARY if vocabulary is None else len(vocabulary)
    hidden = torch.randn(3, count, SIZE, generator=draw)
    teacher = torch.randn(count, SIZE, generator=draw)
    weights = torch.rand(3, count, generator=draw) * (torch.rand(3, count, generator=draw) < 0.8)
    return (
        hidden,
        teacher,
        weights,
        torch.randn(VOCABULARY, SIZE, generator=draw),
        torch.randn(heads, width, SIZE, generator=draw),
    )


@pytest.mark.parametrize("chunk", [4, 50])
@pytest.mark.parametrize("vocabulary", [None, SOME], ids=["all", "some"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["ce", "kl"])
def test_the_quick_way_gives_what_the_plain_one_gives(kind, dtype, vocabulary, chunk):
    hidden, teacher, weights, table, own = material(11, 1, vocabulary)
    results = []
    for fast in (True, False):
        weight, leaf = nn.Parameter(own[0].clone()), hidden.to(dtype).requires_grad_(True)
        head = lambda h, w=weight: h @ w.to(h.dtype).T  # noqa: E731
        how = Distillation(kind, lambda h: h @ table.to(h.dtype).T, (head,), vocabulary, fast=fast)
        assert how.quick is fast
        total, actual = chunked_distillation(
            leaf, teacher.to(dtype), weights, how, chunk, (weight,)
        )
        total.backward()
        results.append((total.detach(), actual, leaf.grad, weight.grad))
    for quick, plain in zip(*results, strict=True):
        torch.testing.assert_close(
            quick, plain, **({} if dtype is torch.float32 else {"rtol": 1e-2, "atol": 1e-3})
        )
    assert torch.equal(results[0][1][1:3], results[1][1][1:3])
    assert float(results[0][1][3].min()) >= 0


@pytest.mark.parametrize("chunk", [2, 4, 50])
@pytest.mark.parametrize("vocabulary", [None, SOME], ids=["all", "some"])
@pytest.mark.parametrize("kind", ["ce", "ce_l1"])
def test_a_teacher_that_predictions_share_is_asked_once(kind, vocabulary, chunk):
    hidden, teacher, weights, table, own = material(11, 1, vocabulary)
    places = torch.tensor([7, 3, 3, 9, 0, 3, 7, 7, 7, 9, 3])  # of the first of three heads' rows
    shared, order, different = Shared.by_place(places, torch.device("cpu"))
    assert different.tolist() == [0, 3, 7, 9]
    assert places[order].tolist() == different[shared.teacher].tolist() == sorted(places.tolist())
    asked = []

    def whole(h):
        asked.append(len(h))
        return h @ table.T

    results = []
    for together in (shared, None):
        weight, leaf = nn.Parameter(own[0].clone()), hidden[:1].clone().requires_grad_(True)
        how = Distillation(kind, whole, (lambda h, w=weight: h @ w.T,), vocabulary)
        at = different if together is not None else places[order]
        asked.clear()
        total, numbers = chunked_distillation(
            leaf, teacher[at], weights[:1], how, chunk, (weight,), together
        )
        (2.0 * total).backward()
        results.append((total.detach(), numbers, leaf.grad, weight.grad))
        assert sum(asked) == len(at)
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


def test_the_quick_way_holds_where_probabilities_vanish():
    logits = torch.tensor([[0.0, 200.0, -200.0, 5.0], [3.0, 3.0, 3.0, 3.0], [-1e4, 1e4, 0.0, 0.0]])
    teacher = torch.tensor([[300.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 300.0], [-1e4, 1e4, 0.0, 0.0]])
    for vocabulary in (None, torch.tensor([0, 1, 3])):
        how = Distillation("kl", lambda h: h, (lambda h: h,), vocabulary, top=2)
        truth = how.truth(teacher)
        drafted = logits if vocabulary is None else logits[:, vocabulary]
        quick = how.quickly(truth, drafted, [])[:3]
        for actual, expected in zip(quick, how.loss(truth.p, drafted.log_softmax(-1)), strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("chunk", [4, 50])
@pytest.mark.parametrize("vocabulary", [None, SOME], ids=["all", "some"])
@pytest.mark.parametrize(
    ("kind", "heads"), [*((kind, 1) for kind in KINDS), ("ce", 3), ("lk_hybrid", 3)]
)
def test_value_and_gradient_are_those_of_whole_distributions(kind, heads, vocabulary, chunk):
    hidden, teacher, weights, table, own = material(11, heads, vocabulary)
    tables = [nn.Parameter(one) for one in own.clone()]
    how = Distillation(
        kind,
        lambda h: h @ table.T,
        tuple(lambda h, w=w: h @ w.T for w in tables),
        vocabulary,
        eta=2.0,
        top=5,
    )
    leaf = hidden.clone().requires_grad_(True)
    total, actual = chunked_distillation(leaf, teacher, weights, how, chunk, tuple(tables))
    (3.0 * total).backward()

    plain, exact = hidden.double().requires_grad_(True), own.double().requires_grad_(True)
    expected, counts = (
        torch.zeros((), dtype=torch.float64),
        torch.zeros(4, 3, 11, dtype=torch.float64),
    )
    left_out = 0
    for k in range(3):
        for i in range(11):
            p = torch.softmax(table.double() @ teacher[i].double(), 0)
            logits = exact[k % heads] @ plain[k, i]
            loss, accepted, best = numbers_of(kind, p, torch.softmax(logits, 0), vocabulary, 2.0)
            left_out += loss is None
            if loss is not None:
                expected = expected + weights[k, i].double() * loss
            ranked = logits.argsort(descending=True)
            ranked = (ranked if vocabulary is None else vocabulary[ranked]).tolist()
            counts[:, k, i] = torch.tensor(
                [
                    0.0 if loss is None else float(loss.detach()),
                    ranked[0] == best,
                    best in ranked[:5],
                    accepted.detach(),
                ]
            )
    (3.0 * expected).backward()
    assert left_out == 0 if vocabulary is None else 0 < left_out < 33

    torch.testing.assert_close(total.double(), expected.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(leaf.grad.double(), plain.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        torch.stack([w.grad for w in tables]).double(), exact.grad, rtol=1e-4, atol=2e-5
    )
    skipped = torch.stack(
        [(weights[:, i // chunk * chunk : (i // chunk + 1) * chunk] == 0).all() for i in range(11)]
    )
    torch.testing.assert_close(actual.double(), counts * ~skipped, rtol=1e-5, atol=1e-5)
    assert not actual.requires_grad


@pytest.mark.parametrize("vocabulary", [None, SOME], ids=["all", "some"])
def test_the_top_k_loss_is_that_of_a_loop_over_the_likeliest_tokens(vocabulary):
    hidden, teacher, weights, table, own = material(9, 1, vocabulary)
    how = Distillation(
        "ce", lambda h: h @ table.T, (lambda h: h @ own[0].T,), vocabulary, topk=3, topk_weight=2.5
    )
    leaf = hidden.clone().requires_grad_(True)
    total, counts = chunked_distillation(leaf, teacher, weights, how, 4)
    total.backward()

    plain = hidden.double().requires_grad_(True)
    expected = torch.zeros((), dtype=torch.float64)
    for k in range(3):
        for i in range(9):
            p = torch.softmax(table.double() @ teacher[i].double(), 0)
            q = torch.softmax(own[0].double() @ plain[k, i], 0)
            ce, _, _ = numbers_of("ce", p, q, vocabulary, 0.0)
            if ce is None:
                continue
            drafted = p if vocabulary is None else p[vocabulary] / p[vocabulary].sum()
            likely = sorted(range(len(drafted)), key=lambda x: -float(drafted[x]))[:3]
            top = -sum(drafted[x] * q[x].log() for x in likely)
            expected = expected + weights[k, i].double() * (ce + 2.5 * top)
    expected.backward()
    torch.testing.assert_close(total.detach().double(), expected.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(leaf.grad.double(), plain.grad, rtol=1e-4, atol=1e-5)
    without = Distillation("ce", how.head, how.heads, vocabulary, fast=False)
    assert torch.equal(counts, chunked_distillation(leaf, teacher, weights, without, 4)[1])


def test_the_top_k_loss_of_all_tokens_is_the_cross_entropy():
    hidden, teacher, weights, table, own = material(9, 1, None)
    heads = (lambda h: h @ table.T, (lambda h: h @ own[0].T,))
    results = []
    for how in (
        Distillation("ce", *heads, topk=VOCABULARY, topk_weight=1.0),
        Distillation("ce", *heads, fast=False),
    ):
        leaf = hidden.clone().requires_grad_(True)
        total, _ = chunked_distillation(leaf, teacher, weights, how, 50)
        total.backward()
        results.append((total.detach(), leaf.grad))
    (both, slope), (once, half) = results
    torch.testing.assert_close(both, 2 * once)
    torch.testing.assert_close(slope, 2 * half, rtol=1e-5, atol=1e-6)


def test_what_is_not_trained_gets_no_gradient_and_costs_none():
    hidden, teacher, weights, table, own = material(5, 1, None)
    asked = []

    def head(h):
        asked.append(h.requires_grad)
        return h @ own[0].T

    how = Distillation("kl", lambda h: h @ table.T, (head,))
    total, _ = chunked_distillation(hidden, teacher, weights, how, 2)
    assert not total.requires_grad
    leaf = hidden.clone().requires_grad_(True)
    with torch.no_grad():
        again, _ = chunked_distillation(leaf, teacher, weights, how, 2, (nn.Parameter(own),))
    assert not again.requires_grad
    assert not any(asked)
    assert float(total) == float(again)


def test_without_positions_there_is_a_gradient_of_zero():
    how = Distillation(
        "ce",
        lambda h: h @ torch.ones(SIZE, VOCABULARY),
        (lambda h: h @ torch.ones(SIZE, VOCABULARY),),
    )
    leaf, parameter = torch.zeros(2, 0, SIZE, requires_grad=True), nn.Parameter(torch.ones(3))
    total, actual = chunked_distillation(
        leaf, torch.zeros(0, SIZE), torch.zeros(2, 0), how, 4, (parameter,)
    )
    total.backward()
    assert float(total.detach()) == 0.0
    assert actual.shape == (4, 2, 0)
    assert leaf.grad.shape == leaf.shape
    assert parameter.grad.tolist() == [0, 0, 0]


@pytest.mark.parametrize("kind", KINDS)
def test_a_teacher_that_gives_the_draft_vocabulary_no_chance_leaves_no_nan(kind):
    """exp(-200) is 0 in fp32."""
    table = torch.zeros(VOCABULARY, SIZE)
    table[1, 0] = 200.0  # token 1 is not of the draft vocabulary
    how = Distillation(
        kind, lambda h: h @ table.T, (lambda h: h @ torch.ones(SIZE, len(SOME)),), SOME
    )
    # the second position's chances are equal, and token 0, the first of them, is of it
    teacher = torch.eye(SIZE)[:2]
    leaf = torch.zeros(1, 2, SIZE, requires_grad=True)
    total, actual = chunked_distillation(leaf, teacher, torch.ones(1, 2), how, 8)
    total.backward()
    assert actual.isfinite().all()
    assert leaf.grad.isfinite().all()
    assert actual[0, 0, 0] == actual[3, 0, 0] == 0
    assert float(actual[3, 0, 1]) == pytest.approx(0.5)


@pytest.mark.parametrize("kind", ["ce", "kl"])
def test_the_teacher_itself_is_a_stationary_point(kind):
    _, teacher, _, table, _ = material(4, 1, None)
    leaf = teacher.expand(1, -1, -1).clone().requires_grad_(True)
    how = Distillation(kind, lambda h: h @ table.T, (lambda h: h @ table.T,))
    total, actual = chunked_distillation(leaf, teacher, torch.ones(1, 4), how, 3)
    total.backward()
    assert actual[3].min() > 1 - 1e-6
    assert leaf.grad.abs().max() < 1e-5
    if kind == "kl":
        assert float(total.detach()) == pytest.approx(0, abs=1e-5)


# drafters


class Lines(Distilled):
    """States are the target's, times a matrix for each offset."""

    def __init__(self, offsets=3, weights=None, kind="kl"):
        super().__init__(offsets, weights, [0.5**k for k in range(offsets)], 2.0, 1.0, kind, 3.0)
        draw = torch.Generator().manual_seed(1)
        near = torch.eye(SIZE) + 0.15 * torch.randn(offsets, SIZE, SIZE, generator=draw)
        self.matrices = nn.Parameter(near)

    def states(self, output, target):
        for matrix in self.matrices:
            yield output.hidden @ matrix


class Voiced(Lines):
    """With a head of its own, over a draft vocabulary."""

    def __init__(self, **knobs):
        super().__init__(**knobs)
        self.table = nn.Parameter(
            torch.randn(len(SOME), SIZE, generator=torch.Generator().manual_seed(3))
        )

    @property
    def vocabulary(self):
        return SOME

    def draft_heads(self, target):
        return (lambda hidden: hidden @ self.table.T,)

    def head_parameters(self):
        return (self.table,)


def target_of(size=SIZE, vocabulary=VOCABULARY):
    return Target(
        toys.llama(
            torch.float32,
            hidden_size=size,
            intermediate_size=8,
            num_attention_heads=1,
            num_key_value_heads=1,
            vocab_size=vocabulary,
        )
    )


@pytest.mark.long
@pytest.mark.parametrize("chunk", [3, 100])
@pytest.mark.parametrize("packs", [APART, PACKED], ids=["apart", "packed"])
@pytest.mark.parametrize("make", [Lines, Voiced])
@pytest.mark.parametrize("kind", ["kl", "lk_hybrid"])
def test_a_drafters_loss_and_numbers_are_those_of_plain_loops(make, kind, packs, chunk):
    target, drafter = target_of(), make(kind=kind)
    with torch.no_grad():
        table = target.model.get_output_embeddings().weight.mul_(5)
        if make is Voiced:
            drafter.table.mul_(0.5).add_(table[SOME])
    output, states = output_of(packs, SIZE)
    total, numbers = drafter.loss(output, target, chunk)
    total.backward()

    table = target.model.get_output_embeddings().weight.detach().double()
    matrices = drafter.matrices.detach().double().requires_grad_(True)
    own = drafter.table.detach().double() if make is Voiced else table
    expected, counted = torch.zeros((), dtype=torch.float64), torch.zeros(3, 7, dtype=torch.float64)
    for (ids, first), (hidden, _) in zip(ROWS, states, strict=True):
        hidden = hidden.double()
        for t in range(len(ids)):
            unbroken, product = 1.0, 1.0
            for k in (1, 2, 3):
                if t + k + 1 >= len(ids) or t + k + 1 < first:
                    unbroken = product = 0.0
                    continue
                logits = own @ (hidden[t] @ matrices[k - 1])
                p = torch.softmax(table @ hidden[t + k], 0)
                loss, accepted, best = numbers_of(
                    kind, p, torch.softmax(logits, 0), drafter.vocabulary, 3.0
                )
                ranked = logits.argsort(descending=True)
                ranked = (ranked if drafter.vocabulary is None else SOME[ranked]).tolist()
                unbroken *= ranked[0] == best
                product *= float(accepted.detach())
                expected = expected + (0 if loss is None else 2.0 * 0.5 ** (k - 1) * loss)
                right = [ranked[0] == best, best in ranked[:5]]
                one = [
                    0 if loss is None else float(loss.detach()),
                    1,
                    *right,
                    unbroken,
                    float(accepted.detach()),
                    product,
                ]
                counted[k - 1] += torch.tensor(one, dtype=torch.float64)
    expected.backward()
    assert counted[0, 2] > 0
    assert (counted[:, 5:] > 0).all()
    assert make is Voiced or counted[1, 4] > 0
    torch.testing.assert_close(numbers.double(), counted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(total.double(), expected.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(drafter.matrices.grad.double(), matrices.grad, rtol=1e-4, atol=1e-4)
    actual = metrics(numbers)
    assert actual["offset2/acceptance"] == pytest.approx(
        float(counted[1, 5] / counted[1, 1]), rel=1e-5
    )
    assert actual["expected"] == pytest.approx(
        1 + sum(float(n[6] / n[1]) for n in counted), rel=1e-5
    )


def test_no_trained_position_and_rows_shorter_than_the_offsets():
    target, drafter = target_of(), Lines()
    ids = torch.tensor([[1, 2]])
    output = TargetOutput(
        torch.randn(1, 2, SIZE),
        ids,
        torch.full_like(ids, -100),
        torch.arange(2)[None],
        torch.zeros(1, 0, SIZE),
    )
    total, numbers = drafter.loss(output, target, 4)
    total.backward()
    assert float(total.detach()) == 0
    assert (numbers == 0).all()
    assert drafter.matrices.grad is not None
    assert metrics(numbers) == {}


def test_an_unknown_loss_is_named_with_the_choices():
    with pytest.raises(DrafterError, match=r"drafter\.loss=mse: one of ce, kl, tv"):
        Lines(kind="mse")


@pytest.mark.parametrize("layers", [(0, 1, 3), (2,), ()])
def test_captured_layers_are_what_transformers_calls_hidden_states(layers):
    model = toys.llama(torch.float32, num_hidden_layers=3)
    model.model.norm.weight.data += torch.randn(64)
    last = []
    handle = model.model.norm.register_forward_pre_hook(lambda _, args: last.append(args[0]))
    with captured_layers(model.get_decoder(), layers) as kept, torch.no_grad():
        expected = model(toys.IDS, output_hidden_states=True).hidden_states
    handle.remove()
    assert len(kept) == len(layers)
    for layer, actual in zip(layers, kept, strict=True):
        # transformers' last one is after the norm
        assert torch.equal(actual, last[0] if layer == 3 else expected[layer])
    with torch.no_grad():
        model(toys.IDS)
    assert len(kept) == len(layers)
