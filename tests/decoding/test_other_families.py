"""Plain decoding of models whose cache or whose logits are unlike Llama's."""

from __future__ import annotations

import functools

import pytest
import torch

from tests.toys.families import model_of
from trainer.decoding.speculative import generate
from trainer.drafters import DrafterError, Target

PROMPT = torch.arange(5, 17)


def greedy(model):
    out = model.generate(
        input_ids=PROMPT[None],
        attention_mask=torch.ones_like(PROMPT)[None],
        max_new_tokens=10,
        do_sample=False,
        eos_token_id=1 << 20,
        pad_token_id=0,
    )
    return out[0, len(PROMPT) :].tolist()


@pytest.mark.parametrize(
    "family",
    [
        "mamba",  # a cache that counts no tokens
        "rwkv",  # a state that is no cache
        "recurrent_gemma",  # a soft cap under a name of its own
    ],
)
def test_plain_decoding_is_transformers(family):
    model = model_of(family)
    target = Target(model, drafted=False)
    assert not target.gives_logits
    assert generate(target, None, PROMPT, 10, []).tokens == greedy(model)


def test_a_model_with_an_unknown_head_is_decoded_and_not_drafted():
    model = model_of("llama")
    inner = model.forward

    @functools.wraps(inner)
    def forward(*args, **kwargs):
        out = inner(*args, **kwargs)
        if out.logits.shape[-1]:
            out.logits = out.logits.flip(-1) ** 3
        return out

    model.forward = forward
    with pytest.raises(DrafterError, match="no drafter can share its head"):
        Target(model)
    target = Target(model, drafted=False)
    assert target.gives_logits
    assert generate(target, None, PROMPT, 10, []).tokens == greedy(model)
    with pytest.raises(DrafterError, match="no drafter can share its head"):
        generate(target, object(), PROMPT, 4, [])
