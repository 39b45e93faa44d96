"""The demo's world, its training and its checkpoint: demo/."""

import json
import re
from collections import Counter
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from demo import images as demo_images
from demo.evaluate import answers
from demo.scenes import COLOURS, NUMBERS, PLACES, SHAPES, SPLITS, Scene, companion, examples, lesson, sample_scene
from demo.train import EOS, Lessons, Recipe, answer_logits, conversation, new_model, new_processor, train
from janus.models import MultiModalityCausalLM, VLChatProcessor
from janus.utils.io import load_image
from janus_dola import DoLaConfig, DoLaJanusWrapper

DEMO = Path(demo_images.__file__).parent
CHECKPOINT = DEMO / "checkpoint"
QUESTIONS: dict[str, Any] = json.loads((DEMO / "images" / "questions.json").read_text(encoding="utf-8"))
TINY = Recipe(
    vision_steps=2,
    shallow_steps=2,
    search_steps=2,
    deep_steps=2,
    shallow_layers=1,
    layers=2,
    pictures=3,
    scenes=2,
    turns=2,
)


def named(scene: Scene, name: str) -> list[str]:
    """The places of what `name` ("red circle", "circles", "red shape", "shape in the top left") stands for."""
    words = name.split(" in the ")
    return [
        item.place
        for item in scene.items
        if words[1:] in ([], [item.place])
        and all(
            word.removesuffix("es" if word == "crosses" else "s") in (item.thing.colour, item.thing.shape, "shape")
            or word in (item.thing.colour, item.thing.shape)
            for word in words[0].split()
        )
    ]


def facts(scene: Scene, text: str) -> set[str]:
    """What a question or answer names: its words of colour, shape, place and number."""
    words = [*COLOURS, *SHAPES, *PLACES, *NUMBERS, "nothing"]
    return {word for word in words if re.search(rf"\b{word}(e?s)?\b", text.lower())}


@pytest.mark.parametrize("split", SPLITS)
def test_equal_arguments_give_equal_scenes_and_questions(split: Any) -> None:
    first, second = (list(examples(split, 3, 60)) for _ in range(2))
    assert first == second
    assert list(examples(split, 4, 60)) != first
    assert first[7].scene.render(64).tobytes() == second[7].scene.render(64).tobytes()
    assert sample_scene("train", 0, 123456) == sample_scene("train", 0, 123456)


def test_the_three_sets_share_no_scene() -> None:
    counts = (3000, 500, 500)
    shown = [
        {sample_scene(split, seed, i).description for i in range(count) for seed in (0, 1)}
        for split, count in zip(SPLITS, counts, strict=True)
    ]
    assert all(len(scenes) > 200 for scenes in shown)
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert not shown[i] & shown[j]
    lessons = {lesson(0, i, 2)[0].description for i in range(1000)}
    assert not lessons & (shown[1] | shown[2])
    with pytest.raises(ValueError, match=r"split must be one of train, validation, test, got 'dev'"):
        sample_scene("dev", 0, 0)  # type: ignore[arg-type]


def test_answers_are_right() -> None:
    """Each against a count of the scene's own items, by what the words of the question say."""
    asked = list(examples("test", 0, 600))
    asked += [(s, q) for s, qs in (lesson(0, i, 8) for i in range(200)) for q in qs]  # type: ignore[misc]
    for scene, question in asked:
        kind, text, answer = question
        where = {item.place: item for item in scene.items}
        sort = kind.split("/")[0]
        if sort == "what":
            place = next(place for place in PLACES if place in text)
            item = where.get(place)
            expected = {place, item.thing.colour, item.thing.shape} if item else {place, "nothing"}
            assert facts(scene, answer) == expected
        elif sort == "where":
            name = re.fullmatch(r"Where is the (.*)\?", text)[1]  # type: ignore[index]
            (place,) = named(scene, name)
            assert facts(scene, answer) == {place, *name.split()}
        elif sort == "colour":
            name = re.fullmatch(r"What colou?r is the (.*)\?", text)[1]  # type: ignore[index]
            (place,) = named(scene, name)
            assert facts(scene, answer) - facts(scene, text) == {where[place].thing.colour}
        elif sort == "count":
            name = re.fullmatch(r"How many (.*) are there\?", text)[1]  # type: ignore[index]
            assert NUMBERS[len(named(scene, name))] in facts(scene, answer)
        elif sort == "presence":
            name = re.fullmatch(r"Is there an? (.*) in the image\?", text)[1]  # type: ignore[index]
            assert answer.startswith("Yes," if named(scene, name) else "No,")
            assert (kind == "presence/present") == bool(named(scene, name))
            if kind == "presence/co-occurring-absent":
                assert any(name in (str(c), c.shape) for c in (companion(item.thing) for item in scene.items))
        else:
            sentences = answer.rstrip(".").split(". ")
            assert NUMBERS[len(scene.items)] in sentences[0] and len(sentences) == 1 + len(scene.items)
            for sentence, item in zip(sentences[1:], scene.items, strict=True):
                assert facts(scene, sentence) == {item.thing.colour, item.thing.shape, item.place}


def test_kinds_and_presences_come_evenly() -> None:
    kinds = Counter(question.kind for _, question in examples("validation", 0, 180))
    sorts = {kind: n for kind, n in kinds.items() if kind.startswith("presence/")}
    assert sorted(sorts) == ["presence/co-occurring-absent", "presence/present", "presence/random-absent"]
    assert set(sorts.values()) == {10}
    assert {n for kind, n in kinds.items() if kind not in sorts} == {30}


def test_a_packed_lesson_is_computed_as_conversations_of_its_own() -> None:
    processor = new_processor()
    model = new_model(len(processor.tokenizer), 2, TINY).eval()
    taught = [(*lesson(0, 5, 6), 192), (*lesson(0, 6, 4), 96)]
    alone = []
    with torch.no_grad():
        batch = Lessons(processor).batch([(scene, asked) for scene, asked, _ in taught], [side for *_, side in taught])
        packed = answer_logits(model, batch)
        for scene, asked, side in taught:
            for question in asked:
                inputs = processor(conversations=conversation(question.text), images=[scene.render(side)])
                answer = processor.tokenizer.encode(f" {question.answer}{EOS}", add_special_tokens=False)
                embeds = [model.prepare_inputs_embeds(**inputs)]
                embeds += [model.get_input_embeddings()(torch.tensor([answer[:-1]]))]
                alone.append(model.language_model(inputs_embeds=torch.cat(embeds, 1)).logits[0, -len(answer) :])
    torch.testing.assert_close(packed, torch.cat(alone), atol=1e-4, rtol=1e-4)


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path) -> None:
    whole, _ = train(TINY, tmp_path / "whole", validate_every=100, validation_questions=6)
    for stop in (1, 4, 8):  # inside a stage, where one ends, and the end
        parts, _ = train(TINY, tmp_path / "parts", validate_every=100, validation_questions=6, stop_at=stop)
    expected, got = whole.state_dict(), parts.state_dict()
    assert expected.keys() == got.keys()
    assert all(torch.equal(got[name], weight) for name, weight in expected.items())
    with pytest.raises(ValueError, match="holds a run of another recipe"):
        train(replace(TINY, seed=1), tmp_path / "parts")


def test_the_pictures_are_those_that_the_script_draws() -> None:
    drawn = demo_images.pictures()
    assert sorted(drawn) == sorted(path.name for path in (DEMO / "images").glob("*.png")) == sorted(QUESTIONS)
    for seed, (name, (scene, image)) in enumerate(drawn.items()):
        assert load_image(DEMO / "images" / name).tobytes() == image.tobytes()
        kept = [(question["kind"], question["text"], question["answer"]) for question in QUESTIONS[name]]
        assert demo_images.questions(scene, seed) == kept


@pytest.fixture(scope="module")
def checkpoint() -> tuple[MultiModalityCausalLM, VLChatProcessor]:
    model = MultiModalityCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32).eval()
    return model, VLChatProcessor.from_pretrained(CHECKPOINT)


def test_the_checkpoint_is_small_and_in_the_published_layout(checkpoint: Any) -> None:
    assert sum(path.stat().st_size for path in CHECKPOINT.iterdir()) <= 12e6
    with safe_open(CHECKPOINT / "model.safetensors", "pt") as file:
        keys = list(file.keys())
        assert {str(file.get_tensor(key).dtype) for key in keys} == {"torch.bfloat16"}
    parts = {key.split(".")[0] for key in keys}
    assert parts == {
        "vision_model", "aligner", "language_model", "gen_vision_model", "gen_aligner", "gen_head", "gen_embed"
    }  # fmt: skip
    assert checkpoint[0].config.language_config.num_hidden_layers == 30


def test_the_processor_files_are_those_that_training_saves(tmp_path: Path) -> None:
    """tests/dola reads the checkpoint's with transformers 4, where janus does not import."""
    new_processor().save_pretrained(tmp_path)
    for path in tmp_path.iterdir():
        assert path.read_bytes() == (CHECKPOINT / path.name).read_bytes(), path.name


def test_the_checkpoint_answers_right(checkpoint: Any) -> None:
    model, processor = checkpoint
    wrapper = DoLaJanusWrapper(model, DoLaConfig(use_dola_lm=False))
    asked = [(name, question) for name, questions in QUESTIONS.items() for question in questions]
    known = [(name, question) for name, question in asked if question["right"]]
    assert len(known) >= 0.8 * len(asked) and {name for name, _ in known} == set(QUESTIONS)
    given = answers(wrapper, processor, [(load_image(DEMO / "images" / name), q["text"]) for name, q in known])
    wrong = [(name, q["text"], text) for (name, q), text in zip(known, given, strict=True) if text != q["answer"]]
    assert not wrong


def test_dola_off_is_plain_generate(checkpoint: Any) -> None:
    model, processor = checkpoint
    image = load_image(DEMO / "images" / "scene.png")
    texts = ["Describe the image.", *dict.fromkeys(q["text"] for q in chain(*QUESTIONS.values()))][:4]
    rows = [processor(conversations=conversation(text), images=[image], force_batchify=False) for text in texts]
    batch = processor.batchify(rows)
    eos = processor.tokenizer.eos_token_id
    arguments = {
        "inputs_embeds": model.prepare_inputs_embeds(**batch),
        "attention_mask": batch.attention_mask,
        "do_sample": False,
        "max_new_tokens": 48,
        "eos_token_id": eos,
        "pad_token_id": eos,
    }
    plain = model.language_model.generate(**arguments)
    off = DoLaJanusWrapper(model, DoLaConfig(use_dola_lm=False)).generate(**arguments)
    assert torch.equal(off, plain)
    assert (plain[0] != eos).sum() > 10
