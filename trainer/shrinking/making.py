"""A smaller base: from the options to a folder that was loaded back and compared."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tasks.reading import DataError
from trainer.assembly.build import instantiate
from trainer.assembly.rows import Data, load_data
from trainer.config.shrink_options import ShrinkOptions
from trainer.data.held_out import HeldOut
from trainer.evaluation.loss import losses
from trainer.exporting.compare import compare
from trainer.exporting.merged import cast_parameters
from trainer.models.base import Base
from trainer.models.folders import text_model_class
from trainer.models.losses import CausalLoss
from trainer.models.precision import bf16_is_fast
from trainer.shrinking import (
    card,
    divergence,
    drop_layers,
    evolution,
    narrow,
    search_levels,
    sliced,
)
from trainer.shrinking.families import Shape, layers_of, shape_of
from trainer.shrinking.patterns import Pattern
from trainer.shrinking.resuming import Resumed
from trainer.shrinking.sparse import Sparse, refuse_pruned
from trainer.shrinking.walk import Method, walk
from trainer.storage import atomic


@dataclass
class Work:
    """A base that is shrunk: its parts, and what was measured."""

    options: ShrinkOptions
    config: dict[str, Any]
    base: Base
    shape: Shape
    method: Method
    device: torch.device
    dtype: torch.dtype  # of the files
    record: dict[str, Any] = field(default_factory=dict)


def shrink(options: ShrinkOptions, config: dict[str, Any]) -> dict[str, Any]:
    """Write the smaller base to `options.to`. Return the record, as in its shrink.json.

    Raises:
        BaseError: the base cannot be shrunk by this method.
        DataError: there are too few rows.
        Mismatch: the folder, loaded back, gives other logits than the model in memory.
    """
    work = prepared(options, config)
    data = load_data(config, work.base, instantiate(config["task"]))
    rows = calibration_rows(data, options, work.base.config.get_text_config().hidden_size)
    held_out = held_out_of(data, options)
    settings = {
        **options.described,
        "method": options.method,
        "rows": options.rows,
        "seed": options.seed,
        "base": work.base.fingerprint,
        "data": data.identity["train"],
        "max_length": config["max_length"],
        "device": work.device.type,
    }
    options.to.parent.mkdir(parents=True, exist_ok=True)
    with Resumed(options.to, settings) as resumed:
        model: Any = work.base.load(_computed(work))
        action = "Give the unpruned base, or drop layers, which keeps its zeros"
        if options.method != "drop_layers":
            refuse_pruned(layers_of(model, work.shape), work.shape, work.base.path, action)
        work.record = {
            **{key: value for key, value in settings.items() if key != "device"},
            "tokens": sum(map(len, rows)),
            "before": sizes(model, work.dtype) | measured(model, held_out, work),
        }
        apply(work, model, rows, resumed)
        cast_parameters(model, work.dtype)  # the figures are those of the written dtype
        cast_parameters(model, _computed(work))
        work.record["after"] = sizes(model, work.dtype) | measured(model, held_out, work)
        write(work, model, rows[0])
    return work.record


def prepared(options: ShrinkOptions, config: dict[str, Any]) -> Work:
    """Return the work, after everything that can be checked without weights.

    Raises:
        BaseError: the base cannot be shrunk by this method.
    """
    base: Base = instantiate(config["base"])
    shape = shape_of(base)
    skeleton: Any = base.skeleton()
    layers = layers_of(skeleton, shape)
    settings = options.described
    method: Method
    if options.method == "drop_layers":
        drop_layers.check(settings["layers"], len(layers))
        method = drop_layers.Influence(settings["score"])
    elif options.method == "slice":
        sliced.check(base.config.model_type)
        size, of_heads = base.config.hidden_size, sliced.heads(base.config)
        states = sliced.width(settings["width"], size, settings["multiple"], of_heads)
        method = sliced.Sliced(states, size)
    elif options.method == "narrow":
        narrow.check(shape, base.config.model_type)
        neurons = getattr(base.config, shape.width)
        neurons_left = narrow.width(settings["ffn"], neurons, settings["multiple"])
        method = narrow.Narrow(neurons_left, settings["score"], shape)
    else:
        pattern = Pattern.of(settings["pattern"], settings.get("density"))
        sparse = Sparse(options.method, pattern, settings["part"], shape)
        sparse.check(layers)
        if options.search is not None:
            search_levels.check(sparse, layers, settings["step"])
        method = sparse
    cuda = torch.cuda.is_available() and config["lightning"]["accelerator"] != "cpu"
    stored = base.config.dtype or torch.float32
    dtype = stored if base.dtype == "auto" else getattr(torch, base.dtype)
    device = torch.device("cuda" if cuda else "cpu")
    return Work(options, config, base, shape, method, device, dtype)


def _computed(work: Work) -> torch.dtype:
    """Return the dtype that the model has in memory: that of its files where it is fast."""
    fast = work.device.type == "cuda" or bf16_is_fast(False)
    return work.dtype if fast and work.dtype == torch.bfloat16 else torch.float32


def calibration_rows(data: Data, options: ShrinkOptions, width: int) -> list[Tensor]:
    """Draw rows from the training rows, (t,) int64 each.

    Raises:
        DataError: there are fewer rows, or they have fewer tokens than the states have numbers.
    """
    if data.task.kind == "label":
        raise DataError(
            "graft shrink reads texts or conversations, and this task classifies. Use task=sft or"
            " task=completion with rows of the same kind of text"
        )
    if data.train is None:
        raise DataError("task.streaming=true: calibration rows are drawn from all. Leave it out")
    table = data.train.rows
    if len(table) < options.rows:
        raise DataError(
            f"rows={options.rows}: the task has {len(table)} training rows. Use"
            f" rows={max(1, len(table))}, or more data"
        )
    draw = np.random.default_rng(options.seed)
    places = np.sort(draw.choice(len(table), options.rows, replace=False))
    rows = [torch.tensor(table[int(place)].ids) for place in places]
    if (tokens := sum(map(len, rows))) < width:
        raise DataError(
            f"rows={options.rows}: these rows have {tokens} tokens, and the states of the base have"
            f" {width} numbers, which so few tokens do not show. Use more rows="
        )
    return rows


def held_out_of(data: Data, options: ShrinkOptions) -> HeldOut | None:
    """Return the rows that the loss is measured on.

    Raises:
        DataError: there are none.
    """
    if not options.evaluate:
        return None
    if data.held_out is None:
        raise DataError(
            "the task has no held-out rows to measure the loss on: set task.eval_fraction or"
            " task.eval_path, or evaluate=false"
        )
    return data.held_out


def apply(work: Work, model: Any, rows: list[Tensor], resumed: Resumed) -> None:
    """Shrink the model in place, and record the figures of its layers."""
    layers = layers_of(model, work.shape)
    if isinstance(work.method, Sparse) and work.options.search is not None:
        work.record |= levels_searched(work, work.method, model, rows, resumed)
    figures = walk(model, layers, rows, work.method, work.device, resumed)
    work.record["layers_figures"] = figures
    if isinstance(work.method, drop_layers.Influence):
        least = drop_layers.least(figures, work.options.described["layers"])
        work.record["dropped"] = least
        if work.options.search is not None:
            work.record |= searched(work, model, rows, least, resumed)
        drop_layers.drop(model, work.shape, work.record["dropped"])
    elif isinstance(work.method, sliced.Sliced):
        rotation, share = work.method.rotation()
        work.record |= {"states": work.method.states, "variance": share}
        sliced.apply(model, layers, rotation)
    elif isinstance(work.method, narrow.Narrow):
        work.record["neurons"] = work.method.neurons
        setattr(model.config, work.shape.width, work.method.neurons)


def searched(
    work: Work, model: Any, rows: list[Tensor], least: list[int], resumed: Resumed
) -> dict[str, Any]:
    """Search for the layers that go, from those of least influence on. The device holds the whole
    model meanwhile."""
    options, layers = work.options, layers_of(model, work.shape)
    count = options.described["layers"]
    settings = evolution.Settings(
        options.generations or evolution.generations_of(len(layers), count),
        options.described["offspring"],
    )
    without = drop_layers.without(len(layers))
    judge = divergence.Divergence(model, layers, rows, work.device, without)
    space = evolution.Sets(len(layers), count)
    job = evolution.Search(space, judge, options.seed, settings)
    record = divergence.search(judge, job, tuple(least), resumed.path / "search.json")
    model.to("cpu")
    return {
        "dropped": list(record["best"]),
        "generations": record["generations"],
        "divergence": record["divergence"],
        "divergence_least_influence": record["divergence_start"],
    }


def levels_searched(
    work: Work, method: Sparse, model: Any, rows: list[Tensor], resumed: Resumed
) -> dict[str, Any]:
    """Search for the share of each linear that stays, from the same share of all on. The device
    holds the whole model meanwhile."""
    options, layers = work.options, layers_of(model, work.shape)
    settings = replace(evolution.OF_LEVELS, offspring=options.described["offspring"])
    if options.generations is not None:
        settings = replace(settings, generations=options.generations)
    masks = search_levels.masks(method, model, layers, rows, options.described["step"], work.device)
    judge = divergence.Divergence(model, layers, rows, work.device, masks.run_at)
    job = evolution.Search(masks.space, judge, options.seed, settings)
    record = divergence.search(judge, job, masks.uniform, resumed.path / "search.json")
    method.patterns = masks.patterns(record["best"])
    model.to("cpu")
    return {
        "generations": record["generations"],
        "divergence": record["divergence"],
        "divergence_uniform": record["divergence_start"],
    }


def sizes(model: nn.Module, dtype: torch.dtype) -> dict[str, Any]:
    """Return the number of parameters, of those that are not zero, and their bytes in a file."""
    parameters = list(model.parameters())
    count = sum(p.numel() for p in parameters)
    return {
        "parameters": count,
        "bytes": count * dtype.itemsize,
        "nonzero": sum(int(p.count_nonzero()) for p in parameters),
    }


def measured(model: Any, held_out: HeldOut | None, work: Work) -> dict[str, float]:
    """Return loss, perplexity and accuracy on the held-out rows, and the seconds that 1000 of their
    tokens take on this machine."""
    if held_out is None:
        return {}
    model.to(work.device)
    loss = CausalLoss(model, work.config["objective"]["logits_chunk"])
    start = time.perf_counter()
    result = losses(loss, held_out, work.config["batch_size"], work.device)
    seconds = time.perf_counter() - start
    model.to("cpu")
    tokens = int(held_out.sequences.sizes()[0].sum())
    return result | {"seconds_per_1000_tokens": 1000 * seconds / max(1, tokens)}


@torch.no_grad()
def write(work: Work, model: Any, row: Tensor) -> None:
    """Write the folder, load it back and compare.

    Raises:
        Mismatch: the loaded model gives other logits.
    """
    expected = _outputs(model, row)
    with atomic.folder(work.options.to) as temporary:
        cast_parameters(model, work.dtype)
        model.config.dtype = work.dtype
        model.save_pretrained(temporary)
        work.base.load_tokenizer().save_pretrained(temporary)
        text = json.dumps(work.record, indent=2) + "\n"
        (temporary / "shrink.json").write_text(text, "utf-8")
        loaded: Any = text_model_class(model.config).from_pretrained(
            temporary, dtype=_computed(work), attn_implementation=model.config._attn_implementation
        )
        difference = compare(expected, _outputs(loaded.eval(), row))
        card.write(temporary, work.options.to.name, work.config, work.record, difference)


def _outputs(model: Any, row: Tensor) -> list[Tensor]:
    """Return the states after each layer and the logits of a row."""
    output = model(input_ids=row.unsqueeze(0), output_hidden_states=True, use_cache=False)
    return [state.float() for state in (*output.hidden_states, output.logits)]
