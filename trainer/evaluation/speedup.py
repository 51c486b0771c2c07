"""Summaries of prompts that were decoded in several ways.

    tau            tokens of a target pass, including the target's own: new tokens after each
                   answer's first, over target passes after the prompt's
    conditional    how often a k-th drafted token was accepted, of those that were proposed after
                   accepted ones only; in trees, any token of level k
    survival       how often a k-th drafted token was accepted, of all passes that verified a draft:
                   unconditional, as vLLM counts it
    speed-up       new tokens per second over another way's, including the prompt's pass

Intervals are 95 % of bootstraps over the questions, with all turns of a question together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from trainer.decoding.speculative import Result, position_counts
from trainer.evaluation.decode_ways import WAYS, Answer

RESAMPLES = 2000


def interval(
    answers: Sequence[Answer],
    above: Callable[[Answer], float],
    below: Callable[[Answer], float],
    seed: int = 0,
) -> dict[str, float | None]:
    """Return Σ above / Σ below over the answers as `value`, with `low` and `high` of 95 % of
    bootstraps over the questions; None for a single question."""
    sums: dict[int, list[float]] = {}
    for answer in answers:
        sum_pair = sums.setdefault(answer.question, [0.0, 0.0])
        sum_pair[0] += above(answer)
        sum_pair[1] += below(answer)
    both = np.array(list(sums.values()))
    total = both.sum(0)
    if total[1] <= 0:
        return {"value": None, "low": None, "high": None}
    low = high = None
    if len(both) > 1:
        drawn = both[
            np.random.default_rng(seed).integers(len(both), size=(RESAMPLES, len(both)))
        ].sum(1)
        drawn = drawn[drawn[:, 1] > 0]
        low, high = (float(x) for x in np.percentile(drawn[:, 0] / drawn[:, 1], [2.5, 97.5]))
    return {"value": float(total[0] / total[1]), "low": low, "high": high}


def speed_up(answers: Sequence[Answer], way: str, over: str) -> dict[str, float | None]:
    """Return tokens per second of one way over another's, with its interval."""
    if not answers:
        return {"value": None, "low": None, "high": None}
    rate = sum(len(answer.results[over].tokens) for answer in answers) / sum(
        answer.results[over].seconds for answer in answers
    )
    if all(
        len(answer.results[way].tokens) == len(answer.results[over].tokens) for answer in answers
    ):
        # The texts are equally long, so each prompt is compared with itself, and differences
        # between prompts do not widen the interval.
        return interval(
            answers, lambda a: a.results[over].seconds, lambda a: a.results[way].seconds
        )
    return interval(
        answers, lambda a: len(a.results[way].tokens) / rate, lambda a: a.results[way].seconds
    )


def figures(answers: Sequence[Answer]) -> dict[str, Any]:
    """Summarise answers: for each way tokens, target passes and seconds; for the drafter tau,
    speed-ups, acceptance by position, and milliseconds of a pass. Ways and speed-ups are those of
    the answers that all ways decoded."""
    compared = all_ways(answers)
    drafted = [answer.results["drafter"] for answer in answers]
    verified = sum(proposed > 0 for result in drafted for proposed, _ in result.drafts)
    return {
        "questions": len({answer.question for answer in answers}),
        "answers": len(answers),
        "compared": len(compared),
        "ways": {way: _way([answer.results[way] for answer in compared]) for way in WAYS},
        "tau": interval(
            answers,
            lambda a: len(a.results["drafter"].tokens) - 1,
            lambda a: a.results["drafter"].steps,
        ),
        "speed_up": {
            over: speed_up(compared, "drafter", over) for over in ("transformers", "plain")
        },
        "positions": [
            {
                "proposed": counts.proposed,
                "reached": counts.reached,
                "taken": counts.taken,
                "conditional": counts.taken / counts.reached if counts.reached else None,
                "survival": counts.taken / verified,
            }
            for counts in position_counts(drafted)
        ],
        "pass": _pass(drafted, [answer.results["plain"] for answer in compared]),
    }


def all_ways(answers: Sequence[Answer]) -> list[Answer]:
    """Return the answers that were decoded by each of WAYS."""
    return [answer for answer in answers if answer.results.keys() >= WAYS.keys()]


def _way(results: Sequence[Result]) -> dict[str, float | None]:
    tokens = sum(len(result.tokens) for result in results)
    seconds = sum(result.seconds for result in results)
    return {
        "tokens": tokens,
        "target_passes": sum(1 + result.steps for result in results),
        "seconds": seconds,
        "tokens_per_second": tokens / seconds if seconds else None,
    }


def _pass(drafted: Sequence[Result], plain: Sequence[Result]) -> dict[str, float | None]:
    """Return the drafted tokens and milliseconds of a pass, with and without a drafter."""
    steps = sum(result.steps for result in drafted)
    plain_steps = sum(result.steps for result in plain)

    def ms(seconds: float, steps: int) -> float | None:
        return 1000 * seconds / steps if steps else None

    return {
        "nodes": sum(result.nodes for result in drafted) / steps if steps else None,
        "draft_ms": ms(sum(result.draft_seconds for result in drafted), steps),
        "verify_ms": ms(sum(result.verify_seconds for result in drafted), steps),
        "plain_ms": ms(sum(result.verify_seconds for result in plain), plain_steps),
    }


def different_texts(answers: Sequence[Answer]) -> dict[str, int]:
    """Return how many texts of our decoder differ from transformers'."""
    return {
        way: sum(
            answer.results[way].tokens != answer.results["transformers"].tokens
            for answer in all_ways(answers)
        )
        for way in ("plain", "drafter")
    }


def summary_by_category(
    answers: Sequence[Answer], left_out: int, temperature: float
) -> dict[str, Any]:
    """Return as plain data the `figures` of all answers and of each category, and the costs of each
    answer. With a temperature of 0 it says how many texts differ from transformers'."""
    result = {"temperature": temperature, **figures(answers), "left_out": left_out}
    if temperature == 0:
        result["different_texts"] = different_texts(answers)
    names = list(dict.fromkeys(answer.category for answer in answers))
    result["categories"] = {
        name: figures([answer for answer in answers if answer.category == name]) for name in names
    }
    result["each"] = [
        {
            "question": answer.question,
            "turn": answer.turn,
            "category": answer.category,
            **{
                way: {
                    "tokens": len(text.tokens),
                    "steps": text.steps,
                    "seconds": text.seconds,
                    "prompt_seconds": text.prompt_seconds,
                }
                for way, text in answer.results.items()
            },
        }
        for answer in answers
    ]
    return result


def summary_of_prompts(
    results: Mapping[str, Sequence[Result]], batch_size: int, temperature: float
) -> dict[str, Any]:
    """Return as plain data, for prompts decoded in batches, for each way its
    tokens, target steps, seconds, tokens per second and their ratio to transformers'; for the
    drafter the tokens per step, the counts of each draft position, and how many steps accepted 0, 1
    ... tokens; and, if greedy, how many texts differ from transformers'."""
    answers = [
        Answer(number, 0, "all", {way: results[way][number] for way in WAYS})
        for number in range(len(results["drafter"]))
    ]
    counts = figures(answers)
    taken = [count for result in results["drafter"] for _, count in result.drafts]
    summary: dict[str, Any] = {
        "prompts": len(answers),
        "batch_size": batch_size,
        "temperature": temperature,
        "accepted": counts["tau"]["value"],
        "histogram": [taken.count(count) for count in range(max(taken, default=0) + 1)],
        "positions": [
            {key: position[key] for key in ("proposed", "reached", "taken")}
            for position in counts["positions"]
        ],
    }
    for way in WAYS:
        tokens = counts["ways"][way]["tokens"]
        seconds = sum(batch_seconds(results[way], batch_size, way))
        summary[way] = {
            "tokens": tokens,
            "steps": counts["ways"][way]["target_passes"],
            "seconds": seconds,
            "tokens_per_second": tokens / seconds,
        }
    rate = summary["transformers"]["tokens_per_second"]
    for way in WAYS:
        summary[way]["ratio"] = summary[way]["tokens_per_second"] / rate
    if temperature == 0:
        for way, count in different_texts(answers).items():
            summary[way]["different_texts"] = count
    return summary


def batch_seconds(results: Sequence[Result], batch_size: int, way: str) -> list[float]:
    """Return the seconds of each batch, which are those of its last text. transformers decodes one
    text at a time."""
    size = 1 if way == "transformers" else batch_size
    return [
        max(result.seconds for result in results[start : start + size])
        for start in range(0, len(results), size)
    ]
