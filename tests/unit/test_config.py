from __future__ import annotations

import resource
import signal
from pathlib import Path

import pytest

from parallelmind.config import FrozenConfig, LoraConfig, RopeConfig, TrainConfig, resolve
from parallelmind.config.yaml_file import load_yaml, save_yaml
from parallelmind.errors import UserError
from workloads.data.convert import ConvertConfig
from workloads.export import ExportConfig
from workloads.generate.config import GenerateConfig


def train(*dotlist: str, **values: object) -> TrainConfig:
    return resolve(TrainConfig, {"data_path": "facts.jsonl", **values}, dotlist)


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("rope_2d_ratoi=0.5", ["rope_2d_ratoi", "rope_2d_ratio", "--help"]),
        ("rope_2d_ratio=1.5", ["rope_2d_ratio=1.5", "less than or equal to 1"]),
        ("lora_rank=many", ["lora_rank=many", "integer"]),
        ("dtype=float64", ["dtype=float64", "'float32', 'bfloat16' or 'float16'"]),
        ("align_to=top", ["align_to=top", "'left' or 'right'"]),
        ("min_branches_per_sample=9", ["min_branches_per_sample=9", "max_branches_per_sample=8", "lower"]),
        ("branches_per_sample=9", ["branches_per_sample=9", "max_branches_per_sample=8", "raise"]),
        ("patch_rope=false", ["patch_rope=false", "branches_per_sample=1"]),
        ("name=a/b", ["name=a/b", "pattern"]),
        ("learning_rate=0", ["learning_rate=0", "greater than 0"]),
    ],
)
def test_an_error_names_field_value_and_remedy(override: str, told: list[str]) -> None:
    with pytest.raises(UserError) as error:
        train(override)
    assert all(part in str(error.value) for part in told)
    assert "\n" not in str(error.value)


def test_a_missing_required_field_is_named() -> None:
    with pytest.raises(UserError, match=r"data_path: required and not given; add data_path="):
        resolve(TrainConfig, {})


def test_every_problem_is_told_at_once() -> None:
    with pytest.raises(UserError, match=r"lora_rank=0.*; .*batch_size=0"):
        train("lora_rank=0", "batch_size=0")


def test_a_malformed_override_is_one_line() -> None:
    with pytest.raises(UserError, match="write key=value") as error:
        train("lora_rank=[1,")
    assert "\n" not in str(error.value)


def test_the_dotlist_wins_over_the_values_and_keeps_types() -> None:
    config = train(
        "lora_rank=4",
        "learning_rate=1e-3",
        "validation_branches=[1,2]",
        "max_steps=null",
        lora_rank=8,
        max_steps=3,
    )
    assert (config.lora_rank, config.learning_rate, config.validation_branches, config.max_steps) == (
        4,
        1e-3,
        [1, 2],
        None,
    )


def test_yaml_gives_the_same_run_again(tmp_path: Path) -> None:
    config = train("rope_2d_ratio=0.25", "learning_rate=3e-5", "pairs=spread", data_path="ünï 数据.jsonl")
    save_yaml(config, tmp_path / "config.yaml")
    again = resolve(TrainConfig, load_yaml(tmp_path / "config.yaml"))
    assert again == config
    assert again.fingerprint() == config.fingerprint()


def test_a_disk_that_fills_up_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    """Cut short it would be refused by every later start of the run."""
    file = tmp_path / "config.yaml"
    save_yaml(train(), file)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(
        signal.SIGXFSZ, signal.SIG_IGN
    )  # a file at its limit is an OSError then, as on a full disk
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with pytest.raises(OSError, match="too large"):
            save_yaml(train(lora_rank=3), file)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert load_yaml(file) == train().model_dump(mode="json")
    assert list(tmp_path.iterdir()) == [file]


def test_the_fingerprint_tells_settings_apart_and_nothing_else() -> None:
    assert train("lora_rank=4").fingerprint() == train(lora_rank=4).fingerprint() != train().fingerprint()
    assert len(train().fingerprint()) == 12


def test_part_gives_the_fields_of_one_kind_alone() -> None:
    config = train("lora_rank=4", "branch_stride=7")
    assert config.part(LoraConfig) == LoraConfig(lora_rank=4)
    assert config.part(RopeConfig) == RopeConfig(branch_stride=7)


def test_a_config_is_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        train().lora_rank = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("text", "told"), [(None, "no such file"), ("- a\n", "no mapping"), ("a: [", "not readable as YAML")]
)
def test_an_unreadable_file_is_named(tmp_path: Path, text: str | None, told: str) -> None:
    path = tmp_path / "run.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=told) as error:
        load_yaml(path)
    assert str(path) in str(error.value)


def test_every_field_says_what_it_means() -> None:
    assert [name for name, field in TrainConfig.model_fields.items() if not field.description] == []


@pytest.mark.parametrize("kind", [ConvertConfig, ExportConfig, GenerateConfig])
def test_a_uri_to_write_to_is_refused(kind: type[FrozenConfig]) -> None:
    """As a path it would be a folder `s3:` in this one."""
    with pytest.raises(
        UserError, match=r"output_path=s3://bucket/out\.jsonl: a URI, .*; give a path, and copy it there"
    ):
        resolve(kind, {"output_path": "s3://bucket/out.jsonl"})
