"""Checkpoints are whole or not there, whatever ends a save."""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import multiprocessing
import os
import random
import re
import resource
import stat
import subprocess
import tempfile
import time

import pytest
import torch

from tests.toys.disks import full_disk
from trainer.storage import atomic, checkpoints
from trainer.storage.checkpoints import Checkpoint, CheckpointError, complete, newest
from trainer.training.lightning_trainer import AtomicCheckpointIO


def content(step, numbers=4):
    generator = torch.Generator().manual_seed(step)
    return {
        "counters": {"step": step, "tokens": 10 * step},
        "adapter": {
            "tensors": {"a": torch.randn(numbers, generator=generator)},
            "extra": {"rank": 2},
        },
        "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(2, dtype=torch.bfloat16)}}}],
    }


def save(folder, *steps, numbers=4):
    for step in steps:
        AtomicCheckpointIO().save_checkpoint(
            content(step, numbers), Checkpoint.at(folder, step).path
        )


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_what_is_saved_is_loaded(tmp_path):
    save(tmp_path / "new" / "folder", 40)
    checkpoint = Checkpoint.at(tmp_path / "new" / "folder", 40)
    assert names(checkpoint.path.parent) == ["step-00000040.ckpt", "step-00000040.json"]
    for loaded in (
        checkpoints.load(checkpoint),
        AtomicCheckpointIO().load_checkpoint(checkpoint.path, weights_only=False),
    ):
        assert loaded["counters"] == {"step": 40, "tokens": 400}
        assert torch.equal(
            loaded["adapter"]["tensors"]["a"], content(40)["adapter"]["tensors"]["a"]
        )
        assert loaded["optimizer_states"][0]["state"][0]["exp_avg"].dtype == torch.bfloat16


def test_the_manifest_is_that_of_the_file(tmp_path):
    save(tmp_path, 3)
    checkpoint = Checkpoint.at(tmp_path, 3)
    path, manifest = checkpoint.path, json.loads(checkpoint.manifest.read_text())
    assert (manifest["step"], manifest["bytes"], manifest["sha256"]) == (
        3,
        path.stat().st_size,
        checkpoints.sha256(path),
    )
    assert checkpoints.fault(checkpoint) is None
    assert (checkpoint.sha256, Checkpoint.at(tmp_path, 4).sha256) == (manifest["sha256"], None)
    assert Checkpoint.of(path) == checkpoint


def cut(path):
    path.write_bytes(path.read_bytes()[:-7])


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def vanish(path):
    path.unlink()


def tear_manifest(path):
    path.with_suffix(".json").write_text('{"step": 3, "by')


def other_manifest(path):
    path.with_suffix(".json").write_text("[]")


DAMAGES = {
    cut: "bytes instead of",
    flip: "its content has changed since it was written",
    vanish: "step-00000003.ckpt is missing",
    tear_manifest: "its manifest cannot be read",
    other_manifest: "its manifest cannot be read",
}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_one_is_passed_over_for_the_one_before(tmp_path, caplog, damage):
    save(tmp_path, 1, 2, 3)
    damage(Checkpoint.at(tmp_path, 3).path)
    assert newest(tmp_path) == Checkpoint.at(tmp_path, 2)
    assert (
        f"step-00000003.ckpt is damaged ({DAMAGES[damage]}" in caplog.text
        or DAMAGES[damage] in caplog.text
    )
    assert "was skipped" in caplog.text
    with pytest.raises(CheckpointError, match=re.escape(DAMAGES[damage])):
        checkpoints.load(Checkpoint.at(tmp_path, 3))


def test_one_without_a_manifest_was_never_completed(tmp_path):
    save(tmp_path, 1, 2)
    Checkpoint.at(tmp_path, 2).manifest.unlink()
    assert complete(tmp_path) == [Checkpoint.at(tmp_path, 1)]
    assert newest(tmp_path) == Checkpoint.at(tmp_path, 1)
    with pytest.raises(CheckpointError, match=r"step-00000002\.json is missing"):
        checkpoints.load(Checkpoint.at(tmp_path, 2))


def test_where_all_are_damaged_none_is_guessed(tmp_path):
    save(tmp_path, 1, 2)
    cut(Checkpoint.at(tmp_path, 1).path)
    flip(Checkpoint.at(tmp_path, 2).path)
    with pytest.raises(CheckpointError, match="every checkpoint of this run is damaged") as refusal:
        newest(tmp_path)
    assert "step-00000001.ckpt: it has" in str(refusal.value)
    assert "step-00000002.ckpt: its content has changed" in str(refusal.value)


def test_where_there_is_none_there_is_none(tmp_path):
    assert newest(tmp_path) is None
    assert newest(tmp_path / "nowhere") is None


def test_names_that_are_not_ours_are_left_alone(tmp_path):
    save(tmp_path, 5)
    for name in ("step-12.json", "step-0000000x.json", "notes.json", "model.ckpt"):
        (tmp_path / name).touch()
    assert complete(tmp_path) == [Checkpoint.at(tmp_path, 5)]
    checkpoints.remove_leftovers(tmp_path)
    assert {"notes.json", "model.ckpt"} <= set(names(tmp_path))


def test_leftovers_are_removed_and_nothing_else(tmp_path):
    save(tmp_path, 1, 2)
    atomic.write_text(tmp_path / "best.json", '{"step": 1}')
    before = names(tmp_path)
    for name in (
        "step-00000003.ckpt.tmp",
        "step-00000003.json.tmp",
        "step-00000003.ckpt",
        "best.json.tmp",
    ):
        (tmp_path / name).write_text("half")
    checkpoints.remove_leftovers(tmp_path)
    assert names(tmp_path) == before


def test_removing_takes_both_files(tmp_path):
    save(tmp_path, 1, 2)
    AtomicCheckpointIO().remove_checkpoint(Checkpoint.at(tmp_path, 1).path)
    checkpoints.remove(Checkpoint.at(tmp_path, 7))
    assert complete(tmp_path) == [Checkpoint.at(tmp_path, 2)]
    assert len(names(tmp_path)) == 2


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_refused(tmp_path, value):
    save(tmp_path, 1)
    broken = content(2)
    broken["adapter"]["tensors"]["b.weight"] = torch.tensor([0.0, value], dtype=torch.bfloat16)
    broken["adapter"]["tensors"]["index"] = torch.tensor([1, 2])
    with pytest.raises(
        CheckpointError,
        match=r"b\.weight holds NaN or infinite values, so step-00000002\.ckpt was not written",
    ):
        AtomicCheckpointIO().save_checkpoint(broken, Checkpoint.at(tmp_path, 2).path)
    assert newest(tmp_path) == Checkpoint.at(tmp_path, 1)
    assert len(names(tmp_path)) == 2


def test_which_checkpoint_is_meant(tmp_path):
    save(tmp_path, 10, 20, 30)
    assert checkpoints.chosen(tmp_path, "last") == Checkpoint.at(tmp_path, 30)
    assert checkpoints.chosen(tmp_path, "best") == Checkpoint.at(
        tmp_path, 30
    )  # nothing was evaluated
    atomic.write_text(tmp_path / "best.json", json.dumps({"step": 10}))
    assert checkpoints.chosen(tmp_path, "best") == Checkpoint.at(tmp_path, 10)
    assert checkpoints.chosen(tmp_path, "20") == Checkpoint.at(tmp_path, 20)
    flip(Checkpoint.at(tmp_path, 30).path)
    assert checkpoints.chosen(tmp_path, "last") == Checkpoint.at(tmp_path, 20)


@pytest.mark.parametrize(
    ("which", "message"),
    [
        ("40", "has no checkpoint '40'; it has the steps 10, 20"),
        ("newest", "'newest' names no checkpoint: give last, best, or one of the steps 10, 20"),
        ("-10", "'-10' names no checkpoint"),
        ("", "'' names no checkpoint"),
        ("best", "has no checkpoint 'best'; it has the steps 10, 20"),
    ],
)
def test_what_is_meant_by_nothing(tmp_path, which, message):
    save(tmp_path, 10, 20)
    atomic.write_text(tmp_path / "best.json", json.dumps({"step": 30}))
    with pytest.raises(CheckpointError, match=re.escape(message)):
        checkpoints.chosen(tmp_path, which)


def test_an_empty_folder_has_no_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match="it has the steps none"):
        checkpoints.chosen(tmp_path, "last")


def test_temporary_folders_elsewhere_do_not_matter(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", "/proc")  # where nothing can be written
    monkeypatch.setattr(tempfile, "tempdir", "/proc")
    save(tmp_path, 1)
    assert checkpoints.fault(Checkpoint.at(tmp_path, 1)) is None


@pytest.fixture
def small_disk(tmp_path):
    """A file system of three megabytes."""
    if os.geteuid() != 0:
        pytest.skip("mounting a file system takes root")
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", folder], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"a file system cannot be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk_costs_nothing_that_was_there(small_disk):
    save(small_disk, 1, numbers=400_000)  # 1.6 MB
    with pytest.raises(CheckpointError, match="could not be written: the disk is full") as refusal:
        save(small_disk, 2, numbers=400_000)
    assert "resume with resume=auto; step-00000001.ckpt before it is untouched" in str(
        refusal.value
    )
    assert newest(small_disk) == Checkpoint.at(small_disk, 1)
    assert names(small_disk) == ["step-00000001.ckpt", "step-00000001.json"]
    checkpoints.remove(Checkpoint.at(small_disk, 1))
    with pytest.raises(CheckpointError, match="there was none before it"):
        save(small_disk, 3, numbers=800_000)
    save(small_disk, 4, numbers=400_000)
    assert newest(small_disk) == Checkpoint.at(small_disk, 4)


def test_a_save_that_a_limit_cuts_in_its_middle_costs_nothing_that_was_there(tmp_path):
    """A limit on the size of files ends a write as a full disk does, without root."""
    save(tmp_path, 1, numbers=100_000)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))  # half of a checkpoint
    try:
        with pytest.raises(
            CheckpointError, match=r"size of files is reached \(ulimit -f\)"
        ) as refusal:
            save(tmp_path, 2, numbers=100_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "step-00000001.ckpt before it is untouched" in str(refusal.value)
    assert names(tmp_path) == ["step-00000001.ckpt", "step-00000001.json"]
    assert newest(tmp_path) == Checkpoint.at(tmp_path, 1)


@pytest.mark.parametrize(
    ("number", "says"),
    [(errno.EDQUOT, "your quota on this disk is used up"), (errno.EROFS, "Read-only file system")],
)
def test_the_systems_own_error_is_reported(tmp_path, monkeypatch, number, says):
    def refused(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", refused)
    with pytest.raises(CheckpointError, match=says):
        save(tmp_path, 1)


def test_a_disk_too_full_for_the_manifest(small_disk):
    save(small_disk, 1)
    filler = small_disk / "filler"
    with contextlib.suppress(OSError), filler.open("wb") as file:
        while True:
            file.write(b"x" * 4096)
            file.flush()
    with pytest.raises(CheckpointError, match="the disk is full"):
        save(small_disk, 2)
    assert newest(small_disk) == Checkpoint.at(small_disk, 1)
    filler.unlink()
    checkpoints.remove_leftovers(small_disk)
    save(small_disk, 2)
    assert newest(small_disk) == Checkpoint.at(small_disk, 2)


def test_a_folder_that_went_away_says_so(tmp_path, monkeypatch):
    save(tmp_path, 1)

    def fail(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(
        CheckpointError, match=r"Permission denied\. Fix that, and resume with resume=auto"
    ):
        save(tmp_path, 2)
    assert len(names(tmp_path)) == 2


def save_until_killed(folder, first, reported):
    """Save step after step, tell each that is done, and keep the newest two."""
    for step in itertools.count(first):
        save(folder, step, numbers=100_000)
        reported.send(step)
        for checkpoint in complete(folder)[:-2]:
            checkpoints.remove(checkpoint)


@pytest.mark.long
def test_a_kill_in_a_save_leaves_a_good_checkpoint(tmp_path):
    """The moment of each kill is chance; what must hold holds at every moment."""
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload([__name__])
    draw, last, left_behind = random.Random(0), 0, 0
    for _ in range(15):
        heard, reported = processes.Pipe(duplex=False)
        child = processes.Process(target=save_until_killed, args=(tmp_path, last + 1, reported))
        child.start()
        reported.close()
        done = heard.recv()
        time.sleep(draw.uniform(0, 0.03))
        child.kill()
        child.join()
        with contextlib.suppress(EOFError):
            while True:
                done = heard.recv()
        actual = newest(tmp_path)
        last = actual.step
        # the newest may be complete before its saver has reported it
        assert last in (done, done + 1)
        assert torch.equal(
            checkpoints.load(actual)["adapter"]["tensors"]["a"],
            content(last, 100_000)["adapter"]["tensors"]["a"],
        )
        before = names(tmp_path)
        checkpoints.remove_leftovers(tmp_path)
        whole = [
            name
            for checkpoint in complete(tmp_path)
            for name in (checkpoint.path.name, checkpoint.manifest.name)
        ]
        assert names(tmp_path) == sorted(whole)
        left_behind += len(before) - len(whole)
    assert left_behind > 0  # some kills did hit a save


def test_a_checkpoint_holds_what_is_trained_and_no_more(train, chats, tiny):
    run = train(
        f"task.path={chats}",
        "max_steps=2",
        "callbacks.evaluation=null",
        "adapter.target_modules=[q_proj]",
    )
    saved = checkpoints.chosen(run / "checkpoints", "last")
    loaded = checkpoints.load(saved)
    tensors = loaded["adapter"]["tensors"]
    trained = sum(tensor.numel() for tensor in tensors.values())
    assert trained == 2 * 16 * (16 + 16)  # two layers, rank 16, q_proj of 16 by 16
    assert (
        saved.path.stat().st_size <= 1.05 * trained * (4 + 8) + 30_000
    )  # fp32, and AdamW's two moments
    assert not tensors.keys() & tiny.load(torch.float32).state_dict().keys()
    assert loaded["state_dict"] == {}
    assert b"embed_tokens" not in saved.path.read_bytes()


def test_a_larger_adapter_takes_as_much_more(train, chats):
    sizes = {}
    for rank in (16, 1024):
        run = train(
            f"task.path={chats}",
            "max_steps=1",
            "callbacks.evaluation=null",
            f"adapter.rank={rank}",
            f"name=rank{rank}",
        )
        saved = checkpoints.chosen(run / "checkpoints", "last")
        trained = sum(
            tensor.numel() for tensor in checkpoints.load(saved)["adapter"]["tensors"].values()
        )
        sizes[rank] = (trained, saved.path.stat().st_size)
    numbers, size = (sizes[1024][i] - sizes[16][i] for i in (0, 1))
    assert numbers > 400_000
    assert size == pytest.approx(12 * numbers, rel=0.02)


@pytest.mark.parametrize(
    ("word", "kind", "message"),
    [
        (
            "DataLoader worker (pid 3) is killed by signal: Killed. ",
            RuntimeError,
            "^DataLoader worker",
        ),
        ("something else", CheckpointError, "could not be written: something else"),
    ],
)
def test_a_loading_process_that_is_lost_meanwhile_is_no_fault_of_the_disk(
    tmp_path, monkeypatch, word, kind, message
):
    save(tmp_path, 3)
    monkeypatch.setattr(torch, "save", lambda *_, **__: (_ for _ in ()).throw(RuntimeError(word)))
    with pytest.raises(kind, match=message):
        save(tmp_path, 6)
    assert names(tmp_path) == ["step-00000003.ckpt", "step-00000003.json"]


def test_a_file_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "notes.txt"
    atomic.write_text(path, "old")
    with pytest.raises(TypeError), atomic.file(path) as temporary:
        temporary.write_text(b"half")
    with monkeypatch.context() as patch:
        patch.setattr(atomic.os, "fsync", full_disk)
        with pytest.raises(OSError, match="No space left"):
            atomic.write_text(path, "half")
    assert path.read_text() == "old"
    with atomic.file(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert names(tmp_path) == ["notes.txt"]


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "below" / "model"
    with pytest.raises(FileExistsError), atomic.folder(path) as temporary:
        [(temporary / "half").touch(exist_ok=False) for _ in range(2)]
    assert names(path.parent) == []
    with atomic.folder(path) as temporary:
        (temporary / "whole").touch()
        assert not path.exists()
    assert (names(path.parent), names(path)) == (["model"], ["whole"])
    assert stat.S_IMODE(path.stat().st_mode) == 0o755
    with pytest.raises(OSError, match="not empty"), atomic.folder(path) as temporary:
        (temporary / "other").touch()
    assert (names(path.parent), names(path)) == (["model"], ["whole"])


def test_a_checkpoint_is_on_the_disk_before_its_manifest_says_so(tmp_path, monkeypatch):
    """After a power cut a file that was renamed and not synced may be empty."""
    events: list[tuple[str, str]] = []
    sync, replace = os.fsync, os.replace

    def synced(descriptor):
        name = os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}"))
        events.append(("sync", re.sub(r"\.[0-9a-f]{8}\.tmp$", ".tmp", name)))
        sync(descriptor)

    def replaced(source, target):
        events.append(("rename", os.path.basename(target)))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", replaced)
    save(tmp_path, 3)
    assert events == [
        event
        for name in ("step-00000003.ckpt", "step-00000003.json")
        for event in (("sync", f".{name}.tmp"), ("rename", name), ("sync", tmp_path.name))
    ]
