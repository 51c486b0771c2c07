"""Rows whose context runs without a gradient: the exact loss, and the gradient of constant keys and
values, against whole rows one by one."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from scripts.zoo.families import every
from tests.toys import adapters as toys
from tests.toys.families import model_of, moved
from trainer.assembly.early_checks import refuse_early
from trainer.models import context
from trainer.models.base import Base, BaseError
from trainer.models.losses import CausalLoss
from trainer.training import heal

LENGTHS, FIRST = (20, 17, 24, 9), (15, 3, 22, 8)  # of four rows, and their first trained tokens


def batch_of(firsts=FIRST, lengths=LENGTHS):
    draw = torch.Generator().manual_seed(3)
    ids = torch.randint(1, toys.VOCABULARY, (len(lengths), 24), generator=draw)
    labels = ids.clone()
    for row, (first, length) in enumerate(zip(firsts, lengths, strict=True)):
        labels[row, :first] = labels[row, length:] = -100
    weights = torch.tensor([1.0, 0.5, 2.0, 1.0])[: len(lengths), None].expand(-1, 24)
    return {"input_ids": ids, "labels": labels, "weights": weights}


def models(model=None, window=4):
    """A model with a LoRA, a copy, and the loss of the first."""
    model = moved(toys.lora(dtype="float64"), model or toys.llama())
    other = copy.deepcopy(model)
    loss = CausalLoss(model, 5)
    loss.window = window
    return model, other, loss


def naive(model, batch, window):
    """The loss row by row, with keys and values before the window detached, and its gradient."""
    layers = [m for n, m in model.named_modules() if n.endswith(("k_proj", "v_proj"))]
    total = 0.0
    for ids, labels, weights in zip(*batch.values(), strict=True):
        first = int((labels != -100).nonzero()[0])
        cut = max(0, first - window)

        def constant(module, args, out, cut=cut):
            return torch.cat([out[:, :cut].detach(), out[:, cut:]], 1)

        handles = [layer.register_forward_hook(constant) for layer in layers]
        logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1]
        for handle in handles:
            handle.remove()
        each = F.cross_entropy(logits, labels[1:], reduction="none", ignore_index=-100)
        total = total + (each * weights[1:]).sum()
    total.backward()
    return total


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize("window", [1, 4, 12])
def test_loss_and_gradient_are_those_of_constant_keys_and_values(window):
    model, other, loss = models(window=window)
    summed, counts = loss(batch_of())
    summed.backward()
    expected = naive(other, batch_of(), window)
    assert summed.item() == pytest.approx(expected.item(), rel=1e-6)
    whole, sums = CausalLoss(model, None)(batch_of())
    assert counts["loss"].item() == pytest.approx(whole.item(), rel=1e-6)
    assert counts["tokens"] == sums["tokens"]
    assert counts["right"] == sums["right"]
    for mine, theirs in zip(trained(model), trained(other), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-6)
    full = torch.autograd.grad(whole, trained(model))
    mine = [p.grad for p in trained(model)]
    assert any((a - b).norm() > 0.01 * b.norm() for a, b in zip(mine, full, strict=True))


def test_a_window_over_all_of_a_prompt_is_the_whole_row_to_the_same_bits():
    model, other, loss = models(window=22)
    loss(batch_of())[0].backward()
    CausalLoss(other, 5)(batch_of())[0].backward()
    assert all(
        torch.equal(a.grad, b.grad) for a, b in zip(trained(model), trained(other), strict=True)
    )


def test_no_gradient_means_whole_rows():
    model, _, loss = models()
    with torch.no_grad():
        assert torch.equal(loss(batch_of())[0], CausalLoss(model, 5)(batch_of())[0])


def test_what_is_kept_for_the_backward_pass_does_not_grow_with_the_context():
    def kept(length, window):
        loss = models(toys.llama(max_position_embeddings=512), window)[2]
        ids = torch.randint(1, 64, (1, length), generator=torch.Generator().manual_seed(0))
        labels = ids.clone()
        labels[:, :-8] = -100
        saved: dict[int, int] = {}

        def pack(tensor):
            storage = tensor.untyped_storage()
            saved[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            summed, _ = loss({"input_ids": ids, "labels": labels})
            del summed
        return sum(saved.values())

    whole, short, long = kept(256, None), kept(64, 8), kept(256, 8)
    # 192 more tokens have keys and values of 2 x 32 numbers in 2 layers, here with both dtypes.
    assert long - short < 192 * 2 * 64 * 8 * 4
    assert long < 0.4 * whole


def test_a_batch_is_cut_as_its_rows_are():
    """A row's gradient does not depend on the rows next to it."""
    model, other, loss = models()
    loss(batch_of())[0].backward()
    apart = CausalLoss(other, 5)
    apart.window = 4
    for row in range(4):
        apart({key: value[row : row + 1] for key, value in batch_of().items()})[0].backward()
    for mine, theirs in zip(trained(model), trained(other), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-5, atol=1e-8)


def test_parts_of_a_batch():
    first, rest = context.split(batch_of(), 4)
    assert first["input_ids"].shape == (4, 18)
    assert first["attention_mask"].sum(1).tolist() == [11, 0, 18, 4]
    assert rest["position_ids"][:, 0].tolist() == [11, 0, 18, 4]
    assert rest["input_ids"].shape == (4, 17)
    for row in range(4):
        there = rest["labels"][row]
        assert (
            there[there != -100].tolist()
            == batch_of()["input_ids"][row, FIRST[row] : LENGTHS[row]].tolist()
        )
    assert "attention_mask" not in context.split(batch_of((9, 9), (20, 24)), 4)[1]
    filler = {"input_ids": torch.ones(1, 8).long(), "labels": torch.full((1, 8), -100)}
    assert context.split(filler, 4) is None


def test_autocast_does_not_keep_weights_without_a_gradient():
    model = toys.llama(torch.float32)  # all of it is trained
    loss = CausalLoss(model, 5)
    loss.window = 4
    with torch.autocast("cpu", torch.bfloat16):
        loss(batch_of())[0].backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in trained(model))


def test_a_sliding_window_slides_over_the_context():
    config = MistralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, sliding_window=5, initializer_range=0.2,
    )  # fmt: skip
    torch.manual_seed(0)
    model, other, loss = models(MistralForCausalLM(config).double().eval())
    summed, _ = loss(batch_of())
    summed.backward()
    assert summed.item() == pytest.approx(naive(other, batch_of(), 4).item(), rel=1e-5)
    for mine, theirs in zip(trained(model), trained(other), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-3, atol=1e-4)


def test_a_teacher_reads_whole_rows():
    student, teacher = toys.llama(), toys.llama(num_hidden_layers=3)
    loss = heal.TeacherLoss(student, 5, teacher, 0.5)
    whole, _ = loss(batch_of())
    loss.window = 4
    assert loss(batch_of())[0].item() == pytest.approx(whole.item(), rel=1e-6)


def test_models_that_count_positions_themselves():
    torch.manual_seed(0)
    config = BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4, initializer_range=0.2)
    model = BloomForCausalLM(config).eval()
    loss = CausalLoss(model, 5)
    whole = loss(batch_of())[0]
    loss.window = 4
    assert loss(batch_of())[0].item() == pytest.approx(whole.item(), rel=1e-4)


def test_an_encoder_decoder_is_refused_early():
    config = {
        "max_length": 8, "base": {}, "lightning": {"strategy": "ddp"}, "fused": True,
        "task": {"_target_": "tasks.sft.Sft"}, "target": {"run": None, "draft": None},
        "objective": {"context_window": 8}, "drafter": None,
    }  # fmt: skip
    pair = SimpleNamespace(
        path="t5", longest=64, config=SimpleNamespace(is_encoder_decoder=True, model_type="t5")
    )
    with pytest.raises(BaseError, match=r"context_window=8: t5 reads its prompts with an encoder"):
        refuse_early(config, pair, None)


@pytest.fixture
def base(tiny):
    return Base(tiny.path, "auto", "sdpa", "none", True)


def test_a_model_that_can_is_left_as_it_was(base):
    model = moved(toys.lora(), base.load(torch.float32)).train()
    context.check_context(model, base)
    assert model.training
    assert all(p.grad is None for p in model.parameters())


def test_a_model_whose_state_does_not_continue_is_refused(base):
    config = MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=4)
    with pytest.raises(
        BaseError, match=r"cannot continue after a context: .*Set objective.context"
    ):
        context.check_context(MambaForCausalLM(config), base)


class Forgets(torch.nn.Module):
    """A model that takes a cache and does not read it."""

    def __init__(self, model):
        super().__init__()
        self.inner, self.config = model, model.config

    def forward(self, input_ids, past_key_values=None, position_ids=None, **_):
        return self.inner(input_ids=input_ids, position_ids=position_ids, use_cache=True)


def test_a_model_that_forgets_its_context_is_refused(base):
    with pytest.raises(BaseError, match="its logits differ by"):
        context.check_context(Forgets(toys.llama(torch.float32)), base)


# Why a family does not continue after a context; every other one does.
REFUSED = {
    "bailing_hybrid": "modified by an inplace operation",
    "cpmant": "must match the size of tensor",  # it sees later tokens
    "deepseek_v4": "its logits differ",  # its compressor pools tokens by blocks
    "falcon_mamba": "must match the size of tensor",
    "jamba": "its logits differ",
    "kimi_linear": "modified by an inplace operation",
    "mamba": "must match the size of tensor",
    "olmo_hybrid": "modified by an inplace operation",
    "openai-gpt": "it takes no cache",
    "qwen3_5_moe_text": "modified by an inplace operation",
    "qwen3_5_text": "modified by an inplace operation",
    "qwen3_next": "modified by an inplace operation",
    "recurrent_gemma": "returns no cache",
    "rwkv": "its logits differ",
    "xlm": "returns no cache",
}
# one of each kind of cache; the others are slow tests
OFTEN = ("deepseek_v3", "gemma3_text", "gpt_neox", "lfm2", "qwen3_next", "rwkv")
CAUSAL = sorted(name for name, family in every().items() if "CausalLM" in family.auto)


@pytest.mark.parametrize(
    "name",
    [name if name in OFTEN else pytest.param(name, marks=pytest.mark.slow) for name in CAUSAL],
)
def test_each_family_continues_or_is_refused(base, name):
    model = model_of(name).float().requires_grad_(True)
    if name in REFUSED:
        with pytest.raises(BaseError, match=f"cannot continue after a context: .*{REFUSED[name]}"):
            context.check_context(model, base)
    else:
        context.check_context(model, base)
