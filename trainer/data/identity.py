"""The identity of a run's rows, as run.yaml records it, and a comparison with other rows.

The identity is the sha256 of the tokenised rows, whatever code made them. Rows
that are streamed are identified by the files and settings that they are made from. Earlier versions
recorded the key of the cache instead, which changes with the source text of the code that
tokenises.
"""

from __future__ import annotations

import functools
import logging
import re
from pathlib import Path
from typing import Any

from trainer.data.rows import Rows, cached_digest
from trainer.storage import door

log = logging.getLogger("trainer")

_COUNTS = {
    "rows": "kept",
    "tokens": "tokens",
    "trained_tokens": "trained_tokens",
}  # here, and in preflight.json


def of_rows(rows: Rows) -> dict[str, Any]:
    """Return the identity of tokenised rows.

    The counts are for people, and for runs that an earlier version recorded."""
    return {
        "sha256": rows.digest,
        **{name: getattr(rows.report, count) for name, count in _COUNTS.items()},
    }


def of_stream(key: str) -> dict[str, Any]:
    """Return the identity of rows that are tokenised while training.

    `key` is from `trainer.data.cache_key.source_key`."""
    return {"source": key}


def changed(run: Path, recorded: dict[str, Any], current: dict[str, dict[str, Any]]) -> list[str]:
    """Return the splits whose rows are not those that the run.yaml in the folder `run` records."""
    return [
        split for split in recorded if not _same(run, split, recorded[split], current.get(split))
    ]


def _same(run: Path, split: str, recorded: Any, current: dict[str, Any] | None) -> bool:
    if current is None:
        return False
    if isinstance(recorded, dict):
        return all(recorded.get(name) == current.get(name) for name in ("sha256", "source"))
    return same_as_key(str(recorded), current, f"{run}: the rows of {split}", _counted(run, split))


def same_as_key(key: str, current: dict[str, Any], what: str, counts: dict[str, int]) -> bool:
    """Return whether rows are those that an earlier version recorded by the `key` of its cache.

    Their digests are compared if the cache still holds that entry. Otherwise the known `counts` are
    compared, and a warning that names `what` says that they could not be verified."""
    if not re.fullmatch(r"[0-9a-f]{32}", key):
        return False
    if "sha256" in current and (digest := cached_digest(key)) is not None:
        return digest == current["sha256"]
    if any(count != current.get(name) for name, count in counts.items()):
        return False
    if counts and not any(counts.values()):  # no rows in either run
        return True
    _warn_unverified(
        what, ", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in counts.items())
    )
    return True


@functools.cache  # the same rows may be compared several times
def _warn_unverified(what: str, same: str) -> None:
    counts = (
        f"Their counts are the same ({same})"
        if same
        else "No counts were recorded either; they are assumed to be the same"
    )
    log.warning(
        "%s could not be verified by digest: an earlier version recorded a cache key alone, and the"
        " cache no longer holds it. %s",
        what,
        counts,
    )


def _counted(run: Path, split: str) -> dict[str, int]:
    """Return the counts of a split's rows in a run's preflight.json, or nothing if it has none."""
    try:
        splits = door.json_file(run / "preflight.json", {"data": dict, "*": object})["data"]
        if split == "eval" and split not in splits:
            return dict.fromkeys(_COUNTS, 0)
        return {name: int(splits[split][count]) for name, count in _COUNTS.items()}
    except (OSError, ValueError, KeyError, TypeError):
        return {}
