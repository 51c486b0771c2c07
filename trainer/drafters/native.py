"""The MTP layer that a base brings (Qwen3.5, GLM, DeepSeek-V3 and their like), trained further on
the adapted model.

It is the module of trainer.drafters.sequential, run K times, and starts from the base's own files.
A stock layer drafts well for the stock model, and training it can make it worse: on one base of
this kind the share of accepted tokens went from 0.740 to 0.655 at a rate of 1e-4, and to 0.755 at
2e-5. So acceptance on held-out rows is measured before training, and the stock layer is kept unless
a checkpoint has more (trainer.assembly.guarded).
"""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor
from transformers.modeling_layers import MtpModel

from trainer.drafters import DrafterError
from trainer.drafters.sequential import SequentialModules


class NativeModule(SequentialModules):
    """The base's MTP layer; conf/drafter/native.yaml documents the settings.

    Raises:
        DrafterError: the base has no such layer, or more than one; its files cannot be read; or
        what SequentialModules raises.
    """

    guarded = True
    elsewhere = True  # engines decode with it also where this project's loop cannot

    def __init__(
        self,
        model: Any,
        offsets: int,
        weights: list[float] | None,
        beta: float,
        weight: float,
        lr_scale: float,
    ):
        _check(model)
        super().__init__(model, offsets, True, weights, beta, weight, "random", True, lr_scale)
        self._stock = functools.partial(stock, model)
        if next(self.parameters()).device.type != "meta":
            self.restore()

    def restore(self) -> None:
        self.load_state_dict(self._stock(self.state_dict()))


def _check(model: Any) -> None:
    name, config = type(model).__name__, model.config.get_text_config()
    count = getattr(config, "num_mtp_layers", None) or 0
    try:
        MtpModel.get_mtp_weights_regex(model)
    except (ValueError, TypeError):
        count = 0
    if not count:
        raise DrafterError(
            f"drafter=native trains the MTP layer that a base brings, and {name}"
            f" ({config.model_type}) has none that transformers knows: set drafter=mtp_shared,"
            " which trains one from scratch"
        )
    if count > 1:
        raise DrafterError(
            f"drafter=native trains one MTP layer, and {name}'s config has num_mtp_layers={count}:"
            " transformers runs the further ones on normed states, which are not those of training"
            " here. Set drafter=mtp_shared"
        )


def stock(model: Any, expected: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the base's own tensors of its MTP layer, of the names, shapes and dtypes of
    `expected`.

    Raises:
        DrafterError: they cannot be read, or they are others.
    """
    try:
        own = MtpModel.from_pretrained(model).state_dict()
    except (OSError, RuntimeError, ValueError, KeyError, AttributeError) as error:
        raise DrafterError(
            f"drafter=native: {model.config.name_or_path} has no MTP layer that can be read"
            f" ({error}). Set drafter=mtp_shared, which trains one from scratch"
        ) from None
    own = {name: tensor for name, tensor in own.items() if name.startswith("layers.")}
    shapes, needed = ({k: tuple(t.shape) for k, t in d.items()} for d in (own, expected))
    if different := sorted(k for k in shapes | needed if shapes.get(k) != needed.get(k)):
        raise DrafterError(
            f"drafter=native: the MTP layer of {model.config.name_or_path} is no decoder layer like"
            f" the model's last one: {', '.join(different[:5])} differ. Set drafter=mtp_shared"
        )
    return {name: tensor.to(expected[name]) for name, tensor in own.items()}
