"""A target's hidden states on disk, to distil drafters without running the target again.

Logits are not stored: the head computes them from the states. Each row is run alone, so that packed
and unpacked runs read the same folder; rows of a pack do not see each other. A drafter may read
fewer layers than a folder holds, so one folder, written for the drafter that reads most, serves
all. trainer.data.states_folder describes the files.

Size: (d + f) numbers a token. EAGLE-3 with three layers on a base of 4096 takes 32 kB a token in
bf16, 33 MB a row of 1024. A small target runs faster than most disks read: measure before caching.
"""

from __future__ import annotations

import hashlib
import logging
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tasks.wheel import sha256
from trainer.data import states_folder
from trainer.data.batches import Collate, Pick, Sequences
from trainer.data.held_out import to_device
from trainer.data.states_folder import HiddenStatesError, unusable
from trainer.models.base import Base
from trainer.storage.locks import locked
from trainer.storage.progress import Progress

log = logging.getLogger(__name__)

# a batch -> hidden (B, T, d), features (B, T, f) or None
States = Callable[[dict[str, Any]], tuple[Tensor, Tensor | None]]
# bytes of a shard, about: a kill loses one at most, and it is held in memory until it is written
SHARD = 256 << 20
OPEN = 64  # shards that are mapped at a time, since each takes a file descriptor


@dataclass(frozen=True)
class TargetPass:
    """A target's forward pass, and the batches that it takes."""

    states: States
    width: int  # d
    pad: int  # token id
    batch_size: int
    device: torch.device


def digest(value: Any) -> str:
    """Return a sha256 over nested plain data and tensors, such as Adapter.state."""
    hashed = hashlib.sha256()

    def update(part: Any) -> None:
        if isinstance(part, dict):
            for name in sorted(part, key=str):
                hashed.update(f"{name}\0".encode())
                update(part[name])
        elif isinstance(part, list | tuple):
            hashed.update(f"[{len(part)}".encode())
            for item in part:
                update(item)
        elif isinstance(part, Tensor):
            hashed.update(f"{part.dtype} {tuple(part.shape)}\0".encode())
            flat = part.detach().cpu().contiguous().flatten()
            hashed.update(flat.view(torch.uint8).numpy().data if flat.numel() else b"")
        else:
            hashed.update(f"{part!r}\0".encode())

    update(value)
    return hashed.hexdigest()


def key_of(
    base: Base, dtype: torch.dtype, adapter: Any, rows: str, layers: tuple[int, ...]
) -> dict[str, Any]:
    """Return everything that states depend on: the base's weights, their quantisation and compute
    dtype, the adapter's `state` (None without one), the digest of the tokenised rows
    (trainer.data.rows.Rows.digest), and the layers."""
    return {
        "base": base.fingerprint,
        "quantization": base.quantization,
        "dtype": str(dtype).removeprefix("torch."),
        "adapter": None if adapter is None else digest(adapter),
        "rows": rows,
        "layers": sorted(layers),
    }


class HiddenStates:
    """Stored states of the rows of `sequences`.

    The size of a shard is checked when the folder is opened. Its sha256 is checked by `prepare`,
    before a run evaluates or trains, or else when the shard is first read.

    Raises:
        HiddenStatesError: the folder holds other states or is not complete, or a shard is missing
            or of another size; from `row` and `batch`, the content of a shard has changed.
    """

    def __init__(self, folder: Path, key: dict[str, Any], sequences: Sequences):
        self.folder, self.sequences = folder, sequences
        self.index = states_folder.read_index(folder)
        lengths, written = sequences.rows.lengths, self.index["shards"]
        states_folder.refuse_other_key(folder, self.index, key, lengths)
        self.starts = np.concatenate([[0], np.cumsum(lengths)])
        self.shards = sorted(written.items(), key=lambda item: item[1]["first"])
        named = [name for name, _ in states_folder.shards_of(self.index)]
        missing = [name for name in named if name not in written]
        if not self.shards or not set(written) <= set(named):
            raise HiddenStatesError(f"{folder} lists no shards, or others than it has")
        if missing:
            raise HiddenStatesError(
                f"{folder} is not complete: {len(missing)} shards are still to be written, such as"
                f" {missing[0]}"
            )
        rows, tokens = self.shards[-1][1]["last"], self.index["tokens"]
        if (rows, tokens) != (len(lengths), int(self.starts[-1])):
            raise HiddenStatesError(
                f"{folder} holds {rows} rows of {tokens} tokens, not {len(lengths)} of"
                f" {self.starts[-1]}"
            )
        for name, shard in self.shards:
            if reason := states_folder.size_fault(folder / name, shard):
                raise unusable(folder / name, reason)
        self.firsts = [shard["first"] for _, shard in self.shards]
        layers, width = self.index["key"]["layers"], self.index["hidden"]
        self.columns = [
            slice(layers.index(layer) * width, (layers.index(layer) + 1) * width)
            for layer in sorted(key["layers"])
        ]
        self._verified: set[str] = set()
        self._mapped = lru_cache(OPEN)(self._map)

    @classmethod
    def prepare(
        cls,
        folder: Path,
        key: dict[str, Any],
        sequences: Sequences,
        target: TargetPass,
        shard_bytes: int = SHARD,
    ) -> HiddenStates:
        """Write the states that are missing, and open the folder. Processes that need the same
        folder wait for the one that writes.

        Raises:
            HiddenStatesError: as `HiddenStates` and `write`.
        """
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder / ".lock", "the target's hidden states"):
            write(folder, key, sequences, target, shard_bytes)
        states = cls(folder, key, sequences)
        with Progress("checking the target's hidden states", len(states.shards), "shards") as done:
            for number in done.each(range(len(states.shards))):
                states._verify(number)
        return states

    def _verify(self, number: int) -> None:
        name, shard = self.shards[number]
        path = self.folder / name
        if name not in self._verified:
            try:
                changed = sha256(path) != shard["sha256"]
            except OSError as error:
                raise unusable(path, error.strerror or str(error)) from None
            if changed:
                raise unusable(path, "its content has changed since it was written")
            self._verified.add(name)

    def _map(self, number: int) -> Any:
        self._verify(number)
        path = self.folder / self.shards[number][0]
        try:
            return safe_open(path, framework="pt")
        except SafetensorError as error:
            raise unusable(path, f"it holds no tensors ({error})") from None

    def row(self, row: int) -> tuple[Float[Tensor, "T d"], Float[Tensor, "T f"] | None]:
        """Return the states of one row."""
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
        """Return the states of some sequences, rows or packs, in the layout of
        trainer.data.batches.Collate, padded with zeros to T = `width`."""
        outputs: list[Tensor | None] = [None, None]
        for i, sequence in enumerate(sequences):
            at = 0
            for row in self.sequences.members(sequence):
                parts = self.row(row)
                for j, part in enumerate(parts):
                    if part is None:
                        continue
                    output = outputs[j]
                    if output is None:
                        output = part.new_zeros(len(sequences), width, part.shape[1])
                        outputs[j] = output
                    output[i, at : at + len(part)] = part
                at += len(parts[0])
        hidden, features = outputs
        assert hidden is not None
        return hidden, features

    def states(
        self, batch: dict[str, Any]
    ) -> tuple[Float[Tensor, "B T d"], Float[Tensor, "B T f"] | None]:
        """Return the states of a batch of Collate, on its device. This takes the place of a forward
        pass (trainer.training.distill.DraftLoss.states)."""
        ids, lengths = batch["input_ids"], self.sequences.rows.lengths
        known = batch["host"].lengths if "host" in batch else batch["lengths"].tolist()
        for sequence, length in zip(batch["sequences"], known, strict=True):
            # 0: a filler
            if length not in (0, lengths[self.sequences.members(sequence)].sum()):
                raise HiddenStatesError(
                    f"{self.folder} holds states of other rows than those of this batch"
                )
        hidden, features = self.batch(batch["sequences"], ids.shape[1])
        return hidden.to(ids.device), None if features is None else features.to(ids.device)


@torch.no_grad()
def write(
    folder: Path,
    key: dict[str, Any],
    sequences: Sequences,
    target: TargetPass,
    shard_bytes: int = SHARD,
) -> None:
    """Write those states of the rows of `sequences` that are missing. Shards of the right size are
    kept; a kill loses at most one.

    Raises:
        HiddenStatesError: the folder holds other states, the disk has no room, or the target's
            states are not finite or not of the key's dtype.
    """
    index = _begun(folder, key, sequences, target, shard_bytes)
    lengths, dtype = sequences.rows.lengths, getattr(torch, key["dtype"])
    missing = [
        (name, rows)
        for name, rows in states_folder.shards_of(index)
        if name not in index["shards"]
        or states_folder.size_fault(folder / name, index["shards"][name])
    ]
    if not missing:
        return
    tokens = sum(int(lengths[rows.start : rows.stop].sum()) for _, rows in missing)
    numbers = index["hidden"] + index["features"]
    states_folder.check_room(folder, tokens * numbers * dtype.itemsize, tokens)
    states_folder.write_index(folder, index)
    total = sum(len(rows) for _, rows in missing)
    with Progress("the target's hidden states", total, "rows") as progress:

        def counted(batch: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
            result = target.states(batch)
            progress.advance(len(batch["input_ids"]))
            return result

        counting = replace(target, states=counted)
        for count, (name, rows) in enumerate(missing, 1):
            tensors = _shard(sequences, rows, counting, index)
            shard = states_folder.save_shard(folder / name, tensors)
            index["shards"][name] = {"first": rows.start, "last": rows.stop, **shard}
            states_folder.write_index(folder, index)
            log.info("%s: %d of %d shards", folder, count, len(missing))


def _begun(
    folder: Path, key: dict[str, Any], sequences: Sequences, target: TargetPass, shard_bytes: int
) -> dict[str, Any]:
    """Return the index of a folder that was begun with the same key, or a new one."""
    lengths = sequences.rows.lengths
    if not (folder / "index.json").exists():
        if any(folder.glob("shard-*.safetensors")):
            raise HiddenStatesError(
                f"{folder} has shards without an index.json: empty it, or choose another folder"
            )
        return states_folder.new_index(key, lengths, target.width, shard_bytes)
    index = states_folder.read_index(folder)
    states_folder.refuse_other_key(folder, index, key, lengths)
    complete = all(name in index["shards"] for name, _ in states_folder.shards_of(index))
    if not complete and sorted(key["layers"]) != index["key"]["layers"]:
        raise HiddenStatesError(
            f"{folder} is not complete, and was begun with the layers {index['key']['layers']}:"
            " finish it with those"
        )
    return index


def _shard(
    sequences: Sequences, rows: range, target: TargetPass, index: dict[str, Any]
) -> dict[str, Tensor]:
    """Return the states of some rows, one row after another."""
    dtype = getattr(torch, index["key"]["dtype"])
    lengths = sequences.rows.lengths[rows.start : rows.stop]
    starts = np.concatenate([[0], np.cumsum(lengths)])
    total = int(starts[-1])
    tensors = {"hidden": torch.empty(total, index["hidden"], dtype=dtype)}
    if index["features"]:
        tensors["features"] = torch.empty(total, index["features"], dtype=dtype)
    collate = Collate(target.pad, False, False)  # each row alone, though training may pack it
    order = np.argsort(-lengths, kind="stable")
    for first in range(0, len(order), target.batch_size):
        chosen = order[first : first + target.batch_size].tolist()
        batch = collate([(Pick(rows[i], True, 1), [sequences.rows[rows[i]]]) for i in chosen])
        states = target.states(to_device(batch, target.device))
        for name, part in zip(("hidden", "features"), states, strict=True):
            if part is None:
                continue
            width = tensors[name].shape[1]
            if (part.dtype, part.shape[-1]) != (dtype, width):
                raise HiddenStatesError(
                    f"the target's {name} states have {part.shape[-1]} numbers in {part.dtype},"
                    f" expected {width} in {dtype}"
                )
            for i, row in zip(chosen, part.cpu(), strict=True):
                if not torch.isfinite(row[: lengths[i]]).all():
                    where = sequences.rows.where(rows[i])
                    raise HiddenStatesError(
                        f"{where}: the target's states of this row are not finite. Set"
                        " precision=fp32, or leave the row out"
                    )
                tensors[name][starts[i] : starts[i + 1]] = row[: lengths[i]]
    return tensors
