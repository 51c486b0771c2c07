"""docs/quickstart.ipynb: nothing of a machine in it, and every cell runs."""

from __future__ import annotations

import ast
import re
import sys

import nbformat
import pytest
from nbclient import NotebookClient

from tests import warm
from tests.docs.pages import LINK, ROOT, blocks

FILE = ROOT / "docs" / "quickstart.ipynb"
# In place of the real base and of BFCL's rows.
SETTINGS = """
GRAFT = {command}
TRAIN = ["experiment=smoke", "name=toy", "task.path=chats.jsonl", "max_steps=4", "precision=fp32",
         "threads=1", "callbacks.evaluation.generate=2", "callbacks.evaluation.max_new_tokens=4"]
RUN = "runs/toy"
SYSTEM = "Add."
QUESTION = "2+3="
ADAPTER = "adapter-peft"
"""


@pytest.fixture
def book():
    return nbformat.read(FILE, as_version=4)


def cells(book, kind):
    return [cell for cell in book.cells if cell.cell_type == kind]


def settings_of(book):
    """The cell that is meant to be changed, marked as papermill marks it."""
    (cell,) = [cell for cell in book.cells if "parameters" in cell.metadata.get("tags", ())]
    return cell


def names(source):
    """The names that a cell sets."""
    return {
        target.id
        for statement in ast.parse(source).body
        if isinstance(statement, ast.Assign)
        for target in statement.targets
    }


def test_it_is_a_notebook_without_anything_of_a_machine(book):
    nbformat.validate(book)
    for cell in cells(book, "code"):
        assert cell.outputs == []
        assert cell.execution_count is None
    assert {*book.metadata} == {"kernelspec", "language_info"}
    assert book.metadata.kernelspec.name == "python3"  # any kernel's, none of an own name
    assert not re.search(r"/(root|home|work|tmp)/", FILE.read_text("utf-8"))


def test_its_links_lead_somewhere_and_its_lines_are_short(book):
    text = "\n".join(cell.source for cell in cells(book, "markdown"))
    targets = [one or other for one, other in LINK.findall(text)]
    assert len(targets) >= 6
    for target in targets:
        assert (FILE.parent / target).is_file(), target
    for cell in book.cells:
        assert all(len(line) <= 100 for line in cell.source.splitlines())


def test_its_settings_are_those_of_the_quickstart(book):
    values = {}
    exec(settings_of(book).source, values)
    assert values["GRAFT"] == [sys.executable, "-m", "trainer"]
    (word,) = values["TRAIN"]
    experiment = ROOT / "conf" / f"{word.removeprefix('+').replace('=', '/')}.yaml"
    name = re.search(r"^name: (\S+)", experiment.read_text("utf-8"), re.M)
    assert values["RUN"] == f"runs/{name[1]}"
    page = next(block for block in blocks("docs/get-started.md", "bash") if "generate" in block)
    assert values["SYSTEM"] in page
    assert values["QUESTION"] in page


def printed(cell):
    return "".join(output.get("text", "") for output in cell.outputs)


def test_a_command_that_fails_stops_it(book, capfd):
    (cell,) = [cell for cell in book.cells if cell.id == "command"]
    values = {"GRAFT": [sys.executable, "-c", "print('why'); raise SystemExit(3)"]}
    exec(cell.source, values)
    with pytest.raises(RuntimeError, match="graft train ended with 3"):
        values["graft"]("train")
    assert capfd.readouterr().out == "why\n"


@pytest.mark.slow  # 40 s, most of it imports
def test_every_cell_runs(book, tmp_path, warm_socket, monkeypatch):
    rows = [f'{{"prompt": "{i}+{i}=", "completion": "{2 * i}"}}\n' for i in range(60)]
    (tmp_path / "chats.jsonl").write_text("".join(rows))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    cell = settings_of(book)
    before = names(cell.source)
    cell.source = SETTINGS.format(
        command=[sys.executable, "-S", warm.__file__, warm_socket, "graft"]
    )
    assert names(cell.source) == before  # none of them keeps its real value
    NotebookClient(book, timeout=240, resources={"metadata": {"path": tmp_path}}).execute()
    done = {cell.id: cell for cell in book.cells}
    assert (tmp_path / "runs" / "toy" / "report.html").is_file()
    assert "rows kept" in printed(done["train"])
    assert re.search(r"^loss +\d\.\d+ +\d\.\d+$", printed(done["curves"]), re.M)
    assert any("image/png" in output.get("data", {}) for output in done["curves"].outputs)
    assert (tmp_path / "adapter-peft" / "adapter_model.safetensors").is_file()
    assert len(printed(done["load"])) > 0
