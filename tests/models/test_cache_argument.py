"""The cache's name in signatures of any version."""

import inspect

import pytest
import torch
import transformers

from tests.toys.families import model_of
from trainer.decoding.speculative import generate
from trainer.drafters import DrafterError, Target
from trainer.drafters.lookup import PromptLookup
from trainer.models.cache_argument import (
    NAMES,
    cache_argument,
    cache_of,
    makes_its_own,
    model_with_cache,
    rolls_back,
    with_cache,
)


@pytest.mark.parametrize("name", NAMES)
def test_the_name_is_the_signature_s(name):
    """Each name that some version or family has is found, and handed on under that name."""
    scope: dict = {}
    exec(f"def forward(hidden, {name}=None, use_cache=False): return {name}", scope)
    assert cache_argument(scope["forward"]) == name
    assert scope["forward"](1, **with_cache(scope["forward"], "kept")) == "kept"
    assert cache_of({"logits": 1, name: "kept"}) == "kept"


def test_a_function_without_a_cache_is_refused_by_its_arguments():
    def forward(hidden, attention_mask=None):
        return hidden

    assert cache_argument(forward) is None
    assert cache_of({"logits": 1}) is None
    with pytest.raises(TypeError, match="takes no cache: none of cache, past_key_values"):
        with_cache(forward, None)


def test_installed_transformers_takes_that_name_everywhere():
    """The model, its layers and its masks agree with the installed version's own signature, also
    behind PEFT's wrapper, which has no such argument."""
    from peft import LoraConfig, get_peft_model
    from transformers.masking_utils import create_causal_mask
    from transformers.models.llama import modeling_llama

    named = {
        cache_argument(function)
        for function in (
            create_causal_mask,
            modeling_llama.LlamaDecoderLayer.forward,
            transformers.LlamaForCausalLM.forward,
        )
    }
    assert len(named) == 1
    name = named.pop()
    assert name in inspect.signature(transformers.LlamaForCausalLM.forward).parameters
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=8,
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
        )
    )
    wrapped = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    assert model_with_cache(wrapped, "kept") == {name: "kept"}


@pytest.mark.parametrize(
    ("family", "own", "back"),
    [
        ("llama", False, True),
        ("mamba", False, False),
        ("rwkv", True, False),  # its state is no cache
        ("minimax", True, False),  # its class of cache refuses to drop tokens
        ("minimax_m2", False, True),
        ("kimi_linear", False, False),
        ("mpt", False, True),
    ],
)
def test_a_model_says_which_cache_it_takes(family, own, back):
    model = model_of(family, "meta")
    assert makes_its_own(model) is own
    assert rolls_back(model) is back


def test_a_cache_that_is_not_returned_is_kept():
    model, ids = model_of("recurrent_gemma"), torch.arange(5, 25)
    text = generate(Target(model, drafted=False), None, ids[:14], 8, []).tokens
    stock = model.generate(ids[None, :14], max_new_tokens=8, do_sample=False, eos_token_id=None)
    assert text == stock[0, 14:].tolist()


@pytest.mark.parametrize("family", ["minimax", "openai-gpt"])
def test_a_model_without_a_usual_cache_writes_as_transformers_does(family):
    model = model_of(family)
    prompt = torch.arange(5, 15)
    text = generate(Target(model), None, prompt, 8, []).tokens
    stock = model.generate(prompt[None], max_new_tokens=8, do_sample=False, eos_token_id=None)
    assert text == stock[0, len(prompt) :].tolist()
    with pytest.raises(DrafterError, match="cannot be rolled back"):
        generate(Target(model), PromptLookup(), prompt, 8, [])
