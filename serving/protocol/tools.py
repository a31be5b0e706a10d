"""Tools in chat requests: functions that an answer may call, and calls in the history."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, StringConstraints

import parallelmind as pm
from serving.protocol.fields import Ignored, Items, Str, StrictRequest
from serving.protocol.strict_json import JsonObject, parse_json

MAX_TOOLS = 128

Name = Annotated[str, StringConstraints(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]


def check_object(text: str) -> str:
    """A JSON object as text, such as the arguments of a call. Raises ValueError for anything else."""
    try:
        is_object = isinstance(parse_json(text or "{}"), dict)
    except ValueError:
        is_object = False
    if not is_object:
        raise ValueError("give a JSON object as text")
    return text


class Function(StrictRequest):
    """parameters: JSON schema of the arguments."""

    name: Name
    description: Str | None = None
    parameters: JsonObject = Field(default_factory=lambda: {"type": "object", "properties": {}})
    strict: bool | None = None


class Tool(StrictRequest):
    type: Literal["function"]
    function: Function


class FunctionName(StrictRequest):
    name: Name


class NamedTool(StrictRequest):
    type: Literal["function"]
    function: FunctionName


class CalledFunction(StrictRequest):
    """parsed_arguments: what `parse()` of OpenAI's client adds to an answer."""

    name: Str
    arguments: Annotated[Str, AfterValidator(check_object)]
    parsed_arguments: Ignored = None


class ToolCall(StrictRequest):
    """A call that an earlier answer made. index: some clients send back what a stream held."""

    id: Str
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = None

    def as_turn(self) -> dict[str, Any]:
        """The call as chat templates take it: with the arguments as an object."""
        arguments = json.loads(self.function.arguments or "{}")
        function = {"name": self.function.name, "arguments": arguments}
        return {"id": self.id, "type": "function", "function": function}


class ToolFields(StrictRequest):
    """tool_choice: none: the tools are not shown to the model; auto: the model decides; required: the answer
    calls tools; a named tool: the answer calls this one.
    """

    tools: Annotated[Items[Tool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool = True

    @property
    def shown_tools(self) -> list[Tool]:
        """The tools that the answer may call."""
        return [] if self.tool_choice == "none" else self.tools or []

    @property
    def requires_call(self) -> bool:
        """Whether the answer has to call a tool."""
        return self.tool_choice == "required" or isinstance(self.tool_choice, NamedTool)

    def check_tools(self) -> None:
        """Raise UserError for tools with one name, and for a choice that names none of them."""
        names = [tool.function.name for tool in self.tools or []]
        double = next((name for name in names if names.count(name) > 1), None)
        if double is not None:
            raise pm.UserError(f'tools: two are named "{double}"; give each a name of its own')
        if self.requires_call and not names:
            raise pm.UserError("tool_choice: needs tools; give them")
        if isinstance(self.tool_choice, NamedTool) and self.tool_choice.function.name not in names:
            name = self.tool_choice.function.name
            raise pm.UserError(f"tool_choice={name!r}: is not one of the tools; use {', '.join(names)}")
