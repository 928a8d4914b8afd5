"""Three answers from one network: how sure they are, and whether they differ where they should. scikit-learn's digits.

python examples/mimo_uncertainty.py [--quick]
"""

from __future__ import annotations

import argparse

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import fastseq

M = 3


class Reader(nn.Module):
    """Reads the rows of an image one after the other."""

    def __init__(self, H: int) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(8, H, batch_first=True), nn.Linear(H, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])


def train(model: fastseq.nn.MIMO, x: Tensor, labels: Tensor, steps: int) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=0.005)
    sampler = fastseq.nn.MIMOIndex(batch=32, M=M, R=4, rho=0.5)
    for _ in range(steps):
        rows = torch.randint(len(x), (32,))
        index = sampler.draw()  # which examples share a row
        loss = model.loss(model(x[rows], index), labels[rows], index)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="seconds instead of minutes")
    quick = parser.parse_args().quick
    torch.manual_seed(0)
    digits = load_digits()
    x, labels = torch.tensor(digits.images / 16, dtype=torch.float32), torch.tensor(digits.target)
    known = labels < 8  # eights and nines are never trained on
    train_x, train_labels = x[:1400][known[:1400]], labels[:1400][known[:1400]]

    model = fastseq.nn.MIMO(Reader(64), M=M)
    print(model.report)
    train(model, train_x, train_labels, 150 if quick else 2000)
    model.eval().fold()  # prediction at the price of one network
    with torch.no_grad():
        for name, which in (("digits as trained", known[1400:]), ("eights and nines", ~known[1400:])):
            stats = model.stats(model(x[1400:][which]), labels[1400:][which])
            sure, differ = stats.confidence.mean(), stats.disagreement.mean()
            print(f"{name}: accuracy {stats.accuracy:.3f}, sure {sure:.3f}, members differ {differ:.3f}")


if __name__ == "__main__":
    main()
