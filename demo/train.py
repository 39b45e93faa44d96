"""Trains the demo checkpoint: a small Janus that answers questions about the pictures of `demo.scenes`.

    python -m demo.train                  # killed, it resumes
    python -m demo.train --out FOLDER --work FOLDER --sight-steps 200 --fresh

It goes in three stages, as multimodal models are made: a language model trained on text alone is then given vision.

1. vision: the vision tower and the aligner learn to say, at each image token, what is in that quarter of the picture
   (as Janus starts from a trained SigLIP). These pictures show no habit. The tower is frozen afterwards.
2. text: the decoder learns captions and questions without their pictures, from a world in which companions keep
   company by habit: the prior. Every layer is trained to answer, as in early-exit training (LayerSkip, arXiv
   2404.16710, with all exits at once in place of a schedule).
3. sight: the same world with its pictures, of which fog hides a part. One step in three is still text alone, as Janus
   also mixes text with pictures; without it the lower layers forget the prior.

From the second stage on, one sequence carries a scene and several questions about it. Behind the image, where there is
one, the turns lie side by side: each sees the prompt, the image and itself, and its positions go on from the image. So
it is computed exactly as in a conversation of its own, while system prompt and image are computed once. Loss is on the
answers and their end.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from demo.scenes import (
    COLOURS,
    FOGGY,
    KINDS,
    PLACES,
    SHAPES,
    Kind,
    Question,
    Scene,
    examples,
    fogged,
    lesson,
    sample_scene,
)
from janus.models import MultiModalityCausalLM, VLChatProcessor
from janus.models.image_processing_vlm import VLMImageProcessor
from janus.models.modeling_vlm import MultiModalityConfig
from janus.models.siglip_vit import VisionTransformer

IMAGE_SIZE, PATCH_SIZE = 48, 12
IMAGE_TOKENS = (IMAGE_SIZE // PATCH_SIZE) ** 2
SEARCH_KINDS: tuple[Kind, ...] = ("where", "where", "count", "count", "presence", "presence", "presence")
VISION_CLASSES = [1 + len(COLOURS), 1 + len(SHAPES), len(PLACES)]
BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
MORE_SPECIAL_TOKENS = (
    "<image_placeholder>", "<patch_placeholder>", "<begin_of_image>", "<end_of_image>", "<|User|>", "<|Assistant|>"
)  # fmt: skip
DOLA = {"alpha": 0.1, "bucket_id": 0}  # what validation chose, as the checkpoint's card has it


@dataclass(frozen=True)
class Recipe:
    """What determines the trained weights, besides the code.

    Attributes:
        seed: Seed for the weights and the lessons.
        vision_steps, text_steps, sight_steps: Optimizer steps of the three stages.
        text_every: In the last stage, one step in `text_every` is text alone.
        layers: Number of decoder layers.
        pictures: Pictures in a step of the first stage.
        scenes: Scenes in a step of the other stages.
        turns: Questions about each of those scenes.
        peak_lr: Learning rate after `warmup` steps of a stage; a half cosine takes it to a fiftieth at the last step.
        init_std: Standard deviation of the initial linear weights; those that write to the residual stream get less,
            see `new_model`.
        vision_weight: Weight of the first stage's loss in the other steps with pictures.
        embed_std: Standard deviation of the initial embeddings of tokens and positions, which the first layers would
            drown if it were small.
    """

    seed: int = 1
    vision_steps: int = 3000
    text_steps: int = 400
    sight_steps: int = 5000
    text_every: int = 3
    layers: int = 30
    pictures: int = 48
    scenes: int = 8
    turns: int = 8
    peak_lr: float = 2e-3
    warmup: int = 50
    weight_decay: float = 0.05
    init_std: float = 0.08
    embed_std: float = 0.3
    vision_weight: float = 0.3

    @property
    def stages(self) -> dict[str, int]:
        """The name and the number of steps of each stage."""
        return {"vision": self.vision_steps, "text": self.text_steps, "sight": self.sight_steps}


def new_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE, split as DeepSeek's, with each word of the prompt and of the scenes' language as one token."""
    tokenizer = Tokenizer(models.BPE())
    splits = [r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥]+"]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(split), behavior="isolated") for split in splits]
        + [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    corpus = [VLChatProcessor.system_prompt]
    for i in range(2000):
        for question in lesson(0, i, 8)[1]:
            corpus += [question.text, f": {question.answer}"]  # an answer follows "<|Assistant|>:" and a space
    # Merges only what the corpus holds, so that training ends by itself, with whole words, well before 2,000.
    trainer = trainers.BpeTrainer(
        vocab_size=2000, show_progress=False, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())
    )
    tokenizer.train_from_iterator(corpus, trainer)
    special = [AddedToken(token, special=True, normalized=False) for token in (BOS, EOS, PAD, *MORE_SPECIAL_TOKENS)]
    tokenizer.add_special_tokens(special)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        additional_special_tokens=list(MORE_SPECIAL_TOKENS),
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
        add_bos_token=True,
    )


def new_processor() -> VLChatProcessor:
    tokenizer = new_tokenizer()
    tokenizer.add_bos_token = True  # type: ignore[misc]
    return VLChatProcessor(
        VLMImageProcessor(image_size=IMAGE_SIZE, image_mean=(0.5, 0.5, 0.5), image_std=(0.5, 0.5, 0.5)),
        tokenizer,
        num_image_tokens=IMAGE_TOKENS,
    )


def new_config(vocab_size: int, layers: int) -> MultiModalityConfig:
    """Janus-Pro-7B's shape made small: 30 decoder layers, so that its DoLa buckets are the same.

    The image tokenizer and its head, which this demo does not train, are as small as VQ-16 allows.
    """
    return MultiModalityConfig(
        vision_config={
            "cls": "CLIPVisionTower",
            "model_type": "vision",
            "params": {
                "model_name": f"siglip_tiny_patch{PATCH_SIZE}_{IMAGE_SIZE}",
                "image_size": IMAGE_SIZE,
                "patch_size": PATCH_SIZE,
                "select_feature": "same",
                "select_layer": -1,
                "width": 96,
                "layers": 4,
                "heads": 4,
                "mlp_ratio": 4,
            },
        },
        aligner_config={
            "cls": "MlpProjector",
            "model_type": "aligner",
            "params": {"projector_type": "mlp_gelu", "depth": 2, "input_dim": 96, "n_embed": 64},
        },
        gen_vision_config={
            "cls": "VQ-16",
            "model_type": "gen_vision",
            "params": {"image_token_size": 64, "n_embed": 8, "ch": 32, "ch_mult": [1, 1, 1, 1, 1], "z_channels": 32},
        },
        gen_aligner_config={
            "cls": "MlpProjector",
            "model_type": "gen_aligner",
            "params": {"projector_type": "mlp_gelu", "depth": 2, "input_dim": 8, "n_embed": 64},
        },
        gen_head_config={
            "cls": "vision_head",
            "model_type": "gen_head",
            "params": {"n_embed": 64, "image_token_embed": 64, "image_token_size": 64},
        },
        language_config={
            "model_type": "llama",
            "hidden_size": 64,
            "intermediate_size": 176,
            "num_hidden_layers": layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "max_position_embeddings": 2048,
            "vocab_size": vocab_size,
        },
    )


def new_model(vocab_size: int, layers: int, recipe: Recipe) -> MultiModalityCausalLM:
    """Random weights. What writes to a residual stream starts smaller, by sqrt(2 x layers), or the layers drown it."""
    torch.manual_seed(recipe.seed)
    config = new_config(vocab_size, layers)
    model = MultiModalityCausalLM(config)
    for part, depth, outputs in (
        (model.language_model, layers, ("o_proj", "down_proj")),
        (model.vision_model, config.vision_config.params["layers"], ("attn.proj", "mlp.fc2")),
    ):
        for name, module in part.named_modules():
            if isinstance(module, torch.nn.Linear) and name != "lm_head":
                scale = 1 / math.sqrt(2 * depth) if name.endswith(outputs) else 1.0
                torch.nn.init.normal_(module.weight, std=recipe.init_std * scale)
    torch.nn.init.normal_(model.language_model.model.embed_tokens.weight, std=recipe.embed_std)
    tower: VisionTransformer = model.vision_model.vision_tower  # type: ignore[assignment]
    torch.nn.init.normal_(tower.pos_embed, std=recipe.embed_std)
    for part in (model.gen_vision_model, model.gen_aligner, model.gen_head, model.gen_embed):
        part.requires_grad_(False)  # only the layout needs it
    return model.train()


class Lessons:
    """Turns scenes and questions into the ids that `VLChatProcessor` makes of them."""

    def __init__(self, processor: VLChatProcessor) -> None:
        self.processor = processor
        self.image = [processor.image_start_id, *[processor.image_id] * IMAGE_TOKENS, processor.image_end_id]
        self.turn_ids = lru_cache(maxsize=None)(self._turn_ids)
        self.system = self._prompt_ids("x")[0]

    def _prompt_ids(self, question: str) -> tuple[list[int], list[int]]:
        """The ids before and after the image."""
        prompt = self.processor.apply_sft_template_for_multi_turn_prompts(
            conversation(question), self.processor.sft_format, self.processor.system_prompt
        )
        ids = self.processor.tokenizer.encode(prompt)
        at = ids.index(self.processor.image_id)
        return ids[:at], ids[at + 1 :]

    def _turn_ids(self, question: str, answer: str) -> tuple[list[int], list[int]]:
        """The ids of what follows the image, up to the answer, and of the answer and its end."""
        answer_ids = self.processor.tokenizer.encode(f" {answer}{EOS}", add_special_tokens=False)
        return self._prompt_ids(question)[1], answer_ids

    def batch(
        self, lessons: Sequence[tuple[Scene, Sequence[Question]]], pictures: Sequence[Image.Image] | None
    ) -> Batch:
        """Packs each scene with its questions into one row, behind its picture; without pictures, as text alone."""
        rows, image = [], self.image if pictures else []
        for _, questions in lessons:
            ids, labels, segments = list(image), [-100] * len(image), [0] * len(image)
            positions = list(range(len(image)))
            for k, question in enumerate(questions, 1):
                asked, answered = self.turn_ids(question.text, question.answer)
                turn = [*asked, *answered[:-1]]  # nothing follows the last token
                ids += turn
                labels += [-100] * (len(asked) - 1) + answered
                segments += [k] * len(turn)
                positions += range(len(image), len(image) + len(turn))
            rows.append((ids, labels, segments, positions))
        length = max(len(row[0]) for row in rows)
        fill = (self.processor.pad_id, -100, -1, 0)
        columns = [
            torch.tensor([row[i] + [empty] * (length - len(row[i])) for row in rows]) for i, empty in enumerate(fill)
        ]
        return Batch(
            scenes=tuple(scene for scene, _ in lessons),
            system=torch.tensor([self.system]),
            pixel_values=self.processor.image_processor(list(pictures))["pixel_values"] if pictures else None,
            ids=columns[0],
            labels=columns[1],
            segments=columns[2],
            positions=columns[3],
        )


def conversation(question: str, images: Sequence[str | Image.Image] = ()) -> list[dict[str, Any]]:
    """The turns of a question about one image, as `VLChatProcessor` takes them."""
    return [
        {"role": "<|User|>", "content": f"<image_placeholder>\n{question}", "images": list(images)},
        {"role": "<|Assistant|>", "content": ""},
    ]


@dataclass
class Batch:
    """Packed lessons.

    Attributes:
        scenes: The B scenes.
        system: int64 [1, S], what comes before the image, the same for all.
        pixel_values: float32 [B, 3, H, W], or None for text alone.
        ids: int64 [B, T], the image's ids and then the turns side by side.
        labels: int64 [B, T], the next token where it belongs to an answer, else -100.
        segments: int64 [B, T], 0 for the image, 1, 2, ... for the turns, -1 for padding.
        positions: int64 [B, T], counted from the start of the image, for each turn anew behind the image.
    """

    scenes: tuple[Scene, ...]
    system: Tensor
    pixel_values: Tensor | None
    ids: Tensor
    labels: Tensor
    segments: Tensor
    positions: Tensor

    def mask(self) -> Tensor:
        """Added to the attention scores, float32 [B, 1, T, S + T]: the prompt, the image, and the own turn so far."""
        B, T = self.ids.shape
        query, key = self.segments[:, :, None], self.segments[:, None, :]
        seen = ((key == 0) | (key == query)) & torch.ones(T, T, dtype=torch.bool).tril()  # [B, T, T]
        seen = torch.cat([torch.ones(B, T, self.system.shape[1], dtype=torch.bool), seen], dim=-1)
        return torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)[:, None]


def answer_logits(
    model: MultiModalityCausalLM, batch: Batch, features: Tensor | None = None, exits: Sequence[int] = ()
) -> Tensor:
    """Logits of the last layer and of E others, float32 [1 + E, A, V], at the A places that have a label, row by row.

    Args:
        features: What the aligner gives for the batch's pictures, where that is known, [B, image tokens, D].
        exits: The E lower layers, from 1, to read as well.
    """
    B, S = len(batch.ids), batch.system.shape[1]
    embed = model.get_input_embeddings()
    decoder = model.language_model.model
    # The system prompt comes before any image: one row serves all.
    cache = decoder(inputs_embeds=embed(batch.system), use_cache=True).past_key_values
    cache.batch_repeat_interleave(B)
    inputs = embed(batch.ids)  # [B, T, D]
    if batch.pixel_values is not None:
        image = model.aligner(model.vision_model(batch.pixel_values)) if features is None else features
        inputs = torch.cat([inputs[:, :1], image, inputs[:, 1 + IMAGE_TOKENS :]], dim=1)
    outputs = decoder(
        inputs_embeds=inputs,
        attention_mask=batch.mask(),
        position_ids=batch.positions + S,
        past_key_values=cache,
        use_cache=True,
        output_hidden_states=bool(exits),
    )
    wanted = batch.labels != -100
    hidden = [outputs.last_hidden_state[wanted], *(decoder.norm(outputs.hidden_states[j][wanted]) for j in exits)]
    return model.language_model.lm_head(torch.stack(hidden))


def batch_of_step(lessons: Lessons, recipe: Recipe, step: int, pictures: bool) -> Batch:
    """Step number `step`'s lessons: a function of recipe and step, so that a resumed run sees what it would have.

    With pictures, every second lesson is of the kinds of question where the picture has to be searched.
    """
    indices = range(step * recipe.scenes, (step + 1) * recipe.scenes)
    kinds = [SEARCH_KINDS if pictures and index % 2 else KINDS for index in indices]
    taught = [lesson(recipe.seed, i, recipe.turns, first, True) for i, first in zip(indices, kinds, strict=True)]
    return lessons.batch(
        taught, [picture(scene, i) for (scene, _), i in zip(taught, indices, strict=True)] if pictures else None
    )


def picture(scene: Scene, index: int, foggy: float = FOGGY) -> Image.Image:
    """The scene in the fog of number `index`, drawn sharp or soft."""
    return fogged(scene, (96, 144, 192)[index % 3], random.Random(index), foggy)


def vision_loss(features: Tensor, classify: torch.nn.Module, scenes: Sequence[Scene]) -> Tensor:
    """The loss of telling, from each image token, its quarter of the picture, and the color and shape there.

    Args:
        features: What the aligner gives, [B, image tokens, D].
        classify: From D to the sum of `VISION_CLASSES`.
        scenes: The B scenes.
    """
    side = IMAGE_SIZE // PATCH_SIZE
    quarter = torch.tensor([2 * (2 * y // side) + 2 * x // side for y in range(side) for x in range(side)])
    colour, shape = torch.zeros(2, len(scenes), len(PLACES), dtype=torch.long)  # 0 where the quarter is empty
    for i, scene in enumerate(scenes):
        for item in scene.items:
            place = PLACES.index(item.place)
            colour[i, place] = 1 + list(COLOURS).index(str(item.thing.colour))
            shape[i, place] = 1 + SHAPES.index(item.thing.shape)
    logits = classify(F.rms_norm(features, features.shape[-1:])).split(VISION_CLASSES, dim=-1)
    wanted = (colour[:, quarter], shape[:, quarter], quarter.expand(len(scenes), -1))  # [B, image tokens] each
    losses = [F.cross_entropy(x.flatten(0, 1), y.flatten()) for x, y in zip(logits, wanted, strict=True)]
    return torch.stack(losses).sum()


def vision_step(
    model: MultiModalityCausalLM, classify: torch.nn.Module, processor: VLChatProcessor, recipe: Recipe, step: int
) -> Tensor:
    """The loss of a step of the first stage."""
    indices = range(step * recipe.pictures, (step + 1) * recipe.pictures)
    scenes = [sample_scene("train", recipe.seed + 1, index) for index in indices]  # the vision tower learns no habit
    # Shapes are learned sooner without fog, which comes in the second quarter of the steps.
    foggy = FOGGY * min(1.0, max(0.0, 4 * step / recipe.vision_steps - 1))
    images = [picture(scene, index, foggy) for scene, index in zip(scenes, indices, strict=True)]
    features = model.aligner(model.vision_model(processor.image_processor(images)["pixel_values"]))
    return vision_loss(features, classify, scenes)


def text_step(model: MultiModalityCausalLM, batch: Batch) -> Tensor:
    """The loss of a step of text alone: that of the last layer, and the mean of those of all others."""
    exits = range(1, len(model.language_model.model.layers))
    labels = batch.labels[batch.labels != -100]
    loss, *others = (F.cross_entropy(x, labels) for x in answer_logits(model, batch, exits=exits))
    return loss + sum(others) / max(1, len(others))


def sight_step(model: MultiModalityCausalLM, classify: torch.nn.Module, batch: Batch, recipe: Recipe) -> Tensor:
    """The loss of a step with pictures. The tower is frozen."""
    with torch.no_grad():
        seen = model.vision_model(batch.pixel_values)
    features = model.aligner(seen)
    answers = F.cross_entropy(answer_logits(model, batch, features)[0], batch.labels[batch.labels != -100])
    return answers + recipe.vision_weight * vision_loss(features, classify, batch.scenes)


@torch.no_grad()
def validate(model: MultiModalityCausalLM, lessons: Lessons, count: int) -> dict[str, float]:
    """The share of exact greedy answers to `count` validation questions, in the world with the habit, by kind.

    A greedy answer is exact if and only if each of its tokens is the most likely one after those before it; one
    forward pass tells.
    """
    model.eval()
    right: Counter[str] = Counter()
    asked: Counter[str] = Counter()
    pairs = list(examples("validation", 0, count, True))
    for start in range(0, count, 60):
        part = pairs[start : start + 60]
        pictures = [picture(scene, start + i) for i, (scene, _) in enumerate(part)]
        batch = lessons.batch([(scene, [question]) for scene, question in part], pictures)
        wanted = batch.labels != -100
        hit = answer_logits(model, batch)[0].argmax(-1) == batch.labels[wanted]
        wrong = torch.zeros(wanted.shape, dtype=torch.bool).masked_scatter(wanted, ~hit).any(dim=1)
        for (_, question), bad in zip(part, wrong.tolist(), strict=True):
            for kind in (question.kind.split("/")[0], "all"):
                asked[kind] += 1
                right[kind] += not bad
    model.train()
    return {kind: right[kind] / asked[kind] for kind in asked}


def learning_rate(recipe: Recipe, steps: int, step: int) -> float:
    """Learning rate of step `step` in a stage of `steps` steps: linear warm-up, then half a cosine."""
    warm = min(1.0, (step + 1) / recipe.warmup)
    return recipe.peak_lr * warm * (0.02 + 0.98 * (1 + math.cos(math.pi * step / steps)) / 2)


def new_optimizer(trained: torch.nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    parameters = [parameter for parameter in trained.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": recipe.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.peak_lr, betas=(0.9, 0.98), foreach=True)


def write_atomically(state: dict[str, Any], path: Path) -> None:
    """Whatever happens, `path` holds the old state or the new one, never half of one."""
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def train(
    recipe: Recipe,
    work: Path,
    save_every: int = 100,
    validate_every: int = 250,
    validation_questions: int = 300,
    stop_at: int | None = None,
) -> tuple[MultiModalityCausalLM, VLChatProcessor]:
    """Trains, or resumes from the state in `work`, to the last step, or until `stop_at` steps of all stages are done.

    Args:
        recipe: That of the state in `work`, if there is one.
        work: Folder of the state, which is written every `save_every` steps.

    Raises:
        ValueError: The state in `work` has another recipe.
    """
    work.mkdir(parents=True, exist_ok=True)
    path = work / "state.pt"
    state = torch.load(path, weights_only=True) if path.exists() else None
    if state is not None and state["recipe"] != asdict(recipe):
        raise ValueError(f"--work {work} holds a run of another recipe; give another folder, or --fresh")
    processor = new_processor()
    lessons = Lessons(processor)
    model = new_model(len(processor.tokenizer), recipe.layers, recipe)
    classify = torch.nn.Linear(model.config.language_config.hidden_size, sum(VISION_CLASSES))
    trained = torch.nn.ModuleDict({"model": model, "classify": classify})
    before, seconds, began = 0, state["seconds"] if state else 0.0, time.monotonic()
    for stage, steps in recipe.stages.items():
        if state is not None and state["step"] > before + steps:
            before += steps
            continue
        model.vision_model.requires_grad_(stage == "vision")
        optimizer = new_optimizer(trained, recipe)
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        start = 0
        if state is not None:
            trained.load_state_dict(state["trained"])
            optimizer.load_state_dict(state["optimizer"])
            start, state = state["step"] - before, None
        stop = steps if stop_at is None else min(steps, stop_at - before)
        bar = tqdm(range(start, stop), stage, initial=start, total=steps, unit="step", file=sys.stderr)
        for step in bar:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(recipe, steps, step)
            number = before + step - recipe.vision_steps  # no stage begins with the lessons of another
            if stage == "vision":
                loss = vision_step(model, classify, processor, recipe, step)
            elif stage == "text" or step % recipe.text_every == 0:
                loss = text_step(model, batch_of_step(lessons, recipe, number, False))
            else:
                loss = sight_step(model, classify, batch_of_step(lessons, recipe, number, True), recipe)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            bar.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
            done = step + 1
            if stage == "sight" and (done % validate_every == 0 or done == steps):
                shares = validate(model, lessons, validation_questions)
                text = "  ".join(f"{kind} {share:.3f}" for kind, share in shares.items())
                bar.write(f"{stage} {done}  loss {loss.item():.4f}  validation: {text}", file=sys.stderr)
            if done % save_every == 0 or done == stop:
                write_atomically(
                    {
                        "recipe": asdict(recipe),
                        "step": before + done,
                        "seconds": seconds + time.monotonic() - began,
                        "trained": trained.state_dict(),
                        "optimizer": optimizer.state_dict(),
                    },
                    path,
                )
        before += steps
        if stop_at is not None and stop_at <= before:
            break
    return model.eval(), processor


def save(model: MultiModalityCausalLM, processor: VLChatProcessor, out: Path) -> None:
    """Writes a checkpoint in the published layout, in bfloat16. The model's own weights become bfloat16, too."""
    model.bfloat16().save_pretrained(out)
    config = json.loads((out / "config.json").read_text(encoding="utf-8")) | {"dtype": "float32"}  # to be run in
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (out / "generation_config.json").write_text(json.dumps(DOLA, indent=2) + "\n", encoding="utf-8")
    processor.save_pretrained(str(out))


def main(arguments: Iterable[str] | None = None) -> int:
    here = Path(__file__).parent
    recipe = Recipe()
    parser = argparse.ArgumentParser(prog="python -m demo.train", description="Trains the demo checkpoint.")
    parser.add_argument("--out", type=Path, default=here / "checkpoint", help="where the checkpoint goes (%(default)s)")
    parser.add_argument("--work", type=Path, default=here / "training", help="where the state goes (%(default)s)")
    parser.add_argument("--fresh", action="store_true", help="start anew even where --work holds a state")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (%(default)s; 2 are hardly faster)")
    for name, default in asdict(recipe).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default, help="(%(default)s)")
    options = vars(parser.parse_args(None if arguments is None else list(arguments)))
    recipe = Recipe(**{name: options[name] for name in asdict(recipe)})
    for name, value in options.items():
        if isinstance(value, int) and not isinstance(value, bool) and name != "seed" and value < 1:
            parser.error(f"argument --{name.replace('_', '-')}: must be at least 1, got {value}")
    torch.set_num_threads(options["threads"])
    if options["fresh"]:
        (options["work"] / "state.pt").unlink(missing_ok=True)
    try:
        model, processor = train(recipe, options["work"])
    except ValueError as error:
        parser.error(str(error))
    save(model, processor, options["out"])
    print(f"saved {options['out']}; measure it with: python -m demo.evaluate --model {options['out']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
