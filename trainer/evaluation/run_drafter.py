"""A run's model with the drafter that a command names, checked before the weights are loaded."""

from __future__ import annotations

import torch

from tasks.reading import DataError
from trainer.assembly import trained
from trainer.assembly.build import instantiate
from trainer.assembly.chosen_drafter import check_drafter, drafter_of
from trainer.assembly.trained import Trained
from trainer.config.decoding_options import DrafterOptions
from trainer.drafters import Drafter, DrafterError
from trainer.storage import run_folder


def load_run_and_drafter(path: str, options: DrafterOptions) -> tuple[Trained, Drafter]:
    """Load a run's model and the requested drafter.

    Raises:
        DataError: the run writes no text.
        DrafterError: it has no drafter that proposes tokens. Others: see load_trained.
    """
    _, content, _ = run_folder.read(path)
    if content["identity"]["labels"] is not None:
        raise DataError("this run trained a classifier, which writes no text. Use: graft evaluate")
    check_drafter(content["config"], path, options)
    base = instantiate(content["config"]["base"])
    if base.decoder_start is not None:
        raise DrafterError(
            f"{base.path} is an encoder-decoder: a drafter continues the sequence that the model"
            " reads, and its decoder writes another one. Use: graft evaluate, or graft generate"
        )
    run = trained.load_trained(path, "cuda" if torch.cuda.is_available() else "cpu")
    drafter = drafter_of(run, options)
    if drafter is None:
        raise DrafterError(
            f"the drafter of run={path} only shapes the adapter, and proposes no tokens"
        )
    return run, drafter
