"""vLLM's server on an exported folder, asked by OpenAI's client: each gets what the wrapper says, whoever else asks."""

import base64
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import cache
from io import BytesIO
from itertools import product
from typing import Any

import pytest

openai = pytest.importorskip("openai")
psutil = pytest.importorskip("psutil")

from engines import janus, new_folder  # noqa: E402
from janus_requests import QUESTIONS, wanted  # noqa: E402
from PIL import Image  # noqa: E402

from janus_dola import DoLaConfig  # noqa: E402

SERVER = {"candidate_layers": list(range(1, 30))}
KEYS: list[dict[str, Any]] = [
    {},
    {"use_dola_lm": 0},
    {"alpha": 0.0, "bucket_id": 0},
    {"alpha": 0.3, "bucket_id": 1},
    {"bucket_id": 2},
    {"candidate_layers": [24]},
    {"method": "deco", "bucket_id": 2},
    {"method": "sled", "bucket_id": 1, "sled_rate": 5.0},
]
ASKED = list(product(range(len(QUESTIONS)), range(len(KEYS))))


class Server:
    """vLLM's server in a process group of its own."""

    def __init__(self) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.address = f"http://localhost:{port}"
        options = {
            "model": str(janus()[1]),
            "served-model-name": "janus",
            "host": "127.0.0.1",
            "port": str(port),
            "api-key": "secret",
            "dtype": "float32",
            "max-model-len": "2048",
            "max-num-seqs": "32",
            "num-gpu-blocks-override": "80",  # touched, all of them, by a hundred requests
            "limit-mm-per-prompt": '{"image": 4}',
            "allowed-media-domains": "pictures.invalid",
            "additional-config": json.dumps({"dola": SERVER}),
        }
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--enforce-eager"]
        command += [part for name, value in options.items() for part in (f"--{name}", value)]
        env = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
        self.log = new_folder() / "log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=env, start_new_session=True)

    def client(self) -> openai.OpenAI:
        """A client, once the server answers."""
        deadline = time.monotonic() + 900
        while True:
            try:
                urllib.request.urlopen(f"{self.address}/health").close()
                return openai.OpenAI(base_url=f"{self.address}/v1", api_key="secret", timeout=120)
            except OSError:
                assert self.process.poll() is None and time.monotonic() < deadline, self.log.read_text()
                time.sleep(0.1)

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(60)
        finally:
            with suppress(ProcessLookupError):  # none is left
                os.killpg(self.process.pid, signal.SIGKILL)

    def processes(self) -> list[psutil.Process]:
        parent = psutil.Process(self.process.pid)
        return [parent, *parent.children(recursive=True)]

    def resident(self) -> int:
        """Bytes of memory of all its processes."""
        return sum(process.memory_info().rss for process in self.processes())

    def metric(self, name: str) -> float:
        with urllib.request.urlopen(f"{self.address}/metrics") as answer:
            lines = answer.read().decode().splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(f"vllm:{name}{{"))


@contextmanager
def running() -> Iterator[Server]:
    server = Server()
    try:
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with running() as server:
        yield server


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return server.client()


@cache
def tokens(i: int, k: int) -> list[int]:
    """What the wrapper answers to a question with a configuration."""
    own = SERVER | ({"candidate_layers": None} if "bucket_id" in KEYS[k] else {}) | KEYS[k]
    return wanted(*QUESTIONS[i], DoLaConfig(**own))[1].sequences[0].tolist()


def data_url(picture: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(picture).decode()}"


def encode(image: Image.Image) -> bytes:
    image.save(buffer := BytesIO(), "png")
    return buffer.getvalue()


def message(text: str, *urls: Any) -> list[dict[str, Any]]:
    images = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return [{"role": "user", "content": [*images, {"type": "text", "text": text}]}]


URLS = [[data_url(encode(image)) for image in images] for _, images in QUESTIONS]


def create(client: openai.OpenAI, i: int, k: int, **more: Any) -> Any:
    body = {"vllm_xargs": KEYS[k], "ignore_eos": True, "return_token_ids": True}
    defaults = {
        "model": "janus",
        "max_tokens": 16,
        "messages": message(QUESTIONS[i][0], *URLS[i]),
    }
    return client.chat.completions.create(extra_body=body, **defaults | more)


def ask(client: openai.OpenAI, i: int, k: int) -> list[int]:
    return create(client, i, k).choices[0].token_ids


def test_it_answers_as_the_wrapper_whole_and_streamed(client: openai.OpenAI) -> None:
    """Greedily, as the folder says, though nothing is said of a temperature."""
    for i in range(len(QUESTIONS)):
        whole = create(client, i, 0).choices[0]
        assert whole.token_ids == tokens(i, 0) and whole.finish_reason == "length"
        pieces = [chunk.choices[0] for chunk in create(client, i, 0, stream=True)]
        assert [x for piece in pieces for x in getattr(piece, "token_ids", None) or []] == tokens(i, 0)
        assert "".join(piece.delta.content or "" for piece in pieces) == whole.message.content
        assert len(pieces) > 8


def test_32_clients_at_once_get_what_each_would_alone(client: openai.OpenAI) -> None:
    with ThreadPoolExecutor(len(ASKED)) as threads:
        answers = list(threads.map(lambda each: ask(client, *each), ASKED))
    assert answers == [tokens(*each) for each in ASKED]
    assert len(ASKED) == 32 and len({tuple(answer) for answer in answers}) > 16


def test_a_client_that_goes_away_stops_its_generation(server: Server, client: openai.OpenAI) -> None:
    before = server.metric("generation_tokens_total")
    stream = create(client, 2, 0, stream=True, max_tokens=1900)
    for _ in zip(range(20), stream, strict=False):
        pass
    stream.close()
    assert ask(client, 0, 3) == tokens(0, 3)
    while server.metric("num_requests_running"):
        time.sleep(0.1)
    assert server.metric("generation_tokens_total") - before < 1000


PNG = encode(QUESTIONS[0][1][0])
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no picture": ({"messages": message("?", data_url(b"no picture"))}, "cannot identify image file"),
    "nothing": ({"messages": message("?", data_url(b""))}, "cannot identify image file"),
    "truncated": ({"messages": message("?", data_url(PNG[:-40]))}, "image file is truncated"),
    "header alone": ({"messages": message("?", data_url(PNG[:20]))}, "Truncated File Read"),
    "vector graphics": ({"messages": message("?", data_url(b"<svg/>", "svg+xml"))}, "cannot identify image file"),
    "base64": ({"messages": message("?", "data:image/png;base64,%%%")}, "Non-base64 digit"),
    "comma": ({"messages": message("?", "data:image/png")}, "missing ',' separator"),
    "path": ({"messages": message("?", "/etc/hostname")}, "must be either a HTTP, data or file URL"),
    "file": ({"messages": message("?", "file:///etc/hostname")}, "Cannot load local files"),
    "address": ({"messages": message("?", "http://localhost:1/a.png")}, "from one of the allowed domains"),
    "scheme": ({"messages": message("?", "ftp://localhost/a.png")}, "must be either a HTTP, data or file URL"),
    "null address": ({"messages": message("?", None)}, "validation error"),
    "a bomb": ({"messages": message("?", data_url(encode(Image.new("1", (20000, 20000)))))}, "decompression bomb"),
    "five pictures": ({"messages": message("?", *[data_url(PNG)] * 5)}, "At most 4 image"),
    "audio": (
        {
            "messages": [
                {"role": "user", "content": [{"type": "input_audio", "input_audio": {"data": "AA==", "format": "wav"}}]}
            ]
        },
        "At most 0 audio",
    ),
    "unknown part": ({"messages": [{"role": "user", "content": [{"type": "picture"}]}]}, "validation error"),
    "content": ({"messages": [{"role": "user", "content": 5}]}, "validation error"),
    "role": ({"messages": [{"role": "robot", "content": "?"}]}, "role must be system, user or assistant, got robot"),
    "no messages": ({"messages": []}, "empty conversation"),
    "placeholders": (
        {"messages": message("<image_placeholder>" * 2, data_url(PNG))},
        "Found more '<image_placeholder>'",
    ),
    "no such model": ({"model": "gpt"}, "does not exist"),
    "30,000 tokens": ({"messages": message("word " * 30000)}, "maximum context length is 2048"),
    "3,000 tokens": ({"max_tokens": 3000}, "max_tokens=3000 cannot be greater than max_model_len"),
    "0 tokens": ({"max_tokens": 0}, "max_tokens must be at least 1, got 0"),
    "10^5 answers": ({"n": 10**5}, "n must be at most"),
    "0 answers": ({"n": 0}, "n must be at least 1, got 0"),
    "10^5 beams": ({"n": 10**5, "extra_body": {"use_beam_search": True}}, "beam_width must be at most"),
    "temperature": ({"temperature": -1}, "temperature must be non-negative"),
    "top_p": ({"top_p": 7}, r"top_p must be in \(0, 1\], got 7"),
    "logprobs": ({"logprobs": True, "top_logprobs": 10**6}, "greater than max allowed"),
    "logit_bias": ({"logit_bias": {"999999": 1}}, "out-of-vocab"),
    "grammar": (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nope"}}}},
        "Invalid type: nope",
    ),
}
XARGS: dict[str, tuple[Any, str]] = {
    "alpha": ({"alpha": 7}, r"alpha must be in \[0, 1\], got 7"),
    "alpha as text": ({"alpha": "0.2"}, r"alpha must be in \[0, 1\], got '0.2'"),
    "NaN": ({"alpha": "NaN"}, r"alpha must be in \[0, 1\], got 'NaN'"),
    "null": ({"alpha": None}, "validation error"),
    "list": ([1], "valid dictionary"),
    "near miss": ({"alhpa": 0.2}, "unknown key 'alhpa', did you mean 'alpha'"),
    "unknown": ({"zzz": 1}, "unknown key 'zzz', allowed are"),
    "bucket": ({"bucket_id": 3}, "bucket_id must be 0, 1 or 2, got 3"),
    "layer": ({"candidate_layers": [40]}, "candidate_layers must be in 1...30, the model's layers, got 40"),
    "layers": ({"candidate_layers": "all"}, "candidate_layers must be integers"),
    "method": ({"method": "decco"}, "method must be dola, deco, sled or confident, got 'decco', did you mean 'deco'"),
    "another method's": ({"sled_rate": 3.0}, "sled_rate is of method sled"),
    "top k": ({"method": "sled", "sled_top_k": 0}, "sled_top_k must be an integer of at least 1, got 0"),
    "switch": ({"use_dola_lm": "off"}, "use_dola_lm must be true or false, got 'off'"),
}
BAD |= {f"xargs: {name}": ({"extra_body": {"vllm_xargs": keys}}, error) for name, (keys, error) in XARGS.items()}
BAD["penalty"] = ({"presence_penalty": 1}, "presence_penalty must be 0.0 with DoLa, got 1")
# vLLM itself says 500 for what it does not allow.
VLLMS_OWN = ("file", "a bomb")


@pytest.mark.parametrize("name", BAD)
def test_a_bad_request_is_refused_and_the_next_is_right(client: openai.OpenAI, name: str) -> None:
    bad, error = BAD[name]
    once = client.with_options(max_retries=0)
    with pytest.raises(openai.APIStatusError, match=error) as caught:
        once.chat.completions.create(**{"model": "janus", "max_tokens": 8, "messages": message("?")} | bad)
    assert (caught.value.status_code == 500) if name in VLLMS_OWN else (400 <= caught.value.status_code < 500)
    which = ASKED[list(BAD).index(name) % len(ASKED)]
    assert ask(client, *which) == tokens(*which)


def test_a_wrong_key_is_refused(server: Server, client: openai.OpenAI) -> None:
    with pytest.raises(openai.AuthenticationError):
        ask(client.with_options(api_key="wrong"), 0, 0)


def test_500_requests_leave_the_memory_flat(server: Server, client: openai.OpenAI) -> None:
    """Whole, streamed and left in the middle, good and bad."""

    def one(n: int) -> None:
        if n % 10 == 9:
            with pytest.raises(openai.BadRequestError):
                create(client, 0, 0, max_tokens=0)
        elif n % 10 == 8:
            create(client, *ASKED[n % 32], stream=True).close()
        else:
            assert ask(client, *ASKED[n % 32]) == tokens(*ASKED[n % 32])

    with ThreadPoolExecutor(32) as threads:
        list(threads.map(one, range(200)))
        before = server.resident()
        list(threads.map(one, range(200, 500)))
    assert server.resident() < before * 1.05  # oneDNN goes on keeping what it has made for shapes


def test_killed_in_an_answer_and_started_again_it_answers_the_same(server: Server, client: openai.OpenAI) -> None:
    next(create(client, 2, 0, stream=True, max_tokens=1900))
    killed = [each for each in server.processes() if "resource_tracker" not in " ".join(each.cmdline())]
    for process in killed:
        process.kill()
    server.process.wait()
    with running() as again:
        client = again.client()
        for each in ASKED[::5]:
            assert ask(client, *each) == tokens(*each)
