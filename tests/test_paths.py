"""The data folder is found in a clone and when installed; otherwise the message says what to do."""

from pathlib import Path

import pytest

from harmlens.keep import paths


@pytest.fixture
def no_variables(monkeypatch):
    monkeypatch.delenv("HARMLENS_DATA", raising=False)
    monkeypatch.delenv("HARMLENS_BUILD", raising=False)


def package_in(folder: Path, monkeypatch) -> Path:
    package = folder / "lib" / "harmlens"
    package.mkdir(parents=True)
    monkeypatch.setattr(paths, "_PACKAGE", package)
    return package


def data_in(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "claims.yaml").write_text("claims: []")
    return folder


def test_clone(tmp_path, monkeypatch, no_variables):
    package_in(tmp_path, monkeypatch)
    data = data_in(tmp_path / "data")
    assert paths.repo_root() == tmp_path
    assert paths.data_dir() == data
    assert paths.build_dir() == tmp_path / "build"


def test_installed_package_carries_its_data(tmp_path, monkeypatch, no_variables):
    data = data_in(package_in(tmp_path, monkeypatch) / "data")
    monkeypatch.chdir(tmp_path)
    assert paths.repo_root() is None
    assert paths.data_dir() == data
    assert paths.build_dir() == tmp_path / "harmlens-build"


def test_variables_win_over_the_clone(tmp_path, monkeypatch):
    package_in(tmp_path / "clone", monkeypatch)
    data_in(tmp_path / "clone" / "data")
    other = data_in(tmp_path / "other")
    monkeypatch.setenv("HARMLENS_DATA", str(other))
    monkeypatch.setenv("HARMLENS_BUILD", str(tmp_path / "made"))
    assert paths.data_dir() == other
    assert paths.build_dir() == tmp_path / "made"


def test_without_data_the_message_names_both_remedies(tmp_path, monkeypatch, no_variables):
    package_in(tmp_path, monkeypatch)
    with pytest.raises(FileNotFoundError, match=r"Reinstall.*HARMLENS_DATA"):
        paths.data_dir()


def test_variable_that_points_nowhere_is_not_passed_over(tmp_path, monkeypatch):
    package_in(tmp_path, monkeypatch)
    data_in(tmp_path / "data")
    monkeypatch.setenv("HARMLENS_DATA", str(tmp_path / "missing"))
    with pytest.raises(FileNotFoundError, match="HARMLENS_DATA is set to"):
        paths.data_dir()


def test_the_real_data_folder_is_found():
    assert (paths.data_dir() / "claims.yaml").is_file()
