"""Sparse adapters in stock PEFT's files: what they answer there, merged, trained further and saved
again, and what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from adapters import mask, sparse
from adapters.delta import AdapterError, Start
from adapters.linear import float_weight
from adapters.spiel import SpIEL
from tests.toys import adapters as toys
from tests.toys.sparse import make
from trainer import export

# of PEFT's SHiRA
pytestmark = pytest.mark.filterwarnings(
    "ignore:Sparse invariant checks are implicitly disabled:UserWarning"
)

KINDS = ("rosa", "sparse", "spiel")
FP32 = {"dtype": "float32", "sparse_dtype": "float32"}
EXACT = 1e-11  # in float64; logits go up to 6


def adapter_of(kind: str, **changes: Any) -> Any:
    if kind == "spiel":
        settings: dict[str, Any] = {
            "variant": "AG",
            "density": 0.02,
            "density_pattern": {},
            "weight_decay": 0.0,
            "reselection_steps": 4,
            "accumulation_steps": 1,
            "initial_rate": 0.2,
            "policy": "linear",
            "clip_moments": True,
            "momentum": 0.0,
            "support_seed": 0,
            "target_modules": "all-linear",
            "exclude_modules": [],
            "gradient": "sampled",
            "sparse_dtype": "float32",
            "within": "all",
            "train_modules": [],
        }
        return SpIEL(**settings | changes)
    return make(**FP32 | {"schedule": "spa_only" if kind == "sparse" else "wl"} | changes)


def attached(
    kind: str, model: Any, new_modules: tuple[str, ...] = (), **changes: Any
) -> tuple[Any, Any]:
    """The model with all of S, A and B random."""
    torch.manual_seed(3)
    adapter = adapter_of(kind, **changes)
    model = adapter.attach(model, Start(steps=9, new_modules=new_modules)).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(("delta.B", "delta.values")):
                p.normal_(std=0.3)
            elif p.requires_grad and not name.endswith("delta.A"):
                p.normal_()
    return adapter, model


def written(plain: Any, model: Any) -> Any:
    """The plain model with W + S + s B A written into its weights, entry by entry in float64."""
    for name, adapted in sparse.layers(model):
        delta: Any = adapted.delta
        linear = plain.get_submodule(name)
        dense = linear.weight.detach().double().clone()
        if delta.has_support:
            for value, entry in zip(delta.values.tolist(), delta.indices.tolist(), strict=True):
                dense[entry // delta.i, entry % delta.i] += value
        if delta.A is not None:
            dense += delta.scale * delta.B.detach().double() @ delta.A.detach().double()
        linear.weight = nn.Parameter(dense.to(linear.weight.dtype))
    return plain


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("llama")
    toys.llama(torch.float32).save_pretrained(place)
    return place


def config_of(folder: Path) -> Any:
    return json.loads((folder / "adapter_config.json").read_text())


def equal(actual: Any, expected: Tensor, most: float) -> None:
    torch.testing.assert_close(toys.logits(actual), expected, rtol=0, atol=most)


def tensors(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "adapter_model.safetensors")


# Super-Tuning


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_stock_peft_answers_and_merges_alike(tmp_path, kind, dtype):
    adapter, model = attached(kind, toys.llama(dtype))
    expected, most = toys.logits(model), EXACT if dtype == torch.float64 else 1e-4
    assert (expected - toys.logits(toys.llama(dtype))).abs().mean() > 0.3
    equal(written(toys.llama(dtype), model), expected, 1e-4 if dtype == torch.float32 else 1e-11)
    adapter.save(model, tmp_path, "base", "CAUSAL_LM")

    actual, supports = tensors(tmp_path), sparse.supports(model)
    assert len(actual) == 14 * (4 if kind == "rosa" else 2)
    for name, adapted in sparse.layers(model):
        values = actual[f"base_model.model.{name}.supertuning_values"]
        indices = actual[f"base_model.model.{name}.supertuning_indices"]
        assert (values.dtype, indices.dtype) == (torch.float32, torch.int32)
        assert torch.equal(values, adapted.delta.values)
        assert torch.equal(indices, supports[name])
    config = config_of(tmp_path)
    assert config["peft_type"] == "SUPERTUNING"
    assert config["base_model_name_or_path"] == "base"
    assert config["target_modules"] == sorted(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )
    assert (config["r"], config["lora_alpha"]) == ((4, 6.0) if kind == "rosa" else (None, None))

    loaded: Any = peft.PeftModel.from_pretrained(toys.llama(dtype), tmp_path).eval()
    equal(loaded, expected, most)
    with loaded.disable_adapter():
        assert torch.equal(toys.logits(loaded), toys.logits(toys.llama(dtype)))
    merged: Any = loaded.merge_and_unload(safe_merge=True)
    assert not any("supertuning" in name for name in merged.state_dict())
    equal(merged, expected, most)
    equal(adapter.merge(model), toys.logits(merged), most)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_stock_peft_has_our_gradient_and_trains_nothing_else(tmp_path, low_cpu_mem_usage):
    adapter, model = attached("rosa", toys.llama())
    adapter.save(model, tmp_path, "base", "CAUSAL_LM")
    loaded: Any = peft.PeftModel.from_pretrained(
        toys.llama(), tmp_path, is_trainable=True, low_cpu_mem_usage=low_cpu_mem_usage
    )
    toys.loss(model).backward()
    toys.loss(loaded).backward()
    theirs = {name: p for name, p in loaded.named_parameters() if p.requires_grad}
    assert len(theirs) == 14 * 3
    for name, adapted in sparse.layers(model):
        for own, their in (
            ("values", "values.default"),
            ("A", "lora_A.default.weight"),
            ("B", "lora_B.default.weight"),
        ):
            gradient = getattr(adapted.delta, own).grad
            assert gradient.abs().max() > 0
            actual = theirs[f"base_model.model.{name}.supertuning_{their}"].grad
            torch.testing.assert_close(
                actual.float(), gradient.float(), rtol=1e-4, atol=1e-6 * float(gradient.abs().max())
            )


@pytest.mark.parametrize("kind", KINDS)
def test_stock_peft_trains_further_on_the_support_alone(tmp_path, folder, kind):
    adapter, model = attached(kind, toys.llama(torch.float32))
    adapter.save(model, tmp_path / "first", str(folder), "CAUSAL_LM")
    loaded: Any = peft.PeftModel.from_pretrained(
        toys.llama(torch.float32), tmp_path / "first", is_trainable=True
    ).train()
    trained = [p for p in loaded.parameters() if p.requires_grad]
    adam = torch.optim.AdamW(trained, lr=1e-2)
    start = toys.loss(loaded).item()
    for _ in range(3):
        adam.zero_grad()
        toys.loss(loaded).backward()
        adam.step()
    assert toys.loss(loaded).item() < start
    plain = dict(toys.llama(torch.float32).named_parameters())
    for name, layer in loaded.get_base_model().named_modules():
        if hasattr(layer, "base_layer"):
            assert torch.equal(layer.base_layer.weight, plain[f"{name}.weight"])
    loaded.save_pretrained(tmp_path / "second")
    before, after = tensors(tmp_path / "first"), tensors(tmp_path / "second")
    assert before.keys() == after.keys()
    for name, tensor in after.items():
        assert torch.equal(tensor, before[name]) == name.endswith("supertuning_indices")
    supports = sparse.supports(model)
    if kind != "rosa":
        merged: Any = loaded.merge_and_unload()
        for name, weight in plain.items():
            moved = (merged.get_parameter(name) != weight).flatten().nonzero().flatten()
            assert torch.equal(moved, supports.get(name.removesuffix(".weight"), moved[:0]).long())


@pytest.mark.parametrize("kind", KINDS)
def test_saved_again_by_stock_peft_the_tensors_are_the_same(tmp_path, folder, kind):
    adapter, model = attached(
        kind, toys.llama(torch.float32), **{"dropout": 0.25} if kind == "rosa" else {}
    )
    adapter.save(model, tmp_path / "ours", str(folder), "CAUSAL_LM")
    peft.PeftModel.from_pretrained(toys.llama(torch.float32), tmp_path / "ours").save_pretrained(
        tmp_path / "theirs"
    )
    ours, theirs = tensors(tmp_path / "ours"), tensors(tmp_path / "theirs")
    assert ours.keys() == theirs.keys()
    assert all(
        tensor.dtype == theirs[name].dtype and torch.equal(tensor, theirs[name])
        for name, tensor in ours.items()
    )
    first, second = config_of(tmp_path / "ours"), config_of(tmp_path / "theirs")
    for config in (first, second):
        config["target_modules"] = sorted(config["target_modules"])
    assert {key: value for key, value in first.items() if second.get(key) != value} == {}
    assert first["lora_dropout"] == (0.25 if kind == "rosa" else 0)


PATTERN = {"layers.1.mlp.up_proj": 0.29, "up_proj": 0.1, "q_proj": 0.005}


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pair", [False, True])
def test_other_densities_are_padded_and_exact(tmp_path, kind, pair):
    adapter, model = attached(kind, toys.llama(), density_pattern=PATTERN)
    # the place that padding has is in every support, as its worst case
    for _, adapted in sparse.layers(model):
        delta: Any = adapted.delta
        delta.take_out(adapted.base)
        delta.set_support(torch.cat([delta.indices.new_zeros(1), delta.indices[1:]]), adapted.base)
    expected = toys.logits(model)
    if pair:
        adapter.save_pair(model, tmp_path, "base", "CAUSAL_LM")
        folder, key, values_key = (
            tmp_path / ("shira" if kind == "rosa" else ""),
            "shira_indices",
            "shira_weight",
        )
    else:
        adapter.save(model, tmp_path, "base", "CAUSAL_LM")
        folder, key, values_key = tmp_path, "supertuning_indices", "supertuning_values"
    actual, supports, budget = tensors(folder), sparse.supports(model), config_of(folder).get("r")
    for name, adapted in sparse.layers(model):
        o, i = adapted.base.weight.shape
        k = budget * (o + i) if pair else mask.entries(o, i, 0.29, name)
        indices, values = (actual[f"base_model.model.{name}.{each}"] for each in (key, values_key))
        flat = indices[0] * i + indices[1] if pair else indices
        count = len(supports[name])
        assert len(flat) == len(values) == k
        assert torch.equal(flat[:count], supports[name])
        assert torch.equal(values[:count], adapted.delta.values)
        assert len(flat.unique()) == k  # so that each entry moves by itself where PEFT trains on
        assert not values[count:].any()
    if pair:
        least = max(
            math.ceil(len(s) / (d.o + d.i))
            for (_, d), s in zip(deltas(model), supports.values(), strict=True)
        )
        assert budget == least
    loaded: Any = adapter.load_stock(toys.llama(), tmp_path).eval()
    equal(loaded, expected, EXACT)
    if not (pair and kind == "rosa"):
        equal(loaded.merge_and_unload(safe_merge=True), expected, EXACT)


def deltas(model: Any) -> list[tuple[str, Any]]:
    return [(name, adapted.delta) for name, adapted in sparse.layers(model)]


@pytest.mark.parametrize("pair", [False, True])
def test_a_density_of_one_and_layers_left_out(tmp_path, pair):
    changes = {
        "density": 0.3 if pair else 1.0,
        "target_modules": ["q_proj", "layers.1.mlp.down_proj"],
    }
    adapter, model = attached(
        "sparse", toys.llama(), exclude_modules=["layers.0.self_attn.q_proj"], **changes
    )
    (adapter.save_pair if pair else adapter.save)(model, tmp_path, "base", "CAUSAL_LM")
    assert config_of(tmp_path)["target_modules"] == [
        "model.layers.1.mlp.down_proj",
        "model.layers.1.self_attn.q_proj",
    ]
    equal(peft.PeftModel.from_pretrained(toys.llama(), tmp_path), toys.logits(model), 1e-12)


@pytest.mark.long
@pytest.mark.parametrize("rank", [3, 7])
@pytest.mark.parametrize("pair", [False, True])
def test_rsloras_scale_is_kept(tmp_path, rank, pair):
    adapter, model = attached("rosa", toys.llama(), rank=rank, rslora=True, alpha=5.0)
    (adapter.save_pair if pair else adapter.save)(model, tmp_path, "base", "CAUSAL_LM")
    loaded = adapter.load_stock(toys.llama(), tmp_path).eval()
    equal(loaded, toys.logits(model), EXACT)
    config = config_of(tmp_path / "lora" if pair else tmp_path)
    if pair:
        assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (rank, 5.0, True)
    else:
        assert config["lora_alpha"] / rank == pytest.approx(5 / math.sqrt(rank), rel=1e-15)
    _, other = attached("rosa", toys.llama(), rank=rank, alpha=5.0)
    assert (toys.logits(other) - toys.logits(model)).abs().max() > 0.1


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_on_a_bf16_base_the_two_round_elsewhere(tmp_path, kind):
    """Ours rounds W + S once. PEFT rounds S to bf16, then W + S, and B A x is in fp32 there: as far
    from what is right."""
    adapter, model = attached(kind, toys.llama(torch.bfloat16))
    expected = toys.logits(model)
    adapter.save(model, tmp_path, "base", "CAUSAL_LM")
    loaded: Any = peft.PeftModel.from_pretrained(toys.llama(torch.bfloat16), tmp_path).eval()
    theirs = toys.logits(loaded)
    right = toys.logits(written(toys.exact(toys.llama(torch.bfloat16).double()), model))
    ours_off, off, merged_off = (
        (each.double() - right).abs().mean()
        for each in (expected, theirs, toys.logits(loaded.merge_and_unload(safe_merge=True)))
    )
    assert 0 < ours_off < 4 * 2**-8 * right.abs().max()
    assert off < 1.5 * ours_off
    assert merged_off < 1.5 * ours_off
    assert (right - toys.logits(toys.llama(torch.bfloat16))).abs().mean() > 10 * ours_off
    assert {tensor.dtype for tensor in tensors(tmp_path).values()} == {torch.float32, torch.int32}


@pytest.mark.parametrize("kind", KINDS)
def test_values_in_bf16_are_exported_as_they_are(tmp_path, kind):
    changes = {"dtype": "bfloat16"} if kind == "rosa" else {}
    adapter, model = attached(kind, toys.llama(torch.float32), sparse_dtype="bfloat16", **changes)
    adapter.save(model, tmp_path, "base", "CAUSAL_LM")
    equal(
        peft.PeftModel.from_pretrained(toys.llama(torch.float32), tmp_path),
        toys.logits(model),
        1e-4,
    )


# SHiRA and LoRA


@pytest.mark.long
@pytest.mark.parametrize(
    ("kind", "dtype"), [("rosa", torch.float64), ("rosa", torch.float32), ("sparse", torch.float64)]
)
def test_as_shira_and_lora_it_answers_alike(tmp_path, kind, dtype):
    adapter, model = attached(kind, toys.llama(dtype))
    expected, most = toys.logits(model), EXACT if dtype == torch.float64 else 1e-4
    adapter.save_pair(model, tmp_path, "base", "CAUSAL_LM")
    assert sorted(path.name for path in tmp_path.iterdir()) == (
        ["lora", "shira"]
        if kind == "rosa"
        else ["adapter_config.json", "adapter_model.safetensors"]
    )
    equal(adapter.load_stock(toys.llama(dtype), tmp_path).eval(), expected, most)
    alone = peft.PeftModel.from_pretrained(
        toys.llama(dtype), tmp_path / ("shira" if kind == "rosa" else "")
    ).eval()
    if kind == "rosa":  # each part alone is that part
        for _, delta in deltas(model):
            delta.B.data.zero_()
        equal(alone, toys.logits(model), most)
    else:
        equal(alone, expected, most)
        equal(alone.merge_and_unload(safe_merge=True), expected, most)  # type: ignore[operator]


def dequantised(base: Any) -> Any:
    """A plain fp32 model of a quantised one's weights."""
    plain = toys.llama(torch.float32)
    for name, module in base.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            plain.get_submodule(name).weight = nn.Parameter(float_weight(module).clone())
    return plain


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_from_an_nf4_base_it_is_shira_and_lora(tmp_path, folder, kind):
    adapter, model = attached(kind, toys.quantised(folder, "nf4"))
    expected = toys.logits(model)
    adapter.save(model, tmp_path, "base", "CAUSAL_LM")
    shira = tmp_path / ("shira" if kind == "rosa" else "")
    assert config_of(shira)["peft_type"] == "SHIRA"
    if kind == "rosa":
        assert config_of(tmp_path / "lora")["peft_type"] == "LORA"
    equal(adapter.load_stock(toys.quantised(folder, "nf4"), tmp_path).eval(), expected, 1e-4)
    equal(written(dequantised(toys.quantised(folder, "nf4")), model), expected, 1e-4)
    assert (toys.logits(toys.quantised(folder, "nf4")) - expected).abs().mean() > 0.3


@pytest.mark.long
@pytest.mark.parametrize("kind", ["sparse", "spiel"])
def test_from_an_int8_base_it_is_shira(tmp_path, folder, kind):
    adapter, model = attached(kind, toys.quantised(folder, "int8"))
    assert adapter.exportable
    adapter.save(model, tmp_path, "base", "CAUSAL_LM")
    assert config_of(tmp_path)["peft_type"] == "SHIRA"
    expected = toys.logits(model)
    equal(written(dequantised(toys.quantised(folder, "int8")), model), expected, 1e-4)
    equal(
        peft.PeftModel.from_pretrained(toys.quantised(folder, "int8"), tmp_path).eval(),
        expected,
        1e-4,
    )
    assert (toys.logits(toys.quantised(folder, "int8")) - expected).abs().mean() > 0.3


# what has no container


def nothing_in(folder: Path) -> bool:
    return not any(path.is_file() for path in folder.rglob("*"))


@pytest.mark.parametrize("way", ["save", "save_pair"])
def test_rosa_on_an_int8_base_has_none(tmp_path, folder, way):
    adapter, model = attached("rosa", toys.quantised(folder, "int8"))
    assert not adapter.exportable
    with pytest.raises(
        AdapterError,
        match="stock PEFT cannot load this adapter: export the merged model with to=merged",
    ):
        getattr(adapter, way)(model, tmp_path, "base", "CAUSAL_LM")
    assert nothing_in(tmp_path)


@pytest.mark.parametrize("way", ["save", "save_pair"])
@pytest.mark.parametrize("kind", KINDS)
def test_on_conv1d_there_is_none(tmp_path, kind, way):
    adapter, model = attached(kind, toys.gpt2())
    assert not adapter.exportable
    with pytest.raises(
        AdapterError,
        match="stock PEFT cannot load this adapter: export the merged model with to=merged",
    ):
        getattr(adapter, way)(model, tmp_path, "base", "CAUSAL_LM")
    assert nothing_in(tmp_path)


@pytest.mark.parametrize("base", [toys.llama, toys.gpt2])
def test_a_low_rank_part_alone_is_a_lora(tmp_path, base):
    adapter, model = attached("rosa", base(), schedule="lora_only", rslora=True)
    assert adapter.exportable
    adapter.save(model, tmp_path, "base", "CAUSAL_LM")
    assert config_of(tmp_path)["peft_type"] == "LORA"
    equal(peft.PeftModel.from_pretrained(base(), tmp_path).eval(), toys.logits(model), 1e-5)
    assert (toys.logits(base()) - toys.logits(model)).abs().max() > 0.3


def test_before_its_support_rosa_is_a_lora(tmp_path, folder):
    for base in (toys.llama, lambda: toys.quantised(folder, "nf4")):
        adapter, model = attached("rosa", base(), mask="gradient", warmup_steps=1)
        for _, delta in deltas(model):
            assert not delta.has_support
            delta.values.data.zero_()
        adapter.save(model, tmp_path, "base", "CAUSAL_LM")
        assert config_of(tmp_path)["peft_type"] == "LORA"
        assert len(tensors(tmp_path)) == 28
        equal(peft.PeftModel.from_pretrained(base(), tmp_path).eval(), toys.logits(model), 1e-4)


@pytest.mark.parametrize("way", ["save", "save_pair"])
def test_before_its_support_a_sparse_adapter_has_nothing_to_save(tmp_path, way):
    adapter, model = attached("sparse", toys.llama(), mask="gradient")
    with pytest.raises(
        AdapterError,
        match="has no support yet, so there is nothing to save: the run ended before its mask",
    ):
        getattr(adapter, way)(model, tmp_path, "base", "CAUSAL_LM")
    assert nothing_in(tmp_path)


@pytest.mark.parametrize("schedule", ["lora_only", "wl"])
def test_without_a_sparse_part_there_is_no_pair(tmp_path, schedule):
    adapter, model = attached("rosa", toys.llama(), schedule=schedule, mask="gradient")
    with pytest.raises(AdapterError, match="to=peft"):
        adapter.save_pair(model, tmp_path, "base", "CAUSAL_LM")
    assert nothing_in(tmp_path)


def test_too_dense_for_shira(tmp_path):
    # k_proj is 32 x 64: r (32 + 64) entries are at most its 2048 for r = 21, which is 2016 of them.
    adapter, model = attached(
        "rosa", toys.llama(), target_modules=["k_proj"], density=2016.5 / 2048
    )
    adapter.save_pair(model, tmp_path / "fits", "base", "CAUSAL_LM")
    assert config_of(tmp_path / "fits" / "shira")["r"] == 21
    equal(adapter.load_stock(toys.llama(), tmp_path / "fits").eval(), toys.logits(model), EXACT)
    adapter, model = attached(
        "rosa", toys.llama(), target_modules=["k_proj"], density=2017.5 / 2048
    )
    with pytest.raises(
        AdapterError,
        match=(
            r"r=22, which this support needs, is more than model.layers.0.self_attn.k_proj \(32 x"
            r" 64\) has. .*to=merged"
        ),
    ):
        adapter.save_pair(model, tmp_path / "dense", "base", "CAUSAL_LM")
    assert nothing_in(tmp_path / "dense")


# heads


def classifier() -> Any:
    labels = {"id2label": {0: "a", 1: "b", 2: "c"}, "label2id": {"a": 0, "b": 1, "c": 2}}
    config = (
        toys.llama().config.to_dict() | labels | {"pad_token_id": 0, "tie_word_embeddings": False}
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForSequenceClassification(LlamaConfig(**config)).eval()


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pair", [False, True])
def test_a_classification_head_goes_along(tmp_path, kind, pair):
    adapter, model = attached(kind, classifier(), new_modules=("score",))
    (adapter.save_pair if pair else adapter.save)(model, tmp_path, "base", "SEQ_CLS")
    ids = toys.IDS.clamp_min(1)
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        loaded = adapter.load_stock(classifier(), tmp_path).eval()
        torch.testing.assert_close(loaded(input_ids=ids).logits, expected, rtol=0, atol=1e-4)
        for _, adapted in sparse.layers(model):
            adapted.delta.take_out(adapted.base)
        assert (classifier()(input_ids=ids).logits - expected).abs().mean() > 0.3
    heads = [
        path
        for path in tmp_path.rglob("adapter_model.safetensors")
        if any("score" in name for name in load_file(path))
    ]
    assert heads == [
        tmp_path / ("lora" if pair and kind == "rosa" else "") / "adapter_model.safetensors"
    ]


# masks of them


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_an_exported_adapter_is_a_mask(tmp_path, kind):
    adapter, model = attached(kind, toys.llama())
    adapter.save(model, tmp_path, "base", "CAUSAL_LM")
    _, other = attached("rosa", toys.llama(), mask=str(tmp_path))
    _, elsewhere = attached("rosa", toys.llama(), mask_seed=5)
    actual, expected = sparse.supports(other), sparse.supports(model)
    assert len(actual) == 14
    assert all(torch.equal(indices, expected[name]) for name, indices in actual.items())
    assert not any(
        torch.equal(indices, expected[name]) for name, indices in sparse.supports(elsewhere).items()
    )
    with pytest.raises(
        AdapterError,
        match=r"has 81 entries for .* \(density 0.0197754\) where the settings ask for 40 \(",
    ):
        attached("rosa", toys.llama(), mask=str(tmp_path), density=0.01)
    with pytest.raises(AdapterError, match=r"0 layers are missing .*, 7 are not adapted here"):
        attached("rosa", toys.llama(num_hidden_layers=1), mask=str(tmp_path))


def test_a_mask_that_does_not_fit_is_found_before_weights_are_loaded(tmp_path):
    adapter_of("rosa").attach(toys.llama(), Start(folder=tmp_path))

    def weightless() -> Any:
        with torch.device("meta"):
            return LlamaForCausalLM(LlamaConfig(**toys.llama().config.to_dict()))

    adapter_of("rosa", mask=str(tmp_path)).attach(weightless(), Start())
    with pytest.raises(AdapterError, match="where the settings ask for"):
        adapter_of("rosa", mask=str(tmp_path), density=0.03).attach(weightless(), Start())


@pytest.mark.parametrize("kind", KINDS)
def test_processes_compare_their_supports_at_the_first_step(kind, monkeypatch):
    seen: list[dict[str, Tensor]] = []
    adapter, model = attached(kind, toys.llama())
    expected = {name: indices.clone() for name, indices in sparse.supports(model).items()}
    monkeypatch.setattr(
        mask,
        "refuse_divergence",
        lambda actual: seen.append({n: indices.clone() for n, indices in actual.items()}),
    )
    toys.train(adapter, model, range(2))
    assert len(seen) == (2 if kind == "spiel" else 1)  # SpIEL's support moves after its first step
    assert len(expected) == len(seen[0]) == 14
    assert all(torch.equal(indices, expected[name]) for name, indices in seen[0].items())
    assert all(
        torch.equal(indices, sparse.supports(model)[name]) for name, indices in seen[-1].items()
    )


# the program


RUN = ["max_steps=3", "callbacks.evaluation=null", "optimizer.lr=3e-2", "adapter.density=0.05"]


def test_the_program_exports_rosa_as_each(train, chats, tmp_path, capsys):
    run = train(
        *RUN,
        f"task.path={chats}",
        "adapter=rosa",
        "adapter.rank=2",
        "adapter.alpha=2",
        "adapter.warmup_steps=1",
        "adapter.mask_steps=1",
    )
    for to in ("peft", "shira", "merged"):
        assert export.main([f"run={run}", f"to={to}"]) == 0
        assert "loaded back and compared: logits differ by" in capsys.readouterr().out
    assert config_of(run / "peft")["peft_type"] == "SUPERTUNING"
    assert {path.name for path in (run / "shira").iterdir() if path.is_dir()} == {"lora", "shira"}
    assert (run / "merged" / "model.safetensors").exists()
    own, again = tensors(run / "adapter"), tensors(run / "peft")  # what the run wrote at its end
    assert own.keys() == again.keys()
    assert all(torch.equal(tensor, again[name]) for name, tensor in own.items())
    values = [tensor for name, tensor in own.items() if name.endswith("supertuning_values")]
    assert len(values) == 14
    assert all(each.any() for each in values)
    saved = load_file(run / "masks.safetensors")
    assert len(saved) == 14
    assert all(
        torch.equal(indices, own[f"base_model.model.{name}.supertuning_indices"])
        for name, indices in saved.items()
    )


def test_the_program_has_no_shira_of_a_lora(train, chats, tmp_path, capsys):
    run = train("max_steps=1", "callbacks.evaluation=null", f"task.path={chats}")
    assert export.main([f"run={run}", "to=shira", f"out={tmp_path / 'out'}"]) == 2
    assert (
        "to=shira is for adapters with a sparse part, and this run's is LoRAAdapter: to=peft"
        in capsys.readouterr().err
    )
    assert not (tmp_path / "out").exists()


def test_a_padded_export_is_a_mask_too(tmp_path):
    adapter, model = attached(
        "rosa", toys.llama(), density=0.02, density_pattern={"down_proj": 0.05}, mask="random"
    )
    adapter.save(model, tmp_path, "base", "CAUSAL_LM")
    expected = sparse.supports(model)
    _, again = attached(
        "rosa", toys.llama(), density=0.02, density_pattern={"down_proj": 0.05}, mask=str(tmp_path)
    )
    assert all(
        torch.equal(support, expected[name]) for name, support in sparse.supports(again).items()
    )
    with pytest.raises(AdapterError, match=r"Set adapter\.density to the mask's"):
        attached(
            "rosa",
            toys.llama(),
            density=0.01,
            density_pattern={"down_proj": 0.05},
            mask=str(tmp_path),
        )
