"""Drafters as MTP layers of their target's family, read back by transformers' own loader and run by
its own loop."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.toys.heads import llama, make, stirred
from tests.toys.mtp_bases import KINDS, names_of, tiny_of
from trainer.drafters import DrafterError
from trainer.exporting import mtp_layers


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_transformers_own_mtp_layer_is_the_drafter(tmp_path, kind):
    model = tiny_of(kind)
    drafter = stirred(make("sequential", model, offsets=1))
    with torch.no_grad():
        for name, buffer in drafter.named_buffers():
            if "bias" in name:
                # an expert bias is no parameter, and has to arrive all the same
                buffer.add_(torch.arange(len(buffer)) * 0.1)
    mtp_layers.check(drafter, model)
    model.save_pretrained(tmp_path)
    mtp_layers.append(tmp_path, mtp_layers.tensors(drafter, model, torch.float32), {})

    loaded, notes = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not notes["missing_keys"]
    assert not notes["unexpected_keys"]
    ids = torch.randint(3, 64, (2, 14), generator=torch.Generator().manual_seed(1))
    expected, got = (
        mtp_layers.own_logits(drafter, model, ids),
        mtp_layers.transformers_logits(loaded.eval(), ids),
    )
    assert expected.shape == (2, 13, 64)
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-5)
    assert expected.std() > 0.05
    with torch.no_grad():
        next(drafter.parameters()).mul_(1.5)
    assert (mtp_layers.own_logits(drafter, model, ids) - expected).abs().max() > 1e-3
    if loaded._is_stateful:
        with pytest.raises(ValueError, match="not supported with stateful models"):
            loaded.generate(ids[:1], max_new_tokens=4, use_mtp=True)
    else:
        limits = {"max_new_tokens": 6, "do_sample": False}
        assert torch.equal(
            loaded.generate(ids[:1], use_mtp=True, **limits), loaded.generate(ids[:1], **limits)
        )


@pytest.mark.long
def test_the_names_and_keys_are_the_families_own(tmp_path):
    """Names as in the released files, which vLLM's and SGLang's loaders ask for."""
    for kind, offsets in (("glm4_moe", 1), ("qwen3_5_text", 3)):
        model = tiny_of(kind)
        drafter = stirred(make("shared", model, offsets=offsets))
        mtp_layers.check(drafter, model)
        folder = tmp_path / kind
        model.save_pretrained(folder)
        whole = load_file(folder / "model.safetensors")
        mtp_layers.append(folder, mtp_layers.tensors(drafter, model, torch.bfloat16), {})
        extra = names_of(folder).keys() - whole.keys()
        block = {"input_layernorm.weight", "post_attention_layernorm.weight"}
        if kind == "glm4_moe":
            own = {"enorm.weight", "hnorm.weight", "eh_proj.weight", "shared_head.norm.weight"}
            own |= {
                "embed_tokens.weight",
                "shared_head.head.weight",
                "mlp.gate.weight",
                "mlp.gate.e_score_correction_bias",
            }
            own |= {
                f"mlp.experts.{i}.{part}_proj.weight"
                for i in range(4)
                for part in ("gate", "up", "down")
            }
            own |= {f"mlp.shared_experts.{part}_proj.weight" for part in ("gate", "up", "down")}
            own |= block | {f"self_attn.{part}_proj.weight" for part in "qkvo"}
            assert extra == {f"model.layers.46.{name}" for name in own}
            assert json.loads((folder / "config.json").read_text())["num_nextn_predict_layers"] == 1
        else:
            own = {
                "fc.weight",
                "norm.weight",
                "pre_fc_norm_embedding.weight",
                "pre_fc_norm_hidden.weight",
            }
            inner = block | {
                f"self_attn.{part}.weight"
                for part in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")
            }
            inner |= {f"mlp.{part}_proj.weight" for part in ("gate", "up", "down")}
            assert extra == {f"mtp.{name}" for name in own} | {
                f"mtp.layers.0.{name}" for name in inner
            }
            config = json.loads((folder / "config.json").read_text())
            assert (config["num_mtp_layers"], config["mtp_num_hidden_layers"]) == (1, 1)
            assert config["mtp_layer_types"] == ["full_attention"]
        with safe_open(folder / "model-00002-of-00002.safetensors", "pt") as stream:
            assert set(stream.keys()) == extra
            dtypes = {name: stream.get_tensor(name).dtype for name in extra}
        assert {name for name, dtype in dtypes.items() if dtype != torch.bfloat16} == {
            name for name in extra if name.endswith("correction_bias")
        }
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        there = [load_file(folder / file) for file in set(names_of(folder).values())]
        assert index["metadata"]["total_size"] == sum(
            t.nbytes for tensors in there for t in tensors.values()
        )


def test_what_is_no_mtp_layer_of_the_family_says_why():
    model = llama()
    with pytest.raises(
        DrafterError,
        match=r"this run has no drafter. Use to=drafter, and decode with graft speculate",
    ):
        mtp_layers.check(None, model)
    with pytest.raises(
        DrafterError, match="ParallelHeads, which is not decoder layers one after another"
    ):
        mtp_layers.check(make("parallel", model), model)
    with pytest.raises(
        DrafterError,
        match=r"LlamaForCausalLM \(llama\) has no MTP layers in transformers.*glm4_moe",
    ):
        mtp_layers.check(make("shared", model), model)
    with pytest.raises(
        DrafterError, match=r"this drafter has 3: .*Train drafter=mtp_shared or drafter.offsets=1"
    ):
        mtp_layers.check(make("sequential", model), model)
    short = tiny_of("glm4_moe", num_hidden_layers=2, first_k_dense_replace=1)
    with pytest.raises(
        DrafterError,
        match=r"under model\\\.layers\\\.46\.\*, .*92.* only, and this model has 2 layers",
    ):
        mtp_layers.check(make("shared", short), short)
    dense = tiny_of("glm4_moe", first_k_dense_replace=46)
    with pytest.raises(
        DrafterError,
        match="last layer, which the drafter copies, has other tensors than its MTP layers",
    ):
        mtp_layers.check(make("shared", dense), dense)


def test_the_mtp_layers_of_files_are_found_by_their_names(tmp_path):
    names = [
        "model.layers.1.mlp.weight",
        "model.layers.2.enorm.weight",
        "model.layers.2.mlp.weight",
        "mtp.fc.weight",
        "model.mtp.norm.weight",
        "model.language_model.layers.3.eh_proj.weight",
        "model.mtp_layers.0.w",
        "model.visual.layers.9.weight",
        "lm_head.weight",
        "vision_model.encoder.layers.7.w",
        "model.smtp.w",
    ]
    save_file(
        {
            name: torch.randn(2, generator=torch.Generator().manual_seed(i))
            for i, name in enumerate(names)
        },
        tmp_path / "one",
    )
    (tmp_path / "one").rename(tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(
        '{"text_config": {"mtp_num_hidden_layers": 1, "num_hidden_layers": 2}}'
    )
    actual, settings = mtp_layers.left_out(tmp_path, 2, tmp_path / "none")
    assert sorted(actual) == sorted([*names[1:7]])
    assert all(
        torch.equal(tensor, load_file(tmp_path / "model.safetensors")[name])
        for name, tensor in actual.items()
    )
    assert settings == {"mtp_num_hidden_layers": 1}
    assert mtp_layers.left_out(tmp_path / "none", 2, tmp_path) == ({}, {})
    (tmp_path / "export").mkdir()
    # a model that keeps it
    save_file({"mtp.fc.weight": torch.zeros(2)}, tmp_path / "export" / "model.safetensors")
    assert mtp_layers.left_out(tmp_path, 2, tmp_path / "export")[0].keys() == actual.keys() - {
        "mtp.fc.weight"
    }
    assert mtp_layers.left_out(tmp_path, 2, tmp_path) == ({}, {})
