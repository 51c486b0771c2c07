"""Rows cut to max_length, and counts of all rows."""

from __future__ import annotations

from dataclasses import dataclass, field

from tasks.reading import DataError
from trainer.data.render import Renderer, Tokens

SHOWN = 20  # broken rows that an error or a report lists


@dataclass
class Report:
    """Row counts of one split. Every dropped row is counted in one of these fields."""

    rows: int = 0
    kept: int = 0
    dropped: int = 0  # longer than max_length, with overlong=drop
    truncated: int = 0  # cut to max_length, with overlong=truncate
    answers_lost: int = 0  # dropped, since cutting left no trained token
    tokens_cut: int = 0
    skipped: int = 0  # broken, with on_bad=skip
    special_text: int = 0  # rows whose messages hold the text of a special token
    ends_trained: int = 0  # rows whose last trained token ends the answer
    tokens: int = 0
    trained_tokens: int = 0
    longest: int = 0
    bad: list[tuple[str, str]] = field(default_factory=list)  # the first broken rows: where, why

    def summary(self) -> str:
        """Return the counts as one line of text."""
        parts = [f"{self.kept} of {self.rows} rows kept"]
        for count, text in (
            (self.dropped, "longer than max_length, dropped"),
            (self.truncated, f"truncated ({self.tokens_cut} tokens)"),
            (self.answers_lost, "lost their answer to truncation, dropped"),
            (self.skipped, "broken, skipped"),
        ):
            if count:
                parts.append(f"{count} {text}")
        share = self.trained_tokens / self.tokens if self.tokens else 0.0
        return "; ".join(parts) + f"; {self.tokens:,} tokens, {share:.0%} of them trained"


def take(
    where: str,
    outcome: Tokens | str,
    renderer: Renderer,
    max_length: int,
    overlong: str,
    on_bad: str,
    report: Report,
) -> Tokens | None:
    """Count one row, and return it if it is kept, cut to max_length. `outcome` is the row, or the
    reason why it cannot be used.

    Raises:
        DataError: the row is too long and overlong=raise, or it is the SHOWN-th broken row and
            on_bad=raise.
    """
    if isinstance(outcome, str):
        if len(report.bad) < SHOWN:
            report.bad.append((where, outcome))
        report.skipped += 1
        if on_bad == "raise" and report.skipped >= SHOWN:
            raise DataError(listing(report))
        return None
    row = fit(outcome, renderer, max_length, overlong, where, report)
    if row is None:
        return None
    report.kept += 1
    report.tokens += len(row.ids)
    report.trained_tokens += sum(row.trained)
    report.longest = max(report.longest, len(row.ids))
    last = next((i for i in range(len(row.ids) - 1, -1, -1) if row.trained[i]), None)
    report.ends_trained += last is not None and row.ids[last] in renderer.ends
    return row


def fit(
    row: Tokens, renderer: Renderer, max_length: int, overlong: str, where: str, report: Report
) -> Tokens | None:
    """Return a row that is no longer than max_length, None if it is dropped.

    Raises:
        DataError: it is longer, and overlong=raise.
    """
    if len(row.ids) <= max_length:
        return row
    if overlong == "raise":
        raise DataError(
            f"{where}: {len(row.ids)} tokens, more than max_length={max_length}. Set overlong=drop"
            " or truncate, or a larger max_length"
        )
    if overlong == "drop":
        report.dropped += 1
        return None
    cut = renderer.cut(row, max_length)
    if any(row.trained[1:]) and not any(cut.trained[1:]):
        report.answers_lost += 1
        return None
    report.truncated += 1
    report.tokens_cut += len(row.ids) - max_length
    return cut


def listing(report: Report) -> str:
    """List the first broken rows, one a line, and say how to continue."""
    lines = [f"{where}: {reason}" for where, reason in report.bad[:5]]
    more = report.skipped - len(lines)
    return "\n".join(
        [
            *lines,
            *([f"and {more} more broken rows"] if more > 0 else []),
            "Fix them, or skip them with task.on_bad=skip",
        ]
    )
