"""Checkpoints in the layout of transformers' own Janus answer as those of the published layout do."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CHECKPOINT, GOLDEN, Fails, export
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    JanusForConditionalGeneration,
    JanusProcessor,
    LogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SuppressTokensLogitsProcessor,
)
from transformers.models.janus.processing_janus import DEFAULT_SYSTEM_PROMPT

from janus.models import MultiModalityCausalLM, VLChatProcessor
from janus_dola import DoLaConfig, DoLaJanusWrapper, DoLaTrace
from janus_dola.programs import answer as answer_program
from janus_dola.programs import calibrate, checkpoint
from janus_dola.programs.options import ModelConfig
from janus_dola.programs.prompts import build_conversation

pytestmark = pytest.mark.usefixtures("loaded_once")

DEMO = Path(__file__).parents[1] / "demo" / "checkpoint"
IMAGES = DEMO.parent / "images"
QUESTIONS = {"wide.png": "Describe the image.", "scene.png": "Is there a red circle in the image?"}
SHORT = {"max_new_tokens": 40, "do_sample": False}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(DEMO, tmp_path_factory.mktemp("native") / "demo")


@pytest.fixture(scope="module")
def loaded(folder: Path) -> Any:
    return JanusForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)


@pytest.fixture(scope="module")
def native(loaded: Any) -> Any:
    return loaded[0].eval()


@pytest.fixture(scope="module")
def published() -> Any:
    return MultiModalityCausalLM.from_pretrained(DEMO, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def images() -> list[Image.Image]:
    return [Image.open(IMAGES / name).convert("RGB") for name in QUESTIONS]


@pytest.fixture(scope="module")
def inputs(folder: Path, images: list[Image.Image]) -> Any:
    """A left-padded batch of two by transformers' own processor."""
    asked = [f"<|User|>: <image_placeholder>\n{question}\n\n<|Assistant|>:" for question in QUESTIONS.values()]
    texts = [DEFAULT_SYSTEM_PROMPT + text for text in asked]
    return JanusProcessor.from_pretrained(folder)(text=texts, images=images, padding=True, return_tensors="pt")


@pytest.fixture(scope="module")
def batch(images: list[Image.Image]) -> Any:
    """The same by ours."""
    processor = VLChatProcessor.from_pretrained(DEMO)
    roles = ("<|User|>", "<|Assistant|>")
    return processor.batchify(
        [
            processor.process_one(conversations=build_conversation(roles, question, [name]), images=[image])
            for (name, question), image in zip(QUESTIONS.items(), images, strict=True)
        ]
    )


def test_every_weight_has_its_place_and_the_logits_are_equal(loaded: Any, native: Any, published: Any) -> None:
    assert not any(loaded[1].values()), loaded[1]
    assert native.lm_head.weight is not native.get_input_embeddings().weight
    ids = torch.randint(466, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        torch.testing.assert_close(
            native(input_ids=ids).logits, published.language_model(ids).logits, atol=1e-5, rtol=0
        )


@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize("use_dola_lm", [False, True])
def test_wrapped_it_answers_as_the_published_layout(
    native: Any, published: Any, inputs: Any, batch: Any, use_dola_lm: bool, num_beams: int
) -> None:
    T = inputs.input_ids.shape[1]
    assert inputs.input_ids.equal(batch.input_ids) and inputs.attention_mask.equal(batch.attention_mask)
    assert (inputs.attention_mask == 0).any()
    config, arguments = DoLaConfig(use_dola_lm=use_dola_lm), SHORT | {"num_beams": num_beams}
    traces = [DoLaTrace() if use_dola_lm else None for _ in range(2)]
    ids = DoLaJanusWrapper(native, config).generate(**inputs, **arguments, trace=traces[0])
    with torch.inference_mode():
        embeds = published.prepare_inputs_embeds(**batch)
    end = {"eos_token_id": native.generation_config.eos_token_id, "pad_token_id": native.generation_config.pad_token_id}
    expected = DoLaJanusWrapper(published, config).generate(
        inputs_embeds=embeds, attention_mask=batch.attention_mask, **end, **arguments, trace=traces[1]
    )
    assert ids[:, T:].equal(expected) and ids[:, :T].equal(inputs.input_ids)
    if traces[0] is not None and traces[1] is not None:
        assert traces[0].layers.equal(traces[1].layers)
        assert not expected.equal(
            published.language_model.generate(inputs_embeds=embeds, attention_mask=batch.attention_mask, **end, **SHORT)
        )


@pytest.mark.parametrize("do_sample", [False, True])
def test_images_are_generated_as_without_the_wrapper(native: Any, folder: Path, do_sample: bool) -> None:
    processor = JanusProcessor.from_pretrained(folder)
    texts = ["<|User|>: a red circle\n\n<|Assistant|>:", "<|User|>: two blue squares and a ring\n\n<|Assistant|>:"]
    inputs = processor(text=texts, generation_mode="image", padding=True, return_tensors="pt")
    assert (inputs.input_ids[:, -1] == native.generation_config.generation_kwargs["boi_token_id"]).all()
    codes = []
    for model in (native, DoLaJanusWrapper(native, DoLaConfig(alpha=0.5, bucket_id=0))):
        torch.manual_seed(0)
        codes.append(model.generate(**inputs, generation_mode="image", do_sample=do_sample))
    assert codes[0].shape == (2, 16) and codes[0].unique().numel() > 1
    assert codes[0].equal(codes[1])
    assert native.decode_image_tokens(codes[1]).shape[0] == 2


@pytest.mark.parametrize("use_dola_lm", [False, True])
def test_penalties_and_processors_of_the_caller_are_honoured(native: Any, inputs: Any, use_dola_lm: bool) -> None:
    wrapper = DoLaJanusWrapper(native, DoLaConfig(use_dola_lm=use_dola_lm))
    few = SHORT | {"max_new_tokens": 20}
    plain = wrapper.generate(**inputs, **few)
    first = plain[:, inputs.input_ids.shape[1]].unique().tolist()  # of the answers
    pairs: list[tuple[dict[str, Any], LogitsProcessor]] = [
        ({"repetition_penalty": 3.0}, RepetitionPenaltyLogitsProcessor(3.0)),
        ({"suppress_tokens": first}, SuppressTokensLogitsProcessor(first)),
    ]
    for argument, processor in pairs:
        ids = wrapper.generate(**inputs, **few, **argument)
        assert not ids.equal(plain)
        # transformers' own generate would drop the processor
        assert ids.equal(wrapper.generate(**inputs, **few, logits_processor=[processor]))
        if not use_dola_lm:
            assert ids.equal(native.generate(**inputs, **few, **argument))


# The command lines.


def run(capsys: Any, model_path: Path, *arguments: str) -> str:
    answer_program.run([f"model_path={model_path}", "device=cpu", "generation.max_new_tokens=40", *arguments])
    return re.sub(r"0\.\d+ seconds", "seconds", capsys.readouterr().out)


def test_the_command_line_answers_as_with_the_published_layout(capsys: Any, folder: Path) -> None:
    turns = [
        {"content": "<image_placeholder>\nDescribe the image.", "images": [str(IMAGES / "wide.png")]},
        {"content": "There are four shapes."},
        {"content": "<image_placeholder>\nHow many shapes are there?", "images": [str(IMAGES / "two.png")]},
    ]
    few = "generation.max_new_tokens=12"
    for arguments in (
        [f"image={IMAGES / 'habit.png'}", "question=Describe the image.", "compare=true"],
        ["conversation=" + json.dumps(turns), "generation.num_beams=2", "generation.repetition_penalty=1.2", few],
        ["question=How many shapes are there?", "generation.do_sample=true", "generation.temperature=2.0", few],
    ):
        out = run(capsys, DEMO, *arguments)
        assert run(capsys, folder, *arguments) == out
        if "compare=true" in arguments:
            assert len(set(re.findall("DoLa o.. +(.*)", out))) == 2  # it is not one answer twice


def test_the_batch_run_and_calibration_do_so_too(capsys: Any, folder: Path, tmp_path: Path) -> None:
    asked = [{"images": [str(IMAGES / name)], "question": question} for name, question in QUESTIONS.items()]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in asked))
    answers = ["There are three shapes. In the top", "No, there is no red circle in the image."]
    lines = [line | {"answer": answer} for line, answer in zip(asked, answers, strict=True)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    outputs, few = [], "generation.max_new_tokens=12"
    for name, model_path in (("published", DEMO), ("native", folder)):
        output = tmp_path / f"{name}.jsonl"
        given = [f"prompts={tmp_path / 'prompts.jsonl'}", f"output={output}", "compare=true", few]
        run(capsys, model_path, *given)
        common = [f"model_path={model_path}", "device=cpu", few]
        calibrate.run([*common, f"data={tmp_path / 'data.jsonl'}", f"output={tmp_path / name}.yaml"])
        results = json.loads((tmp_path / f"{name}.json").read_text())["table"]
        outputs.append((output.read_text(), results))
    assert outputs[0][0] == outputs[1][0] and "shapes" in outputs[0][0]
    for name, row in outputs[0][1].items():
        assert outputs[1][1][name].pop("logprob") == pytest.approx(row.pop("logprob"), abs=1e-5)
        assert outputs[1][1][name] == row


@pytest.mark.parametrize("published_path", [DEMO, CHECKPOINT], ids=["demo", "golden"])
@pytest.mark.parametrize("saved_by", ["export", "transformers"])
def test_ids_and_pixels_are_those_of_the_published_layout(tmp_path: Path, published_path: Path, saved_by: str) -> None:
    """By our processor, which cuts the sizes of images as the published one does, where JanusProcessor rounds them."""
    folder = export(published_path, tmp_path / "native")
    theirs = JanusProcessor.from_pretrained(folder)
    if saved_by == "transformers":  # which puts the image settings into processor_config.json
        for file in ("preprocessor_config.json", "processor_config.json", "tokenizer_config.json", "tokenizer.json"):
            (folder / file).unlink()
        theirs.save_pretrained(folder)
        assert not (folder / "preprocessor_config.json").exists()
    ours = checkpoint.load_processor(ModelConfig(model_path=str(folder)), checkpoint.load_config(str(folder)))
    expected = VLChatProcessor.from_pretrained(published_path)
    images = [Image.open(file).convert("RGB") for file in sorted((GOLDEN / "expected" / "images").iterdir())]
    turns = build_conversation(["<|User|>", "<|Assistant|>"], "Is it a  ring? 中文", [""] * len(images))
    given, wanted = (processor(conversations=turns, images=images) for processor in (ours, expected))
    assert given.input_ids.equal(wanted.input_ids) and given.input_ids[0, 0] == ours.tokenizer.bos_token_id
    assert given.pixel_values.equal(wanted.pixel_values)
    assert given.images_seq_mask.equal(wanted.images_seq_mask) and given.images_emb_mask.equal(wanted.images_emb_mask)
    assert (ours.tokenizer.eos_token_id, ours.pad_id) == (expected.tokenizer.eos_token_id, expected.pad_id)
    rounded = theirs.image_processor(images, return_tensors="pt")["pixel_values"]  # [n_images, 3, H, W]
    assert torch.allclose(rounded, wanted.pixel_values[0], atol=1e-5) == (published_path == CHECKPOINT)
    assert theirs(text="Hi").input_ids[0][0] == ours.tokenizer.bos_token_id


@pytest.mark.parametrize(
    ("change", "arguments", "message"),
    [
        ("", ["candidate_layers=[31]"], "candidate_layers must be in 1...30, the model's layers, got 31"),
        (
            "",
            ["generation.pad_token_id=475"],
            "pad_token_id must be a token id or a list of them, below 475, the model's vocabulary",
        ),
        ("model_type", [], "has no model_type multi_modality or janus"),
        ("text_config", [], "config.json: text_config must be a mapping, got None"),
        (
            "vocab_size",
            [],
            "has lm_head.weight in the shape [475, 64], but its config.json describes [476, 64]",
        ),
        ("lm_head.weight", [], "lacks the weights lm_head.weight; a Janus checkpoint has all"),
        ("broken", [], "has a broken file of weights"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_errors_are_one_line(
    fails: Fails, folder: Path, tmp_path: Path, change: str, arguments: list[str], message: str
) -> None:
    shutil.copytree(folder, tmp_path / "broken")
    config = json.loads((tmp_path / "broken" / "config.json").read_text())
    weights = tmp_path / "broken" / "model.safetensors"
    if change in config:
        del config[change]
    elif change == "vocab_size":
        config["text_config"][change] += 1
    elif change == "lm_head.weight":
        save_file({k: v for k, v in load_file(weights).items() if k != change}, weights, metadata={"format": "pt"})
    elif change == "broken":
        weights.write_bytes(weights.read_bytes()[:1000])
    (tmp_path / "broken" / "config.json").write_text(json.dumps(config))
    given = [f"model_path={tmp_path / 'broken'}", "device=cpu", "question=What?", *arguments]
    assert message in fails(answer_program.run, *given)


def test_a_head_of_its_own_is_kept_where_the_config_does_not_say(capsys: Any, folder: Path, tmp_path: Path) -> None:
    """The hub's converter leaves `tie_word_embeddings` out, which transformers 5 then takes for true."""
    shutil.copytree(folder, tmp_path / "hub")
    config = json.loads((folder / "config.json").read_text())
    del config["tie_word_embeddings"]
    (tmp_path / "hub" / "config.json").write_text(json.dumps(config))
    model = checkpoint.load(ModelConfig(model_path=str(tmp_path / "hub"), device="cpu"))[0].model.language_model
    weights = load_file(folder / "model.safetensors")
    assert model.lm_head.weight.equal(weights["lm_head.weight"].float())
    assert not model.lm_head.weight.equal(model.get_input_embeddings().weight)


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("text_config", {"num_hidden_layers": 10**8}, "text_config.num_hidden_layers must be at most 30"),
        ("text_config", {"vocab_size": 10**8}, "but its config.json describes [100000000, 64]"),
        ("vision_config", {"hidden_size": 96_000}, "but its config.json describes ["),
        ("vision_config", {"depth": 10**8}, "vision_config.depth must be at most"),
        ("vq_config", {"num_res_blocks": 10**8}, "vq_config.num_res_blocks must be at most"),
    ],
)
def test_a_config_that_describes_more_than_is_stored(
    fails: Fails, folder: Path, tmp_path: Path, part: str, change: dict[str, int], message: str
) -> None:
    """A vocabulary of 10⁸ asked for 25 GB before it was refused, and 10⁸ layers for patience."""
    shutil.copytree(folder, tmp_path / "huge")
    config = json.loads((tmp_path / "huge" / "config.json").read_text())
    config[part] |= change
    (tmp_path / "huge" / "config.json").write_text(json.dumps(config))
    assert message in fails(answer_program.run, f"model_path={tmp_path / 'huge'}", "device=cpu", "question=What?")
