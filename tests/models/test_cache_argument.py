"""The cache's name in signatures of any version."""

import inspect

import pytest
import transformers

from trainer.models.cache_argument import (
    NAMES,
    cache_argument,
    cache_of,
    model_with_cache,
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
