"""Twenty steps with what torch itself offers: loss scaling, activation checkpointing, functional calls, FSDP2."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tests.tolerance import GRADIENTS, assert_same_bits, assert_within_budget
from tests.trainers.tagger import CLIP, RATE, STEPS, Tagger, batch, fell, optimizer_of, tagger, tensors


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_grad_scaler(dtype: torch.dtype) -> None:
    """Under autocast the loss falls; a step whose gradients are infinite changes nothing and halves the scale."""
    model = tagger()
    optimizer, scaler, losses = optimizer_of(model), torch.amp.GradScaler("cpu", init_scale=256.0), []
    for step in range(STEPS):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype):
            loss = model(**batch(step))["loss"]
        scaler.scale(loss * float("inf") if step == 9 else loss).backward()
        before = [p.detach().clone() for p in model.parameters()]
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        scaler.step(optimizer)
        scaler.update()
        losses.append(float(loss.detach()))
        same = all(map(torch.equal, before, model.parameters()))
        assert same == (step == 9) and scaler.get_scale() == (256.0 if step < 9 else 128.0)
    assert fell(losses) and {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoint(use_reentrant: bool) -> None:
    """The LSTM runs again in backward, with the noise of the first time: the bits of a training without."""

    def train(again: bool) -> list[Tensor]:
        model = tagger(quantized=False)
        optimizer, run = optimizer_of(model), model.lstm.forward
        if again:
            model.lstm.forward = lambda x: checkpoint(run, x, use_reentrant=use_reentrant)  # type: ignore[method-assign]
        for step in range(STEPS):
            optimizer.zero_grad()
            data = batch(step)
            data["x"].requires_grad_()  # the reentrant way asks for it
            model(**data)["loss"].backward()
            optimizer.step()
        return tensors(model)[1]

    assert_same_bits(tensors(tagger(False))[0], train(True), train(False))


def test_functional_call() -> None:
    """Parameters as a dictionary and gradients by torch.func train as a module and its optimizer do."""
    model = tagger(quantized=False)
    parameters = start = {name: p.detach() for name, p in model.named_parameters()}

    def data(step: int, dtype: torch.dtype) -> dict[str, Tensor]:
        torch.manual_seed(step)  # of the noise
        return {**batch(step), "x": batch(step)["x"].to(dtype)}

    def loss(parameters: dict[str, Tensor], step: int) -> Tensor:
        return torch.func.functional_call(model, parameters, (), data(step, torch.float32))["loss"]

    for step in range(STEPS):
        gradients = torch.func.grad(loss)(parameters, step)
        parameters = {name: p.add(gradients[name], alpha=-RATE) for name, p in parameters.items()}

    def as_usual(*values: Tensor) -> list[Tensor]:
        other = tagger(quantized=False).to(values[0].dtype)
        other.load_state_dict(dict(zip(start, values, strict=True)))
        optimizer = torch.optim.SGD(other.parameters(), lr=RATE)
        for step in range(STEPS):
            optimizer.zero_grad()
            other(**data(step, values[0].dtype))["loss"].backward()
            optimizer.step()
        return [p.detach() for p in other.parameters()]

    assert_within_budget([*start], [*parameters.values()], as_usual, [*start.values()], GRADIENTS)


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[None]:
    """A process group of this process alone; tests/nn/test_training_ranks.py has two ranks."""
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_rank")
def test_fsdp(tmp_path: Path) -> None:
    """fully_shard with bfloat16 parameters and clipping; a checkpoint after half of the steps goes on bit for bit."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    def made() -> tuple[Tagger, torch.optim.Optimizer]:
        model = tagger()
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, output_dtype=torch.float32)
        fully_shard(model.lstm, mp_policy=policy)
        fully_shard(model, mp_policy=MixedPrecisionPolicy())
        return model, optimizer_of(model)

    def train(model: Tagger, optimizer: torch.optim.Optimizer, steps: range) -> list[float]:
        losses = []
        for step in steps:
            torch.manual_seed(step)
            optimizer.zero_grad()
            loss = model(**batch(step))["loss"]
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            losses.append(float(loss.detach()))
        return losses

    def parts(model: Tagger, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, object]]:
        return dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))

    through, half = made(), made()
    losses = train(*through, range(STEPS))
    assert fell(losses)
    train(*half, range(STEPS // 2))
    dcp.save(parts(*half), checkpoint_id=tmp_path / "half")
    again = made()
    loaded = parts(*again)
    dcp.load(loaded, checkpoint_id=tmp_path / "half")
    set_state_dict(*again, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"])
    assert train(*again, range(STEPS // 2, STEPS)) == losses[STEPS // 2 :]
    whole = [[v.full_tensor() if hasattr(v, "full_tensor") else v for v in tensors(m)[1]] for m, _ in (again, through)]
    assert_same_bits(tensors(through[0])[0], *whole)
