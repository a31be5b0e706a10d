"""`workloads.evaluate support`: the table of model types on stdout and in a document."""

from __future__ import annotations

import csv
import io

import pytest
from disk import file_size_limit

from parallelmind.errors import UserError
from parallelmind.evaluation.laws import LAWS
from parallelmind.evaluation.tiny_models import causal_lm_types
from workloads.evaluate import support
from workloads.evaluate.command import main as evaluate
from workloads.evaluate.support import SupportRow, text_above_table, write_markdown


def test_table_as_csv(capsys):
    evaluate(["support", "model_types=llama, gptj,mamba", "--csv"])
    first, *rows = csv.reader(io.StringIO(capsys.readouterr().out))
    assert first == ["model_type", "family", "supported", "reason", "laws"]
    assert [(row[0], row[2]) for row in rows] == [("llama", "yes"), ("gptj", "yes"), ("mamba", "no")]
    assert rows[0][4].split() == list(LAWS)
    assert "recurrent" in rows[2][3]


def test_table_in_a_document_keeps_the_text_above_its_marker(tmp_path):
    path = tmp_path / "models.md"
    rows = [
        SupportRow("llama", "shared", True, "", ("unpatch",)),
        SupportRow("odd", "not built", False, "a | b", ()),
    ]
    write_markdown(path, text_above_table(path), rows)
    path.write_text("handwritten\n\n" + path.read_text())
    write_markdown(path, text_above_table(path), rows[:1])
    text = path.read_text()
    assert text.startswith("handwritten\n\n<!-- generated")
    assert "| llama | shared | yes |  | unpatch |" in text
    assert "odd" not in text
    with file_size_limit(20), pytest.raises(UserError, match="cannot be written"):
        write_markdown(path, text_above_table(path), rows)
    assert path.read_text() == text


@pytest.mark.parametrize("content", ["handwritten only\n", None])
def test_a_document_that_cannot_hold_the_table_is_refused_before_any_type_is_checked(
    tmp_path, monkeypatch, content
):
    path = tmp_path / "models.md"
    path.mkdir() if content is None else path.write_text(content)
    monkeypatch.setattr(support, "check_model_types", lambda model_types: pytest.fail("checked"))
    message = "has no line <!-- generated" if content else "cannot be read"
    with pytest.raises(UserError, match=f"^output_path={path}: .*{message}"):
        support.evaluate_support(["model_types=llama", f"output_path={path}"])
    assert path.is_dir() or path.read_text() == content


def test_unknown_types_and_evaluations_are_refused():
    with pytest.raises(UserError, match="model_types=nix"):
        evaluate(["support", "model_types=nix"])
    with pytest.raises(
        UserError, match="evaluate tables: unknown evaluation; choose one of answers, tax, attention, support"
    ):
        evaluate(["tables"])
    assert "llama" in causal_lm_types()
