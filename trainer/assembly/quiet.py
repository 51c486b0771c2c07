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
    # on a login node a run without srun is intended
    warnings.filterwarnings("ignore", message=".*`srun` command is available.*")
    # it is resumable: the sampler starts where the run stopped
    warnings.filterwarnings("ignore", message=".*dataloader is not resumable.*")
    # true for several readers; a stream has one
    warnings.filterwarnings("ignore", message=".*IterableDataset. has .__len__. defined.*")
    # a frozen target stays in eval mode on purpose
    warnings.filterwarnings("ignore", message=r".*module\(s\) in eval mode.*")
    # from PEFT's prompt methods, about the positions that generate itself passes
    warnings.filterwarnings("ignore", message="Position ids are not supported.*")
    warnings.filterwarnings(
        "ignore", message="(?s).*FSDP2-wrapped module .* returned a view tensor.*"
    )  # the view is of logits that are not used
    warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning)
    # PEFT's prefixes, with transformers 5.24
    warnings.filterwarnings(
        "ignore", message=".past_key_values. is deprecated.*", category=FutureWarning
    )
    # PEFT reads that attribute
    warnings.filterwarnings(
        "ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning
    )
