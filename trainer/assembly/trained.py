"""The trained model of a run folder, and the adapter of a run as part of another one's target."""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from adapters.delta import Adapter, Start, freeze
from adapters.full import Nothing
from adapters.linear import float_weight, is_linear
from tasks import reading
from trainer.assembly import guarded, start_heads
from trainer.assembly.build import instantiate, new_modules, new_tokens, set_problem
from trainer.config import paths
from trainer.data import ends
from trainer.data.chat_template import use_day
from trainer.data.render import Renderer
from trainer.data.stops import Stops
from trainer.drafters import Drafter, head_lora
from trainer.models.base import Base, BaseError
from trainer.models.precision import compute
from trainer.storage import checkpoints, run_folder
from trainer.storage.progress import Progress

log = logging.getLogger("trainer")


@dataclass
class Tuned:
    """The adapter of a fine-tuning run at one of its checkpoints. With its base it is a target."""

    record: dict[str, Any]  # the run, step and checkpoint, as run.yaml names them
    content: dict[str, Any]  # the run's run.yaml
    adapter: Adapter
    saved: dict[str, Any]  # Adapter.state

    def attach(self, model: nn.Module) -> nn.Module:
        """Attach the adapter to a model, un-merged. Return it frozen, in eval mode."""
        model = _attached(model, self.adapter, self.content["identity"], self.saved)
        freeze(model)
        return model.eval()

    def ends(self, tokenizer: Any) -> list[int]:
        """The tokens that its answers end in, as its run.yaml records them."""
        return ends.recorded(self.content, tokenizer) or []


def load_tuned(
    path: str, sha256: str | None = None, recorded: dict[str, Any] | None = None
) -> Tuned:
    """Load the adapter of `FOLDER` or `FOLDER@last|best|STEP`. `sha256` is that of its checkpoint.
    A run that continues keeps the step that it `recorded`, though another one is the best now.

    Raises:
        FolderError, UnusableCheckpoint: the folder or its checkpoint cannot be used, or is another
        one.
    """
    folder, content, which = run_folder.read(path)
    if which == "best" and recorded is not None and recorded["id"] == content["id"]:
        which = str(recorded["step"])
    source = checkpoints.chosen(folder / "checkpoints", which)
    record = checkpoint_record(folder, content["id"], source)
    if sha256 is not None and record["sha256"] != sha256:
        raise checkpoints.UnusableCheckpoint(
            f"{source.path} is not the checkpoint that the drafter was trained for: it has changed"
            " since. Restore it, or train a drafter for it: graft realign"
        )
    return Tuned(
        record,
        content,
        instantiate(content["config"]["adapter"]),
        checkpoints.load(source)["adapter"],
    )


def checkpoint_record(run: Path, run_id: str, source: checkpoints.Checkpoint) -> dict[str, Any]:
    """Return what is recorded of a checkpoint that something else depends on. The digest is None
    if the run keeps no checkpoints (callbacks.checkpoints=null)."""
    return {
        "run": str(run.resolve()),
        "id": run_id,
        "step": source.step,
        "sha256": source.sha256,
    }


def load_recorded_target(record: dict[str, Any], neighbour: Path) -> Tuned:
    """Load the target that a drafter was trained for. Its folder may have been moved, together with
    its neighbour."""
    folder = Path(record["run"])
    moved = neighbour.parent / folder.name
    if not (folder / "run.yaml").exists() and (moved / "run.yaml").exists():
        folder = moved
    return load_tuned(f"{folder}@{record['step']}", record["sha256"])


@dataclass
class Trained:
    """A run's model at one of its checkpoints. Its adapter is the run's own, or its target's if the
    run trained a drafter for a target."""

    folder: Path
    config: dict[str, Any]
    base: Base
    task: Any
    adapter: Adapter
    model: nn.Module
    step: int
    drafter: Drafter | None = None
    # the run, step and checkpoint that the target's adapter is from; None for the base alone
    adapted: dict[str, Any] | None = None
    recorded_ends: list[int] | None = None  # None where an older version wrote run.yaml
    target_ends: list[int] = field(default_factory=list)

    @functools.cached_property
    def renderer(self) -> Renderer:
        """The renderer of the run's rows, with the template that it was trained with."""
        return Renderer(self.base.tokenizer, self.task, self.base.decoder_start)

    @functools.cached_property
    def ends(self) -> list[int]:
        """The tokens that trained answers end in, the most frequent one first: as run.yaml records
        them, otherwise measured on the run's rows, or on a made-up conversation if those no longer
        exist."""
        own = self.recorded_ends
        if own is None:
            try:
                own = ends.of_examples(self.task.examples("train"), self.renderer)
            except Exception as error:  # whatever the reason that the rows cannot be read
                own = ends.of_template(self.renderer)
                log.warning(
                    "%s records no end tokens, and its rows cannot be read (%s): the end tokens are"
                    " those of its chat template alone",
                    self.folder,
                    str(error).partition("\n")[0],
                )
        return list(dict.fromkeys([*own, *self.target_ends]))

    @property
    def stops(self) -> Stops:
        """The tokens, and the texts, that end an answer when decoding."""
        return ends.stop_set(self.base.tokenizer, self.model, self.ends, self.renderer)


def load_trained(
    path: str,
    device: torch.device | str = "cpu",
    fp32: bool = False,
    dequantise: bool = False,
    load_base: Callable[..., nn.Module] | None = None,
) -> Trained:
    """Load the model of `FOLDER` or `FOLDER@last|best|STEP`, in the precision of its training or in
    fp32. `dequantise` replaces a quantised base by an unquantised one with the rounded weights.
    `load_base` takes the arguments of Base.load, and may return a model that is loaded already.

    Raises:
        FolderError, UnusableCheckpoint, BaseError: the folder, its checkpoint or its base cannot be
        used.
    """
    folder, content, which = run_folder.read(path)
    config, identity = content["config"], content["identity"]
    source = checkpoints.chosen(folder / "checkpoints", which)  # before a base is fetched
    base = _base_of(folder, config, identity["base"])
    saved = checkpoints.load(source)
    dtype, _, _ = compute(
        identity["precision"], config["base"]["dtype"], identity["trains_base"], False
    )
    with Progress(f"loading {base.path}"):
        loaded = (base, torch.float32 if fp32 else dtype, identity["labels"], device)
        model = (load_base or Base.load)(*loaded)
    with reading.read_later():
        task = instantiate(config["task"])
    if task.kind == "label" and identity["labels"] is not None:
        task.labels = identity["labels"]
    set_problem(model, task)
    if dequantise and (base.quantization != "none" or base.is_quantized):
        model = dequantised(model)
    drafter = (
        start_heads.make(config, model, start_heads.source_of(config, folder)).to(device).eval()
        if config["drafter"]
        else None
    )
    adapter, model, adapted, target_ends = _adapted(model, folder, content, source, saved, base)
    if drafter is not None:
        guarded.load(drafter, folder, which, saved)
        head_lora.merge(drafter)
    run_folder.use_template(folder, task)
    use_day(content, task)
    return Trained(
        folder,
        config,
        base,
        task,
        adapter,
        model.to(device).eval(),
        saved["counters"]["step"],
        drafter,
        adapted,
        ends.recorded(content, base.tokenizer),
        target_ends,
    )


def _base_of(folder: Path, config: dict[str, Any], fingerprint: str) -> Base:
    """Return the base of a run, which must still be where it was, and the same."""
    path = str(config["base"].get("path"))
    if paths.base_fault(path) is not None:
        raise BaseError(
            f"the base of {folder} was in {path}, where it is no longer. Put it back, or record its"
            f" new place by resuming the run with base.path=NEW resume={folder} and its settings"
        )
    base: Base = instantiate(config["base"])
    if base.fingerprint != fingerprint:
        raise BaseError(
            f"{base.path} is not the model that this run was trained on: its weights have changed."
            " Restore them, or train again"
        )
    return base


def _adapted(
    model: nn.Module,
    folder: Path,
    content: dict[str, Any],
    source: checkpoints.Checkpoint,
    saved: dict[str, Any],
    base: Base,
) -> tuple[Adapter, nn.Module, dict[str, Any] | None, list[int]]:
    """Attach the target's adapter, or the run's own. Return (adapter, model, record of the
    adapter's checkpoint, end tokens of the target)."""
    identity = content["identity"]
    if identity.get("target") is not None:
        target = load_recorded_target(identity["target"], folder)
        model = target.attach(model)
        return target.adapter, model, target.record, target.ends(base.tokenizer)
    adapter = instantiate(content["config"]["adapter"])
    record = None
    if not isinstance(adapter, Nothing):
        record = checkpoint_record(folder, content["id"], source)
    return adapter, _attached(model, adapter, identity, saved["adapter"]), record, []


def _attached(
    model: nn.Module, adapter: Adapter, identity: dict[str, Any], saved: dict[str, Any]
) -> nn.Module:
    if identity["trains_base"]:
        # weights that were trained in another precision than this model computes in
        dtype = next(model.parameters()).dtype
        saved = saved | {
            "tensors": {name: tensor.to(dtype) for name, tensor in saved["tensors"].items()}
        }
    model = adapter.attach(
        model,
        Start(
            new_modules(model, identity["labels"]),
            identity["steps"],
            saved=saved,
            new_tokens=new_tokens(model),
        ),
    )
    adapter.load_state(model, saved)
    return model


def dequantised(model: Any) -> nn.Module:
    """Copy a quantised model to an unquantised one in fp32 with the rounded weights, which are what
    the adapter was trained on."""
    config = copy.deepcopy(model.config)
    del config.quantization_config
    plain = type(model)(config).float()
    linears = {name for name, module in model.named_modules() if is_linear(module)}
    with torch.no_grad():
        for name, module in plain.named_modules():
            if name in linears:
                module.weight.copy_(float_weight(model.get_submodule(name)))
                if module.bias is not None:
                    module.bias.copy_(model.get_submodule(name).bias)
        for name, parameter in plain.named_parameters():
            if name.rpartition(".")[0] not in linears:
                parameter.copy_(model.get_parameter(name))
    plain.generation_config = model.generation_config
    if hasattr(model, "fresh_modules"):
        plain.fresh_modules = model.fresh_modules
    plain.added_tokens = new_tokens(model)
    return plain.eval()
