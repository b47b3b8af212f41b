"""What the pages of all commands share: tables in three forms, and pictures with and without matplotlib."""

import sys
from pathlib import Path

import pytest
from browser import browser, find_browser
from html5lib import HTMLParser
from test_evaluation import make_comparison, make_report
from test_trainer import run

from peagle_hf.evaluation.report import html
from peagle_hf.pages import pictures
from peagle_hf.pages.tables import Table, escape_markdown

HOSTILE = "<script>alert(1)</script> a | b\n[c](javascript:d) `e` **f** & ![g](h) #i ~~j~~"


def test_a_table_shows_any_text_and_aligns_numbers():
    table = Table("T & t", ["name", "count", "share"], [[HOSTILE, "12", "1.5 %"], ["表", "7", ""]])
    page = f"<!DOCTYPE html><html><head><title>t</title></head><body>{table.html()}</body></html>"
    cells = [cell for cell in HTMLParser(strict=True).parse(page).iter() if cell.tag.endswith("}td")]
    assert [cell.text or "" for cell in cells] == [HOSTILE, "12", "1.5 %", "表", "7", ""]
    assert ["number" in cell.get("class") for cell in cells] == [False, True, True] * 2
    head, *lines = table.text().splitlines()[1:]
    assert head.index("count") == lines[-1].index("7") + 1, "one character that is two columns wide"
    assert "<thead>" not in Table("", ["", ""], [["a", "b"]]).html()
    assert Table("", ["a"], []).html().count("<tr>") == 1


@pytest.mark.slow
@pytest.mark.skipif(find_browser() is None, reason="no Chromium or Chrome is installed")
def test_a_wide_table_is_a_list_on_a_phone(tmp_path):
    table = Table("", ['a "name"', "long " * 6, ""], [["x", "word " * 5, "y"]])
    (tmp_path / "report.html").write_text(html(make_comparison()).replace("</body>", f"{table.html()}</body>"))
    wide = (
        "[document.documentElement, ...document.querySelectorAll('.table')].filter(e => e.scrollWidth > e.clientWidth)"
    )
    cells = "[...document.querySelectorAll('.table:last-child td')]"
    with browser(tmp_path) as page:
        page.open((tmp_path / "report.html").as_uri(), width=390)
        assert page.evaluate(f"{wide}.length") == 0
        shown = page.evaluate(f"{cells}.map(cell => getComputedStyle(cell, '::before').content)")
        assert shown == ['"a \\"name\\": "', f'"{"long " * 6}: "', "none"]
        page.open((tmp_path / "report.html").as_uri(), width=1280)
        assert page.evaluate(f"getComputedStyle({cells}[0], '::before').content") == "none"
        assert page.faults == []


def test_escaped_markdown_is_the_text_itself():
    markdown = pytest.importorskip("markdown")
    page = HTMLParser().parse(markdown.markdown(escape_markdown(HOSTILE)))
    assert {node.tag.partition("}")[2] for node in page.iter()} == {"html", "head", "body", "p"}
    text = "".join(page.itertext()).replace("\\~", "~").replace("\\|", "|")  # which only tables and GitHub take away
    assert text == " ".join(HOSTILE.split())


def test_a_picture_that_can_not_be_drawn_gives_the_reason(tmp_path, caplog):
    def draw(axes):
        raise ValueError("no <numbers>")

    shown = pictures.picture("lengths", draw)
    assert shown == "<p>The picture “lengths” could not be drawn: no &lt;numbers&gt;</p>"
    pictures.save_png(tmp_path / "curves.png", [draw], (4, 3), "curves.json")
    assert "curves.png could not be drawn (ValueError: no <numbers>). All figures are in curves.json." in caplog.text
    assert list(tmp_path.iterdir()) == []


@pytest.mark.fault("matplotlib is not installed", "Reports and training have no pictures and say what to install.")
def test_without_matplotlib_reports_have_tables_and_say_what_to_install(monkeypatch, train_flags, caplog):
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    pictures.can_draw.cache_clear()
    try:
        page = html(make_report())
        run(train_flags, num_train_epochs=1)
    finally:
        pictures.can_draw.cache_clear()
    assert page.count("pip install &#39;peagle-hf[plots]&#39;") == 3
    assert "<img" not in page
    assert "<h2>Acceptance</h2>" in page
    assert caplog.text.count("pip install 'peagle-hf[plots]'") == 1
    folder = Path(train_flags["output_dir"])
    assert (folder / "checkpoint_best").exists()
    assert not (folder / "training.png").exists()
