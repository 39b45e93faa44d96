"""A file of prompts that grows, is mended, or comes from a pipe: what was answered stays, the rest is answered."""

import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest
from conftest import CHECKPOINT, Fails
from PIL import Image

from janus_dola.programs import answer, calibrate

pytestmark = pytest.mark.usefixtures("loaded_once")

TEXT = {"question": "Why?"}


def lines(path: Path) -> dict[Any, dict[str, Any]]:
    found = [json.loads(line) for line in path.read_text().splitlines()]
    assert len({line["id"] for line in found}) == len(found)
    return {line["id"]: line for line in found}


@pytest.fixture
def ask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Answers lines, always in the same file; returns the exit code."""
    monkeypatch.chdir(tmp_path)

    def ask(given: list[Any], *more: str) -> int:
        text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in given)
        Path("prompts.jsonl").write_text(text)
        keys = [f"model_path={CHECKPOINT}", "device=cpu", "generation.max_new_tokens=3", "output=out.jsonl"]
        return answer.run([*keys, "prompts=prompts.jsonl", *more])

    return ask


def test_errors_are_retried_and_the_rest_stays(ask: Any, capsys: Any) -> None:
    asked = [TEXT | {"id": 1}, {"id": 2, "question": "What?", "images": ["late.png"]}, "broken"]
    assert ask(asked) == 1
    before = lines(Path("out.jsonl"))
    assert {name for name, line in before.items() if "error" in line} == {2, "line 3"}
    data = Path("out.jsonl").read_bytes()
    assert ask(asked) == 1 and Path("out.jsonl").read_bytes() == data  # the same errors again
    Image.new("RGB", (8, 8)).save("late.png")
    capsys.readouterr()
    assert ask(asked) == 1
    after = lines(Path("out.jsonl"))
    assert after[1] == before[1] and "error" not in after[2] and "error" in after["line 3"]
    assert "out.jsonl: 1 answer kept, 1 prompt to answer" in capsys.readouterr().err


def test_prompts_may_grow_and_be_mended(ask: Any, capsys: Any) -> None:
    """One mended line of 10,000 meant all again."""
    asked = [{"id": n, "question": f"What is {n}?"} for n in range(4)]
    assert ask(asked) == 0
    before = lines(Path("out.jsonl"))
    capsys.readouterr()
    mended = [asked[0], asked[1] | {"question": "What is one?"}, asked[2] | {"alpha": 0.5}, asked[3], {"id": 4} | TEXT]
    assert ask(mended) == 0
    assert "out.jsonl: 2 answers kept, 3 prompts to answer" in capsys.readouterr().err
    after = lines(Path("out.jsonl"))
    assert set(after) == {0, 1, 2, 3, 4}
    assert [after[n] == before[n] for n in range(4)] == [True, False, False, True]
    assert ask(asked[:2]) == 0  # fewer: nothing is lost
    assert set(lines(Path("out.jsonl"))) == {0, 1, 2, 3, 4} and lines(Path("out.jsonl"))[1] == before[1]


def test_answers_of_other_prompts_are_not_replaced(ask: Any, fails: Fails) -> None:
    assert ask([{"id": n, "question": f"What is {n}?"} for n in range(2)]) == 0
    data = Path("out.jsonl").read_bytes()
    with pytest.raises(ValueError, match=r"output: 'out.jsonl' holds answers to other prompts"):
        ask([{"id": n, "question": f"Where is {n}?"} for n in range(2)])
    assert Path("out.jsonl").read_bytes() == data


def test_prompts_from_a_pipe_are_read_once(ask: Any, tmp_path: Path) -> None:
    """They had the fingerprint of nothing, so a second run kept the answers of the first."""
    os.mkfifo("pipe")
    answers = []
    for question in ("What is it?", "Where is it?"):
        text = json.dumps({"id": 1, "question": question}) + "\n" + json.dumps({"id": question} | TEXT) + "\n"
        writer = threading.Thread(target=Path("pipe").write_text, args=[text])
        writer.start()
        assert ask([], "prompts=pipe", "output=piped.jsonl" if not answers else "output=other.jsonl") == 0
        writer.join()
        answers.append(lines(Path("piped.jsonl" if not answers else "other.jsonl")))
    assert [set(found) for found in answers] == [{1, "What is it?"}, {1, "Where is it?"}]
    assert answers[0][1]["prompt"] != answers[1][1]["prompt"]


@pytest.mark.parametrize(
    ("program", "keys", "message"),
    [
        (calibrate, ["data=val.json", "output=val.yaml"], "output must not be the file of data, got 'val.json'"),
        (calibrate, ["data=val.json", "output=link.yaml"], "output must not be the file of data, got 'link.json'"),
        (calibrate, ["data=val.json", "config=mine.yaml", "output=mine.yaml"], "output must not be the file of config"),
        (calibrate, ["data=val.json", "output=model/config.yaml"], "output must not be a file of model_path"),
        (answer, ["prompts=val.html", "output=out.jsonl", "report=val.html"], "report must not be the file of prompts"),
        (answer, ["prompts=val.json", "output=val.json"], "output must not be the file of prompts, got 'val.json'"),
        (answer, ["prompts=out.jsonl.settings.json", "output=out.jsonl"], "output must not be the file of prompts"),
        (answer, ["prompts=val.json", "output=x.html", "report=x.html"], "report must not be the file of output"),
        (answer, ["image=trace.png", "trace=.", "question=What?"], "trace must not be the file of images, got 'trace"),
    ],
)
def test_nothing_that_is_read_is_written(ask: Any, fails: Fails, program: Any, keys: list[str], message: str) -> None:
    """calibrate replaced val.json by its report."""
    for name in ("val.json", "val.html", "out.jsonl.settings.json", "trace.png"):
        Path(name).write_text(json.dumps(TEXT | {"answer": "so"}) + "\n")
    Path("link.json").symlink_to("val.json")
    Path("mine.yaml").write_text("alpha: 0.3\n")
    Path("model").symlink_to(CHECKPOINT)
    before = {path.name: path.read_bytes() for path in Path().iterdir() if path.is_file()}
    assert message in fails(program.run, "model_path=model", *keys)
    assert {path.name: path.read_bytes() for path in Path().iterdir() if path.is_file()} == before
