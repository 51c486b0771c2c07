"""Modules that are trained whole, and rows of added tokens, with every kind of method: trained,
restored, switched off, merged, and loaded by stock PEFT."""

from __future__ import annotations

import copy
import itertools

import peft
import pytest
import torch
from omegaconf import OmegaConf
from transformers import AutoModelForCausalLM
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

from adapters.delta import AdapterError, Start
from adapters.trained_copies import TokenRows
from tests.toys import adapters as toys
from trainer.assembly.build import instantiate
from trainer.config import compose
from trainer.models.added_tokens import resize

NEW = {toys.VOCABULARY: [5, 6], toys.VOCABULARY + 1: [7]}  # token: its pieces
IDS = torch.tensor([[5, toys.VOCABULARY, 9, toys.VOCABULARY + 1, 3, toys.VOCABULARY]])
METHODS = {
    "lora": [],
    "sparse": ["adapter.mask=random"],
    "spiel": ["adapter.reselection_steps=3", "adapter.accumulation_steps=1"],
    "dora": [],
    "peft": ["adapter.peft_type=LOHA", "adapter.r=2", "adapter.target_modules=all-linear"],
}


def adapter_of(method, *more):
    words = [f"adapter={method}", "task.path=x.jsonl", *METHODS[method], *more]
    config = OmegaConf.to_container(compose.compose(words), resolve=False)
    return instantiate(config["adapter"])


def base_of(tied, dtype=torch.float32):
    model = toys.llama(dtype, tie_word_embeddings=tied)
    resize(model, toys.VOCABULARY + len(NEW), NEW)
    return model


def trained(method, tied, *more, tokens=True, dtype=torch.float32):
    """The adapter, the model after three steps on rows with the new tokens, and the base alone."""
    adapter, model = adapter_of(method, *more), base_of(tied, dtype)
    base = copy.deepcopy(model)
    model = adapter.attach(model, Start(steps=3, new_tokens=tuple(NEW) if tokens else ()))
    optimizer = toys.optimiser(adapter, model)
    for step in range(3):
        toys.loss(model, IDS).backward()
        adapter.before_step(model, 1.0)
        optimizer.step()
        adapter.after_step(model, step + 1)
        optimizer.zero_grad()
    return adapter, model.eval(), base


def test_rows_of_a_scaled_embedding_are_scaled():
    """Gemma's embeddings multiply what they look up. Before the first step the rows are the
    base's."""
    table = Gemma3TextScaledWordEmbedding(12, 4, padding_idx=0, embed_scale=3.5)
    ids = torch.tensor([[1, 7, 3, 9, 7]])
    torch.testing.assert_close(TokenRows(table, (9, 7))(ids), table(ids), rtol=0, atol=0)


CASES = {
    "tokens": ((), True),
    "whole": (("adapter.train_modules=[embed_tokens,lm_head]",), False),
    "whole embedding": (("adapter.train_modules=[embed_tokens]",), False),
    "norms and tokens": (("adapter.train_modules=[post_attention_layernorm]",), True),
}


# a run of each takes two seconds
QUICK = [
    (method, tied, case)
    for method in ("lora", "sparse", "peft")
    for tied in (True, False)
    for case in ("tokens", "whole")
]
GRID = [
    pytest.param(*cell, marks=[] if cell in QUICK else pytest.mark.slow)
    for cell in itertools.product(METHODS, (True, False), CASES)
]


@pytest.mark.long
@pytest.mark.parametrize(("method", "tied", "case"), GRID)
def test_it_trains_switches_off_resumes_exports_and_merges(method, tied, case, tmp_path):
    more, tokens = CASES[case]
    adapter, model, base = trained(method, tied, *more, tokens=tokens)
    before, after = toys.logits(base, IDS), toys.logits(model, IDS)
    assert float((before - after).abs().max()) > 1e-2
    with adapter.disabled(model):  # the base alone answers
        torch.testing.assert_close(toys.logits(model, IDS), before, rtol=0, atol=0)
    torch.testing.assert_close(toys.logits(model, IDS), after, rtol=0, atol=0)

    again = adapter_of(method, *more)  # resumed
    state = copy.deepcopy(adapter.state(model))
    start = Start(steps=3, new_tokens=tuple(NEW) if tokens else (), saved=state)
    other = again.attach(base_of(tied), start)
    again.load_state(other, state)
    torch.testing.assert_close(toys.logits(other.eval(), IDS), after, rtol=0, atol=0)

    adapter.save(model, tmp_path / "peft", "base", "CAUSAL_LM")  # by stock PEFT
    stock = adapter.load_stock(base_of(tied), tmp_path / "peft").eval()
    torch.testing.assert_close(toys.logits(stock, IDS), after, rtol=1e-4, atol=1e-4)

    merged = adapter.merge(model)  # in transformers
    torch.testing.assert_close(toys.logits(merged, IDS), after, rtol=1e-4, atol=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    torch.testing.assert_close(toys.logits(loaded.eval(), IDS), after, rtol=1e-4, atol=1e-4)
    assert loaded.config.tie_word_embeddings is tied  # what was tied stays tied


@pytest.mark.long
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_only_the_rows_of_new_tokens_change(method, tied, tmp_path):
    """LoRA's kind keeps single rows, and stores no more of them."""
    adapter, model, base = trained(method, tied)
    adapter.save(model, tmp_path, "base", "CAUSAL_LM")
    stored = peft.PeftConfig.from_pretrained(tmp_path).trainable_token_indices
    assert sorted(stored) == ["lm_head", "model.embed_tokens"][tied:]
    merged = adapter.merge(model)
    for layer, old in (
        (merged.get_input_embeddings(), base.get_input_embeddings()),
        (merged.get_output_embeddings(), base.get_output_embeddings()),
    ):
        changed = (layer.weight != old.weight).any(1).nonzero().flatten().tolist()
        assert changed == list(NEW)


@pytest.mark.long
def test_a_bf16_base_trains_copies_in_fp32(tmp_path):
    adapter, model, _ = trained(
        "lora", True, "adapter.train_modules=[embed_tokens]", dtype=torch.bfloat16
    )
    kinds = {p.dtype for name, p in model.named_parameters() if "copy" in name}
    assert kinds == {torch.float32}
    assert toys.logits(model, IDS).dtype == torch.bfloat16
    assert {p.dtype for p in adapter.merge(model).parameters()} == {torch.bfloat16}


def test_rows_start_as_the_mean_of_their_pieces():
    for tied in (True, False):
        plain, model = toys.llama(torch.float32, tie_word_embeddings=tied), base_of(tied)
        for old, new in (
            (plain.get_input_embeddings(), model.get_input_embeddings()),
            (plain.get_output_embeddings(), model.get_output_embeddings()),
        ):
            torch.testing.assert_close(new.weight[-2], (old.weight[5] + old.weight[6]) / 2)
            torch.testing.assert_close(new.weight[-1], old.weight[7])
            torch.testing.assert_close(new.weight[:-2], old.weight, rtol=0, atol=0)


@pytest.mark.long
@pytest.mark.parametrize(
    ("more", "says"),
    [
        (("adapter.train_modules=[embed_tokns]",), "'embed_tokns', which matches no module"),
        (
            ("adapter.train_modules=[q_proj]",),
            "'q_proj', and model.layers.0.self_attn.q_proj is one of adapter.target_modules",
        ),
        (
            ("adapter.target_modules=[lm_head]",),
            "base.add_tokens trains the output layer's weight, which adapter.target_modules",
        ),
    ],
)
def test_what_does_not_fit_is_refused_by_name(more, says):
    with pytest.raises(AdapterError, match=says):
        adapter_of("lora", *more).attach(base_of(False), Start(new_tokens=tuple(NEW)))


@pytest.mark.long
@pytest.mark.parametrize("ensure", [True, False])
def test_a_lora_on_a_tied_embedding_merges_as_it_answers(ensure, tmp_path):
    """PEFT's merge writes into the tied weight, and so into the output layer too."""
    adapter = adapter_of("dora", "adapter.use_dora=false", "adapter.target_modules=[embed_tokens]")
    adapter.fields["ensure_weight_tying"] = ensure
    model = adapter.attach(toys.llama(torch.float32, tie_word_embeddings=True), Start(steps=3))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.1)
    after = toys.logits(model.eval())
    merged = adapter.merge(model)
    torch.testing.assert_close(toys.logits(merged), after, rtol=1e-4, atol=1e-4)
    merged.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    torch.testing.assert_close(toys.logits(loaded), after, rtol=1e-4, atol=1e-4)
