"""Multi-label classification: a text, or a pair of texts, and all its classes, none or several.

{"text": "a funny and sad film", "labels": ["comedy", "drama"]}
"""

from __future__ import annotations

from typing import Any

from tasks.classification import Classification
from tasks.reading import DataError
from tasks.task import column


class MultiLabel(Classification):
    """Texts, each with some of a fixed set of classes."""

    problem = "multi_label_classification"

    def labels_of(self, row: dict[str, Any]) -> list[str]:
        """Return the classes that a row names.

        Raises:
            DataError: they are no list of names or numbers, or one comes twice.
        """
        labels = column(row, self.columns, "labels")
        if not isinstance(labels, list) or not all(
            isinstance(label, str | int) and not isinstance(label, bool) and str(label).strip()
            for label in labels
        ):
            raise DataError(
                "labels must be a list of names or numbers of classes, as [comedy, drama] or [],"
                f" and is {type(labels).__name__}: {str(labels)[:60]!r}"
            )
        names = [str(label) for label in labels]
        if len(set(names)) < len(names):
            raise DataError(f"labels has a class twice: {str(labels)[:60]!r}")
        return names

    def target(self, row: dict[str, Any]) -> list[str]:
        """Return the classes of a row.

        Raises:
            DataError: they are no list, or one is none of the task's classes.
        """
        names = self.labels_of(row)
        if unknown := [name for name in names if name not in self.labels]:
            raise DataError(f"the class {unknown[0]!r} is none of: {', '.join(self.labels)}")
        return names
