"""The demo checkpoint as the published code reads it, which runs on transformers 4: this runs on 4 and on 5."""

import json
from pathlib import Path
from typing import Any

import transformers
from transformers import LlamaConfig, LlamaTokenizerFast, PreTrainedTokenizerFast

DEMO = Path(__file__).parents[2] / "demo" / "checkpoint"
# The published VLChatProcessor's arguments, and the key by which transformers knows the class.
PROCESSOR_KEYS = {
    "image_tag", "image_start_tag", "image_end_tag", "pad_tag", "num_image_tokens", "add_special_token", "sft_format",
    "mask_prompt", "ignore_id", "processor_class",
}  # fmt: skip


def read(name: str) -> dict[str, Any]:
    return json.loads((DEMO / name).read_text(encoding="utf-8"))


def test_processor_config_repeats_no_argument() -> None:
    """With `image_processor`, the published code "got multiple values for argument 'image_processor'"."""
    assert read("processor_config.json").keys() <= PROCESSOR_KEYS
    assert read("preprocessor_config.json")["image_processor_type"] == "VLMImageProcessor"


def test_the_tokenizer_loads() -> None:
    """With `extra_special_tokens`, transformers 4 said "'list' object has no attribute 'keys'"."""
    # As the published code loads it; transformers 5's class of that name builds another tokenizer.
    four = int(transformers.__version__.split(".")[0]) < 5
    tokenizer = (LlamaTokenizerFast if four else PreTrainedTokenizerFast).from_pretrained(DEMO)
    stored = json.loads((DEMO / "tokenizer.json").read_text(encoding="utf-8"))
    ids = {token["content"]: token["id"] for token in stored["added_tokens"]} | stored["model"]["vocab"]
    assert tokenizer.get_vocab() == ids  # nothing added, such as <unk>
    tokens = read("special_tokens_map.json")
    for name in ("bos_token", "eos_token", "pad_token"):
        assert getattr(tokenizer, name) == tokens[name] == read("tokenizer_config.json")[name]
    assert tokenizer.unk_token is None
    for text in ("<|User|>: What is in the image?", "a  b 图片 12"):
        encoded = tokenizer.encode(text)
        assert encoded[0] == ids[tokens["bos_token"]] and tokenizer.decode(encoded[1:]) == text
    assert tokenizer.encode("<|User|>")[1:] == [ids["<|User|>"]]


def test_the_decoder_is_the_same_to_transformers_4() -> None:
    """Which knows `rope_theta` and `rope_scaling`, and not `rope_parameters`."""
    written = read("config.json")["language_config"]
    assert written["rope_theta"] == written["rope_parameters"]["rope_theta"]
    assert LlamaConfig(**written).num_hidden_layers == 30
