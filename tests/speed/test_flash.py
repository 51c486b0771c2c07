"""Flash attention keeps packed rows apart in batches of several sequences. Plain loops stand in for
its kernels, which need a GPU: what is tested is what transformers and the trainer give them."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers import modeling_flash_attention_utils as flash
from transformers.integrations.flash_attention import flash_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tests.toys import adapters as toys
from trainer.models import base
from trainer.models.base import Base, BaseError
from trainer.models.losses import CausalLoss
from trainer.models.packing_check import check_packing_isolation
from trainer.speed import flash as flash_module

ROWS = ([5, 3, 8], [2, 9, 4, 1])  # lengths in the two sequences of a batch


def row(query, key, value, scale):
    """One row by itself: (n, heads, d) each; heads of keys may be fewer."""
    out = torch.empty(query.shape[:2] + value.shape[2:], dtype=torch.float64)
    of = query.shape[1] // key.shape[1]
    for head in range(query.shape[1]):
        for i in range(len(query)):
            scores = torch.stack(
                [
                    (query[i, head].double() @ key[j, head // of].double()) * scale
                    for j in range(i + 1)
                ]
            )
            out[i, head] = torch.softmax(scores, 0) @ value[: i + 1, head // of].double()
    return out.to(query.dtype)


def fixed(q, k, v, softmax_scale=None, causal=True, **_):
    scale = softmax_scale or 1 / math.sqrt(q.shape[-1])
    return torch.stack([row(*one, scale) for one in zip(q, k, v, strict=True)])


def varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale=None, **_):
    assert cu_seqlens_q.dtype == torch.int32
    assert cu_seqlens_q.equal(cu_seqlens_k)
    scale = softmax_scale or 1 / math.sqrt(q.shape[-1])
    parts = [
        slice(a, b)
        for a, b in zip(cu_seqlens_q[:-1].tolist(), cu_seqlens_q[1:].tolist(), strict=True)
    ]
    return torch.cat([row(q[part], k[part], v[part], scale) for part in parts])


@pytest.fixture
def kernels(monkeypatch):
    """Flash attention by the loops above, in transformers' own paths."""

    def options(
        query_length,
        key_length,
        is_causal,
        dropout,
        softmax_scale,
        max_seqlen_q=None,
        max_seqlen_k=None,
        **_,
    ):
        return {
            "softmax_scale": softmax_scale,
            "max_seqlen_q": max_seqlen_q,
            "max_seqlen_k": max_seqlen_k,
        }

    monkeypatch.setattr(
        flash,
        "lazy_import_flash_attention",
        lambda *_, **__: ((fixed, varlen, None, None, None), (options, None)),
    )
    for name in flash_module.NAMES:
        monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, name, flash_attention_forward)


def packed():
    lengths = [sum(rows) for rows in ROWS]
    ids = torch.randint(1, 60, (2, max(lengths)), generator=torch.Generator().manual_seed(1))
    positions = torch.zeros_like(ids)
    for i, rows in enumerate(ROWS):
        positions[i, : lengths[i]] = torch.cat([torch.arange(n) for n in rows])
    labels = ids.clone()
    labels[positions == 0] = -100
    return {"input_ids": ids, "position_ids": positions, "labels": labels}


def by_flash(model):
    model.config._attn_implementation = flash_module.FLASH
    return model


@pytest.mark.long
@pytest.mark.parametrize("count", [1, 2])
def test_loss_and_gradients_are_those_of_masked_attention(kernels, count):
    flash_module.isolate_packed_rows()
    batch = {key: value[:count] for key, value in packed().items()}
    actual = []
    for model in (toys.llama(), by_flash(toys.llama())):
        loss, sums = CausalLoss(model, None)(batch)
        loss.backward()
        actual.append((loss.detach(), sums["right"], [p.grad for p in model.parameters()]))
    (masked, right, expected), (apart, same, gradients) = actual
    assert torch.allclose(masked, apart, rtol=1e-5)
    assert right == same
    assert all(
        torch.allclose(g, w, rtol=1e-3, atol=1e-5) for g, w in zip(gradients, expected, strict=True)
    )


def test_transformers_alone_lets_rows_of_a_batch_see_each_other(kernels, tiny):
    """What the wrapper is for; where this fails it can go."""
    model = by_flash(toys.llama())
    with pytest.raises(BaseError, match="packed rows see each other"):
        check_packing_isolation(model, tiny)
    flash_module.isolate_packed_rows()
    check_packing_isolation(model, tiny)


def test_unpacked_batches_and_caches_are_left_alone(kernels):
    seen = []
    attend = flash_module._with_row_bounds(lambda *_, **options: seen.append(options))
    states = torch.zeros(2, 1, 4, 8)
    at = torch.arange(4)
    # unpacked: the model's own, for all alike
    attend(None, states, states, states, None, position_ids=at[None])
    attend(None, states, states, states, torch.ones(2, 4), position_ids=at.expand(2, 4))
    attend(None, states[:, :, :1], states, states, None, position_ids=at[:1].expand(2, 1))
    # transformers' own way
    attend(None, states[:1], states[:1], states[:1], None, position_ids=at[None])
    assert [set(options) for options in seen] == [{"position_ids"}] * 4
    attend(None, states, states, states, None, position_ids=at.expand(2, 4))
    assert seen[-1]["cu_seq_lens_q"].tolist() == [0, 4, 8]
    # one sequence whose rows its batch brings along
    flash_module.remember(one := at[None], torch.tensor([0, 1, 4], dtype=torch.int32), 3)
    attend(None, states[:1], states[:1], states[:1], None, position_ids=one)
    assert seen[-1]["cu_seq_lens_k"].tolist() == [0, 1, 4]
    assert seen[-1]["max_length_q"] == 3


def test_another_batch_has_its_own_rows():
    seen = []
    attend = flash_module._with_row_bounds(
        lambda *_, **options: seen.append(options["cu_seq_lens_q"].tolist())
    )
    states = torch.zeros(2, 1, 4, 8)
    for positions in ([[0, 1, 2, 3], [0, 1, 0, 1]], [[0, 1, 2, 0], [0, 1, 2, 3]]):
        arguments = torch.tensor(positions)
        attend(None, states, states, states, None, position_ids=arguments)
        attend(None, states, states, states, None, position_ids=arguments)
    assert seen == [[0, 4, 6, 8]] * 2 + [[0, 3, 4, 8]] * 2


@pytest.mark.long
def test_a_compiled_layer_has_the_rows_too():
    attend = flash_module._with_row_bounds(
        lambda module, query, *_, cu_seq_lens_q, max_length_q, **__: (
            query * max_length_q + cu_seq_lens_q.sum()
        )
    )

    def layer(states, positions):
        return attend(None, states, states, states, None, position_ids=positions) + 1

    compiled = torch.compile(layer, backend="eager", dynamic=True)
    for length in (4, 6):
        states, positions = (
            torch.ones(2, 1, length, 8),
            torch.arange(length).remainder(3).expand(2, length).clone(),
        )
        assert compiled(states, positions).equal(layer(states, positions))


def test_rows_begin_where_positions_do_not_go_on():
    positions = packed()["position_ids"]
    actual = flash_module.rows_of(positions)
    bounds, at = [0], 0
    for i, rows in enumerate(ROWS):
        for n in [*rows, *[1] * (positions.shape[1] - sum(ROWS[i]))]:  # padding is rows of one
            at += n
            bounds.append(at)
    assert actual["cu_seq_lens_q"].tolist() == actual["cu_seq_lens_k"].tolist() == bounds
    assert actual["max_length_q"] == actual["max_length_k"] == max(map(max, ROWS))


GOOD = {
    "device": "cuda",
    "dtype": torch.bfloat16,
    "installed": True,
    "capability": (8, 0),
    "supports": True,
    "width": 8,
}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"device": "cpu"},
        {"dtype": torch.float32},
        {"installed": False},
        {"capability": (7, 5)},
        {"supports": False},
        {"width": 512},
    ],
    ids=str,
)
def test_flash_attention_is_taken_where_it_can_be_had(kernels, monkeypatch, changes):
    case = GOOD | changes
    model, requested = toys.llama(head_dim=case["width"]), []
    monkeypatch.setattr(type(model), "_supports_flash_attn", case["supports"])
    monkeypatch.setattr(flash_module, "is_flash_attn_2_available", lambda: case["installed"])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: case["capability"])
    monkeypatch.setattr(model, "set_attn_implementation", requested.append)
    assert flash_module.use_flash(model, torch.device(case["device"]), case["dtype"]) is (
        not changes
    )
    assert requested == ([] if changes else [flash_module.FLASH])


@pytest.mark.parametrize(("requested", "had"), [("auto", "sdpa"), ("eager", "eager")])
def test_auto_is_sdpa_until_a_run_finds_better(tiny, requested, had):
    assert (
        Base(tiny.path, "auto", requested, "none", True)
        .load(torch.float32)
        .config._attn_implementation
        == had
    )


def test_flash_attention_that_is_not_installed_is_told(tiny):
    with pytest.raises(
        BaseError,
        match=r"flash_attention_2 is not available on this machine: .*attn_implementation=auto",
    ):
        Base(tiny.path, "auto", flash_module.FLASH, "none", True).load(torch.float32)


def test_flash_attention_by_name_keeps_rows_apart_too(tiny, monkeypatch):
    called = []
    monkeypatch.setattr(base, "isolate_packed_rows", lambda: called.append(True))
    monkeypatch.setattr(
        AutoModelForCausalLM,
        "from_pretrained",
        lambda *_, **arguments: (toys.llama(), {"missing_keys": []}),
    )
    for name in ("sdpa", flash_module.FLASH):
        Base(tiny.path, "auto", name, "none", True).load(torch.float32)
    assert called == [True]


def test_a_model_without_a_width_of_its_own(kernels, monkeypatch):
    model = SimpleNamespace(
        config=SimpleNamespace(
            get_text_config=lambda: SimpleNamespace(hidden_size=4096, num_attention_heads=8)
        ),
        _supports_flash_attn=True,
        modules=list,
    )
    monkeypatch.setattr(flash_module, "is_flash_attn_2_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    assert not flash_module.use_flash(model, torch.device("cuda"), torch.bfloat16)
