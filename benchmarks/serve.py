"""Requests per minute of servers of a janus-dola export: python -m benchmarks.serve urls=[URL,...] model=FOLDER

Clients ask one question about one picture, each again as soon as it has its answer, with DoLa off and on by turns, and
one server after the other: vLLM's, or transformers'.
"""

import base64
import json
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urljoin
from urllib.request import urlopen

import openai
import torch

from benchmarks.common import at_least, describe_machine, machine
from janus_dola.programs.options import read_config, run_program

IMAGE = Path(__file__).parents[1] / "demo" / "images" / "scene.png"


@dataclass
class ServeOptions:
    """The keys of the command line.

    Attributes:
        model: The folder that is served, as the servers were given it.
        urls: Where they are.
        image, question: What is asked.
        clients: How many ask at once.
        requests: How many each of them makes in a round.
        rounds: Each measures all servers and numbers of clients with DoLa off and on.
    """

    model: str = "outputs/janus-dola"
    urls: list[str] = field(default_factory=lambda: ["http://localhost:8000/v1"])
    image: str = str(IMAGE)
    question: str = "Describe the image."
    clients: list[int] = field(default_factory=lambda: [1, 4, 16])
    requests: int = 8
    rounds: int = 3

    def __post_init__(self) -> None:
        for value in (self.requests, self.rounds, *self.clients):
            at_least("clients, requests and rounds", value, 1)


def measure(options: ServeOptions, url: str, clients: int, use_dola_lm: bool) -> float:
    """Requests per minute."""
    picture = "data:image/png;base64," + base64.b64encode(Path(options.image).read_bytes()).decode()
    content: Any = [{"type": "image_url", "image_url": {"url": picture}}, {"type": "text", "text": options.question}]
    client = openai.OpenAI(base_url=url, api_key="none")
    keys = {"use_dola_lm": int(use_dola_lm)}
    own = {"vllm_xargs": keys} if kind(url) == "vllm" else {"generation_config": json.dumps(keys)}

    def ask(_: int) -> None:
        for _ in range(options.requests):
            client.chat.completions.create(
                model=options.model, messages=[{"role": "user", "content": content}], extra_body=own
            )

    start = time.monotonic()
    with ThreadPoolExecutor(clients) as threads:
        list(threads.map(ask, range(clients)))
    return 60 * clients * options.requests / (time.monotonic() - start)


def kind(url: str) -> str:
    """Which server it is."""
    try:
        with urlopen(urljoin(url, "/version")):
            return "vllm"
    except HTTPError:  # transformers' has no such address
        return "transformers"


def run(argv: Sequence[str]) -> None:
    options = read_config(ServeOptions, argv, None)
    cells = list(product(options.clients, options.urls, (False, True)))
    for url in options.urls:
        measure(options, url, 1, True)  # the first request loads the model
    found: dict[tuple[int, str, bool], list[float]] = {cell: [] for cell in cells}
    for _ in range(options.rounds):
        for clients, url, use_dola_lm in cells:
            found[clients, url, use_dola_lm].append(measure(options, url, clients, use_dola_lm))
    print(f"{describe_machine(machine(torch.device('cpu')))}\n")
    heads = [f"{kind(url)}, DoLa {'on' if on else 'off'}" for url, on in product(options.urls, (False, True))]
    print(f"| clients | {' | '.join(heads)} |\n|--:|{'--:|' * len(heads)}")
    for clients in options.clients:
        values = [f"{median(found[clients, *cell]):.0f}" for cell in product(options.urls, (False, True))]
        print(f"| {clients} | {' | '.join(values)} |")


if __name__ == "__main__":
    run_program(run)
