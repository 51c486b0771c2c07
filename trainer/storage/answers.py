"""The folder of answers that a target has written (trainer.respond): complete lines only, no row
twice, and a record of how they were made.

    rows.jsonl       answers        {row, answer, of, ...}
    left_out.jsonl   rows without   {row, answer, why, ...}
    provenance.json  the settings, and how many rows there are of each kind
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from trainer.config import files
from trainer.storage import door
from trainer.storage.atomic import write_text
from trainer.storage.run_folder import FolderError

_ROW = {"row": int, "answer?": int, "of?": int, "*": object}
_LEFT_OUT = _ROW | {"why": str}
FREE = ("batch_size", "rows")  # settings that may change when a command is continued
REASONS = ("empty", "cut", "long", "refused")  # why a row is left out


class AnswersFolder:
    """A folder of answers, locked by one process: which rows are in it, and a way to add more.

    Raises:
        FolderError: another process writes there, it holds something else, or it was begun with
            other settings.
    """

    def __init__(self, path: Path, settings: dict[str, Any], described: dict[str, Any]):
        self.path, self.settings, self.described = path, settings, described
        self.have: set[tuple[int, int]] = set()  # (row, answer)
        self.done: set[int] = set()  # rows of which all answers are there
        self.counts: dict[str, int] = {}
        self.reason: str | None = None  # why the first row that is refused is left out
        self.rows, self.left_out, self.record = (
            path / "rows.jsonl",
            path / "left_out.jsonl",
            path / "provenance.json",
        )

    def __enter__(self) -> AnswersFolder:
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(self.path / ".lock", timeout=0)
        try:
            self._lock.acquire()
        except Timeout:
            raise FolderError(
                f"{self.path} is in use by another process. Wait for it, or choose another out="
            ) from None
        try:
            self._refuse_other_settings()
            for file in (self.rows, self.left_out):
                shape = _LEFT_OUT if file == self.left_out else _ROW
                for number, line in enumerate(whole_lines(file), 1):
                    try:
                        row = door.parse(line)
                        if door.mismatch(row, shape) is not None:
                            raise ValueError
                        self._note(row)
                    except (ValueError, KeyError, TypeError):
                        raise FolderError(
                            f"{file}:{number} is not a line that this command writes: remove it"
                        ) from None
            self.describe()
        except BaseException:
            self._lock.release()
            raise
        return self

    def __exit__(self, *_: Any) -> None:
        try:
            self.describe()
        finally:
            self._lock.release()

    def _note(self, line: dict[str, Any]) -> None:
        row, answers = line["row"], line.get("of", 1)
        self.have.add((row, line.get("answer", 1)))
        if all((row, number) in self.have for number in range(1, answers + 1)):
            self.done.add(row)

    def _refuse_other_settings(self) -> None:
        if not self.record.exists():
            if self.rows.exists():
                raise FolderError(
                    f"{self.rows} exists, but {self.record.name}, which says how it was made, does"
                    " not: choose another out="
                )
            return
        try:
            recorded = door.json_file(self.record, {"settings": dict})["settings"]
        except (OSError, ValueError):
            raise FolderError(f"{self.record} cannot be read: choose another out=") from None
        different = [
            f"{key}: {json.dumps(recorded.get(key))} then, {json.dumps(self.settings.get(key))} now"
            for key in sorted(recorded.keys() | self.settings.keys())
            if key not in FREE and recorded.get(key) != self.settings.get(key)
        ]
        if different:
            listed = "\n".join(different)
            raise FolderError(
                f"{self.path} was begun with other settings. Continue with those, or choose another"
                f" out=\n{listed}"
            )

    def add(self, lines: list[dict[str, Any]]) -> None:
        """Append those lines whose answers are not there yet. Lines with `why` are left out."""
        for file, left_out in ((self.rows, False), (self.left_out, True)):
            new = [
                line
                for line in lines
                if ("why" in line) == left_out
                and (line["row"], line.get("answer", 1)) not in self.have
            ]
            with files.append(file) as stream:
                stream.write("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in new))
        for line in lines:
            self._note(line)

    @property
    def why(self) -> str:
        """The reason of the first row that was refused, after the file that has all; or nothing."""
        return "" if self.reason is None else f"\n{self.left_out}: {self.reason}"

    def describe(self) -> None:
        """Count the lines, and write provenance.json."""
        counts = self.counts = {
            "rows": 0,
            "cut": 0,
            "inexact": 0,
            **dict.fromkeys((f"left out: {why}" for why in REASONS), 0),
        }
        for line in map(json.loads, whole_lines(self.rows)):
            counts["rows"] += 1
            counts["cut"] += line.get("cut", False)
            counts["inexact"] += line.get("inexact", False)
        for line in map(json.loads, whole_lines(self.left_out)):
            why = f"left out: {line['why']}"
            counts[why] = counts.get(why, 0) + 1
            self.reason = self.reason or line.get("reason")
        content = {"settings": self.settings, **self.described, "counts": counts}
        write_text(self.record, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def whole_lines(file: Path) -> Iterator[str]:
    """Yield the lines of a file. Half a line that a killed process left is removed from it."""
    if not file.exists():
        return
    with files.edit(file) as stream:
        end = 0
        for line in stream:
            if not line.endswith(b"\n"):
                stream.truncate(end)
                return
            end += len(line)
            yield line.decode("utf-8", "replace")
