"""Several processes are one run: the gradients, weights, masks and numbers of one process with the
whole batch."""

from __future__ import annotations

import faulthandler
import json
import os
import shutil
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning
import psutil
import pytest
import torch
from torch import Tensor

from tasks.reading import DataError
from tests import composing
from tests.conftest import ROOT, plain_reports, sums, write_rows
from tests.ranks import spawn
from trainer.config.errors import ConfigError
from trainer.data import rows as rows_module
from trainer.session import failures
from trainer.storage import journal
from trainer.storage.checkpoints import CheckpointError
from trainer.training.fsdp import full_tensors


class Recorder(lightning.Callback):
    """What each step's optimiser was words_of and which rows were in it; the weights and supports
    after the last one."""

    def __init__(self) -> None:
        self.gradients: list[dict[str, Tensor]] = []
        self.sequences: list[list[Any]] = []
        self.weights: dict[str, Tensor] = {}
        self.buffers: dict[str, Tensor] = {}

    def on_train_start(self, trainer: Any, module: Any) -> None:
        clip = module.configure_gradient_clipping

        def recorded(*args: Any, **named: Any) -> None:
            clip(*args, **named)
            actual = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
            self.gradients.append(
                {name: grad.detach().clone() for name, grad in full_tensors(actual).items()}
            )

        module.configure_gradient_clipping = recorded

    def on_train_batch_end(
        self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        real = batch["lengths"] > 0
        self.sequences.append(
            [name for name, counts in zip(batch["sequences"], real.tolist(), strict=True) if counts]
        )

    def on_train_end(self, trainer: Any, module: Any) -> None:
        actual = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.weights = {name: p.detach().clone() for name, p in full_tensors(actual).items()}
        self.buffers = {
            name: b.clone() for name, b in module.named_buffers() if name.endswith("delta.indices")
        }


def start(folder: Path, *overrides: str) -> dict[str, Any]:
    """Run the real program in this process, and give what a Recorder saw with the rows of its
    journal."""
    from hydra import compose, initialize_config_dir
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import OmegaConf, open_dict

    from trainer.cluster.signals import Signals
    from trainer.config.compose import install, rewrite
    from trainer.run import run
    from trainer.session import session

    common = [
        "+experiment=smoke",
        f"runs={folder}",
        "precision=fp32",
        "threads=1",
        "lightning=cpu",
        "callbacks.evaluation.samples=0",
    ]
    install()
    composing.install()
    with initialize_config_dir(
        config_dir=str(ROOT / "conf"), version_base="1.3", job_name="trainer"
    ):
        cfg = compose("config", overrides=rewrite([*common, *overrides]), return_hydra_config=True)
    with open_dict(cfg):
        cfg.hydra.runtime.output_dir = cfg.hydra.run.dir
    HydraConfig.instance().set_config(cfg)
    recorder = Recorder()
    callbacks = session._callbacks
    session._callbacks = lambda *parts: [recorder, *callbacks(*parts)]  # type: ignore[assignment]
    try:
        with plain_reports():
            run(OmegaConf.masked_copy(cfg, [key for key in cfg if key != "hydra"]), Signals())
    finally:
        session._callbacks = callbacks
    rows = journal.read(folder / "smoke/metrics.jsonl")
    return {
        name: getattr(recorder, name) for name in ("gradients", "sequences", "weights", "buffers")
    } | {"rows": rows}


# As torchrun sets it up; the group is there already.
ENVIRONMENT = {
    "TORCHELASTIC_RUN_ID": "test",
    "GROUP_RANK": "0",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "1",
}

EAGLE3 = [
    "adapter=none",
    "objective=distill",
    "drafter=eagle3",
    "drafter.draft_vocab_size=64",
    "drafter.coverage=0",
    "drafter.offsets=2",
]
# 12 rows: in the second step the second process has none that counts
SHORT = ["max_epochs=0.2", "max_steps=null"]
# Settings next to a batch of 8 in one process and of 4 in each of two.
CASES = {
    "lora": ["max_epochs=1", "max_steps=null", "accumulate=2"],  # 60 rows: the last step has 12
    "packing": [
        "task=completion",
        "packing=true",
        "max_length=64",
        "max_steps=2",
        "task.path={texts}",
    ],
    "classes": [
        "task=classification",
        "task.eval_fraction=0.2",
        "max_steps=2",
        "task.path={labels}",
    ],
    "stream": [
        "task.streaming=true",
        "task.eval_fraction=0",
        "max_epochs=1",
        "max_steps=9",
        "task.shuffle_block=16",
    ],
    "rosa": [
        "adapter=rosa",
        "adapter.density=0.1",
        "adapter.warmup_steps=1",
        "adapter.mask_steps=1",
        "adapter.count_mask_steps=true",
        "adapter.score=mean",
        "max_steps=3",
    ],
    "medusa": ["drafter=medusa", "drafter.offsets=2", *SHORT],
    "eagle3": [*EAGLE3, "drafter.aux_layers=[0,1,2]", *SHORT],
}
NF4 = ["base.quantization=nf4", "base.hidden_size=64"]
SHARDED = {
    "fsdp2 lora": ["max_steps=3", "accumulate=2"],
    "fsdp2 full": ["adapter=full", "max_steps=3"],
    "fsdp2 rosa": [*CASES["rosa"], "max_steps=4"],
    "fsdp2 nf4": [*NF4, "base.double_quant=true", "max_steps=2"],
}
# A run of one process, then of two with FSDP2, then of one.
MOVED = [
    *CASES["rosa"],
    "adapter.restart_after_mask=false",
    "schedule=constant",
    "callbacks.checkpoints.every=1",
    "name=smoke",
]
ONE = ["batch_size=4", "accumulate=2"]  # the step of two processes with batches of 4


def words_of(folder: Path, name: str, settings: list[str]) -> list[str]:
    """The settings of a case with the paths of its rows."""
    files = {kind: folder / f"{kind}.jsonl" for kind in ("chats", "texts", "labels", "broken")}
    own = [
        setting.format(**files, folder=folder) if "{" in setting else setting
        for setting in settings
    ]
    return (
        own
        if any(setting.startswith("task.path") for setting in own)
        else [f"task.path={files['chats']}", *own]
    )


def rewind(whole: Path, cut: Path) -> None:
    """Copy a run as it was after its second step, unless there is one to resume."""
    if cut.exists():
        return
    shutil.copytree(whole, cut)
    for file in (cut / "both/smoke/checkpoints").glob("step-*"):
        if int(file.name.removeprefix("step-").partition(".")[0]) > 2:
            file.unlink()


def _member(rank: int, folder: Path) -> None:
    asked = json.loads((folder / "cases.json").read_text())
    processes = torch.distributed.get_world_size()
    os.environ |= ENVIRONMENT | {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "GRAFT_CACHE": str(folder / "cache"),
    }
    tokenised = rows_module._kept

    def kept(task: Any, split: str, renderer: Any, *rest: Any) -> Any:
        with (folder / "tokenised").open("a") as file:
            file.write(f"{rows_module.cache_key(task, split, renderer, *rest[:2])}\n")
        time.sleep(1.0 if "broken" in str(vars(task.splits)) else 0.0)
        return tokenised(task, split, renderer, *rest)

    rows_module._kept = kept
    for name, settings in asked.items():
        faulthandler.dump_traceback_later(400, exit=True)
        both = [
            f"lightning.devices={processes}",
            f"lightning.strategy={'fsdp2' if name.startswith('fsdp2') else 'ddp'}",
            f"batch_size={8 // processes}",
        ]
        if settings[-1] == "resume=auto" and rank == 0:
            rewind(folder / name.replace("cut on", "whole"), folder / name.removesuffix(" on"))
        torch.distributed.barrier()
        try:
            torch.save(
                start(folder / name.removesuffix(" on") / "both", *settings, *both),
                folder / f"{name}.{rank}.pt",
            )
        except (DataError, CheckpointError) as error:
            torch.distributed.barrier()
            (folder / f"{name}.{rank}.txt").write_text(f"{type(error).__name__}: {error}")
    if "broken" not in asked:
        return
    # A process that does not answer.
    group = torch.distributed.new_group(timeout=timedelta(seconds=2))
    if rank == 0:
        try:
            torch.distributed.all_reduce(torch.ones(1), group=group)
        except RuntimeError as error:
            (folder / "lost.txt").write_text(str(failures.explained(error, {})))
    torch.distributed.destroy_process_group(group)


def write_files(folder: Path) -> None:
    """Write the rows of all cases."""
    write_rows(folder / "chats.jsonl", sums(60))
    write_rows(folder / "texts.jsonl", [{"text": "abc " * (3 + i % 9)} for i in range(60)])
    write_rows(
        folder / "labels.jsonl",
        [
            {"text": ("good " if i % 2 else "bad ") * (1 + i % 5), "label": str(i % 2)}
            for i in range(60)
        ],
    )
    (folder / "broken.jsonl").write_text("{}\n" * 3)


def together(folder: Path, cases: dict[str, list[str]], processes: int = 2) -> None:
    """Go through cases with several processes."""
    cases = {name: words_of(folder, name, settings) for name, settings in cases.items()}
    (folder / "cases.json").write_text(json.dumps(cases))
    spawn(_member, folder, processes)


REFUSED = {
    "broken": ["task.path={broken}"],
    "lora again": [
        "max_epochs=1",
        "max_steps=null",
        "accumulate=2",
        "seed=1",
        "resume={folder}/lora/both/smoke",
    ],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two processes have gone through the cases of the default suite."""
    made = tmp_path_factory.mktemp("processes")
    write_files(made)
    moved = words_of(made, "fsdp2 moved", [*MOVED, "max_steps=2"])
    start(made / "fsdp2 moved/both", *moved, *ONE)
    on = {"fsdp2 moved": [*MOVED, "max_steps=4", "resume=auto"]}
    together(made, CASES | SHARDED | on | REFUSED)
    return made


def seen(folder: Path, name: str) -> list[dict[str, Any]]:
    """What the Recorder of each process saw."""
    files = sorted(folder.glob(f"{name}.[0-9].pt"))
    return [torch.load(file, weights_only=True) for file in files]


def equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    """Whether both have the same bits."""
    return first.keys() == second.keys() and all(
        torch.equal(tensor, second[key]) for key, tensor in first.items()
    )


def difference(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest relative difference of a tensor's norm."""
    assert actual.keys() == expected.keys()
    far = []
    for name, tensor in expected.items():
        apart, size = (actual[name].double() - tensor.double()).norm(), tensor.double().norm()
        assert torch.isfinite(apart)
        far.append(float(apart / size) if size else float(apart))
    return max(far, default=0.0)


def compare(folder: Path, name: str, settings: list[str]) -> tuple[float, float]:
    """Hold a case of two processes against the same in one; gives the largest relative differences
    of gradients and weights."""
    first, *others = seen(folder, name)
    alone = start(folder / name / "alone", *words_of(folder, name, settings), "batch_size=8")
    for kind in ("weights", "buffers"):
        assert all(equal(first[kind], other[kind]) for other in others), (
            f"{kind} differ between processes"
        )
    assert first["buffers"].keys() == alone["buffers"].keys()
    assert all(
        torch.equal(tensor, alone["buffers"][key]) for key, tensor in first["buffers"].items()
    ), "another support"
    rows = [
        sorted(str(row) for part in parts for row in part)
        for parts in zip(*(one["sequences"] for one in (first, *others)), strict=True)
    ]
    assert rows == [sorted(map(str, rows)) for rows in alone["sequences"]], (
        "rows were lost or repeated"
    )
    assert len(first["rows"]) == len(alone["rows"])
    for actual, expected in zip(first["rows"], alone["rows"], strict=True):
        assert actual.keys() == expected.keys()
        for key, value in expected.items():
            if key not in (
                "seconds",
                "answer_seconds",
                "time",
                "tokens_per_s",
                "trained_per_s",
                "minutes",
            ):
                same = (
                    pytest.approx(value, rel=1e-4, abs=1e-6) if isinstance(value, float) else value
                )
                assert actual[key] == same, (actual["kind"], actual["step"], key)
    assert len(first["gradients"]) == len(alone["gradients"])
    assert any(alone["gradients"])  # a step that only makes a mask has none
    assert alone["weights"]
    far = max(map(difference, first["gradients"], alone["gradients"]))
    return far, difference(first["weights"], alone["weights"])


@pytest.mark.parametrize("name", CASES | SHARDED)
def test_two_processes_are_one_with_the_whole_batch(folder, name):
    """4 rows of each of two processes are 8 of one: gradients, weights, supports, rows, and the
    numbers in the journal."""
    gradients, weights = compare(folder, name, (CASES | SHARDED)[name])
    # Sums in another order; in the weights, Adam's steps turn on gradients that are zero but for
    # rounding.
    assert gradients < 1e-4
    assert weights < 1e-4


def test_one_process_tokenises_for_all(folder):
    keys = (folder / "tokenised").read_text().split()
    assert len(keys) >= 4
    assert sorted(keys) == sorted(set(keys))


def test_what_stops_one_process_stops_all_with_its_message(folder):
    for name, message in (("broken", "DataError: "), ("lora again", "UnusableCheckpoint: ")):
        texts = [(folder / f"{name}.{rank}.txt").read_text() for rank in (0, 1)]
        assert texts[0] == texts[1]
        assert texts[0].startswith(message)
    assert "seed: 0 in the run, 1 now" in texts[0]


def test_a_process_that_does_not_answer_is_told_of(folder):
    said = (folder / "lost.txt").read_text()
    assert "lost contact with another process of this run" in said
    assert said.endswith(", 1)")


def test_a_run_of_two_processes_resumes_in_one_only_with_the_same_steps(folder):
    settings = words_of(folder, "lora", CASES["lora"])
    with pytest.raises(CheckpointError, match="ranks: 2 in the run, 1 now") as refused:
        start(folder / "lora/both", *settings, "batch_size=4", "resume=auto")
    assert "a step had 16 rows, and would have 8: keep batch_size x" in str(refused.value)


def test_a_run_resumes_with_another_number_of_processes(folder, caplog):
    """From one process to two with FSDP2, and back: the run of one process up to rounding."""
    settings = words_of(folder, "fsdp2 moved", MOVED)
    whole = start(folder / "fsdp2 moved/alone", *settings, *ONE, "max_steps=6")
    first, second = seen(folder, "fsdp2 moved")
    assert equal(first["weights"], second["weights"])
    with caplog.at_level("INFO"):
        last = start(folder / "fsdp2 moved/both", *settings, *ONE, "max_steps=6", "resume=auto")
    assert "1 processes instead of 2: weights, optimiser state, rates and the rows" in caplog.text
    assert len(first["gradients"]) == len(last["gradients"]) == 2
    assert whole["buffers"]
    assert equal(last["buffers"], whole["buffers"])
    assert difference(last["weights"], whole["weights"]) < 1e-4
    recorded = [row["loss"] for row in last["rows"] if row["kind"] == "step"]
    expected = [row["loss"] for row in whole["rows"] if row["kind"] == "step"]
    assert len(expected) == 6
    assert recorded == pytest.approx(expected, rel=1e-4)


FSDP2 = "lightning.strategy=fsdp2 lightning.devices=2"


@pytest.mark.long
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            "lightning.strategy=deepspeed_stage_2 lightning.devices=2",
            "DeepSpeed writes checkpoints of its own",
        ),
        ("lightning.strategy=fsdp lightning.devices=2", "set lightning.strategy=fsdp2"),
        ("lightning.strategy=ddp_spawn lightning.devices=2", "set it to auto, ddp or fsdp2"),
        ("lightning.strategy=fsdp2", "and there is one"),
        (f"{FSDP2} base.quantization=int8", "keeps what 8-bit weights are multiplied with"),
        (f"{FSDP2} adapter=rosa adapter.dtype=bfloat16", "set both to float32"),
        (f"{FSDP2} adapter=rosa adapter.sparse_dtype=bfloat16", "set both to float32"),
        (
            f"{FSDP2} adapter=sparse adapter.train_modules=[lm_head]",
            "not tested with adapter",
        ),
        (f"{FSDP2} adapter=spiel base.add_tokens=[a]", "not tested with base.add_tokens"),
        (f"{FSDP2} adapter=shira", "adapter=sparse with adapter.mask=random"),
        (f"{FSDP2} adapter=dora", "PEFT's methods are not tested"),
        (f"{FSDP2} adapter=bilora", "rounds by the mean of a whole factor"),
        (f"{FSDP2} adapter=increlora", "gives each process other rows"),
        (f"{FSDP2} adapter=mola", "not tested with adapter=mola"),
        (f"{FSDP2} adapter=mos", "whose layers share parameters"),
        (f"{FSDP2} adapter=deft", "penalty=deft reads activations"),
        (f"{FSDP2} callbacks=[default,averaging]", "callbacks.averaging averages full weights"),
        (f"{FSDP2} callbacks.checkpoints=null", "callbacks.checkpoints is null"),
        (f"{FSDP2} optimizer=adamw_8bit", "set optimizer=adamw"),
        (f"{FSDP2} drafter=registers", "not tested with drafter=registers"),
        (
            f"{FSDP2} adapter=full drafter=mtp_medusa",
            "not tested with a drafter and adapter=full",
        ),
        ("adapter=rosa adapter.scores=candidates lightning.devices=2", "Set adapter.scores=exact"),
        (
            "adapter=spiel adapter.accumulation_steps=1 lightning.devices=[0,1]",
            "set adapter.accumulation_steps=2",
        ),
    ],
)
def test_what_several_processes_cannot_do_is_told_before_launch(compose, settings, message):
    with pytest.raises(ConfigError, match=message):
        compose("+experiment=smoke", "task.path=rows.jsonl", *settings.split())


# Every file of conf/adapter and conf/drafter. What draws at random does so in each process for
# itself, so it is switched off here.
SPIEL = ["adapter.density=0.1", "adapter.reselection_steps=3", "adapter.accumulation_steps=2"]
ADAPTERS: dict[str, list[str]] = {
    "adalora": ["adapter.init_r=4", "adapter.target_r=2"],
    "bilora": [],
    "corda": ["adapter.r=4", "adapter.data_batches=2"],
    "deft": ["adapter.dropout=0", "penalty.eps=0.01"],
    "dora": ["adapter.r=4"],
    "dsee": ["adapter.density=0.05", "adapter.rank=4"],
    "eva": ["adapter.r=4", "adapter.data_batches=2"],
    "full": [],
    "ia3": [],
    "increlora": ["adapter.target_rank=2", "adapter.grow_by=1"],
    "loftq": ["adapter.r=4", "base.quantization=nf4", "base.hidden_size=64"],
    "lora": ["base.quantization=nf4", "base.hidden_size=64"],
    "loraplus": [],
    "mola": [],
    "mos": ["adapter.rank=3"],
    "peft": ["adapter.peft_type=LOHA", "+adapter.r=4"],
    "pissa": ["adapter.r=4"],
    "prefix_tuning": [],
    "prompt_tuning": [],
    "pst": ["adapter.renew=1"],
    "rosa": CASES["rosa"][1:],
    "rslora": [],
    "shira": ["adapter.r=4"],
    "sparse": ["adapter.density=0.1", "adapter.score=mean"],
    "spiel_ma": SPIEL,
    "spiel": SPIEL,
    "sr_ste": [],
    "supertuning": [],
}
TIMES = ("seconds", "answer_seconds", "time", "tokens_per_s", "trained_per_s", "minutes")
BLOCK = ["drafter.aux_layers=[0,1,2]", "drafter.offsets=2", "drafter.draft_layers=1"]
DRAFTERS: dict[str, list[str]] = {
    "clover": ["drafter.offsets=2"],
    "dflash": BLOCK,
    "dspark": [*BLOCK, "drafter.markov_rank=4"],
    "eagle": ["drafter.noise=0", "drafter.offsets=2"],
    "eagle3": ["drafter.aux_layers=[0,1,2]", *EAGLE3[3:]],
    "hydra": ["drafter.offsets=2"],
    "hydra_plus": ["drafter.offsets=2", "drafter.dropout=0"],
    "kangaroo": [],
    "medusa": ["drafter.offsets=2"],
    "mtp_medusa": [],
    "mtp_parallel": [],
    "mtp_sequential": [],
    "mtp_shared": [],
    "peagle": [*BLOCK, *EAGLE3[3:5], "drafter.keep=1"],  # fewer positions are drawn
    "registers": ["drafter.share=1"],
}
# They begin from the first batches of a process's rows, or choose entries by the first process's;
# all processes then have the same. Registers draw each row's offset.
OF_FIRST = {"adapter corda", "adapter eva", "adapter spiel", "registers with lora"}
WIDE = {
    f"adapter {name}": [f"adapter={name}", "max_steps=3", *more] for name, more in ADAPTERS.items()
}
WIDE |= {
    f"{name} with lora": [f"drafter={name}", "max_steps=2", *more]
    for name, more in DRAFTERS.items()
}
WIDE |= {
    f"{name} alone": ["adapter=none", "objective=distill", f"drafter={name}", "max_steps=2", *more]
    for name, more in DRAFTERS.items()
    if name != "registers"
}
WIDE |= {f"fsdp2 {name}": CASES[name] for name in ("classes", "medusa", "eagle3")}
WIDE |= {
    "fsdp2 sparse": ["adapter=sparse", "adapter.mask=random", "adapter.density=0.1", "max_steps=3"],
    "fsdp2 nf4 rosa": [*NF4, *CASES["rosa"], "max_steps=4"],
    "fsdp2 spiel_ma": ["adapter=spiel_ma", *SPIEL, "max_steps=6"],
}
# With several processes SpIEL's candidates are those of the first one, so DDP is the reference.
SPIELS = {f"{way} spiel_ag": ["adapter=spiel", *SPIEL, "max_steps=6"] for way in ("ddp", "fsdp2")}
# A run, the same run cut off after its second step, and its resume.
RESUMED = {}
RESUMES = {
    "ddp": ["accumulate=2"],
    "fsdp2": [],
    "fsdp2 full": ["adapter=full"],
    "fsdp2 nf4": NF4,
    "fsdp2 rosa": CASES["rosa"],
}
for _name, _more in RESUMES.items():
    _common = [*_more, "schedule=constant", "callbacks.checkpoints.every=1"]
    RESUMED |= {
        f"{_name} whole": [*_common, "max_steps=4"],
        f"{_name} cut": [*_common, "max_steps=2"],
    }
    RESUMED |= {f"{_name} cut on": [*_common, "max_steps=4", "resume=auto"]}
# Their replacements depend on max_steps, so the second run is the first one without its newer
# checkpoints. It resumes in the middle of a window whose gradients choose what grows.
REWOUND = {
    f"fsdp2 {name}": [
        *(f"adapter={name}", *SPIEL, "max_steps=6", "schedule=constant"),
        *("callbacks.checkpoints.every=1", "callbacks.checkpoints.keep=null"),
    ]
    for name in ("spiel", "spiel_ma")
}
for _name, _more in REWOUND.items():
    RESUMED |= {f"{_name} whole": _more, f"{_name} cut on": [*_more, "resume=auto"]}


def test_the_wide_cases_are_all_of_conf():
    # native is for bases that bring a head: tests/assembly/test_guarded.py trains it. Uno draws
    # its slots in each process, and PPD its anchors: tests/drafters has their steps.
    for group, actual in (("adapter", ADAPTERS), ("drafter", [*DRAFTERS, "native", "ppd", "uno"])):
        assert {*actual, "none"} == {path.stem for path in (ROOT / "conf" / group).glob("*.yaml")}


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("wide")
    write_files(made)
    together(made, WIDE | SPIELS | RESUMED)
    return made


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", WIDE)
def test_any_method_in_two_processes(wide, name):
    first, second = (torch.load(wide / f"{name}.{rank}.pt", weights_only=True) for rank in (0, 1))
    for kind in ("weights", "buffers"):
        assert all(torch.equal(tensor, second[kind][key]) for key, tensor in first[kind].items())
    if name in OF_FIRST:
        return
    gradients, weights = compare(wide, name, WIDE[name])
    assert gradients < 1e-3
    assert weights < 1e-3


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_spiel_with_fsdp2_is_spiel_with_ddp(wide):
    (ddp, _), (fsdp2, _) = (seen(wide, f"{way} spiel_ag") for way in ("ddp", "fsdp2"))
    assert equal(ddp["buffers"], fsdp2["buffers"])
    assert difference(fsdp2["weights"], ddp["weights"]) < 1e-4


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("four")
    write_files(made)
    together(made, FOUR, processes=4)
    return made


FOUR = {name: (WIDE | SHARDED)[name] for name in WIDE | SHARDED if name.startswith("fsdp2")}


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", FOUR)
def test_four_processes_are_one_with_the_whole_batch(four, name):
    gradients, weights = compare(four, name, FOUR[name])
    assert gradients < 1e-3
    assert weights < 1e-3


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_one_of_four_processes_tokenises_for_all(four):
    test_one_process_tokenises_for_all(four)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", RESUMES | REWOUND)
def test_two_processes_go_on_bit_for_bit(wide, name):
    for rank in (0, 1):
        whole, on = (
            torch.load(wide / f"{name} {kind}.{rank}.pt", weights_only=True)
            for kind in ("whole", "cut on")
        )
        assert len(on["gradients"]) == len(whole["gradients"]) - 2
        assert equal(whole["weights"], on["weights"])
        assert equal(whole["buffers"], on["buffers"])  # supports and masks


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_process_ends_the_other(tmp_path, chats, rank):
    settings = [
        f"task.path={chats}",
        "max_steps=100000",
        "lightning=cpu",
        "lightning.devices=2",
        "lightning.timeout=1",
    ]
    command = [
        sys.executable,
        "-m",
        "trainer",
        "+experiment=smoke",
        *settings,
        "callbacks.evaluation.every=null",
    ]
    first = psutil.Popen(
        command,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    rows = tmp_path / "runs/smoke/metrics.jsonl"
    while not (rows.exists() and len(rows.read_text().splitlines()) > 4):
        assert first.poll() is None, first.stdout.read()
        time.sleep(0.1)
    (second,) = (child for child in first.children() if "trainer" in " ".join(child.cmdline()))
    (first, second)[rank].kill()
    began = time.monotonic()
    (second, first)[rank].wait(timeout=100)
    assert time.monotonic() - began < 90
    first.wait(timeout=10)
    assert first.returncode != 0
    with first.stdout as said:
        assert "lost contact with another process of this run" in said.read()
