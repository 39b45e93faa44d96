"""Where the time of a decode step goes: python -m benchmarks.profile_step [key=value ...], such as shape=7b layers=8

torch.profiler's time of each part of a step, with DoLa off and on, and how many kernels each part starts. The parts
of a compiled forward pass (compiled=true) are not known: the table has the formulas and the rest.
"""

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function
from tqdm import tqdm
from transformers import StoppingCriteria

from benchmarks import common
from janus_dola import processor
from janus_dola.exits import ExitView
from janus_dola.programs.options import read_config, run_program
from janus_dola.wrapper import DoLaJanusWrapper

# What is timed: functions that a step calls one after the other, none from within another.
EXITS = {
    "exits: ahead of the norm": (ExitView, "join_exits"),
    "exits: ahead of the head": (ExitView, "prepend_exits"),
}
OF_FORMULAS = {"read: softmax, JSD": (processor, "read"), "choose: M, contrast": (processor, "choose")}
ALL_FORMULAS = {"formulas": (processor.DoLaLogitsProcessor, "_step")}  # on a GPU one graph, compiled one function
OTHER = "rest of generate"


@dataclass
class ProfileOptions(common.Threads):
    """The keys of the command line.

    Attributes:
        shape, layers, compiled, prompt, tokens, device, dtype, threads: As for `benchmarks.latency`, one value each.
    """

    shape: str = "1b"
    layers: int = 4
    compiled: bool = False
    prompt: int = 640
    tokens: int = 17
    device: str = "auto"
    dtype: str = "auto"

    def __post_init__(self) -> None:
        if self.shape not in ("demo", *common.SHAPES):
            raise ValueError(f"shape must be one of demo, {', '.join(common.SHAPES)}, got {self.shape!r}")
        for key, minimum in (("layers", 1), ("prompt", 1), ("tokens", 3)):
            common.at_least(key, getattr(self, key), minimum)
        if self.shape in common.SHAPES:  # the demo's number of layers is known once it is loaded
            common.candidates(common.SHAPES[self.shape][0], self.layers)


@contextmanager
def labelled(model: Any, compiled: bool) -> Iterator[list[str]]:
    """Labels the parts of a step for the profiler; yields their names."""

    def label(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            with record_function(name):
                return function(*args, **kwargs)

        return call

    parts: list[tuple[str, Any, str]] = []
    if not compiled:
        parts = [("decoder layers", layer, "forward") for layer in model.get_decoder().layers]
        parts.append(("lm_head", model.phi, "forward"))
        parts += [(name, *place) for name, place in EXITS.items()]
    whole = compiled or model.device.type == "cuda"
    parts += [(name, *place) for name, place in (ALL_FORMULAS if whole else OF_FORMULAS).items()]
    with ExitStack() as stack:
        for name, owner, attribute in parts:
            stack.enter_context(patch.object(owner, attribute, label(name, getattr(owner, attribute))))
        yield list(dict.fromkeys(name for name, _, _ in parts))


class Start(StoppingCriteria):
    """Starts a profiler once two tokens are chosen. It stops nothing."""

    def __init__(self, profiler: Any) -> None:
        self.profiler, self.chosen, self.time = profiler, 0, 0.0

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self.chosen += 1
        if self.chosen == 2:
            common.synchronize(input_ids.device)
            self.profiler.start()
            self.time = time.perf_counter()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def steps_of(
    model: Any, variant: str, J: int, prompt: dict[str, Any], tokens: int, compiled: bool
) -> dict[str, tuple[float, float]]:
    """Milliseconds and operations of each part per step: the mean of all but the prompt's and the one after it."""
    cuda = model.device.type == "cuda"
    profiler = profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])])
    if compiled:  # now, not under the profiler
        common.generate(model, variant, J, max_new_tokens=tokens, **prompt)
    start = Start(profiler)
    with labelled(model, compiled) as names:
        common.generate(model, variant, J, max_new_tokens=tokens, stopping_criteria=[start], **prompt)
        common.synchronize(model.device)
        seconds = time.perf_counter() - start.time
        profiler.stop()
    steps = tokens - 2
    table = dict.fromkeys(names, (0.0, 0.0))
    everything = 0
    for event in profiler.events():
        if cuda:
            everything += event.device_type == DeviceType.CUDA and event.name not in table
        elif event.cpu_parent is None:
            everything += operations(event, cuda)
        if event.name in table and event.device_type == DeviceType.CPU:
            ms, count = table[event.name]
            spent = event.device_time_total if cuda else event.cpu_time_total  # microseconds
            table[event.name] = (ms + spent / 1e3 / steps, count + operations(event, cuda) / steps)
    known_ms, known_count = (sum(column) for column in zip(*table.values(), strict=True))
    table[OTHER] = (seconds * 1e3 / steps - known_ms, everything / steps - known_count)
    return table


def operations(event: Any, cuda: bool) -> int:
    """Kernels that an event starts; on the CPU operations that consist of no others, views among them."""
    if cuda:
        return len(event.kernels) + sum(operations(child, cuda) for child in event.cpu_children)
    if event.cpu_children:
        return sum(operations(child, cuda) for child in event.cpu_children)
    return int(event.name.startswith("aten::"))


def run(argv: Sequence[str]) -> None:
    options = read_config(ProfileOptions, argv, None)
    options.set_threads()
    device, dtype = common.device_of(options.shape, options.device, options.dtype)
    tables: dict[str, dict[str, tuple[float, float]]] = {}
    with torch.inference_mode():
        model = DoLaJanusWrapper(common.build(options.shape, device, dtype))
        workload = common.Workload(options.shape, 1, options.layers, 1, options.compiled)
        prompt = common.prompt_for(model, workload, options.prompt)
        for variant in tqdm(("baseline", "dola"), disable=None):
            tables[variant] = steps_of(model, variant, options.layers, prompt, options.tokens, options.compiled)
    print(f"`{' '.join(['python -m benchmarks.profile_step', *argv])}`\n")
    machine = common.describe_machine(common.machine(device))
    print(f"{machine}. A step in {dtype}, under the profiler, which slows it.\n")
    print("| | baseline ms | operations | dola ms | operations |\n|---|--:|--:|--:|--:|")
    for name in (*tables["dola"], "total"):
        cells = []
        for table in tables.values():
            ms, count = table[name] if name in table else (sum(column) for column in zip(*table.values(), strict=True))
            cells += [f"{ms:.2f}", f"{count:.0f}"]
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    run_program(run)
