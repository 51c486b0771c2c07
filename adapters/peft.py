"""Every method of stock PEFT, for example `adapter=peft adapter.peft_type=LOHA adapter.r=8`.

Field names and their defaults are PEFT's. conf/adapter has presets. This file adds the parts that
PEFT leaves to its caller: AdaLoRA's budget and penalty, a state from which a run resumes exactly,
and in peft_init the initialisations from data or unquantised weights.

PiSSA, OLoRA, CorDA and LoRA-GA move a part s B₀A₀ of each weight W into the adapter, which leaves
W - s B₀A₀ in the base. Here this remainder is always computed by `_subtract_initial` from the
stored A₀ and B₀, so that it has the same bits after a resume. The saved adapter is the difference
B A - B₀A₀ at twice the rank, which fits the original base.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import torch
from peft.tuners.tuners_utils import check_target_module_exists
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from adapters import io, peft_init, peft_modules, stock, trained_copies
from adapters.delta import (
    Adapter,
    AdapterError,
    NeedsWeights,
    Start,
    cast_inputs,
    copy_tensors,
    freeze,
)
from adapters.linear import float_weight, is_linear, set_float_weight
from adapters.merging import record_ties, refuse_quantised, untie
from adapters.peft_config import build, decides, plain
from adapters.peft_fields import CHANGES_BASE, NAME, OURS, PROMPT_LEARNING, classes, config_class
from adapters.peft_init import lora_layers
from adapters.peft_targets import all_linear, refuse_unknown

# what PEFT raises if a method does not fit a model
PEFT_ERRORS = (ValueError, TypeError, KeyError, NotImplementedError, ImportError, RuntimeError)
# settings with which PEFT initialises a LoRA without computing anything
ORDINARY_START = {
    "init_lora_weights": True,
    "corda_config": None,
    "lora_ga_config": None,
    "eva_config": None,
}


class Peft(Adapter):
    """One of PEFT's methods, built from its configuration class."""

    def __init__(self, peft_type: str, data_batches: int, **fields: Any):
        entry = config_class(peft_type)
        if entry is None or entry.peft_type is None:
            raise AdapterError(
                f"adapter.peft_type is {peft_type!r}, which PEFT {peft.__version__} does not have"
            )
        self.kind, self.config_name, self.data_batches = entry.peft_type, entry.name, data_batches
        self.fields = {key: value for key, value in fields.items() if key not in OURS}
        self.train_modules: list[str] = list(fields.get("train_modules", []))
        self.init = str(self.fields.get("init_lora_weights", ""))
        self.changes_base = self.kind == "LORA" and self.init.startswith(CHANGES_BASE)
        self.mergeable = self.kind not in PROMPT_LEARNING
        self.initial: dict[str, Tensor] = {}  # A₀ and B₀ where changes_base
        # tensors of the frozen base, by their names in the wrapped model
        self.base_names: set[str] = set()

    @property
    def names_modules(self) -> bool:
        named = self.fields.get("target_modules") or "all-linear"
        named = "" if self.kind in PROMPT_LEARNING else named
        return named not in ("", "all-linear") or bool(self.train_modules)

    def check_names(self, model: nn.Module) -> None:
        if self.kind not in PROMPT_LEARNING:
            refuse_unknown(model, self.fields.get("target_modules") or "all-linear")
        trained_copies.chosen(model, self.train_modules)

    def attach(self, model: nn.Module, start: Start) -> nn.Module:
        freeze(model)
        # keep references, so that no id is reused
        base_tensors = {id(t): t for t in itertools.chain(model.parameters(), model.buffers())}
        computed = start.saved is None and next(model.parameters()).device.type != "meta"
        config = self._config(model, start, computed)
        self._refuse_tied(model, config)
        if computed:
            with peft_modules.silent():
                peft_init.before_wrapping(self.init, model, config, start, self.data_batches)
        weights = {}
        if computed and self.changes_base:
            weights = {
                name: module.weight.detach().clone()
                for name, module in model.named_modules()
                if is_linear(module)
            }
        wrapped = self._wrapped(model, config)
        for name, parameter in wrapped.named_parameters():
            # AdaLoRA's divisor: PEFT makes it a constant, then trains it, and does not save it
            if ".ranknum." in name:
                parameter.requires_grad_(False)
        if computed:
            peft_init.after_wrapping(self.init, wrapped, start, self.data_batches)
        if weights:
            self._store_initial(wrapped, weights)
            self._subtract_initial(wrapped)
        for name in start.new_modules:  # PEFT trains a copy of them
            trained = wrapped.get_base_model().get_submodule(name).modules_to_save[NAME].float()
            trained.register_forward_pre_hook(cast_inputs)
        peft_modules.train(wrapped.get_base_model(), self.train_modules, start.new_tokens)
        self.base_names = {
            name for name, tensor in _named_tensors(wrapped) if id(tensor) in base_tensors
        }
        return wrapped

    def _refuse_tied(self, model: Any, config: Any) -> None:
        """Refuse to take a part out of a weight that the embedding has, too."""
        if not self.changes_base:
            return
        table = getattr(model.get_input_embeddings(), "weight", None)
        for name, module in model.named_modules():
            tied = is_linear(module) and module.weight is table
            if tied and check_target_module_exists(config, name):
                raise AdapterError(
                    f"adapter.init_lora_weights={self.init} takes its part out of the weight of"
                    f" {name}, which is the embedding's, too, and would change that: leave {name}"
                    " out of adapter.target_modules, or set adapter=lora"
                )

    def _wrapped(self, model: nn.Module, config: Any) -> Any:
        on_meta = next(model.parameters()).device.type == "meta"
        # the default, set explicitly: otherwise torch warns about SHiRA and others
        torch.sparse.check_sparse_tensor_invariants.disable()
        try:
            with peft_modules.silent():
                return peft.get_peft_model(model, config)
        except torch.OutOfMemoryError:
            raise
        except PEFT_ERRORS as error:
            needs_weights = isinstance(error, NotImplementedError) or "meta tensor" in str(error)
            refusal = NeedsWeights if on_meta and needs_weights else AdapterError
            raise refusal(f"PEFT cannot put {self.config_name} on this model: {error}") from error

    def _store_initial(self, wrapped: Any, weights: dict[str, Tensor]) -> None:
        """Store A₀ and B₀, and put the base's `weights` back, from which PEFT has taken them."""
        self.initial = {}
        for name, module in lora_layers(wrapped):
            self.initial[f"{name}.lora_A"] = module.lora_A[NAME].weight.detach().clone()
            self.initial[f"{name}.lora_B"] = module.lora_B[NAME].weight.detach().clone()
        for name, module in lora_layers(wrapped):
            base = module.get_base_layer()
            base.weight.data.copy_(weights[name])
            if self._initial_part(name, module).shape != float_weight(base).shape:
                raise AdapterError(
                    f"PEFT's initialisation {self.init} does not work on this model's"
                    f" {type(base).__name__} layers, such as {name}"
                )

    def _config(self, model: nn.Module, start: Start, computed: bool) -> Any:
        if start.saved is not None:
            values = dict(start.saved["extra"]["config"])
        else:
            values = dict(self.fields)
            if self.kind == "ADALORA" and values.get("total_step") is None:
                values["total_step"] = start.steps
            if self.kind not in PROMPT_LEARNING:
                chosen = values.get("target_modules") or "all-linear"
                refuse_unknown(model, chosen)
                if chosen == "all-linear" and values.get("target_modules"):
                    values["target_modules"] = all_linear(model, self.kind)
            values |= peft_modules.fields(
                model, values, self.train_modules, start.new_tokens, self.config_name
            )
        transposed = any(isinstance(module, Conv1D) for module in model.modules())
        if transposed and "fan_in_fan_out" in classes()[self.config_name].fields:
            values.setdefault("fan_in_fan_out", True)
        if self.kind == "LORA" and (not computed or self.init == "loftq"):
            # tensors that are loaded or computed later replace PEFT's initial values
            values |= ORDINARY_START
        if self.kind == "ADALORA":
            # `load_state` sets it. PEFT would read layers' ranks from it, as for a LoRA
            values["rank_pattern"] = None
        values["task_type"] = io.task_type(model, bool(start.new_modules))
        if start.new_modules:
            if "modules_to_save" not in classes()[self.config_name].fields:
                raise AdapterError(
                    f"PEFT's {self.config_name} trains no new head, which a classifier needs:"
                    " choose another adapter, as adapter=lora"
                )
            others = values.get("modules_to_save") or []
            values["modules_to_save"] = list(dict.fromkeys([*start.new_modules, *others]))
        try:
            return build(self.config_name, values)
        except (ValueError, TypeError, ImportError) as error:
            raise AdapterError(
                f"PEFT's {self.config_name} refuses these settings: {error}"
            ) from error

    def _subtract_initial(self, wrapped: Any) -> None:
        for name, module in lora_layers(wrapped):
            base = module.get_base_layer()
            set_float_weight(base, float_weight(base) - self._initial_part(name, module))

    def _initial_part(self, name: str, module: Any) -> Tensor:
        part = self.initial[f"{name}.lora_B"].float() @ self.initial[f"{name}.lora_A"].float()
        return module.scaling[NAME] * part.to(module.get_base_layer().weight.device)

    def state(self, model: nn.Module) -> dict[str, Any]:
        live: Any = model
        tensors = {
            name: tensor.detach()
            for name, tensor in _named_tensors(live)
            if name not in self.base_names
        }
        config = self._plain_config(live.peft_config[NAME])
        extra: dict[str, Any] = {"config": config, "initial": self.initial}
        if self.kind == "SHIRA":  # its indices are not buffers
            extra["indices"] = {
                name: module.shira_indices[NAME]
                for name, module in live.named_modules()
                if hasattr(module, "shira_indices")
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
            # On the device that computed the remainder first: another one would round differently.
            self.initial = {name: tensor.to(device) for name, tensor in extra["initial"].items()}
            self._subtract_initial(live)
        for name, indices in extra.get("indices", {}).items():
            live.get_submodule(name).shira_indices[NAME] = indices
        for key, values in extra.get("importance", {}).items():
            importance = {name: tensor.to(device) for name, tensor in values.items()}
            setattr(live.base_model.rankallocator, key, importance)
        if self.kind == "ADALORA":
            live.peft_config[NAME].rank_pattern = extra["config"].get("rank_pattern")

    def attach_continued(self, model: nn.Module, start: Start, state: dict[str, Any]) -> nn.Module:
        own = {key: value for key, value in self.fields.items() if "dropout" in key}
        extra = state["extra"] | {"config": state["extra"]["config"] | own}
        model = self.attach(model, replace(start, saved=state | {"extra": extra}))
        self.load_state(model, state)
        return model

    def refuse_continuing(self) -> None:
        if self.kind == "ADALORA":
            raise AdapterError(
                "adapter.from: AdaLoRA has spent its budget in the earlier run and cannot start"
                " again from its ranks: use adapter=lora for a new run"
            )

    def stock_faults(self, settings: dict[str, Any], stored: dict[str, Any]) -> list[str]:
        if stored.get("peft_type") != self.kind:
            return [f"adapter.peft_type={self.kind} here, {stored.get('peft_type')} there"]
        self.refuse_continuing()
        if self.changes_base:
            return [
                f"adapter.init_lora_weights={self.init} takes its start out of the base's weights,"
                " which that folder is not made for: set adapter.init_lora_weights=true"
            ]
        mine = self._plain_config(build(self.config_name, self.fields))
        return list(
            stock.differences(
                mine, stored, {key: key for key in mine if decides(key) and key in stored}
            )
        )

    def load_stock_folder(self, model: nn.Module, folder: Path) -> None:
        with peft_modules.silent():
            live = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
            peft.set_peft_model_state_dict(model, stock.read_tensors(folder, live))

    def penalty(self, model: nn.Module) -> Tensor | None:
        if self.kind != "ADALORA":
            return None
        # Zhang et al. 2023 (arXiv 2303.10512), eq. 4, averaged over the matrices, as in PEFT's
        # forward.
        live: Any = model
        terms = []
        for name, p in live.named_parameters():
            if f"lora_A.{NAME}" in name or f"lora_B.{NAME}" in name:
                gram = p @ p.T if "lora_A" in name else p.T @ p
                identity = torch.eye(*gram.shape, device=gram.device, dtype=gram.dtype)
                terms.append(torch.linalg.norm(gram - identity))
        return live.peft_config[NAME].orth_reg_weight * torch.stack(terms).mean()

    def ignores_skips(self) -> bool:
        return self.kind != "ADALORA"  # which scores parameters by their gradients

    def after_step(self, model: nn.Module, step: int) -> None:
        live: Any = model
        if self.kind == "ADALORA" and any(p.grad is not None for p in live.parameters()):
            live.base_model.update_and_allocate(step)

    def refuse_merging(self) -> None:
        if not self.mergeable:
            raise AdapterError(
                f"{self.kind} cannot be merged into weights: it works on activations. Export it"
                " with to=peft"
            )

    def merge(self, model: nn.Module) -> nn.Module:
        live: Any = model
        self.mergeable &= hasattr(live.base_model, "merge_and_unload")
        self.refuse_merging()
        for module in live.modules():
            if is_linear(module):
                refuse_quantised(module)
        untie(live.get_base_model())
        try:
            merged = live.merge_and_unload()
            record_ties(merged)
            return merged
        except (ValueError, NotImplementedError, AttributeError, TypeError) as error:
            raise AdapterError(f"PEFT cannot merge {self.kind}: {error}") from error

    def save(self, model: nn.Module, folder: Path, base_name: str, task_type: str) -> None:
        live: Any = model
        with peft_modules.silent():
            tensors = peft.get_peft_model_state_dict(live, save_embedding_layers=False)
        config = copy.copy(live.peft_config[NAME])
        if self.kind == "LORA":
            # the file has the tensors, so loading computes nothing
            vars(config).update(ORDINARY_START)
        if self.changes_base:
            config, tensors = self._difference(config, tensors)
        config.base_model_name_or_path, config.inference_mode = base_name, True
        io.write(folder, config, tensors)

    def _plain_config(self, config: Any) -> dict[str, Any]:
        """Return the config's fields as plain data."""
        fields = classes()[self.config_name].fields
        return {key: plain(value) for key, value in config.to_dict().items() if key in fields}

    def _difference(self, config: Any, tensors: dict[str, Tensor]) -> tuple[Any, dict[str, Tensor]]:
        """Return the adapter B A - B₀A₀ at twice the rank."""
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
        values = self._plain_config(config)
        values |= {"r": 2 * config.r, "lora_alpha": factor * config.lora_alpha}
        values["rank_pattern"] = {k: 2 * v for k, v in (config.rank_pattern or {}).items()}
        values["alpha_pattern"] = {k: factor * v for k, v in (config.alpha_pattern or {}).items()}
        return build(self.config_name, values), doubled

    @contextlib.contextmanager
    def disabled(self, model: nn.Module) -> Iterator[None]:
        live: Any = model
        adapted = list(lora_layers(live)) if self.initial else []
        remainders = [module.get_base_layer().weight.detach().clone() for _, module in adapted]
        # the original weight is the sum of the remainder and the initial part
        for name, module in adapted:
            base = module.get_base_layer()
            set_float_weight(base, float_weight(base) + self._initial_part(name, module))
        try:
            with live.disable_adapter():
                yield
        finally:
            for (_, module), remainder in zip(adapted, remainders, strict=True):
                module.get_base_layer().weight.data.copy_(remainder)


def _named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield parameters and saved buffers under all their names, including those of tied ones."""
    yield from model.named_parameters(remove_duplicate=False)
    for name, module in model.named_modules():
        for key, buffer in module.named_buffers(recurse=False):
            if key not in module._non_persistent_buffers_set:
                yield f"{name}.{key}" if name else key, buffer
