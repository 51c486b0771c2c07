"""A pytest plugin that imitates a processor whose matrix products round differently for each shape.

    python -m pytest -p tests.other_processor

Kernels add in an order that depends on the processor and on the shapes. A test that expects the
same bits of two shapes passes where their orders happen to agree, and fails elsewhere. Here the
last bit of each fp32 and fp64 product depends on the shapes and on the place in the result, so such
a test fails on every machine. The same code with the same shapes still gives the same bits.

Only tests of modules that compare numbers run, and none that runs the whole program.
"""

from __future__ import annotations

import os
import re
import warnings
import zlib
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import marks

PRODUCTS = ("mm", "addmm", "bmm", "baddbmm")
COMPARES = re.compile(r"assert_close|torch\.equal|approx\(")
_library = torch.library.Library("aten", "IMPL")  # the replacements live as long as this object


@cache
def last_bits(shapes: tuple[Any, ...], size: int, dtype: torch.dtype) -> torch.Tensor:
    """What each number of a result is multiplied by: 1, or one of its neighbours."""
    seed = zlib.crc32(repr(shapes).encode()) % 1009
    turn = (torch.arange(size) * 31 + seed) % 5
    return 1 + torch.finfo(dtype).eps * ((turn == 0).to(dtype) - (turn == 1).to(dtype))


def _replace(name: str) -> None:
    kernel = torch.library.get_kernel(f"aten::{name}", "CPU")

    def product(keys: Any, *arguments: Any, **options: Any) -> Any:
        result = kernel.call_boxed(keys, *arguments, **options)
        if result.dtype not in (torch.float32, torch.float64):
            return result
        shapes = [(*a.shape, *a.stride()) for a in arguments if isinstance(a, torch.Tensor)]
        bits = last_bits((name, *shapes), result.numel(), result.dtype)
        return result.mul_(bits.view(result.shape))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a kernel is replaced
        _library.impl(name, product, "CPU", with_keyset=True, allow_override=True)


# torch is imported before tests/conftest.py sets OpenMP's threads.
torch.set_num_threads(int(os.environ.get("GRAFT_TEST_THREADS", "1")))
for _name in PRODUCTS:
    _replace(_name)


@cache
def compares(path: Path) -> bool:
    """Whether a module of tests compares numbers."""
    return bool(COMPARES.search(path.read_text("utf-8")))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the tests that compare no numbers and those that start the program or a process."""
    chosen = [item for item in items if compares(item.path) and not marks.runs(item)]
    config.hook.pytest_deselected(items=[item for item in items if item not in set(chosen)])
    items[:] = chosen
