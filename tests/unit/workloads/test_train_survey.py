"""What a run tells about its data and its tokenizer before training begins."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny import save_tiny, tiny_tokenizer

from parallelmind.config import ModelConfig, TrainConfig
from parallelmind.data.duplicates import ALL_BYTES
from parallelmind.data.epoch_estimate import EpochEstimate
from parallelmind.data.pipeline import start_batch_server, survey_files
from parallelmind.errors import UserError
from parallelmind.model.base_model import load_tokenizer
from parallelmind.model.vocabulary import check_vocabulary
from parallelmind.remote import RemotePath
from workloads.train.data_files import DataFiles
from workloads.train.prepare import begin
from workloads.train.run_dir import RunDir
from workloads.train.survey import check_limits, print_estimate, survey_data


def write(path: Path, *records: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def texts(*values: str) -> list[dict[str, Any]]:
    return [{"text": value} for value in values]


def warnings(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]


def survey(tmp_path: Path, config: TrainConfig) -> None:
    quarantine_file = RemotePath(tmp_path / "quarantine.jsonl")
    survey_data(DataFiles.find(config.data), config.data, config.rope, 300, quarantine_file)


def test_repeated_shared_and_ignored_contents_are_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = {f"key{number}": number for number in range(7)}
    train = write(tmp_path / "train.jsonl", *texts("a", "b", "a"), {"text": "c", **keys})
    held_out = write(tmp_path / "held_out.jsonl", *texts("x", "a", "y"), {"text": "b", "id": 1})
    survey(tmp_path, TrainConfig(data_path=train, validation_path=held_out))
    out, err = capsys.readouterr()
    assert "data: 4 records, 4 branches, 0 bad lines, 1 repeated records, key 'key0' ignored in 1, " in out
    assert ", 2 more keys ignored\n" in out
    assert "validation data: 4 records, 4 branches, 0 bad lines, key 'id' ignored in 1\n" in out
    assert f"validation_path={held_out}: 2 of 4 records are also in data_path={train}, so" in err


def test_data_without_anything_to_tell_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    survey(tmp_path, TrainConfig(data_path=write(tmp_path / "train.jsonl", *texts("a", "b"))))
    assert capsys.readouterr() == ("data: 2 records, 2 branches, 0 bad lines\n", "")


TREE = {"branches": [{"text": "a", "branches": ["b", "c"]}], "reduce": "d"}


def test_trees_are_counted_and_need_the_patch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trees = write(tmp_path / "trees.jsonl", TREE, *texts("a"), {"branches": ["a", "b"]})
    flat = write(tmp_path / "flat.jsonl", *texts("a", "b"))
    survey(tmp_path, TrainConfig(data_path=trees))
    assert capsys.readouterr().out == "data: 3 records (1 trees), 6 branches, 0 bad lines\n"
    unpatched: dict[str, Any] = {"patch_rope": False, "max_branches_per_sample": 1}
    survey(tmp_path, TrainConfig(data_path=flat, **unpatched))
    for paths in ({"data_path": trees}, {"data_path": flat, "validation_path": trees}):
        name = list(paths)[-1]
        with pytest.raises(
            UserError, match=f"patch_rope=false: 1 records of {name}={trees} .*; drop patch_rope"
        ):
            survey(tmp_path, TrainConfig(**paths, **unpatched))


def test_data_of_trees_of_which_nothing_is_left_is_refused(
    with_tokenizer: Callable[..., ModelConfig], tmp_path: Path
) -> None:
    path = write(tmp_path / "trees.jsonl", {"main": "who " * 9, "branches": ["a", "b"], "reduce": "d"})
    settings: dict[str, Any] = {"max_branch_tokens": 8, "overlong": "skip"}
    config = TrainConfig(data_path=path, base_model=with_tokenizer().base_model, **settings)
    files, tokenizer = DataFiles.find(config.data), load_tokenizer(config.model)
    with pytest.raises(UserError, match="leave none of 3 texts"):
        check_limits(survey_files([path], config.data), files, config, tokenizer)


def test_held_out_trees_are_told_to_have_no_branch_tax(
    with_tokenizer: Callable[..., ModelConfig], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "trees.jsonl", {"branches": ["a b", "b c"], "reduce": "d e"}, *texts("a b"))
    config = TrainConfig(data_path=path, validation_path=path, base_model=with_tokenizer().base_model)
    files, tokenizer = DataFiles.find(config.data), load_tokenizer(config.model)
    train = survey_files([path], config.data)
    check_limits(train, files, config, tokenizer)
    (line,) = warnings(capsys)
    assert f"validation_path={path}: 1 of 2 records have a reduce or nested branches" in line
    check_limits(train, files, config.replace(validation_branches=[1]), tokenizer)
    assert not warnings(capsys)


def test_counts_from_a_share_of_the_hashes_are_called_estimates(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("parallelmind.data.pipeline.hash_share", lambda size: 0.5)
    assert ALL_BYTES > 10**8
    numbers = texts(*map(str, range(200)))
    train = write(tmp_path / "train.jsonl", *numbers, *numbers)
    survey(tmp_path, TrainConfig(data_path=train, validation_path=write(tmp_path / "v.jsonl", *numbers)))
    out, err = capsys.readouterr()
    assert ", about " in out
    assert ": about " in err


def test_what_the_limits_remove_is_printed_and_data_without_a_rest_is_refused(
    with_tokenizer: Callable[..., ModelConfig], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long = write(tmp_path / "long.jsonl", {"text": "who " * 9, "answer_offset": 30})
    both = write(tmp_path / "both.jsonl", {"text": "who " * 9}, {"text": "who " * 9, "answer_offset": 30})
    settings = {"base_model": with_tokenizer().base_model, "max_branch_tokens": 8}
    config = TrainConfig.model_validate({"data_path": both, "validation_path": long, **settings})
    tokenizer = load_tokenizer(config.model)
    files = DataFiles.find(config.data)
    assert check_limits(survey_files([both], config.data), files, config, tokenizer).batches == 1
    cut, skipped, held_out = warnings(capsys)
    assert "max_branch_tokens=8 overlong=truncate truncate_side=right: 1 texts are too long" in cut
    assert "max_sample_tokens=4096: 1 texts are skipped" in skipped
    assert f"validation_path={long} max_branch_tokens=8" in held_out
    nothing = TrainConfig.model_validate({"data_path": long, **settings})
    with pytest.raises(UserError, match="max_branch_tokens=8 .*: leave none of 1 texts; raise the limits"):
        check_limits(survey_files([long], nothing.data), DataFiles.find(nothing.data), nothing, tokenizer)


ESTIMATE = EpochEstimate(batches=10, truncated=0, skipped=0, exact=True)


@pytest.mark.parametrize(
    ("estimate", "settings", "told"),
    [
        (ESTIMATE, {}, []),
        (ESTIMATE, {"max_steps": 10}, []),
        (
            ESTIMATE,
            {"max_steps": 21, "epochs": 4, "accumulation_steps": 2},
            ["max_steps=21: training ends before, after 20 steps, as epochs=4"],
        ),
        (
            EpochEstimate(10, 1200, 3, exact=True),
            {},
            [
                "overlong=truncate truncate_side=right: 1,200 texts are",
                "max_sample_tokens=4096: 3 texts are",
            ],
        ),
        (
            EpochEstimate(10, 1200, 3, exact=False),
            {"max_steps": 1000},
            ["about 1,200 texts", "about 3 texts", "max_steps=1000: .* after about 10 steps"],
        ),
    ],
)
def test_limits_and_steps_are_told_before_training(
    estimate: EpochEstimate, settings: dict[str, Any], told: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    config = TrainConfig.model_validate({"data_path": "-", **settings})
    print_estimate(estimate, config.data, config.optimizer, config.batches_per_step)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == len(told)
    for line, text in zip(lines, told, strict=True):
        assert re.search(text, line)
        assert "; " in line


@pytest.fixture(scope="module")
def with_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., ModelConfig]:
    """A tiny model with 300 rows, beside a tokenizer that was changed."""

    def save(*new: str, **special: str | None) -> ModelConfig:
        folder = save_tiny(tmp_path_factory.mktemp("model"))
        tokenizer = tiny_tokenizer()
        tokenizer.add_tokens(list(new))
        for name, token in special.items():
            setattr(tokenizer, name, token)
        tokenizer.save_pretrained(folder)
        return ModelConfig(base_model=folder)

    return save


def test_a_tokenizer_with_a_row_for_every_token_needs_no_note(
    with_tokenizer: Callable[..., ModelConfig],
) -> None:
    assert check_vocabulary(tiny_tokenizer(), with_tokenizer()) == []


def test_tokens_without_a_row_and_a_missing_end_token_are_told_before_ray_starts(
    with_tokenizer: Callable[..., ModelConfig], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = with_tokenizer("<new>", "<newer>", eos_token=None)
    config = TrainConfig(data_path="-", base_model=model.base_model, output_dir=str(tmp_path))
    assert len(begin(config, RunDir.of(config))) == 302
    first, second = warnings(capsys)
    assert f"base_model={model.base_model}: the embedding has 300 rows, and none for 2 tokens" in first
    assert "(the first: '<new>')" in first
    assert "the tokenizer has no end token" in second


def test_a_padding_token_without_a_row_is_refused_before_ray_starts(
    with_tokenizer: Callable[..., ModelConfig], tmp_path: Path
) -> None:
    model = with_tokenizer("[PAD]", pad_token="[PAD]")
    config = TrainConfig(data_path="-", base_model=model.base_model, output_dir=str(tmp_path))
    with pytest.raises(UserError, match=r"300 rows, and none for pad_token '\[PAD\]' \(id 300\); "):
        begin(config, RunDir.of(config))


@pytest.mark.parametrize("record", [{"text": "a <new> b"}, {"input_ids": [5, 300]}])
def test_a_record_with_a_token_without_a_row_is_refused_before_training(
    with_tokenizer: Callable[..., ModelConfig], tmp_path: Path, record: dict[str, Any]
) -> None:
    path = write(tmp_path / "train.jsonl", {"text": "a"}, record)
    config = TrainConfig(data_path=path, base_model=with_tokenizer("<new>").base_model)
    with pytest.raises(UserError, match=r"none for a token of .*train.jsonl, '<new>' \(id 300\); "):
        start_batch_server([path], config.data, config.model, 0, 1)
    good = write(tmp_path / "good.jsonl", {"text": "a"})
    config = config.replace(data_path=good, validation_path=path)
    survey, tokenizer = survey_files([good], config.data), load_tokenizer(config.model)
    with pytest.raises(UserError, match=r"none for a token of validation_path=.*, '<new>' \(id 300\); "):
        check_limits(survey, DataFiles.find(config.data), config, tokenizer)
