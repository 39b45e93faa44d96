"""What the benchmarks share: the models, the prompts, a step's arithmetic, and the description of the machine."""

import math
import os
import platform
import resource
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import CompileConfig, LlamaConfig, LlamaForCausalLM

from janus_dola.config import METHODS, DoLaConfig, by_row
from janus_dola.processor import DoLaLogitsProcessor
from janus_dola.programs.checkpoint import load, pick_device
from janus_dola.programs.options import ModelConfig
from janus_dola.wrapper import DoLaJanusWrapper

DEMO = Path(__file__).parents[1] / "demo" / "checkpoint"
# The language models of Janus-Pro: layers, hidden size, intermediate size, heads, vocabulary. Weights are random here.
SHAPES = {
    "1b": (24, 2048, 5632, 16, 102_400),
    "7b": (30, 4096, 11008, 32, 102_400),
    "tiny": (6, 32, 64, 2, 512),
}


def at_least(key: str, value: Any, minimum: int) -> None:
    if not isinstance(value, int) or value < minimum:
        raise ValueError(f"{key} must be an integer of at least {minimum}, got {value!r}")


@dataclass
class Threads:
    """The key that most benchmarks have: PyTorch threads on the CPU; 0 leaves PyTorch's own number."""

    threads: int = 0

    def set_threads(self) -> None:
        at_least("threads", self.threads, 0)
        if self.threads:
            torch.set_num_threads(self.threads)
        os.environ["OMP_NUM_THREADS"] = str(torch.get_num_threads())  # or loading the demo would choose one


@dataclass(frozen=True)
class Workload:
    """What one row of a table measures: `layers` is J, the number of candidate layers."""

    shape: str
    batch: int
    layers: int
    beams: int
    compiled: bool = False


def candidates(num_layers: int, J: int) -> tuple[int, ...]:
    """The J even layers next to the last one: 30, 4 -> (22, 24, 26, 28), as in the upper bucket."""
    first = num_layers - 2 * J
    if first < 1:
        raise ValueError(f"layers must be at most {(num_layers - 1) // 2} for {num_layers} layers, got {J}")
    return tuple(range(first, num_layers, 2))


def generate(wrapper: DoLaJanusWrapper, variant: str, J: int, **kwargs: Any) -> Any:
    """What `DoLaJanusWrapper.generate` returns, by the method called `variant`, or DoLa off (baseline)."""
    method = variant if variant in METHODS else "dola"
    layers = list(candidates(wrapper.num_layers, J))
    wrapper.config = DoLaConfig(use_dola_lm=variant != "baseline", method=method, candidate_layers=layers)
    return wrapper.generate(**kwargs)


def llama_config(
    num_layers: int, hidden: int, intermediate: int, heads: int, vocab_size: int, **more: Any
) -> LlamaConfig:
    """The configuration of a decoder of these sizes, in the order of `SHAPES`."""
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=num_layers,
        num_attention_heads=heads,
        **more,
    )


def build(shape: str, device: torch.device, dtype: torch.dtype) -> Any:
    """The language model of a shape: the demo's, or one with random weights, made in place in its dtype."""
    model: Any
    if shape == "demo":
        dtype_name = str(dtype).removeprefix("torch.")
        demo = ModelConfig(model_path=str(DEMO), device=str(device), dtype=dtype_name)
        model = load(demo)[0].model.language_model
    else:
        config = llama_config(*SHAPES[shape], max_position_embeddings=16_384)
        config._attn_implementation = "sdpa"
        with torch.device("meta"):
            model = LlamaForCausalLM(config).eval()
            model.to(dtype)
        model.to_empty(device=device)
        model.model.rotary_emb = type(model.model.rotary_emb)(config=config).to(device)
        # Drawing 7 billion numbers takes minutes; a million of them, again and again, cost a step the same.
        numbers = torch.randn(1_000_003, dtype=torch.float32).mul_(0.02).to(device, dtype)
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.data.fill_(1)
            else:
                for chunk in parameter.data.view(-1).split(len(numbers)):
                    chunk.copy_(numbers[: len(chunk)])
    model.generation_config.eos_token_id = None  # so that no run ends early
    model.generation_config.pad_token_id = 0
    return model


def prompt_for(model: Any, workload: Workload, length: int) -> dict[str, Any]:
    """The arguments of `generate` except the number of new tokens; the prompts are `length` embeddings per sequence."""
    weight = model.get_input_embeddings().weight
    generator = torch.Generator().manual_seed(0)
    embeds = torch.randn(workload.batch, length, weight.shape[1], generator=generator) * 0.02
    return {
        "inputs_embeds": embeds.to(weight),
        "attention_mask": torch.ones(workload.batch, length, dtype=torch.long, device=weight.device),
        "num_beams": workload.beams,
        "do_sample": False,
        **({"cache_implementation": "static", "compile_config": compile_config(model)} if workload.compiled else {}),
    }


def compile_config(model: Any) -> CompileConfig:
    """transformers' default; on the CPU, transformers compiles only if it is told to."""
    if model.device.type == "cuda":
        return CompileConfig()
    config = CompileConfig(mode="default")
    config._compile_all_devices = True  # type: ignore[assignment]
    return config


def device_of(shape: str, device: str, dtype: str) -> tuple[torch.device, torch.dtype]:
    """The device and dtype that "auto" stands for; random weights are in bfloat16, like the published ones."""
    return pick_device(device, "bfloat16" if dtype == "auto" and shape != "demo" else dtype)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def arithmetic(model: Any, workload: Workload) -> tuple[float, float]:
    """Seconds, and page faults, of a step's vocabulary-wide arithmetic: log-softmax, JSD, selection, contrast.

    Medians of 30. A fault is a page of fresh memory, of 4 KiB as a rule; how many there are depends on the allocator.
    """
    rows, J = workload.batch * workload.beams, workload.layers
    logits = (
        torch.randn(rows, J + 1, model.get_input_embeddings().num_embeddings, device=model.device)
        .mul_(3)
        .to(model.dtype)
    )
    config = DoLaConfig(candidate_layers=list(range(1, J + 1)))
    processor = DoLaLogitsProcessor(
        lambda: (logits[:, :-1], logits[:, -1]),
        by_row([config] * rows, J + 1),
        -math.inf,
        backend=lambda: compile_config(model).backend if workload.compiled else None,
    )
    tokens, scores = torch.zeros(rows, 1, dtype=torch.long, device=model.device), logits[:, -1].float()
    seconds, faults = [], []
    for _ in range(30):
        synchronize(model.device)
        before, start = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, time.perf_counter()
        processor(tokens, scores)
        synchronize(model.device)
        seconds.append(time.perf_counter() - start)
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    return statistics.median(seconds), statistics.median(faults)


def quartiles(values: Sequence[float]) -> list[float]:
    if len(values) == 1:
        return [values[0]] * 3
    return statistics.quantiles(values, n=4, method="inclusive")


def machine(device: torch.device) -> dict[str, Any]:
    cpu = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        cpu = names[0] if names else cpu
    return {
        "date": time.strftime("%Y-%m-%d"),
        "cpu": f"{cpu} ({torch.backends.cpu.get_cpu_capability()})",  # which decides how fast bfloat16 is
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def describe_machine(about: dict[str, Any]) -> str:
    """One line of what `machine` found."""
    where = f"{about['gpu'] or about['cpu']}, {about['threads']} threads, Python {about['python']}"
    return f"{where}, torch {about['torch']}, transformers {about['transformers']}, {about['date']}"
