"""A page of the server in headless Chromium, with the actions of a user."""

import base64
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from axe_playwright_python.base import AXE_SCRIPT
from playwright.sync_api import sync_playwright

_GIVE = """([data, name, way]) => {
  const bytes = Uint8Array.from(atob(data), (letter) => letter.charCodeAt(0));
  const holder = new DataTransfer();
  holder.items.add(new File([bytes], name, { type: "image/png" }));
  const options = { bubbles: true, cancelable: true };
  document.body.dispatchEvent(way === "paste"
    ? new ClipboardEvent("paste", { ...options, clipboardData: holder })
    : new DragEvent("drop", { ...options, dataTransfer: holder }));
}"""


_FIND_BARRIERS = """async ([scheme, options]) => {
  const found = await axe.run(document, { resultTypes: ["violations"], ...options });
  return found.violations.map((one) => `${scheme} ${one.id}: ${one.nodes[0].html}`);
}"""


@contextmanager
def open_browser(chromium: str) -> Iterator[Any]:
    """Start Debian's Chromium, without a window."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


class Browsing:
    """A loaded page, its requests to other servers, and its errors."""

    def __init__(self, browser: Any, address: str, **options: Any) -> None:
        self.address, self.elsewhere, self.errors = address, [], []  # type: ignore[var-annotated]
        self.page = browser.new_page(**options)
        self.page.set_default_timeout(60_000)
        self.page.on("request", self._note)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("console", lambda said: self.errors.append(said.text) if said.type == "error" else None)
        self.page.goto(f"{address}/")
        self.page.wait_for_selector("body[data-ready=yes]")

    def _note(self, request: Any) -> None:
        if not request.url.startswith((f"{self.address}/", f"blob:{self.address}/", "data:")):
            self.elsewhere.append(request.url)

    def close(self) -> None:
        self.page.close()

    def type(self, text: str) -> None:
        """Write a question, and wait for its answers."""
        self.page.fill("#query", text)
        with self.page.expect_response("**/api/search"):
            self.page.press("#query", "Enter")
        self.wait_for("#status", "search ")

    def give_file(self, path: Path, way: str) -> None:
        """Paste or drop a file."""
        self.page.evaluate(_GIVE, [base64.b64encode(path.read_bytes()).decode(), path.name, way])

    def wait_for(self, selector: str, text: str) -> None:
        """Wait until an element holds some text, and results are no longer on their way."""
        self.page.wait_for_function(
            "([selector, text]) => document.querySelector(selector)?.textContent.includes(text) && "
            "!document.querySelector('#results').classList.contains('busy')",
            arg=[selector, text],
            polling=50,  # in milliseconds: by default it waits for frames, which a busy machine may not draw
        )

    def text(self, selector: str) -> str:
        return str(self.page.text_content(selector))

    def captions(self) -> list[str]:
        """Read the results, in order."""
        found: list[str] = self.page.eval_on_selector_all(
            "#results .captions", "all => all.map((one) => one.textContent)"
        )
        return found

    def wait_for_focus(self, row: int) -> None:
        """Wait until the result of a row has the focus: a dialog that closes gives it back a moment later."""
        self.page.wait_for_function("row => Number(document.activeElement.dataset.row) === row", arg=row)

    def num_columns(self) -> int:
        columns = "getComputedStyle(document.querySelector('#results')).gridTemplateColumns.split(' ').length"
        return int(self.page.evaluate(columns))

    def barriers(self) -> list[str]:
        """Return what axe-core finds that keeps people with a screen reader, a keyboard or weak eyes from the page."""
        if not self.page.evaluate("'axe' in window"):
            self.page.evaluate(AXE_SCRIPT)
        found = self.page.evaluate(_FIND_BARRIERS, ["light", {}])
        self.page.emulate_media(color_scheme="dark")
        found += self.page.evaluate(_FIND_BARRIERS, ["dark", {"runOnly": ["color-contrast"]}])
        self.page.emulate_media(color_scheme="light")
        return list(found)

    def shown_images(self) -> int:
        """Wait for the first images, and count those that have loaded."""
        all_of = "[...document.querySelectorAll('#results img')]"
        self.page.wait_for_function(f"() => {all_of}.slice(0, 4).every((one) => one.complete && one.naturalWidth)")
        return int(self.page.evaluate(f"{all_of}.filter((one) => one.naturalWidth).length"))
