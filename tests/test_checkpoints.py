"""Checkpoints in the published layout: loading them in every way, and saving them."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CHECKPOINT, GOLDEN
from helpers import WEIGHTS, copy_without_weights
from helpers import write_checkpoint as write
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from janus.models import MultiModalityCausalLM, MultiModalityConfig, VLChatProcessor
from janus.models.stored_sizes import stored_shapes
from janus.utils.io import load_pretrained_model
from janus_dola.programs import checkpoint
from janus_dola.programs.options import ModelConfig

UNUSED = ("vision_model.vision_tower.attn_pool.latent", "gen_vision_model.quantize.codebook_used")


def logits(model: Any, expected: dict[str, Tensor]) -> Tensor:
    """[B, 512], as golden/README.md has them, but from the embeddings of this model."""
    case = "batch_mixed"
    names = ("input_ids", "pixel_values", "images_seq_mask", "images_emb_mask")
    with torch.no_grad():
        embeds = model.prepare_inputs_embeds(**{name: expected[f"{case}/{name}"] for name in names})
        return model.language_model(
            inputs_embeds=embeds, attention_mask=expected[f"{case}/attention_mask"], logits_to_keep=1
        ).logits[:, -1]


def assert_same_weights(got: Any, want: Any) -> None:
    a, b = got.state_dict(), want.state_dict()
    assert a.keys() == b.keys()
    different = [name for name in a if a[name].dtype != b[name].dtype or not torch.equal(a[name], b[name])]
    assert different == []


@pytest.mark.parametrize(
    ("layout", "auto"),
    [(layout, False) for layout in ("safetensors-1", "safetensors-2", "bin-1", "bin-2")]
    + [("safetensors-2", True), ("bin-1", True)],
)
def test_layouts(model: Any, expected: dict[str, Tensor], tmp_path: Path, layout: str, auto: bool) -> None:
    folder = write(tmp_path, layout, WEIGHTS)
    if auto:
        loaded = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
    else:
        loaded = MultiModalityCausalLM.from_pretrained(str(folder), dtype=torch.float32)
    assert type(loaded) is MultiModalityCausalLM and not loaded.training
    assert_same_weights(loaded, model)
    got = logits(loaded, expected)
    assert torch.equal(got, logits(model, expected))
    torch.testing.assert_close(got, expected["batch_mixed/logits"], atol=1e-3, rtol=0)


def test_state_dict_has_the_published_keys(model: Any) -> None:
    state = model.state_dict()
    assert state.keys() == WEIGHTS.keys() - set(UNUSED) - {name for name in WEIGHTS if ".attn_pool." in name}
    assert {name: value.shape for name, value in state.items()} == {name: WEIGHTS[name].shape for name in state}
    assert all(torch.equal(value, WEIGHTS[name].float()) for name, value in state.items())


class Payload:
    """Unpickling it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_a_pickle_that_runs_code_is_refused(tmp_path: Path) -> None:
    folder, trace = copy_without_weights(tmp_path / "checkpoint"), tmp_path / "ran"
    torch.save({"lm_head.weight": Payload(trace)}, folder / "pytorch_model.bin")
    with pytest.raises((pickle.UnpicklingError, ValueError, OSError, RuntimeError)):
        MultiModalityCausalLM.from_pretrained(folder)
    assert not trace.exists()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, "bfloat16"])
def test_dtype(expected: dict[str, Tensor], dtype: Any) -> None:
    loaded = MultiModalityCausalLM.from_pretrained(CHECKPOINT, dtype=dtype)
    want = torch.bfloat16 if dtype == "bfloat16" else dtype
    assert {value.dtype for value in loaded.state_dict().values()} == {want}
    assert loaded.dtype == want
    got = logits(loaded, expected).float()
    error = (got - expected["batch_mixed/logits"]).norm() / expected["batch_mixed/logits"].norm()
    assert 0 < error < 0.05


def test_attn_implementation(expected: dict[str, Tensor]) -> None:
    results = {}
    for name in ("eager", "sdpa"):
        loaded = MultiModalityCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32, attn_implementation=name)
        assert loaded.language_model.config._attn_implementation == name
        results[name] = logits(loaded, expected)
    torch.testing.assert_close(results["eager"], results["sdpa"], atol=1e-4, rtol=0)
    assert not torch.equal(results["eager"], results["sdpa"])  # really another way to sum up


def test_language_config_as_the_published_demo_passes_it(expected: dict[str, Tensor]) -> None:
    config = AutoConfig.from_pretrained(CHECKPOINT)
    language_config = config.language_config
    language_config._attn_implementation = "eager"
    loaded = AutoModelForCausalLM.from_pretrained(
        CHECKPOINT, language_config=language_config, trust_remote_code=True, dtype=torch.float32
    )
    assert loaded.language_model.config._attn_implementation == "eager"
    assert loaded.language_model.config.num_hidden_layers == 30
    eager = MultiModalityCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32, attn_implementation="eager")
    assert torch.equal(logits(loaded, expected), logits(eager, expected))


@pytest.mark.parametrize("device_map", ["cpu", {"": "cpu"}, "auto"])
def test_device_map(model: Any, expected: dict[str, Tensor], device_map: Any) -> None:
    loaded = MultiModalityCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32, device_map=device_map)
    assert {value.device.type for value in loaded.parameters()} <= {"cpu", "cuda", "mps"}
    if device_map == "auto":
        loaded = loaded.to("cpu") if loaded.device.type != "cpu" else loaded
    assert_same_weights(loaded, model)
    assert torch.equal(logits(loaded, expected), logits(model, expected))


@pytest.mark.parametrize("sharded", [False, True])
def test_save_pretrained(model: Any, expected: dict[str, Tensor], tmp_path: Path, sharded: bool) -> None:
    model.save_pretrained(tmp_path, **({"max_shard_size": "3MB"} if sharded else {}))
    files = sorted(tmp_path.glob("model*.safetensors"))
    assert (len(files) > 1) is sharded
    saved = {name: weight for file in files for name, weight in load_file(file).items()}
    assert saved.keys() == model.state_dict().keys()
    written = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    published = json.loads((CHECKPOINT / "config.json").read_text(encoding="utf-8"))
    parts = [name for name in published if name.endswith("_config")]
    assert published.keys() - {"torch_dtype"} <= written.keys()
    assert written["model_type"] == "multi_modality" and written["architectures"] == ["MultiModalityCausalLM"]
    for name in parts:
        if name == "language_config":
            kept = published[name].keys() - {"torch_dtype"}  # transformers 5 calls it dtype
            assert {key: written[name][key] for key in kept} == {key: published[name][key] for key in kept}
        else:
            assert written[name] == published[name]
    for load in (MultiModalityCausalLM.from_pretrained, AutoModelForCausalLM.from_pretrained):
        loaded = load(tmp_path, dtype=torch.float32)
        assert_same_weights(loaded, model)
        assert torch.equal(logits(loaded, expected), logits(model, expected))


@pytest.mark.parametrize(
    "name", ["language_model.lm_head.weight", "vision_model.vision_tower.pos_embed", "gen_embed.weight"]
)
@pytest.mark.parametrize("auto", [False, True])
def test_a_missing_weight_is_named(tmp_path: Path, name: str, auto: bool) -> None:
    folder = write(tmp_path, "safetensors-1", {key: value for key, value in WEIGHTS.items() if key != name})
    load = AutoModelForCausalLM.from_pretrained if auto else MultiModalityCausalLM.from_pretrained
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        load(folder)


def test_unused_weights_are_silently_fine(model: Any, tmp_path: Path, caplog: Any, capfd: Any) -> None:
    extra = {name: torch.ones(4) for name in UNUSED}
    folder = write(tmp_path, "bin-1", WEIGHTS | extra)
    import transformers

    logger = transformers.utils.logging.get_logger("transformers")
    before = logger.propagate
    logger.propagate = True
    try:
        with caplog.at_level("WARNING", logger="transformers"):
            loaded, info = MultiModalityCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    finally:
        logger.propagate = before
    assert_same_weights(loaded, model)
    assert not info["unexpected_keys"] and not info["missing_keys"]
    said = caplog.text + "".join(capfd.readouterr())
    assert "attn_pool" not in said and "codebook_used" not in said


def test_a_weight_of_the_wrong_shape_is_an_error(tmp_path: Path) -> None:
    name = "gen_head.vision_head.weight"
    folder = write(tmp_path, "safetensors-1", WEIGHTS | {name: torch.zeros(3, 5)})
    with pytest.raises((ValueError, RuntimeError)):
        MultiModalityCausalLM.from_pretrained(folder)


PRO_7B: dict[str, Any] = {  # config.json of deepseek-ai/Janus-Pro-7B: the sizes of the towers are not in it
    "aligner_config": {
        "cls": "MlpProjector",
        "model_type": "aligner",
        "params": {"depth": 2, "input_dim": 1024, "n_embed": 4096, "projector_type": "mlp_gelu"},
    },
    "architectures": ["MultiModalityCausalLM"],
    "gen_aligner_config": {
        "cls": "MlpProjector",
        "model_type": "gen_aligner",
        "params": {"depth": 2, "input_dim": 8, "n_embed": 4096, "projector_type": "mlp_gelu"},
    },
    "gen_head_config": {
        "cls": "vision_head",
        "model_type": "gen_head",
        "params": {"image_token_embed": 4096, "image_token_size": 16384, "n_embed": 4096},
    },
    "gen_vision_config": {
        "cls": "VQ-16",
        "model_type": "gen_vision",
        "params": {"image_token_size": 16384, "n_embed": 8},
    },
    "language_config": {
        "max_position_embeddings": 16384,
        "model_type": "llama",
        "num_hidden_layers": 30,
        "torch_dtype": "bfloat16",
        "vocab_size": 102400,
    },
    "model_type": "multi_modality",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.33.1",
    "vision_config": {
        "cls": "CLIPVisionTower",
        "model_type": "vision",
        "params": {
            "image_size": 384,
            "model_name": "siglip_large_patch16_384",
            "select_feature": "same",
            "select_layer": -1,
        },
    },
}


@pytest.mark.parametrize("bare", [False, True])
def test_absent_keys_take_the_published_sizes(tmp_path: Path, bare: bool) -> None:
    """The published config.json leaves sizes out; one without the parts altogether means the same model."""
    written = {name: value for name, value in PRO_7B.items() if not bare or name in ("model_type", "language_config")}
    (tmp_path / "config.json").write_text(json.dumps(written), encoding="utf-8")
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config) is MultiModalityConfig
    with torch.device("meta"):
        model = MultiModalityCausalLM(config)
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    tower, vq = "vision_model.vision_tower", "gen_vision_model"
    want = {
        f"{tower}.patch_embed.proj.weight": (1024, 3, 16, 16),
        f"{tower}.pos_embed": (1, 576, 1024),
        f"{tower}.blocks.23.attn.qkv.weight": (3072, 1024),
        f"{tower}.blocks.23.mlp.fc1.weight": (4096, 1024),
        f"{tower}.norm.weight": (1024,),
        f"{vq}.encoder.conv_in.weight": (128, 3, 3, 3),
        f"{vq}.encoder.conv_out.weight": (256, 512, 3, 3),
        f"{vq}.encoder.conv_blocks.2.res.0.nin_shortcut.weight": (256, 128, 1, 1),
        f"{vq}.decoder.conv_in.weight": (512, 256, 3, 3),
        f"{vq}.decoder.conv_out.weight": (3, 128, 3, 3),
        f"{vq}.quantize.embedding.weight": (16384, 8),
        f"{vq}.quant_conv.weight": (8, 256, 1, 1),
        f"{vq}.post_quant_conv.weight": (256, 8, 1, 1),
        "aligner.layers.0.weight": (4096, 1024),
        "aligner.layers.2.weight": (4096, 4096),
        "gen_aligner.layers.0.weight": (4096, 8),
        "gen_embed.weight": (16384, 8),
        "gen_head.output_mlp_projector.weight": (4096, 4096),
        "gen_head.vision_head.weight": (16384, 4096),
        "language_model.model.embed_tokens.weight": (102400, 4096),
        "language_model.model.layers.29.mlp.gate_proj.weight": (11008, 4096),
        "language_model.lm_head.weight": (102400, 4096),
    }
    assert {name: shapes.get(name) for name in want} == want
    assert len(model.vision_model.vision_tower.blocks) == 24
    assert model.vision_model.vision_tower.blocks[0].attn.heads == 16
    assert len(model.language_model.model.layers) == 30
    assert config.gen_vision_config.params.n_embed == 8


def test_config_round_trip(tmp_path: Path) -> None:
    config = MultiModalityConfig.from_pretrained(CHECKPOINT)
    params = config.gen_vision_config.params
    assert params.n_embed == 8 and params["image_token_size"] == 64 and params.ch_mult == [1, 1, 1, 1, 2]
    with pytest.raises(AttributeError, match="nothing"):
        params.nothing  # noqa: B018
    config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path, trust_remote_code=True)
    assert type(again) is MultiModalityConfig
    assert again.to_dict() | {"_name_or_path": ""} == config.to_dict() | {"_name_or_path": ""}
    assert again.language_config.hidden_size == config.language_config.hidden_size == 64
    assert again.gen_vision_config.params.ch_mult == [1, 1, 1, 1, 2]
    assert MultiModalityConfig().gen_vision_config.params is not MultiModalityConfig().gen_vision_config.params


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("vision_config", {"cls": "Nothing"}, r"vision_config\.cls must be one of .* got 'Nothing'"),
        ("gen_vision_config", {"cls": "VQ-8"}, r"gen_vision_config\.cls must be one of .* got 'VQ-8'"),
        ("aligner_config", {"params": {"colour": 1}}, r"aligner_config\.params do not fit MlpProjector.*colour"),
        ("aligner_config", {"params": {"projector_type": "cubic"}}, "projector_type must be .* got 'cubic'"),
        ("vision_config", {"params": {"model_name": "resnet"}}, "model_name must be .* got 'resnet'"),
    ],
)
def test_a_config_that_describes_no_model(part: str, change: dict[str, Any], message: str) -> None:
    config = MultiModalityConfig(**{part: change}, language_config={"num_hidden_layers": 1, "vocab_size": 8})
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        MultiModalityCausalLM(config)


def test_prepare_inputs_embeds_leaves_its_inputs_as_they_are(model: Any, expected: dict[str, Tensor]) -> None:
    case = "batch_left_padded"
    names = ("input_ids", "pixel_values", "images_seq_mask", "images_emb_mask")
    inputs = {name: expected[f"{case}/{name}"].clone() for name in names}
    seq_mask = inputs["images_seq_mask"].bool()
    inputs["input_ids"][seq_mask] = -200  # what LLaVA-like code puts there
    inputs["input_ids"][0, 0] = -1  # counts as 0
    before = {name: value.clone() for name, value in inputs.items()}
    with torch.no_grad():
        got = model.prepare_inputs_embeds(**inputs, sft_format=["unused"])
        table = model.get_input_embeddings().weight
    assert all(torch.equal(value, before[name]) for name, value in inputs.items())
    want = expected[f"{case}/inputs_embeds"].clone()
    want[0, 0] = table[0]
    torch.testing.assert_close(got, want, atol=1e-4, rtol=0)
    again = model.prepare_inputs_embeds(**inputs)
    assert again.requires_grad  # nothing is changed in place, so gradients flow as well


def test_prepare_inputs_embeds_refuses_masks_that_disagree(model: Any, expected: dict[str, Tensor]) -> None:
    names = ("input_ids", "pixel_values", "images_seq_mask", "images_emb_mask")
    inputs = {name: expected[f"two_images/{name}"] for name in names}
    inputs["images_emb_mask"] = inputs["images_emb_mask"].clone()
    inputs["images_emb_mask"][0, 0, 0] = 0
    with pytest.raises(ValueError, match=r"images_seq_mask must select .* got 32 and 31"):
        model.prepare_inputs_embeds(**inputs)


def test_load_pretrained_model(model: Any, expected: dict[str, Tensor]) -> None:
    tokenizer, processor, loaded = load_pretrained_model(str(CHECKPOINT), device="cpu")
    assert tokenizer is processor.tokenizer and type(processor) is VLChatProcessor
    assert not loaded.training
    assert_same_weights(loaded, model)  # float32 on a CPU
    half = load_pretrained_model(str(CHECKPOINT), device=torch.device("cpu"), dtype=torch.bfloat16)[2]
    assert half.dtype == torch.bfloat16


MEMORY_CONFIG: dict[str, Any] = {
    **json.loads((CHECKPOINT / "config.json").read_text(encoding="utf-8")),
    "language_config": {
        "hidden_size": 64,
        "intermediate_size": 98304,
        "num_attention_heads": 4,
        "num_hidden_layers": 4,
        "vocab_size": 65536,
        "model_type": "llama",
    },
    "torch_dtype": "bfloat16",
}
MEASURE = """
import gc, re, sys
from pathlib import Path
import torch
from janus.models import MultiModalityCausalLM

def peak():  # unlike ru_maxrss, it does not start from the parent's
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

# The first load imports what loading needs, so that only weights count below.
MultiModalityCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
before = peak()
for folder in sys.argv[2:]:
    model = MultiModalityCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert all(p.view(-1)[::1024].float().sum() > 0 for p in model.parameters())  # touches every page
    size = sum(p.nbytes for p in model.parameters())
    del model
    gc.collect()
    print(peak() - before, size)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_loading_does_not_need_twice_the_weights(tmp_path: Path) -> None:
    """From one file and from pickled shards, one after the other in one process, as importing takes seconds."""
    config = MultiModalityConfig.from_dict(MEMORY_CONFIG)
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in MultiModalityCausalLM(config).state_dict().items()}
    weights = {name: torch.full(shape, 0.01, dtype=torch.bfloat16) for name, shape in shapes.items()}
    folders = [write(tmp_path / layout, layout, weights) for layout in ("safetensors-1", "bin-2")]
    for folder in folders:
        (folder / "config.json").write_text(json.dumps(MEMORY_CONFIG), encoding="utf-8")
    result = subprocess.run(
        [sys.executable, "-c", MEASURE, str(CHECKPOINT), *map(str, folders)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
    )
    assert result.returncode == 0, result.stderr
    measured = [tuple(map(int, line.split())) for line in result.stdout.splitlines()]
    assert len(measured) == 2
    for grown, size in measured:
        assert 150e6 < size < 250e6
        assert 0.5 * size < grown < 1.5 * size, measured


@pytest.mark.parametrize("flag", [{"output_hidden_states": True}, {"output_attentions": True}, {"return_dict": False}])
def test_flags_of_what_a_forward_pass_returns_change_no_answer(
    model: Any, expected: dict[str, Tensor], tmp_path: Path, flag: dict[str, bool]
) -> None:
    """In `language_config` they ended in a KeyError, or in "'tuple' object has no attribute 'last_hidden_state'"."""
    shutil.copytree(CHECKPOINT, tmp_path / "x")
    config = json.loads((tmp_path / "x" / "config.json").read_text())
    config["language_config"] |= flag
    (tmp_path / "x" / "config.json").write_text(json.dumps(config))
    loaded = MultiModalityCausalLM.from_pretrained(tmp_path / "x", dtype=torch.float32).eval()
    case = "batch_left_padded"
    arguments = {name: expected[f"{case}/{name}"] for name in ("inputs_embeds", "attention_mask")}
    answer = loaded.language_model.generate(**arguments, max_new_tokens=8, do_sample=False, pad_token_id=481)
    assert torch.equal(answer, expected[f"{case}/greedy"][:, :8])


def test_config_json_names_the_rotary_embedding_for_transformers_4_too(tmp_path: Path) -> None:
    """Which does not know `rope_parameters`, and would take its own default."""
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}
    for given, scaling in ((rope, rope), ({"rope_type": "default", "rope_theta": 5e5}, None)):
        config = MultiModalityConfig(language_config={"rope_parameters": given})
        config.save_pretrained(tmp_path)
        written = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))["language_config"]
        assert (written["rope_theta"], written.get("rope_scaling")) == (5e5, scaling)
        again = MultiModalityConfig.from_pretrained(tmp_path)
        assert again.language_config.rope_parameters == config.language_config.rope_parameters


HUGE = 10**9
ABSURD: list[tuple[str, dict[str, Any]]] = [
    ("language_config", {"num_hidden_layers": HUGE}),
    *(("language_config", {key: HUGE}) for key in ("vocab_size", "hidden_size", "intermediate_size", "head_dim")),
    ("language_config", {"num_attention_heads": 64, "head_dim": 16}),
    ("language_config", {"num_key_value_heads": HUGE, "head_dim": 16}),
    *(("vision_config", {key: HUGE}) for key in ("layers", "width", "patch_size", "image_size", "mlp_ratio")),
    *(("gen_vision_config", {key: HUGE}) for key in ("image_token_size", "n_embed", "ch", "z_channels")),
    ("gen_vision_config", {"ch_mult": [1, 1, HUGE, 1, 2]}),
    *((part, {key: HUGE}) for part in ("aligner_config", "gen_aligner_config") for key in ("depth", "input_dim")),
    *(("gen_head_config", {key: HUGE}) for key in ("image_token_size", "image_token_embed", "n_embed")),
]


SHAPE = r"has [\w.]+ in the shape \[[\d, ]+\], but its config\.json describes \[|describes no model that can be built"


def build_on_meta_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    build = MultiModalityCausalLM.__init__

    def on_meta(self: Any, *args: Any) -> None:
        assert torch.get_default_device().type == "meta"
        build(self, *args)

    monkeypatch.setattr(MultiModalityCausalLM, "__init__", on_meta)


@pytest.fixture(scope="module")
def layouts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("layouts")
    names = ("safetensors-1", "safetensors-2", "bin-1", "bin-2")
    return {layout: write(folder / layout, layout, WEIGHTS) for layout in names}


@pytest.mark.parametrize(
    ("part", "change"), ABSURD, ids=lambda value: next(iter(value)) if isinstance(value, dict) else value
)
def test_a_config_that_describes_more_than_is_stored(
    layouts: dict[str, Path], monkeypatch: pytest.MonkeyPatch, part: str, change: dict[str, Any]
) -> None:
    """Nothing is built that takes memory, of which, or of patience, the end would be seen first.

    A number of layers and a shape are held against every layout, by each class; the others against one.
    """
    build_on_meta_alone(monkeypatch)
    key, value = next(iter(change.items()))
    deep = key in ("num_hidden_layers", "layers", "depth")
    message = rf"config\.json: {part}\.(params\.)?{key} must be at most .* got {value}$" if deep else SHAPE
    every = (part, key) in (("language_config", "num_hidden_layers"), ("language_config", "vocab_size"))
    for folder in layouts.values() if every else [layouts["safetensors-1"]]:
        written = json.loads((CHECKPOINT / "config.json").read_text(encoding="utf-8"))
        written[part] |= change if part == "language_config" else {"params": written[part]["params"] | change}
        (folder / "config.json").write_text(json.dumps(written), encoding="utf-8")
        for cls in (MultiModalityCausalLM, AutoModelForCausalLM) if every else [MultiModalityCausalLM]:
            with pytest.raises(ValueError, match=message):
                cls.from_pretrained(folder)


def test_a_huge_part_without_weights_is_refused_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would be filled with random numbers before it was refused."""
    build_on_meta_alone(monkeypatch)
    name = "gen_vision_model.quantize.embedding.weight"
    folder = write(tmp_path, "safetensors-1", {key: value for key, value in WEIGHTS.items() if key != name})
    with pytest.raises(ValueError, match=f"lacks the weights {name}; a Janus checkpoint has all the weights"):
        MultiModalityCausalLM.from_pretrained(folder)


def test_a_part_that_uses_fewer_layers_than_are_stored_loads(tmp_path: Path) -> None:
    """`select_layer` leaves the last blocks out, of the model and then of what it saves."""
    folder = write(tmp_path / "whole", "safetensors-1", WEIGHTS)
    written = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    written["vision_config"]["params"]["select_layer"] = -2
    (folder / "config.json").write_text(json.dumps(written), encoding="utf-8")
    model = MultiModalityCausalLM.from_pretrained(folder)
    model.save_pretrained(tmp_path / "saved")
    again = MultiModalityCausalLM.from_pretrained(tmp_path / "saved")
    assert len(again.vision_model.vision_tower.blocks) == written["vision_config"]["params"]["layers"] - 1
    assert_same_weights(again, model)


def test_shapes_are_read_without_the_weights(layouts: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a pickle, too: mapped into memory, of which nothing is read."""
    want = {name: tuple(weight.shape) for name, weight in WEIGHTS.items()}
    read: list[Any] = []
    load = torch.load
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: read.append(kwargs) or load(*args, **kwargs))
    assert all(stored_shapes(str(folder)) == want for folder in layouts.values())
    assert len(read) == 3 and all(kwargs["mmap"] and kwargs["weights_only"] for kwargs in read)
    assert stored_shapes(str(GOLDEN)) is None


def test_a_small_model_runs_on_one_thread_unless_the_environment_says_otherwise(monkeypatch: Any) -> None:
    chosen: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)  # whoever runs the tests keeps theirs
    config = LlamaConfig(vocab_size=102_400, hidden_size=2048, intermediate_size=5632, num_hidden_layers=24)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    with torch.device("meta"):
        checkpoint.choose_threads(LlamaForCausalLM(config))  # Janus-Pro-1B's decoder
    assert chosen == []
    checkpoint.load(ModelConfig(model_path=str(CHECKPOINT), device="cpu"))
    assert chosen == [1]
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    checkpoint.choose_threads(torch.nn.Linear(64, 64))
    assert chosen == [1]
