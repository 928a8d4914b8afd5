"""TAWT's weights: their formula, what is observed and what is not, small problems with a known answer, going on."""

from __future__ import annotations

import io
import re

import pytest
import torch
from torch import nn

import fastseq.nn
from fastseq import _check
from fastseq.recipes import TaskWeights, mirror_step, probe, sample_signals
from fastseq.recipes import tawt as module
from tests.tolerance import GRADIENTS, assert_same_bits, assert_within_budget

SHAPES = ((7, 5), (13,), (), (1, 3, 2))
N = 4  # tasks; the target is 1


def drawn(dtype=torch.float64, seed=0):
    random = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=random, dtype=torch.float64).to(dtype) for shape in SHAPES]


def flat(gradients):
    return torch.cat([torch.as_tensor(g).reshape(-1) for g in gradients])


def observed(weights, *seeds, dtype=torch.float64):
    """Gradients of the target and then of every source, for each of the seeds; what was given."""
    found = [[drawn(dtype, seed + 10 * t) for t in range(weights.n_tasks)] for seed in seeds]
    for of_tasks in found:
        for t in (weights.target, *(t for t in range(weights.n_tasks) if t != weights.target)):
            weights.observe(t, gradients=of_tasks[t])
    return found


# --- the formula


def definition(start, intervals, eta, c, signal):
    """Weights after updates, each from gradients [observations][tasks], in the words of the paper."""
    w = start / start.sum()
    for interval in intervals:
        s = torch.zeros_like(w)
        for of_tasks in interval:
            target = flat(of_tasks[1])
            for t, gradients in enumerate(of_tasks):
                norm = flat(gradients).norm() if signal == "cosine" else target.norm()
                s[t] = s[t] + flat(gradients) @ target / (target.norm() * norm) / len(interval)
        g = -c * (s if signal != "none" else torch.eye(len(w)).to(w)[1])
        w = w * (-eta * g).exp() / (w * (-eta * g).exp()).sum()
    return w


@pytest.mark.parametrize("signal", ["cosine", "dot", "none"])
def test_the_update_is_that_of_the_paper(signal):
    start = torch.tensor([1.0, 2.0, 0.5, 3.0], dtype=torch.float64)
    weights = TaskWeights(N, 1, start, eta=0.7, c=3.0, signal=signal)
    intervals = []
    for k in range(3):
        intervals.append(observed(weights, *range(100 * k, 100 * k + k + 1)))
        weights.update()
    inputs = start, intervals, 0.7, 3.0, signal
    assert_within_budget("weights", weights.weights, definition, inputs, GRADIENTS)
    assert weights.updates == 3


def test_the_schedule_alone():
    """The target's weight is e^k w / (e^k w + 1 - w), and sources stay in proportion."""
    weights = TaskWeights(3, 2, (1, 3, 4), signal="none")
    for _ in range(3):
        assert weights.update().tolist() == [0, 0, 1]

    def closed(w):
        last = w[2] * (3 * torch.ones_like(w[2])).exp()
        return torch.cat([w[:2], last[None]]) / (last + 1 - w[2])

    assert_within_budget("weights", weights.weights, closed, [torch.tensor([0.125, 0.375, 0.5]).double()])


def test_scales_of_equal_weights_leave_losses_alone():
    assert [TaskWeights(4, 0).scale(t) for t in range(4)] == [1, 1, 1, 1]
    assert [TaskWeights(5, 2, "sources").scale(t) for t in range(5)] == [1, 1, 0, 1, 1]
    assert TaskWeights(2, 0, torch.tensor([3, 1])).scale(0) == 1.5


def test_weights_stay_on_the_simplex_whatever_comes():
    weights = TaskWeights(N, 1, eta=1e4, c=10)
    for k in range(40):
        observed(weights, k)
        weights.update()
        assert weights.weights.isfinite().all() and (weights.weights >= 0).all()
        assert_within_budget("sum", weights.weights.sum(), lambda w: (w / w.sum()).sum(), [weights.weights])
    assert weights.weights[1] == 1
    assert mirror_step(torch.tensor([0.0, 1.0]), torch.tensor([9e9, 0.0]), 1.0).tolist() == [0, 1]


def test_a_weight_of_zero_stays_zero_and_needs_no_gradient():
    weights = TaskWeights(3, 2, "sources")
    for k in range(3):
        weights.observe(2, gradients=drawn(seed=k))
        weights.observe(0, gradients=drawn(seed=k))
        weights.observe(1, gradients=drawn(seed=k + 50))
        assert weights.update()[2] == 0
    assert weights.weights[2] == 0 and weights.weights[0] > 0.5


# --- what is observed


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_streamed_statistics_are_those_of_flat_gradients(dtype):
    left, right = drawn(dtype, 1), drawn(dtype, 2)
    left[0], right[0] = left[0].T.contiguous().T, right[0].T
    right[0] = right[0].T
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    found = [module.dot(left, right), module.square(left)]

    def plain(left, right):
        return flat(left) @ flat(right), flat(left) @ flat(left)

    inputs = [[g.to(wide) for g in of_one] for of_one in (left, right)]
    assert_within_budget("dot square", [f.to(wide) for f in found], plain, inputs)
    assert all(f.dtype == torch.float64 for f in found)


def test_gradients_that_are_missing_are_zeros():
    some, other = drawn(seed=1), drawn(seed=2)
    zeros = [*some[:1], torch.zeros_like(some[1]), *some[2:]]
    assert_same_bits("dot", module.dot([some[0], None, *some[2:]], other), module.dot(zeros, other))
    assert module.dot([None], [some[0]]) == 0


def test_what_the_parameters_hold_is_observed():
    layer = nn.Linear(3, 2)
    layer.bias.requires_grad_(False)
    weights = [TaskWeights(2, 0) for _ in range(3)]
    for t in range(2):
        layer.weight.grad = torch.randn(2, 3)
        weights[0].observe(t, layer)
        weights[1].observe(t, iter([layer.weight]))
        weights[2].observe(t, gradients=[layer.weight.grad])
    first, *rest = [w.update() for w in weights]
    for other in rest:
        assert_same_bits("signals", other, first)


def test_the_target_is_copied_and_sources_are_not_held():
    weights, mine = TaskWeights(2, 0), torch.ones(3)
    weights.observe(0, gradients=[mine])
    mine.neg_()
    weights.observe(1, gradients=[torch.ones(3)])
    assert weights.update()[1] > 0.9


def test_what_comes_before_the_target_and_what_is_not_finite_is_left_out():
    one, other = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    weights = TaskWeights(2, 0)
    weights.observe(1, gradients=[other])
    for target, source in ((one, one), (one, other * torch.nan), (one * torch.inf, other)):
        weights.observe(0, gradients=[target])
        weights.observe(1, gradients=[source])
    assert weights.update().tolist() == [1, 1]


def test_a_gradient_of_zeros_is_orthogonal():
    weights = TaskWeights(2, 0)
    weights.observe(0, gradients=[torch.ones(2)])
    weights.observe(1, gradients=[torch.zeros(2)])
    assert weights.update().tolist() == [1, 0]


def test_dot_undoes_the_scales_of_the_losses():
    """Gradients of training are those of scaled losses; of a pass of its own they are not."""
    phi, far = nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64)), torch.tensor([0.5, 4.0]).double()
    init = (0.1, 0.7, 0.2)
    losses = [lambda: phi.square().sum(), lambda: (phi * far).sum(), lambda: (phi - far).square().sum() / 2]
    found = []
    for scaled in (True, False):
        weights = TaskWeights(3, 0, init, signal="dot")
        for t, loss in enumerate(losses):
            if scaled:
                phi.grad = None
                (weights.scale(t) * loss()).backward()
                weights.observe(t, [phi])
            else:
                weights.observe(t, gradients=torch.autograd.grad(loss(), [phi]))
        found.append(weights.update())

    def plain(phi, far):
        target = 2 * phi
        return torch.stack([target @ target, far @ target, (phi - far) @ target]) / (target @ target)

    for signals in found:
        assert_within_budget("signals", signals, plain, [phi.detach(), far])


# --- passes of its own


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = fastseq.nn.LSTM(3, 4, batch_first=True)
        self.norm, self.dropout = nn.BatchNorm1d(4), nn.Dropout(0.5)
        self.heads = nn.ModuleList(nn.Linear(4, 2) for _ in range(3))

    def loss(self, t, batch):
        return self.heads[t](self.dropout(self.norm(self.lstm(batch)[0][:, -1]))).square().mean()


@pytest.mark.parametrize("fails", [False, True])
def test_a_probe_leaves_everything_as_it_was(fails):
    model = Normed().train()
    model.norm.eval()
    model.lstm.weight_ih_l0.grad = torch.full((16, 3), 7.0)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    weights, generator = TaskWeights(3, 1), torch.get_rng_state()
    batches = [torch.linspace(-1, 1, 30).view(2, 5, 3) * (t + 1) for t in range(3)]

    def loss(t, batch):
        assert not model.training and not model.dropout.training
        if fails and t == 2:
            raise KeyError("of the caller")
        return model.loss(t, batch)

    if fails:
        with pytest.raises(KeyError):
            probe(weights, loss, batches, model, model.lstm)
    else:
        with torch.no_grad():
            probe(weights, loss, batches, model, model.lstm)
        assert (weights.update()[[0, 2]] != 0).all()
    assert [m.training for m in (model, model.lstm, model.norm, model.dropout)] == [True, True, False, True]
    for name, value in model.state_dict().items():
        assert_same_bits(name, value, state[name])
    assert_same_bits("grad", model.lstm.weight_ih_l0.grad, torch.full((16, 3), 7.0))
    assert all(p.grad is None for p in model.heads.parameters())
    assert_same_bits("random_state", torch.get_rng_state(), generator)


def test_a_probe_has_one_pass_of_each_task_with_a_weight():
    model, calls = Normed(), []
    weights = TaskWeights(3, 2, (1, 0, 2))
    probe(weights, lambda t, b: (calls.append(t), model.loss(t, b))[1], [torch.ones(2, 3, 3)] * 3, model, model.lstm)
    assert calls == [2, 0]


def test_signals_of_examples_are_those_of_their_own_gradients():
    torch.manual_seed(0)
    lstm, head = fastseq.nn.LSTM(3, 4, batch_first=True).double(), nn.Linear(4, 1).double()
    own, x = list(lstm.parameters()), torch.randn(5, 6, 3, dtype=torch.float64)
    target = torch.autograd.grad(head(lstm(torch.randn(2, 6, 3).double())[0]).square().mean(), own)
    found = sample_signals(head(lstm(x)[0][:, -1])[:, 0].square(), lstm, target)

    def plain(x, target, parameters, head):
        names, values = zip(*parameters.items(), strict=True)
        copy = nn.LSTM(3, 4, batch_first=True).to(x.dtype)
        rows = []
        for one in x:
            y = torch.func.functional_call(copy, parameters, (one[None],))[0][:, -1]
            loss = (y @ head[0].T + head[1]).square().sum()
            rows.append(flat(torch.autograd.grad(loss, values)) @ flat(target))
        return torch.stack(rows) / flat(target).square().sum()

    parameters = {name: p.detach().requires_grad_() for name, p in lstm.named_parameters()}
    inputs = [x, list(target), parameters, [head.weight.detach(), head.bias.detach()]]
    with torch.enable_grad():
        assert_within_budget("signals", found, plain, inputs, GRADIENTS)


def test_signals_of_the_targets_own_examples_are_one_on_average():
    layer, x = nn.Linear(3, 1).double(), torch.randn(7, 3, dtype=torch.float64)
    losses = layer(x)[:, 0].square()
    target = torch.autograd.grad(losses.mean(), [layer.weight, layer.bias], retain_graph=True)
    mean = sample_signals(losses, layer, target).mean()
    assert_within_budget("mean", mean, lambda x: x.sum() / x.sum(), [x.abs()])


# --- going on


def interrupted(weights, begin):
    for k in range(begin, 9):
        observed(weights, k)
        if k % 2:
            weights.update()


@pytest.mark.parametrize("signal", ["cosine", "dot", "none"])
def test_a_saved_one_goes_on_bit_for_bit(signal):
    first = TaskWeights(N, 2, (1, 2, 3, 4), signal=signal)
    for k in range(4):
        observed(first, k)
        if k % 2:
            first.update()
    first.observe(2, gradients=drawn(seed=77))
    first.observe(0, gradients=drawn(seed=78))  # within an interval, the target's gradient from before
    saved = first.state_dict()
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    second = TaskWeights(N, 2, signal=signal)
    second.load_state_dict(torch.load(file))
    for one in (first, second):
        one.observe(3, gradients=drawn(seed=79))
        interrupted(one, 4)
    assert_same_bits("weights", second.weights, first.weights)
    assert second.scale(0) == first.scale(0) and second.updates == first.updates
    assert saved["weights"].tolist() != first.weights.tolist()  # a copy


# --- what is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_tasks": 0}, "TaskWeights: n_tasks must be an integer >= 1, got 0"),
        ({"target": 3}, "TaskWeights: target must be the number of a task, 0 to 2, got 3"),
        ({"target": True}, "TaskWeights: target must be the number of a task, 0 to 2, got True"),
        ({"eta": -1}, "TaskWeights: eta must be a finite number >= 0, got -1"),
        ({"c": float("nan")}, "TaskWeights: c must be a finite number >= 0, got nan"),
        ({"signal": "cos"}, "TaskWeights: signal must be one of 'cosine', 'dot', 'none', got 'cos'"),
        ({"init": "size"}, "TaskWeights: init must be one of 'uniform', 'sources', got 'size'"),
        ({"init": (1, 2)}, "TaskWeights: init must be [n_tasks] = [3], got [2]"),
        ({"init": (1, -2, 3)}, "TaskWeights: init must be finite numbers >= 0, of tasks that take part > 0, got [1"),
        ({"init": (0, 0, 0)}, "TaskWeights: init must be finite numbers >= 0, of tasks that take part > 0, got [0"),
        ({"init": (1, torch.inf, 1)}, "TaskWeights: init must be finite numbers >= 0, of tasks that take part > 0"),
        ({"n_tasks": 1, "target": 0, "init": "sources"}, "of tasks that take part > 0, got [0.0]"),
    ],
)
def test_arguments_that_are_refused(options, message):
    with pytest.raises(_check.ArgumentError, match=re.escape(message)):
        TaskWeights(**{"n_tasks": 3, "target": 0} | options)


def test_calls_that_are_refused():
    weights = TaskWeights(3, 0)
    for call, message in (
        (lambda: weights.scale(-1), "TaskWeights.scale: t must be the number of a task, 0 to 2, got -1"),
        (lambda: weights.observe(3, []), "TaskWeights.observe: t must be the number of a task, 0 to 2, got 3"),
        (lambda: weights.observe(0), "TaskWeights.observe: shared or gradients must be one of the two, got none"),
        (lambda: weights.observe(0, [], gradients=[]), "shared or gradients must be one of the two, got both"),
        (weights.update, "expected nothing"),
        (
            lambda: probe(weights, None, [1], nn.Linear(1, 1), []),
            "probe: batches must be one of each of 3 tasks, got 1",
        ),
        (lambda: sample_signals(torch.ones(2, 2), [], []), "losses must be [N], one of each example, got [2, 2]"),
        (lambda: weights.load_state_dict({"a": 1}), "TaskWeights.load_state_dict: state_dict must be with ['active', "),
        (lambda: weights.load_state_dict(TaskWeights(2, 0).state_dict()), "weights must be [n_tasks] = [3], got [2]"),
    ):
        message = message.replace("expected nothing", "and finite, got none of tasks [1, 2]")
        with pytest.raises(_check.ArgumentError, match=re.escape(message)):
            call()
    weights.observe(0, gradients=[torch.ones(2)])
    with pytest.raises(ValueError, match=re.escape("of the target's shapes [[2]], got [[3]]")):
        weights.observe(1, gradients=[torch.ones(3)])
    with pytest.raises(ValueError, match=re.escape("of the target's shapes [[2]], got []")):
        weights.observe(1, gradients=[])
    with pytest.raises(ValueError, match=re.escape("the gradient of [2] must be dense, got one of torch.sparse_coo")):
        weights.observe(1, gradients=[torch.ones(2).to_sparse()])
    weights.observe(1, gradients=[torch.ones(2)])
    with pytest.raises(ValueError, match=re.escape("got none of tasks [2]")):
        weights.update()
    assert weights.updates == 0 and repr(weights) == "TaskWeights([0.3333, 0.3333, 0.3333], target=0)"
