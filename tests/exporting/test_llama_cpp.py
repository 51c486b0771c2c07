"""llama.cpp itself reads our GGUF files: the logits, the ids and the chat template are the run's.

It needs an interpreter with llama-cpp-py-sync, whose wheel holds llama.cpp: this one, or the one
that GRAFT_LLAMA_CPP names. Without it the tests are skipped.
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

from adapters.delta import AdapterError
from tests.conftest import ROOT
from tests.exporting.test_gguf import CONFIGS, byte_level, model_of, split, words
from trainer.exporting import gguf_model, gguf_vocabulary
from trainer.exporting.compare import distance

PROGRAM = ROOT / "tests" / "toys" / "llama_cpp.py"
HERE = sys.executable if importlib.util.find_spec("llama_cpp_py_sync") else None
PYTHON = os.environ.get("GRAFT_LLAMA_CPP", HERE)
TEXTS = ["abc", "Größe, 日本 🙂 don't\n\tx  y", "ab  abc\n\n\nabcabc 12345 I'LL", "</s>a<s>"]

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
        [PYTHON, PROGRAM], input=json.dumps(request), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return torch.from_numpy(np.load(out)), json.loads(done.stdout.splitlines()[-1])
