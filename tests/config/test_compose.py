"""From a command line to a checked config, before torch is there."""

from __future__ import annotations

import json

import pytest
import yaml
from omegaconf import OmegaConf

from tests.conftest import ROOT, sums, write_rows
from trainer.config import run_name
from trainer.config.compose import check, rewrite
from trainer.config.errors import ConfigError
from trainer.config.history import complete

TASK = "task.path=rows.jsonl"
AVERAGING = "callbacks=[default,averaging]"
FREE = ("optimizer=schedulefree", "schedule=constant")

COMBINATIONS = {
    "no end": (
        ["max_steps=null"],
        "the run has no end: set one of max_epochs, max_steps, max_tokens, max_time",
    ),
    "no steps": (
        ["max_epochs=null", "max_steps=null", "max_time=5"],
        "a run that ends by max_time alone has no known number of steps",
    ),
    "a warm-up and a cooldown longer than the run": (
        ["max_steps=10", "schedule.warmup=4", "schedule.cooldown=7"],
        "schedule.warmup=4 and schedule.cooldown=7 take more than the run's 10 steps",
    ),
    "a branch of another length": (
        ["branch=cooldown", "branch.run=runs/x", "branch.step=8", "branch.steps=2", "max_steps=11"],
        "max_steps=11 is not branch.step + branch.steps = 10",
    ),
    "a trigger on a falling rate": (
        ["callbacks=[default,cooldown]", "schedule=cosine"],
        "this schedule falls by itself: set schedule=constant",
    ),
    "a deadline that is none": (
        [
            "callbacks=[default,cooldown]",
            "schedule=constant",
            "callbacks.cooldown.deadline=max_time",
        ],
        "needs a max_time above callbacks.cooldown.reserve=2",
    ),
    "patience without evaluations": (
        [
            "callbacks=[default,cooldown]",
            "schedule=constant",
            "callbacks.cooldown.patience=2",
            "callbacks.evaluation.every=null",
        ],
        "callbacks.cooldown.patience counts evaluations, and there are none",
    ),
    "distilling without a drafter": (
        ["objective=distill", "adapter=none"],
        "objective=distill trains a drafter, and drafter=none is none: choose one",
    ),
    "distilling with an adapter": (
        ["objective=distill", "drafter=eagle3"],
        "objective=distill trains the drafter only: set adapter=none",
    ),
    "a rate of zero": (["optimizer.lr=0"], "optimizer.lr is 0, but must be float > 0"),
    "registers without an adapter": (
        ["drafter=registers", "adapter=none"],
        "adapter=none has none: choose an adapter",
    ),
    "registers and a penalty": (
        ["drafter=registers", "penalty=deft"],
        "which penalty=deft would measure in their place",
    ),
    "full on a quantised base": (
        ["adapter=full", "base.quantization=nf4"],
        "set base.quantization=none, or use an adapter",
    ),
    "packing and length groups": (
        ["packing=true", "group_by_length=true"],
        "set group_by_length=false",
    ),
    "packing a classifier": (
        ["task=classification", "packing=true"],
        "which reads one label per sequence: set packing=false",
    ),
    "a stream without steps": (
        ["task.streaming=true", "max_steps=null", "max_epochs=1", f"task.eval_{TASK[5:]}"],
        "set max_steps",
    ),
    "a packed stream": (
        ["task.streaming=true", "packing=true", f"task.eval_{TASK[5:]}"],
        "set packing=false",
    ),
    "a stream in length groups": (
        ["task.streaming=true", "group_by_length=true", f"task.eval_{TASK[5:]}"],
        "set group_by_length=false",
    ),
    "a stream with workers": (
        ["task.streaming=true", "workers=2", f"task.eval_{TASK[5:]}"],
        "set workers=0",
    ),
    "rows held out of a stream": (
        ["task.streaming=true"],
        "set task.eval_path, or task.eval_fraction=0",
    ),
    "half an epoch of a stream": (
        ["task.streaming=true", "max_epochs=1.5", f"task.eval_{TASK[5:]}"],
        "must be whole",
    ),
    "a compiled target": (
        ["compile=true", "adapter=none"],
        "adapter=none trains none: set compile=false",
    ),
    "a compiled quantised base": (
        ["compile=true", "base.quantization=nf4"],
        "base.quantization=nf4: set compile=false",
    ),
    "a compiled penalty": (
        ["compile=true", "penalty=deft"],
        "activations that penalty=deft measures",
    ),
    "compiled and shared out": (
        ["compile=true", "lightning.strategy=fsdp2", "lightning.devices=2"],
        "not tested with compile=true",
    ),
    "fp16 on a CPU": (
        ["precision=16-mixed", "lightning=cpu", "optimizer.fused=false"],
        "use precision=bf16-true or fp32",
    ),
    "fp16 with a fused optimiser": (
        ["precision=16-mixed", "lightning=gpu"],
        "set optimizer.fused=false",
    ),
    "a method that cannot be quantised": (
        ["adapter=peft", "adapter.peft_type=LOHA", "base.quantization=int8"],
        "LOHA cannot sit on",
    ),
    "pissa on a quantised base": (
        ["adapter=pissa", "base.quantization=nf4"],
        "which cannot be done to a quantised base",
    ),
    "pissa and dora": (["adapter=pissa", "adapter.use_dora=true"], "choose one"),
    "loftq on a plain base": (["adapter=loftq"], "set base.quantization=nf4"),
    "virtual tokens and packing": (
        ["adapter=prompt_tuning", "packing=true"],
        "virtual tokens before a row",
    ),
    "a prefix and recomputation": (
        ["adapter=prefix_tuning", "objective.gradient_checkpointing=true"],
        "gradient_checkpointing=false",
    ),
    "an adaption prompt for classes": (
        ["task=classification", "adapter=peft", "adapter.peft_type=ADAPTION_PROMPT"],
        "causal",
    ),
    "an unknown method": (
        ["adapter=peft", "adapter.peft_type=LORO"],
        "adapter.peft_type is 'LORO'. Known: ADALORA",
    ),
    "a method that needs more": (
        ["adapter=peft", "adapter.peft_type=XLORA"],
        "it mixes adapters that were trained before",
    ),
    "a misspelt field": (
        ["adapter=dora", "adapter.lora_alhpa=3"],
        "has no such field. Did you mean lora_alpha?",
    ),
    "a field of another type": (
        ["adapter=dora", "adapter.bias=3"],
        "adapter.bias is 3, but PEFT's LoraConfig takes",
    ),
    "a field that the run sets": (
        ["adapter=dora", "adapter.inference_mode=true"],
        "is set by the run itself",
    ),
    "a name that is a path": (["name=../elsewhere"], "name is '../elsewhere'"),
    "a name that hides": (["name=.run"], "name is '.run'"),
    "an endless name": ([f"name={'a' * 101}"], "at most 100"),
    "a folder without a run": (
        ["resume=no/such/folder"],
        "resume=no/such/folder: that folder holds no run",
    ),
    "an exponential cooldown to zero": (
        ["schedule.shape=exponential"],
        "schedule.final is 0: set schedule.final=0.1, or another shape",
    ),
    "a triggered cooldown to zero": (
        ["callbacks=[default,cooldown]", "callbacks.cooldown.shape=exponential"],
        "set callbacks.cooldown.final=0.1",
    ),
    "milestones without factors": (
        ["schedule=multistep", "schedule.factors=[0.1]"],
        "has 2 entries and schedule.factors 1",
    ),
    "milestones out of order": (
        ["schedule=multistep", "schedule.milestones=[0.9,0.8]"],
        "do not rise: give them in rising order",
    ),
    "a milestone twice": (
        ["schedule=multistep", "schedule.milestones=[0.9,0.9]"],
        "do not rise: give them in rising order",
    ),
    "milestones of two kinds": (
        ["schedule=multistep", "schedule.milestones=[0.9,15]"],
        "mix fractions of the run with steps",
    ),
    "averages of spiel": (
        ["adapter=spiel", AVERAGING],
        "average entries of adapter=spiel that stand for other positions",
    ),
    "averages of adalora": (
        ["adapter=adalora", AVERAGING],
        "restore ranks that adapter=adalora has removed",
    ),
    "averages that never start": (
        [AVERAGING, "callbacks.averaging.start=20"],
        "start=20 is not before the end of max_steps=20",
    ),
    "averages of averages": (
        [AVERAGING, *FREE],
        "optimizer=schedulefree averages its weights itself",
    ),
    "schedule-free with a schedule": (["optimizer=schedulefree"], "set schedule=constant"),
    "schedule-free with a cooldown": (
        ["callbacks=[default,cooldown]", *FREE],
        "leave callbacks.cooldown out",
    ),
    "schedule-free spiel": (["adapter=spiel", *FREE], "set optimizer=adamw"),
    "schedule-free adalora": (
        ["adapter=adalora", *FREE],
        "removes ranks, which optimizer=schedulefree's average restores",
    ),
    "schedule-free rosa that starts again": (
        ["adapter=rosa", "adapter.restart_after_mask=true", *FREE],
        "set it to false",
    ),
    "schedule-free in bf16": (
        ["adapter=full", "precision=bf16-true", *FREE],
        "and precision is too coarse for that",
    ),
    "schedule-free on a bf16 adapter": (
        ["adapter.dtype=bfloat16", *FREE],
        "and adapter.dtype is too coarse for that",
    ),
}


@pytest.mark.long
@pytest.mark.parametrize("case", COMBINATIONS)
def test_settings_that_do_not_go_together(compose, case):
    overrides, message = COMBINATIONS[case]
    with pytest.raises(ConfigError) as refusal:
        compose("+experiment=smoke", TASK, *overrides)
    (line,) = str(refusal.value).splitlines()
    assert message in line


@pytest.mark.long
def test_nothing_to_train_needs_no_end(compose):
    assert compose("+experiment=smoke", TASK, "adapter=none", "max_steps=null").max_steps is None


def test_bad_values_are_told_all_at_once(compose):
    with pytest.raises(ConfigError) as refusal:
        compose(
            "+experiment=smoke",
            "optimizer.lr=-1",
            "adapter.rnak=4",
            "precision=fp23",
            "callbacks.checkpoints.keep=0",
        )
    lines = str(refusal.value).splitlines()
    assert [line.split()[0].rstrip(":") for line in sorted(lines)] == [
        "adapter.rnak",
        "callbacks.checkpoints.keep",
        "optimizer.lr",
        "precision",
        "task.path",
    ]
    assert "Did you mean rank?" in str(refusal.value)
    assert "Did you mean fp32?" in str(refusal.value)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ("experiment=smoke", "+experiment=smoke"),
        ("+experiment=smoke", "+experiment=smoke"),
        ("experiment=a,b", "+experiment=a,b"),
        ("adapter=lora", "adapter=lora"),
        ("adapter.rank=4", "++adapter.rank=4"),
        ("name=x", "++name=x"),
        ("task.path=a=b", "++task.path='a=b'"),
        ("optimizer.rl=3", "++optimizer.rl=3"),
        ("hydra.run.dir=x", "hydra.run.dir=x"),
        ("hydra/launcher=x", "hydra/launcher=x"),
        ("adapter@other=lora", "adapter@other=lora"),
        ("+task.b=1", "+task.b=1"),
        ("++task.b=1", "++task.b=1"),
        ("~callbacks.evaluation", "~callbacks.evaluation"),
        ("--config-dir=x", "--config-dir=x"),
        ("-m", "-m"),
        ("word", "word"),
    ],
)
def test_arguments_as_hydra_takes_them(values, expected):
    assert rewrite([values]) == [expected]


def test_the_command_line_changes_what_an_experiment_says(compose):
    cfg = compose(
        "experiment=smoke",
        TASK,
        "adapter=rslora",
        "adapter.rank=4",
        "callbacks.evaluation=null",
        "~callbacks.progress",
    )
    assert (cfg.adapter.rank, cfg.adapter.rslora, cfg.optimizer.lr) == (4, True, 0.01)
    assert cfg.callbacks.evaluation is None
    assert "progress" not in cfg.callbacks


@pytest.mark.long
def test_two_loggers_at_once(compose):
    cfg = compose("experiment=smoke", TASK, "logger=[wandb,tensorboard]", "logger.wandb.project=p")
    assert list(cfg.logger) == ["wandb", "tensorboard"]
    with pytest.raises(
        ConfigError, match=r"logger\.wandb\.porject: there is no such key. Did you mean project\?"
    ):
        compose("experiment=smoke", TASK, "logger=[wandb,tensorboard]", "logger.wandb.porject=p")


@pytest.mark.long
def test_a_callback_beside_the_default_ones(compose):
    cfg = compose(
        "experiment=smoke",
        TASK,
        AVERAGING,
        "callbacks.averaging.kind=swa",
        "callbacks.checkpoints.keep=3",
    )
    assert set(cfg.callbacks) == {"evaluation", "checkpoints", "progress", "averaging"}
    assert (cfg.callbacks.averaging.kind, cfg.callbacks.checkpoints.keep) == ("swa", 3)
    with pytest.raises(
        ConfigError, match=r"callbacks.averaging.knid: there is no such key. Did you mean kind\?"
    ):
        compose("experiment=smoke", TASK, AVERAGING, "callbacks.averaging.knid=swa")


def test_a_package_that_is_not_installed_is_named_before_anything_is_loaded(compose, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *_: None)
    with pytest.raises(
        ConfigError, match="needs a package that is not installed: pip install schedulefree"
    ):
        compose("experiment=smoke", TASK, *FREE)


def test_a_run_of_a_package_that_is_not_installed_can_be_read(compose, monkeypatch):
    cfg = compose("experiment=smoke", TASK, *FREE)
    choices = OmegaConf.to_container(cfg.hydra.runtime.choices)
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *_: None)
    check(OmegaConf.masked_copy(cfg, [key for key in cfg if key != "hydra"]), choices)


def recorded(cfg):
    """(config, choices) as a run folder has them."""
    bare = OmegaConf.masked_copy(cfg, [key for key in cfg if key != "hydra"])
    return OmegaConf.to_container(bare, resolve=True), OmegaConf.to_container(
        cfg.hydra.runtime.choices
    )


@pytest.mark.long
def test_what_has_come_since_a_run_is_as_conf_has_it(compose):
    cfg = compose(
        "experiment=smoke",
        TASK,
        AVERAGING,
        "logger=wandb",
        "adapter=rslora",
        "adapter.rank=4",
        "callbacks.evaluation=null",
        "~callbacks.progress",
    )
    expected, choices = recorded(cfg)
    older, built = recorded(cfg)
    lacks = [
        "adapter.rslora",
        "callbacks.averaging.export",
        "fused",
        "lightning.timeout",
        "logger.wandb.system",
        "penalty",
        "requeue",
        "target",
    ]
    for place in lacks:
        *path, last = place.split(".")
        node = older
        for key in path:
            node = node[key]
        del node[last]
    del built["penalty"], built["target"]
    places = complete(older, built)
    assert sorted(places) == lacks
    assert older == expected
    assert built == choices
    assert complete(older, built) == []
    check(OmegaConf.create(older), built)


def test_what_is_asked_for_has_no_default(compose):
    older, choices = recorded(compose("experiment=smoke", TASK))
    del older["task"]["path"], older["adapter"]["rank"]
    older["gone"] = 1
    assert complete(older, choices) == ["adapter.rank"]
    with pytest.raises(ConfigError) as refusal:
        check(OmegaConf.create(older), choices)
    missing, unknown = sorted(str(refusal.value).splitlines(), reverse=True)
    assert missing.startswith("task.path is missing")
    assert unknown.startswith("gone: there is no such key")
    assert complete(older, choices | {"adapter": "of long ago"}) == []  # `check` refuses it


@pytest.mark.long
def test_a_targets_base_of_an_older_version(compose, tmp_path):
    plain, choices = recorded(compose("experiment=smoke", TASK, "base=tiny", "base.seed=3"))
    del plain["base"]["double_quant"]
    (tmp_path / "run.yaml").write_text(
        yaml.safe_dump({"config": plain, "identity": {"labels": None, "choices": choices}})
    )
    cfg = compose(
        TASK,
        "logger=none",
        "adapter=none",
        "drafter=mtp_shared",
        "base=tiny",
        "base.seed=3",
        f"target.run={tmp_path}",
    )
    assert (cfg.base.seed, cfg.base.double_quant) == (3, True)


def test_a_hub_commit_in_a_path_is_no_secret(compose):
    place = f"/cache/models--a--b/snapshots/{'0123456789' * 4}"
    cfg = compose(
        "experiment=smoke",
        TASK,
        "base=hf",
        f"base.path={place}",
        f"base.revision={'0123456789' * 4}",
    )
    assert cfg.base.path == place


def runs_of(tmp_path, *names, file="run.yaml"):
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / file).touch()


def test_run_folders_are_numbered(tmp_path):
    assert run_name.run_folder(str(tmp_path), "a", "never") == str(tmp_path / "a")
    assert run_name.run_folder(str(tmp_path), "a", "auto") == str(tmp_path / "a")
    runs_of(tmp_path, "a", "a-2")
    runs_of(tmp_path, "a-3", file="multirun.yaml")
    (tmp_path / "a-4").mkdir()  # without a run
    assert run_name.run_folder(str(tmp_path), "a", "never") == str(tmp_path / "a-4")
    assert run_name.run_folder(str(tmp_path), "a", "auto") == str(tmp_path / "a-3")


def test_a_named_run_folder_is_taken_as_it_is(tmp_path):
    runs_of(tmp_path, "any name")
    assert run_name.run_folder("elsewhere", "a", str(tmp_path / "any name")) == str(
        tmp_path / "any name"
    )
    with pytest.raises(ConfigError, match="that folder holds no run"):
        run_name.run_folder("elsewhere", "a", str(tmp_path))
    with pytest.raises(ConfigError, match="that folder holds no run"):
        run_name.run_folder("elsewhere", "a", "")


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../a", "a/b", "/a", ".a", "-a", "a b", "a\n", "ä", "a*", "a" * 101]
)
def test_a_name_is_no_path(name):
    with pytest.raises(ConfigError, match="A run's name has"):
        run_name.run_folder("runs", name, "never")


@pytest.fixture
def no_torch(tmp_path):
    """Environment in which importing torch leaves a mark and fails, and that mark."""
    mark = tmp_path / "imported"
    (tmp_path / "fake" / "torch").mkdir(parents=True)
    (tmp_path / "fake" / "torch" / "__init__.py").write_text(
        f"open({str(mark)!r}, 'w')\nraise ImportError('torch, too early')\n"
    )
    return {"PYTHONPATH": f"{tmp_path / 'fake'}:{ROOT}"}, mark


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--cfg", "job"], 0, "max_length: null"),
        (["--cfg", "job", "experiment=smoke", "adapter=peft"], 0, "peft_type: ???"),
        (["--help"], 0, "adapter    adalora, bilora, corda"),
        (["--hydra-help"], 0, "Hydra"),
        (["--info", "defaults-tree"], 0, "adapter: lora"),
        (["experiment=smoke", TASK, "adapter.rnak=3"], 2, "Did you mean rank?"),
        (
            ["experiment=smoke", TASK, "adapter=dora", "adapter.lora_alhpa=3"],
            2,
            "Did you mean lora_alpha?",
        ),
        (["--cfg", "job", "adapter.rnak=3"], 2, "Did you mean rank?"),
        (
            ["experiment=smok", TASK],
            2,
            "experiment=smok: there is no such choice. Did you mean smoke? Known: ",
        ),
        (["adapter=loar", TASK], 2, "adapter=loar: there is no such choice. Did you mean lora?"),
        (["adapter=null", TASK], 2, "adapter=null: choose one of adalora,"),
        (["~adapter", TASK], 2, "adapter: choose one of adalora,"),
        (["experiment=smoke,quickstart", TASK], 2, "add --multirun to your command line"),
        (["experiment=smoke", TASK, "word"], 2, "word: expected KEY=VALUE"),
        (["experiment=smoke", TASK, "name=a[b"], 2, "name is 'a[b'"),
        (["experiment=smoke", TASK, "name=[b"], 2, "If this is text, write 'name="),
        (["experiment=smoke", TASK, "+experiments=x"], 2, "Did you mean experiment?"),
        (["evalaute", "run=x"], 2, "Did you mean evaluate?"),
        (["experiment=smoke", "evaluate"], 2, "The command comes first: graft evaluate ..."),
        (["train", "experiment=smoke"], 2, "training needs no command"),
        (["--multrun", "seed=0,1"], 2, "Did you mean --multirun?"),
        (["--version"], 0, "graft "),
        ([], 2, "graft experiment=NAME"),
        (["experiment=smoke"], 2, "task.path is missing. It must be set: task.path=..."),
        (["--config-name=other"], 2, "--config-dir=FOLDER"),
        (["--multirun", "experiment=smoke", TASK, "optimizer.lr=1e-3,-1"], 2, "optimizer.lr is -1"),
    ],
)
def test_what_can_be_said_without_torch_is(program, no_torch, tmp_path, arguments, code, message):
    environment, mark = no_torch
    done = program(*arguments, env=environment)
    assert message in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert done.returncode == code, done.stderr
    assert not mark.exists()
    assert not list(tmp_path.glob("runs/**/run.yaml"))


def test_that_torch_is_noticed(program, no_torch, tmp_path):
    environment, mark = no_torch
    rows = tmp_path / "rows.jsonl"
    rows.write_text("{}\n")
    assert program("experiment=smoke", f"task.path={rows}", env=environment).returncode == 1
    assert mark.exists()


def test_a_folder_that_cannot_be_made(program, no_torch, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "rows.jsonl").write_text("{}\n")
    done = program("experiment=smoke", TASK, "runs=file/runs", env=no_torch[0])
    assert done.returncode == 2
    assert (
        "file/runs/smoke cannot be written: Not a directory. Choose another folder with runs=FOLDER"
        in done.stderr
    )
    assert "Traceback" not in done.stderr


def test_hydras_own_traceback_can_be_asked_for(program):
    done = program("experiment=smoke", TASK, "adapter.rnak=3", env={"HYDRA_FULL_ERROR": "1"})
    assert "Traceback" in done.stderr
    assert "Did you mean rank?" in done.stderr


def test_experiments_of_ones_own_folder(program, tmp_path):
    (tmp_path / "mine" / "experiment").mkdir(parents=True)
    own = tmp_path / "mine" / "experiment" / "own.yaml"
    own.write_text(
        "# @package _global_\ndefaults:\n  - override /adapter: rslora\nname: own\nadapter:\n "
        " rank: 5\n"
    )
    done = program("--config-dir=mine", "--cfg", "job", "experiment=own", TASK)
    assert yaml.safe_load(done.stdout)["adapter"]["rank"] == 5
    own.write_text(own.read_text().replace("rank", "rnak"))
    assert (
        "Did you mean rank?"
        in program("--config-dir=mine", "--cfg", "job", "experiment=own", TASK).stderr
    )


def test_a_sweep_runs_each_value_in_its_own_folder_and_goes_on(warm_program, tmp_path):
    write_rows(tmp_path / "rows.jsonl", sums(20))
    sweep = [
        "-m",
        "experiment=smoke",
        TASK,
        "max_steps=1",
        "optimizer.lr=1e-3,2e-3",
        "callbacks.evaluation=null",
        "resume=auto",
    ]
    done = warm_program(*sweep)
    assert done.returncode == 0, done.stdout + done.stderr
    folders = [tmp_path / "runs" / "smoke-sweep" / name for name in ("0", "1")]
    assert [
        yaml.safe_load((folder / "run.yaml").read_text())["config"]["optimizer"]["lr"]
        for folder in folders
    ] == [
        1e-3,
        2e-3,
    ]
    assert all((folder / "adapter" / "adapter_model.safetensors").exists() for folder in folders)
    assert len(json.loads((folders[0] / "preflight.json").read_text())["errors"]) == 0
    again = warm_program(*sweep)
    assert again.stdout.count("nothing is left to do") == 2
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["smoke-sweep"]


def test_a_value_that_only_looks_like_an_interpolation(compose):
    assert compose("experiment=smoke", TASK, r"task.system='\${x}'").task.system == "${x}"


def test_an_interpolation_that_leads_nowhere(compose):
    with pytest.raises(ConfigError, match="an interpolation of the config cannot be resolved"):
        compose("experiment=smoke", TASK, "task.system=${nowhere}")


def test_everyday_interpolations_stay(compose, monkeypatch):
    monkeypatch.setenv("SCRATCH", "/scratch/me")
    cfg = compose(
        "experiment=smoke",
        TASK,
        "runs=${oc.env:SCRATCH}/runs",
        "logger=wandb",
        "logger.wandb.group=${name}-${seed}",
    )
    assert (cfg.runs, cfg.logger.wandb.group) == ("/scratch/me/runs", "smoke-0")
    assert OmegaConf.select(cfg, "hydra.run.dir") == "/scratch/me/runs/smoke"
