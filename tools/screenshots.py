"""Take docs/screenshots from running programs: the playground, MLflow, and the report of a sweep.

    python -m tools.screenshots runs/demo-HASH/adapter runs/SWEEP-HASH

Needs Chromium. MLflow shows the database `mlflow.db` of the working directory.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

from playwright.sync_api import Page

from serving.runtime.ports import free_port
from tools.browser import chromium

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "screenshots"
_STARTUP_S = 180
_WIDTH, _HEIGHT = 1280, 1100  # pixels


@contextmanager
def running(module: str, health: str, *arguments: str) -> Iterator[str]:
    """Run a server on a free port for the duration of the block; yield its URL."""
    port = free_port()
    site = f"http://127.0.0.1:{port}"
    process = subprocess.Popen(
        [sys.executable, "-m", module, *(argument.format(port=port) for argument in arguments)]
    )
    try:
        deadline = time.monotonic() + _STARTUP_S
        while not is_up(f"{site}{health}"):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{module} did not start")
            time.sleep(0.5)
        yield site
    finally:
        process.send_signal(signal.SIGINT)
        process.wait()


def is_up(url: str) -> bool:
    try:
        with urlopen(url) as response:
            return bool(response.status == 200)
    except (URLError, ConnectionError):
        return False


def playground(page: Page, site: str) -> None:
    """Run the first sample of the adapter in the playground."""
    page.goto(f"{site}/")
    page.get_by_label("Sample", exact=True).locator("option").first.wait_for(state="attached")
    page.get_by_role("button", name="Run").click()
    page.get_by_role("status").filter(has_text="Done").wait_for()
    page.locator("#speed").evaluate("node => node.replaceChildren()")  # the rate is that of this machine


def mlflow(page: Page, site: str) -> None:
    """Open the charts of the runs of the first experiment."""
    page.goto(f"{site}/#/experiments/1/runs?compareRunsMode=CHART")
    page.get_by_text("matching runs").wait_for()
    page.get_by_role("button", name="Close").last.click()  # the assistant's panel
    page.wait_for_timeout(3000)  # wait until the charts are laid out


def main(adapter: str, sweep: str) -> None:
    """Take all screenshots. `sweep`: folder of a finished sweep."""
    with chromium() as browser:
        page = browser.new_page(viewport={"width": _WIDTH, "height": _HEIGHT})
        page.set_default_timeout(60_000)
        page.goto((Path(sweep) / "report.html").resolve().as_uri())
        page.get_by_role("heading", name="Trials").evaluate("node => node.scrollIntoView()")
        screenshot(page, "report")
        with running("serving", "/health", f"lora_path={adapter}", "port={port}") as site:
            playground(page, site)
            screenshot(page, "playground")
        store = "--backend-store-uri sqlite:///mlflow.db --host 127.0.0.1 --port {port} --workers 1".split()
        with running("mlflow", "/health", "server", *store) as site:
            mlflow(page, site)
            screenshot(page, "mlflow")


def screenshot(page: Page, name: str) -> None:
    page.screenshot(path=FOLDER / f"{name}.png")
    print(FOLDER / f"{name}.png", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
