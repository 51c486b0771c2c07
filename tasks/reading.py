"""Rows of local files and hub data sets. Local files are read strictly: an error names file and
line.

`datasets` reports a broken JSON line by its position in a parse block, without the file (row 71,751
for line 150,001), and accepts mixed types and missing keys silently. Reading JSON lines here is no
slower.
"""

from __future__ import annotations

import contextlib
import csv
import glob
import gzip
import hashlib
import io
import json
import re
import zlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tasks.arrow_rows import described, present
from tasks.strict_json import repeated, strict_json

EXPANSION = 200  # of a gzip file, at most: text shrinks to a third or so, equal rows to a hundredth
EXPANDED = 64 << 20  # bytes that any gzip file may expand to
KINDS = ("jsonl", "json", "csv", "tsv", "parquet", "txt")
csv.field_size_limit(2**31 - 1)  # long texts too; Python's own limit is 131072 characters


_later: ContextVar[bool] = ContextVar("later", default=False)


class DataError(ValueError):
    """The data cannot be used. The message says what is wrong, where, and how to fix it."""


def is_later() -> bool:
    """Return whether `read_later` is open."""
    return _later.get()


@contextlib.contextmanager
def read_later() -> Iterator[None]:
    """While open, a source that is made says nothing of missing files before its rows are read. The
    model of a finished run needs none of its rows, which may be elsewhere."""
    token = _later.set(True)
    try:
        yield
    finally:
        _later.reset(token)


@dataclass(frozen=True)
class Bad:
    """A row that cannot be used, and why."""

    where: str
    reason: str


class Source:
    """The rows of some files, or of one split of a hub data set, as (where, mapping or Bad).

    Raises:
        DataError: a file is missing, empty, or of an unknown kind; within `read_later`, when rows
            are read.
    """

    def __init__(
        self,
        path: str | list[str],
        split: str,
        streaming: bool,
        key: str,
        data_files: Any = None,
        revision: str | None = None,
    ):
        self.split, self.streaming = split, streaming
        self.version: dict[str, Any] = {
            name: value
            for name, value in (("data_files", data_files), ("revision", revision))
            if value is not None
        }
        self.name = str(path)
        self.hub: str | None = None
        self.missing: str | None = None  # why the rows cannot be read, where that is a later matter
        self.files: list[Path] = []
        try:
            self._find([path] if isinstance(path, str) else list(path), key)
        except DataError as error:
            if not _later.get():
                raise
            self.missing = str(error)

    def _find(self, patterns: list[str], key: str) -> None:
        if not all(patterns) or not patterns:
            raise DataError(f"{key} is empty: it must name files, or a data set on the hub")
        self.name = (
            patterns[0] if len(patterns) == 1 else f"{patterns[0]} and {len(patterns) - 1} more"
        )
        for pattern in patterns:
            expanded = Path(pattern).expanduser()
            matches = sorted(
                Path(name)
                for name in glob.glob(str(expanded), recursive=True)
                if Path(name).is_file()
            )
            if expanded.is_file():  # its name may contain brackets, which glob takes as a pattern
                matches = [expanded]
            if matches:
                self.files += matches
            elif Path(str(expanded).partition(":")[0]).is_dir() and len(patterns) == 1:
                self.hub = str(expanded)  # a clone of a data set's repository
            elif _looks_local(pattern):
                raise DataError(
                    f"{key}={pattern!r}: there is no such file (the current folder is {Path.cwd()})"
                )
            elif len(patterns) > 1:
                raise DataError(
                    f"{key} lists {pattern!r}, which is no file; a data set on the hub must be the"
                    " only entry"
                )
            else:
                self.hub = pattern
        if self.files and self.version:
            raise DataError(
                f"{key}={self.name}: {' and '.join(f'task.{name}' for name in self.version)} choose"
                " from a data set on the hub or a folder, and this is a file: leave them out"
            )
        for file in self.files:
            if _kind(file) not in KINDS:
                raise DataError(
                    f"{key}: {file} is of an unknown kind; known:"
                    f" {', '.join('.' + kind for kind in KINDS)}, each also as .gz"
                )
            if file.stat().st_size == 0:
                raise DataError(f"{key}: {file} is empty")

    def refuse_missing(self) -> None:
        """Refuse to read rows whose files are missing, which the constructor lets pass.

        Raises:
            DataError: the rows cannot be read.
        """
        if self.missing is not None:
            raise DataError(self.missing)

    def __iter__(self) -> Iterator[tuple[str, dict[str, Any] | Bad]]:
        self.refuse_missing()
        if self.hub is not None:
            from tasks import hub

            yield from hub.rows(self.hub, self.split, self.streaming, self.version)
        for file in self.files:
            try:
                yield from _READERS[_kind(file)](file)
            except (EOFError, gzip.BadGzipFile, zlib.error) as error:
                raise DataError(f"{file}: not readable as gzip: {error}") from None

    def fingerprint(self) -> str:
        """Return a digest of the files' contents, or of the hub data set's version."""
        self.refuse_missing()
        if self.hub is not None:
            from tasks import hub

            return hub.fingerprint(self.hub, self.split, self.version)
        digest = hashlib.sha256()
        for file in self.files:
            digest.update(f"{_kind(file)} ".encode())
            with file.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
        return digest.hexdigest()


def _looks_local(pattern: str) -> bool:
    return (
        pattern.startswith((".", "/", "~"))
        or pattern.count("/") > 1
        or _kind(Path(pattern)) in KINDS
        or "*" in pattern
    )


def _kind(file: Path) -> str:
    name = file.name.removesuffix(".gz")
    return {"ndjson": "jsonl", "text": "txt"}.get(name.rpartition(".")[2], name.rpartition(".")[2])


def _open(file: Path) -> Any:
    with file.open("rb") as stream:
        compressed = stream.read(2) == b"\x1f\x8b"  # by content: the name may be .jsonl
    return io.BufferedReader(_Expanded(file)) if compressed else file.open("rb")


class _Expanded(io.RawIOBase):
    """The content of a gzip file. A small file can expand to a line that fills the memory.

    Raises:
        DataError: it expands to far more than text does.
    """

    def __init__(self, file: Path):
        self.file, self.stream = file, gzip.GzipFile(file, "rb")
        self.left = EXPANDED + EXPANSION * file.stat().st_size

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = self.stream.readinto(buffer)
        self.left -= count
        if self.left < 0:
            raise DataError(
                f"{self.file} expands to more than {EXPANSION} times its size, which no text does:"
                " unpack it if it is what you want"
            )
        return count

    def close(self) -> None:
        self.stream.close()
        super().close()


def json_lines(file: Path) -> Iterator[tuple[str, dict[str, Any] | Bad]]:
    """Yield (place, row or what is wrong with it) of each line of a JSON lines file. A line ends at
    a newline alone: a text may hold U+2028, which JSON does not escape."""
    with _open(file) as lines:
        for number, line in enumerate(lines, 1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if line.strip():
                where = f"{file}:{number}"
                yield where, _parsed(line, where)


def _parsed(line: bytes, where: str) -> dict[str, Any] | Bad:
    try:
        # without the line's end, so that an error there has the right column
        text = line.decode("utf-8").rstrip("\r\n")
    except UnicodeDecodeError as error:
        return Bad(
            where,
            f"not UTF-8 at byte {error.start + 1} of the line ({error.object[error.start]:#04x})",
        )
    return _row(text, where)


def _row(text: str, where: str) -> dict[str, Any] | Bad:
    try:
        row = strict_json(text)
    except json.JSONDecodeError as error:
        return Bad(where, f"not JSON: {error.msg} at column {error.colno}")
    except (ValueError, RecursionError) as error:
        return Bad(where, f"not usable JSON: {error}")
    return _object(row, where)


def _object(row: Any, where: str) -> dict[str, Any] | Bad:
    if isinstance(row, dict):
        return row
    return Bad(where, f"a row must be a JSON object, and is {type(row).__name__}")


def _json(file: Path) -> Iterator[tuple[str, dict[str, Any] | Bad]]:
    read: Callable[[Any, str], dict[str, Any] | Bad] = _object
    with _open(file) as stream:
        content = stream.read()
    try:
        text = content.decode("utf-8-sig")
        rows = strict_json(text)
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: not UTF-8 at byte {error.start + 1}") from None
    except json.JSONDecodeError as error:
        hint = (
            " If it has one JSON value per line, name it .jsonl"
            if error.msg == "Extra data"
            else ""
        )
        raise DataError(
            f"{file}:{error.lineno}: not JSON: {error.msg} at column {error.colno}.{hint}"
        ) from None
    except (ValueError, RecursionError) as error:
        if isinstance(error, RecursionError) or not text.lstrip().startswith("["):
            raise DataError(f"{file}: {error}") from None
        rows, read = _entries(text), _row  # which says what is wrong with an entry
    else:
        if not isinstance(rows, list):
            raise DataError(
                f"{file}: a .json file must hold a list of objects, and holds {type(rows).__name__}"
            )
    for number, row in enumerate(rows, 1):
        where = f"{file}:row {number}"
        yield where, read(row, where)


def _entries(text: str) -> Iterator[str]:
    """Yield the text of each entry of a JSON list."""
    decoder, between = json.JSONDecoder(), re.compile(r"[\s,]*")
    at = text.index("[") + 1
    while text[at := between.match(text, at).end()] != "]":  # type: ignore[union-attr]
        start, at = at, decoder.raw_decode(text, at)[1]
        yield text[start:at]


def _separated(file: Path, delimiter: str) -> Iterator[tuple[str, dict[str, Any] | Bad]]:
    with _open(file) as stream:
        lines = io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")
        # .tsv files such as SST-2's do not quote: a single quotation mark is text.
        reader = csv.reader(
            lines,
            delimiter=delimiter,
            strict=True,
            quoting=csv.QUOTE_MINIMAL if delimiter == "," else csv.QUOTE_NONE,
        )
        try:
            header = next(reader, [])
            if not header:
                raise DataError(f"{file}:1: no header; the first line must name the columns")
            if len(set(header)) != len(header):
                raise DataError(f"{file}:1: the header names a column twice: {', '.join(header)}")
            for values in reader:
                where = f"{file}:{reader.line_num}"
                if not values:
                    continue
                if len(values) != len(header):
                    yield (
                        where,
                        Bad(where, f"{len(values)} fields, but the header has {len(header)}"),
                    )
                else:
                    yield where, dict(zip(header, values, strict=True))
        except UnicodeDecodeError:
            raise DataError(
                f"{file}:{reader.line_num + 1}: not UTF-8 at or after this line"
            ) from None
        except csv.Error as error:
            raise DataError(
                f"{file}:{reader.line_num}: not readable as separated values: {error}"
            ) from None


def _parquet(file: Path) -> Iterator[tuple[str, dict[str, Any] | Bad]]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        table = pyarrow.parquet.ParquetFile(file)
        names, features = table.schema_arrow.names, described(table.schema_arrow)
        if len(set(names)) < len(names):
            raise pyarrow.ArrowInvalid(f"it has the column {repeated(names)!r} twice")
        for batch in table.iter_batches(1000):
            for row in batch.to_pylist():
                number += 1
                yield f"{file}:row {number}", present(row, features)
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: a text after row {number} is not UTF-8: {error}") from None
    # to_pylist raises a ValueError for two fields of one name in a struct
    except (pyarrow.ArrowInvalid, OSError, ValueError) as error:
        raise DataError(f"{file}: not readable as parquet: {error}") from None


def _txt(file: Path) -> Iterator[tuple[str, dict[str, Any] | Bad]]:
    """Yield a row for each paragraph. Paragraphs are separated by empty lines."""
    with _open(file) as lines:
        paragraph: list[str] = []
        first = 1
        for number, line in enumerate(lines, 1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                yield (
                    f"{file}:{number}",
                    Bad(f"{file}:{number}", f"not UTF-8 at byte {error.start + 1} of the line"),
                )
                continue
            if text.strip():
                first = number if not paragraph else first
                paragraph.append(text)
            elif paragraph:
                yield f"{file}:{first}", {"text": "".join(paragraph).strip("\r\n")}
                paragraph = []
        if paragraph:
            yield f"{file}:{first}", {"text": "".join(paragraph).strip("\r\n")}


_READERS: dict[str, Any] = {
    "jsonl": json_lines,
    "json": _json,
    "csv": lambda file: _separated(file, ","),
    "tsv": lambda file: _separated(file, "\t"),
    "parquet": _parquet,
    "txt": _txt,
}
