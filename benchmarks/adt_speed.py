"""How long ADT's search for perturbations takes: against that of adversarial training, and by its parts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import harness
from benchmarks.adt_tasks import cnn
from benchmarks.harness import quantile, ratio
from fastseq.functional import adt_ascend, adt_sample
from fastseq.recipes import ADT
from fastseq.recipes.threat import cross_entropy, input_gradient, quiet

B, T, C, H, K, STEPS, SAMPLES, EPS = 64, 64, 128, 256, 10, 7, 5, 0.1


class LastStep(nn.Module):
    """A classifier of an LSTM's last state."""

    def __init__(self, lstm: nn.Module) -> None:
        super().__init__()
        self.lstm, self.head = lstm, nn.Linear(H, K)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])


def torch_pgd(model: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    """Seven steps as they are written with torch; the gradient of the input only."""
    model.eval()
    adversarial = x + EPS * (2 * torch.rand_like(x) - 1)
    for _ in range(STEPS):
        adversarial.requires_grad_(True)
        g = torch.autograd.grad(F.cross_entropy(model(adversarial), labels), adversarial)[0]
        adversarial = (adversarial.detach() + EPS / 4 * g.sign()).clamp(x - EPS, x + EPS)
    return adversarial


def pointwise(x: Tensor) -> Callable[[], Any]:
    """All of a step but the model: noise, samples, closed forms and the step itself."""
    state = (x, torch.zeros_like(x), torch.zeros_like(x), torch.tensor([1]), torch.tensor(EPS))
    g, weight = torch.randn(SAMPLES, *x.shape), torch.tensor(1e-6)

    def step() -> None:
        adt_sample(*state, samples=SAMPLES)
        adt_ascend(g, *state, weight, 0.3)

    return step


def model_part(model: nn.Module, x: Tensor, labels: Tensor, together: int) -> Callable[[], Any]:
    """The input gradients of a step's samples, so many at a time."""
    many = x.repeat(together, *(1,) * (x.dim() - 1)), labels.repeat(together)

    def step() -> None:
        with quiet(model):
            for _ in range(0, SAMPLES, together):
                input_gradient(model, *many, (), cross_entropy)

    return step


def rows(threads: int) -> list[dict[str, Any]]:
    import fastseq.nn

    shared = harness.provenance(threads, [])
    torch.manual_seed(0)
    x, labels = torch.randn(B, T, C), torch.randint(K, (B,))
    stock = LastStep(nn.LSTM(C, H, batch_first=True))
    ours = LastStep(fastseq.nn.LSTM(C, H, batch_first=True))
    ours.load_state_dict(stock.state_dict())
    pixels, digits, small = torch.rand(B, 1, 28, 28), torch.randint(K, (B,)), cnn()
    adt = ADT(ours, EPS, steps=STEPS, samples=SAMPLES)
    cases = {
        f"ADT exp, {STEPS} steps of {SAMPLES} samples, against {STEPS} steps of PGD on torch.nn.LSTM": (
            lambda: adt.perturb(x, labels),
            lambda: torch_pgd(stock, x, labels),
        ),
        f"pointwise part of a step against the LSTM's ({B} x {T} x {C}, H = {H})": (
            pointwise(x),
            model_part(ours, x, labels, 1),
        ),
        f"pointwise part of a step against a small CNN's ({B} x 28 x 28)": (
            pointwise(pixels),
            model_part(small, pixels, digits, SAMPLES),
        ),
    }
    found = []
    for case, (mine, theirs) in cases.items():
        with harness.threads(threads):
            samples = harness.interleave({"ours": mine, "theirs": theirs}, rounds=11)
        both = {"ms": "ours", "theirs_ms": "theirs"}
        times = {key: round(1e3 * quantile(samples[name], 0.5), 3) for key, name in both.items()}
        pair = [round(v, 4) for v in ratio(samples["ours"], samples["theirs"])]
        found.append({"kind": "speed", "case": case, "threads": threads, **times, "ratio": pair, **shared})
    return found
