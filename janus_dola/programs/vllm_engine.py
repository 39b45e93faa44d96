"""Prompts x configurations answered by vLLM, which batches them as they come and go: what `engine.answer_many` yields.

vLLM is imported when it is asked for.
"""

import math
import os
from collections.abc import Container, Generator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from tqdm import tqdm
from transformers import GenerationConfig

from janus.utils.io import load_pil_images
from janus_dola.config import DoLaConfig, by_row
from janus_dola.processor import nan_error
from janus_dola.programs import checkpoint
from janus_dola.programs.engine import Answer, Outcome, Task, seed_of
from janus_dola.programs.options import ManyConfig, as_list
from janus_dola.programs.prompts import Prompt, encode_prompt

# Arguments of `generate` that vLLM has, by the names of its `SamplingParams`; the second table's are for sampling.
COUNTERPARTS = {
    "max_new_tokens": "max_tokens", "min_new_tokens": "min_tokens", "repetition_penalty": "repetition_penalty",
    "stop_strings": "stop", "eos_token_id": "stop_token_ids",
}  # fmt: skip
SAMPLING = {"temperature": "temperature", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p"}
NO_SCORES = "engine must be transformers where choices are scored, since vLLM gives no log p̂ of given tokens"
# What vLLM is told unless the user has told it something else.
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # an engine that is a process outlives a run that is killed
    "VLLM_LOGGING_LEVEL": "ERROR",  # the log is on stdout, where the results of programs are
    "VLLM_NO_USAGE_STATS": "1",  # its makers would be told of each start
    "VLLM_CPU_KVCACHE_SPACE": "4",  # GiB; it would be nearly all memory
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # it would take cores that others use
}
DEFAULTS: dict[str, Any] = GenerationConfig._get_default_generation_params()


def sampling_params(generation: Mapping[str, Any], path: str, tokenizer: Any) -> dict[str, Any]:
    """The arguments of vLLM's `SamplingParams`, but for the seed and DoLa's keys.

    Args:
        generation: Arguments of `generate`, over the checkpoint's own.
        path: The checkpoint.
        tokenizer: Its tokenizer; its EOS ends an answer unless `generation` has another.

    Raises:
        ValueError: vLLM has no counterpart for one of them, or an answer has no most tokens.
    """
    known = {"do_sample": "", **COUNTERPARTS, **SAMPLING}
    if strange := [k for k, v in generation.items() if k not in known and v not in (None, DEFAULTS.get(k))]:
        raise ValueError(
            f"generation.{strange[0]} must be left off with engine=vllm, got {generation[strange[0]]!r}: vLLM has"
            f" counterparts for {', '.join(known)} alone"
        )
    try:
        saved = GenerationConfig.from_pretrained(path).to_dict()
    except OSError:  # it has none
        saved = {}
    own = {name: value for name in known if (value := saved.get(name)) is not None}
    given = {**DEFAULTS, **own, "eos_token_id": tokenizer.eos_token_id, **generation}
    if given.get("max_new_tokens") is None:
        raise ValueError("generation.max_new_tokens must be an integer of at least 1 with engine=vllm, got None")
    names = COUNTERPARTS | SAMPLING if given["do_sample"] else COUNTERPARTS
    params = {theirs: given[ours] for ours, theirs in names.items() if given.get(ours) is not None}
    # logprobs: that of each token, which is NaN where the logits are. What ends an answer is said here alone.
    params = {"temperature": 0.0} | params | {"ignore_eos": True, "logprobs": 0}
    return params | {"stop_token_ids": as_list(params.get("stop_token_ids", []))}


def start(
    config: ManyConfig, model_config: Any, dtype: torch.dtype, configs: Sequence[DoLaConfig], **limits: Any
) -> Any:
    """A `vllm.LLM` that reads the exits of all of `configs`.

    Args:
        config: The run's.
        model_config: The checkpoint's.
        dtype: The weights' dtype.
        configs: What will be asked for.
        limits: Arguments of `LLM`.

    Raises:
        ValueError: vLLM is not installed, cannot take the checkpoint, or does not start.
    """
    path = config.model_path
    if model_config.model_type != "janus":  # vLLM would load the published tokenizer without spaces
        raise ValueError(
            "model_path must be in the layout of transformers' own Janus with engine=vllm, got the published one: "
            f"janus-dola export out=FOLDER model_path={path} writes the folder to give"
        )
    os.environ |= ENVIRONMENT | dict(os.environ)
    try:
        from vllm import LLM
        from vllm.platforms import current_platform
    except ImportError as error:
        raise ValueError(f"engine=vllm needs vllm: pip install 'janus-dola[vllm]' ({error})") from error
    if config.device not in ("auto", current_platform.device_type):
        raise ValueError(
            f"device must be auto or {current_platform.device_type}, where this vLLM runs, with engine=vllm, got "
            f"{config.device!r}"
        )
    layers = by_row(configs, model_config.get_text_config().num_hidden_layers).layers
    dola = {"candidate_layers": list(layers)} if layers else {"use_dola_lm": False}
    arguments = {"dtype": str(dtype).removeprefix("torch."), "additional_config": {"dola": dola}}
    with checkpoint.loading(path):
        return LLM(path, **arguments, use_tqdm_on_load=False, **limits)


def answer_many(
    llm: Any,
    processor: Any,
    prompts: Sequence[Prompt],
    task: Task,
    params: Mapping[str, Any],
    seed: int = 0,
    done: Container[str | int] = (),
) -> Generator[tuple[Prompt, Outcome], None, None]:
    """Answers prompts x configurations, with a progress bar; each request has a configuration and a seed of its own.

    Args:
        llm: From `start`.
        processor: The checkpoint's.
        prompts: As `read_prompts` gives them.
        task: What to ask of each.
        params: From `sampling_params`.
        seed: Seed for sampling.
        done: Ids of prompts that need no answer.

    Yields:
        Each prompt, and what became of it, in the order in which they end.
    """
    from vllm import SamplingParams
    from vllm.exceptions import VLLMClientError

    engine, room = llm.llm_engine, 2 * llm.llm_engine.vllm_config.scheduler_config.max_num_seqs
    waiting = list(enumerate(prompts))[::-1]
    open_: dict[str, tuple[Prompt, list[Any]]] = {}  # the answers to a prompt so far, by configuration
    with tqdm(total=len(prompts), desc="prompts", unit="prompt", disable=None) as progress:
        while waiting or open_:
            while waiting and engine.get_num_unfinished_requests() < room:
                number, prompt = waiting.pop()
                progress.update(prompt.id in done)
                if prompt.id in done:
                    continue
                configs = task.configs(prompt)
                names = [f"{number}/{i}" for i in range(len(configs))]
                try:
                    ids, images = encode_prompt(prompt.turns, processor), load_pil_images(prompt.turns)
                    for name, dola in zip(names, configs, strict=True):
                        own = SamplingParams(**params, seed=seed_of(seed, prompt), extra_args=asdict(dola))
                        engine.add_request(name, {"prompt_token_ids": ids, "multi_modal_data": {"image": images}}, own)
                    open_[str(number)] = prompt, [None] * len(configs)
                except (ValueError, VLLMClientError) as error:
                    engine.abort_request(names)
                    progress.update()
                    yield prompt, Outcome(str(error))
            for output in engine.step() if open_ else ():
                key, _, i = output.request_id.partition("/")
                if not output.finished or key not in open_:
                    continue
                prompt, answers = open_[key]
                answers[int(i)] = _answer(output.outputs[0], processor.tokenizer)
                if all(answers):
                    del open_[key]
                    progress.update()
                    yield prompt, Outcome(next((a.error for a in answers if a.error is not None), None), answers)


def _answer(completion: Any, tokenizer: Any) -> Answer:
    ids = list(completion.token_ids)
    broken = [math.isnan(step[x].logprob) for x, step in zip(ids, completion.logprobs, strict=True)]
    error = nan_error(broken.index(True)) if any(broken) else None
    return Answer(tokenizer.decode(ids, skip_special_tokens=True).strip(), len(ids), None, error)


def answer_with_vllm(
    config: ManyConfig,
    task: Task,
    model_config: Any,
    dtype: torch.dtype,
    processor: Any,
    prompts: Sequence[Prompt],
    done: Container[str | int] = (),
) -> Generator[tuple[Prompt, Outcome], None, None]:
    """What `answer_many` yields for a run, from an engine for it alone.

    Raises:
        ValueError: vLLM cannot do what the run asks for.
    """
    if task.scored and any(prompt.form == "choices" for prompt in prompts):
        raise ValueError(f"{NO_SCORES}, got 'vllm'")
    params = sampling_params(config.generation, config.model_path, processor.tokenizer)
    left = [prompt for prompt in prompts if prompt.id not in done]
    images = [sum(len(turn["images"]) for turn in prompt.turns) for prompt in left]
    limits = {
        "max_model_len": max(prompt.length for prompt in left) + params["max_tokens"],
        "limit_mm_per_prompt": {"image": max(1, *images)},  # with none, vLLM takes no pictures' argument at all
    }
    configs = [dola for prompt in left for dola in task.configs(prompt)]
    llm = start(config, model_config, dtype, configs, **limits)
    yield from answer_many(llm, processor, prompts, task, params, config.seed, done)
