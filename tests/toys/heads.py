"""Draft heads on tiny bases, and their formulas as plain loops."""

from __future__ import annotations

import math

import torch

from tests.toys import adapters as toys
from trainer.data.batches import Collate, Pick
from trainer.data.render import Tokens
from trainer.drafters import TargetOutput
from trainer.drafters.medusa import MedusaHeads
from trainer.drafters.parallel import ParallelHeads
from trainer.drafters.sequential import SequentialModules

# (ids, first trained): a usual row, one shorter than the offsets, one with a prompt nearly to its
# end, one trained throughout.
ROWS = [
    ([5, 9, 3, 7, 11, 13, 2, 8], 3),
    ([17, 12], 1),
    ([8, 2, 6, 40, 12, 33], 5),
    ([4, 21, 13, 30, 17, 12, 60, 9, 1, 50], 1),
]
APART, PACKED = [[r] for r in ROWS], [ROWS[:3], [ROWS[3]]]
SIZE = 32


def llama(dtype=torch.float32, **changes):
    """A tiny Llama whose norms' weights are not all one."""
    settings = {
        "hidden_size": SIZE,
        "intermediate_size": 48,
        "rms_norm_eps": 1e-3,
        "attention_bias": True,
    } | changes
    model = toys.llama(torch.float32, **settings)
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.3 * torch.randn(parameter.shape, generator=draw)
    return model.to(dtype)


def make(kind, model, offsets=3, **changes):
    """The drafter as its file of conf/ has it, but for the number of offsets."""
    knobs = {"offsets": offsets, "weights": None, "weight": 0.7, "detach": True, "lr_scale": 2.0}
    if kind == "medusa":
        return MedusaHeads(model, **knobs | {"layers": 2, "beta": 0.8} | changes)
    knobs["init"] = "random"
    if kind == "parallel":
        return ParallelHeads(model, **knobs | changes)
    return SequentialModules(model, **knobs | {"shared": kind == "shared", "beta": 0.6} | changes)


def stirred(drafter):
    """The drafter with weights of which none is zero, nor any norm's one."""
    draw = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in drafter.parameters():
            parameter += 0.15 * torch.randn(parameter.shape, generator=draw)
    return drafter.eval()


def batch_of(*packs):
    items = [
        (
            Pick(i, True, 1),
            [Tokens(ids, [at >= first for at in range(len(ids))]) for ids, first in p],
        )
        for i, p in enumerate(packs)
    ]
    return Collate(0, any(len(pack) > 1 for pack in packs), False)(items)


def output_of(packs, hidden, dtype=torch.float32):
    """A batch of packs of rows, whose states are given by row."""
    batch = batch_of(*packs)
    states = torch.randn(
        *batch["input_ids"].shape, SIZE, generator=torch.Generator().manual_seed(17)
    )
    for i, pack in enumerate(packs):
        at = 0
        for row in pack:
            states[i, at : at + len(row[0])] = hidden[ROWS.index(row)]
            at += len(row[0])
    positions = batch.get("position_ids", torch.arange(states.shape[1]).expand(len(packs), -1))
    return TargetOutput(
        states.to(dtype), batch["input_ids"], batch["labels"], positions, states[:, :0].to(dtype)
    )


def hidden_states():
    draw = torch.Generator().manual_seed(11)
    return [torch.randn(len(ids), SIZE, generator=draw) for ids, _ in ROWS]


def by_row(packs, tensor):
    """The parts of a (B, T, ..) tensor in the order of ROWS."""
    actual = [None] * len(ROWS)
    for i, pack in enumerate(packs):
        at = 0
        for row in pack:
            actual[ROWS.index(row)] = tensor[i, at : at + len(row[0])]
            at += len(row[0])
    return actual


# the reference: one row, one position at a time
def rms(x, weight, eps):
    return weight * x / torch.sqrt((x * x).sum() / len(x) + eps)


def rotated(vector, position, theta):
    half = len(vector) // 2
    angles = [position * theta ** (-j / half) for j in range(half)]
    cosines = torch.tensor([math.cos(angle) for angle in angles]).to(vector)
    sines = torch.tensor([math.sin(angle) for angle in angles]).to(vector)
    a, b = vector[:half], vector[half:]
    return torch.cat([a * cosines - b * sines, b * cosines + a * sines])


def block(w, prefix, config, xs):
    """A Llama layer on the positions of a row, a list of (d,)."""

    def linear(name, x):
        y = w[f"{prefix}.{name}.weight"] @ x
        bias = w.get(f"{prefix}.{name}.bias")
        return y if bias is None else y + bias

    heads, groups = (
        config.num_attention_heads,
        config.num_attention_heads // config.num_key_value_heads,
    )
    theta = config.rope_parameters["rope_theta"]
    queries, keys, values, out = [], [], [], []
    for t, x in enumerate(xs):
        normed = rms(x, w[f"{prefix}.input_layernorm.weight"], config.rms_norm_eps)
        queries.append(
            [rotated(q, t, theta) for q in linear("self_attn.q_proj", normed).view(heads, -1)]
        )
        keys.append(
            [
                rotated(k, t, theta)
                for k in linear("self_attn.k_proj", normed).view(heads // groups, -1)
            ]
        )
        values.append(list(linear("self_attn.v_proj", normed).view(heads // groups, -1)))
        mixed = []
        for head in range(heads):
            scores = [
                torch.exp(
                    queries[t][head] @ keys[s][head // groups] / math.sqrt(len(queries[t][head]))
                )
                for s in range(t + 1)
            ]
            mixed.append(
                sum(
                    score / sum(scores) * values[s][head // groups]
                    for s, score in enumerate(scores)
                )
            )
        x = x + linear("self_attn.o_proj", torch.cat(mixed))
        normed = rms(x, w[f"{prefix}.post_attention_layernorm.weight"], config.rms_norm_eps)
        gate = linear("mlp.gate_proj", normed)
        out.append(
            x
            + linear("mlp.down_proj", gate / (1 + torch.exp(-gate)) * linear("mlp.up_proj", normed))
        )
    return out


SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
