"""The updates of several adapters of one base, combined into one adapter.

    τ_j    the update of adapter j, w_j its weight, s_j its scale, τ_j = s_j B_j A_j + S_j

    method           low-rank factors                              entries of the sparse part
    cat              A = [w_1 s_1 A_1; w_2 s_2 A_2], B = [B_1 B_2]  Σ w_j S_j
    linear           A = Σ √(w_j s_j) A_j, B alike                  Σ w_j S_j
    magnitude_prune  linear, of the largest `density` of A_j and B_j  the same, of S_j
    dare_linear      linear, of a random `density`, divided by it     the same, of S_j
    ties             the largest `density`; the sign of Σ_j A_j; the mean of the weighted entries
                     with that sign
    dare_ties        as ties, of a random `density`
    svd, X_svd       X (svd: the sum) of the whole s_j B_j A_j, cut to a rank

cat is the weighted sum of the updates, exactly. svd is the nearest to it of its rank. linear has
products of one run's A with another's B in it, which no run has trained. The low-rank part is that
of PEFT's add_weighted_adapter. The sparse part is here, on the union of the supports.

Sources: TIES (Yadav et al. 2023, arXiv 2306.01708), DARE (Yu et al. 2023, arXiv 2311.03099).

Differs from the papers: they act on the update of the whole weight; X does so only as X_svd.
PEFT elects signs before it weighs, so a negative weight does not turn a sign.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adapters import io, stock
from adapters.delta import AdaptedLinear
from adapters.errors import AdapterError
from adapters.linear import features
from adapters.lora import scaling
from adapters.rosa import RoSA
from adapters.sparse import SparseDelta
from adapters.sparse_adapter import SparseAdapter

Sparse = tuple[Tensor, Tensor]  # (k,) int32 sorted flat indices row · i + column, and (k,) values
RESULT = "default"


@dataclass(frozen=True)
class Combination:
    """A method, the weights of the adapters, and what the method takes."""

    method: str
    weights: tuple[float, ...]
    density: float | None = None
    rank: int | None = None  # of X_svd; None takes the largest of the adapters
    seed: int = 0  # of dare's draws


@dataclass
class LowRank:
    """The combined low-rank part."""

    rank: int
    tensors: dict[str, Tensor]  # by PEFT's keys; the scale is 1
    names: list[str]  # of the layers
    transposed: bool  # whether they are GPT-2's Conv1D
    # By layer, in the layout of its weight: the update that is meant, and Σ w_j τ_j
    meant: dict[str, Tensor] = field(default_factory=dict)
    sums: dict[str, Tensor] = field(default_factory=dict)


def low_rank(model: nn.Module, folders: dict[int, Path], how: Combination) -> LowRank:
    """Combine LoRA folders of stock PEFT, by the adapter's position in `how.weights`. The model is
    their base; it is the same afterwards.

    Raises:
        AdapterError: PEFT cannot combine them.
    """
    import peft

    for folder in folders.values():
        _refuse_parameters(folder)
    with _silent(), torch.random.fork_rng(devices=[]):
        names = {f"run{position}": folder for position, folder in folders.items()}
        first, *others = names
        live: Any = peft.PeftModel.from_pretrained(model, names[first], adapter_name=first)  # type: ignore[arg-type]
        for name in others:
            live.load_adapter(names[name], adapter_name=name)
        layers = {name: _layers(live, name) for name in names}
        transposed = any(config.fan_in_fan_out for config in live.peft_config.values())
        for name, config in live.peft_config.items():
            # PEFT takes the first adapter's config with r and lora_alpha of its own: its layers
            # would be the first's alone, and sqrt(r) of rsLoRA would scale the result.
            config.target_modules, config.exclude_modules = set(layers[name]), None
            config.layers_to_transform = config.layers_pattern = None
            config.use_rslora, config.lora_dropout = False, 0.0
        torch.manual_seed(how.seed)  # after the loading, which draws too
        try:
            live.base_model.add_weighted_adapter(
                list(names),
                [how.weights[position] for position in folders],
                RESULT,
                combination_type=how.method,
                svd_rank=how.rank,
                svd_full_matrices=False,
                density=how.density,
            )
        except ValueError as error:
            raise AdapterError(f"method={how.method}: PEFT refuses: {error}") from error
        tensors = peft.get_peft_model_state_dict(
            live, adapter_name=RESULT, save_embedding_layers=False
        )
        tensors = {key: tensor.detach().cpu().clone() for key, tensor in tensors.items()}
        result = LowRank(live.peft_config[RESULT].r, tensors, _layers(live, RESULT), transposed)
        for layer in result.names:
            module = live.get_base_model().get_submodule(layer)
            result.sums[layer] = sum(
                how.weights[position] * module.get_delta_weight(f"run{position}").detach()
                for position in folders
                if layer in layers[f"run{position}"]
            ).float()  # type: ignore[union-attr]
            own = module.get_delta_weight(RESULT).detach().float()
            result.meant[layer] = result.sums[layer].clone() if how.method == "cat" else own
        live.unload()
    return result


def _layers(live: Any, name: str) -> list[str]:
    """Return the layers that have PEFT's adapter of this name."""
    return [
        layer
        for layer, module in live.get_base_model().named_modules()
        if name in getattr(module, "lora_A", ()) or name in getattr(module, "lora_embedding_A", ())
    ]


def _refuse_parameters(folder: Path) -> None:
    if tensors := stock.read_config(folder).get("target_parameters"):
        raise AdapterError(
            f"the adapter in {folder} updates tensors of experts, such as {tensors[0]}, which PEFT"
            " does not combine: export each run with to=merged"
        )


def sparse(parts: dict[int, Sparse], how: Combination) -> Sparse:
    """Combine the sparse updates of one layer, by the adapter's position in `how.weights`. Entries
    that become zero are left out; at least one stays. Draws come from torch's generator."""
    from peft.utils import merge_utils

    method = how.method.removesuffix("_svd")
    union = torch.cat([indices for indices, _ in parts.values()]).unique()
    rows = torch.zeros(len(parts), len(union))
    for row, (indices, values) in zip(rows, parts.values(), strict=True):
        values = values.detach().float().cpu()
        if how.density is not None and how.density < 1:
            random = method.startswith("dare")
            kind: Any = "random" if random else "magnitude"
            values = merge_utils.prune(values, how.density, kind, rescale=random)
        row[torch.searchsorted(union, indices)] = values
    weighted = rows * torch.tensor([how.weights[position] for position in parts])[:, None]
    if method.endswith("ties"):
        elected = merge_utils.calculate_majority_sign_mask(rows)
        total = merge_utils.disjoint_merge(weighted, elected)
    else:
        total = weighted.sum(0)
    support = total.nonzero().squeeze(1)
    support = support if len(support) else torch.zeros(1, dtype=torch.int64)
    return union[support].int(), total[support]


def add_sparse(
    low: LowRank, model: nn.Module, parts: list[dict[str, Sparse]], how: Combination
) -> dict[str, Sparse]:
    """Combine the adapters' sparse updates, by layer, and add them to the dense ones of `low`."""
    results = {}
    with _silent(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(how.seed + 1)  # not the draws of the low-rank part
        for name in dict.fromkeys(name for part in parts for name in part):
            mine = {i: part[name] for i, part in enumerate(parts) if name in part}
            results[name] = sparse(mine, how)
            shape = features(model.get_submodule(name))[::-1]
            for dense, updates in (
                (low.sums, [(how.weights[i], *update) for i, update in mine.items()]),
                (low.meant, [(1.0, *results[name])]),
            ):
                flat = dense.setdefault(name, torch.zeros(shape)).view(-1)
                for weight, indices, values in updates:
                    flat.index_add_(0, indices.long(), weight * values.detach().float().cpu())
    return results


class Summed(SparseAdapter):
    """A combined low-rank and sparse update, to be written as stock PEFT reads it."""

    def __init__(self, rank: int):
        super().__init__(1.0, {}, "all-linear", [], "gathered", "float32")
        self.rank, self.alpha = rank or None, float(rank)

    def put(self, model: nn.Module, low: LowRank, parts: dict[str, Sparse]) -> None:
        """Attach the updates to a model's layers."""
        self.densest = 0.0
        nothing = torch.zeros(1, dtype=torch.int32), torch.zeros(1)
        for name in dict.fromkeys([*parts, *low.names]):
            indices, values = parts.get(name, nothing)
            linear: Any = model.get_submodule(name)
            delta = self._delta(linear, len(values))
            with torch.no_grad():
                delta.values.copy_(values)
                delta.indices.copy_(indices)
                for key, factor in (("lora_A", delta.A), ("lora_B", delta.B)):
                    if factor is not None:
                        factor.zero_()
                        saved = low.tensors.get(f"{io.PREFIX}{name}.{key}.weight")
                        if saved is not None:
                            factor.copy_(saved)
            delta.has_support = True
            # Half an entry more, so that PEFT's int(o i (1 - sparsity)) leaves none out
            self.densest = max(self.densest, (len(values) + 0.5) / (delta.o * delta.i))
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, AdaptedLinear(linear, delta))
        self.densest = min(self.densest, 1.0)

    def _delta(self, linear: Any, k: int) -> SparseDelta:
        if self.rank is None:
            return SparseDelta(linear, k, torch.float32)
        return RoSA(
            linear,
            k,
            self.rank,
            scaling(self.rank, self.alpha, False),
            0.0,
            torch.float32,
            torch.float32,
        )

    def take_off(self, model: nn.Module) -> None:
        """Put the layers back that `put` has wrapped."""
        for name, module in list(model.named_modules()):
            if isinstance(module, AdaptedLinear):
                parent, _, child = name.rpartition(".")
                setattr(model.get_submodule(parent), child, module.base)


def lost(low: LowRank) -> float:
    """Return how far the combined update is from Σ w_j τ_j: the norm of the difference over that of
    the sum, over all layers."""
    difference = sum(float((low.meant[n] - t).square().sum()) for n, t in low.sums.items())
    total = sum(float(t.square().sum()) for t in low.sums.values())
    return (difference / total) ** 0.5 if total else 0.0


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Silence PEFT's warnings that users cannot act on."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="(?s).*a tied layer is part of the adapter.*")
        warnings.filterwarnings("ignore", message="The density .* no pruning will be performed")
        warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute.*")
        warnings.filterwarnings("ignore", message=".*modify a model with PEFT for a second time.*")
        yield
