"""lmms-eval's own harness on the demo model: the answers are those of a batch run, in one process and in two."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("lmms_eval")

import datasets
from conftest import export
from lmms_eval.models import get_model
from serving import serve

from demo.scenes import ask, sample_scene
from janus.utils.io import load_pil_images
from janus_dola import DoLaConfig
from janus_dola.programs import answer
from janus_dola.programs import lmms_eval as program
from janus_dola.programs.engine import Outcome
from janus_dola.programs.prompts import build_conversation

CHECKPOINT = Path(__file__).parents[2] / "demo" / "checkpoint"
ROLES = ["<|User|>", "<|Assistant|>"]
CHOICES = ["Yes", "No", "No, there"]
MODEL = {"pretrained": CHECKPOINT, "device": "cpu", "dtype": "float32"}
# On differs from off on these pictures; the default does not.
DOLA = {"off": {"use_dola_lm": False}, "on": {"use_dola_lm": True, "alpha": 0.0, "candidate_layers": [1]}}

UTILS = """
def visuals(doc):
    return [image.convert("RGB") for image in doc["images"]]

def question(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]

def score(doc, results):
    return {"yes_or_no": float(results[0].split(",")[0].lower() == doc["label"])}

def mean(scores):
    return sum(scores) / len(scores)
"""
TASK = """
dataset_path: parquet
dataset_kwargs: {{data_files: {{test: {folder}/scenes.parquet}}}}
test_split: test
doc_to_visual: !function utils.visuals
doc_to_text: !function utils.question
"""
POPE = """
task: pope_scenes
output_type: generate_until
doc_to_target: label
generation_kwargs: {until: ".", max_new_tokens: 24, temperature: 0, top_p: 0, num_beams: 1, do_sample: false}
process_results: !function utils.score
metric_list:
  - {metric: yes_or_no, aggregation: !function utils.mean, higher_is_better: true}
"""
CHOOSE = f"""
task: choose_scenes
output_type: multiple_choice
doc_to_target: choice
doc_to_choice: {json.dumps(CHOICES)}
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
"""


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """POPE-style questions, {"id", "images", "question", "label"}; every fifth has two images."""
    folder = tmp_path_factory.mktemp("tasks")
    lines: list[dict[str, Any]] = []
    index = 0
    while len(lines) < 23:  # two processes do not get as many each
        index += 1
        scene, presence = sample_scene("test", 0, index), ("present", "co-occurring-absent")[len(lines) % 2]
        question = ask(scene, "presence", random.Random(index), presence)  # type: ignore[arg-type]
        if question is None:
            continue
        scene.render().save(folder / f"{index}.png")
        images = [str(folder / f"{index}.png")] + ([lines[-1]["images"][0]] if len(lines) % 5 == 4 else [])
        label = question.answer.split(",")[0].lower()
        lines.append({"id": len(lines), "images": images, "question": question.text, "label": label})
    features = datasets.Features(
        {
            "images": [datasets.Image()],
            "question": datasets.Value("string"),
            "label": datasets.Value("string"),
            "choice": datasets.Value("int64"),
        }
    )
    rows = [
        {key: line[key] for key in ("images", "question", "label")} | {"choice": int(line["label"] == "no")}
        for line in lines
    ]
    datasets.Dataset.from_list(rows, features=features).to_parquet(folder / "scenes.parquet")
    (folder / "utils.py").write_text(UTILS)
    (folder / "pope.yaml").write_text(TASK.format(folder=folder) + POPE)
    (folder / "choices.yaml").write_text(TASK.format(folder=folder) + CHOOSE)
    return lines


@pytest.fixture(scope="module")
def folder(lines: list[dict[str, Any]]) -> Path:
    return Path(lines[0]["images"][0]).parent


def lmms_eval(folder: Path, output: Path, processes: int) -> None:
    """Runs both tasks with DoLa off and on, logging to output/off and output/on."""
    runs = [
        {"output_path": str(output / way), "model_args": ",".join(f"{key}={value}" for key, value in keys.items())}
        for way, keys in ((way, MODEL | DOLA[way]) for way in DOLA)
    ]
    (output / "runs.yaml").write_text(json.dumps(runs))
    arguments = ["--model", "janus_dola", "--config", str(output / "runs.yaml"), "--batch_size", "4", "--log_samples"]
    run(folder, *arguments, "--tasks", "pope_scenes,choose_scenes", processes=processes)


def run(folder: Path, *arguments: str, processes: int = 1) -> None:
    launch = ["accelerate.commands.launch", "--cpu", f"--num_processes={processes}", "--main_process_port=0", "-m"]
    command = [sys.executable, "-m", *(launch if processes > 1 else []), "lmms_eval", *arguments]
    command += ["--include_path", str(folder), "--verbosity", "DEBUG"]  # at others errors are not fatal
    env = os.environ | {"HF_HOME": str(folder / "hf"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def logged(output: Path, task: str) -> list[Any]:
    """What the model said, by question."""
    (path,) = output.rglob(f"*_samples_{task}.jsonl")
    samples = sorted((json.loads(line) for line in path.read_text().splitlines()), key=lambda line: line["doc_id"])
    assert [sample["doc_id"] for sample in samples] == list(range(23))
    return [sample["filtered_resps"] for sample in samples]


@pytest.fixture(scope="module")
def model() -> Any:
    return get_model("janus_dola")(**MODEL, batch_size=3, alpha=0.0)


@pytest.fixture(scope="module")
def answers(lines: list[dict[str, Any]], folder: Path) -> dict[str, list[str]]:
    """Those of the batch run, with DoLa off and on."""
    asked = "".join(json.dumps({key: line[key] for key in ("id", "images", "question")}) + "\n" for line in lines)
    (folder / "prompts.jsonl").write_text(asked)
    answers = {}
    for way, dola in DOLA.items():
        keys = {"model_path": CHECKPOINT, "device": "cpu", "dtype": "float32", "generation.max_new_tokens": 24} | dola
        keys |= {"batch_size": 5, "prompts": folder / "prompts.jsonl", "output": folder / f"{way}.jsonl"}
        assert answer.run([f"{key}={value}" for key, value in keys.items()]) == 0
        said = {
            line["id"]: line["text"] for line in map(json.loads, (folder / f"{way}.jsonl").read_text().splitlines())
        }
        answers[way] = [said[line["id"]] for line in lines]
    assert answers["off"] != answers["on"]
    return answers


@pytest.fixture(scope="module")
def losses(lines: list[dict[str, Any]], model: Any) -> dict[str, list[list[float]]]:
    """By question and choice, from `score`."""
    losses: dict[str, list[list[float]]] = {way: [] for way in DOLA}
    for line in lines:
        turns = build_conversation(ROLES, line["question"], line["images"])
        prompt = model.model.prepare_inputs_embeds(
            **model.processor(conversations=turns, images=load_pil_images(turns))
        )
        for way, dola in DOLA.items():
            choices = []
            for text in CHOICES:
                ids = torch.tensor([model.processor.tokenizer.encode(f" {text}", add_special_tokens=False)])
                choices.append(
                    -model.model.score(prompt, continuation_ids=ids, configs=[DoLaConfig(**dola)]).mean().item()
                )
            losses[way].append(choices)
    return losses


@pytest.mark.parametrize("processes", [1, 2])
def test_the_harness_gives_the_answers_of_a_batch_run_and_the_losses_of_score(
    processes: int,
    lines: list[dict[str, Any]],
    folder: Path,
    answers: dict[str, list[str]],
    losses: dict[str, list[list[float]]],
    tmp_path: Path,
) -> None:
    lmms_eval(folder, tmp_path, processes)
    labels = [line["label"] for line in lines]
    for way in DOLA:
        (path,) = (tmp_path / way).rglob("*_results.json")
        results = json.loads(path.read_text())["results"]
        assert logged(tmp_path / way, "pope_scenes") == [text.split(".")[0] for text in answers[way]]
        right = [text.split(",")[0].lower() == label for text, label in zip(answers[way], labels, strict=True)]
        assert results["pope_scenes"]["yes_or_no,none"] == pytest.approx(sum(right) / 23)

        choices = logged(tmp_path / way, "choose_scenes")
        for pairs, text, own in zip(choices, answers[way], losses[way], strict=True):
            assert [float(loss) for loss, _ in pairs] == pytest.approx(own, abs=1e-4)
            assert [greedy == "True" for _, greedy in pairs] == [text.startswith(choice) for choice in CHOICES]
        right = [
            own.index(min(own)) == ["yes", "no"].index(label) for own, label in zip(losses[way], labels, strict=True)
        ]
        assert results["choose_scenes"]["acc,none"] == pytest.approx(sum(right) / 23)


def test_the_served_model_gives_the_plugins_figures(
    lines: list[dict[str, Any]], folder: Path, answers: dict[str, list[str]], tmp_path: Path
) -> None:
    """lmms-eval asks `transformers serve`, two questions at a time."""
    export(CHECKPOINT, tmp_path / "demo", *[f"{key}={value}" for key, value in DOLA["on"].items()])
    keys = f"model_version={tmp_path / 'demo'},api_key=none,num_cpus=2"
    with serve(tmp_path / "demo", tmp_path) as address:
        run(folder, "--model", "async_openai", "--model_args", f"base_url={address},{keys}", "--tasks", "pope_scenes",
            "--log_samples", "--output_path", str(tmp_path / "on"))  # fmt: skip
    assert [text.strip() for text in logged(tmp_path / "on", "pope_scenes")] == answers["on"]
    (path,) = (tmp_path / "on").rglob("*_results.json")
    right = [text.split(",")[0].lower() == line["label"] for text, line in zip(answers["on"], lines, strict=True)]
    assert json.loads(path.read_text())["results"]["pope_scenes"]["yes_or_no,none"] == pytest.approx(sum(right) / 23)


def request(model: Any, *args: Any, images: Any = None) -> Any:
    """A request of a task of one document; the arguments are those before `doc_to_visual`."""
    model.task_dict = {"task": {"test": [{}]}}
    return SimpleNamespace(args=(*args, lambda doc: images, 0, "task", "test"))


def test_loss_is_least_for_what_the_model_says_and_only_that_is_greedy(model: Any) -> None:
    picture = load_pil_images([{"images": [str(CHECKPOINT.parent / "images" / "scene.png")]}])
    text = "Describe the image."
    said = model.generate_until([request(model, text, {"max_new_tokens": 8}, images=picture)])[0]
    choices = [said, lambda doc: "There are two shapes.", f" {said}"]
    results = model.loglikelihood([request(model, text, choice, images=picture) for choice in choices])
    pairs = [result.text for result in results]
    assert [greedy for _, greedy in pairs] == [True, False, True]
    assert pairs[0] == pytest.approx(pairs[2]) and 0 <= pairs[0][0] < pairs[1][0]


def test_images_go_where_the_text_has_them(model: Any) -> None:
    image = load_pil_images([{"images": [str(CHECKPOINT.parent / "images" / "scene.png")]}])[0]
    for text, images, content in (
        ("A <image> B <image>", 2, "A <image_placeholder> B <image_placeholder>"),
        ("A <image> B", 2, "<image_placeholder>\n<image_placeholder>\nA  B"),
        ("A", 1, "<image_placeholder>\nA"),
        ("A <image>", 0, "A "),
    ):
        turns = model.turns(*[request(model, text, images=[image] * images).args[i] for i in range(5)])
        assert turns[0]["content"] == content
        assert load_pil_images(turns) == [image] * images


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"until": ["\n\n"], "temperature": 0, "top_p": 0, "image_aspect_ratio": "pad"}, {"do_sample": False}),
        ({"temperature": 0.7, "top_p": None}, {"do_sample": True, "temperature": 0.7}),
        ({"temperature": 0.7, "do_sample": False}, {"do_sample": False}),
        ({"temperature": 0.0, "do_sample": True}, {"do_sample": False}),
        ({"do_sample": True, "num_beams": 2}, {"do_sample": True, "num_beams": 2}),
        ({"max_new_tokens": 3}, {"do_sample": False, "max_new_tokens": 3}),
        ({}, {"do_sample": False}),
    ],
)
def test_arguments_of_a_task(model: Any, given: dict[str, Any], expected: dict[str, Any]) -> None:
    assert model.arguments(given) == {"max_new_tokens": 512} | expected


def test_repeated_requests_are_drawn_anew_and_the_same_in_every_run(model: Any) -> None:
    kwargs = {"do_sample": True, "temperature": 5.0, "max_new_tokens": 8}
    requests = [request(model, "Hello?", kwargs)] * 3
    first = model.generate_until(requests)
    assert len({*first, ""}) == 4
    assert model.generate_until(requests) == first


def test_answers_come_in_the_order_of_the_requests(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the windows, the lengths, and the arguments that requests are grouped by."""
    monkeypatch.setattr(program, "WINDOW", 1)
    picture = load_pil_images([{"images": [str(CHECKPOINT.parent / "images" / "scene.png")]}])
    texts = ["What is in the top left?", "Where is the square?", "How many shapes are there?", "Hello?", "Red?"]
    requests = [request(model, text, {"max_new_tokens": 6 + i % 2}, images=picture) for i, text in enumerate(texts * 2)]
    answers = model.generate_until(requests)
    assert answers == [model.generate_until([each])[0] for each in requests]
    assert len(set(answers)) >= 6


def test_another_method(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    picture = load_pil_images([{"images": [str(CHECKPOINT.parent / "images" / "wide.png")]}])
    sled = get_model("janus_dola")(**MODEL, method="sled", bucket_id=1)
    for text in ("Describe the image.", "Hello?"):
        answers = sled.generate_until([request(sled, text, {"max_new_tokens": 24}, images=picture)])
        asked = request(model, text, {"max_new_tokens": 24}, images=picture)
        assert answers != model.generate_until([asked])  # DoLa
        with monkeypatch.context() as patch:
            patch.setattr(model, "options", sled.options)
            assert answers == model.generate_until([asked])


def test_cut() -> None:
    assert program.cut("a b. c\n\nd", ["\n\n", ".", ""]) == "a b"
    assert program.cut("a b ", []) == "a b"


def test_errors(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="unknown key 'alpa', did you mean 'alpha'"):
        get_model("janus_dola")(**MODEL, alpa=0.2)
    with pytest.raises(ValueError, match="task/test/0: janus_dola takes images alone, got str"):
        model.generate_until([request(model, "What?", {}, images=["film.mp4"])])
    with pytest.raises(ValueError, match="num_return_sequences must be left off"):
        model.generate_until([request(model, "What?", {"num_return_sequences": 2, "num_beams": 2})])
    monkeypatch.setattr(program, "answer_many", lambda *args: [(args[2][0], Outcome("out of memory"))])
    with pytest.raises(ValueError, match="task/test/0/1: out of memory"):
        model.generate_until([request(model, "What?", {})])
    with pytest.raises(NotImplementedError, match="one question at a time"):
        model.generate_until_multi_round([])
