"""Products and attention of few rows by C, against torch in float64; and models that use them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from tests.toys import speculative as drafters
from trainer.config import schema
from trainer.decoding.speculative import Strategy, generate
from trainer.decoding.target_cache import TargetCache
from trainer.decoding.trees import chain, eagle2
from trainer.drafters import Target
from trainer.speed import few_rows, quick_layers, quick_passes

needs_library = pytest.mark.skipif(few_rows.library() is None, reason="no AVX-512 or no C compiler")


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def assert_rounded(actual: Tensor, expected: Tensor) -> None:
    """Within a rounding to bf16, and fp32's errors of what cancels out."""
    torch.testing.assert_close(actual.double(), expected, rtol=2**-8, atol=1e-5)


@needs_library
@pytest.mark.parametrize("outputs", [1, 9, 37])
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 6, 7, 11, 13, 64])
def test_products_are_the_formula(rows, outputs):
    x, w = drawn(2, rows, 96)[:, :rows], drawn(outputs, 96, seed=1)
    b = drawn(outputs, seed=2)
    y = few_rows.product(x[0], w)
    assert_rounded(y, x[0].double() @ w.double().T)
    # a row's numbers do not depend on the others
    assert torch.equal(few_rows.product(x[0][:1], w), y[:1])
    assert torch.equal(few_rows.product(x[0][None], w, b), (y + b)[None])


@needs_library
def test_threads_share_a_product(monkeypatch):
    x, w = drawn(3, 64), drawn(50, 64, seed=1)
    alone = few_rows.product(x, w)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    monkeypatch.setattr(few_rows, "SHARE", 64)
    assert torch.equal(few_rows.product(x, w), alone)


@needs_library
@pytest.mark.parametrize("kind", ["none", "seen", "added"])
@pytest.mark.parametrize(
    "shape",
    [(1, 4, 4, 1, 5, 16), (1, 6, 2, 3, 16, 48), (2, 9, 3, 7, 37, 64), (3, 2, 1, 32, 33, 32)],
)
def test_attention_is_the_formula(shape, kind):
    B, H, G, n, T, d = shape
    n = 1 if kind == "none" else n
    q = drawn(B, n, H, d).transpose(1, 2)
    # the start of longer tensors, as in a cache with room
    k, v = (drawn(B, G, T + 5, d, seed=seed)[:, :, :T] for seed in (1, 2))
    mask = None
    seen = torch.ones(B, 1, n, T, dtype=torch.bool)
    if kind != "none":
        seen = torch.rand(B, 1, n, T, generator=torch.Generator().manual_seed(3)) < 0.6
        seen[..., 0] = True
        mask = seen
    if kind == "added":
        low = torch.finfo(torch.bfloat16).min
        mask = torch.zeros(seen.shape, dtype=torch.bfloat16).masked_fill(~seen, low)
    assert few_rows.can_attend(q, k, v, mask)
    actual = few_rows.attended(q, k, v, mask, 0.3)
    wide = [x.double().repeat_interleave(H // x.shape[1], dim=1) for x in (q, k, v)]
    scores = (0.3 * wide[0] @ wide[1].mT).masked_fill(~seen, -math.inf)
    torch.testing.assert_close(
        actual.double(), (scores.softmax(-1) @ wide[2]).transpose(1, 2), rtol=2**-8, atol=2e-5
    )


def test_what_cannot_be_attended():
    q, k = drawn(1, 4, 2, 16), drawn(1, 2, 6, 16)
    mask = torch.ones(1, 1, 2, 6, dtype=torch.bool)
    assert few_rows.can_attend(q, k, k, mask)
    assert not few_rows.can_attend(q, k, k, None)  # causal: the second row sees more
    assert not few_rows.can_attend(q.float(), k.float(), k.float(), mask)
    assert not few_rows.can_attend(q, k, k, mask.float())
    assert not few_rows.can_attend(q, k, k, mask[..., :5])
    assert not few_rows.can_attend(q, k, k[:, :, :5], mask)
    assert not few_rows.can_attend(q[:, :3], k, k, mask)
    assert not few_rows.can_attend(q[..., :8], k[..., :8], k[..., :8], mask)


def made(of: Any = LlamaForCausalLM, config_of: Any = LlamaConfig, **settings: Any) -> Any:
    torch.manual_seed(0)
    config = config_of(
        vocab_size=160,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        head_dim=16,
        pad_token_id=0,
        **settings,
    )
    config._attn_implementation = "sdpa"
    return of(config).bfloat16().eval()


@pytest.fixture
def model() -> Any:
    return made()


@needs_library
@torch.no_grad()
def test_a_model_computes_the_same_while_it_is_quick(model, monkeypatch):
    monkeypatch.setattr(quick_passes, "_is_faster", lambda module: True)
    calls = []
    for name in ("product", "attended"):
        original = getattr(few_rows, name)
        monkeypatch.setattr(
            few_rows,
            name,
            lambda *a, original=original, name=name: calls.append(name) or original(*a),
        )
    ids = torch.arange(20)[None]
    plain, wide = model(ids).logits, model.float()(ids).logits
    model.bfloat16()
    mask = torch.ones(20, 20).tril().bool()[None, None]
    with quick_passes.quick(model, None):
        with quick_passes.quick(model):
            pass
        actual = model(ids, attention_mask=mask).logits
    assert (calls.count("product"), calls.count("attended")) == (2 * 7 + 1, 2)
    # no further from fp32 than torch is
    assert (actual - wide).abs().max() < 1.5 * (plain - wide).abs().max()
    calls.clear()
    assert torch.equal(model(ids).logits, plain)
    assert not calls
    assert all("forward" not in vars(module) for module in model.modules())
    assert model.model.layers[0].self_attn.config is model.config


@torch.no_grad()
def test_other_models_stay_as_they_are(model):
    model.float()
    ids = torch.arange(5)[None]
    plain = model(ids).logits
    with quick_passes.quick(model):
        assert torch.equal(model(ids).logits, plain)
        assert all("forward" not in vars(module) for module in model.modules())


@needs_library
def test_a_context_that_fails_leaves_the_model_plain(model, monkeypatch):
    monkeypatch.setattr(quick_passes, "_is_faster", lambda module: True)
    context = quick_passes.quick(model)
    context.__enter__()
    assert "forward" in vars(model.lm_head)
    assert not context.__exit__(ValueError, ValueError(), None)
    assert "forward" not in vars(model.lm_head)


@needs_library
def test_a_variable_keeps_torchs_kernels(model, monkeypatch):
    monkeypatch.setattr(quick_passes, "_is_faster", lambda module: True)
    monkeypatch.setenv("GRAFT_PLAIN_DECODING", "1")
    with quick_passes.quick(model):
        assert not any("forward" in vars(module) for module in model.modules())
    monkeypatch.delenv("GRAFT_PLAIN_DECODING")
    with quick_passes.quick(model):
        assert any("forward" in vars(module) for module in model.modules())


@needs_library
def test_a_slower_library_is_not_used(model, monkeypatch):
    monkeypatch.setattr(quick_passes, "_is_faster", lambda module: False)
    with quick_passes.quick(model):
        assert "forward" not in vars(model.lm_head)


@needs_library
def test_small_models_keep_torchs_kernels(model, monkeypatch):
    """There a measurement would decide by chance."""
    monkeypatch.setattr(quick_passes, "_faster", lambda shape, threads: True)
    with quick_passes.quick(model):
        assert "forward" not in vars(model.lm_head)
    monkeypatch.setattr(quick_passes, "SMALLEST", 1)
    quick_passes._plans.clear()
    with quick_passes.quick(model):
        assert "forward" in vars(model.lm_head)


@needs_library
def test_decoding_is_quick(model, monkeypatch):
    monkeypatch.setattr(quick_passes, "_is_faster", lambda module: True)
    rows = []
    original = quick_layers._computed
    monkeypatch.setattr(
        quick_layers, "_computed", lambda *a: rows.append(a[1].shape[1]) or original(*a)
    )
    generate(Target(model), None, torch.arange(5), 4, [])
    assert rows == [3] * 2 + [1] * 3 * 2  # first each layer is tried


@needs_library
@torch.no_grad()
def test_layers_compute_the_same_with_a_cache(model, monkeypatch):
    monkeypatch.setattr(quick_passes, "_is_faster", lambda module: True)
    target, calls = Target(model), []
    original = quick_layers._computed
    monkeypatch.setattr(
        quick_layers, "_computed", lambda *a: calls.append(a[1].shape) or original(*a)
    )

    def passes() -> list[Tensor]:
        """Of a chain, a tree and single tokens, and the cache at the end."""
        cache = TargetCache(target, whole=True)
        cache.open([torch.arange(7)])
        cache.start_rollback()
        states = [cache.read([torch.arange(9, 12)], [[0, 1]])[0][0]]
        cache.commit([[0]])
        states.append(cache.read([torch.arange(20, 25)], [[-1, -1, 0, 1]])[0][0])
        cache.commit([[1, 3]])
        states.append(cache.read([torch.tensor([3])], [[]])[0][0])
        cache.commit([[]])
        layer: Any = cache.cache.layers[1]
        return [*states, layer.keys[0], layer.values[0]]

    plain = passes()
    wide = target.model.float() and passes()
    model.bfloat16()
    with quick_passes.quick(model):
        actual = passes()
    # first each layer is tried
    assert [shape[1] for shape in calls] == [3, 3, 3, 3, 5, 5, 1, 1]
    for ours, torchs, exact in zip(actual, plain, wide, strict=True):
        error, usual = ((one.float() - exact).abs().max() for one in (ours, torchs))
        assert error < 1.5 * usual + 1e-3


@needs_library
@torch.no_grad()
def test_a_chain_rounds_as_its_tokens_one_by_one(model, monkeypatch):
    monkeypatch.setattr(quick_passes, "_is_faster", lambda module: True)
    states = []
    with quick_passes.quick(model):
        for size in (1, 4):
            cache = TargetCache(Target(model), whole=True)
            cache.open([torch.arange(40)])
            parts = torch.arange(50, 54).split(size)
            chains = [(part, [list(range(-1, len(part) - 2))]) for part in parts]
            read = []
            for part, above in chains:
                read.append(cache.read([part], above)[0][0])
                cache.commit([list(range(len(part) - 1))])
            states.append(torch.cat(read))
    assert torch.equal(*states)


@needs_library
@torch.no_grad()
def test_which_layers_are_one_call(model):
    def taken(model: Any) -> list[bool]:
        return [
            quick_layers.is_layer(layer) and quick_layers.computes_the_same(layer)
            for layer in model.model.layers
        ]

    assert taken(model) == [True, True]
    assert taken(made(MistralForCausalLM, MistralConfig)) == [True, True]
    assert taken(made(attention_bias=True)) == [False, False]
    assert taken(made(hidden_act="gelu")) == [False, False]
    # norms of queries and keys; a factor of what is added
    assert taken(made(Qwen3ForCausalLM, Qwen3Config)) == [False, False]
    granite = made(GraniteForCausalLM, GraniteConfig, residual_multiplier=0.5)
    assert quick_layers.is_layer(granite.model.layers[0])
    assert taken(granite) == [False, False]
    model.model.layers[0].mlp.register_forward_hook(lambda *_: None)
    model.model.layers[1].self_attn.q_proj = torch.nn.Sequential(torch.nn.Linear(64, 64))
    assert taken(model) == [False, False]


@needs_library
@torch.no_grad()
def test_an_adapter_that_comes_later_is_computed(model, monkeypatch):
    monkeypatch.setattr(quick_passes, "_is_faster", lambda module: True)
    with quick_passes.quick(model):
        pass
    changed = model.model.layers[0].mlp

    class Doubled(torch.nn.Module):
        def __init__(self, base: Any):
            super().__init__()
            self.base = base

        def forward(self, x: Tensor) -> Tensor:
            return 2 * self.base(x)

    changed.up_proj = Doubled(changed.up_proj)
    target = Target(model)
    results = []
    for models in ((), (model,)):
        cache = TargetCache(target, whole=True)
        with quick_passes.quick(*models):
            cache.open([torch.arange(7)])
            results.append(cache.read([torch.tensor([3])], [[]])[0][0].float())
    assert torch.allclose(*results, atol=0.05)
    changed.up_proj = changed.up_proj.base
    cache = TargetCache(target, whole=True)
    cache.open([torch.arange(7)])
    assert not torch.allclose(
        cache.read([torch.tensor([3])], [[]])[0][0].float(), results[0], atol=0.05
    )


@needs_library
def test_a_forward_of_anothers_is_called(model, monkeypatch):
    monkeypatch.setattr(quick_passes, "_is_faster", lambda module: True)
    first, second = model.model.layers
    with quick_passes.quick(model):
        assert "forward" in vars(first)
    first.mlp.down_proj.forward = lambda x: torch.zeros(*x.shape[:-1], 64)
    with quick_passes.quick(model):
        assert "forward" not in vars(first)
        assert "forward" in vars(second)
    assert "forward" in vars(first.mlp.down_proj)


# native brings a model of its own, and registers draft nothing
DRAFTERS = sorted({*schema.options("drafter")} - {"none", "native", "registers"})
SMALLER = {name: ["drafter.draft_vocab_size=null"] for name in ("eagle3", "peagle")}


@needs_library
@pytest.mark.parametrize("name", DRAFTERS)
def test_drafts_write_the_plain_text_in_bf16(model, monkeypatch, name):
    monkeypatch.setattr(quick_passes, "_is_faster", lambda module: True)
    drafter = drafters.made(name, model.float(), *SMALLER.get(name, [])).bfloat16()
    target = Target(model.bfloat16())
    prompt = torch.arange(3, 12)
    plain = generate(target, None, prompt, 12, []).tokens
    for shape in (chain(2), eagle2(2, 2, 4)) if name != "kangaroo" else (chain(2),):
        drafted = generate(target, drafter, prompt, 12, [], strategy=Strategy(shape))
        assert drafted.nodes > 0
        if not shape.branches:
            assert drafted.tokens == plain
