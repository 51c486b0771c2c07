"""P-EAGLE against a loop over rollouts in plain float64, each a causal row without a mask."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from tests.toys import adapters as toys
from tests.toys.drafted_text import check_it_learns, check_lossless
from tests.toys.eagle import (
    MODELS,
    SIZE,
    TINY,
    attended,
    fed,
    knobs,
    llama,
    made,
    news_of,
    rms,
    token_of,
    weights_of,
)
from tests.toys.eagle3 import COUNTS, FEATURES
from tests.toys.packed_rows import APART, PACKED, ROWS, numbers_of, output_of
from trainer.decoding import trees
from trainer.drafters import DrafterError, Target, io
from trainer.drafters.eagle3 import Eagle3
from trainer.drafters.peagle import PEagle
from trainer.models.on_host import offset_mask

ALL = {"keep": 1.0, "keep_least": 1.0}
TOY = {"offsets": 3, "draft_layers": 2, "draft_vocab_size": 44, "coverage": 0.5}


def peagle(model, **changes):
    drafter = made(PEagle, model, **knobs("peagle", **TOY | changes))
    drafter.calibrate(lambda: COUNTS)
    return drafter


def rollout(w, drafter, model, features, ids, at):
    """What each depth gives the head, of the rollout at one position of a row."""
    config, embedding = model.config, model.get_input_embeddings().weight.detach().double()
    eps, window = config.rms_norm_eps, getattr(config, "sliding_window", None)
    more = drafter.offsets - 1
    tokens = [token_of(embedding, ids, t + 1) for t in range(at + 1)]
    tokens = torch.stack(tokens + [embedding[int(drafter.mask_token)]] * more)
    z = torch.cat([features[: at + 1], w["mask_hidden"][0].expand(more, -1)]) @ w["fc.weight"].T
    for n in range(1 + len(drafter.more)):
        own = {
            name.replace(f"layers.{n}.", "layers.0.", 1): tensor
            for name, tensor in w.items()
            if name.startswith(f"layers.{n}.")
        }
        x = rms(tokens if n == 0 else z, own["layers.0.input_layernorm.weight"], eps)
        if n == 0:
            x = torch.cat([x, rms(z, own["layers.0.hidden_norm.weight"], eps)], 1)
        z = z + attended(own, config, x, 0, [], [], window)
        z = z + fed(own, rms(z, own["layers.0.post_attention_layernorm.weight"], eps))
    return rms(z, w["norm.weight"], eps)[at:]


@pytest.mark.long
@pytest.mark.parametrize("packs", [APART, PACKED], ids=["apart", "packed"])
@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("llama", {}),
        ("mistral", {"offsets": 4, "draft_vocab_size": None, "loss": "tv"}),
        ("eager", {"draft_layers": 3, "fc_norm": False, "beta": 0.5}),
    ],
)
def test_loss_numbers_and_gradient_are_those_of_a_loop_over_rollouts(kind, changes, packs):
    model = MODELS[kind]()
    drafter = peagle(model, **ALL | {"weight": 0.7} | changes)
    output, rows = output_of(packs, SIZE, FEATURES)
    total, numbers = drafter.train().loss(output, Target(model), 4)
    total.backward()
    w, depth = weights_of(drafter), drafter.offsets
    table, head = model.get_output_embeddings().weight.detach().double(), w["lm_head.weight"]
    expected, counts = torch.zeros((), dtype=torch.float64), torch.zeros(depth, 7).double()
    for (hidden, features), (ids, first) in zip(rows, ROWS, strict=True):
        for a in range(len(ids)):
            z, unbroken, product = None, 1.0, 1.0
            for k in range(depth):
                goal = a + 2 + k
                if goal >= len(ids) or goal < first:
                    break
                if z is None:
                    z = rollout(w, drafter, model, features.double(), ids, a)
                p = torch.softmax(table @ hidden[goal - 1].double(), 0)
                q = torch.softmax(head @ z[k], 0)
                loss, alpha, best = numbers_of(drafter.kind, p, q, drafter.vocabulary, 3.0)
                alpha = float(alpha.detach())
                order = q.topk(5).indices
                order = order if drafter.vocabulary is None else drafter.vocabulary[order]
                unbroken *= int(order[0]) == best
                product *= alpha
                value = 0.0 if loss is None else float(loss.detach())
                counts[k] += torch.tensor(
                    [value, 1, int(order[0]) == best, best in order.tolist(), unbroken,
                     alpha, product]
                )  # fmt: skip
                beta = changes.get("beta", 1.0)
                expected = expected + (0 if loss is None else 0.7 * beta**k * loss)
    expected.backward()
    torch.testing.assert_close(total.detach().double(), expected.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(numbers.double(), counts, rtol=1e-4, atol=1e-4)
    assert counts[0, 1] > counts[2, 1] > 0
    own = dict(drafter.named_parameters())
    for name in ("mask_hidden", "fc.weight", "more.0.self_attn.k_proj.weight"):
        other = w[name.replace("more.0.", "layers.1.")].grad
        torch.testing.assert_close(
            own[name].grad.double(), other, rtol=1e-3, atol=1e-3 * float(other.abs().max())
        )
    again, others = drafter.eval().loss(output, Target(model), 4)
    torch.testing.assert_close(again.detach(), total.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(others, numbers, rtol=1e-5, atol=1e-5)


def test_one_depth_and_one_layer_are_eagle3s_first_pass():
    model = llama()
    output, _ = output_of(PACKED, SIZE, FEATURES)
    drafter = peagle(model, offsets=1, draft_layers=1, loss="ce")
    settings = {"offsets": 1, "draft_vocab_size": 44, "coverage": 0.5, "train_head": True}
    other = made(Eagle3, model, **knobs("eagle3", **settings))
    other.load_state(
        {k: v for k, v in drafter.state().items() if k not in ("mask_hidden", "mask_token")}
    )
    total, numbers = drafter.loss(output, Target(model), 4)
    expected, counts = other.loss(output, Target(model), 4)
    torch.testing.assert_close(total.detach(), expected.detach(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(numbers, counts, rtol=1e-6, atol=1e-6)


def test_kept_positions_are_nested_and_as_many_as_the_settings_say():
    model = llama()
    drafter = peagle(model, offsets=4, keep=0.5, keep_least=0.3).train()
    output, _ = output_of(APART, SIZE, FEATURES)
    torch.manual_seed(0)
    seen = [set(), set(), set()]
    first = offset_mask(1, output.labels, output.positions)
    for _ in range(40):
        anchors, real = drafter.rollouts(output)
        for row in range(len(APART)):
            before = set(first[row].nonzero()[:, 0].tolist())
            many = len(before)
            for depth, (at, kept) in enumerate(zip(anchors, real, strict=True), 1):
                chosen = at[row][kept[row]].tolist()
                where = offset_mask(depth + 1, output.labels, output.positions)
                valid = before & set(where[row].nonzero()[:, 0].tolist())
                assert chosen == sorted(chosen)
                assert set(chosen) <= valid
                expected = math.ceil(many * max(0.5**depth, 0.3) - 1e-6)
                assert len(chosen) == min(expected, len(valid))
                before = set(chosen)
                seen[depth - 1] |= {(row, place) for place in chosen}
    for depth, places in enumerate(seen, 1):
        where = offset_mask(depth + 1, output.labels, output.positions)
        assert places == {tuple(one) for one in (first & where).nonzero().tolist()} or depth > 1
    drafter.eval()
    (one, _), (two, _) = drafter.rollouts(output), drafter.rollouts(output)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_no_slot_reads_what_it_predicts():
    model = llama()
    drafter, target = peagle(model, **ALL), Target(model)
    output, _ = output_of(PACKED, SIZE, FEATURES)
    anchors, real = drafter.rollouts(output)
    before = drafter.slots(output, target, anchors, real)
    depth = [0] * output.ids.shape[1] + [d for d, at in enumerate(anchors, 1) for _ in at[0]]
    at = torch.cat([torch.arange(output.ids.shape[1]).expand(2, -1), *anchors], 1)
    cut = 5
    ids, features = output.ids.clone(), output.features.clone()
    ids[:, cut + 2 :] = 1  # x_{cut+2} is what (cut, 0) predicts
    features[:, cut + 1 :] += 1.0
    after = drafter.slots(replace(output, ids=ids, features=features), target, anchors, real)
    same = at <= cut
    torch.testing.assert_close(before[same], after[same], rtol=1e-4, atol=1e-5)
    assert any(depth[slot] for slot in same[0].nonzero()[:, 0].tolist())
    assert float((before - after).detach()[~same].abs().max()) > 1e-2


@torch.no_grad()
def test_a_draft_is_what_is_trained_and_nothing_of_it_stays():
    model = llama()
    drafter, target = peagle(model, **ALL).eval(), Target(model)
    draw, known = torch.Generator().manual_seed(3), 7
    hidden = torch.randn(known, SIZE, generator=draw)
    features = torch.randn(known, FEATURES, generator=draw)
    ids = torch.randint(0, 64, (known + 1,), generator=draw)
    memory = drafter.start(target)
    for start, end in ((0, 3), (3, 4), (4, known)):
        growth = drafter.grow(memory, target, news_of(hidden, features, ids, start, end))
        assert [entries.get_seq_length() for entries in memory] == [end, end]
    fresh = drafter.start(target)
    drafter.grow(fresh, target, news_of(hidden, features, ids, 0, known))
    for entries, others in zip(memory, fresh, strict=True):
        torch.testing.assert_close(entries.keys, others.keys, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(entries.values, others.values, rtol=1e-4, atol=1e-5)
    w = {name: tensor.detach() for name, tensor in weights_of(drafter).items()}
    z = rollout(w, drafter, model, features.double(), ids.tolist(), known - 1)
    logits = z @ w["lm_head.weight"].T
    actual = [growth.first()]
    for node in range(drafter.depth - 1):
        actual.append(growth.extend(torch.tensor([node]), torch.tensor([node - 1]))[0])
    torch.testing.assert_close(torch.stack(actual).double(), logits, rtol=1e-4, atol=1e-4)
    assert torch.equal(growth.vocabulary, drafter.vocabulary)


SHAPES = {
    "chain": None,
    "static": trees.Levels([(0,), (1,), (0, 0), (0, 1), (1, 0)]),
    "eagle2": trees.eagle2(3, 3, 8),
    "dyspec": trees.dyspec(6),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_texts_are_the_targets(kind, shape):
    model = MODELS[kind]()
    check_lossless(peagle(model).eval(), Target(model), SHAPES[shape])


def test_it_learns_what_the_target_does_next():
    model = llama()
    check_it_learns(peagle(model, draft_vocab_size=None, **ALL), Target(model))


def test_its_folder_gives_it_back(tmp_path):
    model = llama()
    drafter = peagle(model)
    settings = {"_target_": "trainer.drafters.peagle.PEagle", "_partial_": True}
    io.save(drafter, settings | knobs("peagle", **TOY), {}, tmp_path / "draft")
    other = peagle(model)
    io.fill(other, tmp_path / "draft")
    for name, tensor in drafter.state().items():
        assert torch.equal(tensor, other.state()[name]), name
    assert {
        "layers.0.hidden_norm.weight",
        "layers.1.input_layernorm.weight",
    } <= other.state().keys()


def test_bad_settings_are_refused_with_the_way_out():
    model = llama()
    for settings, text in (
        ({"keep": 0.1}, r"expected 0 < keep_least <= keep <= 1"),
        ({"mask_token": 64}, r"the model has tokens 0 \.\. 63"),
        ({"mask_token": 5}, "is trained 59 times"),
    ):
        with pytest.raises(DrafterError, match=text):
            peagle(model, **settings)


def test_rows_without_trained_tokens_have_a_loss_of_zero_and_all_gradients():
    model = llama()
    drafter = peagle(model).train()
    output, _ = output_of(APART, SIZE, FEATURES)
    output = replace(output, labels=torch.full_like(output.labels, -100))
    total, numbers = drafter.loss(output, Target(model), 4)
    total.backward()
    assert float(total.detach()) == 0.0
    assert not numbers.any()
    missing = {name for name, p in drafter.named_parameters() if p.requires_grad and p.grad is None}
    assert missing <= {"lm_head.weight"}


def test_it_can_be_made_without_weights():
    with torch.device("meta"):
        model = toys.llama(torch.float32, **TINY)
        drafter = PEagle(model, **knobs("peagle", **TOY))
    assert all(parameter.device.type == "meta" for parameter in drafter.parameters())
