"""The formulas against an independent float64 oracle in numpy and scipy, from the paper and not from the code."""

import math
from typing import Any

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from oracle import oracle_confident, oracle_contrast, oracle_deco, oracle_jsd, oracle_sled
from scipy.special import entr, softmax

from janus_dola import dola_runtime as dola
from janus_dola.methods import choose

settings.register_profile("untimed", deadline=None)  # what else runs on the machine is no fault of the code
settings.load_profile("untimed")
LOGITS = st.floats(-30, 30, width=32)


def tensor(array: Any, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.from_numpy(np.asarray(array)).to(dtype)


def of_rows(rows: int, alpha: float) -> torch.Tensor:
    return torch.full((rows,), alpha)


def rows_of_logits(*lead: int, V: int = 7) -> st.SearchStrategy[np.ndarray]:
    return hnp.arrays(np.float32, (*lead, V), elements=LOGITS)


@given(rows_of_logits(2), rows_of_logits(2, 3))
def test_jsd_is_the_papers(logits_P: np.ndarray, logits_Q: np.ndarray) -> None:
    P, Q = softmax(logits_P.astype(np.float64), -1)[:, None], softmax(logits_Q.astype(np.float64), -1)
    got = dola.jsd(tensor(P), tensor(Q))
    assert got.shape == (2, 3)
    assert got.dtype == torch.float32
    np.testing.assert_allclose(got.numpy(), oracle_jsd(P, Q), atol=1e-6)
    assert torch.equal(got, dola.jsd(tensor(Q), tensor(P))) or torch.allclose(
        got, dola.jsd(tensor(Q), tensor(P)), atol=1e-7
    )
    assert ((got >= 0) & (got <= math.log(2) + 1e-7)).all()
    np.testing.assert_allclose(
        dola.jsd(tensor(P, torch.float64), tensor(Q, torch.float64)), oracle_jsd(P, Q), atol=1e-9
    )


def test_jsd_is_not_the_reversed_divergence_of_other_implementations() -> None:
    P, Q = torch.tensor([[0.9, 0.1], [0.5, 0.5]]), torch.tensor([[0.1, 0.9], [0.01, 0.99]])
    M = (P + Q) / 2
    reversed_kl = (M * (M / P).log() / 2 + M * (M / Q).log() / 2).sum(-1)
    assert (dola.jsd(P, Q) - reversed_kl).abs().min() > 0.01


def test_jsd_of_disjoint_distributions_is_ln_2_and_of_equal_ones_0() -> None:
    P = torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.5, 0.0]])
    Q = torch.tensor([[0.0, 0.3, 0.7], [0.5, 0.5, 0.0]])
    assert dola.jsd(P, Q).tolist() == pytest.approx([math.log(2), 0.0], abs=1e-7)


@given(rows_of_logits(3), rows_of_logits(3, 4))
def test_layer_is_chosen_row_by_row(logits_N: np.ndarray, logits_j: np.ndarray) -> None:
    qN, qj = softmax(logits_N.astype(np.float64), -1), softmax(logits_j.astype(np.float64), -1)
    M = dola.select_layer(tensor(qN), tensor(qj))
    divergence = oracle_jsd(qN[:, None], qj)
    chosen = np.take_along_axis(divergence, M.numpy()[:, None], 1)[:, 0]
    np.testing.assert_allclose(chosen, divergence.max(1), atol=1e-6)
    for row in range(3):  # what the others are does not matter: no averaging over the batch
        assert dola.select_layer(tensor(qN[row : row + 1]), tensor(qj[row : row + 1])).item() == M[row]


def test_ties_go_to_the_lowest_layer() -> None:
    qN = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.2, 0.7]])
    near, far = qN, qN.flip(0)
    assert dola.select_layer(qN, torch.stack([near, far, far], 1)).tolist() == [1, 1]
    assert dola.select_layer(qN, torch.stack([far, near, far], 1)).tolist() == [0, 0]
    assert dola.select_layer(qN, torch.stack([near, near, near], 1)).tolist() == [0, 0]


@given(rows_of_logits(2, V=9), rows_of_logits(2, V=9), st.sampled_from([0.0, 0.05, 0.1, 0.3, 0.97]))
def test_contrast(logits_N: np.ndarray, logits_M: np.ndarray, alpha: float) -> None:
    q = softmax(logits_N.astype(np.float64), -1)
    if np.abs(q / (alpha * q.max(-1, keepdims=True) + 1e-300) - 1).min() < 1e-4:
        return  # a word on the very threshold: float32 may see it on the other side
    log_qN, log_qM = dola.log_softmax(tensor(logits_N)), dola.log_softmax(tensor(logits_M))
    for premature, logits in ((log_qM, logits_M), (torch.zeros_like(log_qM), None)):
        got, want = dola.contrast(log_qN, premature, of_rows(2, alpha)), oracle_contrast(logits_N, logits, alpha)
        assert np.array_equal(np.isneginf(got.numpy()), np.isneginf(want))
        np.testing.assert_allclose(got.exp().numpy(), np.exp(want), atol=2e-5)
        np.testing.assert_allclose(got.exp().sum(-1).numpy(), 1, atol=1e-5)


@given(rows_of_logits(2, V=5), rows_of_logits(2, V=5), st.floats(-50, 50, width=32))
def test_shift_of_logits_changes_nothing(logits_N: np.ndarray, logits_M: np.ndarray, shift: float) -> None:
    def decode(a: np.ndarray, b: np.ndarray) -> torch.Tensor:
        return dola.contrast(dola.log_softmax(tensor(a)), dola.log_softmax(tensor(b)), of_rows(2, 0.0)).exp()

    assert torch.allclose(decode(logits_N, logits_M), decode(logits_N + shift, logits_M - shift), atol=1e-3)


@given(rows_of_logits(3, V=6), rows_of_logits(3, V=6), st.sampled_from([0.0, 0.1, 0.5, 1.0]))
def test_contrast_with_apc_sums_to_1_on_V_head_and_is_0_elsewhere(
    logits_N: np.ndarray, logits_M: np.ndarray, alpha: float
) -> None:
    qN, qM = (torch.softmax(tensor(x), -1) for x in (logits_N, logits_M))
    before = qN.clone(), qM.clone()
    p = dola.contrast_with_apc(qN, qM, alpha)
    assert torch.equal(qN, before[0]) and torch.equal(qM, before[1])
    assert not p.isnan().any()
    np.testing.assert_allclose(p.sum(-1).numpy(), 1, atol=1e-5)
    assert (p[qN < alpha * qN.amax(-1, keepdim=True) * (1 - 1e-5)] == 0).all()
    in_log_space = dola.contrast(qN.log(), qM.log(), of_rows(3, alpha))  # as the decode path has it
    assert torch.allclose(p, in_log_space.exp(), atol=1e-5)


def test_alpha_0_keeps_every_word_and_alpha_1_the_argmax_alone() -> None:
    log_qN = torch.log_softmax(torch.tensor([[1.0, 2.0, -60.0], [3.0, -1.0, 0.0]]), -1)
    assert dola.head_mask(log_qN, of_rows(2, 0.0)).all()
    assert dola.head_mask(log_qN, of_rows(2, 1.0)).tolist() == [[False, True, False], [True, False, False]]
    own = dola.head_mask(log_qN, torch.tensor([1.0, 0.0]))  # a threshold for each row
    assert own.tolist() == [[False, True, False], [True, True, True]]


def test_fallback_M_is_N_is_q_N_and_not_uniform() -> None:
    log_qN = torch.log_softmax(torch.tensor([[1.0, 2.0, 4.0], [0.0, 0.0, 1.0]]), -1)
    none = dola.read(log_qN, torch.zeros(2, 0, 3))
    assert none.jsd.shape == (2, 0)
    log_p, M_index = choose(none, torch.ones(2, 0, dtype=torch.bool), torch.tensor([0.0, 0.5]))
    assert M_index.tolist() == [0, 0]  # J, which stands for N
    assert torch.equal(log_p[0], none.log_qN[0])
    np.testing.assert_allclose(log_p[1].exp(), [0, 0, 1], atol=1e-7)


def test_tokens_ruled_out_by_a_penalty_stay_out() -> None:
    logits_N = torch.tensor([[1.0, -math.inf, 0.5, 0.2], [-math.inf, -math.inf, 2.0, -math.inf]])
    logits_M = torch.tensor([[1.0, 5.0, -0.5, 0.0], [0.0, 1.0, 2.0, 3.0]])
    for alpha in (0.0, 0.1, 1.0):
        p = dola.contrast(dola.log_softmax(logits_N), dola.log_softmax(logits_M), of_rows(2, alpha)).exp()
        assert (p[logits_N == -math.inf] == 0).all()
        assert p.sum(-1).tolist() == pytest.approx([1, 1])
        assert not dola.jsd(dola.log_softmax(logits_N).exp(), dola.log_softmax(logits_M).exp()).isnan().any()


def test_saturated_logits() -> None:
    logits_N = torch.tensor([[1e4, 0.0, -1e4], [3e38, -3e38, 0.0]])
    logits_M = torch.tensor([[-1e4, 0.0, 1e4], [0.0, 0.0, 0.0]])
    qN, qM = dola.log_softmax(logits_N).exp(), dola.log_softmax(logits_M).exp()
    assert dola.jsd(qN, qM).tolist() == pytest.approx(oracle_jsd(qN.double().numpy(), qM.double().numpy()), abs=1e-6)
    for alpha in (0.0, 0.1):
        p = dola.contrast_with_apc(qN, qM, alpha)
        assert p.tolist() == [[1, 0, 0], [1, 0, 0]]


def test_vocabulary_of_janus_in_float32() -> None:
    rng = np.random.default_rng(0)
    logits_N = rng.normal(0, 3, (2, 102_400)).astype(np.float32)
    logits_j = (logits_N[:, None] + rng.normal(0, 1, (2, 4, 102_400))).astype(np.float32)
    log_qN, log_qj = dola.log_softmax(tensor(logits_N)), dola.log_softmax(tensor(logits_j))
    want = oracle_jsd(softmax(logits_N.astype(np.float64), -1)[:, None], softmax(logits_j.astype(np.float64), -1))
    np.testing.assert_allclose(dola.jsd(log_qN.exp()[:, None], log_qj.exp()).numpy(), want, atol=1e-6)
    got = dola.contrast(log_qN, log_qj[:, 1], of_rows(2, 0.1)).numpy()
    want = oracle_contrast(logits_N, logits_j[:, 1], 0.1)
    assert np.array_equal(np.isneginf(got), np.isneginf(want))
    np.testing.assert_allclose(got[np.isfinite(want)], want[np.isfinite(want)], atol=1e-4)


def test_probs_from_hidden_norms_once_and_upcasts() -> None:
    torch.manual_seed(0)
    norm, head = torch.nn.LayerNorm(8), torch.nn.Linear(8, 5, bias=False)
    h = torch.randn(3, 2, 8)
    q = dola.compute_probs_from_hidden(h, norm, head)
    assert q.shape == (3, 2, 5) and q.dtype == torch.float32
    np.testing.assert_allclose(q.detach().numpy(), softmax(head(norm(h)).double().detach().numpy(), -1), atol=1e-6)
    assert dola.compute_probs_from_hidden(h.bfloat16(), norm.bfloat16(), head.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize(
    ("num_layers", "want"),
    [
        (30, ((1, 10), (11, 20), (21, 29))),
        (24, ((1, 8), (9, 16), (17, 23))),
        (32, ((1, 10), (11, 21), (22, 31))),
        (4, ((1, 1), (2, 2), (3, 3))),
    ],
)
def test_buckets(num_layers: int, want: tuple[tuple[int, int], ...]) -> None:
    assert dola.buckets(num_layers) == want


@settings(max_examples=60)
@given(st.integers(4, 200))
def test_buckets_share_out_the_layers_below_N(num_layers: int) -> None:
    ranges = [range(first, last + 1) for first, last in dola.buckets(num_layers)]
    assert [layer for part in ranges for layer in part] == list(range(1, num_layers))
    for bucket_id, part in enumerate(ranges):
        candidates = dola.candidates_in_bucket(num_layers, bucket_id)
        assert set(candidates) <= set(part) and list(candidates) == sorted(set(candidates))
        even = [layer for layer in part if layer % 2 == 0]
        if len(even) < 3:
            assert list(candidates) == list(part)
        elif len(even) <= 5:
            assert list(candidates) == even
        else:
            gaps = np.diff(candidates)
            assert len(candidates) == 5 and set(candidates) <= set(even)
            assert (candidates[0], candidates[-1]) == (even[0], even[-1]) and gaps.max() - gaps.min() <= 2


@pytest.mark.parametrize(
    ("num_layers", "bucket_id", "want"),
    [
        (30, 0, (2, 4, 6, 8, 10)),
        (30, 1, (12, 14, 16, 18, 20)),
        (30, 2, (22, 24, 26, 28)),
        (24, 2, (18, 20, 22)),
        (40, 1, (14, 16, 20, 22, 26)),
        (8, 0, (1, 2)),
        (12, 2, (9, 10, 11)),
    ],
)
def test_candidates(num_layers: int, bucket_id: int, want: tuple[int, ...]) -> None:
    assert dola.candidates_in_bucket(num_layers, bucket_id) == want


@pytest.mark.parametrize(("num_layers", "bucket_id", "echo"), [(3, 0, "3"), (30, 3, "3"), (30, -1, "-1")])
def test_buckets_refuse(num_layers: int, bucket_id: int, echo: str) -> None:
    with pytest.raises(ValueError, match=f"got {echo}"):
        dola.candidates_in_bucket(num_layers, bucket_id)


@pytest.mark.parametrize("method", ["dola", "deco", "sled", "confident"])
def test_a_step_compiles_to_one_graph(method: str) -> None:
    """No value of a tensor is looked at, which would also make the GPU wait."""

    def step(*inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return choose(dola.read(*inputs[:2]), *inputs[2:], method)

    inputs = torch.randn(2, 50), torch.randn(2, 3, 50), torch.ones(2, 3, dtype=torch.bool), of_rows(2, 0.1)
    compiled = torch.compile(step, backend="eager", fullgraph=True)
    for got, want in zip(compiled(*inputs), step(*inputs), strict=True):
        assert torch.equal(got, want)


@given(rows_of_logits(3, V=9), rows_of_logits(3, 4, V=9), hnp.arrays(bool, (3, 4)), st.data())
def test_each_row_has_its_own_candidates_and_alpha(
    logits_N: np.ndarray, logits_j: np.ndarray, candidates: np.ndarray, data: st.DataObject
) -> None:
    """A row of a batch is what it is alone, with the exits that are its candidates and no others."""
    alpha = [data.draw(st.sampled_from([0.0, 0.1, 0.5, 1.0])) for _ in range(3)]
    rows = tensor(candidates, torch.bool), torch.tensor(alpha)
    log_p, M_index = choose(dola.read(tensor(logits_N), tensor(logits_j)), *rows)
    for row in range(3):
        own = candidates[row].nonzero()[0]
        reading = dola.read(tensor(logits_N[row : row + 1]), tensor(logits_j[row : row + 1, own]))
        every = torch.ones(1, len(own), dtype=torch.bool)
        alone, index = choose(reading, every, torch.tensor(alpha[row : row + 1]))
        assert M_index[row] == (own[index] if index < len(own) else 4)
        torch.testing.assert_close(log_p[row], alone[0], atol=1e-5, rtol=1e-5)
        if not len(own) and not alpha[row]:
            assert torch.equal(log_p[row], dola.log_softmax(tensor(logits_N))[row])  # q_N itself


# DeCo, SLED and Confident.


def decode(
    method: str,
    z_N: np.ndarray,
    exits: np.ndarray,
    strength: float,
    top_k: int = 10,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """log p̂ [rows, V] under all exits."""
    candidates = torch.ones(exits.shape[:2], dtype=torch.bool)
    reading = dola.read(tensor(z_N, dtype), tensor(exits, dtype), False)
    return choose(reading, candidates, torch.full((len(z_N),), strength, dtype=dtype), method, top_k)[0]


TILT = np.arange(40, dtype=np.float32) * np.float32(0.0137)  # added to logits: few are equal then


def apart(values: np.ndarray, gap: float = 1e-4) -> bool:
    """Whether no two are so near that float32 may order them otherwise."""
    return bool((np.diff(np.sort(values, -1), axis=-1) > gap).all())


def close(got: torch.Tensor, want: np.ndarray, atol: float) -> None:
    assert np.array_equal(np.isneginf(got.numpy()), np.isneginf(want))
    np.testing.assert_allclose(got.exp().numpy(), np.exp(want), atol=atol)


@settings(max_examples=50)
@given(rows_of_logits(2, V=30), rows_of_logits(2, 3, V=30), st.sampled_from([0.0, 0.6, 3.0]))
def test_deco(z_N: np.ndarray, exits: np.ndarray, alpha: float) -> None:
    z_N = z_N + TILT[:30]
    assume(apart(z_N))  # which of two equal tokens is kept is anybody's
    want = oracle_deco(z_N, exits, alpha)
    close(decode("deco", z_N, exits, alpha, dtype=torch.float64), want, 1e-9)
    q = np.sort(softmax(z_N.astype(np.float64), -1), -1)[:, ::-1]
    q_j = softmax(exits.astype(np.float64), -1).reshape(2, -1)
    if apart(q_j, 1e-7) and np.abs(q.cumsum(-1) - 0.9).min() > 1e-5:  # float32 sees the same C and M
        close(decode("deco", z_N, exits, alpha), want, 1e-3)


def test_deco_cuts_after_the_first_that_reaches_p_and_at_20() -> None:
    q = np.array([[0.5, 0.3, 0.1, 0.05, 0.05], [0.91, 0.03, 0.03, 0.02, 0.01]])
    kept = decode("deco", np.log(q) + 1e-9, np.zeros((2, 1, 5)), 0.6, dtype=torch.float64).isfinite()
    assert kept.sum(-1).tolist() in ([3, 1], [4, 1])  # 0.5 + 0.3 + 0.1 is 0.9, give or take
    assert decode("deco", np.zeros((2, 50)), np.zeros((2, 1, 50)), 0.6).isfinite().sum(-1).tolist() == [20, 20]


def test_deco_takes_the_surest_exit_on_C_alone() -> None:
    z_N = np.log(np.array([[0.6, 0.35, 0.04, 0.01]]))
    sure_of_another = np.log(np.array([0.01, 0.02, 0.01, 0.96]))  # outside C
    sure, less = np.log(np.array([0.1, 0.8, 0.05, 0.05])), np.log(np.array([0.7, 0.1, 0.1, 0.1]))
    exits = np.stack([sure_of_another, less, sure])[None]
    reading = dola.read(tensor(z_N), tensor(exits), False)
    log_p, M_index = choose(reading, torch.ones(1, 3, dtype=torch.bool), torch.tensor([2.0]), "deco")
    assert M_index.tolist() == [2] and log_p.argmax().item() == 1
    only = torch.tensor([[True, True, False]])
    assert choose(reading, only, torch.tensor([2.0]), "deco")[1].tolist() == [1]
    twice = dola.read(tensor(z_N), tensor(np.stack([less, sure, sure])[None]), False)
    assert choose(twice, torch.ones(1, 3, dtype=torch.bool), torch.tensor([2.0]), "deco")[1].tolist() == [1]


@settings(max_examples=50)
@given(rows_of_logits(2, V=9), rows_of_logits(2, 3, V=9), st.sampled_from([0.0, 0.5, 2.0]), st.sampled_from([1, 4, 10]))
def test_sled(z_N: np.ndarray, exits: np.ndarray, rate: float, k: int) -> None:
    z_N = z_N + TILT[:9]
    assume(apart(z_N))
    want = oracle_sled(z_N, exits, rate, k)
    close(decode("sled", z_N, exits, rate, k, torch.float64), want, 1e-7)


@given(hnp.arrays(np.float32, (2, 40), elements=st.floats(-8, 8, width=32)), st.integers(0, 2**32 - 1))
def test_sled_in_float32(z_N: np.ndarray, seed: int) -> None:
    z_N = z_N + TILT
    assume(apart(z_N))
    exits = (z_N[:, None] + np.random.default_rng(seed).normal(0, 2, (2, 5, 40))).astype(np.float32)
    close(decode("sled", z_N, exits, 2.0), oracle_sled(z_N, exits, 2.0), 1e-4)


def test_sled_of_an_exit_that_is_sure() -> None:
    """q_j − e_i is next to 0 there: rounding must not make up a cosine."""
    rng = np.random.default_rng(0)
    z_N = rng.normal(0, 3, (3, 500)).astype(np.float32)
    exits = rng.normal(0, 3, (3, 4, 500)).astype(np.float32)
    exits[:, :2, 7] += 40
    z_N[:, 7] += 5
    close(decode("sled", z_N, exits, 2.0), oracle_sled(z_N, exits, 2.0), 1e-5)


def test_where_no_cosine_is_positive_sled_changes_nothing() -> None:
    z_N = np.array([[3.0, 1.0, 0.0, -1.0], [3.0, 1.0, 0.0, -1.0]])
    exits = np.stack([z_N, z_N], 1)
    exits[1, 1] = [0.0, 1.0, 2.0, 0.5]  # in the second row one that differs
    log_p = decode("sled", z_N, exits, 2.0, 2)
    assert torch.equal(log_p[0], dola.log_softmax(tensor(z_N))[0])
    assert log_p[1].isfinite().sum() == 2
    close(log_p[1:], oracle_sled(z_N[1:], exits[1:], 2.0, 2), 1e-6)


@given(hnp.arrays(np.float32, (2, 5), elements=st.floats(0, 20, width=32)), st.integers(0, 2**32 - 1))
def test_confident(sharpness: np.ndarray, seed: int) -> None:
    logits = np.random.default_rng(seed).normal(0, 1, (2, 5, 9)) * (0.1 + sharpness[..., None])
    z_N, exits = logits[:, 4].astype(np.float32), logits[:, :4].astype(np.float32)
    assume(apart(entr(softmax(logits, -1)).sum(-1), 1e-6))
    close(decode("confident", z_N, exits, 0.0, dtype=torch.float64), oracle_confident(z_N, exits), 1e-9)
    close(decode("confident", z_N, exits, 0.0), oracle_confident(z_N, exits), 1e-5)


def test_confident_goes_down_as_long_as_the_entropy_falls() -> None:
    """The first valley from N backwards, not the surest of all; N itself where the layer below is less sure."""
    sure, middle, unsure = (np.array([scale, 0.0, 0.0, -scale]) for scale in (6.0, 2.0, 0.5))
    exits = np.stack([[sure, unsure, middle[::-1]], [sure, sure, unsure], [unsure, middle, sure]])
    z_N = np.stack([unsure, middle, middle])
    reading = dola.read(tensor(z_N), tensor(exits), False)
    every = torch.ones(3, 3, dtype=torch.bool)
    log_p, M_index = choose(reading, every, torch.zeros(3), "confident")
    assert M_index.tolist() == [2, 3, 2]
    assert torch.equal(log_p[1], reading.log_qN[1]) and log_p[0].argmax() == 3
    # A layer that is no candidate of the row is passed over.
    own = torch.tensor([[True, False, True]] * 3)
    assert choose(reading, own, torch.zeros(3), "confident")[1][0] == 0
    same = dola.read(tensor(z_N), tensor(np.repeat(z_N[:, None], 3, 1)), False)  # not surer: ties are N's
    assert choose(same, every, torch.zeros(3), "confident")[1].tolist() == [3, 3, 3]


@pytest.mark.parametrize("method", ["deco", "sled", "confident"])
def test_tokens_ruled_out_stay_out_of_other_methods(method: str) -> None:
    rng = np.random.default_rng(1)
    z_N, exits = rng.normal(0, 3, (3, 40)).astype(np.float32), rng.normal(0, 3, (3, 4, 40)).astype(np.float32)
    z_N[0, [3, int(z_N[0].argmax())]] = -np.inf
    z_N[1, 5:] = -np.inf  # fewer are left than are kept
    exits[0, :, 3] = 30  # the exits' choice
    strength = {"deco": 0.6, "sled": 2.0, "confident": 0.0}[method]
    want = {
        "deco": oracle_deco(z_N, exits, strength),
        "sled": oracle_sled(z_N, exits, strength),
        "confident": oracle_confident(z_N, exits),
    }[method]
    close(decode(method, z_N, exits, strength), want, 1e-5)
    assert np.isneginf(want[1, 5:]).all() and np.isfinite(want[1]).any()


def test_a_constant_matters_to_neither_deco_nor_to_q_but_to_sleds_norm() -> None:
    """Why beam search, which hands over log-probabilities, must give SLED the logits back."""
    rng = np.random.default_rng(2)
    z_N, exits = rng.normal(0, 3, (2, 40)), rng.normal(0, 3, (2, 4, 40))
    for method, strength in (("deco", 0.6), ("sled", 2.0)):
        got, shifted = (decode(method, z_N + c, exits, strength, dtype=torch.float64) for c in (0.0, -20.0))
        assert torch.allclose(got.exp(), shifted.exp(), atol=1e-6) == (method == "deco")


@pytest.mark.parametrize("method", ["deco", "sled", "confident"])
@given(rows_of_logits(3, V=9), rows_of_logits(3, 4, V=9), hnp.arrays(bool, (3, 4)))
def test_each_row_of_other_methods_has_its_own_candidates(
    method: str, z_N: np.ndarray, exits: np.ndarray, candidates: np.ndarray
) -> None:
    """A row of a batch is what it is alone; without a candidate, or with none that is finite, it is the baseline."""
    strength = torch.tensor([0.3, 0.6, 2.0])
    exits = exits.copy()
    exits[0, 1, 2] = np.nan  # overflowed
    z_N = z_N + TILT[:9]
    before = z_N.copy(), exits.copy()
    reading = dola.read(tensor(z_N), tensor(exits), False)
    log_p, M_index = choose(reading, tensor(candidates, torch.bool), strength, method, 4)
    np.testing.assert_array_equal(before[0], z_N)
    np.testing.assert_array_equal(before[1], exits)
    for row in range(3):
        own = [j for j in candidates[row].nonzero()[0] if (row, j) != (0, 1)]
        alone = dola.read(tensor(z_N[row : row + 1]), tensor(exits[row : row + 1, own]), False)
        every = torch.ones(1, len(own), dtype=torch.bool)
        want, index = choose(alone, every, strength[row : row + 1], method, 4)
        torch.testing.assert_close(log_p[row], want[0], atol=1e-5, rtol=1e-5)
        if method != "sled" or not own:
            assert M_index[row] == (own[index] if index < len(own) else 4)
        if not own:
            assert torch.equal(log_p[row], dola.log_softmax(tensor(z_N))[row])
