"""Configurations: flat values in, groups in code, the same files and hashes as always."""

from __future__ import annotations

import math
import re
import resource
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import Field, create_model

from parallelmind.config import (
    FrozenConfig,
    GroupedConfig,
    LoraConfig,
    ModelConfig,
    RopeConfig,
    TrainConfig,
    resolve,
)
from parallelmind.config.yaml_file import dump_yaml, load_yaml, parse_yaml, save_yaml
from parallelmind.errors import UserError
from parallelmind.storage import expand_home
from tools.reference import COMMANDS
from workloads.data.convert import ConvertConfig
from workloads.export import ExportConfig
from workloads.generate.config import GenerateConfig
from workloads.sweep.config import SweepConfig

# A config.yaml that an earlier version wrote, the hash that it gave the run, and the hash of the defaults.
WRITTEN_BEFORE = """\
base_model: smollm2-135m
dtype: float32
quantize: none
trust_remote_code: false
patch_rope: true
rope_2d_ratio: 0.5
pairs: high
branch_angle: added
branch_stride: 16
positions: time
visibility: columnar
sibling_penalty: 0.0
align_to: left
lora_rank: 4
lora_alpha: 32
lora_dropout: 0.0
lora_targets: all-linear
lora_init: zero
use_rslora: false
use_dora: false
data_path: ünï 数据.jsonl
validation_path: '1e3'
branches_per_sample: null
min_branches_per_sample: 1
max_branches_per_sample: 8
overfull: split
batch_size: 4
batch_by_samples: true
batch_tokens: null
length_window: 32
random_time_offset: 0
max_branch_tokens: 512
max_sample_tokens: 4096
overlong: truncate
strict: false
max_bad_records: null
shuffle_window: 1024
tuning: lora
resume_adapter: null
epochs: 1
max_steps: 100
learning_rate: 3.0e-05
schedule: cosine
warmup_ratio: 0.05
weight_decay: 0.0
gradient_clip: 1.0
accumulation_steps: 1
max_bad_steps: 10
gradient_checkpointing: false
seed: 0
name: 'no'
output_dir: runs
num_workers: 4
min_workers: null
sharding: none
use_gpu: false
checkpoint_every: 100
keep_checkpoints: 2
log_every: 5
validate_every: 100
validation_branches:
- 1
- 2
validation_samples: 32
mlflow_uri: sqlite:///mlflow.db
mlflow_experiment: '2026-11-28'
ray_address: null
"""
WRITTEN_BEFORE_HASH, EARLIER_DEFAULT_HASH, DEFAULT_HASH = "6f45b84d7d1f", "f1630d4abc9c", "0590a45aaf58"


def train(*overrides: str, **values: object) -> TrainConfig:
    return resolve(TrainConfig, {"data_path": "facts.jsonl", **values}, overrides)


def test_config_yaml_and_hash_stay_as_an_earlier_version_wrote_them(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(WRITTEN_BEFORE, encoding="utf-8")
    config = resolve(TrainConfig, load_yaml(path))
    save_yaml(config, path)
    later = tuple(f"{name}: " for name in TrainConfig.later_fields())
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    assert "".join(line for line in lines if not line.startswith(later)) == WRITTEN_BEFORE
    assert config.earlier_fingerprint() == WRITTEN_BEFORE_HASH
    assert train(accumulation_steps=1, dtype="float32").earlier_fingerprint() == EARLIER_DEFAULT_HASH
    assert train(dtype="float32").fingerprint() == DEFAULT_HASH


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("rope_2d_ratoi=0.5", ["rope_2d_ratoi", "rope_2d_ratio", "--help"]),
        ("rope_2d_ratio=1.5", ["rope_2d_ratio=1.5", "less than or equal to 1"]),
        ("lora_rank=many", ["lora_rank=many", "integer"]),
        ("dtype=float64", ["dtype=float64", "'bfloat16', 'float16' or 'auto'"]),
        ("align_to=top", ["align_to=top", "'left' or 'right'"]),
        ("min_branches_per_sample=9", ["min_branches_per_sample=9", "max_branches_per_sample=8", "lower"]),
        ("branches_per_sample=9", ["branches_per_sample=9", "max_branches_per_sample=8", "raise"]),
        ("patch_rope=false", ["patch_rope=false", "branches_per_sample=1"]),
        ("patch_rope=false branches_per_sample=1", ["patch_rope=false", "max_branches_per_sample=1"]),
        ("patch_rope=false max_branches_per_sample=8", ["patch_rope=false", "max_branches_per_sample=1"]),
        ("name=a/b", ["name=a/b", "pattern"]),
        ("learning_rate=0", ["learning_rate=0", "greater than 0"]),
        ("rope={patch_rope: false}", ["rope: unknown field", "--help"]),
        ("rope.patch_rope=false", ["rope: unknown field", "--help"]),
    ],
)
def test_an_error_names_field_value_and_remedy(override: str, parts: list[str]) -> None:
    with pytest.raises(UserError) as error:
        train(*(override.split() if "{" not in override else [override]))
    assert all(part in str(error.value) for part in parts)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (
            "global_batch_size=10 num_workers=2",
            ["global_batch_size=10: is no multiple of batch_size=4 x num_workers=2", "a multiple of 8"],
        ),
        (
            "global_batch_size=6144 batch_tokens=4096",
            ["global_batch_size=6144: is no multiple of batch_tokens=4096 x num_workers=1"],
        ),
        (
            "global_batch_size=16 accumulation_steps=3",
            ["accumulation_steps=3: global_batch_size=16 with batch_size=4 x num_workers=1 makes it 4"],
        ),
    ],
)
def test_a_step_that_cannot_be_divided_is_refused(overrides: str, parts: list[str]) -> None:
    test_an_error_names_field_value_and_remedy(overrides, parts)


def test_a_missing_required_field_is_named() -> None:
    with pytest.raises(UserError, match=r"^data_path: required and not given; add data_path=…$"):
        resolve(TrainConfig, {})


def test_all_problems_are_reported_at_once() -> None:
    with pytest.raises(UserError, match=r"^lora_rank=0.*; batch_size=0.*; lora_rnak: unknown field"):
        train("lora_rank=0", "batch_size=0", "lora_rnak=1")


@pytest.mark.parametrize(
    "override", ["lora_rank=[1,", "lora_rank=&a [*a]", "validation_branches={a: 1, a: 2}"]
)
def test_a_malformed_override_is_one_line(override: str) -> None:
    with pytest.raises(UserError, match="write key=value") as error:
        train(override)
    assert "\n" not in str(error.value)


def test_overrides_win_over_values_and_keep_types() -> None:
    config = train(
        "lora_rank=4",
        "learning_rate=1e-3",
        "validation_branches=[1,2]",
        "max_steps=null",
        lora_rank=8,
        max_steps=3,
    )
    assert config.lora.lora_rank == 4
    assert config.optimizer.learning_rate == 1e-3
    assert config.metrics.validation_branches == [1, 2]
    assert config.optimizer.max_steps is None


@pytest.mark.parametrize(
    "text", ["1: why?", "${oc.env:HOME}", "yes", "2026-11-28", "'", "a\\b", "[1,", "😀", " "]
)
def test_the_value_of_a_text_field_is_literal(text: str) -> None:
    assert train(f"validation_path={text}").data.validation_path == text


def test_null_switches_an_optional_text_field_off() -> None:
    assert train("validation_path=null", validation_path="a").data.validation_path is None


class Nested(FrozenConfig):
    train: TrainConfig
    space: dict[str, Any] = Field({}, description="values by field")


def nested(*overrides: str) -> Nested:
    return resolve(Nested, {"train": {"data_path": "a"}, "space": {"seed": [1]}}, overrides)


def test_dotted_keys_reach_into_nested_configs_and_mappings() -> None:
    config = nested("train.max_steps=2", "space.lora_rank=[1,2]", "space={epochs: [3]}")
    assert config.train.optimizer.max_steps == 2
    assert config.train.data.data_path == "a"
    assert config.space == {"seed": [1], "lora_rank": [1, 2], "epochs": [3]}
    assert nested("space.seed.low=1").space == {"seed": {"low": 1}}


def test_an_error_in_a_nested_config_has_no_group_in_its_name() -> None:
    with pytest.raises(
        UserError, match=r"^train\.lora_rank=0: should be greater.*; train\.lora_rnk: unknown"
    ):
        nested("train.lora_rank=0", "train.lora_rnk=1")


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (
            lambda: TrainConfig(data_path="a", lora_rnak=8),
            "lora_rnak: unknown field (did you mean lora_rank?); docs/reference.md lists them all",
        ),
        (lambda: TrainConfig(), "data_path: required and not given; add data_path=…"),
        (lambda: RopeConfig(visibility="all"), "visibility=all: should be 'columnar' or 'isolated'"),
        (
            lambda: SweepConfig(train={"data_path": "a", "lora_rank": 0}, space={"lora_alpha": [1]}),
            "train.lora_rank=0: should be greater than or equal to 1",
        ),
        (
            lambda: TrainConfig(data_path="a").replace(lora_rank=0),
            "lora_rank=0: should be greater than or equal to 1",
        ),
    ],
)
def test_an_error_in_python_is_one_line(make: Callable[[], FrozenConfig], line: str) -> None:
    with pytest.raises(UserError) as error:
        make()
    assert str(error.value) == line


def test_overrides_leave_the_given_values_alone() -> None:
    values = {"train": {"data_path": "a"}, "space": {"seed": [1]}}
    resolve(Nested, values, ["train.max_steps=2", "space={epochs: [3]}"])
    assert values == {"train": {"data_path": "a"}, "space": {"seed": [1]}}


def test_flat_values_and_group_instances_give_the_same_config() -> None:
    flat = TrainConfig(data_path="a", branch_stride=7, align_to="right")
    grouped = TrainConfig(rope=RopeConfig(branch_stride=7), align_to="right", data_path="a")
    assert flat == grouped
    assert flat.rope == RopeConfig(branch_stride=7, align_to="right")
    assert flat.lora == LoraConfig()


def test_a_config_is_dumped_flat() -> None:
    config = nested()
    assert list(config.train.model_dump()) == list(TrainConfig.flat_fields())
    assert config.model_dump(mode="json")["train"] == config.train.model_dump(mode="json")
    assert TrainConfig.model_validate(config.train.model_dump()) == config.train


def test_infinity_survives_a_dump() -> None:
    dump = resolve(Nested, {"train": {"data_path": "a", "sibling_penalty": math.inf}}).model_dump(mode="json")
    assert dump["train"]["sibling_penalty"] == math.inf


def test_replace_takes_flat_fields_and_validates() -> None:
    config = train(lora_rank=8)
    assert config.replace(num_workers=2) == train(lora_rank=8, num_workers=2)
    with pytest.raises(ValueError, match="num_workers"):
        config.replace(num_workers=0)


def test_field_names_are_unique_across_groups() -> None:
    names = [name for group in TrainConfig.groups().values() for name in group.model_fields]
    assert len(names) == len(set(names))
    assert set(names).isdisjoint(TrainConfig.groups())
    assert list(TrainConfig.flat_fields()) == names
    assert TrainConfig.field_owners()["visibility"] is RopeConfig

    class Other(FrozenConfig):
        branch_stride: int = 1

    with pytest.raises(TypeError, match="Ambiguous: field names are not unique across groups: branch_stride"):

        class Ambiguous(GroupedConfig):
            rope: RopeConfig
            other: Other


def test_yaml_gives_the_same_run_again(tmp_path: Path) -> None:
    config = train("rope_2d_ratio=0.25", "learning_rate=3e-5", "pairs=spread", data_path="ünï 数据.jsonl")
    save_yaml(config, tmp_path / "config.yaml")
    again = resolve(TrainConfig, load_yaml(tmp_path / "config.yaml"))
    assert again == config
    assert again.fingerprint() == config.fingerprint()


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2e-4", 2e-4),
        ("1E5", 1e5),
        (".5", 0.5),
        ("1.", 1.0),
        (".inf", math.inf),
        ("12", 12),
        ("yes", True),
        ("2026-11-28", "2026-11-28"),
        ("1e", "1e"),
        ("~", None),
        ("", None),
        ("${a}", "${a}"),
    ],
)
def test_yaml_scalars(text: str, value: object) -> None:
    assert parse_yaml(text) == value
    assert type(parse_yaml(text)) is type(value)


@pytest.mark.parametrize(
    "text", ["1e3", "1_000", "nan", "No", "y", "2026-11-28", "null", "a: b", "#", "", "😀"]
)
def test_text_is_quoted_where_it_could_be_read_as_something_else(text: str) -> None:
    assert parse_yaml(dump_yaml({"value": text})) == {"value": text}


def test_a_disk_that_fills_up_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    """A truncated config.yaml would be refused by every later start of the run."""
    file = tmp_path / "config.yaml"
    save_yaml(train(), file)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(
        signal.SIGXFSZ, signal.SIG_IGN
    )  # a file at its limit raises OSError, as a full disk
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with pytest.raises(OSError, match="too large"):
            save_yaml(train(lora_rank=3), file)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert load_yaml(file) == train().model_dump(mode="json")
    assert list(tmp_path.iterdir()) == [file]


def test_the_fingerprint_covers_the_settings_and_nothing_else() -> None:
    assert train("lora_rank=4").fingerprint() == train(lora_rank=4).fingerprint() != train().fingerprint()
    assert len(train().fingerprint()) == 12


def test_the_fingerprint_covers_the_samples_of_a_step_and_not_who_computes_them() -> None:
    shares = [
        {"global_batch_size": 16},
        {"global_batch_size": 16, "num_workers": 2},
        {"num_workers": 4},
        {"num_workers": 2, "accumulation_steps": 2},
        {"accumulation_steps": 4, "name": "other"},
        {"batch_size": 4, "global_batch_size": 16, "accumulation_steps": 2, "num_workers": 2},
    ]
    assert len({train(**values).fingerprint() for values in shares}) == 1
    assert {train(**values).batches_per_step for values in shares} == {4}
    others = [{"num_workers": 2}, {"batch_size": 8, "global_batch_size": 16}, {"accumulation_steps": 2}]
    assert train(**shares[0]).fingerprint() not in {train(**values).fingerprint() for values in others}


def test_a_stored_config_keeps_its_identity_on_other_workers() -> None:
    stored = train(num_workers=2, accumulation_steps=2).with_global_batch_size()
    assert (stored.optimizer.global_batch_size, stored.optimizer.accumulation_steps) == (16, None)
    assert stored.fingerprint() == train(num_workers=2, accumulation_steps=2).fingerprint()
    assert stored.replace(num_workers=1).fingerprint() == stored.fingerprint()
    tokens = train(batch_tokens=4096, accumulation_steps=2).with_global_batch_size()
    assert tokens.optimizer.global_batch_size == 8192


class _Group(FrozenConfig):
    old: int = 1


class _LaterGroup(_Group):
    LATER_FIELDS = frozenset({"new"})
    new: int = 2


class _Config(GroupedConfig):
    group: _Group = Field(default_factory=_Group)


class _LaterConfig(GroupedConfig):
    group: _LaterGroup = Field(default_factory=_LaterGroup)


class _Nested(GroupedConfig):
    inner: _Config = Field(default_factory=_Config)


class _LaterNested(GroupedConfig):
    inner: _LaterConfig = Field(default_factory=_LaterConfig)


def test_a_later_field_at_its_default_keeps_the_fingerprint() -> None:
    before = _Config().fingerprint()
    assert _LaterConfig().fingerprint() == before
    assert _LaterConfig.model_validate({"new": 3}).fingerprint() != before
    assert _LaterNested().fingerprint() == _Nested().fingerprint()
    assert _LaterNested.model_validate({"inner": {"new": 3}}).fingerprint() != _Nested().fingerprint()


def test_a_config_is_frozen() -> None:
    with pytest.raises(
        UserError, match=r"^lora_rank: a LoraConfig is frozen; make another one with lora_rank="
    ):
        train().lora.lora_rank = 3  # type: ignore[misc]
    with pytest.raises(UserError, match=r"^lora: a TrainConfig is frozen"):
        train().lora = LoraConfig()  # type: ignore[misc]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (None, "no such file"),
        ("- a\n", "no mapping"),
        ("", "no mapping"),
        ("a: [", "not valid YAML"),
        ("a: 1\na: 2\n", "not valid YAML"),
        ("a: &a [*a]\n", "not valid YAML"),
    ],
)
def test_an_unreadable_file_is_named(tmp_path: Path, text: str | None, problem: str) -> None:
    path = tmp_path / "run.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=problem) as error:
        load_yaml(path)
    assert str(path) in str(error.value)


def test_a_file_of_comments_sets_nothing(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("# lora_rank: 4\n")
    assert load_yaml(tmp_path / "run.yaml") == {}


def test_every_field_has_a_description() -> None:
    assert [name for name, field in TrainConfig.flat_fields().items() if not field.description] == []


@pytest.mark.parametrize("kind", [ConvertConfig, ExportConfig, GenerateConfig])
def test_a_uri_as_output_is_refused(kind: type[FrozenConfig]) -> None:
    """As a path it would be a local folder `s3:`."""
    with pytest.raises(
        UserError, match=r"output_path=s3://bucket/out\.jsonl: is a URI, .*; give a local path, and copy"
    ):
        resolve(kind, {"output_path": "s3://bucket/out.jsonl"})


AS_WRITTEN = {"data_path", "validation_path", "base_model", "output_dir"}  # `~` is expanded by their readers
PATH_FIELDS = {
    f"{owner.__name__}.{name}": (owner, name)
    for kind in COMMANDS.values()
    for name, owner in kind.field_owners().items()
    if re.search(r"(_path|_dir|_root|_file|_uri|_adapter|^adapters)$", name) and name not in AS_WRITTEN
}


@pytest.mark.parametrize(("owner", "name"), PATH_FIELDS.values(), ids=PATH_FIELDS)
def test_tilde_is_the_home_folder_in_every_path(
    owner: type[FrozenConfig], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    prefix = "sqlite:///" if name.endswith("_uri") else ""
    values: Any = {"a": "~/x.png"} if name == "adapters" else f"{prefix}~/x.png"
    field = owner.model_fields[name]
    kind = create_model("Only", __base__=FrozenConfig, **{name: (field.annotation, field)})  # type: ignore[call-overload]
    given = getattr(resolve(kind, {name: values}), name)
    assert (given["a"] if name == "adapters" else given) == f"{prefix}{tmp_path}/x.png"


def test_a_name_that_starts_with_a_tilde_is_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "~root").touch()
    names = ["~root", "~nobody-of-this-name/x", "a/~/b", "models:/name@champion"]
    assert [expand_home(name) for name in names] == names
    assert expand_home("~") == str(tmp_path / "home")


def test_a_run_keeps_its_data_path_as_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """Earlier versions hashed it so."""
    monkeypatch.setenv("HOME", "/home/one")
    config = TrainConfig(data_path="~/a.jsonl", base_model="~/model", output_dir="~/runs", dtype="float32")
    assert config.model_dump()["data_path"] == "~/a.jsonl"
    assert config.replace(accumulation_steps=1).earlier_fingerprint() == "ffccbb5ccb27"


def test_a_configuration_with_a_list_is_a_key() -> None:
    """Loaded tokenizers are cached by their ModelConfig."""
    first, same, other = (ModelConfig(add_tokens=tokens) for tokens in (["<a>"], ["<a>"], ["<b>"]))
    assert (hash(first), len({first, same, other})) == (hash(same), 2)
    assert len({train(), train(), train("epochs=2")}) == 2
