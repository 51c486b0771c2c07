"""States on disk are those of a forward pass: the same gradients, packed and not; and a folder of
anything else is refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from trainer.data import states_folder
from trainer.data.batches import Collate, Pick, Sequences
from trainer.data.hidden_states import HiddenStates, TargetPass, digest, key_of, write
from trainer.data.render import Tokens
from trainer.data.states_folder import HiddenStatesError
from trainer.drafters import Drafter, Target
from trainer.storage import journal
from trainer.training.distill import DraftLoss

CPU = torch.device("cpu")
LAYERS = (0, 1, 2)


class Rows:
    """Random rows of lengths 3 to 20."""

    def __init__(self, count=13, seed=0):
        draw = np.random.default_rng(seed)
        self.rows = []
        for _ in range(count):
            ids = draw.integers(3, 250, draw.integers(3, 21)).tolist()
            self.rows.append(Tokens(ids, [False] + [True] * (len(ids) - 1)))
        self.lengths = np.array([len(row.ids) for row in self.rows])

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]

    def where(self, index):
        return f"rows.jsonl:{index + 1}"


class Reads(Drafter):
    """Two offsets from a product of all the states that it is given."""

    def __init__(self, layers, size=16):
        super().__init__()
        self.offsets, self.weights, self.layers = 2, [1.0, 0.5], layers
        torch.manual_seed(1)
        self.parts = nn.ModuleList(nn.Linear(size * (1 + len(layers)), size) for _ in range(2))

    def states(self, output, target):
        read = (
            output.hidden
            if output.features is None
            else torch.cat([output.hidden, output.features], dim=-1)
        )
        for part in self.parts:
            yield torch.tanh(part(read))


@pytest.fixture(scope="module")
def model(tiny):
    actual = tiny.load(torch.float32)
    with torch.no_grad():
        for parameter in actual.parameters():
            parameter.mul_(3)  # states that differ from place to place
    return actual.requires_grad_(False)


def online(model, layers=LAYERS):
    return DraftLoss(model, 8, Reads(layers), Target(model))


def passes(model, layers=LAYERS):
    """The states of a forward pass."""
    loss = online(model, layers)
    return lambda batch: loss.forward(batch)[:2]


KEY = {
    "base": "b",
    "quantization": "none",
    "dtype": "float32",
    "adapter": None,
    "rows": "r",
    "layers": list(LAYERS),
}


def cached(folder, model, sequences, states=None, key=KEY, **more):
    settings = {"width": 16, "pad": 0, "batch_size": 4, "device": CPU} | more
    target = TargetPass(states or passes(model, tuple(key["layers"])), **settings)
    return HiddenStates.prepare(folder, key, sequences, target, 8000)


def batches(sequences, packed, counts=True):
    collate = Collate(0, packed, False)
    for start in range(0, len(sequences), 3):
        chosen = range(start, min(start + 3, len(sequences)))
        yield collate([sequences[Pick(i, counts or i != start, 1)] for i in chosen])


def gradients(loss, batch):
    loss.drafter.zero_grad()
    total, sums = loss(batch)
    total.backward()
    return [total.detach(), sums["offsets"], *(p.grad.clone() for p in loss.drafter.parameters())]


PACKS = [[0, 3, 7], [1], [2, 4], [5, 6, 8, 9], [10, 11, 12]]


@pytest.mark.long
@pytest.mark.parametrize("layers", [(), LAYERS, (1,), (0, 2)])
@pytest.mark.parametrize("packs", [None, PACKS])
def test_gradients_from_disk_are_those_of_a_forward_pass(tmp_path, model, packs, layers):
    sequences = Sequences(Rows(), packs)
    cached(tmp_path, model, Sequences(sequences.rows))  # all layers, made without packs
    disk, pass_ = online(model, layers), online(model, layers)
    disk.states = HiddenStates(tmp_path, KEY | {"layers": list(layers)}, sequences).states
    for number, batch in enumerate(batches(sequences, packs is not None)):
        actual, expected = gradients(disk, batch), gradients(pass_, batch)
        assert number or all(value.abs().sum() > 0 for value in (expected[0], *expected[2:]))
        for one, other in zip(actual, expected, strict=True):
            # attention in blocks of another size rounds otherwise
            torch.testing.assert_close(one, other, rtol=2e-5, atol=2e-6)


def test_each_place_holds_its_own_row_and_padding_is_zero(tmp_path, model):
    sequences = Sequences(Rows(), PACKS)
    actual = cached(tmp_path, model, sequences)
    hidden, features = actual.batch([3, 0], 72)
    assert hidden.shape == (2, 72, 16)
    assert features.shape == (2, 72, 48)
    with torch.no_grad():
        for i, pack in enumerate((PACKS[3], PACKS[0])):
            at = 0
            for row in pack:
                ids = torch.tensor([sequences.rows[row].ids])
                naive = model.model(ids, output_hidden_states=True)
                here = slice(at, at + ids.shape[1])
                # A batch of rows and a row alone may round differently.
                torch.testing.assert_close(
                    hidden[i, here], naive.last_hidden_state[0], rtol=1e-5, atol=1e-5
                )
                between = [
                    features[i, here, k * 16 : (k + 1) * 16] for k in range(2)
                ]  # the last one transformers gives after its norm
                for k in range(2):
                    torch.testing.assert_close(
                        between[k], naive.hidden_states[k][0], rtol=1e-5, atol=1e-5
                    )
                at = here.stop
            assert not hidden[i, at:].any()
            assert not features[i, at:].any()


def test_a_sequence_that_only_fills_a_share_is_laid_out_too(tmp_path, model):
    sequences = Sequences(Rows())
    loss, pass_ = online(model), online(model)
    loss.states = cached(tmp_path, model, sequences).states
    for batch in batches(sequences, False, counts=False):
        for one, other in zip(gradients(loss, batch), gradients(pass_, batch), strict=True):
            torch.testing.assert_close(one, other, rtol=2e-5, atol=2e-6)


def test_a_batch_of_other_rows_is_refused(tmp_path, model):
    actual = cached(tmp_path, model, Sequences(Rows()))
    batch = next(batches(Sequences(Rows(seed=1)), False))
    with pytest.raises(HiddenStatesError, match="holds states of other rows"):
        actual.states(batch)


def test_states_are_stored_as_they_are_computed(tmp_path, tiny):
    model = tiny.load(torch.bfloat16).requires_grad_(False)
    sequences = Sequences(Rows())
    actual = cached(tmp_path / "a", model, sequences, key=KEY | {"dtype": "bfloat16"}, batch_size=1)
    batch = next(batches(Sequences(sequences.rows, [[4]]), False))
    hidden, features = passes(model)(batch)
    length = sequences.rows.lengths[4]
    got = actual.row(4)
    assert got[0].dtype == torch.bfloat16
    assert torch.equal(got[0], hidden[0, :length])
    assert torch.equal(got[1], features[0, :length])
    with pytest.raises(
        HiddenStatesError,
        match=r"hidden states have 16 numbers in torch.bfloat16, expected 16 in torch.float32",
    ):
        cached(tmp_path / "b", model, sequences)


def test_what_is_left_of_a_killed_start_is_kept(tmp_path, model):
    sequences, seen = Sequences(Rows()), []

    def counting(batch):
        seen.append(batch["sequences"])
        if len(seen) == 5:
            raise KeyboardInterrupt
        return passes(model)(batch)

    with pytest.raises(KeyboardInterrupt):
        cached(tmp_path, model, sequences, counting)
    index = json.loads((tmp_path / "index.json").read_text())
    whole = {name: (tmp_path / name).stat().st_mtime_ns for name in index["shards"]}
    assert 1 <= len(whole) < len(index["cuts"]) - 1
    with pytest.raises(
        HiddenStatesError,
        match=r"is not complete: \d+ shards are still to be written, such as shard-0000",
    ):
        HiddenStates(tmp_path, KEY, sequences)
    (tmp_path / "shard-00004.safetensors.tmp").write_bytes(b"half")
    cached(tmp_path, model, sequences, counting)
    assert sorted(row for batch in seen[5:] for row in batch) == list(
        range(max(shard["last"] for shard in index["shards"].values()), 13)
    )
    assert {name: (tmp_path / name).stat().st_mtime_ns for name in whole} == whole
    seen.clear()
    cached(tmp_path, model, sequences, counting)
    assert seen == []


@pytest.mark.parametrize("fault", ["cut", "missing"])
def test_a_torn_shard_is_refused_and_made_again(tmp_path, model, fault):
    sequences = Sequences(Rows())
    expected = cached(tmp_path, model, sequences).row(5)
    file = tmp_path / "shard-00001.safetensors"
    content = file.read_bytes()
    file.unlink() if fault == "missing" else file.write_bytes(content[:-7])
    message = (
        "it is missing"
        if fault == "missing"
        else f"it has {len(content) - 7} bytes instead of {len(content)}"
    )
    with pytest.raises(
        HiddenStatesError, match=f"shard-00001.safetensors cannot be used: {message}"
    ):
        HiddenStates(tmp_path, KEY, sequences)
    actual = cached(tmp_path, model, sequences).row(5)
    assert torch.equal(actual[0], expected[0])
    assert file.read_bytes() == content


def test_an_altered_shard_is_refused_when_it_is_first_read(tmp_path, model):
    sequences = Sequences(Rows())
    cached(tmp_path, model, sequences)
    file = tmp_path / "shard-00001.safetensors"
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    actual = HiddenStates(tmp_path, KEY, sequences)
    actual.row(0)
    with pytest.raises(
        HiddenStatesError, match=r"shard-00001.safetensors cannot be used: its content has changed"
    ):
        actual.row(actual.firsts[1])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"base": "other"}, "the base's weights: b there, other expected"),
        ({"adapter": "a1"}, "adapter: None there, a1 expected"),
        ({"rows": "other"}, "tokenised rows .*: r there, other expected"),
        ({"dtype": "bfloat16"}, "dtype: float32 there, bfloat16 expected"),
        ({"quantization": "nf4"}, "quantization: none there, nf4 expected"),
        ({"layers": [0, 5]}, r"layers: \[0, 1, 2\] there, \[0, 5\] expected"),
    ],
)
def test_states_of_something_else_are_refused(tmp_path, model, changed, message):
    sequences = Sequences(Rows(4))
    cached(tmp_path, model, sequences)
    before = (tmp_path / "index.json").read_bytes()
    for use in (
        lambda: HiddenStates(tmp_path, KEY | changed, sequences),
        lambda: cached(tmp_path, model, sequences, key=KEY | changed),
    ):
        with pytest.raises(HiddenStatesError, match=message):
            use()
    assert (tmp_path / "index.json").read_bytes() == before


def test_other_rows_under_the_same_key_are_refused(tmp_path, model):
    cached(tmp_path, model, Sequences(Rows(6)))
    with pytest.raises(HiddenStatesError, match="holds 6 rows"):
        HiddenStates(tmp_path, KEY, Sequences(Rows(5)))


def test_fewer_layers_read_a_whole_cache_and_do_not_finish_a_part(tmp_path, model):
    sequences = Sequences(Rows())

    def stops(batch):
        if len(list(tmp_path.glob("*.safetensors"))) == 2:
            raise KeyboardInterrupt
        return passes(model)(batch)

    with pytest.raises(KeyboardInterrupt):
        cached(tmp_path, model, sequences, stops)
    with pytest.raises(
        HiddenStatesError, match=r"is not complete, and was begun with the layers \[0, 1, 2\]"
    ):
        cached(tmp_path, model, sequences, key=KEY | {"layers": [1]})


def test_no_room_is_said_before_anything_is_computed(tmp_path, model, monkeypatch):
    sequences = Sequences(Rows())
    tokens = int(sequences.rows.lengths.sum())
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 5, 1000))
    with pytest.raises(
        HiddenStatesError,
        match=f"of {tokens:,} tokens take {tokens * 4 * 16 * 4:,} bytes.* has 1,000 free",
    ):
        cached(tmp_path, model, sequences, lambda batch: pytest.fail("computed"))
    assert not list(tmp_path.glob("*.json"))


def test_the_estimate_is_what_the_shards_take(tmp_path, model):
    sequences = Sequences(Rows())
    cached(tmp_path, model, sequences)
    size = sum(file.stat().st_size for file in tmp_path.glob("*.safetensors"))
    shards = len(list(tmp_path.glob("*.safetensors")))
    assert shards > 2
    assert 0 <= size - int(sequences.rows.lengths.sum()) * 64 * 4 < 300 * shards  # headers


def test_states_that_are_not_finite_name_their_row(tmp_path, model):
    def broken(batch):
        hidden, features = passes(model)(batch)
        for i, sequence in enumerate(batch["sequences"]):
            hidden[i, -1] = torch.nan  # padding, but for the longest row of a batch
            if sequence == 6:
                hidden[i, 1] = torch.inf
        return hidden, features

    rows = Rows(8)
    for row in rows.rows:
        row.ids[:] = row.ids[:3]
        row.trained[:] = row.trained[:3]
    rows.lengths = np.full(8, 3)
    with pytest.raises(HiddenStatesError, match=r"rows.jsonl:7: .* not finite"):
        cached(tmp_path, model, Sequences(rows), broken)


def test_a_full_disk_leaves_the_shards_before(tmp_path, model, monkeypatch):
    sequences, saved, whole = Sequences(Rows()), [], states_folder.save_file

    def full(tensors, path):
        saved.append(path)
        if len(saved) == 2:
            path.write_bytes(b"part")
            raise OSError(28, "No space left on device")
        whole(tensors, path)

    monkeypatch.setattr(states_folder, "save_file", full)
    with pytest.raises(
        HiddenStatesError, match=r"shard-00001.safetensors could not be written .* bytes are free"
    ):
        cached(tmp_path, model, sequences)
    assert sorted(path.name for path in tmp_path.glob("shard-*")) == ["shard-00000.safetensors"]
    cached(tmp_path, model, sequences).row(12)


def test_a_folder_that_is_none_of_ours_is_refused(tmp_path, model):
    sequences = Sequences(Rows(2))
    with pytest.raises(HiddenStatesError, match=r"it has no index.json"):
        HiddenStates(tmp_path, KEY, sequences)
    (tmp_path / "index.json").write_text("{")
    with pytest.raises(HiddenStatesError, match="cannot be read"):
        HiddenStates(tmp_path, KEY, sequences)
    (tmp_path / "index.json").write_text("[]")
    with pytest.raises(HiddenStatesError, match="not of states that this version writes"):
        HiddenStates(tmp_path, KEY, sequences)
    (tmp_path / "index.json").unlink()
    (tmp_path / "shard-00000.safetensors").write_bytes(b"x")
    with pytest.raises(HiddenStatesError, match="shards without an index"):
        write(tmp_path, KEY, sequences, TargetPass(passes(model), 16, 0, 4, CPU))


def test_the_digest_sees_every_part():
    value = {
        "tensors": {"a": torch.ones(2), "b": torch.zeros(3, dtype=torch.bfloat16)},
        "extra": {"phase": 1, "list": [1, "x"]},
    }
    same = {
        "extra": {"list": [1, "x"], "phase": 1},
        "tensors": {"b": torch.zeros(3, dtype=torch.bfloat16), "a": torch.ones(2)},
    }
    assert digest(value) == digest(same)
    others = [
        value | {"extra": {"phase": 2, "list": [1, "x"]}},
        value | {"tensors": {"a": torch.ones(2) * 2, "b": value["tensors"]["b"]}},
        value | {"tensors": {"a": torch.ones(2).reshape(1, 2), "b": value["tensors"]["b"]}},
        value | {"tensors": {"a": torch.ones(2, dtype=torch.float64), "b": value["tensors"]["b"]}},
        value | {"tensors": {"c": torch.ones(2), "b": value["tensors"]["b"]}},
    ]
    assert len({digest(other) for other in [value, *others]}) == 6


def test_the_key_is_of_all_that_states_depend_on(tiny):
    state = {"tensors": {"a": torch.ones(2)}, "extra": {}}
    key = key_of(tiny, torch.float32, state, "r", (2, 0))
    assert key["layers"] == [0, 2]
    others = [
        key_of(replace(tiny, quantization="nf4"), torch.float32, state, "r", (2, 0)),
        key_of(tiny, torch.bfloat16, state, "r", (2, 0)),
        key_of(tiny, torch.float32, None, "r", (2, 0)),
        key_of(tiny, torch.float32, state, "s", (2, 0)),
        key_of(tiny, torch.float32, state, "r", (2,)),
    ]
    assert all(other != key for other in others)
    assert json.loads(json.dumps(key)) == key


def test_a_packed_run_on_the_states_of_an_unpacked_one_is_that_on_forward_passes(
    tmp_path, train, chats
):
    words = (
        f"task.path={chats}",
        "objective=distill",
        "adapter=none",
        "drafter=eagle3",
        "drafter.offsets=2",
        "drafter.aux_layers=[0,1,2]",
        "max_length=96",
        "callbacks.evaluation.generate=0",
    )
    folder, packed = (
        f"target.features={tmp_path / 'states'}",
        ("packing=true", "max_steps=4", "callbacks.evaluation.every=2"),
    )
    train(*words, folder, "max_steps=1", "name=unpacked", "callbacks.evaluation=null")
    written = {
        file: file.stat().st_mtime_ns for file in (tmp_path / "states").iterdir() if file.suffix
    }
    losses = []
    for name, more in (("online", ()), ("disk", (folder,))):
        rows = journal.read(train(*words, *packed, *more, f"name={name}") / "metrics.jsonl")
        losses.append([row["loss"] for row in rows if row["kind"] in ("step", "evaluation")])
    assert len(losses[0]) >= 6
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert {
        file: file.stat().st_mtime_ns for file in (tmp_path / "states").iterdir() if file.suffix
    } == written
