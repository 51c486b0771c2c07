"""transformers' flash attention for packed rows: where it is had, and what keeps the rows of
several sequences apart in it.

The other ways of attention are given a mask that is made from the positions. Flash attention is
given where rows begin, and transformers reads that from the positions of a batch of one sequence
only: in a larger one each row would see those before it in its sequence.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers.utils import is_flash_attn_2_available

FLASH = "flash_attention_2"
NAMES = (FLASH, "flash_attention_3", "flash_attention_4")
WIDEST = 256  # numbers of a head that its kernels take


def use_flash(model: nn.Module, device: torch.device, dtype: torch.dtype) -> bool:
    """Have `model` compute attention by flash-attn, whose time for packed rows grows with their own
    lengths instead of their sequence's; whether that can be: the package is there, and it takes
    this model's class and heads, this dtype and this GPU."""
    config: Any = model.config.get_text_config()  # type: ignore[operator, union-attr]
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if (
        device.type != "cuda"
        or dtype not in (torch.bfloat16, torch.float16)
        or not getattr(model, "_supports_flash_attn", False)
        or width > WIDEST
        or not is_flash_attn_2_available()
        or torch.cuda.get_device_capability(device) < (8, 0)
    ):
        return False
    isolate_packed_rows()
    model.set_attn_implementation(FLASH)  # type: ignore[operator]
    return True


def isolate_packed_rows() -> None:
    """Have transformers' flash attention tell the rows of packed sequences apart in batches of any
    size, for all models."""
    # Here, as it takes a second or two, and not everybody who describes a base loads it.
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    for name in NAMES:
        attend = ALL_ATTENTION_FUNCTIONS.get(name)
        if attend is not None and not hasattr(attend, "isolates_packed_rows"):
            ALL_ATTENTION_FUNCTIONS.register(name, _with_row_bounds(attend))


def _with_row_bounds(attend: Callable[..., Any]) -> Callable[..., Any]:
    # all layers of a pass are given the same positions
    last: tuple[Any, dict[str, Any]] = (lambda: None, {})

    @torch.compiler.disable
    def rows(positions: Tensor) -> dict[str, Any]:
        nonlocal last
        if last[0]() is not positions:
            last = weakref.ref(positions), rows_of(positions)
        return last[1]

    def attend_within_rows(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **options: Any,
    ) -> Any:
        batch, length = query.shape[0], query.shape[2]
        positions: Tensor | None = options.get("position_ids")
        told = attention_mask is not None or "cu_seq_lens_q" in options
        whole = batch > 1 and length > 1 and key.shape[2] == length
        if whole and not told and positions is not None and positions.shape == (batch, length):
            options |= rows(positions)
        return attend(module, query, key, value, attention_mask, **options)

    attend_within_rows.isolates_packed_rows = True  # type: ignore[attr-defined]
    return attend_within_rows


def rows_of(positions: Int[Tensor, "B T"]) -> dict[str, Any]:
    """Where rows begin and end in a batch whose sequences follow one another, as transformers gives
    it to flash attention: a row ends where a sequence does, or the positions do not go on.

    Returns cu_seq_lens_q and cu_seq_lens_k, (rows + 1,) int32 from 0 to B T, and the longest row's
    length twice.
    """
    begins = torch.ones_like(positions, dtype=torch.bool)
    begins[:, 1:] = positions[:, 1:] != positions[:, :-1] + 1
    bounds = torch.cat(
        [begins.flatten().nonzero()[:, 0], begins.new_tensor([begins.numel()], dtype=torch.int64)]
    )
    longest = int(bounds.diff().max())
    bounds = bounds.to(torch.int32)
    return {
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": longest,
        "max_length_k": longest,
    }
