"""Who imports whom, read from the files; and what importing does."""

from __future__ import annotations

import ast
import functools
import graphlib
import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT

PACKAGES = ("adapters", "tasks", "trainer")
# What a package may import besides the standard library and, for adapters and tasks, itself.
ADAPTERS = {"torch", "peft", "transformers", "safetensors", "jaxtyping", "bitsandbytes"}
TASKS = {"datasets", "pyarrow", "filelock", "torchmetrics"}
# The folders of trainer/: each imports only what stands before it. A file directly in trainer/ is a
# command.
ORDER = [
    "config", "schedules", "speed", "cluster", "storage", "models", "data", "penalties",
    "drafters", "decoding", "training", "assembly", "evaluation", "selection", "exporting",
    "shrinking", "callbacks", "session", "serving", "studies",
]  # fmt: skip
BEFORE_TORCH = ("config", "cluster")  # these answer before torch is imported, which takes seconds


def files(package):
    return sorted((ROOT / package).rglob("*.py"))


@functools.cache
def import_nodes(path, whole=True):
    """The imports in a file; without `whole` only those that importing the file runs."""
    tree = ast.parse(path.read_text("utf-8"))
    nodes = ast.walk(tree) if whole else tree.body
    return [node for node in nodes if isinstance(node, ast.Import | ast.ImportFrom)]


def imported(path, whole=True):
    """Dotted names that a file imports."""
    names = set()
    for node in import_nodes(path, whole):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative"
            # `from trainer import config` names a module, `from torch import nn` need not.
            names |= {
                f"{node.module}.{alias.name}" if node.module in PACKAGES else node.module
                for alias in node.names
            }
    return {name for name in names if name.partition(".")[0] not in sys.stdlib_module_names}


def tops(path):
    return {name.partition(".")[0] for name in imported(path)}


def folder_of(path):
    """The folder of trainer/ that a file belongs to, None for a command."""
    parts = path.relative_to(ROOT / "trainer").parts
    return parts[0] if len(parts) > 1 else None


def modules():
    """Dotted name -> file of everything in trainer/."""
    named = {
        path: ".".join(path.relative_to(ROOT).with_suffix("").parts) for path in files("trainer")
    }
    return {name.removesuffix(".__init__"): path for path, name in named.items()}


def modules_imported(path, known, whole=True):
    """The files of trainer/ that a file imports, by dotted name."""
    names = set()
    for node in import_nodes(path, whole):
        if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "trainer":
            full = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= {name if name in known else node.module for name in full}
    return names


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


@pytest.mark.parametrize("folder", BEFORE_TORCH)
def test_the_config_is_checked_before_torch_is_imported(folder):
    for path in files(f"trainer/{folder}"):
        names = imported(path, whole=False)
        light = {"hydra", "omegaconf", "yaml", "trainer", "adapters"}
        assert {name.partition(".")[0] for name in names} <= light, path
        ours = {name.split(".")[1] for name in names if name.startswith("trainer.")}
        assert ours <= {*BEFORE_TORCH, "schedules"}, path
    assert tops(ROOT / "adapters" / "peft_fields.py") == set()


def test_every_folder_has_a_place_in_the_order():
    assert {folder_of(path) for path in files("trainer")} == {*ORDER, None}


@pytest.mark.parametrize("folder", ORDER)
def test_a_folder_imports_only_what_stands_before_it(folder):
    allowed = {f"trainer.{name}" for name in ORDER[: ORDER.index(folder) + 1]}
    known = modules()
    for path in files(f"trainer/{folder}"):
        for name in modules_imported(path, known):
            assert ".".join(name.split(".")[:2]) in allowed, f"{path} imports {name}"


def test_nobody_imports_a_command():
    known = modules()
    commands = {name for name, path in known.items() if folder_of(path) is None} - {"trainer"}
    for path in [path for package in PACKAGES for path in files(package)]:
        if path != ROOT / "trainer" / "__main__.py":  # it runs them
            assert not modules_imported(path, known) & commands, path


def test_files_import_each_other_in_no_circle():
    known = modules()
    graph = {
        name: modules_imported(path, known) - {name, "trainer"} for name, path in known.items()
    }
    # raises CycleError, which names the circle
    list(graphlib.TopologicalSorter(graph).static_order())


@pytest.mark.parametrize("folder", ["data", "models", "training"])
def test_what_trains_knows_nothing_of_configs_and_runs(folder):
    known = modules()
    for path in files(f"trainer/{folder}"):
        parts = {name.split(".")[1] for name in modules_imported(path, known) if "." in name}
        assert not parts & {"assembly", "session", "exporting", "callbacks"}, path


def test_the_verbs_wait_for_no_trainer_of_lightnings():
    """It takes two seconds or more to import."""
    verbs = "evaluate, export, generate, preflight, report, respond, serve, speculate"
    program = (
        f"import sys; from trainer import {verbs}; print([n for n in ('lightning', 'peft',"
        " 'bitsandbytes') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def python(code, *paths):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (*paths, ROOT)))}
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
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
        [sys.executable, "-c", WATCHED + EVERYTHING],
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
    )
    assert done.stdout.strip() == "[] True", done.stderr


def test_that_a_process_and_a_socket_are_noticed():
    done = python(
        WATCHED + "import socket,"
        " subprocess\nsubprocess.run(['true'])\nsocket.socket().close()\nprint(len(seen) > 1)"
    )
    assert done.stdout.strip() == "True"
