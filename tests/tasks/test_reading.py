"""Rows of files: what every kind holds, and what is said of a file or a row that cannot be used."""

from __future__ import annotations

import csv
import gzip
import json
import re
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from tasks import arrow_rows, reading
from tasks.reading import Bad, DataError, Source

ROWS = [
    {"text": "plain", "label": "a"},
    {"text": 'é 漢 🙂, "quoted"', "label": "b"},
    {"text": "two\nlines", "label": "a"},
]


def source(*paths: Path | str) -> Source:
    names = [str(path) for path in paths]
    return Source(names[0] if len(names) == 1 else names, "train", False, "task.path")


def rows(*paths: Path | str) -> list[Any]:
    return [row for _, row in source(*paths)]


def packed(content: bytes) -> bytes:
    return gzip.compress(content, mtime=0)


def written(folder: Path, kind: str, arguments: list[dict[str, Any]]) -> Path:
    """A file of this kind with these rows."""
    file = folder / f"rows.{kind}"
    if kind in ("jsonl", "ndjson"):
        file.write_text("".join(json.dumps(row) + "\n" for row in arguments), "utf-8")
    elif kind == "json":
        file.write_text(json.dumps(arguments, ensure_ascii=False, indent=1), "utf-8")
    elif kind == "csv":
        with file.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, list(arguments[0]))
            writer.writeheader()
            writer.writerows(arguments)
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(arguments), file)
    return file


@pytest.mark.parametrize("kind", ["jsonl", "ndjson", "json", "csv", "parquet"])
def test_every_kind_of_file_gives_the_rows_that_were_written(tmp_path, kind):
    assert rows(written(tmp_path, kind, ROWS)) == ROWS


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet"])
def test_nested_values_keep_their_types(tmp_path, kind):
    row = {
        "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}],
        "n": 3,
        "x": 0.5,
        "b": True,
    }
    assert rows(written(tmp_path, kind, [row])) == [row]


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv"])
@pytest.mark.parametrize("name", ["rows.{}.gz", "rows.{}"])
def test_packed_files_are_unpacked_whatever_their_name(tmp_path, kind, name):
    content = written(tmp_path, kind, ROWS).read_bytes()
    file = tmp_path / name.format(kind)
    file.write_bytes(packed(content))
    assert rows(file) == ROWS


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv"])
def test_a_byte_order_mark_is_no_part_of_the_first_row(tmp_path, kind):
    file = written(tmp_path, kind, ROWS)
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert rows(file) == ROWS


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_lines_are_counted_as_an_editor_counts_them(tmp_path, end):
    file = tmp_path / "rows.jsonl"
    file.write_bytes(
        end.join(
            ['{"text": "a\\u2028b"}', "", '{"text": "\u2028"}', "  ", '{"text": "c"}']
        ).encode()
    )
    assert list(source(file)) == [
        (f"{file}:1", {"text": "a\u2028b"}),
        (f"{file}:3", {"text": "\u2028"}),
        (f"{file}:5", {"text": "c"}),
    ]


def test_separated_values_are_all_text_and_keep_blanks(tmp_path):
    file = tmp_path / "rows.csv"
    file.write_text('text,label\n  a ,1\n"x ""y""",\n\n"two\nlines",2\n', "utf-8")
    assert list(source(file)) == [
        (f"{file}:2", {"text": "  a ", "label": "1"}),
        (f"{file}:3", {"text": 'x "y"', "label": ""}),
        (f"{file}:6", {"text": "two\nlines", "label": "2"}),
    ]


def test_line_ends_within_a_quoted_value_stay_as_they_are(tmp_path):
    file = tmp_path / "rows.csv"
    file.write_bytes(b'text,label\r\n"two\r\nlines",1\r\n"one\nmore",2\r\n')
    assert rows(file) == [
        {"text": "two\r\nlines", "label": "1"},
        {"text": "one\nmore", "label": "2"},
    ]


def test_a_quotation_mark_among_tabs_is_text(tmp_path):
    file = tmp_path / "rows.tsv"
    file.write_text('text\tlabel\n"so\t1\nit, "is\t0\n', "utf-8")
    assert rows(file) == [{"text": '"so', "label": "1"}, {"text": 'it, "is', "label": "0"}]


@pytest.mark.parametrize("kind", ["txt", "text"])
def test_the_paragraphs_of_plain_text_are_its_rows(tmp_path, kind):
    file = tmp_path / f"rows.{kind}"
    file.write_bytes("\ufeff\n\none\n  two\n \n\nthree 漢\r\n".encode())
    assert list(source(file)) == [
        (f"{file}:3", {"text": "one\n  two"}),
        (f"{file}:7", {"text": "three 漢"}),
    ]


def test_several_files_and_patterns_are_read_one_after_the_other(tmp_path):
    for name, text in (("b.jsonl", "2"), ("a.jsonl", "1"), ("deep/c.jsonl", "3")):
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps({"text": text}))
    texts = [row["text"] for row in rows(tmp_path / "**" / "*.jsonl", tmp_path / "a.jsonl")]
    assert texts == ["1", "2", "3", "1"]


@pytest.mark.parametrize(
    ("kind", "places"),
    [("jsonl", ["1", "2", "3"]), ("csv", ["2", "3", "5"])]
    + [(kind, ["row 1", "row 2", "row 3"]) for kind in ("json", "parquet")],
)
def test_every_row_has_its_place(tmp_path, kind, places):
    file = written(tmp_path, kind, ROWS)
    assert [where for where, _ in source(file)] == [f"{file}:{place}" for place in places]


def test_rows_of_parquet_are_counted_over_its_batches(tmp_path):
    file = written(tmp_path, "parquet", [{"n": n} for n in range(2500)])
    assert list(source(file)) == [(f"{file}:row {n + 1}", {"n": n}) for n in range(2500)]


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "txt"])
def test_a_long_text_is_one_row(tmp_path, kind):
    file = tmp_path / f"rows.{kind}"
    text = "x" * 200_000
    file.write_text(
        {
            "csv": f"text\n{text}\n",
            "tsv": f"text\n{text}\n",
            "jsonl": json.dumps({"text": text}),
            "txt": text,
        }[kind]
    )
    assert rows(file) == [{"text": text}]


@pytest.mark.parametrize("name", ["rows[1].jsonl", "rows?.jsonl", "a b.jsonl"])
def test_a_file_whose_name_looks_like_a_pattern_is_that_file(tmp_path, name):
    for other in ("rows1.jsonl", "rowsX.jsonl", name):
        (tmp_path / other).write_text(json.dumps({"text": other}))
    assert rows(tmp_path / name) == [{"text": name}]


# data sets that are no file


@pytest.fixture
def data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data set as the hub lays them out, in a folder that has the name of one."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "owner" / "name"
    folder.mkdir(parents=True)
    for split, arguments in (("train", ROWS), ("test", ROWS[:1])):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in arguments))
    return folder


@pytest.mark.long
@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(("split", "expected"), [("train", ROWS), ("test", ROWS[:1])])
def test_a_data_set_gives_the_rows_of_its_split_streamed_or_not(
    data_set, streaming, split, expected
):
    actual = list(Source("owner/name", split, streaming, "task.path"))
    assert actual == [
        (f"owner/name[{split}]:row {number}", row) for number, row in enumerate(expected, 1)
    ]


def test_a_split_that_a_data_set_lacks_is_named_with_those_it_has(data_set):
    with pytest.raises(DataError, match=r"data set 'owner/name': .*nope.*train.*test"):
        list(Source("owner/name", "nope", True, "task.path"))


def test_a_folder_of_save_to_disk_says_how_to_write_it(data_set):
    (data_set / "state.json").write_text("{}")
    with pytest.raises(DataError, match=r"a folder of save_to_disk.* to_parquet\(FILE\)"):
        list(Source("owner/name", "train", False, "task.path"))


def test_a_data_sets_digest_follows_its_content_and_split(data_set):
    def digest(split: str) -> str:
        return Source("owner/name", split, False, "task.path").fingerprint()

    before = digest("train")
    assert digest("train") == before != digest("test")
    (data_set / "train.jsonl").write_text('{"text": "changed", "label": "a"}\n')
    assert digest("train") != before


# what is wrong with a file


@pytest.mark.parametrize("path", ["", [], ["", "rows.jsonl"]])
def test_an_empty_path_is_refused(path):
    with pytest.raises(DataError, match=r"task\.path is empty: it must name files"):
        Source(path, "train", False, "task.path")


@pytest.mark.parametrize(
    "name", ["missing.jsonl", "./missing", "a/b/c", "none*", "missing.parquet"]
)
def test_a_missing_file_is_named(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        DataError,
        match=re.escape(
            f"task.path={name!r}: there is no such file (the current folder is {tmp_path})"
        ),
    ):
        source(name)


def test_among_several_paths_none_may_be_a_hubs(tmp_path):
    file = written(tmp_path, "jsonl", ROWS)
    with pytest.raises(DataError, match=r"task.path lists 'owner/name', which is no file"):
        source(file, "owner/name")


def test_an_unreachable_data_set_is_explained():
    with pytest.raises(
        DataError,
        match="'graft-nobody/nothing' is no file here, and could not be loaded as a data set",
    ):
        list(source("graft-nobody/nothing"))


def test_an_unknown_kind_of_file_lists_the_known_ones(tmp_path):
    (tmp_path / "rows.xlsx").write_text("x")
    with pytest.raises(
        DataError, match=r"rows\.xlsx is of an unknown kind; known: \.jsonl, \.json, \.csv"
    ):
        source(tmp_path / "rows.xlsx")


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "tsv", "parquet", "txt"])
def test_an_empty_file_is_named(tmp_path, kind):
    file = tmp_path / f"rows.{kind}"
    file.write_bytes(b"")
    with pytest.raises(DataError, match=rf"task.path: {re.escape(str(file))} is empty"):
        source(file)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.json", b'{"text": "a"}', "must hold a list of objects, and holds dict"),
        (
            "rows.json",
            b'{"text": "a"}\n{"text": "b"}\n',
            ":2: not JSON: Extra data.*one JSON value per line, name it .jsonl",
        ),
        (
            "rows.json",
            b'[{"text": "a"},\n{"text": b}]',
            ":2: not JSON: Expecting value at column 10",
        ),
        ("rows.json", b'[{"text": "\xff"}]', "not UTF-8 at byte 12"),
        ("rows.json", b'{"text": NaN}', "NaN is not JSON"),
        ("rows.json", b"[" * 200_000, "recursion depth"),
        ("rows.csv", b"a,b,a\n1,2,3\n", ":1: the header names a column twice: a, b, a"),
        (
            "rows.csv",
            b'a,b\n1,2\n"x,2\n',
            "not readable as separated values: unexpected end of data",
        ),
        ("rows.csv", b'a,b\n1,2\n"x"y,2\n', ":3: not readable as separated values"),
        ("rows.csv", b"a,b\n\xff,2\n", "not UTF-8 at or after this line"),
        ("rows.csv", b"\xef\xbb\xbf", ":1: no header; the first line must name the columns"),
        ("rows.csv", b"\n\n1,2\n", ":1: no header"),
        ("rows.csv.gz", packed(b""), ":1: no header"),
        ("rows.parquet", b"no parquet at all", "not readable as parquet"),
        ("rows.jsonl.gz", packed(b'{"text": "a"}\n' * 9)[:-9], "not readable as gzip"),
        ("rows.json.gz", packed(b'[{"text": "a"}]')[:-9], "not readable as gzip"),
        ("rows.csv.gz", packed(b"text\na\n" * 9)[:-9], "not readable as gzip"),
        ("rows.txt.gz", packed(b"text\na\n" * 9)[:-9], "not readable as gzip"),
        ("rows.txt.gz", packed(b"text\na\n" * 9)[:-6] + b"abcdef", "not readable as gzip"),
    ],
)
def test_an_unreadable_file_is_named_with_the_reason(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        list(source(tmp_path / name))
    assert str(caught.value).startswith(str(tmp_path / name))


def test_a_truncated_parquet_file_is_named(tmp_path):
    file = written(tmp_path, "parquet", ROWS)
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(DataError, match=rf"{re.escape(str(file))}: not readable as parquet"):
        list(source(file))


@pytest.mark.parametrize(
    ("columns", "names", "message"),
    [
        ([["a"], ["b"]], ["text", "text"], "it has the column 'text' twice"),
        ([b"\xff\xfe"], ["text"], "a text after row 0 is not UTF-8"),
    ],
)
def test_a_parquet_file_that_would_lose_a_text_is_named(tmp_path, columns, names, message):
    if isinstance(columns[0], bytes):
        offsets = pyarrow.py_buffer(b"\0\0\0\0\x02\0\0\0")
        text = pyarrow.py_buffer(columns[0])
        columns = [pyarrow.Array.from_buffers(pyarrow.string(), 1, [None, offsets, text])]
    file = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.table(columns, names=names), file)
    with pytest.raises(DataError, match=re.escape(f"{file}: ") + f".*{message}"):
        list(source(file))


# what is wrong with a row

HALF = "it has half of a surrogate pair, which is no character"
TWICE = "it has the key 'text' twice: leave one"


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "a"', "not JSON: Expecting ',' delimiter at column 13"),
        (b"text", "not JSON: Expecting value at column 1"),
        (b'{"text": "\xff"}', "not UTF-8 at byte 11 of the line (0xff)"),
        (b'{"text": "a"} {"text": "b"}', "not JSON: Extra data at column 15"),
        (b'["a"]', "a row must be a JSON object, and is list"),
        (b"null", "a row must be a JSON object, and is NoneType"),
        (b'{"text": NaN}', "not usable JSON: NaN is not JSON"),
        (b'{"text": -Infinity}', "not usable JSON: -Infinity is not JSON"),
        (b'{"text": "\\ud83d"}', f"not usable JSON: {HALF}"),
        (b'{"text": "a", "text": "b"}', f"not usable JSON: {TWICE}"),
        (b'{"m": [{"text": "a", "text": "a"}]}', f"not usable JSON: {TWICE}"),
    ],
)
def test_a_broken_json_line_is_bad_with_its_number_and_the_others_are_read(tmp_path, line, reason):
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b"\n".join([b'{"text": "one"}', line, b'{"text": "\\ud83d\\ude42"}']))
    assert [row for _, row in source(file)] == [
        {"text": "one"},
        Bad(f"{file}:2", reason),
        {"text": "🙂"},
    ]


def test_endless_nesting_is_a_bad_row(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"text": ' + "[" * 200_000 + "\n" + '{"text": "b"}\n')
    first, second = rows(file)
    assert (first.where, second) == (f"{file}:1", {"text": "b"})
    assert first.reason.startswith("not usable JSON")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('[{"a": 1}, 5]', "a row must be a JSON object, and is int"),
        ('[{"a": 1}, {"a": "\\ud83d"}]', f"not usable JSON: {HALF}"),
        (' [ {"a": 1} ,{"text": "],[{", "text": "b"}\n]', f"not usable JSON: {TWICE}"),
        ('[{"a": 1}, {"a": NaN}]', "not usable JSON: NaN is not JSON"),
    ],
)
def test_a_broken_entry_of_a_json_list_is_bad_with_its_number(tmp_path, text, reason):
    file = tmp_path / "rows.json"
    file.write_text(text)
    assert rows(file) == [{"a": 1}, Bad(f"{file}:row 2", reason)]


@pytest.mark.parametrize(("fields", "count"), [("x", 1), ("x,y,z", 3)])
def test_a_line_with_other_fields_than_the_header_is_bad(tmp_path, fields, count):
    file = tmp_path / "rows.csv"
    file.write_text(f"a,b\n1,2\n{fields}\n3,4\n")
    assert rows(file) == [
        {"a": "1", "b": "2"},
        Bad(f"{file}:3", f"{count} fields, but the header has 2"),
        {"a": "3", "b": "4"},
    ]


def test_a_line_of_text_in_another_encoding_is_bad(tmp_path):
    file = tmp_path / "rows.txt"
    file.write_bytes(b"one\n\ncaf\xe9\n\ntwo\n")
    assert rows(file) == [
        {"text": "one"},
        Bad(f"{file}:3", "not UTF-8 at byte 4 of the line"),
        {"text": "two"},
    ]


# the digest


def test_the_digest_follows_content_and_kind_and_not_the_place(tmp_path):
    first, second, third = (tmp_path / name for name in ("a.jsonl", "b.jsonl", "c.jsonl"))
    first.write_text('{"text": "a"}\n')
    second.write_text('{"text": "a"}\n')
    third.write_text('{"text": "b"}\n')
    as_text = tmp_path / "a.txt"
    as_text.write_text('{"text": "a"}\n')
    assert source(first).fingerprint() == source(second).fingerprint()
    digests = [
        source(*files).fingerprint()
        for files in ((first,), (third,), (as_text,), (first, third), (third, first))
    ]
    assert len(set(digests)) == 5
    first.write_text('{"text": "c"}\n')
    assert source(first).fingerprint() not in digests


@pytest.mark.long
@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "txt"])
def test_a_gzip_file_that_expands_without_end(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(reading, "EXPANDED", 1 << 16)
    file = tmp_path / f"rows.{kind}.gz"
    file.write_bytes(packed(b'[{"text": "' + b"a" * (10 << 20) + b'"}]'))
    with pytest.raises(DataError, match="expands to more than 200 times its size"):
        rows(file)
    file.write_bytes(packed(b'{"text": "a row of text"}\n' * 4000))  # equal rows
    if kind == "jsonl":
        assert len(rows(file)) == 4000


def test_a_parquet_row_has_only_the_keys_that_it_had(tmp_path):
    arguments = [
        {"calls": [{"name": "a", "arguments": {"city": "Paris"}}], "note": None},
        {"calls": [{"name": "b", "arguments": {"n": 1, "m": [None, 2]}}], "note": "x"},
    ]
    # Arrow gives every struct every key.
    assert pyarrow.Table.from_pylist(arguments).to_pylist() != arguments
    assert rows(written(tmp_path, "parquet", arguments)) == arguments


def test_json_columns_of_datasets_are_parsed_and_keep_their_nulls(tmp_path):
    import datasets

    arguments = [
        {"calls": [{"a": "Paris", "b": None}], "text": '"x"'},
        {"calls": [{"n": 1}], "text": "y"},
    ]
    features = datasets.Features(
        {"calls": datasets.List(datasets.Json()), "text": datasets.Value("string")}
    )
    table = datasets.Dataset.from_list(arguments, features=features)
    file = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(table.data.table, file)
    assert rows(file) == arguments
    decoded = arrow_rows.decoded(table.features.to_dict())
    assert [arrow_rows.present(dict(row), decoded) for row in table] == arguments
