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

import re
from typing import Any

from tasks import conversation
from tasks.databases import TOKEN, Schema, names_of, plain
from tasks.reading import DataError
from tasks.sql_process import same_result
from tasks.task import Chats, Conversation, text_of

PROMPT = (
    "Write a SQL query to answer the question based on the table schema.\n\n context: {context}\n\n"
    " question: {question}"
)

_NAME = r"""("[^"]+"|`[^`]+`|\[[^\]\[]+\]|[^\s("`\[][^\s(]*)"""
_CREATE = re.compile(rf"CREATE\s+TABLE\s+(?:IF\s+NOT\s+EXISTS\s+)?{_NAME}\s*\(", re.IGNORECASE)
_COLUMN = re.compile(rf"{_NAME}(.*)", re.DOTALL)
_CONSTRAINTS = {"primary", "foreign", "unique", "constraint", "check", "key"}


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
    names = names_of(tables)
    return [plain(token, names) for token in TOKEN.findall(query)]


def schema(text: str) -> Schema:
    """Return the tables of a text's CREATE TABLE statements. A table that is created twice has the
    columns of both statements. A statement ends where the next one begins, so that the text is read
    once. Names are equal whatever their case, and keep their first spelling."""
    tables: dict[str, tuple[str, dict[str, tuple[str, str]]]] = {}  # by names in lower case
    statements = list(_CREATE.finditer(text))
    ends = [*(statement.start() for statement in statements[1:]), len(text)]
    for statement, end in zip(statements, ends, strict=False):
        name = statement[1].strip('"`[]')
        _, columns = tables.setdefault(name.lower(), (name, {}))
        for part in _parts(text[statement.end() : end]):
            column = _COLUMN.match(part)
            if column is not None and column[1].lower() not in _CONSTRAINTS:
                name = column[1].strip('"`[]')
                columns.setdefault(name.lower(), (name, column[2].strip().upper()))
    return {name: dict(columns.values()) for name, columns in tables.values() if columns}


def _parts(text: str) -> list[str]:
    """Split by commas the text up to the parenthesis that closes one opened before it. Return
    nothing if none does."""
    depth = 1
    parts: list[list[str]] = [[]]
    for match in re.finditer(r"'[^']*'|\"[^\"]*\"|\s+|[(),]|[^\s(),'\"]+|.", text):
        token = match[0]
        depth += {"(": 1, ")": -1}.get(token, 0)
        if depth == 0:
            return [" ".join("".join(part).split()) for part in parts]
        if token == "," and depth == 1:
            parts.append([])
        else:
            parts[-1].append(token)
    return []
