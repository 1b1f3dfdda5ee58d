"""The page in a real browser: Chromium, driven by Playwright. Skipped where either is missing."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from typing import Any

import pytest

from mor.show.palette import depth_swatches
from tests.serve.serving import Running, running
from tests.serve.sources import TinySource

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]

QUIET = "--no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-component-update"
SLOW = TinySource(seconds=0.01, options={"prefix_caching": False})


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=QUIET.split())
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def slow() -> Iterator[Running]:
    with running(SLOW, max_tokens=200) as server:
        yield server


class Page:
    """The page with what went wrong on it."""

    def __init__(self, browser: Any, server: Running, *, width: int = 1100, **context: Any) -> None:
        self.problems: list[str] = []
        self.asked: set[str] = set()
        self.context = browser.new_context(viewport={"width": width, "height": 800}, **context)
        self.page = self.context.new_page()
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on("console", lambda said: said.type == "error" and self.problems.append(said.text))
        self.page.on("request", lambda request: self.asked.add(request.url.split("/")[2]))
        self.page.goto(server.url)
        self.page.wait_for_selector("#go:not([disabled])")

    def write(self, prompt: str, *, tokens: int = 30, seed: int = 1, wait: bool = True) -> None:
        for name, value in (("prompt", prompt), ("tokens", str(tokens)), ("seed", str(seed))):
            self.page.fill(f"#{name}", value)
        self.page.press("#prompt", "Control+Enter")
        if wait:
            self.page.wait_for_selector("#stop[disabled]", state="attached")

    def depths(self, panel: int = 0) -> list[int]:
        return [int(value) for value in self.of_tokens("node => node.dataset.d", panel)]

    def of_tokens(self, what: str, panel: int = 0) -> list[Any]:
        script = f"(nodes) => [...nodes[{panel}].querySelectorAll('.t')].map({what})"
        return self.page.eval_on_selector_all(".text", script)


@pytest.fixture
def page(browser: Any, server: Running) -> Iterator[Page]:
    page = Page(browser, server)
    yield page
    page.context.close()
    assert page.problems == []
    assert page.asked == {server.url.split("/")[2]}  # nothing from elsewhere


def test_tokens_stand_on_the_colours_of_their_depths(page: Page, server: Running) -> None:
    page.write("hello", tokens=40)
    expected = server.complete("hello", max_tokens=40, seed=1, temperature=0.8, mean_depth=2.0).json()
    assert page.depths() == expected["choices"][0]["depths"]
    text = page.page.inner_text(".text")
    visible = [c for c in expected["choices"][0]["text"] if c.isascii() and c.isalnum()]
    assert text.startswith("hello") and [c for c in text[5:] if c.isascii() and c.isalnum()] == visible
    swatches = depth_swatches(3)
    for depth, color in zip(page.depths(), page.of_tokens("node => getComputedStyle(node).backgroundColor")):
        red, green, blue = (int(swatches[depth - 1].fill[i : i + 2], 16) for i in (1, 3, 5))
        assert color == f"rgb({red}, {green}, {blue})"
    shown = page.page.inner_text("[data-of=depth]")
    assert float(shown) == pytest.approx(expected["usage"]["mean_depth"], abs=0.005)
    counts = [int(cell.split()[0]) for cell in page.page.locator(".depths td:last-child").all_inner_texts()]
    assert counts == [page.depths().count(depth) for depth in (1, 2, 3)]


def test_the_card_of_a_token(page: Page, server: Running) -> None:
    page.write("hello", tokens=10)
    reply = server.complete("hello", max_tokens=10, seed=1, temperature=0.8, mean_depth=2.0, logprobs=4).json()
    choice = reply["choices"][0]
    page.page.focus(".text")
    for _ in range(3):
        page.page.keyboard.press("ArrowRight")
    card = page.page.inner_text("#tip")
    assert card.startswith(f"depth {choice['depths'][2]} of 3 · probability")
    assert page.page.locator("#tip tr").count() == len(choice["logprobs"]["top_logprobs"][2])
    assert page.page.locator("#tip tr.chosen").count() == 1
    page.page.keyboard.press("Escape")
    assert not page.page.is_visible("#tip")
    page.page.hover(".t >> nth=0")
    assert page.page.is_visible("#tip")


def test_two_budgets_side_by_side(page: Page) -> None:
    page.page.check("#compare")
    for dial, value in (("a", "1"), ("b", "3")):
        page.page.fill(f"#dial-{dial}", value)
    page.write("hello", tokens=25)
    assert set(page.depths(0)) == {1} and set(page.depths(1)) == {3}
    assert page.page.locator("h2").all_inner_texts() == ["mean depth 1.0", "mean depth 3.0"]
    kilobytes = [float(text.split()[0]) for text in page.page.locator("[data-of=bytes]").all_inner_texts()]
    assert kilobytes[0] < kilobytes[1]


def test_a_chat_goes_on(page: Page, server: Running) -> None:
    page.page.check("[value=chat]")
    page.write("Hi", tokens=8)
    first = server.chat("Hi", max_tokens=8, seed=1, temperature=0.8, mean_depth=2.0).json()["choices"][0]
    assert page.depths() == first["depths"]
    page.write("And?", tokens=6)
    turns = [("user", "Hi"), ("assistant", first["message"]["content"]), ("user", "And?")]
    body = {"messages": [{"role": role, "content": content} for role, content in turns], "max_tokens": 6, "seed": 1}
    second = server.client.post("/v1/chat/completions", json={**body, "temperature": 0.8, "mean_depth": 2.0}).json()
    assert page.depths() == first["depths"] + second["choices"][0]["depths"]
    assert page.page.locator(".who").all_inner_texts() == ["you", "model", "you", "model"]


def test_markup_stays_text(page: Page) -> None:
    """A chat template repeats what the user says, and byte models write anything."""
    page.page.check("[value=chat]")
    page.write("<img src=x onerror=alert(1)><script>alert(1)</script>", tokens=5)
    assert page.page.locator("#panels img, #panels script").count() == 0
    assert "<img src=x" in page.page.inner_text(".text")


def test_an_error_is_told(page: Page) -> None:
    page.write("x" * 300)
    assert "255" in page.page.inner_text("#problem")
    page.write("short", tokens=3)
    assert not page.page.is_visible("#problem")
    page.problems.clear()  # the browser reports the status of the first


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_has_room_for_all(browser: Any, server: Running, scheme: str) -> None:
    page = Page(browser, server, width=360, color_scheme=scheme, has_touch=True)
    page.page.check("#compare")
    page.write("a rather long prompt " * 3, tokens=50)
    assert page.page.evaluate("document.documentElement.scrollWidth") == 360
    page.page.tap(".t >> nth=4")
    assert page.page.is_visible("#tip")
    background = page.page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(16, 19, 23)") is (scheme == "dark")
    assert page.problems == []
    page.context.close()


def test_everything_is_done_with_the_keyboard(page: Page) -> None:
    reached: set[str] = set()
    for _ in range(20):
        page.page.keyboard.press("Tab")
        reached.add(page.page.evaluate("document.activeElement.id || document.activeElement.className"))
    assert {"prompt", "dial-a", "compare", "tokens", "temperature", "seed", "go", "numbers", "text"} <= reached


def test_stopping_frees_the_engine(browser: Any, slow: Running) -> None:
    page = Page(browser, slow)
    page.write("hello", tokens=200, wait=False)
    page.page.wait_for_selector(".t >> nth=5")
    page.page.keyboard.press("Escape")
    slow.wait_until(lambda: slow.engine.num_open == 0, seconds=1.0)
    page.page.wait_for_selector("#stop[disabled]", state="attached")
    assert 5 < len(page.depths()) < 150
    page.context.close()


def test_the_first_token_is_seen_at_once(browser: Any, slow: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """At most 50 ms after the server had it, in the best of a few tries: other processes share this machine."""
    heard, served = slow.service.metrics.heard, list[float]()

    def listen(output: Any, **times: Any) -> None:
        served.append(time.time())
        heard(output, **times)

    monkeypatch.setattr(slow.service.metrics, "heard", listen)
    page = Page(browser, slow)
    delays: list[float] = []
    for _ in range(5):
        page.page.evaluate(
            "window.seen = new Promise((tell) => new MutationObserver((changes, observer) => {"
            "  if (!document.querySelector('.t')) return;"
            "  observer.disconnect();"
            "  requestAnimationFrame(() => requestAnimationFrame(() => tell(Date.now())));"  # painted in between
            "}).observe(document.getElementById('panels'), { childList: true, subtree: true })); 0"
        )
        served.clear()
        page.write("hello", tokens=20)
        delays.append(page.page.evaluate("window.seen") / 1000 - served[0])
    assert min(delays) <= 0.05, delays
    page.context.close()


@pytest.mark.slow
def test_a_key_is_asked_for(browser: Any) -> None:
    with running(api_key="open sesame") as server:
        page = Page.__new__(Page)
        context = browser.new_context()
        page.page = context.new_page()
        page.page.goto(server.url)
        page.page.fill("#key", "open sesame")
        page.page.press("#key", "Tab")
        page.page.wait_for_selector("#go:not([disabled])")
        page.write("hello", tokens=5)
        assert len(page.depths()) == 5
        context.close()
