"""The contestants of scripts/bench/train.py, their options, and the environments of peers."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

ROOT = Path(__file__).resolve().parents[3]
DEFAULTS: dict[str, Any] = {
    "out": None,
    "data": "chat",
    "task": ["task=bfcl"],
    "base": "smollm2_135m",
    "shape": None,
    "vocabulary": 128256,
    "length": None,
    "batch_size": 8,
    "steps": 14,
    "warm": 4,
    "rounds": 3,
    "group_by_length": False,
    "precision": "auto",
    "adapter_dtype": "float32",
    "autocast": False,
    "gradient_checkpointing": False,
    "allocator": False,
    "rank": 16,
    "alpha": 32,
    "lr": 2e-4,
    "seed": 0,
    "device": "cpu",
    "threads": None,
    "contestants": ["ours", "hf_strongest", "ours_packed", "bare", "hf", "trl", "litgpt"],
    "variants": {},
    "extra": [],
    "envs": "~/.cache/graft/bench",
    "minutes": None,
}
BIG = {"data": "packed", "batch_size": 2, "length": 2048}  # with a shape
PEERS = {"bare": "bare.py", "hf": "hf_trainer.py", "trl": "trl_sft.py", "litgpt": "litgpt_lora.py"}
ENVIRONMENTS = {"bare": "trl", "hf": "trl", "trl": "trl", "litgpt": "litgpt"}
REQUIREMENTS = {
    "trl": ["transformers", "peft", "accelerate", "datasets", "trl==1.16.0"],
    "litgpt": ["litgpt==0.5.13"],
}
NOT_INSTALLED: dict[Path, str] = {}
OF_A_PEER = ("adapter_dtype", "autocast", "gradient_checkpointing", "allocator")
# HF Trainer with what costs it nothing: adapters in bf16, and malloc as trainer.speed.malloc sets
# it. It is the first to be compared with.
STRONGEST = {"hf_strongest": ("hf", ["adapter_dtype=bfloat16", "allocator=true"])}
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(1 << 30), "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1)}


def parsed(arguments: list[str]) -> dict[str, Any]:
    """Return the options of KEY=VALUE arguments.

    Raises:
        ValueError: an option or one of its values is unknown.
    """
    overrides: Any = OmegaConf.to_container(OmegaConf.from_dotlist(arguments))
    options = DEFAULTS | (BIG if overrides.get("shape") else {}) | overrides
    if unknown := sorted(set(options) - set(DEFAULTS)):
        raise ValueError(f"no option {', '.join(unknown)}")
    allowed = {
        "data": ("chat", "packed"),
        "shape": (None, "1b", "8b"),
        "precision": ("auto", "fp32", "bf16"),
        "device": ("cpu", "cuda"),
        "adapter_dtype": ("float32", "bfloat16"),
    }
    for name, values in allowed.items():
        if options[name] not in values:
            raise ValueError(f"{name}={options[name]}: it is one of {', '.join(map(str, values))}")
    if not 1 <= options["warm"] < options["steps"]:
        raise ValueError(
            f"warm={options['warm']}: at least one step is left out, and of"
            f" steps={options['steps']} one must remain"
        )
    if options["length"] is None:
        options["length"] = 256 if options["data"] == "packed" else 1024
    contestants(options)
    return options


def contestants(options: dict[str, Any]) -> dict[str, tuple[str, list[str]]]:
    """Return name -> (ours, ours_packed or a peer, its options), in their order.

    Raises:
        ValueError: a name is unknown.
    """
    programs: dict[str, tuple[str, list[str]]] = {}
    for name in options["contestants"]:
        if name in STRONGEST:
            programs[name] = STRONGEST[name][0], list(STRONGEST[name][1])
            continue
        if name not in ("ours", "ours_packed", *PEERS):
            raise ValueError(
                f"no contestant {name}; there are ours, ours_packed, hf_strongest,"
                f" {', '.join(PEERS)}; others are variants.NAME=[...]"
            )
        if name != "ours_packed" or options["data"] == "chat":
            programs[name] = name, []
    for name, variant in options["variants"].items():
        kind, rest = (
            (variant[0], variant[1:])
            if variant and variant[0] in ("ours_packed", *PEERS)
            else ("ours", variant)
        )
        for item in rest if kind in PEERS else []:
            if item.partition("=")[0] not in OF_A_PEER:
                raise ValueError(
                    f"variants.{name}: {item}: of a peer one can set {', '.join(OF_A_PEER)}"
                )
        programs[name] = kind, list(rest)
    return programs


def interpreter(peer: str, envs: str) -> str:
    """Return the Python of a peer's environment, which is created if it does not exist.

    Raises:
        RuntimeError: it cannot be created.
    """
    if envs == "here":
        return sys.executable
    name = ENVIRONMENTS[peer]
    folder = Path(envs).expanduser() / name
    python, marker = folder / "bin" / "python", folder / "installed.txt"
    requirements = [f"torch=={importlib.metadata.version('torch')}", *REQUIREMENTS[name]]
    if marker.exists() and marker.read_text() == "\n".join(requirements):
        return str(python)
    if folder in NOT_INSTALLED:  # tried for another peer of this environment
        raise RuntimeError(NOT_INSTALLED[folder])
    print(f"installing {', '.join(requirements)} into {folder}", flush=True)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RuntimeError(f"not installed: envs={envs}: {error}") from None
    constraints = (ROOT / "constraints.txt").read_text().splitlines()
    if name != "trl":
        # LitGPT needs an older huggingface_hub: only the packages that compute are constrained
        computing = re.compile("(torch|lightning|numpy|safetensors)==")
        constraints = [line for line in constraints if computing.match(line)]
    (folder / "constraints.txt").write_text("\n".join(constraints) + "\n")
    try:
        _install(folder, python, requirements)
    except RuntimeError as error:
        NOT_INSTALLED[folder] = str(error)
        raise
    marker.write_text("\n".join(requirements))
    return str(python)


def _install(folder: Path, python: Path, requirements: list[str]) -> None:
    """Create a virtual environment and install packages into it.

    Raises:
        RuntimeError: a command failed.
    """
    pip = [
        str(python),
        "-m",
        "pip",
        "install",
        "--disable-pip-version-check",
        "-q",
        "-c",
        str(folder / "constraints.txt"),
        *requirements,
    ]
    # torch's CPU builds, if the configured index does not have them
    index = ["--extra-index-url", "https://download.pytorch.org/whl/cpu"]
    attempts = [[sys.executable, "-m", "venv", str(folder)], pip]
    for number, command in enumerate(attempts):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode and number == 1 and "+cpu" in requirements[0]:
            done = subprocess.run([*command, *index], capture_output=True, text=True)
        if done.returncode:
            output = done.stderr.splitlines()
            lines = [line for line in output if "ERROR" in line] or output
            raise RuntimeError(
                f"not installed: {lines[-1][:200] if lines else shlex.join(command)}"
            )


def environment(options: dict[str, Any]) -> dict[str, str]:
    """The variables of a contestant's process."""
    threads = {"OMP_NUM_THREADS": str(options["threads"])} if options["threads"] else {}
    # One GPU or none: transformers' Trainer would take all that it sees.
    seen = (
        os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]
        if options["device"] == "cuda"
        else ""
    )
    return (
        os.environ
        | threads
        | {
            "HF_HUB_OFFLINE": "1",
            "WANDB_MODE": "disabled",
            "CUDA_VISIBLE_DEVICES": seen,
        }
    )
