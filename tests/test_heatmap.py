"""The picture of a trace: what its labels say, what it marks, and that it is legible at any length."""

import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CHECKPOINT
from tokenizers import Tokenizer

from janus_dola import DoLaTrace

pytest.importorskip("matplotlib")
from matplotlib.figure import Figure
from matplotlib.image import imread

from janus_dola.heatmap import fonts, labels


class Decoder:
    """The golden byte-level tokenizer, as a heatmap needs it."""

    def __init__(self) -> None:
        self.tokenizer = Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))

    def decode(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=False)

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text).ids


class Words:
    """A tokenizer of whole words, so that a test can choose what a token is."""

    def __init__(self, *words: str) -> None:
        self.words = words

    def decode(self, tokens: list[int]) -> str:
        return "".join(self.words[token] for token in tokens)


def make(tokens: list[int], layers: tuple[int, ...] = (22, 24, 26, 28)) -> DoLaTrace:
    """A trace with known marks: step t chose layer t mod J; steps 1, 4, 7, ... were changed; step 2 chose N."""
    T, J = len(tokens), len(layers)
    trace = DoLaTrace()
    trace.num_layers, trace.traced_layers, trace.candidate_layers = 30, layers, layers
    trace.tokens, trace.lengths = torch.tensor([tokens]), torch.tensor([T])
    trace.mature_tokens = trace.tokens.clone()
    trace.mature_tokens[0, 1::3] += 1
    trace.layers = torch.tensor([[layers[t % J] for t in range(T)]])
    trace.layers[0, 2] = 30
    trace.jsd = torch.linspace(0, 0.6, T * J).reshape(1, T, J)
    trace.head_sizes = torch.ones(1, T, dtype=torch.long)
    trace.logprobs = trace.mature_logprobs = torch.zeros(1, T)
    return trace


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that are drawn, as they are saved."""
    drawn: list[Figure] = []
    save = Figure.savefig

    def savefig(figure: Figure, *args: Any, **kwargs: Any) -> None:
        drawn.append(figure)
        save(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", savefig)
    return drawn


def test_labels_show_white_space_and_whole_characters() -> None:
    assert labels(Words(" a b", "\n", "\t", "\r", "$x$"), [0, 1, 2, 3, 4])[0] == ["␣a␣b", "⏎", "⇥", r"\r", r"\$x\$"]
    tokenizer = Decoder()
    tokens = tokenizer.encode("П")  # two bytes, two tokens: either alone is no text
    assert len(tokens) == 2
    assert labels(tokenizer, tokens)[0] == ["П", "·"]
    assert labels(tokenizer, tokens[:1])[0] == [f"<{tokens[0]}>"]
    assert labels(tokenizer, [tokens[0], tokens[0], tokens[1]])[0] == [f"<{tokens[0]}>", "П", "·"]
    assert labels(Words(""), [0])[0] == ["<0>"]


@pytest.mark.parametrize(
    ("token", "label"),
    [
        ("<｜end▁of▁sentence｜>", "<end>"),
        ("<｜begin▁of▁sentence｜>", "<begin>"),
        ("<|User|>", "<User>"),
        ("<image_placeholder>", "<image>"),
        ("<begin_of_image>", "<begin_image>"),
        ("<|im_end|>", "<im_end>"),
        ("</s>", "</s>"),
        ("<", "<"),
        ("a <b> c", "a␣<b>␣c"),
    ],
)
def test_special_tokens_have_short_names(token: str, label: str) -> None:
    """The end of an answer was <\uff5cend_of…"""
    assert labels(Words(token), [0])[0] == [label]


def test_labels_escape_what_no_font_has() -> None:
    """U+E123 and U+E456 are for private use, and U+200B is white space without width."""
    tokenizer = Words("a\ue123", "\u200b", "\ue123\ue456\ue123", "b" * 30)
    assert labels(tokenizer, [0, 1, 2, 3])[0] == [r"a\ue123", r"\u200b", r"\ue123\ue456…", "b" * 13 + "…"]


def test_other_fonts_serve_where_the_first_lacks_a_glyph() -> None:
    families, missing = fonts({"a", "\u1d81", "\U000f4321"})  # matplotlib comes with STIX, which has U+1D81
    assert families[0] == "DejaVu Sans"
    assert len(families) == 2
    assert missing == {"\U000f4321"}
    assert fonts({"a", "é", "я", "␣", "⏎"}) == (["DejaVu Sans"], set())


@pytest.mark.parametrize(("steps", "panels"), [(3, 1), (10, 1), (40, 1), (41, 2), (200, 5)])
def test_marks_and_panels(figures: list[Figure], tmp_path: Path, steps: int, panels: int) -> None:
    trace = make([40 + t % 50 for t in range(steps)])
    trace.heatmap(tmp_path / "x.png", Decoder())
    [figure] = figures
    *axes, bar = figure.axes
    assert len(axes) == panels
    assert bar.get_ylabel() == "JSD(q_N ‖ q_j), nats"
    size = bar.get_window_extent()
    assert size.height > 5 * size.width and size.width < 30  # it grew with the panels, to a square of colors
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "M, the layer chosen",
        "the final layer alone would differ",
    ]
    assert [label.get_text() for label in axes[0].get_yticklabels()] == ["22", "24", "26", "28"]
    written = [label.get_text() for axis in axes for label in axis.get_xticklabels()]
    assert written == labels(Decoder(), trace.tokens[0].tolist())[0]
    chosen, changed, shown = [], [], []
    for panel, axis in enumerate(axes):
        [circles], [triangles] = axis.collections, axis.lines
        chosen += [(40 * panel + x, y) for x, y in circles.get_offsets().tolist()]
        changed += [40 * panel + x for x in triangles.get_xdata().tolist()]
        assert axis.get_ylim() == (-0.5, 3.5)  # there was a white band above the last layer
        shown.append(torch.as_tensor(axis.images[0].get_array().data))
    assert chosen == [(t, t % 4) for t in range(steps) if t != 2]
    assert changed == list(range(1, steps, 3))
    assert torch.equal(torch.cat(shown, 1), trace.jsd[0].T)
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    boxes = [figure.legends[0].get_window_extent(renderer), *(axis.get_tightbbox(renderer) for axis in axes)]
    for above, below in pairwise(boxes):
        assert above.y0 >= below.y1 - 2  # nothing lies over the next panel, up to two dots
    picture = imread(tmp_path / "x.png")
    assert picture.shape[1] < 2500 and picture[..., :3].std() > 0.1


def test_all_layers_and_the_sequence_asked_for(figures: list[Figure], tmp_path: Path) -> None:
    trace = make([40, 41, 42, 43, 44], tuple(range(1, 30)))
    other = make([50, 51, 52, 53, 54], tuple(range(1, 30)))
    for name in ("tokens", "mature_tokens", "layers", "jsd", "lengths"):
        setattr(trace, name, torch.cat([getattr(trace, name), getattr(other, name)]))
    trace.lengths[1] = 4
    trace.heatmap(tmp_path / "x.png", Decoder(), sequence=1)
    axis = figures[0].axes[0]
    assert [label.get_text() for label in axis.get_xticklabels()] == labels(Decoder(), [50, 51, 52, 53])[0]
    assert axis.images[0].get_array().shape == (29, 4)
    with pytest.raises(ValueError, match="sequence must be one of the 2 in the trace, got 2"):
        trace.heatmap(tmp_path / "x.png", Decoder(), sequence=2)
    trace.traced_layers = ()
    with pytest.raises(ValueError, match="no layer was traced"):
        trace.heatmap(tmp_path / "x.png", Decoder())


def test_without_matplotlib_the_error_says_how_to_get_it(tmp_path: Path) -> None:
    make([40, 41, 42]).save(tmp_path / "x.jsonl")
    code = """
import sys
from janus_dola import DoLaTrace
assert "matplotlib" not in sys.modules
trace = DoLaTrace.load(sys.argv[1])
sys.modules["matplotlib"] = None
try:
    trace.heatmap("x.png", None)
except ImportError as error:
    print(error)
"""
    run = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "x.jsonl"], capture_output=True, text=True, check=True,
        cwd=Path(__file__).parent.parent,
    )  # fmt: skip
    assert "pip install 'janus-dola[viz]'" in run.stdout
