"""From a checked config to the parts of a run, and from a run folder to its trained model."""

from __future__ import annotations

import copy
import functools
import json
import logging
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import hydra
import numpy as np
import rich
import torch
from hydra.errors import InstantiationException
from omegaconf import OmegaConf
from torch import nn

from adapters.delta import Adapter, Start, float_weight, freeze, is_linear
from adapters.full import Nothing
from trainer import checkpoint, data, folder
from trainer.base import HEADS, Base, BaseError
from trainer.config import ConfigError
from trainer.data import Rows
from trainer.drafters import Drafter
from trainer.evaluate import HeldOut
from trainer.plan import Collate, Plan, Sequences
from trainer.precision import compute
from trainer.tokens import Renderer, stop_ids

log = logging.getLogger(__name__)


@dataclass
class Data:
    """A task's rows, tokenised."""

    task: Any
    renderer: Renderer
    train: Sequences | None  # None where it streams
    held_out: HeldOut | None
    collate: Collate
    keys: dict[str, str]  # of the tokenised splits: they change with anything that the rows depend on

    def rows_of(self, sequences: list[Any]) -> list[str]:
        """File and line of the rows of some sequences."""
        if self.train is None:
            return sequences  # a stream's are named so from the start
        return [self.train.rows.where(row) for sequence in sequences for row in self.train.members(sequence)]


def quiet() -> None:
    """Silence what libraries say at every start and nobody can act upon."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    for name in ("bitsandbytes", "datasets", "lightning", "lightning.pytorch", "lightning.fabric", "torch.utils.flop_counter"):
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.getLogger("lightning.pytorch").handlers.clear()  # Lightning prints beside whatever logging is configured
    if not rich.get_console().is_terminal:
        rich.get_console().width = 160  # a log file's lines, not a terminal's
    import datasets
    import transformers

    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*`srun` command is available.*")  # on a login node it may well not be meant
    warnings.filterwarnings("ignore", message=".*dataloader is not resumable.*")  # the sampler starts where the run stopped
    warnings.filterwarnings("ignore", message=".*IterableDataset. has .__len__. defined.*")  # a stream has one reader
    warnings.filterwarnings("ignore", message=r".*module\(s\) in eval mode.*")  # a frozen target stays in it
    warnings.filterwarnings("ignore", message="Position ids are not supported.*")  # PEFT's prompts; it drops generate's own
    warnings.filterwarnings(
        "ignore", message="(?s).*FSDP2-wrapped module .* returned a view tensor.*"
    )  # of logits that nobody asks for
    warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning)
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)  # PEFT asks for it


def instantiate(node: dict[str, Any], **arguments: Any) -> Any:
    """An object from a plain config node; its `_target_` was checked when the config was composed."""
    try:
        return hydra.utils.instantiate(OmegaConf.create(node), _convert_="all", **arguments)
    except InstantiationException as error:
        if error.__cause__ is None:
            raise
        raise error.__cause__ from None  # what the part itself says, which failures.py knows to explain


def tokenised(config: dict[str, Any], base: Base, task: Any, train: bool = True) -> Data:
    """The task's rows as tokens: from the cache, or made now. Without `train` only those of evaluation.

    Raises:
        DataError: see trainer.data.tokenise.
    """
    renderer = Renderer(base.tokenizer, task)
    settings = {"max_length": config["max_length"], "overlong": config["overlong"], "processes": config["tokenise_processes"]}
    labelled = task.kind == "label"
    collate = Collate(base.tokenizer.pad_token_id, config["packing"], labelled)
    training = None
    if train and not task.streaming:
        rows = data.tokenise(task, "train", renderer, **settings)
        log.info("train: %s", rows.report.summary())
        packs = data.pack(rows.lengths, config["max_length"], config["seed"]) if config["packing"] else None
        training = Sequences(rows, packs)
    rows = data.tokenise(task, "eval", renderer, **settings)
    if len(rows):
        log.info("eval: %s", rows.report.summary())
    # Evaluation is never packed: its numbers should not depend on how rows share sequences.
    evaluation = Collate(base.tokenizer.pad_token_id, False, labelled)
    held_out = (
        HeldOut(Sequences(rows), evaluation, task.labels if labelled else None, tokenizer=base.tokenizer) if len(rows) else None
    )
    keys = {
        split: data.cache_key(task, split, renderer, config["max_length"], config["overlong"]) for split in ("train", "eval")
    }
    return Data(task, renderer, training, held_out, collate, keys)


def with_prompts(found: Data, count: int, model: nn.Module | None) -> None:
    """Give the held-out rows the prompts of the first `count` conversations among them."""
    held_out = found.held_out
    if held_out is None or found.task.kind != "conversation" or not count:
        return
    rows: Rows = held_out.sequences.rows
    kept = set(rows.examples())
    for index, example in enumerate(found.task.examples("eval")):
        if len(held_out.prompts) >= count:
            break
        if index in kept:
            held_out.prompts.append((example, found.renderer.prompt(example)))
    held_out.grade = found.task.grade
    model_stops = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    held_out.stops = stop_ids(held_out.tokenizer, model_stops, (rows[i] for i in range(min(8, len(rows)))))


def plan(config: dict[str, Any], found: Data, ranks: int) -> Plan:
    """The run's order of sequences."""
    assert found.train is not None
    lengths, trained = found.train.sizes()
    if found.task.kind == "label":
        trained = np.ones_like(trained)
    return Plan(
        lengths, trained, config["seed"], config["batch_size"], config["accumulate"], ranks, config["group_by_length"],
        config["max_epochs"],
    )  # fmt: skip


def schedule(config: dict[str, Any], plan: Plan | None) -> Callable[..., float]:
    """The schedule, `step, steps -> factor`, with a cooldown of so many tokens turned into steps.

    Raises:
        ConfigError: the tokens of each step are not known beforehand.
    """
    node = config["schedule"]
    tokens = node.get("cooldown_tokens")
    if tokens is None:
        return instantiate(node)
    if plan is None:
        raise ConfigError(
            f"schedule.cooldown_tokens={tokens}: a stream's tokens are not known beforehand. Give schedule.cooldown in steps"
        )
    made, down = instantiate(node | {"cooldown_tokens": None}), functools.cache(partial(plan.last_steps, tokens))
    return lambda step, steps: made(step, steps=steps, cooldown=down(steps))


def new_modules(model: nn.Module, labels: list[str] | None) -> tuple[str, ...]:
    """Modules that the base brings no weights for: the head of a classifier."""
    if labels is None:
        return ()
    return tuple(name for name in HEADS if hasattr(model, name))


def token_counts(found: Data, vocabulary: int) -> torch.Tensor:
    """How often each token is trained in the training rows, (V,) int64.

    Raises:
        ConfigError: the rows are not known before training.
    """
    if found.train is None:
        raise ConfigError("this drafter counts the training data's tokens beforehand, which task.streaming=true does not allow")
    return torch.from_numpy(found.train.rows.counts(vocabulary))


@dataclass
class Tuned:
    """The adapter of a fine-tuning run, as it was at one of its checkpoints, to make a target of its base."""

    about: dict[str, Any]  # which run, step and checkpoint that is: what is recorded of it
    content: dict[str, Any]  # the run's run.yaml
    adapter: Adapter
    saved: dict[str, Any]  # Adapter.state

    def attach(self, model: nn.Module) -> nn.Module:
        """The model with the adapter, un-merged and frozen, in eval mode."""
        model = _attached(model, self.adapter, self.content["identity"], self.saved)
        freeze(model)
        return model.eval()


def tuned(path: str, sha256: str | None = None) -> Tuned:
    """The adapter of `FOLDER` or `FOLDER@last|best|STEP`; with `sha256`, of that very checkpoint.

    Raises:
        FolderError, CheckpointError: the folder or its checkpoint cannot be used, or is another one.
    """
    place, content, which = folder.read(path)
    source = checkpoint.chosen(place / "checkpoints", which)
    about = about_checkpoint(place, content["id"], source)
    if sha256 is not None and about["sha256"] != sha256:
        raise checkpoint.CheckpointError(
            f"{source} is not the checkpoint that the drafter was trained for: it has changed since"
        )
    return Tuned(about, content, instantiate(content["config"]["adapter"]), checkpoint.load(source)["adapter"])


def about_checkpoint(run: Path, run_id: str, source: Path) -> dict[str, Any]:
    """What is recorded of a checkpoint that something else depends on."""
    file = source.with_suffix(".json")
    sha256 = json.loads(file.read_text())["sha256"] if file.exists() else None  # callbacks.checkpoints=null
    return {"run": str(run.resolve()), "id": run_id, "step": int(source.stem[5:]), "sha256": sha256}


def tuned_as_recorded(about: dict[str, Any], beside: Path) -> Tuned:
    """What `tuned` found when a drafter was trained for it; its folder may have been moved together with its neighbour `beside`."""
    place = Path(about["run"])
    if not (place / "run.yaml").exists() and (beside.parent / place.name / "run.yaml").exists():
        place = beside.parent / place.name
    return tuned(f"{place}@{about['step']}", about["sha256"])


@dataclass
class Trained:
    """A run's model as it was at one of its checkpoints, with its adapter: its own, or its target's where it trained a drafter for it."""

    folder: Path
    config: dict[str, Any]
    base: Base
    task: Any
    adapter: Adapter
    model: nn.Module
    step: int
    drafter: Drafter | None = None
    adapted: dict[str, Any] | None = (
        None  # the run, step and checkpoint that the target's adapter is from; None for the base alone
    )


def trained(path: str, device: torch.device | str = "cpu", exact: bool = False, unpack: bool = False) -> Trained:
    """The model of `FOLDER` or `FOLDER@last|best|STEP`, computing as it was trained; `exact` computes in fp32, and `unpack` makes
    a quantised base a plain one with the weights that its rounding left.

    Raises:
        FolderError, CheckpointError, BaseError: the folder, its checkpoint or its base cannot be used.
    """
    place, content, which = folder.read(path)
    config, identity = content["config"], content["identity"]
    base: Base = instantiate(config["base"])
    if base.fingerprint != identity["base"]:
        raise BaseError(f"{base.path} is not the model that this run was trained on: its weights have changed")
    source = checkpoint.chosen(place / "checkpoints", which)
    saved = checkpoint.load(source)
    dtype, _, _ = compute(identity["precision"], config["base"]["dtype"], identity["trains_base"], False)
    model = base.load(torch.float32 if exact else dtype, identity["labels"], device)
    if unpack and base.quantization != "none":
        model = unpacked(model)
    drafter = instantiate(config["drafter"])(model=model).to(device).eval() if config["drafter"] else None
    if identity.get("target") is not None:
        target = tuned_as_recorded(identity["target"], place)
        adapter, model = target.adapter, target.attach(model)
        adapted: dict[str, Any] | None = target.about
    else:
        adapter = instantiate(config["adapter"])
        adapted = None if isinstance(adapter, Nothing) else about_checkpoint(place, content["id"], source)
        model = _attached(model, adapter, identity, saved["adapter"])
    if drafter is not None:
        drafter.load_state(saved["drafter"])
    task = instantiate(config["task"])
    return Trained(place, config, base, task, adapter, model.to(device).eval(), saved["counters"]["step"], drafter, adapted)


def _attached(model: nn.Module, adapter: Adapter, identity: dict[str, Any], saved: dict[str, Any]) -> nn.Module:
    if identity["trains_base"]:  # what was trained in another precision than this model computes in
        dtype = next(model.parameters()).dtype
        saved = saved | {"tensors": {name: tensor.to(dtype) for name, tensor in saved["tensors"].items()}}
    model = adapter.attach(model, Start(new_modules(model, identity["labels"]), identity["steps"], saved=saved))
    adapter.load_state(model, saved)
    return model


def unpacked(model: Any) -> nn.Module:
    """A quantised model as a plain one in fp32, with the weights that the rounding left: what the adapter was trained on."""
    config = copy.deepcopy(model.config)
    del config.quantization_config
    plain = type(model)(config).float()
    packed = {name for name, module in model.named_modules() if is_linear(module)}
    with torch.no_grad():
        for name, module in plain.named_modules():
            if name in packed:
                module.weight.copy_(float_weight(model.get_submodule(name)))
                if module.bias is not None:
                    module.bias.copy_(model.get_submodule(name).bias)
        for name, parameter in plain.named_parameters():
            if name.rpartition(".")[0] not in packed:
                parameter.copy_(model.get_parameter(name))
    plain.generation_config = model.generation_config
    return plain.eval()
