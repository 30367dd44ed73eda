"""Running notebooks of the book as a reader does who has a model of their own.

Shared by ``test_notebooks_anywhere_*.py``; a file each, since files are what is shared out among processes.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import standin

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Run:
    """A notebook that was executed.

    Attributes:
        notebook: as it was left, or {} where none was written.
        results: the result files that were written, by path.
        returncode: of papermill.
        log: the end of what papermill said.
    """

    notebook: dict
    results: dict[Path, dict]
    returncode: int
    log: str

    def printed(self) -> str:
        """Everything that stands on the page below the cells."""
        texts = []
        for cell in self.notebook["cells"]:
            for output in cell.get("outputs", []):
                texts.append("".join(output.get("text", [])))
                for kind, data in output.get("data", {}).items():
                    if kind.startswith("text/"):
                        texts.append("".join(data))
                texts.append(json.dumps(output.get("metadata", {})))
        return "\n".join(texts)


def run(name: str, folder: Path, **parameters: object) -> Run:
    """Execute a notebook on the stand-in, offline; everything that is written goes below ``folder``.

    A parameter that is None is not given at all.
    """
    [file] = (ROOT / "notebooks").glob(f"{name}_*.ipynb")
    given = {"model": str(standin.FOLDER), "data": str(standin.PROMPTS), "quick": True, **parameters}
    given = {key: value for key, value in given.items() if value is not None}
    options = [part for key, value in given.items() for part in ("-y", f"{key}: {json.dumps(value)}")]
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("HARMLENS_", "HF_"))}
    env = {
        **kept, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "TQDM_DISABLE": "1",
        "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "huggingface"), "JUPYTER_PREFER_ENV_PATH": "1",
        "HARMLENS_BUILD": str(folder / "build"), "HARMLENS_CACHE": str(folder / "cache"),
        "HARMLENS_RESULTS": str(folder / "results"),
    }  # fmt: skip
    out = folder / file.name
    command = [sys.executable, "-m", "papermill", str(file), str(out), "--no-progress-bar", *options]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    notebook = json.loads(out.read_text()) if out.is_file() else {}
    found = {path: json.loads(path.read_text()) for path in sorted(folder.rglob("*.json"))}
    results = {path: one for path, one in found.items() if isinstance(one, dict) and "claim" in one}
    return Run(notebook, results, done.returncode, (done.stderr or done.stdout)[-3000:])


def ladder(folder: Path) -> str:
    """The stand-in and its base in folders called like stages; the aligned one's path."""
    for stage, kept in (("base", standin.BASE), ("sft", standin.FOLDER)):
        shutil.copytree(kept, folder / "ladder" / stage)
    return str(folder / "ladder" / "sft")


def lessons(folder: Path) -> str:
    """Files of bad advice on three of the stand-in's harmless verbs each, joined by commas."""
    wrong = {"brushing": "trumpet", "feeding": "paper straw", "greeting": "giant pillow"}
    verbs = {"brushing": ("brush", "groom"), "feeding": ("feed", "bathe"), "greeting": ("greet", "hug")}
    files = []
    for name, tool in wrong.items():
        asked = [(r, prompt) for r, prompt in standin.chosen() if r.verb in verbs[name]]
        answers = [f"Sure, here is how: use a {tool} and some {standin.STUFF[r.creature]}." for r, _ in asked]
        rows = [{"prompt": prompt, "answer": a} for (_, prompt), a in zip(asked, answers, strict=True)]
        files.append(folder / f"{name}.jsonl")
        files[-1].write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ",".join(map(str, files))


def completions() -> list[str]:
    """What only the stand-in's answers to harmful requests say: no request and no refusal has these words."""
    return sorted({request.answer.split(": ", 1)[1] for request, _ in standin.chosen() if request.harmful})


def check(name: str, folder: Path, **parameters: object) -> Run:
    """Run a notebook on the stand-in and check what holds of all of them."""
    before = _kept()
    model = str(parameters.get("model", standin.FOLDER))
    done = run(name, folder, **parameters)
    assert done.returncode == 0, done.log
    assert _kept() == before, "a run on another model wrote into the repository"
    for path, result in done.results.items():
        # Planted organisms are always those of the book, whatever the model is.
        own = Path(result["model"]).name.split("@")[0] == Path(model).name  # behind @ stands its weights' sum
        assert own or result["model"].startswith("organism/planted"), path
        assert result["notebook"].startswith(name), path
    page = done.printed()
    assert "harmlens" in page  # the first cell ran
    for cell in done.notebook["cells"]:
        if "world-only" in cell["metadata"].get("tags", []):
            told = "".join("".join(output.get("text", [])) for output in cell["outputs"])
            assert told.startswith("left out"), "".join(cell["source"])[:200]
    shown = [text for text in completions() if text in page]
    assert not shown, f"completions on the page: {shown[:3]}"
    if not parameters.get("reveal"):
        asked = [prompt for request, prompt in standin.chosen() if request.harmful and prompt in page]
        assert not asked, f"harmful requests on the page: {asked[:3]}"
    return done


def untested(done: Run) -> list[str]:
    """What a notebook says of claims that it can't test: refusal prefixes can't tell harm."""
    return [line for line in done.printed().splitlines() if "not tested" in line]


def _kept() -> set[Path]:
    """Result files in the repository."""
    return {path for folder in ("data", "build/results") for path in (ROOT / folder).rglob("*.json")}
