"""fastseq.calibration: the temperature, the diagram, and what is missing without optional packages."""

from __future__ import annotations

import copy
import logging
import math
import subprocess
import sys

import pytest
import torch
from matplotlib.figure import Figure
from torch import Tensor

from fastseq import functional
from fastseq.calibration import Temperature, fit_temperature, reliability_diagram
from tests.tolerance import assert_within_budget

B, M, K = 400, 3, 5


def data(T: float = 2.5, members: int = M) -> tuple[Tensor, Tensor]:
    """Logits [B, M, K] that are right at temperature T, and labels drawn so."""
    logits = 2 * torch.randn(B, members, K, dtype=torch.float64)
    labels = logits.softmax(-1).mean(1).multinomial(1).squeeze(1)
    return T * logits, labels


def nll(logits: Tensor, labels: Tensor, T: float) -> float:
    mean = (logits / T).softmax(-1).mean(1) if logits.dim() == 3 else (logits / T).softmax(-1)
    return float(-mean.gather(1, labels[:, None]).log().mean())


@pytest.mark.parametrize("members", [1, M, None])
@pytest.mark.parametrize("T", [0.05, 0.4, 1.0, 2.5, 30.0])
def test_the_likelihood_is_greatest_at_the_temperature(T: float, members: int | None) -> None:
    logits, labels = data(T, members or 1)
    logits = logits.squeeze(1) if members is None else logits
    found = fit_temperature(logits, labels)
    best = nll(logits, labels, found)
    for factor in (0.5, 0.9, 0.999, 1.001, 1.1, 2.0):
        assert best < nll(logits, labels, found * factor)
    assert T / 1.5 < found < T * 1.5  # of 400 rows


def test_members_share_one_temperature_before_the_mean() -> None:
    """It is not that of the mean logits, nor of the members alone."""
    logits, labels = data()
    found = fit_temperature(logits, labels)
    assert found != fit_temperature(logits.mean(1), labels)
    assert found != fit_temperature(logits.flatten(0, 1), labels.repeat_interleave(M))
    for same in (fit_temperature(logits.float(), labels), fit_temperature(logits[:, [2, 0, 1]], labels.int())):
        assert_within_budget("T", torch.tensor(same), lambda v: v, [torch.tensor(found)])


def test_the_first_of_two_minima_is_not_taken_for_the_least() -> None:
    """Of a mean of members the likelihood can have several maxima."""
    sure = torch.tensor([[[40.0, 0.0], [-1.0, 0.0]]]).repeat(60, 1, 1)
    other = torch.tensor([[[-40.0, 0.0], [1.0, 0.0]]]).repeat(40, 1, 1)
    logits, labels = torch.cat([sure, other]), torch.zeros(100, dtype=torch.int64)
    found = fit_temperature(logits, labels)
    trials = [0.02, 0.1, 0.5, 1.0, 3.0, 10.0, 30.0, 90.0]
    assert nll(logits.double(), labels, found) <= min(nll(logits.double(), labels, T) for T in trials)


def test_ignored_labels_and_gradients() -> None:
    logits, labels = data()
    want = fit_temperature(logits[100:], labels[100:])
    assert (
        fit_temperature(logits.requires_grad_(), torch.cat([labels[:100].new_full((100,), -100), labels[100:]])) == want
    )
    assert fit_temperature(logits, labels.clamp_min(1), ignore_index=0) > 0


def test_a_likelihood_that_no_temperature_changes_leaves_the_logits(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "fastseq"):
        assert fit_temperature(torch.zeros(4, 2), torch.tensor([0, 1, 1, 0])) == 1.0
    assert not caplog.records


@pytest.mark.parametrize("M", [1, 3])
def test_perfect_predictions_have_smoothed_targets(M: int, caplog: pytest.LogCaptureFixture) -> None:
    """Where all is right the best probability of a label is its smoothed target."""
    labels = torch.arange(B) % K
    logits = torch.nn.functional.one_hot(labels, K).float()[:, None].expand(B, M, K)
    with caplog.at_level(logging.WARNING, "fastseq"):
        found = fit_temperature(logits, labels)
    target = 1 - (1 - 1 / K) / (B + 1)
    assert found == pytest.approx(1 / math.log(target * (K - 1) / (1 - target)), rel=1e-6)
    [record] = caplog.records
    assert record.message == f"fit_temperature: likelihood grows as T falls; targets smoothed by 1 / (N + 1), N = {B}"


def test_what_asks_for_more_than_the_range_reaches_its_end(caplog: pytest.LogCaptureFixture) -> None:
    labels = torch.arange(B) % K
    logits = torch.nn.functional.one_hot(labels, K).float()
    with caplog.at_level(logging.WARNING, "fastseq"):
        assert fit_temperature(logits, (labels + 1) % K) == 100.0
        assert fit_temperature(1e-4 * logits, labels) == 0.01
    said = [r.message for r in caplog.records]
    assert said[0] == "fit_temperature: likelihood grows beyond T = 100, the end of the range"
    assert said[2] == "fit_temperature: likelihood grows beyond T = 0.01, the end of the range"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_module(dtype: torch.dtype) -> None:
    logits, labels = data()
    module = Temperature().fit(logits, labels)
    assert_within_budget("T", module.temperature, lambda v: v, [torch.tensor(fit_temperature(logits, labels))])
    out = module(logits.to(dtype))
    assert out.dtype == dtype and torch.equal(out, logits.to(dtype) / module.temperature)
    other = Temperature(3.0)
    other.load_state_dict(module.state_dict())
    assert torch.equal(other(logits), module(logits)) and torch.equal(copy.deepcopy(module)(logits), module(logits))
    assert not list(module.parameters()) and repr(Temperature(2.5)) == "Temperature(2.5)"
    before = functional.ensemble_stats(logits, labels)
    after = functional.ensemble_stats(module(logits), labels)
    assert after.mean_nll < before.mean_nll and after.ece < before.ece


LABELS = torch.zeros(4, dtype=torch.int64)


@pytest.mark.parametrize(
    ("logits", "labels", "message"),
    [
        (
            torch.zeros(4),
            LABELS,
            r"logits must be floating point, \[B, K\] or \[B, M, K\], not empty, got torch.float32 \[4\]",
        ),
        (torch.zeros(0, 3), LABELS[:0], r"logits must be floating point, .*, got torch.float32 \[0, 3\]"),
        (torch.zeros(4, 3).int(), LABELS, r"logits must be floating point, .*, got torch.int32 \[4, 3\]"),
        (torch.zeros(4, 3), LABELS[1:], r"labels must be \[B\] = \[4\], got \[3\]"),
        (torch.zeros(4, 3), LABELS.float(), "labels must be integers, got torch.float32"),
        (torch.zeros(4, 3), LABELS - 100, "labels must be some that are not ignored, got 4 times -100"),
        (torch.zeros(4, 3), LABELS + 3, r"labels must be in 0..K-1 = 0..2, got 3..3"),
        (torch.zeros(4, 3), LABELS - 1, r"labels must be in 0..K-1 = 0..2, got -1..-1"),
        (torch.full((4, 3), torch.nan), LABELS, "logits must be finite, got others"),
    ],
)
def test_errors(logits: Tensor, labels: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=f"fit_temperature: {message}"):
        fit_temperature(logits, labels)


@pytest.mark.parametrize("temperature", [0, -1.0, float("inf"), "hot"])
def test_errors_of_the_module(temperature: float) -> None:
    with pytest.raises(ValueError, match="Temperature: temperature must be a finite number > 0"):
        Temperature(temperature)


def test_diagram() -> None:
    logits, labels = data()
    stats = functional.ensemble_stats(logits, labels, bins=10)
    figure = reliability_diagram(stats, title="held out")
    assert isinstance(figure, Figure)
    above, below = figure.axes
    assert above.get_title() == "held out" and len(above.patches) == len(below.patches) == 10
    rows, _, right = stats.histogram
    accuracy = torch.where(rows > 0, right / rows.clamp_min(1), 0)
    assert [bar.get_height() for bar in above.patches] == accuracy.tolist()
    assert [bar.get_height() for bar in below.patches] == (rows / rows.sum()).tolist()
    assert above.get_legend().get_title().get_text() == f"ECE {stats.ece:.4f}"
    assert len(reliability_diagram(stats.histogram).axes[0].patches) == 10
    assert reliability_diagram(torch.zeros(3, 4)).axes[0].get_legend().get_title().get_text() == "ECE 0.0000"


@pytest.mark.parametrize(("stats", "got"), [(torch.zeros(2, 5), r"\[2, 5\]"), (0.5, "float")])
def test_errors_of_the_diagram(stats: object, got: str) -> None:
    message = rf"reliability_diagram: stats must be EnsembleStats, a metric or a histogram \[3, bins\], got {got}"
    with pytest.raises(ValueError, match=message):
        reliability_diagram(stats)


def test_without_optional_packages() -> None:
    """In a process of its own, where neither can be imported."""
    script = """
import sys
sys.modules["torchmetrics"] = sys.modules["matplotlib"] = sys.modules["matplotlib.figure"] = None
import torch
import fastseq
from fastseq import calibration
from fastseq.calibration import Temperature
Temperature(2.0)(torch.zeros(2, 3))
for call in (lambda: calibration.EnsembleNLL, lambda: calibration.reliability_diagram(torch.zeros(3, 4))):
    try:
        call()
    except ImportError as error:
        print(error)
try:
    from fastseq.calibration import Disagreement
except ImportError as error:
    print(error)
try:
    calibration.nothing
except AttributeError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    needs = "the metrics of fastseq.calibration need torchmetrics: pip install torchmetrics"
    assert done.stdout.splitlines() == [
        needs,
        "reliability_diagram needs matplotlib: pip install matplotlib",
        needs,
        "module 'fastseq.calibration' has no attribute 'nothing'",
    ]
