"""Records of main and branches alone mean what they meant before records were trees."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commits import ROOT, checkout, run_python

COMMIT = "df79be5"  # the last one whose samples were main and branches
SCRIPT = "flat_run.py"
WORDS = "who what where the passage answer question lives works in of is and".split()


def text(draws: random.Random, most: int = 12) -> str:
    return " ".join(draws.choices(WORDS, k=draws.randint(1, most)))


def branch(draws: random.Random) -> dict[str, Any]:
    ids = [draws.randint(3, 299) for _ in range(draws.randint(1, 20))]
    return draws.choice(
        [
            {"text": text(draws)},
            {"text": text(draws), "answer_offset": draws.randint(0, 9)},
            {"text": text(draws), "targets": [[1, 3], [4, 5 + draws.randint(0, 9)]]},
            {"text": f"<s>{text(draws)}</s>", "rendered": True},
            {"prompt": text(draws), "completion": f" {text(draws)}"},
            {"prompt": "", "completion": text(draws)},
            {"input_ids": ids},
            {"input_ids": ids, "answer_offset": draws.randint(0, len(ids))},
        ]
    )


def record(draws: random.Random) -> dict[str, Any]:
    if draws.random() < 0.5:
        return branch(draws)
    main: Any = draws.choice(["", text(draws), {"input_ids": [5, 6, 7]}, {"text": text(draws, 30)}])
    branches = [draws.choice([text(draws), branch(draws)]) for _ in range(draws.randint(1, 10))]
    return {"main": main, "branches": branches}


@pytest.mark.full
@pytest.mark.slow
def test_flat_records_give_the_same_batches_losses_and_adapters_as_before(tmp_path: Path) -> None:
    draws = random.Random(0)
    lines = "".join(json.dumps(record(draws)) + "\n" for _ in range(150))
    (tmp_path / "lines.jsonl").write_text(lines, encoding="utf-8")
    shutil.copy(ROOT / "tests" / SCRIPT, tmp_path)
    with checkout(COMMIT, tmp_path / "before") as before:
        for root, name in ((before, "before.npz"), (ROOT, "now.npz")):
            run_python(root, tmp_path, "-P", SCRIPT, "lines.jsonl", name)
    with np.load(tmp_path / "before.npz") as before_arrays, np.load(tmp_path / "now.npz") as arrays:
        assert set(arrays.files) == set(before_arrays.files)
        assert sum("adapter" in name for name in arrays.files) == 2
        for name in arrays.files:
            assert arrays[name].tobytes() == before_arrays[name].tobytes(), name
