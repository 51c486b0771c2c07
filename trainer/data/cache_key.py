"""The inputs of tokenised rows: the columns of their table, and the key of the cache.

The key of stored rows has the code that makes them. The identity of a stream has none, so that a
run resumes with a later version."""

from __future__ import annotations

import hashlib
import inspect
import json
import sys
from typing import Any

import datasets
import tokenizers
import transformers

import tasks.task
from tasks import arrow_rows, conversation, hub, messages, reading, strict_json
from trainer.data import chat_template, encoding, lost, render, tokens, turns
from trainer.data.lengths import fit
from trainer.data.render import Renderer

FEATURES = datasets.Features(
    {
        "ids": datasets.List(datasets.Value("int32")),
        "trained": datasets.List(datasets.Value("bool")),
        "label": datasets.Value("int32"),
        "index": datasets.Value("int64"),  # of the example in its split
        "where": datasets.Value("string"),
        "weight": datasets.Value("float64"),  # of the row in the loss
    }
)
# Part of the identity of streamed rows, which older runs recorded without a weight.
_STREAMED = str(
    datasets.Features({name: value for name, value in FEATURES.items() if name != "weight"})
)


def features(task: Any) -> datasets.Features:
    """Return the columns of a task's rows. Only those that are labelled with numbers or several
    classes have `values`, and only pairs of texts `types`: the identity of other rows depends on
    the names of their columns."""
    further: dict[str, Any] = {}
    if getattr(task, "problem", None) not in (None, "single_label_classification"):
        further["values"] = datasets.List(datasets.Value("float32"))
    if getattr(task, "pairs", False):
        further["types"] = datasets.List(datasets.Value("int32"))
    return datasets.Features({**FEATURES, **further}) if further else FEATURES


def cache_key(task: Any, split: str, renderer: Renderer, max_length: int, overlong: str) -> str:
    """Return a digest of everything that the tokenised rows depend on: data, template, tokenizer,
    lengths and code."""
    parts = (
        render,
        chat_template,
        turns,
        lost,
        encoding,
        tokens,
        fit,
        reading,
        strict_json,
        arrow_rows,
        hub,
        conversation,
        messages,
        tasks.task,
    )
    code = [inspect.getsource(part) for part in parts]
    modules = {kind.__module__ for kind in type(task).__mro__ if kind is not object}
    code += [inspect.getsource(sys.modules[name]) for name in sorted(modules)]
    # A stream's identity has no day: earlier versions recorded none.
    days = {str(template.day) for template in renderer.templates.values() if template.day}
    return _key(*code, *_settings(task, split, renderer, max_length, overlong), *sorted(days))


def source_key(task: Any, split: str, renderer: Renderer, max_length: int, overlong: str) -> str:
    """Return a digest of data, template, tokenizer and lengths, without code: the identity of rows
    that are never stored in a table."""
    return _key(*_settings(task, split, renderer, max_length, overlong))


def _key(*parts: Any) -> str:
    return hashlib.sha256("\0".join(map(str, parts)).encode()).hexdigest()[:32]


def _settings(
    task: Any, split: str, renderer: Renderer, max_length: int, overlong: str
) -> list[Any]:
    tokenizer = renderer.tokenizer
    backend = (
        tokenizer.backend_tokenizer.to_str()
        if getattr(tokenizer, "is_fast", False)
        else json.dumps(tokenizer.get_vocab())
    )
    return [
        _STREAMED,
        *(name for name in ("values", "types") if name in features(task)),
        backend,
        json.dumps(tokenizer.special_tokens_map, default=str),
        json.dumps(renderer.template),
        renderer.train_on,
        task.fingerprint(split),
        task.on_bad,
        max_length,
        overlong,
        tokenizers.__version__,
        transformers.__version__,
        *([f"on_lost={renderer.on_lost}"] if renderer.on_lost != "error" else []),
        *([json.dumps(renderer.variables, sort_keys=True)] if renderer.variables else []),
    ]
