"""The program `report`: a batch run as a page. What it does is told by `keys.ReportConfig`."""

import base64
import io
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader
from tqdm import tqdm

from janus.utils.io import load_image
from janus_dola.programs import checkpoint
from janus_dola.programs.differences import differences
from janus_dola.programs.keys import BASELINE, ReportConfig
from janus_dola.programs.measures import interval, is_right, summarize, yes_or_no
from janus_dola.programs.options import ModelConfig, merge, read_config
from janus_dola.programs.prompts import DOLA_KEYS, IMAGE_TAG, Prompt, read_prompts
from janus_dola.programs.results import check_files, read_results, result_files

SIDE = 160  # pixels of a picture's longer side: 500 of noise, the worst to compress, are 10 MB
DOLA = "on"


def run(argv: Sequence[str]) -> None:
    config = read_config(ReportConfig, argv, default=None)
    check_files({"report": [config.report]}, {"prompts": [config.prompts], "output": result_files(config.output)})
    settings, lines = read_results(config.output)
    keys = ("model_path", "roles", "generation", *DOLA_KEYS)
    if lacking := [key for key in (*keys, "compare") if key not in settings]:
        raise ValueError(
            f"output must be answers of janus-dola, got {config.output!r}, whose settings lack {lacking[0]}"
        )
    model = ModelConfig(**merge(ModelConfig, [{key: settings[key] for key in keys}]))
    model_config = checkpoint.load_config(model.model_path)
    processor = checkpoint.load_processor(model, model_config)
    prompts, _ = read_prompts(model, config.prompts, processor, model_config, image_root=config.image_root)
    if any("error" not in line for line in lines.values()) and not any(is_of(prompt, lines) for prompt in prompts):
        raise ValueError(f"prompts must be the file that {config.output!r} answers, got {config.prompts!r}")
    write_report(config.report, config.output, prompts)


def write_report(path: str | PathLike[str], output: str | PathLike[str], prompts: Sequence[Prompt]) -> None:
    """Writes the page, and says so in a line on stderr.

    Args:
        path: Where to.
        output: The run's answers, as far as they are there.
        prompts: The run's good prompts.
    """
    settings, lines = read_results(output)
    answered = [(prompt, lines[prompt.id]) for prompt in prompts if is_of(prompt, lines)]
    done = [(prompt, line) for prompt, line in answered if "error" not in line]
    good = {prompt.id for prompt in prompts}
    bad = [line for line in lines.values() if line["id"] not in good and "error" in line]
    judged = [(prompt, line) for prompt, line in done if prompt.form is not None]
    results = [{name: judge(prompt, text) for name, text in texts(line).items()} for prompt, line in judged]
    changed = np.array([is_changed(line) for _, line in done], dtype=float)
    page = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    counts = {
        "all": len(answered) + len(bad),
        "changed": int(changed.sum()),
        "error": len(answered) - len(done) + len(bad),
    }
    page.get_template("report.html").stream(
        title=output,
        settings=settings,
        compare=settings["compare"],
        counts=counts,
        waiting=len(prompts) - len(answered),
        answered=len(done),
        changed_interval=interval(changed) if done else None,
        table=summarize([prompt for prompt, _ in judged], results) if judged else {},
        baseline=BASELINE,
        layers=sorted({layer for _, line in done for layer in line["layers"] or ()}),
        rows=rows(answered, bad, settings),
    ).dump(str(path), encoding="utf-8")
    says = f"{counts['changed']} changed by DoLa, " if settings["compare"] else ""
    print(f"{path}: {len(done)} answers, {says}{counts['error']} errors", file=sys.stderr)


def is_of(prompt: Prompt, lines: Mapping[str | int, Mapping[str, Any]]) -> bool:
    """Whether a prompt has a line, and an answer is one to it as it is now."""
    line = lines.get(prompt.id)
    return line is not None and ("error" in line or line.get("prompt") == prompt.fingerprint)


def texts(line: Mapping[str, Any]) -> dict[str, str]:
    """A line's answers by what they are called; one without `compare` stands in the baseline's place."""
    if "text_baseline" not in line:
        return {BASELINE: line["text"]}
    return {BASELINE: line["text_baseline"], DOLA: line["text"]}


def judge(prompt: Prompt, text: str) -> dict[str, Any]:
    """What `summarize` takes of an answer."""
    return {"correct": is_right(prompt, text), "said": yes_or_no(text)}


def is_changed(line: Mapping[str, Any]) -> bool:
    return line.get("text_baseline", line["text"]) != line["text"]


def rows(
    answered: Sequence[tuple[Prompt, dict[str, Any]]], bad: Sequence[dict[str, Any]], settings: Mapping[str, Any]
) -> Iterator[dict[str, Any]]:
    """What the page shows of each prompt, with a progress bar: the pictures take their time."""
    small = cache(thumbnail)
    for prompt, line in tqdm(answered, desc="report", unit="prompt", disable=None):
        row: dict[str, Any] = {"id": prompt.id, "error": line.get("error"), "kinds": [], "answers": []}
        row["pictures"] = [(name[:80], small(name)) for turn in prompt.turns for name in turn["images"]]
        said = [(turn["role"], turn["content"].replace(IMAGE_TAG, "").strip()) for turn in prompt.turns]
        row["turns"] = [(role, text) for role, text in said if text]
        row["own"] = {key: own for key in DOLA_KEYS if (own := getattr(prompt.dola, key)) != settings[key]}
        row["expected"] = prompt.choices[prompt.answer] if prompt.choices else prompt.answer
        if row["error"] is None:
            found = texts(line)
            right = [is_right(prompt, text) if prompt.form else None for text in found.values()]
            parts = differences(*found.values()) if len(found) == 2 else [[(line["text"], False)]]
            label = "DoLa on" if prompt.dola.use_dola_lm else "DoLa off"
            labels = ["DoLa off", label] if len(found) == 2 else [label]
            row["answers"] = list(zip(labels, parts, right, strict=True))
            kinds = {"changed": is_changed(line), "gained": right == [False, True], "lost": right == [True, False]}
            row["kinds"] = [kind for kind, is_so in kinds.items() if is_so]
            row["layers"], row["chosen"] = line["layers"], sorted(Counter(line["layers"] or ()).items())
        else:
            row["kinds"] = ["error"]
        yield row
    for line in bad:
        yield {"id": line["id"], "error": line["error"], "kinds": ["error"], "answers": []}


def thumbnail(source: str) -> str | None:
    """A small picture as a data URL; None where there is none any more."""
    try:
        image = load_image(source)
    except ValueError:
        return None
    image.thumbnail((SIDE, SIDE))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=75)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
