"""The report of a batch run in a browser: what it shows, its filters, light and dark, on a phone, of 500 prompts."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("playwright")

import numpy as np
from PIL import Image

from janus_dola import DoLaConfig
from janus_dola.programs import answer
from janus_dola.programs.differences import differences
from janus_dola.programs.measures import interval, normalize
from janus_dola.programs.prompts import Prompt
from janus_dola.programs.report import write_report
from janus_dola.programs.results import Results

GOLDEN = Path(__file__).parents[1] / "golden"
IMAGES = GOLDEN / "expected" / "images"
KINDS = ("changed", "gained", "lost", "error")


@pytest.fixture(scope="module")
def run(tmp_path_factory: Any) -> tuple[Path, list[dict[str, Any]], dict[Any, dict[str, Any]]]:
    """A run on the golden checkpoint: its report, its prompts, and its lines by id.

    A prompt's answer is what DoLa said, what the baseline said, or neither; two prompts are errors.
    """
    folder = tmp_path_factory.mktemp("run")
    asked = [
        "What is in the image?",
        "图中有什么？",
        "<script>document.title = 'owned'</script><b>What?</b>\n\nSay it.",
    ]
    prompts: list[dict[str, Any]] = [
        {"id": f"<i>{i}</i>", "question": asked[i % 3], "images": [str(IMAGES / name)], "use_dola_lm": i % 4 != 3}
        for i, name in enumerate(["wide.png", "tall.png", "rgba.png", "square.png"] * 3)
    ]

    def lines(name: str) -> dict[Any, dict[str, Any]]:
        file = folder / f"{name}.prompts.jsonl"
        file.write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts) + "broken\n")
        arguments = [f"model_path={GOLDEN / 'tiny_janus'}", "device=cpu", "generation.max_new_tokens=12", "alpha=0.5"]
        files = [f"prompts={file}", f"output={folder / name}.jsonl", f"report={folder / name}.html"]
        assert answer.run([*arguments, *files, "compare=true"]) == 1
        found = map(json.loads, (folder / f"{name}.jsonl").read_text().splitlines())
        return {line["id"]: line for line in found}

    first = lines("first")
    for i, prompt in enumerate(prompts):
        line = first[prompt["id"]]
        prompt["answer"] = (line["text"], line["text_baseline"], "Nothing.")[i // 2 % 3]
    prompts.append({"id": "gone", "question": "What?", "images": ["nowhere.png"], "answer": "Nothing."})
    return folder / "second.html", prompts, lines("second")


def right(line: dict[str, Any], prompt: dict[str, Any]) -> tuple[bool, bool]:
    """Whether the baseline's answer is right, and DoLa's."""
    off, on = (normalize(line[key]) == normalize(prompt["answer"]) for key in ("text_baseline", "text"))
    assert on == line["correct"]
    return off, on


@pytest.fixture
def kinds(run: Any) -> dict[str, list[str]]:
    """Kind -> the ids that are of it, in the page's order."""
    _, prompts, lines = run
    found: dict[str, list[str]] = {kind: [] for kind in KINDS}
    for prompt in [*prompts, {"id": "line 14"}]:
        line = lines[prompt["id"]]
        if "error" in line:
            found["error"].append(line["id"])
            continue
        if line["text"] != line["text_baseline"]:
            found["changed"].append(line["id"])
        if (judged := right(line, prompt)) in ((False, True), (True, False)):
            found["gained" if judged[1] else "lost"].append(line["id"])
    assert all(found.values()) and len(found["changed"]) < len(prompts) - 1
    return found


@pytest.fixture
def page(browser: Any, run: Any) -> Any:
    """The report, opened from disk; it must ask for nothing else, and complain of nothing."""
    context = browser.new_context(viewport={"width": 1200, "height": 900})
    page = context.new_page()
    requests: list[str] = []
    said: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    page.on("console", lambda message: said.append(message.text))
    page.goto(run[0].as_uri())
    yield page
    assert [url for url in requests if not url.startswith("data:image/jpeg;base64,")] == [run[0].as_uri()]
    assert said == []
    context.close()


def test_each_prompt_with_its_answers(page: Any, run: Any) -> None:
    _, prompts, lines = run
    articles = page.locator("article").all()
    assert [article.locator(".head b").text_content() for article in articles] == [p["id"] for p in prompts] + [
        "line 14"
    ]
    for prompt, article in zip(prompts[:-1], articles, strict=False):
        line = lines[prompt["id"]]
        article.scroll_into_view_if_needed()
        assert article.locator(".body > div:not(.head) .text").first.text_content() == prompt["question"]
        sides = article.locator(".answers > div").all()
        expected = differences(line["text_baseline"], line["text"])
        for side, parts, judged in zip(sides, expected, right(line, prompt), strict=True):
            assert side.locator(".text").text_content() == "".join(text for text, _ in parts)
            assert side.locator("mark").all_text_contents() == [text for text, differs in parts if differs]
            assert ("✓ right" in side.text_content(), "✗ wrong" in side.text_content()) == (judged, not judged)
        shown = article.locator("details pre").all_text_contents()
        assert shown == ([" ".join(map(str, line["layers"]))] if line["layers"] else [])
        (picture,) = article.locator("img").all()
        picture.evaluate("image => image.decode()")
        assert picture.evaluate("image => Math.max(image.naturalWidth, image.naturalHeight)") <= 160
    assert (
        lines["gone"]["error"] in articles[-2].text_content()
        and "no picture: nowhere.png" in articles[-2].text_content()
    )
    assert lines["line 14"]["error"] in articles[-1].text_content()
    assert page.title().endswith("second.jsonl")  # and not owned


def test_filters(page: Any, kinds: dict[str, list[str]]) -> None:
    everything = page.locator("article .head b").all_text_contents()
    for kind in (*KINDS, "all"):
        expected = everything if kind == "all" else kinds[kind]
        label = page.locator(f"label[for={kind}]")
        assert label.inner_text() == f"{kind} {len(expected)}"
        label.click()
        assert page.locator("article:visible .head b").all_text_contents() == expected
    page.keyboard.press("ArrowRight")  # as any radio button
    assert page.locator("article:visible .head b").all_text_contents() == kinds["changed"]


def test_totals(page: Any, run: Any, kinds: dict[str, list[str]]) -> None:
    _, prompts, lines = run
    judged = np.array([right(lines[p["id"]], p) for p in prompts[:-1]], dtype=float)  # [questions, 2]
    off, on = judged.T

    def percent(values: np.ndarray, sign: str = "") -> list[str]:
        low, high = interval(values)
        return [f"{100 * values.mean():{sign}.1f}", f"[{100 * low:{sign}.1f}, {100 * high:{sign}.1f}]"]

    rows = [row.locator("th, td").all_inner_texts() for row in page.locator("#totals tr").all()]
    assert rows[1:] == [
        ["DoLa off", "12", *percent(off), "", "", "", ""],
        ["DoLa on", "12", *percent(on), *percent(on - off, "+"), str(len(kinds["gained"])), str(len(kinds["lost"]))],
    ]
    changed = np.array([lines[p["id"]]["text"] != lines[p["id"]]["text_baseline"] for p in prompts[:-1]], dtype=float)
    share, between = percent(changed)
    assert f"12 prompts answered, 2 errors; DoLa changed {int(changed.sum())}: {share} % {between}" in (
        page.locator("header").inner_text()
    )


def test_light_and_dark_and_on_a_phone(browser: Any, run: Any) -> None:
    grounds = []
    for scheme in ("light", "dark"):
        context = browser.new_context(viewport={"width": 360, "height": 740}, color_scheme=scheme)
        page = context.new_page()
        page.goto(run[0].as_uri())
        assert page.evaluate("document.documentElement.scrollWidth") == 360  # nothing to scroll sideways
        # The totals are all in the first look, each figure with its name: "against off" lay to the right.
        cells = page.locator("#totals tr:last-child td")
        names = cells.evaluate_all("all => all.map(each => getComputedStyle(each, '::before').content)")
        assert names == [
            f'"{name}"' for name in ("questions", "right, %", "95 %", "against off", "95 %", "gained", "lost")
        ]
        for place in [cell.bounding_box() for cell in cells.all()]:
            assert place["x"] >= 0 and place["x"] + place["width"] <= 360 and place["y"] + place["height"] <= 740
        boxes = [side.bounding_box() for side in page.locator("article").first.locator(".answers > div").all()]
        assert boxes[1]["y"] >= boxes[0]["y"] + boxes[0]["height"] and boxes[0]["x"] == boxes[1]["x"]
        colours = page.evaluate(
            "(({color, backgroundColor}) => [color, backgroundColor])(getComputedStyle(document.body))"
        )
        grounds.append([sum(map(int, colour.strip("rgb()").split(","))) for colour in colours])
        context.close()
    (ink, paper), (chalk, board) = grounds
    assert ink < 200 < 600 < paper and board < 200 < 600 < chalk


def test_500_prompts(browser: Any, tmp_path: Path) -> None:
    """Pictures of noise, which compress worst, and answers of 300 words of which a tenth differ."""
    draw = random.Random(0)
    for i in range(25):
        noise = np.random.default_rng(i).integers(0, 256, (320, 320, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / f"{i}.png")
    prompts, lines = [], []
    for i in range(500):
        turns = [{"role": "<|User|>", "content": f"Question {i}?", "images": [str(tmp_path / f"{i % 25}.png")]}]
        prompts.append(Prompt(i, turns, DoLaConfig(), 10, "answer", "yes"))
        words = [f"word{draw.randrange(500)}" for _ in range(300)]
        other = [word if draw.random() < 0.9 else "other" for word in words]
        lines.append({"id": i, "text": " ".join(other), "text_baseline": " ".join(words)})
        lines[-1] |= {"tokens": 300, "layers": [draw.choice([22, 24, 26, 28]) for _ in range(300)]}
        lines[-1] |= {"prompt": prompts[-1].fingerprint}
    settings = {"compare": True, "model_path": "x", "dtype": "torch.float32"} | vars(DoLaConfig())
    with Results(tmp_path / "x.jsonl", settings) as results:
        results.write(lines)
    write_report(tmp_path / "x.html", tmp_path / "x.jsonl", prompts)
    assert (tmp_path / "x.html").stat().st_size < 20e6
    context = browser.new_context(viewport={"width": 1200, "height": 900})
    page = context.new_page()
    page.goto((tmp_path / "x.html").as_uri())
    # Each frame of a scroll through the page, in ms: what is out of sight is not laid out.
    frames = page.evaluate("""async () => {
        const times = []
        const frame = () => new Promise(requestAnimationFrame)
        let last = await frame()
        for (let i = 0; i < 60; i++) {
            scrollTo(0, document.documentElement.scrollHeight * i / 59)
            const now = await frame()
            times.push(now - last)
            last = now
        }
        return times
    }""")
    assert np.median(frames) < 200
    page.locator("article").last.scroll_into_view_if_needed()
    assert page.locator("article").last.locator(".head b").text_content() == "499"
    context.close()
