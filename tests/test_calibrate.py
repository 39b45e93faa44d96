import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import CHECKPOINT, GOLDEN
from omegaconf import OmegaConf

from janus_dola import calibrate, cli
from janus_dola.calibrate import BASELINE, choose, pope_measures, summarise, two_fold

ROOT = Path(__file__).parents[1]
IMAGES = GOLDEN / "expected" / "images"


def outcome(off: list[int], on: list[int]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    questions = [{"form": "answer"} for _ in off]
    results = [{BASELINE: {"correct": bool(a)}, "bucket 0": {"correct": bool(b)}} for a, b in zip(off, on, strict=True)]
    return questions, results


def test_table_counts_and_intervals() -> None:
    table = summarise(*outcome([1, 0, 0, 1] * 25, [1, 1, 0, 0] * 25))
    row = table["bucket 0"]
    assert (row["accuracy"], row["difference"], row["gained"], row["lost"]) == (0.5, 0.0, 25, 25)
    low, high = row["interval"]
    # 100 answers, half of them right: the standard error is 0.05
    assert 0.5 - 2.4 * 0.05 < low < 0.5 - 1.6 * 0.05
    assert 0.5 + 1.6 * 0.05 < high < 0.5 + 2.4 * 0.05


def test_a_lucky_bucket_does_not_win_and_a_better_one_does() -> None:
    rng = np.random.default_rng(0)
    off = rng.integers(0, 2, 60).tolist()
    lucky = off.copy()
    lucky[off.index(0)] = 1  # one question more
    winner, reason = choose(summarise(*outcome(off, lucky)))
    assert winner == BASELINE and "within noise" in reason and "bucket 0" in reason
    better = [1 if i % 3 else a for i, a in enumerate(off)]
    assert choose(summarise(*outcome(off, better)))[0] == "bucket 0"
    assert choose(summarise(*outcome(off, [0] * 60)))[0] == BASELINE


def test_two_fold_reports_on_the_other_half() -> None:
    off, on = [0, 1] * 40, [1, 0] * 40  # DoLa is right on even lines, wrong on odd ones
    report = two_fold(*outcome(off, on))
    # Chosen on the even half DoLa fails on the odd one; chosen on the odd half the baseline fails on the even one.
    assert report["folds"] == [{"winner": "bucket 0", "accuracy": 0.0}, {"winner": BASELINE, "accuracy": 0.0}]
    assert report["accuracy"] == 0.0


def test_pope_measures() -> None:
    said, truth = ["yes", "yes", "no", "no", "yes"], ["yes", "no", "no", "yes", "yes"]
    assert pope_measures(said, truth) == pytest.approx(
        {"accuracy": 3 / 5, "precision": 2 / 3, "recall": 2 / 3, "f1": 2 / 3, "yes_ratio": 3 / 5}
    )
    assert calibrate.yes_or_no("No, there is no dog.") == "no"
    assert calibrate.yes_or_no("Yes, there is.") == "yes"


def test_normalise() -> None:
    assert calibrate.normalise("  The red Circle. ") == calibrate.normalise("red circle")
    assert calibrate.normalise("two") != calibrate.normalise("ten")


LINES = [
    {"images": [str(IMAGES / "wide.png")], "question": "What is in the image?", "answer": "A red circle."},
    {"question": "What is the capital of France?", "answer": "Paris"},
    {"images": [str(IMAGES / "tall.png")], "question": "Which?", "choices": ["one", "three four"], "answer": 0},
    {"question_id": 7, "image": "square.png", "text": "Is there a dog in the image?", "label": "no"},
]
BROKEN = ["{not json", json.dumps({"images": ["nowhere.png"], "question": "Q", "answer": "A"}), json.dumps({"a": 1})]


def arguments(folder: Path, *more: str) -> list[str]:
    return [
        f"model_path={CHECKPOINT}", "device=cpu", f"data={folder / 'val.jsonl'}", f"output={folder / 'mine.yaml'}",
        f"image_root={IMAGES}", "generation.max_new_tokens=6", "alphas=[0.1]", *more,
    ]  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    lines = [json.dumps(line) for line in LINES]
    (tmp_path / "val.jsonl").write_text("\n".join([*lines[:2], *BROKEN, "", *lines[2:]]) + "\n")
    return tmp_path


def test_the_whole_run_and_its_resumption(folder: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calibrate.run(arguments(folder, "two_fold=true"))
    out, err = capsys.readouterr()
    assert [line.split(":")[0] for line in err.splitlines() if line.startswith("line ")] == [
        "line 3",
        "line 4",
        "line 5",
    ]
    report = json.loads((folder / "mine.json").read_text())
    assert list(report["table"]) == ["off", "bucket 0, alpha 0.1", "bucket 1, alpha 0.1", "bucket 2, alpha 0.1"]
    assert all(row["questions"] == 4 for row in report["table"].values())
    assert "two-fold" in out
    written = OmegaConf.load(folder / "mine.yaml")
    assert written.use_dola_lm == (report["winner"] != BASELINE)
    import inference_dola

    loaded = cli.read_config(inference_dola.InferenceConfig, [f"config={folder / 'mine.yaml'}"], inference_dola.DEFAULT)
    assert loaded.use_dola_lm == written.use_dola_lm

    saved = folder / "mine.results.jsonl"
    whole = saved.read_text()
    saved.write_text("\n".join(whole.splitlines()[:3]) + '\n{"line": 7, "resu')  # stopped while it wrote line 7
    calibrate.run(arguments(folder, "two_fold=true"))
    assert saved.read_text() == whole
    assert json.loads((folder / "mine.json").read_text()) == report
    assert capsys.readouterr().out == out

    monkeypatch.setattr(calibrate, "load_model", lambda config: pytest.fail("nothing is left to compute"))
    calibrate.run(arguments(folder, "two_fold=true"))
    with pytest.raises(ValueError, match=r"other settings \(alphas was \[0.1\] and is \[0.3\]\)"):
        calibrate.run(arguments(folder, "alphas=[0.3]"))
    data = folder / "val.jsonl"
    data.write_text(data.read_text().replace("Paris", "Rome"))  # an answer saved by line number would be another's
    with pytest.raises(ValueError, match=r"other settings \(data's sha256 was"):
        calibrate.run(arguments(folder))


def test_a_checkpoint_that_sees(tmp_path: Path, capsys: Any) -> None:
    """The demo's own pictures and questions, in all three forms: what it is known to answer, it answers here."""
    demo = ROOT / "demo"
    asked = json.loads((demo / "images" / "questions.json").read_text(encoding="utf-8"))["scene.png"]
    assert all(question["right"] for question in asked)
    lines: list[dict[str, Any]] = []
    for i, question in enumerate(asked):
        images, answer = [str(demo / "images" / "scene.png")], question["answer"]
        if question["kind"].startswith("presence"):
            label = answer.split(",")[0].lower()
            lines.append({"question_id": i, "image": "scene.png", "text": question["text"], "label": label})
        elif question["kind"] == "colour":
            choices = [answer.replace("yellow", colour) for colour in ("red", "yellow", "green")]
            lines.append({"images": images, "question": question["text"], "choices": choices, "answer": 1})
        elif question["kind"] == "where":
            lines.append({"images": images, "question": question["text"], "answer": answer})
    forms = [calibrate.parse_line(json.dumps(line), "")["form"] for line in lines]
    assert set(forms) == {"answer", "choices", "pope"} and {line.get("label") for line in lines} >= {"yes", "no"}
    (tmp_path / "val.jsonl").write_text("\n".join(map(json.dumps, lines)))
    calibrate.run(
        [f"config={ROOT / 'configs' / 'default.yaml'}", f"model_path={demo / 'checkpoint'}", "device=cpu",
         f"data={tmp_path / 'val.jsonl'}", f"output={tmp_path / 'mine.yaml'}", f"image_root={demo / 'images'}"]
    )  # fmt: skip
    report = json.loads((tmp_path / "mine.json").read_text())
    off = report["table"][BASELINE]
    assert off["accuracy"] == 1 and off["questions"] == len(lines)
    assert off["pope"]["precision"] == off["pope"]["recall"] == off["pope"]["f1"] == 1
    assert off["logprob"] > -0.1  # it is sure of the right answer
    assert report["winner"] == BASELINE  # nothing is better than all right
    assert "no configuration answers more questions than DoLa off" in capsys.readouterr().out


def test_answers_are_those_of_generate_and_score(folder: Path, model: Any) -> None:
    from janus.models import VLChatProcessor
    from janus.utils.io import load_pil_images
    from janus_dola import DoLaJanusWrapper

    config = cli.read_config(calibrate.CalibrateConfig, arguments(folder), None)
    judge = calibrate.Judge(DoLaJanusWrapper(model), VLChatProcessor.from_pretrained(CHECKPOINT), config)

    def ask(line: Any) -> Any:
        question = calibrate.parse_line(json.dumps(line), str(IMAGES))
        turns = cli.build_conversation(config.roles, question["question"], question["images"])
        return judge(question, turns, load_pil_images(turns))

    result = ask(LINES[0])
    texts = {name: row["text"] for name, row in result.items()}
    assert len(set(texts.values())) > 1  # DoLa changes the answers of this checkpoint
    assert all(row["logprob"] < 0 for row in result.values())
    chosen = ask(LINES[2])
    assert {len(row["scores"]) for row in chosen.values()} == {2}
    for row in chosen.values():
        assert row["correct"] == (row["scores"][0] >= row["scores"][1])


def test_strict_stops_at_the_first_bad_line(folder: Path) -> None:
    with pytest.raises(ValueError, match="data, line 3: not JSON"):
        calibrate.run(arguments(folder, "strict=true"))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"question": "Q", "choices": ["a"], "answer": 0}, "choices must be a list of at least two"),
        ({"question": "Q", "choices": ["a", "b"], "answer": 2}, "answer must be the number of a choice, 0 to 1, got 2"),
        ({"question": "Q", "answer": ""}, "answer must be a text"),
        ({"text": "Q", "label": "maybe"}, "label must be yes or no, got 'maybe'"),
        (["Q"], "none of the forms"),
    ],
)
def test_bad_lines(line: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        calibrate.parse_line(json.dumps(line), ".")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["data="], "data must name a file"),
        (["data=nowhere.jsonl"], "data must name a file .* 'nowhere.jsonl'"),
        (["output=mine.txt"], "output must end in .yaml, got 'mine.txt'"),
        (["alphas=[]"], "alphas must hold at least one"),
        (["alphas=[2]"], "alpha must be in"),
    ],
)
def test_bad_arguments(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, more: list[str], message: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["calibrate", *arguments(folder), *more])
    with pytest.raises(SystemExit) as exit_:
        cli.main(calibrate.run)
    err = capsys.readouterr().err
    assert exit_.value.code == 2 and err.count("\n") == 1
    import re

    assert re.search(message, err)
