"""MIMOLinear, MIMOConv, MIMOEmbedding and MIMOHead: parameters, every mode, and their errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from fastseq._check import ArgumentError
from fastseq.nn import MIMOConv1d, MIMOConv2d, MIMOEmbedding, MIMOHead, MIMOLinear
from tests.nn.mimo_cases import CASES, B, M, R, by, compare, draw, embedding, gathered, slots_last, tables
from tests.tolerance import GRADIENTS, assert_same_bits, assert_within_budget

DTYPES = [torch.float64, torch.float32]


@pytest.mark.parametrize("case", CASES)
def test_parameters_are_those_of_the_wide_layer(case: str) -> None:
    make, plain, *_ = CASES[case]
    torch.manual_seed(3)
    ours = make()
    torch.manual_seed(3)
    wide = plain()
    state = ours.state_dict()
    assert list(state) == list(wide.state_dict())
    assert_same_bits(list(state), list(state.values()), list(wide.state_dict().values()))
    ours.load_state_dict(wide.state_dict())
    assert f"M={M}" in repr(ours)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", ["train", "ensemble", "multiplex"])
@pytest.mark.parametrize("case", CASES)
def test_modes(case: str, mode: str, dtype: torch.dtype) -> None:
    make, plain, shape, batch, channel = CASES[case]
    layer, index = make(dtype=dtype), draw()
    x = torch.randn(shape, dtype=dtype)
    if mode == "train":
        compare(layer, lambda x: layer(x, index), x, by(plain(), lambda x: gathered(x, index, batch, channel)))
        assert layer(x, index).shape[batch] == R * B
    elif mode == "ensemble":
        compare(layer, layer, x, by(plain(), lambda x: torch.cat([x] * M, channel)))
    else:
        at = channel if channel >= 0 else len(shape) - 1
        x = torch.randn(*shape[:at], M, *shape[at:], dtype=dtype)
        compare(layer, lambda x: layer(x, mode="multiplex"), x, by(plain(), lambda x: slots_last(x, channel)))


@pytest.mark.parametrize("case", CASES)
def test_modes_do_not_depend_on_training(case: str) -> None:
    make, _, shape, _, _ = CASES[case]
    layer, x, index = make(), torch.randn(shape), draw()
    training = layer(x), layer(x, index)
    layer.eval()
    assert_same_bits("ensemble train", (layer(x), layer(x, index)), training)


def test_strided_input_and_int64_index() -> None:
    layer, index = MIMOLinear(5, 7, M), draw()
    x = torch.randn(B, 10)[:, ::2]
    assert_same_bits("out", layer(x, index.long()), layer(x.contiguous(), index))
    wide = torch.randn(B, 5, 7, 3).permute(0, 3, 1, 2)
    conv = MIMOConv2d(3, 2, 3, M=M)
    assert_same_bits("out", conv(wide, index), conv(wide.contiguous(), index))


def test_unbatched_ensemble() -> None:
    conv, x = MIMOConv2d(3, 4, 3, M=M), torch.randn(2, 3, 5, 5)
    assert conv(x[0]).shape == conv(x).shape[1:]
    assert conv(x[:, None].expand(-1, M, -1, -1, -1)[0], mode="multiplex").shape == conv(x).shape[1:]
    assert MIMOLinear(5, 7, M)(torch.randn(5)).shape == (7,)


def test_empty_batch() -> None:
    index = torch.empty(M, 0, dtype=torch.int32)
    assert MIMOLinear(5, 7, M)(torch.empty(0, 5), index).shape == (0, 7)
    assert MIMOLinear(5, 7, M)(torch.empty(0, 5)).shape == (0, 7)
    assert embedding()(torch.empty(0, 3, dtype=torch.int64), index).shape == (0, 3, 4)


@pytest.mark.parametrize("padding_idx", [None, 2, -1])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", ["train", "ensemble", "multiplex"])
def test_embedding(mode: str, dtype: torch.dtype, padding_idx: int | None) -> None:
    layer, index = MIMOEmbedding(9, 4, M, padding_idx, dtype=dtype), draw()
    tokens = torch.randint(0, 9, (B, 5, M))
    if mode == "train":
        tokens = tokens[..., 0]
        rows, out = torch.stack([tokens[slot] for slot in index.long()], -1), layer(tokens, index)
        assert out.shape == (R * B, 5, 4)
    elif mode == "ensemble":
        tokens = tokens[..., 0]
        rows, out = tokens[..., None].expand(-1, -1, M), layer(tokens)
    else:
        rows, out = tokens, layer(tokens, mode="multiplex")
    upstream = torch.randn_like(out)
    (grad,) = torch.autograd.grad(out, layer.weight, upstream)

    def reference(weight: Tensor, upstream: Tensor) -> list[Tensor]:
        out = tables(weight, rows, None if padding_idx is None else padding_idx % 9)
        return [out, *torch.autograd.grad(out, weight, upstream)]

    assert_within_budget("out dweight", [out, grad], reference, [layer.weight, upstream], GRADIENTS)
    if padding_idx is not None:
        assert not grad[padding_idx].any() and not layer.weight[padding_idx].any()


class Sizes(TorchDispatchMode):
    """Notes how large what torch computes is."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[int] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        self.found += [t.numel() for t in (out,) if isinstance(t, Tensor)]
        return out


@pytest.mark.parametrize("padding_idx", [None, 2])
@pytest.mark.parametrize("kind", [torch.int32, torch.int64])
def test_multiplex_looks_up_one_vector_a_slot(kind: torch.dtype, padding_idx: int | None) -> None:
    """As the other way, of the options that need whole rows, does."""
    layer, whole = embedding(padding_idx), MIMOEmbedding(9, 4, M, padding_idx, sparse=True)
    whole.load_state_dict(layer.state_dict())
    tokens = torch.randint(0, 9, (B, 5, M)).to(kind)
    tokens[0] = 2
    out, want = layer(tokens, mode="multiplex"), whole(tokens, mode="multiplex")
    assert_same_bits("out", out, want)
    upstream = torch.randn_like(out)
    grads = torch.autograd.grad(out, layer.weight, upstream)[0], torch.autograd.grad(want, whole.weight, upstream)[0]

    def reference(weight: Tensor, upstream: Tensor) -> Tensor:
        return torch.autograd.grad(tables(weight, tokens, padding_idx), weight, upstream)[0]

    assert_within_budget("dweight", grads[0], reference, [layer.weight, upstream], GRADIENTS)
    assert_within_budget("dweight", grads[1].to_dense(), reference, [layer.weight, upstream], GRADIENTS)
    assert padding_idx is None or not grads[0][padding_idx].any()
    with Sizes() as sizes:
        layer(tokens, mode="multiplex")
    assert max(sizes.found) == 4 * tokens.numel()
    for token in (-1, 9):
        with pytest.raises(IndexError):
            layer(torch.full((1, M), token, dtype=kind), mode="multiplex")


def test_embedding_is_drawn_as_the_wide_table() -> None:
    torch.manual_seed(3)
    ours = MIMOEmbedding(9, 4, M, padding_idx=1)
    torch.manual_seed(3)
    assert_same_bits("weight", ours.weight, nn.Embedding(9, 4 * M, padding_idx=1).weight)


@pytest.mark.parametrize("mode", ["train", "ensemble", "multiplex"])
def test_sparse_embedding_gradients(mode: str) -> None:
    dense, sparse = MIMOEmbedding(9, 4, M, 0), MIMOEmbedding(9, 4, M, 0, sparse=True)
    tokens = torch.randint(0, 9, (B, M) if mode == "multiplex" else (B, 5))
    options = {"index": draw()} if mode == "train" else {"mode": mode}
    out = sparse(tokens, **options)
    upstream = torch.randn_like(out)
    (grad,) = torch.autograd.grad(out, sparse.weight, upstream)
    assert grad.is_sparse

    def reference(weight: Tensor, upstream: Tensor) -> Tensor:
        out = torch.func.functional_call(dense, {"weight": weight}, (tokens,), options)
        return torch.autograd.grad(out, weight, upstream)[0]

    assert_within_budget("dweight", grad.to_dense(), reference, [sparse.weight, upstream], GRADIENTS)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("per_slot", [True, False])
def test_head(per_slot: bool, bias: bool, dtype: torch.dtype) -> None:
    head = MIMOHead(5, 4, M, bias, dtype=dtype)
    plain = nn.Linear(5, M * 4, bias)
    assert [(n, p.shape) for n, p in head.named_parameters()] == [(n, p.shape) for n, p in plain.named_parameters()]
    x = torch.randn(*((2, 7, M, 5) if per_slot else (2, 7, 5)), dtype=dtype)

    def reference(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        weights, biases = parameters["weight"].chunk(M), parameters["bias"].chunk(M) if bias else [None] * M
        features = x.unbind(-2) if per_slot else [x] * M
        return torch.stack([F.linear(f, w, b) for f, w, b in zip(features, weights, biases, strict=True)], -2)

    compare(head, lambda x: head(x, per_slot=per_slot), x, reference)
    assert head(x, per_slot=per_slot).shape == (2, 7, M, 4)


@pytest.mark.parametrize("case", ["linear", "conv2d"])
def test_every_head_depends_on_every_slot_from_the_start(case: str) -> None:
    """Networks that keep the slots apart, or average them, would pass all other tests."""
    make, _, shape, _, _ = CASES[case]
    layer, index = make(dtype=torch.float64), draw(rho=0.0)
    x = torch.randn(shape, dtype=torch.float64)
    head = MIMOHead(layer(x).flatten(1).shape[1], 2, M, dtype=torch.float64)
    row = int((index.long().sort(0).values.diff(dim=0) != 0).all(0).nonzero()[0])  # with M different examples
    jacobian = torch.func.jacrev(lambda x: head(layer(x, index).tanh().flatten(1))[row])(x)  # [M, K, B, ...]
    size = jacobian.flatten(3).abs().amax((1, 3))  # [M, B]
    others = [b for b in range(B) if b not in index[:, row].tolist()]
    assert (size[:, index[:, row].long()] > 0).all() and not size[:, others].any()


LINEAR = CASES["linear"].layer
CONV1D, CONV2D = CASES["conv1d"].layer, CASES["conv2d"].layer
CALLS: dict[str, tuple[Any, str]] = {
    "m": (lambda: MIMOLinear(5, 7, 1), r"MIMOLinear: M must be an integer >= 2, got 1"),
    "m_bool": (lambda: MIMOHead(5, 7, True), r"MIMOHead: M must be an integer >= 2, got True"),
    "m_embedding": (lambda: MIMOEmbedding(5, 7, 0), r"MIMOEmbedding: M must be an integer >= 2, got 0"),
    "m_conv": (lambda: MIMOConv2d(5, 7, 3, M=1), r"MIMOConv2d: M must be an integer >= 2, got 1"),
    "groups": (lambda: MIMOConv1d(4, 4, 3, groups=2, M=2), r"MIMOConv1d: groups must be 1, .*, got 2"),
    "groups_by_place": (lambda: MIMOConv2d(4, 4, 3, 1, 0, 1, 2, M=2), r"MIMOConv2d: groups must be 1, .*, got 2"),
    "mode": (lambda: LINEAR()(torch.randn(6, 5), mode="eval"), r"MIMOLinear: mode must be one of 'train', .*'eval'"),
    "no_index": (
        lambda: LINEAR()(torch.randn(6, 5), mode="train"),
        r"index must be \[M, N\] in mode 'train', got None",
    ),
    "two_modes": (
        lambda: LINEAR()(torch.randn(6, 5), draw(), mode="multiplex"),
        r"index must be None in mode 'multiplex', got \[3, 24\]",
    ),
    "slots": (
        lambda: LINEAR()(torch.randn(6, 5), draw()[:2]),
        r"MIMOLinear: index must be integers \[M, R\*B\] = \[3, R\*6\], as MIMOIndex draws them, got \[2, 24\]",
    ),
    "batch": (
        lambda: LINEAR()(torch.randn(5, 5), draw()),
        r"index must be integers \[M, R\*B\] = \[3, R\*5\].* \[3, 24\]",
    ),
    "float": (lambda: LINEAR()(torch.randn(6, 5), draw().float()), r"index must be int32 or int64, got torch.float32"),
    "width": (lambda: LINEAR()(torch.randn(6, 4)), r"MIMOLinear: input must be \[..., C\] = \[..., 5\], got \[6, 4\]"),
    "no_slots": (
        lambda: LINEAR()(torch.randn(6, 5), mode="multiplex"),
        r"MIMOLinear: input must be \[..., M, C\] = \[..., 3, 5\], got \[6, 5\]",
    ),
    "conv_train": (
        lambda: CONV2D()(torch.randn(3, 5, 6), draw()),
        r"MIMOConv2d: input must be \[B, 3, ...\] with 2 axes after the channels, got \[3, 5, 6\]",
    ),
    "conv_multiplex": (
        lambda: CONV1D()(torch.randn(6, 2, 11), mode="multiplex"),
        r"MIMOConv1d: input must be \[B, 3, 2, ...\] with 1 axes after the channels, got \[6, 2, 11\]",
    ),
    "conv_channels": (lambda: CONV2D()(torch.randn(6, 9, 5, 6)), r"MIMOConv2d: input must be \[B, 3, ...\]"),
    "embedding_slots": (
        lambda: embedding()(torch.zeros(6, 5, dtype=torch.int64), mode="multiplex"),
        r"MIMOEmbedding: input must be \[..., M\] = \[..., 3\], got \[6, 5\]",
    ),
    "embedding_batch": (
        lambda: embedding()(torch.zeros((), dtype=torch.int64), draw()),
        r"MIMOEmbedding: input must be tokens with examples along 0, got \[\]",
    ),
    "head": (
        lambda: MIMOHead(5, 4, M)(torch.randn(6, 4)),
        r"MIMOHead: input must be \[..., H\] = \[..., 5\], got \[6, 4\]",
    ),
    "head_slots": (
        lambda: MIMOHead(5, 4, M)(torch.randn(2, 5), per_slot=True),
        r"MIMOHead: input must be \[..., M, H\] = \[..., 3, 5\], got \[2, 5\]",
    ),
}


@pytest.mark.parametrize("case", CALLS)
def test_errors(case: str) -> None:
    call, message = CALLS[case]
    with pytest.raises(ValueError, match=message):
        call()


def test_an_index_out_of_range() -> None:
    with pytest.raises((ValueError, IndexError), match="index"):  # the definitions leave it to torch
        LINEAR()(torch.randn(3, 5), draw())


def test_an_index_that_is_no_tensor() -> None:
    with pytest.raises(TypeError, match=r"MIMOLinear: index must be a tensor of integers .*, got list"):
        LINEAR()(torch.randn(6, 5), [[0] * 6] * 3)
    with pytest.raises(ArgumentError, match="M must be"):
        MIMOLinear(5, 7, 2.0)  # type: ignore[arg-type]
