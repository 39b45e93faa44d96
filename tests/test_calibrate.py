import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import CHECKPOINT, EOS, Fails
from helpers import LINES
from helpers import calibrate_arguments as arguments
from omegaconf import OmegaConf

from janus.models import VLChatProcessor
from janus.utils.io import load_pil_images
from janus_dola import DoLaConfig, DoLaJanusWrapper
from janus_dola.programs import answer as answer_program
from janus_dola.programs import calibrate, checkpoint
from janus_dola.programs.calibrate import choose_winner, render, two_fold
from janus_dola.programs.measures import (
    BASELINE,
    interval,
    is_right,
    normalize,
    pope_measures,
    simultaneous_intervals,
    summarize,
    yes_or_no,
)
from janus_dola.programs.options import read_config
from janus_dola.programs.prompts import Prompt, read_prompts

pytestmark = pytest.mark.usefixtures("loaded_once")

ROOT = Path(__file__).parents[1]


def outcome(off: list[int], on: list[int]) -> tuple[list[Prompt], list[dict[str, Any]]]:
    questions = [Prompt(i, [], DoLaConfig(), 1, "answer", "yes") for i in range(len(off))]
    results = [{BASELINE: {"correct": bool(a)}, "bucket 0": {"correct": bool(b)}} for a, b in zip(off, on, strict=True)]
    return questions, results


def test_table_counts_and_intervals() -> None:
    table = summarize(*outcome([1, 0, 0, 1] * 25, [1, 1, 0, 0] * 25))
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
    winner, best, reason = choose_winner(summarize(*outcome(off, lucky)))
    assert (winner, best) == (BASELINE, "bucket 0") and "within noise" in reason and "bucket 0" in reason
    better = [1 if i % 3 else a for i, a in enumerate(off)]
    assert choose_winner(summarize(*outcome(off, better)))[0] == "bucket 0"
    assert choose_winner(summarize(*outcome(off, [0] * 60)))[0] == BASELINE


def test_the_best_of_nine_by_chance_is_seldom_named_a_winner() -> None:
    """Of nine configurations that differ from off by chance alone one was held to an interval for one, and won."""
    rng = np.random.default_rng(0)
    wrong = {"one": 0, "all": 0}
    for _ in range(60):
        changed = rng.random((9, 200)) < 0.1  # a tenth of 200 answers, for better or worse
        differences = np.where(changed, rng.choice([-1.0, 1.0], (9, 200)), 0.0)
        best = int(differences.mean(1).argmax())
        wrong["one"] += interval(differences[best])[0] > 0
        wrong["all"] += simultaneous_intervals(differences)[best][0] > 0
    assert wrong["all"] <= 3 < wrong["one"]  # 5 %


def test_simultaneous_intervals_of_one_are_those_of_one() -> None:
    values = np.random.default_rng(1).integers(-1, 2, (1, 400)).astype(float)
    (low, high), (one_low, one_high) = simultaneous_intervals(values)[0], interval(values[0])
    assert low == pytest.approx(one_low, abs=0.01) and high == pytest.approx(one_high, abs=0.01)
    assert simultaneous_intervals(np.zeros((2, 5))) == [[0.0, 0.0]] * 2  # nothing changed


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
    assert yes_or_no("No, there is no dog.") == "no"
    assert yes_or_no("Yes, there is.") == "yes"


def test_pope_by_split() -> None:
    """Accuracy and F1 of each split beside each other; a line without one counts in the whole alone."""
    asked = [("random", "yes"), ("random", "no"), ("adversarial", "no"), ("adversarial", "yes"), (None, "no")]
    prompts = [Prompt(i, [], DoLaConfig(), 1, "pope", truth, category=s) for i, (s, truth) in enumerate(asked)]
    said = {BASELINE: ["yes", "no", "yes", "yes", "no"], "bucket 0": ["yes", "no", "no", "yes", "yes"]}
    results = [
        {name: {"correct": answers[i] == asked[i][1], "said": answers[i]} for name, answers in said.items()}
        for i in range(5)
    ]
    table = summarize(prompts, results)
    off = table[BASELINE]["pope_splits"]
    assert list(off) == ["adversarial", "random"] and off["adversarial"] == pope_measures(["yes", "yes"], ["no", "yes"])
    assert table[BASELINE]["pope"] == pope_measures(said[BASELINE], [truth for _, truth in asked])
    *_, head, first, second = (re.split(r"  +", line) for line in render(table).splitlines())
    assert head == ["POPE", "adversarial, accuracy", "adversarial, F1", "random, accuracy", "random, F1"]
    assert first == [BASELINE, "0.500", "0.667", "1.000", "1.000"]
    assert second == ["bucket 0", *["1.000"] * 4]


def test_normalize() -> None:
    assert normalize("  The red Circle. ") == normalize("red circle")
    assert normalize("two") != normalize("ten")


BROKEN = ["{not json", json.dumps({"images": ["nowhere.png"], "question": "Q", "answer": "A"}), json.dumps({"a": 1})]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    lines = [json.dumps(line) for line in LINES]
    (tmp_path / "val.jsonl").write_text("\n".join([*lines[:2], *BROKEN, "", *lines[2:]]) + "\n")
    return tmp_path


def test_the_whole_run_and_its_resumption(folder: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calibrate.run(arguments(folder, "two_fold=true"))
    out, err = capsys.readouterr()
    assert sorted(line.split(":")[0] for line in err.splitlines() if line.startswith("line ")) == [
        "line 3",
        "line 4",
        "line 5",
    ]
    report = json.loads((folder / "mine.json").read_text())
    names = [f"bucket {b}, alpha 0.1" for b in (0, 1, 2)] + [
        f"{m}, bucket {b}" for m in ("deco", "sled") for b in (0, 1, 2)
    ]
    names.append("confident")
    assert list(report["table"]) == ["off", *names]
    assert all(row["questions"] == 4 for row in report["table"].values())
    assert "two-fold" in out
    written = OmegaConf.load(folder / "mine.yaml")
    assert written.use_dola_lm == (report["winner"] != BASELINE)
    loaded = read_config(answer_program.AnswerConfig, [f"config={folder / 'mine.yaml'}"])
    assert loaded.use_dola_lm == written.use_dola_lm
    (keys,) = re.findall(rf"checkpoint: ({{.*}}) in {CHECKPOINT}/generation_config.json\n", out)
    assert DoLaConfig(**json.loads(keys)) == loaded.dola()

    saved = folder / "mine.results.jsonl"
    whole = saved.read_text()
    saved.write_text("\n".join(whole.splitlines()[:2]) + '\n{"id": "line 7", "resu')  # stopped while it wrote line 7
    calibrate.run(arguments(folder, "two_fold=true"))
    assert saved.read_text() == whole
    assert json.loads((folder / "mine.json").read_text()) == report
    assert capsys.readouterr().out == out

    data = folder / "val.jsonl"
    data.write_text(data.read_text().replace(BROKEN[1], "{}"))  # a missing picture is looked for again
    monkeypatch.setattr(checkpoint, "load_model", lambda *args: pytest.fail("nothing is left to compute"))
    calibrate.run(arguments(folder, "two_fold=true", "bucket_id=0"))  # which is not asked about
    with pytest.raises(ValueError, match=r"other settings \(alphas was \[0.1\] and is \[0.3\]\)"):
        calibrate.run(arguments(folder, "alphas=[0.3]"))
    data.write_text(data.read_text().replace("Paris", "Rome"))  # an answer saved by line number would be another's
    with pytest.raises(pytest.fail.Exception, match="nothing is left to compute"):  # so it is asked again
        calibrate.run(arguments(folder))


def test_a_checkpoint_that_sees(tmp_path: Path, capsys: Any) -> None:
    """The demo's own pictures and questions, in all three forms: what it is known to answer, it answers here."""
    demo = ROOT / "demo"
    asked = json.loads((demo / "images" / "questions.json").read_text(encoding="utf-8"))["scene.png"]
    asked = [question for question in asked if question["right"]]
    assert len(asked) >= 6
    lines: list[dict[str, Any]] = []
    for i, question in enumerate(asked):
        images, answer = [str(demo / "images" / "scene.png")], question["answer"]
        if question["kind"].startswith("presence"):
            label = answer.split(",")[0].lower()
            lines.append({"question_id": i, "image": "scene.png", "text": question["text"], "label": label})
        elif question["kind"] == "colour":
            choices = [answer.replace("yellow", colour) for colour in ("red", "yellow", "green")]
            lines.append({"images": images, "question": question["text"], "choices": choices, "answer": 1})
        elif question["kind"] in ("what", "where"):
            lines.append({"images": images, "question": question["text"], "answer": answer})
    assert {line.get("label") for line in lines} >= {"yes", "no"}
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
    """Of each configuration by itself, one question at a time."""
    calibrate.run(arguments(folder))
    saved = [json.loads(line) for line in (folder / "mine.results.jsonl").read_text().splitlines()]
    results = {line["id"]: line["results"] for line in saved if "results" in line}
    config = read_config(calibrate.CalibrateConfig, arguments(folder))
    processor = VLChatProcessor.from_pretrained(CHECKPOINT)
    prompts, _ = read_prompts(config, config.data, processor, model.config, image_root=config.image_root)
    prompts = [prompt for prompt in prompts if prompt.id != "line 4"]  # its image is not there
    assert {prompt.id for prompt in prompts} == results.keys() and len(prompts) == 4
    texts = set()
    for prompt in prompts:
        inputs = processor(conversations=prompt.turns, images=load_pil_images(prompt.turns)).to("cpu", torch.float32)
        embeds = model.prepare_inputs_embeds(**inputs)
        for name, dola in config.configurations().items():
            wrapper, result = DoLaJanusWrapper(model, dola), results[prompt.id][name]
            if prompt.form != "choices":
                ids = wrapper.generate(
                    inputs_embeds=embeds, attention_mask=inputs.attention_mask, max_new_tokens=6, do_sample=False,
                    eos_token_id=EOS, pad_token_id=EOS,
                )  # fmt: skip
                assert result["text"] == processor.tokenizer.decode(ids[0], skip_special_tokens=True).strip()
                assert result["correct"] == is_right(prompt, result["text"])
                texts.add((prompt.id, result["text"]))
            choices = prompt.choices or ([prompt.answer] if prompt.form == "answer" else [])
            means = []
            for choice in choices:
                ids = torch.tensor([processor.tokenizer.encode(" " + choice, add_special_tokens=False)])
                means.append(wrapper.score(embeds, continuation_ids=ids).mean().item())
            if prompt.form == "choices":
                assert result["scores"] == pytest.approx(means, abs=1e-4)
                assert result["correct"] == (means.index(max(means)) == prompt.answer)
            elif prompt.form == "answer":
                assert result["logprob"] == pytest.approx(means[0], abs=1e-4)
    assert len(texts) > 3  # DoLa changes the answers of this checkpoint


def test_strict_stops_at_the_first_bad_line(folder: Path) -> None:
    with pytest.raises(ValueError, match="data, line 3: not JSON"):
        calibrate.run(arguments(folder, "strict=true"))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"question": "Q", "choices": ["a"], "answer": 0}, "choices must be a list of at least two"),
        ({"question": "Q", "choices": ["a", "b"], "answer": 2}, "answer must be the index of a choice, 0 to 1, got 2"),
        ({"question": "Q", "answer": ""}, "answer must be a string"),
        ({"text": "Q", "label": "maybe"}, "label must be yes or no, got 'maybe'"),
        ({"text": "Q", "label": "yes", "image": 5}, "image must be a path, got 5"),
        ({"text": "Q", "label": "yes", "category": 5}, "category must be a string, such as random, got 5"),
        ({"question": "Q", "answer": "A", "category": "random"}, "unknown key 'category'"),
        (["Q"], "a line must be a JSON object"),
        ({"question": "Q"}, "the line must have an answer, or a label"),
        ({"conversation": [{"content": "Q"}], "answer": "A"}, "answer must come with a question"),
        ({"question": "Q", "anwser": "A"}, "unknown key 'anwser', did you mean 'answer'?"),
    ],
)
def test_bad_lines(folder: Path, capsys: Any, line: Any, message: str) -> None:
    (folder / "val.jsonl").write_text(json.dumps(line) + "\n")
    with pytest.raises(ValueError, match="data must hold at least one good line, got 1 bad ones"):
        calibrate.run(arguments(folder))
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("more", ["device=nonsense", "candidate_layers=[31]", "generation.eos_token_id=512"])
def test_what_is_wrong_with_the_model_is_no_bad_line(folder: Path, capsys: Any, more: str) -> None:
    """It was reported once for each line of the data."""
    with pytest.raises(ValueError, match=more.split("=")[0]):
        calibrate.run(arguments(folder, more))
    assert capsys.readouterr().err == ""


def test_stop_strings(folder: Path) -> None:
    """They need the tokenizer, which calibrate did not pass."""
    calibrate.run(arguments(folder, "generation.stop_strings=[e]"))
    assert json.loads((folder / "mine.json").read_text())["table"]["off"]["questions"] == 4


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["data="], "data must name a file"),
        (["data=nowhere.jsonl"], "data must name a file that can be read, got 'nowhere.jsonl'"),
        (["output=mine.txt"], "output must end in .yaml, got 'mine.txt'"),
        (["alphas=[]"], "alphas must hold at least one"),
        (["methods=[]"], "methods must be some of dola, deco, sled, confident, got []"),
        (["methods=[dola,sledge]"], "method must be dola, deco, sled or confident, got 'sledge', did you mean 'sled'?"),
        (["alphas=[2]"], "alpha must be in"),
    ],
)
def test_bad_arguments(folder: Path, fails: Fails, more: list[str], message: str) -> None:
    assert message in fails(calibrate.run, *arguments(folder), *more)
