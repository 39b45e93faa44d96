"""A file of prompts answered by Ray Data actors, on this machine or a cluster; whoever asks writes the answers.

Batches are those of one process, and each is a task: it is done again, by another actor, where its own was killed.
"""

import json
import logging
import math
import os
import re
import socket
import sys
import tempfile
from collections.abc import Collection, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import IO, Any

import torch
from tqdm import tqdm

from janus_dola.config import DoLaConfig
from janus_dola.programs import checkpoint
from janus_dola.programs.engine import Answer, Outcome, Task, answer_many
from janus_dola.programs.options import ManyConfig
from janus_dola.programs.prompts import Prompt
from janus_dola.wrapper import DoLaJanusWrapper


class Worker:
    """An actor: answers a batch of prompts. The first batch loads the model, so that a load error reaches the driver.

    Args:
        config: The run's.
        task: The run's.
        folder: Where the run was started; its relative paths are from there.
        threads: CPU threads to use.
    """

    def __init__(self, config: ManyConfig, task: Task, folder: str, threads: int) -> None:
        self.config, self.task, self.folder, self.threads = config, task, folder, threads
        self.loaded: tuple[DoLaJanusWrapper, Any] | None = None

    def __call__(self, row: dict[str, str]) -> dict[str, str]:
        try:
            answered = self.answer(**json.loads(row["batch"]))
            return {"outcomes": json.dumps([(prompt.id, asdict(outcome)) for prompt, outcome in answered]), "error": ""}
        except (ValueError, OSError) as error:  # the user's, for the driver to raise: Ray would not keep its type
            return {"outcomes": "[]", "error": str(error)}

    def answer(self, prompts: list[dict[str, Any]], done: list[str | int]) -> Iterator[tuple[Prompt, Outcome]]:
        if self.loaded is None:
            os.chdir(self.folder)
            torch.set_num_threads(self.threads)
            self.loaded = checkpoint.load(self.config)
        own = [{"dola": DoLaConfig(**prompt["dola"]), "choices": tuple(prompt["choices"])} for prompt in prompts]
        batch = [Prompt(**prompt | typed) for prompt, typed in zip(prompts, own, strict=True)]
        (model, processor), config = self.loaded, self.config
        return answer_many(model, processor, batch, self.task, config.generation, config.batch_size, config.seed, done)


@contextmanager
def held_stderr() -> Iterator[IO[bytes]]:
    """A file that has what is written to the standard error stream meanwhile, also past Python."""
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as file:
        try:
            os.dup2(file.fileno(), 2)
            yield file
        finally:
            os.dup2(kept, 2)
            os.close(kept)


def check_address(address: str) -> None:
    """Refuses HOST:PORT where nobody listens: Ray would look for it for minutes, and end the process."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdecimal():  # auto, local
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
    except (OSError, OverflowError) as error:
        raise ValueError(f"RAY_ADDRESS must be the address of a running cluster, got {address!r}: {error}") from error


def start_ray(address: str) -> None:
    """Connects to the cluster of an address, or starts one where it is "local"."""
    import ray

    quiet: Any = {"log_to_driver": False, "logging_level": logging.ERROR, "include_dashboard": False}
    check_address(address)
    with held_stderr() as said:
        try:
            ray.init(address, **quiet)
        except Exception as error:  # Ray has errors of its own
            said.seek(0)  # the reason, such as a token, it may write on stderr alone
            lines = re.findall(r"^\[.*?\] [\w.]+:\d+: (.*)", said.read().decode(errors="replace"), re.M)
            reason = f" ({lines[-1]})" if lines else ""
            raise ValueError(f"RAY_ADDRESS {address!r} cannot be used: {error}{reason}") from error


def answer_with_workers(
    config: ManyConfig, task: Task, dtype: torch.dtype, prompts: Sequence[Prompt], done: Collection[str | int] = ()
) -> Generator[tuple[Prompt, Outcome], None, None]:
    """What `answer_many` yields with `config.workers` actors, as they come, and with its progress bar.

    The cluster is that of RAY_ADDRESS, or one on this machine, which ends with the iterator.

    Args:
        config: The run's; checkpoint and images must have the same paths on all machines.
        task: What to ask of each prompt.
        dtype: The weights' dtype on all machines.
        prompts: As `read_prompts` gives them.
        done: Ids of prompts that need no answer; see `answer_many`.
    """
    import ray
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # what it has to say is raised, too
    rest, size = sorted(prompts, key=lambda prompt: -prompt.length), config.batch_size
    batches = [rest[i : i + size] for i in range(0, len(rest), size)]
    batches = [batch for batch in batches if any(prompt.id not in done for prompt in batch)]
    rows, by_id = [], {prompt.id: prompt for prompt in prompts}
    for batch in batches:
        given = {"prompts": [asdict(prompt) for prompt in batch], "done": [p.id for p in batch if p.id in done]}
        rows.append({"batch": json.dumps(given)})  # a string: lists of different lengths are no column
    started = not ray.is_initialized()
    if started:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # this it says itself, on file descriptor 2
        start_ray(os.environ.get("RAY_ADDRESS", "local"))
    try:
        ray.data.DataContext.get_current().enable_progress_bars = False
        resources, workers = ray.cluster_resources(), min(config.workers, len(rows))
        cpus, gpus = resources.get("CPU", 1), 0 if config.device == "cpu" else resources.get("GPU", 0)
        threads = max(1, min(torch.get_num_threads(), int(cpus) // workers))
        answers = ray.data.from_items(rows, override_num_blocks=len(rows)).map(
            Worker,
            fn_constructor_args=(replace(config, dtype=str(dtype).removeprefix("torch.")), task, os.getcwd(), threads),
            compute=ray.data.ActorPoolStrategy(size=workers, max_tasks_in_flight_per_actor=2),
            # Shares that all actors fit into, and one of the CPUs for Ray's own tasks.
            num_cpus=0 if gpus else 1 / math.ceil((workers + 1) / cpus),
            num_gpus=1 / math.ceil(workers / gpus) if gpus else None,
        )
        left = sum(map(len, batches))
        with tqdm(total=len(rest), initial=len(rest) - left, desc="prompts", unit="prompt", disable=None) as progress:
            for row in answers.iter_rows():
                if row["error"]:
                    raise ValueError(row["error"])
                outcomes = json.loads(row["outcomes"])
                for id_, outcome in outcomes:
                    answers = [Answer(*answer) for answer in outcome["answers"]]
                    yield by_id[id_], Outcome(outcome["error"], answers, outcome["logprobs"])
                progress.update(len(outcomes))
    finally:
        if started:
            ray.shutdown()
