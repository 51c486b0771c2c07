"""A run's result for use elsewhere, called done only after it was loaded back and gave the run's own logits.

    python -m trainer.export run=FOLDER[@last|best|STEP] to=peft|merged|shira|drafter|mtp|speculators|sglang|medusa [out=FOLDER]
                             [dtype=float32|bfloat16|float16] [verifier=ORG/NAME] [unembedding=shared|copied]

peft is the adapter as stock PEFT loads it; merged is a model folder as transformers loads it, merged in fp32 and then cast to
dtype. A quantised base is merged as its rounding left it, which is what the adapter was trained on. MTP layers in the files of a
base, which transformers does not load, are copied into a merged folder as they are. shira is for adapters with a sparse part.

drafter is the run's drafter as a folder, as the run itself writes it after its last step. mtp is merged with the drafter as the MTP
layer of the base's own family: for generate(use_mtp=True), vLLM and SGLang; trainer/drafters/native.py says for which bases.

speculators (EAGLE-3) and sglang (EAGLE-1, EAGLE-3) are drafters as vLLM and SGLang load them, medusa is Medusa's own file;
trainer/layouts.py says which fits what. verifier is the model that a config names as the one drafted for, by default the base.
unembedding=copied gives each of Medusa's heads a copy of the target's output layer, as its first version has them.
"""

from __future__ import annotations

import logging
import shutil
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any, cast

import huggingface_hub
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from hydra.utils import get_class
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from adapters.delta import AdapterError
from trainer import assembly, layouts
from trainer.assembly import Trained
from trainer.base import Base
from trainer.checkpoint import CheckpointError
from trainer.drafters import Drafter, DrafterError, News, Target, io, native
from trainer.folder import read

log = logging.getLogger("trainer")

TOLERANCE = (
    1e-3  # root mean square of the logits' difference over their spread; summing in another order makes some 1e-5 in fp32
)


class Mismatch(CheckpointError):
    """What was exported answers differently from the run's own model."""


def export(
    run: str, to: str, out: Path | None, dtype: str, verifier: str | None = None, unembedding: str = "shared"
) -> tuple[Path, float]:
    """Write, load back, compare; returns the folder and the largest logit difference over the logits' spread.

    Raises:
        Mismatch: the loaded export differs; nothing is left behind.
        DrafterError: the run has no drafter, or one that is no MTP layer of its base's family or that the layout does not fit.
    """
    if to in ("drafter", "mtp", *layouts.LAYOUTS):
        _check_drafter(run, to)
    found = assembly.trained(run, exact=True, unpack=to in ("merged", "mtp"))
    if to == "shira" and not hasattr(found.adapter, "save_pair"):
        raise AdapterError(
            f"to=shira is for adapters with a sparse part, and this run's is {type(found.adapter).__name__}: to=peft"
        )
    # The run has its own folder called drafter, of its last step.
    out = out or found.folder / (f"drafter-step-{found.step}" if to == "drafter" else to)
    if out.exists():
        raise CheckpointError(f"{out} exists. Remove it, or choose another place with out=FOLDER")
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        if to == "drafter":
            difference = _write_drafter(found, temporary)
        elif to in layouts.LAYOUTS:
            difference = _write_head(found, temporary, to, getattr(torch, dtype), verifier, unembedding == "copied")
        elif to in ("peft", "shira"):
            save_adapter(found.adapter, found.model, found.base, found.task, temporary, pair=to == "shira")
            difference = verify_adapter(found, temporary)
        else:
            difference = _write_merged(found, temporary, getattr(torch, dtype), mtp=to == "mtp")
        temporary.chmod(0o755)
        temporary.rename(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return out, difference


def save_adapter(adapter: Any, model: nn.Module, base: Base, task: Any, folder: Path, pair: bool = False) -> None:
    """The adapter as stock PEFT reads it; a sparse one as a `pair` of SHiRA and LoRA where that is asked for."""
    save = adapter.save_pair if pair else adapter.save
    save(model, folder, base.path, "SEQ_CLS" if task.kind == "label" else "CAUSAL_LM")


@torch.no_grad()
def verify_adapter(found: Trained, folder: Path) -> float:
    """Load an adapter folder with stock PEFT onto a fresh base, and hold its logits against the run's model, in fp32.

    Raises:
        Mismatch: they differ.
    """
    wanted = _outputs(found.model, found)
    fresh = found.base.load(torch.float32, found.task.labels if found.task.kind == "label" else None)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The following rank_pattern keys.*lora_E")  # of every AdaLoRA
        loaded = found.adapter.load_stock(fresh, folder).eval()
    difference = _compare(wanted, _outputs(loaded, found))
    with found.adapter.disabled(found.model):
        alone = _outputs(found.model, found)[-1]
    if torch.equal(wanted[-1][:, -alone.shape[1] :], alone):  # virtual tokens stand before the row's own
        log.warning("the adapter changes no logit: was it trained?")
    return difference


def _check_drafter(run: str, to: str) -> None:
    """Before any weights are loaded."""
    _, content, _ = read(run)
    config, labels = content["config"], content["identity"]["labels"]
    if not config["drafter"]:
        raise DrafterError(f"run={run} has no drafter. Train one beside the adapter: python -m trainer ... drafter=mtp_shared")
    kind: Any = get_class(config["drafter"]["_target_"])
    if not kind.proposes:
        raise DrafterError(
            f"run={run} has a drafter ({kind.__name__}) that only shapes the adapter: to=peft or to=merged is all of it"
        )
    if to != "drafter":
        skeleton = assembly.instantiate(config["base"]).skeleton(labels)
        drafter = assembly.instantiate(config["drafter"])(model=skeleton)
        native.check(drafter, skeleton) if to == "mtp" else layouts.check(drafter, to, skeleton)


def _write_drafter(found: Trained, place: Path) -> float:
    assert found.drafter is not None
    io.save(found.drafter, found.config["drafter"], io.trained_for(found.base, found.folder, found.step, found.adapted), place)
    again = io.load(place, found.base.load(torch.float32), found.base.fingerprint).state()
    different = [name for name, tensor in found.drafter.state().items() if not torch.equal(tensor, again[name])]
    if different:
        raise Mismatch(f"the drafter, loaded back, differs from the run's in {', '.join(different[:5])}")
    return 0.0


@torch.no_grad()
def _write_head(found: Trained, folder: Path, to: str, dtype: torch.dtype, verifier: str | None, copied: bool) -> float:
    """A drafter in an engine's layout, its files held against tables of names, and what they compute against the drafter itself."""
    drafter, model = found.drafter, cast(Any, found.model)
    assert drafter is not None
    head = layouts.canonical(drafter, model, copied)
    layouts.write(head, to, folder, dtype, verifier or found.base.path)
    if wrong := layouts.faults(folder, to, head, dtype, model):
        raise Mismatch(f"the export is not what to={to} should have written: {'; '.join(wrong[:5])}")
    for part in (drafter, model.get_input_embeddings(), model.get_output_embeddings()):
        _cast(part, dtype)
        _cast(part, torch.float32)
    # The names that the files have are read by another program than the one that wrote them.
    draw, count, sizes = torch.Generator().manual_seed(0), 12, model.config.get_text_config()
    states = torch.randn(count, max(1, len(head.layers)) * sizes.hidden_size, generator=draw)
    ids = torch.randint(3, sizes.vocab_size, (count + 1 + head.drafts,), generator=draw)
    drafted = ids[count + 1 : count + (head.drafts if to == "medusa" else min(head.drafts, 4))]
    wanted = _drafted(drafter, Target(model), states, ids[: count + 1], drafted)
    difference = _distance(wanted, layouts.logits(folder, to, model, states, ids[1 : count + 1], drafted))
    if not difference <= TOLERANCE:
        raise Mismatch(
            f"the files give other logits than the run's drafter, by {difference:.3g} of their spread (at most {TOLERANCE:g})"
        )
    if head.method == "eagle" and "fc.bias" in head.own:
        log.warning("SGLang adds the bias of this drafter's fc, and vLLM drops it: train with drafter.bias=false for vLLM")
    if verifier is None:
        log.warning(
            "the config names %s as the model drafted for. Where that is a folder, or the run's adapter is merged into another, "
            "say verifier=ORG/NAME: `vllm serve FOLDER` looks for it on the hub",
            found.base.path,
        )
    return difference


def _drafted(drafter: Drafter, target: Target, states: Tensor, ids: Tensor, drafted: Tensor) -> Tensor:
    """The drafter's own logits after `ids`, whose first token has no state, and after each drafted one."""
    read, other = (states, states[:, :0]) if not drafter.layers else (states.new_zeros(len(states), 1), states)
    growth = drafter.grow(drafter.start(target), target, News(read, other, ids[1:], ids[0]))
    rows = [growth.first()]
    for place, token in enumerate(drafted):
        rows.append(growth.below(token[None], torch.tensor([place - 1]))[0])
    return torch.stack(rows).float()


@torch.no_grad()
def _write_merged(found: Trained, folder: Path, dtype: torch.dtype, mtp: bool) -> float:
    wanted = _outputs(found.model, found)
    merged: Any = found.adapter.merge(found.model)
    difference = _compare(wanted, _outputs(merged, found))
    if mtp:
        native.check(found.drafter, merged)
    _cast(merged, dtype)
    merged.config.dtype = dtype
    merged.save_pretrained(folder)
    # From its source again: the tokenizer in use had its length limit lifted.
    AutoTokenizer.from_pretrained(found.base.path, trust_remote_code=found.base.trust_remote_code).save_pretrained(folder)
    if mtp:
        drafter: Any = found.drafter
        native.append(folder, native.tensors(drafter, merged, dtype), {})
    elif found.task.kind != "label":
        _keep_mtp(found.base, merged, folder)
    auto: Any = AutoModelForSequenceClassification if found.task.kind == "label" else AutoModelForCausalLM
    loaded, notes = auto.from_pretrained(
        folder, dtype=torch.float32, trust_remote_code=found.base.trust_remote_code, output_loading_info=True
    )
    if notes["missing_keys"]:
        raise Mismatch(f"the export lacks {', '.join(sorted(notes['missing_keys'])[:5])}")
    loaded.eval()
    _cast(merged, torch.float32)
    rounded = _outputs(merged, found)
    _compare(rounded, _outputs(loaded, found))  # the folder holds exactly what was merged
    if mtp:
        _compare_mtp(found, merged, loaded, dtype)
    if dtype != torch.float32:
        agreement = float((wanted[-1].argmax(-1) == rounded[-1].argmax(-1)).float().mean())
        log.warning(
            "rounded to %s, the most likely token stays the same at %.1f %% of positions",
            str(dtype).removeprefix("torch."),
            100 * agreement,
        )
    return difference


def _keep_mtp(base: Base, merged: Any, folder: Path) -> None:
    """Copy the MTP layers in the base's files, which transformers has not loaded, into the folder."""
    place = Path(base.path)
    if not place.is_dir():
        try:
            place = Path(
                huggingface_hub.snapshot_download(
                    base.path, revision=base.revision, local_files_only=True, allow_patterns=["*.safetensors", "*.json"]
                )
            )
        except LocalEntryNotFoundError:
            return
    extra, settings = native.left_out(place, merged.config.get_text_config().num_hidden_layers, folder)
    if not extra:
        return
    if getattr(base.config, "quantization_config", None) is not None:
        log.warning("the base's MTP layers (%d tensors) are quantised, and this export is not: they are left out", len(extra))
        return
    native.append(folder, extra, settings)
    log.warning(
        "the base's MTP layers (%d tensors) were copied as they are: they were trained for the base, and the adapter's model takes "
        "fewer of their tokens",
        len(extra),
    )


def _compare_mtp(found: Trained, merged: Any, loaded: Any, dtype: torch.dtype) -> None:
    """Hold what transformers' MTP layer says, loaded from the export, against the drafter with its weights rounded likewise."""
    ids = _rows(merged, found)
    drafter: Any = found.drafter
    _cast(drafter, dtype)
    _cast(drafter, torch.float32)
    wanted, got = native.own_logits(drafter, merged, ids), native.transformers_logits(loaded, ids)
    difference = _distance(wanted.float(), got.float())
    if not difference <= TOLERANCE:
        raise Mismatch(
            f"the MTP layer, loaded back, differs from the run's drafter by {difference:.3g} of the logits' spread (at most {TOLERANCE:g})"
        )


def _cast(model: nn.Module, dtype: torch.dtype) -> None:
    # Parameters only: rotary frequencies are buffers, which a loaded model computes in fp32 again.
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


def _outputs(model: nn.Module, found: Trained) -> list[torch.Tensor]:
    """Hidden states after each layer, then the logits, of `_rows`."""
    ids = _rows(model, found)
    output = model(input_ids=ids, attention_mask=torch.ones_like(ids), output_hidden_states=True, use_cache=False)
    return [*(state.float() for state in output.hidden_states), output.logits.float()]


def _rows(model: nn.Module, found: Trained) -> torch.Tensor:
    """Four rows of random tokens."""
    draw = torch.Generator().manual_seed(0)
    text = found.base.config.get_text_config()
    ids = torch.randint(3, text.vocab_size, (4, min(32, found.base.longest)), generator=draw)
    return ids.to(next(model.parameters()).device)


def _distance(a: torch.Tensor, b: torch.Tensor) -> float:
    # Its root mean square: at single positions rounding alone grows a thousandfold on its way through the layers.
    return float((a - b).square().mean().sqrt() / a.std().clamp_min(1e-6)) if a.shape == b.shape else float("inf")


def _compare(wanted: list[torch.Tensor], got: list[torch.Tensor]) -> float:
    difference = _distance(wanted[-1], got[-1])
    if difference <= TOLERANCE:
        return difference
    layers = [_distance(a, b) for a, b in zip(wanted[:-1], got[:-1], strict=True)]
    first = next((i for i, value in enumerate(layers) if value > TOLERANCE), None)
    where = (
        "only the logits do"
        if first is None
        else f"the first to do so is {'the embedding' if first == 0 else f'decoder layer {first - 1}'} (by {layers[first]:.3g})"
    )
    raise Mismatch(
        f"the export, loaded back, differs from the run's model by {difference:.3g} of the logits' spread (at most {TOLERANCE:g}); {where}"
    )


def main(argv: list[str]) -> int:
    """The verb; see the module's text."""
    from trainer import config, failures

    taken = {"run": ..., "to": ..., "out": None, "dtype": "float32", "verifier": None, "unembedding": "shared"}
    options = config.arguments(argv, taken, __doc__ or "")
    choice = {
        "to": ("peft", "merged", "shira", "drafter", "mtp", *layouts.LAYOUTS), "dtype": ("float32", "bfloat16", "float16"),
        "unembedding": ("shared", "copied"),
    }  # fmt: skip
    for key, choices in choice.items():
        if options[key] not in choices:
            print(f"{key}={options[key]}: choose one of {', '.join(choices)}", file=sys.stderr)
            return config.EXIT_BAD_INPUT
    assembly.quiet()
    try:
        out, difference = export(
            options["run"], options["to"], Path(options["out"]) if options["out"] else None, options["dtype"],
            options["verifier"], options["unembedding"],
        )  # fmt: skip
    except Exception as error:
        return failures.told(error)
    print(f"{out}\nloaded back and compared: logits differ by {difference:.2e} of their spread")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
