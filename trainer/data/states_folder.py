"""The files of stored hidden states: an index, and shards that appear whole.

FOLDER/index.json               format and key of the states, the rows of each shard, and for
                                each shard that is written its rows, bytes and sha256
FOLDER/shard-00000.safetensors  hidden (N, d), the states that the output head reads, and
                                features (N, f), the states of `layers`, concatenated; of N
                                tokens, one row after another, in the target's compute dtype
"""

from __future__ import annotations

import itertools
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from tasks.reading import DataError
from tasks.wheel import sha256
from trainer.config import files
from trainer.data.identity import same_as_key
from trainer.storage import atomic, door

log = logging.getLogger(__name__)

_INDEX = {
    "key": {"layers": [int], "dtype": str, "*": object},
    "tokens": int,
    "hidden": int,
    "features": int,
    "cuts": [int],
    "shards": {"*": {"bytes": int, "sha256": str, "first": int, "last": int, "*": object}},
}

MARGIN = 64 << 20  # bytes that stay free on the disk, besides a twentieth of what is written


class HiddenStatesError(DataError):
    """Stored states cannot be written or used. The message says which, why, and how to fix it."""


def new_index(
    key: dict[str, Any], lengths: np.ndarray, width: int, shard_bytes: int
) -> dict[str, Any]:
    """Return the index of a folder without shards, for rows of some `lengths` and states that are
    `width` wide."""
    features = len(key["layers"]) * width
    bytes_per_token = (width + features) * getattr(torch, key["dtype"]).itemsize
    return {
        "format": 1,
        "key": key,
        "tokens": int(lengths.sum()),
        "hidden": width,
        "features": features,
        "cuts": _cuts(lengths, max(1, shard_bytes // bytes_per_token)),
        "shards": {},
    }


def _cuts(lengths: np.ndarray, tokens: int) -> list[int]:
    """Return the first row of each shard of about `tokens` tokens, and the end."""
    parts = np.cumsum(lengths) // tokens
    return [0, *(int(at) + 1 for at in np.flatnonzero(np.diff(parts))), len(lengths)]


def read_index(folder: Path) -> dict[str, Any]:
    """Return the content of index.json.

    Raises:
        HiddenStatesError: there is none, or it is none that this version writes.
    """
    file = folder / "index.json"
    try:
        index = door.parse(files.read_text(file, door.JSON_BYTES))
    except FileNotFoundError:
        raise HiddenStatesError(
            f"{folder} holds no states of a target: it has no index.json"
        ) from None
    except (OSError, ValueError) as error:
        raise HiddenStatesError(f"{file} cannot be read: {error}") from None
    if (
        not isinstance(index, dict)
        or index.get("format") != 1
        or door.mismatch(index, _INDEX) is not None
        or not index["cuts"]
        or index["cuts"] != sorted(index["cuts"])
    ):
        raise HiddenStatesError(
            f"{file} is not of states that this version writes: choose another folder"
        )
    return index


def write_index(folder: Path, index: dict[str, Any]) -> None:
    """Write index.json."""
    atomic.write_text(folder / "index.json", json.dumps(index, indent=1))


def shards_of(index: dict[str, Any]) -> list[tuple[str, range]]:
    """Return the name and the rows of each shard, whether or not it is written."""
    pairs = itertools.pairwise(index["cuts"])
    return [
        (f"shard-{number:05d}.safetensors", range(first, last))
        for number, (first, last) in enumerate(pairs)
    ]


def refuse_other_key(
    folder: Path, index: dict[str, Any], key: dict[str, Any], lengths: np.ndarray
) -> None:
    """Refuse a folder of other states. A folder of more layers than `key` names is fine.

    Raises:
        HiddenStatesError: names each part of the key that differs.
    """
    held = index["key"]
    current = {"sha256": key["rows"], "rows": len(lengths), "tokens": int(lengths.sum())}
    counts = {"rows": index["cuts"][-1], "tokens": index["tokens"]}
    what = f"{folder.resolve()}: the rows of these states"
    if same_as_key(str(held.get("rows")), current, what, counts):
        held = held | {"rows": key["rows"]}
    names = {
        "rows": "tokenised rows (data, template, tokenizer, max_length or overlong)",
        "base": "the base's weights",
    }
    different = [
        f"{names.get(name, name)}: {held.get(name)} there, {key.get(name)} expected"
        for name in sorted(held.keys() | key.keys())
        if held.get(name) != key.get(name)
        and not (name == "layers" and set(key[name]) <= set(held.get(name, ())))
    ]
    if different:
        raise HiddenStatesError(
            f"{folder} holds other states. Choose another folder.\n" + "\n".join(different)
        )


def check_room(folder: Path, needed: int, tokens: int) -> None:
    """Check that the disk has room for states of `needed` bytes.

    Raises:
        HiddenStatesError: it does not.
    """
    free, with_margin = shutil.disk_usage(folder).free, needed + needed // 20 + MARGIN
    if free < with_margin:
        raise HiddenStatesError(
            f"the target's states of {tokens:,} tokens take {needed:,} bytes, with a margin"
            f" {with_margin:,}, and {folder} has {free:,} free. Use fewer rows (task.limit), a"
            " drafter that reads fewer layers, another disk, or no cache"
        )
    log.info("%s: writing %s bytes of states, %s are free", folder, f"{needed:,}", f"{free:,}")


def save_shard(path: Path, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Write a shard, and return its bytes and sha256.

    Raises:
        HiddenStatesError: it cannot be written.
    """
    try:
        with atomic.file(path) as temporary:
            save_file(tensors, temporary)
            return {"bytes": temporary.stat().st_size, "sha256": sha256(temporary)}
    except (OSError, SafetensorError) as error:
        free = shutil.disk_usage(path.parent).free
        raise HiddenStatesError(
            f"{path} could not be written ({error}; {free:,} bytes are free). Shards before it are"
            " kept"
        ) from error


def size_fault(path: Path, shard: dict[str, Any]) -> str | None:
    """Return what is wrong with a shard's file by its size, None if nothing is."""
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        return "it is missing"
    return None if size == shard["bytes"] else f"it has {size} bytes instead of {shard['bytes']}"


def unusable(path: Path, reason: str) -> HiddenStatesError:
    """Return the error for a damaged shard."""
    return HiddenStatesError(
        f"{path} cannot be used: {reason}. Remove that file; the next start writes it again"
    )
