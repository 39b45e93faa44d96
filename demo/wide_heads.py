"""The demo checkpoint with attention heads of 64 in place of 16: python -m demo.wide_heads OUT

vLLM's attention on a CPU has no heads of 16. The answers are the same. The checkpoint itself keeps its narrow heads:
a batch of 96 is answered three times as fast.
"""

import copy
import sys
from pathlib import Path
from typing import Any

import torch

from janus.models import MultiModalityCausalLM, VLChatProcessor

HERE = Path(__file__).parent
WIDTH = 64


def widen(model: MultiModalityCausalLM) -> MultiModalityCausalLM:
    """The same model with heads of `WIDTH`.

    A narrow head's dimensions go where the wide head's rotary embedding turns them as fast as before; the others are 0.
    Scores are divided by sqrt(64) and no longer by sqrt(16), so the queries are doubled. Both are exact.
    """
    config: Any = copy.deepcopy(model.config)
    text = config.language_config
    heads, times = text.num_attention_heads, WIDTH // text.head_dim
    turned = torch.arange(text.head_dim // 2) * times
    text.head_dim = WIDTH
    places = torch.cat([turned, turned + WIDTH // 2])  # where a narrow head's dimensions are in a wide one
    rows = (torch.arange(heads).unsqueeze(1) * WIDTH + places).flatten()
    weights = model.state_dict()
    for name, weight in weights.items():
        if ".self_attn." in name:
            projection = name.split(".")[-2]
            wide = weight.new_zeros(heads * WIDTH, text.hidden_size)
            wide[rows] = {"q_proj": weight * times**0.5, "o_proj": weight.T}.get(projection, weight)
            weights[name] = wide.T if projection == "o_proj" else wide
    wider: Any = MultiModalityCausalLM(config)
    wider.load_state_dict(weights)
    return wider.to(model.dtype).eval()


def main(out: str, checkpoint: Path = HERE / "checkpoint") -> None:
    """Writes the checkpoint's files to the folder `out`, in the published layout, the heads wide."""
    widen(MultiModalityCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16)).save_pretrained(out)
    VLChatProcessor.from_pretrained(checkpoint).save_pretrained(out)
    generation = checkpoint / "generation_config.json"
    Path(out, generation.name).write_bytes(generation.read_bytes())


if __name__ == "__main__":
    main(sys.argv[1])
