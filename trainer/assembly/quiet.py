"""Silence library warnings that appear at every start and that users cannot act on."""

from __future__ import annotations

import logging
import os
import warnings

import rich


def quiet() -> None:
    """Set log levels and warning filters of the libraries."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    for name in (
        "bitsandbytes",
        "datasets",
        "lightning",
        "lightning.pytorch",
        "lightning.fabric",
        "torch.utils.flop_counter",
    ):
        logging.getLogger(name).setLevel(logging.ERROR)
    # Lightning prints in addition to the configured logging
    logging.getLogger("lightning.pytorch").handlers.clear()
    if not rich.get_console().is_terminal:
        rich.get_console().width = 160  # a log file's lines, not a terminal's
    import datasets
    import transformers

    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    # on a login node nobody wants srun
    warnings.filterwarnings("ignore", message=".*`srun` command is available.*")
    # the sampler starts where the run stopped
    warnings.filterwarnings("ignore", message=".*dataloader is not resumable.*")
    # a stream has one reader
    warnings.filterwarnings("ignore", message=".*IterableDataset. has .__len__. defined.*")
    # a frozen target stays in it
    warnings.filterwarnings("ignore", message=r".*module\(s\) in eval mode.*")
    # PEFT's prompts; it drops generate's own
    warnings.filterwarnings("ignore", message="Position ids are not supported.*")
    warnings.filterwarnings(
        "ignore", message="(?s).*FSDP2-wrapped module .* returned a view tensor.*"
    )  # of logits that are not used
    warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning)
    # PEFT asks for it
    warnings.filterwarnings(
        "ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning
    )
