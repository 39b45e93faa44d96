"""Log-probabilities of given continuations, from one teacher-forced forward pass."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPast

from janus_dola.config import DoLaConfig, by_row
from janus_dola.dola_runtime import Reading, read
from janus_dola.exits import ExitView, path_to
from janus_dola.methods import choose

CHUNK_ELEMENTS = 2**22  # of float32 logits in a chunk: 16 MiB in each of the about ten tensors that a chunk needs


@torch.no_grad()
def score_continuations(
    model: Any,
    config: DoLaConfig,
    inputs_embeds: Tensor | None = None,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    *,
    continuation_ids: Tensor,
    continuation_mask: Tensor | None = None,
    configs: Sequence[DoLaConfig] | None = None,
    apc_floor: float = -1000.0,
    chunk_size: int | None = None,
) -> Tensor:
    """Log-probabilities of given continuations: log p̂, or log q_N where `use_dola_lm` is false.

    One teacher-forced forward pass serves all configurations. Each position of each row is read as a decode step
    reads it (without penalties), in chunks, so that memory does not grow with the length of the continuations.

    Args:
        model: As `generating_model` gives it.
        config: The configuration to score under.
        inputs_embeds: Prompts, [rows, P, d], padded on the left. Or else `input_ids`, [rows, P]. A single prompt is
            shared by all continuations, and run once.
        attention_mask: 0 on the prompts' padding, [rows, P]; all 1 by default.
        continuation_ids: [rows, T], padded on the right with anything.
        continuation_mask: 0 on the continuations' padding, [rows, T]; all 1 by default.
        configs: Score under each of these in place of `config`.
        apc_floor: The score of a token outside V_head, −1000 as in the paper's multiple-choice protocol.
        chunk_size: Positions read out at a time; by default as many as keep below 300 MB at Janus' vocabulary.

    Returns:
        float32 [rows, T], 0 where the continuation is padding; [configs, rows, T] if `configs` is given.

    Raises:
        ValueError: A shape, a mask, an id or a config does not fit.
    """
    embed = model.get_input_embeddings()
    V = model.config.get_text_config().vocab_size
    prompt, mask, ids, present = _check(
        embed, V, inputs_embeds, input_ids, attention_mask, continuation_ids, continuation_mask, apc_floor, chunk_size
    )
    by_config = by_row([config] if configs is None else configs, len(model.get_decoder().layers))
    candidates, strength = by_config.candidates.to(ids.device), by_config.strength.to(ids.device, torch.float32)
    dynamic = any(method.dynamic for method in by_config.methods)
    phi = _readout(model)

    result = torch.zeros(len(by_config.methods), *ids.shape, device=ids.device)  # [configs, rows, T]
    if chunk_size is None:
        chunk_size = max(1, CHUNK_ELEMENTS // (V * (1 + len(by_config.layers))))
    rows, positions = present.nonzero(as_tuple=True)  # [n]
    hidden = _forward(model, by_config.layers, prompt, mask, ids, present)  # [n, J + 1, d]
    for start in range(0, len(rows), chunk_size):
        part = slice(start, start + chunk_size)
        tokens = ids[rows[part], positions[part]].unsqueeze(1)  # [c, 1]
        logits = phi(hidden[part]).to(ids.device)  # [c, J + 1, V]
        reading = read(logits[:, -1], logits[:, :-1], dynamic)
        for i, method in enumerate(by_config.methods):
            own = slice(*method.exits)
            each = candidates[i, own].expand(len(tokens), -1), strength[i].expand(len(tokens))
            log_p = choose(_part(reading, own), *each, method.name, method.top_k)[0].gather(1, tokens).squeeze(1)  # [c]
            result[i, rows[part], positions[part]] = log_p.masked_fill(log_p == -torch.inf, apc_floor).to(result)
    return result[0] if configs is None else result


def _part(reading: Reading, exits: slice) -> Reading:
    """A reading of some of its exits."""
    return reading._replace(log_qj=reading.log_qj[:, exits], z_j=reading.z_j[:, exits], jsd=reading.jsd[:, exits])


def _readout(model: Any) -> Callable[[Tensor], Tensor]:
    """φ, with whatever the model does to its logits after the head: normed hidden states [n, T, d] to logits [n, T, V].

    It is the model itself, on a view whose decoder hands on what it is given.
    """

    def hand_on(*args: Any, inputs_embeds: Tensor, **kwargs: Any) -> BaseModelOutputWithPast:
        return BaseModelOutputWithPast(last_hidden_state=inputs_embeds)

    view = ExitView(model)
    view.own(path_to(model.get_decoder(), model)).forward = hand_on

    def phi(hidden: Tensor) -> Tensor:
        # Without positions, Qwen2-VL would work them out from the rows of its own last call.
        positions = torch.zeros(hidden.shape[:2], dtype=torch.long, device=hidden.device)
        return view.model(inputs_embeds=hidden, position_ids=positions, use_cache=False, return_dict=True).logits

    return phi


def _forward(model: Any, layers: tuple[int, ...], prompt: Tensor, mask: Tensor, ids: Tensor, present: Tensor) -> Tensor:
    """The hidden states that predict the n tokens present, normed: of each exit, then h_N, [n, J + 1, d]."""
    rows, T = ids.shape
    new = model.get_input_embeddings()(ids[:, :-1].where(present[:, :-1], 0))  # the last one predicts nothing
    mask = torch.cat([mask.expand(rows, -1), present[:, :-1].to(mask)], dim=1)  # [rows, P + T - 1]
    positions = (mask.cumsum(-1) - 1).clamp(min=0)  # as generate counts them

    def keep(hidden: Tensor) -> Tensor:
        return hidden[:, -T:][present.to(hidden.device)]  # a copy [n, d]: the prompt's are not kept

    view = ExitView(model, layers, keep)
    decoder = view.own(path_to(model.get_decoder(), model))
    cache = None
    if len(prompt) < rows and prompt.shape[1] > 1:  # shared by all rows: it runs once, but for its last position
        P = prompt.shape[1] - 1
        shared = model.get_decoder()(
            inputs_embeds=prompt[:, :P],
            attention_mask=mask[:1, :P],
            position_ids=positions[:1, :P],
            use_cache=True,
            return_dict=True,
        ).past_key_values
        if hasattr(shared, "batch_repeat_interleave"):  # transformers 4's cache of Gemma2 has no such method
            cache = shared
            cache.batch_repeat_interleave(rows)
            prompt, positions = prompt[:, P:], positions[:, P:]
    embeds = torch.cat([prompt.expand(rows, -1, -1), new.to(prompt)], dim=1)  # [rows, P + T - 1, d]
    last = decoder(
        inputs_embeds=embeds,
        attention_mask=mask,
        position_ids=positions,
        past_key_values=cache,
        use_cache=cache is not None,
        return_dict=True,
    ).last_hidden_state
    last = keep(last).unsqueeze(1)  # [n, 1, d]
    exits = [view.hidden[j].to(last.device) for j in layers]
    return torch.cat([decoder.norm(torch.stack(exits, 1)).to(last), last], 1) if exits else last


def _check(
    embed: Any,
    V: int,
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
    present = torch.ones_like(continuation_ids) if continuation_mask is None else continuation_mask
    if present.shape != continuation_ids.shape:
        raise ValueError(
            f"continuation_mask must be of continuation_ids' shape {list(continuation_ids.shape)}, "
            f"got {list(present.shape)}"
        )
    ids, present = continuation_ids.to(prompt.device), present.to(prompt.device, torch.long)
    _check_mask("continuation_mask", "1, then 0 on the right (padding)", present.flip(-1), empty=True)
    _check_ids("continuation_ids", ids[present.bool()], V)
    return prompt, mask, ids, present.bool()


def _check_mask(name: str, allowed: str, mask: Tensor, empty: bool = False) -> None:
    """Each row of the mask [rows, T] must be zeros, then ones, the last one included unless it may be empty."""
    steps = torch.cat([mask[:, :1], mask.diff(), mask[:, -1:] if empty else mask[:, -1:] - 1], dim=1)
    bad = ((steps < 0) | (mask < 0).any(-1, keepdim=True) | (mask > 1).any(-1, keepdim=True)).any(-1)  # [rows]
    if bad.any():
        row = int(bad.int().argmax())
        raise ValueError(f"{name} must be {allowed}, in each row; got otherwise in row {row}")


def _check_ids(name: str, ids: Tensor, V: int) -> None:
    if ids.is_floating_point() or ids.dtype == torch.bool:
        raise ValueError(f"{name} must be integers, got {ids.dtype}")
    outside = ids[(ids < 0) | (ids >= V)]
    if len(outside):
        raise ValueError(f"{name} must be in 0...{V - 1}, the model's tokens, got {outside[0].item()}")
