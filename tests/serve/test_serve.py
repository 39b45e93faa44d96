"""transformers' own server on an exported folder: what it answers to OpenAI's client is what inference_dola.py says."""

import base64
import json
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest

openai = pytest.importorskip("openai")
pytest.importorskip("fastapi")

from conftest import export  # noqa: E402
from serving import serve  # noqa: E402

from benchmarks import serve as benchmark  # noqa: E402
from janus_dola.programs import answer  # noqa: E402

DEMO = Path(__file__).parents[2] / "demo"
SCENE, WIDE = str(DEMO / "images" / "scene.png"), str(DEMO / "images" / "wide.png")
ASKED = [
    {"question": "Describe the image.", "images": [SCENE]},
    {"question": "Is there a circle in the image?", "images": [SCENE]},
    {"question": "How many red shapes are there?", "images": [SCENE]},
    {"question": "Describe the image.", "images": [WIDE]},
    {"question": "What is in the top left?", "images": [WIDE]},
    {"question": "Is there a blue ring in the image?", "images": [WIDE]},
    {"question": "How many shapes are there?", "images": []},
    {"question": "Describe the images.", "images": [WIDE, SCENE]},
]
# The folder's own configuration; the baseline; one whose answers are others.
DOLA = {"saved": {}, "off": {"use_dola_lm": False}, "layer 1": {"alpha": 0.0, "candidate_layers": [1]}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(DEMO / "checkpoint", tmp_path_factory.mktemp("exported") / "demo", "alpha=0.2", "bucket_id=1")


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("server") / "serve.log"


@pytest.fixture(scope="module")
def client(folder: Path, log: Path) -> Iterator[Any]:
    with serve(folder, log.parent) as address:
        yield openai.OpenAI(base_url=address, api_key="none")


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], str]:
    """What a batch run of inference_dola.py answers, by configuration and question."""
    folder = tmp_path_factory.mktemp("expected")
    lines = [
        {"id": f"{name} {i}"} | asked | {"alpha": 0.2, "bucket_id": 1} | DOLA[name]
        for name, (i, asked) in product(DOLA, enumerate(ASKED))
    ]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    keys = [f"model_path={DEMO / 'checkpoint'}", "device=cpu", f"prompts={folder / 'prompts.jsonl'}"]
    assert answer.run([*keys, f"output={folder / 'out.jsonl'}"]) == 0
    said = {line["id"]: line["text"] for line in map(json.loads, (folder / "out.jsonl").read_text().splitlines())}
    return {(name, i): said[f"{name} {i}"] for name, i in product(DOLA, range(len(ASKED)))}


def data_url(path: str) -> str:
    return "data:image/png;base64," + base64.b64encode(Path(path).read_bytes()).decode()


def create(client: Any, folder: Path, question: str, urls: list[str], dola: dict[str, Any], **more: Any) -> Any:
    content = [{"type": "text", "text": question}, *({"type": "image_url", "image_url": {"url": url}} for url in urls)]
    more |= {"extra_body": {"generation_config": json.dumps(dola)}} if dola else {}
    return client.chat.completions.create(model=str(folder), messages=[{"role": "user", "content": content}], **more)


def ask(client: Any, folder: Path, i: int, name: str = "saved") -> str:
    asked: dict[str, Any] = ASKED[i]
    answer = create(client, folder, asked["question"], [data_url(path) for path in asked["images"]], DOLA[name])
    assert answer.choices[0].finish_reason == "stop"
    return answer.choices[0].message.content.strip()  # the server leaves the space after "<|Assistant|>:"


@pytest.mark.parametrize("name", DOLA)
def test_it_answers_as_inference_dola_does(
    client: Any, folder: Path, expected: dict[tuple[str, int], str], name: str
) -> None:
    assert [ask(client, folder, i, name) for i in range(len(ASKED))] == [expected[name, i] for i in range(len(ASKED))]
    if name == "layer 1":
        assert any(expected[name, i] != expected["off", i] for i in range(len(ASKED)))


def test_a_wrong_key_of_dola_is_an_error_and_the_next_question_is_answered(
    client: Any, folder: Path, log: Path, expected: dict[tuple[str, int], str]
) -> None:
    before, wrong = len(log.read_text()), (folder, "Describe the image.", [data_url(SCENE)], {"alpha": 7})
    with pytest.raises(openai.InternalServerError):
        create(client.with_options(max_retries=0), *wrong)
    with pytest.raises(openai.APIError, match="streaming"):  # found when the answer has begun, with a 200
        list(create(client, *wrong, stream=True))
    # The server has closed the connection; the client makes another.
    assert ask(client, folder, 1) == expected["saved", 1]
    assert "alpha must be in [0, 1], got 7" in log.read_text()[before:]  # with a traceback


def test_the_benchmark(client: Any, folder: Path, capsys: Any) -> None:
    options = ["clients=[1,2]", "requests=1", "rounds=1", f"image={WIDE}"]
    benchmark.run([f"model={folder}", f"urls=[{client.base_url}]", *options])
    rows = [line.split("|")[1:4] for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert [int(row[0]) for row in rows[1:]] == [1, 2] and all(float(cell) > 0 for row in rows[1:] for cell in row[1:])
