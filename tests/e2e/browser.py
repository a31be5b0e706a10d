"""The playground in a real browser."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest

from parallelmind.errors import UserError
from tools.browser import chromium, installed

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Locator, Page, Route

_ENDED = re.compile("^(finished|length limit|forked|stopped|error|read)$")
WAIT = 120_000  # milliseconds; the machine may be busy with other tests


@contextmanager
def running_browser() -> Iterator[Browser]:
    """A running browser. Skips the test without playwright or Chromium."""
    pytest.importorskip("playwright.sync_api")
    try:
        installed()
    except UserError as error:
        pytest.skip(str(error))
    with chromium() as browser:
        yield browser


class Playground:
    """The page as a user sees it: elements are located by their labels and roles."""

    def __init__(self, page: Page, site: str) -> None:
        self.page, self.site = page, site.rstrip("/")
        self.alert = page.get_by_role("alert")
        self.status = page.get_by_role("status")
        self.card = page.get_by_role("tooltip")
        self.run_button = page.get_by_role("button", name="Run")
        page.set_default_timeout(WAIT)

    def open(self) -> None:
        self.page.goto(f"{self.site}/")
        self.field("Sample").locator("option").first.wait_for(state="attached")

    def field(self, label: str) -> Locator:
        return self.page.get_by_label(label, exact=True)

    def branch_field(self, number: int | str) -> Locator:
        return self.page.get_by_role("textbox", name=f"Branch {number}", exact=True)

    def fill_form(self, main: str, *branches: str, **settings: str) -> None:
        """Fill in the form; the temperature is 0 unless given.

        settings: by label, in lower case and with underscores.
        """
        self.field("Main").fill(main)
        for number, text in enumerate(branches, 1):
            if not self.branch_field(number).count():
                self.page.get_by_role("button", name="Add branch").click()
            self.branch_field(number).fill(text)
        self.open_settings()
        for name, value in {"temperature": "0", **settings}.items():
            self.field(name.replace("_", " ").capitalize()).fill(value)

    def open_settings(self) -> None:
        if not self.field("Seed").is_visible():
            self.page.get_by_text("Settings", exact=True).click()

    def run(self) -> None:
        self.run_button.click()

    def show_details(self) -> None:
        self.page.get_by_role("switch", name="Details").check()

    def column(self, number: int | str) -> Locator:
        """The card of a branch, such as 2 or "1.2"."""
        return self.page.get_by_role("article", name=f"Branch {number}", exact=True)

    def state(self, number: int | str) -> Locator:
        return self.column(number).locator(".state")

    def tokens(self, number: int | str) -> Locator:
        return self.column(number).locator("[data-about]")

    def stop_button(self, number: int) -> Locator:
        return self.page.get_by_role("button", name=f"Stop branch {number}", exact=True)

    def finish_reason(self, number: int | str) -> str:
        """Wait until the branch has ended; return what its card says."""
        self.state(number).filter(has_text=_ENDED).wait_for()
        return self.state(number).inner_text()

    def tab_to(self, target: Locator, at_most: int = 40) -> None:
        """Press Tab until the target has the focus. Every element on the way must show a focus outline."""
        for _ in range(at_most):
            self.page.keyboard.press("Tab")
            outline = self.page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
            assert outline != "none", self.page.evaluate("document.activeElement.outerHTML")
            if has_focus(target):
                return
        pytest.fail(f"Tab does not reach {target}")

    def respond_with(self, body: str = "", status: int = 200, **headers: str) -> None:
        """Respond to every new sample with this body instead of passing the request to the server."""

        def fulfil(route: Route) -> None:
            kind = "text/event-stream" if status == 200 else "application/json"
            route.fulfill(status=status, headers={"Content-Type": kind, **headers}, body=body)

        self.page.route("**/v1/branches", fulfil)

    def overflow(self) -> int:
        """Pixels by which the page is wider than the window."""
        return self.page.evaluate(
            "document.documentElement.scrollWidth - document.documentElement.clientWidth"
        )


def has_focus(target: Locator) -> bool:
    return target.count() == 1 and target.evaluate("node => node === document.activeElement")


def begun_event(branches: int = 1) -> dict[str, Any]:
    starts = [
        {"index": index, "path": f"branches[{index}]", "prompt_tokens": 2, "branch": index + 1, "time": 3}
        for index in range(branches)
    ]
    return {"id": "smp-1", "object": "branches.begun", "model": "tiny", "branches": starts}


def step_event(*texts: str, time: int = 5, reason: str | None = None, **more: Any) -> dict[str, Any]:
    """One decoding step, with one text for each branch. more: further fields of each delta."""
    deltas = [
        {
            "index": index,
            "path": f"branches[{index}]",
            "text": text,
            "token": 7,
            "branch": index + 1,
            "time": time,
            "finish_reason": reason,
            **more,
        }
        for index, text in enumerate(texts)
    ]
    return {"id": "smp-1", "object": "branches.step", "deltas": deltas}


def stream_body(*events: dict[str, Any], done: bool = True) -> str:
    return "".join(f"data: {json.dumps(event)}\n\n" for event in events) + (
        "data: [DONE]\n\n" if done else ""
    )


def error_body(message: str, param: str | None = None) -> str:
    return json.dumps(
        {"error": {"message": message, "type": "invalid_request_error", "param": param, "code": None}}
    )
