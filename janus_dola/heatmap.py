"""The picture of a trace. Needs matplotlib, the extra `viz`."""

import re
from itertools import accumulate
from os import PathLike
from typing import Any

STEPS_PER_PANEL = 40
FONT = "DejaVu Sans"  # comes with matplotlib
# Preferred, in this order, for what FONT lacks; any other installed font serves, too.
FONTS = ("Noto Sans CJK SC", "Source Han Sans SC", "WenQuanYi Zen Hei", "WenQuanYi Micro Hei", "PingFang SC",
         "Hiragino Sans GB", "Microsoft YaHei", "SimHei", "Noto Sans CJK JP", "Arial Unicode MS")  # fmt: skip
NO_GLYPHS = ("last resort", "lastresort", "blank", "color")  # boxes for everything; pictures that Agg cannot draw
VISIBLE = str.maketrans({" ": "␣", "\n": "⏎", "\t": "⇥"})
SPECIAL = re.compile(r"<[|｜]?([^\s<>|｜]+)[|｜]?>")  # <｜end▁of▁sentence｜>, <|im_end|>, <image_placeholder>


def fonts(characters: set[str]) -> tuple[list[str], set[str]]:
    """Installed families that together have the characters, as far as any has, and those that none has."""
    from matplotlib.font_manager import FontProperties, findfont, fontManager, get_font

    def glyphs(path: str) -> set[str]:
        try:
            return {chr(code) for code in get_font(path).get_charmap()}
        except (OSError, RuntimeError):  # not a font that FreeType reads
            return set()

    families, missing = [FONT], characters - glyphs(findfont(FontProperties(family=[FONT])))
    regular = [f for f in fontManager.ttflist if f.style == "normal" and f.weight in (400, "normal", "regular")]
    regular.sort(key=lambda font: (FONTS.index(font.name) if font.name in FONTS else len(FONTS), font.name))
    for font in regular:
        if not missing:
            break
        if any(part in font.name.lower() for part in NO_GLYPHS) or not missing & (has := glyphs(font.fname)):
            continue
        families.append(font.name)
        missing = missing - has
    return families, missing


def labels(tokenizer: Any, tokens: list[int]) -> tuple[list[str], list[str]]:
    """Tokens as a reader can tell them, and the font families to write them in.

    A character that byte-level tokens share stands at the first of them, with "·" at the others; a token that is no
    text is its number. A special token has a short name: <end> for <｜end▁of▁sentence｜>. White space is made visible,
    and what no font has is its code point.
    """
    texts: list[str] = []
    while len(texts) < len(tokens):
        start = len(texts)
        for stop in range(start + 1, min(start + 8, len(tokens)) + 1):  # a token may have bytes of two characters
            text = tokenizer.decode(tokens[start:stop])
            if text and "\ufffd" not in text:
                if special := SPECIAL.fullmatch(text):
                    name = special[1].replace("▁", "_").removesuffix("_of_sentence").removesuffix("_placeholder")
                    text = f"<{name.replace('_of_', '_')}>"
                texts += [text.translate(VISIBLE)] + ["·"] * (stop - start - 1)
                break
        else:
            texts.append(f"<{tokens[start]}>")
    families, missing = fonts(set("".join(texts)))

    def escaped(c: str) -> str:
        return c if c.isprintable() and c not in missing else c.encode("unicode_escape").decode()

    pieces = [[escaped(c) for c in text] for text in texts]
    short = ["".join(p) if len("".join(p)) <= 14 else "".join(p[: max(1, cut(p, 13))]) + "…" for p in pieces]
    return [text.replace("$", r"\$") for text in short], families  # $ would start mathematics


def cut(pieces: list[str], width: int) -> int:
    """How many of the pieces, from the first, fit into `width` characters."""
    return sum(total <= width for total in accumulate(map(len, pieces)))


def draw(trace: Any, path: str | PathLike[str], tokenizer: Any, sequence: int) -> None:
    """Draws a `DoLaTrace`: layers up, steps across in panels of `STEPS_PER_PANEL`, JSD as color."""
    try:
        from matplotlib import rc_context
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.transforms import ScaledTranslation
    except ImportError as error:
        raise ImportError("DoLaTrace.heatmap needs matplotlib: pip install 'janus-dola[viz]'") from error

    length, layers = int(trace.lengths[sequence]), trace.traced_layers
    names, families = labels(tokenizer, trace.tokens[sequence, :length].tolist())
    panels = max(1, -(-length // STEPS_PER_PANEL))
    columns = min(length, STEPS_PER_PANEL)
    row_height = 0.32 if len(layers) <= 8 else 0.16
    with rc_context({"font.family": families, "font.size": 9}):
        figure = Figure(
            figsize=(max(5.0, 0.3 * columns + 1.8), panels * (row_height * len(layers) + 1.35) + 0.5),
            layout="constrained",
        )
        FigureCanvasAgg(figure)
        axes = figure.subplots(panels, 1, squeeze=False)[:, 0]
        jsd = trace.jsd[sequence, :length]
        top = max(float(jsd.nan_to_num().max()) if length else 0.0, 1e-6)
        image = None
        for panel, axis in enumerate(axes):
            steps = range(panel * STEPS_PER_PANEL, min((panel + 1) * STEPS_PER_PANEL, length))
            image = axis.imshow(
                jsd[steps.start : steps.stop].T.numpy(), origin="lower", aspect="auto", cmap="viridis", vmin=0, vmax=top
            )
            axis.set_xlim(-0.5, columns - 0.5)  # the last panel may be short: its cells stay as wide as the others'
            every = 1 if len(layers) <= 15 else 4
            axis.set_yticks(range(0, len(layers), every), [str(layer) for layer in layers[::every]])
            axis.set_xticks(
                range(len(steps)), [names[t] for t in steps], rotation=60, ha="right", rotation_mode="anchor"
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
                axis.get_xticklabels()[x].set_color("crimson")
            above = axis.get_xaxis_transform() + ScaledTranslation(0, 5 / 72, figure.dpi_scale_trans)
            (marks,) = axis.plot(  # a line, not a scatter: the layout leaves room for its markers
                changed, [1] * len(changed), "v", markersize=5.5, color="crimson", transform=above, clip_on=False,
                label="the final layer alone would differ",
            )  # fmt: skip
            marks.set_in_layout(bool(changed))
        if image is not None:
            bar: Any = {"shrink": 1 / panels, "anchor": (0.0, 1.0)}  # beside the first panel, whatever their number
            figure.colorbar(image, ax=list(axes), label="JSD(q_N ‖ q_j), nats", pad=0.01, **bar)
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper left", ncols=2, frameon=False)
        figure.savefig(path, dpi=130)
