"""A trained draft head as one dictionary of tensors, in speculators' names or Medusa's own, and
what serving engines can load of it.

Engines compute a Llama or a Qwen3 layer. A head with another family's layer is refused, since most
engines drop tensors that they do not know without a message.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from adapters.linear import float_weight
from trainer.drafters import Drafter, DrafterError, Target
from trainer.drafters.block import Block
from trainer.drafters.eagle import Eagle
from trainer.drafters.eagle3 import Eagle3
from trainer.drafters.families import FAMILIES, unlike_engines
from trainer.drafters.medusa import Medusa, MedusaHeads
from trainer.drafters.peagle import PEagle

log = logging.getLogger("trainer")

_METHODS: dict[type, str] = {
    Block: "block",
    Eagle: "eagle",
    Eagle3: "eagle3",
    Medusa: "medusa",
    MedusaHeads: "medusa",
    PEagle: "peagle",
}
_NAMES = {
    "block": "DSpark or DFlash",
    "eagle3": "EAGLE-3",
    "eagle": "EAGLE-1",
    "medusa": "Medusa",
    "peagle": "P-EAGLE",
}
_LAYOUTS = {
    "block": ("speculators", "sglang"),
    "eagle3": ("speculators", "sglang"),
    "eagle": ("sglang",),
    "medusa": ("medusa",),
    "peagle": ("speculators",),
}
_OF_BLOCKS = {
    "context_norm.": "hidden_norm.",
    "blocks.": "layers.",
    "markov.w": "markov_head.markov_w",
    "confidence.": "confidence_head.proj.",
}
_INSTEAD = "to=drafter writes it for Graft"
_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "rms_norm_eps",
    "initializer_range",
    "vocab_size",
)


@dataclass(frozen=True)
class DraftHead:
    """A trained draft head: `tensors` in speculators' names or Medusa's, and the facts for its
    config."""

    method: str  # block, eagle, eagle3, medusa or peagle
    tensors: dict[str, Tensor]
    own: frozenset[str]  # names of tensors that were trained, not copied from the target
    drafts: int  # tokens that follow one another in a draft
    target: list[str]  # the target's classes in transformers
    layer: dict[str, Any] = field(default_factory=dict)  # transformers' config of the draft layer
    # the target's states that it reads, as transformers counts hidden_states
    layers: tuple[int, ...] = ()
    norm_output: bool = False  # EAGLE-3.1: the next step reads the state after the final norm
    blocks: int = 0  # residual blocks of one of Medusa's heads
    mask_token: int = 0  # of a block or P-EAGLE: the id in place of tokens not drafted yet
    depth: int = 0  # of a block: the target's layers


def check(drafter: Drafter, to: str, model: Any) -> None:
    """Refuse a drafter that the layout cannot hold. The drafter may have weights or only shapes.

    Raises:
        DrafterError: the message says why, and which layout fits.
    """
    method = _METHODS.get(type(drafter))
    if method is None:
        raise DrafterError(
            f"to={to} is for the heads of drafter=dspark, dflash, eagle, eagle3, peagle and"
            f" medusa{', and for drafter=uno' if to == 'sglang' else ''}:"
            f" there is no writer for {type(drafter).__name__}. {_INSTEAD}, and a layer of the"
            " base's own MTP kind is to=mtp"
        )
    fitting = _LAYOUTS[method]
    if to not in fitting:
        methods = {
            "speculators": "EAGLE-3, P-EAGLE, DSpark and DFlash",
            "sglang": "EAGLE-1, EAGLE-3, DSpark and DFlash",
            "medusa": "Medusa's heads",
        }[to]
        raise DrafterError(
            f"to={to} is a format of {methods}, and this drafter is {_NAMES[method]}:"
            f" to={' or to='.join(fitting)}"
        )
    if method == "medusa":
        if any(name.endswith(".bias") and "linear" not in name for name in drafter.state()):
            raise DrafterError(
                f"to=medusa has no place for the biases of these heads' output layers. {_INSTEAD}"
            )
        return
    reason = _unlike_llama(_of_layer(drafter, model), drafter)
    if reason is None and method == "peagle" and getattr(drafter, "fc_norm", None) is not None:
        reason = "vLLM leaves out P-EAGLE's fc_norm without a message"
    markov = getattr(getattr(drafter, "markov", None), "kind", "vanilla")
    if reason is None and markov != "vanilla":
        reason = (
            f"its Markov head is drafter.markov={markov}, of which vLLM and llama.cpp load the"
            " vanilla kind alone, and what SGLang reads for it is not verified here"
        )
    if reason is None and to == "sglang" and method == "block" and drafter.vocabulary is not None:
        reason = (
            "what SGLang reads of a block's draft vocabulary is not verified here: to=speculators,"
            " for vLLM, has it"
        )
    if reason is None and to == "sglang":
        reason = _not_for_sglang(drafter, model, method)
    if reason:
        raise DrafterError(
            f"to={to} does not fit a drafter for {type(model).__name__}: {reason}. {_INSTEAD}"
        )


def _unlike_llama(config: Any, drafter: Drafter) -> str | None:
    biases = sorted(
        name for name in drafter.state() if name.startswith("layers.") and name.endswith(".bias")
    )
    if config.model_type in FAMILIES and biases:
        return f"{biases[0]} is a bias, which vLLM and SGLang drop without a message"
    return unlike_engines(config)


def _of_layer(drafter: Drafter, model: Any) -> Any:
    """Return the config of the draft layer's class: its own, or the target's."""
    family = getattr(drafter, "family", None)
    return model.config.get_text_config() if family is None else family.config


def described(drafter: Drafter, model: Any) -> str | None:
    """Say which formats of engines a head has, or why it has none; None for heads that no engine
    has a format for. Both may be on the meta device."""
    method = _METHODS.get(type(drafter))
    if method is None:
        return None
    fitting, reasons = [], []
    for to in _LAYOUTS[method]:
        try:
            check(drafter, to, model)
            fitting.append(f"to={to}")
        except DrafterError as error:
            reasons.append(str(error))
    layer = ""
    if method != "medusa":
        family = getattr(drafter, "family", None)
        kind = f"{family.config.model_type}'s" if family is not None else "the target's own"
        layer = f"a layer of {kind} class; "
    return layer + (f"engines load it: {', '.join(fitting)}" if fitting else reasons[0])


def _not_for_sglang(drafter: Drafter, model: Any, method: str) -> str | None:
    config = model.config.get_text_config()
    if method == "block" and drafter.layers[0] == 0:
        return (
            f"it reads the target's states {', '.join(map(str, drafter.layers))}, and SGLang counts"
            " them from the first layer's output, state 1; train with other drafter.aux_layers, or"
            " use to=speculators for vLLM alone"
        )
    if method != "block" and FAMILIES[_of_layer(drafter, model).model_type] == "qwen3":
        reason = (
            "its draft layer norms q and k as Qwen3 does, and SGLang's draft layer is Llama's,"
            " which drops those norms without a message"
        )
        return reason + (": to=speculators, for vLLM, has them" if method == "eagle3" else "")
    if config.num_hidden_layers in drafter.layers:
        return (
            f"it reads the target's states {', '.join(map(str, drafter.layers))}, and SGLang keeps"
            " none after the last layer; train with other drafter.aux_layers, or use"
            " to=speculators for vLLM alone"
        )
    return None


def canonical(drafter: Any, model: Any, copied: bool = False) -> DraftHead:
    """Return a drafter's tensors and those that it shares with the target, in fp32, in speculators'
    names or Medusa's own.

    `copied` gives each of Medusa's heads the target's output layer, if it has none. A head that
    predicts acceptance is left out, with a warning.

    Raises:
        DrafterError: the target's logits are not its output layer's weight times the hidden states,
        the target scales its embeddings, or `copied` does not apply.
    """
    _check_plain(model)
    method, drafts = _METHODS[type(drafter)], drafter.depth
    if method in ("block", "eagle"):
        _check_embedding(model)
    target = getattr(model.config, "architectures", None) or [type(model).__name__]
    if copied and method != "medusa":
        raise DrafterError("unembedding=copied is for Medusa's heads: leave it out")
    if method == "block":
        return _block(drafter, model, target)
    state = {
        name: tensor.detach().cpu()
        for name, tensor in drafter.state().items()
        if not name.startswith("confidence.") and name != "mask_token"
    }
    if any(name.startswith("confidence.") for name in drafter.state()):
        log.warning(
            "the head that predicts acceptance (drafter.confidence) is left out: engines have no"
            " place for it. to=drafter keeps it"
        )
    tensors = {name.removeprefix("heads."): tensor.float() for name, tensor in state.items()}
    tensors |= {name: state[name] for name in ("d2t", "t2d") if name in state}
    own = frozenset(tensors)
    if method == "medusa":
        last = {f"{i}.{drafter.blocks}.weight" for i in range(drafts)}
        if copied and last <= own:
            raise DrafterError(
                "unembedding=copied: each head of this drafter already has an output layer, leave"
                " it out"
            )
        tensors |= dict.fromkeys(last, output_weight(model)) if copied else {}
        return DraftHead(method, tensors, own, drafts, target, blocks=drafter.blocks)
    tensors["embed_tokens.weight"] = model.get_input_embeddings().weight.detach().float().cpu()
    layer = _layer_config(_of_layer(drafter, model))
    if method == "eagle":
        return DraftHead(method, tensors, own, drafts, target, layer)
    if not drafter.lm_head.weight.requires_grad:
        own -= {"lm_head.weight"}
    reads, mask = tuple(drafter.layers), 0
    if method == "peagle":
        layer["num_hidden_layers"] = 1 + len(drafter.more)
        mask = int(drafter.mask_token)
    return DraftHead(
        method, tensors, own, drafts, target, layer, reads, drafter.norm_output, mask_token=mask
    )


def _block(drafter: Block, model: Any, target: list[str]) -> DraftHead:
    state = {name: tensor.detach().cpu() for name, tensor in drafter.state().items()}
    tensors = {
        _in_engines(name): tensor.float() if tensor.is_floating_point() else tensor
        for name, tensor in state.items()
        if name != "mask_token"
    }
    own = frozenset(tensors)
    if drafter.lm_head is not None and not drafter.lm_head.weight.requires_grad:
        own -= {"lm_head.weight"}
    return DraftHead(
        "block",
        tensors,
        own,
        drafter.depth,
        target,
        _layer_config(drafter.family.config) | {"num_hidden_layers": len(drafter.blocks)},
        tuple(drafter.layers),
        mask_token=int(drafter.mask_token),
        depth=model.config.get_text_config().num_hidden_layers,
    )


def _in_engines(name: str) -> str:
    """Return the name that engines give a tensor of a block drafter."""
    for ours, theirs in _OF_BLOCKS.items():
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    return name


def flat_rope(layer: dict[str, Any]) -> dict[str, Any]:
    """Return the config of a layer with the keys of its rotary table that servers with an older
    transformers read."""
    rope = layer["rope_parameters"]
    config = layer | {"rope_theta": rope["rope_theta"]}
    if rope["rope_type"] != "default":
        config["rope_scaling"] = {key: value for key, value in rope.items() if key != "rope_theta"}
    return config


def _layer_config(config: Any) -> dict[str, Any]:
    """Return transformers' config of the draft layer."""
    layer = {
        "model_type": FAMILIES[config.model_type],
        **{name: getattr(config, name) for name in _SIZES},
        "head_dim": (
            getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        ),
        "num_hidden_layers": 1,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": False,
        "rope_parameters": dict(config.rope_parameters),
    }
    if layer["model_type"] == "llama":
        layer["mlp_bias"] = False
    return layer


def output_weight(model: Any) -> Float[Tensor, "V d"]:
    """Return the target's output layer in fp32."""
    return float_weight(model.get_output_embeddings()).detach().float().cpu()


@torch.no_grad()
def _check_plain(model: Any) -> None:
    """Refuse a scale, a cap or a bias after the output layer: these formats cannot hold them."""
    weight = float_weight(model.get_output_embeddings())
    probe = torch.randn(4, weight.shape[1], generator=torch.Generator().manual_seed(0)).to(weight)
    expected, plain = Target(model).head(probe).float(), F.linear(probe, weight).float()
    if not torch.allclose(expected, plain, rtol=1e-3, atol=1e-3 * float(expected.abs().max())):
        raise DrafterError(
            f"{type(model).__name__}'s logits are not its output layer's weight times the hidden"
            " states alone (a scale, a cap or a bias follows), and this format has no place for"
            f" that. {_INSTEAD}"
        )


@torch.no_grad()
def _check_embedding(model: Any) -> None:
    """Refuse embeddings that are more than rows of their weight, as Gemma's: engines give a draft
    the rows. The first norm of EAGLE-3's layer makes a scale of them irrelevant."""
    layer = model.get_input_embeddings()
    ids = torch.arange(1, 5, device=layer.weight.device)
    if not torch.allclose(layer(ids).float(), layer.weight[ids].float(), rtol=1e-3):
        raise DrafterError(
            f"{type(model).__name__} scales its embeddings, and engines give a draft head the rows"
            f" as they are stored. {_INSTEAD}"
        )
