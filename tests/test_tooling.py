"""The two commands, the cache of runs, the one address and the package, tried on a small toy book."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
import types
import zipfile
from pathlib import Path

import nbformat
import pytest

import execute
import layout
import sync

PARAMETERS = 'model = "organism/sft"  # which one\nn = 3  # how many\nquick = False  # fewer'
RECORD = (
    "import os, pathlib, sys\n"
    'folder = pathlib.Path(os.environ["HARMLENS_RESULTS"]) / "organism--sft" / "run-0"\n'
    "folder.mkdir(parents=True, exist_ok=True)\n"
    '(folder / "claim.json").write_text(str(n))\n'
    'print("n is", n)\n'
    'print("chat" + "ter", file=sys.stderr)'
)
FIRST = "organism--sft/run-0/claim.json"
READ = (
    "import os, pathlib\n"
    'found = sorted(pathlib.Path(os.environ["HARMLENS_RESULTS"]).rglob("claim.json"))\n'
    'print([p.parents[2].name + " " + p.read_text() for p in found])'
)


def write(root: Path, name: str, *code: str) -> Path:
    cells = [nbformat.v4.new_markdown_cell(f"# Notebook {name}\n\nText.", id="title")]
    for number, source in enumerate(code):
        cell = nbformat.v4.new_code_cell(source, id=f"c{number}")
        cell.metadata["tags"] = ["parameters"] if source == PARAMETERS else []
        cells.append(cell)
    notebook = nbformat.v4.new_notebook(cells=cells)
    notebook.metadata = layout.tidy_metadata(notebook.metadata)
    path = root / "notebooks" / f"{name}.ipynb"
    layout.write_notebook(notebook, path)
    return path


def make_project(root: Path) -> Path:
    """A book of one page and three notebooks, with the real tools."""
    shutil.copytree(layout.ROOT / "tools", root / "tools", ignore=shutil.ignore_patterns("__pycache__"))
    tool = root / "tools" / "layout.py"  # its notebooks have no figures for other pages
    tool.write_text(re.sub(r"(?s)(\nPICTURES[^=]*= )\{.*?\n\}", r"\1{}", tool.read_text()))
    for name in ("_config.yml", "pyproject.toml"):
        shutil.copy(layout.ROOT / name, root / name)
    (root / "CITATION.cff").write_text(f'url: "{layout.address()}"\nrepository-code: "{layout.address()}"\n')
    (root / "README.md").write_text("# Toy\n\n<!-- address:start -->\n<!-- address:end -->\n\nEnd.\n")
    shutil.copytree(layout.ROOT / "book" / "_static", root / "book" / "_static")
    (root / "book" / "intro.md").write_text(f"# Toy\n\nSee <{layout.address()}/issues>.\n")
    (root / "book" / "references.bib").write_text("")
    pages = ["01_first", "02_second", "19_scorecard"]
    chapters = "".join(f"  - file: notebooks/{page}\n" for page in pages)
    (root / "_toc.yml").write_text(f"format: jb-book\nroot: book/intro\nchapters:\n{chapters}")
    (root / "lib").mkdir()
    (root / "lib" / "code.py").write_text("x = 1\n")
    (root / "data" / "results").mkdir(parents=True)
    (root / "data" / "claims.yaml").write_text("[]\n")
    write(root, "01_first", PARAMETERS, RECORD)
    write(root, "02_second", PARAMETERS, RECORD)
    write(root, "19_scorecard", READ)
    return root


def tool(root: Path, name: str, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(root / "tools" / f"{name}.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.fixture
def project(tmp_path):
    return make_project(tmp_path / "project")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A toy book after the first `make book`; tests leave it as they found it or work on copies."""
    root = make_project(tmp_path_factory.mktemp("built") / "project")
    assert tool(root, "sync").returncode == 0
    done = tool(root, "build_book", "--jobs", "2")
    assert done.returncode == 0, done.stdout + done.stderr
    return root, done.stdout


@pytest.fixture
def again(built, tmp_path):
    root = tmp_path / "project"
    shutil.copytree(built[0], root)  # modification times are kept: a copy counts as finished, too
    return root


# --------------------------------------------------------------------------- make book


def test_book_ends_with_where_it_is_and_runs_the_scorecard_last(built):
    root, output = built
    assert output.splitlines()[-1] == "The book: build/_build/html/index.html"
    assert (root / "build" / "_build" / "html" / "index.html").exists()
    started = [line.split(":")[0] for line in output.splitlines() if line.endswith("started")]
    assert started[-1] == "19_scorecard"
    page = (root / "build" / "_build" / "html" / "notebooks" / "19_scorecard.html").read_text()
    assert "01_first 3" in page and "02_second 3" in page
    first = (root / "build" / "_build" / "html" / "notebooks" / "01_first.html").read_text()
    assert "n is 3" in first and "chatter" not in first


def test_a_run_leaves_the_committed_notebooks_alone(built):
    notebook = layout.read_notebook(built[0] / "notebooks" / "01_first.ipynb")
    assert all(not c.get("outputs") for c in notebook.cells)


def test_nothing_changed_means_nothing_is_run(again):
    done = tool(again, "build_book")
    assert done.returncode == 0
    assert "started" not in done.stdout and "rendering" not in done.stdout


def test_an_edited_sentence_is_rendered_without_a_new_run(again):
    path = again / "notebooks" / "01_first.ipynb"
    path.write_text(path.read_text().replace("Text.", "Other words."))
    done = tool(again, "build_book")
    assert done.returncode == 0, done.stderr
    assert "started" not in done.stdout and "rendering" in done.stdout
    page = (again / "build" / "_build" / "html" / "notebooks" / "01_first.html").read_text()
    assert "Other words." in page and "n is 3" in page


def test_failure_names_notebook_and_cell_and_keeps_the_finished(project):
    bad = write(project, "02_second", PARAMETERS, "print(1)", "total = 1\nraise KeyError('missing weights')")
    done = tool(project, "build_book")
    assert done.returncode == 1
    assert "02_second, cell 4 of 4:" in done.stderr
    assert "total = 1" in done.stderr and "KeyError: 'missing weights'" in done.stderr
    assert "19_scorecard: not run, because it needs 02_second" in done.stderr
    assert not (project / "build" / "_build").exists()

    write(project, "02_second", PARAMETERS, RECORD)
    run = execute.plan([bad], {}, project)[0]
    assert not execute.is_kept(run, execute.run_key(run, execute.environment_digest(project)))
    first = execute.plan([project / "notebooks" / "01_first.ipynb"], {}, project)[0]
    assert execute.is_kept(first, execute.run_key(first, execute.environment_digest(project)))


def test_interruption_keeps_the_finished_notebooks(project):
    write(project, "02_second", PARAMETERS, "import time\ntime.sleep(600)")
    command = [sys.executable, str(project / "tools" / "build_book.py"), "--jobs", "2"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        # A suite that runs in the background has SIGINT ignored, and would hand that on.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    record = project / "build" / "executed" / "01_first.json"
    until = time.monotonic() + 300
    while not record.exists() and time.monotonic() < until:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 130
    assert "finished notebooks are kept" in errors
    first = execute.plan([project / "notebooks" / "01_first.ipynb"], {}, project)[0]
    assert execute.is_kept(first, execute.run_key(first, execute.environment_digest(project)))
    assert not (project / "build" / "executed" / "02_second.json").exists()


def test_warning_fails_the_build_every_time(again):
    page = again / "book" / "intro.md"
    page.write_text(page.read_text() + "\nSee {ref}`nowhere`.\n")
    for _ in range(2):  # a second build over the first would not repeat the warning
        done = tool(again, "build_book")
        assert done.returncode == 1
        assert "book/intro.md" in done.stderr and "nowhere" in done.stderr


def test_a_page_that_is_missing_is_named(project):
    (project / "notebooks" / "02_second.ipynb").unlink()
    done = tool(project, "build_book")
    assert done.returncode == 1
    assert "02_second" in done.stderr and "started" not in done.stdout


def test_stored_outputs_render_only_if_there_are_some(project):
    done = tool(project, "build_book", "--from-stored")
    assert done.returncode == 1
    assert "01_first" in done.stderr and "no outputs" in done.stderr
    assert "rendering" not in done.stdout


def test_refresh_stores_outputs_and_results(again):
    kept = again / "data" / "results" / "01_first" / "organism--sft"
    for run in ("run-0", "run-1"):  # the first is measured anew
        (kept / run).mkdir(parents=True)
        (kept / run / "before.json").touch()
    done = tool(again, "refresh_notebooks")
    assert done.returncode == 0, done.stdout + done.stderr
    notebook = layout.read_notebook(again / "notebooks" / "01_first.ipynb")
    cells = [c for c in notebook.cells if c.cell_type == "code"]
    assert [c.execution_count for c in cells] == [1, 2, 3]
    assert [o.text for o in cells[-1].outputs] == ["n is 3\n"]  # and nothing of stderr
    assert "papermill" not in (again / "notebooks" / "01_first.ipynb").read_text()
    assert (again / "data" / "results" / "01_first" / FIRST).read_text() == "3"
    assert sorted(f"{p.parent.name}/{p.name}" for p in kept.rglob("*.json")) == [
        "run-0/claim.json", "run-1/before.json",
    ]  # fmt: skip


# --------------------------------------------------------------------------- parameters and keys


def test_unknown_parameter_is_refused_before_anything_runs(project):
    done = tool(project, "build_book", "-p", "size", "3")
    assert done.returncode == 1
    assert "size" in done.stderr and "01_first: model, n, quick" in done.stderr
    assert not (project / "build").exists()


def test_parameters_go_to_the_notebooks_that_have_them(project):
    runs = execute.plan(layout.notebooks(project), {"n": 5, "quick": True}, project)
    assert [r.parameters for r in runs] == [{"n": 5, "quick": True}, {"n": 5, "quick": True}, {}]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3", 3),
        ("1e-3", 0.001),
        ("true", True),
        ("False", False),
        ("none", None),
        ("[0, 1]", [0, 1]),
        ("organism/sft", "organism/sft"),
        ("", ""),
    ],
)
def test_values_from_the_command_line(text, value):
    assert execute.parse_value(text) == value
    assert type(execute.parse_value(text)) is type(value)


def test_key_follows_what_decides_the_outcome_and_nothing_else(project):
    path = project / "notebooks" / "01_first.ipynb"

    def key(**parameters):
        run = execute.plan([path], parameters, project)[0]
        return execute.run_key(run, execute.environment_digest(project))

    first = key()
    path.write_text(path.read_text().replace("Text.", "Other words."))
    (project / "data" / "results" / "x.json").write_text("{}")
    (project / "book" / "intro.md").write_text("# Other\n")
    assert key() == first
    keys = {first, key(n=4)}
    (project / "lib" / "code.py").write_text("x = 2\n")
    keys.add(key())
    (project / "data" / "claims.yaml").write_text("[1]\n")
    keys.add(key())
    write(project, "01_first", PARAMETERS, RECORD + "\n")
    keys.add(key())
    assert len(keys) == 5


def test_lost_result_files_bring_a_new_run(again):
    run = execute.plan(layout.notebooks(again), {}, again)[0]
    key = execute.run_key(run, execute.environment_digest(again))
    assert execute.is_kept(run, key)
    (again / execute.read_record(run)["results"][0]).unlink()
    assert not execute.is_kept(run, key)


def test_scorecard_key_follows_the_results_of_the_others(again):
    run = execute.plan(layout.notebooks(again), {}, again)[-1]
    environment = execute.environment_digest(again)
    assert execute.is_kept(run, execute.run_key(run, environment))
    (again / "build" / "results" / "01_first" / FIRST).write_text("4")
    assert not execute.is_kept(run, execute.run_key(run, environment))


def test_changed_parameters_stay_visible_in_the_page():
    committed = nbformat.v4.new_notebook()
    cell = nbformat.v4.new_code_cell("n = 3", id="p")
    cell.metadata["tags"] = ["parameters"]
    committed.cells = [cell, nbformat.v4.new_code_cell("print(n)", id="c")]
    executed = nbformat.reads(nbformat.writes(committed), as_version=4)
    injected = nbformat.v4.new_code_cell("n = 5", id="random")
    injected.metadata["tags"] = ["injected-parameters"]
    executed.cells.insert(1, injected)
    executed.cells[2].outputs = [nbformat.v4.new_output("stream", name="stdout", text="5\n")]
    shown = layout.merge_outputs(committed, executed, keep_injected=True)
    assert [c.source for c in shown.cells] == ["n = 3", "n = 5", "print(n)"]
    assert [c.source for c in layout.merge_outputs(committed, executed).cells] == ["n = 3", "print(n)"]
    executed.cells[2].source = "print(n + 1)"
    with pytest.raises(ValueError, match="other code cells"):
        layout.merge_outputs(committed, executed)


# --------------------------------------------------------------------------- the one address


def test_one_command_changes_the_address_everywhere(project):
    old = layout.address(project)
    assert tool(project, "sync", "--check").returncode == 1
    assert tool(project, "sync").returncode == 0
    assert tool(project, "sync", "--check").returncode == 0
    new = "https://github.com/Some-One/other.book"
    assert tool(project, "sync", "--address", f"{new}.git").returncode == 0
    assert tool(project, "sync", "--check").returncode == 0
    assert layout.address(project) == new
    for path in [*project.glob("*.*"), *project.glob("book/*.md"), *project.glob("notebooks/*")]:
        assert old not in path.read_text(), path
    readme = (project / "README.md").read_text()
    assert f"git clone {new}" in readme and readme.endswith("\nEnd.\n")
    assert "https://some-one.github.io/other.book" in readme
    assert f"<{new}/issues>" in (project / "book" / "intro.md").read_text()
    cells = layout.read_notebook(project / "notebooks" / "01_first.ipynb").cells
    assert "github/Some-One/other.book/blob/main/book/colab/notebooks/01_first.ipynb" in cells[0].source
    assert [layout.tags(c)[:1] for c in cells[1:3]] == [["setup"], ["parameters"]]
    assert f"harmlens[colab] @ git+{new}" in cells[1].source


def test_an_address_that_colab_cannot_open_is_refused(project):
    before = (project / "pyproject.toml").read_text()
    done = tool(project, "sync", "--address", "https://example.org/a/b")
    assert done.returncode == 1 and "https://github.com/<owner>/<name>" in done.stderr
    assert (project / "pyproject.toml").read_text() == before


def test_setup_cell_does_nothing_outside_colab(tmp_path, monkeypatch):
    from IPython.core.inputtransformer2 import TransformerManager

    monkeypatch.chdir(tmp_path)
    source = sync.setup_source("https://github.com/a/b")
    calls = []
    exec(TransformerManager().transform_cell(source), {"get_ipython": lambda: calls.append(1)})
    assert not calls and not list(tmp_path.iterdir())


def test_setup_cell_holds_torch_and_numpy_at_the_versions_that_are_there(tmp_path, monkeypatch):
    from importlib.metadata import version

    from IPython.core.inputtransformer2 import TransformerManager

    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "google.colab", types.ModuleType("google.colab"))
    source = sync.setup_source("https://github.com/a/b")
    asked = []
    shell = types.SimpleNamespace(run_line_magic=lambda *line: asked.append(line))
    exec(TransformerManager().transform_cell(source), {"get_ipython": lambda: shell})
    (name, line) = asked[0]
    assert name == "pip" and "-c held.txt" in line and "git+https://github.com/a/b" in line
    assert not re.search(r"upgrade|-U\b", line)
    held = (tmp_path / "held.txt").read_text().splitlines()
    assert held == [f"torch=={version('torch')}", f"numpy=={version('numpy')}"]


# --------------------------------------------------------------------------- set-up and package


def fake_python(folder: Path, name: str, script: str) -> Path:
    path = folder / name
    path.write_text("#!/bin/sh\n" + script)
    path.chmod(0o755)
    return path


@pytest.fixture
def fresh(tmp_path):
    for name in ("Makefile", "requirements.txt", "constraints.txt", "pyproject.toml"):
        shutil.copy(layout.ROOT / name, tmp_path / name)
    return tmp_path


def make(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS"))}
    return subprocess.run(["make", *arguments], cwd=folder, env=environment, capture_output=True, text=True)


def test_python_that_is_too_old_or_missing_is_named(fresh):
    old = fake_python(fresh, "oldpython", 'case "$1" in --version) echo Python 3.9.1;; *) exit 1;; esac\n')
    done = make(fresh, "setup", f"PYTHON={old}")
    assert done.returncode != 0
    assert "Python 3.9.1" in done.stdout and "3.11 or later" in done.stdout
    done = make(fresh, "setup", "PYTHON=no-such-python")
    assert done.returncode != 0 and "no-such-python" in done.stdout
    assert not (fresh / ".venv").exists()


def test_python_without_venv_is_told_what_to_install(fresh):
    bare = fake_python(fresh, "bare", 'case "$2" in *ensurepip*) exit 1;; *) exit 0;; esac\n')
    done = make(fresh, "setup", f"PYTHON={bare}")
    assert done.returncode != 0 and "python3-venv" in done.stdout


def test_failed_installation_leaves_no_stamp(fresh):
    (fresh / ".venv" / "bin").mkdir(parents=True)
    fake_python(fresh / ".venv" / "bin", "python", 'case "$*" in *install*) exit 1;; *) exit 0;; esac\n')
    (fresh / ".venv" / ".installed").write_text(f"{fresh}\n")
    os.utime(fresh / ".venv" / ".installed", (0, 0))  # older than the requirements
    assert make(fresh, "setup", f"PYTHON={sys.executable}").returncode != 0
    assert not (fresh / ".venv" / ".installed").exists()


def test_environment_of_a_copied_folder_is_made_again(fresh):
    (fresh / ".venv" / "bin").mkdir(parents=True)
    fake_python(fresh / ".venv" / "bin", "python", 'echo "$@" >> log; exit 0\n')
    stamp = fresh / ".venv" / ".installed"
    stamp.write_text(f"{fresh}\n")
    assert make(fresh, "setup", f"PYTHON={sys.executable}").returncode == 0
    assert not (fresh / "log").exists()
    stamp.write_text("/elsewhere\n")
    assert make(fresh, "setup", f"PYTHON={sys.executable}").returncode == 0
    assert "install" in (fresh / "log").read_text()
    assert stamp.read_text() == f"{fresh}\n"


def test_help_lists_every_target(fresh):
    shown = make(fresh).stdout
    targets = re.search(r"(?m)^\.PHONY: (help .*)$", (fresh / "Makefile").read_text())[1].split()
    for target in set(targets) - {"help"}:
        assert f"make {target} " in shown, target


def test_requirements_are_exact_and_fit_the_constraints():
    def pins(name: str) -> dict[str, str]:
        lines = (layout.ROOT / name).read_text().splitlines()
        lines = [line for line in lines if line and not line.startswith("#")]
        assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines), name
        return {re.sub(r"[-_.]+", "-", k).lower(): v for k, v in (line.split("==") for line in lines)}

    wanted, held = pins("requirements.txt"), pins("constraints.txt")
    assert wanted.items() <= held.items()


def test_nothing_that_colab_installs_pins_torch_or_numpy():
    project = tomllib.loads((layout.ROOT / "pyproject.toml").read_text())["project"]
    assert not re.search(r"torch|numpy", " ".join(project["optional-dependencies"]["colab"]))
    for line in project["dependencies"]:
        if line.startswith(("torch", "numpy")):
            assert "==" not in line and "<" not in line


def test_versions_agree():
    import harmlens

    project = tomllib.loads((layout.ROOT / "pyproject.toml").read_text())["project"]
    assert harmlens.__version__ == project["version"]


def test_type_checks_are_hooked_in():
    import harmlens.flow.outcomes

    assert "jaxtyping" in type(harmlens.flow.outcomes.__spec__.loader).__module__


@pytest.mark.slow
def test_wheel_carries_the_data_and_works_from_an_empty_environment(tmp_path):
    source = tmp_path / "source"
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("lib", "data"):
        shutil.copytree(layout.ROOT / name, source / name, ignore=ignore)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(layout.ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check"]
    offline = ["--no-deps", "--no-index", "--no-build-isolation"]
    subprocess.run([*pip, "wheel", *offline, "-w", str(tmp_path), str(source)], check=True)
    wheel = next(tmp_path.glob("*.whl"))

    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {"claims.yaml"}
    for folder in ("organisms", "results"):
        files = (p for p in (source / "data" / folder).rglob("*") if p.is_file())
        expected |= {p.relative_to(source / "data").as_posix() for p in files}
    assert {f"harmlens/data/{name}" for name in expected} <= names

    environment = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True)
    python = environment / "bin" / "python"
    where = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.strip()
    subprocess.run([*pip, "install", "--no-deps", "--no-index", "--target", where, str(wheel)], check=True)
    # torch and the rest come from here; a plain path entry does not bring the editable installation along.
    import torch

    Path(where, "others.pth").write_text(f"{Path(torch.__file__).parents[1]}\n")
    code = (
        "import harmlens, harmlens.models.loading, harmlens.keep.files\n"
        "print(harmlens.__file__)\n"
        "print(harmlens.keep.files.data_dir())\n"
        'harmlens.models.loading.load("organism/sft", seed=0)\n'
    )
    variables = {k: v for k, v in os.environ.items() if not k.startswith(("HARMLENS", "PYTHON"))}
    done = subprocess.run([python, "-c", code], cwd=tmp_path, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    package, data = map(Path, done.stdout.splitlines()[:2])
    assert Path(where) in package.parents and data == Path(where) / "harmlens" / "data"
