"""A file of prompts to a file of results, which survives a kill."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from os import PathLike
from typing import Any

from janus_dola.programs import checkpoint
from janus_dola.programs.engine import Outcome, Task, answer_many
from janus_dola.programs.options import ManyConfig
from janus_dola.programs.prompts import Prompt, fingerprint, read_prompts
from janus_dola.programs.ray_workers import answer_with_workers
from janus_dola.programs.results import Results
from janus_dola.wrapper import DoLaJanusWrapper

RUN_KEYS = ("model_path", "roles", "generation", "seed", "image_root")  # those of any run that results depend on


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
    """Answers a file of prompts.

    Args:
        config: The run's.
        task: What to ask of each prompt, and what to keep.
        settings: The keys of `config` that the results depend on.
        key: The one that names the file of prompts.
        output: The file of results; see `Results`. Bad prompts are {"id", "error"} there.
        strict: Whether the first error stops the run.

    Returns:
        The good prompts, and all lines by id.

    Raises:
        ValueError: Something in the configuration is wrong, or `strict` and there is an error.
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

    with Results(output, values | {"dtype": str(dtype), key: fingerprint(path, key)}) as results:
        for line in errors:
            results.write([line])
            check(line)
        for line in results.lines.values():  # of runs before
            check(line)
        if any(prompt.id not in results.lines for prompt in prompts):
            done = results.lines.keys()
            if config.workers:
                answered = answer_with_workers(config, task, dtype, prompts, done)
            else:
                model = DoLaJanusWrapper(checkpoint.load_model(config, model_config))
                how = (config.generation, config.batch_size, config.seed)
                answered = answer_many(model, processor, prompts, task, *how, done)
            with closing(answered):
                for line in lines_of(task, answered):
                    results.write([line])
                    check(line)
        return prompts, results.lines
