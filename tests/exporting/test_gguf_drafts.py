"""Draft heads as GGUF files: names and keys by hand, and logits from the file alone."""

from __future__ import annotations

from types import SimpleNamespace

import gguf
import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.exporting.test_engines import DRAFTED, EACH, D, F, V, drafter_of, model_of
from trainer.drafters import DrafterError
from trainer.exporting import gguf_drafts, gguf_model, heads
from trainer.exporting.compare import Mismatch

BLOCK = {"offsets": 4, "draft_layers": 2, "aux_layers": [1, 2, 3]}
DRAFTS = {"draft_vocab_size": 20, "coverage": 0.0}
PLAIN = {"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}}
LINEAR = {"rope_type": "linear", "rope_theta": 5000.0, "factor": 2.0}
CASES = {
    "eagle3": ("llama", "eagle3", {}, {}),
    "eagle3 of all tokens": ("mistral", "eagle3", {"draft_vocab_size": None}, {}),
    "eagle3 for Qwen": ("qwen3", "eagle3", {"layer": "llama"}, PLAIN),
    "dspark": ("qwen3", "dspark", BLOCK | {"markov_rank": 6}, PLAIN),
    "dflash": ("llama", "dflash", BLOCK, PLAIN),
    "dspark, scaled": ("llama", "dspark", BLOCK | {"markov_rank": 6}, {}),
}


def tokenizer():
    """One over bytes, with as many words as the model has rows."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())[: V - 3]
    merge = (alphabet[0], alphabet[1])  # llama.cpp loads none without merges
    names = ["<s>", "</s>", *alphabet, "".join(merge)]
    vocab = {name: at for at, name in enumerate(names)}
    built = Tokenizer(models.BPE(vocab=vocab, merges=[merge]))
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=built, bos_token="<s>", eos_token="</s>")


def run_of(case, monkeypatch):
    """A run as far as a head's export reads it."""
    kind, name, changes, sizes = CASES[case]
    model = model_of(kind, **sizes)
    drafter = drafter_of(name, model, **changes)
    gguf_drafts.check(drafter, model)
    serving = SimpleNamespace(base=SimpleNamespace(load_tokenizer=tokenizer), ends=[1])
    monkeypatch.setattr(heads.Serving, "of", lambda run: serving)
    return SimpleNamespace(drafter=drafter, model=model)


def fields(folder):
    reader = gguf.GGUFReader(str(folder / "draft.gguf"))
    shapes = {tensor.name: tuple(reversed(tensor.shape.tolist())) for tensor in reader.tensors}
    return reader, {name: field.contents() for name, field in reader.fields.items()}, shapes


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "q8_0"])
def test_the_file_computes_what_the_drafter_does(tmp_path, monkeypatch, case, dtype):
    run = run_of(case, monkeypatch)
    assert heads.write_gguf(run, tmp_path, dtype) < 1e-5


@pytest.mark.parametrize("case", ["eagle3", "dspark", "dflash"])
def test_the_rows_of_a_layer_are_checked(tmp_path, monkeypatch, case):
    """Rows in the other order, or a tensor that is another, are noticed."""
    run = run_of(case, monkeypatch)
    monkeypatch.setattr(gguf_drafts, "_rows", lambda name, tensor, head, move: tensor.roll(1, 0)
                        if move is gguf_model.paired and "q_proj" in name else tensor)  # fmt: skip
    with pytest.raises(Mismatch, match="other logits than the run's drafter"):
        heads.write_gguf(run, tmp_path, "float32")


def test_eagle3_has_llama_cpps_names_and_keys(tmp_path, monkeypatch):
    run = run_of("eagle3", monkeypatch)
    heads.write_gguf(run, tmp_path, "float32")
    reader, keys, shapes = fields(tmp_path)
    assert shapes == {
        "fc.weight": (D, 3 * D),
        "output_norm.weight": (D,),
        "output.weight": (DRAFTED, D),
        "d2t": (DRAFTED,),
        "rope_freqs.weight": (EACH // 2,),
        "blk.0.attn_norm.weight": (D,),
        "blk.0.attn_norm_2.weight": (D,),
        "blk.0.attn_q.weight": (4 * EACH, 2 * D),
        "blk.0.attn_k.weight": (2 * EACH, 2 * D),
        "blk.0.attn_v.weight": (2 * EACH, 2 * D),
        "blk.0.attn_output.weight": (D, 4 * EACH),
        "blk.0.ffn_norm.weight": (D,),
        "blk.0.ffn_gate.weight": (F, D),
        "blk.0.ffn_up.weight": (F, D),
        "blk.0.ffn_down.weight": (D, F),
    }
    assert keys["general.architecture"] == "eagle3"
    assert keys["eagle3.target_layers"] == keys["eagle3.extract_layers"] == [*run.drafter.layers]
    assert keys["eagle3.target_hidden_size"] == D
    assert keys["eagle3.norm_before_residual"] is False
    assert keys["eagle3.block_count"] == 1
    assert keys["eagle3.context_length"] == 256
    assert keys["eagle3.rope.freq_base"] == 5000.0
    assert keys["eagle3.vocab_size"] == len(keys["tokenizer.ggml.tokens"]) == V
    (d2t,) = [tensor for tensor in reader.tensors if tensor.name == "d2t"]
    assert d2t.tensor_type == gguf.GGMLQuantizationType.I64
    chosen = run.drafter.t2d.nonzero()[:, 0].numpy()  # ids of the target, not offsets
    assert np.array_equal(d2t.data, chosen)
    # q's rows are in pairs: the first two are the first rows of the head's two halves
    (q,) = [tensor for tensor in reader.tensors if tensor.name == "blk.0.attn_q.weight"]
    own = dict(run.drafter.named_parameters())
    (weight,) = [own[name] for name in own if name.endswith("q_proj.weight")]
    assert np.array_equal(q.data[:2], weight.detach().numpy()[[0, EACH // 2]])


@pytest.mark.parametrize("case", ["dspark", "dflash"])
def test_a_block_has_llama_cpps_names_and_keys(tmp_path, monkeypatch, case):
    run = run_of(case, monkeypatch)
    heads.write_gguf(run, tmp_path, "float32")
    reader, keys, shapes = fields(tmp_path)
    rank = 6 if case == "dspark" else 16
    outer = {name: shape for name, shape in shapes.items() if not name.startswith("blk.")}
    assert outer == {
        "fc.weight": (D, 3 * D),
        "enc.output_norm.weight": (D,),
        "output_norm.weight": (D,),
        "markov_w1.weight": (V, rank),
        "markov_w2.weight": (V, rank),
        "conf_proj.weight": (1, D + rank),
        "conf_proj.bias": (1,),
    }
    parts = ["attn_norm", "attn_q", "attn_k", "attn_v", "attn_output", "attn_q_norm",
             "attn_k_norm", "ffn_norm", "ffn_gate", "ffn_up", "ffn_down"]  # fmt: skip
    expected = {f"blk.{n}.{part}.weight" for n in range(2) for part in parts}
    assert {*shapes} - {*outer} == expected
    assert keys["general.architecture"] == "dflash"
    assert keys["dflash.target_layers"] == [1, 2, 3]
    assert (keys["dflash.block_size"], keys["dflash.sample_from_anchor"]) == (4, True)
    assert keys["dflash.has_confidence_head"] is (case == "dspark")
    mask = int(run.drafter.mask_token)
    assert keys["tokenizer.ggml.mask_token_id"] == keys["dflash.mask_token_id"] == mask
    if case == "dflash":  # a Markov head of zeros computes the same
        (w1,) = [tensor for tensor in reader.tensors if tensor.name == "markov_w1.weight"]
        assert not w1.data.any()


@pytest.mark.parametrize(
    ("kind", "name", "changes", "sizes", "message"),
    [
        ("llama", "medusa", {}, {}, "this drafter is Medusa: .*MTP layer is part of the model"),
        ("qwen2", "eagle3", {}, {}, "this target is qwen2"),
        ("qwen3", "eagle3", {}, {}, "norms q and k as Qwen3 does: train with drafter.layer=llama"),
        ("llama", "eagle3", {"fc_norm": True}, {}, "no place for drafter.fc_norm"),
        ("llama", "eagle3", {"norm_output": True}, {}, "and drafter.norm_output"),
        ("llama", "eagle3", {"aux_layers": [1, 2]}, {}, "the head reads 2 states"),
        ("llama", "eagle3", {"aux_layers": [1, 2, 4]}, {}, "none after the last"),
        ("llama", "dspark", BLOCK, {"rope_parameters": LINEAR}, "the rotary scaling 'linear'"),
        ("llama", "dspark", BLOCK | DRAFTS, {}, "its blocks draft the whole vocabulary"),
    ],
)
def test_what_llama_cpp_cannot_compute_is_refused(kind, name, changes, sizes, message):
    model = model_of(kind, **sizes)
    with pytest.raises(DrafterError, match=f"gguf_draft.*{message}"):
        gguf_drafts.check(drafter_of(name, model, **changes), model)
