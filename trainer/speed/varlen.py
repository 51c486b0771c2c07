"""torch's own attention for packed rows on a GPU, torch.nn.attention.varlen (torch 2.10): its time
grows with the length of the rows and not of their sequence, as flash-attn's, without the package.

It is an attention of transformers under the name VARLEN, with the masks of sdpa. A batch whose mask
says no more than where rows begin and end is computed by row bounds; any other, such as one with
padding or with a cache, by sdpa and its mask.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from trainer.speed.flash import WIDEST, head_width, rows_of_pass

VARLEN = "varlen"  # the attention's name in transformers
MODULE = "torch.nn.attention.varlen"
UNSUPPORTED = ("position_bias", "cache", "softcap", "s_aux", "head_mask")


def use_varlen(model: nn.Module, device: torch.device, dtype: torch.dtype) -> bool:
    """Make `model` compute the attention of packed rows by torch's varlen kernel. Return False, and
    change nothing, if this torch has none, or it does not support this model, dtype or GPU."""
    if (
        device.type != "cuda"
        or dtype not in (torch.bfloat16, torch.float16)
        or model.config._attn_implementation != "sdpa"  # type: ignore[union-attr]
        or not getattr(model, "_supports_flash_attn", False)
        or head_width(model) > WIDEST
        or importlib.util.find_spec(MODULE) is None
        or torch.cuda.get_device_capability(device) < (8, 0)
    ):
        return False
    register()
    model.set_attn_implementation(VARLEN)  # type: ignore[operator]
    return True


def register() -> None:
    """Make this attention known to transformers."""
    if VARLEN not in ALL_ATTENTION_FUNCTIONS:
        ALL_ATTENTION_FUNCTIONS.register(VARLEN, varlen_attention_forward)
        ALL_MASK_ATTENTION_FUNCTIONS.register(VARLEN, noted_mask)


def noted_mask(*arguments: Any, **options: Any) -> Tensor | None:
    """Return the mask of sdpa, with a note if nothing but the rows' bounds decided it."""
    mask = sdpa_mask(*arguments, **options)
    if mask is not None and options.get("attention_mask") is None:
        mask.by_rows = True  # type: ignore[attr-defined]
    return mask


def varlen_attention_forward(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any
) -> tuple[Tensor, None]:
    """Compute what transformers calls attention "varlen". query is (B, H, T, d), key and value have
    K heads; returns (B, T, H, d)."""
    positions: Tensor | None = options.get("position_ids")
    B, H, T, d = query.shape
    by_rows = (
        isinstance(attention_mask, Tensor)
        and getattr(attention_mask, "by_rows", False)
        and positions is not None
        and positions.shape == (B, T)
        and key.shape[2] == T
        and value.shape[-1] == d
        and getattr(module, "is_causal", True)
        and options.get("is_causal") is not False
        and not options.get("dropout")
        and all(options.get(name) is None for name in UNSUPPORTED)
    )
    if not by_rows:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    assert positions is not None
    rows = rows_of_pass(positions)
    window = options.get("sliding_window")
    q, k, v = (x.transpose(1, 2).reshape(B * T, -1, d) for x in (query, key, value))
    out = importlib.import_module(MODULE).varlen_attn(
        q,
        k,
        v,
        rows["cu_seq_lens_q"],
        rows["cu_seq_lens_k"],
        rows["max_length_q"],
        rows["max_length_k"],
        scale=options.get("scaling"),
        # itself and what is before it; transformers' window counts the query itself
        window_size=(-1, 0) if window is None else (window - 1, 0),
        enable_gqa=key.shape[1] != H,
    )
    return out.view(B, T, H, d), None
