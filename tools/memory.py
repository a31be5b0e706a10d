"""The table of docs/training.md: the memory of a worker, estimated from a model's shape, the rank and the
tokens of a batch.

    python -m tools.memory

What a token leaves behind for the backward pass was counted on Llama-like decoders with an adapter on every
linear layer (tests/unit/test_memory.py counts it again). What a GPU's allocator wastes is not in it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tools.marked import fill

PAGE = Path(__file__).resolve().parents[1] / "docs" / "training.md"
PART = "memory"

_GIB = 2**30
_LEARNT = 18  # bytes of a trained number: value, gradient and two moments in float32, a copy in bfloat16
_FIXED = 1.25 * _GIB  # CUDA's own, and one chunk of logits


@dataclass(frozen=True, slots=True)
class Shape:
    """A Llama-like decoder. inner: width inside the MLP. keys: width of keys, and of values."""

    name: str
    width: int
    inner: int
    layers: int
    keys: int
    vocabulary: int
    tied: bool

    @property
    def linear(self) -> int:
        """Weights of the linear layers that LoRA adapts, and that quantize= packs."""
        return self.layers * (2 * self.width * (self.width + self.keys) + 3 * self.width * self.inner)

    @property
    def embeddings(self) -> int:
        return self.vocabulary * self.width * (1 if self.tied else 2)

    def lora(self, rank: int) -> int:
        """Weights of an adapter on all of them: rank × (inputs + outputs) of each."""
        return (
            rank
            * self.layers
            * (2 * (self.width + self.keys) + 4 * self.width + 3 * (self.width + self.inner))
        )

    def token(self) -> int:
        """Bytes that one token leaves in one layer, in bfloat16: four vectors inside the MLP, and around
        attention and norms the worth of fourteen.
        """
        return 2 * (4 * self.inner + 14 * self.width)


@dataclass(frozen=True, slots=True)
class Setting:
    """How to train, as fields of a run."""

    told: str
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
    """Of one worker that trains an adapter. tokens: of a batch, padding included."""
    weights = setting.bytes_per_weight * shape.linear + 2 * shape.embeddings
    kept = (
        2 * shape.width if setting.checkpointing else shape.token()
    )  # of each layer; a checkpointed one is run again
    again = shape.token() if setting.checkpointing else 0
    return weights + _LEARNT * shape.lora(rank) + tokens * (shape.layers * kept + again) + _FIXED


def full_bytes(shape: Shape, tokens: int) -> float:
    """Of one worker with `tuning=full dtype=bfloat16`."""
    token = shape.token() + 10 * shape.width  # what passes from layer to layer is float32 there
    return _LEARNT * (shape.linear + shape.embeddings) + tokens * shape.layers * token + _FIXED


def table() -> str:
    heads = ["model", "rank", "settings", *(f"{tokens:,} tokens" for tokens in TOKENS)]
    return "\n".join(["| " + " | ".join(heads) + " |", "| --- | --- | --- | ---: | ---: |", *_rows()])


def _rows() -> Iterator[str]:
    for shape, rank in zip(QWEN, RANKS, strict=True):
        for setting in SETTINGS:
            yield _row(
                shape,
                str(rank),
                setting.told,
                [lora_bytes(shape, rank, tokens, setting) for tokens in TOKENS],
            )
        yield _row(
            shape, "", "`tuning=full dtype=bfloat16`", [full_bytes(shape, tokens) for tokens in TOKENS]
        )


def _row(shape: Shape, rank: str, told: str, sizes: list[float]) -> str:
    return (
        f"| {shape.name} | {rank} | {told} | " + " | ".join(f"{size / _GIB:.0f} GiB" for size in sizes) + " |"
    )


if __name__ == "__main__":
    fill(PAGE, PART, table())
