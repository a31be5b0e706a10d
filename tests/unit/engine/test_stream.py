"""Streamed text: complete characters, stop texts, finish reasons and errors."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from tiny import tiny_llama, tiny_tokenizer
from tokenizers import Tokenizer, decoders, models

from parallelmind.config import RopeConfig
from parallelmind.engine.detokenizer import Detokenizer
from parallelmind.engine.generate import generate, generate_text, stream
from parallelmind.engine.output import Event, OutputProcessor, StopChecker
from parallelmind.engine.request import Sample
from parallelmind.engine.sampling_params import SamplingParams
from parallelmind.engine.tokenization import tokenize_sample
from parallelmind.errors import UserError
from parallelmind.model.patch import patch

EOS = 2


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def model():
    model = tiny_llama()
    patch(model, RopeConfig())
    return model


def process_text(tokenizer, text, prompt=(), **sampling):
    """The emitted pieces and the finish reason of a branch that decodes the tokens of `text`."""
    tokens = tokenizer(text).input_ids
    processor = OutputProcessor(tokenizer, prompt, SamplingParams(**sampling), frozenset({EOS}))
    pieces = []
    for token in tokens:
        piece, reason = processor.process(token)
        pieces.append(piece)
        if reason:
            return pieces, reason
    return pieces, None


def test_a_character_split_over_tokens_is_emitted_complete(tokenizer):
    text = "né 你好 👍🏽 end"
    pieces, _ = process_text(tokenizer, text)
    assert len(tokenizer(text).input_ids) > len(text)
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_an_incomplete_character_at_the_end_becomes_a_replacement_character(tokenizer):
    tokens = tokenizer("a👍").input_ids[:-1]
    pieces, reason = process_text(tokenizer, tokenizer.decode([]) + "a👍", max_new_tokens=len(tokens))
    assert ("".join(pieces), reason) == ("a\ufffd", "length")


def test_a_prompt_that_ends_inside_a_character_is_not_repeated(tokenizer):
    half = tokenizer("👍").input_ids[:2]
    stream_of_text = Detokenizer(tokenizer, half)
    assert "".join(stream_of_text.push(token) for token in tokenizer("ok").input_ids) == "ok"


def test_leading_spaces_depend_on_the_prompt():
    """A sentencepiece-style decoder drops the space at the beginning of a text, and only there."""
    backend = Tokenizer(models.WordLevel({"▁Hello": 0, "▁world": 1}, unk_token="▁Hello"))
    backend.decoder = decoders.Metaspace()
    python = SimpleNamespace(decode=lambda ids, **_: backend.decode(ids))
    fast = SimpleNamespace(backend_tokenizer=backend, decode=python.decode)
    for tokenizer in (fast, python):
        assert Detokenizer(tokenizer, [0]).push(1) == " world"
        assert Detokenizer(tokenizer, []).push(1) == "world"


@pytest.mark.parametrize(
    ("stop", "shown"), [("sto", "do not "), ("not", "do "), ("d", ""), ("not stop", "do ")]
)
def test_a_stop_text_is_found_across_tokens_and_trimmed(tokenizer, stop, shown):
    pieces, reason = process_text(tokenizer, "do not stop now", stop=(stop,))
    assert ("".join(pieces), reason) == (shown, "stop")


def test_text_that_only_begins_like_a_stop_text_is_shown(tokenizer):
    text = "ab\n\nab\n"
    pieces, reason = process_text(
        tokenizer, text, stop=("\n\n\n", "abc"), max_new_tokens=len(tokenizer(text).input_ids)
    )
    assert ("".join(pieces), reason) == (text, "length")
    held = StopChecker(("aab",))
    assert [held.push(piece) for piece in "aaab"] == [("", False), ("", False), ("a", False), ("", True)]


def test_end_of_text_finishes_the_branch_and_is_not_shown(tokenizer):
    pieces, reason = process_text(tokenizer, "who</s>more")
    assert ("".join(pieces), reason) == ("who", "stop")
    pieces, reason = process_text(tokenizer, "who</s>more", ignore_eos=True)
    assert ("".join(pieces), reason) == ("whomore", None)


def test_events_add_up_to_generate(model, tokenizer):
    sample = Sample(main="the passage", branches=["who", "where is the answer", "你"])
    events = list(stream(model, tokenizer, sample, max_new_tokens=6, ignore_eos=True))
    assert len(events) == 18
    joined = ["".join(event.text for event in events if event.branch == branch) for branch in range(3)]
    assert joined == generate(model, tokenizer, sample, max_new_tokens=6, ignore_eos=True)
    assert [event.finish_reason for event in events].count("length") == 3
    for branch in range(3):
        tokens = [event.token for event in events if event.branch == branch]
        assert joined[branch] == tokenizer.decode(tokens, skip_special_tokens=True)


def test_a_seeded_branch_is_the_same_beside_isolated_siblings(tokenizer):
    model = tiny_llama()
    patch(model, RopeConfig(visibility="isolated"))
    settings = {"temperature": 1.0, "seed": 5, "max_new_tokens": 8, "repetition_penalty": 1.3, "top_k": 50}
    alone = generate(model, tokenizer, Sample(branches=["who"]), **settings)
    assert generate(model, tokenizer, Sample(branches=["who", "where is"]), **settings)[0] == alone[0]


def test_a_stop_text_finishes_one_branch_only(model, tokenizer):
    sample = Sample(branches=["who", "where is"])
    first, second = generate(model, tokenizer, sample, max_new_tokens=8, ignore_eos=True)
    stop = next(letter for letter in second[1:] if letter not in first)
    events = list(stream(model, tokenizer, sample, max_new_tokens=8, ignore_eos=True, stop=[stop]))
    reasons = {event.branch: event.finish_reason for event in events if event.finish_reason}
    assert reasons == {0: "length", 1: "stop"}
    assert "".join(event.text for event in events if event.branch == 1) == second[: second.index(stop)]


def test_closing_a_stream_early_leaves_the_model_usable(model, tokenizer):
    before = generate_text(model, tokenizer, "who", max_new_tokens=5)
    events = stream(model, tokenizer, Sample(branches=["who", "where"]), max_new_tokens=50)
    assert isinstance(next(events), Event)
    assert not torch.is_inference_mode_enabled(), (
        "a paused stream must not change its caller's inference mode"
    )
    events.close()
    assert generate_text(model, tokenizer, "who", max_new_tokens=5) == before


@pytest.mark.parametrize(
    ("sample", "sampling", "message"),
    [
        (Sample(), {}, r"branches=\[\]"),
        (Sample(branches=["who", ""]), {}, r"branches\[1\]: holds no token"),
        (Sample(branches=[[5], [999]]), {}, "token id 999"),
        (
            Sample(branches=["who"]),
            {"max_new_tokens": 4096},
            "max_new_tokens=4096: .* exceed the model's 4096 positions",
        ),
        (Sample(branches=["who"]), {"temperature": -1}, "temperature=-1"),
        (Sample(branches=["who"]), {"tempreature": 1}, "tempreature=1: unknown"),
    ],
)
def test_user_errors_are_raised_before_decoding(model, tokenizer, sample, sampling, message):
    with pytest.raises(UserError, match=message):
        stream(model, tokenizer, sample, **sampling)


def test_a_text_in_place_of_branches_is_refused():
    with pytest.raises(UserError, match="branches='who'"):
        Sample(branches="who")


def test_an_unpatched_model_refuses_several_branches(tokenizer):
    with pytest.raises(UserError, match="not patched"):
        generate(tiny_llama(), tokenizer, Sample(branches=["who", "where"]))


def test_flat_positions_count_every_token_against_the_context(tokenizer):
    model = tiny_llama(max_position_embeddings=40)
    patch(model, RopeConfig(positions="flat"))
    with pytest.raises(UserError, match="exceed the model's 40 positions"):
        stream(model, tokenizer, Sample(branches=[[5], [6]]), max_new_tokens=20)
    stream(model, tokenizer, Sample(branches=[[5], [6]]), max_new_tokens=19)


def test_only_the_first_sequence_begins_with_bos(tokenizer, monkeypatch):
    bare = tokenize_sample(tokenizer, Sample(main="who", branches=["is", "in"]))

    class AddsBos:
        bos_token_id = 1

        def __call__(self, text, add_special_tokens=True, **options):
            if isinstance(text, list):
                return SimpleNamespace(input_ids=[self(one, add_special_tokens).input_ids for one in text])
            return SimpleNamespace(input_ids=[1] * add_special_tokens + tokenizer(text).input_ids)

    adds_bos = AddsBos()
    with_main = tokenize_sample(adds_bos, Sample(main="who", branches=["is", "in"]))
    assert with_main.ids.tolist() == [1, *bare.ids.tolist()]
    without = tokenize_sample(adds_bos, Sample(branches=["is", "<s>in"]))
    assert (without.ids == 1).sum() == 2, "each branch opens its own text, once"
