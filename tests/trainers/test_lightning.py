"""Lightning: bf16-mixed, clipping, a checkpoint and going on from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.tolerance import assert_same_bits
from tests.trainers.tagger import CLIP, EPOCHS, STEPS, B, examples, fell, optimizer_of, scheduler_of, tagger, tensors

lightning = pytest.importorskip("lightning", reason="lightning is not installed: make check-trainers has it")


def module() -> Any:
    class Module(lightning.LightningModule):  # type: ignore[misc]
        """LEGW steps with the optimizer; each step has noise of its own, the same in every run."""

        def __init__(self) -> None:
            super().__init__()
            self.tagger, self.losses = tagger(), []

        def training_step(self, batch: dict[str, Tensor], number: int) -> Tensor:
            torch.manual_seed(self.global_step)
            loss: Tensor = self.tagger(**batch)["loss"]
            assert torch.is_autocast_enabled("cpu")
            self.losses.append(float(loss.detach()))
            return loss

        def configure_optimizers(self) -> dict[str, Any]:
            optimizer = optimizer_of(self)
            return {
                "optimizer": optimizer,
                "lr_scheduler": {"scheduler": scheduler_of(optimizer), "interval": "step"},
            }

    return Module()


def train(folder: Path, epochs: int, checkpoint: Path | None = None) -> Any:
    saved = lightning.pytorch.callbacks.ModelCheckpoint(folder, filename="{step}", save_last=False)
    trainer = lightning.Trainer(
        accelerator="cpu",
        precision="bf16-mixed",
        gradient_clip_val=CLIP,
        max_epochs=epochs,
        callbacks=[saved],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    made = module()
    loader = torch.utils.data.DataLoader(examples(), B)
    trainer.fit(made, loader, ckpt_path=checkpoint)
    return made


def test_lightning(tmp_path: Path) -> None:
    through = train(tmp_path / "through", EPOCHS)
    assert len(through.losses) == STEPS and fell(through.losses)
    train(tmp_path / "half", EPOCHS // 2)
    (checkpoint,) = (tmp_path / "half").glob("*.ckpt")
    again = train(tmp_path / "again", EPOCHS, checkpoint)
    assert again.losses == through.losses[STEPS // 2 :]
    names, values = tensors(again.tagger)
    assert_same_bits(names, values, tensors(through.tagger)[1])
