"""Tokens per second of vLLM without the plugin, with it and DoLa off, and with DoLa: python -m benchmarks.vllm shape=1b

Two engines are in this process, vLLM's own LLaMA and the one with exits, of the same shape, with random weights. In
each round all variants answer the same requests, in an order that rotates.
"""

import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
} | dict(os.environ)

import torch
import vllm
from transformers import LlamaConfig
from vllm import LLM, SamplingParams

from benchmarks.common import (
    DEMO,
    SHAPES,
    Threads,
    at_least,
    candidates,
    describe_machine,
    llama_config,
    machine,
    quartiles,
)
from janus_dola.programs.checkpoint import load_config
from janus_dola.programs.options import read_config, run_program

HEAD = 32  # the least that vLLM's attention has on the CPU


@dataclass
class VllmOptions(Threads):
    """The keys of the command line.

    Attributes:
        shape: demo (its decoder's), 1b or 7b.
        layers: J, the number of candidate layers.
        requests: How many there are at once, each a row of a table.
        prompt: Tokens of a prompt.
        tokens: Tokens of an answer.
        rounds: Each runs all variants with all numbers of requests.
        compiled: Whether vLLM compiles the decoders.
        dtype: The dtype of the weights.
    """

    shape: str = "demo"
    layers: int = 4
    requests: list[int] = field(default_factory=lambda: [1, 4, 16])
    prompt: int = 32
    tokens: int = 32
    rounds: int = 5
    compiled: bool = False
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        if self.shape not in ("demo", "1b", "7b"):
            raise ValueError(f"shape must be one of demo, 1b, 7b, got {self.shape!r}")
        for name in ("layers", "prompt", "tokens", "rounds"):
            at_least(name, getattr(self, name), 1)
        for value in self.requests:
            at_least("requests", value, 1)


def decoder(shape: str) -> LlamaConfig:
    sizes = SHAPES.get(shape)
    if sizes is None:
        text = load_config(str(DEMO)).get_text_config()
        hidden = text.hidden_size
        sizes = (text.num_hidden_layers, hidden, text.intermediate_size, hidden // HEAD, text.vocab_size)
    return llama_config(*sizes, max_position_embeddings=2048, architectures=["LlamaForCausalLM"])


def start(config: LlamaConfig, options: VllmOptions, **more: Any) -> LLM:
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        return LLM(
            folder,
            load_format="dummy",
            skip_tokenizer_init=True,
            dtype=options.dtype,
            enforce_eager=not options.compiled,
            enable_prefix_caching=False,
            max_model_len=options.prompt + options.tokens,
            max_num_seqs=max(options.requests),
            **more,
        )


def measure(llm: LLM, options: VllmOptions, requests: int, dola: dict[str, Any] | None) -> float:
    """Tokens per second, the prompts' forward pass included."""
    params = SamplingParams(
        temperature=0, max_tokens=options.tokens, ignore_eos=True, detokenize=False, extra_args=dola
    )
    prompts: Any = [{"prompt_token_ids": [i + 1] * options.prompt} for i in range(requests)]
    begin = time.perf_counter()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    seconds = time.perf_counter() - begin
    return sum(len(output.outputs[0].token_ids) for output in outputs) / seconds


def run(argv: Sequence[str]) -> None:
    options = read_config(VllmOptions, argv, None)
    options.set_threads()
    config = decoder(options.shape)
    layers = list(candidates(config.num_hidden_layers, options.layers))
    own = start(config, options)
    with_exits = start(
        config,
        options,
        hf_overrides={"architectures": ["DoLaLlamaForCausalLM"]},
        additional_config={"dola": {"candidate_layers": layers}},
    )
    variants: dict[str, tuple[LLM, dict[str, Any] | None]] = {
        "vLLM": (own, None),
        "plugin, DoLa off": (with_exits, {"use_dola_lm": False}),
        f"DoLa, J = {options.layers}": (with_exits, {}),
    }
    cells = list(product(options.requests, variants))
    for requests, name in cells:  # so that the first round is not colder
        measure(variants[name][0], options, requests, variants[name][1])
    found: dict[tuple[int, str], list[float]] = {cell: [] for cell in cells}
    for i in range(options.rounds):
        first = i % len(variants)
        names = list(variants)[first:] + list(variants)[:first]
        for requests, name in product(options.requests, names):
            found[requests, name].append(measure(variants[name][0], options, requests, variants[name][1]))
    print(f"`{' '.join(['python -m benchmarks.vllm', *argv])}`\n")
    about = describe_machine(machine(torch.device("cuda" if torch.cuda.is_available() else "cpu")))
    print(f"{about}, vLLM {vllm.__version__}. Tokens a second, and ratios to vLLM's of the round: medians.\n")
    print(f"| requests | {' | | '.join(variants)} | |\n|--:|{'--:|' * (2 * len(variants))}")
    for requests in options.requests:
        row = [str(requests)]
        for name in variants:
            pairs = zip(found[requests, name], found[requests, "vLLM"], strict=True)
            low, middle, high = quartiles([ours / theirs for ours, theirs in pairs])
            row += [f"{quartiles(found[requests, name])[1]:.0f}", f"{middle:.3f} ({low:.3f} to {high:.3f})"]
        print(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    run_program(run)
