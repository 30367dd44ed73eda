"""Free memory, sizes for people, files written whole."""

from __future__ import annotations

import pytest

from harmlens.keep import memory


def test_free_memory_is_that_of_the_machine():
    found = memory.free("cpu")
    assert 10_000_000 < found < 1e14


def test_without_a_list_of_the_kernel_memory_is_known_too(monkeypatch):
    psutil = pytest.importorskip("psutil")
    monkeypatch.setattr(memory.Path, "read_text", lambda self: "nothing to be found here\n")
    assert memory.free("cpu") == pytest.approx(psutil.virtual_memory().available, rel=0.3)


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (2_000_000, "2.0 MB"), (3_250_000_000, "3.2 GB")],
)
def test_sizes_for_people(size, text):
    assert memory.shown(size) == text


def test_an_interruption_leaves_the_old_file(tmp_path):
    file = tmp_path / "new" / "file"
    memory.write_whole(file, lambda part: part.write_text("first"))

    def fail(part):
        part.write_text("half of the sec")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        memory.write_whole(file, fail)
    assert file.read_text() == "first"
    memory.write_whole(file, lambda part: part.write_text("second"))
    assert [f.name for f in file.parent.iterdir()] == ["file"]
    assert file.read_text() == "second" and file.stat().st_mode & 0o777 == 0o644
