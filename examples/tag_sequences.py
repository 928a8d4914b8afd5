"""A tagger: which kind of token each character of source code belongs to. Data: Python's standard library.

python examples/tag_sequences.py [--quick]
"""

from __future__ import annotations

import argparse
import io
import json.decoder
import textwrap
import tokenize

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastseq

KINDS = ("other", "name", "number", "string", "comment", "operator")
KIND = {tokenize.NAME: 1, tokenize.NUMBER: 2, tokenize.STRING: 3, tokenize.COMMENT: 4, tokenize.OP: 5}
IGNORED = -100  # padding


def tagged(path: str) -> list[tuple[list[int], list[int]]]:
    """Of every line of a file: its characters, and the kind of each."""
    with open(path) as file:
        source = file.read()
    lines = source.splitlines()
    kinds = [[0] * len(line) for line in lines]
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        (first, begin), (last, end) = token.start, token.end
        for row in range(first, min(last, len(lines)) + 1):
            width = len(lines[row - 1])
            left, right = begin if row == first else 0, min(end, width) if row == last else width
            kinds[row - 1][left:right] = [KIND.get(token.type, 0)] * max(0, right - left)
    return [([min(ord(c), 127) for c in line], kind) for line, kind in zip(lines, kinds, strict=True) if line]


def batch(lines: list[tuple[list[int], list[int]]]) -> tuple[Tensor, Tensor, Tensor]:
    """Characters [T, B], kinds [T, B], lengths [B]."""
    x = nn.utils.rnn.pad_sequence([torch.tensor(line) for line, _ in lines])
    y = nn.utils.rnn.pad_sequence([torch.tensor(kind) for _, kind in lines], padding_value=IGNORED)
    return x, y, torch.tensor([len(line) for line, _ in lines])


class Tagger(nn.Module):
    def __init__(self, H: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(128, 32)
        self.lstm = fastseq.nn.LSTM(32, H, bidirectional=True)
        self.head = nn.Linear(2 * H, len(KINDS))

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        return self.head(self.lstm(self.embedding(x), lengths=lengths)[0])  # each row is read back from its own end


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="seconds instead of minutes")
    quick = parser.parse_args().quick
    torch.manual_seed(0)
    train, test = tagged(argparse.__file__) + tagged(textwrap.__file__), tagged(json.decoder.__file__)
    model = Tagger(32 if quick else 128)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(80 if quick else 1500):
        x, y, lengths = batch([train[n] for n in torch.randint(len(train), (32,))])
        loss = F.cross_entropy(model(x, lengths).flatten(0, 1), y.flatten(), ignore_index=IGNORED)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    x, y, lengths = batch(test)
    with torch.no_grad():
        found = model.eval()(x, lengths).argmax(-1)
    for n, kind in enumerate(KINDS):
        print(f"{kind:9} {(found[y == n] == n).float().mean():.3f} of {int((y == n).sum()):,} characters")
    print(f"all       {(found == y)[y != IGNORED].float().mean():.3f}, lines of a module that was not trained on")


if __name__ == "__main__":
    main()
