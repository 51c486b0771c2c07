"""What vLLM's own model code makes of a draft's folder, on the CPU and without its kernels. Run in
its own environment:

    python by_vllm.py TARGET FOLDER METHOD TOKENS INPUTS OUT

INPUTS holds states (T, f) and ids (T,), the token after each; OUT gets logits (T, v) after each of
the ids, and JSON on standard output says which class was made, which of its parameters nothing was
loaded into, and what its config came to.
"""

import json
import os
import sys

os.environ.update(
    VLLM_LOGGING_LEVEL="ERROR",
    MASTER_ADDR="127.0.0.1",
    CUDA_VISIBLE_DEVICES="",
    VLLM_NO_USAGE_STATS="1",
)

import torch
import vllm.platforms
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from vllm.platforms.cpu import CpuPlatform

vllm.platforms._current_platform = CpuPlatform()

from vllm.config import (
    CompilationConfig,
    DeviceConfig,
    ModelConfig,
    ParallelConfig,
    SpeculativeConfig,
    VllmConfig,
    set_current_vllm_config,
)
from vllm.distributed import init_distributed_environment, initialize_model_parallel
from vllm.forward_context import set_forward_context
from vllm.model_executor.layers import linear
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models import ModelRegistry, registry


def load(target, folder, method, tokens, **more):
    """(model, its name in vLLM's registry, parameters that nothing was loaded into, vLLM's config)
    of a draft's folder."""
    # each would import vLLM again, to keep CUDA out of this process
    registry._run_in_subprocess = lambda look: look()

    parallel = ParallelConfig()
    base = ModelConfig(model=target, skip_tokenizer_init=True, dtype="float32")
    speculative = SpeculativeConfig(
        target_model_config=base,
        target_parallel_config=parallel,
        model=folder,
        method=method,
        num_speculative_tokens=int(tokens),
        **more,
    )
    config = VllmConfig(
        model_config=base,
        parallel_config=parallel,
        speculative_config=speculative,
        device_config=DeviceConfig(device="cpu"),
        compilation_config=CompilationConfig(mode=0, custom_ops=["none"]),
    )
    draft = speculative.draft_model_config
    with set_current_vllm_config(config):
        init_distributed_environment(1, 0, "tcp://127.0.0.1:0", 0, "gloo")
        initialize_model_parallel(1, 1)
        kind, architecture = ModelRegistry.resolve_model_cls(
            draft.architectures, model_config=draft
        )
        torch.set_default_dtype(torch.float32)
        model = kind(vllm_config=config)
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data.fill_(torch.nan)
        else:
            parameter.data.fill_(-1)
    model.load_weights(load_file(os.path.join(folder, "model.safetensors")).items())
    empty = [
        name
        for name, p in model.named_parameters()
        if (p.isnan().any() if p.is_floating_point() else bool((p == -1).all()))
    ]
    return model, architecture, empty, config


def plain_linear():
    """Without vLLM's kernels."""
    linear.UnquantizedLinearMethod.apply = lambda self, layer, x, bias=None: F.linear(
        x, layer.weight, bias
    )


def plain_attention():
    """Causal, over the tokens of a call."""

    def attend(self, query, key, value, *rest, **others):
        q, k, v = (x.view(len(x), -1, self.head_size).transpose(0, 1) for x in (query, key, value))
        y = F.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=self.impl.scale, enable_gqa=True
        )
        return y.transpose(0, 1).flatten(1)

    Attention.forward = attend


def main(target, folder, method, tokens, inputs, out):
    model, architecture, empty, config = load(target, folder, method, tokens)
    hf = config.speculative_config.draft_model_config.hf_config
    names = (
        "eagle_aux_hidden_state_layer_ids",
        "norm_before_residual",
        "norm_output",
        "fc_norm",
        "draft_vocab_size",
    )
    seen = {name: getattr(hf, name, None) for name in names}
    print(
        json.dumps(
            {
                "class": type(model).__name__,
                "architecture": architecture,
                "empty": empty,
                "config": seen,
            }
        )
    )

    arguments = load_file(inputs)
    shared = load_file(os.path.join(target, "model.safetensors"))
    embedding = shared["model.embed_tokens.weight"]
    if "model.embed_tokens.weight" in empty:  # vLLM gives a draft the target's own then
        model.model.embed_tokens.weight.data[: len(embedding)] = embedding

    plain_attention()
    plain_linear()
    positions = torch.arange(len(arguments["ids"]))
    with torch.no_grad(), set_forward_context(None, config):
        states = arguments["states"]
        if hasattr(model, "combine_hidden_states"):
            states = model.combine_hidden_states(states)
        normed, fed = model(arguments["ids"], positions, states)
        head = (
            model.lm_head.weight[: hf.draft_vocab_size]
            if hasattr(model, "lm_head")
            else shared.get("lm_head.weight", embedding)
        )
        save_file({"logits": F.linear(normed, head).contiguous(), "fed": fed.contiguous()}, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
