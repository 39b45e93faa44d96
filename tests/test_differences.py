"""The words in which two answers differ, and how the terminal shows them."""

import os
import pty
import subprocess
import sys
import termios
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import Any, TextIO

import pytest
from conftest import CHECKPOINT, GOLDEN, export
from hypothesis import given
from hypothesis import strategies as st
from transformers.utils import logging

from janus_dola.programs import answer
from janus_dola.programs.checkpoint import load
from janus_dola.programs.differences import differences
from janus_dola.programs.options import ModelConfig

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("off", "on", "only_off", "only_on"),
    [
        ("In the top left is a red circle.", "In the top right is a big red circle.", ["left"], ["right", "big"]),
        ("图中有三个形状。", "图中有四个红色形状。", ["三"], ["四", "红色"]),
        ("A dog. A cat.", "A dog", [". A cat."], []),
        ("the same", "the same", [], []),
        ("two  spaces", "two spaces", [], []),
        ("", "new", [], ["new"]),
    ],
)
def test_words_that_differ(off: str, on: str, only_off: list[str], only_on: list[str]) -> None:
    assert [[text for text, differs in side if differs] for side in differences(off, on)] == [only_off, only_on]


@given(st.text("ab é图三.,\n "), st.text("ab é图三.,\n "))
def test_the_parts_are_the_texts_and_what_is_unmarked_is_in_both(off: str, on: str) -> None:
    sides = differences(off, on)
    assert ["".join(text for text, _ in side) for side in sides] == [off, on]
    kept = ["".join(text for text, differs in side if not differs).split() for side in sides]
    assert "".join(kept[0]) == "".join(kept[1])


def at_a_terminal(run: Callable[[TextIO, TextIO], Any]) -> tuple[str, str]:
    """Runs what writes to two terminals of 24 x 100, stdout and stderr; returns what each shows."""
    shown = []
    pairs = [pty.openpty() for _ in range(2)]
    for _, end in pairs:
        termios.tcsetwinsize(end, (24, 100))
    with open(pairs[0][1], "w") as out, open(pairs[1][1], "w") as err:
        run(out, err)
    for ours, _ in pairs:
        text = b""
        with suppress(OSError):  # which is how a terminal ends, once all that was written to it has been read
            while part := os.read(ours, 1 << 16):
                text += part
        os.close(ours)
        shown.append(text.decode())
    return shown[0].replace("\r\n", "\n"), shown[1]


def test_compare_colours_the_words_that_differ_on_a_terminal_alone(capfd: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """And there, loading shows its progress."""
    image = f"image={GOLDEN / 'expected' / 'images' / 'wide.png'}"
    arguments = [f"model_path={CHECKPOINT}", image, "question=What?", "compare=true", "device=cpu"]
    arguments += ["generation.max_new_tokens=12"]

    def answers(text: str) -> list[str]:
        return [line.partition("  ")[2].lstrip() for line in text.splitlines() if line.startswith("DoLa o")]

    def command(out: TextIO, err: TextIO) -> None:
        command = [sys.executable, "inference_dola.py", *arguments]
        subprocess.run(command, stdout=out, stderr=err, cwd=ROOT, check=True, timeout=120)

    def program(out: TextIO, err: TextIO) -> None:
        with redirect_stdout(out), redirect_stderr(err):
            answer.run(arguments)

    answer.run(arguments)
    piped = capfd.readouterr()
    off, on = answers(piped.out)
    assert piped.err == "" and "\x1b" not in piped.out and off != on
    expected = [
        "".join(f"\x1b[4;{colour}m{text}\x1b[0m" if differs else text for text, differs in side)
        for colour, side in zip((31, 32), differences(off, on), strict=True)
    ]
    seen, err = at_a_terminal(command)
    assert answers(seen) == expected != [off, on]
    assert err.startswith("\rLoading weights:   0%|") and "Loading weights: 100%|" in err
    monkeypatch.setenv("NO_COLOR", "1")
    assert answers(at_a_terminal(program)[0]) == [off, on]


def test_loading_the_native_layout_shows_progress_on_a_terminal_alone(capfd: Any, tmp_path: Path) -> None:
    config = ModelConfig(model_path=str(export(CHECKPOINT, tmp_path / "native")), device="cpu")

    def load_native(out: TextIO, err: TextIO) -> None:
        with redirect_stdout(out), redirect_stderr(err):
            load(config)

    logging.enable_progress_bar()  # a run without a terminal turns it off for its process
    out, err = at_a_terminal(load_native)
    assert out == "" and err.startswith("\rLoading weights:   0%|") and "Loading weights: 100%|" in err
    capfd.readouterr()  # of the export
    load(config)
    assert capfd.readouterr() == ("", "")
