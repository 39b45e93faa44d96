"""Janus in vLLM: prompts and pixels are the published processor's, answers the wrapper's."""

import json
import shutil
import subprocess
import sys
from copy import deepcopy
from itertools import product
from typing import Any

import pytest
import torch
from engines import janus, new_folder, run, serve
from janus_requests import IMAGES, QUESTIONS, prepare, published, wanted
from PIL import Image
from safetensors.torch import save_file
from transformers import JanusForConditionalGeneration
from vllm import SamplingParams
from vllm.lora.request import LoRARequest

from janus_dola import DoLaConfig

KEYS: list[dict[str, Any]] = [
    {"use_dola_lm": False},
    {},
    {"candidate_layers": [24, 26], "alpha": 0.3},
    {"method": "deco", "candidate_layers": [22, 28]},
    {"method": "sled", "candidate_layers": [22, 26]},
]


@pytest.fixture(scope="module")
def llm() -> Any:
    return serve(janus()[1], max_num_batched_tokens=48, block_size=32, limit_mm_per_prompt={"image": 4})


def chat(llm: Any, questions: list[Any], params: list[SamplingParams], loras: Any = None) -> list[Any]:
    conversations = [
        [
            {
                "role": "user",
                "content": [
                    *({"type": "image_pil", "image_pil": image} for image in images),
                    {"type": "text", "text": question},
                ],
            }
        ]
        for question, images in questions
    ]
    return llm.chat(conversations, params, use_tqdm=False, lora_request=loras)


def params(keys: dict[str, Any]) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=16, logprobs=0, ignore_eos=True, extra_args=keys or None)


def test_answers_are_the_wrappers(llm: Any) -> None:
    """Pictures, several, none, and some that come again; all configurations in one batch; prompts in chunks."""
    asked = list(product(QUESTIONS, KEYS))
    outputs = chat(llm, [question for question, _ in asked], [params(keys) for _, keys in asked])
    for (question, keys), output in zip(asked, outputs, strict=True):
        inputs, want = wanted(*question, DoLaConfig(**keys))
        assert output.prompt_token_ids == inputs.input_ids[0].tolist()
        (completion,) = output.outputs
        assert list(completion.token_ids) == want.sequences[0].tolist()
        got = [each[x].logprob for x, each in zip(completion.token_ids, completion.logprobs, strict=True)]
        log_p = [torch.log_softmax(s[0], -1)[x] for s, x in zip(want.scores, completion.token_ids, strict=True)]
        torch.testing.assert_close(torch.tensor(got), torch.stack(log_p), atol=1e-4, rtol=0)
    assert len({tuple(output.outputs[0].token_ids) for output in outputs}) > len(QUESTIONS)


def test_pixels_are_the_published_processors(llm: Any) -> None:
    pixels = llm.llm_engine.renderer.mm_processor.info.images()(IMAGES)["pixel_values"]
    for image, got in zip(IMAGES, pixels, strict=True):
        assert torch.equal(got, prepare("What?", [image]).pixel_values[0, 0])


def test_a_bad_picture_is_refused_and_the_next_is_right(llm: Any) -> None:
    (want,) = chat(llm, QUESTIONS[:1], [params({})])
    with pytest.raises(ValueError, match="images must have at least one pixel, got one of 0x5"):
        chat(llm, [("What?", [Image.new("RGB", (0, 5))])], [params({})])
    (got,) = chat(llm, QUESTIONS[:1], [params({})])
    assert got.outputs[0].token_ids == want.outputs[0].token_ids


def test_the_wrapper_is_not_needed_to_run(llm: Any) -> None:
    """A prompt of tokens alone, as a completion."""
    ids = prepare(*QUESTIONS[2]).input_ids[0].tolist()
    (want,) = chat(llm, QUESTIONS[2:3], [params({})])
    (got,) = run(llm, [({"prompt_token_ids": ids}, params({}))])
    assert got.outputs[0].token_ids == want.outputs[0].token_ids


# From here on engines of their own: when one of them goes, it closes the process groups of the one above.


def test_bfloat16_from_weights_in_shards() -> None:
    """Log p̂ of the first token is float32's, about: later ones follow other tokens, now and then."""
    shutil.copytree(janus()[1], folder := new_folder() / "shards")
    (folder / "model.safetensors").unlink()
    JanusForConditionalGeneration.from_pretrained(janus()[1]).save_pretrained(folder, max_shard_size="1MB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    llm = serve(folder, dtype="bfloat16", limit_mm_per_prompt={"image": 4})
    asked = list(product(QUESTIONS, KEYS))
    outputs = chat(llm, [question for question, _ in asked], [params(keys) for _, keys in asked])
    for (question, keys), output in zip(asked, outputs, strict=True):
        log_p = torch.log_softmax(wanted(*question, DoLaConfig(**keys))[1].scores[0][0], -1)
        token = output.outputs[0].token_ids[0]
        assert abs(output.outputs[0].logprobs[0][token].logprob - log_p[token]) < 0.3
        assert len(output.outputs[0].token_ids) == 16


def test_lora_on_the_decoder() -> None:
    """Requests with an adapter and without in one batch: as the wrapper on merged weights, and on the model's own."""
    torch.manual_seed(0)
    adapted, weights, names = deepcopy(published()), {}, ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")
    for i, layer in enumerate(adapted.language_model.model.layers):
        for name in names:
            weight = layer.get_submodule(name).weight.data
            a, b = torch.randn(8, weight.shape[1]) / 8, torch.randn(weight.shape[0], 8) / 32
            weight += 2 * b @ a
            key = f"base_model.model.model.language_model.layers.{i}.{name}"
            weights |= {f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b}
    save_file(weights, (folder := new_folder()) / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": [name.split(".")[1] for name in names]}
    (folder / "adapter_config.json").write_text(json.dumps(settings), encoding="utf-8")
    # vLLM's CPU kernels take the last place's adapter for a request without one: here there is none in it.
    lora = {"enable_lora": True, "max_lora_rank": 8, "max_loras": 2}
    llm = serve(janus()[1], limit_mm_per_prompt={"image": 4}, **lora)
    loras = [None, LoRARequest("adapter", 1, str(folder))]
    asked = list(product(QUESTIONS[:2], KEYS, loras))
    outputs = chat(llm, [each[0] for each in asked], [params(each[1]) for each in asked], [each[2] for each in asked])
    for (question, keys, lora), output in zip(asked, outputs, strict=True):
        model = published() if lora is None else adapted
        want = wanted(*question, DoLaConfig(**keys), model)[1].sequences[0].tolist()
        assert list(output.outputs[0].token_ids) == want


def test_the_published_layout_is_refused() -> None:
    """In a process of its own: here our janus has told transformers what that layout is."""
    published = str(janus()[0])
    code = "import sys; from vllm import LLM; LLM(sys.argv[1])"
    failed = subprocess.run([sys.executable, "-c", code, published], capture_output=True, text=True, timeout=120)
    assert "janus-dola export out=FOLDER model_path=... writes the folder to serve" in failed.stderr
