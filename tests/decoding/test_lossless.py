"""Trees and batches on real models: the text is transformers' token by token, and drafters get
what the target computed."""

from __future__ import annotations

import pytest
import torch

from tests.toys.speculative import PROMPT, alone, made, tiny
from trainer.decoding import target_cache
from trainer.decoding.policies import confidence_policy, entropy_policy, refusal_policy
from trainer.decoding.speculative import Strategy, generate, generate_batch
from trainer.decoding.target_cache import TargetCache
from trainer.decoding.trees import (
    EAGLE1,
    Levels,
    chain,
    dyspec,
    eagle2,
)
from trainer.drafters import Draft, Drafter, DrafterError, Target

V, LENGTH = 41, 14
SHAPES = {
    "chain": chain(4),
    "chain that ends early": chain(5, confidence_policy(0.4)),
    "chain that gives up": chain(5, refusal_policy(0.7)),
    "static": Levels(EAGLE1),
    "static that ends early": Levels(EAGLE1, confidence_policy(0.5)),
    "eagle2": eagle2(3, 5, 12),
    "dyspec": dyspec(10),
    "dyspec that gives up": dyspec(10, 6, refusal_policy(0.6)),
    "static that is unsure": Levels(EAGLE1, entropy_policy(1.0)),
}
FAMILIES = ("llama", "qwen2", "mistral, a window of 6", "gemma2, a cap and a window of 5", "gpt2")


class Partly(Drafter):
    """Likes the right token more often than not, of a text that it was given for its prompt's first
    tokens."""

    offsets, layers = 5, ()

    def __init__(self, whole, seed=0):
        super().__init__()
        self.whole, self.draw, self.updates = whole, torch.Generator().manual_seed(seed), {}

    def start(self, target):
        return []

    def grow(self, memory, target, update):
        if update.first is not None:
            memory += [int(update.first)]
            self.updates[len(self.updates)] = (memory, [])
        memory += update.ids.tolist()
        next(news_of for of, news_of in self.updates.values() if of is memory).append(update)
        text = next(text for text in self.whole if text[: len(memory)] == memory)
        return Liked(self, text[len(memory) :])


class Liked:
    depth, branches, vocabulary, confidence = 5, True, None, None

    def __init__(self, drafter, rest):
        self.drafter, self.rest, self.depths = drafter, rest, []

    def logits(self, k):
        actual = torch.randn(V, generator=self.drafter.draw)
        if k < len(self.rest) and torch.rand((), generator=self.drafter.draw) < 0.6:
            actual[self.rest[k]] += 3
        return actual

    def first(self):
        return self.logits(0)

    def extend(self, tokens, parents):
        new = [1 + (self.depths[i] if i >= 0 else 0) for i in parents.tolist()]
        self.depths += new
        return torch.stack([self.logits(k) for k in new])


def prompts_of(count, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return [torch.randint(1, V, (2 + 3 * i % 10,), generator=draw) for i in range(count)]


@pytest.mark.parametrize("kind", FAMILIES)
def test_every_shape_writes_transformers_text_alone_and_together(kind):
    model = tiny(kind)
    target, prompts = Target(model), prompts_of(4)
    expected = [alone(model, ids, LENGTH) for ids in prompts]
    whole = [[*ids.tolist(), *text, 0] for ids, text in zip(prompts, expected, strict=True)]
    shapes = (
        SHAPES
        if kind in ("llama", "gemma2, a cap and a window of 5")
        else {name: SHAPES[name] for name in ("static", "eagle2")}
    )
    for number, (name, shape) in enumerate(shapes.items()):
        one = generate(
            target, Partly(whole, number), prompts[number % 4], LENGTH, [], strategy=Strategy(shape)
        )
        assert one.tokens == expected[number % 4], name
        assert one.nodes > 0
        together = generate_batch(
            target, Partly(whole, number), prompts[:3], LENGTH, [], strategy=Strategy(shape)
        )
        assert [actual.tokens for actual in together] == expected[:3], name
        assert min(len(actual.drafts) for actual in together) < LENGTH - 1
        for actual in together:
            assert 1 + len(actual.drafts) + sum(taken for _, taken in actual.drafts) == LENGTH
    assert [
        actual.tokens for actual in generate_batch(target, None, prompts, LENGTH, [])
    ] == expected


def test_rows_end_at_their_own_stops():
    model = tiny()
    target, prompts = Target(model), prompts_of(5, seed=4)
    whole = [[*ids.tolist(), *alone(model, ids, LENGTH), 0] for ids in prompts]
    stops = [whole[0][len(prompts[0]) + 3], whole[2][len(prompts[2]) + 9]]
    expected = [alone(model, ids, LENGTH, stops) for ids in prompts]
    assert len(set(map(len, expected))) > 1
    for shape in (chain(3), Levels(EAGLE1)):
        actual = generate_batch(
            target, Partly(whole), prompts, LENGTH, stops, strategy=Strategy(shape)
        )
        assert [one.tokens for one in actual] == expected


@pytest.mark.parametrize("kind", ["llama", "gemma2, a cap and a window of 5"])
def test_a_drafter_is_told_the_states_and_features_of_what_was_accepted(kind):
    model = tiny(kind)
    target, prompts = Target(model), prompts_of(3, seed=1)
    whole = [[*ids.tolist(), *alone(model, ids, LENGTH), 0] for ids in prompts]
    drafter = Partly(whole)
    drafter.layers = (0, 1, 2)
    generate_batch(target, drafter, prompts, LENGTH, [], strategy=Strategy(Levels(EAGLE1)))
    for (memory, update), text in zip(drafter.updates.values(), whole, strict=True):
        assert memory == text[: len(memory)]
        ids = torch.tensor(memory[:-1])
        with (
            torch.no_grad(),
            target_cache.captured_layers(model.get_decoder(), (0, 1, 2)) as stored,
        ):
            states = model.get_decoder()(input_ids=ids[None]).last_hidden_state[0]
        reported = torch.cat([one.hidden for one in update])
        torch.testing.assert_close(reported, states[: len(reported)], rtol=1e-3, atol=1e-4)
        features = torch.cat([one.features for one in update])
        torch.testing.assert_close(
            features, torch.cat([layer[0] for layer in stored], dim=-1), rtol=1e-3, atol=1e-4
        )
        for one in update[1:]:
            tokens, logits = one.tried
            assert len(tokens) == len(logits)
            assert int(one.ids[-1]) in logits.argmax(-1).tolist()


@pytest.mark.parametrize("name", ["mtp_parallel", "mtp_sequential", "mtp_shared", "mtp_medusa"])
def test_heads_draft_trees(name):
    model = tiny()
    drafter = made(name, model)
    prompts = prompts_of(3, seed=2)
    expected = [alone(model, ids, LENGTH) for ids in prompts]
    for shape in (Levels([(0,), (1,), (0, 0), (1, 0), (1, 1)]), eagle2(3, 3, 9), dyspec(9)):
        actual = generate_batch(
            Target(model), drafter, prompts, LENGTH, [], strategy=Strategy(shape)
        )
        assert [one.tokens for one in actual] == expected


class Own(Drafter):
    """Makes trees itself, whatever shape is asked for."""

    offsets = 2

    def __init__(self, trees):
        super().__init__()
        self.trees = trees

    def start(self, target):
        return []

    def propose(self, memory, target, update, build):
        memory += [0]
        tokens, parents = self.trees[len(memory) % len(self.trees)]
        return Draft(
            torch.tensor(tokens, dtype=torch.long), torch.tensor(parents, dtype=torch.long)
        )


@pytest.mark.parametrize("kind", ["qwen2", "gemma2, a cap and a window of 5"])
def test_a_drafter_may_make_chains_and_trees_in_turn(kind):
    model = tiny(kind)
    text = alone(model, PROMPT, 20)
    trees = [
        ([text[3], 5, 7], [-1, 0, 1]),
        ([5, text[4], 9, text[5]], [-1, -1, 0, 1]),
        ([], []),
        ([7, 7], [-1, -1]),
    ]
    assert generate(Target(model), Own(trees), PROMPT, 20, []).tokens == text


def test_a_chain_asks_nothing_of_a_model_that_cannot_read_trees(monkeypatch):
    model = tiny()
    text = alone(model, PROMPT, 10)
    target = Target(model)
    monkeypatch.setattr(target.config, "_attn_implementation", "flash_attention_2")
    monkeypatch.setattr(
        TargetCache, "_pass", lambda self, *_, **__: pytest.fail("a pass before the refusal")
    )
    for many, shape in ((1, Levels(EAGLE1)), (2, chain(2))):
        with pytest.raises(
            DrafterError, match=r"flash_attention_2 takes no 4-D mask.*tree=chain with batch_size=1"
        ):
            generate_batch(
                target,
                Partly([[*PROMPT.tolist(), *text]]),
                [PROMPT] * many,
                10,
                [],
                strategy=Strategy(shape),
            )
    monkeypatch.undo()
    monkeypatch.setattr(target.config, "_attn_implementation", "sdpa")
    monkeypatch.setattr(target_cache, "allow_trees", lambda target: pytest.fail("asked for trees"))
    assert generate(target, Own([([1, 2], [-1, 0])]), PROMPT, 10, []).tokens == text


def test_layers_that_see_in_chunks_and_models_without_positions_are_refused(monkeypatch):
    model = tiny()
    target = Target(model)
    monkeypatch.setattr(target.config, "layer_types", ["chunked_attention"] * 2, raising=False)
    with pytest.raises(DrafterError, match="layers of the kind chunked_attention"):
        target_cache.allow_trees(target)


def test_a_model_that_does_not_keep_siblings_apart_is_refused(monkeypatch):
    model = tiny()
    target = Target(model)
    monkeypatch.setattr(
        target_cache,
        "tree_positions",
        lambda trees, most: (torch.arange(most)[None], torch.ones(1, most, most, dtype=torch.bool)),
    )
    with pytest.raises(DrafterError, match="siblings change what it computes"):
        target_cache.allow_trees(target)
    assert target not in target_cache._reads_trees


def test_tokens_that_no_training_has_seen_refuse_no_trees():
    model = tiny()
    target = Target(model)  # tries the head on those ids
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())  # not tied
    with torch.no_grad():  # as special tokens at a vocabulary's start may be, at the extreme
        model.get_input_embeddings().weight[:4] = torch.nan
    target_cache.allow_trees(target)


def test_who_sees_whom():
    depths, sees = target_cache.tree_positions([[-1, -1, 0, 2], [-1]], 5)
    assert depths.tolist() == [[0, 1, 1, 2, 3], [0, 1, 0, 0, 0]]
    assert [[j for j in range(5) if row[j]] for row in sees[0]] == [
        [0],
        [0, 1],
        [0, 2],
        [0, 1, 3],
        [0, 1, 3, 4],
    ]
    assert [[j for j in range(5) if row[j]] for row in sees[1]] == [[0], [0, 1], [2], [3], [4]]


def test_many_prompts_through_trees():
    """Dozens of texts in one pass at a time, on the family with most kinds of layers."""
    model = tiny("gemma2, a cap and a window of 5")
    target, prompts = Target(model), prompts_of(30, seed=9)
    plain = [actual.tokens for actual in generate_batch(target, None, prompts, LENGTH, [])]
    assert plain[:3] == [alone(model, ids, LENGTH) for ids in prompts[:3]]
    whole = [[*ids.tolist(), *text, 0] for ids, text in zip(prompts, plain, strict=True)]
    actual = generate_batch(
        target, Partly(whole), prompts, LENGTH, [], strategy=Strategy(eagle2(3, 4, 10))
    )
    assert [one.tokens for one in actual] == plain


def test_seconds_are_told_apart():
    model = tiny()
    actual = generate(Target(model), made("mtp_medusa", model), PROMPT, 12, [])
    assert actual.draft_seconds > 0
    assert actual.verify_seconds > 0
    assert (
        actual.prompt_seconds + actual.draft_seconds + actual.verify_seconds
        <= actual.seconds * 1.01
    )
