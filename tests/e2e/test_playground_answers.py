"""The playground with responses that a healthy server does not send; the tests supply them."""

from __future__ import annotations

import re

import pytest
from e2e.browser import Playground, begun_event, error_body, has_focus, step_event, stream_body

pytestmark = pytest.mark.slow


def test_thousands_of_tokens_at_once_leave_the_page_usable(playground: Playground) -> None:
    steps = (step_event(*[" word"] * 8, time=5 + index) for index in range(500))
    playground.respond_with(
        stream_body(begun_event(8), *steps, step_event(*["."] * 8, time=505, reason="length"))
    )
    playground.fill_form("", *["again"] * 8)
    playground.run()
    assert playground.finish_reason(8) == "length limit"
    assert playground.tokens(8).count() == 501
    playground.field("Main").press_sequentially("still here", delay=20)
    assert playground.field("Main").input_value().endswith("still here")


def test_text_is_shown_as_text_and_split_characters_as_one(playground: Playground) -> None:
    split = stream_body(
        begun_event(),
        step_event("<b>bold</b>"),
        step_event("", time=6),
        step_event("é", time=7),
        step_event("", time=8, reason="stop"),
    )
    playground.respond_with(split)
    playground.fill_form("", "<img src=x onerror=alert(1)>")
    playground.run()
    assert playground.finish_reason(1) == "finished"
    assert "<img src=x onerror=alert(1)><b>bold</b>é" in playground.column(1).inner_text()
    titles = [token.get_attribute("data-about") for token in playground.tokens(1).all()]
    assert [re.findall(r"time (\d)", title or "") for title in titles] == [["5"], ["6", "7"], ["8"]]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (
            stream_body(begun_event(), step_event(" on"), {"error": {"message": "the engine was lost"}}),
            "the engine was lost",
        ),
        (stream_body(begun_event(), step_event(" on"), done=False), "closed before"),
    ],
    ids=["error event", "no [DONE]"],
)
def test_broken_stream_is_an_error_and_its_tokens_stay(
    playground: Playground, body: str, message: str
) -> None:
    playground.respond_with(body)
    playground.run()
    playground.alert.filter(has_text=message).wait_for()
    assert [playground.finish_reason(1), playground.finish_reason(2)] == ["error", "error"]
    assert playground.tokens(1).count() == 1
    assert playground.run_button.is_enabled()


def test_lost_network_and_busy_server_are_reported(playground: Playground) -> None:
    playground.page.route("**/v1/branches", lambda route: route.abort())
    playground.run()
    playground.alert.filter(has_text="can't be reached").wait_for()
    playground.respond_with(error_body("too many samples"), status=429, **{"Retry-After": "7"})
    playground.run()
    playground.alert.filter(has_text="too many samples (try again in 7 s)").wait_for()


def test_key_is_requested_after_401_and_sent_with_later_requests(playground: Playground) -> None:
    key = playground.field("API key")
    assert not key.is_visible()
    playground.respond_with(error_body("a key is needed"), status=401)
    playground.run()
    playground.alert.filter(has_text="a key is needed").wait_for()
    assert has_focus(key)
    playground.respond_with(stream_body(begun_event(), step_event(" yes", reason="stop")))
    with playground.page.expect_request("**/v1/branches") as sent:
        playground.page.keyboard.type("sesame")
        playground.page.keyboard.press("Control+Enter")
    assert sent.value.headers["authorization"] == "Bearer sesame"
    assert playground.page.evaluate("[localStorage.length, sessionStorage.length]") == [0, 1]


def test_branch_named_by_an_error_is_marked(playground: Playground) -> None:
    playground.respond_with(error_body("branches[1].text: too long", param="branches[1].text"), status=400)
    playground.run()
    playground.alert.filter(has_text="too long").wait_for()
    assert has_focus(playground.branch_field(2))
    assert playground.page.locator("[aria-invalid=true]").count() == 1


def test_a_branch_that_ends_at_once_says_why(playground: Playground) -> None:
    silent = {"token": None, "branch": None, "time": None}
    for reason, more, note in (
        ("stop", {}, "ended the text at once"),
        ("error", {"error": "the logits are not finite"}, "the logits are not finite"),
    ):
        playground.respond_with(stream_body(begun_event(), step_event("", reason=reason, **silent, **more)))
        playground.run()
        playground.column(1).get_by_text(note).wait_for()
        playground.page.unroute_all()


def test_segments_of_a_tree_hang_below_the_one_that_they_follow(playground: Playground) -> None:
    forked = step_event("", reason="forked", token=None, branch=None, time=None)
    joined = {**begun_event(), "object": "branches.joined"}
    joined["branches"] = [
        {
            "index": 2 + index,
            "path": f"branches[0].branches[{index}]",
            "prompt_tokens": 1,
            "branch": 3,
            "time": 6,
        }
        for index in range(2)
    ]
    joined["branches"].append(
        {"index": 4, "path": "branches[0].reduce", "prompt_tokens": 1, "branch": 1, "time": 8}
    )
    playground.respond_with(stream_body(begun_event(2), step_event(" a", " b"), forked, joined))
    playground.run()
    boxes = [playground.column(number).bounding_box() for number in (1, "1.1", "1.2", "1.reduce")]
    assert all(boxes)
    parent, first, second, reduce = (box or {} for box in boxes)
    assert parent["y"] + parent["height"] <= first["y"] == second["y"]
    assert first["x"] + first["width"] <= second["x"]
    assert second["y"] + second["height"] <= reduce["y"]
    assert parent["x"] < first["x"]
    assert playground.finish_reason(1) == "forked"
