"""The models and processors of Janus. Importing registers `multi_modality` with transformers' Auto classes."""

from janus.models.image_processing_vlm import VLMImageProcessor
from janus.models.modeling_vlm import MultiModalityCausalLM, MultiModalityConfig
from janus.models.processing_vlm import VLChatProcessor

__all__ = ["MultiModalityCausalLM", "MultiModalityConfig", "VLChatProcessor", "VLMImageProcessor"]
