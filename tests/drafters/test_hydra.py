"""Hydra's heads against plain loops over the positions of one row in float64: their losses, their
trees, and where they start."""

from __future__ import annotations

import inspect

import pytest
import torch
import transformers
from omegaconf import OmegaConf

from tests.toys import adapters as toys
from tests.toys.finetuning import adapted
from tests.toys.heads import (
    APART,
    PACKED,
    ROWS,
    SIZE,
    SIZES,
    batch_of,
    block,
    by_row,
    hidden_states,
    llama,
    output_of,
    rms,
    stirred,
)
from trainer.assembly.build import instantiate
from trainer.config import schema
from trainer.drafters import DrafterError, Target, TargetOutput, TargetUpdate, io, metrics
from trainer.drafters.hydra import Hydra
from trainer.models.losses import CausalLoss

FILES = {
    name: OmegaConf.to_container(OmegaConf.load(schema.CONF / "drafter" / f"{name}.yaml"))
    for name in ("hydra", "hydra_plus")
}
PLAIN = FILES["hydra"]
PLUS = PLAIN | {key: value for key, value in FILES["hydra_plus"].items() if key != "defaults"}
KINDS = {
    "hydra": PLAIN | {"offsets": 3, "weight": 0.7},
    "shared": PLAIN | {"offsets": 3, "weight": 0.7, "own_head": False, "layers": 2},
    "plus": PLUS | {"offsets": 3, "weight": 0.7, "layers": 3},
}


def make(model, kind="hydra", **changes):
    return instantiate(KINDS[kind] | changes)(model=model)


def weights_of(drafter, model):
    """Its tensors and the target's embedding and head, in float64."""
    w = {name: tensor.double() for name, tensor in drafter.state().items()}
    w["embedding"] = model.get_input_embeddings().weight.detach().double()
    return w | {"head": model.get_output_embeddings().weight.detach().double()}


def silu(x):
    return x / (1 + torch.exp(-x))


def before_heads(w, drafter, config, hidden):
    """s_t of a row, a list of (d,)."""
    states = [h.double() for h in hidden]
    if drafter.prefix is None:
        return states
    states = block(w, "prefix.block", config, states)
    return [rms(x, w["prefix.norm.weight"], config.rms_norm_eps) for x in states]


def naive(w, drafter, k, state, tokens):
    """(z_k (d,), logits (V,)) at one position, where `tokens` are the k that follow it."""
    assert len(tokens) == k
    at = f"heads.{k - 1}"
    joined = torch.cat([state, *(w["embedding"][int(token)] for token in tokens)])
    z = w[f"{at}.0.res_connection.weight"] @ joined + w[f"{at}.0.res_connection.bias"]
    z = z + silu(w[f"{at}.0.linear.weight"] @ joined + w[f"{at}.0.linear.bias"])
    for j in range(1, drafter.blocks):
        z = z + silu(w[f"{at}.{j}.linear.weight"] @ z + w[f"{at}.{j}.linear.bias"])
    return z, (w[f"{at}.{drafter.blocks}.weight"] if drafter.own_head else w["head"]) @ z


@pytest.mark.parametrize("packs", [APART, PACKED], ids=["apart", "packed"])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_states_are_those_of_plain_loops(kind, packs):
    model, hidden = llama(), hidden_states()
    drafter, target = stirred(make(model, kind)), Target(model)
    w = weights_of(drafter, model)
    states = [by_row(packs, s) for s in drafter.states(output_of(packs, hidden), target)]
    assert len(states) == 3
    for row, (ids, _) in enumerate(ROWS):
        own = before_heads(w, drafter, model.config, hidden[row])
        for k in (1, 2, 3):
            assert states[k - 1][row].isfinite().all()
            for t in range(len(ids) - k):
                reference, _ = naive(w, drafter, k, own[t], ids[t + 1 : t + 1 + k])
                torch.testing.assert_close(
                    states[k - 1][row][t].double(), reference, rtol=1e-5, atol=2e-5
                )


@pytest.mark.long
@pytest.mark.parametrize("packs", [APART, PACKED], ids=["apart", "packed"])
@pytest.mark.parametrize("loss", ["labels", "ce", "tv"])
@pytest.mark.parametrize("kind", KINDS)
def test_loss_numbers_and_slopes_are_those_of_plain_loops(kind, loss, packs):
    model, hidden = llama(), hidden_states()
    drafter = stirred(make(model, kind, loss=loss, weights=[1.0, 0.5, 0.25]))
    total, numbers = drafter.loss(output_of(packs, hidden), Target(model), 4)
    total.backward()

    w = weights_of(drafter, model)
    own = {name: w[name].requires_grad_(True) for name in drafter.state()}
    expected, reference = (
        torch.zeros(3, 7, dtype=torch.float64),
        torch.zeros((), dtype=torch.float64),
    )
    for row, (ids, first) in enumerate(ROWS):
        states = before_heads(w, drafter, model.config, hidden[row])
        for t in range(len(ids)):
            unbroken, chance = True, 1.0
            for k in (1, 2, 3):
                if t + 1 + k >= len(ids) or t + 1 + k < first:
                    unbroken, chance = False, 0.0
                    continue
                _, logits = naive(w, drafter, k, states[t], ids[t + 1 : t + 1 + k])
                q = torch.exp(logits) / torch.exp(logits).sum()
                p = torch.exp(w["head"] @ hidden[row][t + k].double())
                p = p / p.sum()
                accepted = torch.minimum(p, q).sum()
                right = ids[t + 1 + k] if loss == "labels" else int(p.argmax())
                one = {
                    "labels": -torch.log(q[right]),
                    "ce": -(p * torch.log(q)).sum(),
                    "tv": 1 - accepted,
                }[loss]
                better = int((logits > logits[right]).sum())
                unbroken, chance = unbroken and better == 0, chance * float(accepted.detach())
                expected[k - 1] += torch.tensor(
                    [one.detach(), 1, better == 0, better < 5, unbroken, accepted.detach(), chance],
                    dtype=torch.float64,
                )
                reference = reference + 0.7 * [1.0, 0.5, 0.25][k - 1] * one
    reference.backward()
    expected = expected[:, :5] if loss == "labels" else expected
    torch.testing.assert_close(numbers.double(), expected, rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(total.detach().double(), reference.detach(), rtol=1e-5, atol=1e-5)
    for name, parameter in drafter.named_parameters():
        torch.testing.assert_close(parameter.grad.double(), own[name].grad, rtol=1e-4, atol=2e-5)
    assert ("expected" in metrics(numbers)) == (loss != "labels")


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_comes_from_other_rows_or_later_tokens(kind):
    model, hidden = llama(), hidden_states()
    drafter, target = stirred(make(model, kind)), Target(model)
    before = [by_row(PACKED, s) for s in drafter.states(output_of(PACKED, hidden), target)]
    output = output_of(PACKED, hidden)
    output.hidden[0, 8:] += 1.0
    output.ids[0, 8:] += 1  # all but the first row
    for states, earlier in zip(drafter.states(output, target), before, strict=True):
        assert torch.equal(by_row(PACKED, states)[0], earlier[0])
    output = output_of(PACKED, hidden)
    output.ids[1, 6] += 1
    for k, (states, earlier) in enumerate(
        zip(drafter.states(output, target), before, strict=True), 1
    ):
        same = (by_row(PACKED, states)[3] - earlier[3]).abs().amax(-1) < 1e-6
        assert same.tolist() == [not t + 1 <= 6 <= t + k for t in range(10)]


# decoding

# (the target's n new states, nodes of a tree as (parent, token)): levels, a sibling that comes
# late, and nothing but the first
STEPS = [
    (4, [[(-1, 5), (-1, 9), (-1, 33)], [(0, 2), (2, 7), (0, 60)]]),
    (1, [[(-1, 8)], [(0, 1)]]),
    (3, [[(-1, 1)], [(0, 4)], [(-1, 2)], [(2, 4), (2, 5)]]),
    (1, []),
    (2, [[(-1, 40), (-1, 41)], [(1, 3)]]),
]


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_tree_has_the_logits_of_its_paths(kind):
    model = llama()
    drafter, target = stirred(make(model, kind)), Target(model)
    w, draw = weights_of(drafter, model), torch.Generator().manual_seed(13)
    text, hidden = (
        torch.randint(0, 64, (12,), generator=draw),
        torch.randn(11, SIZE, generator=draw),
    )
    states = before_heads(w, drafter, model.config, hidden)
    memory, known = drafter.start(target), 0
    for new, levels in STEPS:
        update = TargetUpdate(
            hidden[known : known + new], hidden[:new, :0], text[known + 1 : known + new + 1]
        )
        growth = drafter.grow(memory, target, update)
        known += new
        newest = int(text[known])
        assert (growth.depth, growth.branches, growth.vocabulary, growth.confidence) == (
            3,
            True,
            None,
            None,
        )
        _, reference = naive(w, drafter, 1, states[known - 1], [newest])
        torch.testing.assert_close(growth.first().double(), reference, rtol=1e-5, atol=2e-5)
        paths = []
        for level in levels:
            parents, tokens = zip(*level, strict=True)
            paths += [(*(paths[parent] if parent >= 0 else ()), token) for parent, token in level]
            actual = growth.extend(torch.tensor(tokens), torch.tensor(parents))
            assert actual.shape == (len(level), 64)
            for logits, path in zip(actual, paths[-len(level) :], strict=True):
                _, reference = naive(w, drafter, len(path) + 1, states[known - 1], [newest, *path])
                torch.testing.assert_close(logits.double(), reference, rtol=1e-5, atol=2e-5)
        assert memory.cache.get_seq_length() == (known if kind == "plus" else 0)


@torch.no_grad()
def test_the_prefix_layer_reads_each_state_once():
    model = llama()
    drafter, target, sizes = make(model, "plus").eval(), Target(model), []
    drafter.prefix.block.register_forward_pre_hook(lambda _, args: sizes.append(args[0].shape[1]))
    memory = drafter.start(target)
    for new in (5, 1, 3):
        growth = drafter.grow(
            memory,
            target,
            TargetUpdate(torch.randn(new, SIZE), torch.zeros(new, 0), torch.arange(new)),
        )
        growth.extend(torch.tensor([1, 2]), torch.tensor([-1, -1]))
    assert sizes == [5, 1, 3]


@torch.no_grad()
def test_a_drafts_text_is_in_windows_as_in_training():
    """Of a family whose attention slides, over more positions than the window."""
    torch.manual_seed(0)
    model = transformers.MistralForCausalLM(
        transformers.MistralConfig(**SIZES, sliding_window=3)
    ).eval()
    drafter, target = stirred(make(model, "plus")), Target(model)
    ids, hidden = torch.randint(0, 64, (1, 12)), torch.randn(1, 12, SIZE)
    first, *_ = drafter.states(
        TargetOutput(hidden, ids, ids, torch.arange(12)[None], hidden[:, :0]), target
    )
    memory, known = drafter.start(target), 0
    for new in (5, 1, 1, 4):
        at = slice(known, known + new)
        growth = drafter.grow(
            memory,
            target,
            TargetUpdate(hidden[0, at], hidden[0, :new, :0], ids[0, known + 1 : known + new + 1]),
        )
        known += new
        reference = drafter.head_of(1, target)[0](first[0, known - 1])
        torch.testing.assert_close(growth.first(), reference, rtol=1e-5, atol=1e-5)


# where training starts, and what is trained


@pytest.mark.parametrize("kind", ["hydra", "shared"])
@torch.no_grad()
def test_heads_start_as_the_targets_own(kind):
    model, hidden = llama(), torch.randn(1, 5, SIZE)
    drafter, target = make(model, kind), Target(model)
    output = TargetOutput(
        hidden, *[torch.randint(0, 64, (1, 5))] * 2, torch.arange(5)[None], hidden[:, :0]
    )
    for k, states in enumerate(drafter.states(output, target), 1):
        torch.testing.assert_close(drafter.head_of(k, target)[0](states), target.head(hidden))


@torch.no_grad()
def test_a_prefix_layer_starts_near_the_targets_own_head():
    model = llama(initializer_range=0.02)
    model.model.norm.weight.mul_(5.0)  # states are larger than a norm of ones gives them
    ids, target = torch.randint(0, 64, (2, 9)), Target(model)
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
    output = TargetOutput(hidden, ids, ids, torch.arange(9).expand(2, 9), hidden[:, :0])
    drafter = make(model, "plus").eval()
    mean = model.model.norm.weight.mean()
    torch.testing.assert_close(drafter.prefix.norm.weight, mean.expand(SIZE))
    for k, states in enumerate(drafter.states(output, target), 1):
        difference = drafter.head_of(k, target)[0](states) - target.head(hidden)
        assert float(difference.norm() / target.head(hidden).norm()) < 0.35


@pytest.mark.parametrize("loss", ["labels", "ce"])
def test_neither_the_adapter_nor_the_embedding_learns_from_heads(loss):
    _, model = adapted(model=llama())
    model.get_input_embeddings().weight.requires_grad_(True)  # tied: the target's head, too
    drafter = stirred(make(model, "plus", loss=loss))

    def gradients(*more):
        model.zero_grad()
        CausalLoss(model, 4, *more)(batch_of(*PACKED))[0].backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}

    alone, together = gradients(), gradients(drafter, Target(model))
    assert all(torch.equal(alone[name], together[name]) for name in alone)
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in drafter.parameters())


@pytest.mark.parametrize("loss", ["labels", "ce"])
def test_a_batch_with_nothing_to_predict_gives_every_parameter_a_gradient(loss):
    """Of zero: ranks without targets must not be waited for."""
    model = llama()
    drafter, hidden, ids = (
        make(model, "plus", loss=loss),
        torch.randn(2, 2, SIZE),
        torch.ones(2, 2, dtype=torch.int64),
    )
    labels = torch.full_like(ids, -100)
    output = TargetOutput(hidden, ids, labels, torch.arange(2).expand(2, 2), hidden[:, :0])
    total, numbers = drafter.loss(output, Target(model), 8)
    total.backward()
    assert float(total.detach()) == 0.0
    assert not numbers.any()
    assert all(not p.grad.any() for p in drafter.parameters())


@pytest.mark.parametrize("kind", ["hydra", "plus"])
def test_dropout_is_on_while_training_only(kind):
    model, hidden = llama(), hidden_states()
    drafter, target = stirred(make(model, kind, dropout=0.5)), Target(model)
    whole = make(model, kind, dropout=0.0).eval()
    whole.load_state(drafter.state())
    output = output_of(PACKED, hidden)
    for actual, reference in zip(
        drafter.states(output, target), whole.states(output, target), strict=True
    ):
        assert torch.equal(actual, reference)
    drafter.train()
    torch.manual_seed(0)
    for states in drafter.states(output, target):
        assert 0.3 < float((states == 0).float().mean()) < 0.7  # of what the output layer is given


@pytest.mark.long
def test_heads_learn_to_read_the_tokens_between():
    """Text whose next token follows from the last, and hidden states that say nothing: the k-th
    head has to read x_{t+k}."""
    torch.manual_seed(0)
    model = llama(tie_word_embeddings=False)
    drafter, target = make(model, layers=2, lr_scale=1.0).train(), Target(model)
    following = torch.randperm(64)
    optimizer = torch.optim.Adam(drafter.parameters(), lr=1e-2)
    for _ in range(80):
        ids = torch.randint(0, 64, (16, 1))
        for _ in range(7):
            ids = torch.cat([ids, following[ids[:, -1:]]], dim=1)
        hidden = torch.ones(16, 8, SIZE)
        total, numbers = drafter.loss(
            TargetOutput(hidden, ids, ids, torch.arange(8).expand(16, 8), hidden[:, :0]), target, 64
        )
        optimizer.zero_grad()
        (total / numbers[:, 1].sum()).backward()
        optimizer.step()
    assert (numbers[:, 2] / numbers[:, 1] > 0.9).all(), metrics(numbers)


def test_half_precision_is_computed_from_whole_weights():
    model = llama(torch.bfloat16)
    drafter, whole = stirred(make(model, "plus")), stirred(make(llama(), "plus"))
    whole.load_state(drafter.state())
    output = output_of(PACKED, hidden_states(), torch.bfloat16)
    total, _ = drafter.loss(output, Target(model), 4)
    reference, _ = whole.loss(output_of(PACKED, hidden_states()), Target(llama()), 4)
    total.backward()
    assert float(total.detach()) == pytest.approx(float(reference.detach()), rel=0.02)
    assert (
        {p.dtype for p in drafter.parameters()}
        == {p.grad.dtype for p in drafter.parameters()}
        == {torch.float32}
    )
    update, actual = TargetUpdate(output.hidden[0], output.hidden[0, :, :0], output.ids[0]), []
    for one in (drafter, drafter.bfloat16()):  # the second, in bf16, as a decoder may have it
        growth = one.grow(one.start(Target(model)), Target(model), update)
        actual.append(growth.extend(torch.tensor([1, 2]), torch.tensor([-1, -1])))
    assert {logits.dtype for logits in actual} == {torch.bfloat16}
    assert float((actual[0] - actual[1]).float().norm() / actual[0].float().norm()) < 0.03


@pytest.mark.parametrize("kind", KINDS)
def test_names_shapes_and_states(tmp_path, kind):
    model = llama(attention_bias=False)
    settings = KINDS[kind]
    one = stirred(make(model, kind))
    shapes = {}
    for k in range(3):
        for part in ("linear", "res_connection"):
            shapes |= {
                f"heads.{k}.0.{part}.weight": (SIZE, (k + 2) * SIZE),
                f"heads.{k}.0.{part}.bias": (SIZE,),
            }
        for j in range(1, settings["layers"]):
            shapes |= {
                f"heads.{k}.{j}.linear.weight": (SIZE, SIZE),
                f"heads.{k}.{j}.linear.bias": (SIZE,),
            }
        shapes |= (
            {f"heads.{k}.{settings['layers']}.weight": (64, SIZE)} if settings["own_head"] else {}
        )
    if settings["prefix"]:
        layer = model.model.layers[0].state_dict()
        shapes |= {f"prefix.block.{name}": tuple(tensor.shape) for name, tensor in layer.items()}
        shapes |= {"prefix.norm.weight": (SIZE,)}
    assert {name: tuple(tensor.shape) for name, tensor in one.state().items()} == shapes
    with torch.device("meta"):
        skeleton = make(transformers.LlamaForCausalLM(model.config), kind)
    assert {name: tuple(tensor.shape) for name, tensor in skeleton.state().items()} == shapes
    target = {
        "base": "some/base",
        "fingerprint": "abc",
        "run": "x",
        "step": 3,
        "hidden_size": SIZE,
        "vocab_size": 64,
    }
    io.save(one, settings, target, tmp_path)
    again = io.load(tmp_path, model, "abc")
    assert all(torch.equal(tensor, again.state()[name]) for name, tensor in one.state().items())
    with pytest.raises(DrafterError, match="other settings"):
        make(model, kind, layers=5).load_state(one.state())


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"offsets": 0}, "drafter.offsets=0"),
        ({"layers": 0}, "drafter.layers=0.*at least 1"),
        ({"weights": [1.0]}, "drafter.weights=.1.0. are 1, and drafter.offsets=3"),
        ({"loss": "mse"}, "drafter.loss=mse: one of labels, ce, kl, tv"),
        ({"dropout": 1.0}, "drafter.dropout=1.0.*below 1"),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes, says):
    with pytest.raises(DrafterError, match=says):
        make(llama(), **changes)


def test_a_prefix_layer_asks_for_a_model_of_known_layers():
    model = toys.gpt2(torch.float32)
    make(model)
    with pytest.raises(DrafterError, match="GPT2LMHeadModel"):
        make(model, "plus")


def test_the_files_are_the_papers():
    assert set(inspect.signature(Hydra).parameters) - {"model"} == PLAIN.keys() - {
        "_target_",
        "_partial_",
    }
    assert (PLAIN["layers"], PLAIN["prefix"], PLAIN["loss"], PLAIN["weights"]) == (
        1,
        False,
        "labels",
        None,
    )
    assert (PLUS["offsets"], PLUS["layers"], PLUS["prefix"], PLUS["loss"], PLUS["dropout"]) == (
        4,
        4,
        True,
        "ce",
        0.2,
    )
    assert make(llama(), weight=2.0).weights == [2.0, 2.0, 2.0]
