"""The texts of a sample are tokenised as one running text, by tokenizers of every kind."""

from __future__ import annotations

import pytest
import torch
from chat_templates import CHAT_KINDS, chat_tokenizer
from tokenizers.processors import TemplateProcessing
from tokenizers_by_kind import KINDS, tokenizer_of_kind
from transformers import PreTrainedTokenizerBase

import parallelmind as pm
from parallelmind.config import DataConfig, ModelConfig
from parallelmind.data.encode import encode_text, turn_end_id
from parallelmind.data.record_parser import parse_value
from parallelmind.data.tokenise import tokenise
from parallelmind.engine.detokenizer import Detokenizer
from parallelmind.engine.tokenization import eos_token_ids, tokenize_sample
from parallelmind.model.base_model import load_tokenizer

SAMPLES = [
    ("For lunch Ada likes rice.", " What does Ada eat?", " rice"),
    ("Ada", " What?", " rice"),
    ("The answer is:", "in", " the passage."),  # no space before a branch
    ("Ada likes", " rice\n", "Bob  beans"),
    ("", "Ada", " rice"),
    ("", "", "Ada likes"),
    ("Ada", " rice</s> beans", "</s>Bob"),
    ("Ada", " où est 😀", " é"),
]


def check_sample(tokenizer: PreTrainedTokenizerBase, main: str, prompt: str, completion: str) -> None:
    record = parse_value({"main": main, "branches": [{"prompt": prompt, "completion": completion}]})
    (tokenised,) = tokenise([record], tokenizer, DataConfig(data_path="-"))
    assert tokenised.tokens is not None
    running = encode_text(tokenizer, main + prompt + completion, first=True)
    assert tokenised.tokens.ids.tolist() == [*running, tokenizer.eos_token_id]
    if prompt:
        decoded = tokenize_sample(tokenizer, pm.Sample(main, [prompt])).ids.tolist()
        assert decoded == running[: len(decoded)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sample", SAMPLES, ids=repr)
def test_texts_of_a_sample_are_one_running_text(kind: str, sample: tuple[str, str, str]) -> None:
    if kind == "words without spaces" and not (sample[1].startswith(" ") and sample[2].startswith(" ")):
        pytest.skip("such a tokenizer writes no difference between a word and its continuation")
    check_sample(tokenizer_of_kind(kind), *sample)


@pytest.mark.model
@pytest.mark.parametrize("sample", SAMPLES, ids=repr)
def test_texts_of_a_sample_are_one_running_text_for_smollm2(sample: tuple[str, str, str]) -> None:
    check_sample(load_tokenizer(ModelConfig()), *sample)


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_first_text_begins_with_bos(kind: str) -> None:
    tokenizer = tokenizer_of_kind(kind)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    check_sample(tokenizer, "Ada", " What?", " rice")
    assert encode_text(tokenizer, " rice", first=False) == encode_text(
        tokenizer_of_kind(kind), " rice", first=False
    )


@pytest.mark.parametrize("kind", CHAT_KINDS)
def test_decoding_stops_at_the_token_that_ends_a_turn(kind: str) -> None:
    tokenizer = chat_tokenizer(kind)
    (*_, end) = tokenizer(CHAT_KINDS[kind].answer("0", ""), add_special_tokens=False).input_ids
    assert eos_token_ids(torch.nn.Module(), tokenizer) == {end, tokenizer.eos_token_id}


@pytest.mark.parametrize(
    "template", [None, "{% for m in messages %}{{ m.content }}\n{% endfor %}", "{{ raise_exception('no') }}"]
)
def test_chat_template_without_an_end_token_adds_none(template: str | None) -> None:
    assert turn_end_id(tokenizer_of_kind("byte level", template)) is None


@pytest.mark.parametrize("kind", KINDS)
def test_first_decoded_word_of_a_branch_keeps_its_space(kind: str) -> None:
    tokenizer = tokenizer_of_kind(kind)
    detokenizer = Detokenizer(tokenizer, encode_text(tokenizer, " What does Ada eat?", first=False))
    ids = encode_text(tokenizer, " rice beans", first=False)
    assert "".join([*map(detokenizer.push, ids), detokenizer.flush()]) == " rice beans"
