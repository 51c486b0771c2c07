"""What the answers of several ways of decoding come to: figures with their intervals, tables and a
plot.

What tau, conditional, survival and speed-up are stands in trainer.evaluation.speculation, which
asks the questions. Intervals are 95 % of bootstraps over the questions, all turns of one together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich import get_console
from rich.table import Table

from trainer.decoding import speculative
from trainer.decoding.speculative import Result
from trainer.evaluation.decode_ways import WAYS

RESAMPLES = 2000


@dataclass(frozen=True)
class Answer:
    """One turn, decoded by each of speculate.WAYS."""

    question: int
    turn: int  # from 0
    category: str
    results: dict[str, Result]


def interval(
    answers: Sequence[Answer],
    above: Callable[[Answer], float],
    below: Callable[[Answer], float],
    seed: int = 0,
) -> dict[str, float | None]:
    """Σ above / Σ below over the answers as `value`, with `low` and `high` of 95 % of bootstraps
    over the questions: None of one only."""
    sums: dict[int, list[float]] = {}
    for answer in answers:
        pair = sums.setdefault(answer.question, [0.0, 0.0])
        pair[0] += above(answer)
        pair[1] += below(answer)
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
    """Tokens a second of one way over another's, with its interval."""
    rate = sum(len(answer.results[over].tokens) for answer in answers) / sum(
        answer.results[over].seconds for answer in answers
    )
    if all(
        len(answer.results[way].tokens) == len(answer.results[over].tokens) for answer in answers
    ):
        # The same texts: prompts are compared with themselves, so that how fast a prompt is in
        # itself widens no interval.
        return interval(
            answers, lambda a: a.results[over].seconds, lambda a: a.results[way].seconds
        )
    return interval(
        answers, lambda a: len(a.results[way].tokens) / rate, lambda a: a.results[way].seconds
    )


def figures(answers: Sequence[Answer]) -> dict[str, Any]:
    """What some answers say: of each way tokens, target passes and seconds; of the drafter tau,
    speed-ups, what became of the drafted tokens position by position, and milliseconds of a
    pass."""
    found: dict[str, Any] = {
        "questions": len({answer.question for answer in answers}),
        "answers": len(answers),
        "ways": {},
    }
    for way in WAYS:
        results = [answer.results[way] for answer in answers]
        tokens, seconds = sum(len(r.tokens) for r in results), sum(r.seconds for r in results)
        found["ways"][way] = {
            "tokens": tokens,
            "target_passes": sum(1 + r.steps for r in results),
            "seconds": seconds,
            "tokens_per_second": tokens / seconds,
        }
    drafted = [answer.results["drafter"] for answer in answers]
    found["tau"] = interval(
        answers,
        lambda a: len(a.results["drafter"].tokens) - 1,
        lambda a: a.results["drafter"].steps,
    )
    found["speed_up"] = {
        over: speed_up(answers, "drafter", over) for over in ("transformers", "plain")
    }
    verified = sum(proposed > 0 for result in drafted for proposed, _ in result.drafts)
    found["positions"] = [
        {
            "proposed": place.proposed,
            "reached": place.reached,
            "taken": place.taken,
            "conditional": place.taken / place.reached if place.reached else None,
            "survival": place.taken / verified,
        }
        for place in speculative.places(drafted)
    ]
    steps = sum(result.steps for result in drafted)
    plain = [answer.results["plain"] for answer in answers]
    alone = sum(result.steps for result in plain)
    found["pass"] = {
        "nodes": sum(result.nodes for result in drafted) / steps if steps else None,
        "draft_ms": (
            1000 * sum(result.draft_seconds for result in drafted) / steps if steps else None
        ),
        "verify_ms": (
            1000 * sum(result.verify_seconds for result in drafted) / steps if steps else None
        ),
        "plain_ms": (
            1000 * sum(result.verify_seconds for result in plain) / alone if alone else None
        ),
    }
    return found


def summary(answers: Sequence[Answer], left_out: int, options: dict[str, Any]) -> dict[str, Any]:
    """All that was found, as plain data: how the answers were had, `figures` of all and of each
    category, and what each answer took."""
    found = options | figures(answers) | {"left_out": left_out}
    if options["temperature"] == 0:
        found["different_texts"] = {
            way: sum(
                answer.results[way].tokens != answer.results["transformers"].tokens
                for answer in answers
            )
            for way in ("plain", "drafter")
        }
    names = list(dict.fromkeys(answer.category for answer in answers))
    found["categories"] = {
        name: figures([answer for answer in answers if answer.category == name]) for name in names
    }
    found["each"] = [
        {
            "question": answer.question,
            "turn": answer.turn,
            "category": answer.category,
            **{
                way: {
                    "tokens": len(r.tokens),
                    "steps": r.steps,
                    "seconds": r.seconds,
                    "prompt_seconds": r.prompt_seconds,
                }
                for way, r in answer.results.items()
            },
        }
        for answer in answers
    ]
    return found


def _with(value: dict[str, float | None]) -> str:
    if value["value"] is None:
        return "-"
    return f"{value['value']:.2f}" + (
        f" ({value['low']:.2f} to {value['high']:.2f})" if value["low"] is not None else ""
    )


def show(found: dict[str, Any]) -> None:
    """The summary as tables."""
    console = get_console()
    table = Table("", "tokens", "target passes", "tokens/s", "speed-up of the drafter")
    for way, name in WAYS.items():
        row = found["ways"][way]
        against = _with(found["speed_up"][way]) if way in found["speed_up"] else ""
        table.add_row(
            name,
            f"{row['tokens']}",
            f"{row['target_passes']}",
            f"{row['tokens_per_second']:.1f}",
            against,
        )
    console.print(table)
    table = Table("draft position", "proposed", "conditional acceptance", "survival")
    for k, place in enumerate(found["positions"], 1):
        conditional = "-" if place["conditional"] is None else f"{place['conditional']:.1%}"
        table.add_row(f"{k}", f"{place['proposed']}", conditional, f"{place['survival']:.1%}")
    console.print(table)
    table = Table("", "answers", "tau", "speed-up over transformers", "over the same decoder")
    rows = {"all": found} | (found["categories"] if len(found["categories"]) > 1 else {})
    for name, row in rows.items():
        table.add_row(
            name,
            f"{row['answers']}",
            _with(row["tau"]),
            _with(row["speed_up"]["transformers"]),
            _with(row["speed_up"]["plain"]),
        )
    console.print(table)
    times = found["pass"]
    if times["draft_ms"] is not None and times["plain_ms"] is not None:
        console.print(
            f"A pass: {times['draft_ms']:.1f} ms to draft {times['nodes']:.1f} tokens,"
            f" {times['verify_ms']:.1f} ms to verify them; {times['plain_ms']:.1f} ms without a"
            " draft."
        )
    if found["left_out"]:
        console.print(
            f"{found['left_out']} turns were left out: with max_new_tokens they are longer than the"
            " model takes."
        )
    if found["temperature"] > 0:
        console.print(
            "Sampled texts are the target's in distribution, and are not compared one by one."
        )
    elif different := found["different_texts"]["drafter"]:
        console.print(
            f"{different} of {found['answers']} texts differ from transformers'"
            f" ({found['different_texts']['plain']} without the drafter): rounding decides between"
            " tokens that are equally likely."
        )
    else:
        console.print(
            f"All {found['answers']} texts are those of transformers' greedy decoding, token by"
            " token."
        )


def plot(found: dict[str, Any], path: Path) -> None:
    """Acceptance by position; tau and speed-up by category with their intervals."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    rows = {"all": found} | (found["categories"] if len(found["categories"]) > 1 else {})
    with pyplot.rc_context(
        {
            "font.size": 9,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "svg.fonttype": "none",
        }
    ):
        figure, (left, middle, right) = pyplot.subplots(
            1, 3, figsize=(11, 1.6 + 0.22 * max(6, len(rows))), layout="constrained"
        )
        numbers = range(1, len(found["positions"]) + 1)
        for key in ("conditional", "survival"):
            values = [np.nan if place[key] is None else place[key] for place in found["positions"]]
            left.plot(numbers, values, "o-", label=key, linewidth=1.2, markersize=3)
        left.set(xlabel="draft position", ylim=(0, 1))
        left.xaxis.get_major_locator().set_params(integer=True)
        left.set_title("acceptance", loc="left", fontsize=10)
        left.legend(frameon=False)
        _bars(
            middle, {name: row["tau"] for name, row in rows.items()}, "tau: tokens of a target pass"
        )
        speeds = {name: row["speed_up"]["transformers"] for name, row in rows.items()}
        _bars(right, speeds, "tokens/s over transformers' generate")
        right.axvline(1, color="black", linewidth=0.8)
        right.set_yticklabels([])
        figure.savefig(path, format="svg", bbox_inches="tight", metadata={"Date": None})
        pyplot.close(figure)


def _bars(panel: Any, values: dict[str, dict[str, float | None]], title: str) -> None:
    shown = {name: value for name, value in values.items() if value["value"] is not None}
    middles = np.array([value["value"] for value in shown.values()], dtype=float)
    ends = [
        (
            v["value"] if v["low"] is None else v["low"],
            v["value"] if v["high"] is None else v["high"],
        )
        for v in shown.values()
    ]
    around = np.abs(np.array(ends, dtype=float).reshape(-1, 2).T - middles)
    panel.barh(list(shown), middles, xerr=around, height=0.6, error_kw={"linewidth": 0.8})
    panel.invert_yaxis()
    panel.set_title(title, loc="left", fontsize=10)
