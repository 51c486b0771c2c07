"""Tensors that FSDP2 shards among the ranks: a DTensor holds a rank's share, some of its rows.

The functions return other tensors unchanged, so that callers need not know whether a run is
sharded. `whole` is a collective: all ranks must call it together.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


def whole(tensor: Any) -> Tensor:
    """Gather a sharded tensor on each rank, detached."""
    sharded: Any = tensor.detach()  # a DTensor again, which torch's types do not say
    return sharded.full_tensor() if isinstance(tensor, DTensor) else sharded


def local(tensor: Any) -> Tensor:
    """Return this rank's share of a sharded tensor, detached. It shares the tensor's memory."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def bounds(tensor: Any) -> tuple[int, int]:
    """Return the first position of this rank's share in the flat tensor, and the one after its
    last. FSDP2 shards rows as torch.chunk does."""
    if not isinstance(tensor, DTensor):
        return 0, tensor.numel()
    mesh = tensor.device_mesh
    chunk = -(-tensor.shape[0] // mesh.size())
    row = tensor.numel() // tensor.shape[0]
    start = min(mesh.get_local_rank() * chunk, tensor.shape[0]) * row
    return start, start + tensor.to_local().numel()


def shard_like(shard: Any, value: Any) -> Any:
    """Return this rank's shard of a full tensor, with the placement of `shard`. Values that are no
    tensors of that shape are returned unchanged."""
    if not isinstance(shard, DTensor) or not isinstance(value, Tensor):
        return value
    if value.shape != shard.shape:
        return value
    return distribute_tensor(
        value.to(shard.device), shard.device_mesh, shard.placements, src_data_rank=None
    )
