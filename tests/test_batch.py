"""A file of prompts to a file of answers: the same lines whatever the batches, and however often the run is killed."""

import json
import multiprocessing
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CASES, CHECKPOINT, Fails
from helpers import TALL, TEXT, WIDE, cli_arguments, golden_lines, read, write

from janus.utils.io import load_pil_images
from janus_dola import DoLaConfig, DoLaJanusWrapper, DoLaTrace
from janus_dola.programs import answer as answer_program
from janus_dola.programs import checkpoint
from janus_dola.programs.engine import Task, answer_many
from janus_dola.programs.prompts import Prompt, read_prompts
from janus_dola.programs.results import Results
from janus_dola.programs.runs import lines_of

pytestmark = pytest.mark.usefixtures("loaded_once")

ROOT = Path(__file__).parents[1]


@pytest.fixture
def ask(tmp_path: Path, model: Any, processor: Any) -> Any:
    """Answers lines in a new file, through the library; returns its lines by id."""

    def ask(lines: list[Any], name: str = "out.jsonl", batch_size: int = 4, seed: int = 0, **more: Any) -> Any:
        compare, dola = more.pop("compare", False), more.pop("dola", DoLaConfig())
        path = write(tmp_path / "prompts.jsonl", lines)
        generation = {"max_new_tokens": 12, "do_sample": False} | more
        config = answer_program.AnswerConfig(**vars(dola), generation=generation)
        task, wrapper = answer_program.Compare() if compare else Task(), DoLaJanusWrapper(model, dola)
        prompts, errors = read_prompts(config, path, processor, model.config)
        with Results(tmp_path / name, {}) as results:
            results.write(errors)
            answered = answer_many(wrapper, processor, prompts, task, generation, batch_size, seed)
            results.write(lines_of(task, answered))
        assert wrapper.config == dola
        return read(tmp_path / name)

    return ask


def test_every_batch_size_gives_the_answers_of_one_at_a_time(
    ask: Any, model: Any, processor: Any, expected: dict[str, torch.Tensor]
) -> None:
    lines = golden_lines()
    first = ask(lines, "1.jsonl", 1, max_new_tokens=8)
    assert len(first) == len(lines) == 13
    for size in (2, 5, len(lines)):
        assert ask(lines, f"{size}.jsonl", size, max_new_tokens=8) == first
    answers = ask(lines, "compare.jsonl", 5, compare=True, max_new_tokens=24)
    for name, case in CASES.items():
        for i, golden in enumerate(case["greedy_text"]):
            assert answers[f"{name}/{i}"]["text_baseline"] == golden.strip()
    # and those of the wrapper itself, from what the published processor prepared
    for name in ("single_wide", "two_images", "multi_turn"):
        trace = DoLaTrace()
        ids = DoLaJanusWrapper(model).generate(
            inputs_embeds=expected[f"{name}/inputs_embeds"], attention_mask=expected[f"{name}/attention_mask"],
            max_new_tokens=24, do_sample=False, eos_token_id=481, pad_token_id=481, trace=trace,
        )  # fmt: skip
        line = answers[f"{name}/0"]
        assert line["text"] == processor.tokenizer.decode(ids[0], skip_special_tokens=True).strip()
        assert line["tokens"] == trace.lengths[0] == len(line["layers"])
        assert line["layers"] == trace.layers[0, : trace.lengths[0]].tolist()


def test_tokens_count_up_to_and_with_the_end(ask: Any, expected: dict[str, torch.Tensor]) -> None:
    ends = expected["batch_left_padded/greedy"][:, 4].tolist()  # tokens that come up, as ends of sequence
    off = ask(
        golden_lines(), dola=DoLaConfig(use_dola_lm=False), batch_size=5, max_new_tokens=24, eos_token_id=[481, *ends]
    )
    lengths = set()
    for name, case in CASES.items():
        for i in range(len(case["conversations"])):
            ids = expected[f"{name}/greedy"][i].tolist()
            length = next((t for t, token in enumerate(ids, 1) if token in (481, *ends)), len(ids))
            lengths.add(length)
            assert (off[f"{name}/{i}"]["tokens"], off[f"{name}/{i}"]["layers"]) == (length, None)
    assert len(lengths) > 3


def test_a_stop_string_counts_the_same_in_any_batch(ask: Any) -> None:
    alone = ask(golden_lines(), "1.jsonl", 1, stop_strings=["ing", "L"])
    assert ask(golden_lines(), "5.jsonl", 5, stop_strings=["ing", "L"]) == alone
    assert {line["tokens"] for line in alone.values()} >= {1, 2}


def test_lines_may_have_dola_keys_of_their_own(ask: Any) -> None:
    own: list[dict[str, Any]] = [
        {}, {"use_dola_lm": False}, {"alpha": 0.5}, {"candidate_layers": [5]}, {"bucket_id": 0},
        {"bucket_id": 0, "alpha": 1},
    ]  # fmt: skip
    mixed = ask([WIDE | keys | {"id": i} for i, keys in enumerate(own)] + [TALL | {"id": 9}], compare=True)
    for i, keys in enumerate(own):
        alone = ask([WIDE | {"id": i}], f"{i}.jsonl", dola=DoLaConfig(**keys), compare=True)
        assert mixed[i] == alone[i]
    assert mixed[1]["text"] == mixed[1]["text_baseline"] and mixed[1]["layers"] is None
    assert set(mixed[3]["layers"]) == {5} and set(mixed[4]["layers"]) <= {2, 4, 6, 8, 10}
    assert len({line["text"] for line in mixed.values()}) > 3


def test_sampling_does_not_depend_on_the_other_lines(ask: Any) -> None:
    lines = [TEXT | {"id": name} for name in "abcdef"]
    draw = {"do_sample": True, "temperature": 1.5}
    first = ask(lines, "1.jsonl", 8, **draw)
    assert ask(lines[::-1][:4], "2.jsonl", 1, **draw) == {name: first[name] for name in "fedc"}
    assert len({line["text"] for line in first.values()}) > 3  # the same question, but seeds of their own
    assert ask(lines, "3.jsonl", 8, seed=1, **draw) != first


BAD: dict[str, tuple[Any, str]] = {
    "broken JSON": ('{"question": "Wh', "not JSON: Unterminated string"),
    "no object": ("[1]", "a line must be a JSON object"),
    "deep": ("[" * 100_000, "not JSON: maximum recursion depth"),
    "no text": ('{"question": "\\ud800"}', "not JSON: 'utf-8' codec"),
    "no question": ({"id": "x1"}, "exactly one of question and conversation must be given"),
    "both": (TEXT | {"id": "x2", "conversation": [{"content": "Hi"}]}, "exactly one of question and conversation"),
    "unknown key": (TEXT | {"id": "x3", "imgae": "a.png"}, "unknown key 'imgae', did you mean 'image'?"),
    "image and images": (TEXT | {"id": "x16", "image": "a.png", "images": ["b.png"]}, "must not both be given"),
    "no image": ({"id": "x4", "question": "Q", "images": ["nowhere.png"]}, "there is no file 'nowhere.png'"),
    "broken image": ({"id": "x5", "question": "Q", "images": [str(CHECKPOINT / "config.json")]}, "is not an image"),
    "tags": ({"id": "x6", "question": "<image_placeholder> Q"}, "got 0 for 1"),
    "too long": ({"id": "x7", "question": "word " * 16384}, "too long: the prompt's"),
    "duplicate": (TEXT | {"id": "good 1"}, "id must be of one line alone, got 'good 1' on line 11 and on line 1"),
    "bad id": (TEXT | {"id": [1]}, "id must be a string or an integer, got [1]"),
    "alpha": (TEXT | {"id": "x8", "alpha": 2}, "alpha must be in [0, 1], got 2.0"),
    "alpha's type": (TEXT | {"id": "x9", "alpha": "high"}, "alpha: Value 'high'"),
    "layer": (TEXT | {"id": "x10", "candidate_layers": [31]}, "must be in 1...30, the model's layers, got 31"),
    "interpolation": (TEXT | {"id": "x11", "alpha": "${oc.env:HOME}"}, "must not use an interpolation"),
    "question's type": ({"id": "x12", "question": 5}, "question must be a string, got 5"),
    "images' type": ({"id": "x13", "question": "Q", "images": {"a": "b.png"}}, "images must be a list"),
    "image's type": (
        {"id": "x17", "question": "Q", "image": 5},
        "images must be a list of paths or data URLs, got [5]",
    ),
    "answer's type": ({"id": "x18", "question": "Q", "answer": True}, "answer must be a string or a number, got True"),
    "conversation's type": ({"id": "x14", "conversation": "Hi"}, "conversation must be a list of turns"),
    "a turn": ({"id": "x15", "conversation": [{"content": 5}]}, "turn 1 must have content"),
}


def test_bad_lines_are_errors_and_the_rest_is_answered(tmp_path: Path, capsys: Any) -> None:
    good = [WIDE | {"id": "good 1"}, TALL, TEXT | {"id": 7}]
    names = list(BAD)
    names.insert(9, names.pop(names.index("duplicate")))
    bad = [BAD[name][0] for name in names]
    write(tmp_path / "prompts.jsonl", [good[0], *bad, "", *good[1:]])
    assert answer_program.run(cli_arguments(tmp_path, "batch_size=3")) == 1
    assert capsys.readouterr().err == f"{tmp_path / 'out.jsonl'}: 3 answered, 0 kept, {len(BAD)} errors\n"
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert len(lines) == len(BAD) + 3
    answers = {line["id"]: line for line in lines if "error" not in line}
    errors = [(line["id"], line["error"]) for line in lines if "error" in line]
    for number, (name, given) in enumerate(zip(names, bad, strict=True), 2):
        own = given.get("id") if isinstance(given, dict) and name != "duplicate" else None
        own = own if isinstance(own, str) else f"line {number}"
        assert [BAD[name][1] in error for key, error in errors if key == own] == [True], name

    write(tmp_path / "good.jsonl", [good[0] | {"id": "good 1"}, TALL | {"id": f"line {len(BAD) + 3}"}, good[2]])
    (tmp_path / "alone").mkdir()
    assert answer_program.run([*cli_arguments(tmp_path, prompts="good.jsonl"), f"output={tmp_path / 'alone/out'}"]) == 0
    assert read(tmp_path / "alone/out") == answers

    # A run that has nothing left to do says the same, and adds nothing.
    before = (tmp_path / "out.jsonl").read_bytes()
    assert answer_program.run(cli_arguments(tmp_path, "batch_size=2")) == 1
    assert (tmp_path / "out.jsonl").read_bytes() == before
    assert capsys.readouterr().err.endswith(f"out.jsonl: 0 answered, 3 kept, {len(BAD)} errors\n")


def test_a_run_ends_with_one_line(tmp_path: Path, capsys: Any) -> None:
    """On standard error: what became of the prompts, how many answers are right, and where they are."""
    lines = [TEXT | {"id": i, "answer": "Paris"} for i in range(3)]
    write(tmp_path / "prompts.jsonl", lines[:1])
    answer_program.run(cli_arguments(tmp_path))
    said = read(tmp_path / "out.jsonl")[0]["text"]
    assert capsys.readouterr() == ("", f"{tmp_path / 'out.jsonl'}: 1 answered, 0 kept, 0 errors, 0 of 1 right\n")
    write(tmp_path / "prompts.jsonl", [*lines[:2], lines[2] | {"answer": said}, TEXT, "broken"])
    answer_program.run(cli_arguments(tmp_path))
    *_, last = capsys.readouterr().err.splitlines()
    assert last == f"{tmp_path / 'out.jsonl'}: 3 answered, 1 kept, 1 error, 1 of 3 right"


def test_an_output_that_the_system_refuses_is_its_own_words(tmp_path: Path, fails: Fails) -> None:
    """It was "being written by another run"."""
    write(tmp_path / "prompts.jsonl", [TEXT])
    said = fails(answer_program.run, *cli_arguments(tmp_path), "output=/proc/x")
    assert said.startswith("error: output must name a file that can be written, got '/proc/x': [Errno 2] No such file")


def test_killed_at_any_moment_it_finishes_with_the_lines_of_an_undisturbed_run(tmp_path: Path) -> None:
    lines = [TEXT | {"id": i, "question": f"What is {i} + {i}?"} for i in range(30)]
    write(tmp_path / "prompts.jsonl", [*lines, "broken", TALL, WIDE | {"images": ["nowhere.png"]}])
    more = ["batch_size=2"]
    whole = tmp_path / "whole.jsonl"
    assert answer_program.run([*cli_arguments(tmp_path, *more), f"output={whole}"]) == 1
    out, beside = tmp_path / "out.jsonl", tmp_path / "out.jsonl.settings.json"
    processes = multiprocessing.get_context("forkserver")  # imports once
    processes.set_forkserver_preload(["janus_dola.programs.answer"])
    counts = []
    for wanted in (0, 1, 4, 11, 18):  # lines there when it is killed; 0: as soon as the settings are
        process = processes.Process(target=answer_program.run, args=[cli_arguments(tmp_path, *more)])
        process.start()
        deadline = time.monotonic() + 300
        while not beside.exists() or (wanted and out.read_bytes().count(b"\n") < wanted):
            assert process.is_alive() and time.monotonic() < deadline
            time.sleep(0.005)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        counts.append(out.read_bytes().count(b"\n") if out.exists() else 0)
    assert counts == sorted(counts) and counts[-1] < len(lines) + 3 and len(set(counts)) > 3
    # a line cut short, as by a full disk
    out.write_bytes(out.read_bytes()[:-9])
    assert answer_program.run(cli_arguments(tmp_path, *more)) == 1
    assert read(out) == read(whole) and len(read(out)) == len(lines) + 3


def test_an_output_cut_at_any_byte_is_repaired(tmp_path: Path) -> None:
    lines = [{"id": "a", "text": "£\n\u2028", "tokens": 2, "layers": [1, 2]}, {"id": 2, "error": "no file"}]
    path = tmp_path / "out.jsonl"
    with Results(path, {"alpha": 0.1}) as results:
        assert (results.write(lines), results.write(lines), list(results.lines)) == (2, 0, ["a", 2])
    data = path.read_bytes()
    for cut in range(len(data) + 1):
        path.write_bytes(data[:cut])
        with Results(path, {"alpha": 0.1}) as results:
            kept = data[:cut].count(b"\n")
            assert list(results.lines.values()) == lines[:kept]
            assert results.write(lines) == 2 - kept
        assert path.read_bytes() == data


def test_a_second_run_on_the_same_output_is_refused(tmp_path: Path, capsys: Any) -> None:
    """Two at once wrote every line twice."""
    write(tmp_path / "prompts.jsonl", [TEXT])
    path = tmp_path / "out.jsonl"
    with Results(path, {}) as results:
        results.write([{"id": "line 1", "text": ""}])
        with pytest.raises(ValueError, match=r"output: '.*out.jsonl' is being written by another run"):
            answer_program.run(cli_arguments(tmp_path))
        assert len(path.read_text().splitlines()) == 1
    with pytest.raises(ValueError, match="results of other settings"):  # no longer locked
        answer_program.run(cli_arguments(tmp_path))


@pytest.mark.parametrize(
    ("more", "differs"),
    [
        (["alpha=0.2"], "alpha was 0.1 and is 0.2"),
        (["use_dola_lm=false", "seed=3"], "use_dola_lm was True and is False, seed was 0 and is 3"),
        (["generation.max_new_tokens=7"], "generation was {'max_new_tokens': 6, 'do_sample': False} and is"),
        (["dtype=bfloat16"], "dtype was 'torch.float32' and is 'torch.bfloat16'"),
        (["compare=true"], "compare was False and is True"),
        (["roles=[User,Assistant]"], "roles was"),
        (["model_path=demo/checkpoint"], "model_path was"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_other_settings_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: list[str], differs: str
) -> None:
    monkeypatch.chdir(ROOT)
    write(tmp_path / "prompts.jsonl", ["broken"])  # needs no weights
    monkeypatch.setattr(checkpoint, "load_model", lambda *args: pytest.fail("loaded the weights"))
    assert answer_program.run(cli_arguments(tmp_path)) == 1
    before = (tmp_path / "out.jsonl").read_bytes()
    with pytest.raises(ValueError, match=r"holds results of other settings") as error:
        answer_program.run(cli_arguments(tmp_path, *more))
    assert differs in str(error.value)
    assert answer_program.run(cli_arguments(tmp_path, "batch_size=3", "device=auto", "dtype=float32")) == 1
    assert (tmp_path / "out.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["output=a.jsonl"], "prompts and output must be given together, got None and 'a.jsonl'"),
        (["prompts=PROMPTS"], "prompts and output must be given together, got 'prompts.jsonl' and None"),
        (["BOTH", "question=Why?"], "prompts and question must not both be given, got 'prompts.jsonl' and 'Why?'"),
        (["BOTH", "image=a.png"], "prompts and images must not both be given"),
        (["BOTH", "conversation=[{content: Hi}]"], "prompts and conversation must not both be given"),
        (["BOTH", "stream=true"], "prompts and stream must not both be given"),
        (["BOTH", "trace=here"], "prompts and trace must not both be given"),
        (["BOTH", "batch_size=0"], "batch_size must be at least 1, got 0"),
        (["BOTH", "batch_size=two"], "batch_size: Value 'two'"),
        (["BOTH", "workers=-1"], "workers must be at least 0, got -1"),
        (["BOTH", "workers=1.5"], "workers: Value '1.5'"),
        (
            ["BOTH", "generation.num_beams=2", "generation.num_return_sequences=2"],
            "generation.num_return_sequences must be left off in a batch",
        ),
        (["BOTH", "generation.max_length=1"], "generation.max_length must be left off in a batch run, got 1"),
        (["BOTH", "generation.penalty_alpha=0.6"], "generation.penalty_alpha must be left off in a batch run, got 0.6"),
        (["BOTH", "generation.max_new_tokens=-1"], "max_new_tokens"),
        (["BOTH", "generation.max_new_tokns=1"], "did you mean 'generation.max_new_tokens'"),
        (["BOTH", "bucket_id=3"], "bucket_id must be 0, 1 or 2, got 3"),
        (["BOTH", "candidate_layers=[31]"], "must be in 1...30, the model's layers, got 31"),
        (["prompts=nowhere", "output=a.jsonl"], "prompts must name a file that can be read, got 'nowhere'"),
        (["prompts=PROMPTS", "output=folder"], "output must name a file that can be written, got 'folder'"),
        (["prompts=PROMPTS", "output=other.jsonl"], "'other.jsonl' is not a run's"),
        (["prompts=PROMPTS", "output=PROMPTS"], "output must not be the file of prompts, got 'prompts.jsonl'"),
    ],
    ids=lambda value: value[-1][:40] if isinstance(value, list) else "",
)
def test_errors_are_one_line_before_the_weights_are_loaded(
    tmp_path: Path, fails: Fails, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write(Path("prompts.jsonl"), [WIDE])
    Path("other.jsonl").write_text("mine")
    Path("folder").mkdir()
    both = ["prompts=prompts.jsonl", "output=out.jsonl"]
    given = [
        part
        for argument in arguments
        for part in (both if argument == "BOTH" else [argument.replace("PROMPTS", "prompts.jsonl")])
    ]
    monkeypatch.setattr(checkpoint, "load_model", lambda *args: pytest.fail("loaded the weights"))
    assert message in fails(answer_program.run, f"model_path={CHECKPOINT}", *given)
    assert Path("other.jsonl").read_text() == "mine" and not Path("out.jsonl").exists()
    assert json.loads(Path("prompts.jsonl").read_text()) == WIDE


def test_workers_without_ray_are_refused(tmp_path: Path, fails: Fails, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    said = fails(answer_program.run, *cli_arguments(tmp_path, "workers=2"))
    assert said == "error: workers needs ray: pip install 'janus-dola[ray]'\n"


def ask_for_too_much(device: str) -> None:
    if device == "cpu":
        torch.empty(2**50)  # what PyTorch itself raises where memory runs out
    raise torch.OutOfMemoryError("CUDA out of memory.")


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_out_of_memory_halves_the_batch(ask: Any, model: Any, capsys: Any, device: str) -> None:
    lines = golden_lines()
    want = ask(lines, "whole.jsonl", 8, max_new_tokens=4)
    rows: list[int] = []

    def hook(module: Any, args: Any, kwargs: Any) -> None:
        if kwargs["inputs_embeds"] is not None and kwargs["inputs_embeds"].shape[1] > 1:  # a prompt
            rows.append(len(kwargs["inputs_embeds"]))
            if rows[-1] > 2:
                ask_for_too_much(device)

    handle = model.language_model.model.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        assert ask(lines, "small.jsonl", 8, max_new_tokens=4) == want
    finally:
        handle.remove()
    assert rows == [8, 4, 2, 2, 2, 2, 2, 2, 1]
    err = capsys.readouterr().err
    assert "batch_size 8 is too much, going on with 4" in err and "batch_size 4 is too much, going on with 2" in err
    assert "out of memory (" in err


def test_a_prompt_that_does_not_fit_alone_is_an_error_and_other_errors_are_not_hidden(ask: Any, model: Any) -> None:
    lines = [WIDE | {"id": "long"}, TEXT | {"id": "short"}]

    def hook(module: Any, args: Any, kwargs: Any) -> None:
        if kwargs["inputs_embeds"] is not None and kwargs["inputs_embeds"].shape[1] > 60:
            ask_for_too_much(failure)

    handle = model.language_model.model.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        failure = "cpu"
        answers = ask(lines)
        handle.remove()
        handle = model.language_model.model.register_forward_pre_hook(lambda *a: 1 // 0)
        with pytest.raises(ZeroDivisionError):
            ask(lines, "2.jsonl")
    finally:
        handle.remove()
    assert "can't allocate memory" in answers["long"].pop("error") and answers.pop("long") == {"id": "long"}
    assert answers == ask(lines[1:], "3.jsonl")


def test_batches_start_with_the_longest_and_mix_configurations(
    tmp_path: Path, model: Any, processor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [TEXT | {"id": 0}, WIDE | {"id": 1}, TEXT | {"id": 2, "alpha": 0.5}, TALL | {"id": 3, "use_dola_lm": False}]
    path = write(tmp_path / "prompts.jsonl", lines)
    generation = {"max_new_tokens": 3, "do_sample": False}
    config, task = answer_program.AnswerConfig(generation=generation), answer_program.Compare()
    prompts, errors = read_prompts(config, path, processor, model.config)
    assert errors == [] and all(isinstance(prompt, Prompt) for prompt in prompts)
    for prompt, line in zip(prompts, lines, strict=True):
        images = load_pil_images(prompt.turns)
        assert prompt.length == len(processor.process_one(conversations=prompt.turns, images=images)), line
    encoded: list[int] = []
    handle = model.vision_model.register_forward_pre_hook(lambda module, args: encoded.append(len(args[0])))
    try:
        with Results(tmp_path / "out.jsonl", {}) as results:
            answered = answer_many(DoLaJanusWrapper(model), processor, prompts, task, generation, 3)
            results.write(lines_of(task, answered))
    finally:
        handle.remove()
    assert list(read(tmp_path / "out.jsonl")) == [3, 1, 0, 2]
    assert encoded == [3, 1]  # an image of each prompt, whatever the number of its configurations


def test_lines_with_an_answer_are_judged(tmp_path: Path) -> None:
    """The forms of calibrate's data are prompts, too."""
    scene = str(ROOT / "demo" / "images" / "scene.png")
    asked = {"images": [scene], "question": "What color is the cross?"}
    cross = ["The cross is red.", "The cross is yellow."]
    lines: list[dict[str, Any]] = [
        {
            "id": "pope",
            "question_id": 1,
            "image": "scene.png",
            "text": "Is there a blue ring in the image?",
            "label": "no",
        },
        {"id": "pope, wrong", "image": "scene.png", "text": "Is there a blue ring in the image?", "label": "yes"},
        asked | {"id": "answer", "answer": "the cross is YELLOW"},
        asked | {"id": "answer, wrong", "answer": cross[0]},
        asked | {"id": "choices", "choices": cross, "answer": 1},
        asked | {"id": "choices, wrong", "choices": cross, "answer": 0},
        asked | {"id": "none"},
        asked | {"id": "broken", "choices": cross, "answer": 2},
    ]
    write(tmp_path / "prompts.jsonl", lines)
    arguments = [f"prompts={tmp_path / 'prompts.jsonl'}", f"output={tmp_path / 'out.jsonl'}", "device=cpu"]
    assert answer_program.run([*arguments, f"image_root={ROOT / 'demo' / 'images'}"]) == 1
    answers = read(tmp_path / "out.jsonl")
    assert "correct" not in answers["none"] and answers["none"]["text"] == cross[1]
    assert answers.pop("broken")["error"] == "answer must be the index of a choice, 0 to 1, got 2"
    right = {name: line["correct"] for name, line in answers.items() if name != "none"}
    assert right == {name: "wrong" not in name for name in right} and len(right) == 6
