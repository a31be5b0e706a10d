"""The data pipeline from JSONL to batches: throughput, peak memory, and accounting of bad lines.

Each figure is measured in a process of its own, because Ray keeps memory that it has allocated. Tokenizers
run on one thread, in the pipeline and in the baseline.
"""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from benchmarks.harness import Bench
from benchmarks.text import texts, tokenizer
from parallelmind.config import DataConfig, ModelConfig, RopeConfig
from parallelmind.data.batch_server import ShardAssignment
from parallelmind.data.files import file_parts
from parallelmind.data.pipeline import receive_batches, silence_ray_data, start_batch_server, survey_files
from parallelmind.data.survey import read_records

_SPEED_BYTES = 24 << 20
_SMALL, _LARGE = 100 << 20, 2 << 30
_LINES, _BAD_EVERY = 1_000_000, 100
_BAD = [
    b'{"text": "torn', b"{'text': 'q'}", b'{"text": "a"} {"text": "b"}', b'{"text": "a", "text": "b"}',
    b'{"text": NaN}',
    b'{"text": "\x00"}', b'{"text": "\xff"}', b'{"text": "\\ud800"}', b'{"text": ' + b"[" * 3000,
    b'{"input_ids": [' + b"9" * 5000 + b"]}",
    b"[1]", b'"text"', b"null", b"{}", b'{"main": "m", "branches": []}', b'{"branches": "a"}',
    b'{"main": 5, "branches": ["a"]}',
    b'{"text": ""}', b'{"input_ids": [-2]}', b'{"prompt": "a"}',
]  # fmt: skip


def start_ray(cpus: int) -> None:
    """Start a local Ray cluster without a dashboard and with quiet logs."""
    import ray

    ray.init(
        "local", num_cpus=cpus, log_to_driver=False, include_dashboard=False, logging_level=logging.ERROR
    )
    silence_ray_data()


def write_records(path: Path, size: int, field: str, values: Sequence[str | list[int]]) -> None:
    """Write single-branch records, repeating `values`, up to about `size` bytes."""
    block = b"".join(json.dumps({field: value}, ensure_ascii=False).encode() + b"\n" for value in values)
    with path.open("wb") as file:
        for _ in range(max(1, size // len(block))):
            file.write(block)


def read_everything(path: Path, config: DataConfig) -> tuple[int, int, float]:
    """Read one epoch and return its tokens, its rows, and the seconds from first request to last batch."""
    import ray

    batch_server = start_batch_server([str(path)], config, ModelConfig(), seed=0, num_workers=1)
    ray.get(batch_server.__ray_ready__.remote())
    counts: Counter[str] = Counter()
    tokens = rows = 0
    start = time.perf_counter()
    for group in receive_batches(batch_server, ShardAssignment("", 0, 0, 1, 1), 0, counts):
        batch = group.collate(RopeConfig(), 0)
        tokens += batch.tokens
        rows += sum(sample.branches for sample in group.samples)
    return tokens, rows, time.perf_counter() - start


def bare_tokenizer_speed() -> float:
    """Tokens per second of the tokenizer alone, on the same text, in lists of 256."""
    encode, passages = tokenizer(), (texts() * 40)[:8192]
    encode(passages[:256])
    start = time.perf_counter()
    tokens = 0
    for at in range(0, len(passages), 256):
        encoded = encode(passages[at : at + 256], add_special_tokens=False, return_attention_mask=False)
        tokens += sum(map(len, encoded.input_ids))
    return tokens / (time.perf_counter() - start)


def share_of_tokenizer() -> float:
    """Tokens/s of the pipeline over tokens/s of the bare tokenizer."""
    import ray

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "text.jsonl"
        write_records(path, _SPEED_BYTES, "text", texts())
        start_ray(cpus=2)
        config = DataConfig(data_path=str(path), batch_size=16)
        read_everything(path, config)  # warm-up: starts the reader processes
        tokens, rows, seconds = read_everything(path, config)
        ray.shutdown()
    bare = bare_tokenizer_speed()
    print(
        f"{rows / seconds:.0f} rows/s, {tokens / seconds:.0f} tokens/s, bare tokenizer {bare:.0f} tokens/s",
        file=sys.stderr,
    )
    return tokens / seconds / bare


def peak_memory(size: int) -> float:
    """Peak resident memory in MB, summed over all processes, while `size` bytes are read.

    The records hold token ids, because tokenising 2 GB of text on one thread takes half an hour. All other
    stages are unchanged.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "text.jsonl"
        write_records(path, size, "input_ids", tokenizer()(texts()).input_ids)
        child = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.data", "read", str(path)], start_new_session=True
        )
        peak = 0.0
        while child.poll() is None:
            peak = max(peak, _resident(child.pid))
            time.sleep(0.5)
    assert child.returncode == 0
    return peak


def _resident(session: int) -> float:
    """Memory in MB of a session's processes and their descendants; shared pages count once."""
    listing = subprocess.run(
        ["ps", "-eo", "pid=,ppid=,sid="], capture_output=True, text=True, check=True
    ).stdout.split("\n")
    rows = [tuple(map(int, line.split())) for line in listing if line.strip()]
    family = {pid for pid, _, sid in rows if sid == session}
    while grown := {pid for pid, parent, _ in rows if parent in family} - family:
        family |= grown
    return sum(_proportional_kib(pid) for pid in family) / 1024


def _proportional_kib(pid: int) -> int:
    try:
        match = re.search(r"^Pss:\s+(\d+)", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.MULTILINE)
    except OSError:  # the process has ended
        return 0
    return int(match[1]) if match else 0


def memory_growth() -> float:
    """Peak memory at 2 GB of input over peak memory at 100 MB."""
    small, large = peak_memory(_SMALL), peak_memory(_LARGE)
    print(
        f"peak {small:.0f} MB at {_SMALL >> 20} MB of input, {large:.0f} MB at {_LARGE >> 20} MB",
        file=sys.stderr,
    )
    return large / small


def quarantine(parallelism: int) -> float:
    """Share of 10^6 lines with the right outcome.

    A good line is read back unchanged; a bad one is listed with its byte offset and line number.
    """
    import ray

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "lines.jsonl"
        good, bad, offset = [], {}, 0
        with path.open("wb") as file:
            for number in range(_LINES):
                is_bad = number % _BAD_EVERY == 7
                line = (
                    _BAD[number // _BAD_EVERY % len(_BAD)]
                    if is_bad
                    else b'{"text": "line %d \xe2\x80\xa8 and on"}' % number
                )
                if is_bad:
                    bad[offset] = number + 1
                else:
                    good.append(json.loads(line)["text"])
                offset += file.write(line + b"\n")
        start_ray(parallelism)
        config = DataConfig(data_path=str(path))
        result = survey_files([str(path)], config)
        ray.shutdown()
        read = [
            record.branches[0].body
            for part in file_parts([str(path)])
            for record in read_records(part, config, None)
        ]
    assert result.lines == _LINES == result.records + len(result.bad)
    located = sum(bad.get(item.offset) == item.line for item in result.bad)
    unchanged = sum(text == expected for text, expected in zip(read, good, strict=True))
    return (located + unchanged) / _LINES


def _in_process(name: str) -> float:
    """Run one entry of _MEASURES in a new process and return its figure."""
    env = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
    completed = subprocess.run(
        [sys.executable, "-m", "benchmarks.data", name],
        env=env,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return float(completed.stdout.split()[-1])


_MEASURES: dict[str, Callable[[], float]] = {
    "share_of_tokenizer": share_of_tokenizer,
    "quarantine_1": partial(quarantine, 1),
    "quarantine_2": partial(quarantine, 2),
}

BENCHES = [
    Bench("data.pipeline_vs_tokenizer", 0.7, "higher", "ratio", partial(_in_process, "share_of_tokenizer")),
    Bench("data.quarantine_accounted_1", 1, "higher", "share", partial(_in_process, "quarantine_1")),
    Bench("data.quarantine_accounted_2", 1, "higher", "share", partial(_in_process, "quarantine_2")),
    Bench("data.memory_2gb_vs_100mb", 1.15, "lower", "ratio", memory_growth),
]

if __name__ == "__main__":
    if sys.argv[1] == "read":
        start_ray(cpus=2)
        read_everything(Path(sys.argv[2]), DataConfig(data_path=sys.argv[2], batch_size=16))
    else:
        print(_MEASURES[sys.argv[1]]())
