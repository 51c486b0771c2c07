"""What speculators' own loader makes of a folder. Run in its own environment: python
by_speculators.py FOLDER INPUTS OUT.

INPUTS holds states (T, f) and ids (T,), the token after each; OUT gets its weights, and logits (3,
T, Vd) of three steps of its training-time test, which step by step is given the next of the ids.
"""

import sys

import torch
from safetensors.torch import load_file, save_file
from speculators import SpeculatorModel, SpeculatorModelConfig

folder, inputs, out = sys.argv[1:]
config = SpeculatorModelConfig.from_pretrained(folder)
# its default needs blocks of 128 tokens
config.transformer_layer_config._attn_implementation = "eager"
model = SpeculatorModel.from_pretrained(folder, config=config).float().eval()
actual = []
model.lm_head.register_forward_hook(lambda module, args, output: actual.append(output[0]))
arguments = load_file(inputs)
with torch.no_grad():
    model(
        hidden_states=arguments["states"][None],
        input_ids=arguments["ids"][None],
        document_ids=torch.zeros_like(arguments["ids"])[None],
        ttt_steps=3,
    )
written = {
    name: tensor.clone()
    for name, tensor in model.state_dict().items()
    if not name.startswith("verifier_")
}
save_file(
    {
        "logits": torch.stack(actual),
        **{f"weights.{name}": tensor for name, tensor in written.items()},
    },
    out,
)
