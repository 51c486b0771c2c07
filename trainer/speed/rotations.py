"""Rotary position embeddings by elementwise.c, in place of the function that a family's attention
calls (Su et al. 2021, arXiv 2104.09864)."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from trainer.speed import elementwise

NAME = "apply_rotary_pos_emb"  # transformers' name of the function, in each family's file


class _Rotation(torch.autograd.Function):
    """x (B, H, T, d) rotated by cos and sin (1 or B, T, d), which get no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        ctx.save_for_backward(cosine, sine)
        return elementwise.rotated(x, cosine, sine, back=False)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        cosine, sine = ctx.saved_tensors
        return elementwise.rotated(dy.to(cosine.dtype), cosine, sine, back=True), None, None


def by_c(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that computes what `function` does: by elementwise.c where that supports
    the arguments, by `function` otherwise."""

    def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *more: Any, **options: Any) -> Any:
        if more or options or not _supported(q, k, cos, sin):
            return function(q, k, cos, sin, *more, **options)
        return _Rotation.apply(q, cos, sin), _Rotation.apply(k, cos, sin)

    return rotate


def _supported(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> bool:
    if not elementwise.supports(q, k, cos, sin) or q.ndim != 4 or k.ndim != 4:
        return False
    B, _, T, d = q.shape
    shapes = (1, T, d), (B, T, d)
    return (
        cos.shape in shapes
        and sin.shape == cos.shape
        and k.shape[0] == B
        and k.shape[2:] == (T, d)
        and d % 2 == 0
        and not cos.requires_grad
        and not sin.requires_grad
    )


def plain(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate q and k as transformers' Llama does, in four passes over each."""

    def rotate(x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        turned = torch.cat([-second, first], dim=-1)
        return x * cos.unsqueeze(1) + turned * sin.unsqueeze(1)

    return rotate(q), rotate(k)


def put_in(model: nn.Module) -> int:
    """Let the attention of `model` rotate by elementwise.c, in place, where that computes the same,
    and return in how many modules it does."""
    tried: dict[Any, bool] = {}
    count = 0
    for module in model.modules():
        forward = getattr(type(module), "forward", None)
        if "forward" in vars(module) or NAME not in getattr(
            getattr(forward, "__code__", None), "co_names", ()
        ):
            continue
        function = forward.__globals__.get(NAME)  # type: ignore[union-attr]
        if function not in tried:
            tried[function] = function is not None and _same(function)
        if tried[function]:
            bound = types.MethodType(with_globals(forward, {NAME: by_c(function)}), module)
            module.forward = bound  # type: ignore[method-assign]
            count += 1
    return count


def _same(function: Callable[..., Any]) -> bool:
    """Return whether `function` computes what elementwise.c does, on random numbers."""
    generator = torch.Generator().manual_seed(0)
    shapes = (2, 3, 5, 8), (2, 1, 5, 8), (2, 5, 8), (2, 5, 8)
    arguments = [torch.randn(shape, generator=generator, dtype=torch.float32) for shape in shapes]
    with torch.no_grad():
        try:
            expected = function(*arguments)
        except Exception:  # another function of the same name may want other arguments
            return False
        result = by_c(function)(*arguments)
    return (
        isinstance(expected, tuple)
        and len(expected) == 2
        and all(
            one.shape == two.shape and torch.allclose(one, two, rtol=1e-5, atol=1e-5)
            for one, two in zip(expected, result, strict=True)
        )
    )


def with_globals(function: Any, names: dict[str, Any]) -> Any:
    """Return a copy of a function that sees other values under some of its global names."""
    copy = types.FunctionType(
        function.__code__,
        function.__globals__ | names,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy
