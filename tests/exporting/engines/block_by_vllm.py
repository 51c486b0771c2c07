"""What vLLM's own model code makes of a block drafter's folder, on the CPU and without its kernels.
Run in its own environment:

    python block_by_vllm.py TARGET FOLDER INPUTS OUT ANCHORS TOKENS

INPUTS holds states (T, f) and ids (T,); OUT gets, of the blocks at the anchors 1 .. A, logits
(A, K, v), the target's ids of the v tokens and, if it predicts them, acceptances (A, K). JSON on
standard output says which class was made, which of its parameters nothing was loaded into, and what
its config came to.

The loops over slots and tokens are those of vllm.v1.worker.gpu.spec_decode.dspark.speculator, which
runs on GPUs only.
"""

import json
import os
import sys

from by_vllm import load, plain_linear


def main(target, folder, inputs, out, anchors, tokens):
    import torch
    from safetensors.torch import load_file, save_file
    from torch.nn import functional as F

    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "1"
    model, architecture, empty, config = load(target, folder, "dspark", tokens)
    from vllm.forward_context import set_forward_context
    from vllm.model_executor.layers.attention import Attention
    from vllm.model_executor.models import qwen3_dflash
    from vllm.v1.worker.gpu.spec_decode.eagle.eagle3_utils import (
        get_eagle3_aux_layers_from_config,
    )

    hf = config.speculative_config.draft_model_config.hf_config
    report = {
        "class": type(model).__name__,
        "architecture": architecture,
        "empty": [name for name in empty if "draft_id" not in name],
        "reads": get_eagle3_aux_layers_from_config(config.speculative_config),
        "causal": model.get_draft_attn_causal(),
        "from_anchor": getattr(hf, "sample_from_anchor", True),
        "mask_token": model.model.mask_token_id,
    }
    print(json.dumps(report))

    shared = load_file(os.path.join(target, "model.safetensors"))
    embedding = shared["model.embed_tokens.weight"]
    model.model.embed_tokens.weight.data[: len(embedding)] = embedding
    head = shared.get("lm_head.weight", embedding)
    if model.draft_id_to_target_id is not None:
        head = model.lm_head.weight.data[: hf.draft_vocab_size]

    def rms_norm(result, x, weight, eps):
        weight = weight.view(len(weight), *[1] * (x.dim() - 2), -1) if weight.dim() > 1 else weight
        result.copy_(x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight)

    def rotary(positions, query, key, size, table, neox):
        rotated, _ = model.model.layers[0].self_attn.rotary_emb.forward_native(
            positions, query.clone(), None
        )
        query.copy_(rotated)

    qwen3_dflash.ops.rms_norm, qwen3_dflash.ops.rotary_embedding = rms_norm, rotary
    context = {}

    def store(layer, keys, values, *_):
        context[layer.layer_name] = keys, values

    for layer in model.model._attn_layers:
        layer.impl.do_kv_cache_update = store
        layer.kv_cache = None

    def attend(self, query, key, value, *rest, **others):
        keys, values = context[self.layer_name]
        q, k, v = (x.view(len(x), -1, self.head_size) for x in (query, key, value))
        k, v = torch.cat([keys, k]), torch.cat([values, v])
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, scale=self.impl.scale, enable_gqa=True)
        return y.transpose(0, 1).flatten(1)

    Attention.forward = attend
    plain_linear()
    arguments, count = load_file(inputs), int(tokens)
    states, ids, results = arguments["states"], arguments["ids"], {"logits": [], "confidence": []}
    with torch.no_grad(), set_forward_context(None, config):
        for a in range(1, 1 + int(anchors)):
            model.precompute_and_store_context_kv(
                model.combine_hidden_states(states[:a]), torch.arange(a), torch.arange(a)
            )
            block = torch.tensor([int(ids[a])] + [model.model.mask_token_id] * (count - 1))
            hidden = model(block, torch.arange(a, a + count))
            embeds = model.markov_embed(ids[a : a + count])
            bias = embeds @ model.model.markov_head.markov_w2.weight[: len(head)].T
            results["logits"].append(F.linear(hidden, head) + bias)
            if model.model.confidence_head is not None:
                results["confidence"].append(model.compute_confidence(hidden, embeds))
    ids = model.map_draft_to_target(torch.arange(len(head)))
    save_file(
        {name: torch.stack(rows) for name, rows in results.items() if rows} | {"ids": ids}, out
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
