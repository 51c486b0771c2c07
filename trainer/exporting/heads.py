"""Draft heads for serving engines."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from hydra.utils import get_class
from torch import Tensor

from trainer.assembly.build import instantiate
from trainer.assembly.trained import Trained
from trainer.drafters import Drafter, DrafterError, Target, TargetUpdate, io
from trainer.drafters.uno import Uno
from trainer.exporting import draft_head, engines, gguf_drafts, gguf_model, mtp_layers, uno_layout
from trainer.exporting.compare import TOLERANCE, Mismatch, distance
from trainer.exporting.merged import cast_parameters
from trainer.exporting.serving import Serving
from trainer.storage.run_folder import read

log = logging.getLogger("trainer")


def check_drafter(run: str, to: str) -> None:
    """Refuse a run whose drafter does not fit the format, before any weights are loaded.

    Raises:
        DrafterError: there is no drafter that proposes tokens, or it does not fit.
    """
    _, content, _ = read(run)
    config, labels = content["config"], content["identity"]["labels"]
    if not config["drafter"]:
        raise DrafterError(
            f"run={run} has no drafter. Train one with the adapter: graft ... drafter=mtp_shared"
        )
    kind: Any = get_class(config["drafter"]["_target_"])
    if not kind.proposes:
        raise DrafterError(
            f"run={run} has a drafter ({kind.__name__}) that only shapes the adapter: to=peft or"
            " to=merged exports all of it"
        )
    if to == "drafter":
        return
    skeleton = instantiate(config["base"]).skeleton(labels)
    check_format(instantiate(config["drafter"])(model=skeleton), to, skeleton)


def check_format(drafter: Drafter, to: str, skeleton: Any) -> None:
    """Refuse a format that cannot hold a drafter. Drafter and target need shapes alone.

    Raises:
        DrafterError: the message says why, and which format fits.
    """
    if to == "drafter":
        return
    if to == "gguf_draft":
        gguf_drafts.check(drafter, skeleton)
    elif isinstance(drafter, Uno):
        uno_layout.check(drafter, to, skeleton)
    elif to == "mtp":
        mtp_layers.check(drafter, skeleton)
    else:
        draft_head.check(drafter, to, skeleton)


def write_drafter(run: Trained, folder: Path) -> float:
    """Write the drafter's own format, and load it back.

    Raises:
        Mismatch: a tensor differs.
    """
    assert run.drafter is not None
    io.save(
        run.drafter,
        run.config["drafter"],
        io.trained_for(run.base, run.folder, run.step, run.adapted),
        folder,
    )
    loaded = io.load(folder, run.base.load(torch.float32), run.base.fingerprint).state()
    different = [
        name
        for name, tensor in run.drafter.state().items()
        if not torch.equal(tensor, loaded[name])
    ]
    if different:
        raise Mismatch(
            f"the drafter, loaded back, differs from the run's in {', '.join(different[:5])}"
        )
    return 0.0


@torch.no_grad()
def write_head(
    run: Trained, folder: Path, to: str, dtype: torch.dtype, verifier: str | None, copied: bool
) -> float:
    """Write a drafter in an engine's layout. Check the files' names and shapes, and compare the
    logits computed from the files with the drafter's own.

    Raises:
        Mismatch: the files are wrong, or the logits differ.
    """
    drafter, model = run.drafter, cast(Any, run.model)
    assert drafter is not None
    if isinstance(drafter, Uno):
        base = run.base.load(torch.float32)
        return uno_layout.write(drafter, base, folder, dtype, verifier or run.base.path)
    head = draft_head.canonical(drafter, model, copied)
    engines.write(head, to, folder, dtype, verifier or run.base.path)
    if wrong := engines.faults(folder, to, head, dtype, model):
        raise Mismatch(
            f"the export is not what to={to} should have written: {'; '.join(wrong[:5])}"
        )
    for part in (drafter, model.get_input_embeddings(), model.get_output_embeddings()):
        cast_parameters(part, dtype)
        cast_parameters(part, torch.float32)

    def of_files(states: Tensor, ids: Tensor, drafted: Tensor) -> Tensor:
        return engines.logits(folder, to, model, states, ids, drafted)

    difference = _compare_head(run, head, of_files)
    if head.method == "eagle" and "fc.bias" in head.own:
        log.warning(
            "SGLang adds the bias of this drafter's fc, and vLLM drops it: train with"
            " drafter.bias=false for vLLM"
        )
    if verifier is None:
        log.warning(
            "the config names %s as the target. If that is a folder, or the run's adapter is merged"
            " into another model, set verifier=ORG/NAME: `vllm serve FOLDER` looks for it on the"
            " hub",
            run.base.path,
        )
    return difference


@torch.no_grad()
def write_gguf(run: Trained, folder: Path, dtype: str) -> float:
    """Write a drafter as a GGUF file, and compare the logits computed from the file with the
    drafter's own, rounded alike.

    Raises:
        Mismatch: the logits differ.
    """
    model = cast(Any, run.model)
    head = draft_head.canonical(run.drafter, model)
    folder.mkdir(parents=True, exist_ok=True)
    gguf_drafts.write(head, folder, dtype, Serving.of(run))
    gguf_model.round_weights(cast(Drafter, run.drafter), dtype)

    def of_file(states: Tensor, ids: Tensor, drafted: Tensor) -> Tensor:
        return gguf_drafts.logits(head, folder, model, states, ids, drafted)

    return _compare_head(run, head, of_file)


def _compare_head(
    run: Trained, head: draft_head.DraftHead, of_files: Callable[[Tensor, Tensor, Tensor], Tensor]
) -> float:
    drafter, model = cast(Drafter, run.drafter), cast(Any, run.model)
    draw, count, sizes = torch.Generator().manual_seed(0), 12, model.config.get_text_config()
    states = torch.randn(count, max(1, len(head.layers)) * sizes.hidden_size, generator=draw)
    ids = torch.randint(3, sizes.vocab_size, (count + 1 + head.drafts,), generator=draw)
    most = head.drafts if head.method == "medusa" else min(head.drafts, 4)
    drafted = ids[count + 1 : count + most]
    difference = distance(
        draft_logits(drafter, Target(model), states, ids[: count + 1], drafted),
        of_files(states, ids[1 : count + 1], drafted),
    )
    if not difference <= TOLERANCE:
        raise Mismatch(
            f"the files give other logits than the run's drafter, by {difference:.3g} of their"
            f" spread (at most {TOLERANCE:g})"
        )
    return difference


def draft_logits(
    drafter: Drafter, target: Target, states: Tensor, ids: Tensor, drafted: Tensor
) -> Tensor:
    """Return the drafter's own logits after `ids`, whose first token has no state, and after each
    drafted token."""
    hidden, features = (
        (states, states[:, :0])
        if not drafter.layers
        else (states.new_zeros(len(states), 1), states)
    )
    update = TargetUpdate(hidden, features, ids[1:], ids[0])
    growth = drafter.grow(drafter.start(target), target, update)
    rows = [growth.first()]
    for node, token in enumerate(drafted):
        rows.append(growth.extend(token[None], torch.tensor([node - 1]))[0])
    return torch.stack(rows).float()
