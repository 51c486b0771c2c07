"""Every method of stock PEFT through one bridge: `adapter=peft adapter.peft_type=LOHA adapter.r=8
...`.

Field names and their defaults are PEFT's own; conf/adapter holds presets. What this file adds is
what PEFT leaves to its caller: initialisations computed from data (EVA, CorDA, LoRA-GA) or from the
unquantised weights (LoftQ), AdaLoRA's budget and penalty, and a state from which a run goes on
exactly.

PiSSA, OLoRA, CorDA and LoRA-GA move a part B₀A₀ of each weight into the adapter and leave W - s
B₀A₀ behind. Here that remainder is always computed by `_take_out` from the stored A₀, B₀, so that
it has the same bits after a resume, and the saved adapter is the difference B A - B₀A₀ at twice the
rank, which fits the base as everyone else has it.
"""

from __future__ import annotations

import ast
import contextlib
import copy
import itertools
import re
import warnings
from collections.abc import Iterator
from dataclasses import fields as dataclass_fields
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from peft.utils.loftq_utils import _low_rank_decomposition, _SafetensorLoader
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from adapters import io
from adapters.delta import (
    Adapter,
    AdapterError,
    NeedsWeights,
    Start,
    _ends,
    _to_own_dtype,
    copy_tensors,
    float_weight,
    freeze,
    is_linear,
    refuse_quantised,
    set_float_weight,
    targets,
    untie,
)
from adapters.peft_fields import CHANGES_BASE, OURS, PROMPT_LEARNING, classes, config_class

NAME = "default"  # PEFT's name for the only adapter
ORDINARY_START = {
    "init_lora_weights": True,
    "corda_config": None,
    "lora_ga_config": None,
    "eva_config": None,
}


class Peft(Adapter):
    """One of PEFT's methods, made from its own configuration class."""

    def __init__(self, peft_type: str, data_batches: int, **fields: Any):
        entry = config_class(peft_type)
        if entry is None or entry.peft_type is None:
            raise AdapterError(
                f"adapter.peft_type is {peft_type!r}, which PEFT {peft.__version__} does not have"
            )
        self.kind, self.config_name, self.data_batches = entry.peft_type, entry.name, data_batches
        self.fields = {key: value for key, value in fields.items() if key not in OURS}
        self.init = str(self.fields.get("init_lora_weights", ""))
        self.changes_base = self.kind == "LORA" and self.init.startswith(CHANGES_BASE)
        self.mergeable = self.kind not in PROMPT_LEARNING
        self.initial: dict[str, Tensor] = {}  # A₀ and B₀ where changes_base
        # tensors of the frozen base, by their names in the wrapped model
        self.base_names: set[str] = set()

    def attach(self, model: nn.Module, start: Start) -> nn.Module:
        freeze(model)
        # held, so that no id is reused
        base_tensors = {id(t): t for t in itertools.chain(model.parameters(), model.buffers())}
        on_meta = next(model.parameters()).device.type == "meta"
        computed = start.saved is None and not on_meta
        config = self._config(model, start, computed)
        if computed:
            self._before_wrapping(model, config, start)
        weights = {}
        if computed and self.changes_base:
            weights = {
                name: module.weight.detach().clone()
                for name, module in model.named_modules()
                if is_linear(module)
            }
        # as they are anyway: unsaid, torch warns at SHiRA and others
        torch.sparse.check_sparse_tensor_invariants.disable()
        try:
            with _silent():
                wrapped = peft.get_peft_model(model, config)
        except torch.OutOfMemoryError:
            raise
        except (
            ValueError,
            TypeError,
            KeyError,
            NotImplementedError,
            ImportError,
            RuntimeError,
        ) as error:
            refusal = (
                NeedsWeights
                if on_meta
                and (isinstance(error, NotImplementedError) or "meta tensor" in str(error))
                else AdapterError
            )
            raise refusal(f"PEFT cannot put {self.config_name} on this model: {error}") from error
        for name, parameter in wrapped.named_parameters():
            # AdaLoRA's divisor, which PEFT makes a constant, then trains, and does not save
            if ".ranknum." in name:
                parameter.requires_grad_(False)
        if computed:
            self._after_wrapping(wrapped, start)
        if weights:
            self.initial = {
                name: tensor.detach().clone() for name, tensor in self._factors(wrapped)
            }
            for name, module in self._adapted(wrapped):
                module.get_base_layer().weight.data.copy_(weights[name])
                if self._part(name, module).shape != float_weight(module.get_base_layer()).shape:
                    kind = type(module.get_base_layer()).__name__
                    raise AdapterError(
                        f"PEFT's initialisation {self.init} does not work on this model's {kind}"
                        f" layers, such as {name}"
                    )
            self._take_out(wrapped)
        for name in start.new_modules:  # PEFT trains a copy of them
            trained = wrapped.get_base_model().get_submodule(name).modules_to_save[NAME].float()
            trained.register_forward_pre_hook(_to_own_dtype)
        self.base_names = {
            name for name, tensor in _own_tensors(wrapped) if id(tensor) in base_tensors
        }
        return wrapped

    def _config(self, model: nn.Module, start: Start, computed: bool) -> Any:
        if start.saved is not None:
            values = dict(start.saved["extra"]["config"])
        else:
            values = dict(self.fields)
            if self.kind == "ADALORA" and values.get("total_step") is None:
                values["total_step"] = start.steps
            if self.kind not in PROMPT_LEARNING:
                _refuse_unknown(model, values.get("target_modules") or "all-linear")
        transposed = any(isinstance(module, Conv1D) for module in model.modules())
        if transposed and "fan_in_fan_out" in classes()[self.config_name].fields:
            values.setdefault("fan_in_fan_out", True)
        if self.kind == "LORA" and (not computed or self.init == "loftq"):
            # saved or later computed tensors replace whatever is put there
            values |= ORDINARY_START
        if self.kind == "ADALORA":
            # `load_state` brings it; PEFT would look for layers' ranks in it, as for a LoRA
            values["rank_pattern"] = None
        values["task_type"] = "SEQ_CLS" if start.new_modules else "CAUSAL_LM"
        try:
            return _build(self.config_name, values)
        except (ValueError, TypeError, ImportError) as error:
            raise AdapterError(
                f"PEFT's {self.config_name} refuses these settings: {error}"
            ) from error

    def _before_wrapping(self, model: nn.Module, config: Any, start: Start) -> None:
        if self.init in ("corda", "lora_ga") and config.target_modules == "all-linear":
            # their preparation reads names only
            config.target_modules = {name for name, _ in targets(model, "all-linear")}
        if self.init == "corda":
            from peft.tuners.lora.corda import preprocess_corda

            preprocess_corda(
                model, config, run_model=lambda: _forward(model, _single(self._data(start, model)))
            )
        elif self.init == "lora_ga":
            from peft.tuners.lora.loraga import preprocess_loraga

            with _silent():
                preprocess_loraga(
                    model,
                    config,
                    train_step=lambda: _forward(model, self._data(start, model), backward=True),
                )

    def _after_wrapping(self, wrapped: Any, start: Start) -> None:
        if self.init == "eva":
            peft.initialize_lora_eva_weights(
                wrapped, list(self._data(start, wrapped)), show_progress_bar=False
            )
        elif self.init == "loftq":
            self._fit_rounding(wrapped)

    def _fit_rounding(self, wrapped: Any) -> None:
        """LoftQ (Li et al. 2023, arXiv 2310.08659) in one iteration, as PEFT's own, which needs a
        GPU and a scale of 1."""
        folder = Path(wrapped.config._name_or_path)
        try:
            stored = _SafetensorLoader(wrapped, str(folder) if folder.is_dir() else None)
        except (ValueError, OSError) as error:
            raise AdapterError(
                f"LoftQ reads the base's weights before rounding, which are not there: {error}"
            ) from error
        for name, module in self._adapted(wrapped):
            rounded = float_weight(module.get_base_layer())
            lost = stored.get_tensor(f"{name}.weight").to(rounded) - rounded
            factors = _low_rank_decomposition(lost / module.scaling[NAME], module.r[NAME])
            module.lora_A[NAME].weight.data.copy_(factors["R"])
            module.lora_B[NAME].weight.data.copy_(factors["L"])

    def _data(self, start: Start, model: nn.Module) -> Iterator[dict[str, Tensor]]:
        if start.data is None:
            raise AdapterError(
                f"adapter.init_lora_weights={self.init} is computed from training data, and there"
                " is none"
            )
        device = next(model.parameters()).device
        for batch in itertools.islice(start.data(), self.data_batches):
            yield {key: value.to(device) for key, value in batch.items()}

    def _adapted(self, wrapped: Any) -> Iterator[tuple[str, Any]]:
        for name, module in wrapped.get_base_model().named_modules():
            if isinstance(module, peft.tuners.lora.LoraLayer):
                yield name, module

    def _factors(self, wrapped: Any) -> Iterator[tuple[str, Tensor]]:
        for name, module in self._adapted(wrapped):
            yield f"{name}.lora_A", module.lora_A[NAME].weight
            yield f"{name}.lora_B", module.lora_B[NAME].weight

    def _take_out(self, wrapped: Any) -> None:
        for name, module in self._adapted(wrapped):
            set_float_weight(
                module.get_base_layer(),
                float_weight(module.get_base_layer()) - self._part(name, module),
            )

    def _part(self, name: str, module: Any) -> Tensor:
        part = self.initial[f"{name}.lora_B"].float() @ self.initial[f"{name}.lora_A"].float()
        return module.scaling[NAME] * part.to(module.get_base_layer().weight.device)

    def state(self, model: nn.Module) -> dict[str, Any]:
        live: Any = model
        tensors = {
            name: tensor.detach()
            for name, tensor in _own_tensors(live)
            if name not in self.base_names
        }
        config = {
            k: _plain(v)
            for k, v in live.peft_config[NAME].to_dict().items()
            if k in classes()[self.config_name].fields
        }
        extra: dict[str, Any] = {"config": config, "initial": self.initial}
        if self.kind == "SHIRA":  # its indices are no buffers
            extra["indices"] = {
                n: m.shira_indices[NAME]
                for n, m in live.named_modules()
                if hasattr(m, "shira_indices")
            }
        if self.kind == "ADALORA":
            allocator = live.base_model.rankallocator
            extra["importance"] = {
                key: dict(getattr(allocator, key)) for key in ("ipt", "exp_avg_ipt", "exp_avg_unc")
            }
        return {"tensors": tensors, "extra": extra}

    def load_state(self, model: nn.Module, state: dict[str, Any]) -> None:
        live: Any = model
        copy_tensors(self.state(model)["tensors"], state["tensors"])
        extra, device = state["extra"], next(live.parameters()).device
        if extra["initial"] and not self.initial:
            # Where they were at first: another device would multiply them with another rounding.
            self.initial = {name: tensor.to(device) for name, tensor in extra["initial"].items()}
            self._take_out(live)
        for name, indices in extra.get("indices", {}).items():
            live.get_submodule(name).shira_indices[NAME] = indices
        for key, values in extra.get("importance", {}).items():
            setattr(
                live.base_model.rankallocator,
                key,
                {name: tensor.to(device) for name, tensor in values.items()},
            )
        if self.kind == "ADALORA":
            live.peft_config[NAME].rank_pattern = extra["config"].get("rank_pattern")

    def penalty(self, model: nn.Module) -> Tensor | None:
        if self.kind != "ADALORA":
            return None
        # Zhang et al. 2023 (arXiv 2303.10512), eq. 4, averaged over the matrices as PEFT does in
        # its own forward.
        live: Any = model
        terms = []
        for name, p in live.named_parameters():
            if f"lora_A.{NAME}" in name or f"lora_B.{NAME}" in name:
                gram = p @ p.T if "lora_A" in name else p.T @ p
                terms.append(
                    torch.linalg.norm(
                        gram - torch.eye(*gram.shape, device=gram.device, dtype=gram.dtype)
                    )
                )
        return live.peft_config[NAME].orth_reg_weight * torch.stack(terms).mean()

    def after_step(self, model: nn.Module, step: int) -> None:
        live: Any = model
        if self.kind == "ADALORA" and any(p.grad is not None for p in live.parameters()):
            live.base_model.update_and_allocate(step)

    def merge(self, model: nn.Module) -> nn.Module:
        live: Any = model
        if not self.mergeable or not hasattr(live.base_model, "merge_and_unload"):
            raise AdapterError(
                f"{self.kind} cannot be merged into weights: it works on activations. Export it"
                " with to=peft"
            )
        for module in live.modules():
            if is_linear(module):
                refuse_quantised(module)
        untie(live.get_base_model())
        try:
            return live.merge_and_unload()
        except (ValueError, NotImplementedError, AttributeError, TypeError) as error:
            raise AdapterError(f"PEFT cannot merge {self.kind}: {error}") from error

    def save(self, model: nn.Module, folder: Path, base_name: str, task_type: str) -> None:
        live: Any = model
        with _silent():
            tensors = peft.get_peft_model_state_dict(live, save_embedding_layers=False)
        config = copy.copy(live.peft_config[NAME])
        if self.kind == "LORA":
            # the tensors are there: whoever loads them has nothing to compute
            vars(config).update(ORDINARY_START)
        if self.changes_base:
            config, tensors = self._difference(config, tensors)
        config.base_model_name_or_path, config.inference_mode = base_name, True
        io.write(folder, config, tensors)

    def _difference(self, config: Any, tensors: dict[str, Tensor]) -> tuple[Any, dict[str, Tensor]]:
        doubled = {}
        for key, tensor in tensors.items():
            name = key.removeprefix(io.PREFIX).removesuffix(".weight")
            if name not in self.initial:
                doubled[key] = tensor
            elif name.endswith("lora_A"):
                doubled[key] = torch.cat([tensor, self.initial[name].to(tensor)], dim=0)
            else:
                doubled[key] = torch.cat([tensor, -self.initial[name].to(tensor)], dim=1)
        # keeps alpha / r, or alpha / sqrt(r), at twice the rank
        factor = 2**0.5 if config.use_rslora else 2
        values = {
            k: _plain(v)
            for k, v in config.to_dict().items()
            if k in classes()[self.config_name].fields
        }
        values |= {"r": 2 * config.r, "lora_alpha": factor * config.lora_alpha}
        values["rank_pattern"] = {k: 2 * v for k, v in (config.rank_pattern or {}).items()}
        values["alpha_pattern"] = {k: factor * v for k, v in (config.alpha_pattern or {}).items()}
        return _build(self.config_name, values), doubled

    @contextlib.contextmanager
    def disabled(self, model: nn.Module) -> Iterator[None]:
        live: Any = model
        adapted = list(self._adapted(live)) if self.initial else []
        remainders = [module.get_base_layer().weight.detach().clone() for _, module in adapted]
        # the base's own weights are the remainder and what was taken out of it
        for name, module in adapted:
            set_float_weight(
                module.get_base_layer(),
                float_weight(module.get_base_layer()) + self._part(name, module),
            )
        try:
            with live.disable_adapter():
                yield
        finally:
            for (_, module), remainder in zip(adapted, remainders, strict=True):
                module.get_base_layer().weight.data.copy_(remainder)


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Without what PEFT warns of and nobody can act upon."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*used with low_cpu_mem_usage=False.*")  # EVA
        # LoRA-GA, at the first layer
        warnings.filterwarnings("ignore", message="Full backward hook is firing.*")
        # AdaLoRA's layers of rank 0
        warnings.filterwarnings("ignore", message=".*LoRA tensor.* have invalid shape.*")
        yield


def _refuse_unknown(model: nn.Module, wanted: str | list[str]) -> None:
    """PEFT passes over names that match nothing beside others that do, and names no choices."""
    names = [name for name, _ in model.named_modules()]
    if wanted == "all-linear":
        return
    if isinstance(wanted, str):
        with contextlib.suppress(re.error):  # `targets` tells of it
            if any(re.fullmatch(wanted, name) for name in names):
                return
        targets(model, wanted)
    elif unknown := [entry for entry in wanted if not any(_ends(name, entry) for name in names)]:
        targets(model, unknown)


def _own_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and saved buffers under all their names, tied ones included."""
    yield from model.named_parameters(remove_duplicate=False)
    for name, module in model.named_modules():
        for key, buffer in module.named_buffers(recurse=False):
            if key not in module._non_persistent_buffers_set:
                yield f"{name}.{key}" if name else key, buffer


def _build(class_name: str, values: dict[str, Any]) -> Any:
    """One of PEFT's dataclasses from plain values, with nested dataclasses from mappings."""
    cls = getattr(peft if hasattr(peft, class_name) else peft.tuners.lora.config, class_name)
    annotations = classes()[class_name].fields
    nested = {}
    for key, value in values.items():
        names = (
            [node.id for node in ast.walk(annotations[key]) if isinstance(node, ast.Name)]
            if key in annotations
            else []
        )
        inner = next((name for name in names if name in classes()), None)
        # PEFT's own default for some is {}, which is not the same as their class's defaults: it
        # warns of those.
        nested[key] = _build(inner, value) if inner and isinstance(value, dict) and value else value
    known = {f.name for f in dataclass_fields(cls) if f.init}
    return cls(**{key: value for key, value in nested.items() if key in known})


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclass_fields(value)}
    if isinstance(value, set | list | tuple):
        return sorted(map(_plain, value)) if isinstance(value, set) else [_plain(v) for v in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return getattr(value, "value", value)


def _single(batches: Iterator[dict[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    """Row by row and without padding, as CorDA's covariance needs them."""
    for batch in batches:
        for i, length in enumerate(batch["attention_mask"].sum(1).tolist()):
            yield {
                key: value[i : i + 1, :length] for key, value in batch.items() if key != "labels"
            }


def _forward(
    model: nn.Module, batches: Iterator[dict[str, Tensor]], backward: bool = False
) -> None:
    with torch.set_grad_enabled(backward):
        for batch in batches:
            output = model(**batch, use_cache=False)
            if backward:
                output.loss.backward()
