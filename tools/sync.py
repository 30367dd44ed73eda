"""Keep everything in step with the repository's public address in pyproject.toml. This is `make sync`.

python tools/sync.py                     rewrite badges, links, set-up cells from pyproject.toml, and the
                                         Colab edition of the notebooks from the notebooks
python tools/sync.py --address URL       change the address first
python tools/sync.py --check             change nothing; list what is out of step, exit code 1
"""

from __future__ import annotations

import argparse
import copy
import re
import sys
from pathlib import Path

import nbformat

from layout import ADDRESS_LINE, BRANCH, ROOT, address, read_notebook, tags, write_notebook

NAME = "harmlens"
COLAB = "book/colab/notebooks"  # what badges and the rocket open: plain Markdown, no outputs
GITHUB = re.compile(r"https://github\.com/([\w.-]+)/([\w.-]+?)(?:\.git)?/?")
BADGE_IMAGE = "https://colab.research.google.com/assets/colab-badge.svg"
BADGE = re.compile(r"\[!\[[^\]]*\]\(" + re.escape(BADGE_IMAGE) + r"\)\]\(([^)]*)\)")  # and where it leads
BLOCK = re.compile(r"(?s)(<!-- address:start -->\n).*?(<!-- address:end -->)")


def main(arguments: list[str] | None = None, root: Path = ROOT) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--address", help="new address, https://github.com/<owner>/<name>")
    parser.add_argument("--check", action="store_true", help="only report")
    options = parser.parse_args(arguments)
    try:
        if options.address:
            set_address(normal(options.address), root)
        changes = desired(root)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for path, content in changes.items():
        name = path.relative_to(root)
        if options.check:
            print(f"out of step with the address in pyproject.toml: {name}")
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_notebook(content, path) if path.suffix == ".ipynb" else path.write_text(content, "utf-8")
            print(f"rewritten: {name}")
    if options.check and changes:
        print("make sync puts this right")
        return 1
    return 0


def normal(url: str) -> str:
    """The address in its plain form. Raises ValueError for one that Colab can't open."""
    match = GITHUB.fullmatch(url.strip())
    if not match:
        raise ValueError(f"the address is {url!r}; Colab opens https://github.com/<owner>/<name> only")
    return f"https://github.com/{match[1]}/{match[2]}"


def set_address(url: str, root: Path = ROOT) -> None:
    path = root / "pyproject.toml"
    old, text = address(root), path.read_text(encoding="utf-8")
    path.write_text(ADDRESS_LINE.sub(rf"\g<1>{url}\g<3>", text, count=1), "utf-8")
    # Pages may name the old address in running text; afterwards nobody would know it.
    for page in text_files(root):
        text = page.read_text(encoding="utf-8")
        changed = replace_address(text, old, url)
        if changed != text:
            page.write_text(changed, "utf-8")
            print(f"rewritten: {page.relative_to(root)}")


def text_files(root: Path) -> list[Path]:
    """Files in which the address may stand, notebooks apart."""
    return sorted(
        [*root.glob("*.md"), *root.glob("book/**/*.md"), root / "_config.yml", root / "CITATION.cff"]
    )


def desired(root: Path = ROOT) -> dict[Path, object]:
    """New content of every file that is out of step: text, or a notebook."""
    url = normal(address(root))
    changes: dict[Path, object] = {}
    for path in filter(Path.exists, text_files(root)):
        text = path.read_text(encoding="utf-8")
        new = any_address(text, url)
        if path.name == "README.md":
            new = BLOCK.sub(lambda m: m[1] + readme_block(url, root) + m[2], new)
        elif path.name == "_config.yml":
            new = re.sub(r"(?m)^(  url: )\S+", rf"\g<1>{url}", new)
        elif path.name == "CITATION.cff":
            new = re.sub(r'(?m)^((?:url|repository-code): "?)[^"\s]+', rf"\g<1>{url}", new)
        if new != text:
            changes[path] = new
    import editions  # which needs addresses from here

    for path in sorted((root / "notebooks").glob("*.ipynb")):
        old, other = read_notebook(path), root / COLAB / path.name
        new = sync_notebook(old, url, f"{COLAB}/{path.name}")
        if new != old:
            changes[path] = new
        plain = editions.Plain(new, path.stem, root).whole()
        if not other.is_file() or read_notebook(other) != plain:
            changes[other] = plain
    return changes


def any_address(text: str, url: str) -> str:
    """`text` with every address of a repository called like the project replaced by `url`."""
    for owner in {m[1] for m in re.finditer(rf"https://github\.com/([\w.-]+)/{NAME}\b", text)}:
        text = replace_address(text, f"https://github.com/{owner}/{NAME}", url)
    return text


def replace_address(text: str, old: str, url: str) -> str:
    """Replace a repository's address, the address of its published book and its Colab links."""
    colab = "https://colab.research.google.com/github/"
    pairs = [(old, url), (pages_url(old), pages_url(url)), (colab + slug(old), colab + slug(url))]
    for before, after in pairs:
        text = re.sub(rf"{re.escape(before)}(?![\w-])", after, text)
    return text


def slug(url: str) -> str:
    return url.removeprefix("https://github.com/")


def pages_url(url: str) -> str:
    owner, name = slug(url).split("/")
    return f"https://{owner.lower()}.github.io/{name}"


def colab_url(url: str, path: str) -> str:
    return f"https://colab.research.google.com/github/{slug(url)}/blob/{BRANCH}/{path}"


def badge(url: str, path: str) -> str:
    return f"[![Open In Colab]({BADGE_IMAGE})]({colab_url(url, path)})"


def readme_block(url: str, root: Path = ROOT) -> str:
    """Badges and links at the head of the README."""
    first = min((root / "notebooks").glob("*.ipynb"), default=None)
    lines = [
        f"[![tests]({url}/actions/workflows/test.yml/badge.svg)]({url}/actions/workflows/test.yml)",
        *([badge(url, f"{COLAB}/{first.name}")] if first else []),
        "",
        f"Read the book: <{pages_url(url)}> · Get it: `git clone {url}`",
    ]
    return "\n".join(lines) + "\n"


def setup_source(url: str) -> str:
    """The set-up cell: at most ten lines, and nothing is left in the namespace but what it imports.

    torch and numpy are held as they are, or the installation stops: a runtime whose torch was replaced behind
    its back fails later, and in ways that nobody can read.
    """
    return (
        "# In Colab this installs the package and keeps torch and numpy; anywhere else it does nothing.\n"
        "import sys\n\n"
        'if "google.colab" in sys.modules:\n'
        "    from importlib.metadata import version\n"
        "    from pathlib import Path\n"
        '    print("About a minute. Red lines about other packages and notes on restarting are harmless.")\n'
        '    Path("held.txt").write_text("\\n".join(f"{p}=={version(p)}" for p in ("torch", "numpy")))\n'
        f'    %pip install -q -c held.txt "{NAME}[colab] @ git+{url}"\n'
        f"    import {NAME}  # fails here if the installation did; pip's message stands above"
    )


def sync_notebook(notebook: nbformat.NotebookNode, url: str, path: str) -> nbformat.NotebookNode:
    """The notebook with its badge below the title and the set-up cell before all other code."""
    new = copy.deepcopy(notebook)
    title = next((c for c in new.cells if c.cell_type == "markdown"), None)
    if title is None:
        raise ValueError(f"{path} has no markdown cell with a title")
    for cell in new.cells:
        if cell.cell_type == "markdown":
            cell.source = any_address(cell.source, url)
    if BADGE.search(title.source):
        title.source = BADGE.sub(badge(url, path), title.source)
    else:
        head, _, rest = title.source.partition("\n")
        title.source = f"{head}\n\n{badge(url, path)}\n\n{rest.lstrip()}".rstrip()
    setup = next((c for c in new.cells if "setup" in tags(c)), None)
    if setup is None:
        at = next((i for i, c in enumerate(new.cells) if c.cell_type == "code"), len(new.cells))
        setup = nbformat.v4.new_code_cell(id="setup")
        new.cells.insert(at, setup)
    setup.source = setup_source(url)
    setup.metadata["tags"] = sorted({*tags(setup), "setup", "hide-cell"}, reverse=True)
    return new


if __name__ == "__main__":
    sys.exit(main())
