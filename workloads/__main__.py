"""Branch-parallel language models: train, sweep, decode, measure and serve them.

    parallelmind COMMAND [key=value …]
    parallelmind COMMAND --help

In the project's folder and in jobs, `python -m workloads.COMMAND` is the same.
"""

from __future__ import annotations

from parallelmind import cli
from parallelmind.config.other_names import similar_name
from parallelmind.errors import UserError
from parallelmind.programs import import_program

# The module and the purpose of each command.
COMMANDS = {
    "train": ("workloads.train.command", "train an adapter or a whole model"),
    "sweep": ("workloads.sweep.command", "search a space of training runs"),
    "generate": ("workloads.generate.command", "continue prompts and files"),
    "chat": ("workloads.chat", "chat in the terminal, also with several prompts at once"),
    "evaluate": ("workloads.evaluate.command", "answers, branch tax, attention maps, supported models"),
    "serve": ("serving.__main__", "serve a model and its adapters over HTTP"),
    "convert": ("workloads.data.convert", "convert data to parallel JSONL; --inspect shows it"),
    "doctor": ("workloads.doctor.command", "check an installation or a cluster"),
    "export": ("workloads.export", "write an adapter for other libraries"),
    "push": ("workloads.push", "upload an adapter or a model to the Hugging Face hub"),
    "demo": ("workloads.demo", "train a small adapter on generated data, and use it"),
}


def run_command(argv: list[str]) -> None:
    """Run the command that the first argument names, or list all. Raises UserError for an unknown one."""
    name, *arguments = argv or ["--help"]
    if cli.wants_help([name]):
        print(f"{cli.flowing(__doc__ or '')}\n\nCommands:")
        print("\n".join(f"  {command:<10}{purpose}" for command, (_, purpose) in COMMANDS.items()))
    elif name in COMMANDS:
        import_program(COMMANDS[name][0]).main(arguments)
    else:
        similar = similar_name(name, COMMANDS)
        hint = f" (did you mean {similar}?)" if similar else ""
        raise UserError(f"{name}: no such command{hint}; choose from {', '.join(COMMANDS)}")


def main() -> None:
    cli.run(run_command)


if __name__ == "__main__":
    main()
