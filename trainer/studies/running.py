"""Run the pieces of a study as processes, several at once, and record what they give."""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import json
import os
import shlex
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from trainer.config import files
from trainer.config.errors import ConfigError
from trainer.config.limits import load_yaml
from trainer.config.shown import say
from trainer.storage import atomic, checkpoints, journal
from trainer.studies import progress
from trainer.studies.pieces import UNTESTED, Piece, Results, missing
from trainer.studies.plan import Study

WAIT = 0.5  # seconds between two looks at a run that still has a process
REPORT = 300  # seconds between lines about the runs, while none ends
TAIL = 2000  # characters of a failed run's log that its result keeps


@dataclass
class Runner:
    """Runs pieces of a study; `gpus` are the devices that processes take turns in using."""

    study: Study
    parallel: int = 1
    threads: int | None = None
    gpus: list[str] = field(default_factory=list)
    minutes: float | None = None
    stopping: bool = False
    processes: set[Any] = field(default_factory=set)
    free_gpus: list[str] = field(default_factory=list)

    def run(self, results: Results) -> None:
        """Run what is missing, until nothing is, or the minutes are over. A piece that fails is
        recorded and does not end the study."""
        began = time.monotonic()
        self.free_gpus = list(self.gpus)
        running: dict[Future[dict[str, Any]], str] = {}
        with self._stops_processes(), ThreadPoolExecutor(self.parallel) as pool:
            while True:
                over = self.minutes is not None and time.monotonic() - began > 60 * self.minutes
                for piece in missing(self.study, results):
                    if over or self.stopping or len(running) >= self.parallel:
                        break
                    if piece.key not in running.values():
                        before = results.get(piece.key)
                        running[pool.submit(self.piece, piece, before)] = piece.key
                if not running:
                    return
                ended = wait(running, REPORT, return_when=FIRST_COMPLETED).done
                if not ended:
                    say(
                        progress.line(self.study.folder, running.values(), len(results)), flush=True
                    )
                for done in ended:
                    key = running.pop(done)
                    if self.stopping:
                        continue
                    results[key] = done.result()
                    say(_line(key, results[key]), flush=True)

    def one(self, piece: Piece, results: Results) -> dict[str, Any]:
        """Run one piece alone, as a job does. Signals reach its process."""
        with self._stops_processes():
            return self.piece(piece, results.get(piece.key))

    def piece(self, piece: Piece, before: dict[str, Any] | None = None) -> dict[str, Any]:
        """Run one piece, and write its result. One that is trained, with the result `before`, is
        only tested."""
        words, folder = piece.words(self.study), self.study.folder
        gpu = self.free_gpus.pop() if self.free_gpus else None
        log = folder / "logs" / f"{piece.key}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        result: dict[str, Any] = {"piece": asdict(piece), "words": words, "log": str(log)}
        if not piece.searches:
            result["tests"] = piece.tests(self.study)
        saved = checkpoints.complete(folder / "runs" / piece.key / "checkpoints")
        trained = before if saved and UNTESTED in (before or {}) else None
        doing = "started" if trained is None else "testing"
        say(f"{piece.key}: {doing}, its log is {log}", flush=True)
        try:
            if trained is None:
                self._wait_for_earlier(piece)
                code, peak = self._call([*words, *self._place(piece)], log, gpu)
            else:
                code, peak = 0, trained["peak_bytes"]
            if code == 0 and not piece.searches:
                code, _ = self._call(self._evaluation(piece), log, gpu, "trainer.evaluate")
            if code == 0:
                result |= self._numbers(piece, peak)
            else:
                text = log.read_text("utf-8", "replace")
                result |= {"failed": code, "message": text[-TAIL:]}
                # it still counts in the search for rates
                result |= {} if trained is None else {"validation": trained["validation"]}
        finally:
            if gpu is not None:
                self.free_gpus.append(gpu)
        if not self.stopping:
            (folder / "pieces").mkdir(exist_ok=True)
            text = json.dumps(result, indent=1)
            atomic.write_text(folder / "pieces" / f"{piece.key}.json", text)
        return result

    def _wait_for_earlier(self, piece: Piece) -> None:
        """Wait while the piece's run has a process: one that was left when a study was killed ends
        by itself. Its run is then resumed, and is no failure."""
        file = self.study.folder / "runs" / piece.key / ".lock"
        waited = False
        while file.exists() and not self.stopping:
            with file.open("rb") as lock, contextlib.suppress(BlockingIOError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            if not waited:
                say(f"{piece.key}: waiting for its process of an earlier start", flush=True)
            waited = True
            time.sleep(WAIT)

    def _place(self, piece: Piece) -> list[str]:
        threads = [] if self.threads is None else [f"threads={self.threads}"]
        runs = self.study.folder / "runs"
        return [*threads, f"name={piece.key}", f"runs={runs}", "resume=auto"]

    def _evaluation(self, piece: Piece) -> list[str]:
        run = self.study.folder / "runs" / piece.key
        return [
            f"run={run}",
            *piece.tests(self.study),
            f"batch_size={self.study.data[piece.data].batch_size}",
            f"json={run}/test.json",
            f"rows={run}/test_rows.jsonl",
        ]

    def _call(
        self, words: list[str], log: Path, gpu: str | None, module: str = "trainer"
    ) -> tuple[int, int]:
        """Run a command. Return its exit code and its peak memory in bytes."""
        command = [sys.executable, "-m", module, *words]
        environment = dict(os.environ)
        if gpu is not None:
            environment["CUDA_VISIBLE_DEVICES"] = gpu
        if self.threads is not None:
            environment |= {"OMP_NUM_THREADS": str(self.threads)}
        with files.append(log) as file:
            file.write(shlex.join(["python", *command[1:]]) + "\n")
            file.flush()
            if self.stopping:
                return 130, 0
            # A session of its own, so that Ctrl-C reaches it once, from here.
            process = subprocess.Popen(
                command, stdout=file, stderr=file, env=environment, start_new_session=True
            )
            self.processes.add(process)
            try:
                _, status, usage = os.wait4(process.pid, 0)
            finally:
                self.processes.discard(process)
            process.returncode = os.waitstatus_to_exitcode(status)
        return process.returncode, usage.ru_maxrss * 1024

    def _numbers(self, piece: Piece, peak: int) -> dict[str, Any]:
        """Collect the numbers of a finished run."""
        run = self.study.folder / "runs" / piece.key
        rows = list(journal.read(run / "metrics.jsonl"))
        seconds = [row["seconds"] for row in rows if row["kind"] == "step"]
        evaluations = [row for row in rows if row["kind"] == "evaluation"]
        steps = [b - a for a, b in itertools.pairwise(seconds)]
        adapter = run / "adapter"
        sizes = [f.stat().st_size for f in adapter.rglob("*.safetensors")]
        preflight = json.loads((run / "preflight.json").read_text("utf-8"))
        result: dict[str, Any] = {
            "validation": _measured(_of_result(run, evaluations)),
            "steps": max((row["step"] for row in rows if row["kind"] == "step"), default=0),
            "step_seconds": statistics.median(steps) if steps else None,
            "seconds": seconds[-1] if seconds else 0.0,
            "parameters": preflight["model"]["trainable"],
            "total_parameters": preflight["model"]["parameters"],
            "peak_bytes": max((int(1e9 * row.get("memory_gb", 0)) for row in rows), default=0)
            or peak,
            "adapter_bytes": sum(sizes) if sizes else None,
        }
        if (run / "test.json").exists():
            result["test"] = json.loads((run / "test.json").read_text("utf-8"))["adapted"]
        if not self.study.keep:
            for path in (run / "checkpoints").glob("step-*"):
                path.unlink()
        return result

    @contextlib.contextmanager
    def _stops_processes(self) -> Iterator[None]:
        """Let a signal end the runs, which save, and then the study."""

        def stop(number: int, _: Any) -> None:
            if number != signal.SIGUSR1:
                self.stopping = True
            for process in list(self.processes):
                with contextlib.suppress(ProcessLookupError):
                    # not send_signal, which would take the exit status from os.wait4
                    os.kill(process.pid, number if number != signal.SIGINT else signal.SIGTERM)

        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
        before = {number: signal.signal(number, stop) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a study's folder.

    Raises:
        ConfigError: another process runs the study.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigError(
                f"{folder}: another process runs this study. Wait for it, or give another name"
            ) from None
        yield


def forget_failures(study: Study, results: Results, forget: Callable[[Path], None]) -> None:
    """Remove the results of pieces that failed, so that they are tried again."""
    for key in [key for key, result in results.items() if "failed" in result]:
        del results[key]
        forget(study.folder / "pieces" / f"{key}.json")


def _of_result(run: Path, evaluations: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the evaluation of the checkpoint that is the run's result; {} if there is none."""
    if not evaluations:
        return {}
    export = load_yaml(run / "run.yaml")["config"].get("export")
    best = checkpoints.marked(run / "checkpoints", "best") if export == "best" else None
    step = evaluations[-1]["step"] if best is None else best.step
    return next((row for row in reversed(evaluations) if row["step"] == step), evaluations[-1])


def _measured(row: dict[str, Any]) -> dict[str, float]:
    return {key: value for key, value in row.items() if key not in ("kind", "step", "seconds")}


def _line(key: str, result: dict[str, Any]) -> str:
    if "failed" in result:
        last = result["message"].strip().rpartition("\n")[2]
        return f"{key}: failed with {result['failed']}: {last[:200]}"
    loss = result["validation"].get("loss")
    shown = "" if loss is None else f"validation loss {loss:.4f}, "
    return f"{key}: {shown}{result['steps']} steps in {result['seconds'] / 60:.1f} minutes"
