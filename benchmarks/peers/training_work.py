"""What both trainers are given: mains and branches, read from a file of JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class TrainingWork:
    """Samples of token ids: a main, which may be empty, and branches, whose tokens are the targets.

    batch_samples: samples of a batch. packed_tokens: tokens of a batch of packed rows, in its place.
    """

    samples: list[tuple[list[int], list[list[int]]]]
    batch_samples: int = 1
    packed_tokens: int | None = None

    @property
    def batch_rows(self) -> int:
        """Rows of a batch for a trainer that does not know mains: one for each branch."""
        return self.batch_samples * len(self.samples[0][1])

    def rows(self) -> tuple[list[list[int]], list[list[int]]]:
        """Main and branch of every row, and 1 for its targets and 0 for its main."""
        pairs = [(main, branch) for main, branches in self.samples for branch in branches]
        return (
            [main + branch for main, branch in pairs],
            [[0] * len(main) + [1] * len(branch) for main, branch in pairs],
        )

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")


def read_work(path: str) -> TrainingWork:
    return TrainingWork(**json.loads(Path(path).read_text(encoding="utf-8")))
