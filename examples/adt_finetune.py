"""A trained reader of digits, fine-tuned on distributions of perturbations so that it withstands attacks.

python examples/adt_finetune.py [--quick]
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

import fastseq
from fastseq.recipes import ADT, Threat, attacks

EPS = 0.15  # of pixels in 0..1


class Reader(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = fastseq.nn.LSTM(8, 64, batch_first=True), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])


def train(model: Reader, loss: Callable[[Tensor, Tensor], Tensor], x: Tensor, labels: Tensor, steps: int) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=0.005)
    for _ in range(steps):
        rows = torch.randint(len(x), (64,))
        optimizer.zero_grad()
        loss(x[rows], labels[rows]).backward()
        optimizer.step()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="seconds instead of minutes")
    quick = parser.parse_args().quick
    torch.manual_seed(0)
    digits = load_digits()
    x, labels = torch.tensor(digits.images / 16, dtype=torch.float32), torch.tensor(digits.target)

    model = Reader()
    train(model, lambda x, labels: F.cross_entropy(model(x), labels), x[:1400], labels[:1400], 200 if quick else 1000)
    tuned = copy.deepcopy(model)
    adt = ADT(tuned, eps=EPS, clamp=(0.0, 1.0), steps=3 if quick else 7, samples=2 if quick else 5)
    train(tuned, adt, x[:1400], labels[:1400], 60 if quick else 600)

    threat = Threat(EPS, clamp=(0.0, 1.0))
    test_x, test_labels = x[1400:], labels[1400:]
    for name, reader in (("trained", model.eval()), ("fine-tuned by ADT", tuned.eval())):
        hit = attacks.pgd(reader, test_x, test_labels, threat)
        withstood = attacks.withstood(reader, test_labels, [test_x, hit]).float().mean()
        natural = (reader(test_x).argmax(-1) == test_labels).float().mean()
        print(f"{name}: accuracy {natural:.3f}, under attack {withstood:.3f}")


if __name__ == "__main__":
    main()
