"""The table and the plot of scripts.bench.speculation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

HEADS = ("drafter", "decoding", "min", "steps", "parameters", "tau")
COST_HEADS = (
    "ms to draft",
    "ms to verify",
    "transformers tokens/s",
    "own loop",
    "with the drafter",
    "ratio",
    "texts that differ",
)
LEGEND = (
    "\n\ntau: tokens per target pass, including the target's own. taken k: how often the k-th"
    " drafted token was accepted if all before it were. ratio: tokens/s over transformers' greedy"
    " generate, with 95 % of bootstraps over the prompts.\n"
)


def table(done: list[dict[str, Any]]) -> str:
    """Return a table with a line for each decoding, and one of the costs of a pass."""
    trained = {(row["drafter"], row["minutes"]): row for row in done if row["kind"] == "training"}
    decoded = [row for row in done if row["kind"] == "decoding"]
    levels = min(4, max((len(row["found"]["positions"]) for row in decoded), default=0))
    heads = [*HEADS, *(f"taken {k}" for k in range(1, levels + 1)), *COST_HEADS]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for row in decoded:
        training = trained.get((row["drafter"], row["minutes"]))
        lines.append(f"| {' | '.join(_cells(row, training, levels))} |")
    text = ("\n".join(lines) if decoded else "") + LEGEND
    return text + "".join(_costs(row) for row in done if row["kind"] == "costs")


def _cells(row: dict[str, Any], training: dict[str, Any] | None, levels: int) -> list[str]:
    result = row["found"]
    cells = [row["drafter"], row["decoding"]]
    if training:
        cells += [f"{row['minutes']:g}", f"{training['steps']}", f"{training['parameters']:,}"]
    else:
        cells += ["", "", ""]
    taken = [position["conditional"] for position in result["positions"][:levels]]
    ways = [
        result["ways"][way]["tokens_per_second"] for way in ("transformers", "plain", "drafter")
    ]
    times = [result["pass"][name] for name in ("draft_ms", "verify_ms")]
    return [
        *cells,
        interval(result["tau"]),
        *("-" if share is None else f"{share:.1%}" for share in taken),
        *[""] * (levels - len(taken)),
        *("-" if time is None else f"{time:.1f}" for time in times),
        *("-" if rate is None else f"{rate:.1f}" for rate in ways),
        interval(result["speed_up"]["transformers"]),
        f"{result['different_texts']['drafter']} of {result.get('compared', result['answers'])}",
    ]


def _costs(row: dict[str, Any]) -> str:
    text = (
        f"\nA pass of {row['base']} over n tokens after {row['context']}, in {row['dtype']}:\n\n"
        f"| n | {' | '.join(row['chain'])} |\n{'|---' * (1 + len(row['chain']))}|\n"
    )
    for shape in ("chain", "tree"):
        for name, digits in (("ms", 1), ("ratio", 2)):
            values = " | ".join(f"{cost[name]:.{digits}f}" for cost in row[shape].values())
            text += f"| {shape}, {name} | {values} |\n"
    return text


def interval(value: dict[str, Any]) -> str:
    """Return a ratio and its confidence interval."""
    if value["value"] is None:
        return "-"
    return f"{value['value']:.2f}" + (
        "" if value["low"] is None else f" ({value['low']:.2f} to {value['high']:.2f})"
    )


def plot(done: list[dict[str, Any]], file: Path) -> None:
    """Plot tau, tokens per second over transformers', and the time of a pass over more tokens."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    decoded = [row for row in done if row["kind"] == "decoding"]
    names = [
        f"{row['drafter']}, {row['decoding']}" if row["minutes"] is not None else row["drafter"]
        for row in decoded
    ]
    figure, (left, middle, right) = pyplot.subplots(
        1, 3, figsize=(13, 1.5 + 0.3 * max(8, len(names)))
    )
    for panel, values, label in (
        (left, [row["found"]["tau"] for row in decoded], "tau: tokens of a target pass"),
        (
            middle,
            [row["found"]["speed_up"]["transformers"] for row in decoded],
            "tokens/s over transformers' generate",
        ),
    ):
        centres = [value["value"] or 0.0 for value in values]
        ends = [
            [
                centre - (value["low"] or centre)
                for centre, value in zip(centres, values, strict=True)
            ],
            [
                (value["high"] or centre) - centre
                for centre, value in zip(centres, values, strict=True)
            ],
        ]
        panel.barh(names, centres, xerr=ends, height=0.6)
        panel.invert_yaxis()
        panel.set(xlabel=label)
    middle.axvline(1, color="black", linewidth=1)
    middle.set_yticklabels([])
    for row in done:
        if row["kind"] == "costs":
            for shape in ("chain", "tree"):
                right.plot(
                    [int(n) for n in row[shape]],
                    [cost["ratio"] for cost in row[shape].values()],
                    "o-",
                    label=shape,
                )
            right.set(
                xlabel="tokens of a pass", ylabel="time over that of one token", ylim=(0, None)
            )
            right.legend()
    figure.tight_layout()
    figure.savefig(file)
