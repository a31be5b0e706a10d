"""`workloads.evaluate tax`: isolated branches have no tax, and all counts are measured on the same text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from generating import WORDS, write_records
from tiny import save_tiny, tiny_llama, tiny_tokenizer

from parallelmind.config import DataConfig, RopeConfig
from parallelmind.data.held_out import HeldOut
from parallelmind.errors import UserError
from parallelmind.evaluation.branch_tax import tax_curve
from parallelmind.evaluation.peak_memory import PeakMemory, memory_in_use
from parallelmind.model.patch import patch
from parallelmind.training.step import NoMemoryError
from workloads.evaluate import tax as tax_module
from workloads.evaluate.command import main as evaluate

TEXTS = [" ".join(np.random.default_rng(n).choice(WORDS, 3 + n)) for n in range(8)]
ISOLATED = ["visibility=isolated", "rope_2d_ratio=0", "positions=time"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def standalone_texts(tmp_path):
    """A file of texts that are grouped into samples."""
    write_records(tmp_path / "texts.jsonl", [{"text": text} for text in TEXTS])
    return tmp_path / "texts.jsonl"


def measure(tiny: str, data: Path, *settings: str) -> dict[str, Any]:
    output = data.parent / "out" / "tax.json"
    evaluate(["tax", f"base_model={tiny}", f"data_path={data}", f"output_path={output}", *settings])
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    return json.loads(output.read_text())


def losses(report: dict[str, Any]) -> dict[int, float]:
    return {point["branches"]: point["loss"] for point in report["points"]}


@torch.no_grad()
def reference_loss() -> float:
    """Nats per token of the texts, each alone, on the plain model."""
    model, tokenizer, total, count = tiny_llama(), tiny_tokenizer(), 0.0, 0
    for text in TEXTS:
        ids = torch.tensor([[*tokenizer(text, add_special_tokens=False).input_ids, tokenizer.eos_token_id]])
        total += float(model(ids, labels=ids).loss) * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    return total / count


def test_isolated_branches_have_no_tax(tiny, standalone_texts, capsys):
    report = measure(tiny, standalone_texts, *ISOLATED, "branches=[2, 4, 8, 16]", "pool=8")
    assert losses(report) == pytest.approx(dict.fromkeys((1, 2, 4, 8), reference_loss()), abs=1e-4)
    assert [point["tax"] for point in report["points"]] == pytest.approx([0] * 4, abs=1e-4)
    assert len({point["targets"] for point in report["points"]}) == 1
    assert all(
        point["tokens_per_second"] > 0 and point["peak_extra_bytes"] >= 0 for point in report["points"]
    )
    assert report["not_measured"] == [{"branches": 16, "largest_sample": 8}]
    out = capsys.readouterr().out
    assert "16 branches: not measured; the largest sample of data_path and batch_tokens has 8" in out
    assert "in 8 branches;" in out


def test_columnar_branches_have_a_tax(tiny, standalone_texts):
    report = measure(tiny, standalone_texts, "visibility=columnar", "branches=[1, 8]")
    assert report["held_out_branches"] == 8
    assert report["points"][0]["tax"] == 0
    assert abs(report["points"][1]["tax"]) > 1e-2
    assert report["points"][1]["tax"] == pytest.approx(losses(report)[8] - losses(report)[1])


def test_unpatched_model_is_measured_at_one_branch(tiny, standalone_texts, capsys):
    report = measure(tiny, standalone_texts, "patch_rope=false")
    assert losses(report) == pytest.approx({1: reference_loss()}, abs=1e-4)
    assert "patch_rope=false: the model holds one branch" in capsys.readouterr().out


def test_branches_of_a_record_keep_their_main(tiny, tmp_path):
    branches = [{"prompt": "who", "completion": f" {text}"} for text in TEXTS]
    write_records(
        tmp_path / "own.jsonl", [{"main": "the passage", "branches": branches[at : at + 3]} for at in (0, 3)]
    )
    report = measure(tiny, tmp_path / "own.jsonl", *ISOLATED, "branches=[1, 2, 3, 4]", "pool=5")
    assert [point["mean_branches"] for point in report["points"]] == pytest.approx([1, 5 / 3, 5 / 2])
    assert [point["tax"] for point in report["points"]] == pytest.approx([0] * 3, abs=1e-4)
    assert report["points"][0]["tokens"] > report["points"][2]["tokens"]  # main is repeated
    assert report["not_measured"] == [{"branches": 4, "largest_sample": 3}]
    assert report["held_out_branches"] == 5


def test_count_above_batch_tokens_is_not_measured(tiny, standalone_texts):
    report = measure(
        tiny, standalone_texts, *ISOLATED, "branches=[8]", "max_branch_tokens=10", "batch_tokens=40"
    )
    assert report["not_measured"] == [{"branches": 8, "largest_sample": 4}]
    assert report["truncated_texts"] > 0


def test_bad_lines_are_reported(tiny, standalone_texts, capsys):
    standalone_texts.write_text("{\n" + standalone_texts.read_text())
    assert measure(tiny, standalone_texts, "branches=[1]")["held_out_branches"] == 8
    assert "skipped 1 bad lines, the first: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["branches=[4, 0]"], "branches=0: .*give counts of 1 or more"),
        (["output_path=tax.png"], "output_path=tax.png: .*end it in .json"),
        (["data_path=nowhere.jsonl"], "data_path=nowhere.jsonl: no such file"),
    ],
)
def test_wrong_arguments_give_a_one_line_error(tiny, settings, message):
    with pytest.raises(UserError, match=message) as error:
        evaluate(["tax", f"base_model={tiny}", "data_path=x.jsonl", *settings])
    assert "\n" not in str(error.value)


def test_text_without_a_target_is_refused(tiny, tmp_path):
    write_records(tmp_path / "none.jsonl", [{"input_ids": [5, 6, 7], "answer_offset": 9}])
    with pytest.raises(UserError, match="leave none of 1 branches usable"):
        measure(tiny, tmp_path / "none.jsonl")


def test_trees_are_refused(tiny, tmp_path):
    question = {"prompt": "who", "completion": " it"}
    records = [{"text": "the answer"}, {"branches": TEXTS[:2], "reduce": question}]
    write_records(tmp_path / "trees.jsonl", records)
    with pytest.raises(
        UserError, match="trees.jsonl: 1 of 2 records have a reduce or nested branches, .*; give"
    ):
        measure(tiny, tmp_path / "trees.jsonl")


def test_every_count_is_measured_on_the_same_text(standalone_texts):
    data = DataConfig(data_path=str(standalone_texts))
    held_out = HeldOut.read([str(standalone_texts)], 5, tiny_tokenizer(), data)
    texts = [
        sorted(map(tuple, (t for batch in held_out.batches(n, 0) for s in batch for t in s.split()[1:])))
        for n in (1, 2, 5)
    ]
    assert len(texts[0]) == 5
    assert texts[0] == texts[1] == texts[2]


def test_tax_is_relative_to_one_branch(standalone_texts):
    model = tiny_llama()
    patch(model, RopeConfig())
    held_out = HeldOut.read(
        [str(standalone_texts)], 8, tiny_tokenizer(), DataConfig(data_path=str(standalone_texts))
    )
    first, second = tax_curve(model, {4: held_out.batches(4, 0), 1: held_out.batches(1, 0)}, pad_id=0)
    assert (first.branches, first.tax, second.branches) == (1, 0, 4)
    assert second.mean_branches == 4


def test_peak_memory_is_kept_after_it_is_freed():
    before = memory_in_use()
    with PeakMemory() as peak:
        torch.ones(64 << 20, dtype=torch.uint8).sum()
    assert peak.max_bytes - before > 48 << 20


def test_out_of_memory_error_names_the_fields_of_this_command(
    tiny: str, standalone_texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def curve(*_: object) -> Any:
        raise NoMemoryError("out of memory on a batch of 2 x 99 tokens, up to 4 branches each")
        yield

    monkeypatch.setattr(tax_module, "tax_curve", curve)
    with pytest.raises(
        UserError, match=r"^batch_tokens=8192: out of memory on a batch of 2 x 99 .*; lower it, or drop "
    ):
        measure(tiny, standalone_texts)


def test_an_output_that_is_an_input_is_refused(tiny, standalone_texts, tmp_path):
    data = tmp_path / "texts.json"
    data.write_bytes(standalone_texts.read_bytes())
    for output, message in ((data, "is data_path="), (Path(tiny) / "config.json", "lies in base_model=")):
        before = output.read_bytes()
        with pytest.raises(UserError, match=message):
            evaluate(["tax", f"base_model={tiny}", f"data_path={data}", f"output_path={output}"])
        assert output.read_bytes() == before
