"""The golden checkpoint's language model where our janus does not import: transformers 4."""

import json

from conftest import CHECKPOINT
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM


class StandIn(nn.Module):
    """The part of a Janus model that janus_dola needs, for transformers 4, where our janus does not import."""

    def __init__(self) -> None:
        super().__init__()
        config = json.loads((CHECKPOINT / "config.json").read_text(encoding="utf-8"))["language_config"]
        self.language_model = LlamaForCausalLM(LlamaConfig(**config))
        weights = load_file(CHECKPOINT / "model.safetensors")
        prefix = "language_model."
        self.language_model.load_state_dict(
            {name.removeprefix(prefix): weight.float() for name, weight in weights.items() if name.startswith(prefix)}
        )

    def prepare_inputs_embeds(self, input_ids: Tensor) -> Tensor:
        return self.language_model.get_input_embeddings()(input_ids)
