"""A sharded codebook on one process (several: ``test_distributed_vq.py``), and its messages."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fastseq import functional
from fastseq._check import ArgumentError
from fastseq.nn import sharded_codebook as module
from fastseq.nn.sharded_codebook import ShardedCodebook
from fastseq.nn.vector_quantize import VectorQuantize
from tests.nn import two_ranks
from tests.tolerance import assert_same_bits, assert_within_budget


@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_alone_it_is_an_ordinary_codebook(metric: str) -> None:
    x, codes, counts = two_ranks.learn_inputs(metric)
    book = ShardedCodebook(5, 13, metric=metric)
    book.load_codes(codes, counts)
    found = book.eval()(x, x[..., 0] > 0)
    want = functional.vq_nearest(x, book.embed, metric=metric, mask=x[..., 0] > 0).index
    assert_same_bits("index", found.indices, want)
    assert found.quantized.shape == x.shape and found.commitment.shape == x.shape[:-1]
    book.train()
    for batch in x:
        book(batch)
    got = book.embed, book.cluster_size
    assert_within_budget("codes counts", got, lambda *a: two_ranks.learn_whole(*a, metric), [x, codes, counts])


def test_it_learns_as_the_layer_does() -> None:
    x, codes, _ = two_ranks.learn_inputs("l2")
    layer, book = VectorQuantize(5, 13, decay=0.8), ShardedCodebook(5, 13)
    layer.codebook = codes
    book.load_codes(codes)
    for batch in x:
        assert_same_bits("index", book(batch).indices, layer(batch[None])[1][0])
    assert_same_bits("codes", book.embed, layer.codebook)


def test_in_evaluation_nothing_is_learned() -> None:
    book = ShardedCodebook(5, 13).eval()
    before = {name: t.clone() for name, t in book.state_dict().items()}
    book(torch.randn(20, 5))
    assert_same_bits(list(before), list(book.state_dict().values()), list(before.values()))
    assert set(before) == {"embed", "embed_avg", "cluster_size", "part"} and not list(book.buffers())
    assert "codes 0..12 here" in repr(book)


def test_padding_is_not_learned_and_gives_nothing() -> None:
    x, mask = torch.randn(2, 10, 5), torch.arange(10) < torch.tensor([[4], [10]])
    first, second = (ShardedCodebook(5, 13) for _ in range(2))
    second.load_state_dict(first.state_dict())
    found = first(x.masked_fill(~mask[..., None], torch.nan), mask)
    assert not found.quantized[~mask].any() and (found.indices[~mask] == -1).all() and not found.commitment[~mask].any()
    second(x[mask])
    assert_same_bits("codes", first.embed, second.embed)


def test_half_precision_rows() -> None:
    book = ShardedCodebook(5, 13).eval()
    for dtype in (torch.bfloat16, torch.float16):
        x = torch.randn(8, 5).to(dtype)
        found = book(x)
        assert found.quantized.dtype == found.commitment.dtype == dtype
        assert_same_bits("index", found.indices, functional.vq_nearest(x, book.embed).index)


def test_the_order_of_scores_in_integers() -> None:
    scores = torch.tensor([-torch.inf, -3e38, -1.0, -1e-45, -0.0, 0.0, 1e-45, 1.0, 1.0000001, 3e38, torch.inf])
    ordered = module._ordered(scores)
    assert ordered[4] == ordered[5]
    rises = ordered.diff() > 0
    assert rises.tolist() == [i != 4 for i in range(10)]
    packed = (ordered << 32) | 0xFFFFFFFF
    assert (packed >> 32 == ordered).all() and (packed[-1] < torch.iinfo(torch.int64).max)


BOOK = ShardedCodebook(3, 4)
X = torch.zeros(2, 3)
ERRORS: dict[str, tuple[Callable[[], Any], str]] = {
    "dim": (lambda: ShardedCodebook(0, 4), "ShardedCodebook: dim must be an integer in 1..2**31, got 0"),
    "K": (lambda: ShardedCodebook(3, 2.0), "ShardedCodebook: codebook_size must be an integer in 1..2**31, got 2.0"),
    "metric": (lambda: ShardedCodebook(3, 4, metric="dot"), "metric must be one of 'l2', 'cosine', got 'dot'"),
    "decay": (lambda: ShardedCodebook(3, 4, decay=2), "ShardedCodebook: decay must be a number in [0, 1], got 2"),
    "eps": (lambda: ShardedCodebook(3, 4, eps=0), "ShardedCodebook: eps must be a finite number > 0, got 0"),
    "D": (lambda: BOOK(X[:, :2]), "ShardedCodebook: x must be [..., D = 3], got [2, 2]"),
    "dtype": (lambda: BOOK(X.double()), "ShardedCodebook: x must be float32, bfloat16 or float16, got torch.float64"),
    "device": (lambda: BOOK(X.to("meta")), "ShardedCodebook: x must be on cpu, got one on meta"),
    "mask": (lambda: BOOK(X, torch.ones(3).bool()), "ShardedCodebook: mask must be [x without D] = [2], got [3]"),
    "mask dtype": (lambda: BOOK(X, torch.ones(2)), "ShardedCodebook: mask must be torch.bool, got torch.float32"),
    "codes": (lambda: BOOK.load_codes(X), "load_codes: codes must be [K, D] = [4, 3], got [2, 3]"),
    "counts": (lambda: BOOK.load_codes(torch.zeros(4, 3), X[0]), "load_codes: counts must be [K] = [4], got [3]"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_messages(name: str) -> None:
    call, words = ERRORS[name]
    with pytest.raises(ArgumentError, match=re.escape(words)):
        call()


def test_a_state_that_does_not_fit() -> None:
    with pytest.raises(RuntimeError, match=re.escape("part (first code, end, K) must be [0, 4, 4], got [0, 5, 5]")):
        BOOK.load_state_dict(ShardedCodebook(3, 5).state_dict())
    with pytest.raises(RuntimeError, match=re.escape("ShardedCodebook: embed must be [4, 3], got [4, 2]")):
        BOOK.load_state_dict(ShardedCodebook(2, 4).state_dict())
