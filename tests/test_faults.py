"""Bad input, faults within a call, and threads: the right answer or one clear error, and a process that goes on."""

import base64
import io
import json
import math
import os
import pickle
import re
import shutil
import struct
import subprocess
import sys
import threading
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import CHECKPOINT, GOLDEN, Fails
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LogitsProcessor, StoppingCriteria, TextIteratorStreamer
from transformers.generation.streamers import BaseStreamer

from benchmarks import long_run
from janus.models import MultiModalityCausalLM, VLChatProcessor, VLMImageProcessor
from janus.utils.io import load_image, load_pil_images
from janus_dola import DoLaConfig, DoLaJanusWrapper, DoLaTrace
from janus_dola.dola_runtime import choose, log_softmax, read
from janus_dola.exits import ExitView
from janus_dola.programs import answer as answer_program
from janus_dola.programs import checkpoint as checkpoint_program
from janus_dola.programs.options import run_program
from janus_dola.wrapper import DoLaLogitsProcessor

WIDE = GOLDEN / "expected" / "images" / "wide.png"
TAG = "<image_placeholder>"
TEXT = [f"model_path={CHECKPOINT}", "device=cpu", "generation.max_new_tokens=2"]


# The command line, its config files, and conversations.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--hlep"], "arguments must be written key=value, got '--hlep'; --help shows the keys"),
        (
            ["generation.max_new_tokens=many"],
            "generation.max_new_tokens must be an integer of at least 1, got 'many'",
        ),
        (["generation.max_new_tokens=0"], "generation.max_new_tokens must be an integer of at least 1, got 0"),
        (["generation.num_beams=0"], "generation.num_beams must be an integer of at least 1, got 0"),
        (["generation.eos_token_id=a"], "generation.eos_token_id must be a token id or a list of them, got 'a'"),
        (
            ["generation.forced_eos_token_id=99999"],
            "generation.forced_eos_token_id must be below 512, the model's words",
        ),
        (["generation.pad_token_id=512"], "generation.pad_token_id must be below 512, the model's words, got 512"),
        (["generation.forced_bos_token_id=a"], "generation.forced_bos_token_id must be a token id or a list of them"),
        (["generation.return_dict_in_generate=true"], "generation.return_dict_in_generate must be left off"),
        (["generation.watermarking_config={a: 1}"], "generation: WatermarkingConfig.__init__() got an unexpected"),
        (["generation.temperature=0", "generation.do_sample=true"], "`temperature` (=0) has to be a strictly positive"),
        (["generation.num_beams=2", "stream=true"], "`streamer` cannot be used with beam search"),
        (["generation.dola_layers=high"], "dola_layers must be left off with DoLa, got 'high'"),
        (["generation=[1]"], "generation: Cannot merge incompatible container types"),
        (["seed=99999999999999999999"], "seed must be an integer of 64 bits, got 99999999999999999999"),
        (["candidate_layers=[1.5]"], "candidate_layers[0]: Value '1.5' of type 'float'"),
        (
            ["candidate_layers=[!!python/object/apply:os.mkdir [ran]]"],
            "are not YAML: could not determine a constructor",
        ),
        (["images=5"], "images must be paths or data URLs, got 5"),
        (["images=[5]"], "images must be paths or data URLs, got [5]"),
        (["alpha=nan"], "alpha must be in [0, 1], got nan"),
        (["device=meta"], "device must be auto, cpu, cuda or mps, and be there, got 'meta'"),
        (["model_path=../x"], "model_path '../x' cannot be loaded"),
        (["question=\ud800"], "prompt must be text that UTF-8 can encode"),
    ],
    ids=lambda value: value[0][:40] if isinstance(value, list) else "",
)
def test_arguments(fails: Fails, arguments: list[str], message: str) -> None:
    assert message in fails(answer_program.run, *TEXT, "question=What?", *arguments)


def test_a_trace_that_cannot_be_written(fails: Fails, tmp_path: Path) -> None:
    """It is refused before the model is asked."""
    (tmp_path / "file").touch()
    trace = f"trace={tmp_path / 'file' / 'below'}"
    assert "[Errno 20] Not a directory: " in fails(answer_program.run, *TEXT, "question=What?", trace)


def test_a_heatmap_without_matplotlib(monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(sys, "argv", ["x", *TEXT, "question=What?", f"trace={tmp_path}"])
    with pytest.raises(SystemExit, match="2"):
        run_program(answer_program.run)
    out, err = capsys.readouterr()
    assert out and (tmp_path / "trace.jsonl").exists()  # the answer is not lost
    assert err == "error: DoLaTrace.heatmap needs matplotlib: pip install 'janus-dola[viz]'\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"- 1", "must be a YAML mapping, got a list"),
        (b"a: [", "is not a YAML mapping: while parsing"),
        (b"\xff\xfe", "is not a YAML mapping: 'utf-8' codec"),
        (b"question: !!python/object/apply:os.mkdir [ran]", "could not determine a constructor for the tag"),
        (b"question: !!python/name:os.system", "could not determine a constructor for the tag"),
        (b'generation: {temperature: "${oc.env:HOME}"}', "generation.temperature must not use an interpolation"),
        (b"generation: []", "a list and a mapping stand for the same key"),
        (b"images: {a: b}", "a list and a mapping stand for the same key"),
        (b"alpha: 2024-01-01", "Value 'date' is not a supported primitive type"),
        (b"alpha: 0.1\n---\nalpha: 0.2", "expected a single document"),
        (b"roles: null", "roles: field 'roles' is not Optional"),
        (b"alpha: {b: 1}", "alpha: Value '{'b': 1}' of type 'DictConfig'"),
    ],
)
def test_config_files(fails: Fails, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: bytes, message: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.yaml").write_bytes(text)
    assert message in fails(answer_program.run, *TEXT, "question=What?", "config=bad.yaml")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("conversation", "message"),
    [
        ("5", "conversation must be a list of turns, got 5"),
        ("hello", "conversation must be a list of turns, got 'hello'"),
        ("{a: b}", "conversation must be a list of turns, got {'a': 'b'}"),
        ("[[]]", "turn 1 must have content, a string, got []"),
        ("[{content: x, role: System}]", "role of turn 1 must be one of ['<|User|>', '<|Assistant|>'], got 'System'"),
        ("[{content: x}, {content: '  '}, {content: '  '}]", "turn 3 must not be empty"),
        ("[{content: x, images: y.png}]", "images of turn 1 must be a list of paths or data URLs, got 'y.png'"),
        ("[{content: x, 5: 1, foo: 2}]", "turn 1 has unknown keys ['5', 'foo']"),
        (f"[{{content: '{TAG} x'}}]", f"images must be as many as the {TAG} in the text, got 0 for 1"),
    ],
)
def test_conversations(fails: Fails, conversation: str, message: str) -> None:
    assert message in fails(answer_program.run, *TEXT, f"conversation={conversation}")


# Images.


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size, and has next to no pixels."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


PICTURE = Image.open(WIDE).convert("RGB")
PNG, JPEG = WIDE.read_bytes(), encoded(PICTURE, "JPEG")
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n(ran) (w) file\n"
BAD_IMAGES: dict[str, tuple[bytes, str]] = {
    "half a JPEG": (JPEG[: len(JPEG) // 2], "image file is truncated"),
    "a PNG with a broken stream": (PNG[:50] + bytes([PNG[50] ^ 255]) + PNG[51:], "cannot read"),
    "zeros": (bytes(100), "is not an image that Pillow can read"),
    "text": (b"hello", "is not an image that Pillow can read"),
    "svg": (b"<svg/>", "is not an image that Pillow can read"),
    "a program": (EPS, "EPS is a program"),
    "no pixels": (png_header(0, 5), "is not an image that Pillow can read"),
    "a bomb that Pillow refuses": (png_header(30_000, 30_000), "decompression bomb"),
    "a bomb that Pillow warns of": (png_header(10_000, 10_000), "10000x10000 is more than 89478485 pixels"),
    "a bomb of text": (
        PNG[:33] + chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(2 << 20))) + PNG[33:],
        "too large",
    ),
    "a broken AVIF": (b"\0\0\0 ftypavif\0\0\0\0avifmif1miaf" + bytes(60), "cannot read|not an image"),
}


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("name", BAD_IMAGES)
def test_broken_images(tmp_path: Path, name: str) -> None:
    """From a file and from a data URL, and neither is worse for it."""
    content, message = BAD_IMAGES[name]
    path = tmp_path / "picture.png"
    path.write_bytes(content)
    before = Image.MAX_IMAGE_PIXELS
    for source in (path, "data:image/png;base64," + base64.b64encode(content).decode()):
        with pytest.raises(ValueError, match=rf"^images: .*({message})") as error:
            load_image(source)
        assert len(str(error.value)) < 300 and "\n" not in str(error.value)
    assert before == Image.MAX_IMAGE_PIXELS


def test_a_directory_and_a_file_that_may_not_be_read(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"images: cannot read .*it is not a regular file"):
        load_image(tmp_path)
    path = tmp_path / "secret.png"
    path.write_bytes(PNG)
    path.chmod(0)
    if os.access(path, os.R_OK):  # root may read everything
        assert load_image(path).size == PICTURE.size
    else:
        with pytest.raises(ValueError, match=r"images: cannot read .*Permission denied"):
            load_image(path)


def test_the_bounds_are_pillows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever needs larger pictures raises PIL.Image.MAX_IMAGE_PIXELS, or sets it to None."""
    url = "data:image/png;base64," + base64.b64encode(PNG).decode()
    pixels = PICTURE.width * PICTURE.height
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", pixels)
    assert load_image(url).size == PICTURE.size
    with pytest.raises(ValueError, match=f"a data URL must have at most {4 * pixels} characters, got {8 * pixels}"):
        load_image("data:image/png;base64," + "?" * 8 * pixels)  # not decoded: it is not even base64
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", pixels - 1)
    with pytest.warns(Image.DecompressionBombWarning), pytest.raises(ValueError, match="is more than"):
        load_image(url)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert load_image(url).size == PICTURE.size


def odd_images() -> dict[str, bytes]:
    red, exif = Image.new("RGB", PICTURE.size, "red"), Image.Exif()
    exif[0x112] = 6  # turned by a quarter
    deep = Image.fromarray((np.arange(64 * 64).reshape(64, 64) * 16).astype(np.uint16))
    return {
        "CMYK": encoded(PICTURE.convert("CMYK"), "JPEG"),
        "palette with alpha": encoded(PICTURE.quantize(8), "PNG", transparency=b"\x00\x80\xff"),
        "16 bit": encoded(deep, "PNG"),
        "bilevel": encoded(PICTURE.convert("1"), "PNG"),
        "float": encoded(PICTURE.convert("F"), "TIFF"),
        "LAB": encoded(Image.new("LAB", (5, 5)), "TIFF"),
        "animated GIF": encoded(PICTURE, "GIF", save_all=True, append_images=[red]),
        "animated PNG": encoded(PICTURE, "PNG", save_all=True, append_images=[red]),
        "EXIF-rotated": encoded(PICTURE, "JPEG", exif=exif),
        "1x1": encoded(Image.new("RGB", (1, 1), "blue"), "PNG"),
        "20000x1": encoded(Image.new("RGB", (20_000, 1), "blue"), "PNG"),
    }


@pytest.fixture(scope="module")
def processor() -> Any:
    return VLChatProcessor.from_pretrained(CHECKPOINT)


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
@pytest.mark.parametrize("name", odd_images())
def test_odd_images_are_what_the_published_code_makes_of_them(processor: Any, tmp_path: Path, name: str) -> None:
    """convert("RGB") of the first frame as it is stored (EXIF is not looked at), resized, in the middle of grey."""
    path = tmp_path / "picture"
    path.write_bytes(odd_images()[name])
    image = load_image(path)
    with Image.open(path) as stored:
        want = stored.convert("RGB")
    assert image.mode == "RGB" and np.array_equal(np.asarray(image), np.asarray(want))
    got = processor.image_processor([image])["pixel_values"][0].numpy()  # [3, 64, 64]
    width, height = (max(int(x / max(want.size) * 64), 14) for x in want.size)
    square = Image.new("RGB", (64, 64), (127, 127, 127))
    square.paste(want.resize((width, height), Image.Resampling.BICUBIC), ((64 - width) // 2, (64 - height) // 2))
    np.testing.assert_allclose(got, (np.asarray(square).transpose(2, 0, 1) / 255 - 0.5) / 0.5, atol=1e-6)


@pytest.mark.parametrize(
    ("conversations", "message"),
    [
        ("x", "conversations must be a list of turns, got 'x' in str"),
        ([None], "conversations must be a list of turns, got None"),
        ([{"images": None}], "images must be a list of paths or data URLs, got None"),
        ([{"images": {"a": 1}}], "images must be a list of paths or data URLs, got {'a': 1}"),
    ],
)
def test_load_pil_images_refuses(conversations: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_pil_images(conversations)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"conversations": "hi"}, "conversations must be a list of turns .* got 'h'"),
        ({"conversations": [{"content": "x"}]}, "turns with role and content"),
        ({"conversations": [{"role": "<|User|>", "content": None}]}, "turns with role and content"),
        ({"prompt": 5}, "prompt must be text that UTF-8 can encode, got 5"),
        ({"prompt": "\ud800"}, "prompt must be text that UTF-8 can encode"),
        ({"prompt": TAG, "images": PICTURE}, "images must be a list of PIL images"),
        ({"prompt": TAG, "images": ["x.png"]}, r"images must be a list of PIL images, got \['x.png'\]"),
        ({"prompt": TAG, "images": [torch.zeros(3, 4, 4)]}, "images must be a list of PIL images"),
        ({"prompt": TAG, "images": [Image.new("RGB", (0, 0))]}, "at least one pixel, got one of 0x0"),
    ],
)
def test_the_processor_refuses(processor: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        processor(**arguments)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"image_size": "x"}, "image_size must be at least min_size, and that 1, got 'x' and 14"),
        ({"image_size": 8}, "image_size must be at least min_size"),
        ({"image_size": 64, "image_mean": None}, "image_mean must be 3 numbers"),
        ({"image_size": 64, "image_std": [0, 0, 0]}, "image_std must be 3 numbers"),
    ],
)
def test_the_image_processor_refuses(sizes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VLMImageProcessor(**sizes)


# Checkpoints.

WEIGHTS = load_file(CHECKPOINT / "model.safetensors")
HEAD = "language_model.lm_head.weight"


class Payload:
    """Unpickling it makes a folder where the process is."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("ran",)


def saved(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def set_keys(file: str, **keys: Any) -> Callable[[Path], None]:
    """Changes a JSON file: ... takes a key out, a dict is merged into the one that is there."""

    def change(folder: Path) -> None:
        content = json.loads((folder / file).read_text(encoding="utf-8"))
        for key, value in keys.items():
            old = content.pop(key, None)
            if value is not ...:
                content[key] = old | value if isinstance(value, dict) and isinstance(old, dict) else value
        (folder / file).write_text(json.dumps(content), encoding="utf-8")

    return change


def file_of(name: str, content: bytes | str) -> Callable[[Path], None]:
    """Writes a file; one of other weights takes the place of the weights."""

    def change(folder: Path) -> None:
        if name.startswith("pytorch_model"):
            (folder / "model.safetensors").unlink()
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return change


def weights(**changed: Tensor | None) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        merged = WEIGHTS | {HEAD: changed["head"]}
        kept = {name: weight for name, weight in merged.items() if weight is not None}
        save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})

    return change


def lose_a_shard(folder: Path) -> None:
    names = sorted(WEIGHTS)
    files = [f"pytorch_model-{i:05}-of-00002.bin" for i in (1, 2)]
    torch.save({name: WEIGHTS[name] for name in names[::2]}, folder / files[0])
    index = {name: files[i % 2] for i, name in enumerate(names)}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    (folder / "model.safetensors").unlink()


SAFETENSORS = (CHECKPOINT / "model.safetensors").read_bytes()
BROKEN: dict[str, tuple[Callable[[Path], None], str]] = {
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "no file named model.safetensors"),
    "a missing shard": (lose_a_shard, "pytorch_model-00002-of-00002.bin"),
    "an empty index": (file_of("pytorch_model.bin.index.json", "{}"), "KeyError: 'weight_map'"),
    "a wrong shape": (weights(head=torch.zeros(3, 5)), rf"{HEAD} in the shape \[3, 5\], but .* \[512, 64\]"),
    "a missing key": (weights(head=None), f"lacks the weights {HEAD}"),
    "half a safetensors": (file_of("model.safetensors", SAFETENSORS[:3_000_000]), "a broken file of weights"),
    "an empty safetensors": (file_of("model.safetensors", b""), "a broken file of weights"),
    "a huge safetensors header": (file_of("model.safetensors", b"\xff" * 7 + b"\x7f{}"), "a broken file of weights"),
    "half a bin": (file_of("pytorch_model.bin", saved(WEIGHTS)[:1_000_000]), "PytorchStreamReader failed"),
    "an empty bin": (file_of("pytorch_model.bin", b""), "a broken file of weights"),
    "a bin that is text": (file_of("pytorch_model.bin", "garbage" * 9), "a pickle that is broken or holds more"),
    "a bin that runs code": (file_of("pytorch_model.bin", saved({HEAD: Payload()})), "pickle that is broken or"),
    "a pickle that runs code": (file_of("pytorch_model.bin", pickle.dumps(Payload(), 2)), "pickle that is broken or"),
    "a bin of a list": (file_of("pytorch_model.bin", saved([1, 2])), "TypeError"),
    "no language_config": (set_keys("config.json", language_config=...), "language_config must be a mapping, got None"),
    "a part that is no mapping": (set_keys("config.json", vision_config=5), "vision_config must be a mapping, got 5"),
    "params that are none": (set_keys("config.json", vision_config={"params": 5}), "TypeError"),
    "a config that is a list": (file_of("config.json", "[]"), "AttributeError|no model_type"),
    "a config that is cut": (file_of("config.json", "{"), "is not a valid JSON file"),
    "a width that is text": (set_keys("config.json", language_config={"hidden_size": "big"}), "'hidden_size'"),
    "more layers than weights": (
        set_keys("config.json", language_config={"num_hidden_layers": 31}),
        r"num_hidden_layers must be at most 30, the language_model\.model\.layers in the weights, got 31",
    ),
    "an unknown activation": (set_keys("config.json", language_config={"hidden_act": "evil"}), "KeyError: 'evil'"),
}  # fmt: skip
BROKEN_PROCESSORS: dict[str, tuple[Callable[[Path], None], str]] = {
    "no preprocessor": (lambda folder: (folder / "preprocessor_config.json").unlink(), "Can't load image processor"),
    "a preprocessor that is a list": (file_of("preprocessor_config.json", "[]"), "AttributeError"),
    "no image_size": (set_keys("preprocessor_config.json", image_size=...), "'image_size'"),
    "a mean of two": (set_keys("preprocessor_config.json", image_mean=[1, 2]), "image_mean must be 3 numbers"),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), "the backend tokenizer"),
    "a tokenizer that is cut": (file_of("tokenizer.json", "{"), "JSONDecodeError"),
    "no image tokens": (set_keys("processor_config.json", num_image_tokens=-5), "num_image_tokens must be .* got -5"),
    "a tag that is no token": (set_keys("processor_config.json", image_start_tag="<no>"), "has no token '<no>'"),
}


def broken_copy(folder: Path, change: Callable[[Path], None]) -> Path:
    shutil.copytree(CHECKPOINT, folder)
    change(folder)
    return folder


@pytest.mark.parametrize("name", BROKEN)
def test_broken_checkpoints(fails: Fails, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str) -> None:
    change, message = BROKEN[name]
    monkeypatch.chdir(tmp_path)
    folder = broken_copy(tmp_path / "checkpoint", change)
    with pytest.raises(Exception) as error:  # of any kind, as transformers has it; what it says is checked
        MultiModalityCausalLM.from_pretrained(folder, dtype=torch.float32)
    said = f"{type(error.value).__name__}: {error.value}"
    line = fails(answer_program.run, f"model_path={folder}", *TEXT[1:], "question=What?")
    assert re.search(message, said) and re.search(message, line), (said, line)
    assert "weights_only" not in said + line  # PyTorch advises to switch it off
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", BROKEN_PROCESSORS)
def test_broken_processors(fails: Fails, tmp_path: Path, name: str) -> None:
    change, message = BROKEN_PROCESSORS[name]
    folder = broken_copy(tmp_path / "checkpoint", change)
    with pytest.raises(Exception) as error:  # as above
        VLChatProcessor.from_pretrained(folder)
    said = f"{type(error.value).__name__}: {error.value}"
    line = fails(answer_program.run, f"model_path={folder}", *TEXT[1:], "question=What?")
    assert re.search(message, said) and re.search(message, line), (said, line)


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("processor_config.json", {"num_image_tokens": 17}, "num_image_tokens must be 16, as the vision_config of"),
        ("processor_config.json", {"num_image_tokens": 10**9}, "num_image_tokens must be an integer from 1 to"),
        ("preprocessor_config.json", {"image_size": 10**9}, "image_size must be 64, as the vision_config of"),
    ],
)
def test_a_processor_of_other_sizes_than_the_vision_tower(
    fails: Fails, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, file: str, change: dict[str, Any], message: str
) -> None:
    """It is refused before it makes an image, or the tokens of one, of which memory would see the end."""
    folder = broken_copy(tmp_path / "checkpoint", set_keys(file, **change))
    monkeypatch.setattr(checkpoint_program, "load_model", None)
    arguments = [f"model_path={folder}", *TEXT[1:], f"images=[{WIDE}]", "question=What?"]
    assert message in fails(answer_program.run, *arguments)


@pytest.mark.parametrize("file", ["janus/__init__.py", "janus.py"])
def test_another_package_of_the_name_janus(tmp_path: Path, file: str) -> None:
    """The registry's is an async queue."""
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text("class Queue: pass\n", encoding="utf-8")
    # An editable install of ours would find the submodules of theirs.
    code = "import sys; sys.meta_path = [f for f in sys.meta_path if '__editable__' not in repr(f)]\n"
    result = subprocess.run(
        [sys.executable, "-c", f"{code}from janus_dola.programs import main; main()", *TEXT, "question=What?"],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{Path(__file__).parents[1]}"},
    )
    assert (result.returncode, result.stdout) == (2, "")
    assert re.fullmatch(r"error: janus\.\w+ is missing: the package 'janus' here is another one .*\n", result.stderr)


def test_code_beside_the_weights_is_not_run(capsys: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = broken_copy(tmp_path / "checkpoint", lambda folder: None)
    for name in ("evil.py", "custom_generate/generate.py"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("import os\nos.mkdir('ran')\n")
    names = {"config": "AutoConfig", "processor_config": "AutoProcessor", "preprocessor_config": "AutoImageProcessor"}
    for file, auto in (names | {"tokenizer_config": "AutoTokenizer"}).items():
        set_keys(f"{file}.json", auto_map={auto: "evil.Evil", "AutoModelForCausalLM": "evil.Evil"})(folder)
    monkeypatch.chdir(tmp_path)
    answer_program.run([*TEXT, "question=What?"])
    want = capsys.readouterr().out
    answer_program.run([f"model_path={folder}", *TEXT[1:], "question=What?"])
    assert capsys.readouterr().out == want
    assert not (tmp_path / "ran").exists()


# The Python API.


@pytest.mark.parametrize("use_dola_lm", [False, True])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda embeds, mask: {"inputs_embeds": embeds[0]}, r"inputs_embeds must be .*\[rows, T, 64\].* \[91, 64\]"),
        (lambda embeds, mask: {"inputs_embeds": embeds[..., :9]}, r"inputs_embeds must be .* got \[3, 91, 9\]"),
        (lambda embeds, mask: {"inputs_embeds": embeds[:0], "attention_mask": mask[:0]}, r"got \[0, 91, 64\]"),
        (lambda embeds, mask: {"inputs_embeds": embeds[:, :0], "attention_mask": mask[:, :0]}, r"got \[3, 0, 64\]"),
        (lambda embeds, mask: {"inputs_embeds": embeds.numpy()}, "inputs_embeds must be a tensor"),
        (lambda embeds, mask: {"attention_mask": mask[:, :3]}, r"attention_mask must be .* \[3, 91\], got \[3, 3\]"),
        (lambda embeds, mask: {"attention_mask": mask[:2]}, r"attention_mask must be .* \[3, 91\], got \[2, 91\]"),
        (lambda embeds, mask: {"max_new_tokens": 0}, "`max_new_tokens` must be greater than 0, but is 0"),
        (lambda embeds, mask: {"alhpa": 1}, "`model_kwargs` are not used by the model: .'alhpa'"),
        (lambda embeds, mask: {"trace": "out"}, "trace must be"),
    ],
)  # fmt: skip
def test_generate_refuses(
    model: Any, prompt: dict[str, Any], use_dola_lm: bool, change: Callable[..., dict[str, Any]], message: str
) -> None:
    wrapper = DoLaJanusWrapper(model, DoLaConfig(use_dola_lm=use_dola_lm))
    bad = change(prompt["inputs_embeds"], prompt["attention_mask"])
    with pytest.raises(ValueError, match=message):
        wrapper.generate(**(prompt | bad))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pixel_values": (slice(None), slice(None), slice(1))}, r"pixel_values must be .* got \[2, 1, 1, 64, 64\]"),
        ({"pixel_values": (0,)}, r"pixel_values must be of shape .* got \[1, 3, 64, 64\]"),
        ({"pixel_values": (..., slice(32))}, r"pixel_values must be of shape .* got \[2, 1, 3, 64, 32\]"),
        ({"images_emb_mask": (..., slice(5))}, r"images_emb_mask must be of shape \[2, 1, 16\], got \[2, 1, 5\]: does"),
        ({"images_seq_mask": (slice(1),)}, "images_seq_mask must be of input_ids' shape"),
    ],
)  # fmt: skip
def test_prepare_inputs_embeds_refuses(
    model: Any, expected: dict[str, Tensor], change: dict[str, Any], message: str
) -> None:
    names = ("input_ids", "pixel_values", "images_seq_mask", "images_emb_mask")
    inputs = {name: expected[f"batch_mixed/{name}"] for name in names}
    with pytest.raises(ValueError, match=message):
        model.prepare_inputs_embeds(**(inputs | {name: inputs[name][index] for name, index in change.items()}))


def test_a_wrapped_wrapper_obeys_its_own_config(model: Any, prompt: dict[str, Any]) -> None:
    on, off = DoLaConfig(), DoLaConfig(use_dola_lm=False)
    inner = {use: DoLaJanusWrapper(model, config) for use, config in ((True, on), (False, off))}
    want = {use: wrapper.generate(**prompt) for use, wrapper in inner.items()}
    assert not torch.equal(want[True], want[False])
    assert torch.equal(DoLaJanusWrapper(inner[False], on).generate(**prompt), want[True])
    assert torch.equal(DoLaJanusWrapper(inner[True], off).generate(**prompt), want[False])


# Logits that are not numbers.


def step(final: Tensor, exits: Tensor) -> Tensor:
    """log p̂ [rows, V] of the logits of the final layer and of the exits."""
    candidates = torch.ones(1, exits.shape[1], dtype=torch.bool)
    processor = DoLaLogitsProcessor(lambda: exits, candidates, torch.tensor([0.05]), -torch.inf)
    return processor(torch.zeros(len(final), 1), final)


@pytest.fixture
def logits() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(3, 50, generator=generator) * 2, torch.randn(3, 3, 50, generator=generator) * 2


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_an_exit_that_overflowed_is_not_chosen(logits: tuple[Tensor, Tensor], bad: float) -> None:
    """float16 overflows; argmax takes NaN for the largest divergence, and made NaN of the row, which is token 0."""
    final, exits = logits
    want = step(final, exits)
    chosen = [next(j for j in range(3) if torch.equal(step(final, exits[:, [j]])[row], want[row])) for row in range(3)]
    broken = exits.clone()
    broken[1, (chosen[1] + 1) % 3, 7] = bad  # one that is not chosen anyway
    torch.testing.assert_close(step(final, broken), want, atol=0, rtol=0)
    broken = exits.clone()
    broken[1, chosen[1], 7] = bad  # the one that would be
    others = [j for j in range(3) if j != chosen[1]]
    torch.testing.assert_close(step(final, broken)[1], step(final, exits[:, others])[1], atol=0, rtol=0)
    torch.testing.assert_close(step(final, broken)[[0, 2]], want[[0, 2]], atol=0, rtol=0)


@pytest.mark.parametrize("bad", [torch.nan, -torch.inf])
@pytest.mark.parametrize("J", [1, 3])
def test_without_any_exit_that_is_finite_there_is_nothing_to_subtract(
    logits: tuple[Tensor, Tensor], J: int, bad: float
) -> None:
    final, exits = logits[0], logits[1][:, :J].clone()
    want = step(final, exits)
    exits[1, :, 7] = bad
    got = step(final, exits)
    log_q = log_softmax(final[1:2])
    on_V_head = log_softmax(log_q.masked_fill(log_q < log_q.max() + math.log(0.05), -torch.inf))
    torch.testing.assert_close(got[1:2], on_V_head, atol=1e-6, rtol=0)
    torch.testing.assert_close(got[[0, 2]], want[[0, 2]], atol=0, rtol=0)
    for dynamic in (True, False)[: 3 - J + 1]:
        reading = read(final, exits, dynamic)
        log_p, M_index = choose(reading, torch.ones(3, J, dtype=torch.bool), torch.zeros(3))
        assert M_index[1] == J and (M_index[[0, 2]] < J).all()  # J stands for the final layer
        assert torch.equal(log_p[1], reading.log_qN[1]) and not log_p.isnan().any()


def test_a_row_whose_final_logits_are_nan_is_its_own_affair(model: Any, prompt: dict[str, Any]) -> None:
    """As without DoLa: sampling says so, and the other rows are what they were."""

    class Break(LogitsProcessor):
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            scores = scores.clone()
            scores[1] = torch.nan
            return scores

    wrapper = DoLaJanusWrapper(model)
    want = wrapper.generate(**prompt)
    got = wrapper.generate(**prompt, logits_processor=[Break()])
    assert torch.equal(got[[0, 2]], want[[0, 2]])
    for subject in (wrapper, model.language_model):
        with pytest.raises(RuntimeError, match="probability tensor contains either"):
            subject.generate(**(prompt | {"do_sample": True}), logits_processor=[Break()])
    assert torch.equal(wrapper.generate(**prompt), want)


# Faults within a call.


class Fault(Exception):
    pass


def fail() -> None:
    raise Fault


class Watched(LogitsProcessor, StoppingCriteria, BaseStreamer):
    """Whichever of the three it is passed as, it calls `then` and changes nothing."""

    def __init__(self, then: Callable[[], Any]) -> None:
        self.then = then

    def __call__(self, input_ids: Tensor, scores: Any) -> Any:
        self.then()
        return scores if isinstance(scores, Tensor) else torch.zeros(len(input_ids), dtype=torch.bool)

    def put(self, value: Tensor) -> None:
        self.then()

    def end(self) -> None:
        pass


def hooks(model: Any) -> dict[str, tuple[list[int], list[int]]]:
    """transformers has hooks of its own once hidden states were asked for, so none is not what to expect."""
    return {
        name: (list(module._forward_hooks), list(module._forward_pre_hooks)) for name, module in model.named_modules()
    }


POINTS = ["layer 22", "layer 24", "layer 26", "layer 28", "layer 30", "norm", "lm_head", "processor", "criteria"]
POINTS += ["streamer", "ExitView.prepend_exits", "ExitView.take", "trace", "read", "choose"]


@pytest.fixture(scope="module")
def answer(model: Any, prompt: dict[str, Any]) -> Tensor:
    return DoLaJanusWrapper(model).generate(**(prompt | {"max_new_tokens": 4}))


@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("at", [1, 3])
def test_after_a_fault_the_next_call_is_right(
    model: Any, prompt: dict[str, Any], answer: Tensor, monkeypatch: pytest.MonkeyPatch, point: str, at: int
) -> None:
    """At the prompt, and in the third step."""
    decoder, library = model.language_model.model, sys.modules[DoLaJanusWrapper.__module__]
    wrapper, prompt, before, count = DoLaJanusWrapper(model), prompt | {"max_new_tokens": 4}, hooks(model), 0
    one = {name: prompt[name][:1] for name in ("inputs_embeds", "attention_mask")}

    def fault(*args: Any, **kwargs: Any) -> None:
        nonlocal count
        count += 1
        if count == at:
            raise Fault

    def failing(owner: Any, name: str) -> None:
        function = getattr(owner, name)
        patch.setattr(owner, name, lambda *args, **kwargs: (fault(), function(*args, **kwargs))[1])

    trace, handle = DoLaTrace(), None
    arguments: dict[str, Any] = {
        "processor": {"logits_processor": [Watched(fault)]},
        "criteria": {"stopping_criteria": [Watched(fault)]},
        "streamer": one | {"streamer": Watched(fault)},
        "trace": {"trace": trace},
    }.get(point, {})
    with monkeypatch.context() as patch:
        if point.startswith("layer"):
            handle = decoder.layers[int(point.split()[1]) - 1].register_forward_hook(fault)
        elif point in ("norm", "lm_head"):
            handle = {"norm": decoder.norm, "lm_head": model.language_model.lm_head}[point].register_forward_hook(fault)
        elif point.startswith("ExitView"):
            failing(ExitView, point.split(".")[1])
        elif point in ("read", "choose"):
            failing(library, point)
        elif point == "trace":
            failing(trace, "record")
        try:
            with pytest.raises(Fault):
                wrapper.generate(**(prompt | arguments))
        finally:
            if handle is not None:
                handle.remove()
    assert count == at
    assert hooks(model) == before
    assert torch.equal(wrapper.generate(**prompt), answer)
    assert trace.tokens.numel() == 0  # empty, not half a trace


# Threads.


def test_eight_threads_with_streaming_and_faults_among_them(model: Any, prompt: dict[str, Any], processor: Any) -> None:
    """Mixed configurations on one model and on one wrapper; two of the eight fail, and the others do not notice."""
    prompt = prompt | {"max_new_tokens": 6}
    shared = DoLaJanusWrapper(model)  # DoLa through generate_with_dola, off through the model's own
    low = DoLaJanusWrapper(model, DoLaConfig(bucket_id=0, alpha=0.02))
    one = prompt | {name: prompt[name][1:2] for name in ("inputs_embeds", "attention_mask")}

    def stream(wrapper: DoLaJanusWrapper) -> str:
        streamer = TextIteratorStreamer(processor.tokenizer, timeout=60)
        thread = threading.Thread(target=wrapper.generate, kwargs=one | {"streamer": streamer})
        thread.start()
        text = "".join(streamer)
        thread.join()
        return text

    jobs: list[Callable[[], Any]] = [
        lambda: shared.generate_with_dola(**prompt),
        lambda: model.language_model.generate(**prompt),
        lambda: low.generate(**prompt),
        lambda: shared.generate(**prompt, num_beams=2),
        lambda: stream(shared),
        lambda: stream(low),
        lambda: shared.generate(**prompt, logits_processor=[Watched(fail)]),
        lambda: low.generate(**prompt, stopping_criteria=[Watched(fail)]),
    ]
    before = hooks(model)
    want = [job() for job in jobs[:6]]
    assert not torch.equal(want[0], want[1]) and want[4] != want[5]
    results: list[list[Any]] = [[] for _ in jobs]
    start = threading.Barrier(len(jobs))

    def work(index: int) -> None:
        start.wait()
        for _ in range(2):
            try:
                results[index].append(jobs[index]())
            except Exception as error:
                results[index].append(error)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, got in enumerate(results):
        assert len(got) == 2
        if index >= 6:
            assert [type(error) for error in got] == [Fault] * 2
        else:
            assert all(torch.equal(a, want[index]) if isinstance(a, Tensor) else a == want[index] for a in got), (
                f"job {index}: {got}"
            )
    assert hooks(model) == before


# The long run.


def test_long_run_reports_the_slope(capsys: Any) -> None:
    long_run.run(["generations=10", "warm_up=5", "tokens=2", "prompt=4", "threads=0"])
    out = capsys.readouterr().out
    assert "generations  10 after 5: off, on, trace, beams, stream by turns" in out
    assert " bytes per generation" in out
    assert long_run.slope([10, 14, 18, 22]) == pytest.approx(4)
    with pytest.raises(ValueError, match="generations must be an integer of at least 2, got 1"):
        long_run.run(["generations=1"])
