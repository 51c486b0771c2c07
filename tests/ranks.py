"""Two processes of a group, as a test of what they agree on needs them."""

from __future__ import annotations

import faulthandler
import gc
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch


def spawn(work: Callable[[int, Path], None], folder: Path, processes: int = 2) -> None:
    """Call work(rank, folder) in so many new processes of one gloo group; raises what one of them
    raised.

    They are spawned: a fork hangs in threads that earlier tests have left.
    """
    torch.multiprocessing.spawn(_member, (work, folder, processes), nprocs=processes)


def _member(rank: int, work: Callable[[int, Path], None], folder: Path, processes: int) -> None:
    faulthandler.enable()  # a crash names its line
    faulthandler.dump_traceback_later(200, exit=True)
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
