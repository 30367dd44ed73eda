"""The registration: what it holds fast, what it refuses, and that this clone still goes by it."""

import json
import shutil

import pytest

import register
from harmlens.evidence import claims
from harmlens.keep import files


@pytest.fixture
def data(tmp_path, monkeypatch):
    """A data folder with the real claims and recipes, and two fresh runs of which none is measured."""
    for name in ("claims.yaml", "organisms.yaml", "vale.yaml"):
        shutil.copy(files.data_dir() / name, tmp_path / name)
    (tmp_path / "runs.yaml").write_text("exploratory: [0]\nconfirmatory: [7, 8]\nstop: after 8\n")
    monkeypatch.setenv("HARMLENS_DATA", str(tmp_path))
    monkeypatch.setenv("HARMLENS_RESULTS", str(tmp_path / "mine"))
    return tmp_path


def refused(capsys, message, *options):
    with pytest.raises(SystemExit):
        register.main([*options])
    assert message in capsys.readouterr().err


def test_a_registration_is_made_once_and_never_after_a_measurement(data, capsys):
    assert claims.registration() == {}
    assert register.main([]) == 0 == register.main([])  # nothing is measured yet
    fixed, known = claims.registration(), claims.load_claims()
    assert fixed["C1"] == {known["C1"].registered_sha256}
    assert {"05_neurons", "base", "planted_harm"} <= fixed.keys()
    made = data / "results" / "05_neurons" / "organism--sft" / "run-7" / "C3a.json"
    made.parent.mkdir(parents=True)
    made.write_text("{}")
    refused(capsys, "1 results of confirmatory runs are there already; log a deviation")


def test_a_deviation_is_logged_with_its_reason(data, capsys):
    refused(capsys, "nothing is registered yet", "--deviation", "C1", "--why", "x")
    register.main([])
    refused(capsys, "C1 is as it was registered", "--deviation", "C1", "--why", "x")
    refused(capsys, "'X9' is none of C1, ", "--deviation", "X9", "--why", "x")
    refused(capsys, "--deviation and --why belong together", "--deviation", "C1")
    path = data / "claims.yaml"
    path.write_text(
        path.read_text().replace("minus the larger of the shares", "less the larger of the shares")
    )
    before = claims.registration()["C1"]
    assert register.main(["--deviation", "C1", "--why", "clearer words"]) == 0
    (logged,) = json.loads((data / "registration.json").read_text())["deviations"]
    assert (logged["what"], logged["why"]) == ("C1", "clearer words")
    assert claims.registration()["C1"] == before | {claims.load_claims()["C1"].registered_sha256}


def test_no_fresh_runs_nothing_to_register(data, capsys):
    (data / "runs.yaml").write_text("exploratory: [0]\n")
    refused(capsys, "names no confirmatory runs; enter them first, with a stop rule")


def test_what_stands_here_is_what_was_registered_or_is_logged():
    """Whoever changes a rule, a notebook's computation or a recipe now says why (tools/register.py)."""
    fixed = claims.registration()
    changed = [name for name, checksum in register.checksums().items() if checksum not in fixed.get(name, ())]
    assert not fixed or not changed
