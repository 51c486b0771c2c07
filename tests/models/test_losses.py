"""The chunked loss against full logits, and a batch's loss against transformers' own."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)

from adapters.delta import AdaptedLinear, Start
from adapters.full import Full
from adapters.lora import LoRAAdapter
from adapters.peft import Peft
from adapters.rosa import RoSA
from tests.toys import adapters as toys
from trainer.data.batches import Collate, Pick
from trainer.data.render import Tokens
from trainer.drafters import Target
from trainer.drafters.parallel import ParallelHeads
from trainer.models.heads import captured_hidden, output_head
from trainer.models.losses import (
    CausalLoss,
    ClassLoss,
    chunked_cross_entropy,
    positions,
)
from trainer.models.on_host import supervised_positions
from trainer.speed.predictions import largest

SHAPE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": 0,
}


class Shifted(LlamaForCausalLM):
    """A model of which no config tells what follows its output layer."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = output.logits.sinh()
        return output


class Masked(LlamaForCausalLM):
    """One that addresses single tokens among the logits."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits[..., 60] = -100.0
        return output


def models() -> dict[str, Any]:
    torch.manual_seed(0)
    made = {
        "llama": toys.llama(torch.float32),
        "gpt2": toys.gpt2(torch.float32),
        "gemma2": Gemma2ForCausalLM(
            Gemma2Config(**SHAPE, final_logit_softcapping=3.0, query_pre_attn_scalar=8)
        ),
        "granite": GraniteForCausalLM(GraniteConfig(**SHAPE, logits_scaling=4.0)),
        "cohere": CohereForCausalLM(
            CohereConfig(**{k: v for k, v in SHAPE.items() if k != "head_dim"}, logit_scale=0.25)
        ),
        "shifted": Shifted(toys.llama().config).float(),
        "masked": Masked(toys.llama().config).float(),
    }
    return {name: model.eval() for name, model in made.items()}


MODELS = models()


def lora(**changes: Any) -> LoRAAdapter:
    return toys.lora(**{"dtype": "float64"} | changes)


def adapted(model: Any, **changes: Any) -> Any:
    """With a LoRA whose A and B are random."""
    torch.manual_seed(1)
    lora(**changes).attach(model, Start())
    for name, parameter in model.named_parameters():
        if name.endswith("delta.B"):
            nn.init.normal_(parameter, std=0.2)
    return model


def rows(*lengths: int) -> list[Tokens]:
    """Rows of random tokens, of which the first third is not trained."""
    draw = torch.Generator().manual_seed(len(lengths))
    made = []
    for length in lengths:
        ids = torch.randint(1, 64, (length,), generator=draw).tolist()
        made.append(Tokens(ids, [i >= length // 3 for i in range(length)]))
    return made


def batch(*sequences: list[Tokens], packed: bool = False) -> dict[str, Any]:
    return Collate(0, packed, False)(
        [(Pick(i, True, 1), sequence) for i, sequence in enumerate(sequences)]
    )


def gradients(model: Any) -> list[Tensor]:
    return [p.grad.clone() for p in model.parameters() if p.requires_grad]


# chunks


@pytest.mark.parametrize("chunk", [1, 3, 10, 11])
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [
        (torch.float64, 1e-5),  # losses are summed in fp32 whatever comes in
        # logits, and then the gradients, are rounded to 8 bits: 2^-8 each, of the largest
        (torch.bfloat16, 0.03),
    ],
)
def test_chunks_give_what_full_logits_give(chunk, dtype, tolerance):
    torch.manual_seed(0)
    head = nn.Linear(6, 17).to(dtype)
    hidden = torch.randn(10, 6, dtype=dtype, requires_grad=True)
    targets = torch.randint(0, 17, (10,))
    loss, right = chunked_cross_entropy(hidden, targets, head, chunk, (head.weight, head.bias))
    assert loss.dtype == torch.float32
    (0.37 * loss).backward()

    exact = hidden.detach().double().requires_grad_(True)
    w, b = (
        head.weight.detach().double().requires_grad_(True),
        head.bias.detach().double().requires_grad_(True),
    )
    total = torch.zeros((), dtype=torch.float64)
    guessed = 0
    for t in range(10):
        logits = w @ exact[t] + b
        total = total + torch.log(torch.exp(logits).sum()) - logits[targets[t]]
        guessed += int(logits.argmax() == targets[t])
    (0.37 * total).backward()
    assert float(loss.detach()) == pytest.approx(float(total.detach()), rel=tolerance)
    assert float(right) == guessed
    for got, expected in (
        (hidden.grad, exact.grad),
        (head.weight.grad, w.grad),
        (head.bias.grad, b.grad),
    ):
        assert got.dtype == dtype
        assert (got.double() - expected).abs().max() < tolerance * expected.abs().max()
    with torch.no_grad():
        again, also_right = chunked_cross_entropy(
            hidden, targets, head, chunk, (head.weight, head.bias)
        )
    assert float(again) == pytest.approx(float(loss.detach()), rel=1e-6)
    assert float(also_right) == guessed


@pytest.mark.parametrize("vocabulary", [3, 511, 512, 513, 1000, 1024, 5003])
def test_the_largest_logit_and_its_first_place_are_those_of_argmax(vocabulary):
    draw = torch.Generator().manual_seed(vocabulary)
    # of so few numbers that most rows have several largest ones
    tied = torch.randint(0, 4, (300, vocabulary), generator=draw).float()
    apart = torch.randn(300, vocabulary, generator=draw)
    apart[:20, -1] = apart[20:40, 0] = 9.0  # at the ends, of which the last block is shorter
    for logits in (tied, apart, -apart.abs(), torch.zeros(3, vocabulary)):
        most, place = largest(logits)
        assert torch.equal(most, logits.amax(-1, keepdim=True))
        assert torch.equal(place, logits.argmax(-1))


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_whole_tiles_on_a_gpu_give_the_loss_of_all_logits(dtype, tolerance):
    torch.manual_seed(0)
    vocabulary = 128256
    head = nn.Linear(64, vocabulary, bias=False, device="cuda", dtype=dtype).requires_grad_(False)
    hidden = torch.randn(900, 64, device="cuda", dtype=dtype, requires_grad=True)
    targets = torch.randint(0, vocabulary, (900,), device="cuda")
    loss, _ = chunked_cross_entropy(hidden, targets, head, positions(vocabulary, "cuda"))
    (grad,) = torch.autograd.grad(loss, hidden)
    exact = hidden.detach().double().requires_grad_()
    expected = F.cross_entropy(exact @ head.weight.double().T, targets, reduction="sum")
    (wanted_grad,) = torch.autograd.grad(expected, exact)
    torch.testing.assert_close(loss.double(), expected, rtol=tolerance, atol=0)
    error = (grad.double() - wanted_grad).abs().max()
    assert error < 5 * tolerance * wanted_grad.abs().max()


@pytest.mark.parametrize("chunk", [1, 3, 10])
def test_weights_count_each_loss_as_often_as_they_say(chunk):
    torch.manual_seed(0)
    head = nn.Linear(6, 17)
    hidden = torch.randn(10, 6, requires_grad=True)
    targets, weights = torch.randint(0, 17, (10,)), torch.rand(10) * 3
    parameters = (head.weight, head.bias)
    loss, right = chunked_cross_entropy(hidden, targets, head, chunk, parameters, weights)
    loss.backward()

    other, again = copy.deepcopy(head), hidden.detach().clone().requires_grad_(True)
    other.zero_grad()
    each = F.cross_entropy(other(again), targets, reduction="none")
    expected = sum(weights[t] * each[t] for t in range(10))
    expected.backward()
    best = (other(again).argmax(-1) == targets).float()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(right, (best * weights).sum())
    for got, exact in ((hidden, again), (head.weight, other.weight), (head.bias, other.bias)):
        torch.testing.assert_close(got.grad, exact.grad)
    with torch.no_grad():
        silent, _ = chunked_cross_entropy(hidden, targets, head, chunk, parameters, weights)
    torch.testing.assert_close(silent, expected.detach())


def test_weights_of_0_and_1_are_a_mask_to_the_bit():
    torch.manual_seed(0)
    head = nn.Linear(6, 17)
    hidden, targets = torch.randn(10, 6), torch.randint(0, 17, (10,))
    ones = chunked_cross_entropy(hidden, targets, head, 4, (), torch.ones(10))
    assert ones == chunked_cross_entropy(hidden, targets, head, 4)
    keep = torch.tensor([1, 0, 0, 1, 1, 0, 1, 1, 0, 1], dtype=torch.bool)
    # one position a chunk, so that both sum in the same order
    masked = chunked_cross_entropy(hidden[keep], targets[keep], head, 1)
    assert chunked_cross_entropy(hidden, targets, head, 1, (), keep.float()) == masked


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", ["llama", "shifted"])
def test_a_step_over_weighted_rows_is_the_weighted_mean_of_their_losses(name, packed):
    model = MODELS[name]
    made = rows(5, 7, 4)
    for row, weight in zip(made, (0.25, 2.0, 1.0), strict=True):
        row.weight = weight
    groups = [made[:2], made[2:]] if packed else [[row] for row in made]
    items = [(Pick(i, True, 1), group) for i, group in enumerate(groups)]
    _, sums = CausalLoss(model, 64)(Collate(0, packed, False, weighted=True)(items))
    loss = tokens = 0.0
    for row in made:
        _, alone = CausalLoss(model, 64)(batch([row]))
        loss += row.weight * float(alone["loss"])
        tokens += row.weight * float(alone["tokens"])
    assert float(sums["loss"]) == pytest.approx(loss, rel=1e-5)
    assert float(sums["tokens"]) == pytest.approx(tokens)


def test_a_frozen_head_gets_no_gradient_and_hidden_states_get_all_of_it():
    torch.manual_seed(0)
    head = nn.Linear(6, 17).requires_grad_(False)
    hidden = torch.randn(10, 6, requires_grad=True)
    targets = torch.randint(0, 17, (10,))
    chunked_cross_entropy(hidden, targets, head, 4)[0].backward()
    other = hidden.detach().clone().requires_grad_(True)
    F.cross_entropy(head(other), targets, reduction="sum").backward()
    torch.testing.assert_close(hidden.grad, other.grad)
    assert head.weight.grad is None


def test_a_head_is_trained_where_nothing_before_it_is():
    torch.manual_seed(0)
    head = nn.Linear(6, 17)
    hidden, targets = torch.randn(10, 6), torch.randint(0, 17, (10,))
    chunked_cross_entropy(hidden, targets, head, 4, tuple(head.parameters()))[0].backward()
    other = copy.deepcopy(head)
    other.zero_grad()
    F.cross_entropy(other(hidden), targets, reduction="sum").backward()
    torch.testing.assert_close(head.weight.grad, other.weight.grad)
    torch.testing.assert_close(head.bias.grad, other.bias.grad)


@pytest.mark.parametrize("trains", [True, False])
def test_no_trained_token_is_no_loss_and_no_gradient(trains):
    head = nn.Linear(6, 17)
    whole = torch.randn(4, 6, requires_grad=trains)
    loss, right = chunked_cross_entropy(whole[:0], torch.zeros(0, dtype=torch.int64), head, 4)
    assert (float(loss.detach()), float(right)) == (0.0, 0.0)
    if trains:
        loss.backward()  # a micro-batch of a step like any other
        assert torch.equal(whole.grad, torch.zeros(4, 6))


class Largest(TorchDispatchMode):
    """The most numbers that any operation gives."""

    def __init__(self) -> None:
        super().__init__()
        self.most = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        for value in result if isinstance(result, list | tuple) else [result]:
            if isinstance(value, Tensor):
                self.most = max(self.most, value.numel())
        return result


@pytest.mark.parametrize("trained", ["adapter", "head"])
def test_the_logits_never_exist_all_at_once(trained):
    # 40 positions of 2000 tokens: 80000 logits; the head itself has 2000 x 16.
    model: Any = toys.llama(
        torch.float32,
        vocab_size=2000,
        hidden_size=16,
        intermediate_size=16,
        tie_word_embeddings=False,
    )
    adapted(model, dtype="float32", target_modules=["q_proj"])
    if trained == "head":
        model.lm_head.requires_grad_(True)
    here = batch(rows(41), rows(21))
    loss = CausalLoss(model, 8)
    with Largest() as seen:
        summed, sums = loss(here)
        summed.backward()
    assert int(sums["tokens"]) > 38
    assert seen.most <= 2000 * 16
    with Largest() as seen:
        model(input_ids=here["input_ids"], labels=here["labels"]).loss.backward()
    assert seen.most >= 40 * 2000  # as it would be


@pytest.mark.parametrize("trains", [True, False])
def test_the_reported_loss_is_exact_over_bfloat16_logits(trains):
    # A sum of about 1900: in bf16 its neighbours are 8 away.
    torch.manual_seed(0)
    weight = torch.randn(500, 16).bfloat16()
    hidden = torch.randn(150, 16).bfloat16().requires_grad_(trains)
    targets = torch.randint(0, 500, (150,))
    pieces = []

    def head(part: Tensor) -> Tensor:
        logits = part @ weight.T
        pieces.append(logits.detach())
        return logits

    loss, _ = chunked_cross_entropy(hidden, targets, head, 8)
    logits = torch.cat(pieces)
    assert logits.dtype == torch.bfloat16
    exact = sum(
        float(torch.log(torch.exp(row).sum()) - row[t])
        for row, t in zip(logits.double(), targets, strict=True)
    )
    assert float(loss.detach()) == pytest.approx(exact, rel=1e-5)
    assert float(loss.detach().bfloat16()) != pytest.approx(exact, rel=1e-5)


class Alive(TorchDispatchMode):
    """Which of the tensors that operations gave, `width` numbers wide, still have memory of their
    own."""

    def __init__(self, width: int, model: nn.Module):
        super().__init__()
        self.width = width
        self.weights = {StorageWeakRef(p.untyped_storage()) for p in model.parameters()}
        self.refs: dict[StorageWeakRef, int] = {}

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        for value in result if isinstance(result, list | tuple) else [result]:
            if isinstance(value, Tensor) and value.ndim == 2 and value.shape[1] == self.width:
                self.refs[StorageWeakRef(value.untyped_storage())] = len(value)
        return result

    def rows(self) -> list[int]:
        return [
            rows for ref, rows in self.refs.items() if not ref.expired() and ref not in self.weights
        ]


@pytest.mark.parametrize("trains", [True, False])
def test_one_chunk_of_one_heads_logits_is_alive_at_a_time(trains):
    model: Any = adapted(
        toys.llama(torch.float32, vocab_size=97), dtype="float32", target_modules=["q_proj"]
    ).to(torch.bfloat16)
    drafter = ParallelHeads(model, 3, None, 1.0, "random", False, 1.0)
    target, loss = Target(model), CausalLoss(model, 4)
    loss.drafter, loss.target = drafter, target
    chunks, head = [], target.head
    seen = Alive(97, model)

    def watched(hidden: Tensor) -> Tensor:
        assert seen.rows() == []
        logits = head(hidden)
        assert seen.rows() == [len(hidden)]
        chunks.append(len(hidden))
        return logits

    loss.head = target.head = watched
    with seen, torch.set_grad_enabled(trains):
        summed, sums = loss(batch(rows(17), rows(9)))
        assert seen.rows() == []
        if trains:
            summed.backward()
    asked = [int(sums["tokens"]), *sums["offsets"][:, 1].int().tolist()]
    assert chunks == [size for n in asked for size in [4] * (n // 4) + [n % 4] * (n % 4 > 0)]
    assert len(chunks) >= 4 * 3
    assert (
        any(gradient.any() for gradient in gradients(drafter))
        if trains
        else not summed.requires_grad
    )


# heads


@pytest.mark.long
@pytest.mark.parametrize("name", MODELS)
def test_the_loss_is_transformers_own(name):
    model = copy.deepcopy(MODELS[name])
    here = batch(rows(9), rows(17), rows(5))
    loss = CausalLoss(model, 5)
    assert (loss.head is None) == (name in ("shifted", "masked"))
    tokens = int((here["labels"][:, 1:] != -100).sum())
    output = model(input_ids=here["input_ids"], use_cache=False)
    labels = here["labels"]
    right = sum(
        int(output.logits[i, t].argmax() == labels[i, t + 1])
        for i in range(3)
        for t in range(labels.shape[1] - 1)
        if labels[i, t + 1] != -100
    )
    expected = F.cross_entropy(
        output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum"
    )
    # their classes compute the loss before they change the logits
    if name not in ("shifted", "masked"):
        own = model(input_ids=here["input_ids"], labels=labels, use_cache=False).loss * tokens
        assert float(own.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    summed, sums = loss(here)
    assert (
        float(summed.detach())
        == float(sums["loss"])
        == pytest.approx(float(expected.detach()), rel=1e-5)
    )
    assert (int(sums["tokens"]), float(sums["right"])) == (tokens, right)

    wanted_gradients = torch.autograd.grad(expected, list(model.parameters()))
    summed.backward()
    for got, right_one in zip(gradients(model), wanted_gradients, strict=True):
        assert (got - right_one).abs().max() <= 1e-4 * right_one.abs().max() + 1e-6


@pytest.mark.parametrize("name", MODELS)
def test_a_head_is_found_on_a_half_precision_model_and_in_train_mode(name):
    model = copy.deepcopy(MODELS[name]).to(torch.bfloat16).train()
    head = output_head(model)
    assert model.training
    assert (head is None) == (name in ("shifted", "masked"))
    if head is not None:
        with torch.no_grad(), captured_hidden(model.get_output_embeddings()) as kept:
            model.eval()(input_ids=toys.IDS, use_cache=False)
        assert torch.equal(head(kept[0]), toys.logits(model))
    assert "forward" not in vars(model.get_output_embeddings())


def test_a_lora_on_the_output_layer_is_trained_and_can_be_switched_off():
    model = adapted(toys.llama(), target_modules=["lm_head", "up_proj"])
    here = batch(rows(9), rows(17))
    loss = CausalLoss(model, 4)
    summed, _ = loss(here)
    summed.backward()
    actual = gradients(model)
    model.zero_grad()
    logits = model(input_ids=here["input_ids"], use_cache=False).logits
    F.cross_entropy(
        logits[:, :-1].flatten(0, 1), here["labels"][:, 1:].flatten(), reduction="sum"
    ).backward()
    for got, expected in zip(actual, gradients(model), strict=True):
        assert expected.abs().max() > 0
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)  # the loss is in fp32
    with lora().disabled(model), torch.no_grad():
        alone = float(loss(here)[0])
    assert alone == pytest.approx(float(CausalLoss(toys.llama(), 4)(here)[0].detach()), rel=1e-6)
    assert abs(alone - float(summed.detach())) > 0.01
    assert float(loss(here)[0].detach()) == float(summed.detach())


def test_an_adapter_reads_the_gradient_of_all_the_output_layers_rows_at_once():
    model = toys.llama(torch.float32, tie_word_embeddings=False).requires_grad_(False)
    delta = RoSA(model.lm_head, 3, 2, 1.0, 0.0, torch.float32, torch.float32)
    model.lm_head = AdaptedLinear(model.lm_head, delta)  # its values have no support yet
    here, read = batch(rows(9), rows(17)), []
    delta.watch = lambda dy, x: read.append(dy.t() @ x)
    (0.5 * CausalLoss(model, 4)(here)[0]).backward()
    actual = [delta.A.grad, delta.B.grad]
    assert delta.values.grad is None

    weight = model.lm_head.weight.clone().requires_grad_(True)
    hidden = model.model(input_ids=here["input_ids"], use_cache=False).last_hidden_state
    logits = (hidden @ weight.t())[:, :-1].flatten(0, 1)
    naive = F.cross_entropy(logits, here["labels"][:, 1:].flatten(), reduction="sum")
    (0.5 * naive).backward()
    assert len(read) == 1
    torch.testing.assert_close(read[0], weight.grad, rtol=1e-4, atol=1e-5)

    delta.watch, delta.A.grad, delta.B.grad = None, None, None
    (0.5 * CausalLoss(model, 4)(here)[0]).backward()  # in chunks
    assert delta.values.grad is None
    for grad, expected in zip([delta.A.grad, delta.B.grad], actual, strict=True):
        torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "ADAPTION_PROMPT"])
def test_virtual_tokens_shift_no_label(kind):
    fields = (
        {"adapter_len": 4, "adapter_layers": 1}
        if kind == "ADAPTION_PROMPT"
        else {"num_virtual_tokens": 4}
    )
    adapter = Peft(kind, 1, **fields)
    model: Any = adapter.attach(toys.llama(torch.float32), Start()).eval()
    toys.train(adapter, model, lr=0.1)
    here = batch(rows(9), rows(16))
    own = model(input_ids=here["input_ids"], labels=here["labels"], use_cache=False).loss
    tokens = int((here["labels"] != -100).sum())
    summed, sums = CausalLoss(model, 4)(here)
    assert int(sums["tokens"]) == tokens
    assert float(summed.detach()) == pytest.approx(float(own.detach()) * tokens, rel=1e-5)
    summed.backward()
    actual = gradients(model)
    model.zero_grad()
    (own * tokens).backward()
    for got, expected in zip(actual, gradients(model), strict=True):
        torch.testing.assert_close(
            got, expected, rtol=1e-3, atol=1e-5 * float(expected.abs().max())
        )
    with adapter.disabled(model):
        base = float(CausalLoss(toys.llama(torch.float32), 4)(here)[0].detach())
        assert float(CausalLoss(model, 4)(here)[0].detach()) == pytest.approx(base, rel=1e-6)
    assert base != pytest.approx(float(summed.detach()), rel=1e-3)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_rows_do_not_see_each_other(attention):
    model = adapted(toys.llama(attn_implementation=attention))
    apart = rows(7, 12, 3, 9, 14)
    loss = CausalLoss(model, 6)
    summed, sums = loss(batch(apart[:3], apart[3:], packed=True))
    summed.backward()
    actual = gradients(model)
    model.zero_grad()
    total = 0.0
    for row in apart:
        one, _ = loss(batch([row]))
        one.backward()
        total += float(one.detach())
    assert float(summed.detach()) == pytest.approx(total, rel=1e-6)
    assert int(sums["tokens"]) == sum(sum(row.trained[1:]) for row in apart)
    # eager takes its softmax in fp32, and the loss is in fp32.
    for got, expected in zip(actual, gradients(model), strict=True):
        assert (got - expected).abs().max() < 1e-5 * expected.abs().max()
    together, _ = loss(
        {
            key: value
            for key, value in batch(apart[:3], apart[3:], packed=True).items()
            if key != "position_ids"
        }
    )
    # so that the positions are what keeps them apart
    assert float(together.detach()) != pytest.approx(total, rel=1e-3)


def test_padding_changes_nothing():
    model = adapted(toys.llama())
    short, long = rows(5, 30)
    loss = CausalLoss(model, 6)
    both = loss(batch([short], [long]))[0]
    assert float(both.detach()) == pytest.approx(
        sum(float(loss(batch([row]))[0].detach()) for row in (short, long)), rel=1e-6
    )


@pytest.mark.parametrize("tied", [True, False])
def test_full_fine_tuning_trains_a_tied_weight_from_both_ends(tied):
    model: Any = Full().attach(toys.llama(tie_word_embeddings=tied), Start())
    here = batch(rows(9), rows(17))
    CausalLoss(model, 4)(here)[0].backward()
    actual = {name: p.grad.clone() for name, p in model.named_parameters()}
    assert ("lm_head.weight" in actual) != tied
    model.zero_grad()
    logits = model(input_ids=here["input_ids"], use_cache=False).logits
    F.cross_entropy(
        logits[:, :-1].flatten(0, 1), here["labels"][:, 1:].flatten(), reduction="sum"
    ).backward()
    for name, p in model.named_parameters():
        assert p.grad.abs().max() > 0
        assert (actual[name] - p.grad).abs().max() < 1e-5 * p.grad.abs().max(), name


def test_a_batch_without_a_trained_token_has_zero_gradients():
    model = adapted(toys.llama())
    here = batch(rows(9))
    here["labels"] = torch.full_like(here["labels"], -100)
    here["supervised"] = supervised_positions(here["labels"])
    summed, sums = CausalLoss(model, 4)(here)
    summed.backward()
    assert (float(summed.detach()), int(sums["tokens"])) == (0.0, 0)
    assert all(not gradient.any() for gradient in gradients(model))


# classes


def test_the_class_loss_is_cross_entropy_at_each_rows_last_token():
    config = copy.deepcopy(toys.llama().config)
    config.num_labels, config.pad_token_id = 3, 0
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(config).double().eval()
    made = rows(5, 8, 3)
    for row, label in zip(made, (2, 0, 1), strict=True):
        row.label = label
    # the second only fills a share
    here = Collate(0, False, True)([(Pick(i, i != 1, 3), [row]) for i, row in enumerate(made)])
    summed, sums = ClassLoss(model)(here)
    total = 0.0
    for i, (row, label) in enumerate(zip(made, (2, 0, 1), strict=True)):
        hidden = model.model(input_ids=torch.tensor([row.ids])).last_hidden_state[0, -1]
        logits = (model.score.weight @ hidden).detach()
        torch.testing.assert_close(sums["scores"][i].double(), logits, rtol=1e-5, atol=1e-5)
        if i != 1:
            total += float(torch.logsumexp(logits, 0) - logits[label])
    assert float(summed.detach()) == pytest.approx(total, rel=1e-5)
    assert int(sums["tokens"]) == 2
    assert float(sums["right"]) == sum(
        int(sums["scores"][i].argmax()) == label for i, label in ((0, 2), (2, 1))
    )
    summed.backward()
    assert model.score.weight.grad.abs().max() > 0


def test_a_larger_vocabulary_has_fewer_positions_at_once():
    assert positions(49152, "cpu") == 256
    assert positions(49152, "cuda") == 4 * positions(49152, "cpu")
    numbers = [positions(size, "cpu") * size for size in (8192, 32768, 131072, 262144)]
    assert max(numbers) <= 1.01 * min(numbers)
    assert positions(10**7, "cpu") == positions(10**7, "cuda") == 16
    # Llama 3: 392 positions would leave the last of four tiles almost empty.
    assert positions(128256, "cuda") == 384
    assert all(positions(size, "cuda") % 128 == 0 for size in range(1000, 390_000, 777))
    model = toys.llama(torch.float32, vocab_size=97)
    assert CausalLoss(model, None).chunk == positions(97, "cpu")
    assert CausalLoss(model, 5).chunk == 5
