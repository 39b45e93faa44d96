"""janus-dola draw: the published loop from the command line."""

import inspect
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import CHECKPOINT, Fails, export
from PIL import Image

from janus.image_generation import build_prompt, generate_images
from janus.models import MultiModalityCausalLM
from janus_dola import programs
from janus_dola.programs import draw

pytestmark = pytest.mark.usefixtures("loaded_once")

TINY = [f"model_path={CHECKPOINT}", "device=cpu", "prompt=A red circle"]


def test_it_writes_what_the_library_draws(tmp_path: Path, processor: Any, capsys: Any) -> None:
    """The same seed draws the same bytes."""
    files: dict[str, list[Path]] = {}
    for name, seed in (("first", 3), ("second", 3), ("third", 4)):
        draw.run([*TINY, f"output={tmp_path / name}", f"seed={seed}", "dtype=float32", "parallel_size=2"])
        files[name] = sorted((tmp_path / name).iterdir())
    assert [file.name for file in files["first"]] == ["img_0.png", "img_1.png"]
    read = {name: [file.read_bytes() for file in each] for name, each in files.items()}
    assert read["first"] == read["second"] != read["third"]
    assert capsys.readouterr().err.splitlines()[0] == f"{tmp_path / 'first'}: img_*.png, 2 of 64x64 pixels, seed 3"
    model = MultiModalityCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32).eval()
    prompt, generator = build_prompt(processor, "A red circle"), torch.Generator().manual_seed(3)
    sizes = {"parallel_size": 2, "image_token_num_per_image": 16, "img_size": 64}
    _, want = generate_images(model, processor, prompt, **sizes, generator=generator)
    assert np.array_equal([np.asarray(Image.open(file)) for file in files["first"]], want)


def test_what_is_wrong_is_one_line(fails: Fails, tmp_path: Path) -> None:
    out = f"output={tmp_path / 'out'}"
    for more, message in (
        (["prompt= "], "prompt must not be empty, got ' '"),
        (["parallel_size=0"], "parallel_size must be at least 1, got 0"),
        (["temperature=-1"], "temperature must be at least 0, got -1"),
        (["paralel_size=2"], "unknown key 'paralel_size', did you mean 'parallel_size'?"),
        (["dtype=int8"], "dtype must be one of auto"),
        (["prompt=" + "red " * 20_000], "too long: the prompt's"),
        (["model_path="], "model_path must be given: model_path=deepseek-ai/Janus-Pro-1B"),
        (["output=/proc/x"], "/proc/x"),
        (["parallel_size=1000000000000"], "out of memory: parallel_size 1000000000000 is too much"),
        (
            [f"model_path={export(CHECKPOINT, tmp_path / 'native')}"],
            "must be in the published layout, got transformers",
        ),
    ):
        assert message in fails(draw.run, *TINY, out, *more), more


def test_its_defaults_are_the_published_ones() -> None:
    loop = {key: given.default for key, given in inspect.signature(generate_images).parameters.items()}
    config = draw.DrawConfig(prompt="A red circle", model_path="x")
    for key in ("temperature", "parallel_size", "cfg_weight"):
        assert getattr(config, key) == loop[key]
    assert config.output == "generated_samples"


def test_it_takes_the_configs_of_models(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> None:
    """By the console script; keys of other programs in a file are those of other programs."""
    argv = ["janus-dola", "draw", "config=janus_pro_7b", *TINY, f"output={tmp_path}", "parallel_size=1"]
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(SystemExit) as exit_:
        programs.main()
    assert exit_.value.code == 0 and [file.name for file in tmp_path.iterdir()] == ["img_0.png"]
    with pytest.raises(SystemExit):
        draw.run(["--help"])
    assert "prompt=TEXT" in capsys.readouterr().out
