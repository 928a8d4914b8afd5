"""Re-initialization: its schedules against tables worked out by hand, its state, and the recipe it belongs to."""

from __future__ import annotations

import copy
import io
import logging
import pickle
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastseq._check import ArgumentError
from fastseq.nn.codebook_optim import codebook_parameter_groups
from fastseq.nn.reinit import AfterWarmup, Reinit, Spaced, attach, next_epoch
from fastseq.nn.usage import CodebookUsage
from fastseq.nn.vector_quantize import VectorQuantize
from tests.tolerance import assert_same_bits

K, D, N = 4, 2, 10


class Book(nn.Module):
    """A codebook that remembers when it was made anew, and from what."""

    def __init__(self, groups: int = 1, codes: int = K) -> None:
        super().__init__()
        self.embed = nn.Parameter(torch.zeros(groups, codes, D))
        self.counts: Tensor | None = None
        self.times = 0

    def set_codes(self, means: Tensor, counts: Tensor | None = None) -> None:
        assert means.shape == self.embed.shape and counts is not None and counts.shape == means.shape[:2]
        self.embed.data, self.counts = means, counts
        self.times += 1


def train(reinit: Reinit, epochs: int, steps: int) -> tuple[list[tuple[int, int]], list[bool], list[set[int]]]:
    """(epoch, iteration) of each re-initialization, ``quantizes`` by epoch, and the epochs each was made from."""
    book, when, quantized, sources = Book(), [], [], []
    iteration = 0
    for epoch in range(1, epochs + 1):
        for _ in range(steps):
            iteration += 1
            before = book.times
            quantizes = reinit.step(torch.full((1, N, D), float(epoch)), None, book)
            if book.times > before:
                when.append((epoch, iteration))
                sources.append(set(book.embed.flatten().tolist()))
        quantized.append(quantizes)
        reinit.next_epoch()
    return when, quantized, sources


@pytest.mark.parametrize(
    ("schedule", "epochs", "steps", "want"),
    [
        # the first step of epoch 3 and of every later one; the first after max_epoch is the last
        (AfterWarmup(3, 5), 9, 3, [(3, 7), (4, 10), (5, 13), (6, 16)]),
        (AfterWarmup(2), 5, 2, [(2, 3), (3, 5), (4, 7), (5, 9)]),
        (AfterWarmup(1, 1), 4, 2, [(2, 3)]),  # no warm-up: there are no rows at the first step
        # 1 (without rows), then int(1.5 i + 1) after each
        (Spaced(expansion=1.5), 1, 45, [(1, 2), (1, 4), (1, 7), (1, 11), (1, 17), (1, 26), (1, 40)]),
        (Spaced(every_iterations=5), 2, 9, [(1, 5), (2, 10), (2, 15)]),
        (Spaced(every_iterations=5, max_iteration=9), 1, 30, [(1, 5), (1, 10)]),
        (Spaced(every_epochs=2), 7, 3, [(2, 4), (4, 10), (6, 16)]),
        (Spaced(every_epochs=2, max_epoch=3), 9, 3, [(2, 4), (4, 10)]),
        # as shipped: both. Epoch 1 asks for epoch 2 and iteration 2; 2 at 4 for 3 and 7; 3 at 7 for 4 and 11, ...
        (Spaced(every_epochs=1, expansion=1.5), 9, 3, [(2, 4), (3, 7), (4, 11), (6, 17), (9, 26)]),
    ],
    ids=str,
)
def test_schedule(schedule: AfterWarmup | Spaced, epochs: int, steps: int, want: list[tuple[int, int]]) -> None:
    reinit = Reinit(schedule, reservoir_size=200)
    assert reinit.quantizes == (not isinstance(schedule, AfterWarmup) or schedule.from_epoch == 1)
    when, quantized, _ = train(reinit, epochs, steps)
    assert when == want
    first = schedule.from_epoch if isinstance(schedule, AfterWarmup) else 1
    assert quantized == [epoch >= first for epoch in range(1, epochs + 1)]
    ended = isinstance(schedule, (AfterWarmup, Spaced)) and (
        schedule.max_epoch or getattr(schedule, "max_iteration", 0)
    )
    assert reinit.reservoir is not None and reinit.reservoir.dropped == (not reinit.active) == bool(ended)


def test_each_is_made_from_the_epoch_before() -> None:
    """Emptied at each new epoch of the warm-up, and after each re-initialization."""
    _, _, sources = train(Reinit(AfterWarmup(3, 4), reservoir_size=200), 7, 3)
    assert sources == [{2.0}, {3.0}, {4.0}]


def test_too_few_rows_are_kept_for_the_next_time(caplog: pytest.LogCaptureFixture) -> None:
    reinit, book = Reinit(AfterWarmup(2), reservoir_size=50), Book(codes=15)
    with caplog.at_level(logging.WARNING, logger="fastseq"):
        for _ in range(3):
            reinit.step(torch.randn(1, N, D), None, book)
            reinit.next_epoch()
    assert caplog.messages == ["Reinit: skipped in epoch 2: 10 rows for 15 codes"]
    assert book.times == 1 and reinit.epoch == 4


def test_counts_are_those_of_one_step() -> None:
    """Shared out as the sample's rows are; a code without rows counts as one, so that no average divides by zero."""
    reinit, book = Reinit(Spaced(every_iterations=2), reservoir_size=100), Book()
    rows = torch.tensor([0.0, 0.0, 0.0, 0.0, 0.0, 5.0, 5.0, 5.0, 9.0, 9.0])[None, :, None].expand(1, N, D)
    mask = torch.arange(N)[None] < 6
    reinit.step(rows, None, book)
    reinit.step(rows, mask, book)
    assert book.counts is not None and book.times == 1  # three different rows, so one of four codes is empty
    share = {5: 5 / 11, 3: 3 / 11, 2: 2 / 11, 1: 1 / 11}
    assert sorted(book.counts[0].tolist()) == pytest.approx(sorted(6 * s for s in share.values()))


def test_groups_masks_and_rows_that_are_not_finite() -> None:
    reinit, book = Reinit(Spaced(every_iterations=2), reservoir_size=30), Book(groups=2)
    x = torch.stack([torch.randn(20, D), 100 + torch.randn(20, D)])
    x[:, ::5] = torch.nan
    mask = torch.ones(2, 20, dtype=torch.bool)
    mask[:, 1] = False
    x[:, 1] = 1e6
    for _ in range(2):
        reinit.step(x, mask, book)
    assert book.embed[0].abs().max() < 10 and (book.embed[1] - 100).abs().max() < 10


@pytest.mark.parametrize(("metric", "of_book"), [("cosine", "l2"), (None, "dot"), (None, "cosine")])
def test_metric(metric: str | None, of_book: str) -> None:
    reinit, book = Reinit(Spaced(every_iterations=2), reservoir_size=30, metric=metric), Book()
    book.metric = of_book
    for _ in range(2):
        reinit.step(torch.randn(1, 20, D), None, book)
    assert (book.embed.norm(dim=-1) - 1).abs().max() < 4 * torch.finfo(torch.float32).eps


def quantizer(schedule: AfterWarmup | Spaced, **options: Any) -> VectorQuantize:
    return VectorQuantize(3, 8, reinit=Reinit(schedule, reservoir_size=64), batch_norm="codes", **options)


@pytest.mark.parametrize("schedule", [AfterWarmup(3, 4), Spaced(expansion=1.5), Spaced(1, 4, None, 2)], ids=str)
@pytest.mark.parametrize("learnable", [False, True])
def test_training_goes_on_from_a_checkpoint(schedule: AfterWarmup | Spaced, learnable: bool) -> None:
    """Bit for bit, whatever the step of the checkpoint."""
    options = {"learnable_codebook": learnable, "ema_update": not learnable}
    data = torch.randn(18, 2, 12, 3)

    def run(stop: int | None) -> Tensor:
        torch.manual_seed(0)
        layer = quantizer(schedule, **options)
        for t, x in enumerate(data):
            if t == stop:
                file = io.BytesIO()
                torch.save(layer.state_dict(), file)
                file.seek(0)
                layer = quantizer(schedule, **options)
                layer.load_state_dict(torch.load(file, weights_only=True))
            torch.manual_seed(t)
            layer(x)
            if t % 3 == 2:
                next_epoch(layer)
        return layer.codebook.detach()

    want = run(None)
    assert not torch.equal(want, quantizer(schedule).codebook)
    for stop in range(1, 18, 2):
        assert_same_bits("codes", run(stop), want)


@pytest.mark.parametrize("learnable", [False, True])
def test_layer(learnable: bool) -> None:
    """The warm-up passes vectors through, without loss or learning; then the codes are means of the sample."""
    layer = quantizer(AfterWarmup(2), learnable_codebook=learnable, ema_update=not learnable)
    start = layer.codebook.detach().clone()
    x = (5 + torch.randn(4, 16, 3)).requires_grad_()
    quantized, indices, loss = layer(x)
    assert_same_bits("codes", layer.codebook, start)
    assert not indices.any() and loss.item() == 0 and quantized.requires_grad
    assert torch.unique(quantized.detach().flatten(0, 1), dim=0).shape[0] == 64
    next_epoch(layer)
    with torch.no_grad():
        quantized, indices, loss = layer(x)
    assert loss.item() > 0 and len(indices.unique()) == 8
    assert torch.unique(quantized.flatten(0, 1), dim=0).shape[0] == 8
    assert not torch.equal(layer.codebook, start)


def test_the_warm_up_holds_in_evaluation() -> None:
    layer = quantizer(AfterWarmup(2)).eval()
    x = torch.randn(2, 5, 3)
    for _ in range(2):
        quantized, indices, loss = layer(x)
        assert_same_bits("rows", quantized, layer.batch_norm(x))
        assert not indices.any() and loss.item() == 0
    assert layer.reinit.iteration == 0
    next_epoch(layer)
    assert_same_bits("codes", layer(x)[0], layer.get_codes_from_indices(layer(x)[1]))


def test_a_compiled_layer_goes_the_same_way() -> None:
    """``step`` stays outside of the graph."""

    def run(compiled: bool) -> Tensor:
        torch.manual_seed(0)
        layer = quantizer(AfterWarmup(2, 3))
        call = torch.compile(layer, backend="eager") if compiled else layer
        for t in range(8):
            torch.manual_seed(t)
            call(torch.randn(2, 12, 3))
            if t % 2:
                next_epoch(layer)
        return layer.codebook

    assert_same_bits("codes", run(True), run(False))


def test_adam_forgets_the_codes() -> None:
    layer = quantizer(Spaced(every_iterations=3, max_iteration=4), learnable_codebook=True, ema_update=False)
    optimizer = torch.optim.Adam(codebook_parameter_groups(layer, 1e-3))
    attach(layer, optimizer)
    steps = []
    for _ in range(8):
        optimizer.zero_grad()
        layer(torch.randn(2, 32, 3))[2].backward()
        optimizer.step()
        steps.append(int(optimizer.state[layer._codebook.embed]["step"]))
    assert steps == [1, 2, 1, 2, 3, 1, 2, 3]
    assert optimizer.state[layer.batch_norm.weight]["step"] == 8


def test_the_optimizer_is_held_weakly_and_not_saved() -> None:
    layer = quantizer(Spaced(every_iterations=2), learnable_codebook=True, ema_update=False)
    optimizer = torch.optim.Adam(layer.parameters())
    attach(layer, optimizer)
    layer(torch.randn(2, 32, 3))
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert other.reinit._optimizer is None
        other(torch.randn(2, 32, 3))  # the codebook of the copy is another one, and its own
        assert other.reinit.iteration == 2 and layer.reinit.iteration == 1
        assert not torch.equal(other.codebook, layer.codebook)
    del optimizer
    layer(torch.randn(2, 32, 3))
    assert layer.reinit._optimizer() is None and len(layer.codebook.detach().unique(dim=0)) == 8


def test_copy_and_repr() -> None:
    reinit = Reinit(Spaced(every_epochs=2), reservoir_size=9, iterations=3, metric="cosine").build(1, 8, D)
    train(reinit, 3, 1)
    other = reinit.copy()
    assert other.reservoir is None and (other.epoch, other.iteration) == (1, 0)
    assert (other.schedule, other.reservoir_size, other.iterations, other.metric) == (reinit.schedule, 9, 3, "cosine")
    assert "Spaced(every_epochs=2" in repr(reinit) and "epoch=4, iteration=3" in repr(reinit)


def test_next_epoch_reaches_every_layer() -> None:
    model = nn.Sequential(quantizer(AfterWarmup(2)), nn.ModuleList([quantizer(AfterWarmup(3))]))
    next_epoch(model)
    assert [m.epoch for m in model.modules() if isinstance(m, Reinit)] == [2, 2]


def drift(robust: bool, learnable: bool, seed: int) -> tuple[float, float]:
    """Usage and relative error in the last of 6 epochs, on clusters whose scale grows 19-fold."""
    torch.manual_seed(seed)
    codes, dim, steps = 64, 8, 25
    centres = torch.randn(codes, dim)
    options: dict[str, Any] = {"decay": 0.99, "learnable_codebook": learnable, "ema_update": not learnable}
    if robust:
        options.update(batch_norm="codes", reinit=Reinit(AfterWarmup(2, 4), reservoir_size=2048))
    layer = VectorQuantize(dim, codes, **options)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    if learnable:
        groups = codebook_parameter_groups(layer, 1e-3, multiplier=10.0 if robust else 1.0)
        optimizer = torch.optim.Adam(groups)
        attach(layer, optimizer)
    for epoch in range(6):
        usage, errors = CodebookUsage(), []
        for t in range(epoch * steps, (epoch + 1) * steps):
            x = centres[torch.randint(codes, (1, 256))] + 0.05 * torch.randn(1, 256, dim) + 1.0
            x = 0.3 * 1.02**t * x
            target = layer.batch_norm(x) if robust else x
            quantized, indices, loss = layer(x)
            optimizer.zero_grad()
            if learnable and loss.requires_grad:
                loss.backward()
            optimizer.step()
            usage.update(indices, codes)
            errors.append(((quantized - target).square().mean() / target.var()).item())
        next_epoch(layer)
    return usage.compute().usage.item(), sum(errors) / len(errors)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("learnable", [False, True])
def test_the_recipe_does_not_collapse_where_plain_quantization_does(seed: int, learnable: bool) -> None:
    plain, robust = drift(False, learnable, seed), drift(True, learnable, seed)
    assert plain[0] < 0.65 and robust[0] > 0.95
    assert robust[1] < 0.1 * plain[1]


BOOK = Book()
X = torch.zeros(1, N, D)


def second_layer() -> None:
    reinit = Reinit(Spaced(every_iterations=2), reservoir_size=9)
    reinit.step(X, None, Book())  # whose codebook is gone: another one may follow
    reinit.step(X, None, BOOK)
    reinit.step(X, None, Book())


def one_reinit_for_two_layers() -> None:
    reinit = Reinit(AfterWarmup(), reservoir_size=64)
    VectorQuantize(3, 8, reinit=reinit)
    VectorQuantize(3, 8, reinit=reinit)


ERRORS: dict[str, tuple[Callable[[], Any], str]] = {
    "from_epoch": (lambda: AfterWarmup(0), "AfterWarmup: from_epoch must be an integer >= 1, got 0"),
    "from_epoch None": (lambda: AfterWarmup(None), "AfterWarmup: from_epoch must be an integer >= 1, got None"),
    "max_epoch": (lambda: AfterWarmup(3, 0), "AfterWarmup: max_epoch must be an integer >= 1, got 0"),
    "every_epochs": (lambda: Spaced(1.5), "Spaced: every_epochs must be an integer >= 1, got 1.5"),
    "every_iterations": (lambda: Spaced(1, 0), "Spaced: every_iterations must be an integer >= 1, got 0"),
    "max_iteration": (lambda: Spaced(1, max_iteration=True), "max_iteration must be an integer >= 1, got True"),
    "expansion": (lambda: Spaced(expansion=0.5), "Spaced: expansion must be >= 1, got 0.5"),
    "expansion nan": (lambda: Spaced(expansion=float("nan")), "expansion must be a finite number > 0, got nan"),
    "both": (
        lambda: Spaced(every_iterations=2, expansion=1.5),
        "Spaced: expansion must be None beside every_iterations, got 1.5",
    ),
    "neither": (lambda: Spaced(), "every_epochs must be given where every_iterations and expansion are not, got None"),
    "reservoir_size": (
        lambda: Reinit(AfterWarmup(), reservoir_size=0),
        "Reinit: reservoir_size must be an integer >= 1, got 0",
    ),
    "iterations": (lambda: Reinit(AfterWarmup(), iterations=-1), "Reinit: iterations must be an integer >= 0, got -1"),
    "metric": (lambda: Reinit(AfterWarmup(), metric="dot"), "Reinit: metric must be one of 'l2', 'cosine', got 'dot'"),
    "more codes than rows": (
        lambda: Reinit(AfterWarmup(), reservoir_size=3).build(1, 4, 2),
        "Reinit: reservoir_size must be at least the number of codes K = 4, got 3",
    ),
    "at the first step": (
        lambda: Reinit(AfterWarmup(), reservoir_size=3).step(X, None, BOOK),
        "Reinit: reservoir_size must be at least the number of codes K = 4, got 3",
    ),
    "built twice": (
        lambda: Reinit(AfterWarmup()).build(1, 4, 2).build(1, 4, 2),
        "Reinit: reinit must be one of its own for each layer (Reinit.copy makes them), got one that has a layer",
    ),
    "in a layer": (
        lambda: VectorQuantize(3, 65, reinit=Reinit(AfterWarmup(), reservoir_size=64)),
        "Reinit: reservoir_size must be at least the number of codes K = 65, got 64",
    ),
    "in two layers": (one_reinit_for_two_layers, "Reinit: reinit must be one of its own for each layer"),
    "two layers": (second_layer, "Reinit: reinit must be one of its own for each layer"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_messages(name: str) -> None:
    call, words = ERRORS[name]
    with pytest.raises(ArgumentError, match=re.escape(words)):
        call()


def test_other_errors() -> None:
    with pytest.raises(TypeError, match="Reinit: schedule must be AfterWarmup or Spaced, got int"):
        Reinit(3)  # type: ignore[arg-type]
    reinit = Reinit(AfterWarmup(), reservoir_size=9).build(1, 4, 2)
    state = reinit.state_dict()
    with pytest.raises(RuntimeError, match=re.escape("Reinit: progress must be [6], got [5]")):
        reinit.load_state_dict({**state, "progress": torch.zeros(5)})
    del state["progress"]
    with pytest.raises(RuntimeError, match=re.escape('Missing key(s) in state_dict: "progress"')):
        reinit.load_state_dict(state)
