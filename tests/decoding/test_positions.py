"""Texts that cross the length from which a model rotates by another table are transformers' own,
token by token, whatever is drafted."""

from __future__ import annotations

import pytest
import torch
import transformers

from tests.decoding.test_plugin import Scripted
from tests.toys.speculative import PROMPT, SIZES, alone, made
from trainer.decoding import positions
from trainer.decoding.plugin import assist
from trainer.decoding.speculative import Strategy, generate, generate_batch
from trainer.decoding.trees import EAGLE1, Levels
from trainer.drafters import DrafterError, Target
from trainer.drafters.lookup import PromptLookup
from trainer.evaluation.answers import continuations

N, COUNT = 16, 30
LONG = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0, 1.0],
    "long_factor": [1.5, 6.0],
    "original_max_position_embeddings": N,
}
KINDS = {
    "dynamic": ("Llama", {"rope_type": "dynamic", "factor": 4.0}, N),
    "longrope": ("Phi3", LONG, 64),
    "longrope that reads nothing again": ("Llama", LONG | {"factor": 4.0}, 64),
    "yarn": (
        "Llama",
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": N},
        64,
    ),
    "llama3": (
        "Llama",
        {
            "rope_type": "llama3",
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": N,
        },
        64,
    ),
    "window": ("Mistral", None, 64),
}
CHANGES = [kind for kind in KINDS if kind.startswith(("dynamic", "longrope"))]


def model_of(kind):
    family, rope, longest = KINDS[kind]
    settings = SIZES | {"max_position_embeddings": longest, "num_hidden_layers": 3}
    if rope is not None:
        settings["rope_parameters"] = {"rope_theta": 1e4} | rope
    if family == "Phi3":
        settings |= {"original_max_position_embeddings": N, "sliding_window": None}
    if kind == "window":
        settings["sliding_window"] = N
    torch.manual_seed(3)
    config = getattr(transformers, f"{family}Config")(**settings)
    return getattr(transformers, f"{family}ForCausalLM")(config).eval()


def fresh(kind, prompt=PROMPT, count=COUNT):
    """transformers' text, of a model that has written no other before: a table stays enlarged."""
    return alone(model_of(kind), prompt, count)


@pytest.mark.parametrize("kind", KINDS)
def test_plain_and_drafted_texts_are_transformers_own(kind):
    model = model_of(kind)
    expected = fresh(kind)
    whole = PROMPT.tolist() + expected
    assert len(set(expected)) > 5
    target = Target(model)
    assert generate(target, None, PROMPT, COUNT, []).tokens == expected
    drafters = {
        "right": Scripted(whole),
        "wrong": Scripted(whole, lambda place: place % 3 == 1),
        "lookup": PromptLookup(),
        "head": made("mtp_medusa", model),
        "layer": made("mtp_shared", model),
    }
    for name, drafter in drafters.items():
        result = generate(target, drafter, PROMPT, COUNT, [])
        assert result.tokens == expected, name
        if name == "right":
            again = sum(drafts[1] for drafts in result.drafts)
            # drafts are accepted up to N, with longrope also after it, otherwise to the end
            assert again > (5 if kind == "dynamic" else 15)
    tree = Strategy(Levels(EAGLE1))
    assert generate(target, drafters["head"], PROMPT, COUNT, [], strategy=tree).tokens == expected
    prompts = [PROMPT, PROMPT[:3], PROMPT.repeat(3)]
    batch = generate_batch(target, drafters["head"], prompts, COUNT, [])
    for prompt, result in zip(prompts, batch, strict=True):
        assert result.tokens == fresh(kind, prompt)


@pytest.mark.parametrize("kind", KINDS)
def test_so_are_those_of_the_plugin(kind):
    model = model_of(kind)
    for prompt in (PROMPT, PROMPT.repeat(3)):
        expected = fresh(kind, prompt)
        whole = prompt.tolist() + expected
        for drafter in (
            Scripted(whole),
            Scripted(whole, lambda place: place % 3 == 1),
            made("mtp_shared", model),
        ):
            with assist(model, drafter):
                assert alone(model, prompt, COUNT) == expected


def test_a_boundary_is_known_from_the_config():
    assert {kind: positions.boundary(model_of(kind).config) for kind in KINDS} == {
        "dynamic": positions.Boundary(N, "dynamic"),
        "longrope": positions.Boundary(N, "longrope"),
        "longrope that reads nothing again": positions.Boundary(N, "longrope"),
        "yarn": None,
        "llama3": None,
        "window": None,
    }
    each = {"full_attention": LONG, "sliding_attention": {"rope_type": "default"}}
    config = model_of("yarn").config
    config.rope_parameters = each
    assert positions.boundary(config) == positions.Boundary(N, "longrope")


@pytest.mark.parametrize("kind", CHANGES)
def test_that_drafting_pauses_is_said_once(kind, caplog):
    positions._warn.cache_clear()
    model = model_of(kind)
    generate(Target(model), PromptLookup(), PROMPT, 3, [])
    assert "rotates by another table" not in caplog.text
    for _ in range(2):
        generate(Target(model), PromptLookup(), PROMPT, COUNT, [])
    assert caplog.text.count(f"in texts of more than {N} tokens") == 1


def test_the_last_position_is_said_or_ends_the_text(caplog):
    positions._warn_last.cache_clear()
    model = model_of("yarn")
    assert positions.new_tokens(model, 10, 54) == 54
    assert not caplog.text
    assert positions.new_tokens(model, 10, 55) == 55
    assert "longer than the 64 tokens that LlamaForCausalLM supports" in caplog.text
    assert positions.new_tokens(model_of("dynamic"), 10, 54) == 54  # 4 times 16
    torch.manual_seed(0)
    settings = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 12, "vocab_size": 41}
    gpt2 = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(**settings, eos_token_id=None, pad_token_id=0)
    ).eval()
    caplog.clear()
    assert len(generate(Target(gpt2), None, PROMPT, 30, []).tokens) == 5
    assert "GPT2LMHeadModel has positions for 5 more" in caplog.text
    assert len(continuations(gpt2, [PROMPT.tolist()], 0, [], 30, torch.device("cpu"))[0]) == 5
    with pytest.raises(DrafterError, match="the prompt has 12 tokens, and GPT2LMHeadModel has 12"):
        generate(Target(gpt2), None, PROMPT.repeat(2)[:12], 3, [])
