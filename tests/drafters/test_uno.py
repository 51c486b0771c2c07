"""Uno against the pass that an engine serves, one block at a time: the text through the target's
weights into a cache, then z through a copy of the model with merged weights, in float64."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from transformers import DynamicCache

from adapters.delta import Start
from tests.toys import adapters as toys
from tests.toys.drafted_text import (
    PROMPTS,
    TOKENS,
    check_lossless,
    tokens_of_a_step,
    train,
    written,
)
from tests.toys.eagle import MODELS, SIZE, TINY, knobs, llama, made
from tests.toys.packed_rows import APART, PACKED, ROWS, output_of
from tests.toys.speculative import tiny
from trainer.decoding import trees
from trainer.decoding.speculative import generate
from trainer.drafters import DrafterError, Target, TargetOutput, TargetUpdate, io
from trainer.drafters.anchors import anchors_of
from trainer.drafters.uno import Uno

K = 4
TOY = {"offsets": K, "rank": 3, "alpha": 6.0, "anchors": 64}


def uno(model, **changes):
    return made(Uno, model, **knobs("uno", **(TOY | changes)))


def merged(drafter, model):
    """A copy of the model with W + s B A."""
    other = copy.deepcopy(model)
    w = drafter.state()
    scale = drafter.alpha / drafter.rank
    with torch.no_grad():
        for name in {key.rpartition(".")[0] for key in w}:
            layer = other.get_submodule(name)
            layer.weight += scale * (w[f"{name}.B"] @ w[f"{name}.A"]).to(layer.weight)
    return other


@torch.no_grad()
def served(model, drafting, text, z):
    """The logits (K, V) of x_a = text[-1] and of z, as an engine computes them."""
    cache = DynamicCache(config=model.config)
    first = model(input_ids=torch.tensor([text]), past_key_values=cache).logits[0, -1:]
    later = drafting(input_ids=z[None], past_key_values=cache).logits[0]
    return torch.cat([first, later])


def naive(drafter, model, states, z_of):
    drafting = merged(drafter, model)
    head = model.get_output_embeddings().weight.detach()
    total = torch.zeros((), dtype=torch.float64)
    numbers = torch.zeros(K, 7, dtype=torch.float64)
    for number, ((ids, first), (hidden, _)) in enumerate(zip(ROWS, states, strict=True)):
        for anchor in range(max(1, first), len(ids) - 1):
            logits = served(model, drafting, ids[: anchor + 1], z_of(number, anchor))
            unbroken = product = 1.0
            for k in range(min(K, len(ids) - 1 - anchor)):
                p = torch.softmax(head @ hidden[anchor + k].double(), 0)
                q = torch.softmax(logits[k], 0) if k else p
                alpha = float(torch.minimum(p, q).sum())
                kl = float((p * (p / q).log()).sum())
                total = total + drafter.weights[k] * kl
                best = float(q.argmax() == p.argmax())
                among = float(int(p.argmax()) in q.topk(5).indices.tolist())
                unbroken, product = unbroken * best, product * alpha
                numbers[k] += torch.tensor([kl, 1, best, among, unbroken, alpha, product])
    return total, numbers


def z_by_row(drafter, output, packs):
    """From (row of ROWS, anchor in it) to the z of its block."""
    at, real, _ = anchors_of(output, 64, drawn=False)
    z = drafter.drawn((*at.shape, K - 1), at.device)
    result = {}
    for i, pack in enumerate(packs):
        start = 0
        for row in pack:
            for a, place in enumerate(at[i].tolist()):
                if real[i, a] and start <= place < start + len(row[0]):
                    result[ROWS.index(row), place - start] = z[i, a]
            start += len(row[0])
    return result


@pytest.mark.parametrize("packs", [APART, PACKED], ids=["apart", "packed"])
@pytest.mark.parametrize("kind", MODELS)
def test_loss_and_numbers_are_those_of_the_passes_that_are_served(kind, packs):
    model = MODELS[kind]().double()
    drafter = uno(model, weight=0.7).double().eval()
    output, states = output_of(packs, SIZE)
    output = replace(output, hidden=output.hidden.double())
    total, numbers = drafter.loss(output, Target(model), 3)
    z = z_by_row(drafter, output, packs)
    expected, counts = naive(drafter, model, states, lambda row, anchor: z[row, anchor])
    torch.testing.assert_close(total.detach().double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(numbers.double(), counts, rtol=1e-4, atol=1e-5)
    assert counts[0, 1] > counts[K - 1, 1] > 0
    assert float(numbers[1, 5]) < float(numbers[1, 1])


def test_the_row_itself_has_no_lora():
    """The natural mistake, a LoRA on all positions, is far from what is served."""
    model = llama().double()
    drafter = uno(model).double().eval()
    text, z = [5, 9, 13, 7], torch.tensor([1, 60, 33])
    right = served(model, merged(drafter, model), text, z)
    wrong = served(merged(drafter, model), merged(drafter, model), text, z)
    assert float((right - wrong).abs().max()) > 0.1
    drafter.drawn = lambda shape, device: z.expand(shape)
    ids = torch.tensor([[*text, 2, 3, 4]])
    places = torch.arange(7)[None]
    output = TargetOutput(torch.zeros(1, 7, SIZE).double(), ids, ids, places, torch.zeros(1, 0, 1))
    states = drafter.slots(output, Target(model), torch.tensor([[3]]), z.view(1, 1, 3))
    actual = Target(model).head(states[0, 0])
    torch.testing.assert_close(actual, right[1:], rtol=1e-10, atol=1e-10)


def test_gradients_are_those_of_finite_differences():
    model = llama().double()
    drafter, target = uno(model).double().eval(), Target(model)
    output, _ = output_of(PACKED, SIZE)
    output = replace(output, hidden=output.hidden.double())
    drafter.loss(output, target, 4)[0].backward()
    assert not any(p.grad is not None for p in model.parameters() if not p.requires_grad)
    draw = torch.Generator().manual_seed(2)
    for name, parameter in list(drafter.lora.tensors().items())[::5]:
        way = torch.randn(parameter.shape, generator=draw, dtype=torch.float64)
        slope = float((parameter.grad * way).sum())
        with torch.no_grad():
            parameter += 1e-3 * way
            up = float(drafter.loss(output, target, 4)[0])
            parameter -= 2e-3 * way
            down = float(drafter.loss(output, target, 4)[0])
            parameter += 1e-3 * way
        assert (up - down) / 2e-3 == pytest.approx(slope, rel=1e-2, abs=1e-3), name


@torch.no_grad()
@pytest.mark.parametrize("kind", MODELS)
def test_a_draft_is_the_served_pass_whatever_was_accepted_before(kind):
    model = MODELS[kind]().double()
    drafter, target = uno(model).double().eval(), Target(model)
    drafting, memory = merged(drafter, model), drafter.start(target)
    noise, nothing = torch.Generator().manual_seed(0), torch.zeros(0, 0)
    text = [5]
    for step, fresh in enumerate(([9, 13, 7, 30], [2], [8, 8, 1, 40], [3, 4])):
        text += fresh
        first = None if step else torch.tensor(5)
        update = TargetUpdate(nothing, nothing, torch.tensor(fresh), first)
        growth = drafter.grow(memory, target, update)
        z = torch.randint(64, (K - 1,), generator=noise)
        expected = served(model, drafting, text, z)
        actual = [growth.first()]
        for k in range(K - 1):
            actual.append(growth.extend(torch.tensor([k]), torch.tensor([k - 1]))[0])
        # Eager attention of transformers has its softmax in fp32: 3e-7 with 256-bit vectors.
        close = 1e-5 if kind == "eager" else 1e-9
        torch.testing.assert_close(torch.stack(actual), expected, rtol=close, atol=close)
    assert growth.depth == K


@torch.no_grad()
def test_an_adapter_of_the_target_stays_below_the_lora():
    model = llama().double()
    drafter = uno(model).double().eval()
    adapter = toys.lora()
    adapted = adapter.attach(copy.deepcopy(model), Start())
    draw = torch.Generator().manual_seed(4)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter += 0.1 * torch.randn(parameter.shape, generator=draw)
    whole = adapter.merge(copy.deepcopy(adapted))
    output, _ = output_of(PACKED, SIZE)
    at = torch.tensor([[2, 4], [3, 6]])
    z = drafter.drawn((2, 2, K - 1), at.device)
    together = drafter.slots(output, Target(adapted), at, z)
    alone = drafter.slots(output, Target(whole), at, z)
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    plain = drafter.slots(output, Target(model), at, z)
    assert float((together - plain).abs().max()) > 1e-2


SHAPES = {
    "chain": None,
    "static": trees.Levels([(0,), (1,), (0, 0), (0, 1), (1, 0)]),
    "eagle2": trees.eagle2(3, 3, 8),
    "dyspec": trees.dyspec(6),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_texts_are_the_targets(shape):
    model = llama()
    alone, _ = check_lossless(uno(model), Target(model), SHAPES[shape])
    # The first token of a draft is the target's own: every step but a cut one takes it.
    assert all(taken >= 1 for proposed, taken in alone.drafts if proposed)


def test_it_learns_what_the_target_does_next():
    """On one text of the target's, far more is accepted than of an untrained LoRA."""
    model = llama()
    target = Target(model)
    text, output = written(target)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        drafter = Uno(model, **knobs("uno", **(TOY | {"offsets": 3, "rank": 8, "alpha": 16.0})))
        before = tokens_of_a_step(drafter, output, target)
        train(drafter, output, target, 60, 2e-2)
        after = tokens_of_a_step(drafter, output, target)
    assert before < 2.6
    assert after > before + 0.8
    result = generate(target, drafter, PROMPTS[0], TOKENS, [])
    assert result.tokens == text


def test_rows_without_trained_tokens_have_a_loss_of_zero_and_all_gradients():
    model = llama()
    drafter = uno(model).train()
    output, _ = output_of(APART, SIZE)
    output = replace(output, labels=torch.full_like(output.labels, -100))
    total, numbers = drafter.loss(output, Target(model), 4)
    total.backward()
    assert float(total.detach()) == 0.0
    assert not numbers.any()
    assert all(parameter.grad is not None for parameter in drafter.parameters())


def test_its_folder_gives_it_back(tmp_path):
    model = llama()
    drafter = uno(model)
    settings = {"_target_": "trainer.drafters.uno.Uno", "_partial_": True}
    io.save(drafter, settings | knobs("uno", **TOY), {}, tmp_path / "draft")
    other = Uno(model, **knobs("uno", **TOY))
    io.fill(other, tmp_path / "draft")
    for name, tensor in drafter.state().items():
        assert torch.equal(tensor, other.state()[name]), name
    assert "model.layers.0.self_attn.q_proj.A" in drafter.state()


def test_texts_may_end_where_the_table_of_positions_does():
    model = tiny("gpt2", n_positions=24)
    drafter, target = uno(model), Target(model)
    prompt = torch.tensor([5, 9, 13, 7])
    plain = generate(target, None, prompt, 20, []).tokens
    assert generate(target, drafter, prompt, 20, []).tokens == plain


def test_bad_settings_are_refused_with_the_way_out():
    model = llama()
    for settings, text in (
        ({"offsets": 1}, r"drafter\.offsets=1: .* at least 2"),
        ({"target_modules": ["w_proj"]}, r"drafter\.target_modules has 'w_proj'"),
        ({"loss": "l2"}, r"drafter\.loss=l2"),
    ):
        with pytest.raises(DrafterError, match=text):
            uno(model, **settings)
    drafter, target = uno(model), Target(model)
    drafter.lora.names[0] = "model.norm"  # which is not called below
    with pytest.raises(DrafterError, match=r"1 of the 14 layers .* model\.norm first"):
        _called(drafter.lora, target, model)


def _called(lora, target, model):
    with lora.on(target, 4, 4):
        for name in lora.names[1:]:
            layer = model.get_submodule(name)
            layer(torch.zeros(1, 4, layer.in_features))


def test_it_can_be_made_without_weights():
    with torch.device("meta"):
        drafter = Uno(toys.llama(torch.float32, **TINY), **knobs("uno", **TOY))
    assert all(parameter.device.type == "meta" for parameter in drafter.parameters())
