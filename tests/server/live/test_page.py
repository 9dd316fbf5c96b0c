"""The live page in a real Chromium, which ``chromium`` on the PATH starts, against a feed that the test fills."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI

from tests.server.live.watched import LAYERS, Running, answer, application, feed, served, until

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on the PATH")

AREAS = """(id) => {
    const canvas = document.getElementById(id), pen = canvas.getContext("2d"), counts = {};
    const {data} = pen.getImageData(0, 0, canvas.width, canvas.height);
    for (let i = 0; i < data.length; i += 4) {
        const key = data.slice(i, i + 4).join();
        counts[key] = (counts[key] || 0) + 1;
    }
    return counts;
}"""
"""How many pixels of a canvas have each colour, by "r,g,b,a"."""

AT = """([id, x, y]) => {
    const canvas = document.getElementById(id), box = canvas.getBoundingClientRect();
    const dots = canvas.width / box.width;
    return [...canvas.getContext("2d").getImageData((box.width - x) * dots, (box.height - y) * dots, 1, 1).data];
}"""
"""The colour at a place, in CSS pixels from the lower right corner."""

LOW, HIGH = "68,1,84,255", "253,231,37,255"


class Watched:
    """A page, and what its browser asked for and complained of."""

    def __init__(self, page: Any, running: Running) -> None:
        self.page = page
        self.running = running
        self.asked: list[str] = []
        self.complaints: list[str] = []
        page.on("request", lambda request: self.asked.append(request.url))
        page.on("console", lambda said: self.complaints.append(said.text) if said.type == "error" else None)
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.goto(f"{running.url}/steering/live")

    def text(self, id: str) -> str:
        return str(self.page.locator(f"#{id}").inner_text())

    def shows(self, id: str, text: str) -> None:
        playwright.expect(self.page.locator(f"#{id}")).to_contain_text(text, timeout=8000)

    def areas(self, id: str) -> dict[str, int]:
        found: dict[str, int] = self.page.evaluate(AREAS, id)
        return found

    def at_layer(self, id: str, layer: int) -> tuple[int, ...]:
        """The colour of the newest column at a layer."""
        height = self.page.locator(f"#{id}").bounding_box()["height"]
        row = (height - 18 - 6) / LAYERS
        return tuple(self.page.evaluate(AT, [id, 1, 18 + (layer + 0.5) * row])[:3])


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        found = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield found
        found.close()


@contextmanager
def watched(browser: Any, app: FastAPI, **context: Any) -> Iterator[Watched]:
    with served(app) as running:
        opened = browser.new_context(viewport={"width": 1280, "height": 800}, **context)
        try:
            yield Watched(opened.new_page(), running)
        finally:
            opened.close()


def seen(norms: list[float], edit: float = 0.1, **changes: Any) -> dict[str, Any]:
    """A pass of ten tokens, two of them steered, with a mean ``norm`` for each layer."""
    groups = [[layer, g, n, n * norm, norm] for layer, norm in enumerate(norms) for g, n in ((2, 8), (3, 2))]
    probes = [["sentiment", layer, 10, 10.0 * (layer - 2)] for layer in (1, 3)]
    return answer(norms=groups, edits=[["<b>calm</b>", 2, 2, 2 * edit]], probes=probes, **changes)


def test_the_heat_map_follows_the_data(tmp_path: Path, browser: Any) -> None:
    live = feed(interval=0.2)
    with watched(browser, application(tmp_path, live)) as shown:
        shown.shows("status", "No traffic yet")
        shown.running.push(live, seen([1.0, 10.0, 100.0, 1000.0, 10.0, 1.0]))
        shown.shows("status", "Live")
        shown.shows("norms-high", "1000")
        assert shown.text("norms-low") == "1"
        assert shown.at_layer("norms", 0) == shown.at_layer("norms", 5) == (68, 1, 84)
        assert shown.at_layer("norms", 3) == (253, 231, 37)
        middle = shown.at_layer("norms", 1)
        assert middle == shown.at_layer("norms", 4)
        share = math.log(10) / math.log(1000) * 4
        assert middle == tuple(
            round(a + (b - a) * (share - 1)) for a, b in zip((59, 82, 139), (33, 145, 140), strict=True)
        )
        before = shown.areas("norms")
        shown.page.wait_for_timeout(1000)  # five columns on
        shown.running.push(live, seen([1000.0, 10.0, 100.0, 1.0, 10.0, 1.0]))
        until(lambda: shown.page.wait_for_timeout(50) or shown.at_layer("norms", 0) == (253, 231, 37))
        assert shown.at_layer("norms", 3) == (68, 1, 84)
        after = shown.areas("norms")
        assert after[HIGH] == pytest.approx(2 * before[HIGH], rel=0.1)  # the old column is still there
        assert after[LOW] == pytest.approx(2 * before[LOW], rel=0.1)
        edited, unedited = shown.at_layer("edits", 2), shown.at_layer("edits", 1)
        assert edited != unedited == (227, 230, 234)
        assert not shown.complaints


def test_labels_and_numbers_are_there(tmp_path: Path, browser: Any) -> None:
    live = feed(interval=1.0)
    live.take(seen([1.0, 2.0, 4.0, 8.0, 16.0, 32.0], edit=0.25))
    live.publish()
    with watched(browser, application(tmp_path, live)) as shown:
        shown.shows("status", "one pass in 4 sampled, read every 1 s")
        assert shown.text("model") == "m"
        shown.shows("tokens", "10")
        assert shown.text("share") == "20 %"
        assert shown.text("alarm") == ""
        assert shown.text("assets").split("\t") == ["<b>calm</b>", "0.25", "2"]
        assert shown.text("legend").split("\n") == ["sentiment at layer 1: -1", "sentiment at layer 3: 1"]
        label = shown.page.locator("#norms").get_attribute("aria-label")
        assert label == "Activation norm of 6 layers by time, from 1 to 32. Arrow keys read it."
        shown.page.locator("#norms").focus()
        for _ in range(3):
            shown.page.keyboard.press("ArrowUp")
        assert shown.text("norms-read") == "layer 2, 0 s ago: mean 4, largest 4"
        shown.page.locator("summary").click()
        rows = shown.text("layers").split("\n")
        assert rows[2].split("\t") == ["2", "4", "4", "0.25"]
        assert shown.page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        assert shown.page.evaluate("document.querySelector('main').getBoundingClientRect().bottom <= innerHeight")
        host = shown.page.url.removesuffix("/steering/live")
        assert sorted(u.removeprefix(host) for u in shown.asked if not u.startswith("data:")) == [
            "/steering/live",
            "/steering/live/events",
        ]
        assert not shown.complaints


def test_states_are_said(tmp_path: Path, browser: Any) -> None:
    live = feed(interval=0.1, every=None)
    with watched(browser, application(tmp_path, live)) as shown:
        shown.running.push(live)
        shown.shows("status", "No traffic yet")
        shown.running.loop.call_soon_threadsafe(live.late, 42.0)
        shown.shows("status", "The workers have not answered for 42 s")
        shown.running.push(live, seen([1.0] * LAYERS), answer(norms=[[3, 2, 4, 0.0, None]]))
        shown.shows("status", "Live · a share of the passes sampled, read every 0.1 s")
        shown.running.push(live, answer(norms=[[2, 2, 4, 0.0, None]]))
        shown.shows("alarm", "No finite norm at layer 2 in the last minute.")
        assert not shown.complaints
        shown.running.server.should_exit = True
        shown.shows("status", "No connection to the server; trying again")


def test_monitoring_off_and_dark(tmp_path: Path, browser: Any) -> None:
    with watched(browser, application(tmp_path, None), color_scheme="dark") as shown:
        shown.shows("status", "Monitoring is off")
        assert shown.page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 23, 28)"
        shown.page.wait_for_timeout(1500)
        assert len(shown.asked) == 2  # it does not ask again
        assert not shown.complaints


def test_the_page_asks_for_the_key_and_keeps_it(tmp_path: Path, browser: Any) -> None:
    live = feed(interval=0.1)
    live.take(seen([1.0] * LAYERS))
    live.publish()
    with watched(browser, application(tmp_path, live, key="schlüssel")) as shown:
        for key in ("wrong", "schlüssel"):
            playwright.expect(shown.page.get_by_label("This server wants its API key:")).to_be_focused()
            shown.shows("status", "Locked")
            shown.page.keyboard.type(key)
            shown.page.keyboard.press("Enter")
        shown.shows("status", "Live")
        assert not shown.page.locator("#ask").is_visible()
        shown.page.reload()
        shown.shows("status", "Live")
        assert not [url for url in shown.asked if "schl" in url]
