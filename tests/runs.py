"""The working directory of a training run of a tiny model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tiny import save_tiny


def prepare(folder: Path, records: int, settings: Mapping[str, Any]) -> Path:
    """Save a tiny model, records of unequal length and run.yaml with these settings; return the folder."""
    save_tiny(folder / "tiny")
    texts = (
        f"Question: {number % 7} Answer: the {number % 7} lives" + " in" * (number % 23)
        for number in range(records)
    )
    lines = (json.dumps({"text": text, "answer_offset": 4}) for text in texts)
    (folder / "data.jsonl").write_text("".join(f"{line}\n" for line in lines))
    fields = {"base_model": "tiny", "data_path": "data.jsonl", **settings}
    (folder / "run.yaml").write_text("".join(f"{key}: {value}\n" for key, value in fields.items()))
    return folder
