"""Combined updates against loops over single entries and against dense sums in float64."""

from __future__ import annotations

import math
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig
from transformers import LlamaConfig, LlamaForCausalLM

from adapters import combine, io
from adapters.combine import Combination, LowRank, Summed
from adapters.errors import AdapterError

PROJECTIONS = ["q_proj", "v_proj", "down_proj"]


def base() -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=2,
        )
    ).eval()  # fmt: skip


def saved(folder: Any, seed: int, **fields: Any) -> Any:
    """Save a LoRA of random factors; return its folder and its dense updates by layer."""
    settings = {"r": 3, "lora_alpha": 6, "target_modules": PROJECTIONS} | fields
    model: Any = peft.get_peft_model(base(), LoraConfig(**settings, task_type="CAUSAL_LM"))
    torch.manual_seed(seed)
    updates = {}
    for name, module in model.get_base_model().named_modules():
        if "default" in getattr(module, "lora_A", ()):
            A, B = module.lora_A["default"].weight, module.lora_B["default"].weight
            torch.nn.init.normal_(A)
            torch.nn.init.normal_(B)
            r = len(A)
            alpha = settings["lora_alpha"]
            scale = alpha / (math.sqrt(r) if settings.get("use_rslora") else r)
            updates[name] = scale * (B.double() @ A.double()).detach()
    model.save_pretrained(folder)
    return folder, updates


def stock(low: LowRank) -> dict[str, torch.Tensor]:
    """The dense updates of combined tensors, at scale 1."""
    return {
        name: low.tensors[f"{io.PREFIX}{name}.lora_B.weight"].double()
        @ low.tensors[f"{io.PREFIX}{name}.lora_A.weight"].double()
        for name in low.names
    }


@pytest.mark.parametrize("weights", [(0.5, 0.5), (1.0, -0.3)])
def test_cat_is_the_weighted_sum_whatever_ranks_layers_and_scales(tmp_path, weights):
    one, first = saved(tmp_path / "a", 1, use_rslora=True)
    other, second = saved(
        tmp_path / "b", 2, r=5, target_modules=["q_proj", "o_proj"], layers_to_transform=[1]
    )
    low = combine.low_rank(base(), {0: one, 1: other}, Combination("cat", weights))
    assert low.rank == 8
    expected = {}
    for weight, updates in zip(weights, (first, second), strict=True):
        for name, update in updates.items():
            expected[name] = expected.get(name, 0) + weight * update
    assert {*low.names} == {*expected} == {*low.sums}
    for name, update in stock(low).items():
        torch.testing.assert_close(update, expected[name], rtol=0, atol=2e-5)
        torch.testing.assert_close(low.sums[name].double(), expected[name], rtol=0, atol=2e-5)
    assert combine.lost(low) == 0.0


def test_svd_is_the_nearest_of_its_rank_and_says_what_it_lost(tmp_path):
    folders, dense = {}, []
    for position in range(2):
        folders[position], updates = saved(tmp_path / str(position), position, use_rslora=True)
        dense.append(updates)
    low = combine.low_rank(base(), folders, Combination("svd", (0.5, 0.5), rank=4))
    missed = total = 0.0
    for name, update in stock(low).items():
        u, s, v = torch.linalg.svd(0.5 * dense[0][name] + 0.5 * dense[1][name])
        cut = u[:, :4] * s[:4] @ v[:4]
        torch.testing.assert_close(update, cut, rtol=0, atol=1e-4)
        torch.testing.assert_close(low.meant[name].double(), cut, rtol=0, atol=1e-4)
        missed, total = missed + float(s[4:].square().sum()), total + float(s.square().sum())
    assert combine.lost(low) == pytest.approx(math.sqrt(missed / total), rel=1e-4)


def test_linear_has_products_across_the_runs(tmp_path):
    """As PEFT's documentation warns: the sum of factors is not the sum of updates."""
    folders = {position: saved(tmp_path / str(position), position)[0] for position in range(2)}
    low = combine.low_rank(base(), folders, Combination("linear", (0.5, 0.5)))
    assert low.rank == 3
    assert combine.lost(low) > 0.5


@pytest.mark.long
def test_draws_are_those_of_the_seed(tmp_path):
    folders = {position: saved(tmp_path / str(position), position)[0] for position in range(2)}

    def drawn(seed: int) -> torch.Tensor:
        model, how = base(), Combination("dare_linear", (0.5, 0.5), density=0.5, seed=seed)
        torch.manual_seed(99)
        low = combine.low_rank(model, folders, how)
        assert torch.initial_seed() == 99  # the program's own draws stay as they are
        return torch.cat([tensor.flatten() for tensor in low.tensors.values()])

    assert torch.equal(drawn(3), drawn(3))
    assert not torch.equal(drawn(3), drawn(4))


def test_experts_are_refused(tmp_path):
    folder, _ = saved(tmp_path / "a", 1)
    config = (folder / "adapter_config.json").read_text()
    whole = '"target_parameters": ["x.experts.up"]'
    (folder / "adapter_config.json").write_text(config.replace('"target_parameters": null', whole))
    with pytest.raises((AdapterError, ValueError), match="experts"):
        combine.low_rank(base(), {0: folder, 1: folder}, Combination("cat", (1.0, 1.0)))


def part(seed: int, k: int, n: int = 60) -> Any:
    draw = torch.Generator().manual_seed(seed)
    indices = torch.randperm(n, generator=draw)[:k].sort().values.int()
    return indices, torch.randn(k, generator=draw)


def naive(parts: list[Any], weights: tuple[float, ...], method: str, density: float) -> dict:
    """By dicts of single entries: trim, elect, average."""
    trimmed = []
    for indices, values in parts:
        entries = dict(zip(indices.tolist(), values.tolist(), strict=True))
        if method in ("ties", "magnitude_prune"):
            largest = sorted(entries, key=lambda key: -abs(entries[key]))
            entries = {key: entries[key] for key in largest[: int(density * len(entries))]}
        trimmed.append(entries)
    result = {}
    for key in sorted({key for entries in trimmed for key in entries}):
        there = [(w, e[key]) for w, e in zip(weights, trimmed, strict=True) if key in e]
        if method == "ties":
            sign = 1 if sum(value for _, value in there) >= 0 else -1
            agreeing = [w * value for w, value in there if value * sign > 0]
            result[key] = sum(agreeing) / len(agreeing)
        else:
            result[key] = sum(w * value for w, value in there)
    return result


@pytest.mark.parametrize("method", ["cat", "linear", "ties", "magnitude_prune", "ties_svd"])
@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (0.5, -0.2, 2.0)])
def test_sparse_parts_against_a_loop(method, weights):
    parts = [part(1, 30), part(2, 20), part(3, 25)]
    density = 0.6 if "ties" in method or "prune" in method else None
    indices, values = combine.sparse(
        dict(enumerate(parts)), Combination(method, weights, density=density)
    )
    expected = naive(parts, weights, method.removesuffix("_svd"), density or 1.0)
    assert indices.tolist() == list(expected)
    assert indices.dtype == torch.int32
    torch.testing.assert_close(values, torch.tensor(list(expected.values())))


def test_dare_keeps_the_expectation_and_drops_the_rest():
    parts = {0: part(1, 60), 1: part(2, 60)}
    how = Combination("dare_linear", (0.5, 0.5), density=0.25)
    torch.manual_seed(0)
    sums, counts = torch.zeros(60), []
    for _ in range(600):
        indices, values = combine.sparse(parts, how)
        counts.append(len(indices))
        sums[indices.long()] += values
    expected = torch.zeros(60)
    for indices, values in parts.values():
        expected[indices.long()] += 0.5 * values
    assert sum(counts) / 600 / 60 == pytest.approx(1 - 0.75**2, abs=0.02)
    torch.testing.assert_close(sums / 600, expected, rtol=0, atol=0.3)


def test_updates_that_cancel_leave_one_entry():
    indices, values = part(1, 5)
    result = combine.sparse(
        {0: (indices, values), 1: (indices, -values)}, Combination("cat", (1.0, 1.0))
    )
    assert [tensor.tolist() for tensor in result] == [[int(indices[0])], [0.0]]


def test_a_low_rank_and_a_sparse_update_are_one_supertuning_folder(tmp_path):
    """A LoRA on some layers and sparse updates on others, saved, and loaded by stock PEFT."""
    folder, updates = saved(tmp_path / "a", 1, target_modules=["q_proj"])
    how = Combination("cat", (0.5, 2.0, 1.0))
    model = base()
    low = combine.low_rank(model, {0: folder}, how)
    name = "model.layers.1.mlp.down_proj"
    pair = [{}, {name: part(4, 9, 16 * 24)}, {name: part(5, 7, 16 * 24)}]
    parts = combine.add_sparse(low, model, pair, how)
    adapter = Summed(low.rank)
    adapter.put(model, low, parts)
    adapter.save(model, tmp_path / "out", "base", "CAUSAL_LM")
    adapter.take_off(model)
    dense = torch.zeros(16 * 24)
    for weight, mine in zip(how.weights[1:], pair[1:], strict=True):
        for index, value in zip(*(tensor.tolist() for tensor in mine[name]), strict=True):
            dense[index] += weight * value
    expected = base()
    with torch.no_grad():
        for layer, update in updates.items():
            expected.get_submodule(layer).weight += 0.5 * update
        expected.get_submodule(name).weight += dense.view(16, 24)
        ids = torch.randint(40, (2, 9))
        loaded = adapter.load_stock(base(), tmp_path / "out").eval()
        torch.testing.assert_close(
            loaded(input_ids=ids).logits, expected(input_ids=ids).logits, rtol=0, atol=1e-5
        )
        torch.testing.assert_close(
            model(input_ids=ids).logits, base()(input_ids=ids).logits, rtol=0, atol=0
        )
    assert combine.lost(low) < 1e-6
