"""Two processes of a group, as a test of what they agree on needs them."""

from __future__ import annotations

import faulthandler
import gc
import shutil
import signal
import tempfile
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch


def spawn(work: Callable[[int, Path], None], folder: Path, processes: int = 2) -> None:
    """Call work(rank, folder) in so many new processes of one gloo group; raises what one of them
    raised.

    They are spawned: a fork hangs in threads that earlier tests have left. If SIGSEGV ends one,
    they start again, once, with the folder as it was: the kernel's log had two crashes of torch's
    thread pt_gloo_runloop, in malloc, within 20 hours of tests (torch 2.13). What always crashes
    still fails.
    """
    with tempfile.TemporaryDirectory() as temporary:
        before = shutil.copytree(folder, Path(temporary) / "before", symlinks=True)
        try:
            torch.multiprocessing.spawn(_member, (work, folder, processes), nprocs=processes)
        except torch.multiprocessing.ProcessExitedException as error:
            if error.exit_code != -signal.SIGSEGV:
                raise
            warnings.warn(f"started again: {error}", stacklevel=2)
            shutil.rmtree(folder)
            shutil.copytree(before, folder, symlinks=True)
            torch.multiprocessing.spawn(_member, (work, folder, processes), nprocs=processes)


def _member(rank: int, work: Callable[[int, Path], None], folder: Path, processes: int) -> None:
    faulthandler.enable()  # a crash names its line
    faulthandler.dump_traceback_later(400, exit=True)
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=processes,
        timeout=timedelta(minutes=2),
    )
    work(rank, folder)
    # torch's Reducer holds the group and, where it is the last to, ends the group's threads with
    # the GIL in its hand, for which one of them may wait. So what work has left must be gone before
    # the group is.
    gc.collect()
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
