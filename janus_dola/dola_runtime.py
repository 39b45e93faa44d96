"""The formulas of DoLa (arXiv 2309.03883), and of DeCo and SLED, tensors in and tensors out.

Symbols, as in the paper: q_N is the next-token distribution of the final ("mature") layer N, q_j that of the early exit
at layer j, M the chosen ("premature") layer, V_head the tokens that the final layer finds plausible (eq. 4), F the
contrast (eq. 3) and p̂ the result; z are logits. Layers count from 1. Shapes: rows are sequences or beams, J exits, V
tokens.

A decode step, a scored position and a trace are all `read`, then `choose`. Arithmetic is float32, or float64 for
float64 input. No argument is changed.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

EPS = 1e-12  # inside the logarithms of the JSD
COS_EPS = 1e-6  # a cosine of SLED's that is no more is 0 and rounding: of an exit that differs by a constant, all are


class Reading(NamedTuple):
    """What the final layer and the exits say.

    Attributes:
        log_qN: Log-probabilities of the final layer, [rows, V].
        log_qj: Those of the exits, lowest layer first, [rows, J, V].
        jsd: JSD(q_N ‖ q_j), [rows, J]; NaN for an exit that overflowed.
        z_N: What `read` was given: the logits of the final layer, [rows, V].
        z_j: Those of the exits, [rows, J, V].
    """

    log_qN: Tensor
    log_qj: Tensor
    jsd: Tensor
    z_N: Tensor
    z_j: Tensor


def read(logits_N: Tensor, logits_j: Tensor, dynamic: bool = True) -> Reading:
    """The distributions of all layers, and how far the exits are from the final one.

    Args:
        logits_N: Logits of the final layer, [rows, V]; −∞ rules a token out.
        logits_j: Logits of the exits, [rows, J, V]; J may be 0.
        dynamic: Whether the JSD is needed. Else it is 0: where every row has one candidate, there is nothing to select.
    """
    qN, log_qN = softmax(logits_N)
    qj, log_qj = softmax(logits_j)
    if dynamic:
        divergence = jsd(qN.unsqueeze(1), qj, log_qN.unsqueeze(1), log_qj)
    else:
        lost = ~log_qj.amin(-1).isfinite()  # NaN is less than all
        divergence = torch.zeros_like(lost, dtype=log_qN.dtype).masked_fill_(lost, torch.nan)
    return Reading(log_qN, log_qj, divergence, logits_N, logits_j)


def choose(
    reading: Reading, candidates: Tensor, strength: Tensor, method: str = "dola", top_k: int = 10
) -> tuple[Tensor, Tensor]:
    """What a method makes of the rows, each with its own candidates.

    Args:
        reading: Of these rows.
        candidates: Which exits each row may choose from, bool [rows, J].
        strength: α of `dola` or `deco`, η of `sled`, [rows].
        method: One of these three.
        top_k: The k of `sled`.

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
    else:
        log_p, M_index, found = sled(reading, eligible, strength, top_k)
    return torch.where(found.unsqueeze(1), log_p, reading.log_qN), M_index.where(found, J)


def dola(reading: Reading, candidates: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
    """Each row's premature layer among its own candidates, and what is left when it is subtracted.

    M = N means that there is nothing to subtract: the row has no candidate, or all of them overflowed. Then F is
    log q_N, and with α = 0 so is the result. (F = 0, the formula taken literally, would make p̂ uniform.)

    Args:
        reading: Of these rows.
        candidates: Which exits each row may choose from, bool [rows, J].
        alpha: Threshold of V_head, in [0, 1], [rows].

    Returns:
        log p̂, [rows, V], and M as an index into the exits, int64 [rows]; J stands for N.
    """
    log_qN, log_qj, divergence = reading[:3]
    J = divergence.shape[1]
    M_index = _most_divergent(divergence, candidates)
    alone = (M_index == J).unsqueeze(1)
    if J:
        log_qM = log_qj[torch.arange(len(M_index), device=M_index.device), M_index.clamp(max=J - 1)]
        log_qM.masked_fill_(alone, 0.0)
    else:
        log_qM = torch.zeros_like(log_qN)
    same = alone & (alpha == 0).unsqueeze(1)
    return torch.where(same, log_qN, contrast(log_qN, log_qM, alpha)), M_index


def deco(
    reading: Reading, candidates: Tensor, alpha: Tensor, k: int = 20, p: float = 0.9
) -> tuple[Tensor, Tensor, Tensor]:
    """DeCo (arXiv 2410.11779; the formula is that of the code published with it): a sure exit's logits are added.

    C = the most likely tokens of q_N, at most k, cut after the first at which their cumulative probability reaches p;
    (M, c) = the layer and the value of max q_j(x) over candidates j and x ∈ C; p̂ = softmax(z_N + α c z_M) on C.

    Theirs is for one row, and takes the maximum over all rows of a batch; here each row has its own M and c.

    Args:
        reading: Of these rows; the JSD is not used.
        candidates: Which exits each row may choose from, bool [rows, J], J at least 1.
        alpha: α, at least 0, [rows].
        k, p: Theirs for all experiments.

    Returns:
        log p̂, [rows, V], −∞ outside C; M's index, int64 [rows], ties to the lowest layer; whether there was a
        candidate, bool [rows]: the rest means nothing where there was none.
    """
    log_qN, log_qj = reading[:2]
    top, tokens = log_qN.topk(min(k, log_qN.shape[-1]))  # [rows, k]
    q = top.exp()
    in_C = q.cumsum(-1) - q < p  # what comes before a token is less than p
    at = tokens.unsqueeze(1).expand(-1, log_qj.shape[1], -1)  # [rows, J, k]
    allowed = candidates.unsqueeze(-1) & in_C.unsqueeze(1)
    log_qj_C = log_qj.gather(-1, at)  # [rows, J, k]
    log_c = torch.where(allowed, log_qj_C, -math.inf).amax(-1)  # [rows, J]
    M_index = log_c.argmax(-1)
    row = torch.arange(len(M_index), device=M_index.device)
    factor = alpha.to(q) * log_c[row, M_index].exp()  # [rows]
    scores = torch.where(in_C, top + factor.unsqueeze(-1) * log_qj_C[row, M_index], -math.inf)  # constants cancel out
    log_p = torch.full_like(log_qN, -math.inf).scatter(-1, tokens, log_softmax(scores))
    return log_p, M_index, candidates.any(-1)


def sled(reading: Reading, candidates: Tensor, rate: Tensor, k: int = 10, T: int = 10) -> tuple[Tensor, Tensor, Tensor]:
    """SLED (arXiv 2411.02433, Algorithm 1, with the steps of the published code): z_N moves to what the exits foretell.

    I = the k most likely tokens of q_N, e_i the one-hot vector of token i;
    s_ij = max(0, cos(z_j − z_N, q_j − e_i))² for i ∈ I and each candidate j;
    P(i) = Σ_j s_ij / Σ_ij s_ij, which is P_latent: each layer's normalised s_ij, weighted by the layer's sum;
    z ← z − η_t (softmax(z) − P), t = 0 … T−1, from z_N on, with η_t = η (1 − t/T); p̂ = softmax(z) on I.

    Departures: a token that the caller ruled out (−∞ in z_N) is left out of the vectors, which would be infinite there.
    Tokens outside I get −∞, where theirs get −100 or −2500. Their loop for generation runs one step, that for scoring
    T = 10. M, which SLED does not choose, is the layer of the greatest weight, for a trace to show.

    Args:
        reading: Of these rows, with z_N up to no constant: |z_j − z_N| depends on it. The JSD is not used.
        candidates: Which exits each row uses, bool [rows, J], J at least 1.
        rate: The evolution rate η at t = 0, [rows].
        k: The evolution scale.
        T: The number of steps.

    Returns:
        log p̂, [rows, V], −∞ outside I; M's index, int64 [rows]; whether any cosine was positive, bool [rows]: the
        rest means nothing where none was.
    """
    log_qN, log_qj, _, z_N, z_j = reading
    top, tokens = log_qN.topk(min(k, log_qN.shape[-1]))  # [rows, k]
    at = tokens.unsqueeze(1).expand(-1, log_qj.shape[1], -1)  # [rows, J, k]
    banned = z_N.isneginf().unsqueeze(1)  # [rows, 1, V]
    d = (z_j.to(log_qj) - z_N.to(log_qj).unsqueeze(1)).masked_fill_(banned, 0.0)  # [rows, J, V]
    q = log_qj.exp()
    # Both sums over V are of what is left without each exit's most likely token m: an exit that is sure of it has a
    # q_j − e_m near 0, which 1 − q_j(m) and Σ q_j² − 2 q_j(m) + 1 would round away. No [J, k, V] tensor is needed.
    rest = q.masked_fill(banned, 0.0)
    q_m, m = rest.max(-1, keepdim=True)  # [rows, J, 1]
    rest.scatter_(-1, m, 0.0)
    q_i, d_i = q.gather(-1, at), d.gather(-1, at)  # [rows, J, k]
    not_m = q.scatter_(-1, m, 0.0).sum(-1, keepdim=True)  # 1 − q_m
    of_m = at == m
    dot = (rest * d).sum(-1, keepdim=True) + torch.where(of_m, -not_m * d_i, q_m * d.gather(-1, m) - d_i)
    square = rest.square_().sum(-1, keepdim=True) + torch.where(of_m, not_m**2, (1 - q_i) ** 2 + q_m**2 - q_i**2)
    cos = dot / (square * d.square_().sum(-1, keepdim=True)).sqrt()  # [rows, J, k]
    used = candidates.unsqueeze(-1) & ~top.isneginf().unsqueeze(1) & (cos > COS_EPS)
    s = torch.where(used, cos**2, 0.0)
    total = s.sum((1, 2))  # [rows]
    P = torch.zeros_like(log_qN).scatter_(-1, tokens, s.sum(1) / total.unsqueeze(-1))  # [rows, V]
    z = log_qN
    for t in range(T):
        z = z - (softmax(z)[0] - P).mul_(rate.to(P).unsqueeze(-1) * (1 - t / T))
    log_p = torch.full_like(log_qN, -math.inf).scatter(-1, tokens, log_softmax(z.gather(-1, tokens)))
    return log_p, s.sum(-1).argmax(-1), total > 0


def softmax(logits: Tensor) -> tuple[Tensor, Tensor]:
    """q and log q of logits [..., V], in float32 (float64 stays).

    On the CPU `torch.log_softmax` keeps a few running sums over the 102,400 tokens: with short vectors its q adds up to
    1 within 1e-5 only, which the JSD inherits. `sum` adds in pairs. Both results share the exp, which is the costly
    part. Elsewhere what costs is starting kernels, and it is two in place of eight.
    """
    if logits.device.type != "cpu":
        log_q = log_softmax(logits)
        return log_q.exp(), log_q
    log_q = logits.to(torch.promote_types(logits.dtype, torch.float32), copy=True)  # then in place: fresh memory costs
    log_q -= logits.amax(-1, keepdim=True)  #                                          more than the arithmetic
    q = log_q.exp()
    Z = q.sum(-1, keepdim=True)
    return q.div_(Z), log_q.sub_(Z.log())


def log_softmax(logits: Tensor) -> Tensor:
    """log q of logits [..., V], in float32 (float64 stays)."""
    if logits.device.type == "cpu":
        return softmax(logits)[1]
    return torch.log_softmax(logits, -1, dtype=torch.promote_types(logits.dtype, torch.float32))


def compute_probs_from_hidden(h: Tensor, ln_out: Callable[[Tensor], Tensor], phi: Callable[[Tensor], Tensor]) -> Tensor:
    """q_j = softmax(φ(LN_out(h_j))): the next-token distribution of an early exit.

    Args:
        h: Output of layer j, [..., d], not normed yet.
        ln_out: The final norm.
        phi: The head, [..., d] -> logits [..., V].

    Returns:
        Probabilities [..., V].
    """
    return softmax(phi(ln_out(h)))[0]


def jsd(P: Tensor, Q: Tensor, log_P: Tensor | None = None, log_Q: Tensor | None = None) -> Tensor:
    """Jensen-Shannon divergence, JSD(P‖Q) = ½ KL(P‖M) + ½ KL(Q‖M) with M = (P + Q)/2, in nats: 0 ≤ JSD ≤ ln 2.

    Well-known DoLa implementations compute KL(M‖P) in place of KL(P‖M); this is the paper's (eq. 2).

    Args:
        P, Q: Probabilities [..., V], broadcast against each other.
        log_P, log_Q: Their logarithms, where the caller has them: two passes over the vocabulary less. log P may be −∞
            where P is 0; a log Q of −∞ makes NaN.

    Returns:
        [...].
    """
    log_P = (P + EPS).log_() if log_P is None else log_P.clamp(min=math.log(EPS))
    log_Q = (Q + EPS).log_() if log_Q is None else log_Q
    log_M = torch.lerp(P, Q, 0.5).add_(EPS).log_()
    KL_PM = (log_P - log_M).mul_(P).sum(-1)
    KL_QM = (log_Q - log_M).mul_(Q).sum(-1)
    return (KL_PM + KL_QM).div_(2).clamp_(0.0, math.log(2.0))


def select_layer(qN: Tensor, qj: Tensor) -> Tensor:
    """M = argmax_j JSD(q_N ‖ q_j), for each row by itself; ties go to the lowest layer.

    Args:
        qN: Probabilities of the final layer, [rows, V].
        qj: Probabilities of the candidates, lowest layer first, [rows, J, V].

    Returns:
        Index into J, int64 [rows].
    """
    divergence = jsd(qN.unsqueeze(-2), qj)
    return _most_divergent(divergence, torch.ones_like(divergence, dtype=torch.bool))


def _most_divergent(divergence: Tensor, candidates: Tensor) -> Tensor:
    """The argmax of each row's candidates, both [rows, J]; J, for N, where a row has none whose JSD is a number."""
    eligible = torch.where(candidates, divergence, -2.0).nan_to_num_(nan=-2.0)
    return pad(eligible, (0, 1), value=-1.0).argmax(-1)


def head_mask(log_qN: Tensor, alpha: Tensor) -> Tensor:
    """V_head = { x : q_N(x) ≥ α max q_N } (eq. 4, adaptive plausibility constraint), compared in log space.

    Args:
        log_qN: [rows, V], up to a constant per row.
        alpha: In [0, 1], [rows]; 0 keeps every token, 1 the most likely alone.

    Returns:
        bool [rows, V].
    """
    return log_qN >= log_qN.amax(-1, keepdim=True) + alpha.to(log_qN).log().unsqueeze(-1)


def contrast(log_qN: Tensor, log_qM: Tensor, alpha: Tensor) -> Tensor:
    """log p̂ = log_softmax(F) on V_head, −∞ elsewhere, with F = log q_N − log q_M (eq. 3).

    Args:
        log_qN: Log-probabilities of the final layer, [rows, V].
        log_qM: Log-probabilities of the chosen exit, [rows, V]; 0 where there is nothing to subtract.
        alpha: Threshold of V_head, in [0, 1], [rows].

    Returns:
        [rows, V].
    """
    return log_softmax(torch.where(head_mask(log_qN, alpha), log_qN - log_qM, -math.inf))


def contrast_with_apc(qN: Tensor, qM: Tensor, alpha: float) -> Tensor:
    """p̂ from probabilities: `contrast` for those who have no logarithms.

    Args:
        qN, qM: Probabilities of the final layer and of the chosen exit, [rows, V].
        alpha: Threshold of V_head, in [0, 1].

    Returns:
        p̂ [rows, V]: sums to 1 over V_head, 0 elsewhere.
    """
    # A q_M that underflowed to 0 stands for a tiny number: log 0 would make F infinite.
    log_qM = qM.clamp(min=torch.finfo(qM.dtype).tiny).log()
    return contrast(qN.log(), log_qM, qN.new_full(qN.shape[:-1], alpha)).exp()


def buckets(num_layers: int) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
    """The three ranges of layers that candidates come from: thirds of 1…N, the last one ending at N − 1.

    Returns:
        Three (first, last) pairs: 30 -> (1, 10), (11, 20), (21, 29); 24 -> (1, 8), (9, 16), (17, 23).

    Raises:
        ValueError: Fewer than 4 layers.
    """
    if num_layers < 4:
        raise ValueError(f"num_layers must be at least 4 for three buckets, got {num_layers}")
    first, second = num_layers // 3, 2 * num_layers // 3
    return (1, first), (first + 1, second), (second + 1, num_layers - 1)


def candidates_in_bucket(num_layers: int, bucket_id: int) -> tuple[int, ...]:
    """The candidates of a bucket: its even layers, or all if those are fewer than 3, or five evenly spaced of more.

    Args:
        num_layers: N.
        bucket_id: 0, 1 or 2.

    Returns:
        Layers, lowest first: 30, 2 -> (22, 24, 26, 28).

    Raises:
        ValueError: There is no such bucket.
    """
    if bucket_id not in (0, 1, 2):
        raise ValueError(f"bucket_id must be 0, 1 or 2, got {bucket_id!r}")
    first, last = buckets(num_layers)[bucket_id]
    layers = tuple(range(first, last + 1))
    even = tuple(layer for layer in layers if layer % 2 == 0)
    if len(even) < 3:
        return layers
    if len(even) > 5:
        return tuple(even[i * (len(even) - 1) // 4] for i in range(5))
    return even
