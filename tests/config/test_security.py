"""A command line or an experiment file from a stranger runs nothing, and secrets reach no file.

What else a stranger may send: tests/storage/test_strangers_folder.py and
tests/models/test_strangers_base.py.
"""

from __future__ import annotations

import ast
import pickle
import re
import sys

import pytest
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from tests.conftest import ROOT, composed
from tests.toys.hostile import Payload
from tests.toys.secrets import SECRETS
from trainer import __main__
from trainer.config import limits
from trainer.config.compose import check
from trainer.config.errors import ConfigError

COMMON = ("experiment=smoke", "task.path=rows.jsonl", "max_steps=1")


@pytest.fixture
def refused(canary, monkeypatch, capsys):
    """Runs the program in this process; returns the message with which it refused."""

    def ran(*arguments):
        monkeypatch.setattr(sys, "argv", ["trainer", *arguments])
        monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
        monkeypatch.setattr(
            "trainer.run.run", lambda cfg, signals: pytest.fail(f"not refused: {arguments}")
        )
        with pytest.raises(SystemExit) as end:
            __main__.main()
        said = capsys.readouterr().err
        assert end.value.code == 2, said
        assert "Traceback" not in said
        assert not canary.exists()
        assert not list(canary.parent.rglob("run.yaml"))
        return said

    return ran


@pytest.fixture(scope="module")
def good():
    """A config that is refused nothing."""
    config = OmegaConf.to_container(composed(*COMMON))
    check(OmegaConf.create(config))
    return config


ONLY = "Only classes that conf/ names are instantiated"
THERE = "and only that is allowed"
NOWHERE = "no object may be created there"
RESOLVER = "uses the resolver"
VARIABLE = "reads the environment variable"


# Command lines: (overrides, what is said). CANARY stands for the canary's path.
HOSTILE = {
    # other targets, at every kind of place
    "os.system": (["adapter._target_=os.system", "++adapter.command='touch CANARY'"], ONLY),
    "a subprocess": (["task._target_=subprocess.run", "++task.args=[touch,CANARY]"], ONLY),
    "torch.load": (
        ["adapter._target_=torch.load", "++adapter.f=x.pt", "++adapter.weights_only=false"],
        ONLY,
    ),
    "numpy.load": (["adapter._target_=numpy.load", "++adapter.allow_pickle=true"], ONLY),
    "pandas": (["adapter._target_=pandas.read_pickle", "++adapter.filepath_or_buffer=x"], ONLY),
    "torch's own shell": (
        ["adapter._target_=torch.utils.collect_env.run", "++adapter.command='touch CANARY'"],
        ONLY,
    ),
    "asyncio's shell": (
        ["adapter._target_=asyncio.create_subprocess_shell", "++adapter.cmd='touch CANARY'"],
        ONLY,
    ),
    "torch.hub": (["base._target_=torch.hub.load", "++base.source=local"], ONLY),
    "open": (
        ["callbacks.evaluation._target_=builtins.open", "++callbacks.evaluation.file=CANARY"],
        ONLY,
    ),
    "write_text": (["+callbacks.own={_target_: pathlib.Path.write_text}"], ONLY),
    "copyfile": (
        ["logger=wandb", "+logger.own={_target_: shutil.copyfile, src: rows.jsonl, dst: CANARY}"],
        ONLY,
    ),
    "a process": (["objective._target_=multiprocessing.Process"], ONLY),
    "makedirs": (["optimizer._target_=os.makedirs", "++optimizer.name=CANARY"], ONLY),
    "getenv": (["schedule._target_=os.getenv", "++schedule.key=WANDB_API_KEY"], ONLY),
    "an alias of torch.load": (["schedule._target_=torch.nn.modules.module.torch.load"], ONLY),
    "an alias of what is allowed": (["optimizer._target_=torch.optim.adamw.AdamW"], ONLY),
    "a module of ours": (["adapter._target_=trainer.storage.checkpoints.load"], ONLY),
    "a new node": (["+new.node={_target_: os.makedirs, name: CANARY}"], ONLY),
    "deep in a new node": (["+new={a: [{b: {_target_: os.makedirs, name: CANARY}}]}"], ONLY),
    "within a list": (["task.path=[{_target_: os.makedirs, name: CANARY}]"], ONLY),
    "within a mapping": (["++task.columns={a: {_target_: os.makedirs, name: CANARY}}"], ONLY),
    "within a method's fields": (
        ["adapter=dora", "++adapter.eva_config={_target_: os.makedirs, name: CANARY}"],
        ONLY,
    ),
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
    "a base for an adapter": (["adapter._target_=trainer.models.tiny.tiny"], THERE),
    "a base within a mapping": (
        ["++task.columns={a: {_target_: trainer.models.tiny.tiny}}"],
        NOWHERE,
    ),
    "a base within a list": (
        ["task=classification", "task.labels=[{_target_: trainer.models.tiny.tiny}]"],
        NOWHERE,
    ),
    "a base in a method's fields": (
        ["adapter=dora", "++adapter.eva_config={_target_: trainer.models.tiny.tiny}"],
        NOWHERE,
    ),
    "a base for a number": (["++seed={_target_: trainer.models.tiny.tiny}"], NOWHERE),
    "a base for Hydra": (["+hydra.callbacks.a={_target_: trainer.models.tiny.tiny}"], ONLY),
    # how things are made
    "positional arguments": (
        ["++optimizer._args_=[CANARY]"],
        "positional arguments are not taken from a config",
    ),
    "not partial": (["objective._partial_=false"], THERE),
    "partial": (["++adapter._partial_=true"], THERE),
    "not recursive": (["++adapter._recursive_=false"], THERE),
    "other containers": (["++adapter._convert_=object"], THERE),
    "no target": (["~adapter._target_"], THERE),
    # Hydra's own node
    "a Hydra callback": (["+hydra.callbacks.a={_target_: os.makedirs, name: CANARY}"], ONLY),
    "a launcher": (["hydra.launcher._target_=os.makedirs", "+hydra.launcher.name=CANARY"], ONLY),
    "a sweeper": (["hydra.sweeper._target_=os.makedirs", "--multirun"], ONLY),
    "a function of a sweeper": (
        ["+hydra.sweeper.custom_search_space=os.makedirs", "--multirun"],
        "names code or a database of Optuna",
    ),
    "a handler": (
        ["hydra.job_logging.handlers.file.class=logging.handlers.SocketHandler"],
        "Log handlers are one of",
    ),
    "a formatter's class": (
        ["+hydra.job_logging.formatters.dated.class=os.makedirs"],
        "Log handlers are one of",
    ),
    "an object for a handler": (
        ["+hydra.job_logging.handlers.console.stream=ext://os.environ"],
        "Only ext://sys.stdout",
    ),
    "a part of the log's config": (
        ["+hydra.job_logging.handlers.console.stream=cfg://handlers.file"],
        "Only ext://sys.stdout",
    ),
    "the log in another place": (
        ["hydra.job_logging.handlers.file.filename=CANARY"],
        "but the log is always",
    ),
    "the log under another name": (["hydra.job.name=../canary"], "hydra.job.name is '../canary'"),
    "an alias of pickle": (["adapter._target_=torch.serialization.pickle.load"], ONLY),
    "an alias of os": (
        ["adapter._target_=shutil.os.system", "++adapter.command='touch CANARY'"],
        ONLY,
    ),
    "the environment": (["adapter._target_=os.environ.update"], ONLY),
    "a repository's attention": (
        ["base.attn_implementation=evil/kernel"],
        "Attention is one of transformers' own",
    ),
    "a repository's attention at a version": (
        ["base.attn_implementation=paged|evil/kernel@main:f"],
        "Attention is one of",
    ),
    "a secret for Hydra": (
        ["hydra.run.dir=runs/hf_c4n4ryc4n4ryc4n4ryc4n4ry"],
        "hydra.run.dir looks like a secret",
    ),
    "Hydra's log in a file": (
        ["+hydra.hydra_logging.handlers.a={class: logging.FileHandler, filename: CANARY}"],
        "but the log is always",
    ),
    "Hydra's files elsewhere": (
        ["hydra.output_subdir=../canary"],
        "hydra.output_subdir is '../canary'",
    ),
    "what other programs run": (
        ["+hydra.job.env_set.LD_PRELOAD=CANARY"],
        "the environment is not set from a config",
    ),
    "copied secrets": (
        ["hydra.job.env_copy=[WANDB_API_KEY]"],
        "the environment is not set from a config",
    ),
    "forged overrides": (
        ["hydra.overrides.task=['a=1']"],
        "hydra.overrides is Hydra's record of the command line",
    ),
    "an imported search path": (
        ["hydra.searchpath=[pkg://stranger]"],
        "only folders can be searched",
    ),
    "an interpolated search path": (
        ["hydra.searchpath=['${oc.env:HOME}']"],
        "only folders can be searched",
    ),
    # resolvers
    "a secret": (["logger=wandb", "logger.wandb.notes=${oc.env:WANDB_API_KEY}"], VARIABLE),
    "a secret as a default": (
        ["logger=wandb", "logger.wandb.notes='${oc.env:HOME,${oc.env:WANDB_API_KEY}}'"],
        VARIABLE,
    ),
    "a secret by another name": (
        ["logger=wandb", "logger.wandb.notes='${oc.env:${oc.select:name}}'", "name=HF_TOKEN"],
        VARIABLE,
    ),
    "a resolver by another name": (
        ["name=env", "logger=wandb", "logger.wandb.notes='${oc.${name}:WANDB_API_KEY}'"],
        RESOLVER,
    ),
    "a quoted secret": (
        ["logger=wandb", "logger.wandb.notes='${oc.env:\"WANDB_API_KEY\"}'"],
        VARIABLE,
    ),
    "a spaced secret": (
        ["logger=wandb", "logger.wandb.notes='${ oc.env : WANDB_API_KEY }'"],
        VARIABLE,
    ),
    "a secret within text": (
        ["logger=wandb", "logger.wandb.notes='a ${name} ${oc.env:HF_TOKEN} b'"],
        VARIABLE,
    ),
    "a secret in a folder's name": (["hydra.run.dir='${oc.env:WANDB_API_KEY}'"], VARIABLE),
    "a secret in a deleted key's value": (["~runs='${oc.env:WANDB_API_KEY}'"], None),
    "oc.create": (
        ["++task.columns='${oc.create:{_target_: os.makedirs, name: CANARY}}'"],
        RESOLVER,
    ),
    "oc.decode": (["++task.columns='${oc.decode:\"{_target_: os.makedirs}\"}'"], RESOLVER),
    "oc.dict": (["++task.columns='${oc.dict.values:base}'"], RESOLVER),
    "a resolver there is not": (["runs='${nothing:1}'"], RESOLVER),
    "half an interpolation": (
        ["++task.columns={a: '${oc.env'}"],
        "no viable alternative at input '${oc.env'",
    ),
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
}


# Of the cases about targets these go through the whole program. The rest are set in a config that
# is refused nothing, and checked: parsing and composing add nothing to what a target is.
WHOLE = (
    "os.system",
    "a list for a target",
    "an interpolated target",
    "a new node",
    "within a list",
    "a base for Hydra",
    "a quoted space",
    "partial",
)


def targets_alone(case):
    """Whether a case sets targets and nothing that only the command line knows: flags, choices of a
    group, quotes, deletions."""
    overrides, said = HOSTILE[case]
    plain = all(re.match(r"[+\w][\w.+]*\.[\w.]+=|\+", word) for word in overrides)
    return said in (ONLY, THERE, NOWHERE) and plain and case not in WHOLE


@pytest.mark.long
@pytest.mark.parametrize("case", [case for case in HOSTILE if targets_alone(case)])
def test_a_hostile_target_is_refused(good, canary, case):
    overrides, said = HOSTILE[case]
    words = [word.replace("CANARY", str(canary)) for word in overrides]
    cfg = OmegaConf.create(good)
    for override in OverridesParser.create().parse_overrides(words):
        OmegaConf.update(cfg, override.key_or_group, override.value(), merge=False, force_add=True)
    with pytest.raises(ConfigError, match=said):
        check(cfg)


def test_most_targets_are_checked_alone_and_each_kind_by_the_program_too():
    alone = [case for case in HOSTILE if targets_alone(case)]
    assert len(alone) > 30
    assert set(WHOLE) < set(HOSTILE)
    assert not {"a sweeper", "a quoted space", "no target"} & {*alone}


@pytest.mark.long
@pytest.mark.parametrize("case", [case for case in HOSTILE if not targets_alone(case)])
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


# Experiment files: (entries of the defaults list, the rest, what is said). CANARY stands for the
# canary's path.
FILES = {
    "a target": ([], "adapter: {_target_: os.makedirs, name: CANARY}", ONLY),
    "a new node": ([], "own: {deep: [{_target_: os.makedirs, name: CANARY}]}", ONLY),
    "positional arguments": ([], "optimizer: {_args_: [CANARY]}", "positional arguments"),
    "an anchor": ([], "own: &a {_target_: os.makedirs, name: CANARY}\ntask: {columns: *a}", ONLY),
    "a merged anchor": (
        [],
        "own: &a {_target_: os.makedirs}\ntask: {columns: {<<: *a, name: CANARY}}",
        ONLY,
    ),
    "a target of bytes": ([], "adapter: {_target_: !!binary b3MubWFrZWRpcnM=}", ONLY),
    "half an interpolation": (
        [],
        "task: {system: '${oc.env'}",
        "no viable alternative at input '${oc.env'",
    ),
    "a tag that calls": (
        [],
        "own: !!python/object/apply:os.makedirs [CANARY]",
        "could not determine a constructor",
    ),
    "a tag that names": (
        [],
        "own: !!python/name:os.makedirs ''",
        "could not determine a constructor",
    ),
    "a tag that makes": (
        [],
        "own: !!python/object/new:os.makedirs [CANARY]",
        "could not determine a constructor",
    ),
    "a Hydra callback": (
        [],
        "hydra: {callbacks: {a: {_target_: os.makedirs, name: CANARY}}}",
        ONLY,
    ),
    "a called handler": (
        [],
        "hydra: {job_logging: {handlers: {a: {(): os.makedirs, name: CANARY}}}}",
        "Log handlers are one of",
    ),
    "a called filter": (
        [],
        "hydra: {job_logging: {filters: {a: {(): os.makedirs, name: CANARY}}}}",
        "Log handlers are one of",
    ),
    "a handler's attribute": (
        [],
        "hydra: {job_logging: {handlers: {file: {delay: true, '.': {baseFilename: CANARY}}}}}",
        "Log handlers are one of",
    ),
    "a log that is a shell's file": (
        [],
        (
            "hydra: {job_logging: {formatters: {dated: {format: 'ls # %(message)s'}}, handlers:"
            " {file: {filename: CANARY}}}}"
        ),
        "but the log is always",
    ),
    "what git runs": (
        [],
        (
            "hydra: {job: {env_set: {GIT_CONFIG_COUNT: '1', GIT_CONFIG_KEY_0: core.fsmonitor,"
            " GIT_CONFIG_VALUE_0: touch CANARY}}}"
        ),
        "the environment is not set from a config",
    ),
    "where a key is sent": (
        [],
        "hydra: {job: {env_set: {WANDB_BASE_URL: 'http://evil'}}}",
        "the environment is not set from a config",
    ),
    "a search path": (
        [],
        "hydra: {searchpath: ['pkg://stranger']}",
        "hydra.searchpath is only supported from the primary config",
    ),
    "forged overrides": (
        [],
        "hydra: {overrides: {task: ['base.trust_remote_code=true']}}",
        "hydra.overrides is Hydra's record of the command line",
    ),
    "a forged choice": (
        [],
        "hydra: {runtime: {choices: {adapter: full}}}\nadapter: {_target_: os.makedirs}",
        ONLY,
    ),
    "a model's own code": (
        ["override /base: hf"],
        "base: {path: a/b, trust_remote_code: true}",
        "is taken from the command line only",
    ),
    "a file outside conf": (
        ["override /adapter: ../harmless"],
        "",
        "adapter=../harmless: conf/adapter has adalora,",
    ),
    "a method of its own": (["override /adapter: stranger"], "", ONLY),
    "a harmless method of its own": (
        ["override /adapter: harmless"],
        "",
        "adapter=harmless: conf/adapter has adalora,",
    ),
    "a launcher of its own": (["override /hydra/launcher: stranger"], "", ONLY),
    "a base for Hydra": (["/base@hydra.callbacks.a: tiny"], "", ONLY),
    "a base within a task": (["/base@task.columns.a: tiny"], "", NOWHERE),
    "an interpolated secret": ([], "task: {system: '${oc.env:WANDB_API_KEY}'}", VARIABLE),
    "a job's shell": (
        ["override /hydra/launcher: slurm"],
        "hydra: {launcher: {setup: ['touch CANARY']}}",
        "runs commands",
    ),
    "a job's Python": (
        ["override /hydra/launcher: slurm"],
        "hydra: {launcher: {python: /tmp/evil}}",
        "runs commands",
    ),
    "a job's further options": (
        ["override /hydra/launcher: slurm"],
        "hydra: {launcher: {additional_parameters: {wrap: 'touch CANARY'}}}",
        "runs commands",
    ),
    "a line of the job's script": (
        ["override /hydra/launcher: slurm"],
        'hydra: {launcher: {partition: "a\\n#SBATCH --wrap=x"}}',
        "a new line would become a command",
    ),
    "options of srun": (
        ["override /hydra/launcher: slurm"],
        "hydra: {launcher: {srun_args: ['--prolog=x']}}",
        "runs commands",
    ),
    "a repository's attention": (
        [],
        "base: {attn_implementation: evil/kernel}",
        "Attention is one of transformers' own",
    ),
    "aliases of aliases": (
        [],
        "own: ["
        + ", ".join(
            ["&a0 [x]", *(f"&a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 40))]
        )
        + "]",
        "has more than 10,000 values",
    ),
    "an alias of itself": ([], "own: &a {a: *a}", "contains itself"),
    "a deep one": ([], f"own: {'[' * 3000}{']' * 3000}", "nested more than 64 levels"),
    "a long one": ([], f"own: {'x' * (1 << 20)}", "at most 1,048,576 are read"),
    "texts of texts": (
        [],
        "own: {x0: "
        + "x" * 99
        + ", "
        + ", ".join(f"x{i}: '{'${own.x' + str(i - 1) + '}' * 3}'" for i in range(1, 30))
        + "}",
        None,
    ),
    "an address with a password": (
        [],
        "task: {system: 'see https://me:hunter2@host/x'}",
        "looks like a secret",
    ),
    "a hidden sweep": (
        [],
        "hydra: {mode: MULTIRUN, sweeper: {params: {adapter._target_: os.makedirs}}}",
        "hydra.mode=MULTIRUN is taken from the command line",
    ),
}


# Where files are written; what is said names the setting.
PLACES = {
    "runs": "runs: CANARY",
    "resume": "resume: CANARY",
    "hydra.run.dir": "hydra: {run: {dir: CANARY}}",
    "hydra.sweep.dir": "hydra: {sweep: {dir: CANARY}}",
    "hydra.sweep.subdir": "hydra: {sweep: {subdir: CANARY}}",
    "hydra.output_subdir": "hydra: {output_subdir: own}",
    "hydra.mode": "hydra: {mode: MULTIRUN}",
    "hydra.job.chdir": "hydra: {job: {chdir: true}}",
    "target.features": "target: {features: CANARY}",
}
FILES |= {
    f"a place: {place}": ([], body, "is taken from the command line or a file of conf/ only")
    for place, body in PLACES.items()
}


@pytest.mark.long
@pytest.mark.parametrize("place", [place for place in PLACES if place != "target.features"])
def test_a_place_of_the_command_line_is_taken(compose, place):
    value = {"hydra.mode": "MULTIRUN", "hydra.job.chdir": "true", "resume": "never"}.get(place, "x")
    assert compose(*COMMON, f"{place}={value}") is not None


FILES["a pattern that takes for ever"] = (
    [],
    "adapter: {target_modules: '(a|aa|.+)+[.]$|(.*)*x(.*)*y'}",
    "took more than 1 s of computing",
)


@pytest.mark.long
@pytest.mark.parametrize("case", FILES)
def test_a_strangers_experiment_runs_nothing(refused, canary, case):
    defaults, body, said = FILES[case]
    folder = canary.parent / "from"
    for name in ("experiment", "adapter", "hydra/launcher"):
        (folder / name).mkdir(parents=True)
    if "override /base: hf" not in defaults:
        defaults = [*defaults, "override /base: tiny"]
    text = "\n".join(
        [
            "# @package _global_",
            "defaults:",
            *(f"  - {entry}" for entry in defaults),
            "max_length: 256",
            body,
        ]
    )
    (folder / "experiment" / "evil.yaml").write_text(text.replace("CANARY", str(canary)))
    for name in ("adapter/stranger", "hydra/launcher/stranger", "stranger"):
        (folder / f"{name}.yaml").write_text(f"_target_: os.makedirs\nname: {canary}\n")
    for name in ("adapter/harmless", "harmless"):
        (folder / f"{name}.yaml").write_text("_target_: adapters.lora.LoRAAdapter\nrank: 1\n")
    message = refused("--config-dir=from", "experiment=evil", "task.path=rows.jsonl", "max_steps=1")
    assert said is None or said in message


# What an import would find, and what it could do: files, processes, code, pickles, the network,
# other models.
FOREIGN = (
    "builtins.eval",
    "builtins.exec",
    "builtins.__import__",
    "builtins.compile",
    "importlib.import_module",
    "runpy.run_path",
    "code.interact",
    "pty.spawn",
    "ctypes.CDLL",
    "webbrowser.open",
    "site.addsitedir",
    "cProfile.run",
    "timeit.timeit",
    "pydoc.pipepager",
    "os.popen",
    "os.execv",
    "os.remove",
    "shutil.rmtree",
    "subprocess.Popen",
    "subprocess.getoutput",
    "pickle.loads",
    "pickle.load",
    "marshal.loads",
    "shelve.open",
    "zipfile.ZipFile",
    "tarfile.open",
    "yaml.unsafe_load",
    "socket.create_connection",
    "urllib.request.urlopen",
    "smtplib.SMTP",
    "functools.partial",
    "operator.methodcaller",
    "operator.attrgetter",
    "hydra.utils.instantiate",
    "hydra.utils.call",
    "hydra.utils.get_method",
    "hydra.utils.get_class",
    "hydra._internal.utils._locate",
    "hydra._internal.instantiate._instantiate2.instantiate",
    "omegaconf.OmegaConf.load",
    "omegaconf.OmegaConf.register_new_resolver",
    "torch.jit.load",
    "torch.ops.load_library",
    "torch.hub.download_url_to_file",
    "torch.utils.cpp_extension.load_inline",
    "torch.serialization.load",
    "torch.package.PackageImporter",
    "transformers.AutoModel.from_pretrained",
    "transformers.pipeline",
    "peft.PeftModel.from_pretrained",
    "transformers.dynamic_module_utils.get_class_from_dynamic_module",
    "lightning.pytorch.LightningModule.load_from_checkpoint",
    "lightning.pytorch.cli.LightningCLI",
    "datasets.load_dataset",
    "datasets.load_from_disk",
    "huggingface_hub.snapshot_download",
    "huggingface_hub.upload_folder",
    "wandb.Artifact.download",
    "trainer.exporting.formats.export",
    "trainer.config.compose.install",
    "trainer.storage.run_folder.RunFolder",
    "trainer.storage.checkpoints.remove",
    "trainer.models.base.Base",
    "trainer.models.gguf.convert",
    "trainer.models.hub.from_hub.__globals__",
    "tasks.wheel.fetch",
    "tasks.wheel.forget",
    "adapters.io.write",
    "adapters.io.os.system",
    "trainer.models.base.os.system",
    "trainer.run.run",
    "torch.optim.AdamW.__init__",
    "torch.optim._multi_tensor.AdamW",
    "TORCH.OPTIM.ADAMW",
    "torch.optim.AdamW\x00",
    "torch.optim.AdamW/",
    "torch..optim.AdamW",
    ".torch.optim.AdamW",
)


EVERYWHERE = (
    "adapter",
    "base",
    "task",
    "optimizer",
    "schedule",
    "objective",
    "penalty",
    "drafter",
    "branch",
    "target",
    "callbacks.evaluation",
    "logger.own",
    "lightning.strategy",
    "lightning.plugins",
    "own",
    "own.deep.er",
    "hydra.launcher",
    "hydra.sweeper",
    "hydra.callbacks.own",
    "hydra.job",
    "hydra.job_logging.handlers.own",
    "hydra.hydra_logging.handlers.own",
    "hydra.help",
    "hydra.runtime",
)


@pytest.mark.long
@pytest.mark.parametrize("place", EVERYWHERE)
def test_nothing_foreign_is_made_anywhere(good, place):
    if place == "adapter":
        good = {key: good[key] for key in ("adapter", "base", "hydra", "task")}
    targets = FOREIGN if place == "adapter" else FOREIGN[:1]
    if place.startswith("hydra"):
        targets = [*targets, "trainer.models.tiny.tiny", "adapters.lora.LoRAAdapter"]
    assert "builtins.eval" in targets
    for name in targets:
        cfg = OmegaConf.create(good)
        OmegaConf.update(cfg, place, {"_target_": name}, merge=False, force_add=True)
        with pytest.raises(ConfigError, match=ONLY if "logging" not in place else "Only classes"):
            check(cfg)


@pytest.mark.long
def test_a_file_may_ask_for_little_and_gets_it(compose, canary):
    """What a refusal is worth is seen by what is not refused."""
    assert (
        compose(
            *COMMON, "base=hf", "base.path=a/b", "base.trust_remote_code=true"
        ).base.trust_remote_code
        is True
    )
    cfg = compose(
        *COMMON,
        "hydra.job_logging.handlers.console.show_time=true",
        "hydra.run.dir=elsewhere",
        "hydra.verbose=true",
    )
    assert cfg.hydra.run.dir == "elsewhere"


@pytest.mark.long
@pytest.mark.parametrize(
    "override",
    [
        f"logger.wandb.notes={SECRETS['HF_TOKEN']}",
        f"logger.wandb.project={SECRETS['WANDB_API_KEY']}",
        f"logger.wandb.notes='my {SECRETS['SOME_PASSWORD']}'",
        f"logger.wandb.notes='{SECRETS['AWS_SECRET_ACCESS_KEY']}'",
        f"runs={SECRETS['SOME_PASSWORD']}",
        "++task.columns={token: {deep: quiet}}",
        "logger.wandb.notes=AKIAABCDEFGHIJKLMNOP",
        "logger.wandb.notes=github_pat_abcdefghijklmnopqrstuvwx",
        "logger.wandb.notes='-----BEGIN OPENSSH PRIVATE KEY-----'",
        "task.path=https://me:quiet@host/rows.jsonl",
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
def test_what_looks_like_a_secret_is_refused_before_anything_is_written(
    refused, canary, monkeypatch, override
):
    for name in ("SOME_PASSWORD", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, SECRETS[name])
    message = refused(*COMMON, "logger=wandb", override)
    assert (
        "looks like a secret. Configs are logged: export it" in message
        or "which is a secret by its name" in message
    )
    assert not any(part in message for part in (*SECRETS.values(), "quiet", "sk-abc", "ghp_"))
    assert [path.name for path in canary.parent.iterdir()] == []


def test_what_is_no_secret_is_taken(compose):
    assert compose(*COMMON, "max_tokens=10", "task=bfcl", "~task.path").max_tokens == 10


def test_a_check_without_hydras_node_refuses_as_well():
    """As for a launcher's worker, and for a run folder."""
    with pytest.raises(ConfigError, match="Only classes that conf/ names"):
        check(OmegaConf.create({"adapter": {"_target_": "os.system"}}), {})


def dotted(node):
    """A name with its attributes; of anything else the attributes alone."""
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join(reversed([*parts, node.id if isinstance(node, ast.Name) else ""]))


def calls(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            kept = ("shell", "weights_only", "Loader")
            yield (
                dotted(node.func),
                {word.arg: ast.unparse(word.value) for word in node.keywords if word.arg in kept},
            )


@pytest.mark.long
def test_no_file_of_ours_loads_a_pickle_or_asks_a_shell():
    """Every way to read code as data, wherever it may be written one day."""
    seen = 0
    for file in [
        path for name in ("adapters", "tasks", "trainer") for path in (ROOT / name).rglob("*.py")
    ]:
        for name, words in calls(ast.parse(file.read_text("utf-8"))):
            last = name.rpartition(".")[2]
            assert name not in (
                "eval",
                "exec",
                "compile",
                "os.system",
                "os.popen",
                "yaml.unsafe_load",
                "yaml.full_load",
            ), file
            assert not name.startswith(
                ("pickle.load", "dill.", "marshal.", "shelve.", "joblib.", "np.load", "numpy.load")
            ), file
            assert last not in (
                "extractall",
                "unpack_archive",
                "load_from_disk",
                "read_pickle",
            ), file
            assert words.get("shell", "False") == "False", file
            if name == "torch.load":
                seen += 1
                assert words["weights_only"] == "True", file
            if name == "yaml.load":
                # _Loader is LOADER with numbers as OmegaConf reads them, for conf/ alone
                safe = ("LOADER", "yaml.BaseLoader", "_Loader")
                assert words["Loader"] in safe, file
    assert issubclass(limits.LOADER, yaml.constructor.SafeConstructor)
    assert seen == 1
