"""Write a run's result in another format, and load it back to compare.

    graft export run=FOLDER[@last|best|STEP] to=FORMAT [OPTIONS]

An export is complete only after it was loaded back and gave the run's own logits.

    peft          the adapter, as stock PEFT loads it
    merged        a model folder, as transformers loads it: merged in fp32, then cast to dtype. A
                  quantised base is merged as its rounding left it, which is what the adapter was
                  trained on. MTP layers in the files of a base, which transformers does not load,
                  are copied as they are.
    gguf          the merged model as one file for llama.cpp and Ollama, with tokenizer and chat
                  template: Llama, Mistral, SmolLM 2, Qwen 2 and 3, Gemma 2 and 3, Phi 3. dtype=q8_0
                  takes half the bytes of float16.
    gguf_lora     a LoRA that llama.cpp applies to the base's own GGUF file
    shira         for adapters with a sparse part
    drafter       the run's drafter as a folder, as the run itself writes it after its last step
    mtp           merged, with the drafter as the MTP layer of the base's own family: for
                  generate(use_mtp=True), vLLM and SGLang. trainer/exporting/mtp_layers.py lists
                  the bases.
    speculators   a drafter (EAGLE-3, P-EAGLE, DSpark, DFlash) as vLLM loads it
    sglang        a drafter (EAGLE-1, EAGLE-3, DSpark, DFlash, Uno) as SGLang loads it
    medusa        Medusa's own file
    gguf_draft    a drafter (EAGLE-3, DSpark, DFlash) as llama.cpp loads it, with -md

trainer/exporting/draft_head.py says which drafter fits which format.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from trainer.config import paths
from trainer.config.options import exit_with, option, parse
from trainer.config.shown import say

Format = Literal[
    "peft", "merged", "gguf", "gguf_lora", "shira", "drafter", "mtp", "speculators", "sglang",
    "medusa", "gguf_draft",
]  # fmt: skip


@dataclass(frozen=True)
class Options:
    """The options of the command line."""

    run: str = option("the run folder", value="FOLDER[@last|best|STEP]", reads=paths.saved_fault)
    to: Format = option("the format", value="FORMAT")
    out: Path | None = option(
        "the folder to write, by default one in the run folder",
        None,
        value="FOLDER",
        writes="folder",
    )
    dtype: Literal["float32", "bfloat16", "float16", "q8_0"] = option(
        "dtype of the weights; q8_0 for to=gguf and to=gguf_draft alone", "float32"
    )
    verifier: str | None = option(
        "the model that the config of a drafter names as the one it drafts for, by default the"
        " base",
        None,
        value="ORG/NAME",
    )
    unembedding: Literal["shared", "copied"] = option(
        "copied gives each of Medusa's heads a copy of the target's output layer, as its first"
        " version has them",
        "shared",
    )

    def faults(self) -> Iterator[str]:
        """Yield what does not go together."""
        if self.dtype == "q8_0" and self.to not in ("gguf", "gguf_draft"):
            yield f"dtype=q8_0 is a type of GGUF; to={self.to} has float32, bfloat16, float16"


def main(argv: list[str]) -> int:
    """Run the command; see the module's text."""
    options = parse(Options, argv, __doc__, "graft export")
    from trainer.assembly import quiet
    from trainer.exporting.formats import export
    from trainer.session import failures

    quiet.quiet()
    try:
        out, difference = export(
            options.run,
            options.to,
            options.out,
            options.dtype,
            options.verifier,
            options.unembedding,
        )
    except Exception as error:
        return failures.report_and_exit_code(error)
    say(f"{out}\nloaded back and compared: logits differ by {difference:.2e} of their spread")
    return 0


if __name__ == "__main__":
    exit_with(main)
