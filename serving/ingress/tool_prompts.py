"""Describe tools to a model with its chat template, or with a system prompt for templates without tools."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

from parallelmind.engine.grammar import Grammar
from serving.protocol.tool_calls import CLOSE, OPEN
from serving.protocol.tools import NamedTool, Tool, ToolFields

Turn = dict[str, Any]  # a message as chat templates take it
JsonTool = dict[str, Any]
Render = Callable[[Sequence[Turn], Sequence[JsonTool]], str]

_MAX_CALLS = 16  # of an answer that has to call tools; a small model may never end

# For a template that does not show tools to the model.
_PROMPT = """\
You can call functions. Each line between <tools> and </tools> describes one of them as JSON:
<tools>
{tools}
</tools>
To call one, write its name and its arguments as JSON between these tags, and nothing else:
<tool_call>
{{"name": "function name", "arguments": {{"argument": "value"}}}}
</tool_call>"""
_TOOL: dict[str, Any] = {
    "type": "function",
    "function": {"name": "probe_tool", "description": "", "parameters": {"type": "object", "properties": {}}},
}
_USER: Turn = {"role": "user", "content": "0"}
_CALL: Turn = {
    "role": "assistant",
    "content": "",
    "tool_calls": [
        {"id": "call00000", "type": "function", "function": {"name": "probe_tool", "arguments": {"k": 1}}}
    ],
}


class ToolPrompts:
    """What a model's chat template knows of tools, found out by rendering two short conversations."""

    def __init__(self, render: Render) -> None:
        """render: raises for a conversation that the template refuses."""
        self._render = render

    @cached_property
    def is_known(self) -> bool:
        """Whether the template shows tools to the model."""
        return "probe_tool" in self._rendered([_USER], [_TOOL])

    @cached_property
    def has_tags(self) -> bool:
        """Whether a call stands between tags; else an answer is a call as a whole."""
        return not self.is_known or not self._call or OPEN in self._call

    @cached_property
    def _call(self) -> str:
        """An answer that calls a tool; empty if the template does not write it."""
        written = self._rendered([_USER, _CALL], [_TOOL])
        return written if '"k"' in written else ""

    def _rendered(self, turns: list[Turn], tools: list[JsonTool]) -> str:
        try:
            return self._render(turns, tools)
        except Exception:  # a template is a program of the model and may raise anything
            return ""

    def turns(self, turns: Sequence[Turn], tools: Sequence[Tool]) -> tuple[list[Turn], list[JsonTool]]:
        """The turns, and the tools, as the template takes them. Without tools the second is empty."""
        shown = [tool.model_dump(exclude_none=True) for tool in tools]
        if self.is_known:
            return list(turns), shown
        plain = list(map(_plain_turn, turns))
        if not shown:
            return plain, []
        prompt = _PROMPT.format(tools="\n".join(json.dumps(tool["function"]) for tool in shown))
        if plain and plain[0]["role"] in ("system", "developer"):
            first, *plain = plain
            return [{**first, "content": f"{first['content']}\n\n{prompt}"}, *plain], []
        return [{"role": "system", "content": prompt}, *plain], []

    def grammar(self, request: ToolFields) -> Grammar | None:
        """What an answer follows that has to call a tool. Raises UserError for one that is too complex."""
        if not request.requires_call:
            return None
        chosen = request.tool_choice
        if isinstance(chosen, NamedTool):
            tools = [tool for tool in request.shown_tools if tool.function.name == chosen.function.name]
            return Grammar.of({"lark": self._lark(tools, several=False)}, "tools")
        return Grammar.of({"lark": self._lark(request.shown_tools, request.parallel_tool_calls)}, "tools")

    def _lark(self, tools: Sequence[Tool], several: bool) -> str:
        """One call of the tools, or several calls."""
        key = "parameters" if '"parameters": {"k"' in self._call else "arguments"
        schemas = [Grammar.of({"json": tool.function.parameters}, "tools").text for tool in tools]
        calls = [
            json.dumps(f'{{"name": {json.dumps(tool.function.name)}, "{key}": ') + f" %json {schema} " + '"}"'
            for tool, schema in zip(tools, schemas, strict=True)
        ]
        call = "call: " + "\n    | ".join(calls)
        if not self.has_tags:
            return f"start: call\n{call}"
        tagged = f'"{OPEN}\\n" call "\\n{CLOSE}"'
        repeated = f' ("\\n" {tagged}){{0,{_MAX_CALLS - 1}}}' if several else ""
        return f"start: {tagged}{repeated}\n{call}"


def _plain_turn(turn: Turn) -> Turn:
    """A turn for a template that knows neither calls nor their results."""
    if turn["role"] == "tool":
        return {"role": "user", "content": f"<tool_response>\n{turn['content']}\n</tool_response>"}
    if "tool_calls" not in turn:
        return turn
    functions = [json.dumps(call["function"], ensure_ascii=False) for call in turn["tool_calls"]]
    parts = [turn["content"], *(f"{OPEN}\n{function}\n{CLOSE}" for function in functions)]
    return {"role": turn["role"], "content": "\n".join(filter(None, parts))}
