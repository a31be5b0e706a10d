"""Log-probabilities tell the bytes of each token, whole characters or not."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

from asgi import front, post
from tiny import tiny_tokenizer
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from parallelmind.engine.output import Event
from parallelmind.engine.sampling_params import SamplingParams
from serving.config import AppConfig
from serving.engine.messages import BranchStarted, StepOutput
from serving.ingress.preprocessor import RequestPreprocessor


def asker(tokenizer: Any) -> RequestPreprocessor:
    return RequestPreprocessor(AppConfig.of({"base_model": "tiny"}), tokenizer, None)


def test_a_vocabulary_of_bytes_tells_them_all() -> None:
    tokenizer = tiny_tokenizer()
    known = asker(tokenizer)
    for text in ("who is ü?", "漢字 \U0001f600", "tab\tline\n"):
        assert b"".join(known.encoded(token) or b"" for token in tokenizer(text).input_ids) == text.encode()
    assert known.encoded(1) == b"<s>"


def test_a_vocabulary_of_characters_tells_its_single_bytes_and_no_more() -> None:
    vocab = {"<unk>": 0, "<0xE2>": 1, "<0x0A>": 2, "\u2581who": 3, "\u2581": 4, "\ufffd": 5}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    known = asker(PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>"))
    assert [known.encoded(token) for token in range(1, 7)] == [b"\xe2", b"\n", b" who", b" ", None, None]


def test_a_chat_is_told_half_a_character_as_its_byte(tmp_path: Path) -> None:
    first = tiny_tokenizer()("ü").input_ids[0]
    told = [
        StepOutput([], [BranchStarted(0, [5], SamplingParams(), (0, 0))]),
        StepOutput([Event(0, "", first, "length", -0.5, ((first, -0.5), (299 + 7, -9.0)))], []),
    ]
    body = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "who"}],
        "logprobs": True,
        "top_logprobs": 2,
    }
    reply = asyncio.run(post(front(tmp_path, told).__serve_build_asgi_app__(), "/v1/chat/completions", body))
    (token,) = json.loads(reply.body)["choices"][0]["logprobs"]["content"]
    assert (token["bytes"], [each["bytes"] for each in token["top_logprobs"]]) == ([0xC3], [[0xC3], None])
