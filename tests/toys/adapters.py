"""Tiny random models, a few steps of training, and logits, for the tests of adapters."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from adapters.lora import LoRAAdapter
from trainer.models.base import Base

VOCABULARY = 64
IDS = torch.randint(0, VOCABULARY, (4, 12), generator=torch.Generator().manual_seed(0))


def llama(dtype: torch.dtype = torch.float64, **changes: Any) -> LlamaForCausalLM:
    """Always the same random Llama, its embeddings tied."""
    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "tie_word_embeddings": True,
        "initializer_range": 0.2,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**settings | changes)).to(dtype)
    return exact(model).eval() if dtype == torch.float64 else model.eval()


def exact(model: Any) -> Any:
    """The model with norms that compute in float64: transformers' round to fp32 whatever they are
    given."""
    for name, module in list(model.named_modules()):
        if isinstance(module, LlamaRMSNorm):
            norm = nn.RMSNorm(
                len(module.weight), module.variance_epsilon, dtype=module.weight.dtype
            )
            norm.weight = module.weight
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, norm)
    return model


def lora(**changes: Any) -> LoRAAdapter:
    """A LoRA of rank 4 on all linear layers."""
    settings = {
        "rank": 4,
        "alpha": 8.0,
        "rslora": False,
        "dropout": 0.0,
        "target_modules": "all-linear",
        "exclude_modules": [],
        "target_parameters": [],
        "train_modules": [],
        "lr_ratio": 1.0,
        "dtype": "float32",
        "fused": True,
    }
    return LoRAAdapter(**settings | changes)


def gpt2(dtype: torch.dtype = torch.float64, **changes: Any) -> GPT2LMHeadModel:
    """Always the same random GPT-2, whose linear layers are Conv1D, without its dropout."""
    settings = {
        "vocab_size": VOCABULARY,
        "n_embd": 64,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 64,
        "initializer_range": 0.2,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "loss_type": "ForCausalLM",
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return GPT2LMHeadModel(GPT2Config(**settings | changes)).to(dtype).eval()


def quantised(folder: Any, kind: str, dtype: torch.dtype = torch.float32) -> Any:
    """The saved model of `folder` as nf4 or int8."""
    return Base(str(folder), "auto", "sdpa", kind, True).load(dtype)


@torch.no_grad()
def logits(model: Any, ids: Tensor = IDS) -> Tensor:
    """Logits at the tokens of `ids`; virtual tokens before them have none here."""
    return model(input_ids=ids, use_cache=False).logits[:, -ids.shape[1] :]


def loss(model: Any, ids: Tensor = IDS) -> Tensor:
    """Mean next-token loss."""
    actual = model(input_ids=ids, use_cache=False).logits[:, -ids.shape[1] :]
    return F.cross_entropy(actual[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def batches() -> Iterator[dict[str, Tensor]]:
    """Eight batches as initialisations that read data take them, the last rows padded."""
    draw = torch.Generator().manual_seed(1)
    for _ in range(8):
        ids = torch.randint(0, VOCABULARY, (4, 12), generator=draw)
        mask = torch.ones_like(ids)
        mask[-1, 9:] = 0
        yield {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def optimiser(adapter: Any, model: nn.Module, lr: float = 1e-2) -> torch.optim.Optimizer:
    """AdamW with the adapter's own rates."""
    groups = [group | {"lr": lr * group["lr_scale"]} for group in adapter.parameter_groups(model)]
    make = partial(torch.optim.AdamW, lr=lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    return adapter.optimizer(groups, make)


def train(
    adapter: Any, model: nn.Module, steps: range = range(3), optimizer: Any = None, lr: float = 1e-2
) -> nn.Module:
    """Training steps as FineTune makes them: the loss and the adapter's penalty, then its word
    after the step."""
    optimizer = optimizer or optimiser(adapter, model, lr)
    model.train()
    for step in steps:
        penalty = adapter.penalty(model)
        total = loss(model) if penalty is None else loss(model) + penalty
        optimizer.zero_grad()
        total.backward()
        adapter.before_step(model, 1.0)
        optimizer.step()
        adapter.after_step(model, step + 1)
    optimizer.zero_grad()
    return model.eval()
