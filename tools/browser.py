"""The system's Chromium, driven by playwright; nothing is downloaded."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from parallelmind.errors import UserError

if TYPE_CHECKING:
    from playwright.sync_api import Browser

_NAMES = ("chromium", "chromium-browser", "google-chrome")


def installed() -> str:
    """Return the path of the browser. Raises UserError if none is installed."""
    path = next(filter(None, map(shutil.which, _NAMES)), None)
    if path is None:
        raise UserError(f"none of {', '.join(_NAMES)} is installed; install one")
    return path


@contextmanager
def chromium() -> Iterator[Browser]:
    """Start a headless browser for the duration of the block.

    Raises:
        UserError: No browser is installed.
        ImportError: playwright is not installed.
    """
    from playwright.sync_api import sync_playwright

    path = installed()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()
