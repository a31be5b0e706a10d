"""Chat templates of eight kinds, with a tokenizer for each, and what each writes for an answer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from tokenizers_by_kind import tokenizer_of_kind
from transformers import PreTrainedTokenizerFast

_CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_LLAMA2 = (
    "{% set ns = namespace(system='') %}{% for m in messages %}"
    "{% if m.role == 'system' %}{% set ns.system = '<<SYS>>\n' + m.content + '\n<</SYS>>\n\n' %}"
    "{% elif m.role == 'user' %}{{ bos_token + '[INST] ' + ns.system + m.content.strip() + ' [/INST]' }}"
    "{% set ns.system = '' %}"
    "{% else %}{{ ' ' + m.content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
_LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|head|>{{ m.role }}<|/head|>\n\n{{ m.content.strip() }}<|eot|>"
    "{% endfor %}{% if add_generation_prompt %}<|head|>assistant<|/head|>\n\n{% endif %}"
)
_MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content + '\n\n' }}"
    "{% elif m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% else %}{{ m.content + eos_token }}{% endif %}{% endfor %}"
)
_GEMMA = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}"
    "{% endif %}<|turn|>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content.strip() }}<|end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|turn|>model\n{% endif %}"
)
_PHI3 = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)
_QWEN3 = (  # thinking stands in turns after the last question; the last turn has it, be it empty
    "{% set ns = namespace(last=0) %}{% for m in messages %}"
    "{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% set thought = m.reasoning_content if m.reasoning_content is string else '' %}"
    "{% if m.role == 'assistant' and loop.index0 > ns.last and (loop.last or thought) %}"
    "<think>\n{{ thought.strip() }}\n</think>\n\n{{ m.content.lstrip() }}"
    "{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_DEEPSEEK = (  # thinking is stripped from every turn, and decoding begins with it
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}"
    "{% elif m.role == 'user' %}<|user|>{{ m.content }}"
    "{% else %}<|assistant|>{{ m.content.split('</think>')[-1] }}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}"
)


@dataclass(frozen=True, slots=True)
class ChatKind:
    """A chat template and its tokenizer.

    answer: what the template writes for the content and the reasoning of a last turn, up to the token that
    ends it. final: what it writes after the last turn. system: it takes system turns. reasons: it writes
    reasoning. reopens: its generation prompt holds more than the beginning of a rendered answer. keeps_turns:
    it renders earlier answers as it renders the last one.
    """

    template: str
    tokenizer: str
    special_tokens: tuple[str, ...]
    answer: Callable[[str, str], str]
    final: str = ""
    system: bool = True
    reasons: bool = False
    reopens: bool = False
    keeps_turns: bool = True


CHAT_KINDS = {
    "chatml": ChatKind(
        _CHATML, "byte level", ("<|im_start|>", "<|im_end|>"), lambda text, _: f"{text}<|im_end|>"
    ),
    "llama2": ChatKind(_LLAMA2, "metaspace first", (), lambda text, _: f" {text.strip()} </s>"),
    "llama3": ChatKind(
        _LLAMA3,
        "byte level after a split",
        ("<|head|>", "<|/head|>", "<|eot|>"),
        lambda text, _: f"{text.strip()}<|eot|>",
    ),
    "mistral": ChatKind(_MISTRAL, "prepend", ("[INST]", "[/INST]"), lambda text, _: f" {text}</s>"),
    "gemma": ChatKind(
        _GEMMA, "replace", ("<|turn|>", "<|end|>"), lambda text, _: f"{text.strip()}<|end|>", system=False
    ),
    "phi3": ChatKind(
        _PHI3,
        "prepend",
        ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
        lambda text, _: f"{text}<|end|>",
        final=" \n</s>",  # its tokenizer puts a space after a special token
    ),
    "qwen3": ChatKind(
        _QWEN3,
        "byte level after a split",
        ("<|im_start|>", "<|im_end|>"),
        lambda text, thought: f"<think>\n{thought.strip()}\n</think>\n\n{text.lstrip()}<|im_end|>",
        reasons=True,
        keeps_turns=False,
    ),
    "deepseek": ChatKind(
        _DEEPSEEK,
        "byte level after a split",
        ("<|user|>", "<|assistant|>"),
        lambda text, _: f"{text}</s>",
        reopens=True,
    ),
}


@cache
def chat_tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """The tokenizer of one kind of chat, shared by all tests of a process."""
    chat = CHAT_KINDS[kind]
    tokenizer = tokenizer_of_kind(chat.tokenizer, chat.template)
    tokenizer.add_special_tokens({"additional_special_tokens": list(chat.special_tokens)})
    return tokenizer
