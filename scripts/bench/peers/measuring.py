"""The input and output of the contestants of scripts/bench/train.py.

A contestant is a script, run with `SPEC RESULT` in an interpreter that need not have our packages.
SPEC (JSON) names the model's folder, the rows of each step, the adapter's values at the start
(PEFT's layout) and the settings; RESULT (JSON) gets the wall-clock time of the end of each
optimiser step, the losses and the peak memory.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

IGNORED = -100
EIGHT = 8  # widths are padded to a multiple of it, by everyone
PACKAGES = ("torch", "transformers", "peft", "accelerate", "trl", "litgpt", "lightning")


def read() -> dict[str, Any]:
    """Read the settings that the command line names."""
    return json.loads(Path(sys.argv[1]).read_text("utf-8"))


def rows(spec: dict[str, Any]) -> list[list[dict[str, list[int]]]]:
    """The rows of each step: input_ids and labels, a label being the token itself where it is
    trained and -100 elsewhere."""
    return json.loads(Path(spec["rows"]).read_text("utf-8"))


def padded(batch: list[dict[str, list[int]]], pad: int) -> dict[str, list[list[int]]]:
    """input_ids, labels and, where there is padding, attention_mask of a batch, padded to the
    right."""
    longest = max(len(row["input_ids"]) for row in batch)
    width = -(-longest // EIGHT) * EIGHT
    columns: dict[str, list[list[int]]] = {"input_ids": [], "labels": [], "attention_mask": []}
    for row in batch:
        missing = width - len(row["input_ids"])
        columns["input_ids"].append(row["input_ids"] + [pad] * missing)
        columns["labels"].append(row["labels"] + [IGNORED] * missing)
        columns["attention_mask"].append([1] * (width - missing) + [0] * missing)
    if all(all(mask) for mask in columns["attention_mask"]):
        del columns["attention_mask"]
    return columns


def batches(spec: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The micro-batches of all steps as tensors (B, T) int64 on the device."""
    import torch

    for batch in rows(spec):
        yield {
            name: torch.tensor(values).to(spec["device"])
            for name, values in padded(batch, spec["pad"]).items()
        }


def base(spec: dict[str, Any]) -> Any:
    """Load the frozen model with transformers, in the run's precision."""
    import torch
    from transformers import AutoModelForCausalLM

    dtype = getattr(torch, spec["dtype"])
    return AutoModelForCausalLM.from_pretrained(
        spec["model"], dtype=dtype, attn_implementation="sdpa"
    ).to(spec["device"])


def lora(spec: dict[str, Any]) -> Any:
    """Return PEFT's config of the adapter."""
    from peft import LoraConfig

    return LoraConfig(
        r=spec["rank"],
        lora_alpha=spec["alpha"],
        lora_dropout=0.0,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )


def adapted(spec: dict[str, Any]) -> Any:
    """The model with PEFT's LoRA, its adapters in fp32 (PEFT's default) or in the base's dtype."""
    from peft import get_peft_model

    return begin(
        spec,
        get_peft_model(
            base(spec), lora(spec), autocast_adapter_dtype=spec["adapter_dtype"] == "float32"
        ),
    )


def begin(spec: dict[str, Any], model: Any) -> Any:
    """The PEFT model with the adapter's values at the start, which are the same for all."""
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    loaded: Any = set_peft_model_state_dict(model, load_file(spec["start"]))
    assert not loaded.unexpected_keys, loaded.unexpected_keys[:3]
    return model


class Clock:
    """The times at which optimiser steps end, and their losses."""

    def __init__(self, spec: dict[str, Any]):
        self.device, self.ends, self.losses = spec["device"], [], []  # type: ignore[var-annotated]

    def step(self, loss: float | None = None) -> None:
        """Call it when the optimiser has stepped; on a GPU it waits for the step to be done."""
        if self.device == "cuda":
            import torch

            torch.cuda.synchronize()
        self.ends.append(time.time())
        if loss is not None:
            self.losses.append(loss)

    def write(self, **more: Any) -> None:
        """Write RESULT."""
        Path(sys.argv[2]).write_text(
            json.dumps({"ends": self.ends, "losses": self.losses, **memory(), **more}), "utf-8"
        )


def memory() -> dict[str, Any]:
    """The process's largest resident memory and what torch's allocator had at most on the GPU, in
    bytes; versions of packages."""
    # of this program only; getrusage's may include the process that started it
    status = Path("/proc/self/status")
    lines = (
        [line for line in status.read_text().splitlines() if line.startswith("VmHWM")]
        if status.exists()
        else []
    )
    scale = 1 if sys.platform == "darwin" else 1024
    most = (
        int(lines[0].split()[1]) * 1024
        if lines
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
    )
    torch = sys.modules.get("torch")
    cuda = torch is not None and torch.cuda.is_available()
    return {
        "peak_rss": most,
        "peak_gpu": torch.cuda.max_memory_allocated() if torch and cuda else None,
        "gpu": torch.cuda.get_device_name() if torch and cuda else None,
        "threads": torch.get_num_threads() if torch else None,
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Return the versions of the relevant packages that are installed."""
    loaded = {}
    for name in PACKAGES:
        try:
            loaded[name] = version(name)
        except PackageNotFoundError:
            continue
    return loaded


def same_batches(spec: dict[str, Any], seen: Iterator[dict[str, Any]]) -> None:
    """Compare the batches of a trainer's loader with the rows: tokens, and the labels that are
    trained.

    Raises:
        AssertionError: they differ.
    """
    for number, (mine, theirs) in enumerate(zip(batches(spec), seen, strict=True)):
        for name in ("input_ids", "labels"):
            ours, other = mine[name], theirs[name].to(mine[name].device)
            # The first label is never trained, so a collator may mask it or not.
            assert ours.shape == other.shape, (
                f"step {number}: {name} of {tuple(other.shape)}, expected {tuple(ours.shape)}"
            )
            assert (ours[:, 1:] == other[:, 1:]).all(), f"step {number}: other {name}"
