"""Log-probabilities of given continuations, from one teacher-forced forward pass."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from janus_dola.config import DoLaConfig
from janus_dola.dola_runtime import contrast, jsd, log_softmax, premature, softmax
from janus_dola.readout import _local

CHUNK_ELEMENTS = 2**22  # of float32 logits in a chunk: 16 MiB in each of the about ten tensors that a chunk needs


@torch.no_grad()
def score(
    language_model: Any,
    configs: Sequence[DoLaConfig],
    inputs_embeds: Tensor | None,
    input_ids: Tensor | None,
    attention_mask: Tensor | None,
    continuation_ids: Tensor,
    continuation_mask: Tensor | None,
    apc_floor: float,
    chunk_size: int | None,
) -> Tensor:
    """See `DoLaJanusWrapper.score`; this one returns [configs, rows, T]."""
    embed = language_model.get_input_embeddings()
    prompt, mask, ids, known = _check(
        embed, inputs_embeds, input_ids, attention_mask, continuation_ids, continuation_mask, apc_floor, chunk_size
    )
    N = len(language_model.model.layers)
    candidates = [
        tuple(j for j in config.resolve_layers(N) if j < N) if config.use_dola_lm else () for config in configs
    ]
    tapped = tuple(sorted({j for layers in candidates for j in layers}))  # J of them

    result = torch.zeros(len(configs), *ids.shape, device=ids.device)  # [configs, rows, T]
    if chunk_size is None:
        chunk_size = max(1, CHUNK_ELEMENTS // (embed.num_embeddings * (1 + len(tapped))))
    rows, positions = known.nonzero(as_tuple=True)  # [n]
    with _apart_from_readouts():
        hidden, exits = _forward(language_model, tapped, prompt, mask, ids, known)  # [n, d], J of [n, d]
        for start in range(0, len(rows), chunk_size):
            part = slice(start, start + chunk_size)
            words = ids[rows[part], positions[part]]  # [c]
            scores = _read(language_model, configs, candidates, tapped, hidden[part], [h[part] for h in exits], words)
            scores = scores.masked_fill(scores == -torch.inf, apc_floor)
            result[:, rows[part], positions[part]] = scores.to(result)
    return result


@contextmanager
def _apart_from_readouts() -> Iterator[None]:
    """A generation may be under way in this thread, which scores from a streamer, say: its hooks are not for us."""
    stack = _local.__dict__.setdefault("stack", [])
    ours = object()
    stack.append(ours)
    try:
        yield
    finally:
        stack.remove(ours)


def _read(
    language_model: Any,
    configs: Sequence[DoLaConfig],
    candidates: list[tuple[int, ...]],
    tapped: tuple[int, ...],
    hidden: Tensor,
    exits: list[Tensor],
    words: Tensor,
) -> Tensor:
    """log p̂ (or log q_N) of the words [c] after positions of the last layer, [c, d], and of the exits: [configs, c]."""
    if exits:
        exits_normed = language_model.model.norm(torch.stack(exits, dim=1)).to(hidden)  # [c, J, d]
        hidden = torch.cat([hidden.unsqueeze(1), exits_normed], dim=1)
        logits = language_model.lm_head(hidden)  # [c, 1 + J, V]
        (qN, log_qN), (qj, log_qj) = softmax(logits[:, 0]), softmax(logits[:, 1:])
        del logits
        divergence = None
        if any(len(layers) > 1 for layers in candidates):
            divergence = jsd(qN.unsqueeze(1), qj, log_qN.unsqueeze(1), log_qj)  # [c, J]
    else:
        log_qN = log_softmax(language_model.lm_head(hidden))  # [c, V]
    words = words.to(log_qN.device).unsqueeze(1)  # [c, 1]
    scores = []
    for config, layers in zip(configs, candidates, strict=True):
        log_p = log_qN
        if layers:
            _, log_qM = premature(log_qj, divergence, [tapped.index(j) for j in layers])
            log_p = contrast(log_qN, log_qM, config.alpha)
        elif config.use_dola_lm and config.alpha > 0:
            log_p = contrast(log_qN, None, config.alpha)
        scores.append(log_p.gather(1, words).squeeze(1))
    return torch.stack(scores)


def _forward(
    language_model: Any, tapped: tuple[int, ...], prompt: Tensor, mask: Tensor, ids: Tensor, known: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """The hidden states that predict the n known continuation tokens: h_N, normed, [n, d], and h_j of each exit."""
    rows, T = ids.shape
    new = language_model.get_input_embeddings()(ids[:, :-1].where(known[:, :-1], 0))  # the last one predicts nothing
    mask = torch.cat([mask.expand(rows, -1), known[:, :-1].to(mask)], dim=1)  # [rows, P + T - 1]
    positions = (mask.cumsum(-1) - 1).clamp(min=0)  # as generate counts them
    cache = None
    if len(prompt) < rows and prompt.shape[1] > 1:  # shared by all rows: it runs once, but for its last position
        P = prompt.shape[1] - 1
        cache = language_model.model(
            inputs_embeds=prompt[:, :P], attention_mask=mask[:1, :P], position_ids=positions[:1, :P], use_cache=True
        ).past_key_values
        cache.batch_repeat_interleave(rows)
        prompt, positions = prompt[:, P:], positions[:, P:]
    embeds = torch.cat([prompt.expand(rows, -1, -1), new.to(prompt)], dim=1)  # [rows, P + T - 1, d]
    kept: dict[int, Tensor] = {}
    thread = threading.get_ident()

    def keep(layer: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if threading.get_ident() == thread:
                hidden = output[0] if isinstance(output, tuple) else output  # transformers 4 returns tuples
                kept[layer] = hidden[:, -T:][known.to(hidden.device)]  # a copy: the prompt's are not kept

        return hook

    with ExitStack() as handles:
        for j in tapped:
            handles.callback(language_model.model.layers[j - 1].register_forward_hook(keep(j)).remove)
        last = language_model.model(
            inputs_embeds=embeds,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=cache is not None,
        ).last_hidden_state[:, -T:]
        hidden = last[known.to(last.device)]  # [n, d]
    return hidden, [kept[j].to(hidden.device) for j in tapped]


def _check(
    embed: Any,
    inputs_embeds: Tensor | None,
    input_ids: Tensor | None,
    attention_mask: Tensor | None,
    continuation_ids: Tensor,
    continuation_mask: Tensor | None,
    apc_floor: float,
    chunk_size: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The prompt's embeddings [rows or 1, P, d] and mask [rows or 1, P]; the ids and their bool mask, [rows, T]."""
    if (inputs_embeds is None) == (input_ids is None):
        raise ValueError(
            f"inputs_embeds or input_ids must be given, and not both; got {'neither' if input_ids is None else 'both'}"
        )
    if not apc_floor <= 0:  # also refuses NaN
        raise ValueError(f"apc_floor must be a log-probability, at most 0, got {apc_floor}")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
    V = embed.num_embeddings

    if inputs_embeds is None:
        assert input_ids is not None  # for mypy
        if input_ids.ndim != 2:
            raise ValueError(f"input_ids must be of shape [rows, P], got {list(input_ids.shape)}")
        _check_ids("input_ids", input_ids, V)
        prompt: Tensor = embed(input_ids)
    else:
        prompt = inputs_embeds
        if prompt.ndim != 3:
            raise ValueError(f"inputs_embeds must be of shape [rows, P, d], got {list(prompt.shape)}")
    prompts, P = prompt.shape[:2]
    if prompts == 0 or P == 0:
        raise ValueError(f"the prompt must have at least one row and position, got shape {list(prompt.shape)}")
    mask = torch.ones(prompts, P, dtype=torch.long, device=prompt.device) if attention_mask is None else attention_mask
    if mask.shape != (prompts, P):
        raise ValueError(f"attention_mask must be of the prompt's shape [{prompts}, {P}], got {list(mask.shape)}")
    mask = mask.to(prompt.device, torch.long)
    _check_mask("attention_mask", "0 on the left (padding), then 1", mask)

    if continuation_ids.ndim != 2 or prompts not in (1, len(continuation_ids)) or 0 in continuation_ids.shape:
        raise ValueError(
            f"continuation_ids must be of shape [{'rows' if prompts == 1 else prompts}, T], a row for each prompt or "
            f"all for the only one; got {list(continuation_ids.shape)}"
        )
    known = torch.ones_like(continuation_ids) if continuation_mask is None else continuation_mask
    if known.shape != continuation_ids.shape:
        raise ValueError(
            f"continuation_mask must be of continuation_ids' shape {list(continuation_ids.shape)}, "
            f"got {list(known.shape)}"
        )
    ids, known = continuation_ids.to(prompt.device), known.to(prompt.device, torch.long)
    _check_mask("continuation_mask", "1, then 0 on the right (padding)", known.flip(-1), empty=True)
    _check_ids("continuation_ids", ids[known.bool()], V)
    return prompt, mask, ids, known.bool()


def _check_mask(name: str, allowed: str, mask: Tensor, empty: bool = False) -> None:
    """Each row of the mask [rows, T] must be zeros, then ones, the last one included unless it may be empty."""
    steps = torch.cat([mask[:, :1], mask.diff(), mask[:, -1:] if empty else mask[:, -1:] - 1], dim=1)
    bad = ((steps < 0) | (mask < 0).any(-1, keepdim=True) | (mask > 1).any(-1, keepdim=True)).any(-1)  # [rows]
    if bad.any():
        row = int(bad.int().argmax())
        raise ValueError(f"{name} must be {allowed}, in each row; got otherwise in row {row}")


def _check_ids(name: str, ids: Tensor, V: int) -> None:
    if ids.is_floating_point() or ids.dtype == torch.bool:
        raise ValueError(f"{name} must be whole numbers, got {ids.dtype}")
    outside = ids[(ids < 0) | (ids >= V)]
    if len(outside):
        raise ValueError(f"{name} must be in 0...{V - 1}, the model's words, got {outside[0].item()}")
