"""The decode step against an oracle: an uncached forward pass with all hidden states, and the formulas in float64."""

import copy
import math
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from inspect import signature
from typing import Any

import numpy as np
import pytest
import torch
from conftest import load_model
from oracle import N, Recorder, all_logits, assert_scores, oracle_scores, oracle_step
from torch import Tensor
from transformers import LogitsProcessor, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from janus_dola import DoLaConfig, DoLaJanusWrapper, DoLaTrace
from janus_dola.exits import ExitView
from janus_dola.processor import NaNWatch

CONFIGS = [
    DoLaConfig(),
    DoLaConfig(alpha=0.3, bucket_id=0),
    DoLaConfig(alpha=0.0, candidate_layers=[3, 11, 29]),
    DoLaConfig(alpha=0.1, candidate_layers=[17]),  # static DoLa
    DoLaConfig(alpha=0.1, candidate_layers=[]),  # nothing to subtract, V_head alone
    DoLaConfig(method="deco"),
    DoLaConfig(method="deco", deco_alpha=2.0, candidate_layers=[3, 11, 29]),
    DoLaConfig(method="sled"),
    DoLaConfig(method="sled", sled_rate=5.0, sled_top_k=4, candidate_layers=[*range(1, N + 1)]),
    DoLaConfig(method="confident"),
    DoLaConfig(method="confident", candidate_layers=[*range(1, N + 1)]),
]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("num_beams", [1, 3])
def test_each_step_of_a_cached_generation_is_the_oracles(
    model: Any, prompt: dict[str, Any], config: DoLaConfig, num_beams: int
) -> None:
    recorder = Recorder()
    output = DoLaJanusWrapper(model, config).generate(
        **(prompt | {"max_new_tokens": 4, "eos_token_id": 511}),
        num_beams=num_beams,
        logits_processor=[recorder],
        return_dict_in_generate=True,
        output_scores=True,
    )
    assert len(output.scores) == len(recorder.input_ids) == 4
    for tokens, got in zip(recorder.input_ids, output.scores, strict=True):
        logits = all_logits(model, prompt["inputs_embeds"], prompt["attention_mask"], tokens)
        live = np.asarray(tokens.shape[1] == 0 or ~(tokens == 511).any(1)).repeat(1)
        want = oracle_step(logits, logits[:, -1], config)
        assert_scores(got[live], want[live]) if live.shape == (len(want),) else assert_scores(got, want)
    if num_beams == 1:
        assert torch.equal(output.sequences, torch.stack([scores.argmax(-1) for scores in output.scores], 1))


@pytest.mark.parametrize("layers", [(22, 24, 26, 28), (1,), (5, 29)])
@pytest.mark.parametrize("kept", [1, 0])
def test_exits_equal_one_head_call_each(model: Any, prompt: dict[str, Any], layers: tuple[int, ...], kept: int) -> None:
    """They are ahead of the model's own logits, of the last position or of the whole prompt."""
    language_model, J = model.language_model, len(layers)
    inputs = {name: prompt[name] for name in ("inputs_embeds", "attention_mask")}
    few = {name: kept for name in signature(type(language_model).forward).parameters if name.endswith("logits_to_keep")}
    with torch.no_grad():
        plain = language_model(**inputs, output_hidden_states=True)
        logits = ExitView(language_model, layers).model(**inputs, **few).logits
        want = [language_model.lm_head(language_model.model.norm(plain.hidden_states[j][:, -1:])) for j in layers]
    assert torch.allclose(logits[:, :J], torch.cat(want, 1), atol=1e-5)
    assert logits.shape[1] == J + (kept or inputs["inputs_embeds"].shape[1])
    assert torch.allclose(logits[:, J:], plain.logits[:, -kept:], atol=1e-5)


def test_a_row_does_not_depend_on_the_others(model: Any, prompt: dict[str, Any]) -> None:
    wrapper = DoLaJanusWrapper(model)
    details = {"return_dict_in_generate": True, "output_scores": True}
    batch = wrapper.generate(**prompt, **details)
    for order in ([2, 0, 1], [1], [0, 0]):
        rows = {name: prompt[name][order] for name in ("inputs_embeds", "attention_mask")}
        part = wrapper.generate(**(prompt | rows), **details)
        steps = part.sequences.shape[1]
        assert torch.equal(part.sequences, batch.sequences[order][:, :steps])
        for got, want in zip(part.scores, batch.scores, strict=False):
            assert_scores(got, want[order].double().numpy())
    row = 0  # by itself, without its padding
    keep = prompt["attention_mask"][row].bool()
    alone = {
        "inputs_embeds": prompt["inputs_embeds"][row : row + 1, keep],
        "attention_mask": prompt["attention_mask"][:1, keep],
    }
    alone["attention_mask"] = torch.ones(1, int(keep.sum()), dtype=torch.long)
    assert torch.equal(wrapper.generate(**(prompt | alone))[0], batch.sequences[row])


ROWS = [DoLaConfig(alpha=0.3, bucket_id=0), DoLaConfig(use_dola_lm=False), DoLaConfig(candidate_layers=[17])]


@pytest.mark.parametrize(
    "kind",
    [{}, {"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}, {"do_sample": True, "num_return_sequences": 2}],
    ids=str,
)
def test_each_row_follows_its_own_configuration(model: Any, prompt: dict[str, Any], kind: dict[str, Any]) -> None:
    """In one batch, with its beams and returned sequences: as the whole batch under that configuration answers it."""
    wrapper = DoLaJanusWrapper(model, DoLaConfig(alpha=0.9))  # of no row
    details = kind | {"return_dict_in_generate": True, "output_scores": True}

    prompt = prompt | {"max_new_tokens": 6}

    def ask(**more: Any) -> Any:
        torch.manual_seed(0)
        return wrapper.generate_with_dola(**(prompt | details | more))

    trace = DoLaTrace()
    got = ask(configs=ROWS, trace=trace)
    each, beams = kind.get("num_return_sequences", 1), kind.get("num_beams", 1)
    sampled = "do_sample" in kind  # then rows part ways after the first step: a batch draws for all rows at once
    for row, config in enumerate(ROWS):
        want = ask(configs=[config] * 3)
        scores = slice(row * max(beams, each), (row + 1) * max(beams, each))
        mine, its = (x.scores[0][scores].log_softmax(-1) for x in (got, want))  # all off are logits, up to a constant
        assert_scores(mine, its.double().numpy())
        if not sampled:
            mine, its = (x.sequences[row * each : (row + 1) * each] for x in (got, want))
            T = min(mine.shape[1], its.shape[1])
            assert torch.equal(mine[:, :T], its[:, :T])
        layers = set(trace.layers[row * each : (row + 1) * each].flatten().tolist()) - {0}
        own = [] if row == 1 else config.resolve_layers(N)
        assert layers <= set(own or [N])
        read = ~trace.jsd[row * each, 0].isnan()
        assert [j for j, is_read in zip(trace.traced_layers, read.tolist(), strict=True) if is_read] == [*own]
    assert trace.alpha == [0.3, 0.0, 0.1] and trace.candidate_layers == (2, 4, 6, 8, 10, 17)
    if not sampled:
        plain = model.language_model.generate(**prompt, **kind)[each : 2 * each]
        assert torch.equal(got.sequences[each : 2 * each, : plain.shape[1]], plain)


NOTHING_TO_SUBTRACT = [
    DoLaConfig(use_dola_lm=False),
    DoLaConfig(alpha=0.0, candidate_layers=[]),
    DoLaConfig(alpha=0.0, candidate_layers=[N]),
    DoLaConfig(method="deco", candidate_layers=[]),
    DoLaConfig(method="sled", candidate_layers=[N]),
    DoLaConfig(method="confident", candidate_layers=[N]),
]


@pytest.mark.parametrize("config", NOTHING_TO_SUBTRACT[::2], ids=str)
def test_beside_others_a_row_with_dola_off_is_the_baseline_after_penalties(
    model: Any, prompt: dict[str, Any], config: DoLaConfig
) -> None:
    """Its scores were log q_N, which add up to 1 where those of beams do not, and others of its beams were chosen."""
    wrapper, details = DoLaJanusWrapper(model), {"return_dict_in_generate": True, "output_scores": True}
    beams = prompt | details | {"num_beams": 3, "repetition_penalty": 1.3}
    plain = DoLaJanusWrapper(model, DoLaConfig(use_dola_lm=False)).generate(**beams)
    for row in range(3):
        configs = [config if i == row else DoLaConfig() for i in range(3)]
        for trace in (None, DoLaTrace()):
            got = wrapper.generate_with_dola(**beams, configs=configs, trace=trace)
            T = min(got.sequences.shape[1], plain.sequences.shape[1])
            assert torch.equal(got.sequences[row, :T], plain.sequences[row, :T])
            assert torch.allclose(got.sequences_scores[row], plain.sequences_scores[row], atol=1e-5)
            rows = slice(3 * row, 3 * row + 3)
            assert torch.allclose(got.scores[0][rows], plain.scores[0][rows], atol=1e-5)


def test_the_head_reads_each_row_s_own_exits_alone(model: Any, prompt: dict[str, Any]) -> None:
    """6 exits for 3 rows: 2 a row beside the final layer's own, in place of 6. A trace of all layers reads all."""
    wrapper, shapes = DoLaJanusWrapper(model), []
    handle = wrapper.phi.register_forward_hook(lambda head, args, logits: shapes.append(tuple(logits.shape[:2])))
    try:
        want = wrapper.generate_with_dola(**prompt, configs=ROWS, trace=DoLaTrace())
        assert set(shapes[1:]) == {(3, 2 + 1)}
        shapes.clear()
        every = DoLaTrace("all")
        assert torch.equal(wrapper.generate_with_dola(**prompt, configs=ROWS, trace=every), want)
        assert set(shapes[1:]) == {(3, N - 1 + 1)} and not every.jsd.isnan().any()
    finally:
        handle.remove()


@pytest.mark.parametrize("how", [{}, {"length_penalty": 0.0}, {"length_penalty": -1.0}, {"do_sample": True}], ids=str)
def test_dead_beams_score_minus_infinity(model: Any, prompt: dict[str, Any], how: dict[str, Any]) -> None:
    """V_head of alpha 1 leaves one answer: they were repeats and fragments, at -1e9 divided by the length penalty."""
    wrapper, prompt = DoLaJanusWrapper(model), prompt | {"max_new_tokens": 6}
    two = {name: value[:2] if isinstance(value, torch.Tensor) else value for name, value in prompt.items()} | how
    beams = {"num_beams": 4, "num_return_sequences": 4}
    scored = {"return_dict_in_generate": True, "output_scores": True}
    mixed = [DoLaConfig(alpha=1.0), DoLaConfig(use_dola_lm=False)]

    def ask(**more: Any) -> Any:
        torch.manual_seed(0)
        with pytest.warns(RuntimeWarning, match="of the .* returned sequences are no answers") as warned:
            output = wrapper.generate_with_dola(**(two | beams | more))
        (warning,) = warned
        assert warning.filename == __file__
        return output, int(str(warning.message).split()[0])

    output, dead = ask(configs=mixed, **scored)
    alive = output.sequences_scores.isfinite()
    assert alive[0] and alive[4] and dead == (~alive).sum() >= 3 and output.sequences_scores[~alive].isneginf().all()
    if not how.get("do_sample"):  # which may draw less than there is
        assert alive.tolist() == [True, False, False, False] + [True] * 4
        baseline = model.language_model.generate(**two, **beams, **scored)
        torch.testing.assert_close(output.sequences_scores[4:], baseline.sequences_scores[4:])
    greedy = wrapper.generate_with_dola(**(prompt | {"num_beams": 1}), configs=[mixed[0]] * 3)[0]
    T = min(len(greedy), output.sequences.shape[1])
    assert torch.equal(output.sequences[0, :T], greedy[:T])
    bare, again = ask(configs=mixed)  # without scores, it is counted as well
    assert torch.equal(bare, output.sequences) and again == dead
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing dead is returned
        wrapper.generate_with_dola(**(two | beams | {"num_return_sequences": 1}), configs=mixed)
        wrapper.generate_with_dola(**(two | beams), configs=mixed, logits_processor=[NaNWatch()])  # its caller looks


METHODS = [
    DoLaConfig(method="sled", bucket_id=0),
    DoLaConfig(method="deco", deco_alpha=1.5),
    DoLaConfig(method="sled", sled_top_k=3, candidate_layers=[5, 29]),
    DoLaConfig(method="confident", candidate_layers=[10, 20, 29]),
]


@pytest.mark.parametrize("num_beams", [1, 2])
def test_each_row_follows_its_own_method(model: Any, prompt: dict[str, Any], num_beams: int) -> None:
    """All methods in one batch, in any order, traced or not: each row as its method's oracle has it."""
    wrapper, details = DoLaJanusWrapper(model), {"return_dict_in_generate": True, "output_scores": True}
    for configs in (
        METHODS,
        [DoLaConfig(), METHODS[1], METHODS[0]],
        [METHODS[1], METHODS[3], DoLaConfig(use_dola_lm=False)],
    ):
        configs = configs[:3]
        recorder, trace = Recorder(), DoLaTrace()
        more = {"num_beams": num_beams, "configs": configs, "logits_processor": [recorder], **details}
        output = wrapper.generate_with_dola(
            **(prompt | {"max_new_tokens": 4, "eos_token_id": 511}), **more, trace=trace
        )
        for tokens, got in zip(recorder.input_ids, output.scores, strict=True):
            logits = all_logits(model, prompt["inputs_embeds"], prompt["attention_mask"], tokens)
            for prompt_row, config in enumerate(configs):
                rows = slice(prompt_row * num_beams, (prompt_row + 1) * num_beams)
                off = oracle_scores(logits[rows], logits[rows, -1], [], 0.0)
                want = oracle_step(logits[rows], logits[rows, -1], config) if config.use_dola_lm else off
                assert_scores(got[rows].log_softmax(-1), want)
        assert trace.method == [config.method for config in configs]
        assert (trace.head_sizes[0] == 10).all() or configs[0].method != "sled"


def test_configurations_that_do_not_fit_the_rows_are_refused(model: Any, prompt: dict[str, Any]) -> None:
    wrapper = DoLaJanusWrapper(model)
    for configs, message in (
        (ROWS[:2], "configs must be one for each of the 3 prompts, got 2"),
        ([], r"configs must be a list of at least one DoLaConfig, got \[\]"),
        (["off"] * 3, "configs must be a list of at least one DoLaConfig, got .'off'"),
        ([*ROWS[:2], DoLaConfig(candidate_layers=[31])], "candidate_layers must be in 1...30.* got 31"),
    ):
        with pytest.raises(ValueError, match=message):
            wrapper.generate_with_dola(**prompt, configs=configs)
    wrapper.config.use_dola_lm = False
    with pytest.raises(ValueError, match="configs must be None without DoLa"):
        wrapper.generate(**prompt, configs=ROWS)


@pytest.mark.parametrize("case", ["batch_left_padded", "batch_mixed", "two_images"])
def test_nothing_to_subtract_is_the_baseline_bit_for_bit(
    model: Any, expected: dict[str, Tensor], prompt: dict[str, Any], case: str
) -> None:
    prompt = prompt | {name: expected[f"{case}/{name}"] for name in ("inputs_embeds", "attention_mask")}
    details = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    draw = {"do_sample": True, "temperature": 0.8, "top_p": 0.9, "max_new_tokens": 6}
    want = model.language_model.generate(**(prompt | details))
    # The golden logits are those of a forward pass that reads the whole prompt out, which rounds otherwise.
    assert torch.allclose(want.logits[0], expected[f"{case}/logits"], atol=1e-5)
    assert torch.equal(want.sequences, expected[f"{case}/greedy"][:, : want.sequences.shape[1]])
    torch.manual_seed(1)
    drawn = model.language_model.generate(**(prompt | draw))
    for config in NOTHING_TO_SUBTRACT:
        wrapper = DoLaJanusWrapper(model, config)
        got = wrapper.generate(**(prompt | details))
        assert torch.equal(got.sequences, want.sequences), config
        for name in ("scores", "logits"):
            assert all(torch.equal(a, b) for a, b in zip(got[name], want[name], strict=True)), config
        beams = wrapper.generate(**prompt, num_beams=4)
        assert torch.equal(beams, expected[f"{case}/beam4"][:, : beams.shape[1]]), config
        torch.manual_seed(1)
        assert torch.equal(wrapper.generate(**(prompt | draw)), drawn), config


@pytest.mark.parametrize("way", ["keyword", "generation_config", "model"])
def test_repetition_penalty_with_left_padding(
    model: Any, expected: dict[str, Tensor], prompt: dict[str, Any], way: str
) -> None:
    """From embeddings, transformers 5 skips the penalty for as many new tokens as the row has padding."""
    wrapper = DoLaJanusWrapper(model, DoLaConfig(use_dola_lm=False))
    prompt = prompt | {"max_new_tokens": 24}
    defaults = model.language_model.generation_config
    if way == "keyword":
        got = wrapper.generate(**prompt, repetition_penalty=1.3)
    elif way == "generation_config":
        given = copy.deepcopy(defaults)
        given.repetition_penalty = 1.3
        got = wrapper.generate(**prompt, generation_config=given)
        assert given.repetition_penalty == 1.3
    else:
        before, defaults.repetition_penalty = defaults.repetition_penalty, 1.3
        try:
            got = wrapper.generate(**prompt)
        finally:
            defaults.repetition_penalty = before
    assert torch.equal(got, expected["batch_left_padded/greedy_rep13"][:, : got.shape[1]])


@pytest.mark.parametrize(
    "config",
    [DoLaConfig(bucket_id=1), DoLaConfig(method="deco"), DoLaConfig(method="sled"), DoLaConfig(method="confident")],
)
def test_penalties_come_before_dola(model: Any, prompt: dict[str, Any], config: DoLaConfig) -> None:
    recorder = Recorder()
    output = DoLaJanusWrapper(model, config).generate(
        **(prompt | {"max_new_tokens": 8, "eos_token_id": 511}),
        repetition_penalty=1.8,
        suppress_tokens=[43, 267],
        logits_processor=[recorder],
        return_dict_in_generate=True,
        output_scores=True,
    )
    for tokens, got in zip(recorder.input_ids, output.scores, strict=True):
        logits = all_logits(model, prompt["inputs_embeds"], prompt["attention_mask"], tokens)
        penalised = logits[:, -1].copy()
        for row, seen in enumerate(tokens.tolist()):
            for token in set(seen):
                penalised[row, token] *= 1.8 if penalised[row, token] < 0 else 1 / 1.8
        penalised[:, [43, 267]] = -np.inf
        assert_scores(got, oracle_step(logits, penalised, config))


def test_warpers_come_after_dola(model: Any, prompt: dict[str, Any]) -> None:
    wrapper = DoLaJanusWrapper(model, DoLaConfig(alpha=0.02))
    details = {"return_dict_in_generate": True, "output_scores": True, "max_new_tokens": 1}
    log_p = wrapper.generate(**(prompt | details)).scores[0]
    draw = {"do_sample": True, "top_k": 0}
    warm = wrapper.generate(**(prompt | details | draw), temperature=0.5).scores[0]
    assert torch.allclose(warm, log_p / 0.5, atol=1e-5)
    few = wrapper.generate(**(prompt | details | draw | {"top_k": 2})).scores[0]
    assert torch.equal(few.isfinite().sum(-1), torch.tensor([2, 2, 2]))
    assert torch.equal(few.topk(2).indices, log_p.topk(2).indices)
    nucleus = wrapper.generate(**(prompt | details | draw), top_p=0.6).scores[0]
    plausible = wrapper.generate(**(prompt | details | draw), min_p=0.5).scores[0]
    for row in range(3):
        p, order = log_p[row].exp().sort(descending=True)
        kept = int((p.cumsum(0) - p < 0.6).sum())
        assert set(nucleus[row].isfinite().nonzero().flatten().tolist()) == set(order[:kept].tolist())
        assert torch.equal(plausible[row].isfinite(), log_p[row].exp() >= 0.5 * p[0])


def test_sampling_draws_from_p_hat(model: Any) -> None:
    wrapper = DoLaJanusWrapper(model)
    ids = torch.tensor([[480, 40, 41, 42, 43], [480, 90, 91, 92, 93]])
    details = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 1, "eos_token_id": 511, "pad_token_id": 481}
    p = wrapper.generate(ids, **details, return_dict_in_generate=True, output_scores=True, do_sample=False)
    p = p.scores[0].exp()
    torch.manual_seed(0)
    draws = wrapper.generate(ids, **details, do_sample=True, top_k=0, num_return_sequences=400)[:, -1].view(2, 400)
    for row in range(2):
        shares = torch.bincount(draws[row], minlength=512) / 400
        assert (shares - p[row]).abs().max() < 0.08  # three standard errors and more
        assert (shares[p[row] == 0] == 0).all()
        assert (p[row] > 0.02).sum() > 2  # or it proves little


@pytest.mark.parametrize("alpha", [0.1, 1.0])
def test_beam_sampling_of_a_batch_whose_rows_end_at_different_steps(
    model: Any, prompt: dict[str, Any], alpha: float
) -> None:
    """With −∞ outside V_head, a row whose beams have all ended left torch.multinomial nothing to draw from."""
    wrapper = DoLaJanusWrapper(model, DoLaConfig(alpha=alpha))
    greedy = wrapper.generate(**prompt).tolist()
    # With alpha = 1 there is one way to go; this token ends it for row 0 while others go on.
    ends = next(token for token in greedy[0] if token not in greedy[1])
    step = greedy[0].index(ends)
    torch.manual_seed(0)
    sequences = wrapper.generate(
        **(prompt | {"do_sample": True, "eos_token_id": ends, "pad_token_id": 0}), num_beams=3, num_return_sequences=2
    )
    assert sequences.shape[0] == 6
    assert sequences.shape[1] > step + 1
    if alpha == 1.0:
        assert sequences[0, : step + 1].tolist() == greedy[0][: step + 1]


@pytest.mark.parametrize("num_return_sequences", [1, 3])
def test_beams_and_returned_sequences(model: Any, prompt: dict[str, Any], num_return_sequences: int) -> None:
    output = DoLaJanusWrapper(model).generate(
        **(prompt | {"max_new_tokens": 5, "eos_token_id": 511}),
        num_beams=3,
        num_return_sequences=num_return_sequences,
        return_dict_in_generate=True,
        output_scores=True,
    )
    assert output.sequences.shape == (3 * num_return_sequences, 5)
    # The score of a returned sequence is the mean of its log p̂, each from an uncached forward pass.
    sequences = output.sequences.view(3, num_return_sequences, 5)[:, 0]
    total = np.zeros(3)
    for t in range(5):
        logits = all_logits(model, prompt["inputs_embeds"], prompt["attention_mask"], sequences[:, :t])
        log_p = oracle_scores(logits, logits[:, -1], [22, 24, 26, 28], 0.1)
        total += log_p[np.arange(3), sequences[:, t].numpy()]
    got = output.sequences_scores.view(3, num_return_sequences)[:, 0]
    np.testing.assert_allclose(got.numpy(), total / 5, atol=1e-4)


def test_input_ids(model: Any) -> None:
    ids = torch.tensor([[480, 40, 41, 42, 43], [480, 90, 91, 92, 93]])
    wrapper = DoLaJanusWrapper(model)
    details = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": 511, "pad_token_id": 481}
    with torch.no_grad():
        embeds = model.language_model.get_input_embeddings()(ids)
    want = wrapper.generate(inputs_embeds=embeds, attention_mask=torch.ones_like(ids), **details)
    got = wrapper.generate(ids, attention_mask=torch.ones_like(ids), **details)
    named = wrapper.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **details)
    assert torch.equal(got[:, :5], ids) and torch.equal(got[:, 5:], want)
    assert torch.equal(named, got)
    penalised = wrapper.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **details, repetition_penalty=5.0)
    assert not torch.equal(penalised, got)  # transformers' own penalty, which sees the prompt too


def test_stopping_criteria_and_no_cache(model: Any, prompt: dict[str, Any]) -> None:
    class Stop(StoppingCriteria):
        def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
            return torch.full((len(input_ids),), input_ids.shape[1] >= 4)

    wrapper = DoLaJanusWrapper(model)
    want = wrapper.generate(**prompt)
    assert torch.equal(wrapper.generate(**prompt, stopping_criteria=StoppingCriteriaList([Stop()])), want[:, :4])


def test_streaming(model: Any, prompt: dict[str, Any]) -> None:
    class Streamer:
        def __init__(self) -> None:
            self.tokens: list[int] = []

        def put(self, value: Tensor) -> None:
            self.tokens += value.flatten().tolist()

        def end(self) -> None:
            self.tokens.append(-1)

    one = prompt | {name: prompt[name][:1] for name in ("inputs_embeds", "attention_mask")}
    wrapper, streamer = DoLaJanusWrapper(model), Streamer()
    sequences = wrapper.generate(**one, streamer=streamer)
    assert streamer.tokens == [*sequences[0].tolist(), -1]


@pytest.mark.parametrize(
    "arguments",
    [
        {"prompt_lookup_num_tokens": 3},
        {"assistant_model": object()},
        {"assistant_early_exit": 4},
        {"penalty_alpha": 0.6, "top_k": 4},
        {"num_beams": 4, "num_beam_groups": 2},
        {"guidance_scale": 1.5},
        {"dola_layers": "high"},
        {"custom_generate": "folder"},
    ],
    ids=lambda arguments: next(iter(arguments)),
)
def test_what_cannot_work_is_refused(model: Any, prompt: dict[str, Any], arguments: dict[str, Any]) -> None:
    name = "num_beam_groups" if "num_beam_groups" in arguments else next(iter(arguments))
    with pytest.raises(ValueError, match=name):
        DoLaJanusWrapper(model).generate(**prompt, **arguments)


def state(model: Any) -> dict[str, Any]:
    """All that must be as it was: the same objects with the same values."""
    attributes: dict[str, Any] = {}
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            attributes[f"{name} {key}"] = {k: id(v) for k, v in value.items()} if isinstance(value, dict) else id(value)
    return attributes | {
        "versions": {name: t._version for name, t in (*model.named_parameters(), *model.named_buffers())},
        "config": model.language_model.config.to_json_string(),
        "generation": model.language_model.generation_config.to_json_string(),
    }


class Look(LogitsProcessor, BaseStreamer):
    """Calls `look` in each step, from within the call and from another thread."""

    def __init__(self, look: Callable[[], None]) -> None:
        self.look, self.pool = look, ThreadPoolExecutor(1)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.put(scores)
        return scores

    def put(self, value: Tensor) -> None:
        self.look()
        self.pool.submit(self.look).result()

    def end(self) -> None:
        self.look()


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_the_model_is_as_it_was(model: Any, prompt: dict[str, Any], error: type[BaseException] | None) -> None:
    """During a call as well as after it."""

    class Fail(LogitsProcessor):
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            if error is not None and input_ids.shape[1] == 3:
                raise error
            return scores

    wrapper, prompt = DoLaJanusWrapper(model), prompt | {"max_new_tokens": 6}
    want = wrapper.generate(**prompt)
    before, given = state(model), {name: prompt[name].clone() for name in ("inputs_embeds", "attention_mask")}
    looks = []
    look = Look(lambda: looks.append(state(model) == before))
    if error is None:
        wrapper.generate(**prompt, repetition_penalty=1.3, logits_processor=[Fail(), look])
        one = {name: prompt[name][:1] for name in ("inputs_embeds", "attention_mask")}
        wrapper.generate(**(prompt | one), streamer=look)
        wrapper.generate(**prompt, num_beams=2, logits_processor=[look], trace=DoLaTrace("all"))
    else:
        with pytest.raises(error):
            wrapper.generate(**prompt, repetition_penalty=1.3, logits_processor=[Fail(), look])
    assert len(looks) > 3 and all(looks)
    assert state(model) == before
    assert all(torch.equal(prompt[name], value) for name, value in given.items())
    assert torch.equal(wrapper.generate(**prompt), want)


def test_hidden_states_on_request_leave_nothing_on_the_model(prompt: dict[str, Any]) -> None:
    """transformers 5 captures them by hooks, on whatever model it runs: here, on the view."""
    model = load_model()
    wrapper, before = DoLaJanusWrapper(model), state(model)
    want = wrapper.generate(**prompt)
    for _ in range(2):
        output = wrapper.generate(
            **(prompt | {"max_new_tokens": 3}),
            return_dict_in_generate=True,
            output_hidden_states=True,
            output_attentions=True,
        )
        assert torch.equal(output.sequences, want[:, :3])
        assert [len(step) for step in output.hidden_states] == [N + 1] * 3
    assert state(model) == before


@pytest.mark.parametrize("where", ["layer", "head", "norm"])
def test_an_error_inside_the_forward_pass_leaves_no_hook(model: Any, prompt: dict[str, Any], where: str) -> None:
    decoder = model.language_model.model
    module = {"layer": decoder.layers[25], "head": model.language_model.lm_head, "norm": decoder.norm}[where]
    wrapper = DoLaJanusWrapper(model)
    want, before = wrapper.generate(**prompt), state(model)

    def fail(*args: Any) -> None:
        raise KeyboardInterrupt

    handle = module.register_forward_hook(fail)
    try:
        with pytest.raises(KeyboardInterrupt):
            wrapper.generate(**prompt)
    finally:
        handle.remove()
    assert state(model) == before
    assert torch.equal(wrapper.generate(**prompt), want)


def test_hooks_of_others_see_the_exits_and_act_on_them(model: Any, prompt: dict[str, Any]) -> None:
    """What is hooked to the head is part of φ, of the exits' as of the final layer's: one call, seen whole."""
    seen = []
    head = model.language_model.lm_head

    def suppress(module: Any, args: Any, output: Tensor) -> Tensor:
        seen.append((args[0].shape[1], output.shape[1]))
        output = output.clone()
        output[..., 43] = 0.0
        return output

    want = DoLaJanusWrapper(model).generate(**prompt)
    handle = head.register_forward_hook(suppress)
    try:
        got = DoLaJanusWrapper(model).generate(
            **(prompt | {"max_new_tokens": 1}), return_dict_in_generate=True, output_scores=True
        )
        assert seen == [(5, 5)]
        logits = all_logits(model, prompt["inputs_embeds"], prompt["attention_mask"], torch.zeros(3, 0).long())
    finally:
        handle.remove()
    assert not logits[..., 43].any()
    assert_scores(got.scores[0], oracle_scores(logits, logits[:, -1], [22, 24, 26, 28], 0.1))
    assert not torch.equal(want[:, :1], got.sequences)


def test_threads_on_one_model_do_not_meet(model: Any, prompt: dict[str, Any]) -> None:
    wrappers = [
        DoLaJanusWrapper(model, DoLaConfig(use_dola_lm=False)),
        DoLaJanusWrapper(model),
        DoLaJanusWrapper(model, DoLaConfig(bucket_id=0, alpha=0.02)),
    ]
    details = {"return_dict_in_generate": True, "output_scores": True}
    prompt = prompt | {"max_new_tokens": 6}
    alone = [wrapper.generate(**prompt, **details) for wrapper in wrappers]
    assert not torch.equal(alone[0].sequences, alone[1].sequences)
    results: dict[tuple[int, int], Any] = {}
    start = threading.Barrier(len(wrappers))

    def work(index: int) -> None:
        start.wait()
        for turn in range(4):
            results[index, turn] = wrappers[index].generate(**prompt, **details)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(wrappers))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4 * len(wrappers)
    for (index, _), got in results.items():
        assert torch.equal(got.sequences, alone[index].sequences)
        assert all(torch.equal(a, b) for a, b in zip(got.scores, alone[index].scores, strict=True))


def test_calls_may_nest(model: Any, prompt: dict[str, Any]) -> None:
    """A stopping criterion that asks the same model, with DoLa, must not disturb the call it is part of."""
    inner = DoLaJanusWrapper(model, DoLaConfig(bucket_id=0))
    asked = []

    class Ask(StoppingCriteria):
        def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
            asked.append(inner.generate(**prompt))
            return torch.zeros(len(input_ids), dtype=torch.bool)

    outer, few = DoLaJanusWrapper(model), prompt | {"max_new_tokens": 4}
    want, answer = outer.generate(**few), inner.generate(**prompt)
    assert torch.equal(outer.generate(**few, stopping_criteria=StoppingCriteriaList([Ask()])), want)
    assert len(asked) == 4 and all(torch.equal(each, answer) for each in asked)


@pytest.fixture
def small_model() -> Iterator[Any]:
    """A LLaMA of 8 layers of its own, for what changes a model."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = {
        "vocab_size": 97,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 8,
        "num_attention_heads": 4,
        "initializer_range": 0.3,
    }
    yield lambda **more: LlamaForCausalLM(LlamaConfig(**config, **more)).eval()


IDS = torch.tensor([[5, 6, 7, 8], [20, 21, 22, 23]])
ANSWER = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": 96, "pad_token_id": 0}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_heads_and_dtypes(small_model: Any, tied: bool, dtype: torch.dtype) -> None:
    model = small_model(tie_word_embeddings=tied)
    model.to(dtype)
    wrapper = DoLaJanusWrapper(model, DoLaConfig(candidate_layers=[2, 4, 6], alpha=0.05))
    output = wrapper.generate(IDS, **ANSWER, return_dict_in_generate=True, output_scores=True)
    assert all(scores.dtype == torch.float32 and not scores.isnan().any() for scores in output.scores)
    np.testing.assert_allclose(output.scores[0].exp().sum(-1), 1, atol=1e-5)
    with torch.no_grad():
        plain = model(IDS, output_hidden_states=True)
        head, norm = model.lm_head, model.model.norm
        exits = torch.stack([head(norm(plain.hidden_states[j][:, -1])) for j in (2, 4, 6)], 1)
    final, exits = plain.logits[:, -1].double().numpy(), exits.double().numpy()
    want = oracle_scores(np.concatenate([exits, final[:, None]], 1), final, [1, 2, 3], 0.05)
    tolerance = 1e-4 if dtype == torch.float32 else 0.15  # half precision rounds logits of size 8 to 1/32
    both = np.isfinite(want) & output.scores[0].isfinite().numpy()
    assert both.any(-1).all()
    np.testing.assert_allclose(output.scores[0].numpy()[both], want[both], atol=tolerance)


def test_layers_and_head_kept_elsewhere(small_model: Any, tmp_path: Any) -> None:
    """accelerate moves inputs and weights of dispatched modules in their `forward`, which it binds to the original."""
    from accelerate import dispatch_model

    model = small_model()
    config = DoLaConfig(candidate_layers=[2, 4, 6])
    want = DoLaJanusWrapper(model, config).generate(IDS, **ANSWER)
    homes = {"model.embed_tokens": "cpu", "model.norm": "disk", "model.rotary_emb": "cpu", "lm_head": "disk"}
    homes |= {f"model.layers.{i}": "disk" if i in (1, 3) else "cpu" for i in range(8)}
    model = dispatch_model(model, homes, main_device="cpu", offload_dir=tmp_path)
    assert torch.equal(DoLaJanusWrapper(model, config).generate(IDS, **ANSWER), want)


def test_wrapper_composes(model: Any) -> None:
    wrapper = DoLaJanusWrapper(model)
    language_model = wrapper.language_model
    assert language_model.generate == wrapper.generate
    assert {name: value for name, value in vars(language_model).items() if name != "generate"} == vars(
        model.language_model
    )
    assert language_model.model is model.language_model.model
    assert wrapper.ln_out is model.language_model.model.norm
    assert wrapper.phi is model.language_model.lm_head
    assert wrapper.prepare_inputs_embeds.__self__ is model
    assert not isinstance(wrapper, torch.nn.Module)
    assert [name for name, value in vars(wrapper).items() if isinstance(value, Tensor | torch.nn.Module)] == ["model"]
    with pytest.raises(AttributeError):
        wrapper.nothing_of_the_kind  # noqa: B018
    assert copy.copy(wrapper).model is model


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"alpha": 0.1}, "config must be a DoLaConfig, got dict"),
        (DoLaConfig(candidate_layers=[31]), "candidate_layers .* got 31"),
    ],
)
def test_wrapper_refuses(model: Any, config: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DoLaJanusWrapper(model, config)


def test_wrapper_refuses_what_does_not_generate() -> None:
    with pytest.raises(ValueError, match="a transformers model that generates, got Linear"):
        DoLaJanusWrapper(torch.nn.Linear(2, 2))


def test_config_may_change_between_calls(model: Any, prompt: dict[str, Any]) -> None:
    wrapper = DoLaJanusWrapper(model)
    on = wrapper.generate(**prompt)
    wrapper.config.use_dola_lm = False
    assert torch.equal(wrapper.generate(**prompt), model.language_model.generate(**prompt))
    assert torch.equal(wrapper.generate_with_dola(**prompt), on)
    wrapper.config.alpha = math.nan
    with pytest.raises(ValueError, match="alpha"):
        wrapper.generate_with_dola(**prompt)
