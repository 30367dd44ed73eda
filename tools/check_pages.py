"""Look at every built page as a reader's browser would, at two widths. This is `make check-pages`.

Three questions, in headless Chromium: does axe-core find a barrier (WCAG 2, levels A and AA), is code cut off
at the right, does the page scroll sideways? The last two are told by the browser's own measures.
"""

from __future__ import annotations

import argparse
import html
import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from layout import ROOT

WIDTHS = {"desktop": 1280, "phone": 390}
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
# Markup of the theme and of sphinxcontrib-bibtex: what is wrong with it is theirs to mend.
THEMES = (
    ".bd-sidebar-primary",
    ".bd-header-article",
    ".bd-sidebar-secondary",
    ".prev-next-area",
    ".citation-list",
)
LOOK = """
<script src="AXE"></script>
<script>
window.addEventListener("load", async () => {
  const code = [...document.querySelectorAll(".highlight pre")];
  const wide = code.filter(p => p.innerText.trim() && p.scrollWidth > p.clientWidth + 1);
  const found = {
    width: window.innerWidth,
    sideways: document.documentElement.scrollWidth - window.innerWidth,
    clipped: wide.map(p => p.innerText.split("\\n").reduce((a, b) => a.length > b.length ? a : b)),
  };
  const rules = await axe.run({exclude: THEMES.map(one => [one])}, {runOnly: ["wcag2a", "wcag2aa"]});
  found.barriers = rules.violations.map(v => [v.id, v.help, v.nodes.length, v.nodes[0].html.slice(0, 150)]);
  parent.postMessage(JSON.stringify(found), "*");
});
</script>
"""
# A window has a least width, a frame has none.
FRAME = """<!DOCTYPE html><title>frame</title>
<iframe src="PAGE" style="width: WIDTHpx; height: 2000px; border: 0"></iframe>
<script>
addEventListener("message", event => {
  const told = document.createElement("pre");
  told.id = "found";
  told.textContent = event.data;
  document.body.append(told);
});
</script>
"""


def browser() -> str:
    """The program of a Chromium."""
    for name in BROWSERS:
        if path := shutil.which(name):
            return path
    raise SystemExit(f"error: no browser found. Install one of {', '.join(BROWSERS)}")


def axe() -> Path:
    """axe-core, as the Python package axe-playwright-python brings it along."""
    spec = find_spec("axe_playwright_python")
    if spec is None or spec.origin is None:
        raise SystemExit("error: axe-core is missing. pip install --no-deps axe-playwright-python")
    return Path(spec.origin).with_name("axe.min.js")


def look(page: Path, width: int, program: str) -> dict[str, Any]:
    """What the browser finds on one page at one width."""
    text = page.read_text(encoding="utf-8")
    script = LOOK.replace("AXE", axe().as_uri()).replace("THEMES", json.dumps(THEMES))
    copy, frame = (page.with_name(f"{page.stem}.look-{what}{width}.html") for what in ("", "frame-"))
    copy.write_text(text.replace("</body>", f"{script}</body>"), encoding="utf-8")  # beside its style sheets
    frame.write_text(FRAME.replace("PAGE", copy.name).replace("WIDTH", str(width)), encoding="utf-8")
    command = [
        program, "--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files",
        "--window-size=1400,2100", "--virtual-time-budget=60000", "--dump-dom", frame.as_uri(),
    ]  # fmt: skip
    try:
        shown = subprocess.run(command, capture_output=True, text=True, timeout=180).stdout
    finally:
        copy.unlink()
        frame.unlink()
    told = re.search(r'<pre id="found">(.*?)</pre>', shown, re.S)
    if told is None:
        raise SystemExit(f"error: the browser said nothing about {page.name}")
    found = json.loads(html.unescape(told[1]))
    if found["width"] != width:
        raise SystemExit(f"error: the browser is {found['width']} px wide, and {width} was asked for")
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="parts of pages' names; default: all pages")
    parser.add_argument(
        "--built", type=Path, default=ROOT / "build" / "_build" / "html", help="folder of pages"
    )
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args(arguments)
    pages = sorted(
        p for part in ("book", "notebooks") for p in (options.built.resolve() / part).glob("*.html")
    )
    pages = [p for p in pages if ".look-" not in p.stem]
    pages = [p for p in pages if not options.names or any(name in p.stem for name in options.names)]
    if not pages:
        print(f"error: no built page in {options.built}. Run make book first", file=sys.stderr)
        return 2
    program, wrong = browser(), Counter()
    asked = [(page, kind) for page in pages for kind in WIDTHS]
    with ThreadPoolExecutor(options.jobs) as pool:
        found = list(pool.map(lambda one: look(one[0], WIDTHS[one[1]], program), asked))
    for (page, kind), one in zip(asked, found, strict=True):
        lines = [f"{name}: {told} ({count}; {first})" for name, told, count, first in one["barriers"]]
        lines += [f"code is cut off: {line}" for line in one["clipped"] if kind == "desktop"]
        lines += [f"scrolls sideways by {one['sideways']} px"] if one["sideways"] > 0 else []
        wrong[kind] += len(lines)
        for line in lines:
            print(f"{page.stem}, {kind}: {line}")
    print(f"{len(pages)} pages: {', '.join(f'{count} findings at {kind}' for kind, count in wrong.items())}")
    return int(sum(wrong.values()) > 0)


if __name__ == "__main__":
    sys.exit(main())
