"""RoSA's adapter with settings of a test."""

from __future__ import annotations

from typing import Any

from adapters.rosa import RoSAAdapter


def make(**changes: Any) -> RoSAAdapter:
    settings = {
        "rank": 4,
        "alpha": 6.0,
        "rslora": False,
        "dropout": 0.0,
        "density": 0.02,
        "density_pattern": {},
        "schedule": "wl",
        "warmup_steps": 0,
        "mask_steps": 1,
        "restart_after_mask": False,
        "count_mask_steps": True,
        "mask": "random",
        "score": "squared",
        "scores": "exact",
        "mask_seed": 0,
        "sparse_lr_ratio": 1.0,
        "sparse_weight_decay": 0.0,
        "target_modules": "all-linear",
        "exclude_modules": [],
        "gradient": "sampled",
        "dtype": "float64",
        "sparse_dtype": "float64",
        "within": "all",
        "target_parameters": [],
        "train_modules": [],
    }
    return RoSAAdapter(**settings | changes)
