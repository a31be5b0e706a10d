"""Log-probabilities hold the bytes of each token, whether they are whole characters or not."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

from asgi import ingress_app, post_json
from tiny import tiny_tokenizer
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from parallelmind.engine.output import Event
from serving.engine.messages import BranchStarted, StepOutput
from serving.ingress.vocabulary import Vocabulary


def test_a_byte_level_vocabulary_has_the_bytes_of_every_token() -> None:
    tokenizer = tiny_tokenizer()
    vocabulary = Vocabulary(tokenizer)
    for text in ("who is ü?", "漢字 \U0001f600", "tab\tline\n"):
        tokens = tokenizer(text).input_ids
        assert b"".join(vocabulary.token_bytes(token) or b"" for token in tokens) == text.encode()
    assert vocabulary.token_bytes(1) == b"<s>"


def test_a_vocabulary_of_characters_has_the_bytes_of_its_byte_tokens_alone() -> None:
    tokens = {"<unk>": 0, "<0xE2>": 1, "<0x0A>": 2, "\u2581who": 3, "\u2581": 4, "\ufffd": 5}
    backend = Tokenizer(models.BPE(vocab=tokens, merges=[], unk_token="<unk>", byte_fallback=True))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    vocabulary = Vocabulary(PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>"))
    assert [vocabulary.token_bytes(token) for token in range(1, 7)] == [
        b"\xe2",
        b"\n",
        b" who",
        b" ",
        None,
        None,
    ]


def test_a_chat_response_holds_half_a_character_as_its_byte(tmp_path: Path) -> None:
    first = tiny_tokenizer()("ü").input_ids[0]
    steps = [
        StepOutput([], [BranchStarted(0, (0, 0))]),
        StepOutput([Event(0, "", first, "length", -0.5, ((first, -0.5), (299 + 7, -9.0)))]),
    ]
    body = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "who"}],
        "logprobs": True,
        "top_logprobs": 2,
    }
    reply = asyncio.run(post_json(ingress_app(tmp_path, steps), "/v1/chat/completions", body))
    (token,) = json.loads(reply.body)["choices"][0]["logprobs"]["content"]
    assert (token["bytes"], [top["bytes"] for top in token["top_logprobs"]]) == ([0xC3], [[0xC3], None])
