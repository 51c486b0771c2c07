"""Phases of a run in which a penalty acts."""

from __future__ import annotations

import lightning
import pytest
import torch

from tests.toys import adapters as toys
from tests.toys.finetuning import Run, adapted
from trainer.models.base import BaseError
from trainer.penalties.deft import DensityDEFT
from trainer.penalties.phase import Phase


def shares(start, end, ramp, steps=10):
    phase = Phase(start, end, ramp)
    return [round(phase.share(step, steps), 6) for step in range(steps)]


def test_shares_of_the_weight():
    assert shares(0.0, 1.0, 0.0) == [1.0] * 10
    assert shares(0.2, 0.7, 0.0) == [0.0] * 2 + [1.0] * 5 + [0.0] * 3
    assert shares(0.2, 0.8, 0.2) == [0, 0, 0, 0.5, 1, 1, 1, 0.5, 0, 0]
    # no ramp at a side of the whole run
    assert shares(0.0, 0.6, 0.2) == [1, 1, 1, 1, 1, 0.5, 0, 0, 0, 0]
    assert shares(0.4, 1.0, 0.4) == [0] * 4 + [0, 0.25, 0.5, 0.75, 1, 1]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((0.5, 0.5, 0.0), r"penalty\.start=0\.5 and penalty\.end=0\.5: expected 0 <= start < end"),
        ((0.8, 0.2, 0.0), "expected 0 <= start"),
        ((0.2, 0.4, 0.2), r"penalty\.ramp=0\.2: .*no room for 2 of them"),
    ],
)
def test_phases_that_cannot_be(values, message):
    with pytest.raises(BaseError, match=message):
        Phase(*values)


def test_the_term_has_the_strength_of_its_step():
    model = toys.llama()

    def measured(strength):
        penalty = DensityDEFT(
            model, 0.7, "rational", 0.04, "uniform", "auto", 2, start=0.25, end=0.75
        )
        penalty.strength = strength
        penalty.open((torch.ones(4, 12, dtype=torch.bool),))
        model(input_ids=toys.IDS)
        value, density, _ = penalty.term()
        penalty.close()
        return float(value.detach()), density

    full, density = measured(1.0)
    half, same = measured(0.5)
    assert torch.equal(density, same)  # measured in any phase
    assert full == pytest.approx(0.7 * float(density.mean()))
    assert half == pytest.approx(full / 2)
    assert measured(0.0)[0] == 0.0


def test_a_run_sets_the_strength_of_each_step(tmp_path):
    adapter, model = adapted()
    strengths = []

    class Recorded(DensityDEFT):
        def open(self, real):
            strengths.append(self.strength)
            super().open(real)

    penalty = Recorded(model, 0.7, "rational", 0.04, "uniform", "auto", 2, start=0.5)
    run = Run(tmp_path, ["batch_size=2"])

    class Sets(lightning.Callback):
        def setup(self, trainer, module, stage):
            module.penalty = penalty

    run.fit(adapter, model, Sets(), steps=4)
    assert strengths == [0.0, 0.0, 1.0, 1.0]
