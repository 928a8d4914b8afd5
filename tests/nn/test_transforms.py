"""The modules under compile, export, functional transforms, double backward, copying and pickling."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, export
from torch.func import functional_call, stack_module_state
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils.rnn import pack_padded_sequence

from fastseq.nn import LSTM, LSTMCell
from tests.nn.stock import LENGTHS, assert_same_sums
from tests.tolerance import assert_same_bits

T, B, I, H = 5, 3, 3, 6  # noqa: E741
BINARY: dict[str, Any] = {
    "bidirectional": True,
    "gates": "binary",
    "noise_probability": 1.0,
    "weight_dropout": 0.2,
    "variational_dropout": 0.2,
    "learnable_state": True,
}


def run(module: Any, parameters: list[Tensor], *args: Any, **call: Any) -> list[Tensor]:
    """Results and gradients under a fixed seed."""
    torch.manual_seed(3)
    out, state = module(*args, **call)
    outs = [out.data if hasattr(out, "batch_sizes") else out, *state]
    torch.manual_seed(4)
    grads = torch.autograd.grad(outs, parameters, [torch.randn(v.shape) for v in outs])
    return [*outs, *grads]


def assert_compiled(module: nn.Module, calls: list[tuple[tuple[Any, ...], dict[str, Any]]], **options: Any) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", **options)
    parameters = list(module.parameters())
    for args, call in calls:
        want = run(module, parameters, *args, **call)
        assert_same_bits([f"value {n}" for n in range(len(want))], run(compiled, parameters, *args, **call), want)


@pytest.mark.parametrize("dynamic, recompute, layers", [(False, False, 2), (True, False, 1), (True, True, 1)])
def test_compile(dynamic: bool, recompute: bool, layers: int) -> None:
    """aot_eager traces forward and backward and runs what it traced, so bits can be asked for."""
    module = LSTM(I, H, layers, recompute=recompute, **BINARY)
    x, state = torch.randn(T, B, I), (torch.randn(2 * layers, B, H), torch.randn(2 * layers, B, H))
    calls: list[Any] = [((x,), {}), ((torch.randn(7, 4, I),), {})]
    calls += [((x, state), {"lengths": torch.tensor(LENGTHS), "reset": torch.rand(T, B) < 0.3})]
    assert_compiled(module, calls, dynamic=dynamic)


@pytest.mark.parametrize("enforce_sorted", [False, True])
def test_compile_of_packed_input(enforce_sorted: bool) -> None:
    module = LSTM(I, H, 2, gates="binary", variational_dropout=0.2, bidirectional=not enforce_sorted)
    calls: list[Any] = []
    for lengths, call in (([5, 3, 2], {}), ([5, 5, 1], {}), ([5, 5, 1], {"reset": torch.rand(T, B) < 0.3})):
        packed = pack_padded_sequence(torch.randn(T, B, I), torch.tensor(lengths), enforce_sorted=enforce_sorted)
        calls += [((packed,), call)]
    assert_compiled(module, calls)


def test_compile_of_the_cell_and_with_inductor() -> None:
    assert_compiled(_Loop(), [((torch.randn(T, B, I),), {})])
    module = LSTM(I, H, gates="binary").eval()
    torch._dynamo.reset()
    x = torch.randn(T, B, I)
    with torch.no_grad():
        assert_same_bits("out", torch.compile(module, fullgraph=True)(x)[0], module(x)[0])


class _Loop(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = LSTMCell(I, H, gates="binary", noise_probability=1.0)

    def forward(self, x: Tensor) -> tuple[Tensor, Any]:
        state = None
        for step in x:
            state = self.cell(step, state)
        assert state is not None
        return state[0], state


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_export_with_dynamic_time_and_batch(training: bool, strict: bool) -> None:
    module = LSTM(I, H, 2, batch_first=True, **BINARY).train(training)
    sizes = {0: Dim("batch", min=2, max=64), 1: Dim("time", min=2, max=512)}
    program = export(module, (torch.randn(B, T, I),), dynamic_shapes=(sizes,), strict=strict)
    for b, t in ((B, T), (2, 31)):
        x = torch.randn(b, t, I)
        torch.manual_seed(1)
        want = module(x)
        torch.manual_seed(1)
        got = program.module()(x)
        assert_same_bits("out h c", [got[0], *got[1]], [want[0], *want[1]])


def test_export_with_lengths_and_reset() -> None:
    module = LSTM(I, H, 2, bidirectional=True)
    time, batch = Dim("time", min=2, max=512), Dim("batch", min=2, max=64)
    call = {"lengths": torch.tensor(LENGTHS), "reset": torch.rand(T, B) < 0.3}
    shapes = {"input": {0: time, 1: batch}, "lengths": {0: batch}, "reset": {0: time, 1: batch}}
    program = export(module, (torch.randn(T, B, I),), call, dynamic_shapes=shapes)
    x, call = torch.randn(9, 4, I), {"lengths": torch.tensor([9, 1, 4, 0]), "reset": torch.rand(9, 4) < 0.3}
    assert_same_bits("out", program.module()(x, **call)[0], module(x, **call)[0])
    with pytest.raises((ValueError, RuntimeError), match="lengths must lie in 0 .. T = 9"):
        program.module()(x, **(call | {"lengths": torch.tensor([9, 1, 4, 10])}))


def test_trace() -> None:
    module = LSTM(I, H, 2, bidirectional=True).eval()
    with torch.no_grad():
        traced = torch.jit.trace(module, torch.randn(T, B, I))
        x = torch.randn(T + 2, B, I)
        assert_same_bits("out", traced(x)[0], module(x)[0])


@pytest.mark.parametrize("make", [LSTM, LSTMCell])
@pytest.mark.parametrize("inside", [False, True])
def test_script_is_refused(make: Any, inside: bool) -> None:
    module = make(I, H)
    with pytest.raises(NotImplementedError, match=f"fastseq.nn.{make.__name__}: torch.jit.script is not supported"):
        torch.jit.script(nn.Sequential(module) if inside else module)


@pytest.mark.parametrize("frozen", [False, True])
def test_forward_mode_is_refused(frozen: bool) -> None:
    module = LSTM(I, H).requires_grad_(not frozen)
    x = torch.randn(T, B, I)
    with pytest.raises(NotImplementedError, match="forward-mode differentiation \\(jvp\\) is not supported"):
        torch.func.jvp(lambda x: module(x)[0], (x,), (x,))
    with torch.autograd.forward_ad.dual_level():  # tensors without a tangent may pass
        assert_same_bits("out", module(x)[0], module(x)[0])


def test_functional_call_and_grad() -> None:
    module = LSTM(I, H, 2, bidirectional=True, proj_size=2)
    x = torch.randn(T, B, I)
    named = {k: torch.randn_like(v) / 4 for k, v in module.named_parameters()}

    def loss(named: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(module, named, (x,))[0].square().sum()

    got = torch.func.grad(loss)(named, x)
    required = {k: v.clone().requires_grad_() for k, v in named.items()}
    want = torch.autograd.grad(loss(required, x), list(required.values()))
    assert_same_sums(list(named), list(got.values()), want)
    other = LSTM(I, H, 2, bidirectional=True, proj_size=2)
    other.load_state_dict(named)
    assert_same_bits("out", functional_call(module, named, (x,))[0], other(x)[0])


def test_vmap_over_an_ensemble_and_per_sample_gradients() -> None:
    members = [LSTM(I, H, bidirectional=True) for _ in range(3)]
    stacked, _ = stack_module_state(members)
    x = torch.randn(T, B, I)
    out = torch.vmap(lambda named, x: functional_call(members[0], named, (x,))[0], (0, None))(stacked, x)
    assert_same_bits("out", out, torch.stack([m(x)[0] for m in members]))
    module = members[0]
    named = {k: v.detach() for k, v in module.named_parameters()}

    def loss(named: dict[str, Tensor], row: Tensor) -> Tensor:
        return functional_call(module, named, (row,))[0].square().sum()

    per_sample = torch.vmap(torch.func.grad(loss), (None, 1))(named, x)
    for n in range(B):
        want = torch.autograd.grad(module(x[:, n])[0].square().sum(), list(module.parameters()))
        assert_same_sums(list(named), [g[n] for g in per_sample.values()], want)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_double_backward(training: bool, recompute: bool) -> None:
    module = LSTM(2, 3, 2, bidirectional=True, proj_size=2, recompute=recompute, dtype=torch.float64).train(training)
    module.gates, module.tau, module.noise_probability = "binary", 0.9, 1.0
    names = [n for n, _ in module.named_parameters()]
    given = [torch.randn(3, 2, 2, dtype=torch.float64), *(p.detach() for p in module.parameters())]
    given = [v.requires_grad_() for v in given]

    def run(x: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        torch.manual_seed(0)
        out, state = functional_call(module, dict(zip(names, parameters, strict=True)), (x,))
        return (out, *state)

    assert torch.autograd.gradgradcheck(run, given, fast_mode=True)


def test_gradient_penalty_is_that_of_stock() -> None:
    stock, module = nn.LSTM(I, H, 2, dtype=torch.float64), LSTM(I, H, 2, dtype=torch.float64)
    module.load_state_dict(stock.state_dict())
    x = torch.randn(T, B, I, dtype=torch.float64, requires_grad=True)
    results = []
    for m in (module, stock):
        (dx,) = torch.autograd.grad(m(x)[0].square().sum(), x, create_graph=True)
        results.append(torch.autograd.grad(dx.square().sum(), list(m.parameters()), allow_unused=True))
    for got, want in zip(*results, strict=True):
        # two float64 computations of one quantity in different orders; wrong second derivatives are off by percents
        assert (got - want).abs().max() <= 1e-12 * want.abs().max()


@pytest.mark.parametrize("make", [LSTM, LSTMCell])
def test_deepcopy_and_pickle(make: Any) -> None:
    module = make(I, H, gates="binary", tau=0.7, learnable_state=True).eval()
    x = torch.randn(T, B, I) if make is LSTM else torch.randn(B, I)
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    for other in (
        copy.deepcopy(module),
        pickle.loads(pickle.dumps(module)),
        torch.load(buffer, weights_only=False),
    ):
        assert repr(other) == repr(module) and "tau=0.7" in repr(module)
        assert_same_bits("out", other(x)[0], module(x)[0])
        assert not {id(p) for p in other.parameters()} & {id(p) for p in module.parameters()}
        with torch.no_grad():
            next(other.parameters()).zero_()
        assert not torch.equal(other(x)[0], module(x)[0])


def test_pickles_from_before_an_option_existed() -> None:
    for make, sizes in ((LSTM, (T, B, I)), (LSTMCell, (B, I))):
        module = make(I, H)
        state = module.__getstate__() if make is LSTM else dict(module.__dict__)
        for name in ("gates", "tau", "hard_eval", "noise_probability", "weight_dropout", "variational_dropout"):
            state.pop(name, None)
        for name in ("forget_bias", "learnable_state", "recompute", "proj_size", "_weight_names"):
            state.pop(name, None)
        old = make.__new__(make)
        old.__setstate__(state)
        x = torch.randn(*sizes)
        assert repr(old) == repr(module)
        assert_same_bits("out", old(x)[0], module(x)[0])


def test_parametrizations() -> None:
    module = LSTM(I, H)
    x = torch.randn(T, B, I)
    want = module(x)[0]
    parametrizations.weight_norm(module, "weight_hh_l0")
    assert (module(x)[0] - want).abs().max() <= 8 * torch.finfo(torch.float32).eps  # g * v / |v| is v but for rounding
    module(x)[0].sum().backward()
    assert module.parametrizations.weight_hh_l0.original0.grad.any()
    with torch.no_grad():
        module.parametrizations.weight_hh_l0.original0.zero_()
    plain = LSTM(I, H)
    plain.load_state_dict(
        {k: v for k, v in module.state_dict().items() if "original" not in k} | {"weight_hh_l0": torch.zeros(4 * H, H)}
    )
    assert_same_bits("out", module(x)[0], plain(x)[0])
    assert_same_bits("out", copy.deepcopy(module)(x)[0], plain(x)[0])
    parametrize.remove_parametrizations(module, "weight_hh_l0")
    assert_same_bits("out", module(x)[0], plain(x)[0])


def test_to_and_half_and_share() -> None:
    module = LSTM(I, H)
    x = torch.randn(T, B, I)
    assert module.double()(x.double())[0].dtype == torch.float64
    assert module.to(torch.bfloat16)(x.bfloat16())[0].dtype == torch.bfloat16
    assert module.float().share_memory()(x)[0].shape == (T, B, H)
    assert module._flat_weights[0] is module.weight_ih_l0
