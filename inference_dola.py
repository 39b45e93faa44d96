"""Asks a Janus model about images, with DoLa on or off: python inference_dola.py [config=FILE] key=value ...

One question, or with prompts=FILE output=FILE many of them.
"""

import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import TextStreamer

from janus.utils.io import load_pil_images
from janus_dola import DoLaJanusWrapper, DoLaTrace
from janus_dola.batch import (
    DOLA_KEYS,
    Output,
    check_batch,
    fingerprint,
    generate_arguments,
    read_prompts,
    run_batch,
)
from janus_dola.cli import (
    ModelConfig,
    as_list,
    build_conversation,
    check_generation,
    load_config,
    load_model,
    load_processor,
    main,
    pick_device,
    read_config,
)

ROOT = Path(__file__).parent
DEFAULT = ROOT / "configs" / "default.yaml"
DEMO_IMAGE, DEMO_QUESTION = "demo/images/scene.png", "Describe the image."


@dataclass
class InferenceConfig(ModelConfig):
    """The keys of configs/default.yaml, which says what each is for."""

    images: Any = field(default_factory=list)
    image: str | None = None
    question: str | None = None
    conversation: Any = None
    compare: bool = False
    stream: bool = False
    trace: str | None = None
    prompts: str | None = None
    output: str | None = None
    batch_size: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        images = self.images if self.image is None else self.image
        self.images = [] if images is None else as_list(images)
        if not all(isinstance(image, str) for image in self.images):
            raise ValueError(f"images must be paths or data URLs, got {images!r}")
        if (self.prompts is None) != (self.output is None):
            raise ValueError(f"prompts and output must be given together, got {self.prompts!r} and {self.output!r}")
        for key in ("question", "images", "conversation", "stream", "trace"):
            if self.prompts is not None and (value := getattr(self, key)):
                raise ValueError(f"prompts and {key} must not both be given, got {self.prompts!r} and {value!r}")


def run(argv: Sequence[str]) -> int:
    """Returns the exit code."""
    config = read_config(InferenceConfig, argv, DEFAULT)
    if config.prompts is not None and config.output is not None:
        return answer_file(config, config.prompts, config.output)
    answer_one(config)
    return 0


def answer_file(config: InferenceConfig, prompts: str, output: str) -> int:
    """Answers a file of prompts; 1 if there was one that could not be answered."""
    check_batch(config.generation, config.batch_size)
    check_generation(config.generation)
    processor = load_processor(config)
    model_config = load_config(config.model_path)
    _, dtype = pick_device(config.device, config.dtype, model_config.dtype)
    same = ("model_path", "roles", *DOLA_KEYS, "generation", "seed", "compare")
    settings = {key: getattr(config, key) for key in same} | {"dtype": str(dtype), "prompts": fingerprint(prompts)}
    language_config = model_config.get_text_config()
    asked, errors = read_prompts(
        prompts, processor, language_config, config.dola(), config.roles, config.generation.get("max_new_tokens") or 1
    )
    with Output(output, settings, errors) as answers:
        if any(prompt.id not in answers.done for prompt in asked):
            model = DoLaJanusWrapper(load_model(config), config.dola())
            how = {"batch_size": config.batch_size, "seed": config.seed, "compare": config.compare}
            run_batch(model, processor, asked, answers, config.generation, **how)
        if answers.failed:
            print(f"{answers.failed} of {len(asked) + len(errors)} prompts are errors in {output}", file=sys.stderr)
        return 1 if answers.failed else 0


def answer_one(config: InferenceConfig) -> None:
    if config.question is None and not config.conversation and not config.images:
        config.images, config.question = [os.path.relpath(ROOT / DEMO_IMAGE)], DEMO_QUESTION
    # All that can be wrong without the weights is found before they are loaded.
    turns = build_conversation(config.roles, config.question, config.images, config.conversation)
    pil_images = load_pil_images(turns)
    check_generation(config.generation)
    if config.trace:
        Path(config.trace).mkdir(parents=True, exist_ok=True)
    pick_device(config.device, config.dtype)
    processor = load_processor(config)
    model = DoLaJanusWrapper(load_model(config), config.dola())
    inputs = processor(conversations=turns, images=pil_images).to(model.device, model.dtype)

    tokenizer = processor.tokenizer
    arguments = generate_arguments(model, tokenizer, inputs, config.generation)

    if config.compare:
        model.generate_with_dola(**(arguments | {"max_new_tokens": 2}))  # so that the first answer timed is not colder
        for turn in turns:
            print(
                *(f"image     {image[:80]}" for image in turn["images"]), sep="\n", end="\n" if turn["images"] else ""
            )
        print(f"question  {turns[-2]['content'].replace('<image_placeholder>', '').strip()}")
    for use_dola_lm in (False, True) if config.compare else (config.use_dola_lm,):
        model.config.use_dola_lm = use_dola_lm
        trace = DoLaTrace() if use_dola_lm and (config.compare or config.trace) else None
        streamer = TextStreamer(tokenizer, skip_special_tokens=True) if config.stream else None
        torch.manual_seed(config.seed)
        start = time.perf_counter()
        sequences = model.generate(
            **arguments, **({"trace": trace} if trace else {}), **({"streamer": streamer} if streamer else {})
        )
        seconds = time.perf_counter() - start
        answers = [text.strip() for text in tokenizer.batch_decode(sequences, skip_special_tokens=True)]
        if config.compare:
            tokens = int((sequences[0] != tokenizer.eos_token_id).sum()) + 1
            label = f"DoLa {'on' if use_dola_lm else 'off'}"
            print(*(f"{label:<10}{answer}" for answer in answers), sep="\n")
            print(f"{'':<10}({tokens} tokens, {seconds / tokens:.4f} seconds per token)")
        elif not config.stream:
            print(*answers, sep="\n")
        if trace is not None:
            report(trace, tokenizer, config)


def report(trace: DoLaTrace, tokenizer: Any, config: InferenceConfig) -> None:
    """Prints the layers chosen, with `compare`, and writes the trace, with `trace`."""
    if config.compare:
        print(f"{'layers':<10}{' '.join(str(layer) for layer in trace.layers[0][: trace.lengths[0]].tolist())}")
    if config.trace:
        folder = Path(config.trace)
        trace.save(folder / "trace.jsonl")
        trace.heatmap(folder / "trace.png", tokenizer)
        print(f"{'JSD':<10}{folder / 'trace.png'} (and trace.jsonl)")


if __name__ == "__main__":
    main(run)
