"""DoLa in vLLM, each request with its own configuration; and Janus, which vLLM does not have, in it.

vLLM finds this by entry points, in each of its processes: nothing of vLLM is changed, and a model that is not one of
`ARCHITECTURES` is left alone.
"""

ARCHITECTURES = {
    "JanusForConditionalGeneration": "janus:Janus",
    "DoLaLlamaForCausalLM": "decoders:DoLaLlama",
    "DoLaMistralForCausalLM": "decoders:DoLaMistral",
    "DoLaQwen2ForCausalLM": "decoders:DoLaQwen2",
    "DoLaQwen3ForCausalLM": "decoders:DoLaQwen3",
    "DoLaGemma2ForCausalLM": "decoders:DoLaGemma",
    "DoLaGemma3ForCausalLM": "decoders:DoLaGemma",
}


def register() -> None:
    """The entry point `vllm.general_plugins`."""
    from transformers import AutoConfig
    from vllm.model_executor.models import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    from janus_dola.vllm.server import PublishedConfig, StartUp

    for architecture, model in ARCHITECTURES.items():
        ModelRegistry.register_model(architecture, f"janus_dola.vllm.{model}")
        MODELS_CONFIG_MAP[architecture] = StartUp
    AutoConfig.register("multi_modality", PublishedConfig, exist_ok=True)
