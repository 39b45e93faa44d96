"""What several test modules use: prompts and their lines, arguments of the programs, and checkpoints to write."""

import json
from pathlib import Path
from typing import Any

import torch
from conftest import CASES, CHECKPOINT, GOLDEN
from safetensors.torch import load_file, save_file
from torch import Tensor

IMAGES = GOLDEN / "expected" / "images"
WIDE = {"images": [str(IMAGES / "wide.png")], "question": "What is in the image?"}
TALL = {"images": [str(IMAGES / "tall.png")], "question": "Describe the picture in detail."}
TEXT = {"question": "What is the capital of France?"}
WEIGHTS = load_file(CHECKPOINT / "model.safetensors")
# For calibrate, whose image_root is IMAGES.
LINES = [
    {"images": [str(IMAGES / "wide.png")], "question": "What is in the image?", "answer": "A red circle."},
    {"question": "What is the capital of France?", "answer": "Paris"},
    {"images": [str(IMAGES / "tall.png")], "question": "Which?", "choices": ["one", "three four"], "answer": 0},
    {"question_id": 7, "image": "square.png", "text": "Is there a dog in the image?", "label": "no"},
]


def golden_lines() -> list[dict[str, Any]]:
    lines = []
    for name, case in CASES.items():
        for i, turns in enumerate(case["conversations"]):
            given = [
                turn | {"images": [str(GOLDEN / "expected" / image) for image in turn.get("images", [])]}
                for turn in turns[:-1]
            ]
            lines.append({"id": f"{name}/{i}", "conversation": given})
    return lines


def write(path: Path, lines: list[Any]) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def read(path: Path) -> dict[Any, dict[str, Any]]:
    """id -> line; no id may come twice."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert len({json.dumps(line["id"]) for line in lines}) == len(lines)
    return {line["id"]: line for line in lines}


def cli_arguments(folder: Path, *more: str, prompts: str = "prompts.jsonl") -> list[str]:
    return [
        f"model_path={CHECKPOINT}", "device=cpu", "generation.max_new_tokens=6", f"prompts={folder / prompts}",
        f"output={folder / 'out.jsonl'}", *more,
    ]  # fmt: skip


def calibrate_arguments(folder: Path, *more: str) -> list[str]:
    return [
        f"model_path={CHECKPOINT}", "device=cpu", f"data={folder / 'val.jsonl'}", f"output={folder / 'mine.yaml'}",
        f"image_root={IMAGES}", "generation.max_new_tokens=6", "alphas=[0.1]", *more,
    ]  # fmt: skip


def copy_without_weights(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    for file in CHECKPOINT.iterdir():
        if file.name != "model.safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    return folder


def write_checkpoint(folder: Path, layout: str, weights: dict[str, Tensor]) -> Path:
    """A checkpoint of `weights`, in one file or in two shards with an index."""
    copy_without_weights(folder)
    kind, parts = layout.split("-")
    stem, end = ("model", ".safetensors") if kind == "safetensors" else ("pytorch_model", ".bin")
    names = sorted(weights)
    shards = [names] if parts == "1" else [names[::2], names[1::2]]
    index: dict[str, str] = {}
    for i, shard in enumerate(shards, 1):
        file = f"{stem}{end}" if len(shards) == 1 else f"{stem}-{i:05}-of-{len(shards):05}{end}"
        part = {name: weights[name] for name in shard}
        if kind == "safetensors":
            save_file(part, folder / file, metadata={"format": "pt"})
        else:
            torch.save(part, folder / file)
        index |= dict.fromkeys(shard, file)
    if len(shards) > 1:
        size = sum(weight.nbytes for weight in weights.values())
        text = json.dumps({"metadata": {"total_size": size}, "weight_map": index})
        (folder / f"{stem}{end}.index.json").write_text(text, encoding="utf-8")
    return folder
