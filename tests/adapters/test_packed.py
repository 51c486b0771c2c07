"""4-bit layers whose tensors FSDP2 can shard compute what bitsandbytes' layers compute."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from adapters import shards
from adapters.linear import float_weight, is_packed
from adapters.packed import Packed4bit, unpack_parameters

bnb = pytest.importorskip("bitsandbytes")


def layer(double: bool, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    linear = nn.Linear(64, 96, bias=True).to(dtype)
    made = bnb.nn.Linear4bit(
        64, 96, True, compute_dtype=dtype, compress_statistics=double, quant_type="nf4"
    )
    made.load_state_dict(linear.state_dict())
    made.to("cpu")  # quantises
    made.support_avx512bf16_for_cpu = False
    return made


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_bits_forward_and_backward(double, dtype):
    theirs = layer(double, dtype)
    model = nn.Sequential(copy.deepcopy(theirs), nn.Linear(96, 2))
    unpack_parameters(model, torch.device("cpu"))
    ours = model[0]
    assert isinstance(ours, Packed4bit)
    assert is_packed(ours)
    assert all(type(p) is nn.Parameter and not p.requires_grad for p in (ours.weight, ours.absmax))
    assert torch.equal(float_weight(ours), float_weight(theirs))
    out, gradients = [], []
    for module in (ours, theirs):
        x = torch.randn(5, 64, generator=torch.Generator().manual_seed(1)).to(dtype)
        x.requires_grad_()
        out.append(module(x))
        out[-1].float().square().sum().backward()
        gradients.append(x.grad)
    assert torch.equal(*out)
    assert torch.equal(*gradients)
    assert float(gradients[0].norm()) > 0


def test_constants_are_those_of_the_parameter():
    """Not those that the layer was made with: FSDP2 replaces them by gathered ones."""
    ours = Packed4bit(layer(False, torch.float32), torch.device("cpu"))
    x = torch.randn(2, 64)
    before = ours(x) - ours.bias
    with torch.no_grad():
        ours.absmax.mul_(2)
    assert torch.allclose(ours(x) - ours.bias, 2 * before, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 2, 5, 7, 9])  # fewer than ranks, and not as many in each
def test_bounds_are_where_the_shards_are(rows):
    full, ends = torch.arange(rows * 4.0).view(rows, 4), [0]
    for rank in range(3):
        torch.distributed.init_process_group("fake", rank=rank, world_size=3, store=FakeStore())
        try:
            mesh = init_device_mesh("cpu", (3,))
            shard = distribute_tensor(full, mesh, [Shard(0)], src_data_rank=None)
            start, end = shards.bounds(shard)
            assert torch.equal(shards.local(shard).flatten(), full.flatten()[start:end])
            doubled = shards.shard_like(shard, 2 * full)
            assert torch.equal(shards.local(doubled), 2 * shards.local(shard))
        finally:
            torch.distributed.destroy_process_group()
        assert start == ends[-1]
        ends.append(end)
    assert ends[-1] == full.numel()


def test_tensors_that_are_not_sharded_stay_as_they_are():
    tensor = torch.arange(6.0)
    assert shards.bounds(tensor) == (0, 6)
    assert shards.whole(tensor).data_ptr() == shards.local(tensor).data_ptr() == tensor.data_ptr()
    assert shards.shard_like(tensor, 3) == 3
