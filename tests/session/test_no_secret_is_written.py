"""Files of a run and of a job hold no secret."""

from __future__ import annotations

import subprocess

from tests.conftest import write_rows
from tests.toys.secrets import SECRETS
from trainer import submit

COMMON = ("experiment=smoke", "task.path=rows.jsonl", "max_steps=1")


def test_no_byte_of_a_run_holds_a_secret(warm_program, tmp_path):
    write_rows(tmp_path / "rows.jsonl", [{"prompt": f"{i}", "completion": "x"} for i in range(20)])
    remote = "https://me:ghp_remoteCANARYremoteCANARYremoteCANARY@host/a/b.git"
    for words in (["init", "--quiet"], ["remote", "add", "origin", remote]):
        subprocess.run(["git", *words], cwd=tmp_path, check=True)
    visible = "a note that is meant to be seen"
    done = warm_program(
        *COMMON,
        "logger=[wandb,tensorboard]",
        "logger.wandb.mode=offline",
        f"logger.wandb.notes='{visible}'",
        "max_steps=2",
        env=SECRETS | {"HOME": str(tmp_path)},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    run = tmp_path / "runs" / "smoke"
    written = {
        path: path.read_bytes()
        for path in tmp_path.rglob("*")
        if path.is_file() and path.name != "rows.jsonl" and ".git" not in path.parts
    }
    (upload,) = run.glob("wandb/offline-run-*/*.wandb")
    assert visible.encode() in written[upload]  # so that what W&B would upload can be searched
    assert {"run.yaml", "trainer.log", "metrics.jsonl", "report.html"} <= {
        path.name for path in written
    }
    for secret in [
        *SECRETS.values(),
        "canaryCANARY",
        "remoteCANARY",
        SECRETS["WANDB_API_KEY"][:20],
    ]:
        assert [path for path, content in written.items() if secret.encode() in content] == []
        assert secret not in done.stdout + done.stderr


def test_a_jobs_script_holds_no_secret(canary, monkeypatch, capsys):
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    write_rows(canary.parent / "rows.jsonl", [{"prompt": "a", "completion": "b"}])
    words = ["experiment=smoke", "task.path=rows.jsonl", "lightning=cpu", "dry=true"]
    assert submit.main(words) == 0
    message = capsys.readouterr()
    assert "#SBATCH" in message.out
    for more in (
        f"slurm.extra=['--comment={SECRETS['HF_TOKEN']}']",
        f"slurm.setup=['export K={SECRETS['SOME_PASSWORD']}']",
    ):
        assert submit.main([*words, more]) == 2
        refused = capsys.readouterr()
        message = type(message)(message.out + refused.out, message.err + refused.err)
    assert not any(secret in message.out + message.err for secret in SECRETS.values())
    assert [path.name for path in canary.parent.rglob("*.sbatch")] == []
