"""An answer's tokens as HTML: coloured by the JSD of M, marked where DoLa changed them, the numbers on hover."""

import math
from html import escape
from typing import Any

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
    """HTML of a trace's first sequence; the classes are those of web.css."""
    T = int(trace.lengths[0])
    tokens, mature, layers = (rows[0, :T].tolist() for rows in (trace.tokens, trace.mature_tokens, trace.layers))
    rows = (trace.head_sizes, trace.mature_logprobs, trace.logprobs)
    numbers = zip(*(values[0, :T].tolist() for values in rows), strict=True)
    place = {layer: j for j, layer in enumerate(trace.traced_layers)}
    jsd = [float(trace.jsd[0, t, place[M]].nan_to_num()) if M in place else 0.0 for t, M in enumerate(layers)]
    top = max([*jsd, math.ulp(0)])
    spans = []
    for t, (piece, (head, log_q, log_p)) in enumerate(zip(pieces(tokenizer, tokens), numbers, strict=True)):
        chosen = f"layer {layers[t]}" if layers[t] in place else "none"
        about = f"M {chosen} · JSD {jsd[t]:.4f} · |V_head| {head} · log q_N {log_q:.3f} · log p̂ {log_p:.3f}"
        changed = tokens[t] != mature[t]
        if changed:
            about += f"\nThe final layer alone would have said “{name(tokenizer, mature[t])}”."
        spans.append(
            f'<span class="token{" changed" * changed}" tabindex="0" style="--jsd: {jsd[t] / top:.3f}">{escape(piece)}'
            f'<span class="about">{escape(about)}</span></span>'
        )
    changes = sum(a != b for a, b in zip(tokens, mature, strict=True))
    return f"""<div class="tokens">The answer with DoLa, {
        T
    } tokens. Colour: how far M, the layer chosen, is from the final one
(JSD, up to {
        top:.3f} nats). <span class="changed">Underlined</span>: the final layer alone would have said something else ({
        changes
    }).
<div class="line"><span class="about hint">Hover, tap or Tab: a token's M, JSD, |V_head|, log q_N and log p̂</span>{
        "".join(spans)
    }</div></div>"""
