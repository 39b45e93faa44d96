"""The golden checkpoint and what the published code answered for it: see golden/README.md."""

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # more threads only wait for each other on models as small as these
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # where a model is on the hub, whether it has files is looked up there

import pytest

# Nothing here imports torch or transformers before a test runs: pytest-xdist's own process, which runs none, would wait
# seconds for it, and only then start those that do.
if TYPE_CHECKING:
    from torch import Tensor

GOLDEN = Path(__file__).parent / "golden"
CHECKPOINT = GOLDEN / "tiny_janus"
EOS = 481
CASES: dict[str, Any] = json.loads((GOLDEN / "expected" / "expected.json").read_text(encoding="utf-8"))["cases"]


def load_model() -> Any:
    """The golden checkpoint in float32: through our janus, or as the stand-in where transformers is older than 5."""
    if int(version("transformers").split(".")[0]) < 5:
        from stand_in import StandIn

        return StandIn().eval()
    import torch

    from janus.models import MultiModalityCausalLM

    return MultiModalityCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32).eval()


def export(published: Path, folder: Path, *keys: str) -> Path:
    """A checkpoint in the layout of transformers' own Janus; returns the folder."""
    from janus_dola.programs.export import run

    run([f"out={folder}", f"model_path={published}", *keys])
    return folder


@pytest.fixture(scope="session")
def model() -> Any:
    """Shared by all tests: whoever changes it breaks the others, and the test that nothing changes it."""
    return load_model()


@pytest.fixture(scope="module")
def processor() -> Any:
    from janus.models import VLChatProcessor

    return VLChatProcessor.from_pretrained(CHECKPOINT)


@pytest.fixture(scope="session")
def expected() -> "dict[str, Tensor]":
    """Keys are CASE/NAME."""
    from safetensors.torch import load_file

    return load_file(GOLDEN / "expected" / "expected.safetensors")


@pytest.fixture(scope="session")
def prompt(expected: "dict[str, Tensor]") -> dict[str, Any]:
    """Arguments of `generate`: a left-padded batch of 3, greedy, 12 new tokens."""
    return {
        "inputs_embeds": expected["batch_left_padded/inputs_embeds"],
        "attention_mask": expected["batch_left_padded/attention_mask"],
        "do_sample": False,
        "max_new_tokens": 12,
        "eos_token_id": EOS,
        "pad_token_id": EOS,
    }


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Headless Chromium, as it is installed on this machine, driven by Playwright."""
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=shutil.which("chromium") or "chromium, which is not installed")
        yield browser
        browser.close()


LOADED: dict[Any, Any] = {}  # by device, dtype and files


@pytest.fixture
def loaded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What programs load is kept from run to run, as long as the files stay the same: half a second each."""
    from janus_dola.programs import checkpoint

    def load_model(config: Any, model_config: Any) -> Any:
        files = tuple((str(file), file.stat().st_mtime_ns) for file in sorted(Path(config.model_path).glob("*")))
        key = config.device, config.dtype, files
        if key not in LOADED:
            LOADED[key] = load(config, model_config)
        return LOADED[key]

    load = checkpoint.load_model
    monkeypatch.setattr(checkpoint, "load_model", load_model)


Fails = Callable[..., str]


@pytest.fixture
def fails(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> Fails:
    """Runs a program that must say one line on stderr and exit with code 2; returns the line."""
    from janus_dola.programs.options import run_program

    def fails(run: Callable[[Any], Any], *arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["program", *arguments])
        capsys.readouterr()  # of runs before
        with pytest.raises(SystemExit) as exit_:
            run_program(run)
        out, err = capsys.readouterr()
        assert (exit_.value.code, out, err.count("\n")) == (2, "", 1)
        assert err.startswith("error: ")
        return err

    return fails
