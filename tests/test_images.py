"""Broken, odd and oversized images: the published code's pixels, or one clear error."""

import base64
import io
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import GOLDEN
from PIL import Image

from janus.models import VLMImageProcessor
from janus.utils.io import load_image, load_pil_images

WIDE = GOLDEN / "expected" / "images" / "wide.png"
TAG = "<image_placeholder>"


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
    fitted = processor.image_processor.fit(image)  # as programs keep it
    assert np.array_equal(processor.image_processor([fitted])["pixel_values"][0].numpy(), got)


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
        ({"conversations": "hi"}, "conversations must be turns with role and content, both strings; got 'h'"),
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
        ({"image_size": 64, "rescale_factor": {}}, "rescale_factor must be a number, got {}"),
    ],
)
def test_the_image_processor_refuses(sizes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VLMImageProcessor(**sizes)
