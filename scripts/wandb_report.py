"""Make a report at W&B with the layout of docs/dashboard.md, over the runs of a project.

    pip install wandb-workspaces
    python -m scripts.wandb_report project=graft [entity=TEAM] [title=TEXT] [dry=true]

The report is saved as a draft and its address is printed. With dry=true the report is printed and
not sent. Both read the project from the server.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

from trainer.config.errors import bad
from trainer.config.options import option, parse

# section -> (title, metrics, logarithmic)
SECTIONS: dict[str, list[tuple[str, list[str], bool]]] = {
    "Learning": [
        ("held out", ["eval/loss", "eval_average/loss"], False),
        ("training", ["train/loss"], False),
        ("learning rate", ["train/lr"], False),
    ],
    "Health": [
        ("gradient norm", ["train/grad_norm"], True),
        ("skipped steps", ["train/skipped"], False),
    ],
    "Method": [
        ("mean density of the MLPs", ["train/density"], False),
        ("share of the support replaced", ["mask/replaced_share"], False),
        ("held out, top-1 by head", [f"heads_eval/offset{k}/top1" for k in range(1, 5)], False),
    ],
    "Speed": [
        ("tokens a second", ["speed/tokens_per_s"], False),
        ("memory, GB", ["speed/memory_gb"], False),
    ],
}


def make_report(project: str, entity: str, title: str) -> Any:
    """Return the report, without sending it."""
    import wandb_workspaces.reports.v2 as wr

    from trainer.callbacks import wandb_settings

    wandb_settings.own_only()

    blocks: list[Any] = [wr.TableOfContents()]
    for name, panels in SECTIONS.items():
        lines = [
            wr.LinePlot(title=panel, x="global_step", y=metrics, log_y=log or None)
            for panel, metrics, log in panels
        ]
        runs = wr.Runset(project=project, entity=entity)
        blocks += [wr.H1(text=name), wr.PanelGrid(runsets=[runs], panels=lines)]
    return wr.Report(project=project, entity=entity, title=title, blocks=blocks)


@dataclass(frozen=True)
class Options:
    """The command line's options."""

    project: str = option("the project", value="NAME")
    entity: str = option("the entity, by default your own", "", value="NAME")
    title: str = option("of the report", "Fine-tuning")
    dry: bool = option("print the report and save nothing", False)


def main(argv: list[str]) -> int:
    """Run the script; see the module's text."""
    options = parse(Options, argv, __doc__, "python -m scripts.wandb_report")
    try:
        report = make_report(options.project, options.entity, options.title)
    except ModuleNotFoundError:
        return bad("this needs a package that is not installed: pip install wandb-workspaces")
    if options.dry:
        print(report._to_model().model_dump_json(indent=1))
    else:
        print(report.save(draft=True).url)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
