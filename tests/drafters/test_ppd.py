"""PPD against whole passes of the target over a text and one chain of prompt tokens after it, one
anchor and one member at a time, in float64."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from tests.toys.eagle import MODELS, SIZE, knobs, llama, made
from tests.toys.packed_rows import APART, PACKED, ROWS, output_of
from tests.toys.speculative import tiny
from trainer.decoding import trees
from trainer.decoding.sampling import Sampling
from trainer.decoding.speculative import Strategy, generate
from trainer.drafters import DrafterError, Target, TargetUpdate, io
from trainer.drafters.ppd import PromptTokens

K = 3


def ppd(model, **changes):
    return made(PromptTokens, model, **knobs("ppd", **changes))


@torch.no_grad()
def looked_ahead(drafter, model, text):
    """The logits (K, V) at the prompts after a text, averaged over the members."""
    embed = model.get_input_embeddings()
    members = []
    for member in range(drafter.members):
        prompts = drafter.prompts[:, member].to(embed.weight.dtype)
        inputs = torch.cat([embed(torch.tensor(text)), prompts])
        members.append(model(inputs_embeds=inputs[None]).logits[0, len(text) :])
    return torch.stack(members).mean(0)


def naive(drafter, model, states):
    head = model.get_output_embeddings().weight.detach()
    total = torch.zeros((), dtype=torch.float64)
    numbers = torch.zeros(K, 7, dtype=torch.float64)
    for (ids, first), (hidden, _) in zip(ROWS, states, strict=True):
        for anchor in range(max(1, first), len(ids) - 1):
            logits = looked_ahead(drafter, model, ids[: anchor + 1])
            unbroken = product = 1.0
            for k in range(1, min(K, len(ids) - 2 - anchor) + 1):
                p = torch.softmax(head @ hidden[anchor + k].double(), 0)
                q = torch.softmax(logits[k - 1], 0)
                alpha = float(torch.minimum(p, q).sum())
                kl = float((p * (p / q).log()).sum())
                total = total + drafter.weights[k - 1] * kl
                best = float(q.argmax() == p.argmax())
                among = float(int(p.argmax()) in q.topk(5).indices.tolist())
                unbroken, product = unbroken * best, product * alpha
                numbers[k - 1] += torch.tensor([kl, 1, best, among, unbroken, alpha, product])
    return total, numbers


@pytest.mark.parametrize("packs", [APART, PACKED], ids=["apart", "packed"])
@pytest.mark.parametrize(
    ("kind", "members"), [("llama", 1), ("mistral", 1), ("qwen3", 2), ("eager", 1)]
)
def test_loss_and_numbers_are_those_of_one_chain_at_a_time(kind, members, packs):
    model = MODELS[kind]().double()
    drafter = ppd(model, members=members, weight=0.7).double().eval()
    output, states = output_of(packs, SIZE)
    output = replace(output, hidden=output.hidden.double())
    total, numbers = drafter.loss(output, Target(model), 3)
    expected, counts = naive(drafter, model, states)
    torch.testing.assert_close(total.detach().double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(numbers.double(), counts, rtol=1e-4, atol=1e-5)
    assert counts[0, 1] > counts[K - 1, 1] > 0


def test_only_the_prompts_learn_and_they_learn():
    model = llama()
    model.requires_grad_(False)
    drafter = ppd(model).train()
    assert [name for name, _ in drafter.named_parameters()] == ["prompts"]
    assert sum(p.numel() for p in drafter.parameters()) == K * SIZE
    (group,) = drafter.parameter_groups()
    assert (group["lr_scale"], group["weight_decay"]) == (1.0, 0.0)
    output, _ = output_of(APART, SIZE)
    optimizer = torch.optim.Adam(drafter.parameters(), lr=0.05)
    losses = []
    for _ in range(25):
        optimizer.zero_grad()
        total, _ = drafter.loss(output, Target(model), 64)
        total.backward()
        optimizer.step()
        losses.append(float(total.detach()))
    assert losses[-1] < 0.9 * losses[0]
    assert all(p.grad is None for p in model.parameters())


def test_fewer_anchors_count_for_all():
    model = llama()
    output, _ = output_of([[ROWS[3]]], SIZE)
    few, all_ = (ppd(model, anchors=count).eval() for count in (2, 64))
    counts = [int(drafter.loss(output, Target(model), 64)[1][0, 1]) for drafter in (few, all_)]
    assert counts[0] < counts[1]
    drawn = few.train()
    sums = []
    for seed in range(60):
        torch.manual_seed(seed)
        sums.append(drawn.loss(output, Target(model), 64)[0].detach())
    expected = all_.loss(output, Target(model), 64)[0].detach()
    spread = torch.stack(sums).std() / len(sums) ** 0.5
    assert abs(float(torch.stack(sums).mean() - expected)) < 4 * float(spread)


@pytest.mark.parametrize("members", [1, 2])
def test_decoding_predicts_what_training_did(members):
    """After each update, also one that follows a refused tree: the logits of whole passes over the
    text without its newest token."""
    model = llama()
    drafter, target = ppd(model, members=members), Target(model)
    text = [5, 9, 3, 7, 11, 13, 2, 8, 21, 4]
    memory, read = drafter.start(target), 0
    for length in (4, 5, 8):
        ids = torch.tensor(text[read + 1 : length + 1])
        states = torch.zeros(len(ids), SIZE)
        first = torch.tensor(text[0]) if not read else None
        update = TargetUpdate(states, states[:, :0], ids, first)
        growth = drafter.grow(memory, target, update)
        read = length
        expected = looked_ahead(drafter, model, text[:length])
        got = [growth.first()]
        for depth in range(K - 1):
            got.append(growth.extend(torch.tensor([3]), torch.tensor([depth - 1]))[0])
        torch.testing.assert_close(torch.stack(got), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "mistral, a window of 6", "gpt2"])
def test_the_text_is_the_targets(kind):
    model = tiny(kind)
    drafter, target = ppd(model), Target(model)
    prompt = torch.tensor([5, 9, 13, 7, 30, 22, 11])
    plain = generate(target, None, prompt, 24, [])
    for shape in (trees.chain(K), trees.Levels([(0,), (1,), (0, 0), (0, 1), (1, 0), (0, 0, 0)])):
        result = generate(target, drafter, prompt, 24, [], Sampling(), Strategy(shape))
        assert result.tokens == plain.tokens


def test_a_perfect_look_ahead_is_accepted():
    """A target that repeats one token is looked ahead by any prompt."""
    model = tiny()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        head = model.get_output_embeddings().weight
        head.zero_()
        model.get_input_embeddings().weight[:, 0] = 9.0
        head[17, 0] = 5.0
    drafter = ppd(model)
    with torch.no_grad():
        drafter.prompts[..., 0] = 9.0
    result = generate(Target(model), drafter, torch.tensor([5, 9, 13]), 16, [])
    assert result.tokens == [17] * 16
    assert result.steps == 4  # the first token, then 4 a step, the last of them 3


def test_what_it_cannot_do_is_refused():
    model = llama()
    with pytest.raises(DrafterError, match=r"drafter\.loss=l2"):
        ppd(model, loss="l2")
    with pytest.raises(DrafterError, match=r"drafter\.offsets=0"):
        ppd(model, offsets=0)
    model.active_peft_config = SimpleNamespace(is_prompt_learning=True, peft_type="PREFIX_TUNING")
    with pytest.raises(DrafterError, match="PREFIX_TUNING puts virtual tokens"):
        ppd(model).start(Target(model))


def test_a_folder_is_loaded_with_the_same_bits(tmp_path):
    model = llama()
    drafter = ppd(model, members=2)
    settings = {"_target_": "trainer.drafters.ppd.PromptTokens", "_partial_": True}
    settings |= knobs("ppd", members=2)
    sizes = {"base": "x", "hidden_size": SIZE, "vocab_size": model.config.vocab_size}
    io.save(drafter, settings, sizes, tmp_path)
    loaded = io.load(tmp_path, model)
    assert torch.equal(loaded.state()["prompts"], drafter.prompts)
    assert sum(t.nbytes for t in loaded.state().values()) == K * 2 * SIZE * 4
