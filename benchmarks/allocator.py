"""Why the same arithmetic takes longer in some processes: python -m benchmarks.allocator [rounds=12]

Processes take turns at a step's arithmetic on 1B's vocabulary. In every second one glibc keeps freed memory.
"""

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.common import SHAPES, Workload, arithmetic, at_least, describe_machine, machine
from janus_dola.programs.options import read_config, run_program

KEPT = {"MALLOC_TRIM_THRESHOLD_": "1000000000", "MALLOC_MMAP_THRESHOLD_": "1000000000"}


@dataclass
class AllocatorOptions:
    """The keys of the command line.

    Attributes:
        rounds: How often each process has its turn.
        processes: How many there are.
        layers: J.
        threads: PyTorch threads per process.
    """

    rounds: int = 12
    processes: int = 4
    layers: int = 4
    threads: int = 2

    def __post_init__(self) -> None:
        for key in ("rounds", "processes", "layers", "threads"):
            at_least(key, getattr(self, key), 1)


def work(layers: int, threads: int) -> None:
    """Runs in each process: prints milliseconds and page faults of a step for each line that it reads."""
    torch.set_num_threads(threads)
    vocab_size = SHAPES["1b"][-1]
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=vocab_size, **sizes)).bfloat16()  # type: ignore[arg-type]
    with torch.inference_mode():
        for _ in sys.stdin:
            seconds, faults = arithmetic(model, Workload("1b", 1, layers, 1))
            print(f"{seconds * 1e3:.2f} ms, {faults:.0f}", flush=True)


def run(argv: Sequence[str]) -> None:
    options = read_config(AllocatorOptions, argv, None)
    command = [sys.executable, "-m", "benchmarks.allocator", "work", str(options.layers), str(options.threads)]
    workers = [
        subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            encoding="utf-8",
            env=os.environ | (KEPT if i % 2 else {}),
        )
        for i in range(options.processes)
    ]
    print(f"`{' '.join(['python -m benchmarks.allocator', *argv])}`\n")
    print(f"{describe_machine(machine(torch.device('cpu')))}. Median of 30 steps, and page faults of each.\n")
    print("| round |", " | ".join("kept" if i % 2 else "as it is" for i in range(options.processes)), "|")
    print("|--:" * (options.processes + 1) + "|")
    for number in range(options.rounds):
        cells = []
        for worker in workers:
            assert worker.stdin is not None and worker.stdout is not None  # both are pipes
            print("", file=worker.stdin, flush=True)
            cells.append(worker.stdout.readline().strip())
        print(f"| {number + 1} |", " | ".join(cells), "|", flush=True)
    for worker in workers:
        worker.communicate()


if __name__ == "__main__":
    if sys.argv[1:2] == ["work"]:
        work(*map(int, sys.argv[2:]))
    else:
        run_program(run)
