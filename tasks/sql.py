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
values come from the queries' own literals: equal results there show that a query is not plainly
wrong, and prove no equality. Where the right query does not run in SQLite, or finds nothing in
these tables, `same_result` is `exact_match`.
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

DATABASES = 3  # each query runs on so many
ROWS = 24  # of each table
# of SQLite's virtual machine, per query: a join of three tables needs a third of that
STEPS = 500_000
RESULT_ROWS = 20_000  # a query that gives more is not compared
BYTES = 5_000  # of one value

_TOKEN = re.compile(
    r"""'(?:[^']|'')*' | "(?:[^"]|"")*" | `[^`]*` | [0-9]+(?:\.[0-9]+)?(?![\w$]) | [\w$\u0080-\U0010ffff]+ | <> | != | <= | >= | == | \|\| | \S""",
    re.VERBOSE,
)
_NAME = r"""("[^"]+"|`[^`]+`|\[[^\]]+\]|[^\s("`\[][^\s(]*)"""
_CREATE = re.compile(rf"CREATE\s+TABLE\s+(?:IF\s+NOT\s+EXISTS\s+)?{_NAME}\s*\(", re.IGNORECASE)
_COLUMN = re.compile(rf"{_NAME}(.*)", re.DOTALL)
_CONSTRAINTS = {"primary", "foreign", "unique", "constraint", "check", "key"}
_NONDETERMINISTIC = {"random", "randomblob", "load_extension"}


class SQL(Chats):
    """Questions over tables, and queries."""

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
            raise DataError("no CREATE TABLE statement with columns stands before the answer")
        example.reference = (tables, example.reference)
        return example

    def grade(self, example: Conversation, completion: str) -> dict[str, float]:
        tables, right = example.reference
        query = bare(completion)
        exact = tokens(query, tables) == tokens(bare(right), tables)
        same = exact or same_result(query, bare(right), tables)
        return {"exact_match": float(exact), "same_result": float(same)}


def bare(text: str) -> str:
    """A query without a fence of Markdown, the white space and the semicolons around it."""
    fenced = re.match(r"\s*```(?:sql|sqlite)?\s(.*?)(?:```|$)", text, re.DOTALL | re.IGNORECASE)
    return (fenced[1] if fenced else text).strip().rstrip(";").rstrip()


def tokens(query: str, tables: Schema) -> list[str]:
    """A query's tokens as they are compared: names and keywords in lower case, strings as they
    stand, in single quotes."""
    return [_plain(token, _names(tables)) for token in _TOKEN.findall(query)]


def _plain(token: str, names: set[str]) -> str:
    if token[0] == "`" and len(token) > 1:
        return token[1:-1].lower()
    if token[0] == '"' and len(token) > 1:
        inner = token[1:-1].replace('""', '"')
        # As SQLite has it: double quotes hold a name where there is one, else a string.
        return inner.lower() if inner.lower() in names else "'" + inner.replace("'", "''") + "'"
    if token[0] == "'":
        return token
    return {"<>": "!=", "==": "="}.get(token, token.lower())


def _names(tables: Schema) -> set[str]:
    return {name.lower() for table, columns in tables.items() for name in (table, *columns)}


def schema(text: str) -> Schema:
    """The tables of a text's CREATE TABLE statements. A table that is created twice has the columns
    of both."""
    tables: Schema = {}
    for found in _CREATE.finditer(text):
        columns = _same_name(tables, found[1].strip('"`[]'), {})
        for part in _parts(text[found.end() :]):
            column_ = _COLUMN.match(part)
            if column_ is not None and column_[1].lower() not in _CONSTRAINTS:
                _same_name(columns, column_[1].strip('"`[]'), column_[2].strip().upper())
    return {name: columns for name, columns in tables.items() if columns}


def _same_name(names: dict[str, Any], name: str, new: Any) -> Any:
    """The value under a name, which was set to `new` unless there was one, whatever its case."""
    spelt = next((other for other in names if other.lower() == name.lower()), name)
    return names.setdefault(spelt, new)


def _parts(text: str) -> list[str]:
    """What commas divide up to the parenthesis that closes an opened one; nothing if none does."""
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


def same_result(query: str, right: str, tables: Schema) -> bool:
    """Whether two queries give the same rows, in the same order where the right one orders them, in
    each of some databases.

    False too where `query` fails, or where the right query fails or finds nothing but NULL, zeros
    and empty strings.
    """
    names = _names(tables)
    literals = _literals(right, names)
    literals[None] += [value for values in _literals(query, names).values() for value in values]
    ordered = re.search(r"\border\s+by\b", right, re.IGNORECASE) is not None
    said = False
    for seed in range(DATABASES):
        try:
            with contextlib.closing(sqlite3.connect(":memory:")) as database:
                fill(database, tables, literals, random.Random(f"{seed} {right}"))
                guard(database)
                wanted = _answers(database, _runnable(right, names), ordered)
                if wanted != _answers(database, _runnable(query, names), ordered):
                    return False
        # ValueError for characters that SQLite does not take
        except (sqlite3.Error, sqlite3.Warning, ValueError, _Endless):
            return False
        said = said or any(value for row in wanted for value in row)
    return said


class _Endless(Exception):
    """A query gives more rows than are compared."""


def _runnable(query: str, names: set[str]) -> str:
    """The query with strings in single quotes: whether SQLite takes others depends on how it was
    built."""
    return _TOKEN.sub(
        lambda found: _plain(found[0], names) if _plain(found[0], names)[0] == "'" else found[0],
        query,
    )


def _literals(query: str, names: set[str]) -> dict[str | None, list[Any]]:
    """Each column's literals: those after its name, with an operator between; under None those of
    all."""
    found: dict[str | None, list[Any]] = {None: []}
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
            # What LIKE '%a%' finds is a.
            both = [value, value.strip("%")] if isinstance(value, str) and "%" in value else [value]
            found.setdefault(name, []).extend(both)
            found[None].extend(both if name is not None else [])
    return found


def fill(
    database: sqlite3.Connection,
    tables: Schema,
    literals: dict[str | None, list[Any]],
    draw: random.Random,
) -> None:
    """Create the tables, with random rows.

    A value is one of the literals that the column is compared with, or near one if it is a number,
    else one of the small numbers that all columns share, so that joins find something. There is no
    NULL: COUNT(a) and COUNT(*) are one here.
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
    """From now on a query can neither write, nor reach a file, nor make a large value."""
    database.execute("PRAGMA temp_store=MEMORY")
    database.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, BYTES)
    database.setlimit(sqlite3.SQLITE_LIMIT_SQL_LENGTH, 10 * BYTES)
    database.set_authorizer(_allowed)


def _value(own: list[Any], others: list[Any], draw: random.Random) -> Any:
    kind = draw.random()
    if kind < 0.6 and own:
        value = draw.choice(own)
        return value + draw.choice((-1, 0, 1)) if isinstance(value, int | float) else value
    if kind < 0.7 and others:
        return draw.choice(others)
    return draw.randint(1, draw.choice((12, 200)))


def _affinity(type_: str) -> str:
    # SQLite's rules, without what a type's text could smuggle into the statement.
    if "INT" in type_:
        return "INTEGER"
    if any(part in type_ for part in ("REAL", "FLOA", "DOUB")):
        return "REAL"
    return "NUMERIC" if any(part in type_ for part in ("NUM", "DEC", "BOOL")) else "TEXT"


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _allowed(action: int, first: str | None, second: str | None, *_: Any) -> int:
    """SQLite's authoriser: reading, and functions that give the same each time."""
    if action == sqlite3.SQLITE_FUNCTION:
        return (
            sqlite3.SQLITE_DENY
            if (second or "").lower() in _NONDETERMINISTIC
            else sqlite3.SQLITE_OK
        )
    reads = action in (sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_RECURSIVE)
    return sqlite3.SQLITE_OK if reads else sqlite3.SQLITE_DENY


def _answers(database: sqlite3.Connection, query: str, ordered: bool) -> Any:
    """A query's rows, as a list or counted; it is interrupted after STEPS."""
    left = iter(range(STEPS // 1000))
    database.set_progress_handler(lambda: next(left, None) is None, 1000)
    rows = database.execute(query).fetchmany(RESULT_ROWS + 1)
    if len(rows) > RESULT_ROWS:
        raise _Endless
    plain = [
        tuple(float(f"{value:.9g}") if isinstance(value, float) else value for value in row)
        for row in rows
    ]
    return plain if ordered else Counter(plain)
