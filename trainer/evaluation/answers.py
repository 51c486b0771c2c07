"""Generated answers to held-out prompts, and their grades."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from tasks.task import Text
from trainer.data.encoding import plain_ids
from trainer.data.held_out import HeldOut
from trainer.data.stops import Stops
from trainer.decoding import positions
from trainer.evaluation.diversity import type_token_ratio
from trainer.storage.progress import Progress, current


@torch.no_grad()
def answers(
    model: nn.Module,
    held_out: HeldOut,
    batch_size: int,
    max_new_tokens: int,
    device: torch.device,
    stop: Callable[[], bool] = lambda: False,
) -> list[dict[str, Any]] | None:
    """Return greedy answers to the held-out prompts, in their order, each with its prompt,
    reference text and scores. None if `stop` returned True between batches."""
    by_length = sorted(range(len(held_out.prompts)), key=lambda i: -len(held_out.prompts[i][1]))
    graded: dict[int, dict[str, Any]] = {}
    with Progress("answers", len(by_length), "rows") as progress:
        for start in range(0, len(by_length), batch_size):
            if stop():
                return None
            chosen = by_length[start : start + batch_size]
            rows = continuations(
                model,
                [held_out.prompts[i][1] for i in chosen],
                held_out.tokenizer.pad_token_id,
                held_out.stops,
                max_new_tokens,
                device,
            )
            for i, row in zip(chosen, rows, strict=True):
                graded[i] = _graded(held_out, i, row, max_new_tokens)
            progress.advance(len(chosen))
    return [graded[i] for i in range(len(held_out.prompts))]


def _graded(held_out: HeldOut, index: int, row: list[int], most: int) -> dict[str, Any]:
    """Return one prompt with its answer, the ids `row`, and its scores."""
    example, prompt = held_out.prompts[index]
    tokenizer = held_out.tokenizer
    text = _text(row, tokenizer, held_out.stops)
    assert held_out.grade is not None
    scores = held_out.grade(example, text)
    if isinstance(example, Text):  # its prompt is its beginning
        expected = tokenizer.decode(plain_ids(tokenizer, example.text)[len(prompt) :][:most])
        scores = scores | {"ttr": type_token_ratio(_written(row, tokenizer, held_out.stops))}
    else:
        expected = example.messages[-1]["content"]
    return {
        "where": example.where,
        "prompt": tokenizer.decode(prompt),
        "expected": expected,
        "answer": text,
        "scores": scores,
    }


def _text(row: list[int], tokenizer: Any, stops: Any) -> str:
    return Stops.of(stops).without_end(tokenizer.decode(row, skip_special_tokens=True))


def _written(row: list[int], tokenizer: Any, stops: Any) -> list[int]:
    """Return the ids of a continuation up to the token that ended it."""
    ends = {*stops, tokenizer.pad_token_id}
    return list(itertools.takewhile(lambda token: token not in ends, row))


def generate(
    model: nn.Module,
    prompts: list[list[int]],
    tokenizer: Any,
    stops: list[int],
    max_new_tokens: int,
    device: torch.device,
) -> list[str]:
    """Return greedy continuations of several prompts, as text without special tokens."""
    rows = continuations(model, prompts, tokenizer.pad_token_id, stops, max_new_tokens, device)
    return [_text(row, tokenizer, stops) for row in rows]


def continuations(
    model: nn.Module,
    prompts: list[list[int]],
    pad: int,
    stops: list[int],
    max_new_tokens: int,
    device: torch.device,
    choose: Any = None,
) -> list[list[int]]:
    """Return the ids that follow several prompts, including the token that ended them, then `pad`.
    Decoding is greedy over the scores that `choose`, a transformers LogitsProcessorList,
    returns."""
    from transformers import GenerationConfig, LogitsProcessorList

    longest = max(map(len, prompts))
    pairs = model.config.is_encoder_decoder  # type: ignore[union-attr]
    max_new_tokens = positions.new_tokens(model, longest, max_new_tokens)
    # A decoder continues at the right end. An encoder's rows are padded there, as in training.
    gaps = [longest - len(prompt) for prompt in prompts]
    ids, mask = (
        torch.tensor(
            [
                row + [fill] * gap if pairs else [fill] * gap + row
                for row, gap in zip(rows, gaps, strict=True)
            ],
            device=device,
        )
        for rows, fill in ((prompts, pad), ([[1] * len(prompt) for prompt in prompts], 0))
    )
    settings = GenerationConfig(
        do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=[*stops], pad_token_id=pad
    )
    processors = LogitsProcessorList(choose or [])
    if (progress := current()) is not None:
        processors.append(_Counted(progress, ids.shape[1], max_new_tokens, len(prompts)))
    more = Stops.of(stops).arguments()
    more |= {"logits_processor": processors} if processors else {}
    output = model.generate(  # type: ignore[operator]
        input_ids=ids,
        attention_mask=mask,
        generation_config=settings,
        **more,
    )
    # An encoder-decoder returns the decoder's sequence, after the token that starts it.
    return output[:, 1 if pairs else longest :].tolist()


class _Counted:
    """A processor of scores that changes none, and counts the tokens of an answer."""

    def __init__(self, progress: Progress, longest: int, most: int, rows: int):
        self.progress, self.longest, self.most, self.rows = progress, longest, most, rows

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        count = max(0, input_ids.shape[1] - self.longest)
        self.progress.within(min(count, self.most), self.most, "tokens", self.rows)
        return scores


def means(graded: list[dict[str, Any]]) -> dict[str, float]:
    """Return the mean of each score over graded answers."""
    names = graded[0]["scores"] if graded else {}
    return {name: sum(row["scores"][name] for row in graded) / len(graded) for name in names}
