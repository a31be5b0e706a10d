"""The limits of what one request may ask an engine for."""

from __future__ import annotations

from collections.abc import Sequence

import parallelmind as pm
from parallelmind.engine.sampling_params import SamplingParams
from serving.config import RequestLimits


class SampleLimits:
    """Checks that raise UserError with field, value and limit. field: named if the limit is exceeded."""

    def __init__(self, limits: RequestLimits, max_context_tokens: int | None) -> None:
        """max_context_tokens: positions that the model supports; None if unknown."""
        self._limits, self._max_context_tokens = limits, max_context_tokens

    def default_tokens(self, max_tokens: int, prompt_tokens: int = 0) -> int:
        """A default of max_tokens, or what the limits and the prompt leave of it."""
        context = self._max_context_tokens
        room = max_tokens if context is None or not prompt_tokens else context - prompt_tokens
        return max(1, min(max_tokens, room, self._limits.max_new_tokens))

    def require_context(self, field: str, prompt_tokens: int, max_new_tokens: int) -> None:
        limit = self._max_context_tokens
        if max_new_tokens > self._limits.max_new_tokens:
            return  # which is an error of its own
        if limit is not None and prompt_tokens + max_new_tokens > limit:
            raise pm.UserError(
                f"{field}: the prompt is too long: this model's maximum context length is {limit} tokens, "
                f"and {prompt_tokens} tokens with max_tokens={max_new_tokens} exceed it; shorten it or lower "
                "max_tokens"
            )

    def require_branches(self, field: str, branches: int) -> None:
        limit = self._limits.max_branches
        if branches > limit:
            raise pm.UserError(f"{field}: {branches} branches, {limit} allowed in one request; send several")

    def require_tokens(self, field: str, prompt_tokens: int, params: Sequence[SamplingParams]) -> None:
        limit = self._limits.max_prompt_tokens
        if prompt_tokens > limit:
            raise pm.UserError(
                f"{field}: the prompt is too long: {prompt_tokens} tokens, {limit} allowed by the server; "
                "shorten it or send several requests"
            )
        longest = max(branch.max_new_tokens for branch in params)
        if longest > self._limits.max_new_tokens:
            raise pm.UserError(
                f"max_new_tokens={longest}: {self._limits.max_new_tokens} allowed; give no more"
            )
