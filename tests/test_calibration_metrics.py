"""The metrics of fastseq.calibration inside torchmetrics."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassCalibrationError

from fastseq import functional
from fastseq.calibration import (
    Disagreement,
    EnsembleAccuracy,
    EnsembleBrier,
    EnsembleECE,
    EnsembleNLL,
    reliability_diagram,
)
from tests.tolerance import assert_same_bits, assert_within_budget

B, M, K = 300, 3, 5
ALL = (EnsembleNLL, EnsembleBrier, EnsembleAccuracy, Disagreement, EnsembleECE)


def data(members: int = M) -> tuple[Tensor, Tensor]:
    logits = 2 * torch.randn(B, members, K)
    return logits, torch.where(torch.rand(B) < 0.5, logits.mean(1).argmax(-1), torch.randint(0, K, (B,)))


def figures(logits: Tensor, labels: Tensor) -> list[Tensor]:
    """By the words of each definition; without ECE."""
    probability = logits.softmax(-1).mean(1)
    one_hot = torch.nn.functional.one_hot(labels, K)
    members = logits.argmax(-1)
    pairs = [(members[:, i] != members[:, j]).double().mean() for i in range(M) for j in range(i)]
    return [
        -probability.gather(1, labels[:, None]).log().mean(),
        (probability - one_hot).square().sum(1).mean(),
        (probability.argmax(1) == labels).to(logits.dtype).mean(),
        torch.stack(pairs).mean().to(logits.dtype),
    ]


@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric")  # after a reset there is nothing to tell
@pytest.mark.parametrize("metric", ALL)
def test_batches_resets_and_copies(metric: type[Metric]) -> None:
    logits, labels = data()
    whole, parts = metric(), metric()
    assert isinstance(whole, Metric)
    whole.update(logits, labels)
    for part in torch.arange(B).tensor_split(4):
        parts.update(logits[part], labels[part])
    assert_within_budget("figure", parts.compute(), lambda v: v, [whole.compute()])
    assert_same_bits(
        "copy pickle",
        [copy.deepcopy(parts).compute(), pickle.loads(pickle.dumps(parts)).compute()],
        [parts.compute()] * 2,
    )
    parts.reset()
    assert parts.compute().isnan()
    parts.update(logits, labels)
    assert_same_bits("again", parts.compute(), whole.compute())
    assert_same_bits("forward", metric()(logits, labels), whole.compute())
    alone = metric(ignore_index=0)
    alone.update(logits, labels)
    kept = metric()
    kept.update(logits[labels != 0], labels[labels != 0])
    assert_same_bits("ignored", alone.compute(), kept.compute())


def test_figures() -> None:
    logits, labels = (v[:40] for v in data())
    got = []
    for metric in ALL[:4]:
        found = metric()
        found.update(logits.double(), labels)
        got.append(found.compute())
    assert_within_budget("nll brier accuracy disagreement", got, lambda v: figures(v, labels), [logits.double()])


@pytest.mark.parametrize("members", [1, M])
@pytest.mark.parametrize("bins", [15, 10, 7])
def test_ece_is_that_of_torchmetrics(bins: int, members: int) -> None:
    """Which rounds its edges to float32 and counts these to the bin below: none of the confidences lies there."""
    logits, labels = data(members)
    probability = logits.softmax(-1).mean(1)
    place = probability.max(1).values.double() * bins
    clear = (place - place.round()).abs() > 1e-4
    theirs = MulticlassCalibrationError(K, n_bins=bins)
    theirs.update(probability[clear].double(), labels[clear])
    ours = EnsembleECE(bins=bins)
    ours.update(logits[clear] if members > 1 else logits[clear].squeeze(1), labels[clear])
    assert_within_budget("ece", ours.compute().float(), lambda v: v, [theirs.compute().float()], 8)
    accuracy = EnsembleAccuracy()
    accuracy.update(logits, labels)
    micro = MulticlassAccuracy(K, average="micro")
    micro.update(probability, labels)
    assert_within_budget("accuracy", accuracy.compute().float(), lambda v: v, [micro.compute()])


def test_a_collection_updates_once() -> None:
    logits, labels = data()
    collection = MetricCollection([metric() for metric in ALL])
    collection.update(logits[:100], labels[:100])
    assert len(collection.compute_groups) == 1  # they hold the same sums
    collection.update(logits[100:], labels[100:])
    found = collection.compute()
    stats = functional.ensemble_stats(logits, labels)
    want = [stats.mean_nll, stats.mean_brier, stats.accuracy, stats.mean_disagreement, stats.ece]
    assert_within_budget("n b a d e", [found[m.__name__] for m in ALL], lambda *v: v, want)
    assert len(reliability_diagram(collection["EnsembleECE"]).axes) == 2


def test_sums_over_ranks() -> None:
    logits, labels = data()
    ranks = [EnsembleECE(), EnsembleECE()]
    for rank, metric in enumerate(ranks):
        metric.update(logits[rank::2], labels[rank::2])
    assert all(reduction is ranks[0]._reductions["totals"] for reduction in ranks[0]._reductions.values())

    def gather(value: Tensor, group: object = None) -> list[Tensor]:
        return [
            getattr(rank, name)
            for rank in ranks
            for name in ("totals", "histogram")
            if getattr(rank, name).shape == value.shape
        ]

    synced = EnsembleECE(dist_sync_fn=gather, distributed_available_fn=lambda: True)
    synced.update(logits[0::2], labels[0::2])
    whole = EnsembleECE()
    whole.update(logits, labels)
    assert_within_budget("ece", synced.compute(), lambda v: v, [whole.compute()])


def test_errors() -> None:
    with pytest.raises(ValueError, match="EnsembleECE: bins must be an integer in 1..4096, got 0"):
        EnsembleECE(bins=0)
    with pytest.raises(ValueError, match=r"ensemble_stats: labels must be \[B\] = \[4\], got \[3\]"):
        EnsembleNLL().update(torch.zeros(4, 3), torch.zeros(3, dtype=torch.int64))
