"""The real programs, started by forking this process after all imports, so that a start takes no
seconds for imports. Before the fork torch has computed nothing and started no thread, so a fork
computes the same as a new process. The harness compares the two (trial `process`).
"""

from __future__ import annotations

import contextlib
import importlib
import mmap
import os
import re
import runpy
import signal
import struct
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline"}
IMPORTED = (
    "trainer.run",
    "trainer.respond",
    "trainer.cooldown",
    "trainer.training.distill",
    "trainer.session.failures",
    "trainer.callbacks.averaging",
    "trainer.callbacks.cooldown",
    "trainer.callbacks.progress",
    "trainer.callbacks.checkpoints",
    "trainer.drafters.eagle3",
    "trainer.drafters.sequential",
    "trainer.schedules.cooldown",
    "adapters.lora",
    "adapters.rosa",
    "adapters.spiel",
    "tasks.sft",
    "torch._dynamo",
    "transformers.models.llama.modeling_llama",
    "peft",
    "safetensors.torch",
    "matplotlib.pyplot",
    "trainer.report",
    "trainer.compress",
    "trainer.exporting.compact",
    "trainer.export",
    "trainer.exporting.formats",
)
PHASES = (
    "starting",
    "tokenising",
    "caching features",
    "training",
    "making the mask",
    "reselecting",
    "cooling down",
    "saving",
    "evaluating",
    "exporting",
    "regenerating",
    "comparing",
    "compressing",
    "requeueing",
)


class Marks:
    """The current phase of a child, and how often each phase began, in memory that it shares with
    this process and that outlives the child."""

    def __init__(self) -> None:
        self.memory = mmap.mmap(-1, 4 * (len(PHASES) + 1))

    def _get(self, place: int) -> int:
        return struct.unpack_from("I", self.memory, 4 * place)[0]

    @property
    def phase(self) -> str:
        return PHASES[self._get(0)]

    def count(self, phase: str) -> int:
        return self._get(1 + PHASES.index(phase))

    def enter(self, phase: str) -> None:
        place = PHASES.index(phase)
        struct.pack_into("I", self.memory, 4 * (1 + place), self._get(1 + place) + 1)
        struct.pack_into("I", self.memory, 0, place)


class Child:
    """A started program: `wait` for its exit code, which is -N for signal N, or `kill` it with all
    its children."""

    def __init__(self, pid: int, log: Path, marks: Marks, before: int):
        self.pid, self.log, self.marks, self.before = pid, log, marks, before
        self.code: int | None = None

    def poll(self) -> int | None:
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
        return self.code

    def wait(self, seconds: float = 300.0, every: float = 0.01) -> int | None:
        """Return the exit code; None if it takes longer, and the child is killed."""
        until = time.monotonic() + seconds
        while self.poll() is None:
            if time.monotonic() > until:
                self.kill()
                return None
            time.sleep(every)
        return self.code

    def _send(self, number: int) -> None:
        # the child has its process group only after its first lines
        for send in (os.killpg, os.kill):
            with contextlib.suppress(ProcessLookupError):
                send(self.pid, number)

    def stop(self) -> None:
        """Stop the child with all its children, so that its phase does not change."""
        self._send(signal.SIGSTOP)
        time.sleep(0.002)

    def resume(self) -> None:
        """Let a stopped child continue."""
        self._send(signal.SIGCONT)

    def kill(self) -> None:
        self._send(signal.SIGKILL)
        while self.poll() is None:
            time.sleep(0.001)

    def output(self) -> str:
        if not self.log.exists():
            return ""
        return self.log.read_bytes()[self.before :].decode("utf-8", errors="replace")

    def message(self, *parts: str) -> str:
        """Return the message that contains all these parts, in one line; "" if there is none."""
        messages = re.split(
            r"^(?=(?:DEBUG|INFO|WARNING|ERROR|CRITICAL|Traceback) )",
            self.output(),
            flags=re.MULTILINE,
        )
        unfolded = (" ".join(message.split()) for message in messages)
        return next((message for message in unfolded if all(part in message for part in parts)), "")


def ready() -> None:
    """Import what the programs need.

    Raises:
        RuntimeError: a library has started threads, which a fork would lose.
    """
    os.environ |= ENVIRONMENT
    import torch

    torch.set_num_threads(1)
    for name in IMPORTED:
        importlib.import_module(name)
    names = [
        (Path("/proc/self/task") / thread / "comm").read_text().strip()
        for thread in os.listdir("/proc/self/task")
    ]
    # The threads of jemalloc, which pyarrow contains, survive a fork.
    if others := [
        name for name in names if not name.startswith(("python", "jemalloc", "pytest", "gpy"))
    ]:
        raise RuntimeError(f"this process has threads that a fork would lose: {', '.join(others)}")


def start(
    module: str,
    arguments: list[str],
    log: Path,
    environment: dict[str, str] | None = None,
    before: Callable[[], None] | None = None,
) -> Child:
    """Run `python -m MODULE ARGUMENTS` in a fork. `before` is called in it first, to break
    something only there."""
    marks = Marks()
    length = log.stat().st_size if log.exists() else 0  # by earlier starts
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return Child(pid, log, marks, length)
    code = 70
    try:
        os.setsid()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for stream in (1, 2):
            os.dup2(descriptor, stream)
        sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
        os.environ |= environment or {}
        tempfile.tempdir = None  # which the first use has settled
        note(marks)
        if before is not None:
            before()
        code = ran(module, arguments)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    raise AssertionError


def ran(module: str, arguments: list[str]) -> int:
    """Run a program in this process; return its exit code."""
    sys.argv = [module, *arguments]
    try:
        # a command: run as __main__ it would be a second copy, without the patches of `note`
        if module != "trainer":
            return importlib.import_module(module).main(arguments)
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        if isinstance(end.code, int):
            return end.code
        if end.code is not None:
            print(end.code, file=sys.stderr)
        return 0 if end.code is None else 1
    return 0


def phases() -> list[tuple[Any, str, str]]:
    """Return (owner, name of a function, phase that runs within it)."""
    from adapters import rosa, spiel
    from trainer.assembly import rows as data_rows
    from trainer.callbacks import checkpoints, evaluation
    from trainer.cluster import slurm_job
    from trainer.data import hidden_states
    from trainer.evaluation import answer_prompts, responses
    from trainer.exporting import compact, formats, merged
    from trainer.session import report_html, results
    from trainer.storage import answers
    from trainer.training import lightning_trainer

    return [
        (data_rows, "tokenise", "tokenising"),
        (hidden_states, "write", "caching features"),
        (rosa.RoSAAdapter, "_set_supports", "making the mask"),
        (spiel.SpIEL, "_reselect", "reselecting"),
        (checkpoints.Checkpoints, "_prune", "saving"),
        (lightning_trainer.AtomicCheckpointIO, "save_checkpoint", "saving"),
        (evaluation.Evaluation, "run", "evaluating"),
        (results, "save_adapter", "exporting"),
        (results, "save_drafter", "exporting"),
        (report_html, "write", "exporting"),
        (answer_prompts, "write", "regenerating"),
        (responses, "respond", "regenerating"),
        (answers.AnswersFolder, "add", "saving"),
        (formats, "_write", "exporting"),
        (formats, "verify_adapter", "comparing"),
        (merged, "outputs", "comparing"),
        (compact, "save_adapter", "exporting"),
        (compact, "compressed", "compressing"),
        (compact, "verify_adapter", "comparing"),
        (slurm_job, "exit_code", "requeueing"),
    ]


def note(marks: Marks) -> None:
    """Patch this process to record its phases. Must be called in a child."""
    marks.enter("starting")
    from trainer.session import branches
    from trainer.training import finetune

    def within(owner: Any, name: str, phase: str) -> None:
        whole = getattr(owner, name)

        def noted(*args: Any, **named: Any) -> Any:
            before = marks.phase
            marks.enter(phase)
            try:
                return whole(*args, **named)
            finally:
                struct.pack_into("I", marks.memory, 0, PHASES.index(before))

        setattr(owner, name, noted)

    for owner, name, phase in phases():
        within(owner, name, phase)
    whole = finetune.FineTune.on_train_batch_start

    def step(self: Any, batch: Any, batch_idx: int) -> None:
        marks.enter(phase_of(self))
        whole(self, batch, batch_idx)

    finetune.FineTune.on_train_batch_start = step  # type: ignore[method-assign]

    def finished(command: list[str]) -> int:
        pid = os.fork()
        if pid == 0:
            os._exit(ran(command[2], command[3:]))
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    branches.finished = finished


def phase_of(module: Any) -> str:
    """Return the phase that a training step belongs to."""
    from adapters.rosa import RoSAAdapter
    from adapters.spiel import SpIEL

    adapter = module.adapter
    if isinstance(adapter, RoSAAdapter) and adapter.warmup_steps <= module.step < adapter.mask_step:
        return "making the mask"
    if isinstance(adapter, SpIEL) and adapter.candidates:
        return "reselecting"
    return "training" if module.runtime_cooldown is None else "cooling down"
