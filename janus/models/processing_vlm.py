"""Conversations and images to model inputs (`janus/models/processing_vlm.py`)."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor
from transformers import PreTrainedTokenizerFast
from transformers.models.auto.tokenization_auto import get_tokenizer_config
from transformers.processing_utils import ProcessorMixin

from janus.models.image_processing_vlm import VLMImageProcessor
from janus.models.stored_sizes import refuse_pointer
from janus.utils.conversation import Conversation, get_conv_template


class DictOutput(Mapping):
    """A dataclass whose attributes are dict entries too: `**output` has them all, with what a collator has added."""

    def __iter__(self) -> Iterator[str]:
        return iter(vars(self))

    def __getitem__(self, name: str) -> Any:
        return vars(self)[name]

    def __setitem__(self, name: str, value: Any) -> None:
        setattr(self, name, value)

    def __len__(self) -> int:
        return len(vars(self))


@dataclass
class VLChatProcessorOutput(DictOutput):
    """One conversation.

    Attributes:
        sft_format: The formatted prompt.
        input_ids: int64 [T], each image as `num_image_tokens` ids between a start and an end id.
        pixel_values: float32 [n_images, 3, H, W].
        num_image_tokens: int32 [n_images].
    """

    sft_format: str
    input_ids: Tensor
    pixel_values: Tensor
    num_image_tokens: Tensor

    def __len__(self) -> int:
        return len(self.input_ids)


@dataclass
class BatchedVLChatProcessorOutput(DictOutput):
    """A batch of conversations, padded on the left.

    Attributes:
        sft_format: The formatted prompts.
        input_ids: int64 [B, T].
        pixel_values: float32 [B, n_images, 3, H, W], zeros where a row has fewer images.
        attention_mask: int64 [B, T], 0 at the padding.
        images_seq_mask: bool [B, T], True at the image tokens.
        images_emb_mask: bool [B, n_images, n_image_tokens], True at the features that take their places.
    """

    sft_format: list[str]
    input_ids: Tensor
    pixel_values: Tensor
    attention_mask: Tensor
    images_seq_mask: Tensor
    images_emb_mask: Tensor

    def to(
        self, device: torch.device | str | int, dtype: torch.dtype = torch.bfloat16
    ) -> "BatchedVLChatProcessorOutput":
        """Moves the tensors to `device` in place, the pixels to `dtype` as well, and returns itself, as published."""
        for name in ("input_ids", "attention_mask", "images_seq_mask", "images_emb_mask"):
            setattr(self, name, self[name].to(device))
        self.pixel_values = self.pixel_values.to(device=device, dtype=dtype)
        return self


def load_tokenizer(pretrained_model_name_or_path: str, **kwargs: Any) -> PreTrainedTokenizerFast:
    """The tokenizer of a checkpoint, as its tokenizer.json has it.

    `LlamaTokenizerFast` and `AutoTokenizer` of transformers 5 do not do: the first rebuilds the tokenizer and drops
    spaces and Chinese from DeepSeek's byte-level vocabulary, the second leaves out the BOS of `add_bos_token`.

    Raises:
        ValueError: A git-lfs pointer stands in place of tokenizer.json, or `model_max_length` is not a number.
    """
    if (file := Path(pretrained_model_name_or_path, "tokenizer.json")).is_file():
        refuse_pointer(str(pretrained_model_name_or_path), file)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(pretrained_model_name_or_path, **kwargs)
    if not isinstance(length := tokenizer.model_max_length, (int, float)):
        raise ValueError(f"tokenizer_config.json: model_max_length must be a number, got {length!r}")
    config = get_tokenizer_config(pretrained_model_name_or_path, **kwargs)
    tokenizer.add_bos_token = config.get("add_bos_token", True)  # LlamaTokenizer's default
    return tokenizer


class VLChatProcessor(ProcessorMixin):
    """Formats conversations, tokenizes them, and prepares their images.

    Args:
        image_processor: Prepares the images.
        tokenizer: A fast tokenizer; gets `image_tag` as a special token if it lacks it.
        image_tag, image_start_tag, image_end_tag, pad_tag: Special tokens.
        num_image_tokens: Tokens an image takes, the vision tower's number of patches.
        add_special_token: Whether the image tag itself stays in front of the image.
        sft_format: Name of the conversation template: `deepseek` (Janus-Pro) or `deepseek_old` (Janus-1.3B).
        mask_prompt, ignore_id: For training; kept for the published configuration files.

    Raises:
        ValueError: `num_image_tokens` is no integer that fits the images, or the tokenizer lacks a tag.
    """

    system_prompt = (
        "You are a helpful language and vision assistant. "
        "You are able to understand the visual content that the user provides, "
        "and assist the user with a variety of tasks using natural language."
    )

    def __init__(
        self,
        image_processor: VLMImageProcessor,
        tokenizer: PreTrainedTokenizerFast,
        image_tag: str = "<image_placeholder>",
        image_start_tag: str = "<begin_of_image>",
        image_end_tag: str = "<end_of_image>",
        pad_tag: str = "<｜▁pad▁｜>",
        num_image_tokens: int = 576,
        add_special_token: bool = False,
        sft_format: str = "deepseek",
        mask_prompt: bool = True,
        ignore_id: int = -100,
        **kwargs: Any,
    ) -> None:
        most = image_processor.image_size**2  # a patch has at least a pixel
        if not isinstance(num_image_tokens, int) or not 1 <= num_image_tokens <= most:
            raise ValueError(
                f"num_image_tokens must be an integer from 1 to image_size**2, {most}, got {num_image_tokens!r}"
            )
        for tag in (image_start_tag, image_end_tag, pad_tag):
            if tag not in tokenizer.get_vocab():
                raise ValueError(f"the tokenizer has no token {tag!r}, which must be one for the processor to use it")
        if image_tag not in tokenizer.get_vocab():
            tokenizer.add_special_tokens({"additional_special_tokens": [image_tag]})
        self.image_tag = image_tag
        self.image_start_tag = image_start_tag
        self.image_end_tag = image_end_tag
        self.pad_tag = pad_tag
        self.num_image_tokens = num_image_tokens
        self.add_special_token = add_special_token
        self.sft_format = sft_format
        self.mask_prompt = mask_prompt
        self.ignore_id = ignore_id
        super().__init__(image_processor, tokenizer, **kwargs)

    @classmethod
    def _get_arguments_from_pretrained(
        cls, pretrained_model_name_or_path: str, processor_dict: dict[str, Any] | None = None, **kwargs: Any
    ) -> list[Any]:
        # ProcessorMixin asks the Auto classes, which get DeepSeek's tokenizer wrong: see `load_tokenizer`.
        return [
            VLMImageProcessor.from_pretrained(pretrained_model_name_or_path, **kwargs),
            load_tokenizer(pretrained_model_name_or_path, **kwargs),
        ]

    def to_dict(self) -> dict[str, Any]:
        """What processor_config.json has: transformers 5 would add the image processor, which has a file of its own."""
        return {name: value for name, value in super().to_dict().items() if name != "image_processor"}

    def save_pretrained(self, save_directory: str, push_to_hub: bool = False, **kwargs: Any) -> list[str]:
        """Writes the published files, which the published code (transformers 4) reads as well.

        Args:
            save_directory: The folder.
            push_to_hub: Whether to upload them, too; the other arguments are then `push_to_hub`'s, `repo_id` being the
                folder's name unless given.
        """
        folder = Path(save_directory)
        files = super().save_pretrained(str(folder))
        files += self.image_processor.save_pretrained(folder)
        # transformers 5 writes the tokenizer for itself: a class and a list of special tokens that 4 does not know, no
        # add_bos_token, whose absence counts as true, and no token that is None, for which 4 has another default.
        config = {"legacy": True, "add_eos_token": False}
        config |= json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        for name in ("backend", "extra_special_tokens", "is_local", "local_files_only", "processor_class"):
            config.pop(name, None)
        special = {name: getattr(self.tokenizer, name) for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
        config |= special | {"add_bos_token": self.tokenizer.add_bos_token, "tokenizer_class": "LlamaTokenizer"}
        tokens: dict[str, Any] = {name: token for name, token in special.items() if token is not None}
        tokens["additional_special_tokens"] = self.tokenizer.extra_special_tokens
        for name, content in (("tokenizer_config.json", config), ("special_tokens_map.json", tokens)):
            text = json.dumps(content, indent=2, ensure_ascii=False, sort_keys=True) + "\n"
            (folder / name).write_text(text, encoding="utf-8")
            files.append(str(folder / name))
        if push_to_hub:  # not in super(), before the files are what they are to be
            self.push_to_hub(kwargs.pop("repo_id", folder.name), **kwargs)
        return files

    def _token_id(self, tag: str) -> int:
        return self.tokenizer.convert_tokens_to_ids(tag)

    @property
    def image_token(self) -> str:
        return self.image_tag

    @property
    def image_id(self) -> int:
        return self._token_id(self.image_tag)

    @property
    def image_start_token(self) -> str:
        return self.image_start_tag

    @property
    def image_start_id(self) -> int:
        return self._token_id(self.image_start_tag)

    @property
    def image_end_token(self) -> str:
        return self.image_end_tag

    @property
    def image_end_id(self) -> int:
        return self._token_id(self.image_end_tag)

    @property
    def pad_id(self) -> int:
        return self._token_id(self.pad_tag)

    def new_chat_template(self) -> Conversation:
        """An empty conversation in this checkpoint's format, with the published system prompt."""
        conversation = get_conv_template(self.sft_format)
        conversation.set_system_message(self.system_prompt)
        return conversation

    def apply_sft_template_for_multi_turn_prompts(
        self, conversations: Sequence[Mapping[str, Any]], sft_format: str = "deepseek", system_prompt: str = ""
    ) -> str:
        """Formats one conversation.

        Args:
            conversations: Its turns, each with `role` and `content`; the last `content` empty, for the model to fill.
            sft_format: Name of the template.
            system_prompt: Comes first, unless empty.

        Returns:
            The prompt.

        Raises:
            ValueError: A turn has no `role` or `content`, or `sft_format` is unknown.
        """
        for message in conversations:
            if not isinstance(message, Mapping) or not all(
                isinstance(message.get(k), str) for k in ("role", "content")
            ):
                raise ValueError(f"conversations must be turns with role and content, both strings; got {message!r}")
        conversation = get_conv_template(sft_format)
        conversation.set_system_message(system_prompt)
        for message in conversations:
            conversation.append_message(message["role"], message["content"].strip())
        return conversation.get_prompt().strip()

    def add_image_token(self, image_indices: Tensor | Sequence[int], input_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Widens each image tag to start, `num_image_tokens` image ids, end.

        Args:
            image_indices: Positions of the image tags, int [n_images].
            input_ids: int64 [T].

        Returns:
            The ids, int64 [T'], and the tokens per image, int32 [n_images].
        """
        image = torch.tensor([self.image_start_id, *[self.image_id] * self.num_image_tokens, self.image_end_id])
        pieces, start = [], 0
        for index in map(int, image_indices):
            pieces += [input_ids[start : index + 1 if self.add_special_token else index], image]
            start = index + 1
        num_image_tokens = torch.full((len(image_indices),), self.num_image_tokens, dtype=torch.int32)
        return torch.cat([*pieces, input_ids[start:]]), num_image_tokens

    def process_one(
        self,
        prompt: str | None = None,
        conversations: Sequence[Mapping[str, Any]] | None = None,
        images: Sequence[Image] | None = None,
        **kwargs: Any,
    ) -> VLChatProcessorOutput:
        """Prepares one prompt, given as text or as the turns of a conversation, and its images.

        Raises:
            ValueError: Both or none of `prompt` and `conversations` are given, one of them is no such thing, or the
                images are not PIL images, as many as the image tags.
        """
        if (prompt is None) == (conversations is None):
            given = "none" if prompt is None else "both"
            raise ValueError(f"exactly one of prompt and conversations must be given, got {given}")
        if prompt is None:
            prompt = self.apply_sft_template_for_multi_turn_prompts(
                conversations or (), sft_format=self.sft_format, system_prompt=self.system_prompt
            )
        if not isinstance(prompt, str) or re.search("[\ud800-\udfff]", prompt):  # half a character, from broken UTF-8
            raise ValueError(f"prompt must be text that UTF-8 can encode, got {prompt!r}")
        images = () if images is None else images
        pixel_values = self.image_processor(images, return_tensors="pt")["pixel_values"]
        input_ids = torch.tensor(self.tokenizer.encode(prompt), dtype=torch.long)
        image_indices = (input_ids == self.image_id).nonzero().flatten()
        if len(images) != len(image_indices):
            raise ValueError(
                f"images must be as many as the {self.image_tag} in the prompt, "
                f"got {len(images)} for {len(image_indices)}"
            )
        input_ids, num_image_tokens = self.add_image_token(image_indices, input_ids)
        return VLChatProcessorOutput(prompt, input_ids, pixel_values, num_image_tokens)

    def __call__(
        self,
        *,
        prompt: str | None = None,
        conversations: Sequence[Mapping[str, Any]] | None = None,
        images: Sequence[Image] | None = None,
        force_batchify: bool = True,
        **kwargs: Any,
    ) -> VLChatProcessorOutput | BatchedVLChatProcessorOutput:
        """`process_one`, as a batch of one unless `force_batchify=False`."""
        prepared = self.process_one(prompt=prompt, conversations=conversations, images=images)
        return self.batchify([prepared]) if force_batchify else prepared

    def batchify(self, prepare_list: Sequence[VLChatProcessorOutput]) -> BatchedVLChatProcessorOutput:
        """Pads conversations on the left to one batch."""
        if not prepare_list:
            raise ValueError("prepare_list must hold at least one conversation, got none")
        B, T = len(prepare_list), max(map(len, prepare_list))
        n_images = max(1, *(len(prepared.num_image_tokens) for prepared in prepare_list))
        batch = BatchedVLChatProcessorOutput(
            sft_format=[prepared.sft_format for prepared in prepare_list],
            input_ids=torch.full((B, T), self.pad_id, dtype=torch.long),
            pixel_values=torch.zeros(B, n_images, *self.image_processor.default_shape),
            attention_mask=torch.zeros(B, T, dtype=torch.long),
            images_seq_mask=torch.zeros(B, T, dtype=torch.bool),
            images_emb_mask=torch.zeros(B, n_images, self.num_image_tokens, dtype=torch.bool),
        )
        for i, prepared in enumerate(prepare_list):
            row = slice(T - len(prepared), T)
            batch.input_ids[i, row] = prepared.input_ids
            batch.attention_mask[i, row] = 1
            batch.images_seq_mask[i, row] = prepared.input_ids == self.image_id
            images = len(prepared.num_image_tokens)
            batch.pixel_values[i, :images] = prepared.pixel_values
            batch.images_emb_mask[i, :images] = True
        return batch
