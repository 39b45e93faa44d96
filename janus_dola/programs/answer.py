"""The program `answer`: one question, or a file of prompts. What it does is told by `keys.AnswerConfig`."""

import os
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import TextStreamer

from janus_dola.config import DoLaConfig
from janus_dola.programs import checkpoint
from janus_dola.programs.differences import differences
from janus_dola.programs.engine import Outcome, Task, generate_answers, generate_arguments
from janus_dola.programs.keys import AnswerConfig
from janus_dola.programs.options import CONFIGS, config_files, read_config
from janus_dola.programs.prompts import DOLA_KEYS, IMAGE_TAG, Prompt, build_conversation, check_prompt, open_images
from janus_dola.programs.report import write_report
from janus_dola.programs.results import check_files, result_files
from janus_dola.programs.runs import RUN_KEYS, answer_file
from janus_dola.trace import DoLaTrace
from janus_dola.wrapper import DoLaJanusWrapper

LABELS = ("DoLa off", "DoLa on")
DEMO_IMAGE, DEMO_QUESTION = CONFIGS.parent / "demo" / "images" / "scene.png", "Describe the image."


class Printer(TextStreamer):
    """Prints an answer as it comes, and as it is printed otherwise: without white space around it."""

    space: str | None = None  # held back until there is text after it; None before the first text

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        text = text.lstrip() if self.space is None else self.space + text
        shown = text.rstrip()
        if shown or self.space is not None:
            self.space = text.removeprefix(shown)
        print(shown, end="\n" if stream_end else "", flush=True)


class Compare(Task):
    """DoLa off as well, last, where a prompt's own configuration has DoLa on: the line's "text_baseline"."""

    def configs(self, prompt: Prompt) -> list[DoLaConfig]:
        off = [replace(prompt.dola, use_dola_lm=False)] if prompt.dola.use_dola_lm else []
        return [prompt.dola, *off]

    def line(self, prompt: Prompt, outcome: Outcome) -> dict[str, Any]:
        return super().line(prompt, outcome) | {"text_baseline": outcome.answers[-1].text}


def run(argv: Sequence[str]) -> int:
    """Returns the exit code: 1 if there was a prompt of a file that could not be answered."""
    config = read_config(AnswerConfig, argv)
    if config.output is None:
        answer_one(config, config_files(argv))
        return 0
    report, configs = [config.report] if config.report else [], config_files(argv)
    read = {"prompts": [str(config.prompts)], "config": configs, "model_path": [config.model_path]}
    check_files({"output": result_files(config.output), "report": report}, read)
    task, settings = Compare() if config.compare else Task(), (*DOLA_KEYS, "compare", *RUN_KEYS)
    prompts, lines = answer_file(config, task, settings, "prompts", config.output)
    if config.report is not None:
        write_report(config.report, config.output, prompts)
    return int(any("error" in line for line in lines.values()))


def answer_one(config: AnswerConfig, configs: Sequence[str]) -> None:
    if config.question is None and not config.conversation and not config.images and DEMO_IMAGE.is_file():
        config.images, config.question = [os.path.relpath(DEMO_IMAGE)], DEMO_QUESTION
    # All that can be wrong without the weights is found before they are loaded.
    turns = build_conversation(config.roles, config.question, config.images, config.conversation)
    if config.trace:
        folder = Path(config.trace)
        images = [image for turn in turns for image in turn["images"] if not image.startswith("data:")]
        read = {"images": images, "config": configs, "model_path": [config.model_path]}
        check_files({"trace": [folder / "trace.jsonl", folder / "trace.png"]}, read)
        folder.mkdir(parents=True, exist_ok=True)
    checkpoint.pick_device(config.device, config.dtype)
    model_config = checkpoint.load_config(config.model_path)
    processor = checkpoint.load_processor(config, model_config)
    check_prompt(turns, processor, model_config, config.generation)
    pil_images = open_images(turns, processor)
    model = DoLaJanusWrapper(checkpoint.load_model(config, model_config), config.dola())
    tokenizer = processor.tokenizer
    inputs = processor(conversations=turns, images=pil_images).to(model.device, model.dtype)
    with torch.inference_mode():
        embeds = model.prepare_inputs_embeds(**inputs)  # [1, T, d]
    prompt = {"inputs_embeds": embeds, "attention_mask": inputs.attention_mask}
    arguments = generate_arguments(tokenizer, config.generation) | prompt

    compared: list[list[str]] = []  # what print_comparison takes
    speeds: list[str] = []
    if config.compare:
        warm_up = {"max_new_tokens": 2, "num_return_sequences": 1}  # so that the first answer timed is not colder
        model.generate_with_dola(**(arguments | warm_up))
        for image in (image for turn in turns for image in turn["images"]):
            print(f"image     {image[:80]}")
        print(f"question  {turns[-2]['content'].replace(IMAGE_TAG, '').strip()}")
    for use_dola_lm in (False, True) if config.compare else (config.use_dola_lm,):
        model.config.use_dola_lm = use_dola_lm
        trace = DoLaTrace() if use_dola_lm and (config.compare or config.trace) else None
        streamer = Printer(tokenizer, skip_special_tokens=True) if config.stream else None
        torch.manual_seed(config.seed)
        if config.compare and config.stream:
            print(f"{LABELS[use_dola_lm]:<10}", end="", flush=True)
        start = time.perf_counter()
        answers = generate_answers(model.generate, arguments | {"streamer": streamer}, [model.config], trace)
        seconds = time.perf_counter() - start
        first, beams = answers[0], config.generation.get("num_return_sequences") or 1
        if first.error is not None:
            raise ValueError(first.error)
        if len(answers) < beams:
            print(f"{len(answers)} of {beams} beams: V_head leaves no more (alpha={config.alpha:g})", file=sys.stderr)
        speed = f"({first.tokens} tokens, {seconds / first.tokens:.4f} seconds per token)"
        if config.compare and config.stream:
            print(f"{'':<10}{speed}")
        elif config.compare:
            compared.append([answer.text for answer in answers])
            speeds.append(speed)
        elif not config.stream:
            print(*(answer.text for answer in answers), sep="\n")
    if compared:
        print_comparison(compared, speeds)
    if trace is not None and config.compare:
        print(f"{'layers':<10}{' '.join(map(str, first.layers or ()))}")
    if trace is not None and config.trace:
        trace.save(folder / "trace.jsonl")
        trace.heatmap(folder / "trace.png", tokenizer)
        print(f"{'JSD':<10}{folder / 'trace.png'} (and trace.jsonl)")


def print_comparison(compared: list[list[str]], speeds: list[str]) -> None:
    """Prints the answers with DoLa off and on, and their speeds; on a terminal the words that differ have a color."""
    shown = compared
    if sys.stdout.isatty() and not os.environ.get("NO_COLOR"):
        pairs = zip(*map(differences, *compared), strict=True)  # off's answers and on's, in parts
        red, green = "\033[4;31m{}\033[0m", "\033[4;32m{}\033[0m"  # both underlined
        shown = [
            ["".join(color.format(text) if differs else text for text, differs in parts) for parts in side]
            for color, side in zip((red, green), pairs, strict=True)
        ]
    for label, answers, speed in zip(LABELS, shown, speeds, strict=True):
        print(*(f"{label:<10}{answer}" for answer in answers), sep="\n")
        print(f"{'':<10}{speed}")
