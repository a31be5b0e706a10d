"""Split XQuAD for parallel questions.

Passages with at least eight questions are held out with their first eight; the others are for training.

    python -m workloads.convert data_path=path/to/xquad.en.json output_path=runs/data/xquad.en.all.jsonl
    python -m workloads.convert data_path=path/to/xquad.zh.json output_path=runs/data/xquad.zh.all.jsonl
    python -m experiments._xquad runs/data

SmolLM2's tokenizer needs 2.5 times as many tokens for Chinese as for English, so only the shortest third of
the Chinese passages is used for training.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from experiments._command import run as run_command

_QUESTIONS = 8  # per held-out passage


def _records(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def _write(file: Path, records: list[dict[str, Any]]) -> None:
    file.write_text(
        "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8"
    )


def main(folder: str) -> None:
    """Write xquad.train.jsonl with both languages, and the held-out xquad.LANGUAGE.jsonl."""
    data, train = Path(folder), []
    for language, share in (("en", 1.0), ("zh", 1 / 3)):
        records = _records(data / f"xquad.{language}.all.jsonl")
        held_out = [record for record in records if len(record["branches"]) >= _QUESTIONS]
        _write(
            data / f"xquad.{language}.jsonl",
            [{**record, "branches": record["branches"][:_QUESTIONS]} for record in held_out],
        )
        rest = [record for record in records if len(record["branches"]) < _QUESTIONS]
        train += sorted(rest, key=lambda record: len(record["main"]))[: round(len(rest) * share)]
    _write(data / "xquad.train.jsonl", train)


if __name__ == "__main__":
    run_command(main)
