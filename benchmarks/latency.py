"""What DoLa costs: python -m benchmarks.latency [key=value ...], for example shape=[1b,7b] batch=[1,4] layers=[1,4,8]

Time per new token, time of the prompt (prefill) and peak memory of several ways to decode, for each combination of the
keys. The runs interleave with rotating order (A B C D, B C D A, ...), and ratios to the baseline are taken within a
round, so that a machine that gets slower or faster slows all of them.
"""

import copy
import json
import math
import multiprocessing
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import StoppingCriteria
from transformers.utils import logging

from benchmarks import common
from janus_dola.config import DoLaConfig, by_row
from janus_dola.exits import ExitView
from janus_dola.processor import DoLaLogitsProcessor
from janus_dola.programs.checkpoint import pick_device
from janus_dola.programs.options import DTYPES, as_list, read_config, run_program
from janus_dola.wrapper import DoLaJanusWrapper


@dataclass
class LatencyOptions(common.Threads):
    """The keys of the command line. Lists are combined with each other.

    Attributes:
        shape: demo (the demo checkpoint), 1b, 7b, tiny.
        batch, beams: Sequences, and beams of each.
        compiled: Whether the forward pass is compiled, with a static cache; a variant's baseline is compiled if it is.
        layers: J, the number of candidate layers.
        variants: Some of baseline, dola, deco, sled, confident, one call per exit, hidden states; baseline first.
        rounds: Each runs all variants once.
        prompt, tokens: Embeddings in the prompt, and new tokens; there is no end of sequence.
        device: auto, or a PyTorch device.
        dtype: auto is bfloat16 for random weights, and what `pick_device` says for the demo.
        threads: PyTorch threads on the CPU; 0 leaves PyTorch's own number.
        memory: Whether to measure peak memory too, in a fresh process for each variant.
        out: Writes OUT.json and OUT.md.
    """

    shape: Any = field(default_factory=lambda: ["1b"])
    batch: Any = field(default_factory=lambda: [1])
    layers: Any = field(default_factory=lambda: [4])
    beams: Any = field(default_factory=lambda: [1])
    compiled: Any = field(default_factory=lambda: [False])
    variants: Any = field(default_factory=lambda: list(VARIANTS))
    rounds: int = 5
    prompt: int = 640
    tokens: int = 32
    device: str = "auto"
    dtype: str = "auto"
    memory: bool = True
    out: str = ""

    def __post_init__(self) -> None:
        for key, allowed in (("shape", ["demo", *common.SHAPES]), ("variants", list(VARIANTS))):
            setattr(self, key, as_list(getattr(self, key)))
            for value in getattr(self, key):
                if value not in allowed:
                    raise ValueError(f"{key} must be some of {', '.join(allowed)}, got {value!r}")
        if not self.variants or self.variants[0] != "baseline":
            raise ValueError(f"variants must begin with baseline, got {self.variants}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")
        for key in ("batch", "layers", "beams"):
            setattr(self, key, as_list(getattr(self, key)))
            for value in getattr(self, key):
                common.at_least(key, value, 1)
        for key, minimum in (("rounds", 1), ("prompt", 1), ("tokens", 2)):
            common.at_least(key, getattr(self, key), minimum)
        self.compiled = as_list(self.compiled)
        if any(not isinstance(value, bool) for value in self.compiled):
            raise ValueError(f"compiled must be true or false, or both, got {self.compiled}")
        if any(self.compiled) and set(self.variants) - set(COMPILABLE):
            raise ValueError(f"variants must be {' and '.join(COMPILABLE)} where compiled, got {self.variants}")
        for shape, J in product(self.shape, self.layers):
            if shape in common.SHAPES:  # the demo's number of layers is known once it is loaded
                common.candidates(common.SHAPES[shape][0], J)


# How to decode.


def one_call_per_exit(model: Any, layers: tuple[int, ...]) -> tuple[Any, Callable[[], Tensor]]:
    """Exits as other implementations read them, one `lm_head` call each. Returns the model to run and a reader."""
    view = ExitView(model, layers, keep=lambda hidden: hidden[:, -1:].clone())

    def exits() -> Tensor:
        return torch.cat([model.lm_head(model.model.norm(view.hidden[j])) for j in layers], dim=1)  # [rows, J, V]

    return view.model, exits


def hidden_states(model: Any, layers: tuple[int, ...]) -> tuple[Any, Callable[[], Tensor]]:
    """The exits from `output_hidden_states=True`, read in one further call of `lm_head`."""
    view = ExitView(model, whole=True)  # transformers captures by hooks of its own, and so do we: on a view
    read: list[Tensor] = []

    def look(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        hidden = torch.cat([output.hidden_states[layer][:, -1:] for layer in layers], dim=1)  # [rows, J, d]
        read[:] = [model.lm_head(model.model.norm(hidden))]

    view.model.register_forward_hook(look)
    view.model.generation_config = copy.deepcopy(model.generation_config)
    view.model.generation_config.output_hidden_states = True
    return view.model, lambda: read[0]


# What gives the exits; the wrapper's own way where there is none.
VARIANTS: dict[str, Any] = {
    "baseline": None,
    "dola": None,
    "deco": None,
    "sled": None,
    "confident": None,
    "one call per exit": one_call_per_exit,
    "hidden states": hidden_states,
}
COMPILABLE = [variant for variant, way in VARIANTS.items() if way is None]


def decode(wrapper: DoLaJanusWrapper, variant: str, J: int, **kwargs: Any) -> Any:
    """What `generate` returns, the exits read as the variant has it."""
    if VARIANTS[variant] is None:
        return common.generate(wrapper, variant, J, **kwargs)
    layers = common.candidates(wrapper.num_layers, J)
    model, exits = VARIANTS[variant](wrapper.model, layers)
    rows = by_row([DoLaConfig(candidate_layers=list(layers))], wrapper.num_layers)
    logging.set_verbosity_error()  # transformers warns that hidden states are not returned: they are read on their way
    processor = DoLaLogitsProcessor(lambda: ((read := exits()), read[:, -1]), rows, -math.inf)  # the last is SLED's
    return model.generate(logits_processor=[processor], **kwargs)


# What to measure.


class Clock(StoppingCriteria):
    """Records when each token is chosen, outside the compiled forward pass. It stops nothing."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        common.synchronize(input_ids.device)
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def time_once(
    wrapper: DoLaJanusWrapper, variant: str, J: int, prompt: dict[str, Any], tokens: int
) -> tuple[float, float]:
    """Seconds to the first token, and the median of seconds from each token to the next."""
    clock = Clock()
    common.synchronize(wrapper.device)
    start = time.perf_counter()
    decode(wrapper, variant, J, max_new_tokens=tokens, stopping_criteria=[clock], **prompt)
    if len(clock.times) != tokens:
        raise RuntimeError(f"{variant} chose {len(clock.times)} times for {tokens} tokens")
    return clock.times[0] - start, statistics.median(later - earlier for earlier, later in pairwise(clock.times))


def peak_memory(options: LatencyOptions, workload: common.Workload, variant: str) -> int:
    """Peak bytes of one run, in the device's memory or the process's. Call it in a fresh process."""
    options.set_threads()
    device, dtype = common.device_of(workload.shape, options.device, options.dtype)
    with torch.inference_mode():
        model = DoLaJanusWrapper(common.build(workload.shape, device, dtype))
        prompt = common.prompt_for(model, workload, options.prompt)
        decode(model, variant, workload.layers, max_new_tokens=options.tokens, **prompt)
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")  # Linux counts the parent's memory into ru_maxrss, but not into VmHWM
    if status.exists():
        return int(status.read_text().split("VmHWM:")[1].split()[0]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def in_fresh_process(function: Callable[..., int], *args: Any) -> int:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, args)


def measure(options: LatencyOptions, report: Callable[[list[dict[str, Any]]], None]) -> list[dict[str, Any]]:
    """All workloads; `report` is given the results so far after each of them."""
    results: list[dict[str, Any]] = []
    grid = [
        common.Workload(*values)
        for values in product(options.shape, options.batch, options.layers, options.beams, options.compiled)
    ]
    runs = len(grid) * len(options.variants) * (options.rounds + options.memory)
    with tqdm(total=runs, disable=None, unit="run") as bar, torch.inference_mode():
        for shape in options.shape:
            workloads = [workload for workload in grid if workload.shape == shape]
            peaks: dict[tuple[common.Workload, str], int] = {}
            for workload, variant in product(workloads, options.variants if options.memory else ()):
                bar.set_description(f"{shape} memory {variant}")
                peaks[workload, variant] = in_fresh_process(peak_memory, options, workload, variant)
                bar.update()
            # Not earlier: two models at once may not fit.
            device, dtype = common.device_of(shape, options.device, options.dtype)
            model = DoLaJanusWrapper(common.build(shape, device, dtype))
            for workload in workloads:
                bar.set_description(f"{shape} batch {workload.batch} J {workload.layers} beams {workload.beams}")
                times = interleave(model, options, workload, bar)
                seconds, faults = common.arithmetic(model, workload)
                results.append(
                    asdict(workload)
                    | {"device": device.type, "dtype": str(dtype).removeprefix("torch.")}
                    | {"arithmetic_s": seconds, "arithmetic_page_faults": faults}
                    | {"variants": summarize(times, {v: peaks.get((workload, v)) for v in options.variants})}
                )
                report(results)
            del model
    return results


def interleave(
    model: Any, options: LatencyOptions, workload: common.Workload, bar: Any
) -> dict[str, list[tuple[float, float]]]:
    """Times of each variant, one for each round."""
    prompt = common.prompt_for(model, workload, options.prompt)
    for variant in options.variants:  # so that the first round is not colder than the others
        # A compiled graph has a fixed length.
        length, tokens = (options.prompt, options.tokens) if workload.compiled else (16, 2)
        decode(model, variant, workload.layers, max_new_tokens=tokens, **common.prompt_for(model, workload, length))
    times: dict[str, list[tuple[float, float]]] = {variant: [] for variant in options.variants}
    for i in range(options.rounds):
        first = i % len(options.variants)
        for variant in options.variants[first:] + options.variants[:first]:
            times[variant].append(time_once(model, variant, workload.layers, prompt, options.tokens))
            bar.update()
    return times


def summarize(times: dict[str, list[tuple[float, float]]], peaks: dict[str, int | None]) -> dict[str, Any]:
    """Medians, and the quartiles of the ratios to the baseline of the same round."""
    summary: dict[str, Any] = {}
    base = times["baseline"]
    for variant, pairs in times.items():
        entry: dict[str, Any] = {"peak_bytes": peaks[variant]}
        if peaks[variant] is not None:
            entry["peak_ratio"] = peaks[variant] / peaks["baseline"]  # type: ignore[operator]
        for k, name in enumerate(("prefill", "token")):
            entry[f"{name}_s"] = statistics.median(pair[k] for pair in pairs)
            entry[f"{name}_ratio"] = common.quartiles([pair[k] / b[k] for pair, b in zip(pairs, base, strict=True)])
            entry[f"{name}_runs_s"] = [pair[k] for pair in pairs]
        summary[variant] = entry
    return summary


# What to say.


def markdown(document: dict[str, Any]) -> str:
    lines = [
        f"`{document['command']}`",
        "",
        common.describe_machine(document["machine"])
        + ". Ratios to the baseline of the same round: median (quartiles).",
        "",
        "| shape | dtype | batch | beams | J | compiled | variant | ms a token | ratio | prefill s | ratio | peak MiB "
        "| ratio |",
        "|---|---|--:|--:|--:|---|---|--:|--:|--:|--:|--:|--:|",
    ]
    for result in document["results"]:
        for variant, entry in result["variants"].items():
            peak, peak_ratio = entry["peak_bytes"], entry.get("peak_ratio")
            cells = [
                *(result[key] for key in ("shape", "dtype", "batch", "beams", "layers")),
                "yes" if result["compiled"] else "no",
                variant,
                f"{entry['token_s'] * 1e3:.2f}",
                ratio(entry["token_ratio"]),
                f"{entry['prefill_s']:.3f}",
                ratio(entry["prefill_ratio"]),
                "" if peak is None else f"{peak / 2**20:.0f}",
                "" if peak_ratio is None else f"{peak_ratio:.4f}",
            ]
            lines.append(f"| {' | '.join(map(str, cells))} |")
    lines += ["", "A step's vocabulary-wide arithmetic by itself (log-softmax, JSD, selection, contrast):", ""]
    for result in document["results"]:
        keys = ", ".join(f"{key} {result[key]}" for key in ("shape", "batch", "beams"))
        cost = f"{result['arithmetic_s'] * 1e3:.2f} ms, {result['arithmetic_page_faults']:.0f} page faults"
        lines.append(f"- {keys}, J {result['layers']}: {cost}")
    return "\n".join(lines) + "\n"


def ratio(quarters: Sequence[float]) -> str:
    first, median, third = quarters
    return f"{median:.3f} ({first:.3f} to {third:.3f})"


def run(argv: Sequence[str]) -> None:
    options = read_config(LatencyOptions, argv, None)
    options.set_threads()
    device, _ = pick_device(options.device, "float32")
    out = Path(options.out) if options.out else None
    if out is not None and not out.parent.is_dir():
        raise ValueError(f"out must be in a folder that exists, got {options.out!r}")
    document: dict[str, Any] = {
        "command": " ".join(["python -m benchmarks.latency", *argv]),
        "machine": common.machine(device),
        "options": asdict(options),
    }

    def report(results: list[dict[str, Any]]) -> None:
        document["results"] = results
        if out is not None:
            out.with_name(out.name + ".json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
            out.with_name(out.name + ".md").write_text(markdown(document), encoding="utf-8")

    measure(options, report)
    print(markdown(document), end="")


if __name__ == "__main__":
    run_program(run)
