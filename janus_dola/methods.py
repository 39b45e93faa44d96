"""Other readings of the same exits: DeCo, SLED and Confident; and `choose`, which knows every method by name.

The symbols are those of `dola_runtime`; z are logits.
"""

import math

import torch
from torch import Tensor

from janus_dola.dola_runtime import Reading, dola, log_softmax, softmax

DECO_K, DECO_P = 20, 0.9  # of all their experiments
SLED_STEPS = 10  # T
COS_EPS = 1e-6  # cosines up to this count as 0: they are rounding (an exit equal to z_N up to a constant has no others)


def choose(
    reading: Reading, candidates: Tensor, strength: Tensor, method: str = "dola", top_k: int = 10
) -> tuple[Tensor, Tensor]:
    """What a method makes of the rows, each with its own candidates.

    Args:
        reading: What `read` gives for these rows.
        candidates: Which exits each row may choose from, bool [rows, J].
        strength: α of `dola` or `deco`, η of `sled`, [rows]; `confident` has none.
        method: A key of `METHODS`.
        top_k: SLED's k.

    Returns:
        log p̂, [rows, V], and M as an index into the exits, int64 [rows]; J stands for N.
    """
    if method == "dola":
        return dola(reading, candidates, strength)
    J = candidates.shape[1]
    if not J:
        return reading.log_qN, torch.zeros_like(strength, dtype=torch.long)
    eligible = candidates & ~reading.jsd.isnan()
    if method == "deco":
        log_p, M_index, found = deco(reading, eligible, strength)
    elif method == "confident":
        log_p, M_index, found = confident(reading, eligible)
    else:
        log_p, M_index, found = sled(reading, eligible, strength, top_k)
    return torch.where(found.unsqueeze(1), log_p, reading.log_qN), M_index.where(found, J)


def deco(reading: Reading, candidates: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """DeCo (arXiv 2410.11779; the formula is that of the code published with it): a sure exit's logits are added.

    C = the k = 20 most likely tokens of q_N, cut after the first at which their cumulative probability reaches p = 0.9;
    (M, c) = the layer and the value of max q_j(x) over candidates j and x ∈ C; p̂ = softmax(z_N + α c z_M) on C.

    Theirs is for one row, and takes the maximum over all rows of a batch; here each row has its own M and c.

    Args:
        reading: What `read` gives for these rows; the JSD is not used.
        candidates: Which exits each row may choose from, bool [rows, J], J at least 1.
        alpha: α, at least 0, [rows].

    Returns:
        log p̂, [rows, V], −∞ outside C; M's index, int64 [rows], ties to the lowest layer; whether there was a
        candidate, bool [rows]: the other two are undefined for rows without one.
    """
    top, tokens = reading.log_qN.topk(min(DECO_K, reading.log_qN.shape[-1]))  # [rows, k]
    q = top.exp()
    in_C = q.cumsum(-1) - q < DECO_P  # what comes before a token is less than p
    log_qj_C = reading.log_qj.gather(-1, _at(tokens, reading.log_qj))  # [rows, J, k]
    allowed = candidates.unsqueeze(-1) & in_C.unsqueeze(1)
    log_c = torch.where(allowed, log_qj_C, -math.inf).amax(-1)  # [rows, J]
    M_index = log_c.argmax(-1)
    row = torch.arange(len(M_index), device=M_index.device)
    factor = alpha.to(q) * log_c[row, M_index].exp()  # [rows]
    scores = torch.where(in_C, top + factor.unsqueeze(-1) * log_qj_C[row, M_index], -math.inf)  # constants cancel out
    log_p = torch.full_like(reading.log_qN, -math.inf).scatter(-1, tokens, log_softmax(scores))
    return log_p, M_index, candidates.any(-1)


def sled(reading: Reading, candidates: Tensor, rate: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """SLED (arXiv 2411.02433, Algorithm 1, with the steps of the published code): z_N moves to what the exits foretell.

    I = the k most likely tokens of q_N, e_i the one-hot vector of token i;
    s_ij = max(0, cos(z_j − z_N, q_j − e_i))² for i ∈ I and each candidate j;
    P(i) = Σ_j s_ij / Σ_ij s_ij, which is P_latent: each layer's normalized s_ij, weighted by the layer's sum;
    z ← z − η_t (softmax(z) − P), t = 0 … T−1, from z_N on, with η_t = η (1 − t/T); p̂ = softmax(z) on I.

    Departures: a token that the caller ruled out (−∞ in z_N) is left out of the vectors, which would be infinite there.
    Tokens outside I get −∞, where theirs get −100 or −2500. Their loop for generation runs one step, that for scoring
    T = 10, which is used here. M, which SLED does not choose, is the layer of the greatest weight, for a trace to show.

    Args:
        reading: What `read` gives for these rows; z_N must be the logits themselves, not shifted by a constant, since
            |z_j − z_N| depends on it. The JSD is not used.
        candidates: Which exits each row uses, bool [rows, J], J at least 1.
        rate: The evolution rate η at t = 0, [rows].
        k: The evolution scale.

    Returns:
        log p̂, [rows, V], −∞ outside I; M's index, int64 [rows]; whether any cosine was positive, bool [rows]: the
        other two are undefined for rows without one.
    """
    top, tokens = reading.log_qN.topk(min(k, reading.log_qN.shape[-1]))  # [rows, k]
    cos = _cosines(reading, tokens)
    used = candidates.unsqueeze(-1) & ~top.isneginf().unsqueeze(1) & (cos > COS_EPS)
    s = torch.where(used, cos**2, 0.0)  # [rows, J, k]
    total = s.sum((1, 2))  # [rows]
    P = torch.zeros_like(reading.log_qN).scatter_(-1, tokens, s.sum(1) / total.unsqueeze(-1))  # [rows, V]
    z = reading.log_qN
    for t in range(SLED_STEPS):
        z = z - (softmax(z)[0] - P).mul_(rate.to(P).unsqueeze(-1) * (1 - t / SLED_STEPS))
    log_p = torch.full_like(z, -math.inf).scatter(-1, tokens, log_softmax(z.gather(-1, tokens)))
    return log_p, s.sum(-1).argmax(-1), total > 0


def confident(reading: Reading, candidates: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Confident Decoding (arXiv 2606.21906; vLLM's RFC 48080): from N backwards, the layer where entropy stops falling.

    H_j = −Σ q_j log q_j; from N on M goes down the candidates as long as each is surer than the one before, H_j < H_M;
    p̂ = q_M: no contrast, and no V_head.

    Departures: a token that the caller ruled out (−∞ in z_N) is left out of every q_j; other penalties are of q_N
    alone. Their code divides H by log V, which decides nothing, and can leave a step to N with a probability of 1 − p;
    p = 1 here, its default.

    Args:
        reading: What `read` gives for these rows; the JSD is not used.
        candidates: Which exits each row may choose from, bool [rows, J], J at least 1.

    Returns:
        log p̂, [rows, V]; M's index, int64 [rows]; whether M < N, bool [rows]: the other two are undefined for rows in
        which no candidate is surer.
    """
    J = candidates.shape[1]
    ruled_out = reading.log_qN.isneginf().unsqueeze(1)
    log_qj = log_softmax(reading.log_qj.masked_fill(ruled_out, -math.inf))
    entropy, least = _entropy(log_qj), _entropy(reading.log_qN)  # [rows, J], [rows]
    M_index = torch.full_like(least, J, dtype=torch.long)
    falling = torch.ones_like(M_index, dtype=torch.bool)
    for j in reversed(range(J)):
        surer = falling & candidates[:, j] & (entropy[:, j] < least)
        falling = surer | (falling & ~candidates[:, j])
        M_index, least = M_index.masked_fill(surer, j), torch.where(surer, entropy[:, j], least)
    row = torch.arange(len(M_index), device=M_index.device)
    return log_qj[row, M_index.clamp(max=J - 1)], M_index, M_index < J


def _entropy(log_q: Tensor) -> Tensor:
    """−Σ q log q, [..., V] -> [...]."""
    return -(log_q.exp() * log_q.clamp(min=torch.finfo(log_q.dtype).min)).sum(-1)  # 0 log 0 = 0


def _cosines(reading: Reading, tokens: Tensor) -> Tensor:
    """cos(z_j − z_N, q_j − e_i) for the tokens i, [rows, k] -> [rows, J, k].

    With d = z_j − z_N and m the most likely token of q_j, both sums over V are taken without m and m's part is added:
    an exit that is sure of it has a q_j − e_m near 0, which 1 − q_j(m) and Σ q_j² − 2 q_j(m) + 1 would round away. The
    one-hot vectors enter as corrections at i and m, so that no [J, k, V] tensor is needed.
    """
    z_N, z_j, q = reading.z_N.to(reading.log_qj), reading.z_j.to(reading.log_qj), reading.log_qj.exp()
    banned = z_N.isneginf().unsqueeze(1)  # [rows, 1, V]
    d = (z_j - z_N.unsqueeze(1)).masked_fill_(banned, 0.0)  # [rows, J, V]
    at = _at(tokens, q)
    m = q.masked_fill(banned, 0.0).argmax(-1, keepdim=True)  # [rows, J, 1]
    q_i, d_i, q_m, d_m, of_m = q.gather(-1, at), d.gather(-1, at), q.gather(-1, m), d.gather(-1, m), at == m
    others = q.scatter(-1, m, 0.0)
    not_m = others.sum(-1, keepdim=True)  # 1 − q_m
    others = others.masked_fill(banned, 0.0)
    dot = (others * d).sum(-1, keepdim=True) + torch.where(of_m, -not_m * d_i, q_m * d_m - d_i)
    square = others.square().sum(-1, keepdim=True) + torch.where(of_m, not_m**2, (1 - q_i) ** 2 + q_m**2 - q_i**2)
    return dot / (square * d.square().sum(-1, keepdim=True)).sqrt()


def _at(tokens: Tensor, exits: Tensor) -> Tensor:
    """Tokens [rows, k] as an index into exits [rows, J, V]: [rows, J, k]."""
    return tokens.unsqueeze(1).expand(-1, exits.shape[1], -1)
