"""`--help` reads well on a narrow terminal, on a wide one, and through grep."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from docs import ROOT

from parallelmind import cli
from parallelmind.config import FrozenConfig, TrainConfig
from parallelmind.errors import UserError, format_value
from tools.reference import COMMANDS
from workloads import demo

kinds = pytest.mark.parametrize("kind", COMMANDS.values(), ids=COMMANDS)


@kinds
@pytest.mark.parametrize("width", [80, 120])
def test_fields_fit_the_terminal(kind: type[FrozenConfig], width: int) -> None:
    lines = cli.field_help(kind, width).splitlines()
    assert [line for line in lines if len(line) > width] == []
    words = " ".join(" ".join(lines).split())
    for text in cli.field_texts(kind):
        assert text.meaning in words
        assert any(line.startswith(f"  {text.name} ") for line in lines)


@kinds
def test_without_a_terminal_a_field_is_one_line(kind: type[FrozenConfig]) -> None:
    lines = [line for line in cli.field_help(kind).splitlines() if line.startswith(" ")]
    texts = {text.name: text for text in cli.field_texts(kind)}
    assert sorted(line.split()[0] for line in lines) == sorted(texts)
    assert all(line.endswith(texts[line.split()[0]].meaning) for line in lines)


def test_fields_stand_under_headings_and_required_ones_first() -> None:
    lines = cli.field_help(TrainConfig).splitlines()
    headings = [line for line in lines if line and not line.startswith(" ")]
    assert headings[:3] == ["Required", "Base model", "Branches: 2D RoPE, positions and visibility"]
    assert len(headings) == 1 + len(TrainConfig.groups())
    assert lines[1].startswith("  data_path ")
    assert sum(line.startswith("  data_path ") for line in lines) == 1


def test_a_wide_terminal_has_columns_and_a_narrow_one_has_pairs_of_lines() -> None:
    wide, widest = (
        next(line for line in cli.field_help(TrainConfig, *width).splitlines() if "base_model" in line)
        for width in ([160], [])
    )
    assert wide == widest
    narrow = cli.field_help(TrainConfig, 80).splitlines()
    first = narrow.index("Base model") + 1
    assert narrow[first : first + 2] == [
        '  base_model  str  "smollm2-135m"',
        "      smollm2-135m, a local folder, or a hub id",
    ]


def test_paragraphs_flow_and_commands_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    fixed = "    python -m workloads.train CONFIG.yaml\n\n/main TEXT   set the passage of the prompts"
    assert (
        cli.flowing(f"One line that is\ntoo long for it.\n\n{fixed}\n")
        == f"One line that is too\nlong for it.\n\n{fixed}"
    )


def test_values_are_printed_as_they_are_typed() -> None:
    typed = {"a b": "a b", "": '""', "a\nb": json.dumps("a\nb"), " a": '" a"'}
    assert {value: format_value(value) for value in typed} == typed
    assert [format_value(value) for value in (True, None, 3, 0.5, [1, "a"])] == [
        "true",
        "null",
        "3",
        "0.5",
        '[1, "a"]',
    ]


def test_the_demo_has_no_fields() -> None:
    with pytest.raises(
        UserError, match="lora_rank=4: the demo has no fields; .*workloads.train demo lora_rank=4"
    ):
        demo.main(["lora_rank=4"])


def test_the_demo_ends_with_the_gain_and_its_price() -> None:
    at_once = {"questions_per_second": 7.26, "predictions": [["rice", "flute"], ["goat", ""]]}
    one_by_one = {"questions_per_second": 2.0, "predictions": [["rice", "flute"], ["cat", ""]]}
    assert demo.speed_line(at_once, one_by_one) == (
        "8 at once: 7.3 questions/s; one by one: 2.0; same answers: 3 of 4"
    )


def test_a_command_uses_the_width_of_the_terminal() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "workloads.train", "--help"],
        cwd=ROOT,
        env={"PATH": "", "PYTHONPATH": f"{ROOT / 'platform'}:{ROOT}", "COLUMNS": "80", "PYTHONUTF8": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert max(map(len, done.stdout.splitlines())) <= 80
