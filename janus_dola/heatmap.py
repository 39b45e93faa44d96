"""The picture of a trace. Needs matplotlib, the extra `viz`."""

from functools import lru_cache
from os import PathLike
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from janus_dola.trace import DoLaTrace

STEPS_PER_PANEL = 40
# Fonts for what matplotlib's own lacks, in order of preference; those not installed are passed over.
FONTS = ("DejaVu Sans", "Noto Sans CJK SC", "Noto Sans CJK JP", "Source Han Sans SC", "WenQuanYi Zen Hei",
         "WenQuanYi Micro Hei", "PingFang SC", "Hiragino Sans GB", "Microsoft YaHei", "SimHei", "Arial Unicode MS",
         "Noto Sans", "Noto Sans Arabic", "Noto Sans Devanagari", "Noto Emoji")  # fmt: skip
VISIBLE = str.maketrans({"\n": "⏎", "\t": "⇥", "\r": "␍", "$": r"\$"})  # $ would start mathematics


@lru_cache
def installed_fonts() -> tuple[list[str], frozenset[int]]:
    """Those of `FONTS` that are installed, and the characters they have."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    families: list[str] = []
    characters: set[int] = set()
    for family in FONTS:
        try:
            path = findfont(FontProperties(family=[family]), fallback_to_default=False)
        except ValueError:
            continue
        families.append(family)
        characters |= get_font(path).get_charmap().keys()
    return families, frozenset(characters)


def label(tokenizer: Any, token: int) -> str:
    """A token as a reader can tell it: spaces and line ends visible, what no font has as its code point."""
    text = tokenizer.decode([token])
    if not text or "\ufffd" in text:  # byte-level tokens may hold a part of a character
        text = f"<{token}>"
    _, characters = installed_fonts()
    text = ("␣" + text[1:] if text.startswith(" ") else text).translate(VISIBLE)
    text = "".join(c if ord(c) in characters else c.encode("unicode_escape").decode() for c in text)
    return text if len(text) <= 14 else text[:13] + "…"


def draw(trace: "DoLaTrace", path: str | PathLike[str], tokenizer: Any, sequence: int) -> None:
    """Layers up, steps across in panels of `STEPS_PER_PANEL`, JSD as colour. See `DoLaTrace.heatmap`."""
    try:
        from matplotlib import rc_context
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("DoLaTrace.heatmap needs matplotlib: pip install 'janus-dola[viz]'") from error

    length, layers = int(trace.lengths[sequence]), trace.traced_layers
    labels = [label(tokenizer, token) for token in trace.tokens[sequence, :length].tolist()]
    panels = max(1, -(-length // STEPS_PER_PANEL))
    columns = min(length, STEPS_PER_PANEL)
    row_height = 0.32 if len(layers) <= 8 else 0.16
    families, _ = installed_fonts()
    with rc_context({"font.family": families, "font.size": 9}):
        figure = Figure(
            figsize=(max(5.0, 0.3 * columns + 1.8), panels * (row_height * len(layers) + 1.15) + 0.5),
            layout="constrained",
        )
        FigureCanvasAgg(figure)
        axes = figure.subplots(panels, 1, squeeze=False)[:, 0]
        jsd = trace.jsd[sequence, :length]
        top = max(float(jsd.max()) if length else 0.0, 1e-6)
        image = None
        for panel, axis in enumerate(axes):
            steps = range(panel * STEPS_PER_PANEL, min((panel + 1) * STEPS_PER_PANEL, length))
            image = axis.imshow(
                jsd[steps.start : steps.stop].T.numpy(), origin="lower", aspect="auto", cmap="viridis", vmin=0, vmax=top
            )
            axis.set_ylim(-0.5, len(layers) - 0.5)
            axis.set_xlim(-0.5, columns - 0.5)  # the last panel may be short: its cells stay as wide as the others'
            every = 1 if len(layers) <= 15 else 4
            axis.set_yticks(range(0, len(layers), every), [str(layer) for layer in layers[::every]])
            axis.set_xticks(
                range(len(steps)), [labels[t] for t in steps], rotation=60, ha="right", rotation_mode="anchor"
            )
            axis.set_ylabel("layer")
            chosen = [
                (x, layers.index(M)) for x, t in enumerate(steps) if (M := int(trace.layers[sequence, t])) in layers
            ]
            changed = [x for x, t in enumerate(steps) if trace.tokens[sequence, t] != trace.mature_tokens[sequence, t]]
            axis.scatter(
                *zip(*chosen, strict=True) if chosen else ([], []),
                s=26,
                c="white",
                edgecolors="black",
                label="M, the layer chosen",
            )
            for x in changed:
                axis.get_xticklabels()[x].set(color="crimson", fontweight="bold")
            axis.scatter(
                changed, [len(layers) - 0.25] * len(changed), marker="v", s=30, c="crimson", clip_on=False,
                label="the final layer alone would differ",
            )  # fmt: skip
        if image is not None:
            figure.colorbar(image, ax=list(axes), label="JSD(q_N ‖ q_j), nats", pad=0.01)
        handles, names = axes[0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside upper left", ncols=2, frameon=False)
        figure.savefig(path, dpi=130)
