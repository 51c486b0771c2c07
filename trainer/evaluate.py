"""Evaluation: loss, perplexity and accuracy over the held-out rows, and generated answers graded by the task.

    python -m trainer.evaluate run=FOLDER[@last|best|STEP] [compare=true] [generate=N] [batch_size=16] [max_new_tokens=128] [json=FILE]

evaluates a run's model on its task's held-out rows; compare=true does the base alone too. During training the Evaluation
callback does the same. With task=speculation the run's drafter is evaluated instead: python -m trainer.evaluate task=speculation --help
"""

from __future__ import annotations

import contextlib
import json
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader

from tasks.reading import DataError
from trainer import drafters
from trainer.plan import Pick, Sequences


@dataclass
class HeldOut:
    """The evaluation split, ready to be asked."""

    sequences: Sequences
    collate: Callable[..., dict[str, Any]]
    labels: list[str] | None  # classes, for classification
    prompts: list[tuple[Any, list[int]]] = field(default_factory=list)  # (example, prompt ids) whose answers are generated
    grade: Callable[[Any, str], dict[str, float]] | None = None
    tokenizer: Any = None
    stops: list[int] = field(default_factory=list)


@torch.no_grad()
def losses(
    loss: Callable[[dict[str, Any]], Any], held_out: HeldOut, batch_size: int, device: torch.device, rank: int = 0, ranks: int = 1,
    reduce: Callable[[torch.Tensor], torch.Tensor] = lambda sums: sums, stop: Callable[[], bool] = lambda: False,
) -> dict[str, float]:  # fmt: skip
    """Loss per trained token, perplexity and accuracy, unless it is a drafter's alone; macro F1 for classes; trainer.drafters.metrics
    with a drafter. Each rank takes every ranks-th batch.

    `stop` is asked as often on each rank, between batches; when it says yes, the sums so far are given up and {} comes back.
    """
    from torchmetrics.functional.classification import multiclass_confusion_matrix

    order = np.argsort(-held_out.sequences.sizes()[0], kind="stable")  # long rows first: memory runs out at once or not at all
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    picks = [[Pick(int(sequence), True, 1) for sequence in batch] for batch in batches[rank::ranks]]
    # A rank with a batch less computes one that counts for nothing: what ranks do together, they do equally often.
    picks += [[Pick(int(order[-1]), False, 1)]] * (-(-len(batches) // ranks) - len(picks))
    sums = torch.zeros(3, dtype=torch.float64, device=device)
    guesses = True  # whether the loss is that of next tokens
    offsets: torch.Tensor | None = None
    confusion = torch.zeros(len(held_out.labels or ()), len(held_out.labels or ()), device=device)
    for batch in DataLoader(held_out.sequences, batch_sampler=picks, collate_fn=held_out.collate):  # type: ignore[arg-type]
        if stop():
            return {}
        _, found = loss(to_device(batch, device))
        guesses = "right" in found
        sums += torch.stack([found[key].double() for key in ("loss", "tokens", "right" if guesses else "tokens")])
        if "offsets" in found:
            offsets = found["offsets"].double() if offsets is None else offsets + found["offsets"]
        if "scores" in found:
            confusion += multiclass_confusion_matrix(
                found["scores"], batch["classes"].to(device), found["scores"].shape[-1], ignore_index=-100
            )
    total, tokens, right = reduce(sums).tolist()
    if not tokens:
        return {}
    result = {"loss": total / tokens} | ({"accuracy": right / tokens} if guesses else {})
    if held_out.labels is None:
        if guesses:
            result["perplexity"] = math.exp(min(total / tokens, 700))
        if offsets is not None:
            result |= drafters.metrics(reduce(offsets))
    else:
        confusion = reduce(confusion)
        marked = confusion.sum(0) + confusion.sum(1)  # as a class by its row or by the guess
        result["f1"] = float((2 * confusion.diagonal() / marked)[marked > 0].mean())
    return result


def to_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """The batch with its tensors on `device`."""
    return {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in batch.items()}


@torch.no_grad()
def answers(
    model: nn.Module, held_out: HeldOut, batch_size: int, max_new_tokens: int, device: torch.device,
    stop: Callable[[], bool] = lambda: False,
) -> list[dict[str, Any]] | None:  # fmt: skip
    """Greedy answers to the held-out prompts, in their order, each with its prompt, reference text and scores. None if
    `stop` said yes between batches."""
    by_length = sorted(range(len(held_out.prompts)), key=lambda i: -len(held_out.prompts[i][1]))
    found: dict[int, dict[str, Any]] = {}
    for start in range(0, len(by_length), batch_size):
        if stop():
            return None
        chosen = by_length[start : start + batch_size]
        texts = generate(
            model, [held_out.prompts[i][1] for i in chosen], held_out.tokenizer, held_out.stops, max_new_tokens, device
        )
        for i, text in zip(chosen, texts, strict=True):
            example, prompt = held_out.prompts[i]
            assert held_out.grade is not None
            found[i] = {
                "where": example.where,
                "prompt": held_out.tokenizer.decode(prompt),
                "expected": example.messages[-1]["content"],
                "answer": text,
                "scores": held_out.grade(example, text),
            }
    return [found[i] for i in range(len(held_out.prompts))]


def generate(
    model: nn.Module, prompts: list[list[int]], tokenizer: Any, stops: list[int], max_new_tokens: int, device: torch.device
) -> list[str]:
    """Greedy continuations of several prompts, padded to the left, without special tokens."""
    found = continuations(model, prompts, tokenizer.pad_token_id, stops, max_new_tokens, device)
    return [tokenizer.decode(row, skip_special_tokens=True) for row in found]


def continuations(
    model: nn.Module, prompts: list[list[int]], pad: int, stops: list[int], max_new_tokens: int, device: torch.device, choose: Any = None
) -> list[list[int]]:  # fmt: skip
    """The ids that follow several prompts, with the token that ended them, and after that `pad`. Greedy over what `choose`, a
    transformers LogitsProcessorList, makes of the scores."""
    from transformers import GenerationConfig

    longest = max(map(len, prompts))
    ids = torch.tensor([[pad] * (longest - len(p)) + p for p in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
    settings = GenerationConfig(do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=stops, pad_token_id=pad)
    more = {} if choose is None else {"logits_processor": choose}
    output = model.generate(input_ids=ids, attention_mask=mask, generation_config=settings, **more)  # type: ignore[operator]
    return output[:, longest:].tolist()


def means(graded: list[dict[str, Any]]) -> dict[str, float]:
    """The mean of each score over graded answers."""
    names = graded[0]["scores"] if graded else {}
    return {name: sum(row["scores"][name] for row in graded) / len(graded) for name in names}


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """The module in eval mode, and as it was afterwards."""
    was = [(child, child.training) for child in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for child, mode in was:
            child.training = mode


def main(argv: list[str]) -> int:
    """The verb; see the module's text."""
    from rich import get_console
    from rich.table import Table

    from trainer import assembly, config, failures
    from trainer.losses import CausalLoss, ClassLoss

    if others := [word for word in argv if word.startswith("task=")]:
        from trainer import speculation

        if others != ["task=speculation"]:
            return config.bad(f"{others[-1]}: a run is evaluated on its own task, or with task=speculation")
        return speculation.main([word for word in argv if word != "task=speculation"])
    known = {"run": ..., "compare": False, "generate": 0, "batch_size": 16, "max_new_tokens": 128, "json": None}
    options = config.arguments(argv, known, __doc__ or "")
    for name, least in (("generate", 0), ("batch_size", 1), ("max_new_tokens", 1)):
        if options[name] < least:
            return config.bad(f"{name}={options[name]}: at least {least}")
    if options["json"] and not Path(options["json"]).parent.is_dir():
        return config.bad(f"json={options['json']}: there is no such folder")
    assembly.quiet()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = assembly.trained(options["run"], device)
        data = assembly.tokenised(found.config, found.base, found.task, train=False)
        if data.held_out is None:
            raise DataError("this run's task has no held-out rows: it had task.eval_fraction=0 and no task.eval_path")
        assembly.with_prompts(data, options["generate"], found.model)
        labelled = found.task.kind == "label"
        target = drafters.Target(found.model) if found.drafter is not None else None
        chunk = found.config["objective"]["logits_chunk"]
        loss = ClassLoss(found.model) if labelled else CausalLoss(found.model, chunk, found.drafter, target)
        results: dict[str, dict[str, float]] = {}
        for name in ["base", "adapted"] if options["compare"] else ["adapted"]:
            with found.adapter.disabled(found.model) if name == "base" else contextlib.nullcontext():
                results[name] = losses(loss, data.held_out, options["batch_size"], device)
                if data.held_out.prompts:
                    graded = answers(found.model, data.held_out, options["batch_size"], options["max_new_tokens"], device)
                    results[name] |= means(graded or [])
    except Exception as error:
        return failures.told(error)
    table = Table("", *results)
    for metric in next(iter(results.values())):
        table.add_row(metric, *(f"{values[metric]:.4f}" for values in results.values()))
    get_console().print(table)
    if options["json"]:
        Path(options["json"]).write_text(json.dumps(results, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
