"""Every file that we write is opened where no link is followed: all code that opens one to write is
listed here, with the reason why it cannot meet a link."""

from __future__ import annotations

import ast

import pytest

from tests.conftest import ROOT

# what opens a file to write, by the name that is called
WRITES = {
    "write_text", "write_bytes", "touch", "savefig", "save_file", "save_pretrained", "copyfile",
    "copy", "copy2", "copytree", "move", "NamedTemporaryFile", "mkstemp", "FileHandler",
    "SummaryWriter", "tofile", "memmap", "to_parquet", "to_csv", "save_to_disk",
    "ParquetWriter", "serialize_file", "from_generator", "new_stream",
    "FileLock",
}  # fmt: skip
MODULES = {"copy": ("shutil",), "copy2": ("shutil",), "move": ("shutil",)}
SAVES = {"torch", "np", "numpy", "joblib", "pickle"}  # whose save or dump writes a path
NEW_FOLDER = "into the new folder of atomic.folder"
RANDOM = "to the new, random name of atomic.file"
LOCK = "FileLock opens with O_NOFOLLOW and without O_TRUNC"
# (file, function, call) -> why no link can be there
REASONS = {
    ("trainer/config/files.py", "create", "os.open"): "O_EXCL",
    ("trainer/config/files.py", "_opened", "os.open"): "O_NOFOLLOW",
    ("trainer/storage/atomic.py", "file", "os.open"): "O_NOFOLLOW, to sync",
    ("trainer/storage/atomic.py", "_is_free", "os.open"): "O_NOFOLLOW, to lock",
    ("trainer/storage/atomic.py", "write_text", "write_text"): RANDOM,
    ("trainer/storage/atomic.py", "write_output", "open"): "a device that the user names",
    ("trainer/storage/checkpoints.py", "save", "open"): RANDOM,
    ("trainer/storage/checkpoints.py", "save", "torch.save"): "to an open file",
    ("trainer/storage/journal.py", "write_csv", "open"): RANDOM,
    ("trainer/storage/answers.py", "__enter__", "FileLock"): LOCK,
    ("trainer/drafters/io.py", "save", "save_file"): RANDOM,
    ("trainer/drafters/io.py", "copy", "copyfile"): RANDOM,
    ("trainer/data/states_folder.py", "save_shard", "save_file"): RANDOM,
    ("trainer/storage/locks.py", "locked", "FileLock"): LOCK,
    ("trainer/speed/attention_choice.py", "write", "NamedTemporaryFile"): "O_EXCL, random name",
    ("trainer/data/rows.py", "_write", "new_stream"): "a folder that was made before it",
    ("trainer/models/gguf.py", "save_pretrained", "save_pretrained"): NEW_FOLDER,
    ("trainer/models/gguf.py", "_save_model", "save_pretrained"): NEW_FOLDER,
    ("trainer/models/gguf.py", "_save_model", "save_file"): NEW_FOLDER,
    ("trainer/models/gguf.py", "convert", "save_pretrained"): "the function of this file",
    ("trainer/models/tiny.py", "tiny", "save_pretrained"): "of gguf.py",
    ("tasks/wheel.py", "fetch", "FileLock"): LOCK,
    ("trainer/exporting/merged.py", "write_merged", "save_pretrained"): NEW_FOLDER,
    ("trainer/exporting/serving.py", "write", "save_pretrained"): NEW_FOLDER,
    ("trainer/exporting/serving.py", "_write_tokenizer", "save_pretrained"): NEW_FOLDER,
    ("trainer/exporting/compact.py", "compress", "save_file"): NEW_FOLDER,
    ("trainer/shrinking/making.py", "write", "save_pretrained"): NEW_FOLDER,
    ("trainer/shrinking/making.py", "write", "write_text"): NEW_FOLDER,
    ("trainer/shrinking/resuming.py", "__enter__", "FileLock"): LOCK,
    ("trainer/shrinking/resuming.py", "save", "save_file"): RANDOM,
    ("trainer/exporting/compact.py", "expand", "save_file"): NEW_FOLDER,
    ("trainer/exporting/compact.py", "expand", "copyfile"): NEW_FOLDER,
    ("trainer/exporting/combined.py", "merge", "write_text"): NEW_FOLDER,
    ("trainer/exporting/engines.py", "write", "save_file"): NEW_FOLDER,
    ("trainer/exporting/engines.py", "write", "write_text"): NEW_FOLDER,
    ("trainer/exporting/mtp_layers.py", "append", "save_file"): NEW_FOLDER,
    ("trainer/exporting/mtp_layers.py", "append", "write_text"): NEW_FOLDER,
    ("trainer/exporting/upload.py", "_readme", "write_bytes"): "into a new, temporary folder",
    ("trainer/evaluation/speedup_report.py", "plot", "savefig"): RANDOM,
    ("trainer/evaluation/mlp_density.py", "plot", "savefig"): RANDOM,
    ("trainer/session/branches.py", "_plot", "savefig"): RANDOM,
    ("trainer/evaluation/pictures.py", "picture", "savefig"): "into memory",
    ("trainer/selection/selected.py", "_write", "open"): RANDOM,
    ("trainer/selection/store.py", "blocks", "memmap"): "to read",
    ("trainer/session/start_point.py", "branch_off", "copyfile"): "the name is unlinked before",
    ("trainer/callbacks/tracking.py", "__init__", "SummaryWriter"): (
        "names hold the time, the host and the process"
    ),
    ("trainer/config/options.py", "exit_with", "os.open"): "/dev/null",
    ("adapters/io.py", "save_tensors", "touch"): "O_EXCL",
    ("adapters/io.py", "save_tensors", "save_file"): "safetensors renames a file of its own",
    ("adapters/io.py", "write", "write_text"): "the name is unlinked before",
    ("adapters/compress.py", "write", "save_file"): NEW_FOLDER,
}  # fmt: skip


def name_of(node):
    if isinstance(node, ast.Attribute):
        return f"{name_of(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def opens_to_write(call):
    """The name of a call that opens a file to write, else None."""
    name = name_of(call.func)
    owner, _, last = name.rpartition(".")
    if last == "open" and name != "os.open":
        arguments = call.args[0 if owner and owner not in ("gzip", "io", "builtins") else 1 :]
        modes = [a.value for a in arguments if isinstance(a, ast.Constant)]
        modes += [w.value.value for w in call.keywords if w.arg == "mode"]
        return "open" if any(set(str(mode)) & set("wax+") for mode in modes) else None
    if name == "os.open":
        flags = ast.unparse(call.args[1])
        return name if any(f in flags for f in ("WRONLY", "RDWR", "CREAT", "flags")) else None
    if last in ("save", "dump", "savez") and owner in SAVES | {"json", "yaml"}:
        return name if owner in SAVES or len(call.args) > 1 else None
    if last not in WRITES or (last in MODULES and owner not in MODULES[last]):
        return None
    ours = owner == "atomic" or (last == "write_text" and isinstance(call.func, ast.Name))
    return None if ours else last


def functions(tree):
    """(the innermost function around it, each call of a file)."""

    def walk(node, function):
        for child in ast.iter_child_nodes(node):
            inside = child.name if isinstance(child, ast.FunctionDef) else function
            if isinstance(child, ast.Call):
                yield inside, child
            yield from walk(child, inside)

    yield from walk(tree, "")


def writers():
    for package in ("trainer", "adapters", "tasks"):
        for path in sorted((ROOT / package).rglob("*.py")):
            for function, call in functions(ast.parse(path.read_text("utf-8"))):
                if (name := opens_to_write(call)) is not None:
                    yield str(path.relative_to(ROOT)), function, name


@pytest.mark.long
def test_every_writer_is_listed_with_a_reason():
    assert set(writers()) == set(REASONS)


def test_the_list_sees_what_opens_a_file():
    """Each way that a file has been written here, or may be one day."""
    for text in (
        "open(path, 'w')", "path.open('ab')", "path.open(mode='r+')", "path.write_text('x')",
        "torch.save(x, path)", "np.save(path, x)", "json.dump(x, file)", "shutil.copy(a, b)",
        "os.open(path, os.O_WRONLY)", "figure.savefig(path)", "gzip.open(path, 'wt')",
    ):  # fmt: skip
        assert opens_to_write(ast.parse(text).body[0].value), text
    for text in ("open(path)", "path.open('rb')", "copy.copy(x)", "atomic.write_text(path, 'x')"):
        assert opens_to_write(ast.parse(text).body[0].value) is None, text
