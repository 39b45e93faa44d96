"""The golden checkpoint answers what the published code answered for it: see golden/README.md."""

import dataclasses
from collections.abc import Callable, Iterator
from threading import Thread
from typing import Any

import numpy as np
import pytest
import torch
from conftest import CASES, CHECKPOINT, EOS, GOLDEN
from PIL import Image
from stand_in import StandIn
from torch import Tensor
from transformers import TextIteratorStreamer

from janus.image_generation import build_prompt, generate_images
from janus.models import MultiModalityCausalLM, VLChatProcessor
from janus.utils.io import load_pil_images
from janus_dola import DoLaConfig, DoLaJanusWrapper

EXPECTED = GOLDEN / "expected"
PARTS = {
    "input_ids",
    "attention_mask",
    "images_seq_mask",
    "images_emb_mask",
    "pixel_values",
    "inputs_embeds",
    "logits",
    "hidden_last",
    "last_layer_pre_norm",
    "greedy",
    "beam4",
    "greedy_rep13",
}
T2I_PARTS = {"prompt_ids", "prompt_embeds", "cfg_logits", "tokens", "decoded"}


@pytest.fixture
def two_threads() -> Iterator[None]:
    """The golden data was computed in two threads; sums are split among them, so rounding depends on their number."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def reference() -> Any:
    """transformers' own LLaMA with the golden weights: whether this machine rounds as the golden one did."""
    return StandIn().eval().language_model


def prepare(processor: Any, case: str) -> Any:
    """The case as `VLChatProcessor` makes it, from its conversations."""
    prepared = []
    for conversation in CASES[case]["conversations"]:
        turns = [
            turn | {"images": [str(EXPECTED / image) for image in turn["images"]]} if "images" in turn else turn
            for turn in conversation
        ]
        images = load_pil_images(turns)
        prepared.append(processor(conversations=turns, images=images, force_batchify=False))
    return processor.batchify(prepared)


def assert_tokens(got: Tensor, want: Tensor) -> None:
    """The same tokens; the stored ones are padded with EOS to their greatest length."""
    assert got.shape[0] == want.shape[0] and got.shape[1] <= want.shape[1]
    padded = torch.nn.functional.pad(got, (0, want.shape[1] - got.shape[1]), value=EOS)
    assert padded.tolist() == want.tolist()


def test_every_tensor_is_looked_at(expected: dict[str, Tensor]) -> None:
    want = {f"{case}/{part}" for case in CASES for part in PARTS} | {f"t2i/{part}" for part in T2I_PARTS}
    assert set(expected) == want


@pytest.mark.parametrize("case", CASES)
def test_processor(processor: Any, expected: dict[str, Tensor], case: str) -> None:
    batch = prepare(processor, case)
    assert batch.sft_format == CASES[case]["sft_format"]
    for name in ("input_ids", "attention_mask", "images_seq_mask", "images_emb_mask"):
        assert batch[name].tolist() == expected[f"{case}/{name}"].to(batch[name].dtype).tolist()
    assert batch.images_seq_mask.dtype == batch.images_emb_mask.dtype == torch.bool
    torch.testing.assert_close(batch.pixel_values, expected[f"{case}/pixel_values"], atol=1e-6, rtol=0)


@pytest.mark.parametrize("case", CASES)
def test_embeddings(model: Any, processor: Any, expected: dict[str, Tensor], case: str) -> None:
    with torch.no_grad():
        got = model.prepare_inputs_embeds(**prepare(processor, case))
    torch.testing.assert_close(got, expected[f"{case}/inputs_embeds"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("case", CASES)
def test_forward_pass(model: Any, reference: Any, expected: dict[str, Tensor], two_threads: None, case: str) -> None:
    """Exactly golden on the processors that the golden data was computed on, which others round away from."""
    inputs = {name: expected[f"{case}/{name}"] for name in ("inputs_embeds", "attention_mask")}
    with torch.no_grad():
        plain = reference(**inputs).logits[:, -1]
    before_norm: list[Tensor] = []
    handle = model.language_model.model.norm.register_forward_pre_hook(lambda _, args: before_norm.append(args[0]))
    try:
        with torch.no_grad():
            output = model.language_model(**inputs, output_hidden_states=True)
    finally:
        handle.remove()
    got = {
        "logits": output.logits[:, -1],
        "hidden_last": torch.stack([h[:, -1] for h in output.hidden_states], 1),  # [B, 31, 64]
        "last_layer_pre_norm": before_norm[0][:, -1],
    }
    for name, value in got.items():
        want = expected[f"{case}/{name}"]
        if torch.equal(plain, expected[f"{case}/logits"]):
            assert torch.equal(value, want), (name, (value - want).abs().max())
        torch.testing.assert_close(value, want, atol=2e-5, rtol=0)
    assert torch.equal(got["logits"], plain)
    # Entry 30 is after the final norm, entry 29 and those below are not.
    normed = model.language_model.model.norm(expected[f"{case}/last_layer_pre_norm"])
    torch.testing.assert_close(got["hidden_last"][:, 30], normed, atol=2e-5, rtol=0)


@pytest.mark.parametrize("case", CASES)
def test_answers(model: Any, processor: Any, expected: dict[str, Tensor], case: str) -> None:
    """From the conversation to the text, all of it ours."""
    batch = prepare(processor, case)
    with torch.no_grad():
        inputs_embeds = model.prepare_inputs_embeds(**batch)
    arguments = {
        "inputs_embeds": inputs_embeds,
        "attention_mask": batch.attention_mask,
        "do_sample": False,
        "bos_token_id": processor.tokenizer.bos_token_id,
        "eos_token_id": processor.tokenizer.eos_token_id,
        "pad_token_id": processor.tokenizer.eos_token_id,
    }
    greedy = model.language_model.generate(**arguments, max_new_tokens=24)
    assert_tokens(greedy, expected[f"{case}/greedy"])
    assert processor.tokenizer.batch_decode(greedy, skip_special_tokens=True) == CASES[case]["greedy_text"]
    beams = model.language_model.generate(**arguments, max_new_tokens=12, num_beams=4)
    assert_tokens(beams, expected[f"{case}/beam4"])
    wrapper = DoLaJanusWrapper(model, DoLaConfig(use_dola_lm=False))
    penalised = wrapper.generate(**arguments, max_new_tokens=24, repetition_penalty=1.3)
    assert_tokens(penalised, expected[f"{case}/greedy_rep13"])


PROMPT = "<|User|>: A red circle\n\n<|Assistant|>:<begin_of_image>"
SIZES = {"parallel_size": 2, "image_token_num_per_image": 16, "img_size": 64, "patch_size": 16}


def test_text_to_image_prompt(model: Any, processor: Any, expected: dict[str, Tensor]) -> None:
    assert build_prompt(processor, "A red circle") == PROMPT
    ids = processor.tokenizer.encode(PROMPT)
    assert ids == expected["t2i/prompt_ids"].tolist()
    seen: list[Tensor] = []

    def see(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        seen.append(kwargs["inputs_embeds"])

    handle = model.language_model.model.register_forward_pre_hook(see, with_kwargs=True)
    try:
        generate_images(model, processor, PROMPT, temperature=0, **SIZES)
    finally:
        handle.remove()
    torch.testing.assert_close(seen[0], expected["t2i/prompt_embeds"], atol=1e-4, rtol=0)
    assert [embeds.shape[1] for embeds in seen] == [12] + [1] * 15  # cached


@pytest.mark.parametrize("wrapped", [False, True])
def test_text_to_image(model: Any, processor: Any, expected: dict[str, Tensor], wrapped: bool) -> None:
    """Through a wrapped model as well: DoLa is for text alone."""
    logits: list[Tensor] = []
    decoded: list[Tensor] = []
    handle = model.gen_head.register_forward_hook(lambda module, args, output: logits.append(output))
    decoder = model.gen_vision_model.decoder
    handles = [handle, decoder.register_forward_hook(lambda module, args, output: decoded.append(output))]
    subject = DoLaJanusWrapper(model, DoLaConfig(use_dola_lm=True)) if wrapped else model
    try:
        tokens, images = generate_images(subject, processor, PROMPT, temperature=0, cfg_weight=5, **SIZES)
    finally:
        for handle in handles:
            handle.remove()
    assert tokens.tolist() == expected["t2i/tokens"].tolist()
    rows = torch.stack(logits, 1)  # [4, 16, 64], conditional and unconditional in turn
    guided = rows[1::2] + 5 * (rows[0::2] - rows[1::2])
    torch.testing.assert_close(guided, expected["t2i/cfg_logits"], atol=1e-4, rtol=0)
    torch.testing.assert_close(decoded[0], expected["t2i/decoded"], atol=1e-4, rtol=0)
    want = ((expected["t2i/decoded"] + 1) / 2 * 255).clamp(0, 255).permute(0, 2, 3, 1).numpy()
    assert images.dtype == np.uint8
    assert np.abs(images.astype(float) - np.floor(want)).max() <= 1  # 1e-4 may cross from one value to the next
    assert (images == want.astype(np.uint8)).mean() > 0.99


def test_text_to_image_draws_from_the_guided_distribution(model: Any, processor: Any) -> None:
    """The temperature divides the guided logits, and the generator given is the one that is drawn from."""
    state = torch.get_rng_state()
    draws = [
        generate_images(model, processor, PROMPT, 0.7, generator=torch.Generator().manual_seed(seed), **SIZES)[0]
        for seed in (3, 3, 4)
    ]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    assert torch.equal(torch.get_rng_state(), state)
    cold = generate_images(model, processor, PROMPT, 1e-4, generator=torch.Generator().manual_seed(0), **SIZES)[0]
    assert torch.equal(cold, generate_images(model, processor, PROMPT, 0, **SIZES)[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": -1.0}, "temperature must be at least 0, got -1.0"),
        ({"image_token_num_per_image": 15}, "image_token_num_per_image must be .* = 16, got 15"),
    ],
)
def test_text_to_image_refuses(model: Any, processor: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate_images(model, processor, PROMPT, **(SIZES | arguments))


def test_decode_code_is_decode_of_the_quantised_features(model: Any, expected: dict[str, Tensor]) -> None:
    vq = model.gen_vision_model
    images = expected["batch_left_padded/pixel_values"][:, 0]  # [3, 3, 64, 64]
    with torch.no_grad():
        quantised, _, (_, _, codes) = vq.encode(images)
        want = vq.decode(quantised)
        features = torch.nn.functional.normalize(vq.quant_conv(vq.encoder(images)), dim=1)
    assert quantised.shape == (3, 8, 4, 4) and codes.shape == (48,)
    # The nearest code by distance, an independent way to the one of the largest product.
    flat = features.permute(0, 2, 3, 1).reshape(-1, 8)
    codebook = torch.nn.functional.normalize(vq.quantize.embedding.weight.detach(), dim=-1)
    assert torch.equal(codes, torch.cdist(flat.double(), codebook.double()).argmin(-1))
    assert len(codes.unique()) > 1
    with torch.no_grad():
        for got in (
            vq.decode_code(codes, shape=[3, 8, 4, 4]),
            vq.decode_code(codes.view(3, 16).int(), shape=[3, 8, 4, 4]),
            vq.decode_code(codes, shape=[3, 4, 4, 8], channel_first=False),
            vq.decode_code(codes.view(3, 4, 4)),
            vq(images)[0],
        ):
            torch.testing.assert_close(got, want, atol=1e-4, rtol=0)


def understand(
    model_path: Any, question: str, image: str, wrap: Callable[[Any], Any] = lambda vl_gpt: vl_gpt
) -> tuple[Any, Any, str]:
    """The published README's snippet for understanding, but for `.cuda()`, the number of new tokens, and `wrap`."""
    from transformers import AutoModelForCausalLM

    from janus.models import MultiModalityCausalLM, VLChatProcessor
    from janus.utils.io import load_pil_images

    vl_chat_processor: VLChatProcessor = VLChatProcessor.from_pretrained(model_path)
    tokenizer = vl_chat_processor.tokenizer
    vl_gpt: MultiModalityCausalLM = AutoModelForCausalLM.from_pretrained(model_path, trust_remote_code=True)
    vl_gpt = vl_gpt.to(torch.bfloat16).eval()
    vl_gpt = wrap(vl_gpt)
    conversation = [
        {"role": "<|User|>", "content": f"<image_placeholder>\n{question}", "images": [image]},
        {"role": "<|Assistant|>", "content": ""},
    ]
    pil_images = load_pil_images(conversation)
    prepare_inputs = vl_chat_processor(conversations=conversation, images=pil_images, force_batchify=True).to(
        vl_gpt.device
    )
    inputs_embeds = vl_gpt.prepare_inputs_embeds(**prepare_inputs)
    outputs = vl_gpt.language_model.generate(
        inputs_embeds=inputs_embeds,
        attention_mask=prepare_inputs.attention_mask,
        pad_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        max_new_tokens=24,
        do_sample=False,
        use_cache=True,
    )
    answer = tokenizer.decode(outputs[0].cpu().tolist(), skip_special_tokens=True)
    return inputs_embeds, outputs, f"{prepare_inputs['sft_format'][0]} {answer}"


def test_published_snippet_for_understanding(expected: dict[str, Tensor]) -> None:
    case = "single_wide"
    embeds, outputs, text = understand(CHECKPOINT, "What is in the image?", str(EXPECTED / "images" / "wide.png"))
    assert embeds.dtype == torch.bfloat16
    want = expected[f"{case}/inputs_embeds"]
    assert (embeds.float() - want).norm() < 0.02 * want.norm()  # bfloat16 keeps 8 bits
    assert outputs[0, :2].tolist() == expected[f"{case}/greedy"][0, :2].tolist()
    assert text.startswith(CASES[case]["sft_format"][0] + " ")


def test_published_snippet_with_one_line_more_gets_dola(expected: dict[str, Tensor]) -> None:
    """`vl_gpt = DoLaJanusWrapper(vl_gpt)`; before, `vl_gpt.language_model.generate` went round DoLa without a word."""
    ask = CHECKPOINT, "What is in the image?", str(EXPECTED / "images" / "wide.png")
    _, plain, _ = understand(*ask)
    config = DoLaConfig(alpha=0.3, bucket_id=0)
    embeds, outputs, _ = understand(*ask, lambda vl_gpt: DoLaJanusWrapper(vl_gpt, config))
    _, off, _ = understand(*ask, lambda vl_gpt: DoLaJanusWrapper(vl_gpt, DoLaConfig(use_dola_lm=False)))
    # Cast as the snippet casts it: on some CPUs a product in bfloat16 depends on where the weights lie in memory.
    model = MultiModalityCausalLM.from_pretrained(CHECKPOINT).to(torch.bfloat16).eval()
    mask = torch.ones(embeds.shape[:2], dtype=torch.long)
    want = DoLaJanusWrapper(model, config).generate_with_dola(
        inputs_embeds=embeds, attention_mask=mask, max_new_tokens=24, eos_token_id=EOS, pad_token_id=EOS
    )
    assert torch.equal(outputs, want)
    assert torch.equal(off, plain) and not torch.equal(outputs, plain)


def chat(vl_gpt: Any, vl_chat_processor: Any, history: list[tuple[str, str]], question: str, image: Any) -> str:
    """A turn of a conversation, streamed: what the published demo and its serving code do, but for `.cuda()`."""
    tokenizer = vl_chat_processor.tokenizer
    conversation: list[dict[str, Any]] = []
    for asked, answered in [*history, (question, "")]:
        conversation += [{"role": "<|User|>", "content": asked}, {"role": "<|Assistant|>", "content": answered}]
    conversation[0] |= {"content": f"<image_placeholder>\n{conversation[0]['content']}", "images": [image]}
    prepare_inputs = vl_chat_processor(conversations=conversation, images=[image], force_batchify=True).to(
        vl_gpt.device, dtype=torch.float32
    )
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True, timeout=60)
    generation_config = {
        "inputs_embeds": vl_gpt.prepare_inputs_embeds(**prepare_inputs),
        "attention_mask": prepare_inputs.attention_mask,
        "pad_token_id": tokenizer.eos_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "max_new_tokens": 12,
        "do_sample": False,
        "use_cache": True,
        "streamer": streamer,
    }
    thread = Thread(target=vl_gpt.language_model.generate, kwargs=generation_config)
    thread.start()
    text = "".join(streamer)
    thread.join()
    return text


def test_a_streamed_conversation_gets_dola(model: Any, processor: Any) -> None:
    image = Image.open(EXPECTED / "images" / "wide.png").convert("RGB")
    answers = {}
    for use_dola_lm in (True, False):
        wrapper = DoLaJanusWrapper(model, DoLaConfig(alpha=0.3, bucket_id=0, use_dola_lm=use_dola_lm))
        history: list[tuple[str, str]] = []
        for question in ("What is it?", "And where?"):
            history.append((question, chat(wrapper, processor, history, question, image)))
        answers[use_dola_lm] = [answer for _, answer in history]
        again = chat(wrapper, processor, history[:1], "And where?", image)
        assert again == answers[use_dola_lm][1]  # the conversation, not the wrapper, holds the turns
    plain = chat(model, processor, [], "What is it?", image)
    assert answers[False][0] == plain != answers[True][0]


@torch.inference_mode()
def paint(
    mmgpt: Any,
    vl_chat_processor: Any,
    prompt: str,
    temperature: float = 1,
    parallel_size: int = 16,
    cfg_weight: float = 5,
    image_token_num_per_image: int = 576,
    img_size: int = 384,
    patch_size: int = 16,
) -> tuple[Tensor, np.ndarray]:
    """The published README's `generate`, but for `.cuda()` and the files it writes."""
    input_ids = vl_chat_processor.tokenizer.encode(prompt)
    input_ids = torch.LongTensor(input_ids)
    tokens = torch.zeros((parallel_size * 2, len(input_ids)), dtype=torch.int)
    for i in range(parallel_size * 2):
        tokens[i, :] = input_ids
        if i % 2 != 0:
            tokens[i, 1:-1] = vl_chat_processor.pad_id
    inputs_embeds = mmgpt.language_model.get_input_embeddings()(tokens)
    generated_tokens = torch.zeros((parallel_size, image_token_num_per_image), dtype=torch.int)
    for i in range(image_token_num_per_image):
        outputs = mmgpt.language_model.model(
            inputs_embeds=inputs_embeds,
            use_cache=True,
            past_key_values=outputs.past_key_values if i != 0 else None,  # noqa: F821
        )
        hidden_states = outputs.last_hidden_state
        logits = mmgpt.gen_head(hidden_states[:, -1, :])
        logit_cond = logits[0::2, :]
        logit_uncond = logits[1::2, :]
        logits = logit_uncond + cfg_weight * (logit_cond - logit_uncond)
        probs = torch.softmax(logits / temperature, dim=-1)
        next_token = torch.multinomial(probs, num_samples=1)
        generated_tokens[:, i] = next_token.squeeze(dim=-1)
        next_token = torch.cat([next_token.unsqueeze(dim=1), next_token.unsqueeze(dim=1)], dim=1).view(-1)
        img_embeds = mmgpt.prepare_gen_img_embeds(next_token)
        inputs_embeds = img_embeds.unsqueeze(dim=1)
    dec = mmgpt.gen_vision_model.decode_code(
        generated_tokens.to(dtype=torch.int), shape=[parallel_size, 8, img_size // patch_size, img_size // patch_size]
    )
    dec = dec.to(torch.float32).cpu().numpy().transpose(0, 2, 3, 1)
    dec = np.clip((dec + 1) / 2 * 255, 0, 255)
    visual_img = np.zeros((parallel_size, img_size, img_size, 3), dtype=np.uint8)
    visual_img[:, :, :] = dec
    return generated_tokens, visual_img


def test_published_snippet_for_text_to_image(tmp_path: Any) -> None:
    from transformers import AutoModelForCausalLM

    processor = VLChatProcessor.from_pretrained(CHECKPOINT)
    model = AutoModelForCausalLM.from_pretrained(CHECKPOINT, trust_remote_code=True).to(torch.bfloat16).eval()
    conversation = [{"role": "<|User|>", "content": "A red circle"}, {"role": "<|Assistant|>", "content": ""}]
    sft_format = processor.apply_sft_template_for_multi_turn_prompts(
        conversations=conversation, sft_format=processor.sft_format, system_prompt=""
    )
    prompt = sft_format + processor.image_start_tag
    assert prompt == PROMPT
    torch.manual_seed(0)
    want_tokens, want_images = paint(model, processor, prompt, **SIZES)
    torch.manual_seed(0)
    tokens, images = paint(DoLaJanusWrapper(model), processor, prompt, **SIZES)  # images are what they were
    assert torch.equal(tokens, want_tokens) and np.array_equal(images, want_images)
    # Our function is that loop: the same draws from the same seed, in the published dtype.
    torch.manual_seed(0)
    tokens, images = generate_images(model, processor, prompt, **SIZES)
    assert tokens.tolist() == want_tokens.tolist()
    assert np.array_equal(images, want_images)
    Image.fromarray(images[0]).save(tmp_path / "img_0.jpg")
    assert Image.open(tmp_path / "img_0.jpg").size == (64, 64)


def test_published_loop_in_float32_is_golden(model: Any, processor: Any, expected: dict[str, Tensor]) -> None:
    """Cold enough, the published loop takes the most likely token."""
    tokens, images = paint(model, processor, PROMPT, temperature=1e-4, **SIZES)
    assert tokens.tolist() == expected["t2i/tokens"].tolist()
    want = ((expected["t2i/decoded"] + 1) / 2 * 255).clamp(0, 255).permute(0, 2, 3, 1).numpy()
    assert np.abs(images.astype(float) - np.floor(want)).max() <= 1


def test_outputs_are_dataclasses(processor: Any) -> None:
    """Published code reads the output by attribute, by key and as `**output`."""
    batch = prepare(processor, "batch_mixed")
    assert dataclasses.is_dataclass(batch)
    assert dict(**batch).keys() == {field.name for field in dataclasses.fields(batch)}
    assert batch["input_ids"] is batch.input_ids


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"img_size": 70}, "img_size must be a positive multiple of patch_size 16, got 70"),
        (
            {"img_size": 0, "image_token_num_per_image": 0},
            "img_size must be a positive multiple of patch_size 16, got 0",
        ),
        ({"patch_size": 8, "image_token_num_per_image": 64}, "patch_size must be 16, the pixels of a token in this"),
        (
            {"image_token_num_per_image": 15},
            r"image_token_num_per_image must be \(img_size // patch_size\) \*\* 2 = 16",
        ),
        ({"parallel_size": 0}, "parallel_size must be at least 1, got 0"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(
    model: MultiModalityCausalLM, processor: VLChatProcessor, change: dict[str, int], message: str
) -> None:
    """Images came out in other sizes than asked, or PyTorch could not reshape."""
    with pytest.raises(ValueError, match=message):
        generate_images(model, processor, build_prompt(processor, "a cat"), **(SIZES | change))
