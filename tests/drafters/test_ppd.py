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
from trainer.decoding import speculative, trees
from trainer.decoding.prompted_cache import PromptedCache
from trainer.decoding.sampling import Sampling
from trainer.decoding.speculative import Strategy, generate, generate_batch
from trainer.decoding.target_cache import TargetCache, allow_trees
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


TREE = [-1, -1, 0, 2]


@pytest.mark.parametrize("members", [1, 2])
@pytest.mark.parametrize("parents", [TREE, [-1, 0], []], ids=["tree", "chain", "nothing"])
def test_the_verifying_pass_looks_ahead_after_every_node(parents, members):
    """The places have the states that they have without prompts, which see no other chain; the
    accepted ones are kept, and no prompt is."""
    model = llama()
    drafter, target = ppd(model, members=members), Target(model)
    prompts = [torch.tensor([5, 9, 3, 7]), torch.tensor([4, 21, 13, 30, 17, 12])]
    tokens = [torch.tensor([11, 13, 2, 8, 21][: 1 + len(parents)]), torch.tensor([9])]
    paths = [[node for node in (0, 2) if node < len(parents) and parents is TREE], []]
    with torch.no_grad():
        plain = TargetCache(target, whole=True)
        prompted = PromptedCache(target, (), drafter.appended(target))
        for cache in (plain, prompted):
            cache.open(prompts)
        assert prompted.after(0, []) is None
        for step in range(2):
            trees_ = [parents, []] if step == 0 else [[-1], [-1, -1]]
            rows = tokens if step == 0 else [torch.tensor([3, 4]), torch.tensor([6, 7, 8])]
            expected, got = plain.read(rows, trees_), prompted.read(rows, trees_)
            for (hidden, _), (own, _) in zip(expected, got, strict=True):
                torch.testing.assert_close(own, hidden, rtol=1e-4, atol=1e-5)
            if step == 0:
                for node in range(-1, len(parents)):
                    path, above = [], node
                    while above >= 0:
                        path.insert(0, above)
                        above = parents[above]
                    text = [*prompts[0].tolist(), 11, *(int(tokens[0][1 + n]) for n in path)]
                    states = prompted.after(0, path)
                    logits = target.head(states.mean(0))
                    reference = looked_ahead(drafter, model, text)
                    torch.testing.assert_close(logits, reference, rtol=1e-4, atol=1e-5)
            for cache in (plain, prompted):
                cache.commit(paths if step == 0 else [[0], [1]])
            assert plain.lengths == prompted.lengths
            assert plain.cache.get_seq_length() == prompted.cache.get_seq_length()


@pytest.mark.parametrize("members", [1, 2])
@pytest.mark.parametrize("shape", ["chain", "tree"])
def test_a_step_is_one_pass(members, shape, monkeypatch):
    model = tiny()
    drafter, target = ppd(model, members=members), Target(model)
    shapes = {"chain": trees.chain(K), "tree": trees.Levels([(0,), (1,), (0, 0), (0, 1)])}
    passes, prompt = [], torch.tensor([5, 9, 13, 7, 30, 22, 11])
    plain = [generate(target, None, ids, 24, []).tokens for ids in (prompt, prompt[:4])]
    run = lambda: generate(target, drafter, prompt, 24, [], strategy=Strategy(shapes[shape]))  # noqa: E731
    allow_trees(target)  # tries the target out, with passes of its own
    with monkeypatch.context() as patch:
        patch.setattr(speculative, "prompts_for", lambda *_: None)
        apart = run()
    handle = model.register_forward_pre_hook(lambda *_: passes.append(1))
    one = run()
    handle.remove()
    assert one.tokens == apart.tokens == plain[0]
    assert len(passes) == 1 + one.steps
    assert one.drafts[0] == (0, 0)
    assert sum(taken for _, taken in one.drafts) > 0
    together = generate_batch(
        target, drafter, [prompt, prompt[:4]], 24, [], strategy=Strategy(shapes[shape])
    )
    assert [result.tokens for result in together] == plain
    drawn = Sampling(temperature=1.0, seed=3)
    result = generate(target, drafter, prompt, 24, [], drawn, Strategy(shapes[shape]))
    assert len(result.tokens) == 24


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
    # the first token; a step without a draft; then 4 tokens a step
    assert result.steps == 5


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
