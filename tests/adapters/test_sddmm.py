"""The gradient at few entries against a plain loop over them."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from torch import Tensor

from adapters import native as native_code
from adapters import sddmm

# t, o, i, k: prime sizes, one row, one column, one token, all entries, one entry.
SIZES = [
    (5, 7, 11, 13),
    (3, 1, 17, 4),
    (4, 19, 1, 6),
    (1, 5, 3, 8),
    (6, 5, 7, 35),
    (2, 13, 3, 1),
    (7, 1, 1, 1),
]


def drawn(t: int, o: int, i: int, k: int, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(t + 31 * o + 997 * i)
    flat = torch.randperm(o * i, generator=draw)[:k].sort().values
    rows = (flat // i).tolist()
    return {
        "dy": torch.randn(t, o, generator=draw, dtype=torch.float64).to(dtype),
        "x": torch.randn(t, i, generator=draw, dtype=torch.float64).to(dtype),
        "flat": flat.int(),
        "crow": torch.tensor(
            [sum(row < r for row in rows) for r in range(o + 1)], dtype=torch.int32
        ),
        "col": (flat % i).int(),
    }


def naive(case: dict[str, Tensor]) -> Tensor:
    """The sum of the module's text, entry by entry and token by token."""
    dy, x = case["dy"].tolist(), case["x"].tolist()
    i = case["x"].shape[1]
    sums = []
    for entry in case["flat"].tolist():
        total = 0.0
        for t in range(len(dy)):
            total += dy[t][entry // i] * x[t][entry % i]
        sums.append(total)
    return torch.tensor(sums, dtype=torch.float64)


def sampled(case: dict[str, Tensor]) -> Tensor:
    return sddmm.sampled(case["dy"], case["x"], case["crow"], case["col"])


def gathered(case: dict[str, Tensor], *chunk: int) -> Tensor:
    return sddmm.gathered(case["dy"], case["x"], case["flat"], *chunk)


@pytest.mark.parametrize("sizes", SIZES)
def test_both_ways_are_the_loop(sizes):
    case = drawn(*sizes)
    expected = naive(case)
    assert expected.abs().min() > 0
    actual = sampled(case)
    assert actual.dtype == torch.float64
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(gathered(case), expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("rows", [1, 2, 3, 6, 1000])
def test_rows_are_taken_some_at_a_time(sizes, rows):
    case = drawn(*sizes)
    i = sizes[2]
    torch.testing.assert_close(gathered(case, rows * i), naive(case), rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(
        gathered(case, rows * i + i - 1), naive(case), rtol=1e-12, atol=1e-13
    )


def test_a_chunk_smaller_than_a_row_is_one_row():
    case = drawn(5, 7, 11, 13)
    torch.testing.assert_close(gathered(case, 1), naive(case), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("flat", [[0, 1, 2], [74, 75, 76], [0, 76], [33, 34, 43]])
def test_rows_without_an_entry_cost_and_give_nothing(flat):
    case = drawn(5, 7, 11, 1) | {
        "flat": torch.tensor(flat, dtype=torch.int32),
        "col": torch.tensor(flat).int() % 11,
    }
    case["crow"] = torch.tensor(
        [sum(entry // 11 < row for entry in flat) for row in range(8)], dtype=torch.int32
    )
    for actual in (sampled(case), gathered(case), gathered(case, 11), gathered(case, 22)):
        torch.testing.assert_close(actual, naive(case), rtol=1e-12, atol=1e-13)


def test_no_more_of_the_dense_gradient_exists_than_was_said():
    case = drawn(5, 30, 20, 50)
    sizes: list[int] = []

    class Recorded(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(
            self, function: Any, types: Any, arguments: Any = (), keywords: Any = None
        ) -> Any:
            result = function(*arguments, **keywords or {})
            if function is torch.ops.aten.mm.default:
                sizes.append(result.numel())
            return result

    for chunk, most in ((40, 40), (59, 40), (600, 600), (1, 20)):
        sizes.clear()
        with Recorded():
            gathered(case, chunk)
        assert max(sizes) == most


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    case = drawn(37, 13, 17, 60, dtype)
    expected = naive(case)
    actual = sampled(case)
    assert actual.dtype == torch.float32
    # Products of two half-precision numbers are exact in fp32, so that only sums of 37 are rounded.
    assert (actual.double() - expected).abs().max() < 37 * 2**-24 * expected.abs().max()
    for rows in (1, 4, 13):
        actual = gathered(case, rows * 17)
        assert actual.dtype == dtype
        # Sums are fp32 inside of the product, and the result is rounded once.
        assert (actual.double() - expected).abs().max() < (
            torch.finfo(dtype).eps + 37 * 2**-24
        ) * expected.abs().max()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_no_tokens_give_zeros(dtype):
    case = drawn(0, 7, 11, 13, dtype)
    for actual in (sampled(case), gathered(case), gathered(case, 11)):
        assert torch.equal(actual.double(), torch.zeros(13, dtype=torch.float64))


def test_transposed_and_sliced_inputs():
    case = drawn(5, 7, 11, 13)
    apart = case | {
        "dy": case["dy"].t().contiguous().t(),
        "x": torch.stack([case["x"]] * 2, -1)[..., 0],
    }
    assert not apart["dy"].is_contiguous()
    assert not apart["x"].is_contiguous()
    for actual in (sampled(apart), gathered(apart), gathered(apart, 11)):
        torch.testing.assert_close(actual, naive(case), rtol=1e-12, atol=1e-13)


def test_inputs_are_left_alone():
    case = drawn(5, 7, 11, 13)
    before = {name: tensor.clone() for name, tensor in case.items()}
    first = sampled(case), gathered(case, 22)
    assert torch.equal(first[0], sampled(case))
    assert torch.equal(first[1], gathered(case, 22))
    assert all(torch.equal(tensor, before[name]) for name, tensor in case.items())


@pytest.mark.long
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_fastest_is_one_of_the_ways(dtype):
    for o, i, k in ((48, 64, 20), (1, 7, 1), (13, 11, 143)):
        assert sddmm.fastest(o, i, k, dtype, torch.device("cpu"), tokens=16) in sddmm.WAYS


@pytest.mark.long
@pytest.mark.parametrize("slow", ["sampled", "gathered"])
def test_the_fastest_is_the_one_that_takes_less_time(monkeypatch, slow):
    plain = getattr(sddmm, slow)

    def slowed(*arguments: Tensor) -> Tensor:
        time.sleep(0.02)
        return plain(*arguments)

    monkeypatch.setattr(sddmm, slow, slowed)
    fast = "gathered" if slow == "sampled" else "sampled"
    for k in (77, 768) if sddmm.library() is not None else (10, 77, 768):
        assert (
            sddmm.fastest.__wrapped__(24, 32, k, torch.float32, torch.device("cpu"), tokens=8)
            == fast
        )
    monkeypatch.setattr(sddmm, "library", lambda: None)
    assert (
        sddmm.fastest.__wrapped__(24, 32, 10, torch.float32, torch.device("cpu"), tokens=8) == fast
    )


def native(case: dict[str, Tensor]) -> Tensor:
    return sddmm.native(case["dy"], case["x"], case["crow"], case["col"])


compiled = pytest.mark.skipif(sddmm.library() is None, reason="no C compiler")


# Around blocks of 16 and 32 tokens, tiles of 128 and 256, and 16 columns; 4 products are taken at a
# time.
@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "sizes",
    [
        *SIZES,
        (0, 3, 5, 7),
        (15, 16, 32, 300),
        (33, 17, 31, 527),
        (128, 33, 48, 9),
        (257, 15, 17, 30),
        (609, 16, 1, 16),
    ],
)
def test_native_is_the_loop(sizes, dtype):
    case = drawn(*sizes, dtype)
    before = {name: tensor.clone() for name, tensor in case.items()}
    actual, expected = native(case), naive(case)
    assert actual.dtype == torch.float32
    # Products of bf16 numbers are exact in fp32, those of fp32 are rounded once; and sums of t of
    # them are.
    bound = naive(case | {"dy": case["dy"].abs(), "x": case["x"].abs()}) * (sizes[0] + 1) * 2**-24
    assert ((actual.double() - expected).abs() <= bound).all()
    assert torch.equal(actual, native(case))
    assert all(torch.equal(tensor, before[name]) for name, tensor in case.items())


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_native_takes_transposed_and_sliced_inputs_and_passes_on_what_is_not_finite(dtype):
    case = drawn(40, 7, 21, 60, dtype)
    apart = case | {
        "dy": case["dy"].t().contiguous().t(),
        "x": torch.stack([case["x"]] * 2, -1)[..., 0],
    }
    assert torch.equal(native(apart), native(case))
    case["x"][3, 5] = float("nan")
    case["x"][4, 6] = float("inf")
    expected = sampled(case)
    assert not torch.isfinite(expected).all()
    torch.testing.assert_close(native(case), expected, rtol=1e-4, atol=1e-4, equal_nan=True)


@compiled
@pytest.mark.parametrize(("threads", "tokens"), [(2, 600), (3, 600), (5, 257), (2, 256)])
def test_native_on_several_threads(monkeypatch, threads, tokens):
    case = drawn(tokens, 9, 18, 50, torch.bfloat16)
    alone = native(case)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    torch.testing.assert_close(native(case), alone, rtol=1e-5, atol=1e-5)
    assert torch.equal(native(case), native(case))


@compiled
def test_where_it_is_native_nothing_is_measured(monkeypatch):
    monkeypatch.setattr(sddmm, "_time", lambda *_: pytest.fail("two runs could take two ways"))
    for dtype in (torch.float32, torch.bfloat16):
        assert sddmm.fastest.__wrapped__(24, 32, 76, dtype, torch.device("cpu")) == "native"


@pytest.mark.long
@compiled
def test_it_is_compiled_once_for_a_machine(monkeypatch, tmp_path):
    monkeypatch.setenv("GRAFT_CACHE", str(tmp_path))
    sddmm.library.cache_clear()
    try:
        assert sddmm.library() is not None
        (built,) = (tmp_path / "native").iterdir()
        monkeypatch.setattr(
            native_code.subprocess, "run", lambda *_, **__: pytest.fail("it is there")
        )
        sddmm.library.cache_clear()
        assert sddmm.library() is not None
        monkeypatch.setattr(native_code, "processor", lambda: "another machine of the same home")
        monkeypatch.setattr(
            native_code.subprocess,
            "run",
            lambda *_, **__: (_ for _ in ()).throw(OSError("no compiler there")),
        )
        sddmm.library.cache_clear()
        assert sddmm.library() is None
        assert [*(tmp_path / "native").iterdir()] == [built]
    finally:
        sddmm.library.cache_clear()


def test_without_a_compiler_the_others_are_there(monkeypatch, tmp_path):
    monkeypatch.setenv("GRAFT_CACHE", str(tmp_path))
    for compiler in (str(tmp_path / "none"), "false", "true"):  # true makes no library
        monkeypatch.setenv("CC", compiler)
        sddmm.library.cache_clear()
        try:
            assert sddmm.library() is None
            assert not sddmm.native_available(torch.float32, torch.device("cpu"))
            assert sddmm.fastest.__wrapped__(
                8, 8, 4, torch.float32, torch.device("cpu"), tokens=4
            ) in ("sampled", "gathered")
        finally:
            sddmm.library.cache_clear()
