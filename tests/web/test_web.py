"""The page in Chromium, and its API: the answers are those of the command line, for everybody at once."""

import json
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("gradio")

import httpx
import numpy as np
from conftest import CHECKPOINT, Fails
from gradio_client import Client, handle_file
from PIL import Image

from janus.image_generation import build_prompt, generate_images
from janus_dola import DoLaConfig, DoLaTrace
from janus_dola.programs import answer, checkpoint, keys, web
from janus_dola.programs.differences import differences
from janus_dola.programs.options import read_config
from janus_dola.programs.prompts import build_conversation
from janus_dola.programs.web.side_by_side import answer_both
from janus_dola.programs.web.token_view import pieces, token_view

ROOT = Path(__file__).parents[2]
IMAGES = ROOT / "demo" / "images"
DESCRIBE = "Describe the image."
CPU = ["device=cpu", "generation.max_new_tokens=64"]


def serve(*argv: str) -> tuple[Any, Any, Any]:
    config = read_config(web.WebConfig, [*CPU, *argv])
    model, processor = checkpoint.load(config)
    return web.serve(config, model, processor), model, processor


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """The demo's page."""
    blocks, _, _ = serve()
    yield blocks.local_url
    blocks.close()


@pytest.fixture(scope="module")
def slow() -> Iterator[tuple[str, Callable[[], int]]]:
    """The golden checkpoint's page: its answers have 2,000 tokens; it also draws. And how often its model was run."""
    blocks, model, _ = serve(
        f"model_path={CHECKPOINT}", "text_to_image=true", "generation.max_new_tokens=2000",
        "generation.min_new_tokens=2000", "alpha=1", "candidate_layers=[]",
    )  # fmt: skip
    steps: list[int] = []
    handle = model.model.language_model.model.register_forward_hook(lambda *_: steps.append(1))
    yield blocks.local_url, lambda: len(steps)
    handle.remove()
    blocks.close()


@pytest.fixture
def open_page(browser: Any) -> Iterator[Callable[..., Any]]:
    """Opens a page; there must be no request to another host, and no error in its console."""
    contexts, elsewhere, errors = [], [], []

    def open_page(url: str, width: int = 1280, height: int = 900, **how: Any) -> Any:
        contexts.append(browser.new_context(viewport={"width": width, "height": height}, **how))
        page = contexts[-1].new_page()
        page.set_default_timeout(30_000)
        page.on("request", lambda r: elsewhere.append(r.url) if not r.url.startswith((url, "data:", "blob:")) else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(url)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert (elsewhere, errors) == ([], [])


def ask(page: Any, question: str, *pictures: Path) -> None:
    """Asks, and waits for the answers."""
    tokens = "() => document.querySelector('#tokens .tokens')?.textContent"
    before = page.evaluate(tokens)
    if pictures:
        page.locator("#question input[type=file]").evaluate("input => { input.value = '' }")  # as a click does
        page.set_input_files("#question input[type=file]", pictures)
        page.locator("#question .thumbnail-item, #question .thumbnail-image").nth(len(pictures) - 1).wait_for()
    page.fill("#question textarea", question)
    page.press("#question textarea", "Enter")
    page.wait_for_function(f"before => (now => now && now != before)(({tokens})())", arg=before)


def shown(page: Any) -> list[str]:
    """The last answers with DoLa off and on."""
    return [page.locator(f"#{way} [data-testid=bot]").last.inner_text() for way in ("off", "on")]


def command(page: Any) -> str:
    """What the button copies."""
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.locator("#command button[aria-label*=Copy i]").click()
    return page.evaluate("navigator.clipboard.readText()")


def cli(capsys: Any, *argv: str) -> list[str]:
    """The answers with DoLa off and on that the command line prints."""
    capsys.readouterr()
    answer.run([*argv, "device=cpu"])
    return [text for _, text in re.findall(r"^DoLa (off|on ) *(.*)\n", capsys.readouterr().out, re.M)]


def texts(result: Any) -> list[str]:
    """The last answers with DoLa off and on, of what /ask returned."""
    return [re.sub("</?mark>", "", messages[-1]["content"][0]["text"]) for messages in result[:2]]


def message(text: str, *pictures: Path) -> dict[str, Any]:
    return {"text": text, "files": [handle_file(str(picture)) for picture in pictures]}


def test_upload_ask_change_look_and_copy(url: str, open_page: Any, capsys: Any) -> None:
    page = open_page(url)
    asked = [f"image={IMAGES / 'habit.png'}", f"question={DESCRIBE}", *CPU, "compare=true"]
    ask(page, DESCRIBE, IMAGES / "habit.png")
    first = shown(page)
    assert (
        not page.locator("#off, #on").locator("button[aria-label*=Copy i], button[title*=Copy i]").count()
    )  # of marks
    assert first == cli(capsys, *asked) and first[0] != first[1]
    assert page.locator("#off img").get_attribute("src").endswith("/habit.png")
    for way, parts in zip(("off", "on"), differences(*first), strict=True):
        assert page.locator(f"#{way} mark").all_text_contents() == [text for text, differs in parts if differs] != []
    assert page.locator("#about a").get_attribute("href") == "https://arxiv.org/abs/2309.03883"

    config = read_config(answer.AnswerConfig, asked)
    model, processor = checkpoint.load(config)
    turns = build_conversation(config.roles, DESCRIBE, config.images)
    *_, (_, trace) = answer_both(model, processor, config, [turns, turns])
    tokens = page.locator("#tokens .token")
    T = int(trace.lengths[0])
    changed = [t for t in range(T) if trace.tokens[0, t] != trace.mature_tokens[0, t]]
    assert tokens.count() == T and changed
    is_changed = "all => all.map(each => getComputedStyle(each).textDecorationLine == 'underline')"
    assert tokens.evaluate_all(is_changed) == [t in changed for t in range(T)]
    # The one with the largest JSD is the darkest; its numbers show when the mouse is over it, and only then.
    opacity = "all => all.map(each => +(getComputedStyle(each).backgroundColor.match(/([\\d.]+)\\)$/)[1]))"
    shades = tokens.evaluate_all(opacity)
    jsd = trace.jsd[0].max(-1).values.tolist()
    assert shades.index(max(shades)) == jsd.index(max(jsd))
    t = changed[0]
    about = tokens.nth(t).locator(".about")
    assert not about.is_visible()
    tokens.nth(t).hover()
    assert about.is_visible() and about.inner_text() == (
        f"M layer {trace.layers[0, t]} · JSD {trace.jsd[0, t].max():.4f} · |V_head| {trace.head_sizes[0, t]} · "
        f"log q_N {trace.mature_logprobs[0, t]:.3f} · log p̂ {trace.logprobs[0, t]:.3f}\n"
        f"The final layer alone would have said “{processor.tokenizer.decode(trace.mature_tokens[0, t]).strip()}”."
    )
    assert page.locator("#heat img").evaluate("img => img.decode().then(() => img.naturalWidth)") > 500

    # Another α, in a new conversation.
    page.get_by_role("button", name="New conversation").click()
    page.wait_for_function("() => !document.querySelector('#tokens .token')")
    assert page.locator("#off [data-testid=bot]").count() == 0 and not page.locator("#command").is_visible()
    page.get_by_label("number input for α").fill("0.9")
    page.get_by_label("number input for α").press("Tab")
    ask(page, DESCRIBE, IMAGES / "habit.png")
    assert shown(page) == cli(capsys, *asked, "alpha=0.9") != first

    copied = command(page)
    assert "alpha=0.9" in copied
    done = subprocess.run(
        ["bash", "-c", copied.replace("python ", f"{shlex.quote(sys.executable)} ", 1)],
        capture_output=True, text=True, cwd=ROOT, check=True,
    )  # fmt: skip
    assert [f"DoLa off  {shown(page)[0]}", f"DoLa on   {shown(page)[1]}"] == [
        line for line in done.stdout.splitlines() if line.startswith("DoLa")
    ]


def test_an_example_and_a_conversation_that_goes_on(url: str, open_page: Any, capsys: Any) -> None:
    page = open_page(url, color_scheme="dark")
    page.get_by_text("lower: 2, 4, 6, 8, 10").click()
    page.get_by_text("Describe the picture.").click()
    page.wait_for_function("() => document.querySelector('#question textarea').value")
    ask(page, page.input_value("#question textarea"))
    first = shown(page)
    assert first[0] != first[1]
    ask(page, "How many shapes <b>are</b> there?")
    assert page.locator("#off [data-testid=user]").last.inner_text() == "How many shapes <b>are</b> there?"
    lines = command(page).splitlines()
    assert len(lines) == 2  # each answer has its own conversation
    for line, text, before, on in zip(lines, shown(page), first, ("false", "true"), strict=True):
        argv = shlex.split(line)[2:]
        assert f"use_dola_lm={on}" in argv and json.dumps(before) in line
        capsys.readouterr()
        answer.run([*argv, "device=cpu"])
        assert capsys.readouterr().out == text + "\n"


def test_an_error_is_a_sentence(url: str, open_page: Any, tmp_path: Path) -> None:
    page = open_page(url)
    (tmp_path / "text.png").write_text("no picture")
    page.set_input_files("#question input[type=file]", tmp_path / "text.png")
    page.locator("#question .thumbnail-item, #question .thumbnail-image").first.wait_for()
    page.fill("#question textarea", "What is this?")
    page.press("#question textarea", "Enter")
    toast = page.get_by_test_id("toast-body")
    toast.wait_for()
    assert "text.png must be a picture that Pillow can read" in toast.inner_text()
    assert "Traceback" not in page.inner_text("body")
    assert page.input_value("#question textarea") == "What is this?"  # to be asked again
    assert page.locator("#off [data-testid=user]").count() == 0


def test_on_a_phone(url: str, open_page: Any) -> None:
    page = open_page(url, 390, 844, is_mobile=True, has_touch=True)
    send = page.get_by_test_id("submit-button") if page.get_by_test_id("submit-button").count() else None
    page.set_input_files("#question input[type=file]", IMAGES / "habit.png")
    page.locator("#question .thumbnail-item, #question .thumbnail-image").first.wait_for()
    box = page.locator("#question textarea")
    assert box.bounding_box()["y"] < 844  # without scrolling
    box.fill(DESCRIBE)
    (send or page.locator("#question .submit-button")).tap()
    token = page.locator("#tokens .token.changed").first
    token.wait_for()
    seen = page.locator("#off").evaluate("""all => {  // above its answer, not scrolled away
        const [place, picture] = [all, all.querySelector('img')].map(each => each.getBoundingClientRect())
        return picture.height > 20 && picture.top >= place.top && picture.bottom <= place.bottom
    }""")
    assert seen
    token.tap()
    about = token.locator(".about")
    about.wait_for()
    area = about.bounding_box()
    assert area["x"] >= 0 and area["x"] + area["width"] <= 390
    assert about.evaluate("each => each.scrollHeight <= each.clientHeight + 1")  # nothing is cut off
    assert page.evaluate("document.documentElement.scrollWidth") == 390


def test_the_api_answers_as_the_command_line(url: str, capsys: Any) -> None:
    client = Client(url, verbose=False)
    text, two = "It's \"red\" & <b>$HOME</b>, 红色 🙂?\nOr: 'blue'?", [IMAGES / "one.png", IMAGES / "two.png"]
    for question, pictures, how in (
        (DESCRIBE, [IMAGES / "wide.png"], {}),
        (text, two, {"alpha": 0.3, "layers": [5, 17], "length": 12, "penalty": 1.3}),
        (text, [], {"temperature": 2, "top_p": 0.9, "seed": 7, "bucket_id": 0}),  # an integer, as the slider's end is
        (text, [IMAGES / "one.png"], {"temperature": 1.0, "length": 20, "seed": 8, "layers": [30]}),
        (text, two, {"method": "sled", "alpha": 0.3, "length": 12}),
    ):
        client.reset_session()
        result = client.predict(message(question, *pictures), **how, api_name="/ask")
        argv = shlex.split(result[4])
        assert argv[:2] == ["python", "inference_dola.py"]
        assert [escape(answer, quote=False) for answer in cli(capsys, *argv[2:])] == texts(result), how
        if how.get("layers") == [30]:  # nothing to subtract, nothing to draw
            assert result[3] is None and texts(result)[0] == texts(result)[1]
        else:
            with Image.open(result[3]) as heat:
                assert heat.format == "PNG" and heat.getpixel((0, 0))[3] == 0  # no ground: the page may be dark
        assert 'class="token' in result[2]


def test_eight_at_once_get_what_each_would_get_alone(url: str) -> None:
    asked = [
        ((question, IMAGES / picture), {"temperature": temperature, "seed": seed, "length": 16})
        for seed, (question, picture, temperature) in enumerate(
            (question, picture, temperature)
            for question in (DESCRIBE, "How many shapes are there?")
            for picture in ("one.png", "wide.png")
            for temperature in (0, 1.5)
        )
    ]

    config = read_config(web.WebConfig, CPU)
    model, processor = checkpoint.load(config)

    def alone(what: Any, how: dict[str, Any]) -> Any:
        turns = build_conversation(config.roles, what[0], [str(what[1])])
        draws = {"do_sample": True, "temperature": how["temperature"]} if how["temperature"] else {"do_sample": False}
        generation = {"max_new_tokens": how["length"], **draws}
        own = replace(config, seed=how["seed"], generation=generation)
        *_, (answers, trace) = answer_both(model, processor, own, [turns, turns])
        return answers, token_view(trace, processor.tokenizer)

    def at_once(what: Any, how: dict[str, Any]) -> Any:
        result = Client(url, verbose=False).predict(message(*what), **how, api_name="/ask")
        return texts(result), result[2]

    want = [alone(*each) for each in asked]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda each: at_once(*each), asked)) == want
    assert len({str(each) for each in want}) >= 5


def test_threads_draw_as_if_they_were_alone() -> None:
    """Both answers of a page draw at the same time; so do a page and a script that uses its process."""
    config = replace(read_config(web.WebConfig, CPU), generation={"do_sample": True, "max_new_tokens": 30})
    model, processor = checkpoint.load(config)
    turns = build_conversation(config.roles, DESCRIBE, [str(IMAGES / "four.png")])
    state = torch.get_rng_state()

    def both(seed: int) -> list[str]:
        *_, (texts, _) = answer_both(model, processor, replace(config, seed=seed), [turns, turns])
        return texts

    alone = [both(seed) for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(both, range(4))) == alone
    assert torch.equal(torch.get_rng_state(), state)


def settles(steps: Callable[[], int]) -> bool:
    """Whether the model stops being run, well before an answer would end."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        before = steps()
        time.sleep(1)
        if steps() == before:
            return True
    return False


def test_pictures_come_to_the_models_size_one_after_the_other(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """All pictures of a conversation were in memory at once, at their full size."""
    config = replace(read_config(web.WebConfig, CPU), generation={"max_new_tokens": 2})
    model, processor = checkpoint.load(config)
    sizes: list[tuple[int, int]] = []
    prepare = type(processor).__call__

    def watched(self: Any, **given: Any) -> Any:
        sizes.extend(image.size for image in given["images"])
        return prepare(self, **given)

    monkeypatch.setattr(type(processor), "__call__", watched)
    Image.new("RGB", (2000, 1000)).save(tmp_path / "large.png")
    turns = build_conversation(config.roles, "What?", [str(tmp_path / "large.png"), str(IMAGES / "one.png")])
    list(answer_both(model, processor, config, [turns, turns]))
    assert sizes == [(processor.image_processor.image_size,) * 2] * 2


@pytest.mark.parametrize("way", ["closed", "stop", "client"])
def test_who_goes_away_stops_the_answer(slow: Any, open_page: Any, way: str) -> None:
    url, steps = slow
    assert settles(steps)
    before = steps()
    if way == "client":
        job = Client(url, verbose=False).submit(message("Why?"), api_name="/ask")
        while steps() < before + 20:
            time.sleep(0.05)
        job.cancel()
    else:
        page = open_page(url)
        page.fill("#question textarea", "Why?")
        page.press("#question textarea", "Enter")
        page.wait_for_function("() => document.querySelector('#on [data-testid=bot]')?.innerText.length > 20")
        text = page.locator("#off [data-testid=bot]").inner_text()
        page.wait_for_function(
            "text => document.querySelector('#off [data-testid=bot]').innerText != text", arg=text
        )  # both stream
        page.close() if way == "closed" else page.get_by_role("button", name="Stop").click()
    assert settles(steps)
    assert 20 < steps() - before < 3000


def test_what_is_out_of_bounds_is_refused(url: str, slow: Any, tmp_path: Path) -> None:
    client = Client(url, verbose=False)
    for given, how, says in (
        (message(" "), {}, "question must not be empty"),
        (message("<image_placeholder> What?"), {}, "images must be as many as the <image_placeholder>"),
        (message("What?"), {"length": 65}, "greater than maximum value 64"),
        (message("What?"), {"alpha": -0.1}, "less than minimum value 0"),
        (message("What?"), {"seed": 2**70}, "seed must be an integer of 64 bits"),
        (message("What? " * 9999), {}, "too long: the prompt's "),
    ):
        with pytest.raises(Exception, match=re.escape(says)) as raised:
            client.predict(given, **how, api_name="/ask")
        assert "Traceback" not in str(raised.value)
    with pytest.raises(Exception, match="prompt must not be empty"):
        Client(slow[0], verbose=False).predict(" ", api_name="/draw")
    # A file of the server's is nobody's upload.
    Image.new("RGB", (8, 8)).save(tmp_path / "private.png")
    file = {"path": str(tmp_path / "private.png"), "meta": {"_type": "gradio.FileData"}}
    data = [{"text": "What?", "files": [file]}, 0.1, 2, [], 0, 1, 20, 1, 0, "dola"]
    event = httpx.post(f"{url}gradio_api/call/ask", json={"data": data}).json()["event_id"]
    assert "event: error" in httpx.get(f"{url}gradio_api/call/ask/{event}").text


def test_draw(slow: Any, url: str, open_page: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five pictures, those of the library; the demo's page does not offer it."""
    model, processor = checkpoint.load(read_config(web.WebConfig, [f"model_path={CHECKPOINT}", "device=cpu"]))
    generator = torch.Generator().manual_seed(3)
    prompt = build_prompt(processor, "A red circle")
    _, want = generate_images(model, processor, prompt, 0.7, 5, 4, 16, 64, generator=generator)
    found = Client(slow[0], verbose=False).predict("A red circle", 4, 0.7, 3, api_name="/draw")
    pictures = [np.asarray(Image.open(each["image"]).convert("RGB")) for each in found]
    assert len(pictures) == 5 and all(map(np.array_equal, pictures, want))
    page = open_page(slow[0])
    page.get_by_role("tab", name="Draw").click()
    page.fill("#prompt textarea", "A red circle")
    page.get_by_role("button", name="Draw", exact=True).click()
    page.locator("#pictures img").nth(4).wait_for()
    assert open_page(url).get_by_role("tab").count() == 0
    assert read_config(web.WebConfig, ["config=janus_pro_7b"]).text_to_image


def test_what_cannot_be_a_page_is_one_line(fails: Fails, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "generation.num_beams must be 1" in fails(web.run, "generation.num_beams=2")
    assert "did you mean 'generation.top_k'" in fails(web.run, "generation.topk=2")
    assert "did you mean 'host'" in fails(web.run, "hosts=0.0.0.0")
    monkeypatch.setattr(keys, "find_spec", lambda name: None)
    assert "pip install 'janus-dola[web]'" in fails(web.run)


class Bytes:
    """A tokenizer of bytes, with an end."""

    all_special_ids = [256]

    def decode(self, tokens: Any) -> str:
        ids = [int(token) for token in tokens]
        return bytes(i for i in ids if i < 256).decode(errors="replace") + "</s>" * (256 in ids)


def test_pieces_of_characters_and_markup() -> None:
    text = "a <i>\n红&"
    tokens = [*text.encode(), 256]
    assert pieces(Bytes(), tokens) == ["a", " ", "<", "i", ">", "⏎\n", "·", "·", "红", "&", " </s>"]
    trace = DoLaTrace()
    T = len(tokens)
    trace.num_layers, trace.traced_layers, trace.lengths = 4, (2, 3), torch.tensor([T])
    trace.tokens = torch.tensor([tokens])
    trace.mature_tokens = trace.tokens.clone()
    trace.mature_tokens[0, 2] = ord(">")
    trace.layers = torch.tensor([[2, 3, 4] * 4])[:, :T]  # 4: nothing to subtract
    trace.head_sizes = torch.ones(1, T, dtype=torch.long)
    trace.mature_logprobs = trace.logprobs = torch.zeros(1, T)
    trace.jsd = torch.tensor([[[0.1, 0.2]] * T])
    html = token_view(trace, Bytes())
    assert html.count('class="token"') == T - 1 and html.count('class="token changed"') == 1
    assert "<i>" not in html and "would have said “&gt;”" in html and "something else (1)" in html
    assert re.findall(r"--jsd: ([\d.]+)", html)[:4] == ["0.500", "1.000", "0.000", "0.500"]
    assert "M none · JSD 0.0000" in html
    assert DoLaConfig().use_dola_lm


def test_help_and_the_console_script() -> None:
    """`janus-dola web` says what it is before it needs a model."""
    code = "from janus_dola.programs import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "web", "--help"], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert "janus-dola web open=true" in done.stdout and "text_to_image: false" in done.stdout
    assert "prompts:" not in done.stdout
