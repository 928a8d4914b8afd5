"""``explain``: which backend runs each operator of a call, and why the others do not."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from fastseq.ops import _library, _select


class Step(NamedTuple):
    """One operator of a call. Equal ones that follow each other are told once."""

    operator: str
    backend: str  # "cpu", "triton", "torch" (torch's own), "reference"; "layers": layer by layer, by the steps below
    why: str
    others: dict[str, str]  # of the other backends, why not
    times: int


class Explanation(NamedTuple):
    """What ``explain`` returns; ``print`` shows it as text."""

    forward: list[Step]
    backward: list[Step]  # empty where nothing requires a gradient

    def __str__(self) -> str:
        return "\n".join(_lines(self))


class _Seen(TorchDispatchMode):
    """Records our operators on their way to the dispatcher, in whatever device's way they are chosen."""

    def __init__(self, found: list[_select.Choice]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found = found

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.name()
        if name.startswith("fastseq::"):
            op = name.removeprefix("fastseq::").split(".")[0]
            self.found.append(_select.consider(op, _library.TABLES[op], *args))
        return function(*args, **(kwargs or {}))


def explain(module: nn.Module, *inputs: Any, **options: Any) -> Explanation:
    """Run a copy of ``module`` once, backward too where something requires a gradient, and tell what ran and why.

    The module, its buffers, the random state and the gradients stay as they are.

    Args:
        inputs, options: what ``module.forward`` takes.

    Returns:
        ``Explanation``: for forward and backward the operators in the order in which they ran.

    Raises:
        What the call itself raises.
    """
    copied = copy.deepcopy(module)
    inputs, options = pytree.tree_map(_own, (inputs, options))
    devices = {t.device.index for t in pytree.tree_leaves((inputs, options)) if isinstance(t, Tensor) and t.is_cuda}
    with torch.random.fork_rng(sorted(devices)):
        forward, out = _watched(lambda: copied(*inputs, **options))
        wanted = [t for t in pytree.tree_leaves(out) if isinstance(t, Tensor) and t.requires_grad]
        backward = _watched(lambda: torch.autograd.backward(wanted, [torch.ones_like(t) for t in wanted]))[0]
    return Explanation(forward, backward if wanted else [])


def _own(value: Any) -> Any:
    """A tensor that shares no gradient with the caller's."""
    return value.detach().clone().requires_grad_(value.requires_grad) if isinstance(value, Tensor) else value


def _watched(run: Any) -> tuple[list[Step], Any]:
    found: list[_select.Choice] = []
    with _select.watch(found), _Seen(found):
        out = run()
    return list(_steps(found)), out


def _steps(found: list[_select.Choice]) -> Iterator[Step]:
    last: Step | None = None
    for choice in found:
        step = Step(choice.op, choice.backend.name if choice.backend else "none", choice.why, choice.reasons, 1)
        if last is not None and last._replace(times=1) == step:
            last = last._replace(times=last.times + 1)
            continue
        if last is not None:
            yield last
        last = step
    if last is not None:
        yield last


def _lines(explanation: Explanation) -> Iterator[str]:
    for title, steps in zip(Explanation._fields, explanation, strict=True):
        if steps or title == "forward":
            yield title if steps else f"{title}: no operator of fastseq"
        for step in steps:
            yield f"  {step.operator}{f' x{step.times}' if step.times > 1 else ''}: {step.backend}, {step.why}"
            for name, why in step.others.items():
                yield f"    {name}: {why}"
