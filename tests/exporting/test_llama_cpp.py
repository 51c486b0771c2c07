"""llama.cpp itself reads our GGUF files: the logits, the ids and the chat template are the run's.

It needs an interpreter with llama-cpp-py-sync, whose wheel holds llama.cpp: this one, or the one
that GRAFT_LLAMA_CPP names. Without it the tests are skipped. The wheel 0.11739 needs glibc 2.38.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.conftest import ROOT
from tests.exporting.test_gguf import (
    CONFIGS,
    byte_level,
    model_of,
    run,  # noqa: F401
    split,
    words,
    written,
)
from tests.toys.commands import exit_code
from trainer import export
from trainer.exporting import gguf_model, gguf_vocabulary
from trainer.exporting.compare import distance

PROGRAM = ROOT / "tests" / "toys" / "llama_cpp.py"
HERE = sys.executable if importlib.util.find_spec("llama_cpp_py_sync") else None
PYTHON = os.environ.get("GRAFT_LLAMA_CPP", HERE)
# merges that join across the boundaries of the rules, where a text is not split
MERGES = ["a b", "ab c", "Ġ a", "Ġa b", "1 2", "12 3", "123 4", "Ġ Ġ", "Ċ Ċ", "' t", "' T", "t a",
          "a 1", "b '", ". Ċ", "Ġ 1", "a B", "B a", "! !", "Ġ !", "/ Ċ", "Ċ a", "é t"]  # fmt: skip
TEXTS = ["abc", "Größe, 日本 🙂 don't\n\tx  y", "ab  abc\n\n\nabaB aBa 12345 1 I'Ta b'a",
         "</s>a<s>", "a.\n\n a!! !!/\n a1 été  ", "x'T 'tabc  12a\r\n\r\n   a"]  # fmt: skip
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.run,
    pytest.mark.skipif(PYTHON is None, reason="llama-cpp-py-sync is not installed"),
]


def read(folder, ids, lora=None, texts=()):
    """Return (logits, the program's answer)."""
    out = folder / "logits.npy"
    request = {
        "model": str(folder / "model.gguf"),
        "lora": lora and str(lora),
        "ids": ids,
        "texts": list(texts),
        "out": str(out),
    }
    done = subprocess.run(
        [PYTHON, PROGRAM],
        input=json.dumps(request),
        capture_output=True,
        timeout=300,
        encoding="utf-8",
        errors="replace",
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return torch.from_numpy(np.load(out)), json.loads(done.stdout.splitlines()[-1])


IDS = torch.randint(3, 250, (40,), generator=torch.Generator().manual_seed(1)).tolist()
# of the logits' spread; with Q8_0 llama.cpp rounds the activations of a product too
LIMITS = {"float32": 2e-3, "float16": 2e-3, "bfloat16": 2e-2, "q8_0": 3e-2}


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("name", CONFIGS)
def test_llama_cpp_computes_what_transformers_does(name, dtype, tmp_path):
    model = model_of(name)
    written(model, tmp_path, dtype)
    rounded = gguf_model.round_weights(model, dtype)
    with torch.no_grad():
        expected = rounded(torch.tensor([IDS]), use_cache=False).logits[0]
    logits, _ = read(tmp_path, IDS)
    assert distance(expected, logits) < LIMITS[dtype]


@pytest.mark.parametrize(
    "steps",
    [
        [byte_level()],
        [pre_tokenizers.Digits(individual_digits=True), byte_level()],
        *([split(rule), byte_level(False)] for rule in gguf_vocabulary.RULES),
    ],
    ids=["gpt-2", "smollm", *gguf_vocabulary.RULES],
)
def test_llama_cpp_reads_texts_as_the_tokenizer_does(steps, tmp_path):
    tokenizer = words(*steps, merges=[tuple(merge.split(" ")) for merge in MERGES])
    written(model_of("llama"), tmp_path, template=TEMPLATE, tokenizer=tokenizer)
    _, answer = read(tmp_path, IDS, texts=TEXTS)
    expected = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in TEXTS]
    assert answer == {"ids": expected, "template": TEMPLATE}


@pytest.mark.parametrize("prepend", [True, False])
def test_llama_cpp_reads_sentencepiece(prepend, tmp_path):
    """As Llama 2's tokenizer, with a space before the text, and as Gemma's, without."""
    merges = ["▁ a", "a b", "ab c", "▁a b", "▁ ▁", "▁▁ ▁▁", "1 2", "é t"]
    names = ["<s>", "</s>", "<unk>", *(f"<0x{at:02X}>" for at in range(256)), *"▁abcé12tü"]
    names += [merge.replace(" ", "") for merge in merges]
    vocab = {name: at for at, name in enumerate(names)}
    pairs = [tuple(merge.split(" ")) for merge in merges]
    backend = Tokenizer(
        models.BPE(vocab=vocab, merges=pairs, byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    )
    spaces = [normalizers.Prepend("▁")] if prepend else []
    backend.normalizer = normalizers.Sequence([*spaces, normalizers.Replace(" ", "▁")])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    written(model_of("llama"), tmp_path, tokenizer=tokenizer)
    texts = ["abc ab  a    c", "Größe été 日 🙂 12", "a"]
    _, answer = read(tmp_path, IDS, texts=texts)
    assert answer["ids"] == [
        tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts
    ]


def test_the_base_with_the_lora_is_the_merged_model(run, tmp_path):  # noqa: F811
    for to in ("gguf", "gguf_lora"):
        assert exit_code(export.main, [f"run={run}", f"to={to}", f"out={tmp_path / to}"]) == 0
    (tmp_path / "base").mkdir()
    written(model_of("llama"), tmp_path / "base")
    base, _ = read(tmp_path / "base", IDS)
    merged, _ = read(tmp_path / "gguf", IDS)
    adapted, _ = read(tmp_path / "base", IDS, tmp_path / "gguf_lora" / "adapter.gguf")
    assert distance(merged, base) > 1e-2
    assert distance(merged, adapted) < 1e-5
