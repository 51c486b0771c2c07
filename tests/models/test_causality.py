"""Models that see later tokens are refused before they are trained as causal ones."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import RobertaConfig, RobertaForCausalLM

from tests.toys.families import model_of
from trainer.models.base import BaseError
from trainer.models.causality import check_causality

# attention of each kind, recurrences, and routing over the whole batch
CAUSAL = ["llama", "gpt2", "gemma3_text", "bloom", "mpt", "mixtral", "llama4_text", "mamba", "rwkv"]


def base_of(model: Any) -> Any:
    return SimpleNamespace(path="somewhere", config=model.config)


def roberta(**changes: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    return RobertaForCausalLM(
        RobertaConfig(
            vocab_size=64,
            num_hidden_layers=2,
            max_position_embeddings=64,
            initializer_range=0.3,
            **sizes,
            **changes,
        )
    )


def test_an_encoder_is_refused():
    model = roberta().train()
    with pytest.raises(BaseError, match=r"\(roberta\) sees later tokens.*task=classification"):
        check_causality(model, base_of(model))
    assert model.training


def test_the_same_model_as_a_decoder_is_not():
    model = roberta(is_decoder=True)
    check_causality(model, base_of(model))


@pytest.mark.parametrize("name", CAUSAL)
def test_causal_models_pass(name):
    model = model_of(name)
    check_causality(model, base_of(model))
