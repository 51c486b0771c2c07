"""Modules of the base that are trained besides an adapter: whole, or some rows of an embedding.

    TrainedCopy   a module and its trained fp32 copy, which answers instead (PEFT's modules_to_save)
    TokenRows     an embedding or output layer, some rows of which are replaced by trained ones
                  (PEFT's trainable_token_indices)

The base's own module stays as it is, so that the base alone can still answer. An embedding whose
weight is also the output layer's is trained as one: both read the same trained parameter.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from adapters.errors import AdapterError
from adapters.linear import ends_with, is_packed, output_layer


class Trained(nn.Module):
    """A frozen module of the base with a trained part that answers in its place."""

    base: Any

    def shown(self) -> dict[str, Tensor]:
        """Return the tensors of the module as it answers, under the base module's names."""
        raise NotImplementedError

    def plain(self) -> nn.Module:
        """Return the base's module with the trained tensors in the base's dtype."""
        with torch.no_grad():
            for name, tensor in self.shown().items():
                self.base.get_parameter(name).copy_(tensor)
        return self.base

    # Models read these of their embeddings and output layers.
    @property
    def weight(self) -> Any:
        return self.shown()["weight"]

    @property
    def bias(self) -> Any:
        return getattr(self.base, "bias", None)

    @property
    def num_embeddings(self) -> int:
        return self.base.weight.shape[0]


class TrainedCopy(Trained):
    """A module and its trained copy. The copy computes in fp32; what it returns has the dtype of
    the base's module."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.base = module
        self.copy = copy.deepcopy(module).float().requires_grad_(True)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        dtype = next(self.copy.parameters()).dtype
        out = self.copy(*(_in(dtype, value) for value in args), **kwargs)
        return _in(next(self.base.parameters()).dtype, out)

    def shown(self) -> dict[str, Tensor]:
        return dict(self.copy.named_parameters())

    @property
    def weight(self) -> Any:
        return self.copy.weight


class TokenRows(Trained):
    """Trained rows (n, d) in place of those of n tokens, in an embedding or an output layer.

    Embedding   y_t = scale rows[j] where the token at t is number j of these, else the base's
    Output      logit_j = rows[j] x + b_j for these tokens, else the base's
    """

    base: Any
    indices: Tensor

    def __init__(self, module: Any, tokens: tuple[int, ...]):
        super().__init__()
        self.base = module
        self.register_buffer(
            "indices", torch.tensor(tokens, device=module.weight.device), persistent=False
        )
        self.rows = nn.Parameter(module.weight.detach()[list(tokens)].float().clone())

    @property
    def tokens(self) -> list[int]:
        """The ids of the trained tokens."""
        return self.indices.tolist()

    def forward(self, x: Tensor) -> Tensor:
        out = self.base(x)
        if not isinstance(self.base, nn.Embedding):
            bias = self.base.bias
            logits = F.linear(
                x.to(self.rows.dtype), self.rows, None if bias is None else bias[self.indices]
            )
            return out.index_copy(-1, self.indices, logits.to(out.dtype))
        order = self.indices.argsort()
        places = torch.searchsorted(self.indices[order], x).clamp_max(len(order) - 1)
        number = order[places]
        mine = self.indices[number] == x
        rows = F.embedding(number, self.rows) * _scale(self.base)
        return torch.where(mine.unsqueeze(-1), rows.to(out.dtype), out)

    def shown(self) -> dict[str, Tensor]:
        tensors = dict(self.base.named_parameters())
        weight: Float[Tensor, "V d"] = tensors["weight"].detach()
        tensors["weight"] = weight.index_copy(0, self.indices, self.rows.to(weight.dtype))
        return tensors


def _in(dtype: torch.dtype, value: Any) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def _scale(embedding: Any) -> Any:
    """Return the factor of embeddings that multiply what they look up, as Gemma's."""
    scale = getattr(embedding, "embed_scale", None)
    return 1.0 if scale is None else scale


def attach(model: Any, names: Iterable[str], tokens: tuple[int, ...]) -> None:
    """Train the modules `names` whole, and of all other embeddings and output layers the rows of
    `tokens`.

    Raises:
        AdapterError: a name matches no module, or one that cannot be trained whole.
    """
    copied = chosen(model, names)
    if not tokens and not copied:
        return
    _refuse_adapted(model, tokens, copied)
    embedding, head = tied(model)
    if tokens or copied & set(vocabulary_layers(model)):
        _refuse_shared(model)
    if copied & {embedding, head} - {None}:
        copied |= {name for name in (embedding, head) if name}
    wrapped: dict[str, Trained] = {}
    for name in sorted(copied):
        wrapped[name] = TrainedCopy(model.get_submodule(name))
    if tokens:
        for name in sorted(set(vocabulary_layers(model)) - copied):
            wrapped[name] = TokenRows(model.get_submodule(name), tokens)
    if embedding in wrapped and head in wrapped:
        first, second = wrapped[embedding], wrapped[head]
        if isinstance(first, TokenRows) and isinstance(second, TokenRows):
            second.rows = first.rows
        elif isinstance(first, TrainedCopy) and isinstance(second, TrainedCopy):
            second.copy.weight = first.copy.weight
    for name, module in wrapped.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, module)


def _refuse_adapted(model: Any, tokens: tuple[int, ...], copied: set[str]) -> None:
    """Refuse an adapted output layer where its rows, or the embedding that it shares its weight
    with, would be trained too."""
    head, embedding = output_layer(model), model.get_input_embeddings()
    if not hasattr(head, "delta"):
        return
    names = {name for name, module in model.named_modules() if module is embedding}
    shared = getattr(head, "weight", None) is embedding.weight
    if tokens or (shared and names & copied):
        setting = "base.add_tokens" if tokens else "adapter.train_modules"
        raise AdapterError(
            f"{setting} trains the output layer's weight, which adapter.target_modules adapts too:"
            " leave the output layer out of adapter.target_modules"
        )


def _refuse_shared(model: Any) -> None:
    """Refuse an embedding whose weight further modules have, as those of some encoder-decoders."""
    table, known = model.get_input_embeddings(), set(vocabulary_layers(model))
    others = [
        name
        for name, module in model.named_modules()
        if name not in known and getattr(module, "weight", None) is table.weight
    ]
    if others:
        raise AdapterError(
            f"the embedding shares its weight with {others[0]} too, so its rows cannot be trained"
            " alone: leave out base.add_tokens, and the embedding in adapter.train_modules"
        )


def chosen(model: nn.Module, names: Iterable[str]) -> set[str]:
    """Return the modules that the endings in `names` stand for.

    Raises:
        AdapterError: a name matches no module with parameters of its own, or a quantised or an
            adapted one.
    """
    own = {
        name: module
        for name, module in model.named_modules()
        if any(True for _ in module.parameters(recurse=False))
        and ".delta" not in name
        and not name.endswith(".base")
    }
    result: set[str] = set()
    for ending in names:
        matching = {name for name in own if ends_with(name, ending)}
        adapted = [
            name
            for name, module in model.named_modules()
            if ends_with(name, ending) and hasattr(module, "delta")
        ]
        if adapted:
            raise AdapterError(
                f"adapter.train_modules has {ending!r}, and {adapted[0]} is one of"
                " adapter.target_modules: leave it out of one of them"
            )
        if not matching:
            kinds = sorted({name.rpartition(".")[2] for name in own})
            raise AdapterError(
                f"adapter.train_modules has {ending!r}, which matches no module with parameters."
                f" The model's: {', '.join(kinds)}"
            )
        packed = [name for name in matching if _packed(own[name])]
        if packed:
            raise AdapterError(
                f"adapter.train_modules has {ending!r}, and {packed[0]} is quantised: a quantised"
                " layer cannot be trained whole. Set base.quantization=none, or leave it out"
            )
        result |= matching
    return result


def _packed(module: Any) -> bool:
    return isinstance(getattr(module, "weight", None), Tensor) and is_packed(module)


def vocabulary_layers(model: Any) -> list[str]:
    """Return the names of the input embedding and of the output layer, if the model has one."""
    layers = [model.get_input_embeddings(), output_layer(model)]
    ids = {id(layer) for layer in layers if layer is not None}
    return [name for name, module in model.named_modules() if id(module) in ids]


def tied(model: Any) -> tuple[str | None, str | None]:
    """Return the names of the embedding and the output layer if they share their weight."""
    embedding, head = model.get_input_embeddings(), output_layer(model)
    if head is None or getattr(head, "weight", None) is not embedding.weight:
        return None, None
    names = {id(module): name for name, module in model.named_modules()}
    return names.get(id(embedding)), names.get(id(head))


def ties(model: nn.Module, names: list[str]) -> bool:
    """Return whether two of the trained copies `names` share their weight."""
    copies = [model.get_submodule(name) for name in names]
    weights = [id(part.copy.weight) for part in copies if isinstance(part, TrainedCopy)]
    return len(set(weights)) < len(weights)


def modules(model: nn.Module) -> list[tuple[str, Any]]:
    """Return every Trained module, by its name."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, Trained)]


def dissolve(model: Any) -> None:
    """Put the trained tensors into the base's modules, and those back into the model."""
    for name, module in modules(model):
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, module.plain())
