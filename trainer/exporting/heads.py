"""Draft heads for serving engines."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, cast

import torch
from hydra.utils import get_class
from torch import Tensor

from trainer.assembly.build import instantiate
from trainer.assembly.trained import Trained
from trainer.drafters import Drafter, DrafterError, News, Target, io
from trainer.exporting import engines, mtp_layers
from trainer.exporting.compare import TOLERANCE, Mismatch, _distance
from trainer.exporting.merged import _cast
from trainer.storage.run_folder import read

log = logging.getLogger("trainer")


def _check_drafter(run: str, to: str) -> None:
    """Before any weights are loaded."""
    _, content, _ = read(run)
    config, labels = content["config"], content["identity"]["labels"]
    if not config["drafter"]:
        raise DrafterError(
            f"run={run} has no drafter. Train one beside the adapter: python -m trainer ..."
            " drafter=mtp_shared"
        )
    kind: Any = get_class(config["drafter"]["_target_"])
    if not kind.proposes:
        raise DrafterError(
            f"run={run} has a drafter ({kind.__name__}) that only shapes the adapter: to=peft or"
            " to=merged is all of it"
        )
    if to != "drafter":
        skeleton = instantiate(config["base"]).skeleton(labels)
        drafter = instantiate(config["drafter"])(model=skeleton)
        mtp_layers.check(drafter, skeleton) if to == "mtp" else engines.check(drafter, to, skeleton)


def _write_drafter(found: Trained, place: Path) -> float:
    assert found.drafter is not None
    io.save(
        found.drafter,
        found.config["drafter"],
        io.trained_for(found.base, found.folder, found.step, found.adapted),
        place,
    )
    again = io.load(place, found.base.load(torch.float32), found.base.fingerprint).state()
    different = [
        name
        for name, tensor in found.drafter.state().items()
        if not torch.equal(tensor, again[name])
    ]
    if different:
        raise Mismatch(
            f"the drafter, loaded back, differs from the run's in {', '.join(different[:5])}"
        )
    return 0.0


@torch.no_grad()
def _write_head(
    found: Trained, folder: Path, to: str, dtype: torch.dtype, verifier: str | None, copied: bool
) -> float:
    """A drafter in an engine's layout, its files held against tables of names, and what they
    compute against the drafter itself."""
    drafter, model = found.drafter, cast(Any, found.model)
    assert drafter is not None
    head = engines.canonical(drafter, model, copied)
    engines.write(head, to, folder, dtype, verifier or found.base.path)
    if wrong := engines.faults(folder, to, head, dtype, model):
        raise Mismatch(
            f"the export is not what to={to} should have written: {'; '.join(wrong[:5])}"
        )
    for part in (drafter, model.get_input_embeddings(), model.get_output_embeddings()):
        _cast(part, dtype)
        _cast(part, torch.float32)
    # The names that the files have are read by another program than the one that wrote them.
    draw, count, sizes = torch.Generator().manual_seed(0), 12, model.config.get_text_config()
    states = torch.randn(count, max(1, len(head.layers)) * sizes.hidden_size, generator=draw)
    ids = torch.randint(3, sizes.vocab_size, (count + 1 + head.drafts,), generator=draw)
    drafted = ids[count + 1 : count + (head.drafts if to == "medusa" else min(head.drafts, 4))]
    wanted = _drafted(drafter, Target(model), states, ids[: count + 1], drafted)
    difference = _distance(
        wanted, engines.logits(folder, to, model, states, ids[1 : count + 1], drafted)
    )
    if not difference <= TOLERANCE:
        raise Mismatch(
            f"the files give other logits than the run's drafter, by {difference:.3g} of their"
            f" spread (at most {TOLERANCE:g})"
        )
    if head.method == "eagle" and "fc.bias" in head.own:
        log.warning(
            "SGLang adds the bias of this drafter's fc, and vLLM drops it: train with"
            " drafter.bias=false for vLLM"
        )
    if verifier is None:
        log.warning(
            "the config names %s as the model drafted for. Where that is a folder, or the run's"
            " adapter is merged into another, say verifier=ORG/NAME: `vllm serve FOLDER` looks for"
            " it on the hub",
            found.base.path,
        )
    return difference


def _drafted(
    drafter: Drafter, target: Target, states: Tensor, ids: Tensor, drafted: Tensor
) -> Tensor:
    """The drafter's own logits after `ids`, whose first token has no state, and after each drafted
    one."""
    read, other = (
        (states, states[:, :0])
        if not drafter.layers
        else (states.new_zeros(len(states), 1), states)
    )
    growth = drafter.grow(drafter.start(target), target, News(read, other, ids[1:], ids[0]))
    rows = [growth.first()]
    for place, token in enumerate(drafted):
        rows.append(growth.below(token[None], torch.tensor([place - 1]))[0])
    return torch.stack(rows).float()
