"""The Hugging Face hub, and the cache of its files on this machine."""

from __future__ import annotations

import time
import warnings
from functools import lru_cache
from pathlib import Path
from threading import Thread

from huggingface_hub import constants, get_session, is_offline_mode, try_to_load_from_cache

from parallelmind.errors import UserError, UserNotice, first_line

_TIMEOUT_S = 3.0
_REMEMBERED_S = 60.0  # how long the answer of one request counts


def find_hub_model(name: str) -> str:
    """The hub id itself while the hub answers, otherwise the folder of its cached files.

    transformers reads a folder without the network; for a hub id it would retry for minutes. Raises UserError
    if the hub does not answer and the model is not cached.
    """
    cached, problem = _look_up(name)
    if problem is None:
        return name
    warnings.warn(
        UserNotice(f"base_model={name}: read from the cache, since the hub cannot be reached ({problem})"),
        stacklevel=2,
    )
    return str(cached)


def check_hub_model(name: str) -> None:
    """Raise UserError as `find_hub_model` does."""
    _look_up(name)


def _look_up(name: str) -> tuple[Path | None, str | None]:
    """The folder of the cached files and why the hub cannot be used; both None while it answers."""
    problem = hub_problem()
    if problem is None:
        return None, None
    config = try_to_load_from_cache(name, "config.json")
    if not isinstance(config, str):
        raise UserError(
            f"base_model={name}: is not in the hub's cache on this machine, and the hub cannot be reached "
            f"({problem}); connect this machine to it, or give a local folder"
        )
    return Path(config).parent, problem


def hub_problem() -> str | None:
    """Why the hub cannot be used, None if it answers. The answer of one request counts for a minute."""
    return _hub_problem(int(time.monotonic() / _REMEMBERED_S))


@lru_cache(maxsize=1)
def _hub_problem(period: int) -> str | None:
    """Why the hub cannot be used, None if it answers. period: number of the time span that the answer is for.

    The request runs in a thread, since no timeout of a request covers the look-up of the host's name.
    """
    if is_offline_mode():
        return "HF_HUB_OFFLINE is set"
    problems = [f"{constants.ENDPOINT} does not answer within {_TIMEOUT_S:g} s"]
    thread = Thread(target=_request, args=[problems], daemon=True)
    thread.start()
    thread.join(_TIMEOUT_S)
    return problems[0] if problems else None


def _request(problems: list[str]) -> None:
    """Send one request. Clears `problems` if the hub answers, or replaces its item."""
    try:
        answer = get_session().head(constants.ENDPOINT, timeout=2 * _TIMEOUT_S)
    except Exception as error:  # the HTTP library is huggingface_hub's choice; the reason is reported
        problems[:] = [f"{constants.ENDPOINT}: {first_line(error)}"]
        return
    problems[:] = [f"{constants.ENDPOINT} answers {answer.status_code}"] if answer.status_code >= 500 else []
