"""A file of prompts to a file of results, which survives a kill."""

import sys
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from os import PathLike
from typing import Any

from janus_dola.programs import checkpoint
from janus_dola.programs.engine import Outcome, Task, answer_many
from janus_dola.programs.options import ManyConfig
from janus_dola.programs.prompts import Prompt, read_prompts
from janus_dola.programs.ray_workers import answer_with_workers
from janus_dola.programs.results import Results
from janus_dola.programs.vllm_engine import answer_with_vllm
from janus_dola.wrapper import DoLaJanusWrapper

# The keys of any run that results depend on.
RUN_KEYS = ("model_path", "roles", "generation", "seed", "image_root", "engine")


def lines_of(task: Task, answered: Iterable[tuple[Prompt, Outcome]]) -> Iterator[dict[str, Any]]:
    """What a file keeps of what `answer_many` yields: {"id"} and `task.line`, or {"id", "error"}."""
    for prompt, outcome in answered:
        kept = task.line(prompt, outcome) if outcome.error is None else {"error": outcome.error}
        yield {"id": prompt.id} | kept


def answer_file(
    config: ManyConfig,
    task: Task,
    settings: Sequence[str],
    key: str,
    output: str | PathLike[str],
    strict: bool = False,
) -> tuple[list[Prompt], dict[str | int, dict[str, Any]]]:
    """Answers a file of prompts. Of a run before, answers to the same prompts stay, and errors are tried again.

    Args:
        config: The run's.
        task: What to ask of each prompt, and what to keep.
        settings: The keys of `config` that the results depend on.
        key: The one that names the file of prompts.
        output: The file of results; see `Results`. Bad prompts are {"id", "error"} there.
        strict: Whether the first error stops the run.

    Returns:
        The good prompts, and the lines of all prompts by id.

    Raises:
        ValueError: Something in the configuration is wrong, the output holds answers to other prompts alone, or
            `strict` and there is an error.
    """
    config.check_batch()
    model_config = checkpoint.load_config(config.model_path)
    processor = checkpoint.load_processor(config, model_config)
    _, dtype = checkpoint.pick_device(config.device, config.dtype, model_config.dtype)
    path = getattr(config, key)
    prompts, errors = read_prompts(config, path, processor, model_config, key, config.image_root, task.scored)
    values = {name: getattr(config, name) for name in settings}

    def check(line: Mapping[str, Any]) -> None:
        if strict and "error" in line:
            raise ValueError(f"{key}, {line['id']}: {line['error']}")

    # Of the configuration that it is asked under: calibrate's are its own, whatever the run's.
    prints = {prompt.id: replace(prompt, dola=task.configs(prompt)[0]).fingerprint for prompt in prompts}
    with Results(output, values | {"dtype": str(dtype)}) as results:
        names = [*(line["id"] for line in errors), *prints]
        answered = {name: line for name, line in results.lines.items() if "error" not in line}
        done = {name for name, line in answered.items() if line.get("prompt") == prints.get(name, "")}
        if answered and not done:
            raise ValueError(f"output: {str(output)!r} holds answers to other prompts; give another")
        if results.lines:
            kept, new = _counted(len(done), "answer"), _counted(len(prompts) - len(done), "prompt")
            print(f"{output}: {kept} kept, {new} to answer", file=sys.stderr)
        for name in results.lines.keys() - answered.keys() - set(names):  # errors of lines that are no longer there
            del results.lines[name]
        for line in errors:
            results.write([line])
            check(line)
        if len(done) < len(prompts):
            if config.workers:
                answers = answer_with_workers(config, task, dtype, prompts, done)
            elif config.engine == "vllm":
                answers = answer_with_vllm(config, task, model_config, dtype, processor, prompts, done)
            else:
                model = DoLaJanusWrapper(checkpoint.load_model(config, model_config))
                answers = answer_many(
                    model, processor, prompts, task, config.generation, config.batch_size, config.seed, done
                )
            with closing(answers):
                for line in lines_of(task, answers):
                    results.write([line if "error" in line else line | {"prompt": prints[line["id"]]}])
                    check(line)
        lines = {name: results.lines[name] for name in names}
        print(f"{output}: {summary(lines.values(), len(done))}", file=sys.stderr)
        return prompts, lines


def summary(lines: Collection[Mapping[str, Any]], kept: int) -> str:
    """What became of a run, in a line; `kept` answers are of a run before."""
    errors, judged = sum("error" in line for line in lines), [line["correct"] for line in lines if "correct" in line]
    parts = [f"{len(lines) - errors - kept} answered", f"{kept} kept", _counted(errors, "error")]
    return ", ".join(parts + [f"{sum(judged)} of {len(judged)} right"] * bool(judged))


def _counted(n: int, thing: str) -> str:
    return f"{n} {thing}{'' if n == 1 else 's'}"
