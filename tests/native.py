"""Writes a checkpoint of the published layout in that of transformers' own Janus, `model_type: janus`."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GenerationConfig, JanusConfig, JanusVisionConfig, JanusVQVAEConfig, LlamaConfig

from janus.models.processing_vlm import load_tokenizer

# Published name -> native name, each a regular expression applied in turn.
RENAMED = {
    r"^language_model\.lm_head": "lm_head",
    r"^language_model\.model": "model.language_model",
    r"^vision_model\.vision_tower\.pos_embed": "model.vision_model.embeddings.position_embedding.weight",
    r"^vision_model\.vision_tower\.patch_embed\.proj": "model.vision_model.embeddings.patch_embedding",
    r"^vision_model\.vision_tower\.norm": "model.vision_model.post_layernorm",
    r"^vision_model\.vision_tower\.blocks": "model.vision_model.encoder.layers",
    r"(layers\.\d+)\.attn\.proj": r"\1.self_attn.projection_layer",
    r"(layers\.\d+)\.attn\.": r"\1.self_attn.",
    r"(vision_model\.encoder\.layers\.\d+)\.norm": r"\1.layer_norm",
    r"^aligner\.": "model.aligner.",
    r"^gen_aligner\.": "model.generation_aligner.",
    r"layers\.0\.(weight|bias)$": r"fc1.\1",
    r"(aligner)\.layers\.2": r"\1.hidden_layers.0",
    r"^gen_embed": "model.generation_embeddings",
    r"^gen_head\.output_mlp_projector": "model.generation_head.proj_out",
    r"^gen_head": "model.generation_head",
    r"^gen_vision_model": "model.vqmodel",
    r"encoder\.conv_blocks": "encoder.down",
    r"decoder\.conv_blocks": "decoder.up",
    r"((?:down|up)\.\d+)\.res": r"\1.block",
    r"mid\.([02])\.": lambda match: f"mid.block_{int(match[1]) // 2 + 1}.",
    r"mid\.1\.": "mid.attn_1.",
}  # fmt: skip


def renamed(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The published weights by their native names: the vision tower's qkv in three, its positions without a batch."""
    native = {}
    for name, weight in weights.items():
        if "attn_pool" in name or "codebook_used" in name:  # which inference does not use
            continue
        for pattern, new in RENAMED.items():
            name = re.sub(pattern, new, name)  # type: ignore[call-overload]
        if ".qkv." in name:
            for x, part in zip("qkv", weight.chunk(3), strict=True):
                native[name.replace("qkv", f"{x}_proj")] = part.clone()
        else:
            native[name] = weight[0] if name.endswith("position_embedding.weight") else weight
    return native


def convert(published: Path, folder: Path) -> Path:
    """Writes the files that a converted checkpoint has on the hub; returns the folder."""
    folder.mkdir()
    given: dict[str, dict[str, Any]] = {
        name: json.loads((published / f"{name}.json").read_text(encoding="utf-8"))
        for name in ("config", "preprocessor_config", "tokenizer_config")
    }
    tags = {"image_token": "<image_placeholder>", "boi_token": "<begin_of_image>", "eoi_token": "<end_of_image>"}
    shutil.copy(published / "tokenizer.json", folder)
    write(folder / "tokenizer_config.json", given["tokenizer_config"] | {"extra_special_tokens": tags} | tags)
    tokenizer = load_tokenizer(str(published))
    image_id, boi_id = map(tokenizer.convert_tokens_to_ids, (tags["image_token"], tags["boi_token"]))

    parts = {name: part.get("params", {}) for name, part in given["config"].items() if name.endswith("_config")}
    vision, vq = parts["vision_config"], parts["gen_vision_config"]
    text = given["config"]["language_config"] | {
        name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")
    }
    num_image_tokens = (vision["image_size"] // vision["patch_size"]) ** 2
    JanusConfig(
        text_config=LlamaConfig(**text),  # with its rms_norm_eps and rope_parameters
        vision_config=JanusVisionConfig(
            hidden_size=vision["width"],
            num_hidden_layers=vision["layers"],
            num_attention_heads=vision["heads"],
            mlp_ratio=vision["mlp_ratio"],
            image_size=vision["image_size"],
            patch_size=vision["patch_size"],
            num_image_tokens=num_image_tokens,
            projection_dim=parts["aligner_config"]["n_embed"],
            depth=parts["aligner_config"]["depth"],
        ),
        vq_config=JanusVQVAEConfig(
            embed_dim=vq["n_embed"],
            num_embeddings=vq["image_token_size"],
            base_channels=vq["ch"],
            channel_multiplier=vq["ch_mult"],
            latent_channels=vq["z_channels"],
            projection_dim=parts["gen_aligner_config"]["n_embed"],
            num_hidden_layers=parts["gen_aligner_config"]["depth"],
            image_token_embed_dim=parts["gen_head_config"]["image_token_embed"],
        ),
        image_token_id=image_id,
        tie_word_embeddings=False,  # true by default
        architectures=["JanusForConditionalGeneration"],
    ).save_pretrained(folder)
    GenerationConfig(  # guidance_scale and generation_kwargs are of images
        bos_token_id=text["bos_token_id"],
        eos_token_id=text["eos_token_id"],
        pad_token_id=text["pad_token_id"],
        generation_kwargs={"boi_token_id": boi_id},
        guidance_scale=5,
    ).save_pretrained(folder)

    images = given["preprocessor_config"]
    size = images.pop("image_size")
    images |= {"image_processor_type": "JanusImageProcessor", "size": {"height": size, "width": size}, "resample": 3}
    write(folder / "preprocessor_config.json", images)
    processor = {"processor_class": "JanusProcessor", "num_image_tokens": num_image_tokens}
    write(folder / "processor_config.json", processor | {"use_default_system_prompt": True})
    weights = load_file(published / "model.safetensors")
    save_file(renamed(weights), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def write(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2), encoding="utf-8")
