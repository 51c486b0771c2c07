"""Train a draft head for a fine-tuned model: answers, head, evaluation, exports.

    graft draft run=FOLDER[@last|best|STEP] prompts=FILE out=FOLDER [OPTIONS] [KEY=VALUE ...]

One command for what respond, an experiment, cooldown, evaluate and export do one after another:

    answers       the model of run= answers the prompts (graft respond)
    head          a head is distilled on the answers at a constant rate: a new one of experiment=,
                  or that of draft= continued (graft realign)
    cooldown      the rate falls to 0 (graft cooldown)
    evaluation    tokens of a pass and speed-up by category (graft evaluate task=speculation)
    stale         with draft=: tokens of a pass and the acceptance of the first drafted token, by
                  category, of the old head on its old model, of the old head on the new model, and
                  of the re-aligned one there
    exports       the head in the formats of to= (graft export)

KEY=VALUE are settings of the distillation, as in max_epochs=1 drafter.offsets=5.

OUT/draft.json records the settings and each step that is done; OUT/draft.md has all results. The
same command continues where it was stopped, within a step too. With other settings it is refused;
to= may change.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from trainer.config import paths
from trainer.config.options import exit_with, option, parse, rest
from trainer.config.overrides import is_setting
from trainer.config.quoting import key_of
from trainer.config.shown import say

FORMATS = ("drafter", "speculators", "sglang", "medusa", "mtp", "gguf_draft")
# settings that the command gives the runs itself
FIXED = ("target", "base", "objective", "branch", "resume", "name", "runs", "schedule")


@dataclass(frozen=True)
class Options:
    """The options of the command line."""

    run: str = option(
        "the fine-tuned model", value="FOLDER[@last|best|STEP]", reads=paths.saved_fault
    )
    prompts: str = option("a file of prompts, which the model answers", value="FILE")
    out: Path = option("the folder to write", value="FOLDER", writes="folder")
    experiment: Literal[
        "clover_chat",
        "dspark_chat",
        "eagle3_chat",
        "eagle_chat",
        "hydra_chat",
        "hydra_plus_chat",
        "medusa_chat",
        "native_chat",
        "ppd_chat",
        "uno_chat",
    ] = option("recipe of a new head, from conf/experiment", "eagle3_chat")
    draft: str | None = option(
        "an older head to continue instead", None, value="RUN|FOLDER", reads=paths.drafter_fault
    )
    cooldown: float = option(
        "the share of the head's steps in which the rate falls, 0 for none", 0.2, at_least=0
    )
    questions: str | None = option(
        "prompts to evaluate on, with categories; held-out answers without",
        None,
        value="FILE.jsonl",
        reads=paths.file_fault,
    )
    each: int = option("questions of each category, 0 for all", 16, at_least=0)
    to: str = option("formats to export, separated by commas", "drafter", value="FORMAT,...")
    dtype: Literal["float32", "bfloat16", "float16"] = option(
        "dtype of the exported weights", "bfloat16"
    )
    verifier: str | None = option(
        "the model that the exports name as their target", None, value="ORG/NAME"
    )
    rows: int | None = option("prompts to answer", None, value="N", at_least=1)
    max_new_tokens: int = option("most tokens of an answer", 512, at_least=2)
    temperature: float = option("sampling temperature of the answers; 0 is greedy", 0.0, at_least=0)
    batch_size: int = option("prompts to answer at once", 8, at_least=1)
    dry: bool = option("print the steps and run nothing", False)
    overrides: tuple[str, ...] = rest("settings of the distillation", "KEY=VALUE", is_setting)

    def faults(self) -> Iterator[str]:
        """Yield what does not go together."""
        yield from paths.rows_problems(self.prompts, "prompts")
        if self.cooldown >= 1:
            yield f"cooldown={self.cooldown}: a share of the steps, from 0 to below 1"
        for name in self.to.split(","):
            if name not in FORMATS:
                yield f"to={name}: expected one of {', '.join(FORMATS)}, or several with commas"
        for word in self.overrides:
            if key_of(word).partition(".")[0] in FIXED:
                yield f"{word}: graft draft sets this itself"


def main(argv: list[str]) -> int:
    """Run the command; see the module's text."""
    options = parse(Options, argv, __doc__, "graft draft")
    from trainer.assembly import quiet
    from trainer.session import failures
    from trainer.studies import drafting

    quiet.quiet()
    try:
        code = drafting.run(options)
    except Exception as error:
        return failures.report_and_exit_code(error)
    if code == 0 and not options.dry:
        say((options.out / "draft.md").read_text("utf-8"))
    return code


if __name__ == "__main__":
    exit_with(main)
