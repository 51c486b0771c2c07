"""The drafter that a command line names, and how its answers are drawn."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from tests.toys import adapters as toys
from trainer.assembly.chosen_drafter import check_drafter, drafter_of, generation_config
from trainer.config.decoding_options import DrafterOptions
from trainer.drafters import DrafterError
from trainer.drafters.lookup import PromptLookup
from trainer.drafters.recycling import TokenRecycling

OWN = DrafterOptions(drafter="run")


class Proposes(nn.Linear):
    proposes = True


def trained(drafter, dtype=torch.float32):
    return SimpleNamespace(model=toys.llama(dtype), drafter=drafter, base=None)


def test_greedy_answers_take_no_chances():
    config = generation_config(0.0, 0.9, 7, [2, 5], 0, num_beams=1)
    assert not config.do_sample
    assert (config.max_new_tokens, config.eos_token_id, config.pad_token_id) == (7, [2, 5], 0)


def test_sampling_draws_from_all_tokens_and_not_from_the_50_likeliest():
    config = generation_config(0.5, 0.9, 7, [2], 0)
    assert (config.do_sample, config.temperature, config.top_p, config.top_k) == (True, 0.5, 0.9, 0)


@pytest.mark.parametrize("name", ["lookup", "recycling", "small"])
def test_a_run_without_a_drafter_takes_one_that_needs_no_training(name):
    check_drafter({"drafter": None}, "runs/x", DrafterOptions(drafter=name))
    check_drafter({"drafter": {"_target_": "x"}}, "runs/x", OWN)
    with pytest.raises(DrafterError, match="run=runs/x has no drafter"):
        check_drafter({"drafter": None}, "runs/x", OWN)


def test_the_named_drafter_is_made():
    run = trained(None)
    assert isinstance(drafter_of(run, DrafterOptions(drafter="lookup")), PromptLookup)
    assert isinstance(drafter_of(run, DrafterOptions(drafter="recycling")), TokenRecycling)
    assert drafter_of(run, OWN) is None


def test_the_runs_drafter_computes_in_the_targets_dtype():
    drafter = Proposes(2, 2)
    actual = drafter_of(trained(drafter, torch.bfloat16), OWN)
    assert actual is drafter
    assert actual.weight.dtype == torch.bfloat16
    drafter.proposes = False  # registers: they take part in training alone
    assert drafter_of(trained(drafter), OWN) is None
