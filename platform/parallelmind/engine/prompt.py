"""What callers may give as a prompt: a text, a chat or a sample, alone or in a list."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from parallelmind.engine.request import Sample, Text, is_list
from parallelmind.errors import UserError, first_line, short_repr

if TYPE_CHECKING:  # a model library takes seconds to import
    from transformers import PreTrainedTokenizerBase

Message = Mapping[str, Any]  # role and content, as the chat template takes them
Prompt = Text | Sequence[Message] | Sample


class GivenPrompt(NamedTuple):
    """A prompt as a sample. is_lone: whether it was a text or a chat, whose answer is one text."""

    sample: Sample
    is_lone: bool

    def with_documents(self, documents: Sequence[Text]) -> GivenPrompt:
        """The prompt after documents: a text or a chat reads them, as the reduce of a sample does."""
        if self.is_lone and len(documents):
            return GivenPrompt(Sample(reduce=self.sample.branches[0], documents=documents), True)
        return GivenPrompt(self.sample.with_documents(documents), self.is_lone)


def to_prompts(
    tokenizer: PreTrainedTokenizerBase, given: Any, documents: Sequence[Text] = ()
) -> tuple[list[GivenPrompt], bool]:
    """The prompts that were given, and whether they were a list. Raises UserError for anything else.

    documents: texts that each of them reads.
    """
    if is_list(given) and not _is_chat(given) and not _is_token_ids(given):
        return [_to_prompt(tokenizer, prompt).with_documents(documents) for prompt in given], True
    return [_to_prompt(tokenizer, given).with_documents(documents)], False


def chat_ids(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> list[int]:
    """Token ids of a conversation and the header of the answer.

    Raises UserError without a chat template, and for messages that it refuses.
    """
    if not tokenizer.chat_template:
        raise UserError("messages: the model has no chat template; give a text")
    try:
        ids: Any = tokenizer.apply_chat_template(
            [dict(message) for message in messages], add_generation_prompt=True, return_dict=False
        )
    except Exception as error:  # a template is a program of the model and may raise anything
        raise UserError(
            f"messages: the model's chat template refuses them ({first_line(error)}); change them"
        ) from error
    return list(ids)


def _to_prompt(tokenizer: PreTrainedTokenizerBase, given: Any) -> GivenPrompt:
    if isinstance(given, Sample):
        return GivenPrompt(given, is_lone=False)
    if is_list(given) and _is_chat(given):
        return GivenPrompt(Sample(branches=[chat_ids(tokenizer, given)]), is_lone=True)
    if isinstance(given, str) or (is_list(given) and _is_token_ids(given)):
        return GivenPrompt(Sample(branches=[given]), is_lone=True)
    raise UserError(
        f"prompt={short_repr(given)}: give a text, pm.Sample(main=…, branches=[…]), the messages of a chat, "
        "or a list of these"
    )


def _is_chat(items: Any) -> bool:
    return len(items) > 0 and all(isinstance(item, Mapping) and "role" in item for item in items)


def _is_token_ids(items: Any) -> bool:
    """Whether a list or an array holds numbers, or numbers without dimensions of NumPy or torch."""
    if hasattr(items, "ndim"):
        return bool(items.ndim == 1)
    return len(items) > 0 and not is_list(items[0]) and not isinstance(items[0], (str, Mapping, Sample))
