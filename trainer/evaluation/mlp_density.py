"""The share of MLP activations that a model needs."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tasks.reading import DataError
from trainer.assembly.rows import load_held_out
from trainer.assembly.trained import Trained, load_trained
from trainer.data.held_out import HeldOut
from trainer.evaluation.loss import losses
from trainer.models.losses import CausalLoss, ClassLoss
from trainer.penalties.deft import Real, batch_tokens, medians, mlp_inputs, seen_by
from trainer.storage import atomic, checkpoints, run_folder
from trainer.training.finetune import real_tokens

SAMPLE = 512  # tokens for CETT thresholds
LEVELS = 1024  # thresholds of a layer, at equal distances in share of active neurons
PRECISION = 1e-6  # of the CETT value that is searched for
MEDIAN_BATCHES = 4

Layers = list[tuple[str, nn.Module]]
# (layer, its input, the real tokens) -> a new input, or None
Change = Callable[[int, Tensor, Tensor], Tensor | None]


class Rows:
    """The held-out rows, whose loss is computed while the MLPs' inputs are read or changed."""

    def __init__(
        self,
        loss: Callable[[dict[str, Any]], Any],
        held_out: HeldOut,
        batch_size: int,
        device: torch.device,
    ):
        self.loss, self.held_out, self.batch_size, self.device = loss, held_out, batch_size, device

    def tokens(self, layer: str) -> int:
        """Return how many tokens of all rows the layer of this name sees."""
        lengths, trained = (int(sizes.sum()) for sizes in self.held_out.sequences.sizes())
        if getattr(self.held_out.collate, "decoder_start", None) is None:
            return lengths
        in_decoder = "decoder" in layer.split(".")
        return trained + len(self.held_out.sequences) if in_decoder else lengths - trained

    def loss_with(self, layers: Layers, change: Change) -> float:
        """Return the mean loss per trained token. `change` is called with every layer's input."""
        now: dict[str, Real] = {}

        def loss(batch: dict[str, Any]) -> Any:
            now["real"] = real_tokens(batch)
            return self.loss(batch)

        def hook(index: int) -> Callable[..., Any]:
            def changed(_: nn.Module, inputs: tuple[Tensor, ...]) -> Any:
                other = change(index, inputs[0], seen_by(layers[index][0], now["real"]))
                return None if other is None else (other, *inputs[1:])

            return changed

        with contextlib.ExitStack() as stack:
            for index, (_, module) in enumerate(layers):
                stack.callback(module.register_forward_pre_hook(hook(index)).remove)
            result = losses(loss, self.held_out, self.batch_size, self.device)
        if not result:
            raise DataError("the held-out rows have no trained token, so they have no loss")
        return result["loss"]

    def medians(self, layers: Layers) -> list[float]:
        """Return the median |h| of each layer, over h that are not 0."""
        seen: list[tuple[dict[str, Any], Real]] = []

        def keep(batch: dict[str, Any]) -> Any:
            seen.append((batch, real_tokens(batch)))
            zero = torch.zeros(())
            return zero, {"loss": zero, "tokens": zero, "right": zero}

        losses(
            keep,
            self.held_out,
            self.batch_size,
            self.device,
            stop=lambda: len(seen) == MEDIAN_BATCHES,
        )
        return [median for _, median in medians(layers, self.loss, seen)]


@dataclass
class Sampled:
    """One MLP's activations h (N, F) of some tokens, and the effect of leaving out the smallest."""

    module: nn.Module
    h: Float[Tensor, "N F"]

    def __post_init__(self) -> None:
        self.norms = column_norms(self.module, self.h)
        self.scores = self.h.float().abs() * self.norms
        self.output = self.contribution(self.h)
        ordered = self.scores.flatten().sort().values
        places = [max(1, level * len(ordered) // LEVELS) for level in range(1, LEVELS)]
        # Between two scores, so that rounding moves no neuron across the threshold.
        self.thresholds = [
            0.0,
            *((ordered[place - 1] + ordered[place]).item() / 2 for place in places),
            math.inf,
        ]
        self.known = {0: 0.0, LEVELS: 1.0}  # with nothing and with everything left out

    def contribution(self, h: Float[Tensor, "N F"]) -> Float[Tensor, "N d"]:
        """Return the output of the down projection for h, without its bias."""
        return linear_part(self.module, h).float()

    def cett(self, level: int) -> float:
        """Return the mean over tokens of the norm of what is left out below a threshold, over the
        norm of the output."""
        if level not in self.known:
            left_out = self.contribution(self.h.where(self.scores < self.thresholds[level], 0))
            tiny = torch.finfo(torch.float32).tiny
            self.known[level] = float(
                (left_out.norm(dim=-1) / self.output.norm(dim=-1).clamp(min=tiny)).mean()
            )
        return self.known[level]

    def level(self, cett: float) -> int:
        """Return the highest threshold whose CETT is at most this; CETT rises with the
        threshold."""
        low, high = 0, LEVELS + 1
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.cett(middle) <= cett else (low, middle)
        return low


def linear_part(module: nn.Module, x: Float[Tensor, "N F"]) -> Float[Tensor, "N d"]:
    """Return W x of a layer, adapted or not, by calling it."""
    return module(x) - module(torch.zeros_like(x[:1]))


def column_norms(module: nn.Module, like: Float[Tensor, "N F"]) -> Float[Tensor, " F"]:
    """Return ‖W_j‖ of each neuron's column, from the layer's outputs for unit vectors: so it works
    for adapted and quantised layers too."""
    width = like.shape[1]
    norms = []
    for start in range(0, width, 256):
        rows = torch.arange(start, min(start + 256, width), device=like.device)
        units = torch.zeros(len(rows), width, dtype=like.dtype, device=like.device)
        units[torch.arange(len(rows)), rows] = 1
        norms.append(linear_part(module, units).float().norm(dim=-1))
    return torch.cat(norms)


@torch.no_grad()
def measured(layers: Layers, rows: Rows, taus: list[float], percent: float) -> dict[str, Any]:
    """Return the report of one model: `layers` by name, their `mean`, `loss`, and with `percent`
    the search's `ppl`."""
    every = [max(1, rows.tokens(name) // SAMPLE) for name, _ in layers]
    counts = torch.zeros(len(layers), 3, dtype=torch.float64)
    samples: list[list[Tensor]] = [[] for _ in layers]
    tokens = [0] * len(layers)

    def count(index: int, h: Tensor, real: Tensor) -> None:
        real_rows = batch_tokens(h, real)[real]
        nonzero, above = real_rows.count_nonzero(), (real_rows.abs() > taus[index]).sum()
        counts[index] += torch.tensor(
            [float(nonzero), float(above), real_rows.numel()], dtype=torch.float64
        )
        samples[index].append(real_rows[-tokens[index] % every[index] :: every[index]])
        tokens[index] += len(real_rows)

    dense = rows.loss_with(layers, count)
    sampled = [
        Sampled(module, torch.cat(parts))
        for (_, module), parts in zip(layers, samples, strict=True)
    ]
    by_layer: dict[str, Any] = {
        name: {
            "non_zero": float(nonzero / total),
            "above_tau": float(above / total),
            "cett_half": activations.cett(LEVELS // 2),
            "tau": tau,
        }
        for (name, _), (nonzero, above, total), activations, tau in zip(
            layers, counts, sampled, taus, strict=True
        )
    }
    result: dict[str, Any] = {"loss": dense, "layers": by_layer}
    if percent:
        result["ppl"], sparsity = search(layers, rows, sampled, dense, percent)
        for (name, _), share in zip(layers, sparsity, strict=True):
            by_layer[name]["ppl_sparsity"] = share
    return result | means(by_layer)


def means(by_layer: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """Return the `mean` of each number over all layers, and over those of the `encoder` and of the
    `decoder` apart where there are both."""
    decoder = [name for name in by_layer if "decoder" in name.split(".")]
    encoder = [name for name in by_layer if "encoder" in name.split(".")]
    groups = {"encoder": encoder, "decoder": decoder} if encoder and decoder else {}
    numbers = next(iter(by_layer.values()))
    return {
        group: {key: sum(by_layer[name][key] for name in names) / len(names) for key in numbers}
        for group, names in {**groups, "mean": list(by_layer)}.items()
    }


def search(
    layers: Layers, rows: Rows, sampled: list[Sampled], dense: float, percent: float
) -> tuple[dict[str, float], list[float]]:
    """Return (the largest CETT value at which exp(loss - `dense`) is at most 1 + `percent` / 100,
    with that ratio; each layer's share of neurons that were 0 then). The search assumes that the
    loss rises with CETT."""
    known: dict[tuple[int, ...], tuple[float, list[float]]] = {}

    def ratio(cett: float) -> tuple[float, list[float]]:
        levels = tuple(one.level(cett) for one in sampled)
        if levels not in known:
            loss, sparsity = loss_without(layers, rows, sampled, levels)
            known[levels] = math.exp(min(loss - dense, 700.0)), sparsity
        return known[levels]

    low, high = 0.0, 1.0
    if ratio(high)[0] <= 1 + percent / 100:
        low = high
    while high - low > PRECISION:
        middle = (low + high) / 2
        low, high = (middle, high) if ratio(middle)[0] <= 1 + percent / 100 else (low, middle)
    return {"percent": percent, "cett": low, "ratio": ratio(low)[0]}, ratio(low)[1]


@torch.no_grad()
def loss_without(
    layers: Layers, rows: Rows, sampled: list[Sampled], levels: tuple[int, ...]
) -> tuple[float, list[float]]:
    """Return (loss, each layer's share of zeros) with neurons set to 0 whose |h_j| ‖W_j‖ is below
    the layer's threshold."""
    zeros, totals = [0.0] * len(layers), [0] * len(layers)

    def zeroed(index: int, h: Tensor, real: Tensor) -> Tensor:
        layer = sampled[index]
        h = h.where(h.float().abs() * layer.norms >= layer.thresholds[levels[index]], 0)
        real_rows = batch_tokens(h, real)[real]
        zeros[index] += float((real_rows == 0).sum())
        totals[index] += real_rows.numel()
        return h

    loss = rows.loss_with(layers, zeroed)
    return loss, [zero / total for zero, total in zip(zeros, totals, strict=True)]


COLUMNS = {
    "non_zero": "non-zero",
    "above_tau": "above tau",
    "cett_half": "CETT at 50%",
    "ppl_sparsity": "PPL-{:g}%",
}


def measure_run(
    path: str, compare: bool, tau: float | None, percent: float, batch_size: int
) -> tuple[Trained, dict[str, dict[str, Any]]]:
    """Return (the run, the results of `measured` by model: with `compare` the base, and adapted).

    The thresholds are `tau`, else those that the run's penalty was calibrated to, else the medians
    of the first model.

    Raises:
        DataError: the run holds out no rows. Others: see load_trained.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    run = load_trained(path, device)
    model, penalty = run.model, run.config.get("penalty") or {}
    data = load_held_out(run.config, run.base, run.task)
    layers = mlp_inputs(model, penalty.get("modules", "auto"))
    chunk = run.config["objective"]["logits_chunk"]
    loss = ClassLoss(model) if run.task.kind == "label" else CausalLoss(model, chunk)
    assert data.held_out is not None
    rows = Rows(loss, data.held_out, batch_size, device)
    taus = [tau] * len(layers) if tau is not None else _taus_of_penalty(path)
    results: dict[str, dict[str, Any]] = {}
    for name in ["base", "adapted"] if compare else ["adapted"]:
        with run.adapter.disabled(model) if name == "base" else contextlib.nullcontext():
            taus = taus or rows.medians(layers)
            results[name] = measured(layers, rows, taus, percent)
    return run, results


def _taus_of_penalty(run: str) -> list[float] | None:
    """Return the thresholds that the run's penalty was calibrated to; None if it has none."""
    folder, _, which = run_folder.read(run)
    saved = checkpoints.load(checkpoints.chosen(folder / "checkpoints", which))
    return saved["penalty"]["tau"] if "penalty" in saved else None


def summary_lines(name: str, result: dict[str, Any]) -> Iterator[str]:
    """Yield a model's loss, and the share of neurons that can be set to 0."""
    yield f"{name}: loss {result['loss']:.4f}"
    if "ppl" in result:
        ppl = result["ppl"]
        yield (
            f"{name}: with {result['mean']['ppl_sparsity']:.1%} of the neurons set to 0 (CETT"
            f" {ppl['cett']:.4f}) exp(loss) is {ppl['ratio']:.4f} times as large"
        )


def density_table(results: dict[str, dict[str, Any]], percent: float) -> Any:
    """Return the table, a column for each number and model."""
    from rich.table import Table

    first = next(iter(results.values()))
    columns = [
        (key, title.format(percent)) for key, title in COLUMNS.items() if key in first["mean"]
    ]
    table = Table("MLP", "tau", *(f"{title}\n{name}" for _, title in columns for name in results))
    groups = [name for name in ("encoder", "decoder", "mean") if name in first]
    for layer in [*first["layers"], *groups]:
        values = [
            result[layer] if layer in groups else result["layers"][layer]
            for result in results.values()
        ]
        numbers = [f"{value[key]:.4f}" for key, _ in columns for value in values]
        table.add_row(
            layer,
            f"{values[0]['tau']:.3g}",
            *numbers,
            end_section=layer == list(first["layers"])[-1],
        )
    return table


def plot(results: dict[str, dict[str, Any]], percent: float, path: Path) -> None:
    """Draw each number by layer, a line for each model."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    first = next(iter(results.values()))
    columns = [
        (key, title.format(percent)) for key, title in COLUMNS.items() if key in first["mean"]
    ]
    with pyplot.rc_context(
        {
            "font.size": 9,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "svg.fonttype": "none",
        }
    ):
        figure, axes = pyplot.subplots(
            1, len(columns), figsize=(3.2 * len(columns), 2.9), squeeze=False
        )
        for (key, title), panel in zip(columns, axes[0], strict=True):
            for name, result in results.items():
                panel.plot(
                    [layer[key] for layer in result["layers"].values()],
                    "o-",
                    label=name,
                    linewidth=1.2,
                    markersize=3,
                )
            panel.set_title(title, loc="left", fontsize=10)
            panel.set_xlabel("MLP")
            panel.set_ylim(bottom=0)
            panel.grid(alpha=0.25)
        axes[0][0].legend(frameon=False)
        with atomic.file(path) as temporary:
            figure.savefig(temporary, format="svg", bbox_inches="tight", metadata={"Date": None})
        pyplot.close(figure)
