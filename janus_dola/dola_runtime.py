"""The formulas of DoLa (arXiv 2309.03883), tensors in and tensors out.

Symbols, as in the paper: q_N is the next-word distribution of the final ("mature") layer N, q_j that of the early exit
at layer j, M the chosen ("premature") layer, V_head the words that the final layer finds plausible (eq. 4), F the
contrast (eq. 3) and p̂ the result. Layers count from 1. Shapes: rows are sequences or beams, J candidates, V words.

Arithmetic is float32, or float64 for float64 input. No argument is changed.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

EPS = 1e-12  # inside the logarithms of the JSD
LOG_EPS = math.log(EPS)


def softmax(logits: Tensor) -> tuple[Tensor, Tensor]:
    """q and log q of logits [..., V], in float32 (float64 stays).

    `torch.log_softmax` keeps a few running sums over the 102,400 words: on a CPU with short vectors its q adds up to 1
    within 1e-5 only, which the JSD inherits. `sum` adds in pairs. Both results share the exp, which is the costly part.
    """
    log_q = logits.to(torch.promote_types(logits.dtype, torch.float32), copy=True)  # then in place: see `jsd`
    log_q -= logits.amax(-1, keepdim=True)
    q = log_q.exp()
    Z = q.sum(-1, keepdim=True)
    return q.div_(Z), log_q.sub_(Z.log())


def log_softmax(logits: Tensor) -> Tensor:
    """log q of logits [..., V], in float32 (float64 stays)."""
    return softmax(logits)[1]


def compute_probs_from_hidden(h: Tensor, ln_out: Callable[[Tensor], Tensor], phi: Callable[[Tensor], Tensor]) -> Tensor:
    """q_j = softmax(φ(LN_out(h_j))): the next-word distribution of an early exit.

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
    log_P = (P + EPS).log_() if log_P is None else log_P.clamp(min=LOG_EPS)
    log_Q = (Q + EPS).log_() if log_Q is None else log_Q
    # In place where the tensor is new here, and of the shape of both: fresh memory costs more than the arithmetic.
    log_M = torch.add(P / 2 + EPS, Q, alpha=0.5).log_()
    # Both KL in one sum, to which no word adds less than 0.
    terms = (log_Q - log_M).mul_(Q).addcmul_(log_M.sub_(log_P), P, value=-1)
    return (terms.sum(-1) / 2).clamp(0.0, math.log(2.0))


def select_layer(qN: Tensor, qj: Tensor) -> Tensor:
    """M = argmax_j JSD(q_N ‖ q_j), for each row by itself; ties go to the lowest layer.

    Args:
        qN: Probabilities of the final layer, [rows, V].
        qj: Probabilities of the candidates, lowest layer first, [rows, J, V].

    Returns:
        Index into J, int64 [rows].
    """
    return jsd(qN.unsqueeze(-2), qj).argmax(-1)


def premature(log_qj: Tensor, divergence: Tensor | None, candidates: list[int]) -> tuple[Tensor, Tensor]:
    """M of each row, and its log q_M.

    The JSD of an exit that overflowed (in float16) is NaN, which argmax would pick. It counts as the least divergent;
    where it is chosen all the same, there is nothing to subtract: the row's M is J, for N, and its log q_M 0.

    Args:
        log_qj: The exits' log-probabilities, [rows, J, V].
        divergence: JSD(q_N ‖ q_j), [rows, J]; not needed for one candidate.
        candidates: Indices into J to choose from, lowest layer first; at least one.

    Returns:
        Index into J, int64 [rows], and [rows, V].
    """
    rows = torch.arange(len(log_qj), device=log_qj.device)
    if len(candidates) == 1 or divergence is None:
        M = torch.full_like(rows, candidates[0])
    elif len(candidates) == divergence.shape[1]:
        M = divergence.nan_to_num(nan=-1.0).argmax(-1)
    else:
        index = torch.tensor(candidates, device=log_qj.device)
        M = index[divergence[:, index].nan_to_num(nan=-1.0).argmax(-1)]
    log_qM = log_qj[rows, M]
    lost = ~log_qM.amin(-1, keepdim=True).isfinite()  # NaN is less than all
    return M.masked_fill(lost[:, 0], log_qj.shape[1]), log_qM.masked_fill_(lost, 0.0)


def head_mask(log_qN: Tensor, alpha: float) -> Tensor:
    """V_head = { x : q_N(x) ≥ α max q_N } (eq. 4, adaptive plausibility constraint), compared in log space.

    Args:
        log_qN: [rows, V], up to a constant per row.
        alpha: In [0, 1]; 0 keeps every word, 1 the most likely alone.

    Returns:
        bool [rows, V].
    """
    log_alpha = math.log(alpha) if alpha > 0 else -math.inf
    return log_qN >= log_qN.amax(-1, keepdim=True) + log_alpha


def contrast(log_qN: Tensor, log_qM: Tensor | None, alpha: float) -> Tensor:
    """log p̂ = log_softmax(F) on V_head, −∞ elsewhere, with F = log q_N − log q_M (eq. 3).

    Args:
        log_qN: Log-probabilities of the final layer, [rows, V].
        log_qM: Log-probabilities of the chosen exit, [rows, V]. None means M = N, nothing to subtract: F = log q_N.
            (F = 0, the formula taken literally, would make p̂ uniform, which is not what the fallback is for.)
        alpha: Threshold of V_head, in [0, 1].

    Returns:
        [rows, V].
    """
    F = log_qN if log_qM is None else log_qN - log_qM
    return log_softmax(torch.where(head_mask(log_qN, alpha), F, -math.inf))


def contrast_with_apc(qN: Tensor, qM: Tensor, alpha: float) -> Tensor:
    """p̂ from probabilities: `contrast` for those who have no logarithms.

    Args:
        qN, qM: Probabilities of the final layer and of the chosen exit, [rows, V].
        alpha: Threshold of V_head, in [0, 1].

    Returns:
        p̂ [rows, V]: sums to 1 over V_head, 0 elsewhere.
    """
    # A q_M that underflowed to 0 stands for a tiny number: log 0 would make F infinite.
    return contrast(qN.log(), qM.clamp(min=torch.finfo(qM.dtype).tiny).log(), alpha).exp()


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
