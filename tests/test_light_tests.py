"""make check reaches every source file."""

from __future__ import annotations

import ast

import pytest

from tests import marks
from tests.conftest import ROOT

# Files that no light test imports, and the test file that reaches them: through a config, through
# another file of their folder, or by a run.
ELSEWHERE = {
    "adapters.errors": "tests/adapters/test_laws.py",
    "adapters.merging": "tests/adapters/test_laws.py",
    "adapters.peft_modules": "tests/adapters/test_trained_copies.py",
    "adapters.peft_targets": "tests/adapters/test_peft.py",
    "adapters.rosa_scores": "tests/adapters/test_rosa.py",
    "adapters.state": "tests/adapters/test_delta.py",
    "tasks.hub": "tests/tasks/test_sources.py",
    "trainer.assembly.continued": "tests/runs/test_continued.py",
    "trainer.callbacks.checkpoints": "tests/callbacks/test_callbacks.py",
    "trainer.callbacks.stopping": "tests/callbacks/test_callbacks.py",
    "trainer.config.flags": "tests/commands/test_help.py",
    "trainer.config.groups": "tests/config/test_compose.py",
    "trainer.config.lengths": "tests/config/test_compose.py",
    "trainer.config.target_base": "tests/training/test_distill.py",
    "trainer.decoding.clock": "tests/decoding/test_speculative.py",
    "trainer.evaluation.answer_prompts": "tests/commands/test_respond.py",
    "trainer.evaluation.realigned": "tests/evaluation/test_realigned.py",
    "trainer.evaluation.run_drafter": "tests/evaluation/test_decode_ways.py",
    "trainer.evaluation.run_metrics": "tests/evaluation/test_evaluate.py",
    "trainer.evaluation.streamed_answer": "tests/commands/test_generate.py",
    "trainer.exporting.medusa_layout": "tests/exporting/test_engines.py",
    "trainer.exporting.merged": "tests/exporting/test_export.py",
    "trainer.exporting.serving": "tests/exporting/test_export.py",
    "trainer.models.folders": "tests/models/test_base.py",
    "trainer.models.generation": "tests/models/test_strangers_base.py",
    "trainer.realign": "tests/evaluation/test_realigned.py",
    "trainer.schedules.cosine": "tests/schedules/test_schedules.py",
    "trainer.schedules.inverse_sqrt": "tests/schedules/test_schedules.py",
    "trainer.schedules.linear": "tests/schedules/test_schedules.py",
    "trainer.schedules.multistep": "tests/schedules/test_schedules.py",
    "trainer.session.model": "tests/runs/test_run.py",
    "trainer.session.results": "tests/runs/test_run.py",
    "trainer.session.same_step": "tests/runs/test_same_step.py",
    "trainer.storage.answers": "tests/commands/test_respond.py",
    "trainer.training.untrained": "tests/training/test_finetune.py",
}


def imported(path):
    """Dotted names that a file imports, those within its functions included."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom):
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def mirrored(source):
    """The test file of a source file's name: tests/data/test_rows.py of trainer/data/rows.py."""
    folders = source.relative_to(ROOT).parts[:-1]
    if folders[0] == "trainer":
        folders = folders[1:] or ("commands",)
    return "/".join(["tests", *folders, f"test_{source.name}"])


def test_make_check_reaches_every_source_file(pytestconfig):
    light = pytestconfig.stash[marks.LIGHT]
    written = {str(path.relative_to(ROOT)) for path in (ROOT / "tests").rglob("test_*.py")}
    if set(light) != written:
        pytest.skip("only where all tests are collected")
    files = [ROOT / file for file, count in light.items() if count]
    names = {
        name for file in (*files, *(ROOT / "tests/toys").glob("*.py")) for name in imported(file)
    }
    missed = set()
    for package in ("adapters", "tasks", "trainer"):
        for source in (ROOT / package).rglob("*.py"):
            module = ".".join(source.relative_to(ROOT).with_suffix("").parts)
            named = module.removesuffix(".__init__") in names or light.get(mirrored(source))
            if not named and ast.parse(source.read_text("utf-8")).body[1:]:
                missed.add(module)
    unreached = ", ".join(sorted(missed - set(ELSEWHERE)))
    assert not unreached, f"no light test imports {unreached}"
    reached = ", ".join(sorted(set(ELSEWHERE) - missed))
    assert not reached, f"a light test imports {reached} by now"
    assert set(ELSEWHERE.values()) <= written
