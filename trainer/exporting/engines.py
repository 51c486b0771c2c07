"""Trained draft heads in the layouts that serving engines load.

speculators   EAGLE-3 as speculators 0.9 and vLLM 0.33 read it: a nested config, embedding and head beside the layer
sglang        EAGLE-1 and EAGLE-3 flat, as SGLang 0.5.23, SpecForge and vLLM 0.33 read them: a Llama config, and midlayer.*
medusa        Medusa's own file, as TGI reads it; vLLM 0.33 and SGLang have no Medusa

A head is first one dictionary of tensors in speculators' names (`canonical`), and each layout a
renaming of it. What these engines compute is a Llama or a Qwen3 layer; a head of another family's
layer is refused, since most of them drop in silence what they do not know. `faults` reads a written
folder and says what is wrong with it; `logits` computes from its files alone, in plain torch.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from jaxtyping import Float, Int
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from adapters.linear import float_weight
from trainer.drafters import Drafter, DrafterError, Target
from trainer.drafters.eagle import Eagle
from trainer.drafters.eagle3 import Eagle3
from trainer.drafters.medusa import Medusa, MedusaHeads

log = logging.getLogger("trainer")

_METHODS: dict[type, str] = {
    Eagle: "eagle",
    Eagle3: "eagle3",
    Medusa: "medusa",
    MedusaHeads: "medusa",
}
LAYOUTS = ("speculators", "sglang", "medusa")
FAMILIES = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "llama",
    "qwen3": "qwen3",
}  # of targets, and the draft layer that engines have for it
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
class Head:
    """A trained draft head: `tensors` in speculators' names, and what its config says."""

    method: str  # eagle, eagle3 or medusa
    tensors: dict[str, Tensor]
    own: frozenset[str]  # those that were trained, not taken from the target
    drafts: int  # tokens that follow one another in a draft
    target: list[str]  # the classes that transformers has for it
    layer: dict[str, Any] = field(default_factory=dict)  # transformers' config of the draft layer
    # the target's states that it reads, as transformers counts hidden_states
    layers: tuple[int, ...] = ()
    # EAGLE-3.1: whether the next step is fed the state after the final norm
    norm_output: bool = False
    blocks: int = 0  # of a head of Medusa's


def check(drafter: Drafter, to: str, model: Any) -> None:
    """Whether the layout has a place for this drafter, of weights or of shapes alone.

    Raises:
        DrafterError: it does not; the message says why and which one has.
    """
    method = _METHODS.get(type(drafter))
    if method is None:
        raise DrafterError(
            f"to={to} is for the heads of drafter=eagle, eagle3 and medusa: no engine has a format"
            f" for {type(drafter).__name__}. {_INSTEAD}, and a layer of the base's own MTP kind is"
            " to=mtp"
        )
    fitting = {"eagle3": ("speculators", "sglang"), "eagle": ("sglang",), "medusa": ("medusa",)}[
        method
    ]
    if to not in fitting:
        named = {"eagle3": "EAGLE-3", "eagle": "EAGLE-1", "medusa": "Medusa"}[method]
        has = {
            "speculators": "EAGLE-3 alone",
            "sglang": "EAGLE-1 and EAGLE-3",
            "medusa": "Medusa's heads",
        }[to]
        raise DrafterError(
            f"to={to} is a format of {has}, and this drafter is {named}:"
            f" to={' or to='.join(fitting)}"
        )
    if method == "medusa":
        if any(name.endswith(".bias") and "linear" not in name for name in drafter.state()):
            raise DrafterError(
                f"to=medusa has no place for the biases of these heads' output layers. {_INSTEAD}"
            )
        return
    config = model.config.get_text_config()
    reason: str | None = _unlike_llama(config, drafter)
    if reason is None and FAMILIES[config.model_type] == "qwen3" and to == "sglang":
        reason = (
            "its draft layer norms q and k as Qwen3 does, and SGLang's draft layer is Llama's,"
            " which drops those norms in silence"
        )
        if method == "eagle3":
            reason += ": to=speculators, for vLLM, has them"
    if (
        reason is None
        and to == "sglang"
        and model.config.get_text_config().num_hidden_layers in drafter.layers
    ):
        reason = (
            f"it reads the target's states {', '.join(map(str, drafter.layers))}, and SGLang keeps"
            " none behind the last layer; train with other drafter.aux_layers, or for vLLM alone"
            " take to=speculators"
        )
    if reason:
        raise DrafterError(
            f"to={to} does not fit a drafter for {type(model).__name__}: {reason}. {_INSTEAD}"
        )


def _unlike_llama(config: Any, drafter: Drafter) -> str | None:
    if config.model_type not in FAMILIES:
        return (
            "engines build draft layers of Llama's and Qwen3's kind, and this one is of"
            f" {config.model_type}'s"
        )
    if biased := sorted(
        name for name in drafter.state() if name.startswith("layers.") and name.endswith(".bias")
    ):
        return f"{biased[0]} is a bias, which vLLM and SGLang drop in silence"
    if config.hidden_act != "silu":
        return f"its MLP's activation is {config.hidden_act}, and engines take silu for granted"
    kinds = getattr(config, "layer_types", None) or [
        "sliding_attention" if getattr(config, "sliding_window", None) else "full_attention"
    ]
    if kinds[-1] != "full_attention":
        return (
            f"its layer is of the kind {kinds[-1]} (window {config.sliding_window}), and engines"
            " let draft layers see everything"
        )
    rope = config.rope_parameters
    if "rope_type" not in rope or rope.get("partial_rotary_factor", 1.0) != 1.0:
        return (
            f"its rotary embedding {rope} is not one that turns all of a head, and the same for all"
            " layers"
        )
    return None


def canonical(drafter: Any, model: Any, copied: bool = False) -> Head:
    """A drafter's tensors and those that it shares with the target, in fp32: speculators' names, or
    Medusa's own. `copied` gives each of Medusa's heads the target's output layer, where it has none
    of its own. A head that predicts acceptance is left out, and that is logged.

    Raises:
        DrafterError: the target's logits are not its output layer's weight times the hidden states,
        or `copied` does not apply.
    """
    _check_plain(model)
    config, method, drafts = model.config.get_text_config(), _METHODS[type(drafter)], drafter.depth
    target = getattr(model.config, "architectures", None) or [type(model).__name__]
    state = {
        name: tensor.detach().cpu()
        for name, tensor in drafter.state().items()
        if not name.startswith("confidence.")
    }
    if len(state) < len(drafter.state()):
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
                "unembedding=copied: each head of this drafter has an output layer of its own"
                " already, leave it out"
            )
        tensors |= dict.fromkeys(last, _unembedding(model)) if copied else {}
        return Head(method, tensors, own, drafts, target, blocks=drafter.blocks)
    if copied:
        raise DrafterError("unembedding=copied is for Medusa's heads: leave it out")
    tensors["embed_tokens.weight"] = model.get_input_embeddings().weight.detach().float().cpu()
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
    if method == "eagle":
        return Head(method, tensors, own, drafts, target, layer)
    if not drafter.lm_head.weight.requires_grad:
        own -= {"lm_head.weight"}
    return Head(
        method, tensors, own, drafts, target, layer, tuple(drafter.layers), drafter.norm_output
    )


def _unembedding(model: Any) -> Float[Tensor, "V d"]:
    return float_weight(model.get_output_embeddings()).detach().float().cpu()


@torch.no_grad()
def _check_plain(model: Any) -> None:
    """A scale, a cap or a bias behind the output layer has no place in these formats."""
    weight = float_weight(model.get_output_embeddings())
    probe = torch.randn(4, weight.shape[1], generator=torch.Generator().manual_seed(0)).to(weight)
    wanted, got = Target(model).head(probe).float(), F.linear(probe, weight).float()
    if not torch.allclose(wanted, got, rtol=1e-3, atol=1e-3 * float(wanted.abs().max())):
        raise DrafterError(
            f"{type(model).__name__}'s logits are not its output layer's weight times the hidden"
            " states alone (a scale, a cap or a bias follows), and this format has no place for"
            f" that. {_INSTEAD}"
        )


def write(head: Head, to: str, folder: Path, dtype: torch.dtype, verifier: str) -> None:
    """Write a layout's config.json and safetensors file; `verifier` is what its config calls the
    target."""
    made: Callable[[Head, str], tuple[dict[str, Tensor], dict[str, Any]]]
    made = {"speculators": _speculators, "sglang": _flat, "medusa": _medusa}[to]
    tensors, config = made(head, verifier)
    if to != "medusa":
        config["dtype"] = str(dtype).removeprefix("torch.")
    cast = {
        name: tensor.to(dtype) if tensor.is_floating_point() else tensor
        for name, tensor in tensors.items()
    }
    # safetensors takes no tensors that share their memory.
    save_file(
        {name: t.clone().contiguous() for name, t in cast.items()},
        folder / _file(to),
        {"format": "pt"},
    )
    (folder / "config.json").write_text(
        json.dumps(config, indent=2, sort_keys=True) + "\n", "utf-8"
    )


def _file(to: str) -> str:
    return "medusa_lm_head.safetensors" if to == "medusa" else "model.safetensors"


def _speculators(head: Head, verifier: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    layer = dict(head.layer)
    if len(head.layers) != 3:
        # vLLM's Llama draft layer counts them nowhere else
        layer["num_aux_hidden_states"] = len(head.layers)
    greedy = {
        "proposal_type": "greedy",
        "speculative_tokens": head.drafts,
        "verifier_accept_k": 1,
        "accept_tolerance": 0.0,
    }
    return head.tensors, {
        "architectures": ["Eagle3DraftModel"],
        "speculators_model_type": "eagle3",
        "speculators_version": "0.9.0",
        "transformers_version": transformers.__version__,
        "speculators_config": {
            "algorithm": "eagle3",
            "proposal_methods": [greedy],
            "default_proposal_method": "greedy",
            "verifier": {"name_or_path": verifier, "architectures": head.target},
        },
        "transformer_layer_config": layer,
        "draft_vocab_size": len(head.tensors["lm_head.weight"]),
        "eagle_aux_hidden_state_layer_ids": list(head.layers),
        # vLLM and speculators differ in what they take an absent one for.
        "norm_before_residual": False,
        "norm_before_fc": False,
        "fc_norm": "fc_norm.0.weight" in head.tensors,
        "norm_output": head.norm_output,
        "embed_requires_grad": False,
        "tie_word_embeddings": False,
    }


def _flat(head: Head, verifier: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    rope = head.layer["rope_parameters"]
    # servers with an older transformers read only these
    config = head.layer | {"rope_theta": rope["rope_theta"]}
    if rope["rope_type"] != "default":
        config["rope_scaling"] = {key: value for key, value in rope.items() if key != "rope_theta"}
    if head.method == "eagle":
        # SGLang takes the first, and vLLM puts Eagle before each and takes the second.
        config["architectures"] = ["LlamaForCausalLMEagle", "LlamaForCausalLM"]
        # SGLang's fc has a bias, random where the file has none
        zero = torch.zeros(head.layer["hidden_size"])
        return {"fc.bias": zero} | head.tensors, config
    config |= {
        "architectures": ["LlamaForCausalLMEagle3"],
        "draft_vocab_size": len(head.tensors["lm_head.weight"]),
        "num_aux_hidden_states": len(head.layers),
        "norm_before_residual": False,
        "norm_before_fc": False,
        "fc_norm": "fc_norm.0.weight" in head.tensors,
        "norm_output": head.norm_output,
        # vLLM reads this one and counts as transformers does hidden_states; SGLang reads the other
        # and adds 1.
        "eagle_aux_hidden_state_layer_ids": list(head.layers),
        "eagle_config": {
            "eagle_aux_hidden_state_layer_ids": [layer - 1 for layer in head.layers],
            "use_aux_hidden_state": True,
            "norm_before_fc": False,
        },
    }
    return {
        name.replace("layers.0.", "midlayer."): t
        for name, t in head.tensors.items()
        if name != "embed_tokens.weight"
    }, config


def _medusa(head: Head, verifier: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    return head.tensors, {
        "medusa_num_heads": head.drafts,
        "medusa_num_layers": head.blocks,
        "base_model_name_or_path": verifier,
        "version": "2",
    }


def _expected(
    to: str, config: dict[str, Any], size: tuple[int, int], full: bool
) -> dict[str, tuple[int, ...]]:
    """Names and shapes in a folder, from its config and the target's (V, d)."""
    vocabulary, d = size
    found: dict[str, tuple[int, ...]] = {}
    if to == "medusa":
        heads, blocks = config["medusa_num_heads"], config["medusa_num_layers"]
        names = [f"{i}.{j}.linear" for i in range(heads) for j in range(blocks)]
        for name in names:
            found |= {f"{name}.weight": (d, d), f"{name}.bias": (d,)}
        return found | ({f"{i}.{blocks}.weight": size for i in range(heads)} if full else {})
    layer = config.get("transformer_layer_config", config)
    third = "speculators_config" in config or config["architectures"] == ["LlamaForCausalLMEagle3"]
    each, inputs = layer["head_dim"], 2 * d if third else d
    q, kv, f = (
        layer["num_attention_heads"] * each,
        layer["num_key_value_heads"] * each,
        layer["intermediate_size"],
    )
    shapes: dict[str, tuple[int, ...]] = {
        "self_attn.q_proj": (q, inputs),
        "self_attn.k_proj": (kv, inputs),
        "self_attn.v_proj": (kv, inputs),
        "self_attn.o_proj": (d, q),
        "mlp.gate_proj": (f, d),
        "mlp.up_proj": (f, d),
        "mlp.down_proj": (d, f),
        "post_attention_layernorm": (d,),
    }
    if third:
        shapes |= {"input_layernorm": (d,), "hidden_norm": (d,)}
    if layer["model_type"] == "qwen3":
        shapes |= {"self_attn.q_norm": (each,), "self_attn.k_norm": (each,)}
    prefix = "midlayer" if third and to == "sglang" else "layers.0"
    found |= {f"{prefix}.{name}.weight": shape for name, shape in shapes.items()}
    if not third:
        return found | {"embed_tokens.weight": size, "fc.weight": (d, 2 * d), "fc.bias": (d,)}
    states, drafted = len(config["eagle_aux_hidden_state_layer_ids"]), config["draft_vocab_size"]
    found |= {"fc.weight": (d, states * d), "norm.weight": (d,), "lm_head.weight": (drafted, d)}
    if config["fc_norm"]:
        found |= {f"fc_norm.{i}.weight": (d,) for i in range(states)}
    if drafted < vocabulary:
        found |= {"d2t": (drafted,), "t2d": (vocabulary,)}
    return found | ({"embed_tokens.weight": size} if to == "speculators" else {})


def faults(folder: Path, to: str, head: Head, dtype: torch.dtype, model: Any) -> list[str]:
    """What is wrong with a folder: names, shapes and types of tensors against its own config,
    values that are not finite, a map of the draft vocabulary that contradicts itself, and tensors
    that are not the head's own and differ from the target's."""
    config, tensors = _read(folder, to)
    vocabulary, size = model.get_input_embeddings().weight.shape
    expected = _expected(to, config, (vocabulary, size), f"0.{head.blocks}.weight" in head.tensors)
    found = [f"{name} is missing" for name in sorted(expected.keys() - tensors.keys())]
    found += [f"{name} belongs to no module" for name in sorted(tensors.keys() - expected.keys())]
    for name in sorted(expected.keys() & tensors.keys()):
        tensor, kind = tensors[name], {"d2t": torch.int64, "t2d": torch.bool}.get(name, dtype)
        if tuple(tensor.shape) != expected[name]:
            found.append(f"{name} is of the shape {tuple(tensor.shape)}, not {expected[name]}")
        if tensor.dtype != kind:
            found.append(f"{name} is {tensor.dtype}, not {kind}")
        if not torch.isfinite(tensor).all():
            found.append(f"{name} holds NaN or infinite values")
    if found:
        return found
    kept = torch.arange(vocabulary)
    if "d2t" in tensors:
        kept = torch.arange(len(tensors["d2t"])) + tensors["d2t"]
        if not bool((kept.diff() > 0).all()):
            found.append("the tokens that d2t points at are not ascending, or not unique")
        if not torch.equal(kept, tensors["t2d"].nonzero()[:, 0]):
            found.append("d2t and t2d name different tokens")
        if found:
            return found
    embedding, unembedding = (
        model.get_input_embeddings().weight.detach().cpu().to(dtype),
        _unembedding(model).to(dtype),
    )
    others = [name for name in tensors if name.replace("midlayer.", "layers.0.") not in head.own]
    shared = {name: embedding if name == "embed_tokens.weight" else unembedding for name in others}
    shared = {
        name: tensor[kept] if name == "lm_head.weight" else tensor
        for name, tensor in shared.items()
    }
    shared |= {"fc.bias": torch.zeros(size, dtype=dtype)} if "fc.bias" in shared else {}
    return [
        f"{name} is not the target's"
        for name, tensor in shared.items()
        if not torch.equal(tensors[name], tensor)
    ]


def _read(folder: Path, to: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    return json.loads((folder / "config.json").read_text("utf-8")), load_file(folder / _file(to))


@torch.no_grad()
def logits(
    folder: Path,
    to: str,
    model: Any,
    states: Float[Tensor, "n f"],
    ids: Int[Tensor, " n"],
    drafted: Int[Tensor, " m"],
) -> Float[Tensor, "k v"]:
    """What the files alone say of the token after `ids`, and after each drafted one, in fp32:
    `states` are those that the drafter reads of the target, `ids` the tokens that follow each of
    them. Medusa's heads give one row each, and look at no token."""
    config, read = _read(folder, to)
    tensors = {
        name.replace("midlayer.", "layers.0."): t.float() if t.is_floating_point() else t
        for name, t in read.items()
    }
    if to == "medusa":
        return _medusa_logits(config, tensors, states[-1], _unembedding(model))
    layer = dict(config.get("transformer_layer_config", config))
    layer = {key: value for key, value in layer.items() if key not in ("architectures", "dtype")}
    made = AutoConfig.for_model(**layer)
    eps, third = made.rms_norm_eps, "norm.weight" in tensors

    def norm(name: str, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * tensors[f"{name}.weight"]

    embedding = tensors.get("embed_tokens.weight")
    if embedding is None:
        embedding = model.get_input_embeddings().weight.detach().float().cpu()
    tokens = embedding[torch.cat([ids, drafted])]
    if third:
        parts = list(states.chunk(len(config["eagle_aux_hidden_state_layer_ids"]), dim=-1))
        if config["fc_norm"]:
            parts = [norm(f"fc_norm.{i}", part) for i, part in enumerate(parts)]
        states = F.linear(torch.cat(parts, -1), tensors["fc.weight"])
    rows = []
    for _ in range(len(drafted) + 1):
        seen = tokens[: len(states)]
        if third:
            residual = states
            inputs = torch.cat(
                [norm("layers.0.input_layernorm", seen), norm("layers.0.hidden_norm", states)], -1
            )
        else:
            residual = inputs = F.linear(
                torch.cat([seen, states], -1), tensors["fc.weight"], tensors["fc.bias"]
            )
        last = _layer(made, tensors, norm, inputs, residual)[-1]
        normed = norm("norm", last) if third else last
        rows.append(F.linear(normed, tensors["lm_head.weight"] if third else _unembedding(model)))
        states = torch.cat([states, (normed if third and config["norm_output"] else last)[None]])
    return torch.stack(rows)


def _layer(
    config: Any,
    tensors: dict[str, Tensor],
    norm: Callable[[str, Tensor], Tensor],
    x: Tensor,
    residual: Tensor,
) -> Tensor:
    """A causal decoder layer behind its first norm, over (n, inputs)."""

    def linear(name: str, x: Tensor) -> Tensor:
        return F.linear(x, tensors[f"layers.0.{name}.weight"])

    def heads(kind: str) -> Tensor:
        y = linear(f"self_attn.{kind}_proj", x).unflatten(-1, (-1, config.head_dim)).transpose(0, 1)
        return (
            norm(f"layers.0.self_attn.{kind}_norm", y)
            if kind != "v" and config.model_type == "qwen3"
            else y
        )

    cos, sin = LlamaRotaryEmbedding(config)(x, torch.arange(len(x))[None])

    def turned(y: Tensor) -> Tensor:
        first, second = y.chunk(2, dim=-1)
        return y * cos[0] + torch.cat([-second, first], -1) * sin[0]

    q, k, v = turned(heads("q")), turned(heads("k")), heads("v")
    k, v = (y.repeat_interleave(len(q) // len(k), dim=0) for y in (k, v))
    scores = q @ k.transpose(1, 2) / math.sqrt(config.head_dim)
    future = torch.ones(len(x), len(x), dtype=torch.bool).triu(1)
    mixed = scores.masked_fill(future, -math.inf).softmax(-1) @ v
    hidden = residual + linear("self_attn.o_proj", mixed.transpose(0, 1).flatten(1))
    y = norm("layers.0.post_attention_layernorm", hidden)
    return hidden + linear(
        "mlp.down_proj", F.silu(linear("mlp.gate_proj", y)) * linear("mlp.up_proj", y)
    )


def _medusa_logits(
    config: dict[str, Any],
    tensors: dict[str, Tensor],
    state: Float[Tensor, " d"],
    unembedding: Float[Tensor, "V d"],
) -> Float[Tensor, "K V"]:
    rows = []
    for i in range(config["medusa_num_heads"]):
        x = state
        for j in range(config["medusa_num_layers"]):
            x = x + F.silu(
                F.linear(x, tensors[f"{i}.{j}.linear.weight"], tensors[f"{i}.{j}.linear.bias"])
            )
        rows.append(
            F.linear(x, tensors.get(f"{i}.{config['medusa_num_layers']}.weight", unembedding))
        )
    return torch.stack(rows)
