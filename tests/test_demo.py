"""The demo's world, its training and its checkpoint: demo/."""

import json
import random
import re
from collections import Counter
from dataclasses import replace
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

from demo import images as demo_images
from demo import train as demo_train
from demo import wide_heads
from demo.evaluate import BEGIN, END, Answers, answers, f1, f1_difference, layers_say, main
from demo.scenes import (
    COLOURS,
    NUMBERS,
    PLACES,
    SHAPES,
    SPLITS,
    THINGS,
    Example,
    Question,
    Scene,
    Thing,
    ask,
    companion,
    examples,
    fogged,
    in_fog,
    lesson,
    sample_scene,
)
from demo.train import EOS, Lessons, Recipe, answer_logits, conversation, new_model, new_processor, save, train
from janus.models import MultiModalityCausalLM, VLChatProcessor
from janus.utils.io import load_image
from janus_dola import DoLaConfig, DoLaJanusWrapper
from janus_dola.programs.engine import Answer
from janus_dola.programs.measures import pope_measures

DEMO = Path(demo_images.__file__).parent
CHECKPOINT = DEMO / "checkpoint"
QUESTIONS: dict[str, Any] = json.loads((DEMO / "images" / "questions.json").read_text(encoding="utf-8"))
TINY = Recipe(
    vision_steps=2,
    text_steps=2,
    sight_steps=4,
    text_every=2,
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
        pictures = [scene.render(side) for scene, _, side in taught]
        batch = Lessons(processor).batch([(scene, asked) for scene, asked, _ in taught], pictures)
        packed = answer_logits(model, batch)[0]
        for scene, asked, side in taught:
            for question in asked:
                inputs = processor(conversations=conversation(question.text), images=[scene.render(side)])
                answer = processor.tokenizer.encode(f" {question.answer}{EOS}", add_special_tokens=False)
                embeds = [model.prepare_inputs_embeds(**inputs)]
                embeds += [model.get_input_embeddings()(torch.tensor([answer[:-1]]))]
                alone.append(model.language_model(inputs_embeds=torch.cat(embeds, 1)).logits[0, -len(answer) :])
    torch.testing.assert_close(packed, torch.cat(alone), atol=1e-4, rtol=1e-4)


def test_companions_keep_company_in_the_world_with_the_habit() -> None:
    def kept(habit: bool) -> float:
        scenes = [sample_scene("test", 0, i, habit) for i in range(300)]
        pairs = [pair for scene in scenes for pair in pairwise(item.thing for item in scene.items)]
        return sum(companion(before) == thing for before, thing in pairs) / len(pairs)

    assert 0.8 < kept(True) < 0.95
    assert kept(False) < 0.3


def test_fog_lies_on_things_and_some_look_like_others() -> None:
    foggy = others = things = 0
    for i in range(200):
        scene = sample_scene("test", 0, i)
        seen, density = in_fog(scene, random.Random(i))
        fog = [density[PLACES.index(item.place)] > 0 for item in scene.items]
        differ = [a.thing != b.thing for a, b in zip(scene.items, seen.items, strict=True)]
        assert not any(other and not hidden for other, hidden in zip(differ, fog, strict=True))
        foggy, others, things = foggy + sum(fog), others + sum(differ), things + len(fog)
        clear, drawn = (np.asarray(image) for image in (seen.render(64), fogged(scene, 64, random.Random(i))))
        assert (drawn == np.asarray(fogged(scene, 64, random.Random(i)))).all()
        changed = {place for k, place in enumerate(PLACES) if (quarter(drawn, k) != quarter(clear, k)).any()}
        assert changed == {item.place for item, hidden in zip(scene.items, fog, strict=True) if hidden}
    assert 0.25 < foggy / things < 0.35 and 0.17 < others / foggy < 0.31


def quarter(pixels: np.ndarray, place: int) -> np.ndarray:
    return pixels[place // 2 * 32 :, place % 2 * 32 :][:32, :32]


def test_text_alone_reaches_all_exits() -> None:
    """The second stage's logits are those of the prompt without its picture, and each exit's those of a cut model."""
    processor = new_processor()
    model = new_model(len(processor.tokenizer), 3, TINY).eval()
    lessons = Lessons(processor)
    scene, asked = lesson(0, 5, 3, habit=True)
    before, after = lessons.turn_ids(asked[0].text, asked[0].answer)
    ids = torch.tensor([[*lessons.system, *before, *after[:-1]]])
    with torch.no_grad():
        logits = answer_logits(model, lessons.batch([(scene, asked)], None), exits=(1, 2))
        for layers, got in zip((3, 1, 2), logits, strict=True):
            cut = new_model(len(processor.tokenizer), 3, TINY).eval().language_model
            cut.model.layers = cut.model.layers[:layers]
            alone = cut(input_ids=ids).logits[0, -len(after) :]
            torch.testing.assert_close(got[: len(after)], alone, atol=1e-4, rtol=1e-4)


def test_what_is_counted_of_answers() -> None:
    """Of answers written down: two things right, one a companion that is not there, one made up freely."""
    scene = next(scene for i in range(1000) if len((scene := sample_scene("test", 0, i)).items) == 3)
    first = scene.items[0].thing
    absent = companion(first)
    assert absent not in (item.thing for item in scene.items)
    free = next(t for t in THINGS if t not in [f(i.thing) for i in scene.items for f in (companion, lambda x: x)])
    places = [item.place for item in scene.items]
    said = f"In the {places[0]} is {first.with_article()}. In the {places[1]} is {absent.with_article()}."
    said += f" In the {places[2]} is {free.with_article()}. In the top left is a bottom right."
    question = ask(scene, "describe", random.Random(0))
    assert question is not None
    asked = [
        Question(f"presence/{sort}", "", f"{yes}, there") for sort, yes in (("present", "Yes"), ("random-absent", "No"))
    ]
    pairs = [Example(scene, q) for q in (question, *asked)]
    texts = {"off": [said, "Yes, there", "Yes, there"], "exact": [q.answer for _, q in pairs]}
    found = Answers(pairs, {name: [Answer(text, 1, None) for text in said] for name, said in texts.items()})
    counts = {"things": 3, "said": 3, "right": 1, "hallucinated": 2, "companions": 1, "habit": 1}
    assert {key: value.tolist() for key, value in found.described("off").items()} == {k: [v] for k, v in counts.items()}
    assert found.described("exact")["right"].tolist() == [3]
    assert found.exact("off").tolist() == [0, 1, 0] and found.exact("exact", "presence").tolist() == [1, 1]
    said, true = found.presence("off", "random")
    assert said.tolist() == [True, True] and true.tolist() == [True, False]
    assert f1(said, true) == pytest.approx(100 * pope_measures(["yes", "yes"], ["yes", "no"])["f1"])
    assert f1_difference(said, true, true) == "-33.3 [-33.3, +0.0]"


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path) -> None:
    whole, _ = train(TINY, tmp_path / "whole", validate_every=100, validation_questions=6)
    for stop in (1, 4, 8):  # inside a stage, where one ends, and the end
        parts, _ = train(TINY, tmp_path / "parts", validate_every=100, validation_questions=6, stop_at=stop)
    expected, got = whole.state_dict(), parts.state_dict()
    assert expected.keys() == got.keys()
    assert all(torch.equal(got[name], weight) for name, weight in expected.items())
    with pytest.raises(ValueError, match="holds a run of another recipe"):
        train(replace(TINY, seed=2), tmp_path / "parts")


def test_text_alone_stays_among_the_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every second step of this recipe's last stage, so that the lower layers keep the prior."""
    ran: list[str] = []

    def noted(name: str) -> Any:
        step = getattr(demo_train, name)
        return lambda *args: (ran.append(name.removesuffix("_step")), step(*args))[1]

    for name in ("vision_step", "text_step", "sight_step"):
        monkeypatch.setattr(demo_train, name, noted(name))
    train(TINY, tmp_path, validate_every=100, validation_questions=6)
    assert ran == ["vision", "vision", "text", "text", "text", "sight", "text", "sight"]


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


def test_the_checkpoint_brings_the_configuration_that_validation_chose(tmp_path: Path) -> None:
    """As training saves it, for every program."""
    processor = new_processor()
    save(new_model(len(processor.tokenizer), 2, TINY), processor, tmp_path)
    kept = (tmp_path / "generation_config.json").read_text(encoding="utf-8")
    assert kept == (CHECKPOINT / "generation_config.json").read_text(encoding="utf-8")
    (chosen,) = set(re.findall(r"^\| \*\*DoLa, (.*)\*\* ", (CHECKPOINT / "README.md").read_text("utf-8"), re.M))
    assert "bucket {bucket_id}, α {alpha}".format(**json.loads(kept)) == chosen


def test_the_checkpoint_answers_right(checkpoint: Any) -> None:
    model, processor = checkpoint
    wrapper = DoLaJanusWrapper(model, DoLaConfig(use_dola_lm=False))
    asked = [(name, question) for name, questions in QUESTIONS.items() for question in questions]
    known = [(name, question) for name, question in asked if question["right"]]
    assert len(known) >= 0.8 * len(asked) and {name for name, _ in known} == set(QUESTIONS)
    asked_of = [(load_image(DEMO / "images" / name), q["text"]) for name, q in known]
    given = answers(wrapper, processor, asked_of, [wrapper.config])
    both = zip(known, given, strict=True)
    wrong = [(name, q["text"], a.text) for (name, q), (a,) in both if a.text != q["answer"]]
    assert not wrong


def test_dola_corrects_the_picked_picture(checkpoint: Any) -> None:
    model, processor = checkpoint
    asked = [(load_image(DEMO / "images" / "habit.png"), "Describe the image.")]
    configs = [DoLaConfig(use_dola_lm=False), DoLaConfig(bucket_id=0)]
    ((off, on),) = [[a.text for a in row] for row in answers(DoLaJanusWrapper(model), processor, asked, configs)]
    right = QUESTIONS["habit.png"][-1]["answer"]
    assert on == right != off and off.replace("blue triangle", "red ring") == right
    assert companion(Thing("yellow", "square")) == Thing("blue", "triangle")


def test_the_habit_speaks_in_the_lower_layers_and_the_picture_in_the_upper(checkpoint: Any) -> None:
    said = layers_say(*checkpoint, 30)
    assert all(wrong > 2 * right for wrong, right in said[2:12])
    assert all(right > 2 * wrong for wrong, right in said[21:])


def test_wide_heads_change_nothing(checkpoint: Any, tmp_path: Path) -> None:
    wide_heads.main(str(tmp_path))
    wide = MultiModalityCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    narrow, processor = checkpoint
    assert wide.config.language_config.head_dim == 64
    assert (tmp_path / "tokenizer.json").read_bytes() == (CHECKPOINT / "tokenizer.json").read_bytes()
    picture = load_image(DEMO / "images" / "habit.png")
    inputs = processor(conversations=conversation("Describe the image.", [picture]), images=[picture])
    prompt = {"inputs_embeds": wide.prepare_inputs_embeds(**inputs), "attention_mask": inputs.attention_mask}
    with torch.inference_mode():
        want, got = (model.language_model(**prompt).logits for model in (narrow, wide))
    assert (got - want).abs().max() < 1e-4 < want.abs().max()


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


def test_the_evaluation_writes_its_tables_into_a_card(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in CHECKPOINT.iterdir():
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "README.md").unlink()
    (tmp_path / "README.md").write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n", encoding="utf-8")
    assert main(["--model", str(tmp_path), "--questions", "3", "--validation", "3", "--write-card"]) == 0
    text = capsys.readouterr().out.rstrip("\n")
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == f"before\n{BEGIN}\n{text}\n{END}\nafter\n"
    rows = [line.split("|")[1].strip(" *") for line in text.splitlines() if line.startswith("| ")]
    assert {"off", "DoLa, bucket 2, α 0.5", "off, penalty", "presence/present"} <= {*rows}
    assert [row for row in rows if row.isdigit()] == [str(layer) for layer in range(1, 31)]
