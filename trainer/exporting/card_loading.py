"""Ways to load a result: commands and code for a model card."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from trainer.config import files
from trainer.evaluation.run_summary import Summary

PLACE = "ORG/NAME"  # stands for the card's own repository; graft push puts its name there
_LIMIT = 16 << 20
_CLASSES = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
}


def section(folder: Path, kind: str, base: str | None, source: Summary) -> list[str]:
    """Return the lines of the section that says how to load a folder, which has its files."""
    if kind == "adapter":
        return adapter_section(folder, base)
    lines, name = _head(base)
    if kind in ("merged", "mtp"):
        return lines[:2] + _merged(folder, kind)
    if kind in ("gguf", "gguf_lora"):
        return lines[:2] + _gguf(kind)
    return lines + _drafter(kind, name, source)


def adapter_section(folder: Path, base: str | None) -> list[str]:
    """Return the lines of the section for an adapter."""
    lines, name = _head(base)
    return lines + _adapter(folder, name)


def model_section(folder: Path) -> list[str]:
    """Return the lines of the section for a whole model."""
    return [*_head("")[0], *_merged(folder, "merged")]


def _head(base: str | None) -> tuple[list[str], str]:
    lines = ["## Load it", ""]
    if base is None:
        lines += ["`path/to/base` is the base that it was trained on.", ""]
    return lines, base or "path/to/base"


def _code(language: str, *lines: str) -> list[str]:
    return [f"```{language}", *lines, "```", ""]


def _read(folder: Path, name: str) -> dict[str, Any]:
    try:
        content = json.loads(files.read_text(folder / name, _LIMIT))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _adapter(folder: Path, base: str) -> list[str]:
    pair = (folder / "shira" / "adapter_config.json").exists()
    config = _read(folder / "lora" if pair else folder, "adapter_config.json")
    auto = _CLASSES.get(str(config.get("task_type")), "AutoModelForCausalLM")
    generates = auto != "AutoModelForSequenceClassification"
    if pair:
        load = [
            f'inner = PeftModel.from_pretrained(base, "{PLACE}", subfolder="shira",'
            ' adapter_name="shira")',
            f'model = PeftModel.from_pretrained(inner.get_base_model(), "{PLACE}",'
            ' subfolder="lora")',
        ]
    else:
        load = [f'model = PeftModel.from_pretrained(base, "{PLACE}")']
    extra = ", GenerationConfig" if generates else ""
    lines = _code(
        "python",
        "from peft import PeftModel",
        f"from transformers import {auto}, AutoTokenizer{extra}",
        "",
        f'base = {auto}.from_pretrained("{base}")',
        *load,
        f'tokenizer = AutoTokenizer.from_pretrained("{PLACE}")',
        *_generation(folder, generates),
    )
    if not generates or auto == "AutoModelForSeq2SeqLM":
        return lines
    if config.get("peft_type") != "LORA" or pair or config.get("use_dora"):
        merge = "graft export run=RUN to=merged out=FOLDER"
        return [*lines, "vLLM, SGLang and llama.cpp serve the merged model:", "",
                *_code("bash", merge, "vllm serve FOLDER")]  # fmt: skip
    rank = max([config.get("r") or 8, *(config.get("rank_pattern") or {}).values()])
    served = f"--tokenizer {PLACE} --generation-config {PLACE}"
    lines += ["vLLM and SGLang:", ""]
    lines += _code(
        "bash",
        f"vllm serve {base} --enable-lora --max-lora-rank {_next_rank(rank)} \\",
        f"    --lora-modules tuned={PLACE} {served}",
        f"python -m sglang.launch_server --model-path {base} --enable-lora \\",
        f"    --lora-paths tuned={PLACE} --tokenizer-path {PLACE}",
    )
    lines += ["llama.cpp, from the run's folder:", ""]
    return lines + _code(
        "bash",
        "graft export run=RUN to=merged out=FOLDER",
        "python convert_hf_to_gguf.py FOLDER --outfile tuned.gguf  # of llama.cpp",
        "llama-server -m tuned.gguf",
    )


def _generation(folder: Path, generates: bool) -> list[str]:
    if not generates:
        return ['logits = model(**tokenizer("A text.", return_tensors="pt")).logits']
    chat = (folder / "chat_template.jinja").exists()
    ask = (
        ['chat = [{"role": "user", "content": "Hello"}]',
         "inputs = tokenizer.apply_chat_template(",
         '    chat, add_generation_prompt=True, return_dict=True, return_tensors="pt"',
         ")"]
        if chat
        else ['inputs = tokenizer("Hello", return_tensors="pt")']
    )  # fmt: skip
    settings = (folder / "generation_config.json").exists()
    how = f', generation_config=GenerationConfig.from_pretrained("{PLACE}")' if settings else ""
    return [
        *ask,
        f"output = model.generate(**inputs, max_new_tokens=200{how})",
        'print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :]))',
    ]


def _next_rank(rank: int) -> int:
    """The least rank that vLLM's option takes, at least `rank`."""
    return next((size for size in (8, 16, 32, 64, 128, 256, 320, 512) if size >= rank), rank)


def _merged(folder: Path, kind: str) -> list[str]:
    config = _read(folder, "config.json")
    architecture = str((config.get("architectures") or [""])[0])
    auto = "AutoModelForCausalLM"
    if architecture.endswith("ForSequenceClassification"):
        auto = "AutoModelForSequenceClassification"
    elif config.get("is_encoder_decoder"):
        auto = "AutoModelForSeq2SeqLM"
    generates = auto != "AutoModelForSequenceClassification"
    ask = [line.replace(f', generation_config=GenerationConfig.from_pretrained("{PLACE}")', "")
             for line in _generation(folder, generates)]  # fmt: skip
    lines = _code(
        "python",
        f"from transformers import {auto}, AutoTokenizer",
        "",
        f'model = {auto}.from_pretrained("{PLACE}")',
        f'tokenizer = AutoTokenizer.from_pretrained("{PLACE}")',
        *ask,
    )
    if auto != "AutoModelForCausalLM":
        return lines
    draft = ' --speculative-config \'{"method": "mtp", "num_speculative_tokens": 1}\''
    lines += _code(
        "bash",
        f"vllm serve {PLACE}{draft if kind == 'mtp' else ''}",
        f"python -m sglang.launch_server --model-path {PLACE}",
        "python convert_hf_to_gguf.py FOLDER --outfile model.gguf  # of llama.cpp",
        "llama-server -m model.gguf",
    )
    return lines


def _gguf(kind: str) -> list[str]:
    if kind == "gguf":
        return _code(
            "bash",
            f"hf download {PLACE} --local-dir .",
            "llama-server -m model.gguf",
            "ollama create tuned -f Modelfile && ollama run tuned",
        )
    return [
        "`base.gguf` is the base's own GGUF file, in any type.",
        "",
        *_code(
            "bash",
            f"hf download {PLACE} --local-dir .",
            "llama-server -m base.gguf --lora adapter.gguf",
            "ollama create tuned -f Modelfile && ollama run tuned",
        ),
    ]


# drafter -> the method of engines
_METHODS = {"eagle3": "eagle3", "dspark": "dspark", "dflash": "dspark"}


def _drafter(kind: str, base: str, source: Summary) -> list[str]:
    adapted = "The head drafts for the base alone."
    if source.choices.get("adapter") not in (None, "none") or source.settings.get("target.run"):
        adapted = "The head drafts for the base with the run's adapter: serve the two together."
    drafter = str(source.choices.get("drafter"))
    served_as_lora = kind == "sglang" and drafter == "uno"
    method = _METHODS.get(drafter, "eagle")
    vllm = "VLLM_USE_V2_MODEL_RUNNER=1 vllm" if method == "dspark" else "vllm"
    setting = f'{{"method": "{method}", "model": "{PLACE}", "num_speculative_tokens": 3}}'
    ways = {
        "speculators": [f"{vllm} serve {PLACE}",
                        f"{vllm} serve TARGET --speculative-config '{setting}'"],
        "sglang": [f"python -m sglang.launch_server --model-path TARGET"
                   f" --speculative-algorithm {method.upper()} \\",
                   f"    --speculative-draft-model-path {PLACE}"],
        "uno": ["python -m sglang.launch_server --model-path TARGET --speculative-algorithm UNO \\",
                f"    --uno-lora-path {PLACE} --speculative-num-draft-tokens 8"],
        "medusa": [f"text-generation-launcher --model-id {PLACE}"],
        "gguf_draft": [f"hf download {PLACE} --local-dir .",
                       f"llama-server -m TARGET.gguf -md draft.gguf --spec-type draft-{method}"],
    }  # fmt: skip
    if drafter == "peagle":
        del ways["speculators"][1]  # vLLM reads its method from the folder alone
    own = ["graft speculate run=RUN prompt=Hello"]
    return [
        adapted
        + (" TARGET is that model." if kind in ("speculators", "sglang", "gguf_draft") else ""),
        "",
        *_code("bash", *ways.get("uno" if served_as_lora else kind, own)),
    ]
