"""`-m benchmarks.shard_memory MODEL FOLDER`: print the peak memory of a worker of a sharded LoRA run.

To be started by torchrun. Prints the peak bytes up to the loaded model, and up to the end of a run of two
steps with a checkpoint, of the worker where they are largest.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

import torch
import torch.distributed as dist
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from parallelmind.config import TrainConfig
from parallelmind.data.packing import make_batch
from parallelmind.evaluation.peak_memory import PeakMemory
from parallelmind.layout import Tokens
from parallelmind.remote import RemotePath
from parallelmind.training.build import build_model
from parallelmind.training.checkpoint_manager import CheckpointManager, CheckpointWriter
from parallelmind.training.loop import TrainingInputs, train

_VOCABULARY, _TOKENS, _STEPS = 32_000, 64, 2
_LARGE, _EMPTY = (24, 1024), (1, 64)  # layers and width


class _Silent:
    """Hooks that do nothing."""

    def log(self, *_: object) -> None: ...

    def print_line(self, line: str) -> None: ...

    def report(self, *_: object) -> None: ...

    def should_stop(self) -> bool:
        return False


def main(model_folder: str, folder: Path) -> None:
    dist.init_process_group("gloo")
    config = TrainConfig(
        data_path="-",
        base_model=model_folder,
        sharding="full",
        gradient_checkpointing=True,
        lora_rank=4,
        max_steps=_STEPS,
    )
    tokens = Tokens.of(list(range(_TOKENS // 2)), [list(range(_TOKENS // 2))])
    batch = make_batch([tokens], config.rope, pad_id=0)
    with PeakMemory() as loading:
        model, _ = build_model(config, torch.device("cpu"))
        path = RemotePath(folder)
        writer = CheckpointManager(path, 1) if dist.get_rank() == 0 else CheckpointWriter(path)
    with PeakMemory() as training:
        stream = [batch] * _STEPS
        inputs = TrainingInputs(config, "", model, lambda *_: stream, _Silent(), _STEPS, {}, writer)
        train(inputs)
    peaks = torch.tensor([loading.max_bytes, max(loading.max_bytes, training.max_bytes)])
    dist.all_reduce(peaks, dist.ReduceOp.MAX)
    if dist.get_rank() == 0:
        print(*peaks.tolist(), flush=True)
    dist.barrier()
    os._exit(0)  # a thread of Gloo that frees a tensor while Python ends would abort the process


@cache
def shares(workers: int = 4) -> tuple[float, float]:
    """Peak memory per worker of loading and of training, over the size of a float32 model of 341M weights.

    The peaks of a model of 2M weights are subtracted.
    """
    with tempfile.TemporaryDirectory() as folder:
        size = _save_model(Path(folder, "large"), *_LARGE)
        _save_model(Path(folder, "empty"), *_EMPTY)
        large, empty = (_peaks(Path(folder, name), workers) for name in ("large", "empty"))
    loading, training = ((peak - fixed) / size for peak, fixed in zip(large, empty, strict=True))
    return loading, training


def _save_model(folder: Path, layers: int, width: int) -> int:
    """Save a random model and a tokenizer; returns the bytes of the weights."""
    config = LlamaConfig(
        vocab_size=_VOCABULARY,
        hidden_size=width,
        intermediate_size=width * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    words = {str(number): number for number in range(_VOCABULARY)}
    backend = Tokenizer(WordLevel(words, unk_token="0"))
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="1").save_pretrained(folder)
    return sum(weight.nbytes for weight in model.parameters())


def _peaks(model_folder: Path, workers: int) -> list[int]:
    """What `main` prints for a model. Freed memory goes back to the system at once (see `training._peak`)."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={workers}", "-m", "benchmarks.shard_memory"]
    command += [str(model_folder), str(model_folder / "checkpoints")]
    malloc = {"MALLOC_MMAP_THRESHOLD_": str(1 << 14), "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_ARENA_MAX": "1"}
    env = {**os.environ, **malloc, "OMP_NUM_THREADS": "1"}
    completed = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
    return [int(value) for value in completed.stdout.split()[-2:]]


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1], Path(sys.argv[2]))
