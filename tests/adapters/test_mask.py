"""Supports: how many entries, which, their file, what is said of them, and that processes agree."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from adapters import mask
from adapters.delta import AdapterError
from tests.ranks import spawn

WANTED = {"layers.0.q_proj": ((4, 6), 5), "layers.0.up_proj": ((8, 6), 3)}
SHAPES = {name: shape for name, (shape, _) in WANTED.items()}
SUPPORTS = {
    "layers.0.q_proj": torch.tensor([0, 3, 9, 17, 23], dtype=torch.int32),
    "layers.0.up_proj": torch.tensor([1, 2, 47], dtype=torch.int32),
}


# which, by decomposition


def planted() -> tuple[Tensor, list[int]]:
    """A matrix of rank 3, and twelve spikes that are not its largest entries."""
    draw = torch.Generator().manual_seed(0)
    left, right = torch.randn(40, 3, generator=draw), torch.randn(3, 30, generator=draw)
    spikes = sorted(torch.randperm(1200, generator=draw)[:12].tolist())
    matrix = (left @ right).double()
    matrix.view(-1)[spikes] += 4.0
    return matrix, spikes


@pytest.mark.parametrize("exact", [1024, 8])
def test_planted_spikes_are_separated_from_a_low_rank(monkeypatch, exact):
    monkeypatch.setattr(mask, "EXACT", exact)
    matrix, spikes = planted()
    assert mask.decompose(matrix, 12, 3, "x").tolist() == spikes
    by_size = mask.top(matrix.abs(), 12, "x").tolist()
    assert len({*by_size} & {*spikes}) < 10
    assert mask.decompose(matrix, 12, 0, "x").tolist() == by_size


def test_a_decomposition_keeps_to_what_is_allowed_and_draws_nothing(monkeypatch):
    monkeypatch.setattr(mask, "EXACT", 8)
    matrix, spikes = planted()
    allowed = torch.ones(1200, dtype=torch.bool)
    allowed[spikes[:4]] = False
    state = torch.get_rng_state()
    chosen = mask.decompose(matrix, 12, 3, "x", allowed).tolist()
    assert {*spikes[4:]} <= {*chosen}
    assert not {*spikes[:4]} & {*chosen}
    assert torch.equal(torch.get_rng_state(), state)


# how many


@pytest.mark.parametrize(
    "density",
    [1e-4, 0.001, 0.005, 0.006, 0.01, 0.018, 0.05, 0.1, 1 / 3, 0.29, 0.57, 0.7, 0.99, 1, 1.0],
)
def test_entries_are_as_many_as_peft_trains(density):
    # the processes below import this file, and PEFT takes seconds
    from peft.tuners.supertuning.layer import SupertuningLayer

    for o in (1, 3, 64, 100, 576, 1536, 4096, 14336):
        for i in (1, 7, 64, 100, 576, 1536, 4096, 14336):
            # as it comes out of adapter_config.json
            written = json.loads(json.dumps({"sparsity": 1 - density}))["sparsity"]
            theirs = SupertuningLayer._num_trainable(None, o * i, written)  # type: ignore[arg-type]
            if theirs < 1:
                with pytest.raises(
                    AdapterError,
                    match=(
                        f"density {density:g} of x is less than one of its {o * i} entries:"
                        " raise it"
                    ),
                ):
                    mask.entries(o, i, density, "x")
                continue
            assert mask.entries(o, i, density, "x") == theirs
            assert abs(theirs - density * o * i) < 1.01


def test_their_rounding_is_not_that_of_the_product():
    """Otherwise the test above could not tell the two expressions apart."""
    assert int(100 * 0.29) == 28
    assert mask.entries(10, 10, 0.29, "x") == int(100 * (1 - (1 - 0.29))) == 29


@pytest.mark.parametrize("density", [0, 0.0, -0.1, 1.0001, 6, math.nan, math.inf])
def test_a_density_that_is_no_share(density):
    with pytest.raises(
        AdapterError,
        match=rf"density of x is {density}: expected more than 0 and at most 1, as 0.006 for 0.6 %",
    ):
        mask.entries(64, 64, density, "x")


def test_indices_stay_below_int32():
    assert mask.entries(2**16, 2**15 - 1, 1e-3, "x") == int((2**31 - 2**16) * (1 - (1 - 1e-3)))
    with pytest.raises(
        AdapterError,
        match=(
            r"lm_head has 65536 x 32768 entries, and indices are int32, below 2147483648: leave"
            r" it out"
        ),
    ):
        mask.entries(2**16, 2**15, 1e-3, "lm_head")


# which


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("o", "i", "k"),
    [(5, 7, 1), (5, 7, 6), (5, 7, 35), (1, 9, 4), (8, 1, 3), (1, 1, 1), (40, 50, 300)],
)
def test_the_top_is_that_of_a_plain_sort(dtype, o, i, k):
    draw = torch.Generator().manual_seed(o * k)
    ranks = torch.randperm(o * i, generator=draw)
    scores = (
        (ranks - o * i // 2).to(dtype).view(o, i)
        if o * i < 256
        else torch.randn(o, i, generator=draw).to(dtype)
    )
    actual = mask.top(scores, k, "x")
    assert actual.dtype == torch.int32
    assert actual.shape == (k,)
    plain = scores.flatten().tolist()
    order = sorted(range(o * i), key=lambda entry: -plain[entry])
    assert actual.tolist() == sorted(set(actual.tolist()))
    # Of equal scores, which bf16 has, any may be chosen.
    assert sorted(plain[e] for e in actual.tolist()) == sorted(plain[e] for e in order[:k])
    if len(set(plain)) == o * i:
        assert actual.tolist() == sorted(order[:k])
    assert (
        torch.equal(mask.top(scores.t().contiguous().t(), k, "x"), actual)
        or len(set(plain)) < o * i
    )


def test_equal_scores_give_k_entries():
    for k in (1, 10, 24):
        actual = mask.top(torch.zeros(4, 6), k, "x").tolist()
        assert len(set(actual)) == k
        assert all(0 <= entry < 24 for entry in actual)
    scores = torch.tensor([[1.0, -torch.inf], [torch.inf, 0.0]])
    assert mask.top(scores, 2, "x").tolist() == [0, 2]


def test_scores_that_choose_nothing():
    scores = torch.ones(3, 4)
    with pytest.raises(
        AdapterError, match="up_proj has 12 entries, and 13 of them are to be chosen"
    ):
        mask.top(scores, 13, "up_proj")
    scores[2, 1] = torch.nan
    with pytest.raises(
        AdapterError, match="the scores of up_proj hold NaN, so no mask can be made from them"
    ):
        mask.top(scores, 2, "up_proj")


@pytest.mark.parametrize(
    ("o", "i", "k"),
    [(6, 7, 1), (6, 7, 10), (6, 7, 11), (6, 7, 41), (6, 7, 42), (1, 1, 1), (300, 200, 600)],
)
def test_random_entries_are_sorted_and_of_their_seed(o, i, k):
    actual = [mask.random(o, i, k, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    for support in actual:
        assert support.dtype == torch.int32
        assert len(support) == k
        assert support.tolist() == sorted(set(support.tolist()))
        assert 0 <= support.min() <= support.max() < o * i
    assert torch.equal(actual[0], actual[1])
    if 1 < k < o * i:
        assert not torch.equal(actual[0], actual[2])
    draw = torch.Generator().manual_seed(1)
    assert torch.equal(mask.random(o, i, k, draw), actual[0])
    if 1 < k < o * i:
        # one generator draws for all layers
        assert not torch.equal(mask.random(o, i, k, draw), actual[0])
    before = torch.get_rng_state()
    mask.random(o, i, k, draw)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.long
@pytest.mark.parametrize("k", [5, 10, 11, 20])
def test_random_entries_and_pairs_of_them_are_equally_likely(k):
    n, times = 42, 4000
    draw = torch.Generator().manual_seed(3)
    chosen = torch.zeros(times, n)
    for row in chosen:
        row[mask.random(6, 7, k, draw).long()] = 1
    p, pair = k / n, k * (k - 1) / (n * (n - 1))
    counts = chosen.T @ chosen
    single, pairs = counts.diagonal(), counts[torch.triu(torch.ones(n, n, dtype=torch.bool), 1)]
    assert (single - times * p).abs().max() < 5 * math.sqrt(times * p * (1 - p))
    assert (pairs - times * pair).abs().max() < 5 * math.sqrt(times * pair * (1 - pair))


# the file


def test_what_is_saved_is_loaded(tmp_path):
    file = tmp_path / "masks.safetensors"
    mask.save(file, SUPPORTS, SHAPES)
    for place in (file, tmp_path):
        actual = mask.load(place, WANTED)
        assert actual.keys() == SUPPORTS.keys()
        for name, indices in actual.items():
            assert indices.dtype == torch.int32
            assert torch.equal(indices, SUPPORTS[name])
    assert [path.name for path in tmp_path.iterdir()] == ["masks.safetensors"]
    with safe_open(file, "pt") as opened:
        assert json.loads(opened.metadata()["shapes"]) == {
            "layers.0.q_proj": [4, 6],
            "layers.0.up_proj": [8, 6],
        }
        assert sorted(opened.keys()) == sorted(SUPPORTS)
    # over what was there
    mask.save(file, {name: indices[:1] for name, indices in SUPPORTS.items()}, SHAPES)
    assert len(load_file(file)["layers.0.q_proj"]) == 1


def test_unsorted_indices_are_sorted(tmp_path):
    mask.save(tmp_path / "m", {name: indices.flip(0) for name, indices in SUPPORTS.items()}, SHAPES)
    assert all(
        torch.equal(indices, SUPPORTS[name])
        for name, indices in mask.load(tmp_path / "m", WANTED).items()
    )


def changed(indices: list[int]) -> dict[str, Tensor]:
    return SUPPORTS | {"layers.0.q_proj": torch.tensor(indices, dtype=torch.int32)}


@pytest.mark.parametrize(
    ("supports", "shapes", "message"),
    [
        (
            {"layers.0.q_proj": SUPPORTS["layers.0.q_proj"]},
            {"layers.0.q_proj": (4, 6)},
            (
                r"of another model or other target modules: 1 layers are missing"
                r" \['layers.0.up_proj'\], 0 are not adapted here \[\]"
            ),
        ),
        (
            SUPPORTS | {"layers.1.q_proj": torch.tensor([1])},
            SHAPES | {"layers.1.q_proj": (4, 6)},
            r"0 layers are missing \[\], 1 are not adapted here \['layers.1.q_proj'\]",
        ),
        (
            SUPPORTS,
            SHAPES | {"layers.0.up_proj": (6, 8)},
            r"of another model: layers.0.up_proj is \(6, 8\) there and \(8, 6\) here",
        ),
        (
            changed([0, 3, 9]),
            SHAPES,
            r"has 3 entries for layers.0.q_proj \(density 0.125\) where the settings ask for 5"
            r" \(0.208333\)\. "
            "Set adapter.density to the mask's",
        ),
        (changed([]), SHAPES, "has 0 entries for layers.0.q_proj"),
        (
            changed([0, 3, 9, 17, 24]),
            SHAPES,
            "the indices of layers.0.q_proj leave the weight's 24 entries, or repeat",
        ),
        (
            changed([-1, 3, 9, 17, 23]),
            SHAPES,
            "the indices of layers.0.q_proj leave the weight's 24 entries, or repeat",
        ),
        (
            changed([23, 3, 9, 17, 3]),
            SHAPES,
            "the indices of layers.0.q_proj leave the weight's 24 entries, or repeat",
        ),
    ],
    ids=["missing", "unknown", "shape", "density", "empty", "above", "below", "repeated"],
)
def test_a_mask_that_does_not_fit_is_refused(tmp_path, supports, shapes, message):
    file = tmp_path / "masks.safetensors"
    mask.save(file, supports, shapes)
    with pytest.raises(AdapterError, match=message) as caught:
        mask.load(file, WANTED)
    assert str(caught.value).startswith(f"adapter.mask={file}")


@pytest.mark.parametrize("content", [b"", b"no tensors", b"\xff" * 64, "cut", "shapes"], ids=repr)
def test_a_file_that_is_no_mask_is_refused(tmp_path, content):
    file = tmp_path / "masks.safetensors"
    mask.save(file, SUPPORTS, SHAPES)
    if content == "shapes":
        save_file(SUPPORTS, file, {"shapes": "{4"})
    else:
        file.write_bytes(file.read_bytes()[:-5] if content == "cut" else content)
    with pytest.raises(AdapterError, match=f"adapter.mask={file} cannot be read as masks: "):
        mask.load(file, WANTED)


def test_a_file_that_is_not_there(tmp_path):
    for place in (tmp_path / "masks.safetensors", tmp_path):
        with pytest.raises(
            AdapterError,
            match=f"adapter.mask={place}: there is no such file. Give masks.safetensors of a run",
        ):
            mask.load(place, WANTED)


def test_another_methods_adapter_has_no_mask(tmp_path):
    save_file(
        {"base_model.model.layers.0.q_proj.lora_A.weight": torch.zeros(2, 6)},
        tmp_path / "adapter_model.safetensors",
    )
    with pytest.raises(AdapterError, match="holds no masks"):
        mask.load(tmp_path, WANTED)


# what is said of one


@pytest.mark.parametrize(
    ("o", "i", "k"), [(5, 7, 1), (5, 7, 6), (13, 11, 40), (4, 4, 16), (1, 9, 4)]
)
def test_statistics_are_those_of_plain_loops(o, i, k):
    draw = torch.Generator().manual_seed(k)
    weight = torch.randn(o, i, generator=draw, dtype=torch.float64)
    support = mask.random(o, i, k, draw)
    if k > 2:
        # so that some are among the largest
        support[: k // 2] = mask.top(weight.abs(), k // 2, "x")
        support = torch.cat(
            [
                support.unique(),
                support.new_tensor([e for e in range(o * i) if e not in support.tolist()]),
            ]
        )[:k]
        support = support.sort().values
    rows, columns = set(), set()
    for entry in support.tolist():
        rows.add(entry // i)
        columns.add(entry % i)
    sizes = {r * i + c: abs(weight[r, c].item()) for r in range(o) for c in range(i)}
    largest = sorted(sizes, key=lambda entry: -sizes[entry])[:k]
    among = sum(entry in largest for entry in support.tolist()) / k
    actual = mask.statistics(support, weight)
    assert actual == pytest.approx(
        {"rows": len(rows) / o, "columns": len(columns) / i, "among_largest": among}, abs=1e-6
    )
    assert mask.statistics(mask.top(weight.abs(), k, "x"), weight)["among_largest"] == 1
    assert mask.statistics(support, -weight) == actual
    if k > 2:
        assert among > 0


# several processes


def _agreement(rank: int, folder: Path) -> None:
    other = SUPPORTS | {"layers.0.up_proj": torch.tensor([1, 2, 46], dtype=torch.int32)}
    cases: dict[str, dict[str, Any]] = {
        "equal": dict(reversed(SUPPORTS.items())) if rank else SUPPORTS,
        "none": {},
        "entry": other if rank else SUPPORTS,
        "layer": {"layers.0.up_proj": SUPPORTS["layers.0.up_proj"]} if rank else SUPPORTS,
        "name": {"layers.1.q_proj" if rank else "layers.0.q_proj": SUPPORTS["layers.0.q_proj"]},
        "equal again": {name: indices.clone() for name, indices in SUPPORTS.items()},
    }
    text = {"processes": str(mask.processes())}
    for case, supports in cases.items():
        try:
            mask.refuse_divergence(supports)
            text[case] = ""
        except AdapterError as error:
            text[case] = str(error)
    (folder / f"{rank}.json").write_text(json.dumps(text))


def test_processes_with_other_supports_are_stopped(tmp_path):
    spawn(_agreement, tmp_path)
    refused = (
        "the processes of this run have different supports, so their values cannot be averaged"
    )
    for rank in (0, 1):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == {
            "processes": "2",
            "equal": "",
            "none": "",
            "entry": refused,
            "layer": refused,
            "name": refused,
            "equal again": "",
        }


def test_one_process_agrees_with_itself():
    assert mask.processes() == 1
    mask.refuse_divergence(SUPPORTS)
