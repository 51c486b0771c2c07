"""Registers against a reference that writes them between the tokens, against each prefix alone, and
in runs of the program."""

from __future__ import annotations

import math
import warnings

import peft
import pytest
import torch
import transformers
from torch import nn

from adapters.delta import Start
from adapters.peft import Peft
from tests.toys import adapters as toys
from tests.toys.finetuning import adapted
from tests.toys.power_cuts import PowerCut, cut_at, outcome
from trainer import drafters
from trainer.assembly import trained as trained_module
from trainer.assembly.rows import load_data
from trainer.data.batches import Collate, Pick
from trainer.data.render import Tokens
from trainer.drafters import DrafterError, Target
from trainer.drafters.registers import Registers, attends, place_registers
from trainer.evaluation.loss import losses
from trainer.models.losses import CausalLoss
from trainer.models.tiny import tiny
from trainer.storage import checkpoints, journal

# (ids, first trained): a usual row, an answer shorter than most d, one whose prompt is too, and one
# trained throughout.
ROWS = [
    ([5, 9, 3, 7, 11, 13, 2, 8], 4),
    ([8, 2, 6, 40, 12, 33], 5),
    ([17, 12], 1),
    ([4, 21, 13, 30, 17, 12, 60, 9, 1, 50], 1),
]


def row(ids, first):
    return Tokens(ids, [at >= first for at in range(len(ids))])


def batch_of(*packs):
    """A batch as training makes it; each pack is a list of rows."""
    items = [(Pick(i, True, 1), [row(*r) for r in pack]) for i, pack in enumerate(packs)]
    return Collate(0, any(len(pack) > 1 for pack in packs), False)(items)


APART = [[r] for r in ROWS]
PACKED = [[ROWS[0], ROWS[1], ROWS[2]], [ROWS[3]]]


def registers(model, **changes):
    return Registers(model, **{"d_max": 4, "weight": 0.3, "share": 1.0, "lr_scale": 1.0} | changes)


def made(model=None, **changes):
    """(model with LoRA, drafter, loss) in float64, all of a start in which nothing is zero."""
    model = model or toys.llama()
    torch.manual_seed(3)
    drafter = registers(model, **changes).double()
    _, model = adapted(model=model)
    return model.train(), drafter, CausalLoss(model, 5, drafter, Target(model))


def drawn(batch, d_max, seed):
    """The d of each (sequence, first index) as the seed gives them."""
    torch.manual_seed(seed)
    return torch.randint(1, d_max + 1, batch["input_ids"].shape)


def rows_of(batch, packs, d_max, seed):
    """(ids, first trained, d) of each row."""
    ahead = drawn(batch, d_max, seed)
    actual = []
    for i, pack in enumerate(packs):
        at = 0
        for ids, first in pack:
            actual.append((ids, first, int(ahead[i, at])))
            at += len(ids)
    return actual


def interleaved(model, register, rows):
    """(next-token loss, registers' loss) summed over rows, each computed alone with its registers
    between its tokens."""
    embed = model.get_input_embeddings()
    total, ahead_total = 0.0, 0.0
    for ids, first, d in rows:
        items = []  # (t, whether a register)
        for t in range(len(ids)):
            items.append((t, False))
            if t + d < len(ids) and t + d >= first:
                items.append((t, True))
        table = embed(torch.tensor(ids))
        embeddings = torch.stack(
            [register if is_register else table[t] for t, is_register in items]
        )
        positions = [t + d - 1 if is_register else t for t, is_register in items]
        mask = torch.full((len(items), len(items)), float("-inf"), dtype=torch.float64)
        for q, (t, _) in enumerate(items):
            for k, (s, is_register) in enumerate(items):
                if q == k or (not is_register and s <= t):
                    mask[q, k] = 0.0
        logits = model(
            inputs_embeds=embeddings[None],
            attention_mask=mask[None, None],
            position_ids=torch.tensor([positions]),
            use_cache=False,
        ).logits[0]
        for q, (t, is_register) in enumerate(items):
            target = t + d if is_register else t + 1
            if target < max(first, 1) or target >= len(ids):
                continue
            loss = -torch.log_softmax(logits[q], -1)[ids[target]]
            if is_register:
                ahead_total = ahead_total + loss
            else:
                total = total + loss
    return total, ahead_total


def gradients(model, drafter, loss):
    trained = [p for p in [*model.parameters(), *drafter.parameters()] if p.requires_grad]
    return torch.autograd.grad(loss, trained, retain_graph=True)


# the loss


@pytest.mark.parametrize("packs", [APART, PACKED], ids=["apart", "packed"])
@pytest.mark.parametrize("seed", range(3))
def test_loss_and_gradient_are_those_of_registers_between_the_tokens(packs, seed):
    model, drafter, loss = made()
    batch = batch_of(*packs)
    rows = rows_of(batch, packs, 4, seed)
    torch.manual_seed(seed)
    actual, sums = loss(batch)
    following, ahead = interleaved(model, drafter.register, rows)
    assert float(ahead.detach()) > 1
    torch.testing.assert_close(actual.double(), 0.7 * following + 0.3 * ahead, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(sums["loss"].double(), following, rtol=1e-6, atol=1e-6)
    expected = gradients(model, drafter, 0.7 * following + 0.3 * ahead)
    assert expected[-1].abs().max() > 1e-3, "nothing reaches the register"
    for mine, other in zip(gradients(model, drafter, actual), expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)
    without = gradients(model, nn.Module(), following)
    assert any(
        (mine / 0.7 - other).abs().max() > 1e-3
        for mine, other in zip(expected, without, strict=False)
    ), "nor the adapter"


@pytest.mark.parametrize(
    ("attention", "dtype", "tolerance"),
    [
        ("sdpa", torch.float64, 1e-12),
        ("sdpa", torch.float32, 1e-5),
        ("eager", torch.float32, 1e-5),
        ("sdpa", torch.bfloat16, 0.05),
        ("eager", torch.bfloat16, 0.05),
    ],
)
def test_a_register_is_the_last_token_of_its_prefix(attention, dtype, tolerance):
    """Without any mask of one's own: x_0 .. x_t and the register, in a forward pass for each."""
    model = toys.llama(dtype, attn_implementation=attention)
    torch.manual_seed(0)
    drafter, target = registers(model), Target(model)
    batch = batch_of(*PACKED)
    inputs = drafter.inputs(batch, target)
    assert inputs["inputs_embeds"].dtype == dtype
    assert drafter.register.dtype == torch.float32
    places, length = drafter.placed, batch["input_ids"].shape[1]
    with torch.no_grad():
        hidden = target.decoder(**inputs, use_cache=False).last_hidden_state
        plain = target.decoder(
            input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False
        )
    # The rows with registers are longer, and another shape may round differently.
    assert (hidden[:, :length] - plain.last_hidden_state).abs().max() <= tolerance
    count = 0
    for i, j in (places.targets != -100).nonzero().tolist():
        t, d = int(places.after[i, j]), int(places.ahead[i, j])
        first = t - int(batch["position_ids"][i, t])
        embeddings = torch.cat(
            [target.embed(batch["input_ids"][i, first : t + 1]), drafter.register[None].to(dtype)]
        )
        positions = torch.tensor([*range(t + 1 - first), t - first + d - 1])
        with torch.no_grad():  # a 2-D mask says that a jump of positions begins no new row
            alone = target.decoder(
                inputs_embeds=embeddings[None],
                position_ids=positions[None],
                attention_mask=torch.ones(1, len(positions)),
                use_cache=False,
            ).last_hidden_state[0, -1]
        torch.testing.assert_close(hidden[i, length + j], alone, rtol=tolerance, atol=tolerance)
        assert places.targets[i, j] == batch["input_ids"][i, t + d]
        count += 1
    assert count > 8
    assert torch.isfinite(hidden).all(), "fillers too"


@pytest.mark.parametrize("packs", [APART, PACKED], ids=["apart", "packed"])
def test_the_next_token_loss_is_the_one_without_registers(packs):
    model, _, loss = made(toys.llama(torch.float32))
    batch = batch_of(*packs)
    _, sums = loss(batch)
    plain_loss, plain = CausalLoss(model, 5)(batch)
    assert float(sums["loss"]) == pytest.approx(float(plain_loss.detach()), rel=1e-6)
    assert sums["tokens"] == plain["tokens"]
    assert sums["right"] == plain["right"]


def test_a_pack_gives_what_its_rows_give_alone():
    for d in (1, 3):
        model, drafter, loss = made(d_max=d)
        with pytest.MonkeyPatch.context() as patch:  # the same d wherever a row is
            patch.setattr(
                torch, "randint", lambda low, high, shape: torch.full(tuple(shape), high - 1)
            )
            packed, packed_sums = loss(batch_of(*PACKED))
            alone, alone_sums = loss(batch_of(*APART))
        torch.testing.assert_close(packed, alone, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(
            packed_sums["offsets"], alone_sums["offsets"], rtol=1e-6, atol=1e-6
        )
        for mine, other in zip(
            gradients(model, drafter, packed), gradients(model, drafter, alone), strict=True
        ):
            torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


def test_the_numbers_are_those_of_each_offset():
    model, drafter, loss = made()
    batch = batch_of(*APART)
    rows = rows_of(batch, APART, 4, 5)
    assert len({d for _, _, d in rows}) > 1
    torch.manual_seed(5)
    _, sums = loss(batch)
    assert drafter.offsets == 3
    assert sums["offsets"].shape == (3, 5)
    for k in (1, 2, 3):
        of_this = [r for r in rows if r[2] == k + 1]
        _, expected = interleaved(model, drafter.register, of_this)
        count = sum(max(0, len(ids) - max(first, d)) for ids, first, d in of_this)
        assert sums["offsets"][k - 1, :2].tolist() == pytest.approx(
            [float(torch.as_tensor(expected).detach()), count], rel=1e-5
        )
    metrics = drafters.metrics(sums["offsets"])
    assert metrics["accepted"] == 1.0
    assert not any(key.startswith("offset4") for key in metrics)


def test_a_share_of_the_registers_counts_for_all():
    _, drafter, loss = made(share=0.25)
    batch = batch_of(*[[ROWS[3]]] * 40)
    torch.manual_seed(0)
    total, sums = loss(batch)
    drafter.share = 1.0
    torch.manual_seed(0)
    all_total, all_sums = loss(batch)
    some, whole = (
        float((total - 0.7 * sums["loss"]).detach()),
        float((all_total - 0.7 * all_sums["loss"]).detach()),
    )
    assert some == pytest.approx(whole, rel=0.3)
    assert 0.15 < float(sums["offsets"][:, 1].sum() / all_sums["offsets"][:, 1].sum()) < 0.35


# where they stand


def test_prompts_have_registers_only_for_what_is_trained():
    batch = batch_of([([1, 2, 3, 4, 5, 6, 7], 5)])
    positions = torch.arange(8).expand(1, -1)
    for d, after in [(1, [4, 5]), (2, [3, 4]), (4, [1, 2]), (6, [0]), (7, [])]:
        places = place_registers(
            batch["labels"], positions, torch.full((1, 8), d), torch.ones(1, 8, dtype=torch.bool)
        )
        real = places.targets[0] != -100
        assert places.after[0][real].tolist() == after
        assert places.targets[0][real].tolist() == [t + d + 1 for t in after]
        assert places.positions[0][real].tolist() == [t + d - 1 for t in after]
        assert places.after.shape[1] == 8


def test_a_register_sees_itself_and_its_row_so_far():
    batch = batch_of(*PACKED)
    torch.manual_seed(0)
    ahead = torch.randint(1, 4, (2, 1)).expand_as(batch["labels"])
    places = place_registers(
        batch["labels"], batch["position_ids"], ahead, torch.ones_like(ahead, dtype=torch.bool)
    )
    seen = attends(batch["position_ids"], places)[:, 0]
    length, count = batch["labels"].shape[1], places.after.shape[1]
    of_row = []
    for pack in PACKED:
        numbers = [number for number, (ids, _) in enumerate(pack) for _ in ids]
        of_row.append(
            numbers + [-1 - at for at in range(length - len(numbers))]
        )  # padding is a row a token, as for transformers
    for i in range(2):
        for q in range(length + count):
            for k in range(length + count):
                if q < length:
                    expected = k <= q and of_row[i][q] == of_row[i][k]
                elif k >= length:
                    expected = k == q
                else:
                    t = int(places.after[i, q - length])
                    expected = (
                        int(places.targets[i, q - length]) != -100
                        and k <= t
                        and of_row[i][k] == of_row[i][t]
                    )
                assert bool(seen[i, q, k]) == expected, (i, q, k)


def test_d_is_uniform_over_rows_and_comes_from_the_seed():
    model, drafter, _ = made()
    target = Target(model)
    packs = [[([1, 2, 3, 4, 5, 6], 5)] * 4] * 500
    batch = batch_of(*packs)

    def of_seed(seed):
        torch.manual_seed(seed)
        drafter.inputs(batch, target)
        return drafter.placed

    one, again, other = of_seed(0), of_seed(0), of_seed(1)
    assert torch.equal(one.ahead, again.ahead)
    assert torch.equal(one.after, again.after)
    assert not torch.equal(one.ahead, other.ahead)
    actual = one.ahead[one.targets != -100]  # one register a row
    assert len(actual) == 2000
    # 4 standard deviations
    assert all(abs(int((actual == d).sum()) - 500) < 80 for d in (1, 2, 3, 4))
    within = [
        set(ahead[targets != -100].tolist())
        for ahead, targets in zip(one.ahead, one.targets, strict=True)
    ]
    assert sum(len(ds) > 1 for ds in within) > 400, "rows of a pack draw their own"


def test_nothing_trained_is_no_loss_but_a_gradient_of_zero():
    model, drafter, loss = made()
    items = [(Pick(0, False, 1), [row(*ROWS[0])])]  # fills a rank's share
    total, sums = loss(Collate(0, False, False)(items))
    assert float(total.detach()) == 0.0
    assert sums["offsets"].sum() == 0
    assert all((grad == 0).all() for grad in gradients(model, drafter, total))


def test_evaluation_is_without_registers():
    model, _, loss = made()
    batch = batch_of(*APART)
    with torch.no_grad():
        actual, sums = loss(batch)
        expected, plain = CausalLoss(model, 5)(batch)
    assert torch.equal(sums["loss"], plain["loss"])
    assert torch.equal(actual, 0.7 * expected)
    assert drafters.metrics(sums["offsets"]) == {}


def test_the_head_is_trained_by_registers_where_it_is_trained():
    model = toys.llama(tie_word_embeddings=False)
    torch.manual_seed(3)
    drafter = registers(model).double()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name == "lm_head.weight")
    batch = batch_of(*APART)
    rows = rows_of(batch, APART, 4, 0)
    torch.manual_seed(0)
    actual, _ = CausalLoss(model, 5, drafter, Target(model))(batch)
    following, ahead = interleaved(model, drafter.register, rows)
    expected = gradients(model, drafter, 0.7 * following + 0.3 * ahead)
    for mine, other in zip(gradients(model, drafter, actual), expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


# the start


def test_the_register_starts_as_large_as_a_token_and_is_the_seeds():
    model = toys.llama(torch.bfloat16, hidden_size=256)
    torch.manual_seed(0)
    one = registers(model).register
    torch.manual_seed(0)
    again = registers(model).register
    assert torch.equal(one, again)
    assert one.dtype == torch.float32
    assert float(one.detach().std()) == pytest.approx(0.2, rel=0.15)
    with torch.device("meta"):
        skeleton = transformers.LlamaForCausalLM(model.config)
    assert registers(skeleton).register.shape == (256,)


def test_the_register_has_its_own_rate_and_state():
    _, drafter, _ = made(lr_scale=3.0)
    (group,) = drafter.parameter_groups()
    assert group["lr_scale"] == 3.0
    assert group["params"] == [drafter.register]
    assert list(drafter.state()) == ["register"]


# what it is refused with


def config_of(kind, **changes):
    settings = {
        "vocab_size": 64,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 4,
    }
    return kind(**settings | changes)


def test_attention_without_a_mask_of_ones_own_is_refused():
    model = toys.llama()
    for name in ("flash_attention_2", "flex_attention"):
        model.config._attn_implementation = name
        with pytest.raises(
            DrafterError, match=f"attn_implementation={name}.*base.attn_implementation=sdpa"
        ):
            registers(model)


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (
            config_of(transformers.MistralConfig, sliding_window=4096),
            "MistralForCausalLM has sliding_attention",
        ),
        (config_of(transformers.Gemma3TextConfig), "Gemma3ForCausalLM has sliding_attention"),
        (
            config_of(transformers.Qwen3_5TextConfig, num_hidden_layers=4),
            "Qwen3_5ForCausalLM has linear_attention",
        ),
        (
            transformers.MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1),
            "MambaForCausalLM",
        ),
        (
            transformers.BloomConfig(vocab_size=64, hidden_size=16, n_layer=1, n_head=2),
            "BloomForCausalLM takes no position_ids",
        ),
    ],
    ids=lambda value: "" if isinstance(value, str) else value.model_type,
)
def test_a_model_that_cannot_keep_them_apart_is_refused(config, named):
    config._attn_implementation = "eager"
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    with pytest.raises(DrafterError, match=rf"{named}.*drafter=none"):
        registers(model)


@pytest.mark.parametrize(
    "config",
    [
        config_of(transformers.MistralConfig, sliding_window=None),
        config_of(transformers.Qwen2Config),
        config_of(transformers.GemmaConfig),
        transformers.GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=2),
        transformers.OPTConfig(
            vocab_size=64,
            hidden_size=16,
            ffn_dim=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            word_embed_proj_dim=16,
        ),
        transformers.GPTNeoXConfig(
            vocab_size=64,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=64,
        ),
    ],
    ids=lambda config: config.model_type,
)
def test_families_that_can_are_taken(config):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    registers(model)


def test_a_model_that_ignores_what_it_is_given_is_noticed():
    class Deaf(transformers.LlamaForCausalLM):
        def forward(self, *args, position_ids=None, **kwargs):
            return super().forward(*args, **kwargs)

    class Blind(transformers.LlamaForCausalLM):
        def forward(self, *args, position_ids=None, attention_mask=None, **kwargs):
            return super().forward(*args, position_ids=position_ids, **kwargs)

    class ReadsIds(transformers.LlamaForCausalLM):
        def forward(self, input_ids=None, position_ids=None, **kwargs):
            input_ids.sum()
            return super().forward(input_ids, position_ids=position_ids, **kwargs)

    for kind, says in [
        (Deaf, "does not keep registers apart"),
        (Blind, "does not keep"),
        (ReadsIds, "ReadsIds fails with them"),
    ]:
        for dtype in (torch.float32, torch.bfloat16):
            model = toys.llama(dtype)
            model.__class__ = kind
            with pytest.raises(DrafterError, match=says):
                registers(model)


LEAKS = {
    "a token sees a register": ((5, 6),),
    "a register sees one before it": ((8, 7),),
    "a register sees a token too many": ((8, 3),),
}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("leak", LEAKS)
def test_a_weak_leak_is_noticed_below_the_rounding_of_bf16(leak, attention):
    class Leaks(transformers.LlamaForCausalLM):
        score = -4.0

        def forward(self, *args, position_ids=None, attention_mask=None, **kwargs):
            if attention_mask is not None:
                dtype = kwargs["inputs_embeds"].dtype
                if attention_mask.dtype == torch.bool:
                    attention_mask = torch.zeros(attention_mask.shape, dtype=dtype).masked_fill(
                        ~attention_mask, torch.finfo(dtype).min
                    )
                for row, column in LEAKS[leak]:
                    attention_mask[..., row, column] = self.score
            masked = {"position_ids": position_ids, "attention_mask": attention_mask}
            return super().forward(*args, **masked, **kwargs)

    model = toys.llama(torch.bfloat16, attn_implementation=attention)
    model.__class__ = Leaks
    with pytest.raises(DrafterError, match="does not keep registers apart"):
        registers(model)
    Leaks.score = torch.finfo(torch.bfloat16).min  # the same changes of the mask, without a leak
    registers(model)


def test_positions_that_hardly_matter_are_noticed_too():
    class Deaf(transformers.LlamaForCausalLM):
        def forward(self, *args, position_ids=None, **kwargs):
            return super().forward(*args, **kwargs)

    model = toys.llama(torch.bfloat16)
    with torch.no_grad():  # nearly uniform attention: positions change logits by some percent
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight *= 0.02  # with 0.01, AVX2's rounding in bf16 is as large
    registers(model)
    model.__class__ = Deaf
    with pytest.raises(DrafterError, match="does not keep registers apart"):
        registers(model)


def test_tokens_that_no_training_has_seen_refuse_no_model():
    model = toys.llama(torch.bfloat16, tie_word_embeddings=False)
    with torch.no_grad():  # as special tokens at a vocabulary's start may be, at the extreme
        model.get_input_embeddings().weight[:8] = torch.nan
    registers(model)


@pytest.mark.parametrize("peft_type", ["PROMPT_TUNING", "PREFIX_TUNING"])
def test_virtual_tokens_are_refused(peft_type):
    model = toys.llama(torch.float32)
    drafter = registers(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = Peft(peft_type, 1, num_virtual_tokens=4).attach(
            model, Start(steps=1, data=toys.batches)
        )
    assert isinstance(wrapped, peft.PeftModel)
    with pytest.raises(DrafterError, match=f"{peft_type} puts virtual tokens.*lora"):
        CausalLoss(wrapped, 5, drafter, Target(wrapped))(batch_of(*APART))


def test_no_adapter_and_no_forward_pass_are_refused():
    model = toys.llama(torch.float32).requires_grad_(False)
    drafter = registers(model)
    with pytest.raises(DrafterError, match="adapter=none has nothing to learn"):
        drafter.inputs(batch_of(*APART), Target(model))
    nothing = torch.zeros(1, 8, 64)
    seen = drafters.TargetOutput(
        nothing, *[torch.zeros(1, 8, dtype=torch.int64)] * 3, nothing[:, :0]
    )
    for call in (
        lambda: drafter.loss(seen, Target(model), 5),
        lambda: drafter.start(Target(model)),
        lambda: drafter.propose(),
        lambda: drafter.states(seen, Target(model)),
    ):
        with pytest.raises(DrafterError, match="proposes no tokens"):
            call()


# in other people's adapters, and in runs


@pytest.mark.parametrize("peft_type", ["LORA", "IA3"])
def test_stock_peft_learns_from_them(peft_type):
    model = toys.llama(torch.float32)
    drafter = registers(model)
    fields = {"target_modules": ["k_proj", "down_proj"]} | (
        {"feedforward_modules": ["down_proj"]} if peft_type == "IA3" else {}
    )
    wrapped = Peft(peft_type, 1, **fields).attach(model, Start(steps=1, data=toys.batches))
    batch = batch_of(*APART)
    total, sums = CausalLoss(wrapped, 5, drafter, Target(wrapped))(batch)
    assert float(sums["loss"]) == pytest.approx(
        float(CausalLoss(wrapped, 5)(batch)[0].detach()), rel=1e-6
    )
    assert float(total.detach()) != pytest.approx(0.7 * float(sums["loss"]))
    assert any(grad.abs().max() > 0 for grad in gradients(wrapped, drafter, total))


def test_checkpointed_activations_give_the_same_gradient():
    model, drafter, loss = made()
    batch = batch_of(*PACKED)
    torch.manual_seed(0)
    expected = gradients(model, drafter, loss(batch)[0])
    model.activation_checkpointing_enable({"use_reentrant": False})
    torch.manual_seed(0)
    for mine, other in zip(gradients(model, drafter, loss(batch)[0]), expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-12)


def start(actual):
    """The register that the run began with."""
    torch.manual_seed(actual.config["seed"])
    return registers(actual.base.load(torch.float32)).register


def is_ordinary(run):
    """Assert that a run's adapter has learnt and is worth, without registers, what the run's
    evaluation says."""
    actual = trained_module.load_trained(str(run))
    held_out = load_data(actual.config, actual.base, actual.task, train=False).held_out
    plain = losses(CausalLoss(actual.model, 64), held_out, 8, torch.device("cpu"))
    rows = [row for row in journal.read(run / "metrics.jsonl") if row["kind"] == "evaluation"]
    assert {key: rows[-1][key] for key in plain} == pytest.approx(plain, rel=1e-5)
    assert not any("offset" in key for row in rows for key in row)
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert (actual.drafter.register - start(actual)).abs().min() > 1e-3
    return actual, held_out, plain


SETTINGS = (
    "drafter=registers",
    "drafter.d_max=3",
    "max_steps=6",
    "packing=true",
    "max_length=64",
    "callbacks.checkpoints.every=2",
    "callbacks.evaluation.every=6",
    "callbacks.evaluation.max_new_tokens=8",
)


def test_a_run_leaves_an_ordinary_adapter_resumed_or_not(train, chats, monkeypatch):
    settings = (f"task.path={chats}", *SETTINGS, "objective.gradient_checkpointing=true")
    alone = train(*settings, "name=alone")
    actual, held_out, plain = is_ordinary(alone)
    exported = peft.PeftModel.from_pretrained(
        actual.base.load(torch.float32), str(alone / "adapter")
    ).eval()
    assert losses(CausalLoss(exported, 64), held_out, 8, torch.device("cpu")) == pytest.approx(
        plain, rel=1e-5
    )

    with monkeypatch.context() as patch:
        cut_at(patch, 3)
        with pytest.raises(PowerCut):
            train(*settings, "name=cut", "resume=auto")
    cut = train(*settings, "name=cut", "resume=auto")
    (tensors, rows, _), (expected, wanted_rows, _) = outcome(cut), outcome(alone)
    assert rows == wanted_rows
    assert all(math.isfinite(row["offset1/loss"]) for row in rows if row["kind"] == "step")
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)
    ends = [
        checkpoints.load(checkpoints.newest(run / "checkpoints"))["drafter"]["register"]
        for run in (alone, cut)
    ]
    assert torch.equal(*ends)


def test_a_sparse_adapter_learns_with_them(train, chats):
    sparse = (
        "adapter=rosa",
        "adapter.density=0.05",
        "adapter.warmup_steps=2",
        "adapter.mask_steps=2",
        "adapter.count_mask_steps=true",
    )
    is_ordinary(train(f"task.path={chats}", *sparse, *SETTINGS))


def test_bases_in_8_and_4_bits_are_taken():
    for kind in ("nf4", "int8"):
        for dtype in (torch.float32, torch.bfloat16):
            registers(tiny(0, 2, 64, 64, "auto", "sdpa", kind, True, []).load(dtype))
