"""Decode greedily by llama.cpp with a draft head: a program for an environment with xllamacpp,
whose wheel holds llama.cpp and its server.

    PYTHON drafts_by_llama_cpp.py REQUEST.json > LOG

The request has `model`, `draft` (or null), `kind` (eagle3, dspark or dflash), `ids`, `count`,
`most` (drafted tokens at once), `sure` (the least probability, 0 for all) and `out`. What llama.cpp
counted goes to `out` as JSON, and its log has the drafted tokens.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

DEBUG = 5  # the level of a log with drafted tokens


def main() -> None:
    """Run the program; see the module's text."""
    import xllamacpp

    request = json.loads(Path(sys.argv[1]).read_text())
    server = xllamacpp.Server(settings(xllamacpp, request))
    answer = server.handle_completions(
        {
            "prompt": request["ids"],
            "n_predict": request["count"],
            "temperature": 0,
            "ignore_eos": True,
            "cache_prompt": False,
        }
    )
    Path(request["out"]).write_text(json.dumps(answer["timings"]))


def settings(xllamacpp, request):
    """The parameters of one slot on one thread, in float32 and with plain attention."""
    params, exact = xllamacpp.CommonParams(), xllamacpp.ggml_type.GGML_TYPE_F32
    params.model.path, params.verbosity = request["model"], DEBUG
    params.n_ctx, params.n_parallel, params.n_gpu_layers = 256, 1, 0
    params.warmup = params.fit_params = False
    params.hostnames, params.port = ["127.0.0.1"], 0
    params.cache_type_k = params.cache_type_v = exact
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    if request["draft"] is not None:
        kinds = xllamacpp.common_speculative_type
        kind = f"COMMON_SPECULATIVE_TYPE_DRAFT_{request['kind'].upper()}"
        params.speculative.types = [getattr(kinds, kind)]
        draft = params.speculative.draft
        draft.mparams.path = request["draft"]
        draft.n_max, draft.p_min, draft.n_gpu_layers = request["most"], request["sure"], 0
        draft.cache_type_k = draft.cache_type_v = exact
        draft.cpuparams.n_threads = draft.cpuparams_batch.n_threads = 1
    return params


if __name__ == "__main__":
    main()
