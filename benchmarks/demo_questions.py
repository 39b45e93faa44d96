"""Questions about scenes of the demo's test set, as calibrate reads them: -m benchmarks.demo_questions FOLDER COUNT

FOLDER/data.jsonl has questions of presence in POPE's form, the others with their answers; the pictures are beside it.
"""

import json
import sys
from pathlib import Path

from demo.evaluate import SEED, drawn
from demo.scenes import examples


def write(folder: Path, count: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    lines: list[dict[str, str | list[str]]] = []
    for i, (scene, question) in enumerate(examples("test", SEED, count)):
        drawn(scene, i).save(folder / f"{i}.png")
        if question.kind.startswith("presence"):
            label = question.answer.split(",")[0].lower()
            lines.append({"image": str(folder / f"{i}.png"), "text": question.text, "label": label})
        else:
            images = [str(folder / f"{i}.png")]
            lines.append({"images": images, "question": question.text, "answer": question.answer})
    (folder / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


if __name__ == "__main__":
    write(Path(sys.argv[1]).resolve(), int(sys.argv[2]))
