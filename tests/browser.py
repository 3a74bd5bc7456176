"""A headless Chromium that is installed here, driven by Playwright; nothing is downloaded."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
STEP_MS = 20_000.0


@contextmanager
def chromium() -> Iterator[Browser]:
    """Skips the test where there is no Chromium."""
    path = next((found for name in NAMES if (found := shutil.which(name))), None)
    if path is None:
        pytest.skip(f"no Chromium is installed here (looked for {', '.join(NAMES)})")
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
