"""Settings that need less memory than those of a run."""

from __future__ import annotations

from typing import Any

WHOLE_BASE = ("adapters.full.Full", "adapters.sr_ste.SrSte")  # they train the base's own weights


def settings(config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the changes that need less memory, by the words of a command line. A change maps a
    dotted key to its value."""
    changes: dict[str, dict[str, Any]] = {}
    if (size := config.get("batch_size", 1)) > 1:
        smaller = max(divisor for divisor in range(1, size // 2 + 1) if size % divisor == 0)
        accumulate = config["accumulate"] * size // smaller
        changes[
            f"batch_size={smaller} accumulate={accumulate} (the same step in smaller parts)"
        ] = {
            "batch_size": smaller,
            "accumulate": accumulate,
        }
    if config.get("objective", {}).get("gradient_checkpointing") is not True:
        changes |= _one("objective.gradient_checkpointing", True)
    if (config.get("max_length") or 0) > 256:
        changes |= _one("max_length", config["max_length"] // 2)
    if config.get("precision") == "fp32":
        changes |= _one("precision", "bf16-true")
    trains_base = config.get("adapter", {}).get("_target_") in WHOLE_BASE
    if config.get("base", {}).get("quantization") == "none" and not trains_base:
        changes |= _one("base.quantization", "nf4")
    return changes


def advice(config: dict[str, Any]) -> str:
    """Name the settings that need less memory."""
    words = settings(config)
    return (
        "These settings need less memory: " + ", or ".join(words)
        if words
        else "Use a smaller base, or a machine with more memory."
    )


def changed(config: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    """Return a copy of a config with some dotted keys set."""
    result = dict(config)
    for key, value in change.items():
        group, _, name = key.rpartition(".")
        if group:
            result[group] = {**result[group], name: value}
        else:
            result[name] = value
    return result


def _one(key: str, value: Any) -> dict[str, dict[str, Any]]:
    text = str(value).lower() if isinstance(value, bool) else str(value)
    return {f"{key}={text}": {key: value}}
