"""Rows cut to max_length, and counts of all rows."""

from __future__ import annotations

from dataclasses import dataclass, field

from tasks.reading import DataError
from trainer.data.render import Rendered, Renderer, Tokens

SHOWN = 20  # broken rows that an error or a report lists


@dataclass
class Report:
    """Counts of one split. A row makes one sequence, or several where each of its answers is
    trained after its own prompt. Every dropped sequence is counted in one of these fields."""

    rows: int = 0
    further: int = 0  # sequences of rows beyond the first of each
    kept: int = 0
    dropped: int = 0  # longer than max_length, with overlong=drop
    truncated: int = 0  # cut to max_length, with overlong=truncate
    answers_lost: int = 0  # dropped, since cutting left no trained token
    tokens_cut: int = 0
    skipped: int = 0  # broken, with on_bad=skip
    weightless: int = 0  # of weight 0
    special_text: int = 0  # rows whose messages hold the text of a special token
    ends_trained: int = 0  # rows whose last trained token ends the answer
    tokens: int = 0
    trained_tokens: int = 0
    longest: int = 0
    bad: list[tuple[str, str]] = field(default_factory=list)  # the first broken rows: where, why
    # rows by what the chat template leaves out of them, with on_lost=warn
    lost: dict[str, int] = field(default_factory=dict)
    unread: dict[str, int] = field(default_factory=dict)  # rows by what of them nothing reads

    def summary(self) -> str:
        """Return the counts as one line of text."""
        of = f"{self.rows} rows"
        if self.further:
            of = f"{self.rows + self.further} sequences of {of}"
        parts = [f"{self.kept} of {of} kept"]
        for count, text in (
            (self.dropped, "longer than max_length, dropped"),
            (self.truncated, f"truncated ({self.tokens_cut} tokens)"),
            (self.answers_lost, "lost their answer to truncation, dropped"),
            (self.skipped, "broken, skipped"),
            (self.weightless, "of weight 0, left out"),
        ):
            if count:
                parts.append(f"{count} {text}")
        share = self.trained_tokens / self.tokens if self.tokens else 0.0
        return "; ".join(parts) + f"; {self.tokens:,} tokens, {share:.0%} of them trained"

    def notes(self) -> list[str]:
        """Return what of the rows does not reach the model, as lines of text."""
        lines = []
        if self.lost:
            lines.append(f"the chat template leaves out {_counted(self.lost)}")
        if self.unread:
            lines.append(f"nothing reads {_counted(self.unread)}")
        return lines


def _counted(counts: dict[str, int]) -> str:
    return ", ".join(
        f"{name} ({count} {'row' if count == 1 else 'rows'})" for name, count in counts.items()
    )


def take(
    where: str,
    outcome: Rendered | str,
    renderer: Renderer,
    max_length: int,
    overlong: str,
    on_bad: str,
    report: Report,
) -> list[Tokens]:
    """Count one row, and return those of its sequences that are kept, cut to max_length. `outcome`
    is the row, or the reason why it cannot be used.

    Raises:
        DataError: a sequence is too long and overlong=raise, or it is the SHOWN-th broken row and
            on_bad=raise.
    """
    if isinstance(outcome, str):
        if len(report.bad) < SHOWN:
            report.bad.append((where, outcome))
        report.skipped += 1
        if on_bad == "raise" and report.skipped >= SHOWN:
            raise DataError(listing(report))
        return []
    report.further += len(outcome.sequences) - 1
    for counts, names in ((report.lost, outcome.lost), (report.unread, outcome.unread)):
        for name in names:
            counts[name] = counts.get(name, 0) + 1
    kept_rows = []
    for sequence in outcome.sequences:
        if sequence.weight == 0:
            report.weightless += 1
            continue
        row = fit(sequence, renderer, max_length, overlong, where, report)
        if row is None:
            continue
        kept_rows.append(row)
        report.kept += 1
        report.tokens += len(row.ids)
        report.trained_tokens += sum(row.trained)
        report.longest = max(report.longest, len(row.ids))
        last = next((i for i in range(len(row.ids) - 1, -1, -1) if row.trained[i]), None)
        report.ends_trained += last is not None and row.ids[last] in renderer.ends
    return kept_rows


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
    least = "at least " if report.skipped >= SHOWN else ""  # reading stops there
    return "\n".join(
        [
            *lines,
            *([f"and {least}{more} more broken rows"] if more > 0 else []),
            "Fix them, or skip them with task.on_bad=skip",
        ]
    )
