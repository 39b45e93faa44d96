"""workers=N: the lines of one process, whichever actor or driver is killed on the way."""

import io
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

ray = pytest.importorskip("ray")

import psutil  # noqa: E402
from conftest import CHECKPOINT, GOLDEN, Fails  # noqa: E402
from helpers import (  # noqa: E402
    LINES,
    TALL,
    TEXT,
    WIDE,
    calibrate_arguments,
    cli_arguments,
    golden_lines,
    read,
    write,
)

from janus_dola.programs import answer, calibrate, ray_workers  # noqa: E402

ROOT = Path(__file__).parents[2]
QUESTIONS = [TEXT | {"id": i, "question": f"What is {i} + {i}?"} for i in range(40)]


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """Shared, which is also the test that a run ends no cluster but its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_BACKEND_LOG_LEVEL", "fatal")
        ray.init("local", log_to_driver=False, include_dashboard=False, logging_level=logging.ERROR)
    yield
    assert ray.is_initialized()
    ray.shutdown()


def actors(driver: int) -> list[psutil.Process]:
    """The processes of a run's actors, one that is loading or answering first."""
    found = [each for each in psutil.Process(driver).children(recursive=True) if "Map(Worker)" in each.name()]
    return sorted(found, key=lambda each: ".submit" not in each.name())


def wait_for(what: Any) -> Any:
    deadline = time.monotonic() + 300
    while not (value := what()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return value


def lines_in(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def one_process(folder: Path, *more: str) -> dict[Any, dict[str, Any]]:
    answer.run([*cli_arguments(folder, *more), f"output={folder / 'one.jsonl'}"])
    return read(folder / "one.jsonl")


def test_the_lines_are_those_of_one_process(
    tmp_path: Path, cluster: None, capfd: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(GOLDEN / "expected")  # of the actors' images, too
    own: list[dict[str, Any]] = [{"use_dola_lm": False}, {"alpha": 0.5}, {"candidate_layers": [5]}, {"bucket_id": 0}]
    lines = [WIDE | keys | {"id": i} for i, keys in enumerate(own)] + [TALL | {"id": "a", "answer": "No."}]
    bad = ['{"question": "Wh', {"id": "gone", "question": "Q", "images": ["images/nowhere.png"]}]
    write(tmp_path / "prompts.jsonl", [*golden_lines(), *bad, *lines, {**WIDE, "images": ["images/wide.png"]}])
    more = ["compare=true", "batch_size=3"]
    want = one_process(tmp_path, *more)
    bar = io.StringIO()
    tqdm = ray_workers.tqdm
    monkeypatch.setattr(ray_workers, "tqdm", lambda **how: tqdm(**how | {"file": bar, "disable": False}))
    capfd.readouterr()
    assert answer.run(cli_arguments(tmp_path, *more, "workers=2")) == 1
    assert capfd.readouterr() == ("", f"{tmp_path / 'out.jsonl'}: 19 answered, 0 kept, 2 errors, 0 of 1 right\n")
    assert read(tmp_path / "out.jsonl") == want and len(want) == 21
    assert "there is no file 'images/nowhere.png'" in want["gone"]["error"]
    assert "| 20/20 [" in bar.getvalue() and "| 0/20 [" in bar.getvalue()
    # Nothing is left to do, and the number of workers is no setting.
    assert answer.run(cli_arguments(tmp_path, *more)) == 1
    assert answer.run(cli_arguments(tmp_path, *more, "workers=3")) == 1
    assert read(tmp_path / "out.jsonl") == want


def test_calibrate_compares_what_one_process_does(tmp_path: Path, cluster: None) -> None:
    found = []
    for workers in (0, 2):
        folder = tmp_path / str(workers)
        folder.mkdir()
        write(folder / "val.jsonl", [*LINES, "broken"])
        calibrate.run(calibrate_arguments(folder, f"workers={workers}", "batch_size=2"))
        found.append((read(folder / "mine.results.jsonl"), (folder / "mine.json").read_text()))
    assert found[0] == found[1] and len(found[0][0]) == len(LINES) + 1


def test_an_actor_that_is_killed_loses_no_line(tmp_path: Path, cluster: None) -> None:
    write(tmp_path / "prompts.jsonl", QUESTIONS)
    draw = ["batch_size=2", "generation.do_sample=true"]
    killed: list[int] = []

    def kill() -> None:
        for wanted in (4, 14):
            wait_for(lambda wanted=wanted: lines_in(tmp_path / "out.jsonl") >= wanted)
            killed.append(actors(os.getpid())[0].pid)
            os.kill(killed[-1], signal.SIGKILL)

    thread = threading.Thread(target=kill, daemon=True)
    thread.start()
    assert answer.run(cli_arguments(tmp_path, *draw, "workers=2")) == 0
    thread.join()
    assert len(set(killed)) == 2
    assert read(tmp_path / "out.jsonl") == one_process(tmp_path, *draw) and lines_in(tmp_path / "out.jsonl") == 40


def test_what_is_wrong_in_an_actor_is_one_line(tmp_path: Path, cluster: None, fails: Fails) -> None:
    write(tmp_path / "prompts.jsonl", [TEXT])
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in CHECKPOINT.iterdir():
        (broken / file.name).write_bytes(file.read_bytes()[: 100 if file.suffix == ".safetensors" else None])
    arguments = [*cli_arguments(tmp_path), f"model_path={broken}"]
    said = fails(answer.run, *arguments)
    assert str(broken) in said and fails(answer.run, *arguments, "workers=1") == said
    assert fails(answer.run, *cli_arguments(tmp_path, "workers=-1")) == "error: workers must be at least 0, got -1\n"


def test_a_cluster_that_cannot_be_used_is_one_line(tmp_path: Path, cluster: None) -> None:
    """A dead address gave nothing for minutes; of a wrong token nothing said that it was one."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        dead = f"127.0.0.1:{free.getsockname()[1]}"
        with pytest.raises(
            ValueError, match=f"RAY_ADDRESS must .* running cluster, got '{dead}': .*Connection refused"
        ):
            ray_workers.check_address(dead)
    for other in ("auto", "local", ray.get_runtime_context().gcs_address):
        ray_workers.check_address(other)
    write(tmp_path / "prompts.jsonl", [TEXT])
    command = [sys.executable, ROOT / "inference_dola.py", *cli_arguments(tmp_path, "workers=1")]
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}
    address = {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | address | token, check=False)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert "error: RAY_ADDRESS '" in done.stderr and "Authentication token is missing or incorrect" in done.stderr


def test_a_driver_that_is_killed_and_started_again_loses_no_line(tmp_path: Path) -> None:
    write(tmp_path / "prompts.jsonl", QUESTIONS)
    command = [sys.executable, ROOT / "inference_dola.py", *cli_arguments(tmp_path, "batch_size=2", "workers=2")]
    start = partial(subprocess.Popen, command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with start() as driver:
        wait_for(lambda: lines_in(tmp_path / "out.jsonl") >= 6)
        own = actors(driver.pid)
        driver.kill()
    before = lines_in(tmp_path / "out.jsonl")
    assert 6 <= before < len(QUESTIONS)
    assert len(own) == 2 and not psutil.wait_procs(own, timeout=20)[1]  # they end with it
    with start() as driver:
        wait_for(lambda: lines_in(tmp_path / "out.jsonl") > before)
        actors(driver.pid)[0].kill()
        out, err = driver.communicate(timeout=300)
    left = len(QUESTIONS) - before
    said = f"{tmp_path / 'out.jsonl'}: {before} answers kept, {left} prompts to answer\n"
    said += f"{tmp_path / 'out.jsonl'}: {left} answered, {before} kept, 0 errors\n"
    assert (err, driver.returncode) == (said, 0) and "A worker died or was killed" in out
    assert read(tmp_path / "out.jsonl") == one_process(tmp_path, "batch_size=2")
