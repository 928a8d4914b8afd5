"""What attacks and ADT share: losses of rows, and how far numbers may move."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from fastseq.recipes.threat import Threat, cross_entropy, margin
from tests.recipes.adt_models import MASK
from tests.tolerance import assert_within_budget


def test_rows_of_losses():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 4, 5, generator=generator)
    labels = torch.randint(4, (3, 5), generator=generator)
    labels[0, 2:], labels[1] = -100, -100
    rows = torch.stack([F.cross_entropy(logits[n : n + 1], labels[n : n + 1]) for n in range(3)])
    rows[1] = 0  # no position
    assert_within_budget("mean", cross_entropy(logits, labels), lambda v: v, (rows,))
    shifted = logits[:, :, 0]
    right = labels[:, 3].clamp_min(0)
    got = margin(shifted, right)
    wrong = [max(float(v) for k, v in enumerate(row) if k != right[n]) for n, row in enumerate(shifted)]
    assert got.tolist() == pytest.approx([w - float(shifted[n, right[n]]) for n, w in enumerate(wrong)])


def test_spread_of_a_batch():
    x = torch.randn(4, 5, 3)
    radius = Threat(0.5, normalise="batch").radius(x, MASK[:4])
    for c in range(3):
        assert radius[0, 0, c].item() == pytest.approx(0.5 * x[..., c][MASK[:4]].std(unbiased=False).item(), rel=1e-5)
    assert bool((radius[~MASK[:4]] == 0).all())
    pixels = torch.rand(2, 3, 4, 5)
    got = Threat(0.5, normalise="batch").radius(pixels, None)
    assert got[1, 2, 3, 4].item() == pytest.approx(0.5 * pixels[:, 2].std(unbiased=False).item(), rel=1e-5)
