"""Checks of encoders, which classify, and of encoder-decoders, which also answer a prompt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from scripts.zoo import checks
from scripts.zoo.checks import LOST, Wrong, plain, train
from scripts.zoo.families import Check, Place
from trainer.assembly.recipe import Recipe
from trainer.assembly.trained import Trained, load_trained
from trainer.exporting.compare import distance, outputs

METHODS: dict[str, tuple[str, ...]] = {
    "lora": ("adapter=lora", "adapter.rank=4"),
    "deft": ("adapter=deft", "adapter.rank=4"),
    "rosa": checks.METHODS["rosa"],
    "sparse": checks.METHODS["sparse"],
    "full": checks.METHODS["full"],
}
LABELS = ["a", "b"]
# task -> (overrides, transformers' class, what that class is loaded with)
TASKS: dict[str, tuple[tuple[str, ...], str, dict[str, Any]]] = {
    "classify": (
        ("task=classification", "max_length=64"),
        "AutoModelForSequenceClassification",
        {"num_labels": len(LABELS)},
    ),
    "answer": (
        ("task=sft", "max_length=64", "task.columns={prompt: text, completion: label}"),
        "AutoModelForSeq2SeqLM",
        {},
    ),
}


def of(task: str) -> dict[str, Check]:
    """Return the checks of a family on one of TASKS."""
    words, auto, more = TASKS[task]

    def stock(place: Place, folder: Path | str | None = None) -> Any:
        import transformers

        kind: Any = getattr(transformers, auto)
        loaded = {} if folder else more
        return kind.from_pretrained(folder or place.base, dtype=torch.float32, **loaded).eval()

    def load(place: Place) -> str:
        return _load(place, stock(place), LABELS if task == "classify" else None)

    def method(name: str) -> Check:
        def check(place: Place) -> str:
            folder = train(place, f"name={name}", *words, *METHODS[name])
            run = load_trained(str(folder), fp32=True)
            if name == "full":
                return "trained"
            return f"stock PEFT loses {_lost(run, _peft(stock(place), folder)):.1e} of its effect"

        return check

    def merged(place: Place) -> str:
        from trainer.exporting.formats import export

        run = place.folder / "runs" / "lora"
        folder, _ = export(str(run), "merged", None, "float32")
        lost = _lost(load_trained(str(run), fp32=True), stock(place, folder))
        return f"loses {lost:.1e} of the adapter's effect"

    def two_texts(place: Place) -> str:
        column = "task.columns={text_pair: text}"
        folder = train(place, "name=two_texts", *words, *METHODS["lora"], column)
        run = load_trained(str(folder), fp32=True)
        return f"stock PEFT loses {_lost(run, _peft(stock(place), folder)):.1e} of its effect"

    further = {"two_texts": two_texts} if task == "classify" else {}
    return {
        "load": load,
        "preflight": lambda place: _preflight(place, words),
        **{name: method(name) for name in METHODS},
        **further,
        "resume": lambda place: checks.resume(place, *words),
        "merged": merged,
        "evaluate": lambda place: _evaluate(place, task),
    }


def _load(place: Place, expected: Any, labels: list[str] | None) -> str:
    """Load the base by defaults, with the states of transformers' own defaults."""
    from trainer.assembly.build import instantiate

    config: Any = plain(place)
    model: Any = instantiate(config["base"]).load(torch.float32, labels)
    ids = torch.arange(5, 45)[None]
    ids[:, -1] = 2  # an end token, by whose state some classify
    pairs = model.config.is_encoder_decoder
    inputs = {"input_ids": ids} | ({"decoder_input_ids": ids} if pairs else {})
    parts = [getattr(one, one.base_model_prefix) if labels else one for one in (model, expected)]
    with torch.no_grad():
        own, stock = (part.eval()(**inputs)[0] for part in parts)
    if (far := distance(stock, own)) > 1e-4:
        raise Wrong(f"states differ from transformers' by {far:.2g} of their spread")
    return str(model.config._attn_implementation)


def _preflight(place: Place, words: tuple[str, ...]) -> str:
    from trainer.assembly.build import instantiate
    from trainer.session.inspect import inspect

    config: Any = plain(place, "adapter=lora", *words)
    result = inspect(
        Recipe.of(config, instantiate(config["adapter"])), place.folder / "runs" / "preflight"
    )
    if result["errors"]:
        raise Wrong("; ".join(result["errors"]))
    return f"{result['model']['trainable']:,} of {result['model']['parameters']:,} trained"


def _peft(stock: Any, folder: Path) -> Any:
    from peft import PeftModel

    return PeftModel.from_pretrained(stock, folder / "adapter").eval()


@torch.no_grad()
def _lost(run: Trained, loaded: Any) -> float:
    """The share of an adapter's effect that a model loaded elsewhere does not have."""
    expected = outputs(run.model, run)[-1]
    with run.adapter.disabled(run.model):
        effect = (outputs(run.model, run)[-1] - expected).norm()
    if not effect > 1e-4 * expected.norm():
        raise Wrong("three steps hardly move the logits")
    lost = float((outputs(loaded, run)[-1] - expected).norm() / effect)
    if not lost < LOST:
        raise Wrong(f"what is loaded elsewhere has lost {lost:.2g} of the adapter's effect")
    return lost


def _evaluate(place: Place, task: str) -> str:
    from trainer.evaluation.run_metrics import run_metrics

    run = place.folder / "runs" / "lora"
    metrics = run_metrics(str(run), False, 2 if task == "answer" else 0, 4, 8)["adapted"]
    return " ".join(f"{name} {value:.3g}" for name, value in metrics.items())
