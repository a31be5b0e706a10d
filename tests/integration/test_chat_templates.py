"""Conversations under eight chat templates are trained on as transformers tokenises them."""

from __future__ import annotations

import random

import pytest
from chat_checks import check_conversation, random_conversation
from chat_templates import CHAT_KINDS

_RECORDS = 5000


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*begins an answer with:parallelmind.errors.UserNotice")
def test_random_conversations_give_the_ids_of_their_chat_template() -> None:
    rng, records = random.Random(0), 0
    while records < _RECORDS:
        kind = rng.choice(list(CHAT_KINDS))
        chat = CHAT_KINDS[kind]
        messages = random_conversation(kind, rng, rng.randint(1, 4), chat.reasons and rng.random() < 0.5)
        for turn in messages[:-1]:
            if turn["role"] == "assistant" and rng.random() < 0.2:
                turn["train"] = False
        turns = rng.choice(["last", "each", "all"] if chat.keeps_turns else ["last", "each"])
        records += check_conversation(kind, messages, turns)
