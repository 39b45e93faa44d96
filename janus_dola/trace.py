"""What happened at each step of a generation: the layers' divergence, the choice of layer, what DoLa changed."""

import json
import math
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import StoppingCriteria

from janus_dola.config import Rows
from janus_dola.heatmap import draw

FORMAT = "janus-dola trace 1"


class DoLaTrace:
    """Pass it as `trace=` to `DoLaJanusWrapper.generate_with_dola`; read it after the call.

    Tensors are on the CPU; S counts the returned sequences, T the steps, J the traced layers. With beams they follow
    the returned sequence from beam to beam. A trace used again starts afresh; after a call that raised it is empty.

    Args:
        layers: "candidates" traces the layers that M is chosen from, at no noticeable cost: all that is kept was
            computed anyway. "all" traces 1…N−1, for looking; M is still chosen among the candidates.

    Attributes:
        traced_layers: The J layers whose divergence is kept, lowest first.
        candidate_layers: The layers that M was chosen from, in any row.
        num_layers: N.
        alpha: Threshold of V_head; a list, one for each prompt, where they differ. DeCo's α and SLED's rate, too.
        method: dola, deco, sled or confident; a list, one for each prompt, where they differ.
        tokens: What was generated, int64 [S, T], without the prompt.
        mature_tokens: What q_N alone, after penalties, finds most likely there, int64 [S, T].
        layers: M, int64 [S, T]; N where there was nothing to subtract. SLED's is the layer of the greatest weight.
        jsd: JSD(q_N ‖ q_j) in nats, float32 [S, T, J]. NaN where an exit overflowed, and, where prompts have
            configurations of their own, at layers that are no candidates of the prompt's.
        head_sizes: |V_head|, or how many tokens DeCo or SLED kept, int64 [S, T].
        mature_logprobs: log q_N of the token, float32 [S, T].
        logprobs: log p̂ of the token, before temperature and other warpers, float32 [S, T].
        lengths: Tokens up to and with the end-of-sequence token, int64 [S]. Past it `tokens` holds generate's padding,
            `mature_tokens` the same, and everything else 0.

    Raises:
        ValueError: `layers` is something else.
    """

    def __init__(self, layers: Literal["candidates", "all"] = "candidates") -> None:
        if layers not in ("candidates", "all"):
            raise ValueError(f'layers must be "candidates" or "all", got {layers!r}')
        self.traces_all = layers == "all"
        self.clear()

    def clear(self) -> None:
        """Forgets what was recorded."""
        self.num_layers = 0
        self.alpha: float | list[float] = 0.0
        self.method: str | list[str] = "dola"
        self.candidate_layers: tuple[int, ...] = ()
        self.traced_layers: tuple[int, ...] = ()
        self.tokens = self.mature_tokens = self.layers = self.head_sizes = torch.zeros(0, 0, dtype=torch.long)
        self.mature_logprobs = self.logprobs = torch.zeros(0, 0)
        self.jsd = torch.zeros(0, 0, 0)
        self.lengths = torch.zeros(0, dtype=torch.long)

    @property
    def chosen_jsd(self) -> Tensor:
        """JSD(q_N ‖ q_M), float32 [S, T]: of the layer M that was chosen; 0 where M is N."""
        chosen = self.layers.unsqueeze(-1) == torch.tensor(self.traced_layers, dtype=torch.long)  # [S, T, J]
        return self.jsd.where(chosen, 0.0).sum(-1)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, DoLaTrace) and self._lines() == other._lines()

    __hash__ = None  # type: ignore[assignment]  # equal by content, and the content changes

    def save(self, path: str | PathLike[str]) -> None:
        """Writes JSON lines: a header, then one object per sequence with a list entry per step.

        JSON has neither −∞ nor NaN: they are null, in log-probabilities −∞ and in JSD NaN.
        """
        text = "".join(json.dumps(line, allow_nan=False) + "\n" for line in self._lines())
        Path(path).write_text(text, encoding="utf-8")

    @classmethod
    def load(cls, path: str | PathLike[str]) -> "DoLaTrace":
        """Reads what `save` wrote; equal to what was saved.

        Raises:
            ValueError: The file is not a trace.
        """
        try:
            head, *rows = map(json.loads, Path(path).read_text(encoding="utf-8").splitlines())
            if head["format"] != FORMAT:
                raise ValueError(f"format {head['format']!r}")
            trace = cls("all" if head["traces_all"] else "candidates")
            trace.num_layers, trace.alpha = head["num_layers"], head["alpha"]
            trace.method = head.get("method", "dola")  # the only one there was at first
            trace.candidate_layers = tuple(head["candidate_layers"])
            trace.traced_layers = tuple(head["traced_layers"])
            S, T, J = len(rows), head["steps"], len(trace.traced_layers)
            for name in ("tokens", "mature_tokens", "layers", "head_sizes"):
                setattr(trace, name, torch.tensor([row[name] for row in rows], dtype=torch.long).reshape(S, T))
            for name in ("mature_logprobs", "logprobs"):
                values = [[-torch.inf if x is None else x for x in row[name]] for row in rows]
                setattr(trace, name, torch.tensor(values, dtype=torch.float32).reshape(S, T))
            jsd = [[[torch.nan if x is None else x for x in step] for step in row["jsd"]] for row in rows]
            trace.jsd = torch.tensor(jsd, dtype=torch.float32).reshape(S, T, J)
            trace.lengths = torch.tensor([row["length"] for row in rows], dtype=torch.long)
        except (ValueError, KeyError, TypeError, RuntimeError) as error:
            raise ValueError(f"path must be a file that DoLaTrace.save wrote, got {str(path)!r}: {error}") from error
        return trace

    def _lines(self) -> list[dict[str, Any]]:
        head = {
            "format": FORMAT,
            "num_layers": self.num_layers,
            "candidate_layers": list(self.candidate_layers),
            "alpha": self.alpha,
            "method": self.method,
            "traces_all": self.traces_all,
            "traced_layers": list(self.traced_layers),
            "steps": self.tokens.shape[1],
        }
        lines: list[dict[str, Any]] = [head]
        for s, length in enumerate(self.lengths.tolist()):
            row: dict[str, Any] = {"length": length}
            for name in ("tokens", "mature_tokens", "layers", "head_sizes", "mature_logprobs", "logprobs", "jsd"):
                row[name] = getattr(self, name)[s].tolist()
            for name in ("mature_logprobs", "logprobs"):
                row[name] = [x if math.isfinite(x) else None for x in row[name]]
            row["jsd"] = [[x if math.isfinite(x) else None for x in step] for step in row["jsd"]]
            lines.append(row)
        return lines

    def heatmap(self, path: str | PathLike[str], tokenizer: Any, sequence: int = 0) -> None:
        """Draws a sequence: layers up, steps across, labelled with the tokens, JSD as color, M and changes marked.

        Args:
            path: Where to write the picture; its ending picks the format.
            tokenizer: Decodes the tokens.
            sequence: Which of the returned sequences.

        Raises:
            ImportError: matplotlib, the extra `viz`, is not installed.
            ValueError: There is no such sequence, or it has no traced layers.
        """
        if not 0 <= sequence < len(self.lengths):
            raise ValueError(f"sequence must be one of the {len(self.lengths)} in the trace, got {sequence!r}")
        if not self.traced_layers:
            raise ValueError('nothing to draw: no layer was traced; DoLaTrace(layers="all") traces all')
        draw(self, path, tokenizer, sequence)


class Recorder(StoppingCriteria):
    """Records the steps of a generation on its device, and fills the trace at the end; no value is looked at before.

    The processor tells it what a step computed. As a stopping criterion, which stops nothing, it is shown the tokens
    that the step chose.

    With beams, rows are reordered in each step, and `generate` may not say how. But beams with the same tokens so far
    have the same content, so a row is as good as its tokens: `_follow` looks for the row that holds the returned
    sequence's beginning. A full [rows, V] is kept only until the step's tokens are known.

    Args:
        trace: The trace to fill; what was in it is forgotten.
        num_layers: N.
        rows: As `config.by_row` gives them.
        num_beams: Rows per item of the batch among which rows move; 1 if they stay.
        eos: The end-of-sequence token or tokens, or None.
    """

    def __init__(self, trace: DoLaTrace, num_layers: int, rows: Rows, num_beams: int, eos: Any) -> None:
        trace.clear()
        trace.num_layers, trace.traced_layers = num_layers, rows.layers
        any_row = rows.candidates.any(0).tolist()
        trace.candidate_layers = tuple(j for j, candidate in zip(rows.layers, any_row, strict=True) if candidate)
        alphas, names = rows.strength.tolist(), [method.name for method in rows.methods]
        trace.alpha = alphas if len(set(alphas)) > 1 else alphas[0]
        trace.method = names if len(set(names)) > 1 else names[0]
        self.trace, self.num_beams = trace, num_beams
        self.layers = torch.tensor([*rows.layers, num_layers])  # those that an index of M stands for, [J + 1]
        self.eos = [] if eos is None else torch.as_tensor(eos).flatten().tolist()
        self.prompt_length = 0
        self.steps: list[dict[str, Tensor]] = []
        self._distributions: tuple[Tensor, Tensor] | None = None  # log q_N, log p̂ of the current step

    def record(self, input_ids: Tensor, log_qN: Tensor, log_p: Tensor, M_index: Tensor, jsd: Tensor) -> None:
        """One step, for all rows (sequences or beams), before its tokens are chosen.

        Args:
            input_ids: The rows so far, [rows, t].
            log_qN, log_p: [rows, V], log p̂ with −∞ outside V_head.
            M_index: Index into the traced layers, J for N, [rows].
            jsd: [rows, J].
        """
        if not self.steps:
            self.prompt_length = input_ids.shape[1]
            self.layers = self.layers.to(M_index.device)
        step = {
            "mature_tokens": log_qN.argmax(-1),
            "layers": self.layers[M_index],
            "head_sizes": (log_p > -torch.inf).sum(-1),
            "jsd": jsd.float(),
        }
        if self.num_beams > 1:
            step["prefixes"] = input_ids[:, self.prompt_length :].int()
            # A beam that has ended is not always among those that the stopping criteria see.
            eos = torch.tensor(self.eos, dtype=torch.long).to(log_p.device, non_blocking=True)  # [E]
            step["tokens"] = eos.repeat(len(log_p))  # [rows * E]
            step["rows"] = torch.arange(len(log_p), device=log_p.device).repeat_interleave(len(eos))
            self._gather(step, log_qN, log_p)
        self._distributions = (log_qN, log_p)
        self.steps.append(step)

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """The same step's tokens: the rows, or with beams any number of continuations of each, [C, t + 1]."""
        if self._distributions is not None:
            self._choose(input_ids, *self._distributions)
            self._distributions = None
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    def _choose(self, input_ids: Tensor, log_qN: Tensor, log_p: Tensor) -> None:
        step, C = self.steps[-1], len(input_ids)
        tokens = input_ids[:, -1].to(log_p.device)  # [C]
        rows = torch.arange(C, device=log_p.device)
        if self.num_beams > 1:
            prefixes = step["prefixes"].unflatten(0, (-1, self.num_beams))  # [items, B, t]
            begun = input_ids[:, self.prompt_length : -1].int().unflatten(0, (len(prefixes), -1))  # [items, K, t]
            row = (begun.unsqueeze(2) == prefixes.unsqueeze(1)).all(-1).int().argmax(-1)  # [items, K], the first such
            rows = (row + self.num_beams * torch.arange(len(row), device=row.device).unsqueeze(1)).flatten()
        new = {"tokens": tokens, "rows": rows}
        self._gather(new, log_qN, log_p)
        for name, value in new.items():
            step[name] = torch.cat([step[name], value]) if name in step else value

    @staticmethod
    def _gather(step: dict[str, Tensor], log_qN: Tensor, log_p: Tensor) -> None:
        step["mature_logprobs"] = log_qN[step["rows"], step["tokens"]].float()
        step["logprobs"] = log_p[step["rows"], step["tokens"]].float()

    def finish(self, sequences: Tensor, pad: int | None) -> None:
        """Fills the trace with the steps of the sequences that `generate` returns, [S, prompt + T]."""
        if not self.steps:
            return
        trace, found = self.trace, self._follow(sequences.cpu())
        trace.tokens = tokens = sequences[:, self.prompt_length :].to("cpu", torch.long, copy=True)  # [S, T]
        trace.lengths = answer_lengths(tokens, self.eos, pad)
        past = torch.arange(tokens.shape[1]) >= trace.lengths.unsqueeze(1)  # [S, T]
        trace.mature_tokens = torch.where(past, tokens, found["mature_tokens"])
        trace.layers = found["layers"].masked_fill(past, 0)
        trace.head_sizes = found["head_sizes"].masked_fill(past, 0)
        trace.mature_logprobs = found["mature_logprobs"].masked_fill(past, 0)
        trace.logprobs = found["logprobs"].masked_fill(past, 0)
        trace.jsd = found["jsd"].masked_fill(past.unsqueeze(-1), 0)

    def _follow(self, sequences: Tensor) -> dict[str, Tensor]:
        """The recorded values along the sequences [S, prompt + T]: name -> [S, T, ...]."""
        generated = sequences[:, self.prompt_length :]
        S, T = generated.shape
        steps = self.steps[:T]
        rows = torch.arange(S).expand(len(steps), S)  # [T, S]
        found: dict[str, Tensor] = {}
        if self.num_beams > 1:
            item = torch.arange(S) // max(1, S * self.num_beams // len(steps[0]["layers"]))  # [S]
            along = [self._find(step, item, generated, t) for t, step in enumerate(steps)]
            rows, found["mature_logprobs"], found["logprobs"] = map(torch.stack, zip(*along, strict=True))  # [T, S]
        for name in steps[0]:
            if name not in found and name not in ("prefixes", "tokens", "rows"):
                recorded = torch.stack([step[name] for step in steps]).cpu()  # [T, rows, ...]
                found[name] = recorded[torch.arange(len(steps)).unsqueeze(1), rows]
        return {name: value.transpose(0, 1) for name, value in found.items()}

    def _find(self, step: dict[str, Tensor], item: Tensor, generated: Tensor, t: int) -> tuple[Tensor, Tensor, Tensor]:
        """The rows that hold the sequences' beginnings before step t, and log q_N and log p̂ of what came next, [S]."""
        prefixes = step["prefixes"].cpu().unflatten(0, (-1, self.num_beams))[item]  # [S, B, t]
        row = (prefixes == generated[:, None, :t]).all(-1).int().argmax(-1) + self.num_beams * item  # [S]
        hit = (step["rows"].cpu() == row[:, None]) & (step["tokens"].cpu() == generated[:, t, None])  # [S, C]
        index, recorded = hit.int().argmax(-1), hit.any(-1)
        log_q, log_p = (step[name].cpu()[index].where(recorded, -torch.inf) for name in ("mature_logprobs", "logprobs"))
        return row, log_q, log_p


def answer_lengths(tokens: Tensor, eos: list[int], pad: int | None) -> Tensor:
    """Tokens of each sequence [S, T] up to and with the first EOS; without one, up to trailing padding: [S]."""
    T = tokens.shape[1]
    ended = torch.isin(tokens, torch.tensor(eos, dtype=torch.long))
    if pad is not None and pad not in eos:  # other stopping criteria may have ended a row
        other = (tokens != pad).long()
        kept = T - other.flip(-1).cummax(-1).values.eq(0).sum(-1)  # [S]
    else:
        kept = torch.full((len(tokens),), T)
    return torch.where(ended.any(-1), ended.int().argmax(-1) + 1, kept)
