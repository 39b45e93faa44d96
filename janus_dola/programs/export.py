"""The program `export`: a checkpoint as transformers' own Janus. What it does is told by `keys.ExportConfig`."""

import json
import os
import re
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from secrets import token_hex
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    GenerationConfig,
    JanusConfig,
    JanusForConditionalGeneration,
    JanusVisionConfig,
    JanusVQVAEConfig,
    LlamaConfig,
)
from transformers.modeling_utils import load_state_dict

from janus.models.siglip_vit import tower_sizes
from janus.models.stored_sizes import check_depths, check_shapes, depths, stored_shapes, weight_files
from janus_dola.programs import checkpoint
from janus_dola.programs.keys import ExportConfig
from janus_dola.programs.options import ModelConfig, first_line, read_config

NATIVE = Path(__file__).parents[1] / "native"
SHARD = 5 * 10**9  # bytes of a file of weights
# What tokenizer_config.json keeps of a checkpoint's own. Not auto_map: trust_remote_code would run what it names.
TOKENIZER_KEYS = (
    "backend", "bos_token", "clean_up_tokenization_spaces", "eos_token", "legacy", "model_max_length",
    "tokenizer_class", "unk_token",
)  # fmt: skip
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
    r"(aligner)\.layers\.(\d+)": lambda match: f"{match[1]}.hidden_layers.{int(match[2]) // 2 - 1}",
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


def run(argv: Sequence[str]) -> None:
    config = read_config(ExportConfig, argv, None)
    if not config.model_path and any(not argument.startswith("out=") for argument in argv):
        raise ValueError("model_path must be given with other keys than out: without a model nothing keeps them")
    out = Path(config.out)
    # It has the folder's name only once it is whole, and until then one that no other run or file has.
    partial = out.with_name(f"{out.name}.{token_hex(4)}.partial")
    partial.mkdir(parents=True)
    try:
        shutil.copytree(NATIVE / "custom_generate", partial / "custom_generate", ignore=shutil.ignore_patterns("__*"))
        if config.model_path:
            write_model(ModelConfig(**{key: v for key, v in asdict(config).items() if key != "out"}), partial)
        else:
            shutil.copy(NATIVE / "README.md", partial)
        if os.path.lexists(out):  # as rename would replace an empty folder
            raise ValueError(
                f"out must name a folder that does not exist yet, got {config.out!r}, made during this run"
            )
        partial.rename(out)
        size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file()) / 1e6
        what = "transformers' Janus, whose generate is DoLa" if config.model_path else "DoLa for custom_generate"
        print(f"{out}: {what}, {size:.1f} MB", file=sys.stderr)
    except (OSError, SafetensorError) as error:  # safetensors has an error of its own where the disk is full
        raise ValueError(f"out: {config.out!r} was not written: {first_line(error)}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_model(config: ModelConfig, folder: Path) -> None:
    """Writes the model's files into a folder.

    Raises:
        ValueError: The checkpoint is of another layout or broken, a weight is left over on either side, or a key does
            not fit the model.
    """
    path = config.model_path
    published = checkpoint.load_config(path)
    processor = checkpoint.load_processor(config, published)
    with checkpoint.loading(path):
        if published.model_type != "multi_modality":
            raise ValueError(f"model_path {path!r} must be in the published layout, got transformers' own")
        shapes = stored_shapes(path)
        if shapes is None:
            raise ValueError(f"model_path {path!r} has no weights")
        check_depths(depths(published), shapes)
    native: Any = native_config(published, processor)
    check_names(native, shapes, path)

    native.save_pretrained(folder)
    write_processor(processor, config.roles, native.vision_config.image_size, folder)
    text = native.text_config
    tokens = {name: getattr(text, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    images = {"generation_kwargs": {"boi_token_id": processor.image_start_id}, "guidance_scale": 5}  # to generate them
    GenerationConfig(**(tokens | images | config.generation | asdict(config.dola()))).save_pretrained(folder)
    card = (NATIVE / "model_card.md").read_text(encoding="utf-8").replace("MODEL", path)
    (folder / "README.md").write_text(card, encoding="utf-8")
    write_weights(weight_files(path) or [], folder)


def native_config(published: Any, processor: Any) -> JanusConfig:
    """The `JanusConfig` of a model that a `MultiModalityConfig` describes."""
    # With its rms_norm_eps and rope_parameters, and without what a stranger's config.json adds, such as auto_map.
    known = LlamaConfig().to_dict().keys() - {"model_type"}
    text = LlamaConfig(**{key: value for key, value in published.language_config.to_dict().items() if key in known})
    # language_config has LLaMA's ids, with which no answer would end.
    text.bos_token_id, text.eos_token_id = processor.tokenizer.bos_token_id, processor.tokenizer.eos_token_id
    text.pad_token_id = processor.pad_id
    sizes = tower_sizes(**published.vision_config.params)
    parts = ("gen_vision", "aligner", "gen_aligner", "gen_head")
    vq, aligner, gen_aligner, gen_head = (getattr(published, f"{part}_config").params for part in parts)
    return JanusConfig(
        text_config=text,
        vision_config=JanusVisionConfig(
            hidden_size=sizes["width"],
            num_hidden_layers=sizes["layers"],
            num_attention_heads=sizes["heads"],
            mlp_ratio=sizes["mlp_ratio"],
            image_size=sizes["image_size"],
            patch_size=sizes["patch_size"],
            num_image_tokens=processor.num_image_tokens,
            projection_dim=aligner.get("n_embed", text.hidden_size),
            depth=aligner["depth"],
        ),
        vq_config=JanusVQVAEConfig(
            embed_dim=vq["n_embed"],
            num_embeddings=vq["image_token_size"],
            base_channels=vq.get("ch", 128),
            channel_multiplier=list(vq.get("ch_mult", (1, 1, 2, 2, 4))),
            latent_channels=vq.get("z_channels", 256),
            projection_dim=gen_aligner.get("n_embed", text.hidden_size),
            num_hidden_layers=gen_aligner["depth"],
            image_token_embed_dim=gen_head.get("image_token_embed", text.hidden_size),
        ),
        image_token_id=processor.image_id,
        tie_word_embeddings=text.tie_word_embeddings,  # true by default
        dtype=published.dtype,
        architectures=["JanusForConditionalGeneration"],
    )


def check_names(config: JanusConfig, shapes: Mapping[str, tuple[int, ...]], path: str) -> None:
    """Refuses a checkpoint with a weight that the native model has no place for, or without one that it needs.

    Raises:
        ValueError: There is such a weight, or one of another shape; the message names it.
    """
    with torch.device("meta"):
        native = renamed({name: torch.empty(shape) for name, shape in shapes.items()})
    stored = {name: tuple(weight.shape) for name, weight in native.items()}
    names = check_shapes(lambda: JanusForConditionalGeneration(config), stored, path)
    if left := sorted(stored.keys() - names):
        raise ValueError(f"model_path {path!r} has weights that transformers' Janus does not: {', '.join(left[:3])}")


def renamed(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The published weights by their native names: the vision tower's qkv in three, its positions without a batch."""
    native = {}
    for name, weight in weights.items():
        if ".attn_pool." in name or name.endswith(".codebook_used"):  # which inference does not use
            continue
        for pattern, new in RENAMED.items():
            name = re.sub(pattern, new, name)  # type: ignore[call-overload]
        if ".qkv." in name:
            for x, part in zip("qkv", weight.chunk(3), strict=True):
                native[name.replace("qkv", f"{x}_proj")] = part
        else:
            native[name] = weight[0] if name.endswith("position_embedding.weight") else weight
    return native


def write_weights(files: Sequence[str], folder: Path) -> None:
    """Writes the weights of published files under their native names, `SHARD` bytes a file; one of each in memory."""

    def parts() -> Iterator[dict[str, Tensor]]:
        part: dict[str, Tensor] = {}
        for file in files:
            weights = renamed(load_state_dict(file))
            while weights:
                name = next(iter(weights))
                if part and sum(weight.nbytes for weight in part.values()) + weights[name].nbytes > SHARD:
                    yield part
                    part = {}
                part[name] = weights.pop(name)
        yield part

    index: dict[str, list[str]] = {}
    total = 0
    for part in parts():
        total += sum(weight.nbytes for weight in part.values())
        save_file(part, folder / f"{len(index)}.safetensors", metadata={"format": "pt"})
        index[f"{len(index)}.safetensors"] = list(part)
    named: dict[str, str] = {}
    for i, (file, names) in enumerate(index.items(), 1):
        new = "model.safetensors" if len(index) == 1 else f"model-{i:05}-of-{len(index):05}.safetensors"
        (folder / file).rename(folder / new)
        named |= dict.fromkeys(names, new)
    if len(index) > 1:
        write(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": named})


def write_processor(processor: Any, roles: Sequence[str], image_size: int, folder: Path) -> None:
    """Writes tokenizer, chat template and the settings of `JanusProcessor`."""
    tokenizer = processor.tokenizer
    tokenizer.save_pretrained(folder)  # a tokenizer.json that adds the BOS by itself
    file = folder / "tokenizer_config.json"
    names = {"image_token": "image_tag", "boi_token": "image_start_tag", "eoi_token": "image_end_tag"}
    tags = {name: getattr(processor, tag) for name, tag in names.items()}
    own = {"extra_special_tokens": tags, "add_bos_token": tokenizer.add_bos_token, "pad_token": processor.pad_tag}
    saved = json.loads(file.read_text(encoding="utf-8"))
    write(file, {key: saved[key] for key in TOKENIZER_KEYS if key in saved} | tags | own)
    template = (NATIVE / "chat_template.jinja").read_text(encoding="utf-8")
    for default, role in zip(ModelConfig().roles, roles, strict=True):
        template = template.replace(json.dumps(default), json.dumps(role, ensure_ascii=False))
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    settings: dict[str, Any] = {
        name: getattr(processor.image_processor, name)
        for name in ("image_mean", "image_std", "min_size", "rescale_factor", "do_normalize")
    }
    settings |= {"size": {"height": image_size, "width": image_size}, "resample": 3}  # bicubic
    settings["image_processor_type"] = "JanusImageProcessor"
    write(folder / "preprocessor_config.json", settings)
    own = {"processor_class": "JanusProcessor", "num_image_tokens": processor.num_image_tokens}
    write(folder / "processor_config.json", own | {"use_default_system_prompt": False})


def write(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
