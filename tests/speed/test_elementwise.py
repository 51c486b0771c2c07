"""The C code of elementwise parts against formulas in float64, and where it is used."""

from __future__ import annotations

import copy
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from adapters.delta import Start
from tests.toys import adapters as toys
from trainer.models.losses import CausalLoss, chunked_predictions
from trainer.speed import elementwise, fused, predictions, rotations

pytestmark = pytest.mark.skipif(elementwise.library() is None, reason="no C compiler")

DTYPES = [torch.float32, torch.bfloat16]
# units in the last place of the largest number: of one rounding to bf16, of a few in fp32
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-8}


def drawn(*shape: int, dtype: torch.dtype, seed: int = 0, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)


def assert_close(actual: Tensor, expected: Tensor, roundings: float = 1.0) -> None:
    """Within so many roundings of found's dtype, of each number or of the largest in fp32."""
    unit = roundings * TOLERANCE[actual.dtype]
    expected = expected.double()
    floor = 2e-6 * float(expected.abs().max())
    torch.testing.assert_close(actual.double(), expected, rtol=unit, atol=roundings * floor)


def exact(function: Any, *tensors: Tensor) -> tuple[Tensor, tuple[Tensor, ...], Tensor]:
    """(result, gradients, upstream gradient) of a function in float64."""
    leaves = [x.detach().double().requires_grad_() for x in tensors]
    out = function(*leaves)
    upstream = drawn(*out.shape, dtype=torch.float64, seed=9).to(tensors[0].dtype)
    return out.detach(), torch.autograd.grad(out, leaves, upstream.double()), upstream


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1,), (3, 5), (2, 7, 33), (16, 512)])
def test_gates_are_the_formula(dtype, shape):
    gate, up = (
        drawn(*shape, dtype=dtype, seed=1, scale=4.0),
        drawn(*shape, dtype=dtype, seed=2),
    )
    expected, slopes, upstream = exact(lambda g, u: g / (1 + (-g).exp()) * u, gate, up)
    assert_close(elementwise.gated(gate, up), expected)
    for actual, slope in zip(elementwise.gated_back(upstream, gate, up), slopes, strict=True):
        assert_close(actual, slope)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (2, 7, 33), (4, 576)])
def test_norms_are_the_formula(dtype, shape):
    x, w = drawn(*shape, dtype=dtype, seed=1, scale=3.0), drawn(shape[-1], dtype=dtype, seed=2)

    def formula(x: Tensor) -> Tensor:
        return w.double() * x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt()

    expected, (slope,), upstream = exact(formula, x)
    y, r = elementwise.norm(x, w, 1e-3)
    assert_close(y, expected, 2.0)  # rounded twice, as in transformers
    actual = elementwise.norm_back(upstream, x, w, r)
    # what is left of a difference has the rounding of what was subtracted
    scale = float((upstream.double() * w.double()).abs().max() * r.max())
    unit = TOLERANCE[dtype]
    torch.testing.assert_close(actual.double(), slope, rtol=unit, atol=4e-6 * scale)


def turned(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotate pair by pair; cosine and sine are (B, T, d)."""
    d = x.shape[-1]
    out = torch.empty_like(x)
    for i in range(d // 2):
        one, two = x[..., i], x[..., i + d // 2]
        c, s = cosine[:, None, :, :], sine[:, None, :, :]
        out[..., i] = one * c[..., i] - two * s[..., i]
        out[..., i + d // 2] = two * c[..., i + d // 2] + one * s[..., i + d // 2]
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("transposed", [False, True])
def test_rotations_are_the_formula(dtype, rows, transposed):
    shape = (2, 5, 3, 8) if transposed else (2, 3, 5, 8)
    x = drawn(*shape, dtype=dtype, seed=1)
    x = x.transpose(1, 2) if transposed else x
    cosine, sine = (drawn(rows, 5, 8, dtype=dtype, seed=seed) for seed in (2, 3))
    both = [angle.double().expand(2, 5, 8) for angle in (cosine, sine)]
    expected, (slope,), upstream = exact(lambda x: turned(x, *both), x)
    assert_close(elementwise.rotated(x, cosine, sine, back=False), expected)
    assert_close(elementwise.rotated(upstream, cosine, sine, back=True), slope)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("V", [2, 17, 2048, 5000])
@pytest.mark.parametrize("weighted", [False, True])
def test_losses_are_the_formula(dtype, V, weighted):
    n = 6
    logits = drawn(n, V, dtype=dtype, seed=1, scale=4.0)
    targets = torch.arange(n) * 7919 % V
    logits[0, targets[0]] = logits[0].max() + 1  # one that is right
    weights = drawn(n, dtype=torch.float32, seed=3).abs() if weighted else None
    wide = logits.double().requires_grad_()
    each = -torch.log_softmax(wide, -1)[torch.arange(n), targets]
    (slope,) = torch.autograd.grad((each if weights is None else each * weights).sum(), wide)
    losses, ranks, slopes = elementwise.entropy(logits, targets, weights, 5, True)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses.double(), each.detach(), rtol=2e-6, atol=2e-6)
    assert slopes is not None
    assert_close(slopes, slope, 1.01)
    order = [
        sum(1 for j in range(V) if (row[j] > row[t]) or (row[j] == row[t] and j < t))
        for row, t in zip(logits.tolist(), targets.tolist(), strict=True)
    ]
    assert ranks.tolist() == order
    assert order[0] == 0
    losses, ranks, none = elementwise.entropy(logits, targets, weights, 1, False)
    assert none is None
    assert (ranks == 0).tolist() == [rank == 0 for rank in order]


def test_the_first_of_equal_logits_is_the_guess():
    logits = torch.tensor([[1.0, 3.0, 3.0, 3.0]]).repeat(4, 1)
    for top in (1, 2):
        _, ranks, _ = elementwise.entropy(logits, torch.arange(4), None, top, False)
        assert (ranks == 0).tolist() == [False, True, False, False]
    assert ranks.tolist() == [3, 0, 1, 2]


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_stays_so(dtype):
    for bad in (float("nan"), float("inf"), -float("inf")):
        x = torch.ones(4, 64, dtype=dtype)
        x[1, 7] = bad
        plain = torch.ones(4, 64, dtype=dtype)
        loss = elementwise.entropy(x, torch.zeros(4, dtype=torch.int64), None, 1, True)
        # a logit of -inf is a masked token
        assert loss[0].isfinite().tolist() == [True, bad == -float("inf"), True, True]
        y, r = elementwise.norm(x, plain[0], 1e-6)
        if bad != bad:
            assert y[1].isnan().all()
            assert elementwise.norm_back(plain, x, plain[0], r)[1].isnan().all()
        assert not elementwise.gated(plain, x)[1, 7].isfinite()
        assert not elementwise.gated_back(x, plain, plain)[0][1, 7].isfinite()
    assert elementwise.gated(torch.full((1,), 1e4), torch.ones(1)).tolist() == [1e4]
    assert elementwise.gated(torch.full((1,), -1e4), torch.ones(1)).abs().max() < 1e-30


def test_masked_tokens_get_no_gradient():
    logits = torch.zeros(1, 8)
    logits[0, 3:] = -torch.inf
    _, _, slopes = elementwise.entropy(logits, torch.tensor([1]), None, 1, True)
    torch.testing.assert_close(slopes[0, :3], torch.tensor([1 / 3, -2 / 3, 1 / 3]))
    assert not slopes[0, 3:].any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_all_numbers_of_threads_give_the_same_bits(dtype, monkeypatch):
    monkeypatch.setattr(elementwise, "SHARE", 64)
    gate, up, dh = (drawn(7, 96, dtype=dtype, seed=seed) for seed in range(3))
    x, w, logits = drawn(9, 70, dtype=dtype), drawn(70, dtype=dtype), drawn(11, 300, dtype=dtype)
    q, angle = drawn(2, 3, 9, 16, dtype=dtype), drawn(1, 9, 16, dtype=dtype)
    targets = torch.arange(11)

    def everything() -> list[Tensor]:
        y, r = elementwise.norm(x, w, 1e-6)
        loss = elementwise.entropy(logits, targets, targets.float(), 3, True)
        return [
            elementwise.gated(gate, up),
            *elementwise.gated_back(dh, gate, up),
            *(y, r, elementwise.norm_back(x, x, w, r)),
            elementwise.rotated(q, angle, angle, back=True),
            *(part for part in loss if part is not None),
        ]

    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(everything())
    finally:
        torch.set_num_threads(threads)
    for others in results[1:]:
        assert all(one.equal(other) for one, other in zip(results[0], others, strict=True))


def test_small_numbers_of_the_process_stay():
    """A library linked with -ffast-math would round them to zero."""
    code = (
        "import torch; from trainer.speed import elementwise; assert elementwise.library();"
        "print(float(torch.tensor(1e-40) * 1))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) == pytest.approx(1e-40, rel=1e-3)


def test_what_c_does_not_support_is_torchs():
    x = torch.randn(3, 8)
    assert elementwise.supports(x, torch.nn.Parameter(x))
    assert not elementwise.supports(x.double())
    assert not elementwise.supports(x.half())
    assert not elementwise.supports(x, x.bfloat16())
    assert not elementwise.supports(x.to("meta"))
    with torch._subclasses.FakeTensorMode():
        assert not elementwise.supports(torch.empty(3))
    wide = x.double().requires_grad_()
    w = torch.ones(8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, w: fused.rms_norm(x, w, 1e-3, True), (wide, w))
    assert torch.autograd.gradcheck(lambda x: fused.swiglu(x, x, True), (wide,))


def test_a_trained_norm_gets_its_gradient():
    x, w = (drawn(5, 24, dtype=torch.float32, seed=seed).requires_grad_() for seed in (1, 2))
    w = w[0].detach().requires_grad_()
    actual = [
        torch.autograd.grad(fused.rms_norm(x, w, 1e-5, native).square().sum(), (x, w))
        for native in (False, True)
    ]
    for plain, ours in zip(*actual, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("target", [-1, 9])
def test_a_target_that_is_no_token_is_an_error(target):
    with pytest.raises((IndexError, RuntimeError)):
        predictions.with_slopes(torch.randn(1, 9), torch.tensor([target]), None, 1, True)


def test_numbers_of_torch_and_c_are_the_same():
    logits = drawn(40, 700, dtype=torch.bfloat16, scale=2.0)  # bf16 has many equal numbers
    targets = torch.arange(40) * 17
    logits[::2].scatter_(1, targets[::2, None], 9.0)
    weights = torch.rand(40)
    for top in (1, 5):
        plain, ours = (
            predictions.with_slopes(logits, targets, weights, top, native)
            for native in (False, True)
        )
        torch.testing.assert_close(ours[0], plain[0], rtol=1e-5, atol=1e-5)
        assert ours[1].equal(plain[1])
        assert ours[1].any()
        assert not ours[1].all()
        torch.testing.assert_close(ours[3], plain[3], rtol=2**-7, atol=1e-6)
        with torch.no_grad():
            summed = [
                chunked_predictions(
                    logits, targets, torch.nn.Identity(), 7, (), top, weights, native
                )[0]
                for native in (False, True)
            ]
        torch.testing.assert_close(summed[0], summed[1], rtol=1e-6, atol=0)


@pytest.mark.parametrize("trained", [False, True])
def test_a_model_trains_the_same(trained):
    plain: Any = toys.llama(torch.float32, vocab_size=97)
    torch.manual_seed(2)
    ids = torch.randint(3, 90, (2, 40))
    batch = {"input_ids": ids, "labels": ids.clone()}
    results = []
    for native in ((), elementwise.KINDS):
        model = copy.deepcopy(plain)
        counts = fused.fuse(model, native=native)
        if not trained:
            torch.manual_seed(1)
            toys.lora().attach(model, Start())
            for name, parameter in model.named_parameters():
                if name.endswith(".B"):
                    torch.nn.init.normal_(parameter, std=0.1)
        model.train()
        loss_of = CausalLoss(model, 8)
        assert loss_of.native is bool(native)
        loss, sums = loss_of(batch)
        loss.backward()
        slopes = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
        with torch.no_grad():
            evaluated, _ = loss_of(batch)
        results.append((loss.detach(), sums["right"], slopes, evaluated))
    assert counts["rotations"] == len(plain.model.layers)
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-6, atol=0)
    torch.testing.assert_close(results[0][3], results[1][3], rtol=1e-6, atol=0)
    assert results[0][1] == results[1][1]
    assert results[0][2].keys() == results[1][2].keys()
    for name, expected in results[0][2].items():
        atol = 2e-5 * float(expected.abs().max())
        torch.testing.assert_close(results[1][2][name], expected, rtol=0, atol=atol)


def test_a_rotation_of_another_formula_is_left_alone():
    def interleaved(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        def rotate(x: Tensor) -> Tensor:
            turned = torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)
            return x * cos.unsqueeze(1) + turned * sin.unsqueeze(1)

        return rotate(q), rotate(k)

    assert rotations._same(rotations.plain)
    assert not rotations._same(interleaved)
    assert not rotations._same(lambda q, k: (q, k))
    q, angle = torch.randn(1, 2, 3, 4), torch.randn(1, 3, 4)
    scaled = rotations.by_c(lambda q, k, cos, sin, unsqueeze_dim=1: (q * unsqueeze_dim, k))
    assert scaled(q, q, angle, angle, unsqueeze_dim=2)[0].equal(2 * q)
    assert scaled(q, q, angle.double(), angle.double())[0].equal(q)
