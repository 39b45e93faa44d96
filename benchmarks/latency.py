"""What DoLa costs: python -m benchmarks.latency [key=value ...], for example shape=[1b,7b] batch=[1,4] layers=[1,4,8]

Time per new token, time of the prompt (prefill) and peak memory of several ways to decode, for each combination of the
settings. The runs interleave with rotating order (A B C D, B C D A, ...), and ratios to the baseline are taken within a
round, so that a machine that gets slower or faster slows all of them.
"""

import copy
import json
import math
import multiprocessing
import platform
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
import transformers
from torch import Tensor, nn
from tqdm import tqdm
from transformers import CompileConfig, LlamaConfig, LlamaForCausalLM, StoppingCriteria
from transformers.utils import logging

from janus_dola.config import DoLaConfig, by_row
from janus_dola.exits import ExitView
from janus_dola.methods import METHODS
from janus_dola.processor import DoLaLogitsProcessor
from janus_dola.programs.checkpoint import load, pick_device
from janus_dola.programs.options import DTYPES, ModelConfig, as_list, read_config, run_program
from janus_dola.wrapper import DoLaJanusWrapper

DEMO = Path(__file__).parents[1] / "demo" / "checkpoint"
# The language models of Janus-Pro: layers, hidden size, intermediate size, heads, vocabulary. Weights are random here.
SHAPES = {
    "1b": (24, 2048, 5632, 16, 102_400),
    "7b": (30, 4096, 11008, 32, 102_400),
    "tiny": (6, 32, 64, 2, 512),
}


@dataclass
class Options:
    """The command line. Lists are combined with each other.

    Attributes:
        shape: demo (the demo checkpoint), 1b, 7b, tiny.
        batch, beams: Sequences, and beams of each.
        compiled: Whether the forward pass is compiled, with a static cache; a variant's baseline is of the same kind.
        layers: J, the number of candidate layers.
        variants: Some of `VARIANTS`, baseline first.
        rounds: Each runs all variants once.
        prompt, tokens: Length of the prompt, and of the answer.
        device: auto, or a PyTorch device.
        dtype: auto is bfloat16 for random weights, and what `pick_device` says for the demo.
        threads: Of PyTorch on the CPU; 0 leaves them as they are.
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
    threads: int = 0
    memory: bool = True
    out: str = ""

    def __post_init__(self) -> None:
        for key, allowed in (("shape", ["demo", *SHAPES]), ("variants", list(VARIANTS))):
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
                at_least(key, value, 1)
        for key, minimum in (("rounds", 1), ("prompt", 1), ("tokens", 2), ("threads", 0)):
            at_least(key, getattr(self, key), minimum)
        self.compiled = as_list(self.compiled)
        if any(not isinstance(value, bool) for value in self.compiled):
            raise ValueError(f"compiled must be true or false, or both, got {self.compiled}")
        if any(self.compiled) and set(self.variants) - set(COMPILABLE):
            raise ValueError(f"variants must be {' and '.join(COMPILABLE)} where compiled, got {self.variants}")
        for shape, J in product(self.shape, self.layers):
            if shape in SHAPES:  # the demo's number of layers is known once it is loaded
                candidates(SHAPES[shape][0], J)


@dataclass(frozen=True)
class Setting:
    """One row of the product of the options."""

    shape: str
    batch: int
    layers: int
    beams: int
    compiled: bool = False


def at_least(key: str, value: Any, minimum: int) -> None:
    if not isinstance(value, int) or value < minimum:
        raise ValueError(f"{key} must be an integer of at least {minimum}, got {value!r}")


# How to decode.


def one_call_per_exit(model: Any, layers: tuple[int, ...]) -> tuple[Any, Callable[[], Tensor]]:
    """How other implementations read the exits: `lm_head` once for each. The model to run, and what gives its exits."""
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
    "one call per exit": one_call_per_exit,
    "hidden states": hidden_states,
}
COMPILABLE = [variant for variant, way in VARIANTS.items() if way is None]


def candidates(num_layers: int, J: int) -> tuple[int, ...]:
    """The J even layers next to the last one: 30, 4 -> (22, 24, 26, 28), as in the upper bucket."""
    first = num_layers - 2 * J
    if first < 1:
        raise ValueError(f"layers must be at most {(num_layers - 1) // 2} for {num_layers} layers, got {J}")
    return tuple(range(first, num_layers, 2))


def generate(wrapper: DoLaJanusWrapper, variant: str, J: int, **kwargs: Any) -> Tensor:
    """`DoLaJanusWrapper.generate`, or the same with the exits read in another way."""
    layers = candidates(wrapper.num_layers, J)
    method = variant if variant in METHODS else "dola"
    wrapper.config = DoLaConfig(use_dola_lm=variant != "baseline", method=method, candidate_layers=list(layers))
    if VARIANTS[variant] is None:
        return wrapper.generate(**kwargs)
    model, exits = VARIANTS[variant](wrapper.model, layers)
    rows = by_row([wrapper.config], wrapper.num_layers)
    logging.set_verbosity_error()  # transformers warns that hidden states are not returned: they are read on their way
    processor = DoLaLogitsProcessor(lambda: ((read := exits()), read[:, -1]), rows, -math.inf)  # SLED's the last
    return model.generate(logits_processor=[processor], **kwargs)


# What to decode with.


def build(shape: str, device: torch.device, dtype: torch.dtype) -> Any:
    """The language model of a shape: the demo's, or one with random weights, made in place in its dtype."""
    model: Any
    if shape == "demo":
        dtype_name = str(dtype).removeprefix("torch.")
        demo = ModelConfig(model_path=str(DEMO), device=str(device), dtype=dtype_name)
        model = load(demo)[0].model.language_model
    else:
        num_layers, hidden, intermediate, heads, vocab_size = SHAPES[shape]
        config = LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=hidden,
            intermediate_size=intermediate,
            num_hidden_layers=num_layers,
            num_attention_heads=heads,
            max_position_embeddings=16_384,
        )
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
    model.requires_grad_(False)
    model.generation_config.eos_token_id = None  # every run makes all its tokens
    model.generation_config.pad_token_id = 0
    return model


def prompt_for(model: Any, setting: Setting, length: int) -> dict[str, Any]:
    """Arguments of `generate` but for the number of new tokens: `length` embeddings a sequence, as images give."""
    weight = model.get_input_embeddings().weight
    generator = torch.Generator().manual_seed(0)
    embeds = torch.randn(setting.batch, length, weight.shape[1], generator=generator) * 0.02
    return {
        "inputs_embeds": embeds.to(weight),
        "attention_mask": torch.ones(setting.batch, length, dtype=torch.long, device=weight.device),
        "num_beams": setting.beams,
        "do_sample": False,
        **({"cache_implementation": "static", "compile_config": compile_config(model)} if setting.compiled else {}),
    }


def compile_config(model: Any) -> CompileConfig:
    """transformers' default, which on the CPU it does not use unless told to."""
    if model.device.type == "cuda":
        return CompileConfig()
    config = CompileConfig(mode="default")
    config._compile_all_devices = True  # type: ignore[assignment]
    return config


def device_of(shape: str, device: str, dtype: str) -> tuple[torch.device, torch.dtype]:
    """What "auto" stands for; random weights are in bfloat16, like the published ones."""
    return pick_device(device, "bfloat16" if dtype == "auto" and shape != "demo" else dtype)


# What to measure.


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Clock(StoppingCriteria):
    """Stops nothing: notes when each token is chosen, which a compiled forward pass does not see."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        synchronize(input_ids.device)
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def time_once(
    wrapper: DoLaJanusWrapper, variant: str, J: int, prompt: dict[str, Any], tokens: int
) -> tuple[float, float]:
    """Seconds to the first token, and the median of seconds from each token to the next."""
    clock = Clock()
    synchronize(wrapper.device)
    start = time.perf_counter()
    generate(wrapper, variant, J, max_new_tokens=tokens, stopping_criteria=[clock], **prompt)
    if len(clock.times) != tokens:
        raise RuntimeError(f"{variant} chose {len(clock.times)} times for {tokens} tokens")
    return clock.times[0] - start, statistics.median(later - earlier for earlier, later in pairwise(clock.times))


def arithmetic(model: Any, setting: Setting) -> tuple[float, float]:
    """Seconds, and page faults, of a step's vocabulary-wide arithmetic: log-softmax, JSD, selection, contrast.

    Medians of 30. A fault is a page of fresh memory, of 4 KiB as a rule; how many there are is the allocator's affair.
    """
    rows, J = setting.batch * setting.beams, setting.layers
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
        backend=lambda: compile_config(model).backend if setting.compiled else None,
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


def peak_memory(options: Options, setting: Setting, variant: str) -> int:
    """Peak bytes of one run, in the device's memory or the process's. Call it in a fresh process."""
    if options.threads:
        torch.set_num_threads(options.threads)
    device, dtype = device_of(setting.shape, options.device, options.dtype)
    with torch.inference_mode():
        model = DoLaJanusWrapper(build(setting.shape, device, dtype))
        prompt = prompt_for(model, setting, options.prompt)
        generate(model, variant, setting.layers, max_new_tokens=options.tokens, **prompt)
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


def measure(options: Options, report: Callable[[list[dict[str, Any]]], None]) -> list[dict[str, Any]]:
    """All settings; `report` is given the results so far after each of them."""
    results: list[dict[str, Any]] = []
    grid = [
        Setting(*values)
        for values in product(options.shape, options.batch, options.layers, options.beams, options.compiled)
    ]
    runs = len(grid) * len(options.variants) * (options.rounds + options.memory)
    with tqdm(total=runs, disable=None, unit="run") as bar, torch.inference_mode():
        for shape in options.shape:
            settings = [setting for setting in grid if setting.shape == shape]
            peaks: dict[tuple[Setting, str], int] = {}
            for setting, variant in product(settings, options.variants if options.memory else ()):
                bar.set_description(f"{shape} memory {variant}")
                peaks[setting, variant] = in_fresh_process(peak_memory, options, setting, variant)
                bar.update()
            device, dtype = device_of(shape, options.device, options.dtype)  # only now: two models at once may not fit
            model = DoLaJanusWrapper(build(shape, device, dtype))
            for setting in settings:
                bar.set_description(f"{shape} batch {setting.batch} J {setting.layers} beams {setting.beams}")
                times = interleave(model, options, setting, bar)
                seconds, faults = arithmetic(model, setting)
                results.append(
                    asdict(setting)
                    | {"device": device.type, "dtype": str(dtype).removeprefix("torch.")}
                    | {"arithmetic_s": seconds, "arithmetic_page_faults": faults}
                    | {"variants": summarize(times, {v: peaks.get((setting, v)) for v in options.variants})}
                )
                report(results)
            del model
    return results


def interleave(model: Any, options: Options, setting: Setting, bar: Any) -> dict[str, list[tuple[float, float]]]:
    """Times of each variant, one for each round."""
    prompt = prompt_for(model, setting, options.prompt)
    for variant in options.variants:  # so that the first round is not colder than the others
        length, tokens = (options.prompt, options.tokens) if setting.compiled else (16, 2)  # its graph is of one length
        generate(model, variant, setting.layers, max_new_tokens=tokens, **prompt_for(model, setting, length))
    times: dict[str, list[tuple[float, float]]] = {variant: [] for variant in options.variants}
    for i in range(options.rounds):
        first = i % len(options.variants)
        for variant in options.variants[first:] + options.variants[:first]:
            times[variant].append(time_once(model, variant, setting.layers, prompt, options.tokens))
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
            entry[f"{name}_ratio"] = quartiles([pair[k] / b[k] for pair, b in zip(pairs, base, strict=True)])
            entry[f"{name}_runs_s"] = [pair[k] for pair in pairs]
        summary[variant] = entry
    return summary


def quartiles(values: Sequence[float]) -> list[float]:
    if len(values) == 1:
        return [values[0]] * 3
    return statistics.quantiles(values, n=4, method="inclusive")


# What to say.


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


def in_words(about: dict[str, Any]) -> str:
    """What `machine` found."""
    where = f"{about['gpu'] or about['cpu']}, {about['threads']} threads, Python {about['python']}"
    return f"{where}, torch {about['torch']}, transformers {about['transformers']}, {about['date']}"


def markdown(document: dict[str, Any]) -> str:
    lines = [
        f"`{document['command']}`",
        "",
        f"{in_words(document['machine'])}. Ratios to the baseline of the same round: median (quartiles).",
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
    options = read_config(Options, argv, None)
    if options.threads:
        torch.set_num_threads(options.threads)
    device, _ = pick_device(options.device, "float32")
    out = Path(options.out) if options.out else None
    if out is not None and not out.parent.is_dir():
        raise ValueError(f"out must be in a folder that exists, got {options.out!r}")
    document: dict[str, Any] = {
        "command": " ".join(["python -m benchmarks.latency", *argv]),
        "machine": machine(device),
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
