"""The formulas of DoLa (arXiv 2309.03883), tensors in and tensors out.

Symbols, as in the paper: q_N is the next-token distribution of the final ("mature") layer N, q_j that of the early exit
at layer j, M the chosen ("premature") layer, V_head the tokens that the final layer finds plausible (eq. 4), F the
contrast (eq. 3) and p̂ the result; z are logits. Layers count from 1. Shapes: rows are sequences or beams, J exits, V
tokens.

A decode step, a scored position and a trace are all `read`, then `methods.choose`, which is `dola` for this method.
Arithmetic is float32, or float64 for float64 input. No argument is changed.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from janus_dola.buckets import buckets, candidates_in_bucket  # noqa: F401  # this is their published place

EPS = 1e-12  # inside the logarithms of the JSD


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


def dola(reading: Reading, candidates: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
    """Each row's premature layer among its own candidates, and what is left when it is subtracted.

    M = N means that there is nothing to subtract: the row has no candidate, or all of them overflowed. Then F is
    log q_N, and with α = 0 so is the result. (F = 0, the formula taken literally, would make p̂ uniform.)

    Args:
        reading: What `read` gives for these rows.
        candidates: Which exits each row may choose from, bool [rows, J].
        alpha: Threshold of V_head, in [0, 1], [rows].

    Returns:
        log p̂, [rows, V], and M as an index into the exits, int64 [rows]; J stands for N.
    """
    J = reading.jsd.shape[1]
    M_index = _most_divergent(reading.jsd, candidates)
    alone = (M_index == J).unsqueeze(1)  # M = N
    if J:
        log_qM = reading.log_qj[torch.arange(len(M_index), device=M_index.device), M_index.clamp(max=J - 1)]
        log_qM.masked_fill_(alone, 0.0)
    else:
        log_qM = torch.zeros_like(reading.log_qN)
    log_p = contrast(reading.log_qN, log_qM, alpha)
    return torch.where(alone & (alpha == 0).unsqueeze(1), reading.log_qN, log_p), M_index


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
