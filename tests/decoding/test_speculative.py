"""Speculative decoding writes what the target alone would: token by token when greedy, in
distribution when sampling."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch
import transformers
from omegaconf import OmegaConf
from torch.nn import functional as F
from transformers import TemperatureLogitsWarper, TopPLogitsWarper

from adapters.delta import Start
from tests.conftest import ROOT
from tests.toys import adapters as toys
from tests.toys.speculative import MODELS, PROMPT, alone, made, p_value, tiny
from trainer.assembly.build import instantiate
from trainer.config import compose
from trainer.decoding import verify
from trainer.decoding.policies import confidence_policy, refusal_policy
from trainer.decoding.sampling import Sampling
from trainer.decoding.speculative import (
    PositionCounts,
    Result,
    Strategy,
    generate,
    generate_batch,
    position_counts,
)
from trainer.decoding.trees import Levels, chain, dyspec, eagle2
from trainer.drafters import Drafter, DrafterError, Target

PRESETS = sorted(
    {path.stem for path in (ROOT / "conf" / "drafter").glob("*.yaml")}
    - {"none", "registers", "native"}
)


class Toy(Drafter):
    """Proposes what `guess(index of the token in the text, how many)` says, and records its
    updates."""

    offsets, tokens = 4, 41

    def __init__(self, guess):
        super().__init__()
        self.guess = guess

    def start(self, target):
        self.updates, self.asked = [], []
        return self

    def grow(self, memory, target, update):
        assert memory is self
        assert len(update.hidden) == len(update.ids) >= 1
        self.updates.append(update)
        self.asked.append(0)
        actual = self.guess(sum(len(one.ids) for one in self.updates) + 1, self.offsets)
        return Told(
            self,
            [
                F.one_hot(torch.tensor(token), self.tokens).float()
                for token in actual[: self.offsets]
            ],
        )


class Told:
    """The growth of a list of logits, one for each depth."""

    branches, vocabulary, confidence = True, None, None

    def __init__(self, drafter, logits):
        self.drafter, self.logits, self.depth, self.depths = drafter, logits, len(logits), []

    def first(self):
        self.drafter.asked[-1] = 1
        return self.logits[0]

    def extend(self, tokens, parents):
        depth = 1 + (self.depths[parents[0]] if parents[0] >= 0 else 0)
        self.depths += [depth] * len(tokens)
        self.drafter.asked[-1] = depth + 1
        return self.logits[depth].expand(len(tokens), -1)


def oracle(ids, text, wrong=lambda place: False):
    """A drafter that knows the text, but for some places of it."""
    whole = ids.tolist() + text
    return Toy(
        lambda at, count: [
            (t + 1) % 41 if wrong(i) else t for i, t in enumerate(whole[at : at + count], at)
        ]
    )


def drafters(ids, text):
    draw = torch.Generator().manual_seed(3)
    return {
        "right": oracle(ids, text),
        "half": oracle(ids, text, lambda place: place % 2 == 0),
        "seldom wrong": oracle(ids, text, lambda place: place % 5 == 3),
        "random": Toy(lambda at, count: torch.randint(0, 41, (count,), generator=draw).tolist()),
        "few": oracle(ids, [*text[:5]]),  # it runs out of tokens
        "nothing": Toy(lambda at, count: []),
        "none": None,
    }


@pytest.mark.parametrize("kind", MODELS)
def test_greedy_is_transformers_greedy(kind):
    model = tiny(kind)
    target = Target(model)
    text = alone(model, PROMPT, 30)
    assert len(set(text)) > 4
    for name, drafter in drafters(PROMPT, text).items():
        actual = generate(target, drafter, PROMPT, 30, [])
        assert actual.tokens == text, name
        assert 1 + actual.steps + sum(taken for _, taken in actual.drafts) == 30, name
        if name == "right":
            assert actual.drafts == [(4, 4)] * 5 + [(3, 3)]
            assert actual.histogram == [0, 0, 0, 1, 5]
        if name == "half":
            assert 15 < actual.steps + 1 < 30
        if name in ("nothing", "none"):
            assert actual.drafts == [(0, 0)] * 29


@pytest.mark.parametrize("name", ["lora", "rosa", "dora", "prompt_tuning", "prefix_tuning"])
def test_greedy_with_an_adapter(name):
    node = compose.compose(
        [
            f"adapter={name}",
            "base=tiny",
            "task.path=x",
            *(["adapter.warmup_steps=1"] if name == "rosa" else []),
        ]
    )
    adapter = instantiate(OmegaConf.to_container(node.adapter))
    base = toys.llama(torch.float32, tie_word_embeddings=False)
    base.generation_config.eos_token_id = None
    plain = alone(base, PROMPT, 25)
    model = adapter.attach(base, Start(steps=3, data=toys.batches))
    toys.train(adapter, model, range(2))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(
                    torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)),
                    alpha=0.2,
                )
    model.eval()
    text = alone(model, PROMPT, 25)
    assert text != plain
    assert len(set(text)) > 4
    target = Target(model)
    for which in ("half", "random", "none"):
        drafter = drafters(PROMPT, text)[which]
        if drafter is not None:
            drafter.tokens = 64
        assert generate(target, drafter, PROMPT, 25, []).tokens == text, which
        assert (
            generate(
                target,
                drafter,
                PROMPT,
                25,
                [],
                strategy=Strategy(Levels(FORM) if drafter else None),
            ).tokens
            == text
        ), which
    short = alone(model, PROMPT[:3], 25)
    assert [
        actual.tokens for actual in generate_batch(target, None, [PROMPT, PROMPT[:3]], 25, [])
    ] == [text, short]


@pytest.mark.parametrize("name", PRESETS)
def test_greedy_with_each_drafter(name):
    model = tiny("gemma2, a cap and a window of 5" if name == "mtp_medusa" else "llama")
    text = alone(model, PROMPT, 20)
    drafter = made(name, model)
    actual = generate(Target(model), drafter, PROMPT, 20, [])
    assert actual.tokens == text
    # not the first one of all: PPD's look ahead comes with a verifying pass
    assert max(depth for depth, _ in actual.drafts) >= drafter.offsets
    drawn = [
        generate(Target(model), drafter, PROMPT, 20, [], Sampling(1.0, 0.9, seed=seed)).tokens
        for seed in (0, 0, 1)
    ]
    assert drawn[0] == drawn[1] != drawn[2]


def test_what_does_not_draft_says_so():
    model = tiny()
    with pytest.raises(DrafterError):
        generate(Target(model), made("registers", model), PROMPT, 4, [])


@pytest.mark.parametrize("kind", ["llama", "gemma2, a cap and a window of 5"])
def test_a_drafter_is_told_each_accepted_state_once_with_the_token_after_it(kind):
    model = tiny(kind)
    text = alone(model, PROMPT, 20)
    drafter = oracle(PROMPT, text, lambda place: place % 3 == 0)
    actual = generate(Target(model), drafter, PROMPT, 20, [])
    whole = torch.tensor([*PROMPT.tolist(), *text])
    reported = torch.cat([update.ids for update in drafter.updates])
    assert torch.equal(reported, whole[1 : 1 + len(reported)])
    assert len(reported) > 20
    with torch.no_grad():
        states = model.get_decoder()(input_ids=whole.unsqueeze(0)).last_hidden_state[0]
    assert torch.allclose(
        torch.cat([update.hidden for update in drafter.updates]), states[: len(reported)], atol=1e-4
    )
    assert [len(update.ids) for update in drafter.updates[1:]] == [
        taken + 1 for _, taken in actual.drafts[: len(drafter.updates) - 1]
    ]
    assert int(drafter.updates[0].first) == PROMPT[0]
    assert all(update.first is None for update in drafter.updates[1:])
    for update in drafter.updates:
        tokens, logits = update.tried
        assert len(tokens) == len(logits) >= 1
        assert update.ids[-1] in logits.argmax(-1)


@pytest.mark.parametrize("place", [0, 1, 2, 4, 5, 8])
def test_a_stop_ends_the_text_where_plain_decoding_ends(place):
    model = tiny()
    text = alone(model, PROMPT, 12)
    stops = [text[place], 40]
    expected = alone(model, PROMPT, 12, stops)
    assert expected == text[: text.index(text[place]) + 1]
    for name, drafter in drafters(PROMPT, text).items():
        actual = generate(Target(model), drafter, PROMPT, 12, stops)
        assert actual.tokens == expected, name
        if name == "right":
            assert all(proposed == taken for proposed, taken in actual.drafts)


@pytest.mark.parametrize("limit", [1, 2, 3, 5, 6, 7])
def test_the_number_of_new_tokens_is_exact(limit):
    model = tiny()
    text = alone(model, PROMPT, 12)
    drafter = oracle(PROMPT, text)
    assert generate(Target(model), drafter, PROMPT, limit, []).tokens == text[:limit]
    assert all(requested <= max(0, limit - 2) for requested in drafter.asked)


@pytest.mark.parametrize(("count", "requested"), [(1, 1), (3, 3), (9, 4), (None, 4)])
def test_as_many_are_asked_for_as_wanted_and_known(count, requested):
    model = tiny()
    drafter = oracle(PROMPT, alone(model, PROMPT, 12))
    generate(
        Target(model), drafter, PROMPT, 12, [], strategy=Strategy(chain(count) if count else None)
    )
    assert max(getattr(drafter, "asked", []), default=None) == requested


def test_logits_are_made_where_they_are_needed_only():
    target = Target(tiny())
    rows, head = [], target.head
    target.head = lambda hidden: (rows.append(len(hidden)), head(hidden))[1]
    actual = generate(target, Toy(lambda at, count: [0] * count), PROMPT, 8, [])
    assert rows == [1, *(proposed + 1 for proposed, _ in actual.drafts)]


def test_a_recurrent_target_is_refused_before_it_writes():
    model = transformers.MambaForCausalLM(
        transformers.MambaConfig(vocab_size=41, hidden_size=16, num_hidden_layers=1, state_size=4)
    ).eval()
    target = Target(tiny())
    target.model = model
    drafter = Toy(lambda at, count: [])
    with pytest.raises(
        DrafterError,
        match=r"MambaForCausalLM has layers whose state cannot be rolled back.*graft generate",
    ):
        generate(target, drafter, PROMPT, 4, [])
    assert not hasattr(drafter, "asked")


def test_a_cache_without_a_way_back_is_refused(monkeypatch):
    monkeypatch.setattr(transformers.DynamicCache, "is_croppable", False)
    target = Target(tiny())
    with pytest.raises(DrafterError, match="cannot be rolled back"):
        generate(target, Toy(lambda at, count: []), PROMPT, 4, [])
    assert len(generate(target, None, PROMPT, 4, []).tokens) == 4


# Sampling from five tokens, each drawn given the last one: the chances of all texts of four can be
# worked out.

TOKENS, LENGTH, DRAWS = 5, 4, 1500


@pytest.fixture
def table(monkeypatch):
    """A target that is a table: the next token's logits given the last token."""
    table = torch.randn(TOKENS, TOKENS, generator=torch.Generator().manual_seed(5)) * 1.5
    target = Target.__new__(Target)
    target.model, target.head = torch.nn.Module(), lambda hidden: hidden @ table
    target.config = SimpleNamespace()

    class Read:
        def __init__(self, target, layers, whole):
            pass

        def open(self, prompts):
            return [(F.one_hot(ids, TOKENS).float(), torch.zeros(len(ids), 0)) for ids in prompts]

        def read(self, tokens, parents):
            return self.open(tokens)

        def start_rollback(self):
            pass

        def after(self, row, path):
            return None

        def commit(self, paths):
            pass

        def select_rows(self, rows):
            pass

    monkeypatch.setattr("trainer.decoding.speculative.TargetCache", Read)
    monkeypatch.setattr("trainer.decoding.speculative.allow_trees", lambda target: None)
    target.table = table
    return target


def probabilities(logits, temperature, top_p):
    """As transformers' processors and its sampling do it."""
    scores = logits.clone().unsqueeze(0)
    if temperature != 1:
        scores = TemperatureLogitsWarper(temperature)(None, scores)
    if top_p < 1:
        scores = TopPLogitsWarper(top_p)(None, scores)
    return scores[0].softmax(-1)


def joint(table, first, temperature, top_p):
    """Each text's probability, by counting all of them."""
    rows = [probabilities(row, temperature, top_p).double() for row in table]
    actual = torch.zeros([TOKENS] * LENGTH, dtype=torch.float64)
    for text in itertools.product(range(TOKENS), repeat=LENGTH):
        chance, last = 1.0, first
        for token in text:
            chance, last = chance * rows[last][token], token
        actual[text] = chance
    return actual


class Sampler(Drafter):
    """Drafts from a table of its own, which may know some tokens only."""

    offsets = 2

    def __init__(self, table, vocabulary=None):
        super().__init__()
        self.table, self.vocabulary = table, vocabulary

    def start(self, target):
        return None

    def grow(self, memory, target, update):
        return Rows(self, update.ids[-1])


class Rows:
    depth, branches, confidence = 2, True, None

    def __init__(self, drafter, last):
        self.drafter, self.last, self.vocabulary = drafter, last, drafter.vocabulary

    def first(self):
        return self.extend(self.last.view(1), None)[0]

    def extend(self, tokens, parents):
        rows = self.drafter.table[tokens]
        return rows if self.vocabulary is None else rows[:, self.vocabulary]


def counted(target, drafter, temperature, top_p, **strategy):
    actual = torch.zeros([TOKENS] * LENGTH, dtype=torch.float64)
    prompts = [torch.tensor([1, 3])] * 250
    for seed in range(DRAWS // 250):
        sampling = Sampling(temperature, top_p, seed=seed)
        for result in generate_batch(
            target, drafter, prompts, LENGTH, [], sampling, Strategy(**strategy)
        ):
            actual[tuple(result.tokens)] += 1
    return actual


OTHER = torch.randn(TOKENS, TOKENS, generator=torch.Generator().manual_seed(6)) * 2
FORM = [(0,), (1,), (2,), (0, 0), (0, 1), (1, 0)]
SAMPLED = {
    "chain": {},
    "chain, one at a time": {"shape": chain(1)},
    "chain of the best": {"shape": chain(2, best=True)},
    "chain that ends early": {"shape": chain(2, confidence_policy(0.6))},
    "chain that gives up": {"shape": chain(2, refusal_policy(0.5))},
    "tree without replacement": {"shape": Levels(FORM)},
    "tree without replacement that ends early": {"shape": Levels(FORM, confidence_policy(0.85))},
    "tree with replacement": {"shape": Levels(FORM, with_replacement=True)},
    "chain, by the recursive rule": {"rule": "recursive"},
    "tree, by the recursive rule": {"shape": Levels(FORM), "rule": "recursive"},
    "tree with replacement, by the recursive rule": {
        "shape": Levels(FORM, with_replacement=True),
        "rule": "recursive",
    },
    "SpecTr": {"shape": Levels(FORM, with_replacement=True), "rule": "spectr"},
    "tree of the best": {"shape": Levels(FORM, best=True)},
    "EAGLE-2": {"shape": eagle2(2, 2, 4)},
    "DySpec": {"shape": dyspec(4)},
}


def drafting(table):
    return {
        "as the target": Sampler(table),
        "otherwise": Sampler(OTHER),
        "against": Sampler(-table),
        "some tokens only": Sampler(OTHER, torch.tensor([0, 2, 3])),
    }


@pytest.mark.parametrize(
    ("how", "name", "temperature", "top_p"),
    [
        *(("chain", name, 1.0, 1.0) for name in ("as the target", "against", "some tokens only")),
        *((how, "otherwise", 1.0, 1.0) for how in SAMPLED),
        ("chain", "otherwise", 0.7, 0.8),
        ("tree without replacement", "otherwise", 0.7, 0.8),
        ("tree without replacement", "some tokens only", 1.0, 1.0),
    ],
)
def test_sampled_texts_are_distributed_as_the_targets(table, how, name, temperature, top_p):
    actual = counted(table, drafting(table.table)[name], temperature, top_p, **SAMPLED[how])
    assert p_value(actual, joint(table.table, 3, temperature, top_p)) > 1e-3
    assert p_value(actual, joint(table.table, 3, 1.3, 1.0)) < 1e-6


@pytest.mark.parametrize("how", [how for how in SAMPLED if how.endswith("recursive rule")])
def test_a_rule_that_refills_from_p_is_noticed(table, monkeypatch, how):
    right = verify._in_turn

    def from_p(p, *rest):
        """Behind refused tokens a draw from p, not from what is left of it."""
        return right(p, *rest)[0], p

    monkeypatch.setattr(
        verify, "_in_turn", lambda *arguments, replacement: from_p(*arguments, replacement)
    )
    actual = counted(table, Sampler(OTHER), 1.0, 1.0, **SAMPLED[how])
    assert p_value(actual, joint(table.table, 3, 1.0, 1.0)) < 1e-6


def test_typical_acceptance_writes_otherwise(table):
    actual = counted(
        table, Sampler(OTHER), 1.0, 1.0, shape=Levels(FORM, best=True), rule="typical_lossy"
    )
    assert p_value(actual, joint(table.table, 3, 1.0, 1.0)) < 1e-6


def test_a_draft_of_the_targets_own_distribution_is_always_taken(table):
    for seed in range(50):
        actual = generate(
            table, Sampler(table.table), torch.tensor([1]), 9, [], Sampling(0.9, 0.95, seed=seed)
        )
        assert all(proposed == taken for proposed, taken in actual.drafts)


def test_how_often_a_draft_is_taken_is_what_p_and_q_share(table):
    other = Sampler(torch.randn(TOKENS, TOKENS, generator=torch.Generator().manual_seed(6)) * 2)
    results = [
        generate(
            table,
            other,
            torch.tensor([2, 3]),
            3,
            [],
            Sampling(1.0, seed=seed),
            Strategy(chain(1)),
        )
        for seed in range(1000)
    ]
    firsts = [result.drafts[0] for result in results]
    p, q = table.table.softmax(-1).double(), other.table.softmax(-1).double()
    shared = float((p[3] * torch.minimum(p, q).sum(-1)).sum())
    assert (
        abs(sum(taken for _, taken in firsts) / 1000 - shared)
        < 4 * (shared * (1 - shared) / 1000) ** 0.5
    )


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.6, 0.7)])
def test_without_a_drafter_the_draws_are_those_of_transformers(temperature, top_p):
    model = tiny()
    torch.manual_seed(7)
    expected = alone(
        model, PROMPT, 20, do_sample=True, top_k=0, temperature=temperature, top_p=top_p
    )
    torch.manual_seed(7)
    assert (
        generate(Target(model), None, PROMPT, 20, [], Sampling(temperature, top_p)).tokens
        == expected
    )


def test_a_sampled_text_repeats_with_its_seed():
    target = Target(tiny())
    texts = [
        generate(
            target,
            Toy(lambda at, n: [3] * n),
            PROMPT,
            15,
            [],
            Sampling(1.0, seed=seed),
        ).tokens
        for seed in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]


def test_a_place_counts_what_was_proposed_what_stood_after_right_ones_and_what_was_taken():
    results = [
        Result([], [(3, 3), (3, 0), (3, 2)], 0, 0),
        Result([], [(3, 1), (1, 1), (0, 0)], 0, 0),
    ]
    assert position_counts(results) == [
        PositionCounts(5, 5, 4),
        PositionCounts(4, 3, 2),
        PositionCounts(4, 2, 1),
    ]
    assert results[1].histogram == [1, 2]
    assert position_counts([]) == []
