"""Who imports whom, read from the files; and what importing does."""

from __future__ import annotations

import ast
import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT

PACKAGES = ("adapters", "tasks", "trainer")
# What a package may import besides the standard library and, for adapters and tasks, itself.
ADAPTERS = {"torch", "peft", "transformers", "safetensors", "jaxtyping", "bitsandbytes"}
TASKS = {"datasets", "pyarrow", "filelock", "torchmetrics"}
# At import time each may use those before it. Verbs reach for what comes later inside their main.
ORDER = [
    "schema", "combinations", "untrusted", "target", "requeue", "imports",
    "foreign", "redaction", "config", "schedules", "signals", "allocator", "cores", "journal", "fused", "liger", "compiled", "precision", "losses",
    "attention", "base", "checkpoint", "tokens", "data", "plan", "features", "stream", "loading", "penalties", "drafters", "decoding",
    "contamination", "sharding", "processes", "finetune", "distill", "folder", "branch", "evaluate", "callbacks", "assembly", "layouts", "export",
    "compress", "sizes", "report", "preview", "footprint", "preflight", "generate", "written", "prompts", "rollout", "respond", "treesearch",
    "speculate", "speedup", "speculation", "submit", "cooldown", "realign", "density", "failures", "resume", "outcome", "run", "__main__",
]  # fmt: skip
BEFORE_TORCH = {
    "schema",
    "combinations",
    "untrusted",
    "target",
    "foreign",
    "redaction",
    "requeue",
    "imports",
    "signals",
    "config",
    "submit",
    "__main__",
}


def files(package):
    return sorted((ROOT / package).rglob("*.py"))


def imported(path, whole=True):
    """Dotted names that a file imports; without `whole` only those that importing the file imports."""
    tree = ast.parse(path.read_text("utf-8"))
    nodes = ast.walk(tree) if whole else tree.body
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative"
            # `from trainer import config` names a module, `from torch import nn` need not.
            names |= {f"{node.module}.{alias.name}" if node.module in PACKAGES else node.module for alias in node.names}
    return {name for name in names if name.partition(".")[0] not in sys.stdlib_module_names}


def tops(path):
    return {name.partition(".")[0] for name in imported(path)}


def part(path):
    """The module, or the folder, of trainer/ that a file belongs to."""
    return path.relative_to(ROOT / "trainer").parts[0].removesuffix(".py")


@pytest.mark.parametrize(("package", "allowed"), [("adapters", ADAPTERS), ("tasks", TASKS)])
def test_adapters_and_tasks_know_nothing_of_ours(package, allowed):
    for path in files(package):
        assert tops(path) <= allowed | {package}, path


def test_the_trainer_knows_neither_scripts_nor_tests():
    for path in files("trainer"):
        assert not tops(path) & {"scripts", "tests", "conf"}, path


def test_schedules_import_nothing_heavy():
    for path in files("trainer/schedules"):
        assert imported(path) <= {"trainer.schedules"}, path


def test_the_config_is_checked_by_what_is_light():
    for name in BEFORE_TORCH:
        light = {"hydra", "omegaconf", "yaml", "trainer", "adapters"}
        names = imported(ROOT / "trainer" / f"{name}.py", whole=False)
        assert {imported_name.partition(".")[0] for imported_name in names} <= light
        assert {n for n in names if n.startswith("trainer.")} <= {f"trainer.{n}" for n in BEFORE_TORCH}
    assert tops(ROOT / "adapters" / "peft_fields.py") == set()


def test_inside_the_trainer_imports_go_one_way():
    assert {part(path) for path in files("trainer")} == {*ORDER, "__init__"}
    for path in files("trainer"):
        here = part(path)
        for name in imported(path, whole=False):
            if name.startswith("trainer.") and (there := name.split(".")[1]) != here:
                assert ORDER.index(there) < ORDER.index(here), f"{path} imports {name}"


@pytest.mark.parametrize("name", ["losses", "finetune", "plan", "tokens", "data"])
def test_what_trains_knows_nothing_of_configs_and_runs(name):
    forbidden = {f"trainer.{other}" for other in ("run", "assembly", "folder", "config", "preflight", "export", "report")}
    assert not imported(ROOT / "trainer" / f"{name}.py") & forbidden


def test_the_verbs_wait_for_no_trainer_of_lightnings():
    """It takes two seconds or more to import."""
    verbs = "assembly, evaluate, export, failures, generate, preflight, report, respond, speculate"
    program = f"import sys; from trainer import {verbs}; print([n for n in ('lightning', 'peft', 'bitsandbytes') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_only_the_program_imports_the_run():
    importers = {
        str(path.relative_to(ROOT)) for package in PACKAGES for path in files(package) if "trainer.run" in imported(path)
    }
    assert importers == {"trainer/__main__.py"}


def test_no_file_is_named_after_nothing():
    for folder in (*PACKAGES, "scripts", "tests", "conf"):
        names = {path.stem for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".yaml", ".sh")}
        assert not names & {"utils", "util", "common", "helpers", "helper", "misc", "core"}, folder


def python(code, *paths):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (*paths, ROOT)))}
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, env=environment, timeout=120
    )


@pytest.mark.parametrize("name", PACKAGES)
def test_no_start_beside_other_projects_of_our_names(tmp_path, name):
    folder = tmp_path / f"{name}-9.8.7.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 9.8.7\n")
    done = python("import trainer", tmp_path)
    assert done.returncode == 1
    assert f"the package {name} 9.8.7 from PyPI is installed" in done.stderr
    assert f"pip uninstall -y {name} " in done.stderr


def test_a_start_beside_nobody():
    done = python("import trainer")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


WATCHED = """
import sys
seen = []
watched = ("subprocess.", "os.system", "os.fork", "os.posix_spawn", "os.exec", "socket.")
sys.addaudithook(lambda event, _: seen.append(event) if event.startswith(watched) else None)
"""
EVERYTHING = """
import importlib, pkgutil
import adapters, tasks, trainer
for package in (adapters, tasks, trainer):
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        importlib.import_module(module.name)
print(seen, "torch" in sys.modules)
"""


def test_importing_starts_no_process_and_opens_no_socket():
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", WATCHED + EVERYTHING], capture_output=True, text=True, env=environment, timeout=120
    )
    assert done.stdout.strip() == "[] True", done.stderr


def test_that_a_process_and_a_socket_are_noticed():
    done = python(
        WATCHED + "import socket, subprocess\nsubprocess.run(['true'])\nsocket.socket().close()\nprint(len(seen) > 1)"
    )
    assert done.stdout.strip() == "True"
