"""Accelerate: bfloat16, accumulation, clipping, and a state that is saved and loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tolerance import assert_same_bits
from tests.trainers.tagger import CLIP, STEPS, B, examples, fell, optimizer_of, scheduler_of, tagger, tensors

accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed: make check-trainers has it")


class Run:
    """Steps of half a batch each, two of which make one of the optimizer."""

    def __init__(self) -> None:
        self.accelerator = accelerate.Accelerator(
            mixed_precision="bf16", cpu=True, gradient_accumulation_steps=2, step_scheduler_with_optimizer=False
        )
        model = tagger()
        optimizer = optimizer_of(model)
        loader = torch.utils.data.DataLoader(examples(), B // 2)
        parts: Any = self.accelerator.prepare(model, optimizer, loader, scheduler_of(optimizer))
        self.model, self.optimizer, self.loader, self.scheduler = parts

    def train(self, epochs: int) -> list[float]:
        losses = []
        for _ in range(epochs):
            for data in self.loader:
                with self.accelerator.accumulate(self.model):
                    loss = self.model(**data)["loss"]
                    self.accelerator.backward(loss)
                    if self.accelerator.sync_gradients:
                        self.accelerator.clip_grad_norm_(self.model.parameters(), CLIP)
                    self.optimizer.step()
                    if self.accelerator.sync_gradients:
                        self.scheduler.step()
                    self.optimizer.zero_grad()
                losses.append(float(loss.detach()))
        return losses


def test_accelerate(tmp_path: Path) -> None:
    epochs = 4
    through = Run()
    first = through.train(epochs // 2)
    through.accelerator.save_state(str(tmp_path))
    second = through.train(epochs - epochs // 2)
    assert len(first + second) == 2 * STEPS and fell(first + second)
    again = Run()
    again.accelerator.load_state(str(tmp_path))
    assert again.train(epochs - epochs // 2) == second
    names, values = tensors(again.accelerator.unwrap_model(again.model))
    assert_same_bits(names, values, tensors(through.accelerator.unwrap_model(through.model))[1])
    assert again.scheduler.scheduler.last_epoch == STEPS
