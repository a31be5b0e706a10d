"""Trees in training loops of other people: plain PyTorch and the Trainer of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from adapting import patched_llama
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import tiny_tokenizer
from torch import Tensor
from transformers import BatchEncoding, Trainer, TrainerCallback, TrainingArguments
from tree_losses import training_loss

import parallelmind as pm
from parallelmind.config import RopeConfig
from parallelmind.training.step import trainable

CONFIG = RopeConfig()
TOKENIZER = tiny_tokenizer()


def text(prompt: str, completion: str, **below: Any) -> dict[str, Any]:
    return {"prompt": f" {prompt}:", "completion": f" {completion}", **below}


def tree(number: int) -> dict[str, Any]:
    """A nested tree; trees of other numbers have other lengths."""
    checks = [text("check", "of" * (1 + number % 4)), text("check", "in the passage")]
    first = text("who", "lives", branches=checks, reduce=text("so", "is " * (number % 3) + "the"))
    return {
        "main": f"The question {number}.",
        "branches": [first, text("what", "works")],
        "reduce": text("Answer", f"{number % 5}"),
    }


TREES = [tree(number) for number in range(8)]


def collate(samples: list[dict[str, Any]]) -> BatchEncoding:
    return pm.tree_batch(TOKENIZER, samples, CONFIG)


def adapted() -> PeftModel:
    """A patched model with an adapter whose weights already count."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        settings = LoraConfig(
            task_type="CAUSAL_LM", r=4, target_modules="all-linear", init_lora_weights=False
        )
        return get_peft_model(patched_llama(CONFIG), settings)


class Gradients(TrainerCallback):
    """Keeps the gradients of every step."""

    def __init__(self) -> None:
        self.steps: list[Tensor] = []

    def on_pre_optimizer_step(self, *_: Any, model: PeftModel, **__: Any) -> None:
        self.steps.append(gradient(model))


def gradient(model: PeftModel) -> Tensor:
    return torch.cat([weight.grad.flatten() for weight in trainable(model) if weight.grad is not None])


def trainer(model: PeftModel, folder: Path, collator: Any = collate, **settings: Any) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=0.01,
        lr_scheduler_type="constant",
        max_grad_norm=0,
        remove_unused_columns=False,
        disable_tqdm=True,
        report_to="none",
        use_cpu=True,
        **settings,
    )
    return Trainer(model, arguments, collator, train_dataset=TREES, eval_dataset=TREES[:4])


def weights(model: PeftModel) -> list[Tensor]:
    return [weight.detach().clone() for weight in trainable(model)]


def test_a_plain_loop_learns() -> None:
    model = adapted()
    optimizer = torch.optim.AdamW(trainable(model), lr=0.01)
    losses = []
    for _ in range(15):
        loss = model(**collate(TREES)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] / 2


def test_trainer_learns_and_evaluates(tmp_path: Path) -> None:
    model = adapted()
    with torch.no_grad():
        total, targets = training_loss(model, collate(TREES[:4]), CONFIG)
    learner = trainer(model, tmp_path, max_steps=12)
    before = learner.evaluate()["eval_loss"]
    assert before == pytest.approx(float(total / targets), rel=1e-5)
    learner.train()
    assert learner.evaluate()["eval_loss"] < before / 2


def test_the_gradients_of_trainer_are_those_of_training(tmp_path: Path) -> None:
    """Batches of one step have different numbers of targets, and every target has the same weight."""
    taken: list[list[dict[str, Any]]] = []

    def collator(samples: list[dict[str, Any]]) -> BatchEncoding:
        taken.append(samples)
        return collate(samples)

    kept = Gradients()
    learner = trainer(adapted(), tmp_path, collator, max_steps=1)
    learner.add_callback(kept)
    learner.train()
    model = adapted()
    sums = [training_loss(model, collate(samples), CONFIG) for samples in taken[:2]]
    (first, first_targets), (second, second_targets) = sums
    assert first_targets != second_targets
    ((first + second) / (first_targets + second_targets)).backward()
    torch.testing.assert_close(kept.steps[0], gradient(model), rtol=1e-4, atol=1e-6)


def test_trainer_resumes_from_its_checkpoint(tmp_path: Path) -> None:
    whole = trainer(adapted(), tmp_path / "whole", max_steps=4, save_strategy="no")
    whole.train()
    trainer(adapted(), tmp_path / "parts", max_steps=2, save_steps=2).train()
    resumed = trainer(adapted(), tmp_path / "parts", max_steps=4, save_strategy="no")
    resumed.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-2"))
    for one, other in zip(weights(whole.model), weights(resumed.model), strict=True):
        assert torch.equal(one, other)


def test_the_adapter_of_a_checkpoint_decodes(tmp_path: Path) -> None:
    learner = trainer(adapted(), tmp_path, max_steps=1, save_steps=1)
    learner.train()
    loaded = PeftModel.from_pretrained(patched_llama(CONFIG), tmp_path / "checkpoint-1")
    sample = pm.Sample(main="The question", branches=[" who:", " what:"])
    expected = pm.generate(learner.model, TOKENIZER, sample, max_new_tokens=4)
    assert pm.generate(loaded, TOKENIZER, sample, max_new_tokens=4) == expected
