"""Text to SQL: a question and the CREATE TABLE statements of its tables (b-mc2/sql-create-context,
CC BY 4.0).

    {"messages": [
      {"role": "user", "content": "Write a SQL query to answer the question based on the table
      schema.\n\n
        context: CREATE TABLE table_name_52 (score VARCHAR, visitor VARCHAR, date VARCHAR)\n\n
        question: What was the score for the December 11 game against the Ottawa Senators?"},
      {"role": "assistant", "content": "SELECT score FROM table_name_52 WHERE visitor = 'ottawa
      senators' AND date = 'december 11'"}]}

Rows with `question`, `context` and `answer` become the same chat. `exact_match` compares the
queries' tokens. `same_result` runs both queries on a few small tables of seeded random rows, whose
values come from the queries' own literals. Equal results show that a query is not plainly wrong;
they do not prove that the queries are equal. If the reference query does not run in SQLite, or its
result is empty, `same_result` is `exact_match`.
"""

from __future__ import annotations

import contextlib
import random
import re
import sqlite3
from collections import Counter
from typing import Any

from tasks import conversation
from tasks.reading import DataError
from tasks.task import Chats, Conversation, text_of

PROMPT = (
    "Write a SQL query to answer the question based on the table schema.\n\n context: {context}\n\n"
    " question: {question}"
)
Schema = dict[str, dict[str, str]]  # table -> column -> type

DATABASES = 3  # on which each query runs
ROWS = 24  # in each table
# Steps of SQLite's virtual machine per query, at most. A join of three tables takes a third.
STEPS = 500_000
RESULT_ROWS = 20_000  # a query with more rows is not compared
BYTES = 5_000  # in one value, at most

_TOKEN = re.compile(
    r"""'(?:[^']|'')*' | "(?:[^"]|"")*" | `[^`]*`
    | [0-9]+(?:\.[0-9]+)?(?![\w$]) | [\w$\u0080-\U0010ffff]+
    | <> | != | <= | >= | == | \|\| | \S""",
    re.VERBOSE,
)
_NAME = r"""("[^"]+"|`[^`]+`|\[[^\]]+\]|[^\s("`\[][^\s(]*)"""
_CREATE = re.compile(rf"CREATE\s+TABLE\s+(?:IF\s+NOT\s+EXISTS\s+)?{_NAME}\s*\(", re.IGNORECASE)
_COLUMN = re.compile(rf"{_NAME}(.*)", re.DOTALL)
_CONSTRAINTS = {"primary", "foreign", "unique", "constraint", "check", "key"}
_NONDETERMINISTIC = {"random", "randomblob", "load_extension"}


class SQL(Chats):
    """Questions about tables, answered by queries."""

    metrics = ["exact_match", "same_result"]

    def conversation(self, row: dict[str, Any], where: str) -> Conversation:
        names = {
            name: self.columns.get(name, name)
            for name in ("messages", "question", "context", "answer")
        }
        if names["messages"] in row:
            example = conversation.convert(row, "messages", self.columns, self.system, where)
        elif all(names[name] in row for name in ("question", "context", "answer")):
            question, context, answer = (
                self.text(row, name) for name in ("question", "context", "answer")
            )
            pair = {
                "prompt": PROMPT.format(context=context, question=question),
                "completion": answer,
            }
            example = conversation.convert(pair, "prompt_completion", {}, self.system, where)
        else:
            raise DataError(
                f"neither a column {names['messages']!r} nor all of {names['question']!r},"
                f" {names['context']!r} and {names['answer']!r}; the row has:"
                f" {', '.join(map(str, row))}; set task.columns={{OURS: YOURS}}"
            )
        text_of(example.reference, "the answer")
        tables = schema("\n".join(message["content"] for message in example.messages[:-1]))
        if not tables:
            raise DataError("there is no CREATE TABLE statement with columns before the answer")
        example.reference = (tables, example.reference)
        return example

    def grade(self, example: Conversation, completion: str) -> dict[str, float]:
        tables, reference = example.reference
        query, expected = bare(completion), bare(reference)
        exact = tokens(query, tables) == tokens(expected, tables)
        same = exact or same_result(query, expected, tables)
        return {"exact_match": float(exact), "same_result": float(same)}


def bare(text: str) -> str:
    """Return a query without the Markdown fence, white space and semicolons around it."""
    fenced = re.match(r"\s*```(?:sql|sqlite)?\s(.*?)(?:```|$)", text, re.DOTALL | re.IGNORECASE)
    return (fenced[1] if fenced else text).strip().rstrip(";").rstrip()


def tokens(query: str, tables: Schema) -> list[str]:
    """Return a query's tokens as they are compared: names and keywords in lower case, strings
    unchanged, in single quotes."""
    return [_plain(token, _names(tables)) for token in _TOKEN.findall(query)]


def _plain(token: str, names: set[str]) -> str:
    if token[0] == "`" and len(token) > 1:
        return token[1:-1].lower()
    if token[0] == '"' and len(token) > 1:
        inner = token[1:-1].replace('""', '"')
        # As in SQLite: double quotes enclose a name if there is such a name, else a string.
        return inner.lower() if inner.lower() in names else "'" + inner.replace("'", "''") + "'"
    if token[0] == "'":
        return token
    return {"<>": "!=", "==": "="}.get(token, token.lower())


def _names(tables: Schema) -> set[str]:
    return {name.lower() for table, columns in tables.items() for name in (table, *columns)}


def schema(text: str) -> Schema:
    """Return the tables of a text's CREATE TABLE statements. A table that is created twice has the
    columns of both statements."""
    tables: Schema = {}
    for statement in _CREATE.finditer(text):
        columns = _set_default(tables, statement[1].strip('"`[]'), {})
        for part in _parts(text[statement.end() :]):
            column = _COLUMN.match(part)
            if column is not None and column[1].lower() not in _CONSTRAINTS:
                _set_default(columns, column[1].strip('"`[]'), column[2].strip().upper())
    return {name: columns for name, columns in tables.items() if columns}


def _set_default(names: dict[str, Any], name: str, new: Any) -> Any:
    """Do as dict.setdefault, for names that are equal whatever their case."""
    spelling = next((other for other in names if other.lower() == name.lower()), name)
    return names.setdefault(spelling, new)


def _parts(text: str) -> list[str]:
    """Split by commas the text up to the parenthesis that closes one opened before it. Return
    nothing if none does."""
    depth, parts = 1, [""]
    for token in re.findall(r"'[^']*'|\"[^\"]*\"|\s+|[(),]|[^\s(),'\"]+|.", text):
        depth += {"(": 1, ")": -1}.get(token, 0)
        if depth == 0:
            return [" ".join(part.split()) for part in parts]
        if token == "," and depth == 1:
            parts.append("")
        else:
            parts[-1] += token
    return []


def same_result(query: str, reference: str, tables: Schema) -> bool:
    """Return whether two queries give the same rows in each of a few databases; in the same order,
    if the reference orders them.

    False also if one of them fails, or the reference gives nothing but NULL, zeros and empty
    strings.
    """
    names = _names(tables)
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
    """A query gives more rows than are compared."""


def _runnable(query: str, names: set[str]) -> str:
    """Return the query with all strings in single quotes. Whether SQLite accepts other quotes
    depends on how it was built."""
    return _TOKEN.sub(
        lambda token: _plain(token[0], names) if _plain(token[0], names)[0] == "'" else token[0],
        query,
    )


def _literals(query: str, names: set[str]) -> dict[str | None, list[Any]]:
    """Return the literals of each column, which are those that follow its name in the query. Under
    None are the literals of all columns."""
    literals: dict[str | None, list[Any]] = {None: []}
    name = None
    for token in (_plain(token, names) for token in _TOKEN.findall(query)):
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
    rows = database.execute(query).fetchmany(RESULT_ROWS + 1)
    if len(rows) > RESULT_ROWS:
        raise _TooManyRows
    plain = [
        tuple(float(f"{value:.9g}") if isinstance(value, float) else value for value in row)
        for row in rows
    ]
    return plain if ordered else Counter(plain)
