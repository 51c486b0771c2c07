"""What vLLM's own model code makes of a P-EAGLE folder, on the CPU and without its kernels. Run in
its own environment:

    python peagle_by_vllm.py TARGET FOLDER INPUTS OUT ANCHORS TOKENS

INPUTS holds states (T, f) and ids (T,), the token after each; OUT gets logits (A, K, v) of the
drafts after the first A positions. JSON on standard output says which class was made, which of its
parameters nothing was loaded into, and what its config came to.
"""

import json
import sys

from by_vllm import load, plain_attention, plain_linear


def main(target, folder, inputs, out, anchors, tokens):
    import torch
    from safetensors.torch import load_file, save_file
    from torch.nn import functional as F

    model, architecture, empty, config = load(
        target, folder, "eagle3", tokens, parallel_drafting=True
    )
    from vllm.forward_context import set_forward_context

    hf = config.speculative_config.draft_model_config.hf_config
    report = {
        "class": type(model).__name__,
        "architecture": architecture,
        "empty": empty,
        "reads": hf.eagle_aux_hidden_state_layer_ids,
        "pard_token": hf.pard_token,
    }
    print(json.dumps(report))
    plain_linear()
    plain_attention()
    arguments, more, rows = load_file(inputs), int(tokens) - 1, []
    with torch.no_grad(), set_forward_context(None, config):
        for a in range(int(anchors)):
            # As vllm.v1.spec_decode.llm_base_proposer makes a draft's inputs.
            ids = torch.cat([arguments["ids"][: a + 1], torch.full((more,), hf.pard_token)])
            states = torch.cat([arguments["states"][: a + 1], model.mask_hidden.expand(more, -1)])
            states = model.combine_hidden_states(states)
            normed, _ = model(ids, torch.arange(len(ids)), states)
            rows.append(F.linear(normed[a:], model.lm_head.weight[: hf.draft_vocab_size]))
    save_file({"logits": torch.stack(rows)}, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
