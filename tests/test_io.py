"""What the other files leave open of reading images and of where weights go."""

import base64
import json
import os
import struct
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import torch
from conftest import CHECKPOINT, GOLDEN
from torch import Tensor

from janus.models import MultiModalityCausalLM, MultiModalityConfig
from janus.utils.io import load_image, load_pil_images

WIDE = GOLDEN / "expected" / "images" / "wide.png"


@pytest.mark.parametrize(
    ("source", "echo"),
    [
        (5, "5"),
        (None, "None"),
        (b"abc", "b'abc'"),
        ("", "''"),
        ("a\0b.png", r"'a\\x00b.png'"),
        ("data:image/png;base64,图", "图"),
        ("data:image/png;base64,", "base64,'"),
        ("data:image/png;base64," + base64.b64encode(b"no image").decode(), "bm8gaW1hZ2U="),
    ],
)
def test_odd_sources_are_named_and_echoed(source: Any, echo: str) -> None:
    """Pillow, base64 and open() raise errors of their own for these, without a word about images."""
    with pytest.raises(ValueError, match=f"^images.*{echo}"):
        load_pil_images([{"role": "<|User|>", "content": "x", "images": [WIDE, source]}])


@pytest.mark.parametrize("keep", [0, 20, 2000])
def test_a_truncated_file_is_named(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "cut.png"
    path.write_bytes(WIDE.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"^images: .*cut\.png"):
        load_pil_images([{"role": "<|User|>", "content": "x", "images": [path]}])


@pytest.mark.parametrize("images", [str(WIDE), WIDE])
def test_a_path_in_place_of_a_list_is_refused(images: Any) -> None:
    """Taken letter by letter, it would be an error about a file named '/'."""
    with pytest.raises(ValueError, match=r"images must be a list .*wide\.png"):
        load_pil_images([{"role": "<|User|>", "content": "x", "images": images}])


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no FIFOs here")
def test_what_is_not_a_regular_file_is_refused(tmp_path: Path) -> None:
    """Opening a FIFO waited for a writer for ever."""
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to(tmp_path / "fifo")
    for path in (tmp_path / "fifo", tmp_path / "link", Path(os.devnull), tmp_path):
        with pytest.raises(ValueError, match=f"^images: cannot read '{path}': it is not a regular file$"):
            load_image(path)
    (tmp_path / "wide").symlink_to(WIDE)
    assert load_image(tmp_path / "wide").tobytes() == load_image(WIDE).tobytes()


def test_an_open_image_is_taken_as_it_is() -> None:
    with PIL.Image.open(WIDE) as image:
        (loaded,) = load_pil_images([{"images": [image.convert("RGBA")]}])
    assert loaded == load_image(WIDE)


def test_offloading_to_disk(model: Any, expected: dict[str, Tensor], tmp_path: Path) -> None:
    """A split by accelerate: the last 10 layers and the head stay on disk until they are needed."""
    device_map = {name: "cpu" for name, _ in model.named_children() if name != "language_model"}
    device_map |= {f"language_model.model.{name}": "cpu" for name in ("embed_tokens", "norm", "rotary_emb")}
    device_map |= {f"language_model.model.layers.{i}": "cpu" if i < 20 else "disk" for i in range(30)}
    device_map["language_model.lm_head"] = "disk"
    split = MultiModalityCausalLM.from_pretrained(
        CHECKPOINT, dtype=torch.float32, device_map=device_map, offload_folder=tmp_path
    )
    assert split.language_model.lm_head.weight.device.type == "meta"
    names = ("input_ids", "pixel_values", "images_seq_mask", "images_emb_mask")
    inputs = {name: expected[f"batch_mixed/{name}"] for name in names}
    mask = expected["batch_mixed/attention_mask"]
    logits = []
    for subject in (split, model):
        with torch.no_grad():
            embeds = subject.prepare_inputs_embeds(**inputs)
            logits.append(subject.language_model(inputs_embeds=embeds, attention_mask=mask).logits)
    assert torch.equal(*logits)


def test_config_json_of_the_parts_is_the_published_one(tmp_path: Path) -> None:
    """transformers would add keys of its own to each part, and an empty `model_type`."""
    MultiModalityConfig.from_pretrained(CHECKPOINT).save_pretrained(tmp_path)
    published, written = (
        json.loads((folder / "config.json").read_text(encoding="utf-8")) for folder in (CHECKPOINT, tmp_path)
    )
    parts = [name for name in published if name.endswith("_config") and name != "language_config"]
    assert len(parts) == 5
    assert {name: written[name] for name in parts} == {name: published[name] for name in parts}
    assert written["language_config"]["model_type"] == "llama"


@pytest.mark.parametrize(
    "error", [AttributeError("x"), MemoryError(), struct.error("unpack"), SyntaxError("broken PNG")]
)
@pytest.mark.parametrize("opened", [True, False])
def test_whatever_decoding_raises_is_that_pictures_error(
    monkeypatch: pytest.MonkeyPatch, error: Exception, opened: bool
) -> None:
    """It ended a whole batch with a traceback, and a MemoryError halved the batch size for good."""

    def fail(*args: Any, **kwargs: Any) -> None:
        raise error

    source = PIL.Image.open(WIDE) if opened else WIDE
    monkeypatch.setattr(PIL.Image.Image, "convert", fail)
    with pytest.raises(ValueError, match=f"^images: cannot read .*{error or 'MemoryError'}"):
        load_image(source)


def test_a_resized_vocabulary_has_a_head_of_its_size(tmp_path: Path) -> None:
    """The embedding grew and the head did not, and what was saved could not be loaded."""
    model = MultiModalityCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32)
    before = model.language_model.lm_head.weight.clone()
    model.resize_token_embeddings(520, mean_resizing=False)
    assert model.config.language_config.vocab_size == 520
    assert model.get_output_embeddings() is model.language_model.lm_head
    assert len(model.language_model.lm_head.weight) == len(model.get_input_embeddings().weight) == 520
    assert torch.equal(model.language_model.lm_head.weight[:512], before)
    model.save_pretrained(tmp_path)
    again = MultiModalityCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert torch.equal(again.language_model.lm_head.weight, model.language_model.lm_head.weight)
    assert torch.equal(again.get_input_embeddings().weight, model.get_input_embeddings().weight)
