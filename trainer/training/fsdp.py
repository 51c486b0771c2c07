"""FSDP2: each rank holds a shard of the model's weights, gradients and moments, through Lightning's
ModelParallelStrategy.

A decoder layer's weights are gathered when it computes, and resharded after it. Weights outside of
the layers, such as the embedding and the output head, stay gathered until the end of the backward
pass, since losses read the head without calling the model. A drafter is not sharded, since its
parts are not called as modules. Its gradients are averaged once per step.

Lightning saves such a run as a folder of shards, or with the full base. Here a checkpoint is the
same as in any run: the full trained tensors in one file that rank 0 writes. So a run with FSDP2 is
exported, read and evaluated like any other.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils import _pytree as pytree

from adapters.delta import AdaptedLinear
from adapters.packed import unpack_parameters
from adapters.shards import shard_like


class Sharded(ModelParallelStrategy):
    """FSDP2 over all ranks, with this project's checkpoints."""

    lightning_restore_optimizer = True  # from the one file, by load_optimizer_state_dict

    def setup_environment(self) -> None:
        assert self.accelerator is not None
        self.accelerator.setup_device(self.root_device)
        self._setup_distributed()
        self._device_mesh = init_device_mesh(
            self.root_device.type, (self.num_nodes * self.num_processes,)
        )

    def shard(self, model: Any) -> None:
        """Shard a model that all ranks have loaded. Its layers are the modules that transformers
        never splits over devices (`_no_split_modules`). A delta that is folded into the weights is
        folded into their shards."""
        unpack_parameters(model, self.root_device)
        deltas = [module for module in model.modules() if isinstance(module, AdaptedLinear)]
        for module in deltas:
            module.delta.take_out(module.base)
        layers = set(model._no_split_modules or ())
        for module in list(model.modules()):
            if type(module).__name__ in layers:
                fully_shard(module, mesh=self.device_mesh, reshard_after_forward=True)
        fully_shard(model, mesh=self.device_mesh, reshard_after_forward=False)
        for module in deltas:
            module.delta.fold_in(module.base)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        return {}  # FineTune.on_save_checkpoint adds the trained tensors

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        return getattr(optimizer, "_optimizer", optimizer).state_dict()

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None
    ) -> None:
        checkpoint = full_tensors(checkpoint)
        if self.is_global_zero:
            self.checkpoint_io.save_checkpoint(checkpoint, filepath)

    def load_checkpoint(
        self, checkpoint_path: Any, weights_only: bool | None = None
    ) -> dict[str, Any]:
        return self.checkpoint_io.load_checkpoint(checkpoint_path)

    def load_optimizer_state_dict(self, checkpoint: Any) -> None:
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            state = {
                number: {
                    key: shard_like(parameters[number], value) for key, value in moments.items()
                }
                for number, moments in saved["state"].items()
            }
            optimizer.load_state_dict(saved | {"state": state})


def full_tensors(tree: Any) -> Any:
    """Gather all sharded tensors of a tree on the CPU. All ranks must call it together."""
    return pytree.tree_map_only(DTensor, lambda tensor: tensor.full_tensor().cpu(), tree)


@contextlib.contextmanager
def resharding(model: nn.Module) -> Iterator[None]:
    """Reshard parameters after an evaluation's forward pass, which has no backward pass that does.
    Otherwise the next step would see the gathered weights."""
    try:
        yield
    finally:
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def average_unsharded_grads(parameters: Iterable[nn.Parameter]) -> None:
    """Average the gradients of parameters that are not sharded."""
    for parameter in parameters:
        if parameter.grad is not None and not isinstance(parameter.grad, DTensor):
            torch.distributed.all_reduce(parameter.grad)
            parameter.grad /= torch.distributed.get_world_size()


def clip_grad_norm(parameters: list[nn.Parameter], limit: float) -> Tensor:
    """Clip by the total norm, as torch.nn.utils.clip_grad_norm_ does. Some of the parameters may be
    sharded. Return the norm before."""
    norm = grad_norm(parameters)
    for group in _by_kind(parameters):
        nn.utils.clip_grads_with_norm_(group, limit, norm)
    return norm


def grad_norm(parameters: list[nn.Parameter]) -> Tensor:
    """Return the total norm of the gradients. Some of the parameters may be sharded."""
    norms = [
        nn.utils.get_total_norm([p.grad for p in group if p.grad is not None])
        for group in _by_kind(parameters)
    ]
    norms = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
    return norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))


def _by_kind(parameters: list[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Separate parameters that are sharded from others: torch's functions take one kind only."""
    by_kind: list[list[nn.Parameter]] = [[], []]
    for parameter in parameters:
        by_kind[isinstance(parameter, DTensor)].append(parameter)
    return [group for group in by_kind if group]
