"""Heads against plain loops over the positions of one row in float64, while training and while
decoding, and in runs."""

from __future__ import annotations

import itertools

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn

from adapters.delta import freeze
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
    make,
    output_of,
    rms,
    stirred,
)
from tests.toys.power_cuts import PowerCut, cut_at, outcome
from trainer.assembly.trained import load_trained
from trainer.decoding.trees import Drawing, chain
from trainer.drafters import DrafterError, Target, TargetOutput, TargetUpdate, metrics
from trainer.drafters.layers import decoder_layer, final_norm, layer_inputs, run_layer
from trainer.drafters.sequential import SequentialModules
from trainer.models.losses import CausalLoss
from trainer.models.tiny import tiny
from trainer.storage import journal

KINDS = ("parallel", "sequential", "shared", "medusa")


def naive(kind, drafter, model, hidden, ids):
    """For each offset the states (T - k, d) of a row at the positions t whose x_{t+k} there is."""
    w = {name: tensor.double() for name, tensor in drafter.state().items()}
    config, embedding = model.config, model.get_input_embeddings().weight.detach().double()
    below, actual = [h.double() for h in hidden], []
    for k in range(1, drafter.offsets + 1):
        if kind == "medusa":
            states = list(below)
            for j in range(2):
                for t, h in enumerate(states):
                    inner = (
                        w[f"heads.{k - 1}.{j}.linear.weight"] @ h
                        + w[f"heads.{k - 1}.{j}.linear.bias"]
                    )
                    states[t] = h + inner / (1 + torch.exp(-inner))
        elif kind == "parallel":
            states = block(w, f"heads.{k - 1}.block", config, below)
            states = [rms(x, w[f"heads.{k - 1}.norm.weight"], config.rms_norm_eps) for x in states]
        else:
            name = f"layers.{0 if kind == 'shared' else k - 1}"
            entering = []
            for i in range(len(ids) - k):
                embedded = rms(
                    embedding[ids[i + k]], w[f"{name}.enorm.weight"], config.rms_norm_eps
                )
                passed = rms(below[i], w[f"{name}.hnorm.weight"], config.rms_norm_eps)
                entering.append(w[f"{name}.eh_proj.weight"] @ torch.cat([embedded, passed]))
            below = block(w, f"{name}.mtp_block", config, entering)
            states = [rms(x, w[f"{name}.post_norm.weight"], config.rms_norm_eps) for x in below]
        states = states[: max(0, len(ids) - k)]
        actual.append(torch.stack(states) if states else torch.zeros(0, SIZE, dtype=torch.float64))
    return actual


# states and loss


@pytest.mark.long
@pytest.mark.parametrize("packs", [APART, PACKED], ids=["apart", "packed"])
@pytest.mark.parametrize(("kind", "offsets"), [*((kind, 3) for kind in KINDS), ("shared", 1)])
def test_states_and_loss_are_those_of_plain_loops(kind, offsets, packs):
    model, hidden = llama(), hidden_states()
    drafter, target = stirred(make(kind, model, offsets)), Target(model)
    output = output_of(packs, hidden)
    reference = [
        naive(kind, drafter, model, h, ids) for h, (ids, _) in zip(hidden, ROWS, strict=True)
    ]

    states = list(drafter.states(output, target))
    assert len(states) == offsets
    for k, of_offset in enumerate(states):
        assert of_offset.isfinite().all()
        for row, actual in enumerate(by_row(packs, of_offset)):
            torch.testing.assert_close(
                actual[: len(reference[row][k])].double(), reference[row][k], rtol=1e-5, atol=2e-5
            )

    total, numbers = drafter.loss(output, target, 4)
    head = model.get_output_embeddings().weight.detach().double()
    weights = [
        0.7 * weight
        for weight in {"parallel": [1, 1, 1], "medusa": [0.8, 0.64, 0.512]}.get(
            kind, shares(0.6, offsets)
        )
    ]
    expected = torch.zeros(offsets, 5, dtype=torch.float64)
    for row, (ids, first) in enumerate(ROWS):
        for t in range(len(ids)):
            unbroken = True
            for k in range(1, offsets + 1):
                if t + 1 + k >= len(ids) or t + 1 + k < first:
                    unbroken = False
                    continue
                logits = head @ reference[row][k - 1][t]
                better = int((logits > logits[ids[t + 1 + k]]).sum())
                unbroken = unbroken and better == 0
                loss = torch.log(torch.exp(logits).sum()) - logits[ids[t + 1 + k]]
                expected[k - 1] += torch.tensor([loss, 1, better == 0, better < 5, unbroken])
    torch.testing.assert_close(numbers.double(), expected, rtol=1e-5, atol=1e-5)
    assert float(total.detach()) == pytest.approx(
        sum(w * float(n) for w, n in zip(weights, expected[:, 0], strict=True)), rel=1e-5
    )
    assert not numbers.requires_grad


def shares(beta, count):
    return [beta**k / sum(beta**j for j in range(count)) for k in range(count)]


@pytest.mark.parametrize("kind", KINDS)
def test_guesses_that_are_right_are_counted(kind):
    """Labels are what the drafter guesses at some of the positions, so that no count is zero."""
    model = llama()
    drafter, target = stirred(make(kind, model)), Target(model)
    draw = torch.Generator().manual_seed(2)
    output = TargetOutput(
        torch.randn(1, 12, SIZE, generator=draw),
        *[torch.randint(0, 64, (1, 12), generator=draw)] * 2,
        torch.arange(12)[None],
        None,
    )
    best = [target.head(s)[0].argmax(-1) for s in drafter.states(output, target)]
    labels = torch.full((1, 12), -100)
    # of position 4 all three
    labels[0, 6], labels[0, 7], labels[0, 8] = best[0][4], best[1][4], best[2][4]
    labels[0, 10] = best[1][7]  # of position 7 the second only, as the first is asked for nothing
    _, numbers = drafter.loss(
        TargetOutput(output.hidden, output.ids, labels, output.positions, output.hidden[:, :0]),
        target,
        5,
    )
    assert (numbers[:, 2] >= torch.tensor([1, 2, 1])).all()
    assert numbers[0, 4] >= 1
    assert (numbers[1:, 4] == 1).all()
    assert metrics(numbers)["accepted"] == pytest.approx(
        1 + sum(float(n[4] / n[1]) for n in numbers)
    )


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_comes_from_other_rows_or_later_tokens(kind):
    model, hidden = llama(), hidden_states()
    drafter, target = stirred(make(kind, model)), Target(model)
    before = [by_row(PACKED, s) for s in drafter.states(output_of(PACKED, hidden), target)]
    output = output_of(PACKED, hidden)
    output.hidden[0, 8:] += 1.0
    output.ids[0, 8:] += 1  # all but the first row
    for states, earlier in zip(drafter.states(output, target), before, strict=True):
        torch.testing.assert_close(by_row(PACKED, states)[0], earlier[0], rtol=0, atol=0)
    output = output_of(PACKED, hidden)
    output.hidden[1, 4:] += 1.0
    output.ids[1, 6:] += 1
    for k, (states, earlier) in enumerate(
        zip(drafter.states(output, target), before, strict=True), 1
    ):
        same = (by_row(PACKED, states)[3] - earlier[3]).abs().amax(-1) < 1e-6
        assert same[: min(4, 6 - k)].all()
        assert not same[4:].any()
        if kind in ("sequential", "shared"):
            assert same[:4].tolist() == [t + k < 6 for t in range(4)]


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_with_nothing_to_predict_is_no_loss(kind):
    model = llama()
    drafter = make(kind, model)
    hidden = torch.randn(2, 2, SIZE)
    ids = torch.ones(2, 2, dtype=torch.int64)
    total, numbers = drafter.loss(
        TargetOutput(hidden, ids, ids, torch.arange(2).expand(2, 2), hidden[:, :0]),
        Target(model),
        8,
    )
    total.backward()
    assert float(total.detach()) == 0.0
    assert not numbers.any()
    assert all(p.grad is None or not p.grad.any() for p in drafter.parameters())
    assert metrics(numbers) == {}


@pytest.mark.parametrize("kind", KINDS)
def test_no_more_logits_than_a_chunk(kind):
    model = llama()
    drafter, target = make(kind, model), Target(model)
    sizes, head = [], target.head

    def watched(hidden):
        sizes.append(len(hidden))
        return head(hidden)

    target.head = watched
    _, numbers = drafter.loss(output_of(PACKED, hidden_states()), target, 4)
    assert max(sizes) == 4
    assert sum(sizes) == int(numbers[:, 1].sum())


# what is trained


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("detach", [True, False])
def test_the_adapter_learns_from_heads_only_where_it_may(kind, detach):
    _, model = adapted(model=llama())
    model.get_input_embeddings().weight.requires_grad_(True)  # tied: the head's too
    drafter = stirred(make(kind, model, detach=detach))
    batch = batch_of(*PACKED)

    def gradients(*more):
        model.zero_grad()
        CausalLoss(model, 4, *more)(batch)[0].backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}

    alone, together = gradients(), gradients(drafter, Target(model))
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in drafter.parameters())
    same = {name: torch.equal(alone[name], together[name]) for name in alone}
    assert all(same.values()) if detach else not any(same.values())


@pytest.mark.parametrize("kind", KINDS)
def test_rates_names_and_states(kind):
    model = llama()
    one, other = stirred(make(kind, model)), make(kind, model)
    (group,) = one.parameter_groups()
    assert group["lr_scale"] == 2.0
    assert len(group["params"]) == len(list(one.parameters()))
    assert all(p.dtype == torch.float32 for p in one.parameters())
    output, target = output_of(PACKED, hidden_states()), Target(model)
    other.load_state(one.state())
    for a, b in zip(one.states(output, target), other.eval().states(output, target), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(DrafterError, match="other settings"):
        make(
            kind, model, 2 if kind != "shared" else 3, **({"layers": 1} if kind == "medusa" else {})
        ).load_state(one.state() | ({"more": torch.zeros(1)} if kind == "shared" else {}))


def test_the_names_that_files_hold():
    model = llama(attention_bias=False)
    names = [
        "input_layernorm",
        "post_attention_layernorm",
        *(f"self_attn.{x}_proj" for x in "qkvo"),
    ]
    names = [
        f"{name}.weight" for name in [*names, *(f"mlp.{x}_proj" for x in ("gate", "up", "down"))]
    ]
    modules = {f"{name}.weight" for name in ("enorm", "hnorm", "eh_proj", "post_norm")} | {
        f"mtp_block.{name}" for name in names
    }
    assert make("shared", model).state().keys() == {f"layers.0.{name}" for name in modules}
    assert make("sequential", model, 2).state().keys() == {
        f"layers.{k}.{name}" for k in range(2) for name in modules
    }
    heads = {"norm.weight"} | {f"block.{name}" for name in names}
    assert make("parallel", model, 2).state().keys() == {
        f"heads.{k}.{name}" for k in range(2) for name in heads
    }
    parts = itertools.product(range(2), range(2), ("weight", "bias"))
    assert make("medusa", model, 2).state().keys() == {
        f"heads.{k}.{j}.linear.{name}" for k, j, name in parts
    }


@pytest.mark.parametrize("kind", KINDS)
def test_a_skeleton_counts_the_same_parameters(kind):
    model = llama()
    with torch.device("meta"):
        skeleton = transformers.LlamaForCausalLM(model.config)
    changes = {} if kind == "medusa" else {"init": "last_layer"}
    actual, reference = make(kind, skeleton, **changes), make(kind, model, **changes)
    assert all(p.is_meta for p in actual.parameters())
    shapes = [
        {name: p.shape for name, p in drafter.state().items()} for drafter in (actual, reference)
    ]
    assert shapes[0] == shapes[1]


def test_the_losses_weights():
    model = llama()
    assert make("parallel", model, weight=2.0).weights == [2.0, 2.0, 2.0]
    assert make("medusa", model, weight=0.2).weights == pytest.approx([0.16, 0.128, 0.1024])
    # FastMTP's
    assert make("shared", model, weight=1.0).weights == pytest.approx(
        [0.51020, 0.30612, 0.18367], abs=1e-5
    )
    # λ / D
    assert make("sequential", model, weight=0.3, beta=1.0).weights == pytest.approx([0.1, 0.1, 0.1])
    for kind in KINDS:
        assert make(kind, model, weight=0.5, weights=[4, 2, 1]).weights == [2.0, 1.0, 0.5]


# where training starts


def last_norm(model, x):
    """A Llama's last layer and norm on (B, T, d)."""
    decoder = model.get_decoder()
    positions = torch.arange(x.shape[1])[None]
    out = decoder.layers[-1](
        x, position_embeddings=decoder.rotary_emb(x, positions), position_ids=positions
    )
    return decoder.norm(out)


@torch.no_grad()
def test_last_layer_runs_the_last_layer_again():
    model, hidden = llama(), torch.randn(2, 9, SIZE)
    output = TargetOutput(
        hidden, *[torch.randint(0, 64, (2, 9))] * 2, torch.arange(9).expand(2, 9), hidden[:, :0]
    )
    for states in make("parallel", model, init="last_layer").eval().states(output, Target(model)):
        torch.testing.assert_close(states, last_norm(model, hidden), rtol=1e-5, atol=1e-5)
    drafter = make("shared", model, 1, init="last_layer").eval()
    normed = hidden / torch.sqrt((hidden * hidden).mean(-1, keepdim=True) + 1e-3)
    (states,) = drafter.states(output, Target(model))
    torch.testing.assert_close(states, last_norm(model, normed), rtol=1e-5, atol=1e-5)
    assert not any(p is q for p in drafter.parameters() for q in model.parameters())


@torch.no_grad()
def test_medusa_starts_as_the_targets_own_head():
    model, hidden = llama(), torch.randn(1, 5, SIZE)
    output = TargetOutput(
        hidden, *[torch.zeros(1, 5, dtype=torch.int64)] * 2, torch.arange(5)[None], hidden[:, :0]
    )
    assert all(
        torch.equal(states, hidden)
        for states in make("medusa", model).states(output, Target(model))
    )


def test_a_random_start_is_the_seeds_and_is_not_the_targets():
    model = llama()

    def drawn():
        torch.manual_seed(3)
        return make("sequential", model).state()

    one, again = drawn(), drawn()
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert float(one["layers.0.eh_proj.weight"].std()) == pytest.approx(0.2, rel=0.1)
    assert torch.equal(one["layers.0.post_norm.weight"], torch.ones(SIZE))
    assert not torch.equal(
        one["layers.0.mtp_block.mlp.up_proj.weight"], one["layers.1.mtp_block.mlp.up_proj.weight"]
    )


@pytest.mark.long
@pytest.mark.parametrize(
    "config",
    [
        transformers.MistralConfig(**SIZES, sliding_window=3),
        transformers.Gemma3TextConfig(
            **SIZES, sliding_window=3, layer_types=["full_attention", "sliding_attention"]
        ),
        transformers.Qwen3Config(**SIZES),
        transformers.CohereConfig(
            **{key: value for key, value in SIZES.items() if key != "head_dim"}
        ),
        transformers.MixtralConfig(**SIZES, num_local_experts=2),
        # its layers call the cache layer_past
        transformers.GPTNeoXConfig(
            **{key: value for key, value in SIZES.items() if "key_value" not in key}
        ),
    ],
    ids=lambda config: config.model_type,
)
@torch.no_grad()
def test_layers_of_other_families_are_their_own(config):
    """A copy of the last layer and norm, given what reached them, gives what they gave: windows,
    kinds of rotation and packing."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    ids = torch.randint(0, 64, (2, 12))
    positions = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 0, 1, 2, 3, 4], list(range(12))])
    reached = []
    hook = (
        model.get_decoder()
        .layers[-1]
        .register_forward_pre_hook(
            lambda _, args, kwargs: reached.append(args[0] if args else kwargs["hidden_states"]),
            with_kwargs=True,
        )
    )
    reference = model.get_decoder()(
        input_ids=ids, position_ids=positions, use_cache=False
    ).last_hidden_state
    hook.remove()
    layer, norm = decoder_layer(model, "last_layer").eval(), final_norm(model, "last_layer")
    actual = norm(run_layer(layer, reached[0], layer_inputs(Target(model), reached[0], positions)))
    torch.testing.assert_close(actual, reference, rtol=1e-5, atol=1e-5)
    check_decoding(
        stirred(make("shared", model)),
        model,
        [(5, 3, ""), (1, 3, "1"), (3, 1, ""), (1, 3, "")],
        rtol=1e-4,
    )


@pytest.mark.long
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_packed_base_is_unpacked_for_a_start_and_stepped_on(kind):
    model = tiny(0, 2, 64, 64, "auto", "sdpa", kind, True, []).load(torch.float32)
    plain = tiny(0, 2, 64, 64, "auto", "sdpa", "none", True, []).load(torch.float32)
    freeze(model)
    for of in ("parallel", "shared"):
        drafter = make(of, model, init="last_layer").train()
        copied = (
            drafter.heads[0].block if of == "parallel" else drafter.depths[0].mtp_block
        ).mlp.up_proj.weight
        original = plain.get_decoder().layers[-1].mlp.up_proj.weight
        difference = float((copied - original).detach().norm() / original.detach().norm())
        assert 1e-4 < difference < 0.15
        optimiser = torch.optim.SGD(drafter.parameters(), lr=1e-2)
        losses = []
        for _ in range(2):
            total, _ = CausalLoss(model, 8, drafter, Target(model))(batch_of(*PACKED))
            optimiser.zero_grad()
            total.backward()
            optimiser.step()
            losses.append(float(total.detach()))
        assert losses[1] < losses[0]


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_is_computed_from_whole_weights(kind):
    model = llama(torch.bfloat16)
    drafter, whole = stirred(make(kind, model)), stirred(make(kind, llama()))
    whole.load_state(drafter.state())
    exact = llama(torch.bfloat16).float()
    output, reference = (
        output_of(PACKED, hidden_states(), torch.bfloat16),
        output_of(PACKED, hidden_states()),
    )
    for actual, other in zip(
        drafter.states(output, Target(model)), whole.states(reference, Target(exact)), strict=True
    ):
        assert actual.dtype == torch.bfloat16
        assert float((actual.float() - other).detach().norm() / other.detach().norm()) < 0.03
    total, _ = drafter.loss(output, Target(model), 4)
    total.backward()
    assert {p.grad.dtype for p in drafter.parameters()} == {torch.float32}
    memory = drafter.start(Target(model))
    update = TargetUpdate(output.hidden[1, :4], output.hidden[1, :4, :0], output.ids[1, 1:5])
    draft = drafter.propose(
        memory, Target(model), update, lambda growth: chain(3)(growth, Drawing(64, 9))
    )
    assert draft.tokens.shape == (3,)


# decoding


def check_decoding(drafter, model, steps, rtol=1e-5):
    """Grow trees along a known text and compare all logits with what training computes for the text
    up to there and a path.

    A step is (n, count, which): n states become known, `count` levels are asked for, and the
    offsets named in `which` guess the text's own token, as if they would be accepted. Each level
    has two nodes below each of the one before, added in two calls.
    """
    target, draw = Target(model), torch.Generator().manual_seed(13)
    length = sum(n for n, _, _ in steps)
    text = torch.randint(0, 64, (length + 6,), generator=draw)
    hidden = torch.randn(length, model.config.get_text_config().hidden_size, generator=draw)
    memory, known = drafter.start(target), 0
    for n, count, which in steps:
        new = slice(known, known + n)
        growth = drafter.grow(
            memory,
            target,
            TargetUpdate(hidden[new], hidden[new, :0], text[known + 1 : known + n + 1]),
        )
        known += n
        assert growth.branches
        assert growth.depth == drafter.offsets
        actual, above, numbers = {}, [()], {(): -1}
        if count:
            actual[()] = growth.first()
        for k in range(1, min(count, drafter.offsets)):
            level = []
            for which_child in range(2):
                own = (
                    int(text[known + k])
                    if str(k) in which and not which_child
                    else 3 + 7 * k + which_child
                )
                paths = [(*path, own) for path in above]
                parents = torch.tensor([numbers[path[:-1]] for path in paths])
                rows = growth.extend(torch.tensor([own] * len(paths)), parents)
                numbers |= {path: len(numbers) - 1 + i for i, path in enumerate(paths)}
                actual |= dict(zip(paths, rows, strict=True))
                level += paths
            above = level
        assert len(actual) == 2 ** min(count, drafter.offsets) - 1
        for path, logits in actual.items():
            ids = torch.cat([text[: known + 1], torch.tensor(path, dtype=torch.long), text[:8]])[
                None
            ]
            states = torch.cat(
                [hidden[:known], torch.randn(ids.shape[1] - known, hidden.shape[1])]
            )[None]
            positions = torch.arange(ids.shape[1])[None]
            reference = list(
                drafter.states(TargetOutput(states, ids, ids, positions, states[:, :0]), target)
            )
            torch.testing.assert_close(
                logits, target.head(reference[len(path)][0, known - 1]), rtol=rtol, atol=rtol
            )


PATTERNS = {
    "all refused": [(4, 3, ""), (1, 3, ""), (1, 3, ""), (1, 3, ""), (1, 3, "")],
    "all accepted": [(3, 3, "123"), (4, 3, "123"), (4, 3, "123"), (4, 3, "")],
    "from the first token": [(1, 3, ""), (1, 3, "1"), (2, 3, "12"), (3, 3, ""), (1, 3, "2")],
    "fewer asked for": [
        (5, 1, "1"),
        (2, 0, ""),
        (1, 2, ""),
        (1, 3, ""),
        (1, 1, ""),
        (1, 7, "13"),
        (2, 3, ""),
    ],
    "none asked for at first": [(1, 0, ""), (1, 0, ""), (1, 3, ""), (2, 0, ""), (5, 3, "")],
}


@pytest.mark.long
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_draft_is_what_training_computes(kind, pattern):
    model = llama()
    check_decoding(stirred(make(kind, model)), model, PATTERNS[pattern])


@pytest.mark.parametrize("kind", ["parallel", "sequential", "shared"])
def test_a_step_works_on_new_positions_only(kind):
    model = llama()
    drafter, target = make(kind, model).eval(), Target(model)
    sizes = []
    for module in drafter.modules():
        if isinstance(module, type(model.get_decoder().layers[0])):
            module.register_forward_pre_hook(lambda _, args: sizes.append(args[0].shape[1]))
    memory = drafter.start(target)
    for n in (9, 1, 2, 1):
        sizes.clear()
        update = TargetUpdate(torch.randn(n, SIZE), torch.zeros(n, 0), torch.randint(0, 64, (n,)))
        drafter.propose(memory, target, update, lambda growth: chain(3)(growth, Drawing(64, 9)))
        # depth k: the k - 1 positions whose tokens were drafted
        again = 0 if kind == "parallel" else 1
        assert sizes == [min(9, n + again * k) if n < 9 else 9 for k in range(3)]


def test_greedy_drafts_have_no_distributions():
    model = llama()
    for kind in KINDS:
        drafter, target = make(kind, model).eval(), Target(model)
        update = TargetUpdate(torch.randn(4, SIZE), torch.zeros(4, 0), torch.randint(0, 64, (4,)))

        def drafted(depth, chances=None, of=drafter, to=target, what=update):
            return of.propose(
                of.start(to), to, what, lambda growth: chain(2)(growth, Drawing(64, depth, chances))
            )

        draft = drafted(2)
        assert draft.probabilities is None
        assert draft.tokens.dtype == torch.int64
        drawn = drafted(2, lambda logits: (100 * logits).softmax(-1))
        assert torch.equal(drawn.tokens, draft.tokens)
        torch.testing.assert_close(drawn.probabilities.sum(-1), torch.ones(2))
        assert torch.equal(drawn.probabilities.argmax(-1), drawn.tokens)
        assert drafted(0).tokens.shape == (0,)


# what is refused


@pytest.mark.parametrize("kind", KINDS)
def test_knobs_that_do_not_fit_are_refused(kind):
    model = llama()
    with pytest.raises(DrafterError, match=r"drafter\.offsets=0"):
        make(kind, model, 0)
    with pytest.raises(
        DrafterError, match=r"drafter.weights=\[1.0, 2.0\] are 2, and drafter.offsets=3"
    ):
        make(kind, model, weights=[1.0, 2.0])
    with pytest.raises(DrafterError, match=r"drafter\.layers=0"):
        make("medusa", model, layers=0)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (
            transformers.GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2),
            r"GPT2LMHeadModel has no get_decoder\(\)\.layers",
        ),
        (
            transformers.OPTConfig(
                vocab_size=64,
                hidden_size=16,
                ffn_dim=16,
                num_hidden_layers=1,
                num_attention_heads=2,
                word_embed_proj_dim=16,
            ),
            "OPTForCausalLM's layers do not take rotary",
        ),
        (
            transformers.Qwen3NextConfig(
                **SIZES,
                num_experts=2,
                num_experts_per_tok=1,
                layer_types=["full_attention", "linear_attention"],
            ),
            "Qwen3NextForCausalLM's last layer is of the kind linear_attention",
        ),
    ],
    ids=lambda value: "" if isinstance(value, str) else value.model_type,
)
def test_families_without_such_layers_are_refused_but_for_medusa(config, says):
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    for kind in ("parallel", "shared"):
        with pytest.raises(DrafterError, match=f"{says}.*drafter=mtp_medusa"):
            make(kind, model)
    assert isinstance(make("medusa", model), nn.Module)


# runs


def test_heads_alone_are_trained_and_saved(train, chats):
    run = train(
        f"task.path={chats}",
        "drafter=mtp_shared",
        "adapter=none",
        "max_steps=8",
        "optimizer.lr=3e-3",
    )
    actual = load_trained(str(run))
    fresh = actual.base.load(torch.float32)
    assert all(
        torch.equal(p, q)
        for p, q in zip(actual.model.parameters(), fresh.parameters(), strict=True)
    )
    start = SequentialModules(fresh, 3, True, None, 0.6, 1.0, "last_layer", True, 1.0).state()
    stored = load_file(run / "drafter" / "model.safetensors")
    for name, tensor in actual.drafter.state().items():
        assert torch.equal(stored[name], tensor)
        assert not torch.equal(start[name], tensor)
    rows = [row for row in journal.read(run / "metrics.jsonl") if row["kind"] == "evaluation"]
    assert rows[-1]["loss"] == pytest.approx(rows[0]["loss"], rel=1e-6)
    assert all(rows[-1][f"offset{k}/loss"] < rows[0][f"offset{k}/loss"] for k in (1, 2, 3))


def test_a_run_that_goes_on_is_the_run(train, chats, monkeypatch):
    settings = (
        f"task.path={chats}",
        "drafter=mtp_sequential",
        "adapter.dropout=0.1",
        "packing=true",
        "max_length=64",
        "max_steps=5",
        "max_epochs=null",
        "callbacks.evaluation=null",
        "callbacks.checkpoints.every=2",
    )
    whole = train(*settings, "name=whole")
    with monkeypatch.context() as patch:
        cut_at(patch, 3)
        with pytest.raises(PowerCut):
            train(*settings, "name=cut", "resume=auto")
    cut = train(*settings, "name=cut", "resume=auto")
    reference, actual = outcome(whole), outcome(cut)
    assert actual[1] == reference[1]
    assert all(torch.equal(actual[0][key], reference[0][key]) for key in reference[0])
    one, other = (load_file(run / "drafter" / "model.safetensors") for run in (whole, cut))
    assert one.keys() == other.keys()
    assert all(torch.equal(tensor, other[key]) for key, tensor in one.items())


@pytest.mark.parametrize("detach", [True, False])
def test_a_trained_head_learns_from_drafts_where_it_may(detach):
    """As with adapter=full: its gradient is that of plain cross-entropies over all logits."""
    model = llama(tie_word_embeddings=False)
    drafter, target = make("medusa", model, offsets=2, detach=detach), Target(model)
    head = model.get_output_embeddings().weight.requires_grad_(True)
    ids = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(1))
    positions = torch.arange(9).expand(2, 9)
    hidden = torch.randn(2, 9, SIZE, generator=torch.Generator().manual_seed(2))
    output = TargetOutput(hidden, ids, ids, positions, hidden[:, :0])
    drafter.loss(output, target, 4)[0].backward()
    if detach:
        assert head.grad is None
        return
    actual, head.grad = head.grad, None
    plain = sum(
        weight
        * torch.nn.functional.cross_entropy(
            (h @ head.T)[:, : -k - 1].flatten(0, 1), ids[:, k + 1 :].flatten(), reduction="sum"
        )
        for k, (weight, h) in enumerate(
            zip(drafter.weights, drafter.states(output, target), strict=True), 1
        )
    )
    plain.backward()
    torch.testing.assert_close(actual, head.grad, rtol=1e-4, atol=1e-5)
