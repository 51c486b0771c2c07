"""The families whose decoder layers a base can be shrunk by, and where their parts are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from trainer.models.base import Base, BaseError


@dataclass(frozen=True)
class Shape:
    """The names of the modules of a family's model.

    layers  the list of decoder layers, from the model
    up      the MLP's projections to its neurons, from a layer; empty where they are one packed
            weight, which `narrow` does not know
    down    its projection back
    width   the key of config.json with the number of neurons
    """

    layers: str = "model.layers"
    up: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    down: str = "mlp.down_proj"
    width: str = "intermediate_size"

    def is_mlp(self, name: str) -> bool:
        """Return whether a linear of a layer belongs to the MLP and not to attention."""
        return name.startswith("mlp.") or name in (*self.up, self.down)


_GATED = Shape()
_PLAIN = Shape(up=("mlp.up_proj",))
_PACKED = Shape(up=())
FAMILIES = {
    **dict.fromkeys(
        (
            "cohere", "cohere2", "ernie4_5", "exaone4", "gemma", "gemma2", "gemma3_text", "granite",
            "helium", "hunyuan_v1_dense", "llama", "ministral", "ministral3", "mistral", "olmo",
            "olmo2", "olmo3", "qwen2", "qwen3", "seed_oss", "smollm3", "stablelm",
        ),
        _GATED,
    ),
    **dict.fromkeys(("apertus", "arcee", "nemotron"), _PLAIN),
    **dict.fromkeys(("glm4", "phi3"), _PACKED),
    "gpt_neox": Shape("gpt_neox.layers", ("mlp.dense_h_to_4h",), "mlp.dense_4h_to_h"),
    "opt": Shape("model.decoder.layers", ("fc1",), "fc2", "ffn_dim"),
    "phi": Shape(up=("mlp.fc1",), down="mlp.fc2"),
    "starcoder2": Shape(up=("mlp.c_fc",), down="mlp.c_proj"),
}  # fmt: skip


def shape_of(base: Base) -> Shape:
    """Return where the parts of a base are.

    Raises:
        BaseError: its family is not known here, or its files or settings are quantised.
    """
    family = base.config.model_type
    if family not in FAMILIES:
        raise BaseError(
            f"base {base.path!r} is of the family {family!r}, whose layers graft shrink does not"
            f" know. It knows {', '.join(sorted(FAMILIES))}"
        )
    if base.is_quantized:
        raise BaseError(
            f"base {base.path!r} is quantised already: its weights are codes, which cannot be"
            " shrunk. Give the unquantised model, and quantise the result"
        )
    if base.quantization != "none":
        raise BaseError(
            f"base.quantization={base.quantization}: shrinking changes plain weights. Leave it out"
            " here, and set it when the result is trained"
        )
    if base.add_tokens:
        raise BaseError(
            "base.add_tokens: the result would hold untrained tokens. Leave it out here, and set it"
            " when the result is trained"
        )
    return FAMILIES[family]


def layers_of(model: nn.Module, shape: Shape) -> nn.ModuleList:
    """Return the decoder layers of a model.

    Raises:
        BaseError: the model is not built as its family, such as one with code of its own.
    """
    try:
        layers = model.get_submodule(shape.layers)
        if not isinstance(layers, nn.ModuleList) or not len(layers):
            raise AttributeError(f"{shape.layers} is no list of layers")
        for layer in layers:
            for name in (*shape.up, shape.down):
                if not isinstance(layer.get_submodule(name), nn.Linear):
                    raise AttributeError(f"{name} is no linear layer")
    except AttributeError as error:
        config: Any = model.config
        raise BaseError(
            f"the base is not built as others of the family {config.model_type!r} ({error}), so it"
            " cannot be shrunk"
        ) from None
    return layers


def linears_of(layer: nn.Module, shape: Shape, part: str = "all") -> dict[str, nn.Linear]:
    """Return the linears of a decoder layer by name: all, those of its `mlp`, or those of its
    `attention`."""
    return {
        name: module
        for name, module in layer.named_modules()
        if isinstance(module, nn.Linear)
        and (part == "all" or shape.is_mlp(name) == (part == "mlp"))
    }


def replace(layer: nn.Module, tensors: dict[str, Any]) -> None:
    """Put tensors, perhaps of other shapes, in the places of a layer's parameters and buffers of
    these names. Linears report their new sizes."""
    for name, tensor in tensors.items():
        place, _, key = name.rpartition(".")
        module = layer.get_submodule(place)
        if key in module._parameters:
            old = module._parameters[key]
            trains = old is not None and old.requires_grad
            module._parameters[key] = nn.Parameter(tensor, requires_grad=trains)
        else:
            module._buffers[key] = tensor
        if isinstance(module, nn.Linear) and key == "weight":
            module.out_features, module.in_features = tensor.shape
