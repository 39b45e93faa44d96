"""`transformers serve` on a loopback port, for tests."""

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def serve(folder: Path, cache: Path) -> Iterator[str]:
    """Serves a folder; gives the address for OpenAI's clients. The server's log is CACHE/serve.log."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [Path(sys.executable).parent / "transformers", "serve", str(folder), "--trust-remote-code"]
    env = os.environ | {"HF_HOME": str(cache), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with (
        (cache / "serve.log").open("w") as log,
        subprocess.Popen([*command, "--port", str(port)], stdout=log, stderr=log, env=env) as server,
    ):
        try:
            deadline = time.monotonic() + 120
            while True:
                try:
                    urllib.request.urlopen(f"http://localhost:{port}/health").close()
                    break
                except OSError:
                    assert server.poll() is None and time.monotonic() < deadline, (cache / "serve.log").read_text()
                    time.sleep(0.1)
            yield f"http://localhost:{port}/v1"
        finally:
            server.terminate()
