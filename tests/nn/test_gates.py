"""Binary and sharpened gates of the modules: equations, noise, seeds, and what evaluation does."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.checkpoint import checkpoint

from fastseq import functional, reference
from fastseq.nn import LSTM, LSTMCell
from tests.nn.stock import LENGTHS, assert_like, assert_same_rows, inputs
from tests.tolerance import GRADIENTS, assert_same_bits, assert_within_budget

T, B, I, H = 5, 3, 3, 6  # noqa: E741


def noise_of(module: LSTM, seed: int, layer: int, direction: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """What a forward under ``torch.manual_seed(seed)`` adds to i and f."""
    torch.manual_seed(seed)
    return reference.gate_noise(
        functional.draw_seed(),
        T,
        B,
        H,
        stream=2 * layer + direction,
        noise_probability=module.noise_probability,
        dtype=dtype,
    )


def scaled(parameters: dict[str, Tensor], factor: float) -> dict[str, Tensor]:
    """The rows of i and f times ``factor``."""
    return {k: torch.cat((v[: 2 * H] * factor, v[2 * H :])) for k, v in parameters.items()}


def through_stock(module: LSTM, parameters: list[Tensor], x: Tensor, noises: list[Tensor]) -> list[Tensor]:
    """The exact reduction: stock nn.LSTM of [x, noise], an identity block in weight_ih carrying the noise to i and f,
    and the rows of i and f divided by tau. Output, h_n, c_n and the gradients of parameters and x."""
    carry = torch.eye(4 * H, 2 * H, dtype=x.dtype)
    directions = 2 if module.bidirectional else 1
    out, h_n, c_n = x, [], []
    per_direction = len(parameters) // (module.num_layers * directions)
    for n in range(module.num_layers * directions):
        weights = parameters[n * per_direction : (n + 1) * per_direction]
        if n % directions == 0:
            layer_input, outs = out, []
        stock = nn.LSTM(layer_input.shape[-1] + 2 * H, H, dtype=x.dtype)
        named = dict(zip(("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"), weights, strict=True))
        named["weight_ih_l0"] = torch.cat((named["weight_ih_l0"], carry), 1)
        named = scaled(named, 1 / module.tau)
        reverse = n % directions == 1
        given = torch.cat((layer_input, noises[n]), -1)
        got, (h, c) = torch.func.functional_call(stock, named, (given.flip(0) if reverse else given,))
        outs.append(got.flip(0) if reverse else got)
        h_n.append(h)
        c_n.append(c)
        out = torch.cat(outs, -1)
    results = [out, torch.cat(h_n), torch.cat(c_n)]
    torch.manual_seed(11)
    upstream = [torch.randn(v.shape, dtype=torch.float64).to(v.dtype) for v in results]
    return [*results, *torch.autograd.grad(results, [*parameters, x], upstream)]


@pytest.mark.parametrize("noise_probability", [1.0, 0.2, 0.0])
@pytest.mark.parametrize("layers, both", [(1, False), (2, True)])
def test_reduction_to_stock(layers: int, both: bool, noise_probability: float) -> None:
    make = functools.partial(
        LSTM, I, H, layers, bidirectional=both, gates="binary", noise_probability=noise_probability
    )
    module = make(dtype=torch.float64)
    x = torch.randn(T, B, I, dtype=torch.float64, requires_grad=True)
    noises = [noise_of(module, 5, layer, d) for layer in range(layers) for d in range(1 + both)]
    assert any(v.any() for v in noises) == (noise_probability > 0)
    torch.manual_seed(5)
    out, (h_n, c_n) = module(x)
    torch.manual_seed(11)
    upstream = [torch.randn(v.shape, dtype=torch.float64) for v in (out, h_n, c_n)]
    grads = torch.autograd.grad([out, h_n, c_n], [*module.parameters(), x], upstream)
    assert_within_budget(
        [f"value {n}" for n in range(3 + len(grads))],
        [out, h_n, c_n, *grads],
        lambda *args: through_stock(module, *args),
        [[p.detach().requires_grad_() for p in module.parameters()], x, noises],
        GRADIENTS,
    )


def test_noise_goes_to_rows_before_sorting() -> None:
    module = LSTM(I, H, 2, bidirectional=True, gates="binary", noise_probability=1.0, dtype=torch.float64)
    x = torch.randn(T, B, I, dtype=torch.float64)
    lengths = torch.tensor(LENGTHS)
    torch.manual_seed(4)
    padded, (h_n, c_n) = module(x, lengths=lengths)
    torch.manual_seed(4)
    packed, (h_packed, c_packed) = module(pack_padded_sequence(x, lengths, enforce_sorted=False))
    want = pack_padded_sequence(padded, lengths, enforce_sorted=False).data
    assert_same_rows("out h c", [packed.data, h_packed, c_packed], [want, h_n, c_n])


@pytest.mark.parametrize("a", [-4.0, -1.0, 0.0, 0.5, 3.0])
def test_distribution_of_gates(a: float) -> None:
    """P(G >= 1-e) = sigmoid(a - tau * log(1/e - 1)) (Li et al., from the proof of proposition 1), 2**20 draws."""
    units, tau = 1024, 0.9
    module = LSTM(1, units, gates="binary", noise_probability=1.0)
    with torch.no_grad():
        for p in module.parameters():
            p.zero_()
        module.bias_ih_l0.fill_(a)
        gates = module(torch.zeros(32, 32, 1), return_gates=True)[2][0]
    for drawn in (gates.i, gates.f):
        assert drawn.numel() == 2**20
        for e in (0.05, 0.1, 0.3):
            p = 1 / (1 + math.exp(-(a - tau * math.log(1 / e - 1))))
            share = (drawn >= 1 - e).double().mean().item()
            # six standard deviations: one false alarm in 5e8; the draws are the same in every run anyway
            assert abs(share - p) <= 6 * math.sqrt(p * (1 - p) / drawn.numel()), (e, share, p)


@pytest.mark.parametrize("p", [0.2, 0.7])
def test_share_of_gates_with_noise(p: float) -> None:
    module = LSTM(1, 256, gates="binary", noise_probability=p)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
        gates = module(torch.zeros(64, 16, 1), return_gates=True)[2][0]
    for drawn in (gates.i, gates.f):
        share = (drawn != 0.5).double().mean().item()
        assert abs(share - p) <= 6 * math.sqrt(p * (1 - p) / drawn.numel())


def test_seed_follows_torch_and_differs_per_call_layer_and_direction() -> None:
    module = LSTM(I, H, 2, bidirectional=True, gates="binary", noise_probability=1.0)
    x = torch.randn(T, B, I)
    torch.manual_seed(1)
    first, second = module(x)[0], module(x)[0]
    torch.manual_seed(1)
    again = module(x)[0]
    assert_same_bits("out", again, first)
    assert not torch.equal(first, second)
    noises = [noise_of(module, 0, layer, d) for layer in range(2) for d in range(2)]
    assert all(not torch.equal(p, q) for n, p in enumerate(noises) for q in noises[:n])


def test_rank_is_mixed_into_the_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    def seed() -> int:
        torch.manual_seed(1)
        return int(functional.draw_seed())

    alone = seed()
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    seeds = []
    for rank in range(4):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        seeds.append(seed())
    assert seeds[0] == alone and len(set(seeds)) == 4


@pytest.mark.parametrize("make", [LSTM, LSTMCell])
def test_evaluation_leaves_the_generator_alone(make: Any) -> None:
    module = make(I, H, gates="binary").eval()
    x = torch.randn(T, B, I) if make is LSTM else torch.randn(B, I)
    before = torch.get_rng_state()
    first = module(x)[0]
    assert torch.equal(torch.get_rng_state(), before)
    assert_same_bits("out", module(x)[0], first)
    stock = (nn.LSTM if make is LSTM else nn.LSTMCell)(I, H)
    stock.load_state_dict(module.state_dict())
    assert_within_budget("out", first, lambda x, *p: run_stock(stock, x, p), [x, *stock.parameters()])
    module.train()
    module(x)
    assert not torch.equal(torch.get_rng_state(), before)


def run_stock(stock: nn.Module, x: Tensor, parameters: tuple[Tensor, ...]) -> Tensor:
    named = dict(zip((n for n, _ in stock.named_parameters()), parameters, strict=True))
    return torch.func.functional_call(stock.to(x.dtype), named, (x,))[0]


@pytest.mark.parametrize("training", [True, False])
def test_sharpened_is_stock_with_scaled_weights(training: bool) -> None:
    given = inputs(LSTM(I, H), T, B, I)
    assert_like(functools.partial(LSTM, I, H, gates="sharpened"), _Scaled, given, 3, training=training)


class _Scaled(nn.LSTM):
    """Stock nn.LSTM whose rows of i and f are multiplied by 1 / 0.2 in the forward."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__(I, H, dtype=dtype)

    def forward(self, x: Tensor, hx: None = None) -> Any:  # type: ignore[override]
        named = scaled(dict(self.named_parameters()), 1 / 0.2)
        return torch.func.functional_call(nn.LSTM(I, H, dtype=x.dtype), named, (x,))


def test_hard_evaluation_thresholds_and_has_no_gradient_through_i_and_f() -> None:
    module = LSTM(I, H, gates="binary", hard_eval=True).eval()
    _, _, (gates,) = module(torch.randn(T, B, I), return_gates=True)
    assert set(gates.i.unique().tolist()) == set(gates.f.unique().tolist()) == {0.0, 1.0}
    gates.c.sum().backward()
    grad = module.weight_ih_l0.grad
    assert not grad[: 2 * H].any() and grad[2 * H : 3 * H].any()
    soft = LSTM(I, H, gates="binary").eval()
    soft.load_state_dict(module.state_dict())
    x = torch.randn(T, B, I)
    first = [m(x, return_gates=True)[2][0] for m in (soft, module)]
    assert torch.equal(first[0].i[0] > 0.5, first[1].i[0] == 1)  # the first step has the same pre-activations


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_replays_the_noise(reentrant: bool) -> None:
    module = LSTM(I, H, 2, gates="binary", noise_probability=1.0, weight_dropout=0.3, variational_dropout=0.3)
    x = torch.randn(T, B, I, requires_grad=True)
    grads = []
    for run in (module, lambda x: checkpoint(module, x, use_reentrant=reentrant)):
        torch.manual_seed(2)
        out = run(x)[0]
        module.zero_grad()
        out.square().sum().backward()
        grads.append([out.detach(), *(p.grad.clone() for p in module.parameters())])
    assert_same_bits([f"value {n}" for n in range(len(grads[0]))], grads[1], grads[0])


def test_cell_draws_fresh_noise_per_call() -> None:
    cell = LSTMCell(I, H, gates="binary", noise_probability=1.0)
    x = torch.randn(B, I)
    torch.manual_seed(6)
    first, second = cell(x)[0], cell(x)[0]
    torch.manual_seed(6)
    seed = functional.draw_seed()
    layer = LSTM(I, H, gates="binary", noise_probability=1.0)
    layer.load_state_dict({f"{k}_l0": v for k, v in cell.state_dict().items()})
    torch.manual_seed(6)
    assert_same_bits("h", layer(x[None])[0][0], first)
    assert not torch.equal(first, second) and seed.dtype == torch.int64 and seed.shape == (1,)
    cell.eval()
    assert_same_bits("h", cell(x)[0], cell(x)[0])
