"""The book renders from the stored outputs, without a warning, and needs no network to be read."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

import layout
from harmlens.evidence.claims import load_claims

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def html(root):
    done = subprocess.run(
        [sys.executable, str(root / "tools" / "build_book.py"), "--from-stored"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return root / "build" / "stored" / "_build" / "html"


def test_every_page_is_there(html):
    for page in layout.toc_pages():
        assert (html / f"{page}.html").stat().st_size > 1000, page


def test_pages_load_nothing_from_elsewhere(html):
    for page in layout.toc_pages():
        text = (html / f"{page}.html").read_text(encoding="utf-8")
        loaded = re.findall(r"<(?:script|img|iframe)[^>]+src=\"(https?:[^\"]+)\"", text)
        loaded += re.findall(r"<link[^>]+rel=\"stylesheet\"[^>]+href=\"(https?:[^\"]+)\"", text)
        assert not loaded, f"{page}: {loaded}"


def test_formulas_come_with_the_book(html):
    papers = (html / "book" / "papers.html").read_text(encoding="utf-8")
    script = re.search(r"src=\"([^\"]*mathjax[^\"]*\.js)", papers)
    assert script, "no formula on the page of the papers, or MathJax is not loaded"
    assert (html / "book" / script[1]).resolve().exists()


def test_a_notebook_says_what_was_found_before_any_code_and_in_its_summary(html):
    for name in sorted({claim.notebook for claim in load_claims().values()}):
        text = (html / "notebooks" / f"{name}.html").read_text(encoding="utf-8")
        assert text.index("In short") < text.index('class="highlight'), name
        assert "What was found." in text, name


def test_badge_and_rocket_open_the_colab_edition(html):
    for path in layout.notebooks():
        relative = path.relative_to(layout.ROOT)
        text = (html / relative.with_suffix(".html")).read_text(encoding="utf-8")
        links = set(re.findall(r"https://colab\.research\.google\.com/github/[^\"]+", text))
        owner = layout.address().removeprefix("https://github.com/")
        blob = f"https://colab.research.google.com/github/{owner}/blob/{layout.BRANCH}"
        assert links == {f"{blob}/book/colab/{relative.as_posix()}"}
        assert (layout.ROOT / "book/colab" / relative).exists()
