"""The playground in a browser, with a server whose model named tiny decodes some hundred tokens."""

from __future__ import annotations

import json
import re
import time
from typing import TYPE_CHECKING

import pytest
from e2e.browser import Playground, has_focus

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Route

pytestmark = pytest.mark.slow

MAIN = "For lunch Ada likes rice."
QUESTIONS = ("What does Ada eat?", "Who likes rice?")
FEW, MANY = "8", "200"  # tokens: of a branch that ends soon; of one that still runs while the test acts
COORDINATES = re.compile(r"branch coordinate (\d+), time (\d+)\ntoken \d+")
POLICY = {"Content-Security-Policy": "default-src 'self'"}


def test_page_loads_without_errors_or_foreign_requests(browser: Browser, site: str) -> None:
    page = browser.new_page()
    urls: list[str] = []
    errors: list[str] = []
    page.on("request", lambda request: urls.append(request.url))
    # Chromium reports a complete stream as aborted if the response must not be stored.
    page.on(
        "requestfailed",
        lambda request: errors.append(request.url) if request.failure != "net::ERR_ABORTED" else None,
    )
    page.on("response", lambda response: errors.append(response.url) if response.status >= 400 else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on(
        "console",
        lambda message: (
            errors.append(f"{message.text} {message.location['url']}") if message.type == "error" else None
        ),
    )

    def with_policy(route: Route) -> None:
        response = route.fetch()
        route.fulfill(response=response, headers={**response.headers, **POLICY})

    page.route(f"{site.rstrip('/')}/", with_policy)
    playground = Playground(page, site)
    playground.open()
    playground.fill_form(MAIN, *QUESTIONS, max_tokens=FEW)
    playground.run()
    playground.status.filter(has_text="Done").wait_for()
    playground.tokens(1).first.hover()
    page.close()
    assert [url for url in urls if not url.startswith(site)] == []
    assert errors == []


def test_branches_stream_side_by_side_and_end_with_a_reason(playground: Playground) -> None:
    playground.fill_form(MAIN, *QUESTIONS, max_tokens="24")
    playground.run()
    playground.stop_button(1).wait_for()
    lengths, deadline = set(), time.monotonic() + 60
    while playground.stop_button(1).is_visible() and time.monotonic() < deadline:
        lengths.add(playground.tokens(1).count())
    reasons = {playground.finish_reason(1), playground.finish_reason(2)}
    assert len(lengths) > 1  # it was streamed
    assert reasons <= {"finished", "length limit"}
    assert QUESTIONS[1] in playground.column(2).inner_text()
    left, right = (playground.column(number).bounding_box() for number in (1, 2))
    assert left is not None
    assert right is not None
    assert left["y"] == right["y"]
    assert left["x"] + left["width"] <= right["x"]
    assert playground.page.get_by_text(re.compile(r"\d+ tokens, \d+\.\d tokens/s")).is_visible()
    assert playground.status.inner_text() == "Done"
    assert playground.alert.inner_text() == ""


def test_coordinates_of_the_hovered_or_focused_token_are_shown(playground: Playground) -> None:
    playground.fill_form(MAIN, *QUESTIONS, max_tokens=FEW)
    playground.run()
    playground.finish_reason(1)
    playground.finish_reason(2)
    playground.show_details()
    number = next(
        number for number in (1, 2) if playground.tokens(number).count() > 1
    )  # more than one broken character
    first, second = playground.tokens(number).nth(0), playground.tokens(number).nth(1)
    first.hover()
    branch, time = map(int, COORDINATES.search(playground.card.inner_text()).groups())  # type: ignore[union-attr]
    assert first.get_attribute("data-about") == playground.card.inner_text()
    playground.page.mouse.move(0, 0)
    playground.card.wait_for(state="hidden")
    first.focus()
    playground.card.wait_for()
    playground.page.keyboard.press("ArrowRight")
    assert has_focus(second)
    after = list(map(int, COORDINATES.search(playground.card.inner_text()).groups()))  # type: ignore[union-attr]
    assert after[0] == branch
    assert after[1] > time  # by more than one where several tokens make one character
    playground.page.keyboard.press("Escape")
    playground.card.wait_for(state="hidden")


def test_one_branch_is_stopped_and_the_other_runs_to_its_end(playground: Playground) -> None:
    playground.fill_form(MAIN, *QUESTIONS, max_tokens=MANY)
    playground.run()
    playground.tokens(1).nth(2).wait_for()
    playground.stop_button(1).click()
    assert playground.finish_reason(1) == "stopped"
    written = playground.tokens(2).count()
    assert playground.finish_reason(2) in {"finished", "length limit"}
    assert playground.tokens(2).count() > written
    assert playground.tokens(1).count() < playground.tokens(2).count()


def test_stop_all_stops_every_branch_and_another_sample_can_run(playground: Playground) -> None:
    playground.fill_form(MAIN, *QUESTIONS, max_tokens=MANY)
    playground.run()
    playground.tokens(1).nth(2).wait_for()
    playground.page.get_by_role("button", name="Stop all").click()
    assert [playground.finish_reason(1), playground.finish_reason(2)] == ["stopped", "stopped"]
    playground.status.filter(has_text="Done").wait_for()
    playground.fill_form(MAIN, max_tokens=FEW)
    playground.run()
    playground.state(1).filter(has_text=re.compile("finished|length limit")).wait_for()


@pytest.mark.parametrize(
    ("label", "value", "valid"), [("Max tokens", "0", FEW), ("Temperature", "-1", "0.7")]
)
def test_invalid_value_is_explained_and_its_field_marked(
    playground: Playground, label: str, value: str, valid: str
) -> None:
    playground.fill_form(MAIN, *QUESTIONS, max_tokens=FEW)
    playground.field(label).fill(value)
    playground.run()
    playground.alert.filter(has_text=value).wait_for()
    marked = playground.page.locator("[aria-invalid=true]")
    assert marked.count() == 1
    assert has_focus(playground.field(label))
    assert playground.field(label).get_attribute("aria-invalid") == "true"
    playground.field(label).fill(valid)
    playground.run()
    assert playground.finish_reason(1) in {"finished", "length limit"}
    assert playground.alert.inner_text() == ""
    assert marked.count() == 0


def test_the_keyboard_suffices(playground: Playground) -> None:
    keyboard = playground.page.keyboard
    entries = [
        (playground.field("Main"), MAIN),
        (playground.branch_field(1), QUESTIONS[0]),
        (playground.field("Max tokens"), MANY),
        (playground.field("Temperature"), "0"),
        (playground.field("Seed"), "1"),
    ]
    for field, text in entries:
        playground.tab_to(field)
        keyboard.press("Control+a")
        keyboard.type(text)
    keyboard.press("Control+Enter")
    playground.stop_button(1).wait_for()
    playground.show_details()
    playground.tab_to(playground.stop_button(1))
    playground.tokens(1).first.wait_for()
    keyboard.press("Enter")
    assert playground.finish_reason(1) == "stopped"
    assert has_focus(playground.column(1))
    playground.tab_to(playground.tokens(1).first, at_most=1)
    assert playground.finish_reason(2) in {"finished", "length limit"}


def test_branch_is_added_to_the_running_sample(playground: Playground) -> None:
    playground.fill_form(MAIN, *QUESTIONS, max_tokens=MANY)
    playground.run()
    playground.field("Add to the running sample").fill("Where is lunch?")
    playground.field("Max tokens").fill(FEW)
    playground.page.get_by_role("button", name="Add", exact=True).click()
    playground.tokens(3).first.wait_for()
    assert "Where is lunch?" in playground.column(3).inner_text()
    assert playground.finish_reason(3) in {"finished", "length limit"}
    assert playground.finish_reason(1) in {"finished", "length limit"}
    assert playground.tokens(3).count() <= int(FEW)


@pytest.mark.parametrize("playground", [(360, 740)], indirect=True)
def test_narrow_screen_stacks_columns_and_never_scrolls_sideways(playground: Playground) -> None:
    assert playground.overflow() == 0
    playground.fill_form(MAIN * 8, "unbroken" * 30, QUESTIONS[1], max_tokens="24")
    playground.run()
    assert {playground.finish_reason(1), playground.finish_reason(2)} <= {"finished", "length limit"}
    upper, lower = (playground.column(number).bounding_box() for number in (1, 2))
    assert upper is not None
    assert lower is not None
    assert upper["y"] + upper["height"] <= lower["y"]
    playground.show_details()
    for token in (playground.tokens(1).first, playground.tokens(2).last):
        token.hover()
        card = playground.card.bounding_box()
        assert card is not None
        assert card["x"] >= 0
        assert card["x"] + card["width"] <= 360
        assert card["y"] >= 0
    playground.field("Temperature").fill("-1")
    playground.run()
    playground.alert.filter(has_text="-1").wait_for()
    for needed in (playground.alert, playground.field("Temperature"), playground.run_button):
        box = needed.bounding_box()
        assert box is not None
        assert -1 < box["y"] <= 740 - box["height"], "a page scrolls by whole pixels"
    assert playground.overflow() == 0


def test_coordinates_are_hidden_until_they_are_asked_for(playground: Playground) -> None:
    playground.fill_form(MAIN, *QUESTIONS, max_tokens=FEW)
    playground.run()
    playground.finish_reason(1)
    coordinates = playground.column(1).locator("footer")
    playground.tokens(1).first.hover()
    assert not playground.card.is_visible()
    assert not coordinates.is_visible()
    playground.show_details()
    assert re.search(r"branch coordinate \d+, time \d+", coordinates.inner_text())


@pytest.mark.parametrize("playground", [(390, 844), (1280, 800)], indirect=True)
def test_nothing_scrolls_away_on_run(playground: Playground) -> None:
    playground.fill_form(MAIN, *QUESTIONS, max_tokens=FEW)
    playground.page.wait_for_load_state("networkidle")  # what the page loads late may move its form
    before = playground.run_button.bounding_box()
    playground.run()
    playground.finish_reason(2)
    assert playground.run_button.bounding_box() == before
    assert playground.page.evaluate("[scrollX, scrollY]") == [0, 0]


def test_the_samples_of_the_model_fill_the_form(playground: Playground) -> None:
    sample = {
        "main": "Facts.",
        "branches": [" Who?", {"text": " Where?", "branches": [" When?"], "reduce": " So?"}],
    }
    body = json.dumps({"object": "list", "data": [sample, {**sample, "main": "Others."}]})
    playground.page.route("**/v1/samples*", lambda route: route.fulfill(status=200, body=body))
    playground.open()
    playground.field("Main").filter(has_text="").wait_for()
    assert playground.field("Main").input_value() == "Facts."
    assert playground.branch_field("2.reduce").input_value() == " So?"
    playground.field("Sample").select_option("1")
    assert playground.field("Main").input_value() == "Others."
    playground.branch_field("2.1").fill(" Why?")
    assert playground.field("Sample").input_value() == ""
    with playground.page.expect_request("**/v1/branches") as sent:
        playground.run()
    body = json.loads(sent.value.post_data or "")
    assert body["branches"] == [
        {"text": " Who?"},
        {"text": " Where?", "branches": [{"text": " Why?"}], "reduce": {"text": " So?"}},
    ]


def test_a_tree_is_composed_run_and_shown(playground: Playground) -> None:
    playground.fill_form(MAIN, *QUESTIONS, max_tokens=FEW)
    playground.page.get_by_role("button", name="Add a branch to branch 1", exact=True).click()
    playground.branch_field("1.1").fill("In short:")
    playground.page.get_by_role("button", name="Add a reduce to branch 1", exact=True).click()
    playground.branch_field("1.reduce").fill("So:")
    playground.page.get_by_role("button", name="Add reduce", exact=True).last.click()
    playground.page.get_by_role("textbox", name="Reduce", exact=True).fill("In all:")
    playground.run()
    playground.status.filter(has_text="Done").wait_for()
    reasons = [playground.finish_reason(number) for number in (1, 2, "1.1", "1.reduce")]
    assert set(reasons) <= {"finished", "length limit"}
    reduce = playground.page.get_by_role("article", name="Reduce", exact=True)
    assert "In all:" in reduce.inner_text()


def test_a_running_branch_is_forked(playground: Playground) -> None:
    playground.fill_form(MAIN, *QUESTIONS, max_tokens=MANY)
    playground.run()
    playground.tokens(1).nth(2).wait_for()
    playground.page.get_by_role("button", name="Fork branch 1", exact=True).click()
    playground.page.keyboard.type("One side:\nOther side:")
    playground.page.get_by_role("button", name="Fork here").click()
    assert playground.finish_reason(1) == "forked"
    playground.tokens("1.2").nth(2).wait_for()
    assert "Other side:" in playground.column("1.2").inner_text()
    playground.page.get_by_role("button", name="Stop all").click()
    assert playground.finish_reason("1.1") in {"stopped", "finished"}
