"""density-DEFT: the loss against plain loops, which tokens count, which layers are found, and what
a run makes of it."""

from __future__ import annotations

import math

import peft
import pytest
import torch
import transformers
from torch import nn

from adapters.delta import AdaptedLinear
from tests.toys import adapters as toys
from tests.toys.finetuning import adapted, lora
from tests.toys.power_cuts import PowerCut, cut_at, outcome
from trainer.data.batches import Collate, Pick
from trainer.data.render import Tokens
from trainer.models.base import Base, BaseError
from trainer.penalties import deft
from trainer.penalties.deft import DensityDEFT, PenaltyError, density, medians, mlp_inputs
from trainer.storage import checkpoints, journal
from trainer.training.finetune import real_tokens

FORMS = ["rational", "tanh"]


def penalty(model, **changes) -> DensityDEFT:
    settings = {
        "weight": 0.7,
        "form": "rational",
        "eps": 0.04,
        "layer_weights": "uniform",
        "modules": "auto",
        "calibration_batches": 2,
    }
    return DensityDEFT(model, **settings | changes)


def smooth_count(a: float, form: str, eps: float) -> float:
    return a * a / (a * a + eps) if form == "rational" else math.tanh(abs(a) / math.sqrt(eps))


def naive(a, form, eps, real) -> float:
    """Loops over rows, tokens and neurons."""
    total, count = 0.0, 0
    for row, row_real in zip(a.tolist(), real.tolist(), strict=True):
        for token, token_real in zip(row, row_real, strict=True):
            for value in token if token_real else []:
                total += smooth_count(value, form, eps)
                count += 1
    return total / count


def batch_of(*rows: list[int], packs: list[list[list[int]]] | None = None, filler: bool = False):
    """A batch as training makes it; the last row only fills a rank's share where `filler`."""
    packs = packs or [[row] for row in rows]
    items = [
        (
            Pick(i, not (filler and i == len(packs) - 1), 1),
            [Tokens(ids, [True] * len(ids)) for ids in pack],
        )
        for i, pack in enumerate(packs)
    ]
    return Collate(0, any(len(pack) > 1 for pack in packs), False)(items)


def inputs_of(model, names, ids) -> dict[str, torch.Tensor]:
    """What the named layers are given for one row, alone and without padding; (T, F)."""
    seen = {}
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: seen.setdefault(
                name, args[0].detach().reshape(-1, args[0].shape[-1])
            )
        )
        for name in names
    ]
    with torch.no_grad():
        model(input_ids=torch.tensor([ids]), use_cache=False)
    for hook in hooks:
        hook.remove()
    return seen


def term_of(built: DensityDEFT, model, batch):
    built.open(real_tokens(batch))
    model(**{k: batch[k] for k in ("input_ids", "position_ids") if k in batch}, use_cache=False)
    return built.term()


ROWS = ([5, 9, 3, 7, 11], [8, 2, 6], [4, 4, 13, 21, 30, 17, 12])


# the loss


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("chunk", [1 << 22, 14])
def test_the_density_is_that_of_plain_loops_and_so_is_its_gradient(form, chunk, monkeypatch):
    monkeypatch.setattr(deft, "_CHUNK", chunk)
    draw = torch.Generator().manual_seed(0)
    a = torch.randn(3, 5, 7, generator=draw, dtype=torch.float64) * 0.3
    real = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [0, 0, 0, 0, 0]]).bool()
    assert float(density(a, real, form, 0.2)) == pytest.approx(
        naive(a, form, 0.04, real), rel=1e-12
    )
    a.requires_grad_()
    (grad,) = torch.autograd.grad(density(a, real, form, 0.2) * 3, a)
    q = a**2 / (a**2 + 0.04) if form == "rational" else torch.tanh(a.abs() / 0.2)
    (reference,) = torch.autograd.grad(q[real].mean() * 3, a)
    torch.testing.assert_close(grad, reference, rtol=1e-12, atol=1e-15)
    assert (grad[~real] == 0).all()
    assert grad[real].abs().min() > 0
    assert torch.autograd.gradcheck(lambda x: density(x, real, form, 0.2), a)


@pytest.mark.parametrize("form", FORMS)
def test_the_count_goes_from_none_to_one(form):
    a, real = torch.tensor([[[0.0, 1e9]]]), torch.ones(1, 1, dtype=torch.bool)
    assert float(density(a, real, form, 0.1)) == 0.5
    assert float(density(a, torch.zeros_like(real), form, 0.1)) == 0.0
    slopes = torch.autograd.functional.jacobian(lambda x: density(x, real, form, 0.1), a).flatten()
    assert slopes.tolist() == pytest.approx([0.0, 0.0], abs=1e-20)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_counted_in_fp32(dtype):
    a = (
        (torch.randn(2, 4, 64, generator=torch.Generator().manual_seed(0)) * 3e-4)
        .to(dtype)
        .requires_grad_()
    )
    real = torch.ones(2, 4, dtype=torch.bool)
    actual = density(a, real, "rational", 1e-7**0.5)
    (grad,) = torch.autograd.grad(actual, a)
    assert (actual.dtype, grad.dtype) == (torch.float32, dtype)
    assert actual.item() == pytest.approx(
        naive(a.detach().double(), "rational", 1e-7, real), rel=1e-5
    )
    assert torch.isfinite(grad).all()
    assert grad.abs().max() > 0


@pytest.mark.parametrize("form", FORMS)
def test_the_term_is_the_mean_over_layers_and_real_tokens(form):
    model = toys.llama()
    built = penalty(model, form=form)
    term, each, measured = term_of(built, model, batch_of(*ROWS, ROWS[0], filler=True))
    names = [name for name, _ in built.layers]
    reference = []
    for name in names:
        values = torch.cat([inputs_of(model, names, row)[name] for row in ROWS])
        reference.append(naive(values[None], form, 0.04, torch.ones(1, len(values))))
    assert each.tolist() == pytest.approx(reference, rel=1e-9)
    assert measured.tolist() == [sum(map(len, ROWS))] * 2
    assert term.item() == pytest.approx(0.7 * sum(reference) / 2, rel=1e-9)
    assert abs(reference[0] - reference[1]) > 1e-3
    built.close()


def test_packed_rows_count_as_alone():
    model = toys.llama()
    built = penalty(model)
    packed = batch_of(packs=[[ROWS[0], ROWS[1]], [ROWS[2]]])
    assert packed["lengths"].tolist() == [8, 7]
    a, b = term_of(built, model, packed), term_of(built, model, batch_of(*ROWS))
    assert a[0].item() == pytest.approx(b[0].item(), rel=1e-9)


def test_a_micro_batch_of_fillers_adds_nothing():
    model = toys.llama()
    model.requires_grad_(True)
    term, _, _ = term_of(penalty(model), model, batch_of(ROWS[0], filler=True))
    term.backward()
    assert term.item() == 0.0
    assert all(p.grad is None or (p.grad == 0).all() for p in model.parameters())


@pytest.mark.filterwarnings("ignore:Position ids are not supported.*")
def test_virtual_tokens_are_not_counted():
    base = toys.llama(torch.float32)
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = peft.get_peft_model(base, config).eval()
    built = penalty(model)
    names = [name for name, _ in mlp_inputs(model)]
    batch = batch_of(*ROWS)
    _, each, _ = term_of(built, model, batch)
    built.close()
    for name, actual in zip(names, each.tolist(), strict=True):
        values = torch.cat([inputs_of(model, names, row)[name][3:] for row in ROWS])
        assert actual == pytest.approx(
            naive(values[None], "rational", 0.04, torch.ones(1, len(values))), rel=1e-4
        )


def test_rows_that_the_model_merges_are_taken_apart():
    config = transformers.OPTConfig(
        vocab_size=64,
        hidden_size=16,
        ffn_dim=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
        word_embed_proj_dim=16,
        init_std=0.3,
    )
    torch.manual_seed(0)
    model = transformers.OPTForCausalLM(config).double().eval()
    built = penalty(model)
    shapes = []
    built.layers[0][1].register_forward_pre_hook(lambda _, args: shapes.append(args[0].ndim))
    _, each, _ = term_of(built, model, batch_of(*ROWS))
    built.close()
    assert shapes == [2]
    names = [name for name, _ in built.layers]
    for name, actual in zip(names, each.tolist(), strict=True):
        values = torch.cat([inputs_of(model, names, row)[name] for row in ROWS])
        assert actual == pytest.approx(
            naive(values[None], "rational", 0.04, torch.ones(1, len(values))), rel=1e-9
        )
        assert actual < (values != 0).double().mean() < 1  # a ReLU


# layer weights and calibration


def test_adaptive_weights_go_down_the_slope_of_half_the_sum_of_squares():
    model = toys.llama()
    built = penalty(model, layer_weights="adaptive", weight=1.0)
    assert built.shares() == [0.5, 0.5]
    first = [0.6, 0.2]
    built.update(first)
    built.update([0.4, math.nan])
    smoothed = [0.9 * 0.6 + 0.1 * 0.4, 0.2]
    assert built.shares() == pytest.approx([s / sum(smoothed) for s in smoothed])
    model.requires_grad_(True)
    _, each, _ = term_of(built, model, batch_of(*ROWS))
    built.smoothed = each.tolist()
    weights = [p for name, p in model.named_parameters() if "mlp" in name]
    actual = torch.autograd.grad(
        term_of(built, model, batch_of(*ROWS))[0], weights, allow_unused=True
    )
    uniform = penalty(model, weight=2.0)
    reference = [torch.zeros_like(p) for p in weights]
    for index, value in enumerate(each.tolist()):
        uniform.layers = [built.layers[index]]
        uniform.tau, uniform.smoothed = [0.2], [0.0]
        parts = torch.autograd.grad(
            term_of(uniform, model, batch_of(*ROWS))[0] / 2, weights, allow_unused=True
        )
        for total, part in zip(reference, parts, strict=True):
            total += value * part if part is not None else 0.0
    for got, expected in zip(actual, reference, strict=True):
        got = torch.zeros_like(expected) if got is None else got
        torch.testing.assert_close(got, expected / float(each.sum()), rtol=1e-9, atol=1e-14)
    built.close()
    uniform.close()


def test_tau_is_the_median_of_what_is_not_zero():
    model = toys.llama()
    built = penalty(model, eps="auto", calibration_batches=2)
    batches = [batch_of(*ROWS[:2]), batch_of(ROWS[2]), batch_of([1, 2])]
    built.calibrate(
        lambda b: model(input_ids=b["input_ids"], use_cache=False),
        ((b, real_tokens(b)) for b in batches),
    )
    names = [name for name, _ in built.layers]
    for name, tau in zip(names, built.tau, strict=True):
        values = sorted(
            float(v) for row in ROWS for v in inputs_of(model, names, row)[name].abs().flatten()
        )
        assert tau == pytest.approx(values[(len(values) - 1) // 2], rel=1e-6)
    before = list(built.tau)
    built.calibrate(lambda b: None, iter(()))
    assert built.tau == before


def test_a_relu_that_is_mostly_off_still_has_a_scale():
    layer = nn.Linear(4, 4)
    values = torch.tensor([[[0.0, 0.0, 0.0, 2.0], [0.0, 0.0, 3.0, 0.0], [5.0, 0.0, 0.0, 0.0]]])
    real = torch.tensor([[True, True, False]])
    assert medians([("down_proj", layer)], layer, [(values, (real,))]) == [("down_proj", 2.0)]
    with pytest.raises(PenaltyError, match="down_proj are all 0 or NaN"):
        medians([("down_proj", layer)], layer, [(torch.zeros(1, 3, 4), (real,))])


# which layers


SMALL = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "vocab_size": 32,
    "pad_token_id": 0,
}
DIMS = {
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
}
MODELS = {
    "Llama": (dict(SMALL), ["model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"]),
    "Gemma2": (
        SMALL | {"head_dim": 8, "num_key_value_heads": 2},
        ["model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"],
    ),
    "Qwen3": (
        SMALL | {"head_dim": 8, "num_key_value_heads": 2},
        ["model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"],
    ),
    "Phi": (dict(SMALL), ["model.layers.0.mlp.fc2", "model.layers.1.mlp.fc2"]),
    "GPTNeoX": (
        dict(SMALL),
        ["gpt_neox.layers.0.mlp.dense_4h_to_h", "gpt_neox.layers.1.mlp.dense_4h_to_h"],
    ),
    "GPT2": (
        {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 32},
        ["transformer.h.0.mlp.c_proj", "transformer.h.1.mlp.c_proj"],
    ),
    "OPT": (
        SMALL | {"ffn_dim": 24, "word_embed_proj_dim": 16},
        ["model.decoder.layers.0.fc2", "model.decoder.layers.1.fc2"],
    ),
    "Bert": (
        dict(SMALL),
        ["bert.encoder.layer.0.output.dense", "bert.encoder.layer.1.output.dense"],
    ),
    "Roberta": (
        dict(SMALL),
        ["roberta.encoder.layer.0.output.dense", "roberta.encoder.layer.1.output.dense"],
    ),
    "ModernBert": (
        SMALL | {"num_attention_heads": 2},
        ["model.layers.0.mlp.Wo", "model.layers.1.mlp.Wo"],
    ),
    "DistilBert": (
        {"dim": 16, "hidden_dim": 24, "n_layers": 1, "n_heads": 2, "vocab_size": 32},
        ["distilbert.transformer.layer.0.ffn.lin2"],
    ),
    "T5": (
        {
            "d_model": 16,
            "d_ff": 24,
            "d_kv": 8,
            "num_layers": 1,
            "num_heads": 2,
            "vocab_size": 32,
            "feed_forward_proj": "gated-gelu",
        },
        [
            "transformer.encoder.block.0.layer.1.DenseReluDense.wo",
            "transformer.decoder.block.0.layer.2.DenseReluDense.wo",
        ],
    ),
    "Bart": (
        DIMS | {"vocab_size": 32},
        ["model.encoder.layers.0.fc2", "model.decoder.layers.0.fc2"],
    ),
}


def tiny_of(kind: str, settings: dict) -> nn.Module:
    config = getattr(transformers, f"{kind}Config")(**settings)
    ending = (
        "ForSequenceClassification"
        if kind in ("Bert", "Roberta", "ModernBert", "DistilBert", "T5", "Bart")
        else "ForCausalLM"
    )
    ending = "LMHeadModel" if kind == "GPT2" else ending
    with torch.device("meta"):
        return getattr(transformers, f"{kind}{ending}")(config)


@pytest.mark.parametrize("kind", MODELS)
def test_down_projections_are_found(kind):
    settings, names = MODELS[kind]
    assert [name for name, _ in mlp_inputs(tiny_of(kind, settings))] == names


def test_what_an_adapter_wraps_is_found_by_its_wrapper():
    _, ours = adapted(lora(target_modules=["down_proj"]))
    actual = mlp_inputs(ours)
    assert [name for name, _ in actual] == MODELS["Llama"][1]
    assert all(isinstance(module, AdaptedLinear) for _, module in actual)
    for model, names in (
        (toys.llama(), [f"base_model.model.{name}" for name in MODELS["Llama"][1]]),
        (toys.gpt2(), [f"base_model.model.{name}" for name in MODELS["GPT2"][1]]),
    ):
        wrapped = peft.get_peft_model(
            model,
            peft.LoraConfig(
                target_modules=["down_proj", "c_proj"], fan_in_fan_out="2" in str(type(model))
            ),
        )
        actual = mlp_inputs(wrapped)
        assert [name for name, _ in actual] == names
        assert all(hasattr(module, "base_layer") for _, module in actual)


def test_names_may_be_given():
    assert [name for name, _ in mlp_inputs(toys.llama(), ["0.mlp.down_proj"])] == [
        "model.layers.0.mlp.down_proj"
    ]
    with pytest.raises(
        PenaltyError,
        match=r"penalty.modules has 'fc9', which matches no linear layer.*mlp.down_proj",
    ):
        mlp_inputs(toys.llama(), ["down_proj", "fc9"])


def test_a_model_without_mlps_is_refused():
    config = transformers.MambaConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=1, state_size=4
    )
    with torch.device("meta"):
        model = transformers.MambaForCausalLM(config)
    with pytest.raises(
        PenaltyError, match=r"finds no MLP in this model.*penalty.modules=.*in_proj"
    ):
        mlp_inputs(model)


def test_experts_are_refused():
    settings = SMALL | {"num_local_experts": 2, "num_experts_per_tok": 1, "num_key_value_heads": 2}
    with torch.device("meta"):
        model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**settings))
    with pytest.raises(PenaltyError, match="mixture of experts"):
        mlp_inputs(model)


def test_layers_that_see_other_tokens_are_refused():
    built = penalty(toys.llama())
    built.open((torch.ones(3, 9, dtype=torch.bool),))
    with pytest.raises(
        PenaltyError, match=r"activations of shape \(5, 128\) for a batch of \(3, 9\)"
    ):
        built.layers[0][1](torch.zeros(5, 128, dtype=torch.float64))
    with pytest.raises(PenaltyError, match="none of the down projections was called"):
        built.term()
    built.close()


def test_a_state_of_other_layers_is_refused():
    built = penalty(toys.llama())
    saved = built.state()
    with pytest.raises(PenaltyError, match="on other layers"):
        penalty(toys.llama(), modules=["0.mlp.down_proj"]).load_state(saved)


# training


def gradients(checkpointing: bool, dtype=torch.float64):
    own = lora(
        target_modules="all-linear", dtype="float64" if dtype == torch.float64 else "float32"
    )
    _, model = adapted(own, toys.llama(dtype))
    model.train()
    calls = []
    built = penalty(model, form="tanh")
    built.layers[0][1].register_forward_pre_hook(lambda *_: calls.append(1))
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    term, each, _ = term_of(built, model, batch_of(*ROWS))
    term.backward()
    built.close()
    actual = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return term.item(), each, actual, len(calls), model


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_checkpointed_activations_give_the_same_gradient(dtype):
    plain, recomputed = gradients(False, dtype), gradients(True, dtype)
    assert recomputed[3] == plain[3] + 1
    assert recomputed[0] == plain[0]
    assert torch.equal(recomputed[1], plain[1])
    for name, grad in plain[2].items():
        if ".layers.1.mlp.down_proj" in name:  # nothing is measured after it
            assert grad is None
            continue
        assert grad.abs().max() > 0, name
        torch.testing.assert_close(recomputed[2][name], grad, rtol=1e-6, atol=1e-12)
    assert len(plain[4].model.layers[0].mlp.down_proj._forward_pre_hooks) == 1  # the test's own


SETTINGS = (
    "penalty=deft",
    "penalty.layer_weights=adaptive",
    "penalty.form=tanh",
    "packing=true",
    "max_length=64",
    "accumulate=2",
    "max_steps=6",
    "max_epochs=null",
    "batch_size=2",
    "callbacks.evaluation=null",
    "callbacks.checkpoints.every=3",
)


def test_resumed_ends_as_uninterrupted(train, chats, monkeypatch):
    settings = (f"task.path={chats}", *SETTINGS)
    reference = outcome(train(*settings, "name=alone"))
    with monkeypatch.context() as patch:
        cut_at(patch, 5)
        with pytest.raises(PowerCut):
            train(*settings, "name=cut", "resume=auto")
    # What the resumed run measures comes from the checkpoint: nothing is calibrated again.
    with monkeypatch.context() as patch:
        patch.setattr(deft, "medians", lambda *_: pytest.fail("calibrated again"))
        run = train(*settings, "name=cut", "resume=auto")
    actual = outcome(run)
    assert actual[1] == reference[1]
    assert all(torch.equal(actual[0][name], reference[0][name]) for name in reference[0])
    (taus,) = (row for row in journal.read(run / "metrics.jsonl") if row["kind"] == "penalty")
    saved = checkpoints.load(checkpoints.newest(run / "checkpoints"))["penalty"]
    assert [taus[f"tau/{name}"] for name in saved["layers"]] == saved["tau"]
    assert all(0 < smoothed < 1 for smoothed in saved["smoothed"])


def test_the_penalty_lowers_density_and_leaves_evaluation_alone(train, chats):
    rows = {}
    for name, extra in (("with", ["adapter=deft"]), ("without", ["adapter=deft", "penalty=none"])):
        settings = [
            "max_steps=12",
            "objective.gradient_checkpointing=true",
            "callbacks.checkpoints=null",
        ]
        run = train(f"task.path={chats}", *settings, f"name={name}", *extra)
        rows[name] = journal.read(run / "metrics.jsonl")
    first = [next(row for row in rows[name] if row["kind"] == "evaluation") for name in rows]
    assert first[0]["loss"] == first[1]["loss"]
    steps = {
        name: [row for row in actual if row["kind"] == "step"] for name, actual in rows.items()
    }
    assert "density" not in steps["without"][0]
    assert steps["with"][0]["loss"] == steps["without"][0]["loss"]  # the task's alone
    assert 0 < steps["with"][-1]["density"] < 0.8 * steps["with"][0]["density"] < 0.8


def test_accumulation_averages_micro_batches_by_their_tokens(train, chats):
    def first(*extra: str) -> dict:
        run = train(
            f"task.path={chats}",
            "penalty=deft",
            "penalty.eps=1e-6",
            "max_steps=1",
            "callbacks.evaluation=null",
            *extra,
        )
        return next(row for row in journal.read(run / "metrics.jsonl") if row["kind"] == "step")

    whole, parts = (
        first("batch_size=8", "name=whole"),
        first("batch_size=2", "accumulate=4", "name=parts"),
    )
    assert parts["density"] == pytest.approx(whole["density"], rel=1e-5)
    assert parts["loss"] == pytest.approx(whole["loss"], rel=1e-5)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["penalty.modules=[fc9]"], "penalty.modules has 'fc9', which matches no linear layer"),
        (["adapter=none"], "adapter=none trains nothing, so a penalty has no effect"),
        (
            ["task.streaming=true", "task.eval_path=ROWS"],
            "penalty.eps=auto is measured on training data beforehand",
        ),
    ],
)
def test_what_cannot_be_penalised_is_said_before_weights_are_loaded(
    train, chats, monkeypatch, extra, message
):
    monkeypatch.setattr(Base, "load", lambda *_: pytest.fail("weights were loaded"))
    with pytest.raises(BaseError, match=message):
        train(
            f"task.path={chats}",
            "penalty=deft",
            "max_steps=2",
            *(part.replace("ROWS", str(chats)) for part in extra),
        )
