"""Text to SQL: both layouts, the comparison of queries, and what a generated query can do."""

from __future__ import annotations

import contextlib
import random
import re
import sqlite3
import time
from pathlib import Path
from typing import Any

import pytest

from tasks import databases, sql_process
from tasks.databases import same_result
from tasks.reading import Bad
from tasks.sql import SQL, bare, schema, tokens
from tests.conftest import ROOT, write_rows
from tests.toys import tasks as toys
from tests.toys.growth import assert_linear

REAL = ROOT.parent / "shared" / "data" / "sql_train.jsonl"
CONTEXT = "CREATE TABLE games (score VARCHAR, visitor VARCHAR, year INTEGER)"
QUESTION = "What was the score against Ottawa in 1999?"
ANSWER = "SELECT score FROM games WHERE visitor = 'Ottawa' AND year = 1999"
PAIR = {"question": QUESTION, "context": CONTEXT, "answer": ANSWER}
PROMPT = (
    "Write a SQL query to answer the question based on the table schema.\n\n context:"
    f" {CONTEXT}\n\n question: {QUESTION}"
)
CHAT = {"messages": [{"role": "user", "content": PROMPT}, {"role": "assistant", "content": ANSWER}]}
TABLES = {
    "games": {"score": "VARCHAR", "visitor": "VARCHAR", "year": "INTEGER"},
    "teams": {"name": "VARCHAR", "year": "INTEGER"},
}


def task(path: Path, **changes: Any) -> SQL:
    return SQL(str(path), **toys.CHATS | changes)


def test_both_layouts_give_the_same_chat(tmp_path):
    actual = list(task(write_rows(tmp_path / "rows.jsonl", [CHAT, PAIR])).examples("train"))
    tables = {"games": TABLES["games"]}
    assert [example.messages for example in actual] == [CHAT["messages"]] * 2
    assert [example.reference for example in actual] == [(tables, ANSWER)] * 2
    assert actual[1].where.endswith("rows.jsonl:2")


def test_other_columns_are_named_and_a_system_prompt_stands_first(tmp_path):
    file = write_rows(
        tmp_path / "rows.jsonl", [{"q": QUESTION, "schema": CONTEXT, "query": ANSWER}]
    )
    names = {"question": "q", "context": "schema", "answer": "query"}
    (actual,) = task(file, columns=names, system="S").examples("train")
    assert actual.messages == [{"role": "system", "content": "S"}, *CHAT["messages"]]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (
            {"question": "q", "sql": "s"},
            (
                "neither a column 'messages' nor all of 'question', 'context' and 'answer'; the row"
                " has: question, sql; set task.columns={OURS: YOURS}"
            ),
        ),
        (PAIR | {"answer": ""}, "answer is empty"),
        (PAIR | {"context": 5}, "context must be text, and is int: '5'"),
        (
            PAIR | {"context": "games(score, year)"},
            "there is no CREATE TABLE statement with columns before the answer",
        ),
        ({"messages": CHAT["messages"][:1]}, "no assistant message: there is nothing to learn"),
        (
            {"messages": "SELECT 1"},
            "messages must be a list with at least one entry, and is 'SELECT 1'",
        ),
        (
            {"messages": [CHAT["messages"][0], {"role": "assistant", "content": " "}]},
            "message 2: the answer is empty",
        ),
    ],
)
def test_a_broken_row_is_bad_with_its_line(tmp_path, row, reason):
    file = write_rows(tmp_path / "rows.jsonl", [CHAT, row])
    assert list(task(file).examples("train"))[1] == Bad(f"{file}:2", reason)


@pytest.mark.parametrize(
    ("text", "tables"),
    [
        (CONTEXT, {"games": TABLES["games"]}),
        ("create table if not exists a (x int, PRIMARY KEY (x))", {"a": {"x": "INT"}}),
        (
            "CREATE TABLE a (x VARCHAR(20), y DECIMAL(5, 2) NOT NULL);",
            {"a": {"x": "VARCHAR(20)", "y": "DECIMAL(5, 2) NOT NULL"}},
        ),
        ("CREATE TABLE a (x INT); CREATE TABLE b (y INT)", {"a": {"x": "INT"}, "b": {"y": "INT"}}),
        ("CREATE TABLE a (x INT); CREATE TABLE A (X INT, y INT)", {"a": {"x": "INT", "y": "INT"}}),
        (
            'CREATE TABLE "my table" ("my key" INT, `b` TEXT, [c d] TEXT)',
            {"my table": {"my key": "INT", "b": "TEXT", "c d": "TEXT"}},
        ),
        (
            "CREATE TABLE a (won__$_ VARCHAR, engine_† VARCHAR)",
            {"a": {"won__$_": "VARCHAR", "engine_†": "VARCHAR"}},
        ),
        ("CREATE TABLE a (x, y)", {"a": {"x": "", "y": ""}}),
        ("CREATE TABLE a (x INT DEFAULT ')', y INT)", {"a": {"x": "INT DEFAULT ')'", "y": "INT"}}),
        ("CREATE TABLE a (x INT", {}),
        ("CREATE TABLE a ()", {}),
        ("no table", {}),
    ],
)
def test_tables_are_read_from_their_statements(text, tables):
    assert schema(text) == tables


@pytest.mark.parametrize(
    ("text", "query"),
    [
        (" SELECT 1 ;; \n", "SELECT 1"),
        ("```sql\nSELECT 1;\n```", "SELECT 1"),
        ("```\nSELECT 1", "SELECT 1"),
        ("SELECT '```'", "SELECT '```'"),
        ("", ""),
    ],
)
def test_what_surrounds_a_query_is_taken_off(text, query):
    assert bare(text) == query


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        (ANSWER, ANSWER + " ;", True),
        (ANSWER, ANSWER.replace("SELECT", "select").replace(" FROM", "\n  from"), True),
        (ANSWER, ANSWER.replace("score", "Score"), True),
        (ANSWER, ANSWER.replace("'", '"'), True),
        (ANSWER, ANSWER.replace(" = ", "="), True),
        (ANSWER, ANSWER.replace("score", '"score"'), True),
        (ANSWER, ANSWER.replace("games", "`games`"), True),
        (ANSWER, ANSWER.replace("Ottawa", "ottawa"), False),
        (ANSWER, ANSWER.replace("Ottawa", "Ottawa "), False),
        (ANSWER, ANSWER.replace("1999", "'1999'"), False),
        (ANSWER, ANSWER.replace("score", "'score'"), False),
        (ANSWER, ANSWER.replace("1999", "19.99"), False),
        ("SELECT a <> b", "SELECT a!=b", True),
        ("SELECT a >= b", "SELECT a > = b", False),
        ("SELECT a.b", "SELECT a . b", True),
        ("SELECT 'it''s'", 'SELECT "it\'s"', True),
        ("SELECT 'it's'", "SELECT 'it's'", True),
        ("SELECT COUNT(*)", "SELECT count ( * )", True),
    ],
)
def test_queries_are_compared_by_their_tokens(one, other, same):
    assert (tokens(bare(one), TABLES) == tokens(bare(other), TABLES)) is same


@pytest.mark.parametrize(
    ("query", "same"),
    [
        ("SELECT score FROM games WHERE year = 1999 AND visitor = 'Ottawa'", True),
        (
            "SELECT g.score FROM games AS g WHERE g.visitor IN ('Ottawa') AND NOT g.year <> 1999",
            True,
        ),
        ('SELECT score FROM games WHERE visitor = "Ottawa" AND year = 1999', True),
        (
            "SELECT score FROM games WHERE visitor = 'Ottawa' AND year = 1999 ORDER BY score DESC",
            True,
        ),
        ("SELECT score FROM games WHERE visitor = 'Ottawa'", False),
        ("SELECT score FROM games WHERE year = 1999", False),
        ("SELECT score FROM games WHERE visitor = 'Ottawa' OR year = 1999", False),
        ("SELECT score FROM games WHERE visitor = 'Ottawa' AND year >= 1999", False),
        ("SELECT score FROM games WHERE visitor = 'ottawa' AND year = 1999", False),
        ("SELECT visitor FROM games WHERE visitor = 'Ottawa' AND year = 1999", False),
        ("SELECT score, year FROM games WHERE visitor = 'Ottawa' AND year = 1999", False),
        ("SELECT COUNT(score) FROM games WHERE visitor = 'Ottawa' AND year = 1999", False),
        ("SELECT score FROM teams WHERE visitor = 'Ottawa' AND year = 1999", False),
        ("SELECT score FROM games WHERE", False),
        ("The score.", False),
        ("", False),
        ("SELECT '\0'", False),
        ("SELECT '\ud800'", False),
    ],
)
def test_queries_are_compared_by_their_results(query, same):
    assert same_result(query, ANSWER, TABLES) is same


@pytest.mark.parametrize(
    ("right", "query", "same"),
    [
        ("SELECT year FROM games ORDER BY year", "SELECT year FROM games ORDER BY year ASC", True),
        (
            "SELECT year FROM games ORDER BY year",
            "SELECT year FROM games ORDER BY year DESC",
            False,
        ),
        (
            "SELECT year FROM games ORDER BY year",
            "SELECT DISTINCT year FROM games ORDER BY year",
            False,
        ),
        ("SELECT year FROM games", "SELECT year FROM games ORDER BY year DESC", True),
        ("SELECT AVG(year) FROM games", "SELECT SUM(year) * 1.0 / COUNT(*) FROM games", True),
        ("SELECT AVG(year) FROM games", "SELECT AVG(DISTINCT year) FROM games", False),
        ("SELECT MAX(year) FROM games", "SELECT year FROM games ORDER BY year DESC LIMIT 1", True),
        ("SELECT MAX(year) FROM games", "SELECT MIN(year) FROM games", False),
        (
            "SELECT score FROM games WHERE visitor LIKE '%Otta%'",
            "SELECT score FROM games WHERE visitor LIKE '%otta%'",
            True,
        ),
        (
            "SELECT score FROM games WHERE visitor LIKE '%Otta%'",
            "SELECT score FROM games WHERE visitor LIKE '%awa%'",
            False,
        ),
        (
            "SELECT score FROM games JOIN teams ON games.visitor = teams.name",
            "SELECT score FROM teams, games WHERE name = visitor",
            True,
        ),
        (
            "SELECT score FROM games JOIN teams ON games.visitor = teams.name",
            "SELECT score FROM games",
            False,
        ),
        (
            "SELECT score FROM games EXCEPT SELECT name FROM teams",
            "SELECT DISTINCT score FROM games WHERE NOT score IN (SELECT name FROM teams)",
            True,
        ),
    ],
)
def test_orders_aggregates_and_joins_are_told_apart(right, query, same):
    assert same_result(query, right, TABLES) is same


@pytest.mark.parametrize(
    "right",
    [
        "SELECT score FROM games WHERE 1 = 2",
        "SELECT COUNT(*) FROM games WHERE 1 = 2",
        "SELECT MAX(year) FROM games WHERE 1 = 2",
    ],
)
def test_finding_nothing_in_common_is_no_proof(right):
    assert not same_result(right.replace("1 = 2", "2 = 3"), right, TABLES)


def graded(folder: Path, answer: str, completion: str) -> dict[str, float]:
    actual = task(write_rows(folder / "rows.jsonl", [PAIR | {"answer": answer}]))
    (example,) = actual.examples("train")
    scores = actual.grade(example, completion)
    assert list(scores) == actual.metrics
    return scores


@pytest.mark.parametrize(
    ("answer", "completion", "exact", "same"),
    [
        (ANSWER, ANSWER, 1.0, 1.0),
        (ANSWER, f"```sql\n{ANSWER};\n```", 1.0, 1.0),
        (ANSWER, "SELECT score FROM games WHERE year = 1999 AND visitor = 'Ottawa'", 0.0, 1.0),
        (ANSWER, "SELECT score FROM games", 0.0, 0.0),
        (ANSWER, "", 0.0, 0.0),
        # These do not run, or find nothing.
        (
            "SELECT score FROM games WHERE visitor = 'St. John's'",
            "select score from games where visitor = 'St. John's'",
            1.0,
            1.0,
        ),
        (
            "SELECT score FROM games WHERE visitor = 'St. John's'",
            "SELECT score FROM games WHERE visitor = 'St. Johns'",
            0.0,
            0.0,
        ),
        ("SELECT score FROM games WHERE 1 = 2", "SELECT score FROM games WHERE 1 = 2;", 1.0, 1.0),
    ],
)
def test_an_answer_is_graded(tmp_path, answer, completion, exact, same):
    assert graded(tmp_path, answer, completion) == {"exact_match": exact, "same_result": same}


def test_the_random_rows_are_always_the_same_and_hold_the_literals_and_their_neighbours():
    actual = []
    for _ in range(2):
        with contextlib.closing(sqlite3.connect(":memory:")) as database:
            databases.fill(database, TABLES, {None: ["a"], "year": [1999]}, random.Random("0 x"))
            actual.append(database.execute("SELECT * FROM games").fetchall())
    assert actual[0] == actual[1]
    assert len(actual[0]) == databases.ROWS
    assert {1998, 1999, 2000} <= {year for _, _, year in actual[0]}
    assert "a" in {score for score, _, _ in actual[0]}


HOSTILE = [
    "DELETE FROM games",
    "DROP TABLE games",
    "INSERT INTO games VALUES (1, 2, 3)",
    "UPDATE games SET year = 1",
    "CREATE TABLE other (x)",
    "CREATE TEMP TABLE other (x)",
    "ATTACH DATABASE '{file}' AS other",
    "VACUUM INTO '{file}'",
    "PRAGMA temp_store_directory = '/'",
    "PRAGMA user_version",
    "SELECT * FROM pragma_user_version",
    "SELECT load_extension('{file}')",
    "SELECT random()",
    "SELECT hex(randomblob(4))",
    "SELECT 1; SELECT 2",
    "SELECT 1; DROP TABLE games",
    "BEGIN",
    "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT COUNT(*) FROM n",
    "SELECT COUNT(*) FROM " + ", ".join(f"games AS g{i}" for i in range(9)),
    "SELECT g0.year FROM games AS g0, games AS g1, games AS g2, games AS g3",
    "SELECT zeroblob(1000000000)",
    "SELECT replace(hex(zeroblob(2000)), '0', hex(zeroblob(2000)))",
    "SELECT printf('%1000000000d', 1)",
    "SELECT CAST(x'ff' AS TEXT)",
    "SELECT " + "(" * 5000 + "1" + ")" * 5000,
    "SELECT '" + "a" * 60_000 + "'",
    "SELECT " + ", ".join(["1"] * 5000),
]


@pytest.mark.long
@pytest.mark.parametrize("query", HOSTILE, ids=lambda query: query[:40])
def test_a_query_can_neither_write_nor_reach_out_nor_run_for_long(tmp_path, query):
    file = tmp_path / "out.db"
    query = query.format(file=file)
    for pair in ((query, ANSWER), (ANSWER, query), (query, query)):
        assert not same_result(*pair, TABLES)
    assert list(tmp_path.iterdir()) == []


def test_that_the_guards_are_what_stops_a_query(monkeypatch):
    """The same calls without the authoriser and with more steps: what the tests above refuse would
    pass."""
    monkeypatch.setattr(databases, "_allowed", lambda *_: sqlite3.SQLITE_OK)
    assert same_result("PRAGMA  encoding", "PRAGMA encoding", TABLES)
    endless = "SELECT COUNT(*) FROM games AS a, games AS b, games AS c, games AS d"
    assert not same_result(endless + " WHERE 1", endless, TABLES)
    monkeypatch.setattr(databases, "STEPS", 10**9)
    monkeypatch.setattr(databases, "ROWS", 12)
    assert same_result(endless + " WHERE 1", endless, TABLES)


# One operation of SQLite each, which no count of steps stops, or rows of gigabytes.
UNSTOPPABLE = {
    "a LIKE of many wildcards": "SELECT '{a}' LIKE '{wild}'",
    "a GLOB of many wildcards": "SELECT '{a}' GLOB '{star}'",
    "long texts in many rows": (
        "SELECT group_concat(a.score || '{a}') FROM games a, games b, games c"
    ),
    "wide rows": "WITH t AS (SELECT '{a}' AS x FROM games a, games b, games c) SELECT "
    + ", ".join(["x"] * 900)
    + " FROM t",
}


@pytest.mark.long
@pytest.mark.parametrize("case", UNSTOPPABLE)
def test_a_query_that_sqlite_does_not_interrupt_ends_with_its_process(case, monkeypatch):
    monkeypatch.setattr(databases, "SECONDS", 1)
    sql_process._process.end()
    query = UNSTOPPABLE[case].format(a="a" * 4000, wild="%a" * 400 + "b", star="*a" * 400 + "b")
    started = time.monotonic()
    assert not sql_process.same_result(query, query, TABLES)
    assert time.monotonic() - started < 120
    assert sql_process.same_result(ANSWER, ANSWER, TABLES)  # the next one has a new process
    sql_process._process.end()


def test_the_process_knows_nothing_of_ours(tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "x")
    sql_process._process.end()
    assert sql_process.same_result(ANSWER, ANSWER, TABLES)
    child = sql_process._process.child
    assert Path(f"/proc/{child.pid}/environ").read_bytes() == b""
    limits = Path(f"/proc/{child.pid}/limits").read_text()
    assert re.search(rf"Max address space +{databases.MEMORY} ", limits)
    assert re.search(r"Max file size +0 ", limits)
    sql_process._process.end()
    assert child.returncode is not None


@pytest.mark.long
@pytest.mark.parametrize(
    "text",
    [
        "CREATE TABLE a (",
        "CREATE TABLE [",
        'CREATE TABLE "',
        "CREATE TABLE a (b, ",
        "create table a(b int) ",
        "CREATE ",
        "CREATE TABLE a ('",
        "CREATE TABLE a ((((",
    ],
)
def test_reading_the_tables_takes_a_time_that_grows_with_the_text(text):
    assert_linear(schema, lambda size: text * (size // len(text)))


def test_wide_tables_and_their_queries_take_a_time_that_grows_with_them():
    def wide(size):
        return "CREATE TABLE t (" + ", ".join(f"c{i} INT" for i in range(size // 10)) + ")"

    assert_linear(schema, wide)
    columns = schema(wide(100_000))
    assert len(columns["t"]) == 10_000
    assert_linear(lambda query: tokens(query, columns), lambda size: "SELECT c1 " * (size // 10))


@pytest.fixture(scope="module")
def real() -> tuple[SQL, list[Any]]:
    if not REAL.is_file():
        pytest.skip("../shared/data/sql_train.jsonl is not there")
    actual = task(REAL)
    return actual, list(actual.examples("train"))


@pytest.mark.long
def test_the_real_queries_are_right_and_those_of_other_questions_are_not(real):
    actual, examples = real
    assert len(examples) == 800
    assert all(
        set(actual.grade(example, example.reference[1]).values()) == {1.0} for example in examples
    )
    # The same tokens are right unrun; run, most show something.
    assert (
        sum(
            same_result(query, query, tables)
            for tables, query in (example.reference for example in examples)
        )
        >= 780
    )
    others = random.Random(0).sample(examples, 800)
    chance = [
        actual.grade(example, other.reference[1])
        for example, other in zip(examples, others, strict=True)
    ]
    assert sum(scores["same_result"] for scores in chance) < 8


@pytest.mark.long
@pytest.mark.parametrize(
    ("pattern", "replacement", "count", "least", "most"),
    [
        # as right as before
        (r"WHERE (\w+ = '[^']*') AND (\w+ = '[^']*')$", r"WHERE \2 AND \1", 128, 1.0, 1.0),
        (r" AND .*", "", 145, 0.0, 0.05),
        (r" WHERE .*", "", 770, 0.0, 0.06),
        (r" AND ", " OR ", 145, 0.0, 0.05),
        (r"\bMAX\b", "MIN", 31, 0.0, 0.05),
        (r"= '[^']*'", "= 'nothing'", 762, 0.0, 0.02),
    ],
)
def test_real_queries_with_one_change(real, pattern, replacement, count, least, most):
    actual, examples = real
    changed = [
        (example, re.sub(pattern, replacement, example.reference[1])) for example in examples
    ]
    changed = [(example, query) for example, query in changed if query != example.reference[1]]
    assert len(changed) == count
    right = sum(actual.grade(example, query)["same_result"] for example, query in changed[:160])
    assert least <= right / len(changed[:160]) <= most
