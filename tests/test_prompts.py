"""A file of prompts: every line is a prompt or an error with an id of its own."""

import codecs
import json
import weakref
from pathlib import Path
from typing import Any

import pytest
from conftest import CHECKPOINT
from PIL import Image

from janus.utils.io import load_image
from janus_dola.programs import answer
from janus_dola.programs import prompts as prompts_program
from janus_dola.programs.answer import AnswerConfig
from janus_dola.programs.prompts import read_prompts

TEXT = {"question": "Why?"}


@pytest.fixture
def read(tmp_path: Path, model: Any, processor: Any) -> Any:
    def read(lines: list[Any] | bytes, **more: Any) -> tuple[dict[Any, Any], dict[Any, str]]:
        """The good lines and the errors, by id."""
        path = tmp_path / "prompts.jsonl"
        data = lines if isinstance(lines, bytes) else "".join(json.dumps(line) + "\n" for line in lines).encode()
        path.write_bytes(data)
        prompts, errors = read_prompts(AnswerConfig(), path, processor, model.config, **more)
        return {prompt.id: prompt for prompt in prompts}, {error["id"]: error["error"] for error in errors}

    return read


def test_an_id_like_another_lines_name_loses_no_line(read: Any) -> None:
    """Two lines had one name, and one of them no answer."""
    lines = [
        {"id": "line 2"} | TEXT, TEXT, {"id": "line 5"} | TEXT, {"id": "line 2"} | TEXT, {"id": [1]} | TEXT, 5,
        {"id": "line 6"} | TEXT, {"id": "line 6'"},
    ]  # fmt: skip
    good, errors = read(lines)
    assert list(good) == ["line 2", "line 2'", "line 5", "line 6"]
    assert list(errors) == ["line 4", "line 5'", "line 6''", "line 6'"]
    assert errors["line 4"] == "id must be of one line alone, got 'line 2' on line 4 and on line 1"


def test_lines_as_people_have_them(read: Any) -> None:
    """One picture by itself, roles of OpenAI's, and numbers as answers."""
    asked = {"question": "How many?", "images": ["a.png"], "answer": "5"}
    turns = [{"role": "<|User|>", "content": "Hi", "images": []}, {"role": "<|Assistant|>", "content": "Hello"}]
    turns.append({"role": "<|User|>", "content": "<image_placeholder> What?", "images": ["a.png"]})
    own = [turn | {"role": role} for turn, role in zip(turns, ("user", "assistant", "user"), strict=True)]
    own[2]["images"] = "a.png"
    pairs = [
        ({"question": "How many?", "image": "a.png", "answer": "5"}, asked),
        ({"question": "How many?", "images": "a.png", "answer": 5}, asked),
        (asked | {"answer": 2.5}, asked | {"answer": "2.5"}),
        ({"question": "Which?", "image": "a.png", "choices": ["a", "b"], "answer": 1},
         {"question": "Which?", "images": ["a.png"], "choices": ["a", "b"], "answer": 1}),
        ({"question": "Why?", "image": None}, TEXT),
        ({"conversation": own}, {"conversation": turns}),
    ]  # fmt: skip
    good, errors = read([line for pair in pairs for line in pair])
    assert errors == {}
    prompts = list(good.values())
    for ours, theirs in zip(prompts[::2], prompts[1::2], strict=True):
        assert (ours.turns, ours.form, ours.answer) == (theirs.turns, theirs.form, theirs.answer)
        assert ours.fingerprint == theirs.fingerprint


@pytest.mark.parametrize("key", ["alpha", "candidate_layers", "bucket_id"])
def test_a_deep_or_missing_value_is_the_lines_error(read: Any, key: str) -> None:
    """A deep one ended the run with a traceback, and the mark of a missing value was taken for the default."""
    deep = f'{{"question": "Why?", "{key}": {"[" * 900}{"]" * 900}}}\n'.encode()
    good, errors = read(deep + json.dumps(TEXT | {key: "???"}).encode() + b"\n" + json.dumps(TEXT).encode())
    assert list(good) == ["line 3"]
    assert f"{key} must have a value, got '???'" in errors["line 2"] and "line 1" in errors


def test_numbers_that_are_none_are_the_lines_error(read: Any) -> None:
    """An integer that no float holds ended the run with a traceback; true was the second choice."""
    good, errors = read([TEXT | {"alpha": 10**400}, TEXT | {"choices": ["a", "b"], "answer": True}, TEXT])
    assert list(good) == ["line 3"]
    assert "a number is too large" in errors["line 1"] and "got True" in errors["line 2"]


def test_a_long_text_is_not_tokenized(read: Any, processor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of 8 MB took minutes and gigabytes."""
    encode, sizes = processor.tokenizer.encode, []
    monkeypatch.setattr(processor.tokenizer, "encode", lambda text, **keys: sizes.append(len(text)) or encode(text))
    good, errors = read([{"question": "why " * 2_000_000}, TEXT])
    assert list(good) == ["line 2"] and max(sizes) < 1000
    assert errors["line 1"].startswith("too long: 8000000 bytes of text are more than the model's 16384 positions")


def test_an_answer_to_score_must_fit_too(read: Any) -> None:
    good, errors = read(
        [
            TEXT | {"answer": "so " * 16384},
            TEXT | {"choices": ["no", "so " * 16384], "answer": 0},
            TEXT | {"answer": "so"},
        ],
        judged=True,
    )
    assert list(good) == ["line 3"]
    assert all("of the longest answer are more than the model's 16384 positions" in text for text in errors.values())


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
def test_utf_16_is_refused_as_a_whole(read: Any, encoding: str) -> None:
    with pytest.raises(ValueError, match=r"prompts must be UTF-8, got UTF-16 in '.*prompts.jsonl'"):
        read((json.dumps(TEXT) + "\n").encode(encoding))


def test_bytes_that_editors_leave(read: Any) -> None:
    """A byte order mark and CRLF are no part of a line; NUL and half a surrogate pair are that line's error."""
    line = json.dumps(TEXT).encode()
    lines = [codecs.BOM_UTF8 + line, b"", line[:-1] + b"\0}", b'{"question": "\\ud800"}', b"\xff" + line, line]
    good, errors = read(b"\r\n".join(lines))
    assert list(good) == ["line 1", "line 6"]
    assert list(errors) == ["line 3", "line 4", "line 5"] and all("not JSON" in text for text in errors.values())


@pytest.mark.parametrize("batch", [False, True])
def test_one_picture_at_a_time_is_open_at_its_own_size(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, batch: bool
) -> None:
    """One of 88 megapixels is a file of 280 KB, and each held 340 MB until the last was open."""
    opened: list[weakref.ref[Image.Image]] = []
    held: list[int] = []

    def load(source: Any) -> Image.Image:
        held.append(sum(image() is not None for image in opened))
        image = load_image(source)
        opened.append(weakref.ref(image))
        return image

    monkeypatch.setattr(prompts_program, "load_image", load)
    path = tmp_path / "large.png"
    Image.new("RGB", (300, 200), "red").save(path)
    line = {"question": "Which?", "images": [str(path)] * 3}
    keys = [f"model_path={CHECKPOINT}", "device=cpu", "generation.max_new_tokens=1"]
    if batch:
        (tmp_path / "prompts.jsonl").write_text(f"{json.dumps(line)}\n" * 2)
        keys += [f"prompts={tmp_path / 'prompts.jsonl'}", f"output={tmp_path / 'out.jsonl'}"]
    else:
        keys += [f"images={json.dumps(line['images'])}", "question=Which?"]
    assert not answer.run(keys)
    assert held == [0] * (6 if batch else 3)
