"""Sources of a task's rows besides `path` and `split`: files and a version of a hub data set,
and further sets of evaluation.

    data_files   the files of a data set to read, {SPLIT: pattern} or patterns of the training split
    revision     a commit, tag or branch of the data set
    eval_sets    {NAME: path}, or {NAME: {path, split, limit, data_files, revision}}
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from tasks.reading import DataError, Source

KEYS = ("path", "split", "limit", "data_files", "revision")


def named_sets(
    eval_sets: Mapping[str, Any], key: str = "task.eval_sets"
) -> dict[str, dict[str, Any]]:
    """Return the settings of each further set of evaluation.

    Raises:
        DataError: a name or a setting cannot be used.
    """
    result = {}
    for name, value in eval_sets.items():
        settings = dict(value) if isinstance(value, Mapping) else {"path": value}
        where = f"{key}.{name}"
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name) or name.startswith("offset"):
            raise DataError(
                f"{where}: a set's name has letters, digits, '.', '_' and '-', and does not start"
                " with offset"
            )
        if "path" not in settings or settings.keys() - {*KEYS}:
            raise DataError(
                f"{where} is {value!r}, expected a path, or a mapping with path and, optionally,"
                f" {', '.join(KEYS[1:])}"
            )
        limit = settings.get("limit")
        if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int)):
            raise DataError(f"{where}.limit is {limit!r}, expected a number of rows, or null")
        result[name] = settings
    return result


def further(
    eval_sets: Mapping[str, Any], streaming: bool, split: str, limit: int | None
) -> dict[str, tuple[Source, int | None]]:
    """Return each further set of evaluation with the number of rows to read of it.

    Raises:
        DataError: see `named_sets`, or a file is missing.
    """
    return {
        name: (
            Source(
                settings["path"],
                settings.get("split", split),
                streaming,
                f"task.eval_sets.{name}",
                settings.get("data_files"),
                settings.get("revision"),
            ),
            settings.get("limit", limit),
        )
        for name, settings in named_sets(eval_sets).items()
    }
