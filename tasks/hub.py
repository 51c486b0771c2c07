"""Rows of data sets on the hub, or of a folder that holds one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tasks.arrow_rows import decoded, present
from tasks.reading import Bad, DataError


def rows(
    name: str, split: str, streaming: bool, version: dict[str, Any]
) -> Iterator[tuple[str, dict[str, Any] | Bad]]:
    """Yield (where, row) of one split. `version` has data_files and revision, if they are set."""
    table = _load_hub("load_dataset", name, split=split, streaming=streaming, **version)
    features = getattr(table, "features", None)  # unknown for some streams
    described = decoded(features.to_dict()) if features is not None else {}
    # A Json feature of the hub is decoded, and a text in one is a text.
    for number, row in enumerate(table, 1):
        yield f"{name}[{split}]:row {number}", present(dict(row), described)


def _load_hub(loader: str, name: str, **settings: Any) -> Any:
    """Call a loader of `datasets`. `name` may end in a configuration: ORG/NAME:CONFIG."""
    import datasets

    if any((Path(name) / file).is_file() for file in ("dataset_dict.json", "state.json")):
        raise DataError(
            f"data set {name!r} is a folder of save_to_disk, a cache of rows. Write"
            " them with to_parquet(FILE) or to_json(FILE), and give that file"
        )
    repository, _, configuration = name.partition(":")
    try:
        return getattr(datasets, loader)(repository, configuration or None, **settings)
    except ValueError as error:
        raise DataError(f"data set {name!r}: {error}") from error
    except Exception as error:
        first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            f"{name!r} is no file here, and could not be loaded as a data set from the hub:"
            f" {first_line}"
        ) from error


def fingerprint(name: str, split: str, version: dict[str, Any]) -> str:
    """Return a text that changes with the version of the data set and the files that are read."""
    builder = _load_hub("load_dataset_builder", name, **version)
    chosen = f"{sorted(version.items())} " if version else ""
    return f"{name} {split} {chosen}{builder.hash}"  # of the commit
