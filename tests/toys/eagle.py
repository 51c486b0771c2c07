"""EAGLE on tiny bases, and its formulas as plain loops."""

from __future__ import annotations

import math

import torch
import transformers
from omegaconf import OmegaConf

from tests.conftest import ROOT
from tests.toys import adapters as toys
from tests.toys.packed_rows import ROWS
from trainer.drafters import Target, TargetOutput, TargetUpdate
from trainer.drafters.eagle import Eagle

SIZE = 32
TINY = {
    "hidden_size": SIZE,
    "intermediate_size": 48,
    "rms_norm_eps": 1e-3,
    "initializer_range": 0.12,
}


def stirred(module, seed=5):
    """With weights of which none is zero, nor any norm's one."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            scale = 0.2 if parameter.ndim == 1 else 0.05
            parameter += scale * torch.randn(parameter.shape, generator=draw, dtype=parameter.dtype)
    return module.eval()


def llama(dtype=torch.float32, **changes):
    return stirred(toys.llama(dtype, **TINY | changes))


def mistral():
    """Like toys.llama, but that it sees four positions only."""
    settings = {
        "vocab_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return stirred(
            transformers.MistralForCausalLM(
                transformers.MistralConfig(**TINY | settings, sliding_window=4)
            )
        )


def qwen3():
    """With norms on queries and keys."""
    settings = {
        "vocab_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return stirred(transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**TINY | settings)))


MODELS = {
    "llama": llama,
    "mistral": mistral,
    "qwen3": qwen3,
    "eager": lambda: llama(attn_implementation="eager"),
}


def knobs(name, **changes):
    """The file of conf/drafter, with changes."""
    settings = OmegaConf.to_container(OmegaConf.load(ROOT / "conf" / "drafter" / f"{name}.yaml"))
    settings |= {"layer": "target"} if "layer" in settings else {}
    return {key: value for key, value in settings.items() if not key.startswith("_")} | changes


def eagle(model, **changes):
    return made(Eagle, model, **knobs("eagle", **changes))


def made(method, model, **settings):
    """A drafter with the same weights every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return stirred(method(model, **settings), 7)


# the reference: one row, whole matrices, one mask over the keys of all passes
def rms(x, weight, eps):
    return weight * x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps)


def rotated(x, places, theta):
    """(H, T, c), each pair of halves' entries turned by its place."""
    half = x.shape[-1] // 2
    angles = torch.tensor(
        [[place * theta ** (-j / half) for j in range(half)] for place in places], dtype=x.dtype
    )
    a, b = x.split(half, -1)
    return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], -1)


def attended(w, config, inputs, k, keys, values, window):
    """Attention of pass k on `inputs` (T, ..): the keys of all passes so far are visible as [causal
    | I | .. | I]."""
    length, theta = len(inputs), config.rope_parameters["rope_theta"]
    heads, groups = (
        config.num_attention_heads,
        config.num_attention_heads // config.num_key_value_heads,
    )
    places = [t + k for t in range(length)]

    def by_head(name):
        projected = inputs @ w[f"layers.0.self_attn.{name}.weight"].T
        if (bias := w.get(f"layers.0.self_attn.{name}.bias")) is not None:
            projected = projected + bias
        return projected.view(length, -1, SIZE // heads).transpose(0, 1)

    query = rotated(by_head("q_proj"), places, theta)
    keys.append(rotated(by_head("k_proj"), places, theta).repeat_interleave(groups, 0))
    values.append(by_head("v_proj").repeat_interleave(groups, 0))
    mask = torch.full((length, (k + 1) * length), -math.inf, dtype=torch.float64)
    for t in range(length):
        for s in range(t + 1):
            if window is None or t + k - s < window:
                mask[t, s] = 0
        for j in range(1, k + 1):
            if window is None or k - j < window:
                mask[t, j * length + t] = 0
    scores = query @ torch.cat(keys, 1).transpose(1, 2) / math.sqrt(SIZE // heads) + mask
    mixed = torch.softmax(scores, -1) @ torch.cat(values, 1)
    return mixed.transpose(0, 1).reshape(length, -1) @ w["layers.0.self_attn.o_proj.weight"].T


def fed(w, x):
    gate, up = (x @ w[f"layers.0.mlp.{name}_proj.weight"].T for name in ("gate", "up"))
    return (gate / (1 + torch.exp(-gate)) * up) @ w["layers.0.mlp.down_proj.weight"].T


def token_of(embedding, ids, at):
    return embedding[ids[at]] if at < len(ids) else torch.zeros_like(embedding[0])


def weights_of(drafter):
    return {
        name: tensor.double().requires_grad_(tensor.is_floating_point())
        for name, tensor in drafter.state().items()
    }


def by_row(packs, tensor):
    """The parts of a (B, T, ..) tensor in the order of ROWS."""
    actual = [None] * len(ROWS)
    for i, pack in enumerate(packs):
        at = 0
        for row in pack:
            actual[ROWS.index(row)] = tensor[i, at : at + len(row[0])]
            at += len(row[0])
    return actual


def news_of(hidden, features, ids, start, end):
    """What the target says of positions start .. end - 1 of a row whose tokens `ids` are known up
    to the one after those."""
    return TargetUpdate(
        hidden[start:end],
        features[start:end],
        ids[start + 1 : end + 1],
        ids[0] if start == 0 else None,
    )


# (parents, tokens) of each depth
TREE = [([-1, -1, -1], [3, 9, 4]), ([0, 0, 2], [7, 1, 7]), ([4, 3, 3, 5], [2, 5, 8, 9])]


def drafts_as_it_trains(drafter, model, features=0):
    """A tree's logits are those of training's passes on rows whose last tokens are a path's, and
    the memory holds nothing of trees."""
    target, known, draw = Target(model), 6, torch.Generator().manual_seed(3)
    hidden = torch.randn(known, SIZE, generator=draw)
    more = torch.randn(known, features, generator=draw)
    ids = torch.randint(0, 64, (known + 1,), generator=draw)
    memory = drafter.start(target)
    for start, end in ((0, 3), (3, 4), (4, known)):
        tree = drafter.grow(memory, target, news_of(hidden, more, ids, start, end))
        actual, paths, number = [tree.first()], [[]], 0
        for parents, tokens in TREE:
            actual += list(tree.extend(torch.tensor(tokens), torch.tensor(parents)))
            paths += [
                [*paths[parent + 1], token] for parent, token in zip(parents, tokens, strict=True)
            ]
            number += len(tokens)
        assert memory.get_seq_length() == end
    fresh = drafter.start(target)
    again = drafter.grow(fresh, target, news_of(hidden, more, ids, 0, known))
    torch.testing.assert_close(memory.keys, fresh.keys, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(memory.values, fresh.values, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(again.first(), actual[0], rtol=1e-4, atol=1e-4)
    assert tree.branches
    assert tree.depth == drafter.depth

    apart = 0.0
    head = drafter.draft_heads(target)[0]
    for path, logits in zip(paths, actual, strict=True):
        row = torch.cat([ids, torch.tensor(path, dtype=torch.long)])[None]
        # what comes after the last known state is not looked at
        later = torch.full((len(path) + 1, SIZE + features), 100.0)
        states = torch.cat([torch.cat([hidden, more], 1), later]).split([SIZE, features], 1)
        at = torch.arange(row.shape[1])[None]
        output = TargetOutput(
            states[0][None],
            row,
            row,
            at,
            states[0][None, :0],
            states[1][None] if features else None,
        )
        trained = head(list(drafter.states(output, target))[len(path)][0, known - 1 : known])[0]
        torch.testing.assert_close(logits, trained, rtol=1e-4, atol=1e-4)
        apart = max(apart, float((logits - actual[0]).abs().max()))
    assert apart > 0.1
