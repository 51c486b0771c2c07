"""Adapters that can be compressed: what their config says, before any weights are loaded."""

from __future__ import annotations

from typing import Any

from adapters.errors import AdapterError
from adapters.peft_fields import CHANGES_BASE, config_class

# PEFT's methods whose tensors are an update that starts at zero
KINDS = ("LORA", "SHIRA", "SUPERTUNING")
# Adapters that train other tensors than A and B. Their LoRA follows from these, and these do not
# follow from a LoRA: a compressed one could not be loaded back into such an adapter.
COMPUTED = {
    "adapters.mos.MoSAdapter": "adapter=mos trains pools, and its LoRA repeats them in each layer:"
    " compressed one by one, the layers' factors are larger than the pools",
    "adapters.increlora.IncreLoRAAdapter": "adapter=increlora has a factor for each piece, which is"
    " part of A in its LoRA",
}


def refuse(name: str, adapter: dict[str, Any], method: str) -> None:
    """Refuse an adapter without an update that the method can compress.

    Raises:
        AdapterError: this adapter, as configured, has none.
    """
    few_values = adapter["_target_"] == "adapters.bilora.BiLoRAAdapter"
    if few_values != (method == "levels"):
        raise AdapterError(
            f"adapter=bilora is trained with few values, and method={method} would round them"
            " again: method=levels packs them"
            if few_values
            else "method=levels packs factors of at most 16 values, which adapter=bilora trains:"
            " use method=compeft for other adapters"
        )
    allowed = (
        f"Compression is for LoRA, RoSA and sparse adapters, and for PEFT's {', '.join(KINDS)}"
    )
    if adapter["_target_"].startswith("adapters.full."):
        raise AdapterError(f"adapter={name} leaves no adapter to compress. {allowed}")
    if reason := COMPUTED.get(adapter["_target_"]):
        raise AdapterError(f"{reason}. {allowed}")
    if adapter["_target_"] != "adapters.peft.Peft":
        return
    entry = config_class(adapter["peft_type"])
    kind = entry.peft_type if entry else adapter["peft_type"]
    if kind not in KINDS:
        raise AdapterError(
            f"{kind} is not the sum of its weights and an update that starts at zero. {allowed}"
        )
    init = str(adapter.get("init_lora_weights", ""))
    if kind == "LORA" and init.startswith(CHANGES_BASE):
        raise AdapterError(
            f"init_lora_weights={init} is saved as the difference of two products, in which large"
            f" parts cancel. After compression they would not. {allowed} with another"
            " initialisation"
        )
