"""Checks of the config against the base's own config, before rows are read."""

from __future__ import annotations

from typing import Any

from adapters.delta import Adapter
from trainer.assembly import continued
from trainer.drafters import DrafterError, io
from trainer.models import prequantised
from trainer.models.base import Base, BaseError
from trainer.speed import liger
from trainer.storage import run_folder
from trainer.training import heal

# tasks that give a label to a text
LABELLED = ("tasks.classification.", "tasks.regression.", "tasks.multi_label.")


def refuse_early(config: dict[str, Any], base: Base, adapter: Adapter) -> None:
    """Check everything that needs no row.

    Raises:
        BaseError: lists every fault.
        AdapterError: the adapter names a module that the base does not have, or `adapter.from` does
            not fit.
    """
    faults: list[str] = []
    if config["max_length"] > base.longest:
        faults.append(
            f"max_length={config['max_length']} is more than the {base.longest} tokens that"
            f" {base.path} supports: set max_length={base.longest}"
        )
    faults += target_faults(config, base)
    labelled = config["task"]["_target_"].startswith(LABELLED)
    if (teacher := config["objective"].get("teacher")) is not None:
        fault = heal.fault(base, teacher, labelled)
        faults += [fault] if fault is not None else []
    window = config["objective"]["context_window"]
    if window is not None and base.config.is_encoder_decoder:
        faults.append(
            f"objective.context_window={window}: {base.path} reads its prompts with an encoder,"
            " which has no keys and values to keep: set objective.context_window=null"
        )
    # Whether the device allows it is checked by the run: this may be another machine.
    fault = liger.fault(base.config.model_type) if config["fused"] == "liger" else None
    faults += [fault] if fault is not None else []
    if config["lightning"]["strategy"] == "fsdp2":
        fault = prequantised.sharding_fault(base.config)
        faults += [f"base {base.path!r} {fault}"] if fault is not None else []
    if faults:
        raise BaseError("\n".join(faults))
    continued.check(config, base, adapter)
    if adapter.names_modules:
        adapter.check_names(base.skeleton(["0", "1"] if labelled else None))


def target_faults(config: dict[str, Any], base: Base) -> list[str]:
    """Check that the target run and the first drafter have this run's base."""
    try:
        if (run := config["target"]["run"]) is not None and run_folder.read(run)[1]["identity"][
            "base"
        ] != base.fingerprint:
            return [
                f"target.run={run}: {base.path} is not the model that this run was trained on: its"
                " weights have changed. Restore them, or train that run again"
            ]
        if config["target"]["draft"] is not None and config["drafter"]:
            io.check(io.folder_of(config["target"]["draft"]), base, config["drafter"])
    except (run_folder.FolderError, DrafterError) as error:
        return [str(error)]
    return []
