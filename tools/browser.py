"""Chromium as the system has it, driven by playwright without a download of its own."""

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
    """Where it is. Raises UserError where there is none."""
    path = next(filter(None, map(shutil.which, _NAMES)), None)
    if path is None:
        raise UserError(f"none of {', '.join(_NAMES)} is installed; install one")
    return path


@contextmanager
def chromium() -> Iterator[Browser]:
    """It, until the end of the block. Raises UserError where there is none, and ImportError without
    playwright.
    """
    from playwright.sync_api import sync_playwright

    path = installed()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()
