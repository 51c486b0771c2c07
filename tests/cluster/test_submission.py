"""What `python -m trainer.submit` prints and refuses; tests/slurm has what becomes of it."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys

import pytest

from tests.conftest import ROOT
from trainer import submit
from trainer.cluster import submission
from trainer.config import forbidden
from trainer.config.errors import ConfigError

SMOKE = ("+experiment=smoke", "task.path=rows.jsonl", "lightning=cpu")


@pytest.fixture
def requested(tmp_path, monkeypatch, capsys):
    """(exit code, stdout, stderr) of a submission that queues nothing, from a folder of its own."""
    monkeypatch.chdir(tmp_path)

    def submitted(*words):
        try:
            code = submit.main([*words, "dry=true"])
        except SystemExit as end:
            code = end.code
        out, err = capsys.readouterr()
        return code, out, err

    return submitted


def options(text):
    """What the #SBATCH lines of a script say."""
    lines = [
        shlex.split(line.removeprefix("#SBATCH --"))[0]
        for line in text.splitlines()
        if line.startswith("#SBATCH --")
    ]
    assert len({line.partition("=")[0] for line in lines}) == len(lines)
    return {key: value for key, _, value in (line.partition("=") for line in lines)}


def values(text, tmp_path, **variables):
    """The command that a script's last line runs, with programs of SLURM that only say what they
    are given."""
    programs = tmp_path / "programs"
    programs.mkdir(exist_ok=True)
    (programs / "srun").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\nenv >&2\n')
    (programs / "scontrol").write_text("#!/bin/sh\nprintf 'n7\\nn8\\n'\n")
    for program in programs.iterdir():
        program.chmod(0o755)
    environment = {
        "PATH": f"{programs}:{os.environ['PATH']}",
        "HOME": str(tmp_path),
        "SLURM_JOB_ID": "41234",
        "SLURM_JOB_NODELIST": "n[7-8]",
        "SLURM_JOB_NAME": "mine",
        "SLURM_CPUS_PER_TASK": "3",
    }
    done = subprocess.run(
        ["bash", "-c", text, "script"], capture_output=True, text=True, env=environment | variables
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines(), dict(
        line.partition("=")[::2] for line in done.stderr.splitlines()
    )


def test_nodes_tasks_and_gpus_are_the_configs(requested, tmp_path):
    code, text, err = requested(
        "+experiment=smoke",
        "task.path=rows.jsonl",
        "lightning=gpu",
        "lightning.devices=4",
        "lightning.num_nodes=2",
        "name=mine",
        "slurm.time=1-12",
        "slurm.partition=a100",
        "slurm.account=42",
        "slurm.qos=long",
        "slurm.memory=64G",
        "slurm.cpus_per_task=8",
        "slurm.gpu_type=a100",
        "slurm.constraint=nvlink&ib",
        "slurm.exclude=n[1-3],n7",
        "slurm.mail=me@example.org",
        "slurm.signal_before=300",
        "slurm.extra=[--reservation=maint]",
    )
    assert (code, err) == (0, "")
    assert options(text) == {
        "job-name": "mine",
        "output": f"{tmp_path}/runs/slurm/mine-%j.log",
        "open-mode": "append",
        "chdir": str(tmp_path),
        "nodes": "2",
        "ntasks-per-node": "4",
        "cpus-per-task": "8",
        "gpus-per-node": "a100:4",
        "mem": "64G",
        "time": "1-12",
        "partition": "a100",
        "account": "42",
        "qos": "long",
        "constraint": "nvlink&ib",
        "exclude": "n[1-3],n7",
        "mail-user": "me@example.org",
        "mail-type": "END,FAIL,REQUEUE",
        "signal": "USR1@300",
        "requeue": "",
        "reservation": "maint",
    }
    assert not (tmp_path / "runs").exists()


def test_what_the_script_runs(requested, tmp_path):
    code, text, _ = requested(
        *SMOKE, "name=mine", "optimizer.lr=0.002", "task.path='my rows.jsonl'", "resume=auto"
    )
    assert code == 0
    words, variables = values(text, tmp_path)
    arguments = [
        "+experiment=smoke",
        "task.path=rows.jsonl",
        "lightning=cpu",
        "optimizer.lr=0.002",
        "task.path='my rows.jsonl'",
    ]
    assert words == [
        "--kill-on-bad-exit=1",
        sys.executable,
        "-m",
        "trainer",
        *arguments,
        "name=mine-41234",
        "resume=auto",
    ]
    assert variables["SRUN_CPUS_PER_TASK"] == variables["OMP_NUM_THREADS"] == "3"
    assert (variables["MASTER_ADDR"], variables["MASTER_PORT"]) == (
        "n7",
        str(10000 + 41234 % 20000),
    )
    assert "WANDB_MODE" not in variables  # the run itself looks for a key


def test_the_template_by_hand_runs_the_same(tmp_path):
    text = (ROOT / "trainer/cluster/job.sbatch").read_text()
    words, _ = values(f"set -- +experiment=smoke seed=1\n{text}", tmp_path)
    assert words == [
        "--kill-on-bad-exit=1",
        "python",
        "-m",
        "trainer",
        "+experiment=smoke",
        "seed=1",
        "name=mine-41234",
        "resume=auto",
    ]
    words, _ = values(f"set -- resume=runs/other\n{text}", tmp_path)
    assert words[-1] == "resume=runs/other"
    own = options(text)
    assert (own["signal"], own["open-mode"], own["requeue"]) == ("USR1@120", "append", "")


def test_a_job_of_a_run_that_is_there(requested, tmp_path):
    (tmp_path / "old").mkdir()
    (tmp_path / "old/run.yaml").touch()
    code, text, _ = requested(*SMOKE, "resume=old")
    assert code == 0
    words, _ = values(text, tmp_path)
    assert words[-1] == "resume=old"


def test_an_array_has_a_task_for_each_combination(requested, tmp_path):
    code, text, err = requested(
        "--multirun", *SMOKE, "optimizer.lr=1e-3,1e-2", "seed=1,2", "slurm.parallel=2"
    )
    assert (code, err) == (0, "")
    assert options(text)["array"] == "0-3%2"
    assert options(text)["output"].endswith("/runs/slurm/smoke-%A-%a.log")
    seen = []
    for task in range(4):
        words, _ = values(text, tmp_path, SLURM_ARRAY_JOB_ID="41000", SLURM_ARRAY_TASK_ID=str(task))
        assert words[-2:] == [f"name=mine-41000-{task}", "resume=auto"]
        seen.append(words[-4:-2])
    assert seen == [
        [f"optimizer.lr={lr}", f"seed={seed}"] for lr in ("0.001", "0.01") for seed in (1, 2)
    ]


@pytest.mark.long
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["slurm.partitoin=x"], "slurm.partitoin: there is no such key. Did you mean partition?"),
        (["slurm.time=soon"], "slurm.time=soon is no time limit. Write MINUTES"),
        (["slurm.time=1-2:3:4:5"], "is no time limit"),
        (
            ["slurm.time=2"],
            "slurm.signal_before=120 seconds leave nothing of slurm.time=2 (120 seconds)",
        ),
        (["slurm.cpus_per_task=0"], "slurm.cpus_per_task is 0, but must be int >= 1"),
        (["slurm.memory=much"], "slurm.memory=much is no memory size"),
        (["slurm.partition=a\n#SBATCH --uid=0"], "slurm.partition holds a line break"),
        (["slurm.qos=maybe\x1b[2J"], "slurm.qos holds a line break or another character"),
        (
            ["slurm.extra=[reservation=x]"],
            "slurm.extra has 'reservation=x', but holds options of sbatch",
        ),
        (
            ["slurm.extra=[--signal=B:USR1@10]"],
            "slurm.extra has --signal=B:USR1@10, which slurm.signal_before sets",
        ),
        (["slurm.extra=[-N 4]"], "slurm.extra has -N 4, which lightning.num_nodes sets"),
        (["slurm.parallel=2"], "slurm.parallel=2 is for arrays, which --multirun makes"),
        (["slurm.gpus=-1"], "slurm.gpus is -1, but must be auto | int >= 0"),
        (["slurm=nowhere.yaml"], "slurm=nowhere.yaml cannot be read"),
        (
            ["lightning=auto"],
            "lightning.accelerator=auto: SLURM needs the number of GPUs. Set lightning=gpu",
        ),
        (
            ["lightning=gpu", "lightning.devices=4", "slurm.gpus=2"],
            "slurm.gpus=2, but lightning.devices=4 needs 4",
        ),
        (["lightning.devices=auto"], "lightning.devices=auto: SLURM needs the number"),
        (["seed=1,2"], "seed=1,2: several values need --multirun"),
        (["--multirun"], "--multirun, but no key has several values"),
        (["--multirun", "name=a,b"], "name=a,b: the tasks of an array differ in other things"),
        (
            ["--multirun", "seed=interval(0,9)"],
            "seed=interval(0,9): an array has a task for each value",
        ),
        (
            ["--multirun", "lightning.num_nodes=1,2"],
            "the tasks of an array must need the same nodes and GPUs",
        ),
        (["--multirun", "seed=1,x"], "seed=x: seed is 'x', but must be int >= 0"),
        (["optimiser.lr=1"], "optimiser: there is no such key. Did you mean optimizer?"),
        (["+experiment=smoek"], "smoek"),
        (["seed=["], "seed=["),
        (["resume=never"], "resume=never: a requeued job resumes its run"),
        (["resume=nowhere"], "resume=nowhere: that folder holds no run"),
        (["name=" + "n" * 90], "the job's numbers are added to it"),
        (["name=../x"], "A run's name has at most"),
        (
            ["hydra.run.dir=x"],
            "hydra.run.dir=x: the job has its folder and its launcher from SLURM",
        ),
        (["hydra/launcher=slurm"], "hydra/launcher=slurm: the job has its folder"),
        (["smoke"], "smoke: expected KEY=VALUE"),
        (["--config-dir=nowhere"], "nowhere is no folder"),
        (["--config-dirs=nowhere"], "there is no such option. Did you mean --config-dir?"),
        (["dry=perhaps"], "dry=perhaps: expected true or false"),
    ],
)
def test_what_cannot_run_is_told_before_anything_waits(requested, words, message):
    code, out, err = requested(*SMOKE, *words)
    assert (code, out) == (2, "")
    assert message in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        ("90", 5400),
        ("1:30", 90),
        ("1:30:00", 5400),
        ("2-12", 216000),
        ("2-12:30", 217800),
        ("2-12:30:15", 217815),
        ("0", float("inf")),
    ],
)
def test_limits_are_read_as_sbatch_reads_them(limit, expected):
    assert submission.seconds(limit) == expected


def test_a_file_for_a_cluster(requested, tmp_path):
    (tmp_path / "cluster.yaml").write_text(
        "time: 1:30:00\npartition: 7\ncpus_per_task: 2\nsetup: [module load cuda, 'source"
        " env/bin/activate']\nqos: null\n"
    )
    code, text, _ = requested(*SMOKE, "slurm=cluster.yaml", "slurm.cpus_per_task=3")
    assert code == 0
    actual = options(text)
    # YAML alone reads 5400
    assert (actual["time"], actual["partition"], actual["cpus-per-task"]) == ("1:30:00", "7", "3")
    assert "qos" not in actual
    assert "\nmodule load cuda\nsource env/bin/activate\n" in text
    (tmp_path / "cluster.yaml").write_text("tiem: 3\n")
    assert (
        "slurm.tiem: there is no such key. Did you mean time?"
        in requested(*SMOKE, "slurm=cluster.yaml")[2]
    )
    (tmp_path / "cluster.yaml").write_text("- 3\n")
    assert "a file of KEY: VALUE is expected" in requested(*SMOKE, "slurm=cluster.yaml")[2]


def test_experiments_of_ones_own(requested, tmp_path):
    folder = tmp_path / "my experiments/experiment"
    folder.mkdir(parents=True)
    (folder / "mine.yaml").write_text(
        "# @package _global_\ndefaults: [override /base: tiny, override /lightning: cpu]\nname:"
        " mine\ntask: {path: rows.jsonl}\n"
    )
    for words in (["--config-dir", "my experiments"], ["--config-dir=my experiments"]):
        code, text, err = requested(*words, "+experiment=mine")
        assert (code, err) == (0, "")
        assert values(text, tmp_path)[0][4:6] == [
            f"--config-dir={tmp_path}/my experiments",
            "+experiment=mine",
        ]


TOKEN = "hf_" + "A1b2" * 8


@pytest.mark.long
@pytest.mark.parametrize(
    "word",
    [
        f"base.path={TOKEN}",
        f"logger.wandb.notes={TOKEN}",
        f"slurm.setup=[export HF_TOKEN={TOKEN}]",
        f"slurm.mail={TOKEN}",
        f"slurm.time={TOKEN}",
        f"hf_token={TOKEN}",
        "slurm.setup=[export WANDB_API_KEY=canary-0123456789]",
    ],
)
def test_no_secret_is_written_or_told(requested, monkeypatch, word):
    monkeypatch.setenv("WANDB_API_KEY", "canary-0123456789")
    code, out, err = requested(*SMOKE, "logger=wandb", word)
    assert (code, out) == (2, "")
    assert err
    assert TOKEN not in err
    assert "canary" not in err


def test_without_slurm_it_says_so(requested, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert submit.main([*SMOKE]) == 2
    assert "sbatch was not found: submit on a machine of the cluster" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_what_sbatch_says_is_told(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    programs = tmp_path / "programs"
    programs.mkdir()
    sbatch = programs / "sbatch"
    sbatch.write_text("#!/bin/sh\necho 'invalid partition specified: nowhere' >&2\nexit 1\n")
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    assert submit.main([*SMOKE]) == 2
    assert "sbatch refused the job: invalid partition specified: nowhere" in capsys.readouterr().err
    assert list((tmp_path / "runs/slurm").iterdir()) == []
    sbatch.write_text('#!/bin/sh\ncp "$2" "$0.seen"\necho "17;cluster"\n')
    assert submit.main([*SMOKE]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[0] == "job 17"
    assert "runs/smoke-17\n" in out
    assert "scancel 17" in out
    written = tmp_path / "runs/slurm/smoke-17.sbatch"
    assert written.read_text() == (programs / "sbatch.seen").read_text()
    assert list(written.parent.iterdir()) == [written]


def test_torch_is_not_imported():
    code = (
        "import sys\nfrom trainer import"
        f" submit\nsubmit.main({[*SMOKE, 'dry=true']})\nprint('torch' in sys.modules,"
        " file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.stderr == "False\n"


def test_hydras_launcher_asks_for_what_the_config_says(compose, monkeypatch):
    monkeypatch.setattr("trainer.config.compose.importlib.util.find_spec", lambda name: object())
    cfg = compose(
        *SMOKE,
        "hydra/launcher=slurm",
        "lightning.num_nodes=2",
        "lightning.devices=3",
        "name=mine",
        "hydra.launcher.qos=long",
    )
    launcher = cfg.hydra.launcher
    assert (launcher.nodes, launcher.tasks_per_node, launcher.name, launcher.qos) == (
        2,
        3,
        "mine",
        "long",
    )
    assert launcher.max_num_timeout >= 1  # with 0 submitit fails the job at its first signal
    assert launcher._target_ in forbidden._HYDRA_TARGETS
    fields = pytest.importorskip(
        "hydra_plugins.hydra_submitit_launcher.config"
    ).SlurmQueueConf.__dataclass_fields__
    assert set(launcher) <= set(fields)


def test_without_hydras_launcher_it_says_how_to_get_it(compose, monkeypatch):
    monkeypatch.setattr("trainer.config.compose.importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        ConfigError, match=r"hydra/launcher=slurm needs .* pip install 'hydra-submitit-launcher"
    ):
        compose(*SMOKE, "hydra/launcher=slurm")
