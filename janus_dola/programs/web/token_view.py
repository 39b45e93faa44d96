"""An answer's tokens as HTML: colored by the JSD of M, marked where DoLa changed them, the numbers on hover."""

import math
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader

from janus_dola.heatmap import labels
from janus_dola.trace import DoLaTrace


def pieces(tokenizer: Any, tokens: list[int]) -> list[str]:
    """What each token adds to the text. A character of several tokens stands at the last, with "·" at the others."""
    texts, before = [], ""
    for t, token in enumerate(tokens):
        text = tokenizer.decode(tokens[: t + 1])
        if token in tokenizer.all_special_ids:
            texts.append(" " + name(tokenizer, token))
        elif text.endswith("\ufffd"):
            texts.append("·")
            continue
        else:
            texts.append(text[len(before) :].replace("\n", "⏎\n"))
        before = text
    return texts


def name(tokenizer: Any, token: int) -> str:
    """A token by itself."""
    text = tokenizer.decode([token])
    if token in tokenizer.all_special_ids or not text or "\ufffd" in text:
        return labels(tokenizer, [token])[0][0]
    return text.strip() or repr(text)


def token_view(trace: DoLaTrace, tokenizer: Any) -> str:
    """HTML of a trace's first sequence, from token_view.html; the classes are those of web.css."""
    T = int(trace.lengths[0])
    tokens, mature, layers = (rows[0, :T].tolist() for rows in (trace.tokens, trace.mature_tokens, trace.layers))
    numbers = [values[0, :T].tolist() for values in (trace.head_sizes, trace.mature_logprobs, trace.logprobs)]
    jsd = trace.chosen_jsd[0, :T].nan_to_num().tolist()
    instead = [name(tokenizer, final) if final != token else None for token, final in zip(tokens, mature, strict=True)]
    chosen = [f"layer {M}" if M in trace.traced_layers else "none" for M in layers]
    page = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True).get_template("token_view.html")
    return page.render(
        tokens=list(zip(pieces(tokenizer, tokens), chosen, jsd, *numbers, instead, strict=True)),
        changes=T - instead.count(None),
        top=max([*jsd, math.ulp(0)]),
    )
