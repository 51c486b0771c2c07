"""Random databases on which two SQL queries are compared.

The file is also a program, which tasks/sql_process.py starts: the queries come from a model and
from rows of strangers. It needs the standard library only.
"""

from __future__ import annotations

import contextlib
import json
import random
import re
import resource
import sqlite3
import sys
import time
from collections import Counter
from typing import Any

Schema = dict[str, dict[str, str]]  # table -> column -> type

DATABASES = 3  # on which each query runs
ROWS = 24  # in each table
# Steps of SQLite's virtual machine per query, at most. A join of three tables takes a third.
STEPS = 500_000
RESULT_ROWS = 20_000  # a query with more rows is not compared
BYTES = 5_000  # in one value, at most
RESULT_BYTES = 32 << 20  # a query whose rows take more is not compared
SECONDS = 5  # of computing for a comparison
MEMORY = 512 << 20  # bytes of this process, and a half of it for SQLite

TOKEN = re.compile(
    r"""'(?:[^']|'')*' | "(?:[^"]|"")*" | `[^`]*`
    | [0-9]+(?:\.[0-9]+)?(?![\w$]) | [\w$\u0080-\U0010ffff]+
    | <> | != | <= | >= | == | \|\| | \S""",
    re.VERBOSE,
)
_NONDETERMINISTIC = {"random", "randomblob", "load_extension"}


def same_result(query: str, reference: str, tables: Schema) -> bool:
    """Return whether two queries give the same rows in each of a few databases; in the same order,
    if the reference orders them.

    False also if one of them fails, or the reference gives nothing but NULL, zeros and empty
    strings.
    """
    names = names_of(tables)
    literals = _literals(reference, names)
    literals[None] += [value for values in _literals(query, names).values() for value in values]
    ordered = re.search(r"\border\s+by\b", reference, re.IGNORECASE) is not None
    any_value = False
    for seed in range(DATABASES):
        try:
            with contextlib.closing(sqlite3.connect(":memory:")) as database:
                fill(database, tables, literals, random.Random(f"{seed} {reference}"))
                guard(database)
                expected = _answers(database, _runnable(reference, names), ordered)
                if expected != _answers(database, _runnable(query, names), ordered):
                    return False
        # ValueError: characters that SQLite does not accept
        except (sqlite3.Error, sqlite3.Warning, ValueError, _TooManyRows):
            return False
        any_value = any_value or any(value for row in expected for value in row)
    return any_value


class _TooManyRows(Exception):
    """A query gives more rows, or more bytes, than are compared."""


def _runnable(query: str, names: set[str]) -> str:
    """Return the query with all strings in single quotes. Whether SQLite accepts other quotes
    depends on how it was built."""
    return TOKEN.sub(
        lambda token: plain(token[0], names) if plain(token[0], names)[0] == "'" else token[0],
        query,
    )


def _literals(query: str, names: set[str]) -> dict[str | None, list[Any]]:
    """Return the literals of each column, which are those that follow its name in the query. Under
    None are the literals of all columns."""
    literals: dict[str | None, list[Any]] = {None: []}
    name = None
    for token in (plain(token, names) for token in TOKEN.findall(query)):
        value: Any = None
        if token[0] == "'" and len(token) > 1:
            value = token[1:-1].replace("''", "'")
        elif re.fullmatch(r"[0-9]{1,15}(\.[0-9]{1,15})?", token):
            value = float(token) if "." in token else int(token)
        elif token in names:
            name = token
        if value is not None and len(str(value)) < BYTES:
            # LIKE '%a%' matches a.
            both = [value, value.strip("%")] if isinstance(value, str) and "%" in value else [value]
            literals.setdefault(name, []).extend(both)
            literals[None].extend(both if name is not None else [])
    return literals


def fill(
    database: sqlite3.Connection,
    tables: Schema,
    literals: dict[str | None, list[Any]],
    draw: random.Random,
) -> None:
    """Create the tables, with random rows.

    A value is one of the literals that the column is compared with, or a number next to one; or one
    of the small numbers that all columns share, so that joins have results. There are no NULLs, so
    COUNT(a) and COUNT(*) are equal.
    """
    for name, columns in tables.items():
        declared = ", ".join(
            f"{_quoted(column)} {_affinity(type_)}" for column, type_ in columns.items()
        )
        database.execute(f"CREATE TABLE {_quoted(name)} ({declared})")
        rows = [
            [_value(literals.get(column.lower(), []), literals[None], draw) for column in columns]
            for _ in range(ROWS)
        ]
        marks = ", ".join("?" * len(columns))
        database.executemany(f"INSERT INTO {_quoted(name)} VALUES ({marks})", rows)
    database.commit()


def guard(database: sqlite3.Connection) -> None:
    """Make the database refuse queries that write, open files, or make large values."""
    database.execute("PRAGMA temp_store=MEMORY")
    database.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, BYTES)
    database.setlimit(sqlite3.SQLITE_LIMIT_SQL_LENGTH, 10 * BYTES)
    database.set_authorizer(_allowed)


def _value(of_column: list[Any], of_all: list[Any], draw: random.Random) -> Any:
    kind = draw.random()
    if kind < 0.6 and of_column:
        value = draw.choice(of_column)
        return value + draw.choice((-1, 0, 1)) if isinstance(value, int | float) else value
    if kind < 0.7 and of_all:
        return draw.choice(of_all)
    return draw.randint(1, draw.choice((12, 200)))


def _affinity(type_: str) -> str:
    # SQLite's rules. The type's own text is not copied: it could hold other statements.
    if "INT" in type_:
        return "INTEGER"
    if any(part in type_ for part in ("REAL", "FLOA", "DOUB")):
        return "REAL"
    return "NUMERIC" if any(part in type_ for part in ("NUM", "DEC", "BOOL")) else "TEXT"


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _allowed(action: int, first: str | None, second: str | None, *_: Any) -> int:
    """Answer SQLite's authoriser: allow reading, and functions that are deterministic."""
    if action == sqlite3.SQLITE_FUNCTION:
        return (
            sqlite3.SQLITE_DENY
            if (second or "").lower() in _NONDETERMINISTIC
            else sqlite3.SQLITE_OK
        )
    reads = action in (sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_RECURSIVE)
    return sqlite3.SQLITE_OK if reads else sqlite3.SQLITE_DENY


def _answers(database: sqlite3.Connection, query: str, ordered: bool) -> Any:
    """Return a query's rows, as a list if they are ordered, else counted. The query is interrupted
    after STEPS."""
    left = iter(range(STEPS // 1000))
    database.set_progress_handler(lambda: next(left, None) is None, 1000)
    rows: list[tuple[Any, ...]] = []
    size = 0
    for row in database.execute(query):
        size += sum(len(value) if isinstance(value, str | bytes) else 8 for value in row)
        if len(rows) == RESULT_ROWS or size > RESULT_BYTES:
            raise _TooManyRows
        rows.append(
            tuple(float(f"{value:.9g}") if isinstance(value, float) else value for value in row)
        )
    return rows if ordered else Counter(rows)


def plain(token: str, names: set[str]) -> str:
    """Return a token as it is compared: names and keywords in lower case, strings in single
    quotes."""
    if token[0] == "`" and len(token) > 1:
        return token[1:-1].lower()
    if token[0] == '"' and len(token) > 1:
        inner = token[1:-1].replace('""', '"')
        # As in SQLite: double quotes enclose a name if there is such a name, else a string.
        return inner.lower() if inner.lower() in names else "'" + inner.replace("'", "''") + "'"
    if token[0] == "'":
        return token
    return {"<>": "!=", "==": "="}.get(token, token.lower())


def names_of(tables: Schema) -> set[str]:
    """Return the names of tables and columns, in lower case."""
    return {name.lower() for table, columns in tables.items() for name in (table, *columns)}


def serve(limit_seconds: int) -> None:
    """Answer one line of JSON after another, [query, reference, tables], with true or false.

    An operation of SQLite cannot be interrupted: one LIKE or instr can take minutes and one sort
    gigabytes. So the system ends this process when a comparison has computed for `limit_seconds`,
    and refuses it more than MEMORY. It may write no file.
    """
    for limit, most in (
        (resource.RLIMIT_AS, MEMORY),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        with contextlib.suppress(ValueError, OSError):  # a lower limit is set, or none is allowed
            resource.setrlimit(limit, (most, most))
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    for line in sys.stdin:
        # the system counts whole seconds since the process started
        resource.setrlimit(
            resource.RLIMIT_CPU, (int(time.process_time()) + limit_seconds + 1, hard)
        )
        try:
            answer = same_result(*json.loads(line))
        except (MemoryError, RecursionError, OverflowError):
            answer = False
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    serve(int(sys.argv[1]))
