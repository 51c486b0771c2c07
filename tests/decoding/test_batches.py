"""Drafts of a batch in one pass: each sequence's are those that it gets alone."""

from __future__ import annotations

import functools
import logging

import pytest
import torch

from tests.conftest import ROOT
from tests.toys.speculative import alone, made, tiny
from trainer.decoding import drafting
from trainer.decoding.drafting import AllAtOnce, Merged, OneByOne
from trainer.decoding.drawing import Drawing
from trainer.decoding.fused import Fused
from trainer.decoding.policies import confidence_policy, refusal_policy
from trainer.decoding.sampling import Sampling
from trainer.decoding.speculative import Strategy, generate, generate_batch
from trainer.decoding.trees import EAGLE1, Levels, chain, dyspec, eagle2
from trainer.drafters import Drafter, Target, TargetUpdate
from trainer.drafters.batch_passes import layout
from trainer.drafters.lookup import PromptLookup
from trainer.drafters.medusa import MedusaHeads
from trainer.drafters.small import SmallModel

PRESETS = sorted(
    {path.stem for path in (ROOT / "conf" / "drafter").glob("*.yaml")}
    - {"none", "registers", "native"}
)
SHAPES = {
    "chain that ends early": chain(5, confidence_policy(0.2)),
    "static": Levels([(0,), (1,), (0, 0), (1, 0), (1, 1), (0, 0, 0)]),
    "dyspec that gives up": dyspec(6, 4, refusal_policy(0.95)),
}
OF_WINDOWS = ("static",)
KINDS = ("llama", "mistral, a window of 6")
CASES = [(name, kind) for name in [*PRESETS, "small"] for kind in KINDS]
OWN = ("uno", "ppd", "kangaroo", "clover")
# These run the target itself, whose layers are of two kinds.
CASES += [(name, "gemma2, a cap and a window of 5") for name in OWN[:3]]
CASES += [("dspark drafter.markov=rnn", "llama")]
CASES += [(name, "gpt2") for name in OWN[:2]]  # layers under another name
CASES += [("small gpt2", "llama")]  # learnt positions
V, WIDTH, LENGTH = 41, 16, 9
# the lengths of three prompts, then how many tokens each sequence gets a step
PROMPTS, STEPS = (1, 7, 4), ((1, 3, 2), (5, 1, 1))


def drafter_of(name, model):
    name, *changes = name.split()
    if name == "small":
        return SmallModel(tiny(*changes or ["qwen2"]), 5)
    return made(name, model, *changes)


def updates(drafter, draw):
    """Random updates of three sequences."""
    first = torch.randint(1, V, (3,), generator=draw)
    for number, counts in enumerate((PROMPTS, *STEPS)):
        yield [
            TargetUpdate(
                torch.randn(count, WIDTH, generator=draw),
                torch.randn(count, WIDTH * len(drafter.layers), generator=draw),
                torch.randint(1, V, (count,), generator=draw),
                first=None if number else first[row],
            )
            for row, count in enumerate(counts)
        ]


def same_trees(actual, expected):
    for one, other in zip(actual, expected, strict=True):
        assert one.tokens.tolist() == other.tokens.tolist()
        assert one.parents.tolist() == other.parents.tolist()


@torch.no_grad()
@pytest.mark.parametrize(("name", "kind"), CASES)
def test_a_batch_drafts_what_each_sequence_drafts_alone(name, kind):
    model = tiny(kind)
    target, drafter = Target(model), drafter_of(name, model)
    shapes = SHAPES if kind == "llama" else {name: SHAPES[name] for name in OF_WINDOWS}
    for label, shape in shapes.items():
        draw = torch.Generator().manual_seed(3)
        together = drafting.drafting(drafter, target, shape, 3)
        if not isinstance(together, AllAtOnce):
            pytest.skip(f"{name} drafts one after another")
        one_by_one, rows = OneByOne(drafter, target, shape, 3), [0, 1, 2]
        limits = [drafting.Limit(depth) for depth in (9, 9, 2)]
        for number, step in enumerate(updates(drafter, draw)):
            if number == 2:  # the second sequence has ended
                rows = [0, 2]
                together.select(rows)
                one_by_one.select(rows)
            news, most = [step[row] for row in rows], [limits[row] for row in rows]
            actual = together.drafts(news, Drawing(V, 9), most)
            expected = one_by_one.drafts(news, Drawing(V, 9), most)
            assert len(expected[0].tokens), label
            same_trees(actual, expected)


def test_places_of_a_pass_over_texts_and_what_follows_them():
    """Sequences of 3 and 1 tokens read 1 and 3 more, and two chains of two positions."""
    ahead, chains = torch.tensor([1, 1, 2, 2]), torch.eye(2).repeat(2, 2).tril().bool()
    actual = layout([3, 1], [1, 3], ahead, chains)
    #                            text, padding, the chains behind it
    assert actual.at.tolist() == [[3, 8, 9, 4, 5, 6, 7], [1, 2, 3, 4, 5, 6, 7]]
    assert actual.positions.tolist() == [[3, 3, 3, 4, 4, 5, 5], [1, 2, 3, 4, 4, 5, 5]]
    assert actual.keys.tolist() == [[0, 1, 2, 3, 4, 4, 5, 5, 8, 9]] * 2
    text = [1, 1, 1, 1]
    ends = [[1, 0, 0, 0], [0, 1, 0, 0], [1, 0, 1, 0], [0, 1, 0, 1]]
    expected = [[*text, *end, 0, 0] for end in ends]
    assert actual.sees[0].int().tolist() == [[*text, 0, 0, 0, 0, 0, 0]] * 3 + expected
    first = [[1] * (2 + row) + [0] * (8 - row) for row in range(3)]
    assert actual.sees[1].int().tolist() == first + expected


@pytest.mark.parametrize("name", ["eagle3", "mtp_sequential", "dspark", "hydra_plus", *OWN])
def test_drawn_drafts_come_from_the_distributions_of_each_sequence(name):
    model = tiny()
    target, drafter = Target(model), made(name, model)
    sampling = Sampling(0.7, 0.9)
    step = next(updates(drafter, torch.Generator().manual_seed(1)))
    for shape in (chain(3), Levels(EAGLE1), Levels(EAGLE1, with_replacement=True)):
        drawing = Drawing(V, 9, sampling.to_probabilities(), torch.Generator().manual_seed(2))
        together = drafting.drafting(drafter, target, shape, 3)
        for row, draft in enumerate(together.drafts(step, drawing, [drafting.Limit(9)] * 3)):
            memory = drafter.start(target)
            growth = drafter.grow(memory, target, step[row])
            logits, numbers = {-1: growth.first()}, {-1: -1}
            for node, (token, parent) in enumerate(
                zip(draft.tokens, draft.parents.tolist(), strict=True)
            ):
                q = drawing.to_probabilities(logits[parent].unsqueeze(0))[0]
                if growth.vocabulary is not None:
                    q = torch.zeros(V).index_copy(0, growth.vocabulary, q)
                torch.testing.assert_close(draft.probabilities[draft.rows[node]], q)
                if node in draft.parents:
                    above = torch.tensor([numbers[parent]])
                    logits[node] = growth.extend(token.view(1), above)[0]
                    numbers[node] = len(numbers) - 1


@pytest.mark.parametrize("name", [*PRESETS, "small"])
def test_texts_of_a_batch_are_those_of_each_prompt_alone(name):
    model = tiny()
    target, drafter = Target(model), drafter_of(name, model)
    draw = torch.Generator().manual_seed(5)
    prompts = [torch.randint(1, V, (count,), generator=draw) for count in (2, 9, 5, 3)]
    texts = [alone(model, ids, LENGTH) for ids in prompts]
    stops = [texts[0][2], texts[2][6]]
    expected = [alone(model, ids, LENGTH, stops) for ids in prompts]
    assert len(set(map(len, expected))) > 1
    for shape in (None, eagle2(3, 2, 5)):
        strategy = Strategy(shape)
        actual = generate_batch(target, drafter, prompts, LENGTH, stops, strategy=strategy)
        assert [one.tokens for one in actual] == expected
        for ids, one in zip(prompts, actual, strict=True):
            single = generate(target, drafter, ids, LENGTH, stops, strategy=strategy)
            assert one.drafts == single.drafts


def test_look_ups_are_merged_with_a_batch_of_heads():
    model = tiny()
    target = Target(model)
    drafter = Fused(made("eagle3", model), PromptLookup(4))
    together = drafting.drafting(drafter, target, chain(3), 2)
    assert isinstance(together, Merged)
    assert isinstance(together.parts[0], AllAtOnce)
    prompts = [torch.tensor([5, 9, 5, 9, 5]), torch.tensor([7, 7, 7])]
    expected = [alone(model, ids, LENGTH) for ids in prompts]
    actual = generate_batch(target, drafter, prompts, LENGTH, [])
    assert [one.tokens for one in actual] == expected


class OtherGrow(MedusaHeads):
    """Inherits a `grow_batch` that does not know its own `grow`."""

    def grow(self, memory, target, update):
        raise AssertionError


class OtherHead(MedusaHeads):
    """Changes neither."""


class Plain(Drafter):
    """Has no batch."""

    offsets = 1

    def start(self, target):
        return None

    def grow(self, memory, target, update):
        raise AssertionError


@pytest.mark.parametrize("wrong", ["masks", "positions", "context"])
def test_a_small_model_that_misreads_several_texts_drafts_one_after_another(wrong):
    small = tiny("qwen2")
    forward = type(small).forward

    @functools.wraps(forward)
    def misread(self, *args, **inputs):
        inputs.pop({"masks": "attention_mask", "positions": "position_ids"}.get(wrong), None)
        return forward(self, *args, **inputs)

    drafter = SmallModel(small, 3, "last:64" if wrong == "context" else "all")
    small.forward = misread.__get__(small)
    target = Target(tiny())
    assert isinstance(drafting.drafting(drafter, target, chain(3), 2), OneByOne)
    del small.forward
    again = SmallModel(small, 3)
    assert isinstance(drafting.drafting(again, target, chain(3), 2), AllAtOnce)


def test_what_cannot_draft_in_batches_says_so(caplog):
    model = tiny()
    target = Target(model)
    drafting._warn.cache_clear()
    knobs = {"offsets": 2, "layers": 1, "weights": None, "beta": 1.0, "weight": 1.0}
    knobs |= {"detach": True, "lr_scale": 1.0}
    with caplog.at_level(logging.WARNING, "trainer"):
        other = drafting.drafting(OtherHead(model, **knobs), target, chain(2), 2)
        assert isinstance(other, AllAtOnce)
        drafting.drafting(PromptLookup(), target, chain(2), 2)
        drafting.drafting(Plain(), target, chain(1), 1)
        assert not caplog.messages
        for drafter in (OtherGrow(model, **knobs), Plain()):
            assert isinstance(drafting.drafting(drafter, target, chain(2), 2), OneByOne)
    for name, message in zip(("OtherGrow", "Plain"), caplog.messages, strict=True):
        assert message.startswith(f"{name} drafts for the sequences of a batch one after another")
