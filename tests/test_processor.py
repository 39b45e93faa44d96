"""Conversations and images to model inputs: what the golden cases leave open."""

import base64
import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import CHECKPOINT, GOLDEN
from PIL import Image
from transformers import AutoImageProcessor, PreTrainedTokenizerFast

from janus.models import VLChatProcessor, VLMImageProcessor
from janus.utils.conversation import get_conv_template
from janus.utils.io import load_pil_images

IMAGES = GOLDEN / "expected" / "images"
BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
TAG = "<image_placeholder>"


def ask(content: str, user: str = "<|User|>", assistant: str = "<|Assistant|>") -> list[dict[str, str]]:
    return [{"role": user, "content": content}, {"role": assistant, "content": ""}]


@pytest.mark.parametrize("text", ["a b  c   d", " leading", "图片里有什么？", "line\nline\n\n", "12345 + 678 = é ü 😀"])
def test_bos_and_round_trip_of_text(processor: Any, text: str) -> None:
    ids = processor.tokenizer.encode(text)
    assert ids[0] == processor.tokenizer.bos_token_id == processor.tokenizer.convert_tokens_to_ids(BOS)
    assert processor.tokenizer.decode(ids[1:]) == text
    assert processor.tokenizer.decode(ids, skip_special_tokens=True) == text


def test_an_image_becomes_its_tokens(processor: Any) -> None:
    images = [Image.new("RGB", (20, 10), "red"), Image.new("RGB", (10, 20), "blue")]
    one = processor(conversations=ask(f"{TAG}\n{TAG}\nx"), images=images, force_batchify=False)
    image = [processor.image_start_id, *[processor.image_id] * 16, processor.image_end_id]
    plain = processor.tokenizer.encode(one.sft_format)
    want = [out for token in plain for out in (image if token == processor.image_id else [token])]
    assert one.input_ids.tolist() == want
    assert one.num_image_tokens.tolist() == [16, 16] and one.pixel_values.shape == (2, 3, 64, 64)
    assert one.pixel_values[0, 0].max() == 1 and one.pixel_values[1, 2].max() == 1  # red first, then blue
    assert len(one) == len(want)
    batch = processor(conversations=ask(f"{TAG}\n{TAG}\nx"), images=images)
    assert batch.input_ids.tolist() == [want]
    assert batch.images_seq_mask[0].nonzero().flatten().tolist() == [
        i for i, token in enumerate(want) if token == processor.image_id
    ]


def test_several_turns_with_an_image_each(processor: Any) -> None:
    turns = [
        {"role": "<|User|>", "content": f"{TAG}\nOne"},
        {"role": "<|Assistant|>", "content": "Yes."},
        *ask(f"{TAG}\nTwo"),
    ]
    one = processor(conversations=turns, images=[Image.new("RGB", (8, 8))] * 2, force_batchify=False)
    assert one.sft_format == (
        f"{processor.system_prompt}\n\n<|User|>: {TAG}\nOne\n\n"
        f"<|Assistant|>: Yes.{EOS}<|User|>: {TAG}\nTwo\n\n<|Assistant|>:"
    )
    assert (one.input_ids == processor.image_id).sum() == 32


@pytest.mark.parametrize("images", [None, [], ()])
def test_text_only(processor: Any, images: Any) -> None:
    batch = processor(conversations=ask("Hello"), images=images)
    assert batch.input_ids[0].tolist() == processor.tokenizer.encode(batch.sft_format[0])
    assert batch.attention_mask.all()
    assert batch.pixel_values.shape == (1, 1, 3, 64, 64) and not batch.pixel_values.any()
    assert not batch.images_seq_mask.any() and not batch.images_emb_mask.any()


def test_left_padding(processor: Any) -> None:
    long, short = (
        processor(conversations=ask(text), images=images, force_batchify=False)
        for text, images in ((f"{TAG}\nA long question indeed?", [Image.new("RGB", (9, 9), "white")]), ("Hi", None))
    )
    batch = processor.batchify([short, long])
    pad = len(long) - len(short)
    assert pad > 0
    assert batch.input_ids[0].tolist() == [processor.pad_id] * pad + short.input_ids.tolist()
    assert batch.attention_mask[0].tolist() == [0] * pad + [1] * len(short)
    assert batch.input_ids[1].tolist() == long.input_ids.tolist() and batch.attention_mask[1].all()
    assert batch.images_emb_mask.tolist() == [[[False] * 16], [[True] * 16]]
    assert torch.equal(batch.pixel_values[1], long.pixel_values) and not batch.pixel_values[0].any()
    assert batch.sft_format == [short.sft_format, long.sft_format]


def test_the_format_of_janus_1_3b(processor: Any) -> None:
    turns = [
        {"role": "User", "content": "One"},
        {"role": "Assistant", "content": "Yes."},
        *ask("Two", "User", "Assistant"),
    ]
    prompt = processor.apply_sft_template_for_multi_turn_prompts(turns, sft_format="deepseek_old", system_prompt="S")
    assert prompt == f"S\n\nUser: One\n\nAssistant: Yes.{EOS}User: Two\n\nAssistant:"
    bare = processor.apply_sft_template_for_multi_turn_prompts(ask("  Two \n", "User", "Assistant"), "deepseek_old")
    assert bare == "User: Two\n\nAssistant:"
    template = get_conv_template("deepseek_old")
    assert template.roles == ("User", "Assistant") and EOS in template.stop_str
    template.append_message("User", "Hello")
    assert get_conv_template("deepseek_old").messages == []  # each call gives one of its own


def test_new_chat_template(processor: Any) -> None:
    chat = processor.new_chat_template()
    chat.append_message(chat.roles[0], "Hello")
    chat.append_message(chat.roles[1], "")
    assert chat.get_prompt() == f"{processor.system_prompt}\n\n<|User|>: Hello\n\n<|Assistant|>:"
    other = chat.copy()
    other.append_message("<|User|>", "More")
    assert len(chat.messages) == 2


def test_prompt(processor: Any) -> None:
    prompt = f"{TAG}\nWhat?"
    one = processor(prompt=prompt, images=[Image.new("RGB", (8, 8))], force_batchify=False)
    assert one.sft_format == prompt
    assert processor.tokenizer.decode(one.input_ids[-3:]).endswith("What?")
    assert one.input_ids[0] == processor.tokenizer.bos_token_id


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "exactly one of prompt and conversations must be given, got none"),
        ({"prompt": "x", "conversations": ask("x")}, "exactly one of prompt and conversations .* got both"),
        ({"conversations": ask(f"{TAG}\nx")}, "images must be as many as .* got 0 for 1"),
        ({"conversations": ask("x"), "images": [Image.new("RGB", (8, 8))]}, "images must be .* got 1 for 0"),
        ({"prompt": f"{TAG} {TAG}", "images": [Image.new("RGB", (8, 8))]}, "images must be .* got 1 for 2"),
    ],
)
def test_refused(processor: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        processor(**arguments)


def test_an_empty_batch_and_an_unknown_format_are_refused(processor: Any) -> None:
    with pytest.raises(ValueError, match="prepare_list must hold at least one"):
        processor.batchify([])
    with pytest.raises(ValueError, match=r"sft_format must be one of \['deepseek', 'deepseek_old'\], got 'llama'"):
        processor.apply_sft_template_for_multi_turn_prompts(ask("x"), sft_format="llama")


def test_output_as_arguments_and_to(processor: Any) -> None:
    names = ["sft_format", "input_ids", "pixel_values", "attention_mask", "images_seq_mask", "images_emb_mask"]
    batch = processor(conversations=ask(f"{TAG}\nx"), images=[Image.open(IMAGES / "wide.png")])
    pixels = batch.pixel_values
    assert list(dict(**batch)) == names and batch["input_ids"] is batch.input_ids
    one = processor(conversations=ask("x"), force_batchify=False)
    assert list(dict(**one)) == ["sft_format", "input_ids", "pixel_values", "num_image_tokens"]
    assert batch.to("cpu") is batch  # as published: itself, in bfloat16 unless told otherwise
    assert torch.equal(batch.pixel_values, pixels.to(torch.bfloat16))
    assert batch.input_ids.dtype == torch.int64 and batch.images_seq_mask.dtype == torch.bool
    assert batch.to(torch.device("cpu"), dtype=torch.float16).pixel_values.dtype == torch.float16
    assert batch.to("meta").input_ids.device.type == "meta" and batch.pixel_values.device.type == "meta"


def test_save_pretrained_round_trip(processor: Any, tmp_path: Path) -> None:
    processor.save_pretrained(tmp_path)
    for name in ("processor_config.json", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / name).is_file()
    again = VLChatProcessor.from_pretrained(tmp_path)
    for name in json.loads((CHECKPOINT / "processor_config.json").read_text(encoding="utf-8")).keys() - {
        "processor_class"
    }:
        assert getattr(again, name) == getattr(processor, name), name
    assert again.image_processor.to_dict() == processor.image_processor.to_dict()
    assert again.tokenizer.get_vocab() == processor.tokenizer.get_vocab()
    assert again.tokenizer.special_tokens_map == processor.tokenizer.special_tokens_map
    conversation, images = ask(f"{TAG}\n图片 里有  什么？"), [Image.open(IMAGES / "tall.png")]
    want, got = (p(conversations=conversation, images=images) for p in (processor, again))
    for name in want:
        equal = want[name] == got[name]
        assert equal if isinstance(equal, bool) else equal.all(), name


def contents(folder: Path) -> dict[str, dict[str, Any]]:
    names = ("processor_config", "preprocessor_config", "tokenizer_config", "special_tokens_map")
    return {name: json.loads((folder / f"{name}.json").read_text(encoding="utf-8")) for name in names}


def test_saved_files_are_the_published_ones(processor: Any, tmp_path: Path) -> None:
    """transformers 5 writes `image_processor` twice and a list `extra_special_tokens`: transformers 4 fails on both."""
    files = processor.save_pretrained(tmp_path)
    assert all(Path(file).is_file() for file in files)
    published, written = contents(CHECKPOINT), contents(tmp_path)
    assert published["preprocessor_config"].pop("processor_class") == "VLChatProcessor"  # nobody reads it
    tags = {key: written["processor_config"].pop(key) for key in ("image_start_tag", "image_end_tag", "pad_tag")}
    assert tags == {key: getattr(processor, key) for key in tags}  # arguments of the published processor
    assert written == published


def test_a_new_tokenizer_is_saved_as_a_published_one(tmp_path: Path) -> None:
    """It has no keys of a checkpoint to keep, and the published code's defaults are other tokens."""
    loaded = VLChatProcessor.from_pretrained(CHECKPOINT)
    tokens = {name: getattr(loaded.tokenizer, name) for name in ("bos_token", "eos_token", "pad_token")}
    more = list(loaded.tokenizer.extra_special_tokens)
    new = PreTrainedTokenizerFast(
        tokenizer_file=str(CHECKPOINT / "tokenizer.json"), additional_special_tokens=more, **tokens
    )
    new.add_bos_token = False
    VLChatProcessor(loaded.image_processor, new, num_image_tokens=16).save_pretrained(tmp_path)
    written = contents(tmp_path)
    config = tokens | {"unk_token": None, "add_bos_token": False, "tokenizer_class": "LlamaTokenizer"}
    assert {key: written["tokenizer_config"].get(key, ...) for key in config} == config
    assert "extra_special_tokens" not in written["tokenizer_config"]
    assert written["special_tokens_map"] == tokens | {"additional_special_tokens": more}


def test_what_is_uploaded_is_what_is_saved(processor: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The upload came first, and the tokenizer on the hub had no add_bos_token."""
    processor.save_pretrained(tmp_path / "mine")
    uploads = []

    def upload(self: Any, folder: Any, repo_id: str, *args: Any, **kwargs: Any) -> None:
        uploads.append((repo_id, kwargs["commit_message"], kwargs["token"], contents(Path(folder))))

    hub = SimpleNamespace(create_repo=lambda repo_id, **kwargs: SimpleNamespace(repo_id=f"me/{repo_id}"))
    monkeypatch.setattr("transformers.utils.hub.hf_api", lambda: hub)
    monkeypatch.setattr("transformers.processing_utils.hf_api", lambda: hub)
    monkeypatch.setattr(
        "transformers.utils.hub.create_and_tag_model_card",
        lambda *args, **kwargs: SimpleNamespace(save=lambda file: None),
    )
    monkeypatch.setattr(VLChatProcessor, "_upload_modified_files", upload)
    processor.save_pretrained(tmp_path / "mine", push_to_hub=True, commit_message="Mine", token="t")
    processor.save_pretrained(tmp_path / "mine", push_to_hub=True, repo_id="other")
    saved = contents(tmp_path / "mine")
    assert uploads == [("me/mine", "Mine", "t", saved), ("me/other", None, None, saved)]
    assert saved["tokenizer_config"]["add_bos_token"] is True


@pytest.mark.parametrize("count", [0, 64 * 64 + 1, 10**9, 1.5, "16", None])
def test_num_image_tokens_fit_the_image(processor: Any, count: Any) -> None:
    """With 10**9, the first image took all memory."""
    message = f"num_image_tokens must be an integer from 1 to image_size..2, 4096, got {count!r}"
    with pytest.raises(ValueError, match=message):
        VLChatProcessor(processor.image_processor, processor.tokenizer, num_image_tokens=count)


@pytest.mark.parametrize("add_bos_token", [True, False, None])
def test_add_bos_token(tmp_path: Path, add_bos_token: bool | None) -> None:
    """As tokenizer_config.json has it; LLaMA's default is to add it. It outlives a round trip."""
    source = tmp_path / "source"
    source.mkdir()
    for file in CHECKPOINT.iterdir():
        if file.suffix == ".json":
            (source / file.name).write_bytes(file.read_bytes())
    config = json.loads((source / "tokenizer_config.json").read_text(encoding="utf-8"))
    config.pop("add_bos_token")
    if add_bos_token is not None:
        config["add_bos_token"] = add_bos_token
    (source / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    first = VLChatProcessor.from_pretrained(source)
    first.save_pretrained(tmp_path / "saved")
    for processor in (first, VLChatProcessor.from_pretrained(tmp_path / "saved")):
        ids = processor.tokenizer.encode("Hello")
        assert (ids[0] == processor.tokenizer.bos_token_id) is (add_bos_token is not False)
        assert processor.tokenizer.decode(ids, skip_special_tokens=True) == "Hello"
    saved = json.loads((tmp_path / "saved" / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert saved["add_bos_token"] is (add_bos_token is not False)  # where the published code looks


def test_image_processor(tmp_path: Path) -> None:
    processor = VLMImageProcessor.from_pretrained(CHECKPOINT)
    assert type(AutoImageProcessor.from_pretrained(CHECKPOINT)) is VLMImageProcessor
    assert processor.default_shape == [3, 64, 64] and processor.background_color == (127, 127, 127)
    wide = processor([Image.new("RGB", (100, 50), (255, 0, 127))])["pixel_values"]
    assert wide.dtype == torch.float32 and wide.shape == (1, 3, 64, 64)
    # Rows 16 to 47 are the image, of values in [-1, 1]; what is above and below has the colour of the mean.
    grey = 127 / 255 * 2 - 1
    image = wide[0, :, 16:48]
    want = torch.tensor([1.0, -1.0, grey]).view(3, 1, 1).expand(3, 32, 64)
    torch.testing.assert_close(image, want, atol=1e-6, rtol=0)
    padding = torch.cat([wide[0, :, :16], wide[0, :, 48:]], 1)
    torch.testing.assert_close(padding, torch.full((3, 32, 64), grey), atol=1e-6, rtol=0)
    thin = processor([Image.new("RGB", (1000, 10), "white")])["pixel_values"]
    assert (thin[0, 0].max(1).values == 1).sum() == processor.min_size  # never thinner than this
    plain = VLMImageProcessor(image_size=64, image_mean=None, image_std=None, do_normalize=False)
    assert plain([Image.new("RGB", (64, 64), "white")])["pixel_values"].unique().tolist() == [1.0]
    processor.save_pretrained(tmp_path)
    assert VLMImageProcessor.from_pretrained(tmp_path).to_dict() == processor.to_dict()


def data_url(image: Image.Image, kind: str = "png") -> str:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def test_load_pil_images(tmp_path: Path) -> None:
    """Paths and data URLs, in the order of the turns, of any mode, as RGB."""
    palette = Image.open(IMAGES / "wide.png").convert("RGB").quantize(8)
    palette.save(tmp_path / "palette.png")
    sources: list[Any] = [str(IMAGES / "rgba.png"), IMAGES / "gray.png", str(tmp_path / "palette.png")]
    wide = Image.open(IMAGES / "wide.png").convert("RGB")
    turns: list[dict[str, Any]] = [
        {"role": "<|User|>", "content": TAG * 3, "images": sources},
        {"role": "<|Assistant|>", "content": "Yes."},
        {"role": "<|User|>", "content": TAG * 2, "images": [data_url(wide), data_url(wide.convert("L"), "jpeg")]},
    ]
    images = load_pil_images(turns)
    assert [image.mode for image in images] == ["RGB"] * 5
    want = [*(Image.open(source).convert("RGB") for source in sources), wide]
    for got, image in zip(images, want, strict=False):
        assert np.array_equal(np.asarray(got), np.asarray(image))
    gray = np.asarray(images[4]).astype(int)
    assert np.abs(gray[..., 0] - np.asarray(wide.convert("L"))).mean() < 8 and (gray[..., 0] == gray[..., 2]).all()
    assert load_pil_images([{"role": "<|User|>", "content": "x"}]) == []


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nothing/here.png", "there is no file 'nothing/here.png'"),
        (str(CHECKPOINT / "config.json"), "is not an image"),
        (str(GOLDEN), "cannot read"),
        ("data:text/plain;base64,AAAA", "data URL must start with data:image"),
        ("data:image/png,AAAA", "data URL must start with data:image"),
        ("data:image/png;base64,%%%", "cannot read"),
        (data_url(Image.new("RGB", (300, 300), "red"))[:200], "images: "),
    ],
)
def test_an_image_that_cannot_be_read(source: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        load_pil_images([{"role": "<|User|>", "content": TAG, "images": [source]}])
    assert "images" in str(error.value) and len(str(error.value)) < 300


def test_output_takes_assignment_by_key_as_published() -> None:
    processor = VLChatProcessor.from_pretrained(CHECKPOINT)
    turns = [{"role": "<|User|>", "content": "Hello"}, {"role": "<|Assistant|>", "content": ""}]
    batch = processor(conversations=turns)
    batch["attention_mask"] = batch["attention_mask"] * 0
    assert batch.attention_mask.sum() == 0


def test_the_output_is_a_mapping_that_keeps_what_a_collator_sets(processor: VLChatProcessor) -> None:
    """`dict(batch)` and `**batch` were without it, so every LoRA recipe for Janus trained on nothing."""
    turns = [{"role": "<|User|>", "content": "Hi"}, {"role": "<|Assistant|>", "content": ""}]
    batch = processor(conversations=turns, images=[])
    names = list(batch)
    assert names == ["sft_format", "input_ids", "pixel_values", "attention_mask", "images_seq_mask", "images_emb_mask"]
    batch["labels"] = batch.input_ids.clone()
    assert "labels" in dict(batch) and batch["labels"] is batch.labels is {**batch}["labels"]
    assert list(batch) == [*names, "labels"] and len(batch) == len(names) + 1
    assert "absent" not in batch and "to" not in batch and batch.get("absent") is None
    with pytest.raises(KeyError, match="absent"):
        batch["absent"]
