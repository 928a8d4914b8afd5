"""The plan of a row of batch sizes: its table and its curves are those of LEGW."""

from __future__ import annotations

import math
import re

import pytest
import torch

from fastseq.recipes import LEGW, plan


@pytest.fixture(autouse=True)
def _extra():
    for module in ("matplotlib", "rich"):
        pytest.importorskip(module, reason="the demo extra is not installed")


def drawn(**options):
    arguments = {"lr": 0.5, "base_batch": 10, "batches": (10, 40, 640), "base_warmup_epochs": 0.125}
    return plan(**arguments | {"examples": 1920, "epochs": 12} | options)


def table(capsys, monkeypatch, **options):
    monkeypatch.setenv("COLUMNS", "120")
    drawn(**options)
    out = capsys.readouterr().out
    return [line.split() for line in out.splitlines() if re.match(r"\s*\d", line)], out


def test_the_table(capsys, monkeypatch):
    rows, out = table(capsys, monkeypatch)
    assert rows == [
        ["10", "1", "0.5", "0.125", "24", "192", "2,304"],
        ["40", "4", "1", "0.5", "24", "48", "576"],
        ["640", "64", "4", "8", "24", "3", "36"],
    ]
    assert "*" not in out
    rows, out = table(capsys, monkeypatch, epochs=8, batches=[640])
    assert rows == [["640", "64", "4", "8", "*", "24", "3", "24"]]
    assert "* the warm-up does not end before the training" in out


def test_a_last_batch_that_is_not_full(capsys, monkeypatch):
    assert table(capsys, monkeypatch, examples=100, batches=[40])[0][0][-2:] == ["3", "36"]
    assert table(capsys, monkeypatch, examples=100, batches=[40], drop_last=True)[0][0][-2:] == ["2", "24"]


@pytest.mark.parametrize("decay", ["constant", "exponential", "polynomial", "multistep"])
def test_the_curves_are_the_rates_of_the_scheduler(decay):
    options = {"decay": decay, "gamma": 0.5, "milestones": (6, 9)}
    figure = drawn(**options)
    by_epoch, by_step = figure.axes
    assert [text.get_text() for text in by_epoch.get_legend().get_texts()] == ["10", "40", "640"]
    for batch, steps, line, other in zip((10, 40, 640), (192, 48, 3), by_epoch.lines, by_step.lines, strict=True):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.5)
        scheduler = LEGW(optimizer, 10, batch, 0.125, steps, 12, **options)
        rates = []
        for _ in range(12 * steps):
            rates += scheduler.get_last_lr()
            optimizer.step()
            scheduler.step()
        at = [int(step) - 1 for step in other.get_xdata()]
        assert {0, 23, min(24, len(rates) - 1), len(rates) - 1} <= set(at)
        assert list(other.get_ydata()) == list(line.get_ydata()) == pytest.approx([rates[step] for step in at])
        assert list(line.get_xdata()) == pytest.approx([step / steps for step in at])
        assert max(rates) == pytest.approx(0.5 * math.sqrt(batch / 10))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": 0}, "plan: lr must be a finite number > 0, got 0"),
        ({"examples": 1.5}, "plan: examples must be an integer >= 1, got 1.5"),
        ({"batches": []}, "plan: batches must be one or more sizes, got none"),
        ({"batches": [8, 0]}, "plan: batches must be an integer >= 1, got 0"),
        (
            {"batches": [4096], "drop_last": True},
            "plan: batches must be at most the examples, 1920, with drop_last",
        ),
        ({"decay": "cosine"}, "LEGW: decay must be one of"),
    ],
)
def test_what_is_refused(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        drawn(**options)
