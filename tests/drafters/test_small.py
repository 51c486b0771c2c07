"""A small model drafts what it would write by itself, chain or tree, whatever was accepted
before."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import transformers

from tests.toys import adapters as toys
from trainer.decoding import trees
from trainer.decoding.sampling import Sampling
from trainer.decoding.speculative import Strategy, generate_batch
from trainer.drafters import DrafterError, Target, TargetUpdate
from trainer.drafters.small import SmallModel, small_model
from trainer.models import base


@pytest.fixture(scope="module")
def target():
    return Target(toys.llama(torch.float32))


def update(ids, first=None):
    nothing = torch.zeros(len(ids), 0)
    return TargetUpdate(
        nothing,
        nothing,
        torch.tensor(ids, dtype=torch.long),
        None if first is None else torch.tensor(first),
    )


@torch.no_grad()
def after(model, text):
    """The logits of the next token, without a cache."""
    return model(input_ids=torch.tensor([text]), use_cache=False).logits[0, -1]


@pytest.mark.parametrize("window", [None, 4])
def test_chains_go_on_from_what_was_accepted(target, window):
    draw = torch.Generator().manual_seed(1)
    small = toys.llama(torch.float32, num_hidden_layers=1, hidden_size=32)
    if window:
        config = transformers.MistralConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
            sliding_window=window,
        )
        torch.manual_seed(0)
        small = transformers.MistralForCausalLM(config).eval()
    drafter = SmallModel(small, depth=3)
    assert drafter.branches == (window is None)
    memory, text = drafter.start(target), [5]
    for step, fresh in enumerate(([9, 13, 7, 30], [2], [8, 8, 1, 40], [3, 4])):
        text += fresh
        growth = drafter.grow(memory, target, update(fresh, None if step else 5))
        torch.testing.assert_close(growth.first(), after(small, text), rtol=1e-4, atol=1e-4)
        drafted = []
        for place in range(growth.depth - 1):
            token = torch.randint(0, 64, (1,), generator=draw)
            drafted.append(int(token))
            actual = growth.extend(token, torch.tensor([place - 1]))
            torch.testing.assert_close(
                actual[0], after(small, text + drafted), rtol=1e-4, atol=1e-4
            )
    assert memory.length == len(text)


def test_trees_see_their_own_branch_only(target):
    small = toys.llama(torch.float32, num_hidden_layers=1)
    drafter = SmallModel(small, depth=4)
    memory, text = drafter.start(target), [5, 9, 13]
    growth = drafter.grow(memory, target, update(text[1:], 5))
    paths = []
    for tokens, parents in (
        ([7, 20, 31], [-1, -1, -1]),
        ([1, 2], [0, 2]),
        ([3, 4, 5, 6], [3, 3, 4, 4]),
    ):
        actual = growth.extend(torch.tensor(tokens), torch.tensor(parents))
        paths += [
            [*(paths[parent] if parent >= 0 else []), token]
            for token, parent in zip(tokens, parents, strict=True)
        ]
        for row, path in zip(actual, paths[-len(tokens) :], strict=True):
            torch.testing.assert_close(row, after(small, text + path), rtol=1e-4, atol=1e-4)
    growth = drafter.grow(memory, target, update([31, 2, 60]))
    torch.testing.assert_close(
        growth.first(), after(small, [*text, 31, 2, 60]), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize(("own", "stored"), [(64, None), (80, None), (48, 48)])
def test_padded_vocabularies(target, own, stored):
    drafter = SmallModel(toys.llama(torch.float32, num_hidden_layers=1, vocab_size=own))
    growth = drafter.grow(drafter.start(target), target, update([9], 5))
    below = growth.extend(torch.tensor([3]), torch.tensor([-1]))
    assert growth.first().shape == below[0].shape == (min(own, 64),)
    assert (growth.vocabulary is None) == (stored is None)
    if stored:
        assert growth.vocabulary.tolist() == list(range(stored))


def test_a_recurrent_model_is_refused():
    mamba = transformers.MambaForCausalLM(
        transformers.MambaConfig(vocab_size=41, hidden_size=16, num_hidden_layers=1, state_size=4)
    )
    with pytest.raises(
        DrafterError, match="MambaForCausalLM has layers whose state cannot be rolled back"
    ):
        SmallModel(mamba)
    with pytest.raises(DrafterError, match="depth=0"):
        SmallModel(mamba, 0)


def test_a_model_of_other_tokens_is_refused(tiny, tmp_path):
    built = small_model(tiny.path, tiny, torch.float32, "cpu", 2)
    assert built.offsets == 2
    assert built.state() == {}
    shutil.copytree(tiny.path, tmp_path / "other")
    file = tmp_path / "other" / "tokenizer.json"
    content = json.loads(file.read_text())
    words = content["model"]["vocab"]
    words["a"], words["b"] = words["b"], words["a"]
    file.write_text(json.dumps(content))
    with pytest.raises(
        DrafterError,
        match=(
            r"cannot draft for .*: its \d+ tokens are not the same as the target's \d+ \('[ab]' is"
            r" \d+ of the target and \d+ of it"
        ),
    ):
        small_model(str(tmp_path / "other"), tiny, torch.float32, "cpu")
    with pytest.raises(base.BaseError, match="no/such/place"):
        small_model("no/such/place", tiny, torch.float32, "cpu")


@pytest.mark.parametrize(
    "shape", [None, trees.eagle2(3, 4, 9), trees.Levels([[0], [1], [0, 0], [1, 0], [1, 1]])]
)
def test_the_decoders_text_stays(target, shape):
    drafter = SmallModel(toys.llama(torch.float32, num_hidden_layers=1), 4)
    prompts = [torch.tensor([5, 9, 13, 7]), torch.tensor([40, 41])]
    plain = generate_batch(target, None, prompts, 20, [])
    for one in (prompts, prompts[:1]):
        actual = generate_batch(target, drafter, one, 20, [], strategy=Strategy(shape))
        assert [result.tokens for result in actual] == [
            result.tokens for result in plain[: len(one)]
        ]
    same = SmallModel(target.model, 4)
    actual = generate_batch(target, same, prompts[:1], 20, [], strategy=Strategy(shape))[0]
    if isinstance(shape, trees.Best):  # its deepest nodes need not be the best guess's
        assert actual.steps < 10
    else:
        assert all(taken == proposed for proposed, taken in actual.drafts)
    drawn = [
        generate_batch(
            target,
            drafter,
            prompts[:1],
            20,
            [],
            Sampling(1.0, 0.9, seed=seed),
            Strategy(shape),
        )[0].tokens
        for seed in (0, 0, 1)
    ]
    assert drawn[0] == drawn[1] != drawn[2]
