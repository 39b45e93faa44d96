"""Any transformers model that generates, whose get_decoder() has .layers and .norm, against a float64 oracle.

Tiny models with random weights, large enough that the layers disagree; left-padded batches of two.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from decoders import ALPHA, GREEDY, IDS, LAYERS, MASK, TEXT, Case, N, V, all_logits, one_thread, unchanged
from oracle import Recorder, assert_scores, oracle_scores
from torch import Tensor, nn
from transformers import LogitsProcessorList

from janus_dola import DoLaConfig, DoLaJanusWrapper

__all__ = ["one_thread"]  # a fixture

V4 = int(transformers.__version__.split(".")[0]) < 5
IMAGE = 90  # the id of the placeholder that an image's features take
VISION: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
    "initializer_range": 0.3,
}
WITH_IMAGE = torch.tensor([[0, 0, 0, 1, *[IMAGE] * 4, 9, 10], [1, 20, *[IMAGE] * 4, 25, 26, 27, 28]])


def capped(logits: Tensor) -> Tensor:
    """Gemma's softcapping, with the models' own number below: logits of size 2 are bent a lot."""
    return torch.tanh(logits / 1.5) * 1.5


def config_of(name: str, **values: Any) -> Any:
    """A config of that class; a transformers that does not have it skips the test."""
    if getattr(transformers, name, None) is None:
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    return getattr(transformers, name)(**values)


def text_only(name: str, after_head: Callable[[Tensor], Tensor] = unchanged, **values: Any) -> Case:
    config = config_of(values.pop("config_class", f"{name}Config"), **TEXT | values)
    return Case(getattr(transformers, f"{name}ForCausalLM")(config), {"input_ids": IDS}, after_head)


def gemma(name: str, **values: Any) -> Case:
    sizes = {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 4, "final_logit_softcapping": 1.5}
    return text_only(name, capped, **sizes, **values)


def llava(tower: str) -> Case:
    """CLIP has a class token, which Llava leaves out; SigLIP has none."""
    config = config_of(
        "LlavaConfig",
        vision_config=config_of(f"{tower}VisionConfig", **VISION),
        text_config=config_of("LlamaConfig", **TEXT),
        image_token_index=IMAGE,
        image_seq_length=4,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default" if tower == "CLIP" else "full",
    )
    model = transformers.LlavaForConditionalGeneration(config)
    # What Llava has of its own, and CLIP's and SigLIP's embeddings, do not follow initializer_range.
    return Case(model, {"input_ids": WITH_IMAGE, "pixel_values": torch.randn(2, 3, 8, 8)}, unchanged)


def qwen2_vl() -> Case:
    vision = {"depth": 2, "embed_dim": 16, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4, "spatial_merge_size": 2}
    text = TEXT | {"rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}}
    special = {"image_token_id": IMAGE, "video_token_id": 91, "vision_start_token_id": 92, "vision_end_token_id": 93}
    vision |= {"hidden_size": TEXT["hidden_size"]}
    if V4:
        config = config_of("Qwen2VLConfig", vision_config=vision, **text, **special)
    else:
        config = config_of("Qwen2VLConfig", vision_config=vision, text_config=text, **special)
    ids = WITH_IMAGE.clone()
    ids[0, 3], ids[1, 1] = 92, 92  # the token ahead of each image
    # 4 x 4 patches of 3 colours x 2 frames x 4 x 4, merged by 2 x 2 to the 4 placeholders
    prompt = {"input_ids": ids, "pixel_values": torch.randn(32, 96), "image_grid_thw": torch.tensor([[1, 4, 4]] * 2)}
    if not V4:
        prompt["mm_token_type_ids"] = (ids == IMAGE).int()
    return Case(transformers.Qwen2VLForConditionalGeneration(config), prompt, unchanged)


def native_janus() -> Case:
    """transformers' own, whose generate drops a caller's processors in text mode."""
    vision = VISION | {"projection_dim": TEXT["hidden_size"], "depth": 2, "mlp_ratio": 1.5, "num_image_tokens": 4}
    vq = {"embed_dim": 4, "num_embeddings": 8, "base_channels": 32, "channel_multiplier": [1, 1], "num_patches": 2}
    vq |= {"latent_channels": 4, "projection_dim": TEXT["hidden_size"], "image_token_embed_dim": TEXT["hidden_size"]}
    config = config_of(
        "JanusConfig",
        text_config=config_of("LlamaConfig", **TEXT),
        vision_config=config_of("JanusVisionConfig", **vision),
        vq_config=config_of("JanusVQVAEConfig", num_hidden_layers=2, **vq),
        image_token_id=IMAGE,
    )
    prompt = {"input_ids": WITH_IMAGE, "pixel_values": torch.randn(2, 3, 8, 8)}
    return Case(transformers.JanusForConditionalGeneration(config), prompt, unchanged)


BUILD: dict[str, Callable[[], Case]] = {
    "Llama": lambda: text_only("Llama"),
    "Mistral": lambda: text_only("Mistral", sliding_window=4),
    "Qwen2": lambda: text_only("Qwen2", tie_word_embeddings=True),
    "Qwen3": lambda: text_only("Qwen3", head_dim=8),
    "Gemma2": lambda: gemma("Gemma2"),
    "Gemma3": lambda: gemma("Gemma3", config_class="Gemma3TextConfig", sliding_window_pattern=2),
    "Cohere": lambda: text_only("Cohere", lambda logits: logits * 0.25, logit_scale=0.25),
    "Granite": lambda: text_only("Granite", lambda logits: logits / 4, logits_scaling=4.0),
    "Llava-CLIP": lambda: llava("CLIP"),
    "Llava-SigLIP": lambda: llava("Siglip"),
    "Qwen2-VL": qwen2_vl,
    "Janus": native_janus,
}


@cache
def case(name: str) -> Case:
    """Shared by the tests: DoLa changes nothing on a model."""
    torch.manual_seed(0)
    built = BUILD[name]()
    for parameter in built.model.parameters():  # those that the model's own initialization leaves out, or small
        if parameter.ndim > 1 and parameter.std() < 0.1:
            nn.init.normal_(parameter, std=0.3)
    return built._replace(model=built.model.eval())


@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize("name", BUILD)
def test_each_step_is_the_oracles(name: str, num_beams: int) -> None:
    given = case(name)
    if num_beams > 1 and name == "Qwen2-VL" and V4:
        pytest.skip("transformers 4.48 itself gives the beams wrong images")
    recorder = Recorder()
    output = DoLaJanusWrapper(given.model, DoLaConfig(candidate_layers=LAYERS, alpha=ALPHA)).generate(
        **given.prompt,
        attention_mask=MASK,
        **GREEDY,
        num_beams=num_beams,
        logits_processor=LogitsProcessorList([recorder]),
        return_dict_in_generate=True,
        output_scores=True,
    )
    assert len(output.scores) == len(recorder.input_ids) == 5
    for tokens, got in zip(recorder.input_ids, output.scores, strict=True):
        logits = all_logits(given, tokens)
        assert_scores(got, oracle_scores(logits, logits[:, -1], LAYERS, ALPHA))
    if num_beams == 1:
        chosen = torch.stack([scores.argmax(-1) for scores in output.scores], 1)
        assert torch.equal(output.sequences, torch.cat([given.prompt["input_ids"], chosen], 1))


@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize("name", BUILD)
def test_without_dola_it_is_the_models_own_generate(name: str, num_beams: int) -> None:
    given = case(name)
    arguments = given.prompt | GREEDY | {"attention_mask": MASK, "num_beams": num_beams}
    arguments |= {"return_dict_in_generate": True, "output_scores": True}
    got = DoLaJanusWrapper(given.model, DoLaConfig(use_dola_lm=False)).generate(**arguments)
    want = given.model.generate(**arguments)
    assert torch.equal(got.sequences, want.sequences)
    assert len(got.scores) == 5
    assert all(torch.equal(a, b) for a, b in zip(got.scores, want.scores, strict=True))
    on = DoLaJanusWrapper(given.model, DoLaConfig(candidate_layers=LAYERS, alpha=ALPHA)).generate(**arguments)
    assert not torch.equal(got.scores[0], on.scores[0])


def text_logits(given: Case, ids: Tensor, mask: Tensor) -> np.ndarray:
    """Logits of every layer at every position, [rows, T, N, V] in float64, of text alone."""
    model = given.model
    with torch.no_grad():
        hidden = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=(mask.cumsum(-1) - 1).clamp(min=0),
            use_cache=False,
            output_hidden_states=True,
        ).hidden_states
        norm, head = model.get_decoder().norm, model.get_output_embeddings()
        exits = [head(norm(h)) for h in hidden[1:N]] + [head(hidden[N])]
        return given.after_head(torch.stack(exits, 2)).double().numpy()


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("name", BUILD)
def test_score_is_the_oracles(name: str, shared: bool) -> None:
    """Of a prompt for each continuation, and of one prompt for both, which is run once and cached."""
    given = case(name)
    prompt, mask = (IDS[1:], MASK[1:]) if shared else (IDS, MASK)
    continuation = torch.tensor([[30, 31, 32, 33], [40, 41, 42, 0]])
    known = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
    # What a model remembers of its own calls must not disturb: Qwen2-VL, the positions of two rows.
    given.model.generate(**given.prompt, attention_mask=MASK, **GREEDY)
    wrapper = DoLaJanusWrapper(given.model, DoLaConfig(candidate_layers=LAYERS, alpha=0.001))
    got = wrapper.score(input_ids=prompt, attention_mask=mask, continuation_ids=continuation, continuation_mask=known)
    ids = torch.cat([prompt.expand(2, -1), continuation], 1)
    logits = text_logits(given, ids, torch.cat([mask.expand(2, -1), known], 1))
    for t in range(4):
        at = logits[:, prompt.shape[1] - 1 + t]  # [rows, N, V]
        log_p = oracle_scores(at, at[:, -1], LAYERS, 0.001)[[0, 1], continuation[:, t]]
        want = np.where(np.isneginf(log_p), -1000, log_p) * known[:, t].numpy()
        np.testing.assert_allclose(got[:, t].numpy(), want, atol=1e-4)
    assert ((got > -1000) & (got < 0)).any()  # not all outside V_head


def small(name: str, **values: Any) -> Any:
    torch.manual_seed(0)
    kind = getattr(transformers, name)
    return kind(kind.config_class(vocab_size=V, pad_token_id=0, bos_token_id=1, eos_token_id=2, **values))


DECODER = "model must be a decoder alone, no encoder, whose get_decoder() has .layers and .norm, and have a head; got "
GENERATES = "model must be or hold a transformers model that generates, got "


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: small("T5ForConditionalGeneration", d_model=16, d_kv=8, d_ff=24, num_layers=4, num_heads=2),
            DECODER + "T5ForConditionalGeneration",
        ),
        (lambda: small("GPT2LMHeadModel", n_embd=16, n_layer=4, n_head=2), DECODER + "GPT2LMHeadModel"),
        (lambda: case("Llama").model.model, GENERATES + "LlamaModel"),
        (lambda: nn.Linear(2, 2), GENERATES + "Linear"),
        (lambda: transformers.LlamaForCausalLM, GENERATES + "type"),
        (lambda: None, GENERATES + "NoneType"),
    ],
    ids=["encoder and decoder", "no .layers", "base model", "any module", "a class", "no module"],
)
def test_other_models_are_refused(build: Callable[[], Any], message: str) -> None:
    """When they are wrapped, and not in the first call."""
    with pytest.raises(ValueError) as refusal:
        DoLaJanusWrapper(build())
    assert str(refusal.value) == message
