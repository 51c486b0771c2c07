"""MuToR: register tokens that teach the adapter to look further ahead, and are left out afterwards
(arXiv 2505.10518).

    x_0 .. x_t  r        the register r after x_t predicts x_{t+d} from position t + d - 1

    L = (1 - a) L_next + a / share · Σ_registers -log softmax(head(h_r))[x_{t+d}]
    a = `weight`

One vector r (d) is learned; d is drawn uniformly from 1 .. d_max for each row and micro-batch. A
register comes after each t for which x_{t+d} is trained, including the prompt's last tokens, or
after a random `share` of them, whose loss then counts for all. It sees itself and its own row up to
x_t, never another register, and no token sees it: the next-token loss is the same as without
registers. Its gradient reaches the adapter through its own pass over the layers (section 3). At
inference registers do not exist: the result is an ordinary adapter, at no cost, and no drafter.

An offset k of trainer.drafters is d = k + 1, so offsets 1 .. d_max - 1 are reported; registers with
d = 1 are trained and not reported. Registers of several offsets are never at one position, so runs
of right guesses cannot be counted, and `accepted` stays 1.

Differs from the paper:
    The paper writes a register between x_t and x_{t+1}. Attention depends on mask and position
    only, so here all registers follow the sequence, with the mask and the positions that they would
    have in it. The mask is 4-D, which transformers' models pass on unchanged: True where attention
    is allowed for sdpa, added to the scores for eager. No other attention takes such a mask.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from trainer.drafters import Drafter, DrafterError, Target, TargetOutput, passes
from trainer.models.losses import chunked_predictions
from trainer.models.on_host import all_sent, count, flat, host_of, picked

# transformers' names of layers that attend to the whole row, or to nothing
_FULL = {"full_attention", "mlp", "moe"}


@dataclass(frozen=True)
class Places:
    """The registers of a batch. A sequence with fewer than R registers has padding, with the target
    -100."""

    after: Int[Tensor, "B R"]  # t, an index into the sequence
    ahead: Int[Tensor, "B R"]  # d
    targets: Int[Tensor, "B R"]  # x_{t+d}
    positions: Int[Tensor, "B R"]  # t + d - 1, counted from the row's first token


def place_registers(
    labels: Int[Tensor, "B T"],
    positions: Int[Tensor, "B T"],
    ahead: Int[Tensor, "B T"],
    chosen: Bool[Tensor, "B T"],
) -> Places:
    """Return a register for each `chosen` position whose `ahead`-th next token is trained and in
    the same row.

    R is a multiple of 8 if T is one, and never 0: a rank without targets runs the same code as the
    others, as DDP needs.
    """
    length = labels.shape[1]
    there = torch.arange(length, device=labels.device) + ahead
    inside = there.clamp(max=length - 1)
    targets = labels.gather(1, inside)
    real = (
        chosen
        & (there < length)
        & (positions.gather(1, inside) == positions + ahead)
        & (targets != -100)
    )
    most = int(real.sum(1).max())
    after = real.int().argsort(dim=1, descending=True, stable=True)[:, : max(8, -(-most // 8) * 8)]
    used, steps = real.gather(1, after), ahead.gather(1, after)
    return Places(
        after,
        steps,
        targets.gather(1, after).masked_fill(~used, -100),
        (positions.gather(1, after) + steps - 1).masked_fill(~used, 0),
    )


def attends(positions: Int[Tensor, "B T"], places: Places) -> Bool[Tensor, "B 1 L L"]:
    """Return who sees whom, with the registers after the sequence: L = T + R. Padding sees itself
    only."""
    count = places.after.shape[1]
    at = torch.arange(positions.shape[1], device=positions.device)
    first = at - positions  # the first position of each token's row
    row = torch.cat([first, first.gather(1, places.after)], 1)
    until = torch.cat(
        [at.expand_as(positions), places.after.masked_fill(places.targets == -100, -1)], 1
    )
    tokens = (first.unsqueeze(1) == row.unsqueeze(2)) & (at <= until.unsqueeze(2))
    itself = torch.eye(count, dtype=torch.bool, device=at.device)
    registers = torch.cat([itself.new_zeros(len(at), count), itself])
    return torch.cat([tokens, registers.expand(len(positions), -1, -1)], 2).unsqueeze(1)


def with_registers(
    embedded: Float[Tensor, "B T d"],
    registers: Float[Tensor, "B R d"],
    positions: Int[Tensor, "B T"],
    places: Places,
    attention: str,
) -> dict[str, Tensor]:
    """Return a model's inputs: the sequence, then the registers, cast to the sequence's dtype."""
    mask = attends(positions, places)
    if attention == "eager":
        mask = embedded.new_zeros(mask.shape).masked_fill(~mask, torch.finfo(embedded.dtype).min)
    return {
        "inputs_embeds": torch.cat([embedded, registers.to(embedded.dtype)], 1),
        "position_ids": torch.cat([positions, places.positions], 1),
        "attention_mask": mask,
    }


class Registers(Drafter):
    """Register tokens; see the module's text. The one trained tensor is r (d,), in fp32 for every
    dtype of the base.

    Raises:
        DrafterError: the model's attention takes no 4-D mask, its layers do not see the whole row,
        or positions of its tokens do not come from position_ids.
    """

    detach = False  # the gradient in the adapter is the method
    proposes = False

    def __init__(self, model: Any, d_max: int, weight: float, share: float, lr_scale: float):
        super().__init__()
        refuse(model)
        self.d_max, self.weight, self.share, self.lr_scale = d_max, weight, share, lr_scale
        self.offsets, self.weights, self.main_weight = (
            d_max - 1,
            [weight] * (d_max - 1),
            1.0 - weight,
        )
        table = model.get_input_embeddings().weight
        self.register = nn.Parameter(
            torch.empty(model.config.get_text_config().hidden_size, device=table.device)
        )
        if table.device.type != "meta":
            probe(model)
            with torch.no_grad():
                # Call the layer, since some models scale embeddings; about a thousand rows are
                # enough for an estimate.
                some = torch.arange(0, len(table), max(1, len(table) // 1024), device=table.device)
                std = float(model.get_input_embeddings()(some).float().std())
                self.register.copy_(torch.randn(self.register.shape) * std)
        self.checked = False
        # of the current micro-batch, on the host, between `inputs` and `loss`
        self.placed: Places | None = None

    def inputs(self, batch: dict[str, Any], target: Target) -> dict[str, Tensor]:
        """Return the batch's embeddings followed by this micro-batch's registers, with their mask
        and positions.

        Raises:
            DrafterError: the adapter puts virtual tokens before the rows, or there is nothing that
            registers could teach.
        """
        if not self.checked:
            _refuse_adapter(target.model)
            self.checked = True
        ids, host = batch["input_ids"], host_of(batch)
        start = torch.arange(ids.shape[1]) - host.positions  # of each position's row
        # Drawn on the CPU, so that they are the same for every device; each row uses the number
        # that its first token has drawn.
        drawn = torch.randint(1, self.d_max + 1, ids.shape)
        chosen = torch.rand(ids.shape) < self.share
        places = place_registers(host.labels, host.positions, drawn.gather(1, start), chosen)
        self.placed = places
        sides = (places.after, places.ahead, places.targets, places.positions, host.positions)
        *there, positions = all_sent(ids.device, *sides)
        return with_registers(
            target.embed(ids),
            self.register.expand(*places.after.shape, -1),
            positions,
            Places(*there),
            target.config._attn_implementation,
        )

    def loss(self, output: TargetOutput, target: Target, chunk: int) -> tuple[Tensor, Tensor]:
        """Return (a / share times the registers' summed cross-entropy, numbers (d_max - 1, 5) of
        the offsets d - 1). Both are zeros in evaluation, which has no registers.

        Raises:
            DrafterError: in training, the target did not run on `inputs`.
        """
        total = output.extra.new_zeros((), dtype=torch.float32)
        device = output.ids.device
        numbers = torch.zeros(self.d_max, 5, device=device)
        places, self.placed = self.placed, None
        if not torch.is_grad_enabled():
            return total, numbers[1:]
        if places is None or output.extra.shape[1] != places.after.shape[1]:
            _no_drafts()
        head = target.model.get_output_embeddings()
        trained = tuple(p for p in head.parameters() if p.requires_grad)  # by adapter=full
        for d in range(1, self.d_max + 1):
            here = flat((places.ahead == d) & (places.targets != -100))
            at, targets = all_sent(device, here, places.targets.flatten()[here])
            summed, best, among = chunked_predictions(
                picked(output.extra, at),
                targets,
                target.head,
                chunk,
                trained,
                top=5,
                native=target.native,
            )
            total = total + self.weight / self.share * summed
            numbers[d - 1, :4] = torch.stack([summed.detach(), count(at), best.sum(), among.sum()])
        return total, numbers[1:]

    def states(self, output: TargetOutput, target: Target) -> Iterator[Tensor]:
        _no_drafts()

    def start(self, target: Target) -> Any:
        _no_drafts()

    def propose(self, *args: Any, **kwargs: Any) -> NoReturn:
        _no_drafts()

    def parameter_groups(self) -> list[dict[str, Any]]:
        return [{"params": [self.register], "lr_scale": self.lr_scale}]


def _no_drafts() -> NoReturn:
    raise DrafterError(
        "drafter=registers predicts only while an adapter is trained with it, and proposes no"
        " tokens: its result is the adapter, which is used as any other. For faster decoding"
        " train another drafter"
    )


def refuse(model: Any) -> None:
    """Raise DrafterError if the config of a model, loaded or not, shows that its tokens would see
    registers."""
    passes.refuse_mask_and_positions(model, "registers")
    if other := set(passes.kinds(model.config.get_text_config())) - _FULL:
        raise DrafterError(
            "drafter=registers needs layers that attend to the whole row, and"
            f" {type(model).__name__} has {', '.join(sorted(other))}: set drafter=none"
        )


@torch.no_grad()
def probe(model: Any) -> None:
    """Raise DrafterError unless a register with the next token's embedding acts as that token.

    With d = 2 it is at the next token's position and sees what that token sees, so their logits
    must be the same, and those of the sequence must be as without registers. A model that reads
    token ids elsewhere, keeps a state, or ignores mask or positions fails.
    """
    embed, config = model.get_input_embeddings(), model.config.get_text_config()
    # Ids from all over the vocabulary. The first ones are often special tokens that no training has
    # seen, and in bf16 the rounding of two shapes grows to 0.7 of their logits (SmolLM2, AVX2).
    ids = torch.arange(1, 7, device=embed.weight.device).unsqueeze(0) * (config.vocab_size // 7)
    positions = torch.arange(6, device=ids.device).unsqueeze(0)
    places = Places(
        positions[:, :-1], torch.full_like(ids[:, :-1], 2), ids[:, 1:], positions[:, 1:]
    )
    was_training = model.training
    model.eval()
    plain = model(input_ids=ids, use_cache=False).logits.float()
    inputs = with_registers(
        embed(ids), embed(ids[:, 1:]), positions, places, config._attn_implementation
    )
    try:
        logits = model(**inputs, use_cache=False).logits.float()
        expected = torch.cat([plain, plain[:, 1:]], 1)
        apart = logits.shape == expected.shape and _acts_as_tokens(model, inputs, logits, expected)
    except (RuntimeError, ValueError, IndexError, TypeError, AttributeError) as error:
        raise DrafterError(
            f"drafter=registers gives a model embeddings and a 4-D mask, and {type(model).__name__}"
            f" fails with them: {error}. Set drafter=none"
        ) from error
    finally:
        model.train(was_training)
    if not apart:
        raise DrafterError(
            f"{type(model).__name__} does not keep registers apart from its tokens by a mask and"
            " position_ids, so that drafter=registers would change what it computes: set"
            " drafter=none"
        )


def _acts_as_tokens(
    model: Any,
    inputs: dict[str, Tensor],
    logits: Float[Tensor, "1 L V"],
    expected: Float[Tensor, "1 L V"],
) -> bool:
    """Return whether tokens and registers have the expected logits, up to rounding."""
    # The two shapes round differently in every layer: by 0.05 of a position's logits in bf16. An
    # 8-bit layer rounds its input to 1/127 of the row's largest number, also in fp32.
    eight_bit = any(type(module).__name__ == "Linear8bitLt" for module in model.modules())
    dtype = model.get_input_embeddings().weight.dtype
    coarse = eight_bit or dtype in (torch.bfloat16, torch.float16)
    deviations = _deviations(logits, expected)
    if not bool((deviations <= (0.1 if coarse else 1e-3)).all()):
        return False
    # A wrong mask may change logits by less than that: by 0.01 where a token of SmolLM2 sees one
    # register. Passes of the same shape do not differ in rounding, except with experts and in 8
    # bits, where the products of one row depend on the others.
    if not coarse or eight_bit or _has_experts(model):
        return True
    return _is_isolated(model, inputs, logits) and _follows_positions(
        model, inputs, logits, deviations
    )


def _deviations(
    logits: Float[Tensor, "1 L V"], expected: Float[Tensor, "1 L V"]
) -> Float[Tensor, "1 L"]:
    """Return how far each position's logits are from the expected ones, relative to their norm."""
    return (logits - expected).norm(dim=-1) / expected.norm(dim=-1).clamp(min=1e-12)


def _has_experts(model: Any) -> bool:
    config = model.config.get_text_config()
    return any(
        getattr(config, name, None)
        for name in ("num_experts", "num_local_experts", "n_routed_experts")
    )


def _is_isolated(model: Any, inputs: dict[str, Tensor], logits: Float[Tensor, "1 L V"]) -> bool:
    """Return whether each position's logits stay the same when inputs change that it must not
    see."""
    embeds = inputs["inputs_embeds"]
    allowed = inputs["attention_mask"]
    allowed = (allowed if allowed.dtype == torch.bool else allowed == 0)[0, 0]
    length = (embeds.shape[1] + 1) // 2  # T tokens, T - 1 registers
    # later tokens, the registers of even number, those of odd number
    for changed in (slice(length // 2, length), slice(length, None, 2), slice(length + 1, None, 2)):
        other = embeds.clone()
        other[:, changed] = embeds[:, :1]
        moved = _deviations(
            model(**inputs | {"inputs_embeds": other}, use_cache=False).logits.float(), logits
        )
        unaffected = ~allowed[:, changed].any(1)
        if bool((moved[0, unaffected] > 1e-3).any()):
            return False
    return True


def _follows_positions(
    model: Any,
    inputs: dict[str, Tensor],
    logits: Float[Tensor, "1 L V"],
    deviations: Float[Tensor, "1 L"],
) -> bool:
    """Return False if position_ids of registers change nothing although registers deviate more than
    tokens do: then their positions come from elsewhere. Without any positional encoding both
    deviate by rounding only."""
    length = (logits.shape[1] + 1) // 2
    positions = inputs["position_ids"].clone()
    positions[:, length:] += 3
    shifted = model(**inputs | {"position_ids": positions}, use_cache=False).logits.float()
    if not torch.equal(shifted, logits):
        return True
    return float(deviations[:, length:].max()) <= 5 * float(deviations[:, :length].max()) + 1e-3


def _refuse_adapter(model: Any) -> None:
    passes.refuse_virtual_tokens(model, "registers")
    if not any(p.requires_grad for p in model.parameters()):
        raise DrafterError(
            "drafter=registers teaches the adapter, and adapter=none has nothing to learn: set an"
            " adapter such as lora, or drafter=none"
        )
