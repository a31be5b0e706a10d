"""An output that would replace an input is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from parallelmind.errors import UserError
from parallelmind.outputs import check_output


@pytest.mark.parametrize(
    ("output", "relation"),
    [("model/config.json", "lies in"), ("model", "is"), (".", "holds"), ("link/new.json", "lies in")],
)
def test_an_output_that_meets_an_input_is_refused(tmp_path: Path, output: str, relation: str) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "model")
    with pytest.raises(UserError, match=f"output_path=.*: {relation} base_model=.*/model; give another path"):
        check_output(tmp_path / output, "output_path", lora_path=[None], base_model=[tmp_path / "model"])


def test_other_outputs_and_inputs_that_are_not_local_are_accepted(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    inputs = {
        "base_model": [tmp_path / "model", "org/name"],
        "data_path": ["https://host/data.jsonl", tmp_path / "missing"],
    }
    for output in ("model-2", "model/results/tax.json"):
        check_output(tmp_path / output, "output_path", **inputs)
