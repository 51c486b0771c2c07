"""Packed rows that see each other are noticed, whichever way a model lets them; rounding is none of
these ways."""

from __future__ import annotations

from collections import namedtuple
from types import SimpleNamespace

import pytest
import torch
import transformers
from torch import nn

from scripts.zoo.families_decoder import COMMON, EXPERTS
from scripts.zoo.making import spread
from trainer.models.base import Base, BaseError
from trainer.models.packing_check import check_packing_isolation


class Carrying(nn.Module):
    """Logits from a running sum over all tokens before, whatever the positions say."""

    def __init__(self, carries: float):
        super().__init__()
        self.embedding, self.carries = nn.Embedding(32, 8), carries
        torch.nn.init.normal_(self.embedding.weight, generator=torch.Generator().manual_seed(0))

    def forward(self, input_ids, position_ids=None, use_cache=False):
        x = self.embedding(input_ids)
        return namedtuple("Output", "logits")(x + self.carries * x.cumsum(1))


def test_a_model_that_carries_state_across_rows_is_not_packed(tiny):
    check_packing_isolation(Carrying(0.0), tiny)
    model = Carrying(1.0).train()
    with pytest.raises(BaseError, match=r"packed rows see each other .* Set packing=false"):
        check_packing_isolation(model, tiny)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_that_attends_can_be_packed_and_is_left_as_it_was(tiny, attention, dtype):
    model = Base(tiny.path, "auto", attention, "none", True).load(dtype).train()
    check_packing_isolation(model, tiny)
    assert model.training


class Counting(Carrying):
    """Rows of their own, but for positions that count on where a row begins: with `often` all of
    them, else one."""

    def __init__(self, often: bool):
        super().__init__(0.0)
        self.often = often

    def forward(self, input_ids, position_ids=None, use_cache=False):
        logits = super().forward(input_ids).logits
        shift = torch.full_like(logits, float(input_ids.shape[1]))
        if not self.often:
            shift[:, :-1] = 0.0
        return namedtuple("Output", "logits")(logits + shift)


class Leaking(Carrying):
    """Only a row's first token sees what stands before it, as in a short convolution that forgets
    no row."""

    def forward(self, input_ids, position_ids=None, use_cache=False):
        x = super().forward(input_ids).logits
        begins = (
            torch.zeros(x.shape[:2], dtype=torch.bool)
            if position_ids is None
            else position_ids == 0
        )
        return namedtuple("Output", "logits")(x + (begins.unsqueeze(-1) * x.roll(1, dims=1)))


def test_a_row_that_leaks_into_one_token_is_noticed(tiny):
    with pytest.raises(BaseError, match="packed rows see each other"):
        check_packing_isolation(Leaking(0.0), tiny)


def test_one_token_that_rounding_turns_over_is_no_other_row(tiny):
    check_packing_isolation(Counting(False), tiny)
    with pytest.raises(BaseError, match="packed rows see each other"):
        check_packing_isolation(Counting(True), tiny)


class Blocks(Carrying):
    """Rows of their own in the first block of 32 tokens, as where keys are chosen by block."""

    def forward(self, input_ids, position_ids=None, use_cache=False):
        x = super().forward(input_ids).logits
        return namedtuple("Output", "logits")(torch.cat([x[:, :32], x[:, 32:] + x[:, :1]], dim=1))


def config_of(*kinds):
    config = SimpleNamespace(vocab_size=32, layer_types=list(kinds))
    config.get_text_config = lambda: config
    return SimpleNamespace(config=config, path="here")


def test_layers_that_choose_keys_are_checked_at_the_runs_own_length():
    model = Blocks(0.0)
    sparse = config_of("full_attention", "minimax_m3_sparse")
    check_packing_isolation(model, sparse)  # a few tokens do not show it
    with pytest.raises(BaseError, match="packed rows see each other"):
        check_packing_isolation(model, sparse, 128)
    check_packing_isolation(Carrying(0.0), sparse, 128)
    check_packing_isolation(model, config_of("full_attention", "sliding_attention"), 128)


@pytest.mark.long
def test_packed_rows_of_block_sparse_attention_are_refused_beyond_a_block():
    config = transformers.AutoConfig.for_model(
        "minimax_m3_vl_text",
        **(COMMON | EXPERTS),
        layer_types=["full_attention", "minimax_m3_sparse"],
        index_block_size=16,
        index_topk_blocks=4,
        index_n_heads=2,
        index_head_dim=8,
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    spread(model)
    base = SimpleNamespace(config=config, path="here")
    check_packing_isolation(model, base, 15)
    with pytest.raises(BaseError, match="packed rows see each other"):
        check_packing_isolation(model, base, 128)
