"""The words in which two answers differ, and how the terminal shows them."""

import os
import pty
import subprocess
import sys
import termios
from pathlib import Path

import pytest
from conftest import CHECKPOINT, GOLDEN, export
from hypothesis import given
from hypothesis import strategies as st

from janus_dola.programs.differences import differences

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


def at_a_terminal(command: list[str], **environment: str) -> tuple[str, str]:
    """Runs a command whose stdout and stderr are terminals of 24 x 100; returns what each shows."""
    shown = []
    pairs = [pty.openpty() for _ in range(2)]
    for _, end in pairs:
        termios.tcsetwinsize(end, (24, 100))
    subprocess.run(
        command, stdout=pairs[0][1], stderr=pairs[1][1], cwd=ROOT, env=os.environ | environment, check=True, timeout=120
    )
    for ours, theirs in pairs:
        os.set_blocking(ours, False)
        try:
            shown.append(os.read(ours, 1 << 16).decode())
        except BlockingIOError:
            shown.append("")
        os.close(ours)
        os.close(theirs)
    return shown[0].replace("\r\n", "\n"), shown[1]


def test_compare_colours_the_words_that_differ_on_a_terminal_alone() -> None:
    image = f"image={GOLDEN / 'expected' / 'images' / 'wide.png'}"
    command = [sys.executable, "inference_dola.py", f"model_path={CHECKPOINT}", image, "question=What?", "compare=true"]
    command += ["device=cpu", "generation.max_new_tokens=12"]

    def answers(text: str) -> list[str]:
        return [line.partition("  ")[2].lstrip() for line in text.splitlines() if line.startswith("DoLa o")]

    piped = subprocess.run(command, capture_output=True, encoding="utf-8", cwd=ROOT, check=True)
    off, on = answers(piped.stdout)
    assert piped.stderr == "" and "\x1b" not in piped.stdout and off != on
    seen, _ = at_a_terminal(command)
    expected = [
        "".join(f"\x1b[4;{colour}m{text}\x1b[0m" if differs else text for text, differs in side)
        for colour, side in zip((31, 32), differences(off, on), strict=True)
    ]
    assert answers(seen) == expected != [off, on]
    assert answers(at_a_terminal(command, NO_COLOR="1")[0]) == [off, on]


@pytest.mark.parametrize("layout", ["published", "native"])
def test_loading_shows_progress_on_a_terminal(layout: str, tmp_path: Path) -> None:
    path = CHECKPOINT if layout == "published" else export(CHECKPOINT, tmp_path / "native")
    code = """
import sys
from janus_dola.programs.checkpoint import load
from janus_dola.programs.options import ModelConfig
load(ModelConfig(model_path=sys.argv[1], device="cpu"))
"""
    command = [sys.executable, "-c", code, str(path)]
    out, err = at_a_terminal(command)
    assert out == "" and err.startswith("\rLoading weights:   0%|") and "Loading weights: 100%|" in err
    done = subprocess.run(command, capture_output=True, cwd=ROOT, check=True)
    assert (done.stdout, done.stderr) == (b"", b"")
