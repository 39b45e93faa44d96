"""Whether memory stays flat: python -m benchmarks.long_run [key=value ...], for example generations=2000 tokens=4

Many generations in one process, taking turns: DoLa off, on, traced, in beams, and streamed from a thread of its own.
The report is the slope of the process's resident memory over the generations after a warm-up, by least squares.
"""

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm
from transformers import TextIteratorStreamer

from benchmarks.common import Threads, at_least, describe_machine, machine
from janus_dola import DoLaConfig, DoLaJanusWrapper, DoLaTrace
from janus_dola.programs.checkpoint import load
from janus_dola.programs.options import ModelConfig, read_config, run_program

GOLDEN = Path(__file__).parents[1] / "tests" / "golden" / "tiny_janus"
KINDS = ("off", "on", "trace", "beams", "stream")


@dataclass
class LongRunOptions(Threads):
    """The keys of the command line.

    Attributes:
        model_path: A checkpoint; the golden one by default.
        generations: How many are measured.
        warm_up: How many come before that.
        tokens: New tokens of each.
        prompt: Length of the prompts.
        threads: PyTorch threads on the CPU; 0 leaves PyTorch's own number.
    """

    model_path: str = str(GOLDEN)
    generations: int = 2000
    warm_up: int = 200
    tokens: int = 4
    prompt: int = 16
    threads: int = 1

    def __post_init__(self) -> None:
        for key, minimum in (("generations", 2), ("warm_up", 0), ("tokens", 1), ("prompt", 1)):
            at_least(key, getattr(self, key), minimum)


def resident() -> int:
    """Bytes of this process in memory."""
    status = Path("/proc/self/status")
    if not status.exists():
        raise ValueError("resident memory is read from /proc/self/status, which this system does not have")
    return int(status.read_text().split("VmRSS:")[1].split()[0]) * 1024


def generate(wrappers: dict[bool, DoLaJanusWrapper], tokenizer: Any, kind: str, arguments: dict[str, Any]) -> None:
    """One generation of a kind."""
    wrapper = wrappers[kind != "off"]
    if kind == "stream":
        streamer = TextIteratorStreamer(tokenizer, timeout=600)  # an error in the thread is raised here
        one = {name: value[:1] if isinstance(value, torch.Tensor) else value for name, value in arguments.items()}
        thread = threading.Thread(target=wrapper.generate, kwargs=one | {"streamer": streamer})
        thread.start()
        for _ in streamer:
            pass
        thread.join()
        return
    kinds: dict[str, dict[str, Any]] = {"trace": {"trace": DoLaTrace()}, "beams": {"num_beams": 2}}
    wrapper.generate(**arguments, **kinds.get(kind, {}))


def slope(values: Sequence[float]) -> float:
    """Growth per step, by least squares."""
    return float(np.polyfit(range(len(values)), values, 1)[0])


def run(argv: Sequence[str]) -> None:
    options = read_config(LongRunOptions, argv, None)
    options.set_threads()
    loaded, processor = load(ModelConfig(model_path=options.model_path, device="cpu", dtype="float32"))
    model, tokenizer = loaded.model, processor.tokenizer
    wrappers = {use: DoLaJanusWrapper(model, DoLaConfig(use_dola_lm=use)) for use in (False, True)}
    generator = torch.Generator().manual_seed(0)
    width = model.language_model.config.hidden_size
    memory: list[int] = []
    for i in tqdm(range(options.warm_up + options.generations), disable=None, unit="generation"):
        embeds = torch.randn(2, options.prompt, width, generator=generator) * 0.02
        generate(
            wrappers,
            tokenizer,
            KINDS[i % len(KINDS)],
            {
                "inputs_embeds": embeds,
                "attention_mask": torch.ones(2, options.prompt, dtype=torch.long),
                "min_new_tokens": options.tokens,
                "max_new_tokens": options.tokens,
                "do_sample": False,
                "pad_token_id": tokenizer.eos_token_id,
                "eos_token_id": tokenizer.eos_token_id,
            },
        )
        if i >= options.warm_up:
            memory.append(resident())
    growth = slope(memory)
    print(" ".join(["python -m benchmarks.long_run", *argv]))
    print(describe_machine(machine(torch.device("cpu"))))
    print(f"generations  {options.generations} after {options.warm_up}: {', '.join(KINDS)} by turns")
    print(f"resident     {memory[0] / 2**20:.1f} MiB at first, {memory[-1] / 2**20:.1f} at last")
    print(f"slope        {growth:.0f} bytes per generation")
    print(f"second half  {slope(memory[len(memory) // 2 :]):.0f} bytes per generation")


if __name__ == "__main__":
    run_program(run)
