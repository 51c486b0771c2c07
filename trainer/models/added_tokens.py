"""Tokens that a run adds to its base, `base.add_tokens`: in the tokenizer and in the model.

A new row of an embedding or an output layer starts as the mean of the rows of the pieces that the
tokenizer split the token into before, so it needs no random draw and is the same in every process.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class TokenError(ValueError):
    """A token cannot be added. The message says why and how to fix it."""


def extend(tokenizer: Any, tokens: Sequence[str]) -> dict[int, list[int]]:
    """Add tokens to a tokenizer, in place. Return the id of each, with the ids of its pieces.

    They are no special tokens: decoded answers show them.

    Raises:
        TokenError: a token is empty, is named twice, or is in the vocabulary already.
    """
    if not tokens:
        return {}
    known = tokenizer.get_vocab()
    for number, token in enumerate(tokens):
        fault = (
            "is no text"
            if not token.strip()
            else "is named twice"
            if token in tokens[:number]
            else "is a token of the base already"
            if token in known
            else None
        )
        if fault is not None:
            raise TokenError(f"base.add_tokens has {token!r}, which {fault}: leave it out")
    pieces = [tokenizer(token, add_special_tokens=False)["input_ids"] for token in tokens]
    tokenizer.add_tokens(list(tokens))
    ids = tokenizer.convert_tokens_to_ids(list(tokens))
    return dict(zip(ids, pieces, strict=True))


def resize(model: Any, vocabulary: int, pieces: dict[int, list[int]]) -> None:
    """Give a model rows for added tokens, in place. It keeps their ids as `added_tokens`, which an
    adapter trains. Rows are added only where the vocabulary has none to spare."""
    model.added_tokens = tuple(pieces)
    if not pieces:
        return
    if model.get_input_embeddings().weight.shape[0] < vocabulary:
        model.resize_token_embeddings(vocabulary, mean_resizing=False)
    head = getattr(model, "get_output_embeddings", lambda: None)()
    embedding = model.get_input_embeddings()
    tables: list[Tensor] = [embedding.weight]
    if head is not None and head.weight is not embedding.weight:
        tables.append(head.weight)
    if head is not None and getattr(head, "bias", None) is not None:
        tables.append(head.bias)
    with torch.no_grad():
        for table in tables:
            for token, parts in pieces.items():
                old = table[parts] if parts else table[: min(pieces)]
                table[token] = old.float().mean(0).to(table.dtype)
