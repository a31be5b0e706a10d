"""Inspection of a file before training: statistics, columns, and the command with a tiny tokenizer."""

from __future__ import annotations

import gzip
import json
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import save_tiny, tiny_tokenizer
from trees import TREES, shape_of, tokens_of

from parallelmind.config import RopeConfig
from parallelmind.data.tokenise import TokenisedRecord
from parallelmind.errors import UserError
from parallelmind.layout import Tokens, arrange
from parallelmind.tree import segment_names
from workloads.data import inspect as inspect_data
from workloads.data.histogram import Bucket, bars, histogram
from workloads.data.inspect_report import token_decoder
from workloads.data.inspection import numbered_lines
from workloads.data.sample_columns import sample_columns, text_width, visible
from workloads.data.statistics import LengthStatistics, percentiles

PNG = b"\x89PNG\r\n\x1a\n"


def letters(ids: list[int]) -> list[str]:
    return [chr(token) for token in ids]


def sample(main: str, branches: list[str], offsets: list[int] | None = None) -> Tokens:
    return Tokens.of([*map(ord, main)], [[*map(ord, branch)] for branch in branches], offsets)


def segment(letters: str, offset: int | None = None, **below: object) -> dict[str, object]:
    """A segment of `reference`."""
    return {"tokens": [*map(ord, letters)], "offset": len(letters) if offset is None else offset, **below}


def text(tokens: Tokens, width: int = 200, delays: list[int] | None = None, **rope: object) -> list[str]:
    delay_array = None if delays is None else np.array(delays)
    lines = sample_columns(arrange(tokens, RopeConfig.model_validate(rope), delay_array), letters, width)
    return ["".join(piece for piece, _ in line).rstrip() for line in lines]


@pytest.mark.parametrize("rope", [{"visibility": "columnar"}, {"visibility": "isolated"}])
def test_every_token_is_in_the_column_of_its_time(rope: dict[str, str]) -> None:
    assert text(sample("ab", ["cde", "f"], [1, 1]), **rope) == [
        "time      0 1 2 3   4",
        "main      a b",
        "branch 1      c «d» «e»",
        "branch 2      f",
    ]


def test_alignment_and_delays_move_branches() -> None:
    assert text(sample("", ["abc", "d"], [3, 1]), align_to="right")[2].index("d") == len("branch 2  a b ")
    assert text(sample("", ["abc", "d"], [3, 1]), delays=[0, 1])[2].index("d") == len("branch 2  a ")


def test_targets_are_separate_pieces_without_marks() -> None:
    lines = sample_columns(arrange(sample("", ["abc"], [1]), RopeConfig()), letters, 80, marks=("", ""))
    assert [piece for piece, target in lines[1] if target] == ["b", "c"]


def test_a_tree_has_one_line_for_every_segment_which_shows_forks_and_joins() -> None:
    inner = [segment("ef", 1), segment("g")]
    branches = [segment("cd", branches=inner, reduce=segment("hi", 1)), segment("j")]
    root = segment("ab", branches=branches, reduce=segment("kl", 1))
    assert text(tokens_of(root)) == [
        "time             0 1 2 3 4 5   6 7   8 9",
        "main             a b",
        "branch 1             c d",
        "branch 1.1               e «f»",
        "branch 1.2               g",
        "branch 1.reduce                h «i»",
        "branch 2             j",
        "reduce                               k «l»",
    ]


def test_the_name_of_a_segment_is_its_place() -> None:
    chain = segment("c", branches=[segment("d"), segment("e")], reduce=segment("f"))
    root = segment("a", branches=[segment("b"), segment("b", branches=[segment("b")])], reduce=chain)
    assert segment_names(shape_of(root)) == [
        *("main", "branch 1", "branch 2", "branch 2.1"),
        *("reduce", "reduce.1", "reduce.2", "reduce.reduce"),
    ]


def test_a_deep_segment_is_named_by_the_end_of_its_place() -> None:
    root = segment("z")
    for letter in "yxwvutsrqponmlkjihgfedcba":
        root = segment(letter, branches=[root])
    lines = text(tokens_of(root), width=80)
    assert lines[-1].startswith("…1.1.1.1.1.1.1.1.1.1.1.1 ")
    assert lines[2].startswith("branch 1 ")
    assert max(map(text_width, lines)) <= 80


def test_a_long_tree_shows_where_documents_end_and_the_answer_begins() -> None:
    documents = [segment("x" * length) for length in (90, 40)]
    lines = text(tokens_of(segment("", branches=documents, reduce=segment("who?rice", 4))), width=90)
    assert [line.count("…") for line in lines] == [1, 1, 1, 0]
    assert lines[3].split() == ["reduce", "w", "h", "o", "?", "«r»", "«i»", "«c»", "«e»"]


@given(TREES, st.integers(60, 120))
def test_no_line_of_a_tree_is_wider_than_the_terminal(root: dict[str, object], width: int) -> None:
    tokens = tokens_of(root)
    lines = text(tokens, width=width)
    assert all(text_width(line) <= width for line in lines)
    assert len(lines) == 1 + np.count_nonzero(tokens.lengths)


def test_long_sample_keeps_main_the_branches_and_the_first_targets() -> None:
    lines = text(sample("M" + "m" * 98 + "n", ["b" * 50 + "tuvwxyz" * 9, "c" * 20], [50, 20]), width=60)
    assert all(text_width(line) <= 60 for line in lines)
    assert [line.count("…") for line in lines] == [3, 1, 2, 1]
    assert lines[1].startswith("main      M m")
    assert lines[1].endswith("n")
    assert "b   «t» «u»" in lines[2]
    times = [int(word) for word in lines[0].split()[1:] if word != "…"]
    assert {0, 99, 100, 149, 150} <= set(times)
    assert times == sorted(set(times))


@given(st.lists(st.integers(1, 40), min_size=1, max_size=4), st.integers(0, 60), st.integers(40, 200))
def test_no_line_is_wider_than_the_terminal_and_all_columns_agree(
    lengths: list[int], main: int, width: int
) -> None:
    tokens = Tokens.of([0x8336] * main, [[97 + length] * length for length in lengths])
    lines = text(tokens, width=width)
    assert all(text_width(line) <= width for line in lines)
    assert len(lines) == 1 + bool(main) + len(lengths)


@pytest.mark.parametrize(
    ("given_text", "shown"),
    [
        ("\n", "⏎"),
        (" the", "▁the"),
        ("\t", "⇥"),
        ("\x1b[31m", "▯[31m"),
        ("abcdefgh", "abcdefgh"),
        ("abcdefghi", "abcdefg…"),
    ],
)
def test_tokens_are_visible_and_narrow(given_text: str, shown: str) -> None:
    assert visible(given_text) == shown


@given(st.text(max_size=20))
def test_a_token_is_at_most_eight_cells_on_one_line(given_text: str) -> None:
    assert text_width(visible(given_text)) <= 8
    assert not set(visible(given_text)) & set(" \n\r\t\x1b\x85\u2028")


@given(st.lists(st.integers(1, 5000), min_size=1))
def test_every_value_is_in_the_bucket_that_names_it(values: list[int]) -> None:
    buckets = histogram(values)
    assert all(
        bucket.count == sum(bucket.low <= value <= bucket.high for value in values) for bucket in buckets
    )
    assert sum(bucket.count for bucket in buckets) == len(values)
    assert buckets[0].count > 0
    assert buckets[-1].count > 0
    assert all(left.high + 1 == right.low for left, right in pairwise(buckets))


def test_small_range_gets_single_value_buckets_and_the_longest_bar_is_the_fullest() -> None:
    buckets = histogram([2, 2, 2, 2, 4])
    assert buckets == [Bucket(2, 2, 4), Bucket(3, 3, 0), Bucket(4, 4, 1)]
    assert bars(buckets, 8) == ["2  ████████  4", "3            0", "4  ██        1"]
    assert bars([Bucket(1, 1, 1000), Bucket(2, 3, 1)], 8)[1] == "2–3  █         1"


def test_percentiles_are_values_that_occur() -> None:
    assert percentiles([*range(1, 101)]) == [50, 90, 99, 100]
    assert percentiles([7]) == [7, 7, 7, 7]


def test_statistics_count_tokens_targets_and_padding() -> None:
    statistics = LengthStatistics()
    samples = [sample("abc", ["de", "fghi"], [0, 3]), sample("", ["x" * 5])]
    for record in (
        TokenisedRecord(samples[0], False, 1, 2),
        TokenisedRecord(samples[1], True, 0, 0),
        TokenisedRecord(None, True, 0, 1),
    ):
        statistics.add_record(record)
    statistics.add_batch(samples)
    assert (statistics.main_tokens, statistics.branch_tokens, statistics.tokens) == ([3], [2, 4, 5], 14)
    assert statistics.targets == 1 + 1 + 4
    assert (statistics.truncated, statistics.skipped) == (1, 3)
    assert (statistics.sample_branches, statistics.batch_tokens, statistics.batch_padded_tokens) == (
        [2, 1],
        [14],
        [18],
    )
    assert statistics.padding == pytest.approx(4 / 18)


def test_statistics_count_the_segments_of_all_depths() -> None:
    statistics = LengthStatistics()
    inner = segment("cd", branches=[segment("ef"), segment("g")], reduce=segment("hij", 1))
    tree = tokens_of(segment("ab", branches=[inner, segment("k")], reduce=segment("l" * 9)))
    flat = sample("", ["mn"])
    for tokens in (tree, flat):
        statistics.add_record(TokenisedRecord(tokens, False, 0, 0))
    assert statistics.branch_tokens == [2, 2, 1, 1, 2]
    assert statistics.reduce_tokens == [3, 9]
    assert (statistics.segments, statistics.tokens, statistics.depth) == (8, 22, 2)
    statistics.add_batch([tree, flat])
    assert (statistics.sample_branches, statistics.padding) == ([4, 1], pytest.approx(18 / 40))


def test_packed_batches_have_no_padding() -> None:
    statistics = LengthStatistics()
    statistics.add_batch([sample("", ["ab"]), sample("", ["abcdef"])], packing=True)
    assert (statistics.batch_padded_tokens, statistics.padding) == ([8], 0)


def test_divided_character_is_the_text_of_its_last_token() -> None:
    tokenizer = tiny_tokenizer()
    ids = tokenizer(" the 茶<s>").input_ids
    texts = token_decoder(tokenizer)(ids)
    assert texts[-4:] == ["·", "·", "茶", "<s>"]
    assert "".join(texts).replace("·", "") == " the 茶<s>"
    assert token_decoder(tokenizer)(ids[-4:-2] * 3), "an invalid sequence of bytes ends as well"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return f"base_model={save_tiny(tmp_path_factory.mktemp('tiny'))}"


@pytest.fixture
def data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "data.jsonl"
    record = {
        "main": "the passage",
        "branches": [{"prompt": "who\n", "completion": " works"}, "in [b]the[/b]"],
        "id": 1,
    }
    lines = [json.dumps(record), "{nope", "", *(json.dumps({"text": f"where is {i}"}) for i in range(5))]
    path.write_text("\n".join(lines) + "\n")
    return path


def run_inspect(capsys, *argv: str) -> str:
    inspect_data.main([*argv])
    return " ".join(capsys.readouterr().out.split())


def test_inspect_tells_what_training_would_tell(base, data, capsys):
    data.write_text(data.read_text() + '{"text": "where is 1", "id": 2}\n')
    inspect_data.main([str(data), base, "max_branch_tokens=4", "png_path=x.png"])
    out, err = capsys.readouterr()
    assert "repeated            1  records with the content of an earlier one" in out
    assert "warning: max_branch_tokens=4 overlong=truncate truncate_side=right: " in err
    assert "max_sample_tokens=4096: 1 texts are skipped" in err


def test_inspect_prints_counts_and_samples_and_writes_a_png(base, data, tmp_path, capsys):
    out = run_inspect(capsys, str(data), base, "shuffle_window=1", "length_window=1")
    assert "records 6 1 with branches of their own, 5 standalone" in out
    assert "bad 1 skipped in training other keys 1 ignored: id (1)" in out
    assert f"{data}:2: is not JSON" in out
    assert "branches 7 0 more skipped, 0 texts truncated" in out
    assert "main t he ▁pas sag e branch 1 w h o ⏎ «▁w» «or» «ks» «</s>» branch 2 i «n» «▁» «[» «b» «]»" in out
    assert "sample 2:" in out
    assert (tmp_path / "data.jsonl.png").read_bytes().startswith(PNG)


def test_settings_change_the_batches_of_training(base, data, tmp_path, capsys):
    out = run_inspect(
        capsys,
        f"data_path={data}",
        base,
        "max_records=1",
        "max_branch_tokens=4",
        "show=0",
        "png_path=new/look.png",
    )
    assert "only the first 1 records" in out
    assert "branches 1 1 more skipped, 2 texts truncated" in out
    assert "samples 1 batches 1 padding 0.0% of the 8 tokens" in out
    assert "sample 1:" not in out
    assert (tmp_path / "new" / "look.png").read_bytes().startswith(PNG)


def test_lines_are_numbered_within_every_file(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"1\n\n3\n")
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b"1\n2"))
    files = [str(tmp_path / name) for name in ("a.jsonl", "b.jsonl.gz")]
    lines = [(file[-8:], number, line.raw) for file, number, line in numbered_lines(files)]
    assert lines == [("/a.jsonl", number, raw) for number, raw in ((1, b"1"), (2, b""), (3, b"3"))] + [
        ("jsonl.gz", 1, b"1"),
        ("jsonl.gz", 2, b"2"),
    ]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["nowhere.jsonl"], "data_path=nowhere.jsonl: no such file"),
        (["empty.jsonl"], "data_path=empty.jsonl: holds no record"),
        (
            ["data.jsonl", "max_branch_tokens=2", "overlong=skip"],
            "max_branch_tokens=2 .*: leave none of 7 texts; raise.* set overlong=keep_answer",
        ),
        (["data.jsonl", "strict=true"], "data.jsonl:2: is not JSON.*strict=false"),
        (["data.jsonl", "png_path=data.jsonl/x.png"], "png_path=data.jsonl/x.png: cannot be written"),
        (["data.jsonl", "other.jsonl"], "data_path=other.jsonl: a second file"),
        (["data.jsonl", "shwo=1"], "did you mean show"),
        ([], "data_path: required"),
    ],
)
def test_mistakes_are_reported_in_one_line(base, data, argv, message):
    data.with_name("empty.jsonl").touch()
    with pytest.raises(UserError, match=message) as error:
        inspect_data.main([*argv, base])
    assert "\n" not in str(error.value)


def test_help_shows_every_field(capsys):
    inspect_data.main(["--help"])
    out = capsys.readouterr().out
    assert all(name in out for name in inspect_data.InspectConfig.flat_fields())
