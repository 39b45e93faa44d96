"""The Janus model: vision tower, image tokenizer and LLaMA text decoder (`janus/models/modeling_vlm.py`)."""

import copy
from collections.abc import Mapping
from typing import Any, ClassVar

import transformers
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PretrainedConfig
from transformers.modeling_utils import PreTrainedModel

from janus.models.projector import MlpProjector
from janus.models.siglip_vit import CLIPVisionTower, VisionTransformer
from janus.models.stored_sizes import check_depths, check_shapes, depths, reading, refuse, stored_shapes
from janus.models.vq_model import VQ_models, VQModel


class Params(dict):
    """A dict whose keys read as attributes too: published code reads `config.gen_vision_config.params.n_embed`."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class ComponentConfig(PretrainedConfig):
    """A part of the model: `cls`, its class by name, `params`, that class's arguments, and the part's `model_type`."""

    def __init__(
        self, cls: str = "", params: dict[str, Any] | None = None, model_type: str = "", **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.cls = cls
        self.params = Params(params or {})
        self.model_type = model_type  # type: ignore[misc]  # a class variable in transformers; here, each part has its own

    def to_dict(self) -> dict[str, Any]:
        """The published keys; transformers would add its own to each part, and write an empty `model_type`."""
        written = {"cls": self.cls, "model_type": self.model_type, "params": copy.deepcopy(dict(self.params))}
        return written | {"transformers_version": transformers.__version__}  # which the whole takes out again


class MultiModalityConfig(PretrainedConfig):
    """Configuration of `MultiModalityCausalLM`. A part that `config.json` leaves out takes the published sizes.

    Args:
        vision_config, aligner_config, gen_vision_config, gen_aligner_config, gen_head_config: A dict with `cls` and
            `params`, or a `ComponentConfig`.
        language_config: A dict, or a `LlamaConfig`.
    """

    model_type = "multi_modality"
    sub_configs = {"language_config": LlamaConfig}
    # The class of each part, and those of its arguments that the published checkpoints share.
    components: ClassVar[dict[str, tuple[str, dict[str, Any]]]] = {
        "vision_config": ("CLIPVisionTower", {}),
        "aligner_config": ("MlpProjector", {"projector_type": "mlp_gelu", "depth": 2}),
        "gen_vision_config": ("VQ-16", {"image_token_size": 16384, "n_embed": 8}),
        "gen_aligner_config": ("MlpProjector", {"projector_type": "mlp_gelu", "depth": 2, "input_dim": 8}),
        "gen_head_config": ("vision_head", {"image_token_size": 16384}),
    }

    def __init__(self, language_config: dict[str, Any] | LlamaConfig | None = None, **kwargs: Any) -> None:
        given = {name: kwargs.pop(name, None) or {} for name in self.components}
        if not isinstance(language_config, LlamaConfig):
            language_config = LlamaConfig(**(language_config or {}))
        # These shape what a forward pass returns, not what the model is, and generate expects the usual.
        language_config.return_dict = True
        language_config.output_hidden_states = language_config.output_attentions = False
        self.language_config = language_config
        for name, (cls, params) in self.components.items():
            config = given[name]
            if not isinstance(config, ComponentConfig):
                config = ComponentConfig(**({"cls": cls, "model_type": name.removesuffix("_config")} | config))
            config.params = Params(params | config.params)
            setattr(self, name, config)
        super().__init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As `PretrainedConfig.from_dict`, except that a part that is not a mapping is an error; so is no text decoder.

        Raises:
            ValueError: `language_config` is missing (LLaMA's default has 7 billion weights), or a part not a mapping.
                Or it is JanusFlow's, another model under the same `model_type`.
        """
        if "vision_und_enc_config" in config_dict:
            raise ValueError("config.json: vision_und_enc_config is JanusFlow's, and JanusFlow is not supported")
        for name in ("language_config", *cls.components):
            part = config_dict.get(name, None if name == "language_config" else {})
            if not isinstance(part, (Mapping, PretrainedConfig)):
                raise ValueError(f"config.json: {name} must be a mapping, got {part!r}")
        return super().from_dict(config_dict, **kwargs)

    def get_text_config(self, *args: Any, **kwargs: Any) -> LlamaConfig:
        return self.language_config

    def to_dict(self) -> dict[str, Any]:
        """As `PretrainedConfig.to_dict`, with the rotary embedding under transformers 4's names as well."""
        written = super().to_dict()
        rope = written["language_config"]["rope_parameters"]
        written["language_config"]["rope_theta"] = rope["rope_theta"]
        if rope["rope_type"] != "default":
            written["language_config"]["rope_scaling"] = rope
        return written


class VisionHead(nn.Module):
    """Hidden states of an image position to logits over the image tokens.

    Args:
        n_embed: Width of the language model.
        image_token_embed: Width between the two layers.
        image_token_size: Number of image tokens.
    """

    def __init__(self, n_embed: int, image_token_embed: int, image_token_size: int) -> None:
        super().__init__()
        self.output_mlp_projector = nn.Linear(n_embed, image_token_embed)
        self.vision_activation = nn.GELU()
        self.vision_head = nn.Linear(image_token_embed, image_token_size)

    def forward(self, x: Tensor) -> Tensor:  # [..., n_embed] -> [..., image_token_size]
        return self.vision_head(self.vision_activation(self.output_mlp_projector(x)))


COMPONENTS = {"CLIPVisionTower": CLIPVisionTower, "MlpProjector": MlpProjector, "vision_head": VisionHead}


def build_component(name: str, config: ComponentConfig, **defaults: Any) -> nn.Module:
    """The module that `config` describes, `defaults` standing in for what it leaves out.

    Raises:
        ValueError: `config.cls` is unknown, or `config.params` are not that class's.
    """
    if config.cls not in COMPONENTS:
        raise ValueError(f"{name}.cls must be one of {sorted(COMPONENTS)}, got {config.cls!r}")
    try:
        return COMPONENTS[config.cls](**(defaults | config.params))
    except TypeError as error:
        raise ValueError(f"{name}.params do not fit {config.cls}: {error}; got {dict(config.params)}") from error


class MultiModalityPreTrainedModel(PreTrainedModel):
    config_class = MultiModalityConfig
    base_model_prefix = "multi_modality"
    _no_split_modules = ["LlamaDecoderLayer", "Block", "Level"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    # In the published checkpoints, and unused in inference.
    _keys_to_ignore_on_load_unexpected = [
        r"vision_model\.vision_tower\.attn_pool\.",
        r"gen_vision_model\.quantize\.codebook_used",
    ]

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, VisionTransformer):
            nn.init.trunc_normal_(module.pos_embed, std=0.02)


class MultiModalityCausalLM(MultiModalityPreTrainedModel):
    """Janus: images in through `vision_model` and `aligner`, images out through `gen_*`, text by `language_model`."""

    def __init__(self, config: MultiModalityConfig) -> None:
        super().__init__(config)
        width = config.language_config.hidden_size
        self.vision_model = build_component("vision_config", config.vision_config)
        self.aligner = build_component("aligner_config", config.aligner_config, input_dim=1024, n_embed=width)

        gen_vision = dict(config.gen_vision_config.params)
        codes, code_width = gen_vision.pop("image_token_size"), gen_vision.pop("n_embed")
        if config.gen_vision_config.cls not in VQ_models:
            raise ValueError(
                f"gen_vision_config.cls must be one of {sorted(VQ_models)}, got {config.gen_vision_config.cls!r}"
            )
        self.gen_vision_model: VQModel = VQ_models[config.gen_vision_config.cls](
            codebook_size=codes, codebook_embed_dim=code_width, **gen_vision
        )
        self.gen_aligner = build_component("gen_aligner_config", config.gen_aligner_config, n_embed=width)
        self.gen_head = build_component(
            "gen_head_config", config.gen_head_config, n_embed=width, image_token_embed=width
        )
        self.gen_embed = nn.Embedding(codes, code_width)
        self.language_model = LlamaForCausalLM(config.language_config)
        self.post_init()

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *args: Any, output_loading_info: bool = False, **kwargs: Any
    ) -> Any:
        """As `PreTrainedModel.from_pretrained`, except that a missing weight is an error, not a random tensor.

        Raises:
            ValueError: The checkpoint lacks a weight, or has one of another shape; the message names it. Or config.json
                describes more layers or wider ones than are stored, and nothing has been built. Or its files are
                broken, or pickles of more than tensors, which are never run.
        """
        mismatched = kwargs.pop("ignore_mismatched_sizes", False)
        kwargs["ignore_mismatched_sizes"] = True  # transformers' error does not name the weight
        path = str(pretrained_model_name_or_path)
        with reading(path):
            cls._check_stored(pretrained_model_name_or_path, kwargs, shapes=not mismatched)
            loaded: Any = super().from_pretrained(
                pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs
            )
        model, info = loaded
        refuse(path, info["missing_keys"], () if mismatched else info["mismatched_keys"])
        return (model, info) if output_loading_info else model

    @classmethod
    def _check_stored(cls, path: Any, arguments: Mapping[str, Any], shapes: bool) -> None:
        """Compares config.json with the files, except where the arguments say that other weights are loaded."""
        if path is None or arguments.keys() & {"state_dict", "variant", "use_safetensors", "gguf_file", "key_mapping"}:
            return
        names = ("cache_dir", "revision", "subfolder", "token", "local_files_only")
        hub = {name: arguments[name] for name in names if name in arguments}
        config = arguments.get("config") or path
        if not isinstance(config, PretrainedConfig):
            config = cls.config_class.from_pretrained(config, **hub)
        quantized = getattr(config, "quantization_config", None) is not None
        if (stored := stored_shapes(str(path), quantized, **hub)) is None:
            return
        check_depths(depths(config), stored)
        if shapes:
            check_shapes(lambda: cls(config), stored, str(path), renamed=quantized)

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    # So that resize_token_embeddings changes the head as well, and peft finds what a CAUSAL_LM has.

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.language_model.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.language_model.set_output_embeddings(new_embeddings)

    @classmethod
    def can_generate(cls) -> bool:
        """The language model within generates; transformers would guess otherwise from the next method, and warn."""
        return False

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> Any:
        language_model: Any = self.language_model
        return language_model.prepare_inputs_for_generation(*args, **kwargs)

    def prepare_inputs_embeds(
        self,
        input_ids: Tensor,
        pixel_values: Tensor,
        images_seq_mask: Tensor,
        images_emb_mask: Tensor,
        **kwargs: Any,
    ) -> Tensor:
        """Embeds a prompt, image features in place of the image tokens. The arguments are left as they are.

        Args:
            input_ids: int64 [B, T]; negative ids count as 0.
            pixel_values: float [B, n_images, 3, H, W].
            images_seq_mask: bool [B, T], True at the image tokens.
            images_emb_mask: bool [B, n_images, n_image_tokens], True at the features to use.
            kwargs: The rest of `VLChatProcessor`'s output, unused.

        Returns:
            [B, T, D] in the model's dtype.

        Raises:
            ValueError: The images are not of the vision tower's size, or the masks select different numbers of
                positions.
        """
        S = self.config.vision_config.params.get("image_size", 384)
        if pixel_values.ndim != 5 or pixel_values.shape[2:] != (3, S, S):
            raise ValueError(
                f"pixel_values must be of shape [B, n_images, 3, {S}, {S}], got {list(pixel_values.shape)}"
            )
        images = pixel_values.flatten(0, 1).to(next(self.vision_model.parameters()).dtype)  # [B * n_images, 3, H, W]
        image_embeds = self.aligner(self.vision_model(images))  # [B * n_images, n_image_tokens, D]
        inputs_embeds = self.get_input_embeddings()(input_ids.clamp(min=0))  # [B, T, D]
        if images_emb_mask.shape != (*pixel_values.shape[:2], image_embeds.shape[1]):
            raise ValueError(
                f"images_emb_mask must be of shape {[*pixel_values.shape[:2], image_embeds.shape[1]]}, "
                f"got {list(images_emb_mask.shape)}: does num_image_tokens of the processor fit the vision tower?"
            )
        if images_seq_mask.shape != input_ids.shape:
            raise ValueError(
                f"images_seq_mask must be of input_ids' shape {list(input_ids.shape)}, "
                f"got {list(images_seq_mask.shape)}"
            )
        image_embeds = image_embeds[images_emb_mask.flatten(0, 1).bool()].to(inputs_embeds)
        positions = images_seq_mask.bool().nonzero(as_tuple=True)
        if len(positions[0]) != len(image_embeds):
            raise ValueError(
                f"images_seq_mask must select as many positions as images_emb_mask, got {len(positions[0])} and "
                f"{len(image_embeds)}"
            )
        return inputs_embeds.index_put(positions, image_embeds)

    def prepare_gen_img_embeds(self, image_ids: Tensor) -> Tensor:
        """Embeds generated image tokens, int [...], as inputs [..., D] of the language model."""
        return self.gen_aligner(self.gen_embed(image_ids))


AutoConfig.register("multi_modality", MultiModalityConfig, exist_ok=True)
AutoModelForCausalLM.register(MultiModalityConfig, MultiModalityCausalLM, exist_ok=True)
