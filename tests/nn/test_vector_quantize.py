"""``VectorQuantize``: what a step computes, and what padding, layouts and dtypes may not change."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from fastseq import functional
from tests.nn.quantizers import HEADS, LEARNED, OPTIONS, SEPARATE, B, D, T, make, state
from tests.tolerance import GRADIENTS, assert_same_bits, assert_within_budget


def plain_step(x: Tensor, upstream: Tensor, embed: Tensor, average: Tensor, size: Tensor) -> tuple[Tensor, ...]:
    """One step of the VQ-VAE with moving averages, in plain torch: van den Oord et al. 2017, appendix A.1."""
    index = torch.cdist(x.detach(), embed).argmin(-1)
    loss = F.mse_loss(x, embed[index])
    (dx,) = torch.autograd.grad((x * upstream).sum() + loss, x)
    chosen = F.one_hot(index, len(embed)).to(x.dtype)
    size = 0.8 * size + 0.2 * chosen.sum(0)
    average = 0.8 * average + 0.2 * chosen.T @ x.detach()
    smoothed = (size + 1e-5) / (size.sum() + len(embed) * 1e-5) * size.sum()
    return loss, dx, size, average, average / smoothed[:, None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_step_of_moving_averages(dtype: torch.dtype, device: str) -> None:
    vq = make(rotation_trick=False).to(device, dtype)
    x = torch.randn(40, D, dtype=dtype, device=device).requires_grad_()
    upstream = torch.randn_like(x).detach()
    book = vq._codebook
    given = [x, upstream, *(b[0].clone() for b in (book.embed, book.embed_avg, book.cluster_size))]
    quantized, _, loss = vq(x[None])
    (dx,) = torch.autograd.grad((quantized[0] * upstream).sum() + loss, x)
    got = (loss, dx, book.cluster_size[0], book.embed_avg[0], book.embed[0])
    assert_within_budget("loss dx cluster_size embed_avg embed", got, plain_step, given, GRADIENTS)


@pytest.mark.parametrize("weight", [1.0, 0.25])
def test_a_step_of_a_learned_codebook(weight: float) -> None:
    def plain(x: Tensor, upstream: Tensor, embed: Tensor) -> tuple[Tensor, ...]:
        index = torch.cdist(x.detach(), embed.detach()).argmin(-1)
        loss = weight * F.mse_loss(x, embed[index])
        return loss, *torch.autograd.grad((x * upstream).sum() + loss, (x, embed))

    vq = make(rotation_trick=False, commitment_weight=weight, **LEARNED)
    x, upstream = torch.randn(40, D).requires_grad_(), torch.randn(40, D)
    quantized, _, loss = vq(x[None])
    dx, dembed = torch.autograd.grad((quantized[0] * upstream).sum() + loss, (x, vq._codebook.embed))
    given = (x, upstream, vq.codebook.detach().requires_grad_())
    assert_within_budget("loss dx dembed", (loss, dx, dembed[0]), plain, given, GRADIENTS)


@pytest.mark.parametrize("options", [{}, {"rotation_trick": False}, {"use_cosine_sim": True}, SEPARATE, LEARNED])
@pytest.mark.parametrize("training", [True, False])
def test_the_output_is_the_code_itself(options: dict[str, Any], training: bool) -> None:
    vq = make(**{**options, **({"dim": 8} if "heads" in options else {})}).train(training)
    codes = vq.codebook.detach().clone()
    x = torch.randn(B, T, D, requires_grad=True)
    quantized, index, _ = vq(x)
    rows = F.normalize(x, dim=-1, eps=1e-6) if vq.use_cosine_sim else x
    if vq.heads > 1:
        rows = rows.unflatten(-1, (2, 4)).movedim(2, 0)
        found = functional.vq_nearest(rows, codes).index.movedim(0, -1)
        want = torch.cat([codes[h][index[..., h]] for h in range(2)], dim=-1)
    else:
        found = functional.vq_nearest(rows, codes, metric="dot" if vq.use_cosine_sim else "l2").index
        want = codes[index]
    assert_same_bits("quantized index", [quantized, index], [want, found])


class Watch(TorchDispatchMode):
    """Names of our operators that run, of those that a GPU would be waited for, and the sizes of all results."""

    WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "equal", "index", "index_put_")

    def __init__(self) -> None:
        super().__init__()
        self.ours: list[str] = []
        self.waits: list[str] = []
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.__name__.split(".")[0]
        if func.namespace == "fastseq":
            self.ours.append(name)
        if name in self.WAITS:
            self.waits.append(name)
        for value in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(value, Tensor):
                self.largest = max(self.largest, value.numel())
        return out


@pytest.mark.parametrize("options", [{}, {"use_cosine_sim": True}, {"threshold_ema_dead_code": 2}, HEADS, LEARNED])
def test_one_lookup_gives_everything(options: dict[str, Any]) -> None:
    N, codes = 200, 300
    vq = make(codebook_size=codes, **options)
    x = torch.randn(1, N, D, requires_grad=True)
    with Watch() as watch:
        quantized, _, loss = vq(x)
        (quantized.sum() + loss).backward()
    assert watch.ours == ["vq_quantize", "vq_backward"]
    assert watch.largest <= (N + codes) * D  # rows by codes would be N * codes


@pytest.mark.parametrize("name", [name for name in OPTIONS if name != "k-means"])
@pytest.mark.parametrize("training", [True, False])
def test_nothing_waits_for_the_device(name: str, training: bool) -> None:
    vq = make(**OPTIONS[name]).train(training)
    x, mask = torch.randn(B, T, D, requires_grad=True), torch.rand(B, T) > 0.3
    with Watch() as watch:
        quantized, _, loss = vq(x, mask=mask)
        if training:
            (quantized.sum() + loss).backward()
    assert watch.waits == []
    with Watch() as watch:
        x.sum().item()
        x[mask]
    assert watch.waits == ["_local_scalar_dense", "index"]


def test_vectors_that_are_not_finite() -> None:
    for value in (torch.nan, torch.inf):
        vq = make(threshold_ema_dead_code=1, decay=0.1)
        codes = vq.codebook.clone()
        x = torch.randn(B, 40, D)
        x[1, 2, 3] = value
        quantized, index, loss = vq(x)
        assert index[1, 2] == 0 and not loss.isfinite()
        assert_same_bits("quantized", quantized[1, 2], codes[0])
        assert not vq.codebook[0].isfinite().all()
        for _ in range(4):
            _, index, loss = vq(torch.randn(B, 40, D))
            assert loss.isfinite()  # a code that is not finite is never taken
        assert vq.codebook.isfinite().all()  # since it was replaced


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("training", [True, False])
def test_padding_changes_nothing(name: str, training: bool) -> None:
    mask = torch.arange(T) < torch.tensor([T, 4, 0])[:, None]
    x = torch.randn(B, T, D)
    results = []
    for filler in (0.0, torch.nan):
        vq = make(**OPTIONS[name]).train(training)
        given = torch.where(mask[..., None], x, filler).requires_grad_()
        torch.manual_seed(1)
        quantized, index, loss = vq(given, mask=mask)
        grads: tuple[Tensor | None, ...] = ()
        if training:
            torch.manual_seed(2)
            total = (quantized * torch.randn(quantized.shape)).sum() + loss
            leaves = [given, *vq.parameters()]
            grads = torch.autograd.grad(total, leaves, allow_unused=True)
        assert not (quantized * ~mask[..., None]).any() and (index[~mask] == -1).all()
        results.append([quantized, index, loss, *(g for g in grads if g is not None), *state(vq)])
    names = [f"{name} {n}" for n in range(len(results[0]))]
    assert_same_bits(names, *results)
    assert all(r.isfinite().all() for r in results[0])


@pytest.mark.parametrize("name", [n for n in OPTIONS if n not in ("sampled", "directional", "k-means")])
def test_padding_is_as_if_it_were_not_there(name: str) -> None:
    x = torch.randn(B, 7, D)
    longer = torch.cat([x, torch.randn(B, T - 7, D)], dim=1)

    def step(x: Tensor, lens: Tensor | None = None) -> tuple[Tensor, ...]:
        vq = make(**OPTIONS[name]).to(x.dtype)
        quantized, _, loss = vq(x.requires_grad_(), lens=lens)
        (dx,) = torch.autograd.grad(quantized.square().sum() + loss, x)
        return loss, quantized[:, :7], dx[:, :7], vq._codebook.cluster_size, vq._codebook.embed_avg

    got = step(longer, torch.full((B,), 7))
    assert_within_budget("loss quantized dx cluster_size embed_avg", got, step, (x,), GRADIENTS)


def test_padding_keeps_the_input_where_asked() -> None:
    vq = make(return_zeros_for_masked_padding=False)
    x, lens = torch.randn(B, T, D), torch.tensor([T, 4, 0])
    padding = torch.arange(T) >= lens[:, None]
    quantized, index, _ = vq(x, lens=lens)
    assert_same_bits("padding", quantized[padding], x[padding])
    assert (index[padding] == -1).all() and (index[~padding] >= 0).all()
    first = make(channel_last=False, return_zeros_for_masked_padding=False)
    moved = first(x.mT, lens=lens)[0].mT
    assert_same_bits("moved", moved, quantized)


@pytest.mark.parametrize("name", OPTIONS)
def test_nothing_but_padding(name: str) -> None:
    vq = make(**OPTIONS[name])
    codes = vq.codebook.detach().clone()
    x = torch.randn(B, T, D, requires_grad=True)
    quantized, index, loss = vq(x, mask=torch.zeros(B, T, dtype=torch.bool))
    (quantized.sum() + loss).backward()
    assert not quantized.any() and (index == -1).all() and loss.isfinite()
    if "orthogonal" not in name:
        assert loss == 0
    assert x.grad is not None and not x.grad.any() and all(v.isfinite().all() for v in state(vq))
    assert ((vq.codebook - codes).abs() <= 1e-4 * codes.abs()).all()  # the smoothing of counts, eps = 1e-5, moves them


@pytest.mark.parametrize("options", [{}, HEADS, SEPARATE, {"threshold_ema_dead_code": 2}, {"use_cosine_sim": True}])
@pytest.mark.parametrize("training", [True, False])
def test_no_vectors(options: dict[str, Any], training: bool) -> None:
    vq = make(**options).train(training)
    for sizes in ((0, T, D), (B, 0, D), (0, D)):
        quantized, index, loss = vq(torch.randn(sizes))
        assert quantized.shape == sizes and index.shape[: len(sizes) - 1] == sizes[:-1] and loss == 0
    assert all(v.isfinite().all() for v in state(vq))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("training", [True, False])
def test_other_dtypes(dtype: torch.dtype, training: bool) -> None:
    vq, wide = make().train(training), make().train(training)
    x = torch.randn(B, T, D).to(dtype)
    quantized, index, loss = vq(x.requires_grad_())
    want = wide(x.detach().float().requires_grad_())
    assert quantized.dtype == dtype and loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_same_bits("quantized index", [quantized.double(), index], [want[0].to(dtype).double(), want[1]])


@pytest.mark.parametrize(
    "options", [{}, {"codebook_dim": 5}, {"codebook_diversity_loss_weight": 1.0}, {"affine_param": True}]
)
def test_autocast_leaves_the_lookup_in_float32(options: dict[str, Any]) -> None:
    vq = make(**options)
    codes = vq.codebook.clone()
    x = torch.randn(B, T, D, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        quantized, _, loss = vq(x)
    assert quantized.dtype == x.dtype and loss.dtype == torch.float32
    (quantized.sum() + loss).backward()
    assert x.grad is not None and x.grad.isfinite().all()
    if not options:
        assert (quantized[..., None, :] == codes).all(-1).any(-1).all()  # not rounded to bfloat16


LAYOUTS: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "sequence": ({}, (B, T, D)),
    "vectors": ({}, (B, D)),
    "channels first": ({"channel_last": False}, (B, D, T)),
    "image": ({"accept_image_fmap": True}, (B, D, 3, 5)),
    "volume": ({"accept_3d_fmap": True}, (B, D, 2, 3, 5)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("heads", [{}, {"codebook_dim": 5}, HEADS, SEPARATE, {**SEPARATE, "codebook_dim": 3}])
def test_indices_decode_to_the_output(layout: str, heads: dict[str, Any]) -> None:
    options, sizes = LAYOUTS[layout]
    vq = make(**options, **heads).eval()
    x = torch.randn(sizes)
    quantized, index, loss = vq(x)
    assert quantized.shape == sizes and loss == 0
    assert index.shape == (B, *(n for n in sizes[1:] if n != D), *([2] if vq.heads > 1 else []))
    assert_within_budget("decoded", vq.get_output_from_indices(index), lambda q: q, (quantized,))
    channels = vq.get_codes_from_indices(index).shape[1 if vq._layout.channel_first else -1]
    assert channels == vq.codebook_dim * vq.heads
    none = vq.get_codes_from_indices(torch.full_like(index, -1))
    assert not none.any()


def test_topk_is_sorted_and_decodes() -> None:
    for options, sizes in LAYOUTS.values():
        vq = make(**options).eval()
        x = torch.randn(sizes)
        quantized, index, loss = vq(x, topk=3)
        best, first, _ = vq(x)
        assert index.shape == loss.shape == (*first.shape, 3)
        assert_same_bits("index", index[..., 0], first)
        assert_same_bits("code", quantized[..., 0] if vq._layout.channel_first else quantized[..., 0, :], best)
        assert_same_bits("decoded", vq.get_codes_from_indices(index), quantized)
        assert (loss.diff(dim=-1) >= 0).all()


def test_terms_of_the_loss() -> None:
    weights = {"commitment_weight": 0.3, "orthogonal_reg_weight": 0.7, "codebook_diversity_loss_weight": 0.11}
    vq = make(**weights)
    _, _, loss, terms = vq(torch.randn(B, T, D), return_loss_breakdown=True)
    assert all(term != 0 for term in terms[:3]) and terms.inplace_optimize == 0
    total = [w * t for w, t in zip(weights.values(), (terms[0], terms[2], terms[1]), strict=True)]
    assert_within_budget("loss", loss, lambda *t: sum(t), total)


def test_the_loss_can_always_be_differentiated() -> None:
    for options in ({}, {"commitment_weight": 0.0}, LEARNED):
        make(**options)(torch.randn(B, T, D))[2].backward()
    with torch.no_grad():
        assert not make()(torch.randn(B, T, D))[2].requires_grad


def test_backward_after_the_next_step() -> None:
    for options in (
        {},
        LEARNED,
        *(OPTIONS[n] for n in ("orthogonal", "cross-entropy", "diversity", "affine", "dead codes")),
    ):
        vq, alone = make(**options), make(**options)
        x, y = torch.randn(2, B, T, D)
        grads = []
        for module, again in ((vq, True), (alone, False)):
            given = x.clone().requires_grad_()
            torch.manual_seed(1)
            quantized, _, loss = module(given)
            if again:
                module(y)
            (quantized.sum() + loss).backward()
            grads.append(given.grad)
        assert_same_bits("dx", *([g] for g in grads))
