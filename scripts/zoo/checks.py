"""Checks of any model: what a user does with a base and an adapter.

Each check does it by the program's own path, composes a config, and compares with stock PEFT and
transformers where a result leaves the program.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from adapters.containers import load_pair
from adapters.io import PREFIX
from scripts.zoo.families import Place
from trainer.assembly.recipe import Recipe
from trainer.assembly.trained import Trained, load_trained
from trainer.exporting.compare import distance, outputs
from trainer.storage import checkpoints

ROOT = Path(__file__).resolve().parent.parent.parent
COMMON = (
    "+experiment=smoke",
    "base=hf",
    "max_steps=3",
    "max_length=128",
    "batch_size=4",
    "precision=fp32",
    "threads=1",
    "schedule=constant",
    "schedule.warmup=0",
    "callbacks.evaluation.every=null",
    "callbacks.evaluation.samples=0",
    "callbacks.checkpoints.every=1",
    "callbacks.checkpoints.keep=null",
)
METHODS: dict[str, tuple[str, ...]] = {
    "lora": ("adapter=lora", "adapter.rank=4"),
    "dora": ("adapter=dora", "adapter.r=4"),
    "rosa": (
        "adapter=rosa",
        "adapter.rank=4",
        "adapter.density=0.05",
        "adapter.warmup_steps=1",
        "adapter.mask_steps=1",
        "adapter.restart_after_mask=false",
    ),
    "sparse": ("adapter=sparse", "adapter.density=0.05", "adapter.mask_steps=1"),
    "spiel": (
        "adapter=spiel",
        "adapter.density=0.05",
        "adapter.reselection_steps=2",
        "adapter.accumulation_steps=1",
    ),
    "full": ("adapter=full", "optimizer.lr=1e-3"),
}
EXPERTS = {
    f"{name}_experts": (*METHODS[name], "adapter.target_parameters=all-experts")
    for name in ("lora", "rosa")
}
# Of an adapter's own effect on the logits: what an export may lose of it.
LOST = 1e-2


class Wrong(AssertionError):
    """A result differs from what it should be, without an error of the program."""


def composed(place: Place, *overrides: str) -> Any:
    """The config of a run, composed and checked as the program does."""
    from hydra import compose, initialize_config_dir

    from trainer.config.compose import install, rewrite

    words = (
        *COMMON,
        f"base.path={place.base}",
        f"task.path={place.rows}",
        f"runs={place.folder / 'runs'}",
        *overrides,
    )
    install()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3", job_name="trainer"):
        return compose("config", overrides=rewrite(list(words)), return_hydra_config=True)


def train(place: Place, *overrides: str) -> Path:
    """Train in this process, and return the run folder."""
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import OmegaConf, open_dict

    from trainer.cluster.signals import Signals
    from trainer.run import run

    config = composed(place, *overrides)
    with open_dict(config):
        config.hydra.runtime.output_dir = config.hydra.run.dir
    HydraConfig.instance().set_config(config)
    job = OmegaConf.masked_copy(config, [key for key in config if key != "hydra"])
    with Signals() as signals:
        run(job, signals)
    return Path(config.hydra.runtime.output_dir)


def load(place: Place) -> str:
    """Load the base by defaults, with the logits of transformers' own defaults."""
    from trainer.assembly.build import instantiate

    config: Any = plain(place)
    base = instantiate(config["base"])
    model: Any = base.load(torch.float32)
    ids = torch.arange(5, 45)[None]
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits
        expected = stock(place)(input_ids=ids, use_cache=False).logits
    if (far := distance(expected, logits)) > 1e-4:
        raise Wrong(f"logits differ from transformers' by {far:.2g} of their spread")
    return str(model.config._attn_implementation)


def plain(place: Place, *overrides: str) -> Any:
    """A run's config as plain data."""
    from omegaconf import OmegaConf

    config = composed(place, *overrides)
    job = OmegaConf.masked_copy(config, [key for key in config if key != "hydra"])
    return OmegaConf.to_container(job, resolve=True)


def stock(place: Place, folder: Path | str | None = None) -> Any:
    """transformers' own model of a folder, by defaults the base's, as its users load it."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    path = folder or place.base
    known = type(AutoConfig.from_pretrained(path)) in AutoModelForCausalLM._model_mapping
    auto: Any = AutoModelForCausalLM if known else AutoModelForImageTextToText
    return auto.from_pretrained(path, dtype=torch.float32).eval()


def preflight(place: Place) -> str:
    """Check a LoRA run without weights."""
    from trainer.assembly.build import instantiate
    from trainer.session.inspect import inspect

    config: Any = plain(place, "adapter=lora")
    recipe = Recipe.of(config, instantiate(config["adapter"]))
    result = inspect(recipe, place.folder / "runs" / "preflight")
    if result["errors"]:
        raise Wrong("; ".join(result["errors"]))
    return f"{result['model']['trainable']:,} of {result['model']['parameters']:,} trained"


def method(name: str) -> Any:
    """The check that trains an adapter, and loads it elsewhere."""

    def check(place: Place) -> str:
        folder = train(place, f"name={name}", *(METHODS | EXPERTS)[name])
        trained = load_trained(str(folder), fp32=True)
        effect = _effect(place, trained)
        if name == "full":
            return f"moves the logits by {effect:.2g} of their spread"
        exported = folder / "adapter"
        if not exported.exists():  # no layout of PEFT holds it
            return f"merged only: {merged(place, name)}"
        pair = [exported / "lora", exported / "shira"]
        for part in pair if pair[0].exists() else [exported]:
            _refuse_untrained(part)
        return f"stock PEFT loses {_lost(place, trained, exported):.1e} of its effect"

    return check


@torch.no_grad()
def _effect(place: Place, trained: Trained) -> float:
    """Return how far a trained model is from its base, over the spread of the base's logits."""
    plain_logits = outputs(stock(place), trained)[-1]
    effect = distance(plain_logits, outputs(trained.model, trained)[-1])
    if not effect > 1e-4:
        raise Wrong(f"three steps move the logits by only {effect:.2g} of their spread")
    return effect


@torch.no_grad()
def _lost(place: Place, trained: Trained, folder: Path) -> float:
    """The share of an adapter's effect that stock PEFT, which loads it alone, does not have."""
    from peft import PeftModel

    plain_logits = outputs(stock(place), trained)[-1]
    expected = outputs(trained.model, trained)[-1]
    if (folder / "shira").exists():
        peft_model = load_pair(stock(place), folder)
    else:
        peft_model = PeftModel.from_pretrained(stock(place), folder)
    loaded = outputs(peft_model.eval(), trained)[-1]
    lost = float((loaded - expected).norm() / (expected - plain_logits).norm())
    if not lost < LOST:
        raise Wrong(f"stock PEFT loads it and has lost {lost:.2g} of its effect")
    return lost


def _refuse_untrained(folder: Path) -> None:
    """Refuse matrices that start at zero and still are zero: they had no gradient."""
    tensors = load_file(folder / "adapter_model.safetensors")
    marks = (".lora_B.", ".supertuning_values", ".shira_weight")
    dead = [
        name.removeprefix(PREFIX)
        for name, tensor in tensors.items()
        if any(mark in name for mark in marks) and not tensor.any()
    ]
    if dead:
        raise Wrong(f"{len(dead)} trained tensors never moved, such as {dead[0]}")


def resume(place: Place, *words: str) -> str:
    """Train three steps again from the second checkpoint: the same bits."""
    settings = ("adapter=lora", "adapter.rank=4", "adapter.dropout=0.1", *words)
    shutil.rmtree(place.folder / "runs" / "cut", ignore_errors=True)
    shutil.rmtree(place.folder / "runs" / "whole", ignore_errors=True)
    whole = train(place, "name=whole", *settings)
    cut = whole.parent / "cut"
    shutil.copytree(whole, cut, symlinks=True)
    last = checkpoints.complete(cut / "checkpoints")[-1]
    checkpoints.remove(last)
    shutil.rmtree(cut / "adapter")
    train(place, "name=cut", *settings, "resume=auto")
    one, other = (
        load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (whole, cut)
    )
    different = [name for name, tensor in one.items() if not torch.equal(tensor, other[name])]
    if different:
        raise Wrong(f"{len(different)} of {len(one)} tensors differ, such as {different[0]}")
    return "the same bits"


def merged(place: Place, name: str = "lora") -> str:
    """Export a run merged; transformers loads it by itself, with the run's logits."""
    from trainer.exporting.formats import export

    run = place.folder / "runs" / name
    folder, _ = export(str(run), "merged", None, "float32")
    trained = load_trained(str(run), fp32=True)
    with torch.no_grad():
        expected = outputs(trained.model, trained)[-1]
        plain_logits = outputs(stock(place), trained)[-1]
        loaded = outputs(stock(place, folder), trained)[-1]
    lost = float((loaded - expected).norm() / (expected - plain_logits).norm())
    if not lost < LOST:
        raise Wrong(f"transformers loads it and has lost {lost:.2g} of the adapter's effect")
    return f"loses {lost:.1e} of the adapter's effect"
