"""A headless Chromium that is installed here, driven by Playwright; nothing is downloaded."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
STEP_MS = 20_000.0


@contextmanager
def chromium() -> Iterator[Browser]:
    """Skips the test where there is no Chromium."""
    path = next((found for name in NAMES if (found := shutil.which(name))), None)
    if path is None:
        pytest.skip(f"no Chromium is installed here (looked for {', '.join(NAMES)})")
    expect.set_options(timeout=STEP_MS)
    with sync_playwright() as playwright:
        # As root, in a container, Chromium has no sandbox of its own; the pages are ours.
        browser = playwright.chromium.launch(
            executable_path=path, timeout=60_000, args=["--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"]
        )
        try:
            yield browser
        finally:
            browser.close()


def new_page(
    browser: Browser, *, scheme: str = "light", width: int = 1200, height: int = 800
) -> tuple[Page, list[str]]:
    """A page of a browser context of its own, and what went wrong in it: errors of scripts, refusals by its policy."""
    context = browser.new_context(color_scheme=scheme, viewport={"width": width, "height": height})  # type: ignore[arg-type]
    context.set_default_timeout(STEP_MS)
    page, wrong = context.new_page(), list[str]()
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
    return page, wrong


# The text of an element against what is behind it, as WCAG 2 counts it (1.4.3), for every visible text of the page.
_CONTRASTS = """() => {
  const channels = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const light = ([red, green, blue]) => [red, green, blue]
    .map((value) => value / 255)
    .map((value) => (value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4))
    .reduce((sum, value, index) => sum + value * [0.2126, 0.7152, 0.0722][index], 0);
  const behind = (node) => {
    for (; node; node = node.parentElement) {
      const found = channels(getComputedStyle(node).backgroundColor);
      if (found.length === 3 || found[3] === 1) return found;
    }
    return [255, 255, 255];
  };
  const seen = [];
  for (const node of document.querySelectorAll("body *")) {
    const own = [...node.childNodes].some((child) => child.nodeType === 3 && child.data.trim());
    if (!own || node.closest("[inert], .skip-link, .unseen") || node.disabled || !node.checkVisibility()) continue;
    const [one, other] = [light(channels(getComputedStyle(node).color)), light(behind(node))].sort((a, b) => b - a);
    seen.push([(one + 0.05) / (other + 0.05), node.textContent.trim().slice(0, 40)]);
  }
  return seen;
}"""
# Controls that nothing names.
_NAMELESS = """() => [...document.querySelectorAll("button, input, select, textarea, [role=region]")]
  .filter((node) => node.checkVisibility())
  .filter((node) => !(node.labels?.length || node.getAttribute("aria-label") ||
    document.getElementById(node.getAttribute("aria-labelledby") ?? "") ||
    (node.tagName === "BUTTON" && node.textContent.trim())))
  .map((node) => node.outerHTML.slice(0, 80))"""


def check_readable(page: Page) -> None:
    """Every text has a contrast of 4.5 at least, every control a name."""
    contrasts = page.evaluate(_CONTRASTS)
    assert len(contrasts) > 5
    assert [(round(ratio, 2), text) for ratio, text in contrasts if ratio < 4.5] == []
    assert page.evaluate(_NAMELESS) == []
