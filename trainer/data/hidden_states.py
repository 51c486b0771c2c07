"""A target's states on disk, to distil drafters from without running the target again.

    FOLDER/index.json              what the states are of, and of each shard its rows, bytes and sha256
    FOLDER/shard-00000.safetensors hidden (N, d), what the output head read, and features (N, f), the states of `layers` side by side,
                                   of N tokens: rows one after the other, in the dtype in which the
                                   target computes

Logits are never stored: the head makes them from `hidden` again. Each row was run alone, so that
packed and unpacked runs read the same folder; rows of a pack do not see each other. A cache that
holds more layers than a drafter reads serves it too, so that one made for the greediest drafter
serves all.

Size: (d + f) numbers a token. EAGLE-3 with three layers on a base of 4096 takes 32 kB a token in
bf16, 33 MB a row of 1024. A small target runs faster than most disks read: measure before caching.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import os
import shutil
from bisect import bisect_right
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tasks.reading import DataError
from tasks.wheel import sha256
from trainer.data.batches import Collate, Pick, Sequences
from trainer.data.identity import same_as_key
from trainer.models.base import Base
from trainer.storage.atomic import write_text
from trainer.storage.progress import Progress

log = logging.getLogger(__name__)

# a batch -> hidden (B, T, d), features (B, T, f) or None
States = Callable[[dict[str, Any]], tuple[Tensor, Tensor | None]]
# bytes, about: small enough to lose to a kill, and to be held in memory while it is made
SHARD = 256 << 20
MARGIN = 64 << 20  # bytes that are left free on the disk, and a twentieth of what is written
OPEN = 64  # shards mapped at a time: each takes a file descriptor


class FeaturesError(DataError):
    """States on disk cannot be written or used. The message says which, why, and how to mend it."""


def digest(value: Any) -> str:
    """A sha256 over plain data and tensors, nested, such as Adapter.state."""
    found = hashlib.sha256()

    def take(part: Any) -> None:
        if isinstance(part, dict):
            for name in sorted(part, key=str):
                found.update(f"{name}\0".encode())
                take(part[name])
        elif isinstance(part, list | tuple):
            found.update(f"[{len(part)}".encode())
            for item in part:
                take(item)
        elif isinstance(part, Tensor):
            found.update(f"{part.dtype} {tuple(part.shape)}\0".encode())
            flat = part.detach().cpu().contiguous().flatten()
            found.update(flat.view(torch.uint8).numpy().data if flat.numel() else b"")
        else:
            found.update(f"{part!r}\0".encode())

    take(value)
    return found.hexdigest()


def key_of(
    base: Base, dtype: torch.dtype, adapter: Any, rows: str, layers: tuple[int, ...]
) -> dict[str, Any]:
    """Everything that states depend on: the base's weights, how they are held and computed in, the
    adapter's `state` (None without one), the digest of the tokenised rows
    (trainer.data.rows.Rows.digest), and the layers."""
    return {
        "base": base.fingerprint,
        "quantization": base.quantization,
        "dtype": str(dtype).removeprefix("torch."),
        "adapter": None if adapter is None else digest(adapter),
        "rows": rows,
        "layers": sorted(layers),
    }


class Features:
    """States of the rows of `sequences`, from a folder that `write` made.

    What a shard holds is held against its sha256 when it is first read, in each process, and its
    size when the folder is opened.

    Raises:
        FeaturesError: the folder is of something else, or not complete, or a shard is missing or of
        another size; and from `batch`, a
            shard's content has changed.
    """

    def __init__(self, folder: Path, key: dict[str, Any], sequences: Sequences):
        self.folder, self.sequences = folder, sequences
        self.index = _index(folder)
        lengths = sequences.rows.lengths
        _refuse_others(folder, self.index, key, lengths)
        self.starts = np.concatenate([[0], np.cumsum(lengths)])
        self.shards = sorted(self.index["shards"].items(), key=lambda item: item[1]["first"])
        if missing := [
            name for name, _ in _planned(self.index) if name not in self.index["shards"]
        ]:
            raise FeaturesError(
                f"{folder} is not complete: {len(missing)} shards are still to be written, such as"
                f" {missing[0]}"
            )
        if (held := self.shards[-1][1]["last"]) != len(lengths) or int(
            self.starts[-1]
        ) != self.index["tokens"]:
            raise FeaturesError(
                f"{folder} holds {held} rows of {self.index['tokens']} tokens, not {len(lengths)}"
                f" of {self.starts[-1]}"
            )
        for name, shard in self.shards:
            if reason := _size_fault(folder / name, shard):
                raise FeaturesError(_remade(folder / name, reason))
        self.firsts = [shard["first"] for _, shard in self.shards]
        kept, width = self.index["key"]["layers"], self.index["hidden"]
        self.columns = [
            slice(kept.index(layer) * width, (kept.index(layer) + 1) * width)
            for layer in sorted(key["layers"])
        ]
        self._whole: set[str] = set()
        self._mapped = lru_cache(OPEN)(self._map)

    def _map(self, number: int) -> Any:
        name, shard = self.shards[number]
        if name not in self._whole:
            try:
                changed = sha256(self.folder / name) != shard["sha256"]
            except OSError as error:
                raise FeaturesError(
                    _remade(self.folder / name, error.strerror or str(error))
                ) from None
            if changed:
                raise FeaturesError(
                    _remade(self.folder / name, "its content has changed since it was written")
                )
            self._whole.add(name)
        try:
            return safe_open(self.folder / name, framework="pt")
        except SafetensorError as error:
            raise FeaturesError(
                _remade(self.folder / name, f"it holds no tensors ({error})")
            ) from None

    def row(self, row: int) -> tuple[Float[Tensor, "T d"], Float[Tensor, "T f"] | None]:
        """One row's states."""
        number = bisect_right(self.firsts, row) - 1
        start, end = (
            int(self.starts[at] - self.starts[self.firsts[number]]) for at in (row, row + 1)
        )
        mapped = self._mapped(number)
        hidden = mapped.get_slice("hidden")[start:end]
        if not self.columns:
            return hidden, None
        features = mapped.get_slice("features")[start:end]
        if len(self.columns) == len(self.index["key"]["layers"]):
            return hidden, features
        return hidden, torch.cat([features[:, columns] for columns in self.columns], dim=-1)

    def batch(
        self, sequences: list[int], width: int
    ) -> tuple[Float[Tensor, "B T d"], Float[Tensor, "B T f"] | None]:
        """States of some sequences, rows or packs, as trainer.data.batches.Collate lays out their
        tokens, padded with zeros to `width`."""
        made: list[Tensor | None] = [None, None]
        for i, sequence in enumerate(sequences):
            at = 0
            for row in self.sequences.members(sequence):
                parts = self.row(row)
                for j, part in enumerate(parts):
                    if part is None:
                        continue
                    whole = made[j] = (
                        part.new_zeros(len(sequences), width, part.shape[1])
                        if made[j] is None
                        else made[j]
                    )
                    assert whole is not None
                    whole[i, at : at + len(part)] = part
                at += len(parts[0])
        hidden, features = made
        assert hidden is not None
        return hidden, features

    def states(
        self, batch: dict[str, Any]
    ) -> tuple[Float[Tensor, "B T d"], Float[Tensor, "B T f"] | None]:
        """In place of a forward pass (trainer.training.distill.DraftLoss.states): of a batch of
        Collate's, where its tokens are."""
        ids, lengths = batch["input_ids"], self.sequences.rows.lengths
        for sequence, length in zip(batch["sequences"], batch["lengths"].tolist(), strict=True):
            # 0: it only fills a rank's share
            if length not in (0, lengths[self.sequences.members(sequence)].sum()):
                raise FeaturesError(
                    f"{self.folder} holds states of other rows than those of this batch"
                )
        hidden, features = self.batch(batch["sequences"], ids.shape[1])
        return hidden.to(ids.device), None if features is None else features.to(ids.device)


def prepared(
    folder: Path,
    key: dict[str, Any],
    sequences: Sequences,
    states: States,
    width: int,
    pad: int,
    batch_size: int,
    device: torch.device,
    shard_bytes: int = SHARD,
) -> Features:
    """The states of all rows, written where they are missing. Processes that want the same folder
    wait for the one that writes.

    Raises:
        FeaturesError: as `Features` and `write`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock"):
        write(folder, key, sequences, states, width, pad, batch_size, device, shard_bytes)
    return Features(folder, key, sequences)


@torch.no_grad()
def write(
    folder: Path,
    key: dict[str, Any],
    sequences: Sequences,
    states: States,
    width: int,
    pad: int,
    batch_size: int,
    device: torch.device,
    shard_bytes: int = SHARD,
) -> None:
    """Write what is missing of the states of all rows of `sequences`, whose states are `width` = d
    wide. Shards that are there with the right size are kept; at most one is lost to a kill.

    Raises:
        FeaturesError: the folder holds the states of something else, the disk lacks the room, or
        the target's states are not finite or
            not of the key's dtype.
    """
    lengths, dtype = sequences.rows.lengths, getattr(torch, key["dtype"])
    if (folder / "index.json").exists():
        index = _index(folder)
        _refuse_others(folder, index, key, lengths)
        complete = all(name in index["shards"] for name, _ in _planned(index))
        if not complete and sorted(key["layers"]) != index["key"]["layers"]:
            raise FeaturesError(
                f"{folder} is not complete, and was begun with the layers {index['key']['layers']}:"
                " finish it with those"
            )
    elif any(folder.glob("shard-*.safetensors")):
        raise FeaturesError(
            f"{folder} has shards without an index.json: empty it, or choose another folder"
        )
    else:
        features = len(key["layers"]) * width
        index = {
            "format": 1,
            "key": key,
            "tokens": int(lengths.sum()),
            "hidden": width,
            "features": features,
            "cuts": _cuts(lengths, max(1, shard_bytes // ((width + features) * dtype.itemsize))),
            "shards": {},
        }
    missing = [
        (name, rows)
        for name, rows in _planned(index)
        if name not in index["shards"] or _size_fault(folder / name, index["shards"][name])
    ]
    if not missing:
        return
    tokens = sum(int(lengths[rows.start : rows.stop].sum()) for _, rows in missing)
    _room(folder, tokens * (index["hidden"] + index["features"]) * dtype.itemsize, tokens)
    write_text(folder / "index.json", json.dumps(index, indent=1))
    total = sum(len(rows) for _, rows in missing)
    with Progress("the target's hidden states", total, "rows") as progress:

        def counted(batch: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
            result = states(batch)
            progress.advance(len(batch["input_ids"]))
            return result

        for count, (name, rows) in enumerate(missing, 1):
            tensors = _shard(sequences, rows, counted, index, dtype, pad, batch_size, device)
            index["shards"][name] = {
                "first": rows.start,
                "last": rows.stop,
                **_save(folder / name, tensors),
            }
            write_text(folder / "index.json", json.dumps(index, indent=1))
            log.info("%s: %d of %d shards", folder, count, len(missing))


def _shard(
    sequences: Sequences,
    rows: range,
    states: States,
    index: dict[str, Any],
    dtype: torch.dtype,
    pad: int,
    batch_size: int,
    device: torch.device,
) -> dict[str, Tensor]:
    lengths = sequences.rows.lengths[rows.start : rows.stop]
    starts = np.concatenate([[0], np.cumsum(lengths)])
    total = int(starts[-1])
    tensors = {"hidden": torch.empty(total, index["hidden"], dtype=dtype)}
    if index["features"]:
        tensors["features"] = torch.empty(total, index["features"], dtype=dtype)
    collate = Collate(pad, False, False)  # alone, whatever shares its sequence while training
    order = np.argsort(-lengths, kind="stable")
    for first in range(0, len(order), batch_size):
        chosen = order[first : first + batch_size].tolist()
        batch = collate([(Pick(rows[i], True, 1), [sequences.rows[rows[i]]]) for i in chosen])
        found = states(
            {
                name: value.to(device) if isinstance(value, Tensor) else value
                for name, value in batch.items()
            }
        )
        for name, part in zip(("hidden", "features"), found, strict=True):
            if part is None:
                continue
            wide = tensors[name].shape[1]
            if (part.dtype, part.shape[-1]) != (dtype, wide):
                raise FeaturesError(
                    f"the target's {name} are {part.shape[-1]} numbers in {part.dtype}, and {wide}"
                    f" in {dtype} were to be stored"
                )
            whole = part.cpu()
            for i, row in zip(chosen, whole, strict=True):
                if not torch.isfinite(row[: lengths[i]]).all():
                    where = sequences.rows.where(rows[i])
                    raise FeaturesError(
                        f"{where}: the target's states of this row are not finite. Set"
                        " precision=fp32, or leave it out"
                    )
                tensors[name][starts[i] : starts[i + 1]] = row[: lengths[i]]
    return tensors


def _save(path: Path, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Write a shard whole or not at all; returns its bytes and digest."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        save_file(tensors, temporary)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        found = {"bytes": temporary.stat().st_size, "sha256": sha256(temporary)}
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        free = shutil.disk_usage(path.parent).free
        raise FeaturesError(
            f"{path} could not be written ({error}; {free:,} bytes are free). Shards before it are"
            " kept"
        ) from error
    return found


def _room(folder: Path, needed: int, tokens: int) -> None:
    free, wanted = shutil.disk_usage(folder).free, needed + needed // 20 + MARGIN
    if free < wanted:
        raise FeaturesError(
            f"the target's states of {tokens:,} tokens take {needed:,} bytes, with a margin"
            f" {wanted:,}, and {folder} has {free:,} free. Use fewer rows (task.limit), a drafter"
            " that reads fewer layers, another disk, or no cache"
        )
    log.info(
        "%s: %s bytes of states to be written, %s are free", folder, f"{needed:,}", f"{free:,}"
    )


def _cuts(lengths: np.ndarray, tokens: int) -> list[int]:
    """The first row of each shard of about so many tokens, and the end."""
    parts = np.cumsum(lengths) // tokens
    return [0, *(int(at) + 1 for at in np.flatnonzero(np.diff(parts))), len(lengths)]


def _planned(index: dict[str, Any]) -> list[tuple[str, range]]:
    pairs = itertools.pairwise(index["cuts"])
    return [
        (f"shard-{number:05d}.safetensors", range(first, last))
        for number, (first, last) in enumerate(pairs)
    ]


def _index(folder: Path) -> dict[str, Any]:
    file = folder / "index.json"
    try:
        index = json.loads(file.read_text("utf-8"))
    except FileNotFoundError:
        raise FeaturesError(f"{folder} holds no states of a target: it has no index.json") from None
    except (OSError, ValueError) as error:
        raise FeaturesError(f"{file} cannot be read: {error}") from None
    if (
        not isinstance(index, dict)
        or index.get("format") != 1
        or not {"key", "tokens", "hidden", "features", "cuts", "shards"} <= index.keys()
    ):
        raise FeaturesError(
            f"{file} is not of states that this version writes: choose another folder"
        )
    return index


def _refuse_others(
    folder: Path, index: dict[str, Any], wanted: dict[str, Any], lengths: np.ndarray
) -> None:
    held = index["key"]
    current = {"sha256": wanted["rows"], "rows": len(lengths), "tokens": int(lengths.sum())}
    counts = {"rows": index["cuts"][-1], "tokens": index["tokens"]}
    what = f"{folder.resolve()}: the rows of these states"
    if same_as_key(str(held.get("rows")), current, what, counts):
        held = held | {"rows": wanted["rows"]}
    names = {
        "rows": "tokenised rows (data, template, tokenizer, max_length or overlong)",
        "base": "the base's weights",
    }
    different = [
        f"{names.get(name, name)}: {held.get(name)} there, {wanted.get(name)} asked for"
        for name in sorted(held.keys() | wanted.keys())
        if held.get(name) != wanted.get(name)
        and not (name == "layers" and set(wanted[name]) <= set(held.get(name, ())))
    ]
    if different:
        raise FeaturesError(
            f"{folder} holds the states of something else. Choose another folder.\n"
            + "\n".join(different)
        )


def _size_fault(path: Path, shard: dict[str, Any]) -> str | None:
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        return "it is missing"
    return None if size == shard["bytes"] else f"it has {size} bytes instead of {shard['bytes']}"


def _remade(path: Path, reason: str) -> str:
    return (
        f"{path} cannot be used: {reason}. Remove that file, and it is made again at the next start"
    )
