"""The first cell after the parameters: wrong names and values stop the notebook there."""

import warnings
from types import SimpleNamespace

import matplotlib
import pytest
import tiny
import torch
from IPython.core.interactiveshell import InteractiveShell

from harmlens import notebook
from harmlens.evidence import results
from harmlens.evidence.stats import Estimate
from harmlens.flow import outcomes
from harmlens.keep import files

START = "from harmlens import notebook\nnotebook.start({})\n"


def run(parameters: str, *passed: str, injected: str = "", namespace: dict | None = None) -> dict:
    """Run a notebook's first cells: parameters, what papermill injects, and the call of start.

    ``In`` has the sources that were run, as IPython keeps them.
    """
    space = {"__name__": "__main__", "In": [""], "Out": {}} if namespace is None else namespace
    cells = [parameters, START.format(", ".join(f"{name}={name}" for name in passed))]
    if injected:
        cells.insert(1, f"# Parameters\n{injected}\n")  # papermill's own heading
    for cell in cells:
        space["In"].append(cell)
        exec(compile(cell, "cell", "exec"), space)
    return space


@pytest.fixture(autouse=True)
def settled(monkeypatch):
    """start sets threads and the look of figures for the whole process; keep that from other tests."""
    threads = torch.get_num_threads()
    monkeypatch.setenv("TQDM_DISABLE", "1")
    with matplotlib.rc_context(), warnings.catch_warnings():
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny.data_folder(tmp_path_factory.mktemp("data"), ("sft", 0), ("sft", 1))


@pytest.fixture(autouse=True)
def organisms(data, monkeypatch, settled):
    monkeypatch.setenv("HARMLENS_DATA", str(data))
    monkeypatch.setenv("HARMLENS_BUILD", str(data / "build"))  # nothing was trained there


GOOD = "model = 'organism/sft'\nseed = 1\nquick = True\nn = 8\noutput = ''\n"
NAMES = ("model", "seed", "quick", "n", "output")


def test_valid_parameters_pass(capsys):
    run(GOOD, *NAMES)
    assert "harmlens" in capsys.readouterr().out


def test_a_process_takes_one_thread_unless_told_otherwise(monkeypatch):
    for told, expected in ((None, 1), ("2", 2)):
        monkeypatch.setenv("OMP_NUM_THREADS", "2") if told else monkeypatch.delenv("OMP_NUM_THREADS")
        torch.set_num_threads(2)
        run(GOOD, *NAMES)
        assert torch.get_num_threads() == expected


def test_valid_injected_parameters_pass():
    run(GOOD, *NAMES, injected="n = 200\nquick = False\nseed = 1")


@pytest.mark.parametrize(
    "injected",
    ["quik = True", "N = 3", "model_name = 'organism/sft'", "seeds = [0]", "x = None", "stages = ['sft']",
     "options = {}", "rate = 0.5"],
)  # fmt: skip
def test_an_unknown_name_stops_with_the_valid_ones(injected):
    name = injected.split()[0]
    with pytest.raises(ValueError, match=rf"unknown parameter {name}.*takes: ") as caught:
        run(GOOD, *NAMES, injected=injected)
    assert all(known in str(caught.value) for known in NAMES)


def test_several_unknown_names_are_all_listed():
    with pytest.raises(ValueError, match="unknown parameter quik, sizes"):
        run(GOOD, *NAMES, injected="quik = True\nsizes = [1]")


@pytest.mark.parametrize(
    ("injected", "said"),
    [
        ("quick = 1", "quick=1 is not valid: it must be True or False"),
        ("quick = 'yes'", "quick='yes' is not valid"),
        ("n = 0", "n=0 is not valid: it must be a positive integer"),
        ("n = -5", "n=-5 is not valid"),
        ("n = True", "n=True is not valid"),
        ("n = 2.5", r"n=2\.5 is not valid"),
        ("n = '20'", "n='20' is not valid"),
        ("seed = []", r"seed=\[\] is not valid: it must be an integer from 0"),
        ("seed = '1'", "seed='1' is not valid"),
        ("seed = -1", "seed=-1 is not valid"),
        ("model = ''", "model='' is not valid"),
        ("model = None", "model=None is not valid"),
        ("output = None", "output=None is not valid"),
        ("output = 3", "output=3 is not valid"),
    ],
)
def test_a_wrong_value_stops_with_what_is_valid(injected, said):
    with pytest.raises(ValueError, match=said) as caught:
        run(GOOD, *NAMES, injected=injected)
    assert "quick (True or False)" in str(caught.value)


@pytest.mark.parametrize(
    ("parameter", "good", "bad"),
    [
        (
            "stages",
            ["['base', 'sft']", "['dpo']"],
            ["['rlhf']", "[]", "'sft'", "['sft', 'sft']", "[['sft']]", "[0]"],
        ),
        ("seed", ["0", "2"], ["-1", "'0'", "False", "1.0", "None"]),
        ("domain", ["'remedies'"], ["'potions'", "''", "3", "None"]),
        ("steps", ["10"], ["0", "'10'"]),
        ("batch_size", ["1"], ["0", "None"]),
    ],
)
def test_every_kind_of_parameter(parameter, good, bad):
    for value in good:
        run(f"{parameter} = {value}", parameter)
    for value in bad:
        with pytest.raises(ValueError, match=f"{parameter}=.* is not valid"):
            run(f"{parameter} = {value}", parameter)


@pytest.mark.parametrize(
    "injected",
    ["model = 'organism/rlhf'", "model = 'organism/base'", "seed = 2", "model = 'organism'"],
)
def test_an_organism_that_is_not_there_stops_at_once(injected):
    with pytest.raises(ValueError, match=r"available: sft-0, sft-1$"):
        run(GOOD, *NAMES, injected=injected)


def test_a_name_that_is_no_model_stops_at_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="'organsim/sft-0/x' is no folder here and no Hugging Face id"):
        run(GOOD, *NAMES, injected="model = 'organsim/sft-0/x'")


def test_a_folder_may_be_named(data):
    run(GOOD, *NAMES, injected=f"model = {str(data / 'organisms' / 'sft-0')!r}\nseed = 0")


def test_variables_of_the_readers_own_are_named_as_ignored(capsys):
    """Whether set before or below the parameters; only what is injected stops a notebook."""
    before = "import os\ndef helper(): pass\n_private = 3\ndrive_folder = 'x'\nk = None\n"
    space = {"__name__": "__main__", "In": [""], "Out": {}}
    run(before + GOOD + "rate = 0.5", *NAMES, namespace=space)
    assert capsys.readouterr().out.splitlines()[-1].endswith("ignored: drive_folder, k, rate")
    run(GOOD, *NAMES, namespace=space)
    assert "ignored" not in capsys.readouterr().out  # by now the notebook made variables itself


def test_where_no_history_is_kept_nothing_counts_as_injected(capsys):
    space = {"__name__": "__main__", "folder": "x"}
    exec(GOOD + START.format(", ".join(f"{name}={name}" for name in NAMES)), space)
    assert "ignored: folder" in capsys.readouterr().out


def test_a_misspelt_name_that_was_taken_out_again_is_forgotten():
    space = {"__name__": "__main__", "In": [""], "Out": {}}
    with pytest.raises(ValueError, match="unknown parameter quik"):
        run(GOOD, *NAMES, injected="quik = True", namespace=space)
    with pytest.raises(ValueError, match="unknown parameter quik"):  # the same cell once more
        run(GOOD, *NAMES, injected="quik = True", namespace=space)
    run(GOOD, *NAMES, injected="quick = True", namespace=space)
    with pytest.raises(ValueError, match="unknown parameter siz"):
        run(GOOD, *NAMES, injected="quick = True\nsiz = 3", namespace=space)
    run(GOOD, *NAMES, namespace=space)


def test_a_misspelt_name_beside_all_the_good_ones():
    with pytest.raises(ValueError, match=r"unknown parameter seedz\."):
        run(GOOD, *NAMES, injected=GOOD + "seedz = 1")


def test_the_cell_may_be_run_again_after_the_notebook_was():
    """Changing a parameter and running all cells once more is what notebooks are for."""
    space = run(GOOD, *NAMES)
    exec("effects = [0.1, 0.2]\nn_layers = 8\ntable = {}", space)
    run(GOOD, *NAMES, injected="quick = False", namespace=space)
    with pytest.raises(ValueError, match="n=0 is not valid"):
        run(GOOD, *NAMES, injected="n = 0", namespace=space)


def test_a_parameter_without_a_rule_is_the_authors_mistake():
    with pytest.raises(TypeError, match="no rule for a parameter called 'colour'"):
        run("colour = 'red'", "colour")


def test_cells_about_the_world_alone_are_left_out_where_something_else_is_asked(capsys):
    shell = InteractiveShell()
    for _ in range(2):  # a notebook that is run again has one transformer
        notebook._leave_out_cells(shell)
    cell = f"{notebook.WORLD_ONLY}\nfound = 1"
    for knows, runs in ((None, True), (True, True), (False, False)):
        shell.user_ns.pop("found", None)
        shell.user_ns["source"] = SimpleNamespace(knows_world=knows) if knows is not None else None
        assert shell.run_cell(cell).success and ("found" in shell.user_ns) == runs
        assert capsys.readouterr().out.count("left out: this cell asks about the fictional world alone") == (
            not runs
        )
    shell.run_cell(f"\nfound = 2  {notebook.WORLD_ONLY}")
    assert shell.user_ns["found"] == 2


def test_a_run_loads_what_is_asked_for_and_keeps_and_records_under_its_model(
    data, tmp_path, monkeypatch, capsys
):
    space = {"__name__": "__main__", "given": {"seed": 1, "quick": True, "output": str(tmp_path)}}
    exec("from harmlens import notebook\nrun = notebook.start(model='organism/sft', **given)", space)
    made = space["run"]
    sets = outcomes.TokenSets((1,), (2,))  # a model that is not trained has none of its own
    monkeypatch.setattr(outcomes, "fit_to_pairs", lambda lm, pairs: sets)
    assert (made.model, made.seed, made.quick, made.n, made.folder) == (
        "organism/sft",
        1,
        True,
        12,
        str(tmp_path),
    )
    assert "lm" not in vars(made) and made.lm is made.lm and made.lm.name.startswith("organism/sft")
    assert made.source.knows_world and set(made.exam()) >= {"refusal", "served"}
    assert len(made.requests(True)) == 12 == len(made.pairs("prompt")) and made.y1().name == "Y1"
    calls = []
    for _ in range(2):
        assert made.remember("answer", lambda: [calls.append(1), 42][1]) == 42
    assert len(calls) == 1 and list((tmp_path / "runs" / "answer").glob("*.json"))
    monkeypatch.setenv("HARMLENS_DATA", str(files.repo_root() / "data"))
    made.record("V4", Estimate(0.5, 0.4, 0.6, 12), ("chance", Estimate(0.0, 0.0, 0.1, 12)))
    made.record("V5", None)
    made.record("V5", Estimate(0.5, 0.4, 0.6, 12), unless="only of organisms")
    assert "V5 there is no value\nV5 only of organisms" in capsys.readouterr().out
    found, without = results.load_measurements([tmp_path])
    assert (found.claim, found.model, found.run, found.unit) == ("V4", "organism/sft", 1, "request")
    assert found.provenance["params"]["quick"] is True
    assert (without.claim, without.effect, without.note) == ("V5", None, "only of organisms")
    figure = made.all_runs("V4")  # this run and the shipped ones
    assert len(figure.axes) >= 1 and "answer/" not in capsys.readouterr().out
    matplotlib.pyplot.close(figure)


def test_the_answer_of_the_recorded_runs_is_shown_under_the_title(data, monkeypatch):
    shown = []
    monkeypatch.setattr("IPython.display.display", lambda text: shown.append(text.data))
    monkeypatch.setattr(results, "answer", lambda name, folders: f"{name}: supported")
    exec("from harmlens import notebook\nnotebook.start('05_neurons', model='organism/sft', seed=0)", {})
    exec("from harmlens import notebook\nnotebook.start(model='organism/sft', seed=0)", {})
    assert shown == ["05_neurons: supported"]
