"""Bottlenecks of DistSup: batch norm, projection and lookup as its code has them, written down here in plain torch."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor, nn

from fastseq._check import ArgumentError
from fastseq.nn import VectorQuantize, load_codebooks

C, D, K, N = 6, 4, 9, 3  # channels in, size of a code, codes, codebooks
State = dict[str, Tensor]


def norm(size: int, affine: bool = True) -> State:
    found = {"running_mean": torch.randn(size), "running_var": torch.rand(size) + 0.5}
    found |= {"weight": torch.rand(size) + 0.5, "bias": torch.randn(size)} if affine else {}
    found["num_batches_tracked"] = torch.tensor(7)
    return {f"batch_norm.batch_norm.{name}": value for name, value in found.items()}


def bottleneck(normalized: bool = True, projected: bool = True, affine: bool = True, seed: int = 0) -> State:
    """Of VQBottleneck, with the buffers that play no part in evaluation."""
    torch.manual_seed(seed)
    state = norm(C if projected else D, affine) if normalized else {}
    if projected:
        state |= {f"projection.{n}": v.detach() for n, v in nn.Linear(C, D).named_parameters()}
    state["embedding.weight"] = torch.randn(K, D)
    state["self_loop_bonus_estimate"] = torch.zeros(())
    state["reestimation_data"] = torch.tensor([2, 500, 1, 1, 1], dtype=torch.int32)
    return state | {"reestimation_reservoir.buffer": torch.randn(20, D)}


def normalize(state: State, x: Tensor) -> Tensor:
    """Evaluation, over the last dimension."""
    own = {n.removeprefix("batch_norm.batch_norm."): v for n, v in state.items() if n.startswith("batch_norm.")}
    if not own:
        return x
    unit = (x - own["running_mean"]) / (own["running_var"] + 1e-5).sqrt()
    return unit * own.get("weight", 1.0) + own.get("bias", 0.0)


def indices_of_theirs(state: State, x: Tensor) -> Tensor:
    x = normalize(state, x)
    if "projection.weight" in state:
        x = x @ state["projection.weight"].T + state["projection.bias"]
    return torch.cdist(x.flatten(0, -2), state["embedding.weight"]).argmin(-1).view(x.shape[:-1])


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize("projected", [True, False])
def test_one_codebook(normalized: bool, projected: bool, affine: bool) -> None:
    state = bottleneck(normalized, projected, affine)
    whole = {f"bottleneck.{name}": value for name, value in state.items()} | {"encoder.weight": torch.zeros(2, 2)}
    x = torch.randn(2, 40, C if projected else D)
    for module in (load_codebooks(whole), load_codebooks(whole, "bottleneck.", commitment_weight=0.25)):
        assert not module.training and isinstance(module, nn.Sequential if projected else VectorQuantize)
        quantized, indices, loss = module(x)
        assert torch.equal(indices, indices_of_theirs(state, x)) and loss == 0
        assert torch.equal(quantized, state["embedding.weight"][indices])
    module.train()(x)[2].backward()  # codes are parameters, and learn
    vq = module[-1] if isinstance(module, nn.Sequential) else module
    assert vq._codebook.embed.grad.abs().sum() > 0 and vq.commitment_weight == 0.25


@pytest.mark.parametrize("averaged", [True, False])
@pytest.mark.parametrize("normalized", [True, False])
def test_many_codebooks(normalized: bool, averaged: bool) -> None:
    """Of image maps; one batch norm for the vectors of all codebooks."""
    torch.manual_seed(1)
    state = norm(D) if normalized else {}
    state |= {"embedding": torch.randn(N, K, D), "reestimation_data": torch.zeros(5, dtype=torch.int32)}
    if averaged:
        state |= {"ema_count": torch.rand(N, K) + 1, "ema_weight": torch.randn(N, K, D)}
    x = torch.randn(2, N * D, 5, 7)
    module = load_codebooks(state)
    assert isinstance(module, VectorQuantize) and module.ema_update == averaged
    quantized, indices, _ = module(x)
    rows = normalize(state, x.unflatten(1, (N, D)).movedim(2, -1))  # [2, N, 5, 7, D]
    want = torch.stack(
        [torch.cdist(rows[:, n].flatten(0, 2), codes).argmin(-1) for n, codes in enumerate(state["embedding"])]
    )
    assert torch.equal(indices, want.view(N, 2, 5, 7).movedim(0, -1))
    codes = torch.stack([state["embedding"][n][indices[..., n]] for n in range(N)], 1)
    assert torch.equal(quantized, codes.movedim(-1, 2).flatten(1, 2))
    if averaged:
        kept = module._codebook
        assert torch.equal(kept.cluster_size, state["ema_count"]) and torch.equal(kept.embed_avg, state["ema_weight"])
        assert module._codebook.decay == 0.999


def test_what_is_refused() -> None:
    state = bottleneck()
    for change, message in (
        ({"adapt_bias.weight": torch.zeros(D, 256)}, "a bottleneck that is not conditioned on a speaker or scribe"),
        ({"projection.bias": None}, " has no projection.bias (there is "),
        (
            {"embedding.weight": torch.zeros(K, D + 1)},
            "projection.weight must be [5, any] of floating point, got [4, 6]",
        ),
        ({"batch_norm.batch_norm.running_var": None}, " has no batch_norm.batch_norm.running_var (there is "),
    ):
        changed = {name: value for name, value in (state | change).items() if value is not None}
        with pytest.raises(ArgumentError, match=re.escape(message)):
            load_codebooks(changed, kind="distsup")
