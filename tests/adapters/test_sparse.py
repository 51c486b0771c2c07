"""One sparse layer against a dense delta times a mask, its gradients, and what it holds in the
base's weight."""

from __future__ import annotations

import copy
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from adapters import mask, sddmm, sparse
from adapters.delta import AdaptedLinear, AdapterError, Start, merge_linear, switched_off
from adapters.linear import float_weight
from adapters.lora import LoRA
from adapters.rosa import RoSA, RoSAAdapter
from adapters.sparse import SparseDelta
from adapters.sparse_adapter import SparseAdapter
from tests.ranks import spawn
from tests.toys import adapters as toys
from tests.toys.sparse import make

WAYS = [way for way in sddmm.WAYS if way != "native" or sddmm.library() is not None]
# before: a low-rank part and no support yet; low: there will be none
PATHS = ("sparse", "both", "before", "low")
SCALE = 0.7


def layer(
    path: str = "both",
    o: int = 5,
    i: int = 7,
    k: int = 6,
    bias: bool = True,
    conv: bool = False,
    dropout: float = 0.0,
    way: str = "sampled",
    dtype: torch.dtype = torch.float64,
    std: float = 1.0,
) -> AdaptedLinear:
    """An adapted layer whose values, A and B are all random, so that nothing is hidden behind a
    zero."""
    torch.manual_seed(4)
    own = torch.float64 if dtype == torch.float64 else torch.float32
    linear: Any = Conv1D(o, i) if conv else nn.Linear(i, o, bias=bias)
    for parameter in linear.parameters():
        nn.init.normal_(parameter)
    linear.to(dtype).requires_grad_(False)
    k = 0 if path == "low" else k
    delta: Any = (
        SparseDelta(linear, k, own)
        if path == "sparse"
        else RoSA(linear, k, 3, SCALE, dropout, own, own)
    )
    delta.way = way
    if path != "sparse":
        nn.init.normal_(delta.B)
    adapted = AdaptedLinear(linear, delta)
    if path in ("sparse", "both"):
        nn.init.normal_(delta.values, std=std)
        delta.set_support(torch.randperm(o * i)[:k].sort().values, linear)
    return adapted


def parts(adapted: Any) -> dict[str, nn.Parameter]:
    """What is trained."""
    return {name: p for name, p in adapted.delta.named_parameters() if p.requires_grad}


def reference(
    adapted: Any, x: Tensor, upstream: Tensor, stored: Tensor | None = None
) -> dict[str, Tensor]:
    """y and all gradients in float64 by autograd: W + S M with a dense S and a mask M, and the
    low-rank branch."""
    delta = adapted.delta
    copied = copy.deepcopy(adapted)
    copied.delta.take_out(copied.base)
    w = float_weight(copied.base).double()
    actual = {name: p.detach().double().requires_grad_() for name, p in parts(adapted).items()}
    x = x.detach().double().requires_grad_()
    s, m = torch.zeros_like(w), torch.zeros_like(w)
    if delta.has_support:
        for value, entry in zip(actual["values"].tolist(), delta.indices.tolist(), strict=True):
            s[entry // delta.i, entry % delta.i] = value
            m[entry // delta.i, entry % delta.i] = 1
    s.requires_grad_()
    y = x @ (w + s * m).T
    if adapted.bias is not None:
        y = y + adapted.bias.double()
    if "A" in actual:
        dropped = x if stored is None else x * stored.double().view(x.shape) / (1 - delta.dropout)
        y = y + SCALE * (dropped @ actual["A"].T) @ actual["B"].T
    y.backward(upstream.double())
    right = {"y": y.detach(), "x": x.grad} | {
        name: p.grad for name, p in actual.items() if name != "values"
    }
    if delta.has_support:
        right["values"] = torch.stack(
            [s.grad[e // delta.i, e % delta.i] for e in delta.indices.tolist()]
        )
    return right  # type: ignore[return-value]


def results(adapted: Any, x: Tensor, upstream: Tensor) -> dict[str, Tensor]:
    """y and all gradients."""
    adapted.zero_grad()
    x = x.detach().clone().requires_grad_()
    y = adapted(x)
    y.backward(upstream.to(y.dtype))
    gradients = {name: p.grad for name, p in parts(adapted).items() if p.grad is not None}
    return {"y": y.detach(), "x": x.grad} | gradients  # type: ignore[return-value]


def inputs(adapted: Any, *shape: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(8)
    x = torch.randn(*shape, adapted.delta.i, generator=draw, dtype=torch.float64)
    return x.to(dtype), torch.randn(
        *shape, adapted.delta.o, generator=draw, dtype=torch.float64
    ).to(dtype)


def same(actual: dict[str, Tensor], right: dict[str, Tensor], rounding: float = 1e-12) -> None:
    """Each result is right up to so many of its own largest number, and none is zero."""
    assert actual.keys() == right.keys()
    for name, expected in right.items():
        assert actual[name].shape == expected.shape
        if expected.numel():
            assert expected.abs().max() > 0, name
            assert (
                actual[name].double() - expected.double()
            ).abs().max() <= rounding * expected.abs().max(), name


# the layer


@pytest.mark.long
@pytest.mark.parametrize(
    ("path", "way", "kind", "dropout"),
    [
        *((path, way, "bias", 0.0) for path in PATHS for way in ("sampled", "gathered")),
        *(("both", "sampled", kind, 0.4) for kind in ("bias", "plain", "Conv1D")),
        ("both", "gathered", "Conv1D", 0.4),
        *((path, "sampled", "plain", 0.4) for path in ("before", "low")),
    ],
)
def test_its_gradient_is_that_of_its_value(path, way, kind, dropout):
    adapted = layer(
        path, o=3, i=4, k=5, bias=kind == "bias", conv=kind == "Conv1D", dropout=dropout, way=way
    ).train()
    names = [name for name in parts(adapted) if name != "values" or adapted.delta.has_support]
    x = torch.randn(2, 2, 4, dtype=torch.float64, requires_grad=True)

    def of(x, *arguments):
        torch.manual_seed(5)  # the same dropout each time
        # gradcheck goes back through the first output after computing others
        apart = copy.deepcopy(adapted)
        apart.delta.folded_version = None
        return torch.func.functional_call(
            apart, {f"delta.{n}": p for n, p in zip(names, arguments, strict=True)}, (x,)
        )

    assert torch.autograd.gradcheck(of, (x, *(parts(adapted)[name] for name in names)))


USUAL = (5, 7, 6, (2, 3))
# (o, i, k, shape of x without its last dimension)
SIZES = [
    (1, 9, 4, (4,)),
    (8, 1, 3, (3, 1)),
    (13, 11, 143, ()),
    (13, 11, 1, (2, 2, 3)),
    (3, 5, 4, (0,)),
    (1, 1, 1, (1,)),
]


@pytest.mark.parametrize(
    ("path", "way", "kind", "sizes"),
    [
        *((path, way, "bias", USUAL) for path in PATHS for way in ("sampled", "gathered")),
        *(("both", way, "bias", sizes) for way in ("sampled", "gathered") for sizes in SIZES),
        *((path, "sampled", kind, USUAL) for path in PATHS for kind in ("plain", "Conv1D")),
        ("both", "gathered", "Conv1D", USUAL),
    ],
)
def test_it_is_a_dense_delta_times_a_mask(path, way, kind, sizes):
    o, i, k, shape = sizes
    adapted = layer(path, o, i, k, bias=kind == "bias", conv=kind == "Conv1D", way=way)
    x, upstream = inputs(adapted, *shape)
    right = reference(adapted, x, upstream)
    if x.numel():
        same(results(adapted, x, upstream), right)
    else:
        actual = results(adapted, x, upstream)
        assert actual["y"].shape == right["y"].shape
        assert all((actual[name] == 0).all() for name in right)


@pytest.mark.parametrize("path", ["both", "before", "low"])
@pytest.mark.parametrize("conv", [False, True])
def test_dropout_falls_on_the_low_rank_part_only(path, conv):
    adapted = layer(path, conv=conv, dropout=0.4)
    x, upstream = inputs(adapted, 9, 4)
    torch.manual_seed(5)
    stored = torch.empty(36, 7, dtype=torch.bool).bernoulli_(0.6)
    assert 0.5 < stored.float().mean() < 0.7
    torch.manual_seed(5)
    actual = results(adapted.train(), x, upstream)
    same(actual, reference(adapted, x, upstream, stored))
    assert not torch.equal(results(adapted, x, upstream)["y"], actual["y"])
    same(results(adapted.eval(), x, upstream), reference(adapted, x, upstream))


def test_nothing_is_drawn_without_dropout():
    adapted = layer().train()
    before = torch.get_rng_state()
    results(adapted, *inputs(adapted, 3))
    assert torch.equal(torch.get_rng_state(), before)


def test_inputs_that_are_no_block_of_memory():
    adapted = layer()
    x, upstream = inputs(adapted, 4, 3)
    right = reference(adapted, x, upstream)
    same(
        results(adapted, x.transpose(0, 1).contiguous().transpose(0, 1), upstream.flip(0).flip(0)),
        right,
    )
    # as the gradient of a sum is
    spread = torch.zeros_like(upstream[..., :1]).expand(upstream.shape)
    same(results(adapted, x, spread + 1), reference(adapted, x, torch.ones_like(upstream)))
    adapted.zero_grad()
    adapted(x).sum().backward()
    same({"A": adapted.delta.A.grad}, {"A": reference(adapted, x, torch.ones_like(upstream))["A"]})


def test_what_needs_no_gradient_has_none():
    adapted = layer()
    x, upstream = inputs(adapted, 4)
    right = reference(adapted, x, upstream)
    for alone in ("values", "A", "B"):
        for name, p in parts(adapted).items():
            p.requires_grad_(name == alone)
            p.grad = None
        adapted(x).backward(upstream)
        assert adapted.base.weight.grad is None
        same(
            {n: p.grad for n, p in adapted.delta.named_parameters() if p.grad is not None},
            {alone: right[alone]},
        )
        for p in adapted.delta.parameters():
            p.requires_grad_()


def test_another_gradient_of_the_gradient_is_refused():
    adapted = layer()
    x = inputs(adapted, 3)[0].requires_grad_()
    first = torch.autograd.grad(adapted(x).square().sum(), x, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="differentiate"):
        first.sum().backward()


# dtypes


@pytest.mark.parametrize(
    ("path", "way", "dtype"),
    [
        *((path, way, torch.bfloat16) for path in PATHS for way in WAYS),
        *(("both", way, dtype) for way in WAYS for dtype in (torch.float32, torch.float16)),
    ],
)
def test_half_precision(path, way, dtype):
    adapted = layer(path, 48, 64, 150, dtype=dtype, way=way)
    x, upstream = inputs(adapted, 3, 10, dtype=dtype)
    actual = results(adapted, x, upstream)
    assert actual.pop("y").dtype == actual.pop("x").dtype == dtype
    assert {gradient.dtype for gradient in actual.values()} == {torch.float32}
    # A result passes through at most four roundings to the dtype: of W + S, A or B, of x Aᵀ, of the
    # sum, of the result.
    same(results(adapted, x, upstream), reference(adapted, x, upstream), 4 * torch.finfo(dtype).eps)


def test_bf16_values_collect_their_gradient_in_bf16():
    linear = nn.Linear(64, 48, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    delta = SparseDelta(linear, 50, torch.bfloat16)
    delta.set_support(torch.arange(50) * 61, linear)
    adapted = AdaptedLinear(linear, delta)
    x, upstream = inputs(adapted, 10, dtype=torch.bfloat16)
    actual = results(adapted, x, upstream)
    assert actual["values"].dtype == torch.bfloat16
    same(actual, reference(adapted, x, upstream), 4 * 2**-8)


@pytest.mark.parametrize(
    ("path", "way", "conv"),
    [
        *((path, way, False) for path in PATHS for way in WAYS),
        *(("both", way, True) for way in WAYS),
        ("sparse", "sampled", True),
    ],
)
def test_under_autocast_the_products_are_bf16_and_gradients_fp32(path, way, conv):
    adapted = layer(path, 48, 64, 150, dtype=torch.float32, way=way, conv=conv)
    x, upstream = inputs(adapted, 3, 10, dtype=torch.float32)
    arguments = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = adapted(arguments)
        plain = nn.functional.linear(x, float_weight(adapted.base), adapted.bias)
    y.backward(upstream.to(y.dtype))
    actual = {"y": y.detach(), "x": arguments.grad} | {
        n: p.grad for n, p in parts(adapted).items() if p.grad is not None
    }
    assert y.dtype == plain.dtype == torch.bfloat16
    assert {gradient.dtype for name, gradient in actual.items() if name != "y"} == {torch.float32}
    same(actual, reference(adapted, x, upstream), 4 * 2**-8)
    if path == "sparse":
        assert torch.equal(y, plain)  # what is held is multiplied as torch multiplies any weight


def test_a_held_weight_answers_as_a_plain_layer_of_that_weight():
    for dtype in (torch.float32, torch.bfloat16):
        adapted = layer("sparse", 48, 64, 150, dtype=dtype)
        x, _ = inputs(adapted, 3, 10, dtype=dtype)
        assert torch.equal(adapted(x), adapted.base(x))


def test_native_is_refused_without_a_compiler_and_a_run_that_had_one_goes_on(monkeypatch, tmp_path):
    monkeypatch.setenv("CC", str(tmp_path / "none"))
    sddmm.library.cache_clear()
    try:
        adapter = make(gradient="native")
        with torch.device("meta"):
            model = toys.llama()
        with pytest.raises(
            AdapterError, match=r"adapter.gradient=native needs a C compiler .*gradient=auto"
        ):
            adapter.attach(model, Start(folder=tmp_path))
        delta = layer("sparse", way="native").delta
        other = make()
        other.ways = {f"{delta.o} {delta.i} {len(delta.values)}": "native"}
        other._choose_way(AdaptedLinear(nn.Linear(delta.i, delta.o), delta))
        assert delta.way == "sampled"
    finally:
        sddmm.library.cache_clear()


# the ways of training


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_recomputed_in_the_backward_pass_it_is_the_same(dropout):
    adapted = layer(dropout=dropout).train()
    x, upstream = inputs(adapted, 6)
    torch.manual_seed(5)
    expected = results(adapted, x, upstream)
    adapted.zero_grad()
    x.requires_grad_()
    torch.manual_seed(5)
    y = checkpoint(adapted, x, use_reentrant=False)
    before = adapted.base.weight._version
    y.backward(upstream)
    actual = {"y": y.detach(), "x": x.grad} | {name: p.grad for name, p in parts(adapted).items()}
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
    assert adapted.base.weight._version == before


def test_micro_batches_add_up():
    adapted = layer()
    x, upstream = inputs(adapted, 6, 3)
    expected = results(adapted, x, upstream)
    adapted.zero_grad()
    for rows in (slice(0, 1), slice(1, 4), slice(4, 6)):
        adapted(x[rows]).backward(upstream[rows])
    same({n: p.grad for n, p in parts(adapted).items()}, {n: expected[n] for n in parts(adapted)})
    adapted.zero_grad()
    first, second = adapted(x[:2]), adapted(x[2:])  # both forward passes first
    second.backward(upstream[2:])
    first.backward(upstream[:2])
    same({n: p.grad for n, p in parts(adapted).items()}, {n: expected[n] for n in parts(adapted)})


def test_a_step_between_forward_and_backward_is_noticed():
    adapted = layer()
    x, upstream = inputs(adapted, 4)
    x.requires_grad_()
    y = adapted(x)
    with torch.no_grad():
        adapted.delta.values.add_(1)
    adapted(x)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward(upstream)


def attached(model: Any, **changes: Any) -> tuple[RoSAAdapter, Any]:
    """The model with all of S, A and B random."""
    torch.manual_seed(3)
    adapter = make(**changes)
    model = adapter.attach(model, Start(steps=9))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(("delta.B", "delta.values")):
                p.normal_(std=0.3)
    return adapter, model


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def _rank(rank: int, folder: Path) -> None:
    for mask_of in ("random", "gradient"):
        _, model = attached(toys.llama(), mask=mask_of)
        ddp = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
        # two micro-batches
        for rows in (slice(2 * rank, 2 * rank + 1), slice(2 * rank + 1, 2 * rank + 2)):
            (toys.loss(ddp, toys.IDS[rows]) / 2).backward()
        torch.save(gradients(model), folder / f"{mask_of}{rank}.pt")


def test_two_processes_have_the_gradient_of_one(tmp_path):
    spawn(_rank, tmp_path)
    for mask_of in ("random", "gradient"):
        _, model = attached(toys.llama(), mask=mask_of)
        toys.loss(model).backward()
        expected = gradients(model)
        assert len(expected) == 14 * (3 if mask_of == "random" else 2)
        for rank in (0, 1):
            actual = torch.load(tmp_path / f"{mask_of}{rank}.pt")
            if mask_of == "gradient":  # no support yet: what DDP makes up for values is not a move
                assert not any(
                    gradient.any() for name, gradient in actual.items() if name not in expected
                )
            for name, gradient in expected.items():
                torch.testing.assert_close(actual[name], gradient, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("way", ["sampled", "gathered", "auto"])
@pytest.mark.parametrize("transposed", [False, True])
def test_in_a_model_it_is_a_dense_delta_times_a_mask(way, transposed):
    plain = (toys.gpt2 if transposed else toys.llama)()
    adapter, model = attached(copy.deepcopy(plain), gradient=way)
    actual = list(sparse.layers(model))
    assert all(layer.delta.way in ("sampled", "gathered") for _, layer in actual)
    for name, adapted in actual:
        delta: Any = adapted.delta
        dense = torch.zeros(delta.o, delta.i, dtype=torch.float64)
        dense.view(-1)[delta.indices.long()] = delta.values.detach()
        dense += 1.5 * delta.B.detach() @ delta.A.detach()
        plain.get_submodule(name).weight.data += dense.T if transposed else dense
        plain.get_submodule(name).weight.requires_grad_()
    torch.testing.assert_close(toys.logits(model), toys.logits(plain), rtol=0, atol=1e-11)
    toys.loss(model).backward()
    toys.loss(plain).backward()
    for name, adapted in actual:
        delta = adapted.delta
        gradient = plain.get_submodule(name).weight.grad
        gradient = gradient.T if transposed else gradient
        torch.testing.assert_close(
            delta.values.grad, gradient.flatten()[delta.indices.long()], rtol=1e-8, atol=1e-12
        )
        torch.testing.assert_close(delta.A.grad, 1.5 * delta.B.T @ gradient, rtol=1e-8, atol=1e-12)
        torch.testing.assert_close(delta.B.grad, 1.5 * gradient @ delta.A.T, rtol=1e-8, atol=1e-12)
    _, checkpointed = attached((toys.gpt2 if transposed else toys.llama)(), gradient="sampled")
    if not transposed and way == "sampled":
        checkpointed.activation_checkpointing_enable({"use_reentrant": False})
        toys.loss(checkpointed.train()).backward()
        for name, gradient in gradients(model).items():
            assert torch.equal(gradients(checkpointed)[name], gradient)
    assert adapter.exportable != transposed


# memory


def kept_for_backward(run: Any, parameters: list[Tensor]) -> dict[int, Tensor]:
    """Tensors that a forward pass keeps, but for parameters, one for each memory."""
    own = {p.untyped_storage().data_ptr() for p in parameters}
    actual: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            actual[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return actual


@pytest.mark.parametrize("case", ["float32", "bfloat16", "autocast", "nf4", "int8"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_it_keeps_no_more_than_lora_and_its_input_once(tmp_path, case, dropout):
    dtype = torch.bfloat16 if case == "bfloat16" else torch.float32
    if case in ("nf4", "int8"):
        toys.llama(torch.float32).save_pretrained(tmp_path)
        base: Any = toys.quantised(tmp_path, case).model.layers[0].mlp.up_proj
    else:
        base = nn.Linear(64, 128, dtype=dtype).requires_grad_(False)
    i, r, t = 64, 4, 30
    x = torch.randn(3, 10, i, dtype=dtype, requires_grad=True)
    delta = RoSA(base, 80, r, SCALE, dropout, torch.float32, torch.float32)
    rosa = AdaptedLinear(base, delta).train()
    delta.set_support(torch.arange(80) * 100, base)
    outputs = []

    def run(adapted: Any) -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=case == "autocast"):
            outputs.append(adapted(x))

    own = [*base.parameters(), *delta.parameters()]
    stored = kept_for_backward(lambda: run(rosa), own)
    number = 2 if case in ("autocast", "bfloat16") else 4
    shapes = sorted(tuple(tensor.shape) for tensor in stored.values())
    assert shapes == sorted([(t, i), (t, r)] + [(t, i)] * (dropout > 0))
    bytes_kept = sum(tensor.untyped_storage().nbytes() for tensor in stored.values())
    assert bytes_kept == number * (t * i + t * r) + t * i * (dropout > 0)
    if case != "autocast":
        assert x.untyped_storage().data_ptr() in stored
    delta.take_out(base)
    lora = AdaptedLinear(base, LoRA(base, r, SCALE, dropout, torch.float32)).train()
    theirs = kept_for_backward(lambda: run(lora), [*base.parameters(), *lora.delta.parameters()])
    most = sum(tensor.untyped_storage().nbytes() for tensor in theirs.values())
    assert bytes_kept <= most + number * t * r


def test_layers_of_one_input_keep_it_once():
    x = torch.randn(3, 10, 64, requires_grad=True)
    first, second = (layer("sparse", 48, 64, 150, dtype=torch.float32) for _ in range(2))
    own = [*first.parameters(), *second.parameters()]
    outputs = []
    stored = kept_for_backward(lambda: outputs.extend([first(x), second(x)]), own)
    assert list(stored) == [x.untyped_storage().data_ptr()]


# holding


def held(adapted: Any) -> Tensor:
    """What the base's weight should be, entry by entry, rounded once."""
    copied = copy.deepcopy(adapted)
    copied.delta.take_out(copied.base)
    dense = float_weight(copied.base).double().clone()
    for value, entry in zip(
        adapted.delta.values.tolist(), adapted.delta.indices.tolist(), strict=True
    ):
        dense[entry // adapted.delta.i, entry % adapted.delta.i] += value
    return (dense.T if adapted.delta.transposed else dense).to(adapted.base.weight.dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("conv", [False, True])
def test_the_base_holds_the_sum_and_comes_back_bit_for_bit(dtype, conv):
    adapted: Any = layer("sparse", 48, 64, 150, dtype=dtype, conv=conv)
    plain = layer("low", 48, 64, dtype=dtype, conv=conv).base.weight
    address = adapted.base.weight.data_ptr()
    for _ in range(3):
        # fp32's sum may fall on the other side of a tie where float64's rounds once.
        different = adapted.base.weight != held(adapted)
        assert different.sum() <= (0 if dtype in (torch.float64, torch.float32) else 1)
        assert 100 < (adapted.base.weight != plain).sum() <= 150
        adapted.delta.take_out(adapted.base)
        assert torch.equal(adapted.base.weight, plain)
        adapted.delta.take_out(adapted.base)  # once more is nothing
        assert torch.equal(adapted.base.weight, plain)
        adapted.delta.fold_in(adapted.base)
        adapted.delta.fold_in(adapted.base)
        with torch.no_grad():
            adapted.delta.values.mul_(1.7)
        adapted.delta.refresh(adapted.base)
    adapted.delta.take_out(adapted.base)
    assert torch.equal(adapted.base.weight, plain)
    assert adapted.base.weight.data_ptr() == address


def test_values_collect_what_a_bf16_weight_hides():
    adapted: Any = layer("sparse", 48, 64, 150, dtype=torch.bfloat16, std=0.0)
    start = adapted.base.weight.clone()
    for _ in range(1000):
        with torch.no_grad():
            adapted.delta.values.add_(1e-4)
    adapted.delta.refresh(adapted.base)
    assert torch.allclose(adapted.delta.values, torch.tensor(0.1), atol=1e-5)
    assert (adapted.base.weight != start).sum() > 100
    assert (adapted.base.weight != held(adapted)).sum() <= 1


def test_the_weight_is_written_only_when_values_have_changed():
    adapted: Any = layer()
    x, upstream = inputs(adapted, 3)
    results(adapted, x, upstream)
    before = adapted.base.weight._version
    for _ in range(3):
        results(adapted, x, upstream)
        results(adapted.eval(), x, upstream)
        adapted.train()
    assert adapted.base.weight._version == before
    with torch.no_grad():
        adapted.delta.values.add_(1)
    results(adapted, x, upstream)
    assert adapted.base.weight._version == before + 1
    same(results(adapted, x, upstream), reference(adapted, x, upstream))
    assert adapted.base.weight._version == before + 1


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD])
def test_after_a_step_the_weight_is_up_to_date(optimizer):
    adapted: Any = layer()
    steps = optimizer(list(adapted.delta.parameters()), lr=0.1)
    for _ in range(3):
        x, upstream = inputs(adapted, 3)
        results(adapted, x, upstream)
        before = adapted.base.weight.clone()
        steps.step()
        with torch.no_grad():
            adapted(x)
        assert torch.equal(adapted.base.weight, held(adapted))
        assert not torch.equal(adapted.base.weight, before)


def test_after_a_step_of_an_optimiser_that_goes_behind_versions_too():
    adapter, model = attached(toys.llama())
    expected = {}
    for name, adapted in sparse.layers(model):
        version = adapted.delta.values._version
        adapted.delta.values.data.add_(0.5)  # as fused and foreign ones do
        assert adapted.delta.values._version == version
        expected[name] = held(adapted)
    adapter.after_step(model, 2)
    assert all(
        torch.equal(adapted.base.weight, expected[name]) for name, adapted in sparse.layers(model)
    )


def test_another_parameter_in_the_values_place_is_noticed():
    adapted: Any = layer("sparse")
    adapted.delta.values = nn.Parameter(adapted.delta.values.detach() + 1)
    x, upstream = inputs(adapted, 3)
    same(results(adapted, x, upstream), reference(adapted, x, upstream))


def test_a_copy_is_whole_and_its_own():
    _, model = attached(toys.llama())
    expected = toys.logits(model)
    other = copy.deepcopy(model)
    assert torch.equal(toys.logits(other), expected)
    with torch.no_grad():
        for _, adapted in sparse.layers(other):
            adapted.delta.values.mul_(2)
    moved = toys.logits(other)
    assert not torch.allclose(moved, expected, atol=1e-2)
    assert torch.equal(toys.logits(model), expected)
    for _, adapted in sparse.layers(other):
        assert torch.equal(adapted.base.weight, held(adapted))
        adapted.delta.take_out(adapted.base)
    plain = dict(toys.llama().named_parameters())
    for name, adapted in sparse.layers(other):
        assert torch.equal(adapted.base.weight, plain[f"{name}.weight"])
    assert torch.equal(toys.logits(model), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_switched_off_and_on(dtype):
    own = {} if dtype == torch.float64 else {"dtype": "float32", "sparse_dtype": "float32"}
    adapter, model = attached(toys.llama(dtype), **own)
    expected = toys.logits(model)
    for _ in range(2):
        with adapter.disabled(model):
            plain = dict(toys.llama(dtype).named_parameters())
            assert all(
                torch.equal(x.base.weight, plain[f"{name}.weight"])
                for name, x in sparse.layers(model)
            )
            assert torch.equal(toys.logits(model), toys.logits(toys.llama(dtype)))
        assert torch.equal(toys.logits(model), expected)
    with torch.inference_mode(), adapter.disabled(model):
        toys.logits(model)
    toys.train(adapter, model.train())  # what was made in inference mode does not get in the way
    assert not torch.equal(toys.logits(model), expected)
    with adapter.disabled(model):
        assert torch.equal(toys.logits(model), toys.logits(toys.llama(dtype)))


def test_values_that_change_while_switched_off_are_held_afterwards():
    adapted: Any = layer("sparse")
    model = nn.Sequential(adapted)
    with switched_off(model), torch.no_grad():
        adapted.delta.values.add_(1)
    assert torch.equal(adapted.base.weight, held(adapted))


def test_a_new_support_gives_the_old_one_back():
    adapted: Any = layer("sparse")
    plain = layer("low").base.weight
    x, upstream = inputs(adapted, 3)
    for indices in ([0, 1, 2, 3, 4, 5], [3, 8, 9, 30, 33, 34]):
        adapted.delta.take_out(adapted.base)
        adapted.delta.set_support(torch.tensor(indices), adapted.base)
        assert adapted.delta.indices.tolist() == indices
        assert (adapted.base.weight != plain).flatten().nonzero().flatten().tolist() == indices
        same(results(adapted, x, upstream), reference(adapted, x, upstream))


@pytest.mark.long
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("schedule", ["wl", "spa_only"])
def test_merged_it_gives_the_same_logits(dtype, schedule):
    adapter, model = attached(
        toys.llama(dtype), schedule=schedule, dtype="float32", sparse_dtype="float32"
    )
    expected = toys.logits(model)
    weights = {name: adapted.base.weight.clone() for name, adapted in sparse.layers(model)}
    merged: Any = adapter.merge(copy.deepcopy(model))
    assert not list(sparse.layers(merged))
    if schedule == "spa_only":
        # What is held is what is merged, so that not even the rounding differs.
        assert all(
            torch.equal(merged.get_submodule(name).weight, weight)
            for name, weight in weights.items()
        )
        assert torch.equal(toys.logits(merged), expected)
    else:
        # The merge rounds W + S + B A, where the adapter rounds W + S, A, B and products: as far
        # from what is right, elsewhere.
        right = copy.deepcopy(model)
        with adapter.disabled(right):
            right = toys.exact(right.double())
        right = toys.logits(adapter.merge(right))
        off, merged_off = (
            (actual.double() - right).abs() for actual in (expected, toys.logits(merged))
        )
        assert merged_off.mean() < 1.5 * off.mean()
        assert 0 < off.mean() < 4 * torch.finfo(dtype).eps * right.abs().max()
    assert (toys.logits(toys.llama(dtype)) - expected).abs().mean() > 0.3


def test_a_merge_rounds_once():
    adapted: Any = layer("both", 48, 64, 150, dtype=torch.bfloat16, std=0.01)
    nn.init.normal_(adapted.delta.B, std=0.01)
    plain = layer("low", 48, 64, dtype=torch.bfloat16).base.weight.double()
    for value, entry in zip(
        adapted.delta.values.tolist(), adapted.delta.indices.tolist(), strict=True
    ):
        plain[entry // 64, entry % 64] += value
    plain += SCALE * adapted.delta.B.detach().double() @ adapted.delta.A.detach().double()
    merge_linear(adapted)
    # fp32 may fall on the other side of a tie
    assert (adapted.base.weight != plain.to(torch.bfloat16)).float().mean() < 0.001


# shared weights


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:Model.*tie_word_embeddings=True.*:UserWarning")
def test_on_a_tied_output_layer_the_embedding_stays(tmp_path):
    adapter, model = attached(toys.llama(), target_modules=["lm_head", "q_proj"])
    embedding = toys.llama().model.embed_tokens.weight
    expected = toys.logits(model)
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    assert not torch.equal(model.lm_head.weight, embedding)
    assert torch.equal(model.model.embed_tokens.weight, embedding)
    assert not torch.allclose(expected, toys.logits(toys.llama()), atol=1e-2)
    with adapter.disabled(model):
        assert torch.equal(toys.logits(model), toys.logits(toys.llama()))
        assert torch.equal(model.lm_head.weight, embedding)
    merged: Any = adapter.merge(model)
    assert torch.equal(merged.model.embed_tokens.weight, embedding)
    torch.testing.assert_close(toys.logits(merged), expected, rtol=0, atol=1e-11)
    merged.float().save_pretrained(tmp_path)
    loaded = type(merged).from_pretrained(tmp_path)
    torch.testing.assert_close(toys.logits(loaded).double(), expected, rtol=0, atol=1e-4)


# quantised bases


@pytest.mark.long
@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("path", ["both", "sparse", "before"])
@pytest.mark.parametrize("way", ["sampled", "gathered"])
def test_on_a_quantised_base_it_is_the_dequantised_weight_and_the_delta(tmp_path, kind, path, way):
    toys.llama(torch.float32, mlp_bias=True).save_pretrained(tmp_path)
    linear: Any = toys.quantised(tmp_path, kind).model.layers[0].mlp.up_proj
    packed, w = linear.weight.data.clone(), float_weight(linear)
    delta: Any = SparseDelta(linear, 80, torch.float32)
    if path != "sparse":
        delta = RoSA(linear, 80, 3, SCALE, 0.0, torch.float32, torch.float32)
        nn.init.normal_(delta.B)
    delta.way = way
    adapted = AdaptedLinear(linear, delta)
    nn.init.normal_(delta.values)
    if path != "before":
        delta.set_support(torch.arange(80) * 100, linear)
    x, upstream = inputs(adapted, 2, 6, dtype=torch.float32)
    for _ in range(2):
        same(results(adapted, x, upstream), reference(adapted, x, upstream), 1e-5)
    assert torch.equal(linear.weight.data, packed)
    assert torch.equal(float_weight(linear), w)
    assert delta.base_values is None
    delta.take_out(linear)
    with pytest.raises(AdapterError, match="base is quantised"):
        merge_linear(adapted)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_quantised_model_trains_and_switches_off(tmp_path, kind):
    toys.llama(torch.float32).save_pretrained(tmp_path)
    base = toys.quantised(tmp_path, kind, torch.bfloat16)
    alone = toys.logits(base)
    adapter, model = attached(base, dtype="float32", sparse_dtype="float32", mask="magnitude")
    for _, adapted in sparse.layers(model):
        delta: Any = adapted.delta
        largest = (
            float_weight(adapted.base)
            .abs()
            .flatten()
            .sort(descending=True)
            .values[: len(delta.indices)]
        )
        assert torch.equal(
            float_weight(adapted.base)
            .flatten()[delta.indices.long()]
            .abs()
            .sort(descending=True)
            .values,
            largest,
        )
    before = toys.logits(model)
    start = toys.loss(model).item()
    toys.train(adapter, model, range(3))
    assert toys.loss(model).item() < start
    assert not torch.equal(toys.logits(model), before)
    with adapter.disabled(model):
        assert torch.equal(toys.logits(model), alone)


# attaching


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"density": 0.0}, r"density of .*q_proj is 0.0: expected more than 0 and at most 1"),
        ({"density": 1.5}, r"density of .*q_proj is 1.5: expected"),
        (
            {"density": 3e-4},
            r"density 0.0003 of .*k_proj is less than one of its 2048 entries: raise it",
        ),
        (
            {"density_pattern": {"up_porj": 0.1}},
            r"density_pattern has 'up_porj', which is the end of no adapted layer's name",
        ),
        # of names, not of words
        ({"density_pattern": {"proj": 0.1}}, r"density_pattern has 'proj', which is the end of no"),
        (
            {"density_pattern": {"layers.1.mlp.up_proj": 2}},
            r"density of model.layers.1.mlp.up_proj is 2: expected",
        ),
    ],
)
def test_a_wrong_density_is_found_before_anything_is_attached(changes, message):
    model = toys.llama()
    with pytest.raises(AdapterError, match=message):
        make(**changes).attach(model, Start())
    assert not any(isinstance(module, AdaptedLinear) for module in model.modules())


def test_a_pattern_without_a_number_is_refused():
    # tests check types, the program does not
    plain: Any = inspect.unwrap(SparseAdapter.__init__)
    with pytest.raises(
        AdapterError, match="density_pattern has up_proj: 'many': expected a number"
    ):
        plain(
            make(), 0.1, {"q_proj": 0.2, "up_proj": "many"}, "all-linear", [], "sampled", "float32"
        )


def test_patterns_give_densities_by_names_ends():
    _, model = attached(
        toys.llama(), density_pattern={"layers.1.mlp.up_proj": 0.5, "up_proj": 0.25, "q_proj": 1}
    )
    for name, adapted in sparse.layers(model):
        o, i = adapted.base.weight.shape
        density = 0.02
        if name.endswith("q_proj"):
            density = 1
        if name.endswith("up_proj"):
            density = 0.5 if name == "model.layers.1.mlp.up_proj" else 0.25
        assert (
            len(adapted.delta.indices)
            == len(adapted.delta.values)
            == mask.entries(o, i, density, name)
        )
        assert abs(len(adapted.delta.indices) - density * o * i) <= 1


def test_a_states_supports_are_held_again():
    adapter, model = attached(toys.llama())
    expected, state = toys.logits(model), copy.deepcopy(adapter.state(model))
    other_adapter = make(mask="magnitude")
    other = other_adapter.attach(toys.llama(), Start())
    assert not torch.equal(toys.logits(other), expected)
    other_adapter.load_state(other, state)
    assert torch.equal(toys.logits(other), expected)
    for name, adapted in sparse.layers(other):
        assert torch.equal(adapted.delta.indices, dict(sparse.layers(model))[name].delta.indices)
        assert torch.equal(adapted.base.weight, held(adapted))
    broken = copy.deepcopy(state)
    broken["tensors"].popitem()
    with pytest.raises(AdapterError, match="does not fit this model"):
        other_adapter.load_state(other, broken)
    assert torch.equal(toys.logits(other), expected)
