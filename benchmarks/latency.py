"""What DoLa costs: python -m benchmarks.latency [key=value ...], for example shape=[1b,7b] batch=[1,4] layers=[1,4,8]

Time per new token, time of the prompt (prefill) and peak memory of four ways to decode, for each combination of the
settings. The runs interleave with rotating order (A B C D, B C D A, ...), and ratios to the baseline are taken within a
round, so that a machine that gets slower or faster slows all of them.
"""

import json
import multiprocessing
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from janus_dola.cli import DTYPES, as_list, main, pick_device, read_config
from janus_dola.readout import Readout
from janus_dola.wrapper import DoLaLogitsProcessor

ROOT = Path(__file__).parents[1]
ALPHA = 0.1
# The language models of Janus-Pro: layers, hidden size, intermediate size, heads, words. Their weights are random here.
SHAPES = {
    "1b": (24, 2048, 5632, 16, 102_400),
    "7b": (30, 4096, 11008, 32, 102_400),
    "tiny": (6, 32, 64, 2, 512),
}


@dataclass
class Options:
    """The command line. Lists are combined with each other.

    Attributes:
        shape: demo (the demo checkpoint, or the golden one where there is none), 1b, 7b, tiny.
        batch, beams: Sequences, and beams of each.
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


def at_least(key: str, value: Any, minimum: int) -> None:
    if not isinstance(value, int) or value < minimum:
        raise ValueError(f"{key} must be a whole number of at least {minimum}, got {value!r}")


# How to decode.


class OneCallPerExit(Readout):
    """How other implementations read the exits: `lm_head` once for each."""

    def _append(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if self._active():
            exits = [self._hidden.pop(i) for i in range(len(self._decoder_layers))]
            self._logits = torch.cat([self._phi.forward(self._ln_out(h)) for h in exits], dim=1)  # [rows, J, V]


class FromHiddenStates:
    """The exits from `output_hidden_states=True`, read in one further call of `lm_head`."""

    def __init__(self, language_model: Any, layers: tuple[int, ...]) -> None:
        self._language_model, self._layers = language_model, layers
        self._logits: Tensor | None = None

    def __enter__(self) -> "FromHiddenStates":
        self._handle = self._language_model.register_forward_hook(self._read)
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._handle.remove()

    def _read(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        exits = torch.cat([output.hidden_states[layer][:, -1:] for layer in self._layers], dim=1)  # [rows, J, d]
        self._logits = self._language_model.lm_head(self._language_model.model.norm(exits))

    def take(self) -> Tensor:
        assert self._logits is not None
        return self._logits


VARIANTS: dict[str, Any] = {
    "baseline": None,
    "dola": Readout,
    "one call per exit": OneCallPerExit,
    "hidden states": FromHiddenStates,
}


def candidates(num_layers: int, J: int) -> tuple[int, ...]:
    """The J even layers next to the last one: 30, 4 -> (22, 24, 26, 28), as in the upper bucket."""
    first = num_layers - 2 * J
    if first < 1:
        raise ValueError(f"layers must be at most {(num_layers - 1) // 2} for {num_layers} layers, got {J}")
    return tuple(range(first, num_layers, 2))


def generate(model: Any, variant: str, J: int, **kwargs: Any) -> Tensor:
    """What `DoLaJanusWrapper.generate_with_dola` does, with the variant's readout in its place."""
    readout_class = VARIANTS[variant]
    if readout_class is None:
        return model.generate(**kwargs)
    num_layers = len(model.model.layers)
    layers = candidates(num_layers, J)
    with readout_class(model, layers) as readout:
        processor = DoLaLogitsProcessor(num_layers, layers, ALPHA, readout)
        if variant == "hidden states":
            logging.set_verbosity_error()  # it warns that they are not returned: they are read on their way
            kwargs["output_hidden_states"] = True
        return model.generate(logits_processor=[processor], **kwargs)


# What to decode with.


def build(shape: str, device: torch.device, dtype: torch.dtype) -> Any:
    """The language model of a shape: the demo's, or one with random weights, made in place in its dtype."""
    model: Any
    if shape == "demo":
        from janus.models import MultiModalityCausalLM

        logging.disable_progress_bar()
        folder = ROOT / "demo" / "checkpoint"
        folder = folder if folder.is_dir() else ROOT / "tests" / "golden" / "tiny_janus"
        model = MultiModalityCausalLM.from_pretrained(folder, dtype=dtype).language_model.to(device).eval()
    else:
        num_layers, hidden, intermediate, heads, words = SHAPES[shape]
        config = LlamaConfig(
            vocab_size=words,
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
    }


def device_of(shape: str, device: str, dtype: str) -> tuple[torch.device, torch.dtype]:
    """What "auto" stands for; random weights are in bfloat16, like the published ones."""
    return pick_device(device, "bfloat16" if dtype == "auto" and shape != "demo" else dtype)


# What to measure.


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def forward_starts(model: Any) -> Iterator[list[float]]:
    """The times at which forward passes of the model begin: one hook a step is all that looks on."""
    starts: list[float] = []

    def note(module: nn.Module, args: tuple[Any, ...]) -> None:
        synchronize(model.device)
        starts.append(time.perf_counter())

    handle = model.register_forward_pre_hook(note)
    try:
        yield starts
    finally:
        handle.remove()


def time_once(model: Any, variant: str, J: int, prompt: dict[str, Any], tokens: int) -> tuple[float, float]:
    """Seconds to the first token, and the median of seconds from each further token to the next."""
    with forward_starts(model) as starts:
        generate(model, variant, J, max_new_tokens=tokens, **prompt)
        synchronize(model.device)
        starts.append(time.perf_counter())
    if len(starts) != tokens + 1:
        raise RuntimeError(f"{variant} made {len(starts) - 1} forward passes for {tokens} tokens")
    steps = [end - start for start, end in pairwise(starts)]
    return steps[0], statistics.median(steps[1:])


def arithmetic(model: Any, setting: Setting) -> float:
    """Seconds that a step's vocabulary-wide arithmetic takes: log-softmax, JSD, selection, contrast. Median of 30."""

    class Fixed:
        def take(self) -> Tensor:
            return exits

    rows, words = setting.batch * setting.beams, model.config.vocab_size
    logits = torch.randn(rows, setting.layers + 1, words, device=model.device).mul_(3).to(model.dtype)
    scores, exits = logits[:, 0].float(), logits[:, 1:]
    num_layers = len(model.model.layers)
    readout: Any = Fixed()
    processor = DoLaLogitsProcessor(num_layers, candidates(num_layers, setting.layers), ALPHA, readout)
    tokens = torch.zeros(rows, 1, dtype=torch.long, device=model.device)
    seconds = []
    for _ in range(30):
        synchronize(model.device)
        start = time.perf_counter()
        processor(tokens, scores)
        synchronize(model.device)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def peak_memory(options: Options, setting: Setting, variant: str) -> int:
    """Peak bytes of one run, in the device's memory or the process's. Call it in a fresh process."""
    if options.threads:
        torch.set_num_threads(options.threads)
    device, dtype = device_of(setting.shape, options.device, options.dtype)
    with torch.inference_mode():
        model = build(setting.shape, device, dtype)
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
    grid = [Setting(*values) for values in product(options.shape, options.batch, options.layers, options.beams)]
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
            model = build(shape, device, dtype)
            for setting in settings:
                bar.set_description(f"{shape} batch {setting.batch} J {setting.layers} beams {setting.beams}")
                times = interleave(model, options, setting, bar)
                results.append(
                    asdict(setting)
                    | {"device": device.type, "dtype": str(dtype).removeprefix("torch.")}
                    | {"arithmetic_s": arithmetic(model, setting)}
                    | {"variants": summarize(times, {v: peaks.get((setting, v)) for v in options.variants})}
                )
                report(results)
            del model
    return results


def interleave(model: Any, options: Options, setting: Setting, bar: Any) -> dict[str, list[tuple[float, float]]]:
    """Times of each variant, one for each round."""
    prompt = prompt_for(model, setting, options.prompt)
    for variant in options.variants:  # so that the first round is not colder than the others
        generate(model, variant, setting.layers, max_new_tokens=2, **prompt_for(model, setting, 16))
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
        "| shape | dtype | batch | beams | J | variant | ms a token | ratio | prefill s | ratio | peak MiB | ratio |",
        "|---|---|--:|--:|--:|---|--:|--:|--:|--:|--:|--:|",
    ]
    for result in document["results"]:
        for variant, entry in result["variants"].items():
            peak, peak_ratio = entry["peak_bytes"], entry.get("peak_ratio")
            cells = [
                *(result[key] for key in ("shape", "dtype", "batch", "beams", "layers")),
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
        lines.append(f"- {keys}, J {result['layers']}: {result['arithmetic_s'] * 1e3:.2f} ms")
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
    main(run)
