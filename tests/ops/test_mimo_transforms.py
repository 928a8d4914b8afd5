"""The operators on rows of several examples under opcheck, autograd of any order, ``torch.func``, compile, export."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.export import Dim, export

from fastseq import functional, reference
from fastseq.functional.lstm_arguments import Weights
from tests import tolerance
from tests.ops import mimo_cases as cases
from tests.ops import vq_cases
from tests.ops.mimo_cases import SMALL, Case
from tests.tolerance import assert_same_bits, assert_within_budget

pytestmark = vq_cases.needs_compiled()
CALLS = ("gather", "combine", "project")
each_call = pytest.mark.parametrize("name", CALLS)


def raw_calls(case: Case) -> dict[str, tuple[Any, ...]]:
    """Arguments of every operator."""
    x, weight, bias, index, parts, d, drows = cases.inputs(case)
    return {
        "mimo_gather": (x, index, torch.arange(2 * case.B).view(case.B, 2)),
        "mimo_gather alone": (x, index, None),
        "mimo_gather_backward": (drows, index, case.B),
        "mimo_combine": (parts, index, bias),
        "mimo_combine alone": (parts, index, None),
        "mimo_combine_backward": (d, index, case.B),
        "mimo_project": (x, weight, bias, index),
        "mimo_project alone": (x, weight, None, index),
        "mimo_project_backward": (d, x, weight, index, True, True, True),
        "mimo_project_backward some": (d, x, weight, index, False, True, False),
    }


@pytest.mark.parametrize("name", raw_calls(SMALL["one"]))
def test_opcheck(name: str) -> None:
    for case in (SMALL["places"], SMALL["by_example"], SMALL["no_rows"]):
        op = getattr(torch.ops.fastseq, name.split()[0]).default
        assert set(torch.library.opcheck(op, raw_calls(case)[name]).values()) == {"SUCCESS"}


def function(name: str, index: Tensor, batch_dim: int = 1) -> Any:
    """A call of ``functional`` with its floating-point tensors as arguments."""
    if name == "gather":
        return lambda x: functional.mimo_gather(x, index, batch_dim=batch_dim)
    if name == "combine":
        return lambda parts, bias: functional.mimo_combine(parts, index, bias, batch_dim=batch_dim)
    return lambda x, weight, bias: functional.mimo_project(x, weight, bias, index, batch_dim=batch_dim)


def tensors(name: str, case: Case, dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], Tensor]:
    """Those arguments, and the index."""
    x, weight, bias, index, parts, *_ = cases.inputs(case, dtype)
    assert bias is not None
    found = {"gather": [x], "combine": [parts, bias], "project": [x, weight, bias]}[name]
    return found, index


@each_call
def test_gradients_of_first_and_second_order(name: str) -> None:
    for case in (Case(2, 3, 4, 1, 2, 2, 3), Case(1, 2, 6, 2, 2, 30, 2)):
        found, index = tensors(name, case, torch.float64)
        leaves = [t.requires_grad_() for t in found]
        run = function(name, index)
        fast = case.C > 10
        assert torch.autograd.gradcheck(run, leaves, fast_mode=fast)
        assert torch.autograd.gradgradcheck(run, leaves, fast_mode=True)


@each_call
def test_func_grad_and_vmap(name: str) -> None:
    """One call per element of the mapped dimension, with and without a gradient inside."""
    found, index = tensors(name, SMALL["by_example"])
    run = function(name, index)

    def gradients(*values: Tensor) -> tuple[Tensor, ...]:
        return torch.func.grad(lambda *v: run(*v).sin().sum(), tuple(range(len(values))))(*values)

    def definition(*values: Tensor) -> tuple[Tensor, ...]:
        x, *rest = (v.detach().requires_grad_() for v in values)
        if name == "project":
            out = reference.mimo_project(x, *rest, index)
        else:
            out = getattr(reference, f"mimo_{name}")(x, index, *rest)
        return torch.autograd.grad(out.sin().sum(), (x, *rest))

    names = [f"d{n}" for n in range(len(found))]
    assert_within_budget(names, gradients(*found), definition, found, tolerance.GRADIENTS)
    many = [torch.stack((t, t + 1, -t)) for t in found]
    got = torch.func.vmap(lambda *v: (run(*v), *gradients(*v)))(*many)
    each = [(run(*v), *gradients(*v)) for v in zip(*many, strict=True)]
    assert_same_bits(["out", *names], got, [torch.stack(v) for v in zip(*each, strict=True)])


def test_vmap_over_the_index() -> None:
    x, _, _, index, *_ = cases.inputs(SMALL["places"])
    indices = torch.stack((index, index.flip(1)))
    got = torch.func.vmap(lambda i: torch.ops.fastseq.mimo_gather(x, i, None)[0])(indices)
    assert_same_bits("rows", got, torch.stack([reference.mimo_gather(x, i) for i in indices]))


@each_call
def test_forward_mode_is_refused(name: str) -> None:
    found, index = tensors(name, SMALL["places"])
    with pytest.raises(NotImplementedError, match="mimo: forward-mode differentiation \\(jvp\\) is not supported"):
        torch.func.jvp(function(name, index), tuple(found), tuple(found))


def test_compile() -> None:
    """One graph for any number of rows, forward and backward."""

    def loss(index: Tensor, x: Tensor, parts: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        rows, combined = function("gather", index)(x), function("combine", index)(parts, bias)
        return rows.sin().sum() + combined.sin().sum() + function("project", index)(x, weight, bias).cos().sum()

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    for case in (SMALL["by_example"], SMALL["steps"]):
        x, weight, bias, index, parts, *_ = cases.inputs(case)
        assert bias is not None
        found = []
        for run in (loss, compiled):
            leaves = [t.clone().requires_grad_() for t in (x, parts, weight, bias)]
            value = run(index, *leaves)
            found.append([value.detach(), *torch.autograd.grad(value, leaves)])
        for name, got, expected in zip("loss dx dparts dweight dbias".split(), found[1], found[0], strict=True):
            assert torch.equal(got, expected), name  # the sign of a zero may differ


class Net(torch.nn.Module):
    """Labels, rows and an LSTM of several examples in a row."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        shapes = ((20, 18), (20, 5), (20,), (20,))
        self.weights = torch.nn.ParameterList(torch.randn(s, generator=generator) * 0.3 for s in shapes)

    def forward(self, x: Tensor, labels: Tensor, index: Tensor) -> tuple[Tensor, ...]:
        out = functional.lstm(x, [Weights(*self.weights)], index=index)
        rows = functional.mimo_gather(x, index, batch_dim=1)
        summed = functional.mimo_combine(x, index, batch_dim=1)
        return out.output, out.h_n, rows, summed, functional.mimo_labels(labels, index)


def net_inputs(B: int, N: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(B + N)
    x = torch.randn(3, B, 6, generator=generator)
    index = torch.randint(0, B, (3, N), generator=generator, dtype=torch.int32)
    return x, torch.arange(B), index


NET = "output h_n rows summed labels"


@pytest.mark.parametrize("strict", [False, True])
def test_export_with_any_number_of_rows(strict: bool) -> None:
    net = Net()
    shapes = ({1: Dim("B", min=2, max=512)}, {0: Dim("B", min=2, max=512)}, {1: Dim("N", min=2, max=4096)})
    with torch.no_grad():
        program = export(net, net_inputs(5, 8), dynamic_shapes=shapes, strict=strict)
        for B, N in ((5, 8), (3, 30), (20, 4)):
            call = net_inputs(B, N)
            assert_same_bits(NET, program.module()(*call), net(*call))


def test_compile_of_the_layer() -> None:
    """The LSTM with an index in one graph, with its gradients."""
    torch._dynamo.reset()
    net = Net()
    compiled = torch.compile(net, fullgraph=True, dynamic=True, backend="aot_eager_decomp_partition")
    for B, N in ((5, 20), (4, 9)):
        found = []
        for run in (net, compiled):
            out = run(*net_inputs(B, N))
            grads = torch.autograd.grad(out[0].sin().sum() + out[1].sum(), tuple(net.weights))
            found.append([*(v.detach() for v in out), *grads])
        for name, got, expected in zip([*NET.split(), *(f"d{n}" for n in range(4))], found[1], found[0], strict=True):
            assert torch.equal(got, expected), name  # the sign of a zero may differ


def test_inductor_once() -> None:
    x, weight, bias, index, _, d, _ = cases.inputs(SMALL["by_example"])
    assert bias is not None
    torch._dynamo.reset()
    run = torch.compile(function("project", index), fullgraph=True)
    leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
    grads = torch.autograd.grad(run(*leaves), leaves, d)
    names, call = "dx dweight dbias", (d, x, weight, index)
    assert_within_budget(names, grads, reference.mimo_project_backward, call, tolerance.GRADIENTS)
