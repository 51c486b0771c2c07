"""The patches that docs/developer/patches.md lists exist, and libraries still need them."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys

from tests.docs.pages import ROOT, text

PAGE = text("docs/developer/patches.md")


def test_files_that_the_page_names_exist():
    named = set(re.findall(r"`((?:\w+/)*\w+\.(?:py|toml))`", PAGE))
    assert len(named) > 10
    for name in named - {"ranks.py"}:
        assert (ROOT / name).exists() or (ROOT / "trainer" / name).exists(), name


def test_tests_that_the_page_names_exist():
    code = "\n".join(path.read_text("utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    named = set(re.findall(r"`(test_\w+)`", PAGE))
    assert len(named) > 5
    assert {name for name in named if f"def {name}(" not in code} == set()


def test_generate_takes_no_candidate_generator():
    """If this fails, trainer/decoding/plugin.py can hand its candidates to `generate`."""
    from transformers import GenerationMixin

    assert "candidate_generator" not in inspect.signature(GenerationMixin.generate).parameters
    assert callable(GenerationMixin._get_candidate_generator)
    assert callable(GenerationMixin._assisted_decoding)


def test_wandb_asks_before_it_logs_an_artifact():
    """If this fails, trainer/callbacks/tracking.py need not replace the question."""
    from wandb.sdk.wandb_run import Run

    assert callable(Run._assert_can_log_artifact)
    assert callable(Run._public_api)


def test_bitsandbytes_repacks_4_bit_weights():
    """If this fails, models/base.py need not turn it off."""
    from bitsandbytes.nn import Linear4bit

    assert "support_avx512bf16_for_cpu" in inspect.getsource(Linear4bit)


def test_bitsandbytes_alone_brings_the_compiler():
    """If this fails, speed/fast_imports.py need not delay torch.compile."""
    program = "import sys, bitsandbytes; print('torch._inductor.compile_fx' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split() == ["True"], done.stderr
