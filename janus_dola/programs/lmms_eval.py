"""Janus with DoLa as a model of lmms-eval, which finds it by the entry point in pyproject.toml: --model janus_dola.

python -m lmms_eval --model janus_dola --model_args pretrained=deepseek-ai/Janus-Pro-7B,alpha=0.1 --tasks pope
"""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

import torch
from accelerate import Accelerator
from lmms_eval.api.instance import GenerationResult
from lmms_eval.api.model import lmms
from PIL.Image import Image

from janus_dola.programs import checkpoint, vllm_engine
from janus_dola.programs.engine import Outcome, Task, answer_many, generate_arguments
from janus_dola.programs.generation import BATCH, check_generation, names, refuse
from janus_dola.programs.options import ManyConfig, as_list, read_config
from janus_dola.programs.prompts import (
    IMAGE_TAG,
    Prompt,
    build_conversation,
    encode_continuations,
    open_images,
    prompt_length,
)

WINDOW = 32  # batches whose images are in memory together, to make batches of prompts of like lengths from


class JanusDoLa(lmms):
    """The model. Under `accelerate launch` each process has one, on a device of its own, and answers its share.

    Args:
        pretrained: `model_path` of configs/default.yaml: a folder, or a name on the hub.
        batch_size: Requests answered together.
        keys: Those of `ModelConfig` (DoLa's, `roles`, `device`, `dtype`, `seed`, `generation.KEY`) and `engine`, as on
            the command lines; `config=FILE`. A task's own arguments of `generate` win over `generation`.

    Raises:
        ValueError: A key is unknown, or a value is wrong.
    """

    model: Any = None
    llm: Any = None  # in its place with engine=vllm

    def __init__(self, pretrained: str, batch_size: int | str = 1, **keys: Any) -> None:
        super().__init__()
        self.accelerator = Accelerator()
        if self.accelerator.num_processes > 1:
            keys["device"] = self.accelerator.device
            self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        self.options = read_config(ManyConfig, [f"{key}={v}" for key, v in {**keys, "model_path": pretrained}.items()])
        if self.options.workers:
            raise ValueError(
                f"workers must be 0 in lmms-eval, got {self.options.workers}: accelerate launch has its own"
            )
        self.batch_size = int(batch_size)
        if self.options.engine == "vllm":
            if self.accelerator.num_processes > 1:
                raise ValueError(f"engine=vllm must be in one process, got {self.accelerator.num_processes}")
            model_config = checkpoint.load_config(pretrained)
            self.processor = checkpoint.load_processor(self.options, model_config)
            self.device, dtype = checkpoint.pick_device(self.options.device, self.options.dtype, model_config.dtype)
            self.llm = vllm_engine.start(self.options, model_config, dtype, [self.options.dola()])
        else:
            self.model, self.processor = checkpoint.load(self.options)
            self.device = self.model.device

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """The answers to requests (context, arguments of `generate` and `until`, doc_to_visual, doc_id, task, split).

        Raises:
            ValueError: An argument of `generate` is refused, or a request cannot be answered: no score has a hole.
        """
        answers = [""] * len(requests)
        groups: dict[str, list[int]] = {}  # requests with the same arguments
        for i, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True, default=str), []).append(i)
        seen: Counter[str] = Counter()
        for group in groups.values():
            given = requests[group[0]].args[1]
            generation = check_generation(self.arguments(given))
            refuse(generation, BATCH, "left off in a batch run")
            until = as_list(given.get("until") or [])
            for start in range(0, len(group), WINDOW * self.batch_size):
                window = group[start : start + WINDOW * self.batch_size]
                prompts = {prompt.id: (i, prompt) for i in window for prompt in [self.prompt(requests[i], seen)]}
                waiting = [prompt for _, prompt in prompts.values()]
                for prompt, outcome in self.answer(waiting, generation):
                    if outcome.error is not None:
                        raise ValueError(f"{prompt.id}: {outcome.error}")
                    answers[prompts[prompt.id][0]] = cut(outcome.answers[0].text, until)
        return answers

    def answer(self, prompts: Sequence[Prompt], generation: Mapping[str, Any]) -> Iterator[tuple[Prompt, Outcome]]:
        seed = self.options.seed
        if self.llm is None:
            return answer_many(self.model, self.processor, prompts, Task(), generation, self.batch_size, seed)
        params = vllm_engine.sampling_params(generation, self.options.model_path, self.processor.tokenizer)
        return vllm_engine.answer_many(self.llm, self.processor, prompts, Task(), params, seed)

    def prompt(self, request: Any, seen: Counter[str]) -> Prompt:
        """A request as a prompt. Its id seeds sampling: of its task, document and how often that was `seen` before."""
        context, _, *where = request.args
        turns = self.turns(context, *where)
        _, doc_id, task, split = where
        name = f"{task}/{split}/{doc_id}"
        seen[name] += 1
        return Prompt(f"{name}/{seen[name]}", turns, self.options.dola(), prompt_length(turns, self.processor))

    def arguments(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """A task's arguments for `generate`, over the model's; what is not one, as `until`, is left out.

        As in lmms-eval's own models, a temperature of 0 means greedy search, and another one sampling, unless
        `do_sample` says something else.
        """
        arguments = self.options.generation | {k: v for k, v in given.items() if k in names() and v is not None}
        sample = given.get("do_sample", "temperature" in given or arguments.get("do_sample"))
        arguments["do_sample"] = bool(sample and arguments.get("temperature", 1))
        if not arguments["do_sample"]:
            for name in ("temperature", "top_p", "top_k"):
                arguments.pop(name, None)
        return arguments

    def turns(self, context: str, doc_to_visual: Any, doc_id: int, task: str, split: str) -> list[dict[str, Any]]:
        """The conversation of a request: images where the context has as many <image>, or else before it."""
        images = doc_to_visual(self.task_dict[task][split][doc_id]) or []
        if wrong := [type(image).__name__ for image in images if not isinstance(image, Image)]:
            raise ValueError(f"{task}/{split}/{doc_id}: janus_dola takes images alone, got {wrong[0]}")
        tag = IMAGE_TAG if context.count("<image>") == len(images) else ""
        return build_conversation(self.options.roles, context.replace("<image>", tag), images)

    @torch.inference_mode()
    def loglikelihood(self, requests: Sequence[Any]) -> list[GenerationResult]:
        """For requests (context, continuation, doc_to_visual, doc_id, task, split) a loss, and whether it is greedy.

        The loss is the mean −log p̂ of the continuation's tokens, not a log-probability: lmms-eval chooses the
        continuation with the least (its issue 370), since that is what its own models return. Continuations of one
        context share its forward pass.

        Returns:
            (loss, is_greedy) as `text` of a `GenerationResult`, since lmms-eval 0.7.3 makes a string of a bare tuple.

        Raises:
            ValueError: With vLLM.
        """
        if self.llm is not None:
            raise ValueError(f"{vllm_engine.NO_SCORES}, got 'vllm'")
        tokenizer, results = self.processor.tokenizer, []
        for _, group in groupby([request.args for request in requests], key=lambda args: (args[0], args[3:])):
            choices = list(group)
            context, _, doc_to_visual, doc_id, task, split = choices[0]
            doc = self.task_dict[task][split][doc_id]
            texts = [text(doc) if callable(text) else text for _, text, *_ in choices]
            turns = self.turns(context, doc_to_visual, doc_id, task, split)
            inputs = self.processor(conversations=turns, images=open_images(turns, self.processor))
            inputs = inputs.to(self.model.device, self.model.dtype)
            prompt = self.model.prepare_inputs_embeds(**inputs)  # [1, P, d]
            ids, mask = encode_continuations(tokenizer, [text.lstrip() for text in texts])  # [choices, T]
            log_p = self.model.score(prompt, continuation_ids=ids, continuation_mask=mask).sum(-1).cpu()  # [choices]
            arguments = generate_arguments(tokenizer, {"do_sample": False, "max_new_tokens": ids.shape[1]})
            greedy = self.model.generate(inputs_embeds=prompt, attention_mask=inputs.attention_mask, **arguments)
            for loss, row, own in zip((-log_p / mask.sum(-1)).tolist(), ids, mask.bool(), strict=True):
                text_ids = row[own].tolist()
                results.append(GenerationResult((loss, greedy[0, : len(text_ids)].tolist() == text_ids)))
        return results

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        raise NotImplementedError("janus_dola answers one question at a time: it cannot run generate_until_multi_round")

    def clean(self) -> None:
        """Gives back the model's memory; lmms-eval calls it when all requests are answered."""
        self.model = self.llm = None
        super().clean()


def cut(text: str, until: Sequence[str]) -> str:
    """The text up to the first stop string."""
    for stop in until:
        text = text.split(stop, 1)[0] if stop else text
    return text.strip()
