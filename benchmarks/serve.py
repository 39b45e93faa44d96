"""Requests a minute of `transformers serve` on a folder of janus-dola export: python -m benchmarks.serve model=FOLDER

Clients ask one question about one picture, each again as soon as it has its answer, with DoLa off and on by turns.
"""

import base64
import json
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import openai
import torch

from benchmarks.common import at_least, describe_machine, machine
from janus_dola.programs.options import read_config, run_program

IMAGE = Path(__file__).parents[1] / "demo" / "images" / "scene.png"


@dataclass
class ServeOptions:
    """The keys of the command line.

    Attributes:
        model: The folder that is served, as the server was given it.
        url: Where.
        image, question: What is asked.
        clients: How many ask at once.
        requests: How many each of them makes in a round.
        rounds: Each measures all numbers of clients with DoLa off and on.
    """

    model: str = "outputs/janus-dola"
    url: str = "http://localhost:8000/v1"
    image: str = str(IMAGE)
    question: str = "Describe the image."
    clients: list[int] = field(default_factory=lambda: [1, 2, 4])
    requests: int = 8
    rounds: int = 3

    def __post_init__(self) -> None:
        for value in (self.requests, self.rounds, *self.clients):
            at_least("clients, requests and rounds", value, 1)


def measure(options: ServeOptions, clients: int, use_dola_lm: bool) -> float:
    """Requests a minute."""
    picture = "data:image/png;base64," + base64.b64encode(Path(options.image).read_bytes()).decode()
    content: Any = [{"type": "image_url", "image_url": {"url": picture}}, {"type": "text", "text": options.question}]
    client = openai.OpenAI(base_url=options.url, api_key="none")

    def ask(_: int) -> None:
        for _ in range(options.requests):
            client.chat.completions.create(
                model=options.model,
                messages=[{"role": "user", "content": content}],
                extra_body={"generation_config": json.dumps({"use_dola_lm": use_dola_lm})},
            )

    start = time.monotonic()
    with ThreadPoolExecutor(clients) as threads:
        list(threads.map(ask, range(clients)))
    return 60 * clients * options.requests / (time.monotonic() - start)


def run(argv: Sequence[str]) -> None:
    options = read_config(ServeOptions, argv, None)
    measure(options, 1, True)  # the first request loads the model
    cells = [(clients, use_dola_lm) for clients in options.clients for use_dola_lm in (False, True)]
    found: dict[tuple[int, bool], list[float]] = {cell: [] for cell in cells}
    for _ in range(options.rounds):
        for cell in cells:
            found[cell].append(measure(options, *cell))
    print(f"{describe_machine(machine(torch.device('cpu')))}\n")
    print("| clients | DoLa off | DoLa on |\n|--:|--:|--:|")
    for clients in options.clients:
        print(f"| {clients} | {median(found[clients, False]):.0f} | {median(found[clients, True]):.0f} |")


if __name__ == "__main__":
    run_program(run)
