"""Memory table of docs/training.md: memory per worker, estimated from model shape, rank and tokens per batch.

    python -m tools.memory

The bytes that a token keeps for the backward pass were counted on Llama-like decoders with an adapter on
every linear layer; tests/unit/test_memory.py counts them again. Fragmentation of a GPU's allocator is not
included.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tools.marked import fill

PAGE = Path(__file__).resolve().parents[1] / "docs" / "training.md"
PART = "memory"

_GIB = 2**30
_TRAINED_BYTES = 18  # per trained weight: value, gradient, two moments in float32; a copy in bfloat16
_FIXED = 1.25 * _GIB  # CUDA context and one chunk of logits


@dataclass(frozen=True, slots=True)
class Shape:
    """A Llama-like decoder. `inner`: MLP width. `keys`: width of the key and of the value projection."""

    name: str
    width: int
    inner: int
    layers: int
    keys: int
    vocabulary: int
    tied: bool

    @property
    def linear(self) -> int:
        """Number of weights of the linear layers, which LoRA adapts and `quantize=` packs."""
        return self.layers * (2 * self.width * (self.width + self.keys) + 3 * self.width * self.inner)

    @property
    def embeddings(self) -> int:
        return self.vocabulary * self.width * (1 if self.tied else 2)

    def lora(self, rank: int) -> int:
        """Number of weights of an adapter on all linear layers: rank × (inputs + outputs) of each."""
        return (
            rank
            * self.layers
            * (2 * (self.width + self.keys) + 4 * self.width + 3 * (self.width + self.inner))
        )

    def token(self) -> int:
        """Bytes kept per token and layer for the backward pass, in bfloat16.

        Four vectors of the MLP's inner width, and fourteen of the model width around attention and norms.
        """
        return 2 * (4 * self.inner + 14 * self.width)


@dataclass(frozen=True, slots=True)
class Setting:
    """A way to train. `fields`: its settings as shown in the table."""

    fields: str
    bytes_per_weight: float = 2.0
    checkpointing: bool = False


QWEN = (
    Shape("Qwen2.5-0.5B", 896, 4864, 24, 128, 151936, tied=True),
    Shape("Qwen2.5-1.5B", 1536, 8960, 28, 256, 151936, tied=True),
    Shape("Qwen2.5-7B", 3584, 18944, 28, 512, 152064, tied=False),
)
RANKS = (8, 16, 32)
SETTINGS = (
    Setting("`dtype=bfloat16`"),
    Setting("and `gradient_checkpointing=true`", checkpointing=True),
    Setting("and `quantize=4bit`", bytes_per_weight=0.52, checkpointing=True),
)
TOKENS = (4096, 16384)


def lora_bytes(shape: Shape, rank: int, tokens: int, setting: Setting) -> float:
    """Bytes of one worker that trains an adapter. `tokens`: tokens per batch, padding included."""
    weights = setting.bytes_per_weight * shape.linear + 2 * shape.embeddings
    # With activation checkpointing a layer keeps its input only, and one layer at a time is recomputed.
    kept = 2 * shape.width if setting.checkpointing else shape.token()
    recomputed = shape.token() if setting.checkpointing else 0
    return weights + _TRAINED_BYTES * shape.lora(rank) + tokens * (shape.layers * kept + recomputed) + _FIXED


def full_bytes(shape: Shape, tokens: int) -> float:
    """Bytes of one worker with `tuning=full dtype=bfloat16`."""
    token = shape.token() + 10 * shape.width  # the residual stream is float32
    return _TRAINED_BYTES * (shape.linear + shape.embeddings) + tokens * shape.layers * token + _FIXED


def table() -> str:
    """Return the table as Markdown."""
    heads = ["model", "rank", "settings", *(f"{tokens:,} tokens" for tokens in TOKENS)]
    return "\n".join(["| " + " | ".join(heads) + " |", "| --- | --- | --- | ---: | ---: |", *_rows()])


def _rows() -> Iterator[str]:
    for shape, rank in zip(QWEN, RANKS, strict=True):
        for setting in SETTINGS:
            yield _row(
                shape,
                str(rank),
                setting.fields,
                [lora_bytes(shape, rank, tokens, setting) for tokens in TOKENS],
            )
        yield _row(
            shape, "", "`tuning=full dtype=bfloat16`", [full_bytes(shape, tokens) for tokens in TOKENS]
        )


def _row(shape: Shape, rank: str, fields: str, sizes: list[float]) -> str:
    return (
        f"| {shape.name} | {rank} | {fields} | "
        + " | ".join(f"{size / _GIB:.0f} GiB" for size in sizes)
        + " |"
    )


if __name__ == "__main__":
    fill(PAGE, PART, table())
