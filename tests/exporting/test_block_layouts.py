"""Block drafters in the layouts of engines: names by hand, the engines' own rules, and under `slow`
the engines' own code."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.exporting.engines import environments
from tests.exporting.test_engines import (
    DRAFTED,
    EACH,
    ROPE,
    D,
    F,
    V,
    drafter_of,
    model_of,
    own_logits,
    read,
    states_and_ids,
    written,
)
from trainer.drafters import DrafterError, Target, TargetUpdate
from trainer.exporting import block_layouts, draft_head, engines, formats
from trainer.exporting.compare import Mismatch

K, RANK = 4, 6
SMALL = {"offsets": K, "draft_layers": 2, "aux_layers": [1, 2, 3]}


DRAFTS = {"draft_vocab_size": DRAFTED, "coverage": 0.0}


def block_of(name, model, **changes) -> Any:
    rank = {"markov_rank": RANK} if name == "dspark" else {}
    return drafter_of(name, model, **SMALL | rank | changes)


ONE = {
    "self_attn.q_proj": (4 * EACH, D),
    "self_attn.k_proj": (2 * EACH, D),
    "self_attn.v_proj": (2 * EACH, D),
    "self_attn.o_proj": (D, 4 * EACH),
    "self_attn.q_norm": (EACH,),
    "self_attn.k_norm": (EACH,),
    "mlp.gate_proj": (F, D),
    "mlp.up_proj": (F, D),
    "mlp.down_proj": (D, F),
    "input_layernorm": (D,),
    "post_attention_layernorm": (D,),
}


def names(
    layers: int, states: int, rank: int, confidence: bool, drafted: int = V
) -> dict[str, tuple[int, ...]]:
    """As deepseek-ai's checkpoints and speculators' classes have them."""
    shapes = {f"layers.{n}.{name}.weight": s for n in range(layers) for name, s in ONE.items()}
    shapes |= {"fc.weight": (D, states * D), "hidden_norm.weight": (D,), "norm.weight": (D,)}
    shapes |= {"markov_head.markov_w1.weight": (V, rank)}
    shapes |= {"markov_head.markov_w2.weight": (drafted, rank)}
    if drafted < V:
        shapes |= {"lm_head.weight": (drafted, D), "d2t": (drafted,), "t2d": (V,)}
    if confidence:
        shapes |= {
            "confidence_head.proj.weight": (1, D + rank),
            "confidence_head.proj.bias": (1,),
        }
    return shapes


CASES = [
    ("dspark", "llama", "speculators", {}, names(2, 3, RANK, True)),
    ("dspark", "qwen2", "sglang", {}, names(2, 3, RANK, True)),
    ("dspark", "qwen3", "speculators", {"confidence": None}, names(2, 3, RANK, False)),
    ("dspark", "mistral", "sglang", {"draft_layers": 1}, names(1, 3, RANK, True)),
    ("dflash", "mistral", "speculators", {"aux_layers": [0, 4]}, names(2, 2, 16, False)),
    ("dflash", "llama", "sglang", {"draft_layers": 3}, names(3, 3, 16, True)),
    ("dspark", "llama", "speculators", DRAFTS, names(2, 3, RANK, True, DRAFTED)),
    (
        "dflash",
        "qwen3",
        "speculators",
        DRAFTS | {"train_head": True},
        names(2, 3, 16, False, DRAFTED),
    ),
]


@pytest.mark.long
@pytest.mark.parametrize(("name", "kind", "to", "changes", "expected"), CASES)
def test_names_are_the_engines_and_the_files_compute_what_the_drafter_does(
    tmp_path, name, kind, to, changes, expected
):
    model = model_of(kind)
    drafter = block_of(name, model, **changes)
    written(drafter, model, to, tmp_path)
    config, tensors = read(tmp_path)
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == expected
    assert "null" not in json.dumps(config)
    assert config["mask_token_id"] == int(drafter.mask_token)
    assert config["block_size"] == K
    assert config["sample_from_anchor"] is True
    states, ids = states_and_ids(drafter)
    drafted = torch.tensor([7, 1, 30])
    logits = own_logits(drafter, model, states, ids, drafted)
    got = engines.logits(tmp_path, to, model, states, ids[1:], drafted)
    assert logits.shape == (K, config["draft_vocab_size"])
    assert logits.std() > 0.05
    torch.testing.assert_close(got, logits, rtol=0, atol=1e-5)


def test_configs_say_what_engines_guess_differently(tmp_path):
    model = model_of()
    written(block_of("dspark", model), model, "speculators", tmp_path / "nested")
    config, _ = read(tmp_path / "nested")
    assert "model_type" not in config
    assert config["speculators_model_type"] == "dspark"
    assert config["speculators_config"]["verifier"]["name_or_path"] == "org/target"
    (proposal,) = config["speculators_config"]["proposal_methods"]
    assert proposal["speculative_tokens"] == K
    assert config["aux_hidden_state_layer_ids"] == [1, 2, 3]
    layer = config["transformer_layer_config"]
    assert (layer["model_type"], layer["num_hidden_layers"], layer["vocab_size"]) == ("qwen3", 2, V)
    written(block_of("dspark", model), model, "sglang", tmp_path / "flat")
    config, _ = read(tmp_path / "flat")
    assert config["architectures"] == ["Qwen3DSparkModel"]
    # These count layers without the embeddings: vLLM and SGLang add 1.
    assert config["target_layer_ids"] == config["dflash_config"]["target_layer_ids"] == [0, 1, 2]
    assert config["num_target_layers"] == 4
    assert config["rope_theta"] == ROPE["rope_theta"]
    assert config["rope_scaling"] == {k: v for k, v in ROPE.items() if k != "rope_theta"}


def sglang(config, tensors) -> tuple[set[str], list[str]]:
    """(parameters that stay as they were made, names that go nowhere) as SGLang 0.5.23's
    DSparkDraftModel loads a folder; it raises where that does."""
    rank = config["markov_rank"]
    if rank <= 0 or config["markov_head_type"] not in ("vanilla", "gated", "rnn"):
        raise ValueError("DSpark requires markov_rank > 0")
    reads = config["dflash_config"]["target_layer_ids"]
    if any(not 0 <= layer < config["num_target_layers"] for layer in reads):
        raise ValueError("DFLASH target_layer_ids contains an out-of-range layer id")
    parameters = {f"layers.{n}.{part}.weight" for n in range(config["num_hidden_layers"])
                  for part in ("self_attn.qkv_proj", "self_attn.o_proj", "self_attn.q_norm",
                               "self_attn.k_norm", "mlp.gate_up_proj", "mlp.down_proj",
                               "input_layernorm", "post_attention_layernorm")}  # fmt: skip
    parameters |= {"fc.weight", "hidden_norm.weight", "norm.weight"}
    heads = {"markov_head.markov_w1.weight", "markov_head.markov_w2.weight"}
    heads |= {"confidence_head.proj.weight", "confidence_head.proj.bias"}
    loaded, lost = set(), []
    for name, tensor in tensors.items():
        if name.startswith(("lm_head.", "rotary_emb.", "embed_tokens.")):
            continue
        known = re.sub(r"\.[qkv]_proj\.", ".qkv_proj.", name)
        known = re.sub(r"\.(gate|up)_proj\.", ".gate_up_proj.", known)
        if known == "fc.weight" and tensor.shape[1] != len(reads) * config["hidden_size"]:
            raise ValueError("DFLASH fc.weight shape mismatch")
        if known in parameters | heads:
            loaded.add(known)
        elif name.startswith(("markov_head.", "confidence_head.")):
            raise ValueError(f"DSpark unexpected weight {name}")
        else:
            lost.append(name)
    if missing := {name for name in heads if "confidence" in name} - loaded:
        raise ValueError(f"DSpark confidence head is enabled but is missing {sorted(missing)}")
    return (parameters | heads) - loaded, lost


@pytest.mark.parametrize("name", ["dspark", "dflash"])
def test_sglangs_rules_find_every_tensor_of_a_flat_folder(tmp_path, name):
    model = model_of()
    drafter = block_of(name, model)
    written(drafter, model, "sglang", tmp_path)
    config, tensors = read(tmp_path)
    assert sglang(config, tensors) == (set(), [])
    del tensors["confidence_head.proj.bias"]
    with pytest.raises(ValueError, match="is missing"):
        sglang(config, tensors)
    if name == "dflash":  # a Markov head that changes nothing, and tokens that are all verified
        assert not tensors["markov_head.markov_w2.weight"].any()
        assert not tensors["confidence_head.proj.weight"].any()
        bias = read(tmp_path)[1]["confidence_head.proj.bias"]
        assert float(torch.sigmoid(bias.double())) > 1 - 1e-8


DAMAGE: list[tuple[str, Any, str]] = [
    ("fc.weight", None, "fc.weight is missing"),
    ("layers.1.mlp.up_proj.weight", lambda t: t[:, 1:], "of the shape"),
    ("hidden_norm.weight", lambda t: t * torch.nan, "hidden_norm.weight holds NaN"),
    ("embed_tokens.weight", torch.zeros(V, D), "embed_tokens.weight belongs to no module"),
    ("markov_head.markov_w2.weight", lambda t: t + 1, "not what the format needs"),
    ("confidence_head.proj.bias", lambda t: -t, "not what the format needs"),
]


def test_damage_is_found(tmp_path):
    model = model_of()
    head = written(block_of("dflash", model), model, "sglang", tmp_path)
    _, tensors = read(tmp_path)
    for name, damage, reported in DAMAGE:
        spoilt = dict(tensors)
        if damage is None:
            del spoilt[name]
        else:
            spoilt[name] = (damage(tensors[name]) if callable(damage) else damage).contiguous()
        save_file(spoilt, tmp_path / "model.safetensors", {"format": "pt"})
        actual = engines.faults(tmp_path, "sglang", head, torch.float32, model)
        assert reported in actual[0], (name, actual)


REFUSED = [
    ("dspark", "llama", "medusa", {}, {}, "is DSpark or DFlash: to=speculators or to=sglang"),
    ("dspark", "llama", "sglang", {}, {"aux_layers": [0, 2]}, "SGLang counts them from the first"),
    ("dflash", "llama", "sglang", {}, {"aux_layers": [1, 4]}, "SGLang keeps none after the last"),
    ("dspark", "granite", "sglang", {"logits_scaling": 4.0}, {}, "a scale, a cap or a bias"),
    ("dflash", "gemma", "speculators", {}, {}, "scales its embeddings"),
    ("dspark", "llama", "sglang", {}, {"markov": "rnn"}, "markov=rnn, of which .* to=drafter"),
    ("dspark", "llama", "sglang", {}, DRAFTS, "draft vocabulary is not verified here: to=specul"),
]


@pytest.mark.parametrize(("name", "kind", "to", "sizes", "changes", "reported"), REFUSED)
def test_what_a_layout_has_no_place_for_is_refused(
    tmp_path, name, kind, to, sizes, changes, reported
):
    model = model_of(kind, **sizes)
    drafter = block_of(name, model, **changes)
    with pytest.raises(DrafterError, match=reported):
        written(drafter, model, to, tmp_path)


def test_described_before_training_names_the_formats():
    model = model_of()
    fits = "engines load it: to=speculators, to=sglang"
    assert str(draft_head.described(block_of("dspark", model), model)).endswith(fits)


def test_a_runs_block_is_exported_and_held_against_it(train, chats, tmp_path, monkeypatch):
    run = train(
        f"task.path={chats}",
        "base.layers=4",
        "adapter=none",
        "max_steps=2",
        "optimizer.lr=1e-2",
        "callbacks.evaluation=null",
        "drafter=dspark",
        "drafter.offsets=3",
        "drafter.draft_layers=1",
        "drafter.markov_rank=8",
    )
    for to in ("speculators", "sglang"):
        out, difference = formats.export(str(run), to, None, "bfloat16", verifier="org/target")
        assert (out, difference < 1e-4) == (run / to, True)
        assert read(out)[1]["markov_head.markov_w1.weight"].dtype == torch.bfloat16
    out, difference = formats.export(str(run), "drafter", tmp_path / "own", "float32")
    assert difference == 0.0
    real = block_layouts.output_weight
    monkeypatch.setattr(block_layouts, "output_weight", lambda model: real(model).roll(1, 0))
    with pytest.raises(Mismatch, match="the files give other logits than the run's drafter"):
        formats.export(str(run), "sglang", tmp_path / "wrong", "float32")


def inputs(drafter, model, place) -> tuple[Tensor, Tensor]:
    """Write states (T, f) and ids x_0 .. x_{T-1} for the engines. Return own logits (A, K, V), and
    predicted acceptance (A, K - 1), of the blocks at the anchors 1 .. A; a block's tokens are those
    of ids."""
    count, anchors = 17, 11
    states, ids = states_and_ids(drafter, count - 1)
    states = torch.cat([states, torch.zeros(1, states.shape[1])])
    save_file({"states": states, "ids": ids}, place / "in.safetensors")
    rows, sure = [], []
    for a in range(1, 1 + anchors):
        drafted = ids[a + 1 : a + K]
        rows.append(own_logits(drafter, model, states[:a], ids[: a + 1], drafted))
        update = TargetUpdate(states[:a, :D], states[:a], ids[1 : a + 1], ids[0])
        growth = drafter.grow([], Target(model), update)
        for node, token in enumerate(drafted):
            growth.extend(token[None], torch.tensor([node - 1]))
            sure.append(growth.confidence)
    kept = [one for one in sure if one is not None]
    return torch.stack(rows), torch.stack(kept).view(anchors, -1) if kept else torch.zeros(0)


ENGINES = [
    ("dspark", "llama", "speculators", {}),
    ("dspark", "qwen3", "speculators", {"confidence": None, "aux_layers": [0, 2]}),
    ("dflash", "qwen2", "speculators", {"draft_layers": 3}),
    ("dspark", "llama", "speculators", DRAFTS),
]


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("name", "kind", "to", "changes"), ENGINES)
def test_speculators_own_loader_gives_the_drafters_logits(tmp_path, name, kind, to, changes):
    python = environments.python("speculators-0.9.0", environments.SPECULATORS)
    model = model_of(kind)
    drafter = block_of(name, model, **changes)
    model.save_pretrained(tmp_path / "target")
    written(drafter, model, to, tmp_path / "draft", verifier=str(tmp_path / "target"))
    expected, sure = inputs(drafter, model, tmp_path)
    environments.run(
        python, "block_by_speculators.py", tmp_path / "draft", tmp_path / "in.safetensors",
        tmp_path / "out.safetensors", len(expected), place=tmp_path,
    )  # fmt: skip
    got = load_file(tmp_path / "out.safetensors")
    _, tensors = read(tmp_path / "draft")
    tensors.pop("lm_head.weight", None)  # not trained there, and compared by the logits
    assert {n for n in got if n.startswith("weights.")} == {f"weights.{name}" for name in tensors}
    assert all(torch.equal(got[f"weights.{name}"], tensor) for name, tensor in tensors.items())
    torch.testing.assert_close(got["logits"], expected, rtol=0, atol=1e-5)
    if len(sure):
        torch.testing.assert_close(got["confidence"][:, :-1], sure, rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    ("name", "kind", "to", "changes"),
    [*ENGINES, ("dspark", "llama", "sglang", {}), ("dflash", "qwen3", "sglang", {})],
)
def test_vllms_own_model_code_gives_the_drafters_logits(tmp_path, name, kind, to, changes):
    python = environments.python("vllm-0.33.0", environments.VLLM, sources="vllm==0.33.0")
    model = model_of(kind)
    drafter = block_of(name, model, **changes)
    model.save_pretrained(tmp_path / "target")
    written(drafter, model, to, tmp_path / "draft")
    expected, sure = inputs(drafter, model, tmp_path)
    message = environments.run(
        python, "block_by_vllm.py", tmp_path / "target", tmp_path / "draft",
        tmp_path / "in.safetensors", tmp_path / "out.safetensors", len(expected), K,
        place=tmp_path,
    )  # fmt: skip
    actual = json.loads(message.strip().splitlines()[-1])
    assert actual["class"] == "Qwen3DSparkForCausalLM"
    # vLLM gives a draft the target's own of these, and has a mask embedding that none uses.
    shared = ["lm_head.weight"] if drafter.vocabulary is None else []
    assert sorted(actual["empty"]) == [
        *shared,
        "model.embed_tokens.weight",
        "model.mask_embedding",
    ]
    assert actual["reads"] == list(drafter.layers)
    assert actual["causal"] == [False] * len(drafter.blocks)
    assert actual["from_anchor"] is True
    assert actual["mask_token"] == int(drafter.mask_token)
    got = load_file(tmp_path / "out.safetensors")
    ids = torch.arange(V) if drafter.vocabulary is None else drafter.vocabulary
    assert torch.equal(got["ids"], ids)
    torch.testing.assert_close(got["logits"], expected, rtol=0, atol=1e-5)
    if len(sure):
        torch.testing.assert_close(got["confidence"][:, :-1], sure, rtol=0, atol=1e-5)
