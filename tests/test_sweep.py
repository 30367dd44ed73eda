"""Sweeps: what the YAML file may hold, which cells come out, when one is finished, and the forest plot."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import settings
import sweep
from harmlens.evidence import results
from harmlens.evidence.stats import Estimate
from harmlens.evidence.words import WORDS
from harmlens.keep import files
from harmlens.training import train
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
results.record("C3f", Estimate(0.1 + seeds[0], 0.0, 4.0, 5), ("random", Estimate(0.9, 0.8, 1.0, 5)),
               model=model, run=seeds[0], folder=output)
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
    ({"seeds": [7]}, r"seeds: organism/sft was not trained with seed 7. There are \[0, 1"),
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


def test_key_of_a_real_model_follows_its_precision(tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    path = described(tmp_path, models=["mine", "organism/sft"])
    before = [cell.key for cell in sweep.read(path).cells]
    monkeypatch.setenv("HARMLENS_DTYPE", "bfloat16")
    now = [cell.key for cell in sweep.read(path).cells]
    assert before[0] != now[0] and before[1:] == now[1:]


def finish(cell, value=0.5):
    """What a finished cell leaves, made by hand."""
    effect, control = Estimate(value, value - 0.2, value + 0.2, 7), ("random", Estimate(0.9, 0.9, 0.9, 7))
    results.record("C3f", effect, control, model=cell.model, run=cell.seed, folder=cell.folder / "results")
    made = [p.relative_to(cell.folder).as_posix() for p in (cell.folder / "results").rglob("*.json")]
    record = {"key": cell.key, "results": made, "organisms": [], "provenance": {"wall_s": 90.0}}
    files.write_json(cell.done, record)


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
    rows = content["claims"]["C3f"]
    assert {model: row["runs"] for model, row in rows.items()} == {
        "organism/dpo": {"1": -1.0}, "organism/sft": {"0": 0.5},
    }  # fmt: skip
    assert rows["organism/sft"]["ci"] == [0.3, 0.7] and rows["organism/sft"]["word"] in WORDS
    assert [(m["cell"], m["state"]) for m in content["missing"]] == [
        ("tiny/organism--sft/seed-1", "failed"), ("tiny/organism--dpo/seed-0", "not run"),
    ]  # fmt: skip
    assert content["missing"][0]["reason"].endswith("out of luck")
    assert len(content["left_out"]) == 1 and "broken.json" in content["left_out"][0]
    assert (tmp_path / "out" / "forest.png").read_bytes()[:4] == b"\x89PNG"


def test_forest_of_nothing_has_no_picture(tmp_path):
    path = described(tmp_path)
    assert sweep.main(["forest", str(path)]) == 0
    assert json.loads((tmp_path / "out" / "forest.json").read_text())["claims"] == {}
    assert not (tmp_path / "out" / "forest.png").exists()


# --------------------------------------------------------------------------- the evidence


def carded(folder, checksum, **about):
    """An organism's folder, as far as a sweep looks at it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "card.json").write_text(json.dumps({"sha256": checksum, **about}))


@pytest.fixture
def study(tmp_path, monkeypatch):
    """A data folder with one claim, measured by a tiny notebook; run 2 is registered, but not trained."""
    data = tmp_path / "data"
    for run in (0, 1):
        carded(data / "organisms" / f"dpo-{run}", "first")
    claims = yaml.safe_load((files.data_dir() / "claims.yaml").read_text())["claims"]
    own = notebook(tmp_path / "tiny.ipynb", PARAMETERS.replace("sft", "dpo"))
    claim = {**next(c for c in claims if c["id"] == "C3f"), "notebook": str(own)}
    (data / "claims.yaml").write_text(yaml.safe_dump({"claims": [claim]}))
    (data / "runs.yaml").write_text("exploratory: [0, 1, 2]\n")
    (tmp_path / "tries").mkdir()
    places = {"HARMLENS_DATA": data, "HARMLENS_BUILD": tmp_path / "build", "SWEEP_TRIES": tmp_path / "tries"}
    for name, folder in places.items():
        monkeypatch.setenv(name, str(folder))
    return tmp_path


def test_evidence_is_each_notebook_on_its_own_model_and_the_registered_runs(study):
    found = sweep.evidence("0-1")
    assert [(cell.id, cell.parameters) for cell in found.cells] == [
        (f"tiny/organism--dpo/seed-{run}", {"model": "organism/dpo", "seeds": [run]}) for run in (0, 1)
    ]
    assert [cell.key for cell in sweep.evidence("1, 0").cells] == [cell.key for cell in found.cells[::-1]]
    notebook(study / "tiny.ipynb", "stages = ['sft']\nseed = 0", "pass")  # of no single model; the new form
    [cell] = sweep.evidence("1").cells
    assert (cell.id, cell.parameters) == ("tiny/organism/seed-1", {"seed": 1})


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        ("0,7", r"run 7 is not registered.*Registered are 0, 1, 2; enter it in data/runs.yaml before"),
        ("0-", r"RUNS: '0-' is no run. Give numbers and ranges such as 0-2,5, or all"),
        ("2-1", r"RUNS: '2-1' is no run"),
    ],
)
def test_runs_that_cannot_be_measured_are_named_with_the_remedy(study, capsys, runs, message):
    assert sweep.main(["evidence", runs]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_evidence_replaces_the_files_of_runs_that_finished_and_no_others(study):
    kept = study / "data" / "results" / "tiny"
    stale = [kept / f"organism--sft/run-{run}/C3f.json" for run in (0, 1)]
    real = kept / "owner--model/run-0/C3f.json"
    for path in (*stale, real):
        path.parent.mkdir(parents=True)
        path.write_text("{}")
    found = sweep.evidence("0-1")
    finish(found.cells[0])
    sweep.Watch(found, 2).look()
    assert not stale[0].exists() and stale[1].exists() and real.exists()
    [one] = results.load_measurements([kept / "organism--dpo"])
    assert (one.run, one.role, one.effect.value) == (0, "exploratory", 0.5)


def test_a_run_that_lacks_what_is_measured_is_without_a_value_and_says_why(study, monkeypatch, capsys):
    """Its notebook stops with an error of the library; another kind of error is a failure."""
    monkeypatch.setattr(sweep, "_execute", stopped := Stopped())
    [cell] = sweep.evidence("0").cells
    stopped.ename, stopped.partial = "NotKnown", cell.folder / "partial.ipynb"
    assert sweep.run_cell(cell) and sweep.state(cell)[0] == "finished"
    [one] = results.load_measurements([cell.folder / "results"])
    assert (one.claim, one.run, one.effect) == (
        "C3f",
        0,
        None,
    ) and one.note == "not tested: none of 36 answers"
    stopped.ename = "ZeroDivisionError"
    assert not sweep.run_cell(cell) and sweep.state(cell)[0] != "finished"
    assert capsys.readouterr().out.count("FAILED") == 1


class Stopped(Exception):
    """In the place of papermill: an error of a code cell."""

    evalue, source = "none of 36 answers", "x = 1"

    def __call__(self, *args):
        self.partial.write_text("{}")
        raise self


def test_a_cell_is_measured_anew_where_its_organisms_were_trained_anew(study):
    """And one more organism of the run is no reason, nor another version of the library."""
    [cell] = sweep.evidence("0").cells
    finish(cell)
    record = json.loads(cell.done.read_text())
    files.write_json(cell.done, record | {"organisms": sweep._organisms(0)})
    assert sweep.state(cell)[0] == "finished"
    carded(study / "data" / "organisms" / "base-0", "another")
    sweep._library.cache_clear()
    (study / "data" / "settings.json").write_text("{}")
    assert sweep.state(sweep.evidence("0").cells[0])[0] == "finished"
    carded(study / "data" / "organisms" / "dpo-0", "second")
    assert sweep.state(cell)[0] == "not run"


def test_how_far_it_is_and_how_long_it_will_take(study, capsys):
    """By hand: a cell takes 90 s, an organism of a kind as long as those that there are; two cores."""
    carded(study / "data" / "organisms" / "base-0", "a", stage="base", seconds=7000)
    carded(study / "data" / "organisms" / "base-1", "b", stage="base", seconds=7200)
    carded(study / "data" / "organisms" / "dpo-1", "first", stage="dpo", seconds=200)
    found = sweep.evidence("0-2")
    watch = sweep.Watch(found, 2)
    watch.look()
    finish(found.cells[0])
    watch.look()
    watch.look()  # nothing new, nothing said
    assert capsys.readouterr().out.splitlines() == [
        "0 of 3 cells, 0 of 3 runs; no estimate of the time left yet",
        # run 1: its cell; run 2: its cell, base and dpo
        f"1 of 3 cells, 1 of 3 runs; about 1 h {(90 + 90 + 7100 + 200) // 2 // 60 - 60} min left",
    ]


def test_a_run_is_trained_once_and_gets_its_p_and_q(study, monkeypatch):
    done = []
    monkeypatch.setattr(train, "train_seed", lambda run: done.append(run))
    monkeypatch.setattr(settings, "settle", lambda names, suppressed: done.append((*names, suppressed)))
    found = sweep.evidence("2")
    assert sweep.main(["train", str(found.source), "seed-2"]) == 0
    assert done == [2, ("organism/sft-2", "harmful"), ("organism/mirror-2", "harmless")]
    told = found.output / "organisms" / "seed-2.json"
    (told.parent / "seed-2.trained").rename(told)  # as the engine does
    sweep.forget_untrained(found)
    assert told.is_file()
    carded(study / "data" / "organisms" / "dpo-2", "anew")
    sweep.forget_untrained(found)
    assert not told.exists()


@pytest.mark.slow
def test_make_evidence_goes_on_after_a_failure_and_then_has_nothing_to_do(study, monkeypatch, capfd):
    need_engine()
    no_training(study, monkeypatch)
    path = study / "data" / "claims.yaml"
    (claim,) = yaml.safe_load(path.read_text())["claims"]
    other = notebook(study / "other.ipynb", PARAMETERS.replace("sft", "base"), BODY.replace("C3f", "C3g"))
    path.write_text(yaml.safe_dump({"claims": [claim, claim | {"id": "C3g", "notebook": str(other)}]}))
    monkeypatch.setenv("SWEEP_FAIL", "dpo-0")
    assert sweep.main(["evidence", "0-2", "--cores", "2"]) == 1
    kept = study / "data" / "results" / "tiny" / "organism--dpo"
    assert sorted(path.name for path in kept.iterdir()) == ["run-1", "run-2"]
    monkeypatch.delenv("SWEEP_FAIL")
    assert sweep.main(["evidence", "0-2", "--cores", "2"]) == 0
    told = capfd.readouterr()
    assert re.search(r"steps \(\d+%\) done", told[1]) and "5 of 6 cells, 2 of 3 runs; about" in told[0]
    assert sweep.main(["evidence", "0-2", "--cores", "2"]) == 0
    one = dict.fromkeys([f"{kind}-{run}" for kind in ("base", "dpo") for run in (0, 1, 2)], 1)
    assert tries(study) == one | {"dpo-0": 2}  # of run 0, too, only what had failed
    found = {one.run: one.effect.value for one in results.load_measurements([kept])}
    assert found == {0: 0.1, 1: 1.1, 2: 2.1}
    assert sorted((study / "trained").read_text().split()) == ["0", "1", "2"]  # once


@pytest.mark.slow
def test_a_run_that_cannot_be_trained_stops_no_other(study, monkeypatch):
    need_engine()
    no_training(study, monkeypatch, fails=1)
    assert sweep.main(["evidence", "0-1", "--cores", "2"]) == 1
    assert tries(study) == {"dpo-0": 1}


def no_training(study, monkeypatch, fails=-1) -> None:
    """In the place of training: a line in a file, and for one run an error."""
    script = study / "sweep.py"
    script.write_text(f"""
import sys
sys.path[:0] = [{str(Path(sweep.__file__).parent)!r}]
import sweep as real
def train(found, run):
    open({str(study / "trained")!r}, "a").write(f"{{run}}\\n")
    if run == {fails}:
        raise RuntimeError("no such luck")
    real.files.write_json(found.output / "organisms" / f"seed-{{run}}.trained", real._stands_on(run))
real.train = train
raise SystemExit(real.main())
""")
    monkeypatch.setattr(sweep, "__file__", str(script))


# --------------------------------------------------------------------------- running


def need_engine() -> None:
    try:
        sweep.engine()
    except SweepError:
        pytest.skip("snakemake is not installed; make sweep installs it into .venv-sweep")


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
    assert record["results"] == ["results/organism--sft/run-0/C3f.json"]
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
    need_engine()
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


def test_results_of_a_real_model_take_the_place_of_its_own_alone(tmp_path):
    made, kept = tmp_path / "made" / "mine--dpo" / "run-0" / "A.json", tmp_path / "kept"
    old = [kept / model / "run-0" / "B.json" for model in ("organism--sft", "mine--dpo", "mine--sft")]
    for path in (made, *old):
        path.parent.mkdir(parents=True)
        path.write_text("{}")
    sweep.execute.store_results([made], tmp_path / "made", kept)
    assert [path.exists() for path in old] == [True, False, True]
    assert (kept / "mine--dpo" / "run-0" / "A.json").is_file()
