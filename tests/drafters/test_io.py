"""A drafter's folder read back, bit by bit, and what is refused of one that may come from a
stranger."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.toys.heads import llama, stirred
from trainer.assembly.build import instantiate
from trainer.config import schema
from trainer.drafters import DrafterError, Target, TargetOutput, io

KINDS = ["mtp_medusa", "mtp_parallel", "mtp_sequential", "mtp_shared"]


def node(kind):
    """A group file as a plain config holds it."""
    from omegaconf import OmegaConf

    settings = {}
    for name in ("mtp_sequential", kind) if kind == "mtp_shared" else (kind,):
        settings |= OmegaConf.to_container(OmegaConf.load(schema.CONF / "drafter" / f"{name}.yaml"))
    settings.pop("defaults", None)
    return settings | {"offsets": 2}


def target_of(model, **changes):
    return {
        "base": "some/base",
        "fingerprint": "abc",
        "run": "runs/one",
        "step": 3,
        "hidden_size": model.config.hidden_size,
        "vocab_size": model.config.vocab_size,
    } | changes


@pytest.fixture
def saved(tmp_path):
    """A stirred drafter, its folder, and a model like the one it was made for but with other
    weights in what it starts from."""

    def built(kind="mtp_sequential"):
        model, settings = llama(), node(kind)
        drafter = stirred(instantiate(settings)(model=model))
        io.save(drafter, settings, target_of(model), tmp_path / "drafter")
        return drafter, tmp_path / "drafter", model

    return built


def edited(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize("kind", KINDS)
def test_a_drafter_comes_back_bit_by_bit(saved, kind):
    drafter, folder, model = saved(kind)
    with torch.no_grad():
        # the start that last_layer copies must not show through
        model.model.layers[-1].mlp.up_proj.weight.mul_(2)
    again = io.load(folder, model, "abc")
    assert type(again) is type(drafter)
    assert not again.training
    assert (again.offsets, again.weights) == (drafter.offsets, drafter.weights)
    state = again.state()
    assert state.keys() == drafter.state().keys() != set()
    assert all(torch.equal(tensor, state[name]) for name, tensor in drafter.state().items())
    assert all(
        tensor.dtype == torch.float32 for tensor in load_file(folder / "model.safetensors").values()
    )
    hidden, ids = torch.randn(2, 7, 32), torch.randint(3, 60, (2, 7))
    output = TargetOutput(hidden, ids, ids, torch.arange(7).expand(2, -1), hidden[:, :0])
    target = Target(model)
    for expected, got in zip(
        drafter.states(output, target), again.states(output, target), strict=True
    ):
        assert torch.equal(expected, got)


def test_what_is_not_of_this_model_is_refused(saved):
    _, folder, model = saved()
    assert io.load(str(folder), model)
    with pytest.raises(
        DrafterError, match="was trained for some/base, and this base has other weights"
    ):
        io.load(folder, model, "abd")
    with pytest.raises(
        DrafterError, match="a drafter for some/base, whose hidden_size is 32; this model's is 48"
    ):
        io.load(folder, llama(hidden_size=48))
    with pytest.raises(DrafterError, match=r"of another model or of other settings: .*mlp.*differ"):
        io.load(folder, llama(intermediate_size=64))
    edited(folder, drafter=node("mtp_sequential") | {"offsets": 3})
    with pytest.raises(DrafterError, match=r"of other settings: layers\.2\."):
        io.load(folder, model)


def test_weights_that_are_missing_or_not_finite_are_noticed(saved):
    _, folder, model = saved()
    file = folder / "model.safetensors"
    tensors = load_file(file)
    name = sorted(tensors)[0]
    save_file({key: tensor for key, tensor in tensors.items() if key != name}, file)
    with pytest.raises(DrafterError, match=f"{name} differ"):
        io.load(folder, model)
    spoilt = tensors[name].clone()
    spoilt.view(-1)[0] = torch.nan
    save_file(tensors | {name: spoilt}, file)
    with pytest.raises(DrafterError, match=f"holds NaN or infinite values in {name}"):
        io.load(folder, model)
    file.write_bytes(b"no tensors")
    with pytest.raises(DrafterError, match=r"model\.safetensors cannot be read"):
        io.load(folder, model)
    file.unlink()
    with pytest.raises(DrafterError, match=r"model\.safetensors cannot be read"):
        io.load(folder, model)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"_target_": "os.system"},
            "drafter._target_ is 'os.system'. Only classes that conf/ names are instantiated",
        ),
        # of conf/, and no drafter
        ({"_target_": "trainer.models.tiny.tiny"}, "'trainer.models.tiny.tiny'. Only classes"),
        ({"_target_": ["os.system"]}, "Only classes that conf/ names"),
        (
            {"beta": {"_target_": "os.system", "_args_": ["false"]}},
            "drafter.beta is .*no object may be created there",
        ),
        ({"weights": [{"_target_": "os.system"}]}, "no object may be created there"),
        ({"_args_": ["false"]}, "drafter._args_: there is no such key"),
        ({"_partial_": False}, "drafter._partial_ is False"),
        ({"init": "${oc.env:HOME}"}, "drafter.init is .*must be random | last_layer"),
        ({"offsets": 0}, "drafter.offsets is 0"),
    ],
)
def test_nothing_foreign_is_made(saved, monkeypatch, changes, message):
    _, folder, model = saved()
    monkeypatch.setattr("os.system", lambda command: pytest.fail("was run"))
    edited(folder, drafter=node("mtp_sequential") | changes)
    with pytest.raises(DrafterError, match=message):
        io.load(folder, model)


def test_what_is_no_drafters_folder_says_so(saved, tmp_path):
    _, folder, model = saved()
    with pytest.raises(
        DrafterError, match=r"config\.json cannot be read, so .*none is no drafter's folder"
    ):
        io.load(tmp_path / "none", model)
    for content, message in (
        ("{", "cannot be read"),
        ("[]", "has the format None, and this version of Graft reads 1"),
        ('{"format": 2}', "has the format 2"),
        ('{"format": 1, "drafter": {}}', "must hold the mappings drafter and target"),
    ):
        (folder / "config.json").write_text(content)
        with pytest.raises(DrafterError, match=message):
            io.load(folder, model)
