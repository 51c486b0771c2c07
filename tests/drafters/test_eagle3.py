"""EAGLE-3's head against a plain float64 reference with one dense mask, its draft vocabulary, and
its files."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import transformers
from safetensors.torch import load_file

from tests.toys import adapters as toys
from tests.toys.eagle import (
    MODELS,
    SIZE,
    TINY,
    attended,
    by_row,
    drafts_as_it_trains,
    eagle,
    fed,
    knobs,
    llama,
    made,
    rms,
    token_of,
    weights_of,
)
from tests.toys.eagle3 import COUNTS, FEATURES
from tests.toys.families import model_of
from tests.toys.packed_rows import APART, PACKED, ROWS, numbers_of, output_of
from trainer.drafters import DrafterError, Target, TargetOutput, TargetUpdate, io
from trainer.drafters.eagle3 import Eagle3, read_layers
from trainer.models.losses import CausalLoss
from trainer.models.on_host import offset_mask


def eagle3(model, **changes):
    settings = {"offsets": 3, "draft_vocab_size": 20, "coverage": 0.5} | changes
    drafter = made(Eagle3, model, **knobs("eagle3", **settings))
    drafter.calibrate(lambda: COUNTS)
    return drafter


def naive(w, model, features, ids, passes, norm_output=False, fc_norm=False, window=None):
    """What each pass gives the head for the T slots of a row."""
    config, embedding = model.config, model.get_input_embeddings().weight.detach().double()
    eps, parts = config.rms_norm_eps, features.split(SIZE, 1)
    if fc_norm:
        parts = [rms(part, w[f"fc_norm.{i}.weight"], eps) for i, part in enumerate(parts)]
    state = torch.cat(list(parts), 1) @ w["fc.weight"].T
    keys, values, actual = [], [], []
    for k in range(passes):
        embedded = torch.stack([token_of(embedding, ids, t + 1 + k) for t in range(len(ids))])
        normed = [
            rms(embedded, w["layers.0.input_layernorm.weight"], eps),
            rms(state, w["layers.0.hidden_norm.weight"], eps),
        ]
        state = state + attended(w, config, torch.cat(normed, 1), k, keys, values, window)
        state = state + fed(w, rms(state, w["layers.0.post_attention_layernorm.weight"], eps))
        actual.append(rms(state, w["norm.weight"], eps))
        state = actual[-1] if norm_output else state
    return actual


@pytest.mark.long
@pytest.mark.parametrize("packs", [APART, PACKED], ids=["apart", "packed"])
@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("llama", {}),
        ("llama", {"norm_output": True, "fc_norm": True, "loss": "lk_hybrid"}),
        ("mistral", {"offsets": 5, "draft_vocab_size": None}),
        ("eager", {"train_head": False, "weights": [0.3, 1.0, 0.2]}),
    ],
    ids=["plain", "3.1", "window", "frozen"],
)
def test_states_loss_and_gradient_are_those_of_the_reference(kind, changes, packs):
    model = MODELS[kind]()
    drafter, target = (
        eagle3(model, **{"draft_vocab_size": 44, "weight": 0.7} | changes),
        Target(model),
    )
    output, rows = output_of(packs, SIZE, FEATURES)
    w, passes = weights_of(drafter), drafter.offsets
    form = {"norm_output": drafter.norm_output, "fc_norm": drafter.fc_norm is not None}
    window = getattr(model.config, "sliding_window", None)
    reference = [
        naive(w, model, f.double(), ids, passes, window=window, **form)
        for (_, f), (ids, _) in zip(rows, ROWS, strict=True)
    ]

    for k, states in enumerate(drafter.states(output, target)):
        assert states.isfinite().all()
        for row, actual in enumerate(by_row(packs, states)):
            there = max(0, len(actual) - 1 - k)
            torch.testing.assert_close(
                actual[:there].double(), reference[row][k][:there], rtol=1e-4, atol=1e-4
            )

    total, numbers = drafter.loss(output, target, 4)
    total.backward()
    table, head = model.get_output_embeddings().weight.detach().double(), w["lm_head.weight"]
    weights = changes.get("weights", [0.8**k for k in range(passes)])
    expected, counts, left_out = torch.zeros((), dtype=torch.float64), [0] * passes, 0
    for (hidden, _), states, (ids, first) in zip(rows, reference, ROWS, strict=True):
        for k in range(passes):
            for t in range(len(ids)):
                if t + k + 2 < len(ids) and t + k + 2 >= first:
                    p, q = (
                        torch.softmax(table @ hidden[t + k + 1].double(), 0),
                        torch.softmax(head @ states[k][t], 0),
                    )
                    loss, _, _ = numbers_of(drafter.kind, p, q, drafter.vocabulary, 3.0)
                    counts[k] += 1
                    left_out += loss is None
                    expected = expected + (0 if loss is None else 0.7 * weights[k] * loss)
    expected.backward()
    assert (0 < left_out < sum(counts)) == (drafter.vocabulary is not None)
    assert numbers[:, 1].tolist() == counts
    torch.testing.assert_close(total.double(), expected.detach(), rtol=1e-5, atol=1e-5)
    own = {
        name.replace("midlayer.", "layers.0."): p.grad
        for name, p in drafter.named_parameters()
        if p.requires_grad
    }
    assert own.keys() == w.keys() - {"d2t", "t2d"} - (
        {"lm_head.weight"} if changes.get("train_head") is False else set()
    )
    for name, gradient in own.items():
        torch.testing.assert_close(
            gradient.double(), w[name].grad, rtol=1e-3, atol=1e-3 * float(w[name].grad.abs().max())
        )


@pytest.mark.long
@pytest.mark.parametrize(
    "changes",
    [{}, {"norm_output": True, "fc_norm": True, "draft_vocab_size": None}],
    ids=["plain", "3.1"],
)
@pytest.mark.parametrize("kind", MODELS)
def test_a_tree_is_drafted_as_passes_are_trained(kind, changes):
    model = MODELS[kind]()
    with torch.no_grad():
        drafts_as_it_trains(eagle3(model, offsets=4, **changes), model, FEATURES)


def test_its_features_are_the_targets_states_in_their_order():
    model = toys.llama(torch.float32, **TINY, num_hidden_layers=5)
    drafter = eagle3(model)
    output = []
    drafter.loss = lambda actual, *_: (
        output.append(actual) or (actual.hidden.sum() * 0, torch.zeros(3, 7))
    )
    ids = toys.IDS[:, :9]
    CausalLoss(model, 64, drafter, Target(model))({"input_ids": ids, "labels": ids})
    states = model(ids, output_hidden_states=True).hidden_states
    assert drafter.layers == (1, 2, 4)
    assert torch.equal(output[0].features, torch.cat([states[1], states[2], states[4]], -1))
    assert not output[0].features.requires_grad


@pytest.mark.parametrize(
    ("depth", "layers"),
    [
        (1, (0, 1)),
        (2, (0, 1, 2)),
        (3, (1, 2, 3)),
        (4, (1, 2, 3)),
        (6, (1, 3, 5)),
        (7, (2, 3, 4)),
        (30, (2, 15, 27)),
        (32, (2, 16, 29)),
    ],
)
def test_the_states_that_are_read(depth, layers):
    assert read_layers(depth, None) == layers
    assert read_layers(depth, [0, depth]) == (0, depth)


@pytest.mark.parametrize("reference", [[], [2, 1], [1, 1], [-1, 2], [1, 5]])
def test_states_that_there_are_not_are_named(reference):
    with pytest.raises(
        DrafterError, match=r"drafter\.aux_layers=\[.*ascending.* 4 \(the output of its last layer"
    ):
        read_layers(4, reference)


# draft vocabulary


def test_the_draft_vocabulary_is_what_is_trained_most():
    model = llama()
    drafter = eagle3(model, draft_vocab_size=4, coverage=0.1)
    assert drafter.vocabulary.tolist() == [0, 1, 10, 11]
    assert drafter.d2t.tolist() == [0, 0, 8, 8]
    assert drafter.d2t.dtype == torch.int64
    assert drafter.t2d.nonzero()[:, 0].tolist() == [0, 1, 10, 11]
    assert torch.equal(drafter.lm_head.weight, model.get_output_embeddings().weight[[0, 1, 10, 11]])
    equal = Eagle3(model, **knobs("eagle3", draft_vocab_size=4, coverage=0.0))
    equal.calibrate(lambda: torch.tensor([0, 2, 1, 1, 1, 1] + [0] * 58))
    assert equal.vocabulary.tolist() == [1, 2, 3, 4]  # of equals the smaller ids


def test_too_small_a_draft_vocabulary_is_refused_with_the_size_that_would_do():
    counts = torch.zeros(64, dtype=torch.long)
    counts[40:50] = 10
    drafter = Eagle3(llama(), **knobs("eagle3", draft_vocab_size=7, coverage=0.75))
    with pytest.raises(
        DrafterError,
        match=r"draft_vocab_size=7: these tokens are 70\.0% .* requires 75\.0%: set 8 tokens",
    ):
        drafter.calibrate(lambda: counts)
    drafter = Eagle3(llama(), **knobs("eagle3", draft_vocab_size=8, coverage=0.75))
    drafter.calibrate(lambda: counts)
    assert drafter.vocabulary.tolist() == list(range(40, 48))


@pytest.mark.parametrize("size", [None, 64, 32000])
def test_all_tokens_need_no_vocabulary_and_no_counts(size):
    model = llama()
    drafter = Eagle3(model, **knobs("eagle3", draft_vocab_size=size))
    drafter.calibrate(lambda: pytest.fail("counted"))
    assert drafter.vocabulary is None
    assert not {"d2t", "t2d"} & drafter.state().keys()
    assert torch.equal(drafter.lm_head.weight, model.get_output_embeddings().weight)


def test_its_state_is_named_as_engines_name_it_and_comes_back():
    model = llama()
    drafter, other = (
        eagle3(model, train_head=False),
        Eagle3(model, **knobs("eagle3", offsets=3, draft_vocab_size=20)),
    )
    state = {name: tensor.clone() for name, tensor in drafter.state().items()}
    names = [f"self_attn.{n}_proj" for n in "qkvo"] + [
        f"mlp.{n}_proj" for n in ("gate", "up", "down")
    ]
    names += ["input_layernorm", "hidden_norm", "post_attention_layernorm"]
    plain = {"fc.weight", "norm.weight", "lm_head.weight", "d2t", "t2d"}
    assert state.keys() == plain | {f"layers.0.{name}.weight" for name in names}
    assert state["layers.0.self_attn.q_proj.weight"].shape == (SIZE, 2 * SIZE)
    assert state["fc.weight"].shape == (SIZE, FEATURES)

    assert not torch.equal(other.vocabulary, drafter.vocabulary)
    with pytest.raises(DrafterError, match="d2t and t2d"):
        other.load_state(state | {"d2t": drafter.vocabulary})
    other.load_state(state)
    assert torch.equal(other.vocabulary, drafter.vocabulary)
    assert all(torch.equal(other.state()[name], tensor) for name, tensor in state.items())
    with pytest.raises(DrafterError, match="lm_head"):
        eagle3(model, draft_vocab_size=21).load_state(state)


def test_its_folder_gives_it_back(tmp_path):
    model = llama()
    drafter = eagle3(model)
    settings = knobs("eagle3", offsets=3, draft_vocab_size=20, coverage=0.5)
    settings |= {"_target_": "trainer.drafters.eagle3.Eagle3", "_partial_": True}
    io.save(drafter, settings, {"base": "toy", "hidden_size": SIZE, "vocab_size": 64}, tmp_path)
    assert load_file(tmp_path / "model.safetensors")["t2d"].dtype == torch.bool
    back = io.load(tmp_path, model)
    assert torch.equal(back.vocabulary, drafter.vocabulary)
    assert all(torch.equal(back.state()[name], tensor) for name, tensor in drafter.state().items())


# starts, dtypes, learning


def test_what_trains():
    frozen = eagle3(llama(), train_head=False)
    assert "lm_head.weight" not in {
        name for name, p in frozen.named_parameters() if p.requires_grad
    }
    assert [group["lr_scale"] for group in eagle3(llama(), lr_scale=3.0).parameter_groups()] == [
        3.0
    ]
    assert all(p.dtype == torch.float32 for p in eagle3(llama().bfloat16()).parameters())


def test_from_the_last_layer_it_starts_as_that_run_on_the_last_state_that_is_read():
    model = llama()
    drafter, target = Eagle3(model, **knobs("eagle3", offsets=1, init="last_layer")), Target(model)
    output, rows = output_of(APART, SIZE, FEATURES)
    with torch.no_grad():
        states = next(iter(drafter.states(output, target)))
        for actual, (_, features) in zip(by_row(APART, states), rows, strict=True):
            entering = features[None, :, -SIZE:]
            at = torch.arange(entering.shape[1])[None]
            last = model.model.layers[-1](
                entering,
                position_embeddings=model.model.rotary_emb(entering, at),
                attention_mask=None,
            )
            reference = model.model.norm(last if isinstance(last, torch.Tensor) else last[0])[0]
            torch.testing.assert_close(actual, reference, rtol=1e-4, atol=1e-5)


def test_layers_with_biases_become_layers_without():
    """Qwen2's queries, keys and values have them."""
    settings = {
        "vocab_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**TINY | settings)).eval()
    drafter = eagle3(model)
    assert not [name for name in drafter.state() if name.endswith("bias")]
    assert model.model.layers[-1].self_attn.q_proj.bias is not None


def test_bf16_states_train_fp32_weights():
    model = llama().bfloat16()
    drafter, target = eagle3(model), Target(model)
    output, _ = output_of(PACKED, SIZE, FEATURES)
    output = TargetOutput(
        *(
            t.bfloat16() if t.is_floating_point() else t
            for t in vars(output).values()
            if t is not None
        )
    )
    total, _ = drafter.loss(output, target, 5)
    total.backward()
    assert all(
        p.dtype == p.grad.dtype == torch.float32 and p.grad.isfinite().all()
        for p in drafter.parameters()
    )
    tree = drafter.grow(
        drafter.start(target),
        target,
        TargetUpdate(output.hidden[0, :4], output.features[0, :4], output.ids[0, 1:5]),
    )
    assert (
        tree.extend(torch.tensor([1, 2]), torch.tensor([-1, -1])).dtype
        == tree.first().dtype
        == torch.bfloat16
    )


@pytest.mark.long
def test_it_learns_what_the_target_does_next():
    model = llama()
    drafter = made(Eagle3, model, **knobs("eagle3", offsets=3)).train()
    ids = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6] * 4])
    loss = CausalLoss(model.requires_grad_(False), 64, drafter, Target(model))
    optimizer = torch.optim.AdamW(drafter.parameters(), 3e-3)
    actual = []
    for _ in range(20):
        total, sums = loss({"input_ids": ids, "labels": ids.clone()})
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        actual.append(sums["offsets"])
    assert (actual[-1][:, 2] > actual[0][:, 2]).all()
    assert (actual[-1][:, 6] > actual[0][:, 6]).all()


def test_models_that_it_cannot_be_built_for_are_named():
    with pytest.raises(DrafterError, match="drafter=none"):
        eagle3(toys.gpt2(torch.float32))
    settings = {
        "vocab_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "pad_token_id": 0,
    }
    with pytest.raises(DrafterError, match=r"Phi3Attention has no linear q_proj.*drafter=none"):
        eagle3(transformers.Phi3ForCausalLM(transformers.Phi3Config(**TINY | settings)))


def test_it_can_be_made_without_weights():
    """As the preflight does it."""
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                **TINY, num_attention_heads=4, num_hidden_layers=2, vocab_size=64
            )
        )
    drafter = Eagle3(model, **knobs("eagle3", draft_vocab_size=20))
    assert drafter.lm_head.weight.is_meta
    assert drafter.lm_head.weight.shape == (20, SIZE)


# slots that count


def partly_trained(dtype, length=80):
    """Three rows of `length`: a prompt and its answer; two of those packed, and padding; one that
    nothing is trained of."""
    draw = torch.Generator().manual_seed(4)
    ids = torch.randint(0, 64, (3, length), generator=draw)
    labels, at = torch.full_like(ids, -100), torch.arange(length).expand(3, -1).clone()
    at[1] = torch.cat([torch.arange(30), torch.arange(35), torch.arange(15)])
    for row, span in ((0, slice(60, 80)), (1, slice(24, 30)), (1, slice(55, 65))):
        labels[row, span] = ids[row, span]
    hidden, features = (
        torch.randn(3, length, size, generator=draw).to(dtype) for size in (SIZE, FEATURES)
    )
    return TargetOutput(hidden, ids, labels, at, hidden[:, :0], features)


@pytest.mark.long
@pytest.mark.parametrize("make", [eagle, eagle3])
@pytest.mark.parametrize(
    ("kind", "tolerance"), [("llama", 1e-5), ("mistral", 1e-5), ("eager", 1e-5), ("dense", 1e-11)]
)
def test_later_passes_of_the_slots_that_count_are_those_of_all_slots(make, kind, tolerance):
    """In float64, but for some of attention unless it is sdpa's under a dense mask, and for the
    losses of chunks."""
    model = MODELS.get(kind, llama)().double()
    drafter, target, output = (
        make(model, offsets=5, confidence=0.3).double(),
        Target(model),
        partly_trained(torch.float64),
    )
    if kind == "dense":
        drafter.midlayer.self_attn.config._attn_implementation = "sdpa"
    where = [offset_mask(k, output.labels, output.positions) for k in range(1, 6)]
    pull = torch.randn(
        5, 3, 80, SIZE, generator=torch.Generator().manual_seed(6), dtype=torch.float64
    )
    lengths, results = [], []
    drafter.midlayer.mlp.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    for sparing in (True, False):
        drafter.sparing = sparing
        states = list(drafter.counted_states(output, target))
        assert all(one.shape == output.hidden.shape and one.isfinite().all() for one in states)
        actual = [one[counts] for one, counts in zip(states, where, strict=True)]
        moved = sum((one * pull[k][where[k]]).sum() for k, one in enumerate(actual))
        trained = [
            p
            for name, p in drafter.named_parameters()
            if not name.startswith(("confidence", "lm_head"))
        ]
        results.append([*(one.detach() for one in actual), *torch.autograd.grad(moved, trained)])
        total, numbers = drafter.loss(output, target, 7)
        total.backward()
        results.append(
            [total.detach().double(), numbers.double(), *(p.grad for p in drafter.parameters())]
        )
        drafter.zero_grad()
    assert lengths == 2 * [80, 32, 32, 32, 32] + 2 * [80] * 5
    for spared, whole, apart in (
        (results[0], results[2], tolerance),
        (results[1], results[3], 1e-5),
    ):
        for one, other in zip(spared, whole, strict=True):
            assert other.abs().max() > 0
            torch.testing.assert_close(
                one, other, rtol=apart, atol=apart * float(other.abs().max())
            )


def test_nothing_trained_has_no_gradient_of_later_passes():
    model = llama()
    drafter, output = eagle3(model), partly_trained(torch.float32)
    output = replace(output, labels=torch.full_like(output.labels, -100))
    total, numbers = drafter.loss(output, Target(model), 7)
    total.backward()
    assert not total
    assert not numbers.any()
    assert all(p.grad is None or not p.grad.any() for p in drafter.parameters())


@pytest.mark.long
@pytest.mark.parametrize(
    ("family", "device", "reason"),
    [
        ("gemma3n_text", "cpu", r"layers have the shape \(4, 1, 4, 32\) for a text of 4 tokens"),
        ("rwkv", "meta", r"RwkvForCausalLM has no get_decoder\(\)\.layers"),
        ("gpt2", "meta", r"GPT2LMHeadModel has no get_decoder\(\)\.layers"),
    ],
)
def test_layers_that_the_head_cannot_read_are_refused(family, device, reason):
    settings = knobs("eagle3", offsets=2, aux_layers=[0, 1, 2], layer="llama")
    with pytest.raises(DrafterError, match=reason):
        Eagle3(model_of(family, device), **settings)
