"""`workloads.evaluate answers`: the backends agree on isolated branches, and each one's scores and memory."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from generating import write_records
from tiny import save_tiny, tiny_llama, tiny_tokenizer

from parallelmind.config import RopeConfig
from parallelmind.data.record_parser import parse_value
from parallelmind.data.records import Record
from parallelmind.engine.generate import generate, generate_text
from parallelmind.engine.record_prompt import RecordPrompt
from parallelmind.engine.request import Sample, Segment
from parallelmind.errors import UserError
from parallelmind.evaluation import tiny_models
from parallelmind.evaluation.backends import generate_branches, generate_padded_batch
from parallelmind.evaluation.qa_eval import (
    RecordAnswers,
    answer_records,
    score_answers,
)
from parallelmind.evaluation.qa_records import read_question_records
from parallelmind.model.patch import patch
from workloads.evaluate.command import main as evaluate

ISOLATED = RopeConfig(visibility="isolated", rope_2d_ratio=0, positions="time")
QUESTIONS = ["who", " where is the passage", " what in that 你好", "a question of the answer", " lives"]


def question_record(main: str = "the answer is in the passage " * 4, **branch_fields: Any) -> Record:
    branches = [{"prompt": question, "completion": " it", **branch_fields} for question in QUESTIONS]
    return parse_value({"main": main, "branches": branches})


def patched_model(rope: RopeConfig):
    model = tiny_llama()
    patch(model, rope)
    return model


def answer_record(rope: RopeConfig, **settings: Any) -> RecordAnswers:
    (answers,) = answer_records(
        patched_model(rope), tiny_tokenizer(), [question_record()], max_new_tokens=8, **settings
    )
    return answers


def test_all_backends_agree_on_isolated_branches():
    expected = answer_record(ISOLATED)
    assert len(set(expected.predictions)) > 1
    for settings in (
        {"engine": "one_by_one"},
        {"engine": "batch"},
        {"at_once": 2},
        {"engine": "batch", "at_once": 2},
    ):
        answers = answer_record(ISOLATED, **settings)
        assert (answers.predictions, answers.tokens) == (expected.predictions, expected.tokens)


def test_concurrent_records_equal_sequential_ones():
    """Branches of one record see each other, branches of different records do not."""
    records = [question_record(), question_record("another passage"), question_record("the third")]
    model, tokenizer = patched_model(RopeConfig()), tiny_tokenizer()
    sequential, concurrent = (
        list(answer_records(model, tokenizer, records, at_once=2, records_at_once=count, max_new_tokens=8))
        for count in (1, 2)
    )
    assert [(answers.main, answers.predictions, answers.tokens) for answers in concurrent] == [
        (answers.main, answers.predictions, answers.tokens) for answers in sequential
    ]


def test_columnar_branches_differ_from_separate_questions():
    columnar = RopeConfig()
    separate = answer_record(columnar, engine="one_by_one")
    assert answer_record(columnar).predictions != separate.predictions


@pytest.mark.parametrize("main", ["", "the passage"])
def test_padding_of_finished_rows_is_no_answer(main):
    """Padding after an end-of-text token counts neither as text nor as a decoded token."""
    model, tokenizer, prompt = (
        patched_model(ISOLATED),
        tiny_tokenizer(),
        RecordPrompt(Sample(main, QUESTIONS)),
    )
    without_eos = generate_branches(model, tokenizer, prompt, 12)
    common = tokenizer("".join(without_eos.texts), add_special_tokens=False).input_ids
    model.generation_config.eos_token_id = [2, *sorted(set(common))[::3]]
    branches = generate_branches(model, tokenizer, prompt, 12)
    batch = generate_padded_batch(model, tokenizer, prompt, 12)
    assert branches.tokens < without_eos.tokens
    assert (batch.texts, batch.tokens) == (branches.texts, branches.tokens)


def test_peak_kv_memory_is_that_of_concurrent_questions():
    bytes_per_token = 2 * 2 * 2 * 16 * 4  # keys and values, layers, heads, dimensions, bytes
    answers = {
        "parallel": answer_record(ISOLATED),
        "pairs": answer_record(ISOLATED, at_once=2),
        "one": answer_record(ISOLATED, engine="one_by_one"),
        "batch": answer_record(ISOLATED, engine="batch"),
    }
    kv_tokens = {name: answer.kv_bytes / bytes_per_token for name, answer in answers.items()}
    assert kv_tokens["one"] < kv_tokens["pairs"] < kv_tokens["parallel"] < kv_tokens["batch"]
    ids = tiny_tokenizer()(
        ["the answer is in the passage " * 4, *QUESTIONS], add_special_tokens=False
    ).input_ids
    row_length = len(ids[0]) + max(map(len, ids[1:]))
    # The last token of a row is drawn, but its keys and values are never computed.
    assert kv_tokens["batch"] == len(QUESTIONS) * (row_length + 8 - 1)


def test_any_reference_counts_as_correct():
    predictions = answer_record(ISOLATED).predictions
    references = [["no", text] for text in predictions]
    all_correct = RecordAnswers(
        "", {}, [*"01234"], QUESTIONS, predictions, references, tokens=40, seconds=2.0, kv_bytes=8
    )
    wrong = RecordAnswers("", {}, ["0"], QUESTIONS[:1], ["x"], [["no"]], tokens=2, seconds=1.0, kv_bytes=16)
    _, scores = score_answers([all_correct, wrong])
    assert scores.exact_match == scores.f1 == 5 / 6
    assert (scores.questions, scores.peak_kv_bytes) == (6, 16)
    assert (scores.questions_per_second, scores.tokens_per_second) == (2, 14)


def test_references_are_the_completion_and_those_of_the_record():
    records = [question_record(references=[" they"])]
    (answers,) = answer_records(patched_model(ISOLATED), tiny_tokenizer(), records, max_new_tokens=2)
    assert answers.references == [["it", "they"]] * len(QUESTIONS)


DOCUMENTS = ["the answer is in the passage", " where is the question", " who lives"]
READ = [{"text": text, "targets": []} for text in DOCUMENTS]
ASKED = {"prompt": " what is it", "completion": " it", "references": [" they"]}


def test_a_question_about_documents_is_answered_by_the_reduce():
    """Every engine but `parallel` reads the documents as one plain text."""
    model, tokenizer = patched_model(RopeConfig()), tiny_tokenizer()
    record = parse_value({"main": "read", "branches": READ, "reduce": ASKED})

    def answer(**settings: Any) -> RecordAnswers:
        (answers,) = answer_records(model, tokenizer, [record], max_new_tokens=6, **settings)
        return answers

    ids = [[*tokenizer(text, add_special_tokens=False).input_ids, 2] for text in DOCUMENTS]
    texts = generate(
        model,
        tokenizer,
        Sample("read", ids),
        per_branch=[{"max_new_tokens": 0}] * 3,
        reduce=ASKED["prompt"],
        max_new_tokens=6,
    )
    answers = answer()
    assert answers.predictions == [texts[-1].strip().splitlines()[0].strip()] != [""]
    assert (answers.documents, answers.places) == (
        {str(number): text for number, text in enumerate(DOCUMENTS, start=1)},
        ["reduce"],
    )
    assert (answers.questions, answers.references) == (["what is it"], [["it", "they"]])
    assert answers.tokens <= 6
    plain = generate_text(model, tokenizer, "".join(["read", *DOCUMENTS, ASKED["prompt"]]), max_new_tokens=6)
    for engine in ("one_by_one", "batch"):
        assert answer(engine=engine).predictions == [plain.strip().splitlines()[0].strip()]


def test_nested_questions_are_answered_after_the_answers_on_their_path():
    model, tokenizer = patched_model(RopeConfig()), tiny_tokenizer()
    below = [*READ[:1], {**ASKED, "branches": [ASKED]}]
    record = parse_value({"main": "read", "branches": [{**ASKED, "branches": below, "reduce": ASKED}, ASKED]})
    (answers,) = answer_records(model, tokenizer, [record], max_new_tokens=6)
    assert answers.places == ["1", "1.2", "1.2.1", "1.reduce", "2"]
    assert list(answers.documents) == ["1.1"]
    document = [*tokenizer(DOCUMENTS[0], add_special_tokens=False).input_ids, 2]
    prompt = ASKED["prompt"]
    inner = [Segment(document, sampling={"max_new_tokens": 0}), Segment(prompt, [prompt])]
    sample = Sample("read", [Segment(prompt, inner, prompt), prompt])
    texts = generate(model, tokenizer, sample, max_new_tokens=6)
    del texts[1]  # of the document
    assert answers.predictions == [(text.strip().splitlines() or [""])[0].strip() for text in texts]


def test_a_recurrent_model_reads_documents_as_plain_text_only():
    model, tokenizer = tiny_models.tiny_model("mamba2"), tiny_models.tiny_tokenizer()
    records = [parse_value({"branches": READ, "reduce": ASKED})]
    with pytest.raises(UserError, match="^engine=parallel: the model .*; set engine=one_by_one"):
        next(answer_records(model, tokenizer, records, max_new_tokens=2))
    (answers,) = answer_records(model, tokenizer, records, engine="one_by_one", max_new_tokens=2)
    assert len(answers.predictions) == 1


def test_records_of_documents_are_decoded_beside_others():
    model, tokenizer = patched_model(RopeConfig()), tiny_tokenizer()
    trees = [{"branches": READ, "reduce": ASKED}, {"branches": [READ[0], ASKED], "reduce": ASKED}]
    records = [*map(parse_value, trees), question_record()]
    one, all_at_once = (
        list(answer_records(model, tokenizer, records, records_at_once=count, max_new_tokens=4))
        for count in (1, 3)
    )
    assert [answers.places for answers in one] == [["reduce"], ["2", "reduce"], [*"12345"]]
    assert [answers.predictions for answers in one] == [answers.predictions for answers in all_at_once]


@pytest.mark.parametrize(
    ("record", "settings", "message"),
    [
        (
            {"branches": [{**ASKED, "branches": [ASKED]}]},
            ["engine=batch"],
            "^engine=batch at_once=null: data_path has nested branches, .*; set engine=parallel",
        ),
        ({"branches": [{**ASKED, "branches": ["text"]}]}, [], ":1: has no questions to score"),
        ({"branches": READ, "reduce": " what"}, [], ":1: has no questions to score; .*targets="),
        ({"branches": [*READ, "text"], "reduce": ASKED}, [], ":1: has no questions to score"),
        ({"branches": [*READ, ASKED]}, [], ":1: has no questions to score"),
        ({"branches": [{"input_ids": [5], "targets": []}], "reduce": ASKED}, [], ":1: has no questions"),
        (
            {"branches": [ASKED], "reduce": ASKED},
            ["engine=batch"],
            "^engine=batch at_once=null: .*; set engine",
        ),
        ({"branches": [ASKED], "reduce": ASKED}, ["at_once=1"], "^engine=parallel at_once=1: .*; set engine"),
    ],
)
def test_a_tree_that_cannot_be_scored_is_refused_in_one_line(record, settings, message, tmp_path):
    write_records(tmp_path / "data.jsonl", [record])
    with pytest.raises(UserError, match=message) as error:
        evaluate(["answers", "base_model=none", f"data_path={tmp_path / 'data.jsonl'}", *settings])
    assert "\n" not in str(error.value)


def test_command_prints_and_writes_scores(tmp_path, capsys):
    base_model, data, output = save_tiny(tmp_path / "tiny"), tmp_path / "data.jsonl", tmp_path / "scores.json"
    branches = [{"prompt": question, "completion": " it", "references": [" they"]} for question in QUESTIONS]
    write_records(data, [{"main": "the passage", "branches": branches}] * 2)
    argv = [
        "answers",
        f"base_model={base_model}",
        f"data_path={data}",
        f"output_path={output}",
        "max_new_tokens=3",
    ]
    evaluate([*argv, "engine=batch", "at_once=2"])
    scores = json.loads(output.read_text())
    assert (scores["questions"], scores["config"]["engine"], scores["config"]["at_once"]) == (10, "batch", 2)
    assert scores["questions_per_second"] > 0
    assert [len(predictions) for predictions in scores["predictions"]] == [5, 5]
    out = capsys.readouterr().out
    assert "it / they" in out
    trees = tmp_path / "trees.jsonl"
    write_records(trees, [{"branches": READ, "reduce": ASKED}])
    evaluate([*argv[:2], f"data_path={trees}", "max_new_tokens=3"])
    tree_out = capsys.readouterr().out
    assert "branch 2: where is the question" in tree_out
    assert "│ reduce │ what is it" in tree_out
    assert "peak KV cache" in out
    with pytest.raises(UserError, match="engine=parallel: .*set engine=one_by_one or engine=batch"):
        evaluate([*argv, "patch_rope=false"])
    for settings in (["engine=batch"], ["engine=one_by_one"], ["at_once=1"]):
        evaluate([*argv, "patch_rope=false", *settings])
    with pytest.raises(UserError, match="at_once=2: engine=one_by_one decodes one"):
        evaluate([*argv, "engine=one_by_one", "at_once=2"])


def test_questions_are_read_from_every_format(tmp_path: Path) -> None:
    record = {"main": "m", "branches": [{"prompt": "p", "completion": "c"}]}
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b"\n" + json.dumps(record).encode() + b"\n"))
    pq.write_table(pa.Table.from_pylist([record]), tmp_path / "b.parquet")
    (tmp_path / "c.jsonl").write_text('{"text": "no question"}')
    assert [item.main for item in read_question_records(str(tmp_path), 2)] == ["m", "m"]
    with pytest.raises(UserError, match=r"data_path=.*c\.jsonl:1: has no questions to score"):
        read_question_records(str(tmp_path), 3)
