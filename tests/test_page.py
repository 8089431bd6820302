"""`hf-sparse report --page`: a page of results that needs nothing else, read as a browser reads it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from hf_sparse.page import HeatMap, Section, render
from tests.small import refusal, run_command

CARDS = Path(__file__).parents[1] / "model_cards"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: Debian's package is chromium")
TABLE = (["method", "length", "ratio"], [["b", "8,192", "1.5"], ["a", "512", "-"], ["c", "1,024", "0.25 (worst)"]])


class Page(HTMLParser):
    """The sections, cells and addresses of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text, self.headings, self.addresses, self.titles, self._in = text, [], [], [], ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._in = tag
        found = dict(attrs)
        self.addresses += [found[name] for name in ("src", "href") if name in found]
        if "title" in found:
            self.titles.append(found["title"])

    def handle_data(self, data: str) -> None:
        if self._in == "h2" and data.strip():
            self.headings.append(data.strip())


def page_of(folder: Path, page: Path) -> Page:
    assert run_command("report", str(folder), "--page", str(page)) == 0
    return Page(page.read_text(encoding="utf-8"))


def test_a_page_of_a_card(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = CARDS / "SmolLM2-135M-Instruct-calibrated"
    page = page_of(folder, tmp_path / "page.html")
    assert capsys.readouterr().out == f"{tmp_path / 'page.html'}\n"
    assert page.headings == ["calibration / calibrate", "perplexity", "retrieval", "configuration"]
    for name in ("perplexity", "calibration"):
        for cell in re.findall(r"[^|\n]+", (folder / name / "tables.md").read_text()):
            assert "--" in cell or f">{cell.strip()}<" in page.text
    laws = json.loads((folder / "sparse_config.json").read_text())["per_head"]
    heads = sum(map(len, laws.values()))
    # Keys and exponent, of the calibration and of the configuration alike.
    assert sum(title.startswith("layer ") for title in page.titles) == 2 * heads
    assert f"layer 3, head 5: {laws['3'][5][1]:.4g}" in page.titles


def test_nothing_else_is_needed(tmp_path: Path) -> None:
    folder = CARDS / "SmolLM2-135M-Instruct"
    page = page_of(folder, tmp_path / "page.html")
    assert page.headings[:2] == ["attention-error", "perplexity"]
    assert all(address.startswith(("#section-", "data:image/png;base64,")) for address in page.addresses)
    assert sum(address.startswith("data:") for address in page.addresses) == len(list(folder.rglob("*.png"))) > 3


def test_every_committed_folder_has_a_place(tmp_path: Path) -> None:
    headings = page_of(CARDS, tmp_path / "page.html").headings
    summaries = [path.parent.relative_to(CARDS) for path in CARDS.rglob("summary.json")]
    for folder in summaries:
        assert any(heading.startswith(" / ".join(folder.parts)) for heading in headings)


def test_what_names_hold_is_text() -> None:
    hostile = "<script>alert(1)</script>"
    maps = [HeatMap(hostile, [hostile], [hostile], [[1.0]])]
    section = Section(hostile, [([hostile], [[hostile]])], {hostile: hostile}, maps=maps, details={hostile: hostile})
    assert render(hostile, [section]).count("<script>") == 1  # the page's own


def test_colours_of_a_map() -> None:
    heat = HeatMap("", ["a", "b"], ["c", "d"], [[0.0, None], [5.0, 10.0]], low=0)
    assert heat.limits == (0, 10)
    assert heat.colour(None) == "transparent"
    assert heat.colour(0.0) == heat.colour(-1.0) == "rgb(68,1,84)"
    assert heat.colour(5.0) == "rgb(33,145,140)"
    assert heat.colour(10.0) == heat.colour(99.0) == "rgb(253,231,37)"
    assert HeatMap("", ["a"], ["b"], [[2.0]]).colour(2.0) == "rgb(33,145,140)"


def test_refusals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = str(tmp_path / "page.html")
    assert "holds no results" in refusal(capsys, "report", str(tmp_path), "--page", page)
    assert "--page takes neither" in refusal(capsys, "report", str(CARDS), "--page", page, "--json")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/summary.json").write_text('{"command": "perplexity"}')
    assert "no tables can be made of" in refusal(capsys, "report", str(tmp_path), "--page", page)
    assert not Path(page).exists()


def browse(page: Path, *arguments: str) -> str:
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", *arguments, page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


@needs_browser
@pytest.mark.parametrize(
    ("column", "clicks", "order"),
    [(0, 1, "abc"), (0, 2, "cba"), (1, 1, "acb"), (1, 2, "bca"), (2, 1, "cba"), (2, 2, "abc")],
)
def test_a_click_sorts_by_a_column(column: int, clicks: int, order: str, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    click = (
        f'<script>for (let i = 0; i < {clicks}; i++) document.querySelectorAll("th button")[{column}].click()</script>'
    )
    page.write_text(render("page", [Section("run", [TABLE])]).replace("</body>", click + "</body>"))
    seen = browse(page, "--dump-dom")
    assert re.findall(r"<tr><td>(\w)</td>", seen) == list(order)
    assert re.findall(r'aria-sort="(\w+)"', seen) == ["ascending" if clicks == 1 else "descending"]


@needs_browser
def test_a_phone_shows_it_without_scrolling_sideways(tmp_path: Path) -> None:
    page, picture = tmp_path / "page.html", tmp_path / "page.png"
    page_of(CARDS / "SmolLM2-135M-Instruct", page)
    measure = "<script>document.title = document.documentElement.scrollWidth + ' of ' + innerWidth</script>"
    page.write_text(page.read_text().replace("</body>", measure + "</body>"))
    found = re.search(r"<title>(\d+) of (\d+)</title>", browse(page, "--window-size=500,900", "--dump-dom"))
    assert found is not None
    assert int(found[1]) <= int(found[2]) <= 500
    browse(page, "--window-size=500,900", f"--screenshot={picture}")
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert picture.stat().st_size > 20_000
