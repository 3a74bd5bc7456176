"""The labelling page in a real browser, in front of a real store."""

import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, Route, expect

from contracts.labelling import LabellingConfig
from feedback.store import Store
from serving.labelling import labelling_app
from tests.browser import check_readable, chromium, new_page
from tests.serving.http import served
from tests.serving.labelling.conftest import HOSTILE

Add = Callable[..., str]
Open = Callable[..., Page]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as started:
        yield started


@pytest.fixture
def url(place: Path, store: Store) -> Iterator[str]:
    with served(labelling_app(LabellingConfig(store=str(place), gold_rate=0.0))) as found:
        yield found


@pytest.fixture
def sign_in(browser: Browser, store: Store, url: str) -> Iterator[Open]:
    """Opens the page for a new annotator, in a context of its own; at the end nothing may have gone wrong in any.

    `votes` is asked what becomes of each vote that is sent: from before the page is there, since Chromium was seen to
    send a request past a route that was made just before it.
    """
    opened, everything = [], []

    def open_page(name: str, *, votes: Callable[[Route], None] | None = None, **options: object) -> Page:
        page, wrong = new_page(browser, **options)  # type: ignore[arg-type]
        opened.append(page)
        everything.append(wrong)
        if votes is not None:
            page.route("**/api/judgments", votes)
        page.goto(f"{url}/#token={store.register(name)[1]}")
        expect(page.locator("#task, #nothing").locator("visible=true")).to_be_visible()
        return page

    yield open_page
    for page in opened:
        page.context.close()
    assert [line for wrong in everything for line in wrong if "ERR_FAILED" not in line] == []


def shown(page: Page) -> tuple[str, ...]:
    return tuple(page.locator(".response .text").all_text_contents())


def saved(page: Page, text: str, answered: int) -> None:
    """The page has said so, and shows what is next."""
    expect(page.locator("#last")).to_contain_text(text)
    expect(page.locator("#counts")).to_contain_text(f"You: {answered} answered")


def judgments(place: Path) -> list[tuple]:
    query = """SELECT annotators.name, task_id, act, choice, shown_left, value, rationale, active_s, strength, aspects
        FROM judgments JOIN annotators ON annotator_id = annotators.id ORDER BY judgments.id"""
    connection = sqlite3.connect(place)
    try:
        return connection.execute(query).fetchall()
    finally:
        connection.close()


def test_two_annotators_at_once(place: Path, pair: Add, sign_in: Open) -> None:
    """One with keys, one with the mouse, turn by turn; what is kept is what each of them saw and meant."""
    count = 4
    tasks = {pair(number, required_votes=2) for number in range(count)}
    anna, ben = sign_in("anna"), sign_in("ben")
    meant = []
    for number in range(count):
        for page in (anna, ben):
            assert "version" not in page.locator("#task").inner_text()
        for name, page, choose in (
            ("anna", anna, lambda: anna.keyboard.press("1")),
            ("ben", ben, lambda: ben.get_by_role("button", name="Response 2 is better").click()),
        ):
            sides = shown(page)
            choose()
            saved(page, "written by version", number + 1)
            left, right = ["a" if text.startswith("first") else "b" for text in sides]
            meant.append((name, left if name == "anna" else right, left))
    expect(anna.get_by_role("heading", name="Nothing left for you")).to_be_focused()
    found = judgments(place)
    assert [(name, choice, left) for name, _, _, choice, left, *_ in found] == meant
    assert {(name, task) for name, task, *_ in found} == {(name, task) for name in ("anna", "ben") for task in tasks}
    assert all(0 <= row[7] < 30 for row in found), "the time they took"


def test_keys_undo_and_what_is_said_beside(place: Path, pair: Add, sign_in: Open) -> None:
    for number in range(4):
        pair(number)
    page = sign_in("anna")
    page.keyboard.press("1")
    saved(page, "Saved: Response 1.", 1)
    page.keyboard.press("u")
    expect(page.locator("#last")).to_contain_text("Taken back")
    page.get_by_text("Say more, if you like").click()
    page.get_by_label("clearly").check()
    page.get_by_role("group", name="More helpful").get_by_label("response 1").check()
    page.get_by_label("Why").fill("best of 2, s t b u 1")
    page.get_by_label("Why").press("2")  # typed, no vote
    left = "a" if shown(page)[0].startswith("first") else "b"
    page.get_by_role("heading", name="Which response is better?").focus()
    page.keyboard.press("1")
    saved(page, "Saved: Response 1.", 1)
    expect(page.get_by_label("Why")).to_have_value("")
    for key, text, answered in (("t", "Tie", 2), ("b", "Both bad", 3)):
        page.keyboard.press(key)
        saved(page, f"Saved: {text}.", answered)
    page.keyboard.press("s")
    expect(page.locator("#counts")).to_contain_text("1 skipped")
    expect(page.locator("#last")).to_have_text("Saved: Skipped.")
    found = judgments(place)
    assert [row[2] for row in found] == ["vote", "undo", "vote", "vote", "vote", "vote"]
    assert [row[3] for row in found[3:]] == ["tie", "both_bad", "skip"]
    assert found[2][3] == left
    assert found[2][6] == "best of 2, s t b u 12"
    assert found[2][8:] == (2, f'{{"helpful": "{left}"}}')


def test_keys_can_be_switched_off(place: Path, pair: Add, sign_in: Open) -> None:
    pair()
    page = sign_in("anna")
    page.keyboard.press("g")
    expect(page.get_by_role("dialog", name="Guidelines")).to_be_visible()
    page.keyboard.press("1")  # not while a dialog is open
    page.keyboard.press("Escape")
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Answer with single keys").uncheck()
    page.keyboard.press("Escape")
    page.get_by_role("heading", name="Which response is better?").focus()
    page.keyboard.press("1")
    page.get_by_role("button", name="Tie").focus()
    page.keyboard.press("Enter")
    saved(page, "Saved: Tie.", 1)
    assert [row[3] for row in judgments(place)] == ["tie"]


def test_labels_and_ratings(store: Store, place: Path, sign_in: Open) -> None:
    response = store.add_response(store.add_prompt("question"), "answer", source="live", weights_version=7)
    store.add_task("label", response, priority=1)
    store.add_task("rating", response, scale=5)
    page = sign_in("anna")
    page.keyboard.press("0")
    saved(page, "Saved: Bad. It was written by version 7.", 1)
    page.keyboard.press("4")
    saved(page, "Saved: 4 of 5.", 2)
    assert [row[5] for row in judgments(place)] == [0.0, 4.0]


def test_texts_stay_texts(store: Store, pair: Add, sign_in: Open) -> None:
    pair(a=HOSTILE, b="**plain** <b>text</b>")
    page = sign_in("anna")
    assert set(shown(page)) == {HOSTILE, "**plain** <b>text</b>"}
    assert page.locator("#task script, #task img, #task b").count() == 0
    assert page.evaluate("window.broken") is None


def test_what_may_offend_is_blurred_until_asked_for(pair: Add, sign_in: Open) -> None:
    pair(a="oh shit", b="oh dear")
    page = sign_in("anna")
    veiled = page.locator(".veiled")
    expect(veiled).to_have_count(1)
    text = veiled.locator(".text")
    assert "blur" in text.evaluate("node => getComputedStyle(node).filter")
    assert text.get_attribute("inert") is not None, "screen readers do not read it either"
    page.get_by_role("button", name="Show response").click()
    expect(veiled).to_have_count(0)
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Blur at first").select_option("all")
    expect(veiled).to_have_count(3)


@pytest.mark.parametrize("arrived", [True, False])
def test_an_answer_that_got_lost_is_one_vote(arrived: bool, place: Path, pair: Add, sign_in: Open) -> None:
    pair(0)
    pair(1)
    sent = []

    def lose_the_first(route: Route) -> None:
        sent.append(route.request.post_data)
        if len(sent) > 1:
            route.continue_()
            return
        if arrived:
            route.fetch()
        route.abort()

    page = sign_in("anna", votes=lose_the_first)
    page.keyboard.press("1")
    page.keyboard.press("2")  # while the first is on its way: not an answer to what comes next
    saved(page, "Saved: Response 1.", 1)
    assert len(sent) == 2
    assert sent[0] == sent[1]
    assert len(judgments(place)) == 1


def test_where_nobody_answers_it_can_be_tried_again(place: Path, pair: Add, sign_in: Open) -> None:
    pair()
    away = True
    page = sign_in("anna", votes=lambda route: route.abort() if away else route.continue_())
    page.keyboard.press("t")
    expect(page.get_by_role("alert")).to_contain_text("try again")
    away = False
    page.get_by_role("button", name="Try again").click()
    saved(page, "Saved: Tie.", 1)
    expect(page.get_by_role("alert")).to_be_hidden()
    assert len(judgments(place)) == 1


def test_a_reload_keeps_the_task_and_signing_out_gives_it_back(url: str, pair: Add, sign_in: Open) -> None:
    pair(required_votes=1)
    page = sign_in("anna")
    assert "token" not in page.url
    texts = shown(page)
    page.reload()
    expect(page.locator("#task")).to_be_visible()
    assert shown(page) == texts
    other = sign_in("ben")
    expect(other.locator("#nothing")).to_be_visible()
    with page.expect_response("**/release"):
        page.get_by_role("button", name="Sign out").click()
    expect(page.get_by_label("Your token")).to_be_focused()
    other.get_by_role("button", name="Look again").click()
    expect(other.locator("#task")).to_be_visible()
    page.reload()
    expect(page.get_by_label("Your token")).to_be_visible()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_can_be_read(scheme: str, pair: Add, sign_in: Open) -> None:
    pair(0, a="oh shit")
    page = sign_in("anna", scheme=scheme, width=390)
    page.get_by_text("Say more, if you like").click()
    check_readable(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.get_by_role("button", name="Guidelines").click()
    check_readable(page)
