"""Ways of asking: where branches cannot meet they say the same in every way, and what each of them costs."""

from __future__ import annotations

import json
from typing import Any

import pytest
from generating import write_records
from tiny import save_tiny, tiny_llama, tiny_tokenizer

from parallelmind.config import RopeConfig
from parallelmind.data.records import Record, parse_value
from parallelmind.engine.request import Sample
from parallelmind.errors import UserError
from parallelmind.evaluation.backends import generate_branches, generate_padded_batch
from parallelmind.evaluation.qa_eval import RecordAnswers, answer_records, score_answers
from parallelmind.model.patch import patch
from workloads.evaluate import command as evaluate

APART = RopeConfig(visibility="isolated", rope_2d_ratio=0, positions="time")
QUESTIONS = ["who", " where is the passage", " what in that 你好", "a question of the answer", " lives"]


def record(main: str = "the answer is in the passage " * 4, **branch: Any) -> Record:
    branches = [{"prompt": question, "completion": " it", **branch} for question in QUESTIONS]
    return parse_value({"main": main, "branches": branches})


def model_with(rope: RopeConfig):
    model = tiny_llama()
    patch(model, rope)
    return model


def ask(rope: RopeConfig, **settings: Any) -> RecordAnswers:
    (found,) = answer_records(model_with(rope), tiny_tokenizer(), [record()], max_new_tokens=8, **settings)
    return found


def test_every_engine_says_the_same_where_branches_cannot_meet():
    together = ask(APART)
    assert len(set(together.predictions)) > 1
    for settings in (
        {"engine": "one_by_one"},
        {"engine": "batch"},
        {"at_once": 2},
        {"engine": "batch", "at_once": 2},
    ):
        other = ask(APART, **settings)
        assert (other.predictions, other.tokens) == (together.predictions, together.tokens)


def test_records_side_by_side_are_answered_as_one_after_another():
    """Questions of a record meet, those of another never do."""
    records = [record(), record("another passage"), record("the third")]
    model, tokenizer = model_with(RopeConfig()), tiny_tokenizer()
    alone, beside = (
        list(answer_records(model, tokenizer, records, at_once=2, records_at_once=count, max_new_tokens=8))
        for count in (1, 2)
    )
    assert [(each.main, each.predictions, each.tokens) for each in beside] == [
        (each.main, each.predictions, each.tokens) for each in alone
    ]


def test_branches_that_meet_do_not_say_what_they_say_alone():
    assert ask(RopeConfig()).predictions != ask(RopeConfig(), engine="one_by_one").predictions


@pytest.mark.parametrize("main", ["", "the passage"])
def test_texts_end_where_the_model_ends_them(main):
    """Rows that end early are filled with padding, which is neither text nor a token that was decoded."""
    model, tokenizer, sample = model_with(APART), tiny_tokenizer(), Sample(main, QUESTIONS)
    free = generate_branches(model, tokenizer, sample, 12)
    common = tokenizer("".join(free.texts), add_special_tokens=False).input_ids
    model.generation_config.eos_token_id = [2, *sorted(set(common))[::3]]
    branches, batch = (
        generate_branches(model, tokenizer, sample, 12),
        generate_padded_batch(model, tokenizer, sample, 12),
    )
    assert branches.tokens < free.tokens
    assert (batch.texts, batch.tokens) == (branches.texts, branches.tokens)


def test_memory_is_what_is_asked_at_once():
    per_token = 2 * 2 * 2 * 16 * 4  # keys and values, layers, heads, dimensions, bytes
    kinds = {"parallel": ask(APART), "pairs": ask(APART, at_once=2), "one": ask(APART, engine="one_by_one")}
    kinds["batch"] = ask(APART, engine="batch")
    kept = {name: found.kv_bytes / per_token for name, found in kinds.items()}
    assert kept["one"] < kept["pairs"] < kept["parallel"] < kept["batch"]
    ids = tiny_tokenizer()(
        ["the answer is in the passage " * 4, *QUESTIONS], add_special_tokens=False
    ).input_ids
    longest = len(ids[0]) + max(map(len, ids[1:]))
    assert kept["batch"] == len(QUESTIONS) * (longest + 8 - 1)  # the last token that is drawn is never read


def test_any_reference_is_right():
    said = ask(APART).predictions
    right = [
        RecordAnswers(
            "", QUESTIONS, said, [["no", text] for text in said], tokens=40, seconds=2.0, kv_bytes=8
        ),
        RecordAnswers("", QUESTIONS[:1], ["x"], [["no"]], tokens=2, seconds=1.0, kv_bytes=16),
    ]
    _, scores = score_answers(right)
    assert scores.exact_match == scores.f1 == 5 / 6
    assert (scores.questions, scores.peak_kv_bytes) == (6, 16)
    assert (scores.questions_per_second, scores.tokens_per_second) == (2, 14)


def test_references_come_from_the_record():
    (found,) = answer_records(
        model_with(APART), tiny_tokenizer(), [record(references=[" they"])], max_new_tokens=2
    )
    assert found.references == [["it", "they"]] * len(QUESTIONS)


def test_the_command(tmp_path, capsys):
    base, data, output = save_tiny(tmp_path / "tiny"), tmp_path / "data.jsonl", tmp_path / "scores.json"
    branches = [{"prompt": question, "completion": " it", "references": [" they"]} for question in QUESTIONS]
    write_records(data, [{"main": "the passage", "branches": branches}] * 2)
    given = [
        "answers",
        f"base_model={base}",
        f"data_path={data}",
        f"output_path={output}",
        "max_new_tokens=3",
    ]
    evaluate.main([*given, "engine=batch", "at_once=2"])
    found = json.loads(output.read_text())
    assert (found["questions"], found["config"]["engine"], found["config"]["at_once"]) == (10, "batch", 2)
    assert found["questions_per_second"] > 0
    out = capsys.readouterr().out
    assert "it / they" in out
    assert "MiB of keys and values" in out
    with pytest.raises(UserError, match="engine=parallel: .*set engine=one_by_one or engine=batch"):
        evaluate.main([*given, "patch_rope=false"])
    for settings in (["engine=batch"], ["engine=one_by_one"], ["at_once=1"]):
        evaluate.main([*given, "patch_rope=false", *settings])
    with pytest.raises(UserError, match="at_once=2: engine=one_by_one asks one"):
        evaluate.main([*given, "engine=one_by_one", "at_once=2"])
