"""A file of results: what was written is kept, whatever happens to the file, its names and the files beside it."""

import json
import resource
from pathlib import Path
from typing import Any

import pytest

from janus_dola.programs.results import Results, read_results

SETTINGS = {"alpha": 0.1}


def answered(name: Any, text: str = "a ring") -> dict[str, Any]:
    return {"id": name, "text": text, "tokens": 3, "layers": [20, 22, 20]}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    with Results(tmp_path / "out.jsonl", SETTINGS) as results:
        results.write([answered(1), {"id": 2, "error": "no file"}])
    return tmp_path / "out.jsonl"


def test_a_line_takes_the_place_of_another_of_its_id(path: Path) -> None:
    before = path.read_bytes()
    with Results(path, SETTINGS) as results:
        assert results.write([answered(1), {"id": 2, "error": "no file"}]) == 0
    assert path.read_bytes() == before  # nothing new, nothing written
    with Results(path, SETTINGS) as results:
        assert results.write([answered(2), answered(3)]) == 2
        # A run that is killed here leaves both lines; whoever reads them takes the later one.
        assert path.read_bytes().startswith(before)
        assert read_results(path)[1] == results.lines == {n: answered(n) for n in (1, 2, 3)}
    assert [json.loads(line) for line in path.read_text().splitlines()] == [answered(1), answered(2), answered(3)]


def test_another_name_of_the_file_or_a_deleted_lock_lets_no_second_run_in(path: Path) -> None:
    """Each wrote every line once more."""
    link = path.with_name("link.jsonl")
    link.symlink_to(path)
    with Results(link, SETTINGS) as results:
        for other in path.parent.glob("*"):
            if other not in (path, link) and "settings" not in other.name:
                other.unlink()
        for name in (path, link):
            with pytest.raises(ValueError, match="is being written by another run"):
                Results(name, SETTINGS)
        results.write([answered(3)])
    assert list(read_results(path)[1]) == list(read_results(link)[1]) == [1, 2, 3]
    assert link.is_symlink()


@pytest.mark.parametrize("replaced", [True, False])
def test_a_file_that_is_gone_is_noticed(path: Path, replaced: bool) -> None:
    """Its answers went nowhere, with exit code 0."""
    with Results(path, SETTINGS) as results:
        path.unlink()
        if replaced:
            path.write_text("mine")
        with pytest.raises(ValueError, match=r"output: .*out.jsonl' was removed or replaced during the run"):
            results.write([answered(3)])
    assert path.exists() == replaced and (not replaced or path.read_text() == "mine")


@pytest.mark.parametrize(
    "line",
    [
        "5", "[]", "null", '"text"', '{"text": "x"}', '{"id": 7}', '{"id": [1], "error": "x"}', '{"id": 1, "error": 5}',
        '{"id": 1, "text": "x"}', '{"id": 1, "text": "x", "tokens": 1, "layers": "x"}',
        '{"id": 1, "text": "x", "tokens": 1, "layers": ["x"]}', '{"id": 1, "results": 5}',
        '{"id": 1, "text": "cut in the mid', "[" * 100_000, b"\xff".decode("latin-1"),
    ],
)  # fmt: skip
def test_a_line_that_is_no_result_is_named(path: Path, line: str) -> None:
    data = path.read_bytes()
    path.write_bytes(line.encode("latin-1") + b"\n" + data)
    for read in (read_results, lambda path: Results(path, SETTINGS)):
        with pytest.raises(ValueError, match=r"output: line 1 of '.*out.jsonl' is not"):
            read(path)
    assert path.read_bytes().endswith(data)


@pytest.mark.parametrize("settings", ["5", "null", "[]", "{", "", "[" * 100_000])
def test_settings_that_are_none_are_named(path: Path, settings: str) -> None:
    path.with_name("out.jsonl.settings.json").write_text(settings)
    for read in (read_results, lambda path: Results(path, SETTINGS)):
        with pytest.raises(ValueError, match=r"output: '.*out.jsonl.settings.json' is not a run's settings"):
            read(path)


def test_a_full_disk_names_the_file(path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Results(path, SETTINGS) as results:
        results.write([answered(3)])
        size = path.stat().st_size
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, hard))
        try:
            with pytest.raises(OSError, match=r"out.jsonl'$"):
                results.write([answered(4)])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    with Results(path, SETTINGS) as results:
        assert list(results.lines) == [1, 2, 3] and path.stat().st_size == size
