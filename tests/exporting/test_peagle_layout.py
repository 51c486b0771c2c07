"""P-EAGLE in the layout of speculators and vLLM: names by hand, and under `slow` the engines' own
code."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.exporting.engines import environments
from tests.exporting.test_engines import (
    AROUND,
    DRAFTED,
    EACH,
    LAYER,
    NARROW,
    D,
    V,
    drafter_of,
    model_of,
    own_logits,
    read,
    states_and_ids,
    written,
)
from trainer.drafters import DrafterError
from trainer.exporting import draft_head, engines, formats

K = 4


def peagle_of(model, **changes) -> Any:
    settings = {"offsets": K, "draft_layers": 2, "draft_vocab_size": DRAFTED, "coverage": 0.0}
    return drafter_of("peagle", model, **settings | changes)


def names(layers: int, states: int, more: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    shapes = {f"layers.0.{name}.weight": shape for name, shape in LAYER.items()}
    narrow = NARROW | {"input_layernorm": (D,)}
    for n in range(1, layers):
        shapes |= {f"layers.{n}.{name}.weight": shape for name, shape in narrow.items()}
    around = AROUND | {"fc.weight": (D, states * D), "mask_hidden": (1, 1, states * D)}
    return shapes | around | {"embed_tokens.weight": (V, D)} | more


NORMS = {f"layers.{n}.self_attn.{x}_norm.weight": (EACH,) for n in range(2) for x in "qk"}


@pytest.mark.long
@pytest.mark.parametrize(
    ("kind", "changes", "expected"),
    [
        ("llama", {}, names(2, 3, {})),
        ("qwen3", {"train_head": False}, names(2, 3, NORMS)),
        ("qwen2", {"draft_layers": 3, "aux_layers": [0, 1, 2, 3]}, names(3, 4, {})),
        ("mistral", {"draft_layers": 1}, names(1, 3, {})),
    ],
)
def test_names_are_the_engines_and_the_files_compute_what_the_drafter_does(
    tmp_path, kind, changes, expected
):
    model = model_of(kind)
    drafter = peagle_of(model, layer="auto", **changes)
    written(drafter, model, "speculators", tmp_path)
    config, tensors = read(tmp_path)
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == expected
    assert "null" not in json.dumps(config)
    assert config["speculators_model_type"] == config["speculators_config"]["algorithm"] == "peagle"
    assert config["mask_token_id"] == int(drafter.mask_token)
    (proposal,) = config["speculators_config"]["proposal_methods"]
    assert proposal["speculative_tokens"] == K
    assert config["transformer_layer_config"]["num_hidden_layers"] == 1 + len(drafter.more)
    states, ids = states_and_ids(drafter)
    drafted = torch.tensor([7, 1, 30])
    logits = own_logits(drafter, model, states, ids, drafted)
    got = engines.logits(tmp_path, "speculators", model, states, ids[1:], drafted)
    assert logits.shape == (K, DRAFTED)
    assert logits.std() > 0.05
    torch.testing.assert_close(got, logits, rtol=0, atol=1e-5)


def test_what_the_layout_has_no_place_for_is_refused():
    model = model_of()
    with pytest.raises(DrafterError, match="leaves out P-EAGLE's fc_norm"):
        draft_head.check(peagle_of(model, fc_norm=True), "speculators", model)
    with pytest.raises(DrafterError, match="this drafter is P-EAGLE: to=speculators"):
        draft_head.check(peagle_of(model), "sglang", model)
    fits = "engines load it: to=speculators"
    assert str(draft_head.described(peagle_of(model), model)).endswith(fits)


def test_a_runs_head_is_exported_and_held_against_it(train, chats, tmp_path):
    run = train(
        f"task.path={chats}",
        "base.layers=4",
        "adapter=none",
        "max_steps=2",
        "optimizer.lr=1e-2",
        "callbacks.evaluation=null",
        "drafter=peagle",
        "drafter.offsets=3",
        "drafter.draft_layers=2",
        "drafter.draft_vocab_size=40",
        "drafter.coverage=0",
    )
    out, difference = formats.export(str(run), "speculators", None, "bfloat16", "org/target")
    assert (out, difference < 1e-4) == (run / "speculators", True)
    assert read(out)[1]["mask_hidden"].dtype == torch.bfloat16
    _, difference = formats.export(str(run), "drafter", tmp_path / "own", "float32")
    assert difference == 0.0


def inputs(drafter, model, place, anchors: int) -> Tensor:
    """Write states (T, f) and ids x_1 .. x_T for the engines. Return own logits (A, K, v) of the
    drafts after the positions 0 .. A - 1."""
    states, ids = states_and_ids(drafter, 12)
    save_file({"states": states, "ids": ids[1:].contiguous()}, place / "in.safetensors")
    drafted = torch.zeros(K - 1, dtype=torch.long)
    rows = [
        own_logits(drafter, model, states[: a + 1], ids[: a + 2], drafted) for a in range(anchors)
    ]
    return torch.stack(rows)


ENGINES = [
    ("llama", {}),
    ("qwen3", {"train_head": False, "aux_layers": [0, 1, 2, 3], "draft_layers": 3}),
]


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("kind", "changes"), ENGINES)
def test_speculators_own_loader_gives_the_drafters_logits(tmp_path, kind, changes):
    python = environments.python("speculators-0.9.0", environments.SPECULATORS)
    model = model_of(kind)
    drafter = peagle_of(model, **changes)
    model.save_pretrained(tmp_path / "target")
    folder, out = tmp_path / "draft", tmp_path / "out.safetensors"
    written(drafter, model, "speculators", folder, verifier=str(tmp_path / "target"))
    expected = inputs(drafter, model, tmp_path, 6)
    places = (folder, tmp_path / "in.safetensors", out)
    environments.run(python, "peagle_by_speculators.py", *places, 6, K, place=tmp_path)
    got = load_file(out)
    _, tensors = read(folder)
    assert {n for n in got if n.startswith("weights.")} == {f"weights.{name}" for name in tensors}
    assert all(torch.equal(got[f"weights.{name}"], tensor) for name, tensor in tensors.items())
    torch.testing.assert_close(got["logits"], expected, rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("kind", "changes"), ENGINES)
def test_vllms_own_model_code_gives_the_drafters_logits(tmp_path, kind, changes):
    python = environments.python("vllm-0.33.0", environments.VLLM, sources="vllm==0.33.0")
    model = model_of(kind)
    drafter = peagle_of(model, **changes)
    model.save_pretrained(tmp_path / "target")
    written(drafter, model, "speculators", tmp_path / "draft")
    expected = inputs(drafter, model, tmp_path, 6)
    out = tmp_path / "out.safetensors"
    places = (tmp_path / "target", tmp_path / "draft", tmp_path / "in.safetensors", out)
    message = environments.run(python, "peagle_by_vllm.py", *places, 6, K, place=tmp_path)
    actual = json.loads(message.strip().splitlines()[-1])
    family = "Qwen3" if kind == "qwen3" else "Llama"
    assert actual["class"] == f"Eagle3{family}ForCausalLM"
    # vLLM makes a norm for states that only the first layer reads.
    later = range(1, 1 + len(drafter.more))
    assert actual["empty"] == [f"model.layers.{n}.hidden_norm.weight" for n in later]
    assert actual["pard_token"] == int(drafter.mask_token)
    assert actual["reads"] == list(drafter.layers)
    torch.testing.assert_close(load_file(out)["logits"], expected, rtol=0, atol=1e-5)
