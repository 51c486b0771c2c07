"""Files and a version of a data set on the hub, and further sets of evaluation."""

from __future__ import annotations

import pytest
from omegaconf import OmegaConf

from tasks.reading import DataError, Source
from tests.conftest import write_rows
from trainer.assembly.build import instantiate
from trainer.config import compose


def numbered(name, count):
    return [{"prompt": f"{name} {number}", "completion": str(number)} for number in range(count)]


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A clone of a data set with two configurations and files that belong to none."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    folder = tmp_path / "repository"
    (folder / "more").mkdir(parents=True)
    for name in ("easy", "hard", "more/a", "more/b"):
        write_rows(folder / f"{name}.jsonl", numbered(name, 3))
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: easy\n  data_files: easy.jsonl\n  default: true\n"
        "- config_name: hard\n  data_files: hard.jsonl\n---\n"
    )
    return folder


def first(path, **version):
    return [row["prompt"] for _, row in Source(str(path), "train", False, "task.path", **version)]


def test_a_configuration_and_files_are_chosen_by_name(repository):
    assert first(repository) == ["easy 0", "easy 1", "easy 2"]
    assert first(f"{repository}:hard") == ["hard 0", "hard 1", "hard 2"]
    assert first(repository, data_files="more/b.jsonl")[0] == "more/b 0"
    assert len(first(repository, data_files=["more/*.jsonl"])) == 6
    assert first(repository, data_files={"train": "more/a.jsonl", "test": "hard.jsonl"})[:1] == [
        "more/a 0"
    ]
    digests = {
        Source(str(repository), "train", False, "task.path", files).fingerprint()
        for files in (None, "more/a.jsonl", "more/b.jsonl")
    }
    assert len(digests) == 3


def test_a_revision_reaches_the_hub(monkeypatch):
    import datasets

    calls = []
    monkeypatch.setattr(
        datasets, "load_dataset", lambda *args, **more: calls.append((args, more)) or []
    )
    more = {"data_files": "data/*.parquet", "revision": "v1.2"}
    list(Source("owner/name:main", "train", True, "task.path", **more))
    assert calls == [(("owner/name", "main"), {"split": "train", "streaming": True} | more)]


def test_files_and_a_revision_of_a_file_are_refused(tmp_path):
    file = write_rows(tmp_path / "rows.jsonl", numbered("a", 2))
    with pytest.raises(DataError, match=r"task\.data_files and task\.revision choose from a data"):
        Source(str(file), "train", False, "task.path", "x.jsonl", "main")
    with pytest.raises(DataError, match=r"none\.jsonl"):
        first(tmp_path, data_files="none.jsonl")


@pytest.fixture
def files(tmp_path):
    return {
        name: write_rows(tmp_path / f"{name}.jsonl", numbered(name, 4))
        for name in ("train", "eval", "hard", "long")
    }


def task_of(name, files, *words):
    key = "task.parts={a: {path: '%s'}}" if name == "mixture" else "task.path='%s'"
    more = [] if name == "mixture" else [f"task.eval_path='{files['eval']}'"]
    config = compose.compose(
        [f"task={name}", key % files["train"], *more, *words],
    )
    return instantiate(OmegaConf.to_container(config, resolve=False)["task"])


@pytest.mark.long
@pytest.mark.parametrize("name", ["sft", "mixture"])
def test_further_sets_have_their_own_rows(name, files):
    task = task_of(
        name,
        files,
        f"task.eval_sets={{hard: '{files['hard']}', long: {{path: '{files['long']}', limit: 2}}}}",
    )
    assert task.eval_sets == ["hard", "long"]

    def prompts(split):
        return [example.messages[0]["content"] for example in task.examples(split)]

    assert prompts("eval/hard") == [f"hard {number}" for number in range(4)]
    assert prompts("eval/long") == ["long 0", "long 1"]
    assert not any("hard" in prompt for prompt in prompts("train") + prompts("eval"))
    splits = ("train", "eval", "eval/hard", "eval/long")
    assert len({task.fingerprint(split) for split in splits}) == 4


@pytest.mark.long
@pytest.mark.parametrize(
    ("sets", "says"),
    [
        ("{hard: {pth: x}}", r"task\.eval_sets\.hard is .*expected a path, or a mapping with path"),
        ("{offset1: x.jsonl}", r"task\.eval_sets\.offset1: a set's name has letters"),
        ("{hard: nowhere.jsonl}", r"task\.eval_sets\.hard='nowhere\.jsonl': there is no such file"),
        ("{hard: {path: x.jsonl, limit: many}}", r"hard\.limit is 'many', expected a number"),
    ],
)
def test_a_set_that_cannot_be_used_is_named(sets, says, files):
    with pytest.raises(DataError, match=says):
        task_of("sft", files, f"task.eval_sets={sets}")


def test_every_task_with_files_takes_them(files):
    """A law for each file of conf/task with a path."""
    from trainer.config import schema

    for name in schema.options("task"):
        leaves = schema.load(f"task/{name}").children
        if "path" in leaves:
            assert {"data_files", "revision", "eval_sets"} <= leaves.keys(), name
