"""A precision is a dtype of the base and Lightning's way to compute."""

from __future__ import annotations

import pytest
import torch

from trainer.models import precision


@pytest.mark.parametrize(
    ("requested", "dtype", "trains", "expected"),
    [
        ("fp32", "auto", False, (torch.float32, "32-true", "fp32")),
        ("bf16-true", "auto", False, (torch.bfloat16, "32-true", "bf16-true")),
        ("bf16-true", "auto", True, (torch.bfloat16, "32-true", "bf16-true")),
        ("bf16-mixed", "auto", False, (torch.bfloat16, "bf16-mixed", "bf16-mixed")),
        # trained weights stay fp32
        ("bf16-mixed", "auto", True, (torch.float32, "bf16-mixed", "bf16-mixed")),
        ("16-mixed", "auto", False, (torch.float16, "16-mixed", "16-mixed")),
        ("fp32", "bfloat16", False, (torch.bfloat16, "32-true", "fp32")),
        ("bf16-true", "float32", False, (torch.float32, "32-true", "bf16-true")),
    ],
)
def test_a_precision_is_a_dtype_and_a_way_to_compute(requested, dtype, trains, expected):
    assert precision.compute(requested, dtype, trains, False) == expected


@pytest.mark.parametrize(
    ("fast", "trains", "cuda", "expected"),
    [
        (True, False, True, "bf16-true"),
        (True, False, False, "bf16-true"),
        (False, False, True, "fp32"),
        (False, False, False, "fp32"),
        (True, True, True, "bf16-mixed"),
        (True, True, False, "fp32"),
    ],
)
def test_auto_is_bf16_where_that_is_fast(monkeypatch, fast, trains, cuda, expected):
    monkeypatch.setattr(precision, "bf16_is_fast", lambda cuda: fast)
    assert precision.compute("auto", "auto", trains, cuda)[2] == expected
