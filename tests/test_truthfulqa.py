"""The TruthfulQA benchmark: its measures by hand, and a run on the golden language model."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import CHECKPOINT

from benchmarks import truthfulqa
from janus_dola.programs.measures import BASELINE

HEADER = "Type,Category,Question,Best Answer,Best Incorrect Answer,Correct Answers,Incorrect Answers,Source\n"
ROWS = [
    'x,x,Is it red?,"Yes, it is",No,"It is red.; Yes, it is; ",No; It is blue,x\n',
    "x,x,What is two?,A number,A letter,A number,A letter; A word;A colour,x\n",
    "x,x,Who was it?,Nobody,The king,Nobody; I have no comment,The king,x\n",
]


@pytest.fixture(scope="module")
def folder(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The golden language model by itself, as a text model is published."""
    from janus.models import VLChatProcessor

    folder = tmp_path_factory.mktemp("language_model")
    model.language_model.save_pretrained(folder)
    VLChatProcessor.from_pretrained(CHECKPOINT).tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "TruthfulQA.csv"
    path.write_text(HEADER + "".join(ROWS), encoding="utf-8")
    return path


def test_measures_by_hand() -> None:
    """log P of 0.4 and 0.1 against 0.2 and 0.1: the first correct answer beats all, the second ties with the worst."""
    true, false = [math.log(0.4), math.log(0.1)], [math.log(0.2), math.log(0.1)]
    assert truthfulqa.measures(true, false, best=0) == pytest.approx([1, 0.5 / 0.8, 1 / 2])
    assert truthfulqa.measures(true, false, best=1) == pytest.approx([0, 0.5 / 0.8, 1 / 2])
    assert truthfulqa.measures(false, true, best=0) == pytest.approx([0, 0.3 / 0.8, 0])
    assert truthfulqa.measures([-1.0], [-1.0], best=0) == pytest.approx([0, 0.5, 0])  # a tie is not more likely


def test_measures_of_answers_outside_v_head() -> None:
    """The benchmark's own code takes exp(−2000) there and divides 0 by 0."""
    assert truthfulqa.measures([-2000.0, -3000.0], [-2000.0 + math.log(3)], best=0) == pytest.approx([0, 0.25, 0])


def test_questions_are_split_and_closed_as_by_the_benchmark(data: Path) -> None:
    first, second, _ = truthfulqa.read_questions(str(data))
    assert first == {
        "question": "Is it red?",
        "best": "Yes, it is.",
        "true": ["It is red.", "Yes, it is."],
        "false": ["No.", "It is blue."],
    }
    assert second["false"] == ["A letter.", "A word.", "A colour."]


def test_configurations() -> None:
    named = truthfulqa.configurations()
    assert next(iter(named)) == BASELINE and not named[BASELINE].use_dola_lm
    layers = [config.resolve_layers(30) for config in named.values() if config.use_dola_lm and config.method == "dola"]
    assert layers.count((22, 24, 26, 28)) == 2  # alpha 0.1 and 0
    assert layers.count(()) == 1


def test_each_half_chooses_for_the_other() -> None:
    """The first is better on even places, the second on odd ones: chosen there, each fails on the others."""
    first, second = [[1, 5], [0, 5], [1, 5], [0, 5]], [[0, 0], [1, 0], [0, 0], [1, 0]]  # [questions, measures]
    chosen = truthfulqa.chosen_by_halves(np.array([first, second], dtype=float))
    assert chosen.tolist() == [[0, 5]] * 4


def test_a_stopped_run_goes_on_to_the_same_table(folder: Path, data: Path, tmp_path: Path, capsys: Any) -> None:
    arguments = [f"data={data}", f"model={folder}"]
    truthfulqa.run([*arguments, f"out={tmp_path / 'whole'}"])
    whole = json.loads((tmp_path / "whole.json").read_text())
    truthfulqa.run([*arguments, f"out={tmp_path / 'part'}", "limit=2"])
    saved = tmp_path / "part.jsonl"
    saved.write_text(saved.read_text()[:-20])  # the last question is half written
    capsys.readouterr()
    truthfulqa.run([*arguments, f"out={tmp_path / 'part'}"])
    part = json.loads((tmp_path / "part.json").read_text())
    assert part["table"] == whole["table"] and part["questions"] == 3
    assert len(saved.read_text().splitlines()) == 3
    assert capsys.readouterr().out == (tmp_path / "part.md").read_text()
    assert whole["table"][BASELINE]["MC2"]["difference"] == 0
    with pytest.raises(ValueError, match=r"holds results of other settings \(data was"):
        data.write_text(data.read_text().replace("red", "blue"))
        truthfulqa.run([*arguments, f"out={tmp_path / 'part'}"])


def test_scores_are_those_of_the_language_model(folder: Path, data: Path) -> None:
    """MC2 of DoLa off against plain transformers, one answer at a time."""
    tokenizer, model = truthfulqa.load(str(folder))
    question = truthfulqa.read_questions(str(data))[0]
    prompt = f"{truthfulqa.PRIMER}Q: Is it red?\nA:"
    start = len(tokenizer(prompt).input_ids)
    scores = []
    for answer in question["true"] + question["false"]:
        ids = tokenizer(f"{prompt} {answer}", return_tensors="pt").input_ids
        with torch.no_grad():
            log_q = model.model(input_ids=ids).logits[0].log_softmax(-1)
        scores.append(sum(float(log_q[i - 1, ids[0, i]]) for i in range(start, ids.shape[1])))
    want = truthfulqa.measures(scores[:2], scores[2:], best=1)
    got = truthfulqa.ask(model, tokenizer, question, truthfulqa.configurations())
    assert got[BASELINE] == pytest.approx(want, abs=1e-4)
    assert len({tuple(values) for values in got.values()}) > 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (HEADER, "data must hold at least one question"),
        ("Question,Best Answer\nWhy?,So\n", "line 2 .* Correct Answers and Incorrect Answers must not be empty"),
        (HEADER + "x,x,Why?,So,No,Thus,No,x\n", "Best Answer must be a correct one, got 'So.'"),
    ],
)
def test_bad_data(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bad.csv"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        truthfulqa.run([f"data={path}"])


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("data=nowhere.csv", "data must name the benchmark's TruthfulQA.csv, got 'nowhere.csv'"),
        ("limit=-1", "limit must be an integer of at least 0, got -1"),
        ("model=nowhere/at/all", "model 'nowhere/at/all' cannot be loaded"),
        ("lmit=3", "unknown key 'lmit', did you mean 'limit'"),
    ],
)
def test_bad_arguments(data: Path, tmp_path: Path, argument: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        truthfulqa.run([f"data={data}", f"out={tmp_path / 'out'}", argument])
