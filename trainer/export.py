"""A run's result for use elsewhere, called done only after it was loaded back and gave the run's
own logits.

    python -m trainer.export run=FOLDER[@last|best|STEP]
    to=peft|merged|shira|drafter|mtp|speculators|sglang|medusa [out=FOLDER]
                             [dtype=float32|bfloat16|float16] [verifier=ORG/NAME]
                             [unembedding=shared|copied]

peft is the adapter as stock PEFT loads it; merged is a model folder as transformers loads it,
merged in fp32 and then cast to dtype. A quantised base is merged as its rounding left it, which is
what the adapter was trained on. MTP layers in the files of a base, which transformers does not
load, are copied into a merged folder as they are. shira is for adapters with a sparse part.

drafter is the run's drafter as a folder, as the run itself writes it after its last step. mtp is
merged with the drafter as the MTP layer of the base's own family: for generate(use_mtp=True), vLLM
and SGLang; trainer/exporting/mtp_layers.py says for which bases.

speculators (EAGLE-3) and sglang (EAGLE-1, EAGLE-3) are drafters as vLLM and SGLang load them,
medusa is Medusa's own file; trainer/exporting/draft_head.py says which fits what. verifier is the model that a
config names as the one drafted for, by default the base. unembedding=copied gives each of Medusa's
heads a copy of the target's output layer, as its first version has them.
"""

from __future__ import annotations

import sys
from pathlib import Path

from trainer.assembly import quiet
from trainer.exporting import engines
from trainer.exporting.formats import export


def main(argv: list[str]) -> int:
    """The verb; see the module's text."""
    from trainer.config.errors import EXIT_BAD_INPUT
    from trainer.config.options import arguments
    from trainer.session import failures

    taken = {
        "run": ...,
        "to": ...,
        "out": None,
        "dtype": "float32",
        "verifier": None,
        "unembedding": "shared",
    }
    options = arguments(argv, taken, __doc__ or "")
    choice = {
        "to": ("peft", "merged", "shira", "drafter", "mtp", *engines.LAYOUTS),
        "dtype": ("float32", "bfloat16", "float16"),
        "unembedding": ("shared", "copied"),
    }
    for key, choices in choice.items():
        if options[key] not in choices:
            print(f"{key}={options[key]}: choose one of {', '.join(choices)}", file=sys.stderr)
            return EXIT_BAD_INPUT
    quiet.quiet()
    try:
        out, difference = export(
            options["run"],
            options["to"],
            Path(options["out"]) if options["out"] else None,
            options["dtype"],
            options["verifier"],
            options["unembedding"],
        )
    except Exception as error:
        return failures.report_and_exit_code(error)
    print(f"{out}\nloaded back and compared: logits differ by {difference:.2e} of their spread")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
