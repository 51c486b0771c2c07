"""Attention of packed rows by torch's varlen kernel. Plain loops stand in for it where there is no
GPU: tests check its arguments, and when it is called."""

from __future__ import annotations

import itertools
import math
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.toys import adapters as toys
from trainer.models.losses import CausalLoss
from trainer.speed import varlen

ROWS = ([5, 3, 8], [2, 9, 5])  # lengths in the two sequences of a batch
GOOD = {
    "device": "cuda",
    "dtype": torch.bfloat16,
    "module": varlen.MODULE,
    "capability": (8, 0),
    "supports": True,
    "implementation": "sdpa",
    "width": 8,
}


def packed(device: str = "cpu") -> dict[str, Tensor]:
    ids = torch.randint(1, 60, (2, 16), generator=torch.Generator().manual_seed(1))
    positions = torch.stack([torch.cat([torch.arange(n) for n in rows]) for rows in ROWS])
    labels = ids.clone()
    labels[positions == 0] = -100
    batch = {"input_ids": ids, "position_ids": positions, "labels": labels}
    return {name: tensor.to(device) for name, tensor in batch.items()}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The calls of a kernel of loops, which stands in for torch's."""
    seen: list[dict[str, Any]] = []

    def varlen_attn(q, k, v, cu_q, cu_k, max_q, max_k, *, scale, window_size, enable_gqa):
        assert cu_q.dtype == torch.int32
        assert cu_q.equal(cu_k)
        assert max_q == max_k == int(cu_q.diff().max())
        assert enable_gqa == (q.shape[1] != k.shape[1])
        seen.append({"bounds": cu_q.tolist(), "window": window_size})
        group, parts = q.shape[1] // k.shape[1], []
        scale = scale or 1 / math.sqrt(q.shape[-1])
        bounds = cu_q.tolist()
        for a, b in itertools.pairwise(bounds):
            scores = (
                torch.einsum("ihd,jhd->hij", q[a:b], k[a:b].repeat_interleave(group, 1)) * scale
            )
            near = torch.ones(b - a, b - a, dtype=torch.bool).tril()
            if window_size[0] >= 0:
                near = near.triu(-window_size[0])
            weights = scores.masked_fill(~near, -torch.inf).softmax(-1)
            parts.append(torch.einsum("hij,jhd->ihd", weights, v[a:b].repeat_interleave(group, 1)))
        return torch.cat(parts)

    kernel = SimpleNamespace(varlen_attn=varlen_attn)
    monkeypatch.setitem(sys.modules, varlen.MODULE, kernel)
    varlen.register()
    return seen


def trained(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
    loss, _ = CausalLoss(model, None)(batch)
    loss.backward()
    return loss.detach(), [p.grad for p in model.parameters()]


def test_loss_and_gradients_are_those_of_masked_attention(calls):
    plain, ours = toys.llama(), toys.llama()
    ours.set_attn_implementation(varlen.VARLEN)
    loss, slopes = trained(plain, packed())
    actual, found_slopes = trained(ours, packed())
    torch.testing.assert_close(actual, loss, rtol=1e-5, atol=0)
    for one, other in zip(slopes, found_slopes, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-3, atol=1e-5)
    assert len(calls) == len(ours.model.layers)
    assert calls[0] == {"bounds": [0, 5, 8, 16, 18, 27, 32], "window": (-1, 0)}


def test_padding_and_caches_are_sdpas(calls):
    plain, ours = toys.llama().eval(), toys.llama().eval()
    ours.set_attn_implementation(varlen.VARLEN)
    ids = packed()["input_ids"]
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    for arguments in ({"attention_mask": mask}, {}):
        expected, actual = (model(ids, **arguments).logits for model in (plain, ours))
        torch.testing.assert_close(actual[mask.bool()], expected[mask.bool()], rtol=1e-4, atol=1e-5)
    settings: Any = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    assert ours.generate(ids, **settings).equal(plain.generate(ids, **settings))
    assert not calls


def test_a_window_counts_the_query(calls):
    query = torch.randn(1, 2, 6, 4, generator=torch.Generator().manual_seed(0))
    positions = torch.tensor([[0, 1, 2, 3, 0, 1]])
    index = torch.arange(6)
    row = torch.tensor([0, 0, 0, 0, 1, 1])
    near = (index[:, None] >= index) & (index[:, None] - index < 3) & (row[:, None] == row)
    mask = near[None, None].clone()
    mask.by_rows = True  # type: ignore[attr-defined]
    options = {"position_ids": positions, "sliding_window": 3}
    module = SimpleNamespace(is_causal=True)
    actual, _ = varlen.varlen_attention_forward(module, query, query, query, mask, **options)
    expected = torch.nn.functional.scaled_dot_product_attention(query, query, query, attn_mask=near)
    torch.testing.assert_close(actual, expected.transpose(1, 2), rtol=1e-5, atol=1e-6)
    assert calls[0]["window"] == (2, 0)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"device": "cpu"},
        {"dtype": torch.float32},
        {"module": "torch.nn.attention.none"},
        {"capability": (7, 5)},
        {"supports": False},
        {"implementation": "eager"},
        {"width": 512},
    ],
    ids=str,
)
def test_it_is_taken_where_it_can_compute(monkeypatch, changes):
    case = GOOD | changes
    model, requested = toys.llama(head_dim=case["width"]), []
    model.config._attn_implementation = case["implementation"]
    monkeypatch.setattr(varlen, "MODULE", case["module"])
    monkeypatch.setattr(type(model), "_supports_flash_attn", case["supports"])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: case["capability"])
    monkeypatch.setattr(model, "set_attn_implementation", requested.append)
    taken = varlen.use_varlen(model, torch.device(case["device"]), case["dtype"])
    assert taken is (not changes)
    assert requested == ([] if changes else [varlen.VARLEN])


def test_torchs_kernel_takes_what_it_gets():
    """Its shapes alone: the meta device has no numbers."""
    pytest.importorskip(varlen.MODULE)
    query, key = (torch.empty(2, H, 16, 8, device="meta", dtype=torch.bfloat16) for H in (4, 2))
    mask = torch.empty(1, device="meta")
    mask.by_rows = True  # type: ignore[attr-defined]
    options = {"position_ids": packed()["position_ids"], "scaling": 0.5, "sliding_window": 4}
    module = SimpleNamespace(is_causal=True)
    out, _ = varlen.varlen_attention_forward(module, query, key, key, mask, **options)
    assert out.shape == (2, 16, 4, 8)
    assert out.dtype == torch.bfloat16


@pytest.mark.gpu
def test_on_a_gpu_rows_are_kept_apart():
    plain, ours = (toys.llama(torch.bfloat16).cuda() for _ in range(2))
    if not varlen.use_varlen(ours, torch.device("cuda"), torch.bfloat16):
        pytest.skip("this torch or GPU has no varlen attention")
    loss, slopes = trained(plain, packed("cuda"))
    actual, found_slopes = trained(ours, packed("cuda"))
    torch.testing.assert_close(actual, loss, rtol=1e-2, atol=0)
    for one, other in zip(slopes, found_slopes, strict=True):
        torch.testing.assert_close(other, one, rtol=0, atol=0.05 * float(one.abs().max()))
