"""vLLM's decoders with exits: served by `--hf-overrides '{"architectures": ["DoLaLlamaForCausalLM"]}'`."""

from vllm.model_executor.models.llama import LlamaForCausalLM
from vllm.model_executor.models.mistral import MistralForCausalLM
from vllm.model_executor.models.qwen2 import Qwen2ForCausalLM
from vllm.model_executor.models.qwen3 import Qwen3ForCausalLM
from vllm.model_executor.models.transformers import TransformersForCausalLM

from janus_dola.vllm.exits import WithExits


class DoLaLlama(WithExits, LlamaForCausalLM):
    pass


class DoLaMistral(WithExits, MistralForCausalLM):
    pass


class DoLaQwen2(WithExits, Qwen2ForCausalLM):
    pass


class DoLaQwen3(WithExits, Qwen3ForCausalLM):
    pass


class DoLaGemma(WithExits, TransformersForCausalLM):
    """Gemma 2 and 3: vLLM's own classes collect no layers, its backend for transformers' does, softcapping included."""
