"""LEGW: its formula, its place among torch's schedulers, saving and going on, and what it refuses."""

from __future__ import annotations

import copy
import io
import math
import re

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import ConstantLR, LRScheduler, SequentialLR
from torch.testing._internal.distributed.fake_pg import FakeStore

from fastseq import _check
from fastseq.recipes import LEGW, Schedule
from tests.tolerance import assert_same_bits

N, BASE, EPOCHS = 1920, 10, 12  # examples, base batch, epochs: 192 steps an epoch at the base
BASE_WARMUP = 0.125
FACTORS = (1, 2, 4, 8, 16, 32, 64)


def sgd(*rates: float) -> torch.optim.SGD:
    groups = [{"params": [nn.Parameter(torch.ones(2))], "lr": lr} for lr in rates or (0.5,)]
    return torch.optim.SGD(groups, momentum=0.9)


def legw(optimizer: torch.optim.Optimizer, k: float = 4, **options) -> LEGW:
    arguments = {
        "base_batch": BASE,
        "batch": BASE * k,
        "base_warmup_epochs": BASE_WARMUP,
        "steps_per_epoch": round(N / (BASE * k)),
        "epochs": EPOCHS,
    }
    return LEGW(optimizer, **arguments | options)


def rates(scheduler: LRScheduler, steps: int) -> list[list[float]]:
    """Of the groups, for the next ``steps`` steps, as the optimizer is given them."""
    found = []
    for _ in range(steps):
        found.append([float(group["lr"]) for group in scheduler.optimizer.param_groups])
        scheduler.optimizer.step()
        scheduler.step()
    return found


# --- the formula


@pytest.mark.parametrize("k", FACTORS)
def test_every_batch_warms_up_in_the_same_number_of_steps_to_the_root_of_k(k):
    found = [rate for (rate,) in rates(legw(sgd(), k), N * EPOCHS // (BASE * k))]
    assert found[:24] == pytest.approx([0.5 * math.sqrt(k) * (t + 1) / 24 for t in range(24)], rel=1e-12)
    assert set(found[23:]) == {0.5 * math.sqrt(k)}


def test_the_published_rates_and_warm_ups():
    """Of ResNet-50 on ImageNet: 2**2 at batch 512, 10/2**6 epochs, to 2**5 at 32,768, 10 epochs."""
    for doublings in range(7):
        s = Schedule(512, 512 * 2**doublings, 10 / 64, 2**12 // 2**doublings, 90)
        assert 4 * s.scale == pytest.approx(2 ** (2 + doublings / 2))
        assert s.warmup_epochs == 10 / 2 ** (6 - doublings)
        assert s.warmup_steps == 640


def test_a_warm_up_that_ends_within_a_step():
    found = rates(legw(sgd(1.0), 1, base_warmup_epochs=2.5 / 192), 4)
    assert found == [[pytest.approx(1 / 2.5)], [pytest.approx(2 / 2.5)], [1.0], [1.0]]
    assert rates(legw(sgd(1.0), 1, base_warmup_epochs=0), 2) == [[1.0], [1.0]]


@pytest.mark.parametrize("start", [None, 0.0, 6.0])
@pytest.mark.parametrize("decay", ["polynomial", "exponential"])
def test_decays_count_from_the_end_of_the_warm_up_or_where_they_are_told(decay, start):
    k, per_epoch = 16, 12  # the warm-up is 2 epochs of 12 steps
    scheduler = legw(sgd(), k, decay=decay, decay_start=start, gamma=0.25, power=3.0)
    found = [rate for (rate,) in rates(scheduler, EPOCHS * per_epoch + 2)]
    begin = 2.0 if start is None else start
    for t in range(24, len(found)):
        past = max(0.0, t / per_epoch - begin)
        if decay == "polynomial":
            expected = max(0.0, 1 - past / (EPOCHS - begin)) ** 3
        else:
            expected = 0.25**past
        assert found[t] == pytest.approx(2.0 * expected, rel=1e-12, abs=1e-12), t
    assert found[23] == 2.0
    assert (found[24] < found[23]) == (start == 0.0)


def test_milestones_within_the_warm_up_count_when_it_ends():
    found = [r for (r,) in rates(legw(sgd(), 16, decay="multistep", milestones=(1, 5, 9), gamma=0.5), 140)]
    assert found[23:25] == [2.0, 1.0]
    assert [t for t in range(25, 140) if found[t] != found[t - 1]] == [5 * 12, 9 * 12]
    assert found[-1] == 0.25


def test_a_smaller_batch_goes_down_by_the_same_rule():
    scheduler = legw(sgd(), 0.25, steps_per_epoch=768)
    assert scheduler.schedule.warmup_steps == 24
    assert [r for (r,) in rates(scheduler, 30)][23:] == [0.25] * 7


def test_accumulation_and_processes_count_into_the_batch():
    scheduler = legw(sgd(), 2, accumulation=4, world_size=3, steps_per_epoch=8)
    assert (scheduler.schedule.batch, scheduler.schedule.k) == (240, 24)


def test_the_processes_of_torch_distributed_are_counted():
    distributed = torch.distributed
    distributed.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    try:
        assert legw(sgd(), 2).schedule.batch == 40
        assert legw(sgd(), 2, world_size=1).schedule.batch == 20
    finally:
        distributed.destroy_process_group()
    assert legw(sgd(), 2).schedule.batch == 20


# --- among torch's schedulers


def test_each_group_keeps_its_ratio():
    found = rates(legw(sgd(0.5, 0.125)), 30)
    assert all(a == 4 * b for a, b in found)


def test_rates_that_are_tensors_are_written_in_place():
    parameter = nn.Parameter(torch.ones(2))
    rate = torch.tensor(0.5)
    scheduler = legw(torch.optim.Adam([parameter], lr=rate, capturable=False, foreach=False))
    assert scheduler.optimizer.param_groups[0]["lr"] is rate
    for t in range(30):
        assert float(rate) == pytest.approx(min(1.0, (t + 1) / 24))
        scheduler.optimizer.step()
        scheduler.step()


def test_get_last_lr_and_the_order_of_the_calls():
    optimizer = sgd()
    scheduler = legw(optimizer)
    assert isinstance(scheduler, LRScheduler)
    assert scheduler.get_last_lr() == [optimizer.param_groups[0]["lr"]] == [pytest.approx(1 / 24)]
    with pytest.warns(UserWarning, match="before `optimizer.step"):
        scheduler.step()


@pytest.mark.parametrize("first", [True, False])
def test_in_a_sequence(first):
    def parts(optimizer):
        mine, other = legw(optimizer), ConstantLR(optimizer, factor=0.5, total_iters=100)
        return [mine, other] if first else [other, mine]

    optimizer = sgd()
    found = [r for (r,) in rates(SequentialLR(optimizer, parts(optimizer), milestones=[7]), 20)]
    ramp = [pytest.approx((t + 1) / 24) for t in range(20)]
    assert found == (ramp[:7] + [0.25] * 13 if first else [0.25] * 7 + ramp[:13])


# --- saving and going on


def trained(steps: list[int]) -> list[torch.Tensor]:
    """Weights and rates of a training that is saved and loaded anew after each of these numbers of steps."""
    torch.manual_seed(0)
    model, data = nn.Linear(3, 2), torch.randn(60, 8, 3, generator=torch.Generator().manual_seed(1))
    seen, saved, t = [], None, 0
    for count in steps:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        scheduler = legw(optimizer, decay="polynomial")
        if saved is not None:
            file = io.BytesIO(saved)
            states = torch.load(file, weights_only=True)
            optimizer.load_state_dict(states["optimizer"])
            scheduler.load_state_dict(states["scheduler"])
        for _ in range(count):
            seen.append(optimizer.param_groups[0]["lr"])
            optimizer.zero_grad()
            model(data[t]).square().mean().backward()
            optimizer.step()
            scheduler.step()
            t += 1
        file = io.BytesIO()
        torch.save({"optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}, file)
        saved = file.getvalue()
    return [model.weight, model.bias, torch.tensor(seen, dtype=torch.float64)]


def test_going_on_in_the_middle_of_the_warm_up_gives_equal_numbers():
    assert_same_bits("weight bias rates", trained([7, 5, 30]), trained([42]))


def test_a_state_of_other_arguments_is_refused():
    state = legw(sgd()).state_dict()
    before = copy.deepcopy(state)
    legw(sgd()).load_state_dict(state)
    assert state == before
    message = "LEGW.load_state_dict: steps_per_epoch must be 48 as in the saved state, got 24"
    with pytest.raises(ValueError, match=message):
        legw(sgd(), steps_per_epoch=24).load_state_dict(state)
    with pytest.raises(ValueError, match=r"LEGW.load_state_dict: milestones must be \(\) as in the saved state"):
        legw(sgd(), milestones=(2,)).load_state_dict(state)
    other = ConstantLR(sgd()).state_dict()
    with pytest.raises(ValueError, match=r"LEGW.load_state_dict: state_dict must be that of a LEGW, got one with .*"):
        legw(sgd()).load_state_dict(other)


def test_going_on_with_another_batch_at_the_same_epoch():
    optimizer = sgd()
    rates(legw(optimizer, 4), 12)  # a quarter of an epoch of 48 steps
    scheduler = legw(optimizer, 8, last_epoch=6 - 1)  # of 24
    assert [r for (r,) in rates(scheduler, 20)] == [
        pytest.approx(0.5 * math.sqrt(8) * min(1, (t + 1) / 24)) for t in range(6, 26)
    ]


# --- what is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"base_batch": 0}, "LEGW: base_batch must be a finite number > 0, got 0"),
        ({"batch": -8}, "LEGW: batch must be a finite number > 0, got -8"),
        ({"batch": "8"}, "LEGW: batch must be a finite number > 0, got '8'"),
        ({"base_warmup_epochs": -1}, "LEGW: base_warmup_epochs must be a finite number >= 0, got -1"),
        ({"base_warmup_epochs": math.inf}, "LEGW: base_warmup_epochs must be a finite number >= 0, got inf"),
        ({"steps_per_epoch": 0}, "LEGW: steps_per_epoch must be an integer >= 1, got 0"),
        ({"steps_per_epoch": 7.5}, "LEGW: steps_per_epoch must be an integer >= 1, got 7.5"),
        ({"epochs": 0}, "LEGW: epochs must be a finite number > 0, got 0"),
        ({"epochs": 0.5}, "the warm-up ends before the training: k * base_warmup_epochs < epochs = 0.5, got 4 * 0.125"),
        ({"decay": "cosine"}, "LEGW: decay must be one of 'constant', 'exponential', 'polynomial', 'multistep', got"),
        ({"gamma": 0}, "LEGW: gamma must be a finite number > 0, got 0"),
        ({"power": math.nan}, "LEGW: power must be a finite number > 0, got nan"),
        ({"decay": "multistep"}, "LEGW: milestones must be the epochs after which the rate falls, with decay='mult"),
        ({"milestones": (3, -1)}, "LEGW: milestones must be a finite number > 0, got -1"),
        ({"decay_start": -1}, "LEGW: decay_start must be a finite number >= 0, got -1"),
        ({"decay": "polynomial", "decay_start": 12}, "LEGW: decay_start must be < epochs = 12, got 12"),
        ({"accumulation": 0}, "LEGW: accumulation must be an integer >= 1, got 0"),
        ({"world_size": 1.5}, "LEGW: world_size must be an integer >= 1, got 1.5"),
    ],
)
def test_what_is_refused(options, message):
    with pytest.raises(_check.ArgumentError, match=re.escape(message)):
        legw(sgd(), **options)


def test_the_warm_up_must_end_before_the_training():
    assert legw(sgd(), 64).schedule.warmup_epochs == 8
    with pytest.raises(ValueError, match=r"base_warmup_epochs < epochs = 8, got 64 \* 0.125 = 8$"):
        legw(sgd(), 64, epochs=8)
    assert not Schedule(BASE, 64 * BASE, 0.125, 3, 8).complete
