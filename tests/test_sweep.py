"""Sweeps: what the YAML file may hold, which cells come out, when one is finished, and the forest plot."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
import yaml

import forest
import sweep
from harmlens.evidence import results
from harmlens.evidence.stats import Estimate
from harmlens.keep import files
from sweep import SweepError

PARAMETERS = 'model = "organism/sft"\nseeds = [0]\nquick = False\noutput = ""'
# Counts its own tries; then it fails, kills the process that runs it, or records a claim.
BODY = """
import os, pathlib, signal
from harmlens.evidence import results
tries = pathlib.Path(os.environ["SWEEP_TRIES"]) / f"{model.split('/')[1]}-{seeds[0]}"
first = not tries.exists()
tries.open("a").write("x")
if os.environ.get("SWEEP_KILL") == tries.name and first:
    os.kill(os.getppid(), signal.SIGKILL)
if os.environ.get("SWEEP_FAIL") == tries.name:
    raise RuntimeError("fails on purpose")
from harmlens.evidence.stats import Estimate
one = Estimate(0.1 + seeds[0], 0.0, 4.0, 5)
results.record("C3f", Estimate(one.value, 0.0, 4.0, 5, {seeds[0]: one}), unit="pair", model=model,
               notebook="tiny", folder=output, control=("random", Estimate(0.9, 0.8, 1.0, 5)))
"""


def notebook(path: Path, parameters: str = PARAMETERS, body: str = BODY) -> Path:
    def code(name: str, source: str, tags: list[str]) -> dict:
        return {"cell_type": "code", "id": name, "metadata": {"tags": tags}, "source": source,
                "outputs": [], "execution_count": None}  # fmt: skip

    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    cells = [code("a", parameters, ["parameters"]), code("b", body, [])]
    content = {"cells": cells, "metadata": kernel, "nbformat": 4, "nbformat_minor": 5}
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def described(folder: Path, **changes) -> Path:
    """A valid sweep of 2 models, 2 seeds and one notebook, with some keys changed (None: left out)."""
    notebook(folder / "tiny.ipynb")
    notebook(folder / "ladder.ipynb", parameters="seeds = [0]")
    content = {
        "models": ["organism/sft", "organism/dpo"], "seeds": [0, 1], "notebooks": ["tiny.ipynb"],
        "parameters": {"quick": True}, "output": "out", **changes,
    }  # fmt: skip
    path = folder / "my.yaml"
    path.write_text(yaml.safe_dump({k: v for k, v in content.items() if v is not None}), encoding="utf-8")
    return path


# --------------------------------------------------------------------------- the file


def test_cells_are_the_product_of_notebooks_models_and_seeds(tmp_path):
    found = sweep.read(described(tmp_path))
    assert [cell.id for cell in found.cells] == [
        "tiny/organism--sft/seed-0", "tiny/organism--sft/seed-1",
        "tiny/organism--dpo/seed-0", "tiny/organism--dpo/seed-1",
    ]  # fmt: skip
    cell = found.cells[3]
    assert cell.parameters == {"quick": True, "model": "organism/dpo", "seeds": [1]}
    assert cell.folder.parent == tmp_path / "out" / "cells" / "tiny" / "organism--dpo"
    assert cell.resources == sweep.Needs().model_dump()


def test_models_without_training_seeds_give_one_cell(tmp_path):
    (tmp_path / "mine").mkdir()
    found = sweep.read(described(tmp_path, models=["organism/sft", "Qwen/Qwen2.5-0.5B", "mine"]))
    assert [cell.seed for cell in found.cells] == [0, 1, None, None]
    assert found.cells[2].id == "tiny/Qwen--Qwen2.5-0.5B/single"
    assert "seeds" not in found.cells[2].parameters
    assert found.cells[3].model == str(tmp_path / "mine") and found.cells[3].label == "mine"


def test_stages_of_a_ladder_are_named_as_in_the_figure(tmp_path):
    ladder = {"base": "owner/model-base", "sft": "owner/model-sft"}
    found = sweep.read(described(tmp_path, models=[{"name": "Ladder", "stages": ladder}], seeds=[0]))
    assert [(cell.model, cell.label) for cell in found.cells] == [
        ("owner/model-base", "Ladder, base"), ("owner/model-sft", "Ladder, sft"),
    ]  # fmt: skip


def test_exclude_takes_out_what_matches_all_of_a_rule(tmp_path):
    rules = [{"model": "organism/dpo", "seed": 1}, {"seed": 0, "notebook": "tiny", "model": "organism/sft"}]
    found = sweep.read(described(tmp_path, exclude=rules))
    assert [cell.id for cell in found.cells] == ["tiny/organism--sft/seed-1", "tiny/organism--dpo/seed-0"]


def test_resources_default_then_file_then_the_larger_of_notebook_and_model(tmp_path):
    large = {"name": "owner/large", "resources": {"mem_mb": 90_000, "gpu": 1}}
    tiny = {"name": "tiny.ipynb", "resources": {"mem_mb": 20_000, "runtime": 5}}
    common = {"runtime": 90, "threads": 2}
    found = sweep.read(described(tmp_path, models=["owner/small", large], notebooks=[tiny], resources=common))
    assert found.cells[0].resources == {"gpu": 0, "mem_mb": 20_000, "runtime": 5, "threads": 2}
    assert found.cells[1].resources == {"gpu": 1, "mem_mb": 90_000, "runtime": 5, "threads": 2}


def test_notebooks_of_the_book_by_name_and_by_number(tmp_path):
    found = sweep.read(described(tmp_path, notebooks=["01", "05_neurons"], seeds=[0]))
    assert {cell.notebook.stem for cell in found.cells} == {"01_what_there_is_to_explain", "05_neurons"}


def test_the_shipped_example_is_valid():
    example = Path(__file__).parents[1] / "sweep" / "sweep.yaml"
    assert len(sweep.read(example).cells) == 8


INVALID = [
    ({"models": []}, r"models: List should have at least 1 item.*got \[\]"),
    ({"notebooks": None}, r"notebooks: Field required"),
    ({"seeds": [0, -1]}, r"seeds: 1: Input should be greater than or equal to 0, got -1"),
    ({"seeds": [0, 0]}, r"seeds: 0 occurs twice; keep one"),
    ({"seeds": [7]}, r"seeds: organism/sft was not trained with seed 7. There are \[0, 1, 2"),
    ({"models": ["a/b", {"name": "L", "stages": {"x": "a/b"}}]}, r"models: a/b occurs twice"),
    ({"models": ["organism/stf"]}, r"models: organism/stf: unknown stage 'stf'. Choose one of .*sft"),
    ({"models": ["no such folder"]}, r"models: 'no such folder' is no organism/<stage>, no folder"),
    ({"models": [{"name": "a/b", "gpu": 1}]}, r"models: 0: gpu: Extra inputs are not permitted, got 1"),
    ({"notebooks": ["99_none"]}, r"notebooks: no notebook '99_none'. Choose from 00_model_organism, 01_"),
    ({"notebooks": ["gone.ipynb"]}, r"notebooks: no notebook 'gone.ipynb'"),
    ({"notebooks": ["tiny.ipynb"] * 2}, r"notebooks: tiny.ipynb occurs twice"),
    ({"notebooks": ["ladder.ipynb"], "parameters": None}, r"takes no parameter 'model'.*Remove it"),
    ({"parameters": {"quik": True}}, r"parameters: no notebook has a parameter quik. Valid names"),
    ({"parameters": {"seeds": [0]}}, r"parameters: seeds is set by the sweep"),
    ({"notebooks": [{"name": "tiny.ipynb", "parameters": {"n": 3}}]}, r"no notebook has a parameter n\."),
    ({"exclude": [{"model": "organism/mid"}]}, r"exclude: .*matches no cell"),
    ({"exclude": [{"notebook": "tiny"}]}, r"exclude: leaves no cell"),
    ({"resources": {"mem_mb": 0}}, r"resources: mem_mb: .*greater than or equal to 1, got 0"),
    ({"seed": [0]}, r"seed: Extra inputs are not permitted, got \[0\]. sweep/sweep.yaml shows"),
]


@pytest.mark.parametrize(("changes", "message"), INVALID, ids=[message[:40] for _, message in INVALID])
def test_an_invalid_file_names_key_and_remedy(tmp_path, changes, message):
    path = described(tmp_path, **changes)
    with pytest.raises(SweepError, match=r"^my.yaml: .*" + message):
        sweep.read(path)


def test_no_file_no_yaml_no_mapping(tmp_path, capsys):
    for text, message in (
        (None, "no such file: bad.yaml. Copy sweep/sweep.yaml"), ("a: [", "bad.yaml: while parsing"),
        ("- a", "file: Input should be a valid dictionary"),
    ):  # fmt: skip
        if text:
            (tmp_path / "bad.yaml").write_text(text)
        assert sweep.main(["check", str(tmp_path / "bad.yaml")]) == 2
        assert message in capsys.readouterr().err


# --------------------------------------------------------------------------- keys and states


def test_key_changes_with_code_and_parameters_and_with_nothing_else(tmp_path):
    def keys(**changes):
        return [cell.key for cell in sweep.read(described(tmp_path, **changes)).cells]

    before = keys()
    assert len(set(before)) == 4
    assert keys(resources={"mem_mb": 9}, output="elsewhere") == before
    assert keys(seeds=[1])[0] == before[1]
    assert not set(keys(parameters={"quick": False})) & set(before)
    path = described(tmp_path)
    notebook(tmp_path / "tiny.ipynb", body=BODY + "\n1 + 1")
    assert not {cell.key for cell in sweep.read(path).cells} & set(before)


def test_key_of_a_local_model_follows_its_files(tmp_path):
    (tmp_path / "mine").mkdir()
    path = described(tmp_path, models=["mine"])
    before = sweep.read(path).cells[0].key
    (tmp_path / "mine" / "config.json").write_text("{}")
    assert sweep.read(path).cells[0].key != before


def finish(cell, value=0.5, control=0.9, written=True):
    """What a finished cell leaves, made by hand."""
    if written:
        one, beside = Estimate(value, value - 0.2, value + 0.2, 7), Estimate(control, control, control, 7)
        results.record(
            "C3f", dataclasses.replace(one, per_seed={cell.seed: one}), control=("random", beside),
            unit="pair", model=cell.model, notebook="tiny", folder=cell.folder / "results",
        )  # fmt: skip
    made = [p.relative_to(cell.folder).as_posix() for p in (cell.folder / "results").rglob("*.json")]
    files.write_json(cell.done, {"key": cell.key, "results": made})


def test_states_of_a_cell(tmp_path):
    cells = sweep.read(described(tmp_path)).cells
    assert sweep.state(cells[0]) == ("not run", "not started yet")
    cells[0].folder.mkdir(parents=True)
    (cells[0].folder / "log.txt").write_text("started\n")
    assert sweep.state(cells[0])[0] == "failed"
    assert "killed, out of memory" in sweep.state(cells[0])[1]
    (cells[0].folder / "log.txt").write_text("started\nFAILED tiny: in code cell 2\nlast words of a kernel\n")
    assert sweep.state(cells[0]) == ("failed", "FAILED tiny: in code cell 2")
    finish(cells[0])
    assert sweep.state(cells[0]) == ("finished", "")
    [written] = (cells[0].folder / "results").rglob("*.json")
    written.unlink()  # a result file that is gone has to be made again
    assert sweep.state(cells[0])[0] == "failed"
    cells[1].folder.mkdir(parents=True)
    cells[1].done.write_text('{"key": "of other code", "results": []}')
    assert sweep.state(cells[1])[0] == "not run"


def test_a_cell_that_was_planned_with_other_code_is_refused(tmp_path):
    found = sweep.read(described(tmp_path))
    name = found.cells[0].folder.relative_to(found.output / "cells").as_posix()
    assert sweep.find(found, name) is found.cells[0]
    with pytest.raises(SweepError, match=r"planned with other code.*same version of the repository"):
        sweep.find(found, "tiny/organism--sft/seed-0-0123456789ab")
    with pytest.raises(SweepError, match=r"no cell tiny/x/seed-0-0. .*cells lists them"):
        sweep.find(found, "tiny/x/seed-0-0")


# --------------------------------------------------------------------------- forest


def test_forest_holds_what_is_finished_and_lists_what_is_missing(tmp_path):
    found = sweep.read(described(tmp_path))
    finish(found.cells[0], value=0.5)
    finish(found.cells[3], value=-1.0)
    found.cells[1].folder.mkdir(parents=True)
    (found.cells[1].folder / "log.txt").write_text("FAILED tiny/organism--sft/seed-1: out of luck\n")
    (found.cells[3].folder / "results" / "broken.json").write_text("{}")
    sweep.write_forest(found)
    content = json.loads((tmp_path / "out" / "forest.json").read_text())
    assert (content["cells"], content["finished"]) == (4, 2)
    rows = content["claims"]["C3f"]["rows"]
    assert [(r["model"], r["seed"], r["value"]) for r in rows] == [
        ("organism/sft", 0, 0.5), ("organism/dpo", 1, -1.0),
    ]  # fmt: skip
    assert rows[0]["control"] == {"name": "random", "value": 0.9, "ci": [0.9, 0.9]} and rows[0]["ci"] == [
        0.3,
        0.7,
    ]
    assert [(m["cell"], m["state"]) for m in content["missing"]] == [
        ("tiny/organism--sft/seed-1", "failed"), ("tiny/organism--dpo/seed-0", "not run"),
    ]  # fmt: skip
    assert content["missing"][0]["reason"].endswith("out of luck")
    assert len(content["unreadable"]) == 1 and "broken.json" in content["unreadable"][0]
    assert (tmp_path / "out" / "forest.png").read_bytes()[:4] == b"\x89PNG"


def test_forest_of_nothing_has_no_picture(tmp_path):
    path = described(tmp_path)
    assert sweep.main(["forest", str(path)]) == 0
    assert json.loads((tmp_path / "out" / "forest.json").read_text())["claims"] == {}
    assert not (tmp_path / "out" / "forest.png").exists()


def test_forest_draws_points_controls_thresholds_and_gaps():
    def row(model, seed, value, control=None):
        return {
            "model": model,
            "seed": seed,
            "value": value,
            "ci": [value - 0.1, value + 0.1],
            "control": control,
        }

    beside = {"value": 0.2, "ci": None}
    rows = [row("m", 0, 1.0, beside), row("m", 1, 0.3), row("n", 0, 1.0)]
    claims = {
        "A": {"rows": rows, "threshold": 0.7, "scale": "logits"},
        "B": {"rows": rows[2:], "threshold": None, "scale": ""},
    }
    missing = [{"cell": f"cell {i}", "state": "failed"} for i in range(20)]
    figure = forest.draw({"claims": claims, "models": ["m", "n"], "missing": missing})
    first, second = figure.axes
    points = [line for line in first.lines if line.get_marker() == "o"]
    assert [p.get_xdata()[0] for p in points] == [1.0, 0.2, 0.3, 1.0]
    assert [p.get_markerfacecolor() == "white" for p in points] == [False, True, False, False]
    ys = [float(p.get_ydata()[0]) for p in points]
    assert all(-0.5 < y < 0.5 for y in ys[:3]) and 0.5 < ys[3] < 1.5 and len(set(ys)) == 4
    assert any(line.get_linestyle() == "--" and line.get_xdata()[0] == 0.7 for line in first.lines)
    assert [t.get_text() for t in second.texts] == ["not measured"]
    below = figure.get_supxlabel()
    assert "cell 11" in below and "cell 12" not in below and "and 8 more" in below
    plt.close(figure)


# --------------------------------------------------------------------------- running


def tries(folder: Path) -> dict[str, int]:
    return {p.name: len(p.read_text()) for p in sorted((folder / "tries").iterdir())}


@pytest.fixture
def counted(tmp_path, monkeypatch):
    (tmp_path / "tries").mkdir()
    monkeypatch.setenv("SWEEP_TRIES", str(tmp_path / "tries"))
    monkeypatch.setenv("SWEEP_KILL", "dpo-1")
    monkeypatch.setenv("SWEEP_FAIL", "sft-1")
    return tmp_path


@pytest.mark.slow
def test_four_workers_one_killed_one_failing(counted):
    found = sweep.read(described(counted))
    names = [cell.folder.relative_to(found.output / "cells").as_posix() for cell in found.cells]

    def workers(which):
        command = [sys.executable, sweep.__file__, "cell", str(found.source)]
        started = []
        for name in which:
            log = found.output / "cells" / name / "log.txt"
            log.parent.mkdir(parents=True, exist_ok=True)
            with log.open("w") as file:
                started.append(subprocess.Popen([*command, name], stdout=file, stderr=file))
        return [process.wait() for process in started]

    codes = workers(names)
    assert codes == [0, 1, 0, -9], [(cell.folder / "log.txt").read_text()[-500:] for cell in found.cells]
    states = [sweep.state(cell) for cell in found.cells]
    assert [name for name, _ in states] == ["finished", "failed", "finished", "failed"]
    assert states[1][1] == (
        "FAILED tiny/organism--sft/seed-1: in the code cell that begins with 'import os, pathlib, signal': "
        "RuntimeError: fails on purpose"
    )
    assert "without a message" in states[3][1]
    record = json.loads(found.cells[0].done.read_text())
    assert record["results"] == ["results/organism--sft/C3f.json"]
    assert record["provenance"]["params"]["quick"] is True and str(counted) not in json.dumps(record)
    assert workers([names[3]]) == [0]  # the killed one starts from nothing and finishes
    assert sweep.state(found.cells[3])[0] == "finished"


def test_a_kernel_that_does_not_come_up_is_started_again(tmp_path, monkeypatch, capsys):
    import papermill

    [cell, *_] = sweep.read(described(tmp_path)).cells
    answers = [RuntimeError("Kernel died before replying to kernel_info"), None]
    tried = []

    def execute(*args, **options):
        tried.append(options["parameters"])
        answer = answers[min(len(tried), len(answers)) - 1]
        if answer:
            raise answer

    monkeypatch.setattr(papermill, "execute_notebook", execute)
    sweep._execute(cell, tmp_path / "out.ipynb", {"quick": True})
    assert len(tried) == 2 and "started again" in capsys.readouterr().out
    for answer, times in (("Kernel died before replying to kernel_info", sweep.STARTS), ("else", 1)):
        answers, tried = [RuntimeError(answer)], []
        with pytest.raises(RuntimeError, match=answer):
            sweep._execute(cell, tmp_path / "out.ipynb", {})
        assert len(tried) == times


@pytest.mark.slow
def test_snakemake_runs_what_is_missing_and_only_that(counted, monkeypatch, capfd):
    try:
        sweep.engine()
    except SweepError:
        pytest.skip("snakemake is not installed; make sweep installs it into .venv-sweep")
    path = described(counted)
    assert sweep.main(["run", str(path), "--cores", "4"]) == 1
    assert tries(counted) == {"dpo-0": 1, "dpo-1": 1, "sft-0": 1, "sft-1": 1}
    content = json.loads((counted / "out" / "forest.json").read_text())
    assert [m["cell"] for m in content["missing"]] == [
        "tiny/organism--sft/seed-1",
        "tiny/organism--dpo/seed-1",
    ]
    monkeypatch.delenv("SWEEP_FAIL")
    capfd.readouterr()
    assert sweep.main(["run", str(path), "--cores", "4"]) == 0
    assert tries(counted) == {"dpo-0": 1, "dpo-1": 2, "sft-0": 1, "sft-1": 2}
    assert "4 cells: 2 were finished before, 4 are now" in capfd.readouterr().out
    assert sweep.main(["run", str(path), "--cores", "4"]) == 0  # nothing to do
    assert sum(tries(counted).values()) == 6


def test_no_engine_and_no_profile_are_said_with_the_remedy(tmp_path, monkeypatch):
    found = sweep.read(described(tmp_path))
    with pytest.raises(SweepError, match=r"--profile: no cloud. Choose one of kubernetes, local, slurm"):
        sweep.run(found, "cloud", [])
    monkeypatch.delenv("HARMLENS_SNAKEMAKE", raising=False)
    monkeypatch.setattr(sweep.shutil, "which", lambda name: None)
    monkeypatch.setattr(sweep, "ROOT", tmp_path)
    with pytest.raises(SweepError, match=r"snakemake was not found.*make sweep installs it"):
        sweep.engine()


def test_command_line_lists_cells(tmp_path, capsys):
    path = str(described(tmp_path))
    assert sweep.main(["check", path]) == 0
    assert "valid, 4 cells (4 not run)" in capsys.readouterr().out
    assert sweep.main(["cells", path, "--json"]) == 0
    listing = json.loads(capsys.readouterr().out)
    assert listing["output"] == str(tmp_path / "out") and len(listing["cells"]) == 4
    with pytest.raises(SystemExit):
        sweep.main(["check", path, "--cores", "4"])
    assert "unrecognized arguments" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["local", "slurm", "kubernetes"])
def test_profiles_go_on_after_a_failure_and_leave_the_decision_to_the_key(name):
    folder = Path(__file__).parents[1] / "sweep" / "profiles" / name
    profile = yaml.safe_load((folder / "config.yaml").read_text())
    assert profile["keep-going"] and profile["rerun-incomplete"] and profile["rerun-triggers"] == "mtime"
