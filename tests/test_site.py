"""Every page of the site in a real browser: no errors, no dead links, no missing pictures, no sideways scrolling."""

import functools
import subprocess
import sys
import threading
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urljoin, urlsplit

import pytest
from browser import browser, find_browser

ROOT = Path(__file__).parents[1]
MISSING_PICTURES = "[...document.images].filter(i => !(i.complete && i.naturalWidth)).map(i => i.src)"
WIDE = """[document.documentElement, ...document.querySelectorAll('.md-typeset__scrollwrap')]
    .filter(e => e.scrollWidth > e.clientWidth + 1).map(e => e.innerText.slice(0, 80))"""
"""What has to be scrolled sideways, of the whole page and its tables."""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_browser() is None, reason="no Chromium or Chrome is installed"),
]


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder of the built site and the address at which it is served."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", folder]
    subprocess.run(command, cwd=ROOT, check=True, timeout=300)
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield folder, f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    with browser(tmp_path_factory.mktemp("browser")) as tab:
        yield tab


def paths(folder: Path) -> list[str]:
    """The address of each page below that of the site."""
    return sorted(str(path.relative_to(folder).parent) + "/" for path in folder.rglob("index.html"))


class Links(HTMLParser):
    """The targets of links and the anchors of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.targets: set[str] = set()
        self.anchors: set[str] = set()
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.anchors |= {value for value in (values.get("id"), values.get("name")) if value}
        target = values.get("href") if tag in ("a", "link") else values.get("src")
        self.targets |= {target} if target else set()


@pytest.mark.parametrize("width", [pytest.param(1280, id="laptop"), pytest.param(390, id="phone")])
def test_every_page_loads_without_a_fault(site, page, width):
    """Neither the page nor a table may be wider than the window."""
    folder, address = site
    faults = {}
    for path in paths(folder):
        page.open(urljoin(address, path), width=width, is_dark=width < 1000)
        found = page.faults + page.evaluate(MISSING_PICTURES)
        found += [f"wider than the window: {text!r}" for text in page.evaluate(WIDE)]
        if found:
            faults[path] = found
    assert faults == {}


def test_no_link_is_dead(site):
    folder, address = site
    pages = {urljoin(address, path): Links((folder / path / "index.html").read_text()) for path in paths(folder)}
    dead = []
    for base, links in pages.items():
        for target in links.targets:
            url, _, anchor = urljoin(base, target).partition("#")
            if not url.startswith(address):
                continue
            path = folder / unquote(urlsplit(url).path).lstrip("/")
            if not (path / "index.html" if path.is_dir() else path).is_file():
                dead.append(f"{base} -> {target}")
            elif anchor and url in pages and unquote(anchor) not in pages[url].anchors:
                dead.append(f"{base} -> {target}: no such anchor")
    assert dead == []


def test_pictures_and_colours_follow_the_scheme(site, page):
    background = "getComputedStyle(document.body).backgroundColor"
    colours = []
    for is_dark in (False, True):
        page.open(site[1], is_dark=is_dark)
        colours.append(page.evaluate(background))
        assert page.evaluate("document.images.length") > 0
    assert colours[0] != colours[1]


def test_a_wide_table_is_a_list_on_a_phone_with_the_head_of_its_column_before_each_cell(site, page):
    cell = "document.querySelector('td[data-label=\"ours GiB\"]')"
    shown = f"getComputedStyle({cell}, '::before').content"
    page.open(urljoin(site[1], "performance/"), width=1280)
    assert page.evaluate(f"[{cell}.innerText, {shown}]") == ["23.4", "none"]
    page.open(urljoin(site[1], "performance/"), width=390)
    assert page.evaluate(f"[{cell}.innerText, {shown}]") == ["23.4", '"ours GiB: "']
