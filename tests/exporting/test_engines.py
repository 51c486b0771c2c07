"""Draft heads in the layouts of engines: names by hand, the engines' own rules, and under `slow`
the engines' own code."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import torch
from hydra.utils import get_class
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from tests.conftest import ROOT
from tests.exporting.engines import environments
from trainer import export
from trainer.drafters import DrafterError, Target, eagle3
from trainer.exporting import draft_head, eagle_layouts, engines, formats
from trainer.exporting.compare import Mismatch
from trainer.exporting.heads import draft_logits

D, F, V, EACH, DRAFTED = 32, 48, 96, 8, 20
ROPE = {
    "rope_type": "llama3",
    "rope_theta": 5000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
COUNTS = torch.randint(0, 1000, (V,), generator=torch.Generator().manual_seed(1))
COUNTS[COUNTS.argmin()] = 0  # block drafters take a token that no row trains


def model_of(kind="llama", **changes) -> Any:
    sizes = {
        "vocab_size": V,
        "hidden_size": D,
        "intermediate_size": F,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": EACH,
        "max_position_embeddings": 256,
        "rope_parameters": dict(ROPE),
        "pad_token_id": 0,
        "tie_word_embeddings": False,
    }
    if kind == "mistral":
        sizes["sliding_window"] = None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**sizes | changes)).eval()


def drafter_of(name, model, **changes) -> Any:
    """A drafter as its file of conf/ has it, with weights of which none is as it starts."""
    node: Any = OmegaConf.to_container(OmegaConf.load(ROOT / "conf" / "drafter" / f"{name}.yaml"))
    kind, _ = node.pop("_target_"), node.pop("_partial_")
    if "layer" in node:
        node["layer"] = "target"
    if name == "eagle3":
        node |= {"draft_vocab_size": DRAFTED, "coverage": 0.0, "offsets": 4}
    drafter = get_class(kind)(model=model, **node | changes)
    drafter.calibrate(lambda: COUNTS)
    draw = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in drafter.parameters():
            if parameter.requires_grad:
                parameter += torch.randn(parameter.shape, generator=draw) * (
                    0.2 if parameter.dim() == 1 else parameter.shape[1] ** -0.5
                )
    return drafter.eval()


def written(
    drafter, model, to, folder, dtype=torch.float32, verifier="org/target", copied=False
) -> draft_head.DraftHead:
    draft_head.check(drafter, to, model)
    head = draft_head.canonical(drafter, model, copied)
    folder.mkdir(parents=True, exist_ok=True)
    engines.write(head, to, folder, dtype, verifier)
    assert engines.faults(folder, to, head, dtype, model) == []
    return head


def read(folder) -> tuple[dict[str, Any], dict[str, Tensor]]:
    (file,) = folder.glob("*.safetensors")
    return json.loads((folder / "config.json").read_text()), load_file(file)


def states_and_ids(drafter, count=9) -> tuple[Tensor, Tensor]:
    """States that a drafter reads of its target, and tokens x_0 .. x_count."""
    draw = torch.Generator().manual_seed(5)
    return torch.randn(count, max(1, len(drafter.layers)) * D, generator=draw), torch.randint(
        0, V, (count + 1,), generator=draw
    )


def own_logits(drafter, model, states, ids, drafted) -> Tensor:
    with torch.no_grad():
        return draft_logits(drafter, Target(model), states, ids, drafted)


LAYER = {
    "self_attn.q_proj": (4 * EACH, 2 * D),
    "self_attn.k_proj": (2 * EACH, 2 * D),
    "self_attn.v_proj": (2 * EACH, 2 * D),
    "self_attn.o_proj": (D, 4 * EACH),
    "mlp.gate_proj": (F, D),
    "mlp.up_proj": (F, D),
    "mlp.down_proj": (D, F),
    "input_layernorm": (D,),
    "hidden_norm": (D,),
    "post_attention_layernorm": (D,),
}
AROUND = {
    "fc.weight": (D, 3 * D),
    "norm.weight": (D,),
    "lm_head.weight": (DRAFTED, D),
    "d2t": (DRAFTED,),
    "t2d": (V,),
}
NARROW = {
    name: (shape[0], D) if re.search("[qkv]_proj", name) else shape
    for name, shape in LAYER.items()
    if name not in ("input_layernorm", "hidden_norm")
}
MEDUSA = {
    f"{i}.0.linear.{kind}": (D, D) if kind == "weight" else (D,)
    for i in range(5)
    for kind in ("weight", "bias")
}
CASES = [
    (
        "eagle3",
        "llama",
        "speculators",
        {},
        {f"layers.0.{n}.weight": s for n, s in LAYER.items()}
        | AROUND
        | {"embed_tokens.weight": (V, D)},
    ),
    (
        "eagle3",
        "qwen2",
        "sglang",
        {},
        {f"midlayer.{n}.weight": s for n, s in LAYER.items()} | AROUND,
    ),
    (
        "eagle3",
        "qwen3",
        "speculators",
        {"fc_norm": True, "norm_output": True, "train_head": False},
        {f"layers.0.{n}.weight": s for n, s in LAYER.items()}
        | AROUND
        | {
            "embed_tokens.weight": (V, D),
            **{f"layers.0.self_attn.{x}_norm.weight": (EACH,) for x in "qk"},
        }
        | {f"fc_norm.{i}.weight": (D,) for i in range(3)},
    ),
    (
        "eagle3",
        "mistral",
        "sglang",
        {"draft_vocab_size": None, "aux_layers": [0, 1, 2, 3]},
        {f"midlayer.{n}.weight": s for n, s in LAYER.items()}
        | {"fc.weight": (D, 4 * D), "norm.weight": (D,), "lm_head.weight": (V, D)},
    ),
    (
        "eagle",
        "llama",
        "sglang",
        {},
        {f"layers.0.{n}.weight": s for n, s in NARROW.items()}
        | {"fc.weight": (D, 2 * D), "fc.bias": (D,), "embed_tokens.weight": (V, D)},
    ),
    ("mtp_medusa", "qwen2", "medusa", {"offsets": 5}, MEDUSA),
    ("medusa", "llama", "medusa", {}, MEDUSA | {f"{i}.1.weight": (V, D) for i in range(5)}),
]


@pytest.mark.parametrize(("name", "kind", "to", "changes", "names"), CASES)
def test_a_layouts_names_are_the_engines_and_its_files_compute_what_the_drafter_does(
    tmp_path, name, kind, to, changes, names
):
    model = model_of(kind)
    drafter = drafter_of(name, model, **changes)
    written(drafter, model, to, tmp_path)
    config, tensors = read(tmp_path)
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == names
    assert {str(t.dtype) for n, t in tensors.items() if n not in ("d2t", "t2d")} == {
        "torch.float32"
    }
    assert "null" not in json.dumps(config)
    if "d2t" in tensors:
        assert (tensors["d2t"].dtype, tensors["t2d"].dtype) == (torch.int64, torch.bool)
        ids = [i + int(offset) for i, offset in enumerate(tensors["d2t"])]
        assert ids == sorted(set(ids)) == [i for i, drafted in enumerate(tensors["t2d"]) if drafted]
        assert set(ids) == set(sorted(range(V), key=lambda i: -int(COUNTS[i]))[:DRAFTED])
    states, ids = states_and_ids(drafter)
    drafted = torch.tensor([7, 1, 30, 2])[: drafter.depth - 1]
    expected = own_logits(drafter, model, states, ids, drafted)
    got = engines.logits(tmp_path, to, model, states, ids[1:], drafted)
    assert expected.std() > 0.05
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


def test_a_config_of_speculators_says_everything_that_engines_guess_differently(tmp_path):
    model = model_of(rope_parameters={"rope_type": "default", "rope_theta": 1e4})
    written(drafter_of("eagle3", model, norm_output=True), model, "speculators", tmp_path)
    config, _ = read(tmp_path)
    assert "model_type" not in config
    assert config["speculators_config"]["verifier"] == {
        "name_or_path": "org/target",
        "architectures": ["LlamaForCausalLM"],
    }
    assert config["speculators_config"]["proposal_methods"] == [
        {
            "proposal_type": "greedy",
            "speculative_tokens": 4,
            "verifier_accept_k": 1,
            "accept_tolerance": 0.0,
        }
    ]
    assert {
        key: config[key]
        for key in ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output")
    } == {
        "norm_before_residual": False,
        "norm_before_fc": False,
        "fc_norm": False,
        "norm_output": True,
    }
    assert config["eagle_aux_hidden_state_layer_ids"] == [1, 2, 3]
    layer = config["transformer_layer_config"]
    assert (layer["model_type"], layer["num_hidden_layers"], layer["vocab_size"]) == ("llama", 1, V)
    assert "num_aux_hidden_states" not in layer
    written(drafter_of("eagle3", model, aux_layers=[1, 3]), model, "speculators", tmp_path)
    assert read(tmp_path)[0]["transformer_layer_config"]["num_aux_hidden_states"] == 2


def sglang(config, tensors) -> tuple[set[str], set[str], Tensor | None]:
    """(parameters that stay as they were made, tensors that go nowhere, target ids of the drafted
    tokens) as SGLang 0.5.23 loads a draft: it drops what it does not know, and what
    is not there."""
    third = config["architectures"][0] == "LlamaForCausalLMEagle3"
    layer = [
        "self_attn.qkv_proj",
        "self_attn.o_proj",
        "mlp.gate_up_proj",
        "mlp.down_proj",
        "post_attention_layernorm",
    ]
    layer += ["input_layernorm", "hidden_norm"] if third else []
    parameters = {f"model.layers.0.{name}.weight" for name in layer} | {
        "model.embed_tokens.weight",
        "model.fc.weight",
        "lm_head.weight",
    }
    parameters |= {"model.norm.weight"} if third else {"model.fc.bias"}
    if config.get("fc_norm"):
        parameters |= {f"model.fc_norm.{i}.weight" for i in range(config["num_aux_hidden_states"])}
    stacked = [
        ("qkv_proj", "q_proj"),
        ("qkv_proj", "k_proj"),
        ("qkv_proj", "v_proj"),
        ("gate_up_proj", "gate_proj"),
        ("gate_up_proj", "up_proj"),
    ]
    loaded, lost, drafted = set(), set(), None
    for name, tensor in tensors.items():
        known = name.replace("midlayer", "layers.0")
        if third and "d2t" in known:
            drafted = tensor + torch.arange(len(tensor))
            continue
        if third and "t2d" in known:
            continue
        for whole, part in stacked:
            known = known.replace(f".{part}", f".{whole}")
        known = known if known in parameters else f"model.{known}"
        (loaded if known in parameters else lost).add(known if known in parameters else name)
    return parameters - loaded, lost, drafted


@pytest.mark.parametrize("name", ["eagle3", "eagle"])
def test_sglangs_rules_find_every_tensor_of_a_flat_folder(tmp_path, name):
    model = model_of()
    drafter = drafter_of(name, model, **({"fc_norm": True} if name == "eagle3" else {}))
    written(drafter, model, "sglang", tmp_path)
    config, tensors = read(tmp_path)
    missing, lost, drafted = sglang(config, tensors)
    # SGLang gives the draft the target's embedding, and an EAGLE-1 its output layer.
    assert (missing, lost) == (
        {"model.embed_tokens.weight"} if name == "eagle3" else {"lm_head.weight"},
        set(),
    )
    assert config["tie_word_embeddings"] is False
    assert (config["model_type"], config["num_hidden_layers"], config["vocab_size"]) == (
        "llama",
        1,
        V,
    )
    assert not config.get("bias")  # SGLang and vLLM would give q, k and v one
    # A server whose transformers is older.
    assert config["rope_theta"] == ROPE["rope_theta"]
    assert config["rope_scaling"] == {
        key: value for key, value in ROPE.items() if key != "rope_theta"
    }
    if name == "eagle":
        assert not tensors["fc.bias"].any()
        # what vLLM makes of it
        assert [f"Eagle{one}" for one in config["architectures"]][1] == "EagleLlamaForCausalLM"
        return
    assert drafted is not None
    assert torch.equal(drafted, drafter.vocabulary)
    # as SGLang counts
    captured = [layer + 1 for layer in config["eagle_config"]["eagle_aux_hidden_state_layer_ids"]]
    # as vLLM counts
    assert captured == config["eagle_aux_hidden_state_layer_ids"] == list(drafter.layers)


def test_medusas_file_is_what_tgi_reads(tmp_path):
    model = model_of()
    drafter = drafter_of("mtp_medusa", model, offsets=2)
    head = written(drafter, model, "medusa", tmp_path / "shared", verifier="org/target")
    config, tensors = read(tmp_path / "shared")
    assert (tmp_path / "shared" / "medusa_lm_head.safetensors").exists()
    assert config == {
        "medusa_num_heads": 2,
        "medusa_num_layers": 1,
        "base_model_name_or_path": "org/target",
        "version": "2",
    }
    written(drafter, model, "medusa", tmp_path / "copied", torch.bfloat16, copied=True)
    _, full = read(tmp_path / "copied")
    output = model.get_output_embeddings().weight.to(torch.bfloat16)
    assert full.keys() - tensors.keys() == {"0.1.weight", "1.1.weight"}
    assert torch.equal(full["0.1.weight"], output)
    assert torch.equal(full["1.1.weight"], output)
    states, ids = states_and_ids(drafter)
    with_own = engines.logits(tmp_path / "copied", "medusa", model, states, ids[1:], ids[:1])
    without = engines.logits(tmp_path / "shared", "medusa", model, states, ids[1:], ids[:1])
    torch.testing.assert_close(with_own, without, rtol=0, atol=0.05)
    assert len(head.own) == 4


DAMAGE: list[tuple[str, Any, str]] = [
    ("fc.weight", None, "fc.weight is missing"),
    (
        "layers.0.self_attn.q_proj.bias",
        torch.zeros(D),
        "layers.0.self_attn.q_proj.bias belongs to no module",
    ),
    ("fc.weight", torch.zeros(D, 2 * D), r"fc.weight is of the shape \(32, 64\), not \(32, 96\)"),
    (
        "norm.weight",
        torch.ones(D, dtype=torch.float16),
        "norm.weight is torch.float16, not torch.float32",
    ),
    ("norm.weight", torch.full((D,), torch.nan), "norm.weight holds NaN"),
    # ids in place of offsets
    ("d2t", lambda t: t["t2d"].nonzero()[:, 0], "d2t and t2d name different tokens"),
    ("d2t", lambda t: t["d2t"].flip(0), "not ascending"),
    ("t2d", lambda t: t["t2d"].roll(1), "d2t and t2d name different tokens"),
    ("t2d", lambda t: t["t2d"].to(torch.uint8), "t2d is torch.uint8, not torch.bool"),
    (
        "lm_head.weight",
        lambda t: t["lm_head.weight"].roll(1, 0),
        "lm_head.weight is not the target's",
    ),
    (
        "embed_tokens.weight",
        lambda t: t["embed_tokens.weight"] + 1e-3,
        "embed_tokens.weight is not the target's",
    ),
]


def test_damage_is_found(tmp_path):
    model = model_of()
    head = written(drafter_of("eagle3", model, train_head=False), model, "speculators", tmp_path)
    _, tensors = read(tmp_path)
    for name, damage, reported in DAMAGE:
        spoilt = dict(tensors)
        if damage is None:
            del spoilt[name]
        else:
            spoilt[name] = damage(tensors) if callable(damage) else damage
        save_file(spoilt, tmp_path / "model.safetensors", {"format": "pt"})
        (actual,) = engines.faults(tmp_path, "speculators", head, torch.float32, model)[:1]
        assert re.search(reported, actual), (name, actual)
    # A trained output layer may differ.
    again = tmp_path / "trained"
    head = written(drafter_of("eagle3", model), model, "speculators", again)
    assert not torch.equal(read(again)[1]["lm_head.weight"], tensors["lm_head.weight"])


REFUSED = [
    ("hydra", "llama", "medusa", {}, {}, "there is no writer for Hydra"),
    (
        "mtp_sequential",
        "llama",
        "speculators",
        {},
        {},
        "there is no writer for SequentialModules.*to=mtp",
    ),
    (
        "eagle",
        "llama",
        "speculators",
        {},
        {},
        "to=speculators is a format of EAGLE-3, .* and this drafter is EAGLE-1: to=sglang",
    ),
    ("mtp_medusa", "llama", "sglang", {}, {}, "this drafter is Medusa: to=medusa"),
    ("eagle3", "llama", "medusa", {}, {}, "this drafter is EAGLE-3: to=speculators or to=sglang"),
    (
        "eagle3",
        "gemma",
        "speculators",
        {},
        {},
        "of Llama's and Qwen3's kind, and this one is of gemma's",
    ),
    ("eagle", "qwen2", "sglang", {}, {}, r"layers\.0\.self_attn\.k_proj\.bias is a bias"),
    (
        "eagle3",
        "qwen3",
        "sglang",
        {},
        {},
        "drops those norms without a message: to=speculators, for vLLM, has them",
    ),
    ("eagle", "qwen3", "sglang", {}, {}, "drops those norms without a message"),
    (
        "eagle3",
        "mistral",
        "speculators",
        {"sliding_window": 8},
        {},
        r"of the kind sliding_attention \(window 8\)",
    ),
    (
        "eagle3",
        "llama",
        "sglang",
        {},
        {"aux_layers": [1, 4]},
        "it reads the target's states 1, 4, and SGLang keeps none",
    ),
    ("eagle3", "llama", "sglang", {"hidden_act": "gelu"}, {}, "activation is gelu"),
    (
        "eagle3",
        "llama",
        "sglang",
        {"rope_parameters": ROPE | {"partial_rotary_factor": 0.5}},
        {},
        "does not rotate all of a head",
    ),
]


@pytest.mark.parametrize(("name", "kind", "to", "sizes", "changes", "reported"), REFUSED)
def test_what_a_layout_has_no_place_for_is_refused(
    name, kind, to, sizes, changes, reported, monkeypatch
):
    # Llama's code cannot run with some of these sizes.
    monkeypatch.setattr(eagle3, "check_states", lambda *_: None)
    model = model_of(kind, **sizes)
    drafter = drafter_of(name, model, **changes)
    with pytest.raises(DrafterError, match=reported):
        draft_head.check(drafter, to, model)


def test_logits_and_copies_that_have_no_place_are_refused():
    granite = model_of("granite", logits_scaling=4.0)
    heads = drafter_of("mtp_medusa", granite)
    with pytest.raises(
        DrafterError, match="logits are not its output layer's weight times the hidden states alone"
    ):
        draft_head.canonical(heads, granite)
    model = model_of()
    with pytest.raises(DrafterError, match="already has an output layer"):
        draft_head.canonical(drafter_of("medusa", model), model, copied=True)
    with pytest.raises(DrafterError, match="is for Medusa's heads"):
        draft_head.canonical(drafter_of("eagle", model), model, copied=True)


def test_a_runs_head_is_exported_and_held_against_it(train, chats, tmp_path, monkeypatch, capsys):
    sizes = [
        "base.layers=4",
        "adapter=none",
        "max_steps=2",
        "optimizer.lr=1e-2",
        "callbacks.evaluation=null",
    ]
    head = [
        "drafter=eagle3",
        "drafter.draft_vocab_size=40",
        "drafter.coverage=0",
        "drafter.offsets=2",
    ]
    run = train(f"task.path={chats}", *sizes, *head)
    for to in ("speculators", "sglang"):
        out, difference = formats.export(str(run), to, None, "bfloat16", verifier="org/target")
        assert (out, difference < 1e-4) == (run / to, True)
        _, tensors = read(out)
        assert tensors["fc.weight"].dtype == torch.bfloat16
    wrong = tmp_path / "wrong"
    real = eagle_layouts._layer
    monkeypatch.setattr(eagle_layouts, "_layer", lambda *args: real(*args).roll(1, -1))
    with pytest.raises(Mismatch, match="the files give other logits than the run's drafter"):
        formats.export(str(run), "sglang", wrong, "float32")
    monkeypatch.setitem(
        engines._WRITERS,
        "sglang",
        lambda *_: ({"fc.weight": torch.ones(1)}, read(run / "sglang")[0]),
    )
    with pytest.raises(
        Mismatch, match="the export is not what to=sglang should have written: d2t is missing"
    ):
        formats.export(str(run), "sglang", wrong, "float32")
    assert not list(tmp_path.glob("*wrong*"))
    assert export.main([f"run={run}", "to=medusa"]) == 2
    assert "this drafter is EAGLE-3: to=speculators or to=sglang" in capsys.readouterr().err


def inputs(drafter, model, place) -> list[Tensor]:
    """Writes states and ids for the engines; own logits (T - 2, v) of three steps of which each is
    states_and_ids the next of the ids."""
    states, ids = states_and_ids(drafter, 12)
    save_file({"states": states, "ids": ids[1:].contiguous()}, place / "in.safetensors")
    rows = [
        own_logits(drafter, model, states[:n], ids[: n + 1], ids[n + 1 : n + 3])
        for n in range(1, 11)
    ]
    return list(torch.stack(rows, 1))


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("llama", {}),
        ("llama", {"fc_norm": True, "norm_output": True, "draft_vocab_size": None}),
        ("qwen3", {"aux_layers": [0, 1, 2, 3], "train_head": False}),
    ],
)
def test_speculators_own_loader_gives_the_drafters_logits(tmp_path, kind, changes):
    python = environments.python("speculators-0.9.0", environments.SPECULATORS)
    model = model_of(kind)
    drafter = drafter_of("eagle3", model, **changes)
    model.save_pretrained(tmp_path / "target")
    written(drafter, model, "speculators", tmp_path / "draft", verifier=str(tmp_path / "target"))
    expected = inputs(drafter, model, tmp_path)
    out = tmp_path / "out.safetensors"
    environments.run(
        python,
        "by_speculators.py",
        tmp_path / "draft",
        tmp_path / "in.safetensors",
        out,
        place=tmp_path,
    )
    got = load_file(out)
    _, tensors = read(tmp_path / "draft")
    assert {name for name in got if name != "logits"} == {f"weights.{name}" for name in tensors}
    assert all(torch.equal(got[f"weights.{name}"], tensor) for name, tensor in tensors.items())
    for k, rows in enumerate(expected):
        torch.testing.assert_close(got["logits"][k, :10], rows, rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    ("name", "kind", "to", "changes"),
    [
        ("eagle3", "llama", "speculators", {"fc_norm": True, "norm_output": True}),
        ("eagle3", "llama", "speculators", {"aux_layers": [0, 1, 2, 3], "draft_vocab_size": None}),
        ("eagle3", "qwen3", "speculators", {"train_head": False}),
        ("eagle3", "qwen2", "sglang", {"norm_output": True}),
        ("eagle", "llama", "sglang", {}),
    ],
)
def test_vllms_own_model_code_gives_the_drafters_logits(tmp_path, name, kind, to, changes):
    python = environments.python("vllm-0.33.0", environments.VLLM, sources="vllm==0.33.0")
    model = model_of(kind)
    drafter = drafter_of(name, model, **changes)
    model.save_pretrained(tmp_path / "target")
    written(drafter, model, to, tmp_path / "draft")
    expected = inputs(drafter, model, tmp_path)
    out = tmp_path / "out.safetensors"
    places = (tmp_path / "target", tmp_path / "draft")
    message = environments.run(
        python, "by_vllm.py", *places, name, 3, tmp_path / "in.safetensors", out, place=tmp_path
    )
    actual = json.loads(message.strip().splitlines()[-1])
    family = "Qwen3" if kind == "qwen3" else "Llama"
    built = {"eagle": "EagleLlamaForCausalLM", "eagle3": f"Eagle3{family}ForCausalLM"}[name]
    assert actual["class"] == built
    # A flat EAGLE-3 has no embedding: vLLM gives it the target's.
    assert actual["empty"] == (
        ["model.embed_tokens.weight"] if (name, to) == ("eagle3", "sglang") else []
    )
    if name == "eagle3":
        assert actual["config"] == {
            "eagle_aux_hidden_state_layer_ids": list(drafter.layers),
            "norm_before_residual": False,
            "norm_output": drafter.norm_output,
            "fc_norm": bool(changes.get("fc_norm")),
            "draft_vocab_size": V if drafter.vocabulary is None else DRAFTED,
        }
    got = load_file(out)
    torch.testing.assert_close(got["logits"][:10], expected[0], rtol=0, atol=1e-5)
