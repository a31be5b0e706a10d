"""TRL's SFTTrainer with LoRA. Arguments: base model, dtype, file with a `TrainingWork`.

Prints the seconds of the second of two epochs; the first one warms up.
"""

from __future__ import annotations

import sys
import tempfile
import time
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer

from benchmarks.peers.training_work import TrainingWork, read_work


class _LastEpoch(TrainerCallback):
    """The time of the last epoch."""

    seconds = 0.0

    def on_epoch_begin(self, *_: Any, **__: Any) -> None:
        self._start = time.perf_counter()

    def on_epoch_end(self, *_: Any, **__: Any) -> None:
        self.seconds = time.perf_counter() - self._start


def train(base_model: str, dtype: str, work: TrainingWork) -> float:
    """Train two epochs as the documentation of TRL does on a CPU; return the seconds of the second one."""
    model = AutoModelForCausalLM.from_pretrained(base_model, dtype=getattr(torch, dtype))
    rows = [{"input_ids": row, "completion_mask": mask} for row, mask in zip(*work.rows(), strict=True)]
    last = _LastEpoch()
    with tempfile.TemporaryDirectory() as folder:
        settings = SFTConfig(
            folder,
            num_train_epochs=2,
            per_device_train_batch_size=1 if work.packed_tokens else work.batch_rows,
            max_length=work.packed_tokens,
            packing=bool(work.packed_tokens),
            completion_only_loss=True,
            bf16=dtype == "bfloat16",
            gradient_checkpointing=False,
            learning_rate=2e-4,
            save_strategy="no",
            report_to="none",
            logging_steps=5,
            disable_tqdm=True,
            use_cpu=True,
        )
        SFTTrainer(
            model,
            settings,
            train_dataset=Dataset.from_list(rows),
            processing_class=AutoTokenizer.from_pretrained(base_model),
            peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
            callbacks=[last],
        ).train()
    return last.seconds


if __name__ == "__main__":
    print(train(sys.argv[1], sys.argv[2], read_work(sys.argv[3])))
