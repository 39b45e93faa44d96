"""Janus in vLLM, in the layout of transformers' own Janus, as `janus-dola export` writes it."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from transformers import BatchFeature
from transformers.models.janus.modeling_janus import JanusVisionAlignerMLP, JanusVisionModel
from vllm.model_executor.models.interfaces import SupportsLoRA, SupportsMultiModal, SupportsPP
from vllm.model_executor.models.utils import AutoWeightsLoader, WeightsMapper, init_vllm_registered_model, maybe_prefix
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.processing import (
    BaseDummyInputsBuilder,
    BaseMultiModalProcessor,
    BaseProcessingInfo,
    PromptReplacement,
    PromptUpdateDetails,
)

from janus.models.image_processing_vlm import VLMImageProcessor
from janus_dola.vllm.exits import append_exits, read_head
from janus_dola.vllm.server import Server

PLACEHOLDER = "<image_placeholder>"


class Info(BaseProcessingInfo):
    @property
    def num_image_tokens(self) -> int:
        return self.get_hf_config().vision_config.num_image_tokens

    def images(self) -> VLMImageProcessor:
        """The published preprocessing, with the folder's settings: transformers' needs torchvision."""
        settings = dict(self.ctx.get_hf_image_processor_config())
        names = ("min_size", "image_mean", "image_std", "rescale_factor", "do_normalize")
        given = {name: settings[name] for name in names if settings.get(name) is not None}
        return VLMImageProcessor(self.get_hf_config().vision_config.image_size, **given)

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        return {"image": None}

    def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Mapping[str, int]) -> Mapping[str, int]:
        return {"image": self.num_image_tokens + 2}


class Dummy(BaseDummyInputsBuilder[Info]):
    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        return PLACEHOLDER * mm_counts.get("image", 0)

    def get_dummy_mm_data(self, seq_len: int, mm_counts: Mapping[str, int], mm_options: Any) -> dict[str, Any]:
        side = self.info.get_hf_config().vision_config.image_size
        return {"image": self._get_dummy_images(width=side, height=side, num_images=mm_counts.get("image", 0))}


class Processor(BaseMultiModalProcessor[Info]):
    """Images to pixels, and each placeholder of the prompt, tokenized before, to its start, image and end tokens."""

    def _call_hf_processor(self, hf_data: Mapping[str, Any], hf_kwargs: Mapping[str, Any]) -> BatchFeature:
        return self.info.images()(list(hf_data["images"]), return_tensors="pt")

    def _get_mm_fields_config(
        self, hf_inputs: BatchFeature, hf_processor_mm_kwargs: Mapping[str, Any]
    ) -> Mapping[str, MultiModalFieldConfig]:
        return {"pixel_values": MultiModalFieldConfig.batched("image")}

    def _get_prompt_updates(
        self, mm_items: Any, hf_processor_mm_kwargs: Mapping[str, Any], out_mm_kwargs: Any
    ) -> Sequence[PromptReplacement]:
        tokenizer: Any = self.info.get_tokenizer()
        image = self.info.get_hf_config().image_token_id
        start, end = tokenizer.convert_tokens_to_ids([tokenizer.boi_token, tokenizer.eoi_token])
        details = PromptUpdateDetails.select_token_id([start, *[image] * self.info.num_image_tokens, end], image)
        return [PromptReplacement(modality="image", target=[image], replacement=details)]


@MULTIMODAL_REGISTRY.register_processor(Processor, info=Info, dummy_inputs=Dummy)
class Janus(nn.Module, SupportsMultiModal, SupportsLoRA, SupportsPP):
    """`JanusForConditionalGeneration`: transformers' vision tower and aligner, vLLM's LLaMA with exits; text only."""

    hf_to_vllm_mapper = WeightsMapper(
        orig_to_new_prefix={
            "lm_head.": "language_model.lm_head.",
            "model.language_model.": "language_model.model.",
            "model.vision_model.": "vision_model.",
            "model.aligner.": "aligner.",
            "model.": None,  # what generates images
        }
    )
    packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}

    @classmethod
    def get_placeholder_str(cls, modality: str, i: int) -> str:
        return PLACEHOLDER

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__()
        config = self.config = vllm_config.model_config.hf_config
        with self._mark_tower_model(vllm_config, "image"):  # type: ignore[operator]
            self.vision_model = JanusVisionModel(config.vision_config)
            self.aligner = JanusVisionAlignerMLP(config.vision_config)
        with self._mark_language_model(vllm_config):  # type: ignore[operator]
            self.language_model: Any = init_vllm_registered_model(
                vllm_config=vllm_config,
                hf_config=config.text_config,
                prefix=maybe_prefix(prefix, "language_model"),
                architectures=["LlamaForCausalLM"],
            )
        server = Server.of(vllm_config)
        self.language_model.model._set_aux_hidden_state_layers(server.layers if server else ())
        self.make_empty_intermediate_tensors = self.language_model.make_empty_intermediate_tensors

    def embed_multimodal(self, **kwargs: Any) -> Any:
        """Pixels [n, 3, H, W] to embeddings [n, num_image_tokens, d]."""
        pixels = kwargs.get("pixel_values")
        if pixels is None:
            return []
        pixels = pixels.to(next(self.aligner.parameters()).dtype)
        return self.aligner(self.vision_model(pixels).last_hidden_state)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        return append_exits(self.language_model(input_ids, positions, intermediate_tensors, inputs_embeds))

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        decoder = self.language_model
        return read_head(hidden_states, self.config.text_config.hidden_size, decoder.model.norm, decoder.compute_logits)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        return AutoWeightsLoader(self).load_weights(weights, mapper=self.hf_to_vllm_mapper)
