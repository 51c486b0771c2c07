"""Formulas against plain loops, and Golomb's code against one that writes bit after bit."""

from __future__ import annotations

import math
import random
import zlib

import pytest
import torch
from safetensors.torch import load_file, save_file

from adapters import compress
from adapters.delta import AdapterError


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def golomb_bits(positions, m):
    """Golomb's own order: of each gap the unary part and then the remainder in truncated binary, as
    a string."""
    code, last = [], -1
    for position in positions:
        gap, last = position - last - 1, position
        quotient, remainder = divmod(gap, m)
        code.append("1" * quotient + "0")
        bits = math.ceil(math.log2(m))
        short = 2**bits - m
        if m > 1:
            code.append(
                f"{remainder:0{bits - 1}b}"
                if remainder < short and bits > 1
                else ""
                if remainder < short
                else f"{remainder + short:0{bits}b}"
            )
    return "".join(code)


def streams(positions, m):
    """The same bits, in three streams one after the other."""
    unary, heads, tails, last = "", "", "", -1
    bits = math.ceil(math.log2(m))
    for position in positions:
        code = golomb_bits([position - last - 1], m)
        last = position
        end = code.index("0") + 1
        unary, rest = unary + code[:end], code[end:]
        heads, tails = heads + rest[: max(bits - 1, 0)], tails + rest[max(bits - 1, 0) :]
    return unary + heads + tails


POSITIONS = [
    [],
    [0],
    [100_000],
    list(range(50)),
    [0, 1, 2, 70_000, 70_001, 1_000_000],
    sorted(random.Random(0).sample(range(5000), 300)),
    sorted(random.Random(1).sample(range(64), 40)),
]


@pytest.mark.parametrize("m", [1, 2, 3, 4, 5, 7, 8, 11, 64, 100])
def test_golombs_code_is_the_naive_one_and_comes_back(m):
    for positions in POSITIONS:
        code = compress.golomb_encode(torch.tensor(positions, dtype=torch.int64), m)
        naive = streams(positions, m)
        assert sorted(naive) == sorted(golomb_bits(positions, m))  # no bit more than Golomb's
        assert "".join(f"{byte:08b}" for byte in code.tolist()) == naive + "1" * (-len(naive) % 8)
        assert compress.golomb_decode(code, len(positions), m).tolist() == positions


@pytest.mark.parametrize("density", [0.003, 0.02, 0.1, 0.2, 0.37, 0.49])
def test_random_positions_take_little_more_than_their_entropy(density):
    n = 200_000
    positions = torch.nonzero(
        torch.rand(n, generator=torch.Generator().manual_seed(1)) < density
    ).flatten()
    m = compress.golomb_parameter(len(positions), n)
    size = 8 * len(compress.golomb_encode(positions, m))
    bound = compress.entropy(len(positions), n)
    assert bound <= size < 1.045 * bound
    # No other parameter is better by more than chance.
    assert (
        min(
            8 * len(compress.golomb_encode(positions, other))
            for other in range(max(1, m - 3), m + 4)
        )
        > 0.998 * size
    )


def test_the_parameter_at_its_ends():
    assert [compress.golomb_parameter(count, 100) for count in (0, 1, 50, 100)] == [1, 69, 1, 1]
    assert compress.golomb_parameter(1, 2**40) > 2**39
    assert compress.entropy(0, 10) == compress.entropy(10, 10) == 0.0
    assert compress.entropy(5, 10) == 10.0


@pytest.mark.parametrize("m", [1, 6])
def test_a_code_that_is_cut_off_is_named(m):
    code = compress.golomb_encode(torch.arange(0, 900, 9), m)
    for length in (0, 10, len(code) - 1):
        with pytest.raises(
            AdapterError, match=f"code of 100 positions is cut off after {length} bytes"
        ):
            compress.golomb_decode(code[:length], 100, m)


@pytest.mark.parametrize(("keep", "folder_kept"), [(0.2, 6), (1.0, 30), (1e-9, 1)])
def test_compeft_is_its_formula(keep, folder_kept):
    update = drawn(5, 6).double()
    actual = compress.compeft(update.float(), keep, 2.5)
    values = update.flatten().tolist()
    mean = sum(values) / len(values)
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / len(values))
    largest = sorted(range(len(values)), key=lambda i: -abs(values[i]))[:folder_kept]
    expected = [
        2.5 * deviation * math.copysign(1, values[i]) if i in largest else 0.0
        for i in range(len(values))
    ]
    torch.testing.assert_close(
        actual.double().flatten(), torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=0
    )


def test_compeft_keeps_no_zeros_and_the_dtype():
    update = torch.tensor([0.0, 0.0, 1.0, -3.0, 0.0], dtype=torch.bfloat16)
    actual = compress.compeft(update, 1.0, 1.0)
    assert actual.dtype == torch.bfloat16
    assert actual.sign().tolist() == [0, 0, 1, -1, 0]
    assert compress.compeft(torch.zeros(3, 4), 0.5, 1.0).eq(0).all()


def test_dare_is_its_formula_and_its_seed():
    update = drawn(40, 30)
    actual = compress.dare(update, 0.7, 0.3, torch.Generator().manual_seed(3))
    folder_kept = torch.rand(40, 30, generator=torch.Generator().manual_seed(3)) >= 0.7
    assert torch.equal(actual != 0, folder_kept)
    assert 0.25 < folder_kept.double().mean() < 0.35
    torch.testing.assert_close(actual[folder_kept], update[folder_kept] / 0.3)
    assert not torch.equal(
        actual, compress.dare(update, 0.7, 0.3, torch.Generator().manual_seed(4))
    )
    assert torch.equal(compress.dare(update, 0.0, 1.0, torch.Generator()), update)
    q = compress.dare(update, 0.7, 0.6, torch.Generator().manual_seed(3))
    torch.testing.assert_close(q, actual / 2)


@pytest.mark.long
def test_dare_in_one_factor_keeps_the_product_on_average_with_the_noise_that_is_said():
    B, A, drop, draw = drawn(6, 3), drawn(3, 5, seed=1), 0.75, torch.Generator().manual_seed(0)
    tries = torch.stack([compress.dare(B, drop, 1 - drop, draw) @ A for _ in range(1500)]).double()
    torch.testing.assert_close(tries.mean(0), (B @ A).double(), rtol=0, atol=0.3)
    noise = (tries - B @ A).square().sum((1, 2)).mean()
    expected = drop / (1 - drop) * (B.square().sum(0) * A.square().sum(1)).sum()
    assert float(noise) == pytest.approx(float(expected), rel=0.05)
    both = torch.stack(
        [
            compress.dare(B, drop, 1 - drop, draw) @ compress.dare(A, drop, 1 - drop, draw)
            for _ in range(1500)
        ]
    )
    # 1 / 0.25² - 1 = 15
    assert float((both - B @ A).square().sum((1, 2)).mean()) == pytest.approx(
        float(expected) * 5, rel=0.1
    )


@pytest.mark.parametrize(("o", "r", "i"), [(7, 3, 5), (2, 4, 9), (9, 4, 2), (4, 4, 4)])
def test_balanced_factors_have_the_same_product_and_share_its_spectrum(o, r, i):
    B, A = drawn(o, r), drawn(r, i, seed=1)
    new_B, new_A = compress.balanced(B, A)
    torch.testing.assert_close(new_B @ new_A, B @ A, rtol=1e-5, atol=1e-5)
    values = torch.zeros(r)
    spectrum = torch.linalg.svdvals((B @ A).double()).float()[:r]
    values[: len(spectrum)] = spectrum
    for gram in (new_B.t() @ new_B, new_A @ new_A.t()):
        torch.testing.assert_close(gram, torch.diag(values), rtol=1e-4, atol=1e-4)
    assert not any(factor.any() for factor in compress.balanced(torch.zeros(o, r), A))


TENSORS = {
    "x.lora_A.weight": drawn(4, 10),
    "x.lora_B.weight": drawn(12, 4, seed=1).bfloat16(),
    "x.supertuning_values": drawn(9),
    "x.supertuning_indices": torch.tensor([2, 5, 6, 80, 3000, 3001, 0, 0, 0], dtype=torch.int32),
    "y.supertuning_indices": torch.tensor([0, 5, 1], dtype=torch.int32),
    "z.supertuning_indices": torch.tensor([0, 0], dtype=torch.int32),
    "x.shira_indices": torch.tensor([[0, 1], [2, 3]], dtype=torch.int32),
    "x.lora_magnitude_vector": drawn(12),
    "score.weight": drawn(2, 6),
}


def test_what_is_an_update():
    assert compress.updates(TENSORS, "B") == ["x.lora_B.weight", "x.supertuning_values"]
    assert compress.updates(TENSORS, "both") == [
        "x.lora_A.weight",
        "x.lora_B.weight",
        "x.supertuning_values",
    ]
    # no pair, so no LoRA that we know
    assert compress.updates({"x.lora_B.weight": drawn(2, 2)}, "both") == []


@pytest.mark.parametrize("kind", ["compeft", "dare", "zeros", "whole"])
def test_a_file_gives_everything_back_bit_for_bit(tmp_path, kind):
    keys = compress.updates(TENSORS, "both")
    change = {
        "compeft": lambda tensor: compress.compeft(tensor, 0.3, 1.5),
        "dare": lambda tensor: compress.dare(tensor, 0.6, 0.4, torch.Generator().manual_seed(0)),
        "zeros": torch.zeros_like,
        "whole": lambda tensor: tensor,
    }[kind]
    tensors = TENSORS | {key: change(TENSORS[key]) for key in keys}
    compress.write(tmp_path / "compact.safetensors", tensors, keys)
    actual = compress.read(tmp_path / "compact.safetensors")
    assert actual.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert actual[key].dtype == tensor.dtype
        assert torch.equal(actual[key], tensor), key
    stored = load_file(tmp_path / "compact.safetensors")
    assert (":signs" in stored) == (kind == "compeft")
    assert not {"x.supertuning_indices", "z.supertuning_indices", *keys} & stored.keys()
    assert {"x.shira_indices", "y.supertuning_indices", "score.weight"} <= stored.keys()


def test_a_large_tensor_takes_the_bits_of_the_paper(tmp_path):
    update = compress.compeft(drawn(1000, 1000), 0.05, 1.0)
    compress.write(tmp_path / "f", {"x.shira_weight": update}, ["x.shira_weight"])
    # n H(k) positions and k n signs: 0.286 + 0.05 bits for each number.
    assert 0.336 < 8 * (tmp_path / "f").stat().st_size / 1e6 < 0.336 * 1.04 + 0.004


def test_another_file_is_refused(tmp_path):
    with pytest.raises(AdapterError, match="there is no"):
        compress.read(tmp_path / "none")
    save_file({"a": drawn(2)}, tmp_path / "other")
    with pytest.raises(
        AdapterError, match=r"other: its format is None, expected 'graft-compact-1'"
    ):
        compress.read(tmp_path / "other")
    (tmp_path / "noise").write_bytes(b"\x10" * 100)
    with pytest.raises(AdapterError, match="noise is damaged"):
        compress.read(tmp_path / "noise")


@pytest.mark.parametrize(
    "about",
    [
        '[["x",[3],"float32","values",2,1,2]]',  # the second position is past the third entry
        '[["x",[9],"float32","values",3,1,2]]',
        '[["x",[9],"float32","values",2,1,5]]',
        '[["x",[9],"float32","values",2,1,-1]]',
        '[["x",[9],"float64","values",2,1,2]]',
        '[["x",[9],"float32","signs",2,1,2]]',
        '[["x",[1],"int32","indices",2,1,2]]',
        '[["x",[9],"save","values",2,1,2]]',
        '[["x",[9],"float32","values",2,0,2]]',
        '[["x",[-9],"float32","values",2,1,2]]',
        '[["x",["a"],"float32","values",2,1,2]]',
        '[["x",[9]]]',
        "{",
        "3",
    ],
)
def test_a_damaged_file_is_named(tmp_path, about):
    code = compress.golomb_encode(torch.tensor([1, 8]), 1)
    text = torch.tensor(list(zlib.compress(about.encode())), dtype=torch.uint8)
    stored = {":golomb": code, ":values.float32": drawn(2), ":about": text}
    save_file(stored, tmp_path / "f", {"format": compress.FORMAT})
    with pytest.raises(AdapterError, match=r"f( is|: .*) (damaged|cut off)"):
        compress.read(tmp_path / "f")
    good = zlib.compress(b'[["x",[9],"float32","values",2,1,2]]')
    save_file(
        stored | {":about": torch.tensor(list(good), dtype=torch.uint8)},
        tmp_path / "f",
        {"format": compress.FORMAT},
    )
    assert torch.nonzero(compress.read(tmp_path / "f")["x"]).flatten().tolist() == [1, 8]


@pytest.mark.long
def test_hundreds_of_small_tensors_take_few_bytes_each(tmp_path):
    keys = [f"base_model.model.model.layers.{i}.self_attn.q_proj.lora_B.weight" for i in range(300)]
    tensors = {key: compress.compeft(drawn(64, 4, seed=i), 0.2, 1.0) for i, key in enumerate(keys)}
    compress.write(tmp_path / "f", tensors, keys)
    assert (tmp_path / "f").stat().st_size < 300 * (256 * 0.94 / 8 + 4 + 12)
    assert all(
        torch.equal(tensor, tensors[key]) for key, tensor in compress.read(tmp_path / "f").items()
    )


def test_together_there_is_one_threshold_and_one_scale():
    """As ComPEFT has it: all updates are one vector."""
    updates = [drawn(4, 5), 0.01 * drawn(3, 3, seed=1), drawn(7, seed=2).double()]
    actual = compress.compeft_together(updates, 0.3, 2.0)
    flat = [float(value) for update in updates for value in update.flatten()]
    mean = sum(flat) / len(flat)
    sigma = (sum((value - mean) ** 2 for value in flat) / len(flat)) ** 0.5
    largest = sorted(range(len(flat)), key=lambda i: -abs(flat[i]))[: round(0.3 * len(flat))]
    expected = torch.zeros(len(flat))
    for i in largest:
        expected[i] = math.copysign(2.0 * sigma, flat[i])
    torch.testing.assert_close(torch.cat([part.flatten().float() for part in actual]), expected)
    assert [(part.shape, part.dtype) for part in actual] == [(u.shape, u.dtype) for u in updates]
    assert not actual[1].any()  # its entries are small
    alone = compress.compeft_together(updates[:1], 0.3, 2.0)[0]
    assert torch.equal(alone, compress.compeft(updates[0], 0.3, 2.0))


def test_a_tensor_without_entries_is_stored(tmp_path):
    tensors = {"x.lora_B.weight": torch.zeros(4, 3), "x.lora_A.weight": drawn(3, 5)}
    compress.write(tmp_path / "f", tensors, [*tensors])
    read = compress.read(tmp_path / "f")
    assert all(torch.equal(read[key], tensor) for key, tensor in tensors.items())
