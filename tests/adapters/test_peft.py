"""PEFT's methods through the bridge: each of them, what the bridge adds to some, and what it
refuses."""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import io
import json
import re
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaForSequenceClassification

from adapters import peft_fields, peft_init
from adapters.delta import AdapterError, Start
from adapters.linear import float_weight
from adapters.peft import Peft
from adapters.peft_config import plain
from adapters.peft_fields import NAME
from tests.toys import adapters as toys

# What a method cannot do without on a model this small; PEFT's defaults are the rest.
FIELDS: dict[str, dict[str, Any]] = {
    "C3A": {"block_size": 16},
    "VBLORA": {"vector_length": 16, "num_vectors": 8, "topk": 2},
    "ROAD": {"group_size": 16},
    "OFT": {"oft_block_size": 16},
    "FOURIERFT": {"n_frequency": 10},
    "WAVEFT": {"n_frequency": 10},
    "TRAINABLE_TOKENS": {"token_indices": [1, 2]},
    "PROMPT_TUNING": {"num_virtual_tokens": 4},
    "PREFIX_TUNING": {"num_virtual_tokens": 4},
    "P_TUNING": {"num_virtual_tokens": 4},
    "ADAPTION_PROMPT": {"adapter_len": 4, "adapter_layers": 1},
}
# their defaults know what to adapt
OWN_TARGETS = {"ADAPTION_PROMPT", "IA3", "LILY", "LN_TUNING", "TRAINABLE_TOKENS"}
WHY_NOT_MERGED = {
    "BEFT": "Base layer has no bias",
    "LILY": "not supported for Lily",
    **dict.fromkeys(peft_fields.PROMPT_LEARNING, "works on activations"),
}
CHANGES_BASE: dict[str, dict[str, Any]] = {
    "pissa": {},
    "pissa_niter_4": {},
    "olora": {},
    "corda": {"corda_config": {"corda_method": "kpm"}},
    "lora_ga": {"lora_ga_config": {}},
}
# BOFT's, where its kernel cannot be built.
NO_KERNEL = pytest.mark.filterwarnings(
    "ignore:(Failed to load the CUDA extension|Setting boft_n_butterfly_factor to 1):UserWarning"
)
FP32 = 1e-4  # logits go up to 6; sums of a hundred products in another order, in each of two layers


def make(kind: str, **changes: Any) -> Peft:
    takes = peft_fields.config_class(kind).fields
    fields = dict(FIELDS.get(kind, {}))
    if kind not in OWN_TARGETS and "target_modules" in takes:
        fields["target_modules"] = ["q_proj", "v_proj"]
    if "r" in takes and kind not in ("ADALORA", "ROAD", "OFT"):
        fields["r"] = 4
    return Peft(kind, 4, **fields | changes)


def attach(adapter: Peft, model: Any, state: dict[str, Any] | None = None, steps: int = 6) -> Any:
    """Attach a new adapter, or that of a checkpoint's file."""
    if state is None:
        return adapter.attach(model, Start(steps=steps, data=toys.batches)).eval()
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    wrapped = adapter.attach(model, Start(steps=steps, saved=saved)).eval()
    adapter.load_state(wrapped, saved)
    return wrapped


# of PEFT's own AdaLoRA files
@pytest.mark.filterwarnings("ignore:The following rank_pattern keys.*lora_E:RuntimeWarning")
# BEFT, which adds one
@pytest.mark.filterwarnings("ignore:Detected that the base layer has no bias term:UserWarning")
# LN tuning, of any norm but LayerNorm
@pytest.mark.filterwarnings("ignore:Unsupported layer type.*RMSNorm:UserWarning")
@NO_KERNEL
@pytest.mark.parametrize("kind", peft_fields.usable())
def test_every_method_trains_reloads_is_saved_and_merges_or_says_why_not(kind, tmp_path):
    if kind == "ADAMSS" and importlib.util.find_spec("sklearn") is None:
        with pytest.raises(AdapterError, match="scikit-learn is required"):
            attach(make(kind), toys.llama(torch.float32))
        return
    adapter = make(kind)
    base = toys.llama(torch.float32)
    own = {id(p) for p in base.parameters()}
    model = attach(adapter, base)
    assert not any(p.requires_grad for p in model.parameters() if id(p) in own)
    started = toys.logits(model)
    toys.train(adapter, model, range(4), lr=3e-2)
    trained = toys.logits(model)
    assert (trained - started).abs().max() > 1e-3

    torch.manual_seed(9)  # nothing may depend on what attaching draws
    again = make(kind)
    reloaded = attach(again, toys.llama(torch.float32), adapter.state(model))
    assert torch.equal(toys.logits(reloaded), trained)

    again.save(reloaded, tmp_path, "base", "CAUSAL_LM")
    stock = peft.PeftModel.from_pretrained(toys.llama(torch.float32), tmp_path).eval()
    torch.testing.assert_close(toys.logits(stock), trained, rtol=0, atol=FP32)

    if kind in WHY_NOT_MERGED:
        with pytest.raises(AdapterError, match=WHY_NOT_MERGED[kind]):
            again.merge(reloaded)
    else:
        torch.testing.assert_close(toys.logits(again.merge(reloaded)), trained, rtol=0, atol=FP32)


@NO_KERNEL
@pytest.mark.parametrize("kind", sorted(peft_fields.ON_QUANTIZED | peft_fields.PROMPT_LEARNING))
def test_on_an_nf4_base(kind, tmp_path):
    toys.llama(torch.float32).save_pretrained(tmp_path)
    adapter = make(kind)
    model = attach(adapter, toys.quantised(tmp_path, "nf4"))
    packed = [p for p in model.parameters() if type(p).__name__ == "Params4bit"]
    before = [p.detach().clone() for p in packed]
    started = toys.logits(model)
    toys.train(adapter, model, range(4), lr=3e-2)
    assert (toys.logits(model) - started).abs().max() > 1e-3
    assert len(packed) == 14
    assert all(torch.equal(p, q) for p, q in zip(packed, before, strict=True))
    again = attach(make(kind), toys.quantised(tmp_path, "nf4"), adapter.state(model))
    assert torch.equal(toys.logits(again), toys.logits(model))
    with pytest.raises(
        AdapterError,
        match="works on activations" if kind in peft_fields.PROMPT_LEARNING else "is quantised",
    ):
        adapter.merge(model)


# AdaLoRA


def adalora(**changes: Any) -> Peft:
    return Peft(
        "ADALORA",
        1,
        **{
            "init_r": 6,
            "target_r": 3,
            "orth_reg_weight": 0.3,
            "target_modules": ["q_proj", "v_proj"],
        }
        | changes,
    )


def test_adaloras_penalty_is_what_pefts_own_forward_adds():
    adapter = adalora()
    model = attach(adapter, toys.llama())
    toys.train(adapter, model, range(2))
    penalty = adapter.penalty(model).detach()
    terms = []
    for name, p in model.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            q = p.detach() if "lora_A" in name else p.detach().T
            total = 0.0
            for i in range(len(q)):
                for j in range(len(q)):
                    total += (float(q[i] @ q[j]) - (i == j)) ** 2
            terms.append(total**0.5)
    assert float(penalty) == pytest.approx(0.3 * sum(terms) / len(terms), rel=1e-9)
    output = model(input_ids=toys.IDS, labels=toys.IDS, use_cache=False)
    assert float(output.loss.detach() - toys.loss(model).detach()) == pytest.approx(
        float(penalty), rel=1e-5
    )  # its loss is in fp32
    assert float(penalty) > 0.1


def test_adalora_is_told_of_each_step_that_had_a_gradient(monkeypatch):
    adapter = adalora()
    model = attach(adapter, toys.llama())
    reported = []
    monkeypatch.setattr(model.base_model, "update_and_allocate", reported.append)
    toys.train(adapter, model, range(3))
    for parameter in model.parameters():
        parameter.grad = None
    adapter.after_step(model, 4)  # one that was skipped
    assert reported == [1, 2, 3]


def test_adaloras_ranks_fall_to_their_target():
    adapter = adalora()
    model = attach(adapter, toys.llama())
    toys.train(adapter, model, range(6))
    singular = [p for name, p in model.named_parameters() if "lora_E" in name]
    assert sum(len(p) for p in singular) == 4 * 6
    assert sum(int((p != 0).sum()) for p in singular) == 4 * 3


# of PEFT's own AdaLoRA files
@pytest.mark.filterwarnings("ignore:The following rank_pattern keys.*lora_E:RuntimeWarning")
def test_a_layer_that_adalora_has_left_no_rank_is_saved_too(tmp_path):
    adapter = adalora(target_r=1)
    model = attach(adapter, toys.llama())
    toys.train(adapter, model, range(2))
    with torch.no_grad():  # which of them two steps have left at zero depends on the draw
        for name, parameter in model.named_parameters():
            if "lora_E" in name:
                parameter.fill_(0.5)
    pattern = {name: [i > 3 for i in range(6)] for name in model.peft_config[NAME].rank_pattern}
    pattern |= {next(iter(pattern)): [False] * 6}
    model.peft_config[NAME].rank_pattern = pattern
    model.base_model.rankallocator.mask_using_rank_pattern(model.base_model.model, pattern)
    adapter.save(model, tmp_path, "base", "CAUSAL_LM")
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert sorted(len(tensor) for name, tensor in saved.items() if "lora_A" in name) == [0, 2, 2, 2]
    stock = peft.PeftModel.from_pretrained(toys.llama(), tmp_path).eval()
    torch.testing.assert_close(toys.logits(stock), toys.logits(model), rtol=0, atol=1e-12)
    assert not torch.equal(toys.logits(stock), toys.logits(toys.llama()))


@pytest.mark.parametrize("stopped", [1, 3, 5, 6])
def test_adalora_goes_on_as_if_it_had_not_been_stopped(stopped):
    torch.manual_seed(8)
    through = adalora(tinit=1, tfinal=1, deltaT=2)
    model = attach(through, toys.llama(), steps=8)
    toys.train(through, model, range(8), toys.optimiser(through, model))

    torch.manual_seed(8)
    first = adalora(tinit=1, tfinal=1, deltaT=2)
    model_1 = attach(first, toys.llama(), steps=8)
    optimizer_1 = toys.optimiser(first, model_1)
    toys.train(first, model_1, range(stopped), optimizer_1)
    second = adalora(tinit=1, tfinal=1, deltaT=2)
    torch.manual_seed(9)
    model_2 = attach(second, toys.llama(), first.state(model_1), steps=8)
    optimizer_2 = toys.optimiser(second, model_2)
    optimizer_2.load_state_dict(copy.deepcopy(optimizer_1.state_dict()))
    toys.train(second, model_2, range(stopped, 8), optimizer_2)

    expected, actual = through.state(model), second.state(model_2)
    assert all(
        torch.equal(actual["tensors"][name], tensor) for name, tensor in expected["tensors"].items()
    )
    assert (
        actual["extra"]["config"]["rank_pattern"]
        == expected["extra"]["config"]["rank_pattern"]
        is not None
    )
    assert torch.equal(toys.logits(model_2), toys.logits(model))
    assert not torch.equal(toys.logits(model_1), toys.logits(model)) or stopped == 8


# initialisations


@pytest.mark.parametrize("base", [toys.llama, toys.gpt2])
@pytest.mark.parametrize("init", CHANGES_BASE)
def test_what_is_taken_out_of_the_base_comes_back(init, base, tmp_path):
    def built() -> Peft:
        return Peft(
            "LORA",
            4,
            r=4,
            lora_alpha=8,
            init_lora_weights=init,
            target_modules="all-linear",
            **CHANGES_BASE[init],
        )

    adapter, plain = built(), base(torch.float32)
    weights = {name: p.detach().clone() for name, p in plain.named_parameters()}
    alone = toys.logits(plain)
    if init == "olora" and base is toys.gpt2:
        with pytest.raises(AdapterError, match="olora does not work on this model's Conv1D layers"):
            attach(adapter, plain)
        return
    model = attach(adapter, plain)
    started = toys.logits(model)
    torch.testing.assert_close(started, alone, rtol=0, atol=FP32)
    changed = [
        name
        for name, p in base(torch.float32).named_parameters()
        if not torch.equal(p, _plainly(model, name))
    ]
    assert len(changed) == (14 if base is toys.llama else 8)

    toys.train(adapter, model)
    trained = toys.logits(model)
    assert (trained - started).abs().max() > 0.01
    with adapter.disabled(model):
        torch.testing.assert_close(toys.logits(model), alone, rtol=0, atol=FP32)
        for name, weight in weights.items():
            torch.testing.assert_close(_plainly(model, name), weight, rtol=0, atol=1e-6)
    assert torch.equal(toys.logits(model), trained)

    # Twice: what a state is made from, when it is itself from a state.
    once, twice = built(), built()
    first = attach(once, base(torch.float32), adapter.state(model))
    second = attach(twice, base(torch.float32), once.state(first))
    assert torch.equal(toys.logits(second), trained)

    twice.save(second, tmp_path, "base", "CAUSAL_LM")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["init_lora_weights"]) == (8, 16, True)
    stock = peft.PeftModel.from_pretrained(base(torch.float32), tmp_path).eval()
    torch.testing.assert_close(toys.logits(stock), trained, rtol=0, atol=FP32)
    torch.testing.assert_close(toys.logits(twice.merge(second)), trained, rtol=0, atol=FP32)


def _plainly(model: Any, name: str) -> torch.Tensor:
    inner = model.get_base_model()
    parts = dict(inner.named_parameters())
    module, _, kind = name.rpartition(".")
    return parts.get(name, parts.get(f"{module}.base_layer.{kind}"))


@pytest.mark.parametrize(
    "settings",
    [
        {"r": 4, "lora_alpha": 8, "use_rslora": True},
        {"r": 4, "lora_alpha": 8, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 5}},
    ],
)
def test_the_saved_difference_is_the_same_update_at_twice_the_rank(settings, tmp_path):
    adapter = Peft(
        "LORA",
        1,
        init_lora_weights="pissa",
        target_modules=["q_proj", "v_proj", "up_proj"],
        **settings,
    )
    model = attach(adapter, toys.llama(torch.float32))
    toys.train(adapter, model)
    adapter.save(model, tmp_path, "base", "CAUSAL_LM")
    saved = {
        name: tensor.double()
        for name, tensor in load_file(tmp_path / "adapter_model.safetensors").items()
    }
    stock: Any = peft.PeftModel.from_pretrained(toys.llama(torch.float32), tmp_path)
    for name, module in peft_init.lora_layers(model):
        a, b = module.lora_A[NAME].weight.double(), module.lora_B[NAME].weight.double()
        alpha = settings.get("alpha_pattern", {}).get(
            name.rpartition(".")[2], settings["lora_alpha"]
        )
        scale = alpha / len(a) ** (0.5 if settings.get("use_rslora") else 1)
        whole = float_weight(toys.llama(torch.float32).get_submodule(name)).double()
        expected = float_weight(module.get_base_layer()).double() + scale * b @ a - whole
        prefix = f"base_model.model.{name}"
        doubled_a, doubled_b = saved[f"{prefix}.lora_A.weight"], saved[f"{prefix}.lora_B.weight"]
        assert doubled_a.shape[0] == 2 * len(a)
        loaded = stock.get_submodule(prefix).scaling[NAME] * doubled_b @ doubled_a
        assert expected.abs().max() > 1e-3
        torch.testing.assert_close(loaded, expected, rtol=0, atol=1e-6)


def test_pissa_starts_from_the_weights_largest_components():
    adapter = Peft(
        "LORA", 1, r=4, lora_alpha=8, init_lora_weights="pissa", target_modules=["q_proj"]
    )
    model = attach(adapter, toys.llama(torch.float32))
    for name, module in peft_init.lora_layers(model):
        w = toys.llama().get_submodule(name).weight
        u, s, v = torch.linalg.svd(w)
        largest = sum(s[i] * torch.outer(u[:, i], v[i]) for i in range(4))
        taken = 2 * (module.lora_B[NAME].weight @ module.lora_A[NAME].weight).double()
        torch.testing.assert_close(taken, largest, rtol=0, atol=1e-5)
        torch.testing.assert_close(
            module.get_base_layer().weight.double(), w - largest, rtol=0, atol=1e-5
        )


def test_eva_spans_the_layers_inputs(tmp_path):
    adapter = Peft(
        "LORA",
        8,
        r=4,
        init_lora_weights="eva",
        eva_config={"rho": 2.0, "whiten": False},
        target_modules=["q_proj", "up_proj"],
    )
    model = attach(adapter, toys.llama(torch.float32))
    assert torch.equal(toys.logits(model), toys.logits(toys.llama(torch.float32)))
    inputs: list[torch.Tensor] = []
    plain = toys.llama(torch.float32)
    plain.model.layers[0].self_attn.q_proj.register_forward_pre_hook(
        lambda _, args: inputs.append(args[0])
    )
    for batch in list(toys.batches())[:8]:
        plain(**batch)
    rows = torch.cat([x.flatten(0, 1) for x in inputs]).double()
    a = (
        model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
        .lora_A[NAME]
        .weight.double()
    )
    # EVA stops once its directions hold still, not after all data: they hold nearly as much as the
    # best ones of all data.
    best = torch.linalg.svdvals(rows)[: len(a)].square().sum()
    held = (rows @ torch.linalg.qr(a.T)[0]).square().sum()
    random_ = (
        (rows @ torch.linalg.qr(torch.randn(64, len(a), dtype=torch.float64))[0]).square().sum()
    )
    assert held > 0.9 * best > 2 * random_
    ranks = {len(module.lora_A[NAME].weight) for _, module in peft_init.lora_layers(model)}
    assert len(ranks) > 1  # rho moves them
    again = Peft(
        "LORA",
        8,
        r=4,
        init_lora_weights="eva",
        eva_config={"rho": 2.0},
        target_modules=["q_proj", "up_proj"],
    )
    toys.train(adapter, model)
    once = attach(again, toys.llama(torch.float32), adapter.state(model))
    twice = attach(copy.copy(again), toys.llama(torch.float32), again.state(once))
    assert torch.equal(toys.logits(twice), toys.logits(model))
    again.save(twice, tmp_path, "base", "CAUSAL_LM")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    # loading it computes nothing
    assert (config["init_lora_weights"], config["eva_config"]) == (True, None)
    stock = peft.PeftModel.from_pretrained(toys.llama(torch.float32), tmp_path).eval()
    assert torch.equal(toys.logits(stock), toys.logits(model))


@pytest.mark.long
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_loftq_is_the_best_update_of_its_rank_for_what_rounding_lost(kind, tmp_path):
    toys.llama(torch.float32).save_pretrained(tmp_path)
    adapter = Peft(
        "LORA", 1, r=8, lora_alpha=16, init_lora_weights="loftq", target_modules="all-linear"
    )
    model = attach(adapter, toys.quantised(tmp_path, kind))
    for name, module in peft_init.lora_layers(model.requires_grad_(False)):
        lost = (
            toys.llama().get_submodule(name).weight.detach()
            - float_weight(module.get_base_layer()).double()
        )
        update = 2 * (module.lora_B[NAME].weight @ module.lora_A[NAME].weight).double()
        left = torch.linalg.svdvals(lost)[8:].square().sum()  # Eckart and Young 1936
        assert (lost - update).square().sum() == pytest.approx(float(left), rel=1e-3)
        assert left < 0.9 * lost.square().sum()


def test_loftq_says_that_it_needs_the_bases_file():
    adapter = Peft("LORA", 1, r=8, init_lora_weights="loftq", target_modules="all-linear")
    with pytest.raises(AdapterError, match="weights before rounding, which are not there"):
        attach(adapter, toys.llama(torch.float32))


@pytest.mark.parametrize("init", ["eva", "corda", "lora_ga"])
def test_an_initialisation_from_data_needs_data(init):
    adapter = Peft(
        "LORA", 1, r=4, init_lora_weights=init, target_modules=["q_proj"], **{f"{init}_config": {}}
    )
    with pytest.raises(
        AdapterError,
        match=f"init_lora_weights={init} is computed from training data, and there is none",
    ):
        adapter.attach(toys.llama(torch.float32), Start())


# PEFT warns that merging would be wrong. The bridge's merge is right.
@pytest.mark.filterwarnings("ignore:Model.*tie_word_embeddings=True.*:UserWarning")
def test_on_a_tied_output_layer_a_merge_leaves_the_embedding_alone():
    adapter = make("LORA", target_modules=["lm_head", "q_proj"])
    model = attach(adapter, toys.llama())
    toys.train(adapter, model)
    expected = toys.logits(model)
    merged: Any = adapter.merge(model)
    torch.testing.assert_close(toys.logits(merged), expected, rtol=0, atol=1e-12)
    assert torch.equal(merged.model.embed_tokens.weight, toys.llama().model.embed_tokens.weight)
    assert not torch.allclose(merged.lm_head.weight, merged.model.embed_tokens.weight, atol=1e-3)
    assert merged.config.tie_word_embeddings is False


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_start_taken_out_of_the_embeddings_weight_is_refused(init):
    model = toys.llama(torch.float32)
    before = model.get_input_embeddings().weight.clone()
    adapter = make("LORA", target_modules=["lm_head"], init_lora_weights=init)
    with pytest.raises(AdapterError, match="the weight of lm_head, which is the embedding's, too"):
        attach(adapter, model)
    assert torch.equal(model.get_input_embeddings().weight, before)
    with torch.device("meta"):
        skeleton = type(model)(model.config)
    with pytest.raises(AdapterError, match=r"leave lm_head out of adapter\.target_modules"):
        adapter.attach(skeleton, Start())


def test_a_new_head_is_trained_and_saved_with_the_adapter(tmp_path):
    def classifier() -> Any:
        torch.manual_seed(0)
        config = copy.deepcopy(toys.llama().config)
        config.num_labels, config.pad_token_id = 3, 0
        return LlamaForSequenceClassification(config).to(torch.bfloat16).eval()

    adapter = make("LORA", lora_alpha=8)
    start = Start(new_modules=("score",))
    model: Any = adapter.attach(classifier(), start).eval()
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    optimizer = toys.optimiser(adapter, model)
    output = model(input_ids=toys.IDS).logits
    output.float().square().sum().backward()
    optimizer.step()
    trained = model(input_ids=toys.IDS).logits.detach()
    assert not torch.equal(trained, output)
    state = adapter.state(model)
    assert any("score" in name for name in state["tensors"])
    again = make("LORA", lora_alpha=8)
    reloaded: Any = again.attach(classifier(), dataclasses.replace(start, saved=state)).eval()
    again.load_state(reloaded, state)
    assert torch.equal(reloaded(input_ids=toys.IDS).logits, trained)
    again.save(reloaded, tmp_path, "base", "SEQ_CLS")
    stock: Any = peft.PeftModel.from_pretrained(classifier(), tmp_path).eval()
    assert stock.peft_config[NAME].task_type == "SEQ_CLS"
    # Stock PEFT computes the head in bf16, with 8 bits.
    torch.testing.assert_close(
        stock(input_ids=toys.IDS).logits.float(),
        trained.float(),
        rtol=0,
        atol=4 * 2**-8 * float(trained.abs().max()),
    )


# fields


@pytest.mark.parametrize(
    ("adapter", "state", "message"),
    [
        ({"peft_type": "LORAA"}, {}, r"adapter.peft_type is 'LORAA'. Known: ADALORA, .*LOHA"),
        (
            {"peft_type": "XLORA"},
            {},
            "XLORA cannot be trained here: it mixes adapters.*Known: ADALORA",
        ),
        (
            {"peft_type": "LORA", "lora_alhpa": 8},
            {},
            r"adapter.lora_alhpa: PEFT's LoraConfig has no such field. Did you mean lora_alpha\?",
        ),
        (
            {"peft_type": "LORA", "zzzzz": 8},
            {},
            r"adapter.zzzzz: .* It has: .*alora_invocation_tokens, .*, use_rslora",
        ),
        (
            {"peft_type": "LORA", "task_type": "CAUSAL_LM"},
            {},
            "adapter.task_type is set by the run itself",
        ),
        (
            {"peft_type": "LORA", "r": "four"},
            {},
            r"adapter.r is 'four', but PEFT's LoraConfig takes int",
        ),
        (
            {"peft_type": "LORA", "r": True},
            {},
            r"adapter.r is True, but PEFT's LoraConfig takes int",
        ),
        (
            {"peft_type": "LORA", "target_modules": 5},
            {},
            r"adapter.target_modules is 5, but .* takes .*list\[str\]",
        ),
        (
            {"peft_type": "LORA", "bias": "some"},
            {},
            r"adapter.bias is 'some', but .* takes Literal\['none', 'all', 'lora_only'\]",
        ),
        (
            {"peft_type": "LORA", "init_lora_weights": "pisa"},
            {},
            "adapter.init_lora_weights is 'pisa', but .* 'pissa'",
        ),
        (
            {"peft_type": "LORA", "init_lora_weights": "pissa_niter_many"},
            {},
            "adapter.init_lora_weights is 'pissa_niter_many', but",
        ),
        (
            {"peft_type": "LORA", "eva_config": {"rhoo": 1.0}},
            {},
            r"adapter.eva_config.rhoo: PEFT's EvaConfig has no such field. Did you mean rho\?",
        ),
        (
            {"peft_type": "LORA", "eva_config": {"rho": "big"}},
            {},
            "adapter.eva_config.rho is 'big', but PEFT's EvaConfig takes float",
        ),
        (
            {"peft_type": "LOHA"},
            {"quantized": True},
            (
                r"LOHA cannot sit on a quantised base. These can: ADALORA, .*; or set"
                r" base.quantization=none"
            ),
        ),
        (
            {"peft_type": "LORA", "init_lora_weights": "pissa"},
            {"quantized": True},
            "init_lora_weights=pissa changes the base's weights",
        ),
        (
            {"peft_type": "LORA", "init_lora_weights": "lora_ga", "use_dora": True},
            {},
            "lora_ga with use_dora=true cannot be turned",
        ),
        ({"peft_type": "LORA", "init_lora_weights": "loftq"}, {}, "set base.quantization=nf4"),
        (
            {"peft_type": "P_TUNING"},
            {"packing": True},
            "P_TUNING puts virtual tokens before a row.*set packing=false",
        ),
        (
            {"peft_type": "PREFIX_TUNING"},
            {"checkpointing": True},
            "set objective.gradient_checkpointing=false",
        ),
        (
            {"peft_type": "ADAPTION_PROMPT"},
            {"classification": True},
            "ADAPTION_PROMPT is made for causal language models",
        ),
    ],
)
def test_each_fault_is_named(adapter, state, message):
    settings = {
        "quantized": False,
        "packing": False,
        "classification": False,
        "checkpointing": False,
    } | state
    (actual,) = peft_fields.problems(adapter, **settings)
    assert re.search(message, actual), actual


@pytest.mark.parametrize(
    "adapter",
    [
        {
            "_target_": "adapters.peft.Peft",
            "peft_type": "LoraConfig",
            "data_batches": 3,
            "r": 8,
            "lora_dropout": 0,
        },
        {
            "peft_type": "lora",
            "target_modules": ["q_proj"],
            "rank_pattern": {"q_proj": 4},
            "use_dora": True,
            "r": "???",
        },
        {"peft_type": "LORA", "init_lora_weights": "pissa_niter_16"},
        {
            "peft_type": "LORA",
            "init_lora_weights": "lora_ga",
            "lora_ga_config": {"direction": "ArB2r"},
        },
        {
            "peft_type": "LORA",
            "init_lora_weights": False,
            "modules_to_save": None,
            "layers_to_transform": [0, 1],
        },
        {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 4, "prompt_tuning_init": "RANDOM"},
        {"peft_type": "ADALORA", "init_r": 12, "tinit": 0, "beta1": 0.85},
    ],
)
def test_right_fields_have_no_fault(adapter):
    assert list(peft_fields.problems(adapter, False, False, False, False)) == []


def test_the_fields_read_from_source_are_pefts_own():
    actual = peft_fields.classes()
    for name, entry in actual.items():
        cls = getattr(peft, name, None) or getattr(peft.tuners.lora.config, name, None)
        if dataclasses.is_dataclass(cls):
            assert set(entry.fields) == {field.name for field in dataclasses.fields(cls)}, name
    assert {name for name, entry in actual.items() if entry.peft_type} == {
        cls.__name__ for cls in peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING.values()
    }
    for kind, cls in peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING.items():
        assert (
            peft_fields.config_class(kind.value)
            is peft_fields.config_class(cls.__name__)
            is actual[cls.__name__]
        )
    assert {kind.value for kind in peft.PeftType} == set(peft_fields.usable()) | set(
        peft_fields.UNUSABLE
    )


def test_pefts_own_defaults_fit_what_is_read_of_their_types():
    for cls in peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING.values():
        entry = peft_fields.classes()[cls.__name__]
        for field in dataclasses.fields(cls):
            default = (
                field.default_factory()
                if field.default_factory is not dataclasses.MISSING
                else field.default
            )
            # some say str and mean str | None
            if default not in (None, dataclasses.MISSING) and field.init:
                assert peft_fields._fits(plain(default), entry.fields[field.name]), (
                    cls.__name__,
                    field.name,
                    default,
                )


def test_the_bridge_refuses_what_peft_does_not_have():
    with pytest.raises(AdapterError, match=r"peft_type is 'LORRA', which PEFT .* does not have"):
        Peft("LORRA", 1)
    with pytest.raises(
        AdapterError, match=r"adapter.target_modules='\*proj' is no regular expression"
    ):
        attach(make("LORA", target_modules="*proj"), toys.llama(torch.float32))
    with pytest.raises(
        AdapterError, match=r"PEFT's LoraConfig refuses these settings.*layers_to_transform"
    ):
        attach(
            make("LORA", target_modules=".*q_proj", layers_to_transform=[0]),
            toys.llama(torch.float32),
        )
