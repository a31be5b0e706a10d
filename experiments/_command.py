"""The command line of the modules that make data of experiments and measure adapters."""

from __future__ import annotations

import inspect
from collections.abc import Callable

from parallelmind import cli
from parallelmind.errors import UserError


def run(main: Callable[..., None]) -> None:
    """Call `main` with the arguments of the command line. A mistake of the user and Ctrl-C end in one line.

    The module of `main` shows its usage as an indented line of its docstring.
    """

    def checked(arguments: list[str]) -> None:
        try:
            inspect.signature(main).bind(*arguments)
        except TypeError as error:
            lines = main.__globals__["__doc__"].splitlines()
            usage = next(line.strip() for line in lines if line.startswith("    python -m experiments"))
            raise UserError(f"arguments: {error}; usage: {usage}") from None
        main(*arguments)

    cli.run(checked)
