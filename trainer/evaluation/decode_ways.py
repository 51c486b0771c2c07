"""Decode prompts in several ways and compare them."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch
from rich import get_console
from rich.table import Table

from tasks.reading import DataError
from trainer.assembly.chosen_drafter import sampling
from trainer.assembly.rows import add_prompts, load_data
from trainer.assembly.trained import Trained
from trainer.data.render import Renderer, stop_ids
from trainer.decoding import speculative, trees
from trainer.decoding.speculative import Result
from trainer.decoding.trees import Shape
from trainer.drafters import Drafter, Target

WAYS = {
    "transformers": "transformers' generate",
    "plain": "without the drafter",
    "drafter": "with the drafter",
}


def prompts_of(path: str) -> list[list[dict[str, Any]]]:
    """The conversations of a file, each up to the answer that is asked for.

    Raises:
        DataError: the file cannot be read, or a line is of neither form.
    """
    try:
        lines = Path(path).expanduser().read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"prompts={path} cannot be read: {error}") from None
    found = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}:{number} is no JSON: {error}") from None
        prompt, messages = (
            (row.get("prompt"), row.get("messages")) if isinstance(row, dict) else (None, None)
        )
        if isinstance(prompt, str):
            messages = [{"role": "user", "content": prompt}]
        elif not (
            isinstance(messages, list)
            and messages
            and all(isinstance(m, dict) and "content" in m for m in messages)
        ):
            raise DataError(
                f'{path}:{number}: a line is {{"prompt": "..."}} or {{"messages": [...]}} with at'
                " least one message"
            )
        found.append(messages[:-1] if messages[-1].get("role") == "assistant" else messages)
    if not all(found):
        raise DataError(f"{path}: a conversation of one answer has no prompt")
    if not found:
        raise DataError(f"prompts={path} is empty")
    return found


def asked(options: dict[str, Any], found: Trained) -> tuple[list[list[int]], list[int]]:
    """(prompts, stops) as token ids.

    Raises:
        DataError: the task has no such prompts.
    """
    tokenizer = found.base.tokenizer
    stops = stop_ids(tokenizer, found.model.generation_config.eos_token_id, [])  # type: ignore[union-attr]
    if options["heldout"]:
        if found.task.kind != "conversation":
            raise DataError(
                "heldout takes the prompts of conversations, and this run continues plain text:"
                " give prompt or prompts"
            )
        data = load_data(found.config, found.base, found.task, train=False)
        if data.held_out is None:
            raise DataError(
                "this run's task has no held-out rows: it had task.eval_fraction=0 and no"
                " task.eval_path"
            )
        add_prompts(data, options["heldout"], found.model)
        return [ids for _, ids in data.held_out.prompts], data.held_out.stops
    chats = (
        prompts_of(options["prompts"])
        if options["prompts"]
        else [[{"role": "user", "content": str(options["prompt"])}]]
    )
    if found.task.kind == "conversation":
        renderer = Renderer(tokenizer, found.task)
        ids = [renderer.chat(messages) for messages in chats]
    else:
        ids = [tokenizer(messages[-1]["content"])["input_ids"] for messages in chats]
    if not all(ids):
        raise DataError("a prompt is empty, and this model starts from at least one token")
    return ids, stops


@torch.no_grad()
def by_transformers(
    model: Any, ids: torch.Tensor, stops: list[int], pad: int, options: dict[str, Any]
) -> Result:
    """One text by transformers' own loop."""
    torch.manual_seed(options["seed"])
    # A base's own settings may have a penalty, which no drafter is verified with.
    settings = sampling(options, stops, pad, repetition_penalty=1.0)
    started = speculative.now(ids.device)
    out = model.generate(
        input_ids=ids[None], attention_mask=torch.ones_like(ids[None]), generation_config=settings
    )
    tokens = out[0, len(ids) :].tolist()
    return Result(tokens, [(0, 0)] * (len(tokens) - 1), time.perf_counter() - started, 0.0)


def decoded(
    found: Trained,
    drafter: Drafter,
    prompts: list[list[int]],
    stops: list[int],
    options: dict[str, Any],
) -> dict[str, list[Result]]:
    """Each prompt's text by each of WAYS.

    Raises:
        DrafterError: the drafter cannot draft for its target.
    """
    target = Target(found.model)
    device = next(found.model.parameters()).device

    shape = shape_of(options)

    def some(way: str, ids: list[torch.Tensor], limit: int) -> list[Result]:
        if way == "transformers":
            pad = found.base.tokenizer.pad_token_id
            return [
                by_transformers(found.model, one, stops, pad, options | {"max_new_tokens": limit})
                for one in ids
            ]
        return speculative.generate_batch(
            target,
            drafter if way == "drafter" else None,
            ids,
            limit,
            stops,
            options["temperature"],
            options["top_p"],
            torch.Generator(device).manual_seed(options["seed"]),
            shape=shape,
            rule="spectr" if options["siblings"] == "spectr" else "recursive",
        )

    results: dict[str, list[Result]] = {way: [] for way in WAYS}
    for start in range(0, len(prompts), options["batch_size"]):
        ids = [
            torch.tensor(prompt, device=device)
            for prompt in prompts[start : start + options["batch_size"]]
        ]
        for way in reversed(WAYS):  # a drafter that cannot draft says so first
            if start == 0:
                # what happens once only is not measured
                some(way, ids, min(8, options["max_new_tokens"]))
            results[way] += some(way, ids, options["max_new_tokens"])
    return results


def shape_of(options: dict[str, Any]) -> Shape:
    """The trees that the options ask for.

    Raises:
        DrafterError, DataError: an option is out of its range, or paths cannot be read.
    """
    paths = None
    if options["paths"] is not None:
        try:
            paths = json.loads(Path(options["paths"]).expanduser().read_text("utf-8"))
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise DataError(f"paths={options['paths']} cannot be read: {error}") from None
        if not isinstance(paths, list) or not all(
            isinstance(p, list) and all(type(i) is int for i in p) for p in paths
        ):
            raise DataError(
                f"paths={options['paths']}: it holds the paths of a tree's nodes, as [[0], [1],"
                " [0, 0]]"
            )
    return trees.named(
        options["tree"],
        options["count"],
        options["top_k"],
        options["size"],
        options["policy"],
        options["siblings"],
        paths,
    )


def summary(results: dict[str, list[Result]], options: dict[str, Any]) -> dict[str, Any]:
    """What was found, as plain numbers: of each way tokens, target steps, seconds and tokens a
    second; of the drafter how many tokens its steps gave, how often each draft position was
    proposed, reached and taken, and how many steps took 0, 1 ... tokens; and, greedy, how many
    texts differ from transformers'."""
    found: dict[str, Any] = {
        "prompts": len(results["drafter"]),
        "max_new_tokens": options["max_new_tokens"],
    }
    found |= {
        key: options[key]
        for key in ("temperature", "top_p", "seed", "count", "tree", "policy", "batch_size")
    }
    for way, texts in results.items():
        tokens, seconds = (
            sum(len(text.tokens) for text in texts),
            sum(longest(texts, options["batch_size"], way)),
        )
        found[way] = {
            "tokens": tokens,
            "steps": sum(1 + text.steps for text in texts),
            "seconds": seconds,
            "tokens_per_second": tokens / seconds,
        }
    rate = found["transformers"]["tokens_per_second"]
    for way in results:
        found[way]["ratio"] = found[way]["tokens_per_second"] / rate
    drafts = [draft for text in results["drafter"] for draft in text.drafts]
    taken = [count for _, count in drafts]
    found["accepted"] = (
        (found["drafter"]["tokens"] - found["prompts"]) / len(drafts) if drafts else None
    )
    found["histogram"] = [taken.count(count) for count in range(max(taken, default=0) + 1)]
    found["positions"] = [
        {"proposed": place.proposed, "reached": place.reached, "taken": place.taken}
        for place in speculative.places(results["drafter"])
    ]
    if options["temperature"] == 0:
        for way in ("plain", "drafter"):
            found[way]["different_texts"] = sum(
                text.tokens != wanted.tokens
                for text, wanted in zip(results[way], results["transformers"], strict=True)
            )
    return found


def longest(texts: list[Result], batch_size: int, way: str) -> list[float]:
    """The seconds of each batch, which are those of its last text; of transformers' texts each
    one's."""
    size = 1 if way == "transformers" else batch_size
    return [
        max(text.seconds for text in texts[start : start + size])
        for start in range(0, len(texts), size)
    ]


def show(found: dict[str, Any]) -> None:
    """The summary as tables."""
    console = get_console()
    table = Table("", "tokens", "target steps", "tokens/s", "ratio")
    for way, name in WAYS.items():
        row = found[way]
        table.add_row(
            name,
            f"{row['tokens']}",
            f"{row['steps']}",
            f"{row['tokens_per_second']:.1f}",
            f"{row['ratio']:.2f}",
        )
    console.print(table)
    if found["accepted"] is not None:
        console.print(
            f"tokens a step with the drafter: {found['accepted']:.2f}, the target's own among them"
        )
        table = Table("draft position", "proposed", "taken", "taken of those after right ones")
        for k, place in enumerate(found["positions"], 1):
            table.add_row(
                f"{k}",
                f"{place['proposed']}",
                f"{place['taken'] / place['proposed']:.1%}",
                f"{place['taken'] / place['reached']:.1%}" if place["reached"] else "-",
            )
        console.print(table)
    if found["temperature"] > 0:
        console.print(
            "Sampled texts are the target's in distribution, and are not compared one by one."
        )
    elif found["drafter"]["different_texts"]:
        console.print(
            f"{found['drafter']['different_texts']} of {found['prompts']} texts differ from"
            f" transformers' ({found['plain']['different_texts']} without the drafter): rounding"
            " decides between tokens that are equally likely."
        )
    else:
        console.print(
            f"All {found['prompts']} texts are those of transformers' greedy decoding, token by"
            " token."
        )
