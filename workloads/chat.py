"""Talk to a model in the terminal, on several branches at once.

    python -m workloads.chat lora_path=runs/demo-HASH/adapter

A line is a prompt. Several prompts in one line, separated by ` || `, are branches that are decoded side by
side:

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
from parallelmind.errors import UserError
from workloads.common.inference_config import InferenceModelConfig, SamplingConfig

COMMANDS = """/main TEXT   set the passage that all prompts share; /main alone removes it
/reset       forget the conversation and the passage
/help        show this
/quit        leave (so does Ctrl-D); Ctrl-C stops an answer
A || B       decode prompts A and B side by side"""

_SEPARATOR = " || "


class ChatConfig(SamplingConfig, InferenceModelConfig):
    """One conversation."""

    max_new_tokens: int = Field(256, description="most new tokens per branch")
    main: str = Field("", description="passage that all prompts share from the beginning")


class Chat:
    """The state of a conversation: single prompts add up to one, branches stand beside it."""

    def __init__(self, model: Any, tokenizer: Any, sampling: dict[str, Any], main: str = "") -> None:
        self.model, self.tokenizer, self.sampling = model, tokenizer, sampling
        self.main = main
        self.messages: list[dict[str, str]] = []
        self.console = Console(highlight=False)

    def handle(self, line: str) -> bool:
        """Do what one line asks; False ends the conversation."""
        command, _, rest = line.strip().partition(" ")
        if command in ("/quit", "/exit"):
            return False
        if command == "/main":
            self.main = rest.strip()
        elif command == "/reset":
            self.main, self.messages = "", []
        elif command.startswith("/"):
            self.console.print(COMMANDS, markup=False)
        elif command:
            self.answer([part.strip() for part in line.split(_SEPARATOR) if part.strip()])
        return True

    def answer(self, prompts: list[str]) -> None:
        """Decode and show; a UserError is one line, and the conversation goes on."""
        try:
            if len(prompts) == 1:
                self.answer_one(prompts[0])
            else:
                self.answer_all(prompts)
        except UserError as error:
            self.console.print(f"error: {error}", markup=False)
        except KeyboardInterrupt:
            self.console.print("\n(stopped)", markup=False)

    def answer_one(self, prompt: str) -> None:
        said = ""
        for event in pm.stream(self.model, self.tokenizer, self.sample_of(prompt), **self.sampling):
            said += event.text
            print(event.text, end="", flush=True)
        print()
        self.messages += [{"role": "user", "content": prompt}, {"role": "assistant", "content": said}]

    def sample_of(self, prompt: str) -> pm.Sample:
        """The conversation so far through the chat template; plain text where there is a passage or no
        template.
        """
        if self.main or not self.tokenizer.chat_template:
            return pm.Sample(self.main, [prompt])
        messages = [*self.messages, {"role": "user", "content": prompt}]
        return pm.Sample(
            branches=[
                self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            ]
        )

    def answer_all(self, prompts: list[str]) -> None:
        texts = [""] * len(prompts)
        events = pm.stream(self.model, self.tokenizer, pm.Sample(self.main, prompts), **self.sampling)
        if not self.console.is_terminal:
            for event in events:
                texts[event.branch] += event.text
            for number, text in enumerate(texts, start=1):
                print(f"[{number}] {text.strip()}")
            return
        with Live(_columns(prompts, texts), console=self.console, vertical_overflow="visible") as live:
            for event in events:
                texts[event.branch] += event.text
                live.update(_columns(prompts, texts))


def _columns(prompts: list[str], texts: list[str]) -> Columns:
    panels = [
        Panel(Text(text.strip()), title=Text(prompt)) for prompt, text in zip(prompts, texts, strict=True)
    ]
    return Columns(panels, equal=True, expand=True)


def main(argv: list[str]) -> None:
    if cli.wants_help(argv):
        return cli.print_help(f"{(__doc__ or '').strip()}\n\n{COMMANDS}", ChatConfig)
    config = cli.parse(ChatConfig, argv)
    sampling = config.sampling_kwargs()
    chat = Chat(*config.load_model(), sampling, config.main)
    if terminal := sys.stdin.isatty():
        print(COMMANDS)
    while True:
        try:
            line = input("> " if terminal else "")
        except EOFError:
            return None
        if not chat.handle(line):
            return None


if __name__ == "__main__":
    cli.run(main)
