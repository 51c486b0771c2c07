"""The errors of adapters."""

from __future__ import annotations


class AdapterError(ValueError):
    """The adapter does not fit the model. The message names the setting and the possible values."""


class NeedsWeights(AdapterError):
    """The trained parameters depend on the base's weights, which a model on the meta device does
    not have."""
