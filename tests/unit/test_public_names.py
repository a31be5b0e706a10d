"""The names of `import parallelmind as pm`, its hints, and what a notebook shows of an error."""

from __future__ import annotations

import subprocess
import sys

import pytest

import parallelmind as pm
from parallelmind.errors import DecodingError


def test_dir_lists_the_public_names_alone() -> None:
    assert dir(pm) == sorted(pm.__all__)
    assert all(getattr(pm, name) is not None for name in dir(pm))


def test_a_wrong_name_is_answered() -> None:
    with pytest.raises(AttributeError, match=r"no attribute 'genrate'; did you mean generate\?"):
        pm.genrate  # noqa: B018


@pytest.mark.parametrize(
    "error", [pm.UserError("field=1: too low; give 2"), DecodingError("branches[0]: no")]
)
def test_a_notebook_shows_one_line(error: Exception) -> None:
    """IPython prints these lines in place of a traceback."""
    assert error._render_traceback_() == [f"error: {error}"]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("kind", "name", "hint"),
    [
        (pm.SamplingParams, "max_tokens", "max_new_tokens"),
        (pm.EngineConfig, "cache_token", "cache_tokens"),
        (pm.Sample, "mian", "main"),
        (pm.Segment, "txt", "text"),
    ],
)
def test_an_unknown_keyword_is_one_line_with_a_hint(kind: type, name: str, hint: str) -> None:
    with pytest.raises(pm.UserError, match=rf"^{name}=8: unknown field of .* \(did you mean {hint}\?\)"):
        kind(**{name: 8})


def test_the_names_load_on_first_use() -> None:
    script = "import sys, parallelmind; dir(parallelmind); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_training_takes_a_config_or_fields(monkeypatch: pytest.MonkeyPatch) -> None:
    from workloads.train import run

    trained: list[pm.TrainConfig] = []
    monkeypatch.setattr(run, "run_training", lambda config: trained.append(config) or _RunDir)
    pm.train(pm.TrainConfig(data_path="a.jsonl"), lora_rank=4)
    pm.train(data_path="a.jsonl", lora_rank=4)
    assert trained[0] == trained[1]
    pm.train("demo", validation_branches=[1, 2])
    assert trained[2].metrics.validation_branches == [1, 2]
    with pytest.raises(pm.UserError, match=r"lora_r: unknown field \(did you mean lora_rank\?\)"):
        pm.train(data_path="a.jsonl", lora_r=4)


class _RunDir:
    class result:  # noqa: N801
        local = "runs/a"
