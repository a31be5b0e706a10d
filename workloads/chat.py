"""Chat with a model in the terminal, with one prompt or several parallel prompts per line.

    python -m workloads.chat lora_path=runs/demo-HASH/adapter

Each line is a prompt. Several prompts in one line, separated by ` || `, are branches of one sample and are
decoded in parallel:

    Who wrote it? || When was it written? || What is it about?
"""

from __future__ import annotations

import sys
from typing import Any

from pydantic import Field
from rich.columns import Columns
from rich.console import Console
from rich.live import Live
from rich.panel import Panel
from rich.text import Text

import parallelmind as pm
from parallelmind import cli
from parallelmind.config import GroupedConfig
from parallelmind.engine.linear import linearized
from parallelmind.engine.prompt import chat_ids
from parallelmind.errors import DecodingError, UserError
from workloads.common.inference_config import InferenceModelConfig, SamplingConfig

COMMANDS = """/main TEXT   set the passage that all prompts share; /main alone removes it
/reset       clear the conversation and the passage
/help        show these commands
/quit        leave (Ctrl-D does the same); Ctrl-C stops the current answer
A || B       decode prompts A and B in parallel"""

_SEPARATOR = " || "


class ChatSamplingConfig(SamplingConfig):
    """Answer length. Overrides the default of other commands."""

    max_new_tokens: int = Field(256, description="maximum number of new tokens per branch")


class ChatConfig(GroupedConfig):
    """Conversation."""

    main: str = Field("", description="passage that all prompts share")
    sampling: ChatSamplingConfig
    model: InferenceModelConfig


class Conversation:
    """State of one chat: the passage and the messages. Only single prompts add messages."""

    def __init__(self, model: Any, tokenizer: Any, sampling: dict[str, Any], main: str = "") -> None:
        self.model, self.tokenizer, self.sampling = model, tokenizer, sampling
        self.main = main
        self.messages: list[dict[str, str]] = []
        self.console = Console(highlight=False)

    def handle_line(self, line: str) -> bool:
        """Run one command or answer one line of prompts. Returns False if the conversation ends."""
        command, _, argument = line.strip().partition(" ")
        if command in ("/quit", "/exit"):
            return False
        if command == "/main":
            self.main = argument.strip()
        elif command == "/reset":
            self.main, self.messages = "", []
        elif command.startswith("/"):
            self.console.print(COMMANDS, markup=False)
        elif command:
            self.answer([prompt.strip() for prompt in line.split(_SEPARATOR) if prompt.strip()])
        return True

    def answer(self, prompts: list[str]) -> None:
        """Decode and show the answers. An error or Ctrl-C is reported, and the conversation continues."""
        try:
            if len(prompts) == 1:
                self._answer_single(prompts[0])
            else:
                self._answer_parallel(prompts)
        except (UserError, DecodingError) as error:
            self.console.print(f"error: {error}", markup=False)
        except KeyboardInterrupt:
            self.console.print("\n(stopped)", markup=False)

    def to_sample(self, prompt: str) -> pm.Sample:
        """The conversation with a new prompt, as the token ids of the chat template.

        With a passage, or without a chat template, the sample is the passage and the prompt as plain text.
        """
        if self.main or not self.tokenizer.chat_template:
            return pm.Sample(self.main, [prompt])
        messages = [*self.messages, {"role": "user", "content": prompt}]
        return pm.Sample(branches=[chat_ids(self.tokenizer, messages)])

    def _answer_single(self, prompt: str) -> None:
        answer = ""
        events = pm.stream(self.model, self.tokenizer, self.to_sample(prompt), **self.sampling)
        for event in linearized(events):
            event.raise_error()
            answer += event.text
            print(event.text, end="", flush=True)
        print()
        self.messages += [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]

    def _answer_parallel(self, prompts: list[str]) -> None:
        texts = [""] * len(prompts)
        sample = pm.Sample(self.main, prompts)
        events = linearized(pm.stream(self.model, self.tokenizer, sample, **self.sampling))
        if not self.console.is_terminal:
            for event in events:
                event.raise_error()
                texts[event.branch] += event.text
            for number, text in enumerate(texts, start=1):
                print(f"[{number}] {text.strip()}")
            return
        with Live(_panels(prompts, texts), console=self.console, vertical_overflow="visible") as live:
            for event in events:
                event.raise_error()
                texts[event.branch] += event.text
                live.update(_panels(prompts, texts))


def _panels(prompts: list[str], texts: list[str]) -> Columns:
    panels = [
        Panel(Text(text.strip()), title=Text(prompt)) for prompt, text in zip(prompts, texts, strict=True)
    ]
    return Columns(panels, equal=True, expand=True)


def main(argv: list[str]) -> None:
    if cli.wants_help(argv):
        cli.print_help(f"{(__doc__ or '').strip()}\n\n{COMMANDS}", ChatConfig)
        return
    config = cli.parse(ChatConfig, argv)
    sampling = config.sampling.to_kwargs()  # raises for a value out of range before anything is loaded
    config.model.check()
    conversation = Conversation(*config.model.load(), sampling, config.main)
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        print(COMMANDS)
    while True:
        try:
            line = input("> " if is_terminal else "")
        except EOFError:
            return
        if not conversation.handle_line(line):
            return


if __name__ == "__main__":
    cli.run(main)
