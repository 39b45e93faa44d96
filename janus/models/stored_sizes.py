"""The sizes in config.json against those of the stored weights: a model that no file holds is refused, not built."""

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from transformers import PretrainedConfig
from transformers.modeling_utils import load_state_dict
from transformers.utils import cached_file
from transformers.utils.hub import get_checkpoint_shard_files

from janus.models.siglip_vit import tower_sizes

# In the order in which transformers looks for them.
FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


def weight_files(path: str, **hub: Any) -> list[str] | None:
    """The files with a checkpoint's weights, in this machine's cache if it is on the hub; None where there are none.

    Args:
        path: A folder, or a name on the hub.
        hub: `cached_file`'s arguments: where on the hub, and where in the cache.
    """
    found = (cached_file(path, name, _raise_exceptions_for_missing_entries=False, **hub) for name in FILES)
    file = next((file for file in found if file is not None), None)
    if file is None or not file.endswith(".index.json"):
        return None if file is None else [file]
    with open(file, encoding="utf-8") as index:
        json.load(index)["weight_map"]  # a KeyError that says more than that of the next line
    files, _ = get_checkpoint_shard_files(path, file, **hub)
    return files


def stored_shapes(path: str, **hub: Any) -> dict[str, tuple[int, ...]] | None:
    """The shape of each weight of a checkpoint, by name, from the files' headers; None where there are no weights.

    Args:
        path, hub: As of `weight_files`.
    """
    if (files := weight_files(path, **hub)) is None:
        return None
    shapes: dict[str, tuple[int, ...]] = {}
    for file in files:
        # A pickle for the CPU is mapped; for meta, it would be read.
        state = load_state_dict(file, map_location="meta" if file.endswith(".safetensors") else "cpu")
        shapes |= {name: tuple(weight.shape) for name, weight in dict(state).items()}
    return shapes


def depths(config: Any) -> Iterator[tuple[str, Any, int, str]]:
    """Each key of config.json that makes layers: its name and value, how many layers, the prefix of their names."""
    layers = config.language_config.num_hidden_layers
    yield "language_config.num_hidden_layers", layers, layers, "language_model.model.layers"
    params = config.vision_config.params
    depth = tower_sizes(**params)["layers"]
    yield "vision_config.params.layers", params.get("layers", depth), depth, "vision_model.vision_tower.blocks"
    for part in ("aligner", "gen_aligner"):
        params = getattr(config, f"{part}_config").params
        if params["projector_type"] == "mlp_gelu":
            yield f"{part}_config.params.depth", params["depth"], params["depth"], f"{part}.layers"


def widths(config: Any, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[str, Any, Any, str, int]]:
    """Each key that makes a layer wide: its name and value, the width, the weight and the dimension that have it."""
    text, layer = config.language_config, "language_model.model.layers.0"
    embedding = "language_model.model.embed_tokens.weight"
    if text.tie_word_embeddings and embedding not in shapes:
        embedding = "language_model.lm_head.weight"
    yield "language_config.vocab_size", text.vocab_size, text.vocab_size, embedding, 0
    yield "language_config.hidden_size", text.hidden_size, text.hidden_size, embedding, 1
    for key, weight, dimension, times in (
        ("intermediate_size", "mlp.up_proj", 0, 1),
        ("head_dim", "self_attn.q_proj", 0, 1),
        ("num_attention_heads", "self_attn.q_proj", 0, text.head_dim),
        ("num_key_value_heads", "self_attn.k_proj", 0, text.head_dim),
    ):
        value = getattr(text, key)
        yield f"language_config.{key}", value, value * times, f"{layer}.{weight}.weight", dimension

    params, sizes, tower = (
        config.vision_config.params,
        tower_sizes(**config.vision_config.params),
        "vision_model.vision_tower",
    )
    for key, size, weight, dimension in (
        ("width", sizes["width"], "patch_embed.proj.weight", 0),
        ("patch_size", sizes["patch_size"], "patch_embed.proj.weight", 2),
        ("image_size", (sizes["image_size"] // sizes["patch_size"]) ** 2, "pos_embed", 1),
        ("mlp_ratio", int(sizes["width"] * sizes["mlp_ratio"]), "blocks.0.mlp.fc1.weight", 0),
    ):
        yield f"vision_config.params.{key}", params.get(key, sizes[key]), size, f"{tower}.{weight}", dimension

    vq, ch = config.gen_vision_config.params, config.gen_vision_config.params.get("ch", 128)
    for key, weight, dimension in (
        ("image_token_size", "quantize.embedding.weight", 0),
        ("n_embed", "quantize.embedding.weight", 1),
        ("ch", "encoder.conv_in.weight", 0),
        ("z_channels", "encoder.conv_out.weight", 0),
    ):
        if key in vq:
            yield f"gen_vision_config.params.{key}", vq[key], vq[key], f"gen_vision_model.{weight}", dimension
    for i, mult in enumerate(vq.get("ch_mult", ())):
        weight = f"gen_vision_model.encoder.conv_blocks.{i}.res.0.conv1.weight"
        yield "gen_vision_config.params.ch_mult", mult, ch * mult, weight, 0

    for part in ("aligner", "gen_aligner"):
        params = getattr(config, f"{part}_config").params
        weight = f"{part}.layers.0.weight" if params["projector_type"] == "mlp_gelu" else f"{part}.layers.weight"
        for dimension, key in enumerate(("n_embed", "input_dim")):
            if key in params and params["projector_type"] != "identity":
                yield f"{part}_config.params.{key}", params[key], params[key], weight, dimension
    params = config.gen_head_config.params
    for key, weight, dimension in (
        ("image_token_size", "vision_head", 0),
        ("image_token_embed", "output_mlp_projector", 0),
        ("n_embed", "output_mlp_projector", 1),
    ):
        if key in params:
            yield f"gen_head_config.params.{key}", params[key], params[key], f"gen_head.{weight}.weight", dimension


def check_sizes(config: PretrainedConfig, path: str, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuses a config.json that describes more than is stored, before memory or patience ends.

    Args:
        config: A `MultiModalityConfig`.
        path: Where it is from, for the error.
        shapes: Those of the stored weights, by name.

    Raises:
        ValueError: A part is deeper or wider than its weights, or a weight that tells is missing.
    """
    for key, value, depth, prefix in depths(config):
        # Counted, as an index alone may be anything.
        stored = len({match[1] for name in shapes if (match := re.match(rf"{re.escape(prefix)}\.(\d+)\.", name))})
        if isinstance(depth, int) and depth > stored:
            raise ValueError(f"config.json: {key} must be at most {stored}, the {prefix} in the weights, got {value!r}")
    if getattr(config, "quantization_config", None) is not None:  # its weights may be packed
        return
    for key, value, width, weight, dimension in widths(config, shapes):
        if weight not in shapes:
            raise ValueError(f"{path!r} lacks the weights {weight}; config.json: {key} is {value!r}")
        if isinstance(width, int) and width > shapes[weight][dimension]:
            raise ValueError(
                f"config.json: {key} must fit the weights, where {weight} has the shape {list(shapes[weight])}, "
                f"got {value!r}"
            )
