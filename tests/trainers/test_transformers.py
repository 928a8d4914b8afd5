"""The Trainer of transformers: bfloat16, clipping, LEGW, a checkpoint and going on from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.tolerance import assert_same_bits
from tests.trainers.tagger import CLIP, STEPS, B, examples, fell, optimizer_of, scheduler_of, tagger, tensors

transformers = pytest.importorskip("transformers", reason="transformers is not installed: make check-trainers has it")
pytest.importorskip("accelerate", reason="accelerate is not installed: make check-trainers has it")


def trainer(folder: Path, **options: Any) -> Any:
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        bf16=True,
        max_steps=STEPS,
        per_device_train_batch_size=B,
        max_grad_norm=CLIP,
        logging_steps=1,
        save_steps=STEPS // 2,
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    model = tagger()
    optimizer = optimizer_of(model)
    pair = (optimizer, scheduler_of(optimizer))
    return transformers.Trainer(model, arguments, train_dataset=examples(), optimizers=pair)


def test_transformers(tmp_path: Path) -> None:
    through = trainer(tmp_path / "run")
    through.train()
    losses = [entry["loss"] for entry in through.state.log_history if "loss" in entry]
    rates = [entry["learning_rate"] for entry in through.state.log_history if "loss" in entry]
    assert len(losses) == STEPS and fell(losses)
    assert rates[0] < max(rates) and rates[-1] < max(rates) / 2
    again = trainer(tmp_path / "again")
    again.train(resume_from_checkpoint=str(tmp_path / "run" / f"checkpoint-{STEPS // 2}"))
    assert [entry["loss"] for entry in again.state.log_history if "loss" in entry] == losses
    names, values = tensors(again.model)
    assert_same_bits(names, values, tensors(through.model)[1])
