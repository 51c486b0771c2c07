"""A loading process that does not answer, or is gone, ends the wait for it with a message."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time

import pytest
import torch

from trainer.data.loader import Loader, LoadingError
from trainer.session.failures import explained


class Struck(torch.utils.data.Dataset):
    """Rows of one number; the process that reads row `at` gets a signal."""

    def __init__(self, at=None, number=None):
        self.at, self.number = at, number

    def __len__(self):
        return 8

    def __getitem__(self, index):
        if index == self.at:
            if isinstance(self.number, Exception):
                raise self.number
            os.kill(os.getpid(), self.number)
        return torch.tensor([index])


@pytest.mark.long
@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("minutes", [0, 5])
def test_batches_are_those_of_a_plain_loader(workers, minutes):
    loader = Loader(Struck(), batch_size=2, num_workers=workers, minutes=minutes)
    for _ in range(2):  # a loader can be iterated again
        assert [batch.tolist() for batch in loader] == [
            [[0], [1]],
            [[2], [3]],
            [[4], [5]],
            [[6], [7]],
        ]


@pytest.mark.long
@pytest.mark.parametrize("at", [0, 5])
def test_a_process_that_stops_is_ended_and_told(at):
    began = time.monotonic()
    with pytest.raises(LoadingError, match=r"has not responded for loading_timeout=0\.03 minutes"):
        list(Loader(Struck(at, signal.SIGSTOP), batch_size=2, num_workers=1, minutes=0.03))
    assert time.monotonic() - began < 60
    assert not multiprocessing.active_children()  # for which this process would wait at its end


def test_a_process_that_was_killed_is_told():
    with pytest.raises(RuntimeError) as refusal:
        list(Loader(Struck(3, signal.SIGKILL), batch_size=2, num_workers=1, minutes=0))
    text, code = explained(refusal.value, {})
    assert code == 1
    assert "was killed from outside, most likely out of memory (DataLoader worker (pid" in text


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_of_the_rows_own_stays_what_it_is(workers):
    with pytest.raises(ZeroDivisionError, match="of row 3"):
        list(
            Loader(
                Struck(3, ZeroDivisionError("of row 3")),
                batch_size=2,
                num_workers=workers,
                minutes=1,
            )
        )
