"""Chat with a model in the terminal, with one prompt or several parallel prompts per line.

    python -m workloads.chat lora_path=runs/demo-HASH/adapter

Each line is a prompt. Several prompts in one line, separated by ` || `, are branches of one sample and are
decoded in parallel:

    Who wrote it? || When was it written? || What is it about?
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

from pydantic import Field
from rich.columns import Columns
from rich.console import Console
from rich.live import Live
from rich.panel import Panel
from rich.text import Text

import parallelmind as pm
from parallelmind import cli
from parallelmind.config import GroupedConfig, resolve
from parallelmind.config.other_names import similar_name
from parallelmind.engine.linear import linearized
from parallelmind.engine.output import FinishReason
from parallelmind.engine.prompt import chat_ids
from parallelmind.errors import DecodingError, UserError, format_value
from parallelmind.storage import cache_dir
from workloads.common.empty_answers import ended_at_once, is_empty
from workloads.common.inference_config import InferenceModelConfig, SamplingConfig

COMMANDS = """/main TEXT          set the passage that all prompts share; /main alone removes it
/reset              clear the conversation and the passage
/temperature 0.7    change a setting, here or of any other sampling field; without a value: show it
/settings           show all settings
/help               show these commands
/quit               leave (Ctrl-D does the same); Ctrl-C stops the current answer
A || B              decode prompts A and B in parallel"""

_SEPARATOR = " || "
_NAMES = ("main", "reset", "settings", "help", "quit", "exit")  # of commands that are no settings


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

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        sampling: ChatSamplingConfig,
        main: str = "",
        lora_path: str | None = None,
    ) -> None:
        self.model, self.tokenizer, self.sampling = model, tokenizer, sampling
        self.main, self._lora_path = main, lora_path
        self.messages: list[dict[str, str]] = []
        self.console = Console(highlight=False)

    def handle_line(self, line: str) -> bool:
        """Run one command or answer one line of prompts. Returns False if the conversation ends."""
        command, _, argument = line.strip().partition(" ")
        if command in ("/quit", "/exit"):
            return False
        if command.startswith("/"):
            try:
                self._run_command(command[1:], argument.strip())
            except UserError as error:
                self._say(f"error: {error}")
        elif command:
            self.answer([prompt.strip() for prompt in line.split(_SEPARATOR) if prompt.strip()])
        return True

    def _run_command(self, name: str, argument: str) -> None:
        """Run a command. Raises UserError for one that does not exist, and for a bad value of a setting."""
        if name == "main":
            self.main = argument
        elif name == "reset":
            self.main, self.messages = "", []
        elif name == "help":
            self._say(COMMANDS)
        elif name == "settings":
            for field, value in self.sampling:
                self._say(f"{field}={format_value(value)}")
        elif name not in ChatSamplingConfig.model_fields:
            similar = similar_name(name, [*_NAMES, *ChatSamplingConfig.model_fields])
            hint = f" (did you mean /{similar}?)" if similar else ""
            raise UserError(f"/{name}: unknown command{hint}; /help lists them")
        else:
            self._set(name, argument)

    def _set(self, field: str, value: str) -> None:
        """Change a sampling setting if a value is given, and show it."""
        if value:
            changed = resolve(ChatSamplingConfig, self.sampling.model_dump(), [f"{field}={value}"])
            changed.to_kwargs()  # raises for a value out of range
            self.sampling = changed
        self._say(f"{field}={format_value(getattr(self.sampling, field))}")

    def _say(self, text: str) -> None:
        self.console.print(text, markup=False)

    def answer(self, prompts: list[str]) -> None:
        """Decode and show the answers. An error or Ctrl-C is reported, and the conversation continues."""
        try:
            if len(prompts) == 1:
                self._answer_single(prompts[0])
            else:
                self._answer_parallel(prompts)
        except (UserError, DecodingError) as error:
            self._say(f"error: {error}")
        except KeyboardInterrupt:
            self._say("\n(stopped)")

    def to_sample(self, prompt: str) -> pm.Sample:
        """The conversation with a new prompt, as the token ids of the chat template.

        With a passage, or without a chat template, the sample is the passage and the prompt as plain text.
        """
        if self.main or not self.tokenizer.chat_template:
            return pm.Sample(self.main, [prompt])
        messages = [*self.messages, {"role": "user", "content": prompt}]
        return pm.Sample(branches=[chat_ids(self.tokenizer, messages)])

    def _stream(self, sample: pm.Sample) -> Iterator[pm.Event]:
        settings = self.sampling.to_kwargs()
        return linearized(pm.stream(self.model, self.tokenizer, sample, **settings))

    def _answer_single(self, prompt: str) -> None:
        answer, reason = "", None
        for event in self._stream(self.to_sample(prompt)):
            event.raise_error()
            answer, reason = answer + event.text, event.finish_reason
            print(event.text, end="", flush=True)
        print()
        self._tell_empty([answer], [reason])
        self.messages += [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]

    def _answer_parallel(self, prompts: list[str]) -> None:
        texts = [""] * len(prompts)
        reasons: list[FinishReason | None] = [None] * len(prompts)
        is_terminal = self.console.is_terminal
        view = Live(_panels(prompts, texts), console=self.console, vertical_overflow="visible")
        with view if is_terminal else nullcontext():
            for event in self._stream(pm.Sample(self.main, prompts)):
                event.raise_error()
                texts[event.branch] += event.text
                reasons[event.branch] = event.finish_reason
                if is_terminal:
                    view.update(_panels(prompts, texts))
        if not is_terminal:
            for number, text in enumerate(texts, start=1):
                print(f"[{number}] {text.strip()}")
        self._tell_empty(texts, reasons)

    def _tell_empty(self, texts: Sequence[str], reasons: Sequence[FinishReason | None]) -> None:
        """Say why answers are empty that the model has ended."""
        for number, (text, reason) in enumerate(zip(texts, reasons, strict=True), start=1):
            if is_empty(text, reason):
                subject = f"branch {number}" if len(texts) > 1 else "answer"
                self._say(ended_at_once(subject, self._lora_path, bool(self.sampling.stop)))


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
    config.sampling.to_kwargs()  # raises for a value out of range before anything is loaded
    config.model.check()
    model, tokenizer = config.model.load()
    conversation = Conversation(model, tokenizer, config.sampling, config.main, config.model.lora_path)
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        print(COMMANDS)
    with line_history() if is_terminal else nullcontext():
        for line in read_lines("> " if is_terminal else ""):
            if not conversation.handle_line(line):
                return


def read_lines(prompt: str) -> Iterator[str]:
    """The lines that are typed, until the end of the input. Ctrl-C discards the line."""
    while True:
        try:
            yield input(prompt)
        except EOFError:
            return
        except KeyboardInterrupt:
            print("\n(Ctrl-D or /quit leaves)")


@contextmanager
def line_history() -> Iterator[None]:
    """Let lines be edited, and called back with the arrow keys, also those of earlier chats."""
    import readline  # from here on, `input` uses it

    file = cache_dir() / "chat_history"
    with suppress(OSError):  # none yet
        readline.read_history_file(file)
    readline.set_history_length(1000)
    try:
        yield
    finally:
        with suppress(OSError):  # history is a convenience: a full disk must not hide what was said
            file.parent.mkdir(parents=True, exist_ok=True)
            readline.write_history_file(file)


if __name__ == "__main__":
    cli.run(main)
