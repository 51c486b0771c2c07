"""Read a GGUF file by llama.cpp itself: a program for an interpreter that has llama-cpp-py-sync.

    PYTHON llama_cpp.py < REQUEST

The request is JSON: `model`, `lora` (or null), `ids`, `texts` and `out`. The logits go to the file
`out` (float32, positions x vocabulary); the ids of the texts and the chat template are printed as
JSON.
"""

from __future__ import annotations

import json
import sys

F32 = 0  # ggml's number of the type


def main() -> None:
    """Run the program; see the module's text."""
    import numpy as np
    from llama_cpp_py_sync import _cffi_bindings

    request = json.load(sys.stdin)
    ffi, lib = _cffi_bindings.get_ffi(), _cffi_bindings.get_lib()
    lib.llama_backend_init()
    params = lib.llama_model_default_params()
    params.n_gpu_layers, params.check_tensors = 0, True
    model = lib.llama_model_load_from_file(request["model"].encode(), params)
    assert model != ffi.NULL, "llama.cpp does not load the model"
    context = lib.llama_init_from_model(model, settings(lib, len(request["ids"])))
    assert context != ffi.NULL, "llama.cpp makes no context"
    if request.get("lora"):
        lora = lib.llama_adapter_lora_init(model, request["lora"].encode())
        assert lora != ffi.NULL, "llama.cpp does not load the LoRA"
        adapters = ffi.new("struct llama_adapter_lora *[1]", [lora])
        assert lib.llama_set_adapters_lora(context, adapters, 1, ffi.new("float[1]", [1.0])) == 0
    vocab = lib.llama_model_get_vocab(model)
    size = lib.llama_vocab_n_tokens(vocab)
    np.save(request["out"], logits(ffi, lib, context, request["ids"], size, np))
    template = lib.llama_model_chat_template(model, ffi.NULL)
    answer = {
        "ids": [tokens(ffi, lib, vocab, text) for text in request["texts"]],
        "template": None if template == ffi.NULL else ffi.string(template).decode(),
    }
    print(json.dumps(answer))


def settings(lib, length):
    """A context of `length` tokens, in float32 and with plain attention."""
    params = lib.llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = max(length, 64)
    params.n_threads = params.n_threads_batch = 1
    params.type_k = params.type_v = F32
    params.flash_attn_type = 0
    params.swa_full = True
    return params


def logits(ffi, lib, context, ids, size, np):
    """The logits of all positions of one sequence."""
    batch = lib.llama_batch_init(len(ids), 0, 1)
    batch.n_tokens = len(ids)
    for at, token in enumerate(ids):
        batch.token[at], batch.pos[at], batch.logits[at] = token, at, 1
        batch.n_seq_id[at], batch.seq_id[at][0] = 1, 0
    assert lib.llama_decode(context, batch) == 0, "llama.cpp does not decode"
    rows = [ffi.buffer(lib.llama_get_logits_ith(context, at), 4 * size) for at in range(len(ids))]
    return np.stack([np.frombuffer(row, np.float32).copy() for row in rows])


def tokens(ffi, lib, vocab, text):
    """The ids of a text, with special tokens read as such and none added."""
    raw = text.encode()
    space = ffi.new(f"llama_token[{len(raw) + 8}]")
    count = lib.llama_tokenize(vocab, raw, len(raw), space, len(raw) + 8, False, True)
    return [space[at] for at in range(count)]


if __name__ == "__main__":
    main()
