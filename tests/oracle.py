"""The decode step in float64, from the paper and from uncached forward passes, not from the code under test."""

from typing import Any

import numpy as np
import torch
from scipy.special import entr, log_softmax, rel_entr, softmax
from torch import Tensor
from transformers import LogitsProcessor

from janus_dola import DoLaConfig

N = 30  # layers of the golden checkpoint


def oracle_jsd(P: np.ndarray, Q: np.ndarray) -> np.ndarray:
    M = (P + Q) / 2
    return (rel_entr(P, M).sum(-1) + rel_entr(Q, M).sum(-1)) / 2


def oracle_contrast(logits_N: np.ndarray, logits_M: np.ndarray | None, alpha: float) -> np.ndarray:
    """log p̂, row by row and token by token."""
    log_p = np.full(logits_N.shape, -np.inf)
    for row in range(len(logits_N)):
        q_N = softmax(logits_N[row].astype(np.float64))
        head = q_N >= alpha * q_N.max()
        F = log_softmax(logits_N[row].astype(np.float64))
        if logits_M is not None:
            F = F - log_softmax(logits_M[row].astype(np.float64))
        log_p[row, head] = log_softmax(F[head])
    return log_p


def oracle_deco(z_N: np.ndarray, exits: np.ndarray, alpha: float, k: int = 20, p: float = 0.9) -> np.ndarray:
    """DeCo's log p̂ [rows, V] of final logits [rows, V] and exits' [rows, J, V]: row by row, token by token."""
    log_p = np.full(z_N.shape, -np.inf)
    for row in range(len(z_N)):
        q_N = softmax(z_N[row].astype(np.float64))
        C: list[int] = []
        for x in np.argsort(-q_N, kind="stable")[:k]:
            C.append(x)
            if q_N[C].sum() >= p:
                break
        q_j = softmax(exits[row].astype(np.float64), -1)
        M = q_j[:, C].max(-1).argmax()
        scores = z_N[row].astype(np.float64) + alpha * q_j[M, C].max() * exits[row, M]
        log_p[row, C] = log_softmax(scores[C])
    return log_p


def oracle_sled(z_N: np.ndarray, exits: np.ndarray, rate: float, k: int = 10, T: int = 10) -> np.ndarray:
    """SLED's log p̂ [rows, V], each vector of the paper written out: m_i^(n), s^(n), P_latent, then T steps."""
    log_p = np.full(z_N.shape, -np.inf)
    for row in range(len(z_N)):
        allowed = ~np.isneginf(z_N[row])
        I_k = [i for i in np.argsort(-z_N[row], kind="stable")[:k] if allowed[i]]
        z = z_N[row].astype(np.float64)
        m = np.zeros((len(exits[row]), len(I_k)))
        for n, z_n in enumerate(exits[row].astype(np.float64)):
            q_n = softmax(z_n)
            for place, i in enumerate(I_k):
                gradient = q_n.copy()
                # 1 − q_n(i) from the other tokens: where q_n is sure of i the difference has no digits left
                gradient[i] = -np.delete(q_n, i).sum()
                a, b = gradient[allowed], (z_n - z)[allowed]
                norms = np.linalg.norm(a) * np.linalg.norm(b)
                cos = a @ b / norms if norms else 0.0
                m[n, place] = cos**2 if cos > 1e-6 else 0.0  # what is less is rounding of 0
        if not m.any():
            log_p[row] = log_softmax(z)
            continue
        sums = m.sum(1)
        P_n = m / np.where(sums, sums, 1)[:, None]
        s_n = sums / sums.sum()
        P = np.zeros(len(z))
        P[I_k] = (s_n[:, None] * P_n).sum(0)
        for t in range(T):
            z = z - rate * (1 - t / T) * (softmax(z) - P)
        log_p[row, I_k] = log_softmax(z[I_k])
    return log_p


def oracle_confident(z_N: np.ndarray, exits: np.ndarray) -> np.ndarray:
    """Confident Decoding's log p̂ [rows, V]: from the last layer back while the entropy falls, row by row."""
    log_p = np.zeros(z_N.shape)
    for row in range(len(z_N)):
        allowed = ~np.isneginf(z_N[row])
        layers = [*exits[row].astype(np.float64), z_N[row].astype(np.float64)]
        q = [softmax(np.where(allowed, z, -np.inf)) for z in layers]
        M = len(q) - 1
        while M and entr(q[M - 1]).sum() < entr(q[M]).sum():
            M -= 1
        with np.errstate(divide="ignore"):
            log_p[row] = np.log(q[M])
    return log_p


@torch.no_grad()
def all_logits(model: Any, embeds: Tensor, mask: Tensor, tokens: Tensor) -> np.ndarray:
    """Logits of every layer at the last position, [rows, N, V] in float64: no cache, no hook, one head call each."""
    decoder, head = model.language_model.model, model.language_model.lm_head
    repeat = len(tokens) // len(embeds)
    embeds, mask = embeds.repeat_interleave(repeat, 0), mask.repeat_interleave(repeat, 0)
    inputs = torch.cat([embeds, model.language_model.get_input_embeddings()(tokens)], 1)
    mask = torch.cat([mask, torch.ones_like(tokens)], 1)
    hidden = decoder(
        inputs_embeds=inputs,
        attention_mask=mask,
        position_ids=(mask.cumsum(-1) - 1).clamp(min=0),
        output_hidden_states=True,
        use_cache=False,
    ).hidden_states
    exits = [head(decoder.norm(h[:, -1])) for h in hidden[1:N]] + [head(hidden[N][:, -1])]  # hidden_states[N] is normed
    return torch.stack(exits, 1).double().numpy()


def oracle_scores(logits: np.ndarray, penalised: np.ndarray, layers: list[int], alpha: float) -> np.ndarray:
    """log p̂ [rows, V] of the penalised final logits and the exits' logits [rows, N, V]."""
    if not layers:
        return oracle_contrast(penalised, None, alpha)
    q = np.exp(penalised - penalised.max(-1, keepdims=True))
    q /= q.sum(-1, keepdims=True)
    exits = logits[:, [layer - 1 for layer in layers]]
    qj = np.exp(exits - exits.max(-1, keepdims=True))
    qj /= qj.sum(-1, keepdims=True)
    M = oracle_jsd(q[:, None], qj).argmax(-1)
    return oracle_contrast(penalised, exits[np.arange(len(M)), M], alpha)


def oracle_step(logits: np.ndarray, penalised: np.ndarray, config: DoLaConfig) -> np.ndarray:
    """The same of a configuration, whatever its method."""
    layers = [layer for layer in config.resolve_layers(N) if layer < N]
    if config.method == "dola":
        return oracle_scores(logits, penalised, layers, config.alpha)
    exits = logits[:, [layer - 1 for layer in layers]]
    if config.method == "deco":
        return oracle_deco(penalised, exits, config.deco_alpha)
    if config.method == "confident":
        return oracle_confident(penalised, exits)
    return oracle_sled(penalised, exits, config.sled_rate, config.sled_top_k)


def assert_scores(got: Tensor, want: np.ndarray) -> None:
    assert np.array_equal(np.isneginf(got.numpy()), np.isneginf(want))
    finite = np.isfinite(want)
    np.testing.assert_allclose(got.numpy()[finite], want[finite], atol=1e-4)


class Recorder(LogitsProcessor):
    """A caller's own processor: sees what comes before DoLa."""

    def __init__(self) -> None:
        self.input_ids: list[Tensor] = []
        self.scores: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.input_ids.append(input_ids.clone())
        self.scores.append(scores.clone())
        return scores
