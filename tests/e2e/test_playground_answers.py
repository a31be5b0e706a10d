"""What the playground makes of answers that no healthy server gives, or that come all at once: given by the
test itself.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest
from e2e.browser import Playground, begun, error, has_focus, step, stream

if TYPE_CHECKING:
    pass

pytestmark = pytest.mark.slow


def test_thousands_of_tokens_at_once_leave_the_page_usable(playground: Playground) -> None:
    steps = (step(*[" word"] * 8, time=5 + each) for each in range(500))
    playground.answer(stream(begun(8), *steps, step(*["."] * 8, time=505, reason="length")))
    playground.write("", *["again"] * 8)
    playground.run()
    assert playground.reason(8) == "length"
    assert playground.tokens(8).count() == 501
    playground.field("Main").press_sequentially("still here", delay=20)
    assert playground.field("Main").input_value().endswith("still here")


def test_text_is_shown_as_text_and_split_characters_as_one(playground: Playground) -> None:
    split = stream(
        begun(), step("<b>bold</b>"), step("", time=6), step("é", time=7), step("", time=8, reason="stop")
    )
    playground.answer(split)
    playground.write("", "<img src=x onerror=alert(1)>")
    playground.run()
    assert playground.reason(1) == "stop"
    assert "<img src=x onerror=alert(1)><b>bold</b>é" in playground.column(1).inner_text()
    titles = [token.get_attribute("title") for token in playground.tokens(1).all()]
    assert [re.findall(r"time (\d)", title or "") for title in titles] == [["5"], ["6", "7"], ["8"]]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (stream(begun(), step(" on"), {"error": {"message": "the engine was lost"}}), "the engine was lost"),
        (stream(begun(), step(" on"), done=False), "closed before"),
    ],
    ids=["error event", "no [DONE]"],
)
def test_broken_stream_is_an_error_and_what_it_brought_stays(
    playground: Playground, body: str, message: str
) -> None:
    playground.answer(body)
    playground.run()
    playground.alert.filter(has_text=message).wait_for()
    assert [playground.reason(1), playground.reason(2)] == ["error", "error"]
    assert playground.tokens(1).count() == 1
    assert playground.run_button.is_enabled()


def test_lost_network_and_busy_server_are_told(playground: Playground) -> None:
    playground.page.route("**/v1/branches", lambda route: route.abort())
    playground.run()
    playground.alert.filter(has_text="can't be reached").wait_for()
    playground.answer(error("too many samples"), status=429, **{"Retry-After": "7"})
    playground.run()
    playground.alert.filter(has_text="too many samples (try again in 7 s)").wait_for()


def test_key_is_asked_for_after_401_and_sent_from_then_on(playground: Playground) -> None:
    key = playground.field("API key")
    assert not key.is_visible()
    playground.answer(error("a key is needed"), status=401)
    playground.run()
    playground.alert.filter(has_text="a key is needed").wait_for()
    assert has_focus(key)
    playground.answer(stream(begun(), step(" yes", reason="stop")))
    with playground.page.expect_request("**/v1/branches") as sent:
        playground.page.keyboard.type("sesame")
        playground.page.keyboard.press("Control+Enter")
    assert sent.value.headers["authorization"] == "Bearer sesame"
    assert playground.page.evaluate("[localStorage.length, sessionStorage.length]") == [0, 1]


def test_blamed_branch_is_marked(playground: Playground) -> None:
    playground.answer(error("branches[1].text: too long", param="branches[1].text"), status=400)
    playground.run()
    playground.alert.filter(has_text="too long").wait_for()
    assert has_focus(playground.branch_field(2))
    assert playground.page.locator("[aria-invalid=true]").count() == 1
