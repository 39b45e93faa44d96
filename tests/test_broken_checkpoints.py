"""Checkpoints that are broken, absurd or hostile: one line that names what is wrong."""

import io
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CHECKPOINT, GOLDEN, Fails, export
from safetensors.torch import load_file, save_file
from torch import Tensor

from janus.models import MultiModalityCausalLM, VLChatProcessor
from janus_dola.programs import answer as answer_program
from janus_dola.programs import checkpoint as checkpoint_program

WIDE = GOLDEN / "expected" / "images" / "wide.png"
TEXT = [f"model_path={CHECKPOINT}", "device=cpu", "generation.max_new_tokens=2"]


WEIGHTS = load_file(CHECKPOINT / "model.safetensors")
HEAD = "language_model.lm_head.weight"


class Payload:
    """Unpickling it makes a folder where the process is."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("ran",)


def saved(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def set_keys(file: str, **keys: Any) -> Callable[[Path], None]:
    """Changes a JSON file: ... takes a key out, a dict is merged into the one that is there."""

    def change(folder: Path) -> None:
        content = json.loads((folder / file).read_text(encoding="utf-8"))
        for key, value in keys.items():
            old = content.pop(key, None)
            if value is not ...:
                content[key] = old | value if isinstance(value, dict) and isinstance(old, dict) else value
        (folder / file).write_text(json.dumps(content), encoding="utf-8")

    return change


def file_of(name: str, content: bytes | str) -> Callable[[Path], None]:
    """Writes a file; one of other weights takes the place of the weights."""

    def change(folder: Path) -> None:
        if name.startswith("pytorch_model"):
            (folder / "model.safetensors").unlink()
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return change


def weights(**changed: Tensor | None) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        merged = WEIGHTS | {HEAD: changed["head"]}
        kept = {name: weight for name, weight in merged.items() if weight is not None}
        save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})

    return change


def lose_a_shard(folder: Path) -> None:
    names = sorted(WEIGHTS)
    files = [f"pytorch_model-{i:05}-of-00002.bin" for i in (1, 2)]
    torch.save({name: WEIGHTS[name] for name in names[::2]}, folder / files[0])
    index = {name: files[i % 2] for i, name in enumerate(names)}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    (folder / "model.safetensors").unlink()


def second_shard(name: str, text: str | None = None) -> Callable[[Path], None]:
    """Writes two shards without metadata, the second under this name; `text` is what stands there, if not weights."""

    def change(folder: Path) -> None:
        stored = load_file(folder / "model.safetensors")
        names, files = sorted(stored), ["model-00001-of-00002.safetensors", name.replace("FOLDER", str(folder))]
        for i, file in enumerate(files):
            save_file({key: stored[key] for key in names[i::2]}, folder / file)
        if text is not None:
            (folder / files[1]).write_text(text)
        index = {key: files[i % 2] for i, key in enumerate(names)}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
        (folder / "model.safetensors").unlink()

    return change


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 4178000000\n"
PULL = "has a git-lfs pointer in place of {}: `git lfs pull`"
OUTSIDE = r"its model\.safetensors\.index\.json must name files of the folder, got '(\.\.)?/"
VISION = json.loads((CHECKPOINT / "config.json").read_text(encoding="utf-8"))["vision_config"]["params"]
# In transformers' own layout as well.
BROKEN_WEIGHTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "a pointer": (file_of("model.safetensors", POINTER), PULL.format("model.safetensors")),
    "a pointer for a bin": (file_of("pytorch_model.bin", POINTER), PULL.format("pytorch_model.bin")),
    "a pointer for a shard": (second_shard("b.safetensors", text=POINTER), PULL.format("b.safetensors")),
    "a shard above the folder": (second_shard("../b.safetensors"), OUTSIDE),
    "a shard anywhere": (second_shard("FOLDER/../b.safetensors"), OUTSIDE),
    "heads": (
        set_keys("config.json", vision_config={"params": VISION | {"heads": -1}, "num_attention_heads": -1}),
        r"vision_config\.(params\.heads must be a positive number|num_attention_heads must be at least 1), got -1",
    ),
}  # fmt: skip
BROKEN_TOKENIZERS: dict[str, tuple[Callable[[Path], None], str]] = {
    "a pointer for a tokenizer": (file_of("tokenizer.json", POINTER), PULL.format("tokenizer.json")),
    "a length": (set_keys("tokenizer_config.json", model_max_length={}), "model_max_length must be a number, got {}"),
}
BROKEN_IN_PROGRAMS: dict[str, tuple[Callable[[Path], None], str]] = {
    "a pointer for a config": (file_of("config.json", POINTER), PULL.format("config.json")),
    "fp8": (
        set_keys("config.json", quantization_config={"quant_method": "fp8"}),
        "give dtype=bfloat16, or take it out|lacks the weights",  # where there is a GPU
    ),
    "fp8 and a vocabulary": (
        set_keys(
            "config.json",
            quantization_config={"quant_method": "fp8"},
            language_config={"vocab_size": 10**8},
            text_config={"vocab_size": 10**8},
        ),
        r"but its config\.json describes \[100000000, 64\]",
    ),
}
SAFETENSORS = (CHECKPOINT / "model.safetensors").read_bytes()
BROKEN: dict[str, tuple[Callable[[Path], None], str]] = {
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "no file named model.safetensors"),
    "a missing shard": (lose_a_shard, "pytorch_model-00002-of-00002.bin"),
    "an empty index": (file_of("pytorch_model.bin.index.json", "{}"), "KeyError: 'weight_map'"),
    "a wrong shape": (weights(head=torch.zeros(3, 5)), rf"{HEAD} in the shape \[3, 5\], but .* \[512, 64\]"),
    "a missing key": (weights(head=None), f"lacks the weights {HEAD}"),
    "half a safetensors": (file_of("model.safetensors", SAFETENSORS[:3_000_000]), "a broken file of weights"),
    "an empty safetensors": (file_of("model.safetensors", b""), "a broken file of weights"),
    "a huge safetensors header": (file_of("model.safetensors", b"\xff" * 7 + b"\x7f{}"), "a broken file of weights"),
    "half a bin": (file_of("pytorch_model.bin", saved(WEIGHTS)[:1_000_000]), "PytorchStreamReader failed"),
    "an empty bin": (file_of("pytorch_model.bin", b""), "a broken file of weights"),
    "a bin that is text": (file_of("pytorch_model.bin", "garbage" * 9), "a pickle that is broken or holds more"),
    "a bin that runs code": (file_of("pytorch_model.bin", saved({HEAD: Payload()})), "pickle that is broken or"),
    "a pickle that runs code": (file_of("pytorch_model.bin", pickle.dumps(Payload(), 2)), "pickle that is broken or"),
    "a bin of a list": (file_of("pytorch_model.bin", saved([1, 2])), "TypeError"),
    "no language_config": (set_keys("config.json", language_config=...), "language_config must be a mapping, got None"),
    "a part not a mapping": (set_keys("config.json", vision_config=5), "vision_config must be a mapping, got 5"),
    "params that are none": (set_keys("config.json", vision_config={"params": 5}), "TypeError"),
    "a config that is a list": (file_of("config.json", "[]"), "AttributeError|no model_type"),
    "a config that is cut": (file_of("config.json", "{"), "is not a valid JSON file"),
    "a width that is text": (set_keys("config.json", language_config={"hidden_size": "big"}), "'hidden_size'"),
    "more layers than weights": (
        set_keys("config.json", language_config={"num_hidden_layers": 31}),
        r"num_hidden_layers must be at most 30, the language_model\.model\.layers in the weights, got 31",
    ),
    "an unknown activation": (set_keys("config.json", language_config={"hidden_act": "evil"}), "KeyError: 'evil'"),
    "heads that are text": (set_keys("config.json", vision_config={"params": VISION | {"heads": "x"}}), "got 'x'"),
    "heads that do not fit": (
        set_keys("config.json", vision_config={"params": VISION | {"heads": 3}}),
        "vision_config.params.heads must divide width, 64, got 3",
    ),
    "JanusFlow": (set_keys("config.json", vision_und_enc_config={}), "JanusFlow's, and JanusFlow is not supported"),
    **BROKEN_WEIGHTS,
}  # fmt: skip
BROKEN_PROCESSORS: dict[str, tuple[Callable[[Path], None], str]] = {
    "no preprocessor": (lambda folder: (folder / "preprocessor_config.json").unlink(), "Can't load image processor"),
    "a preprocessor that is a list": (file_of("preprocessor_config.json", "[]"), "AttributeError"),
    "no image_size": (set_keys("preprocessor_config.json", image_size=...), "'image_size'"),
    "a mean of two": (set_keys("preprocessor_config.json", image_mean=[1, 2]), "image_mean must be 3 numbers"),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), "the backend tokenizer"),
    "a tokenizer that is cut": (file_of("tokenizer.json", "{"), "JSONDecodeError"),
    "no image tokens": (set_keys("processor_config.json", num_image_tokens=-5), "num_image_tokens must be .* got -5"),
    "a tag that is no token": (set_keys("processor_config.json", image_start_tag="<no>"), "has no token '<no>'"),
    **BROKEN_TOKENIZERS,
}


def broken_copy(folder: Path, change: Callable[[Path], None]) -> Path:
    shutil.copytree(CHECKPOINT, folder)
    change(folder)
    return folder


@pytest.mark.parametrize("name", BROKEN)
def test_broken_checkpoints(fails: Fails, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str) -> None:
    change, message = BROKEN[name]
    monkeypatch.chdir(tmp_path)
    folder = broken_copy(tmp_path / "checkpoint", change)
    with pytest.raises(Exception) as error:  # of any kind, as transformers has it; what it says is checked
        MultiModalityCausalLM.from_pretrained(folder, dtype=torch.float32)
    said = f"{type(error.value).__name__}: {error.value}"
    line = fails(answer_program.run, f"model_path={folder}", *TEXT[1:], "question=What?")
    assert re.search(message, said) and re.search(message, line), (said, line)
    assert "weights_only" not in said + line  # PyTorch advises to switch it off
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", BROKEN_PROCESSORS)
def test_broken_processors(fails: Fails, tmp_path: Path, name: str) -> None:
    change, message = BROKEN_PROCESSORS[name]
    folder = broken_copy(tmp_path / "checkpoint", change)
    with pytest.raises(Exception) as error:  # as above
        VLChatProcessor.from_pretrained(folder)
    said = f"{type(error.value).__name__}: {error.value}"
    line = fails(answer_program.run, f"model_path={folder}", *TEXT[1:], "question=What?")
    assert re.search(message, said) and re.search(message, line), (said, line)


@pytest.fixture(scope="module")
def layouts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {"published": CHECKPOINT, "native": export(CHECKPOINT, tmp_path_factory.mktemp("native") / "folder")}


@pytest.mark.parametrize(
    ("layout", "name"),
    [
        *(("native", name) for name in BROKEN_WEIGHTS | BROKEN_TOKENIZERS | BROKEN_IN_PROGRAMS),
        *(("published", name) for name in BROKEN_IN_PROGRAMS),
    ],
)
def test_the_command_line_names_what_is_broken(
    fails: Fails, layouts: dict[str, Path], tmp_path: Path, layout: str, name: str
) -> None:
    change, message = (BROKEN_WEIGHTS | BROKEN_TOKENIZERS | BROKEN_IN_PROGRAMS)[name]
    folder = shutil.copytree(layouts[layout], tmp_path / "checkpoint")
    change(folder)
    line = fails(answer_program.run, f"model_path={folder}", *TEXT[1:], "dtype=float32", "question=What?")
    assert re.search(message, line) and str(folder) in line, line


@pytest.mark.parametrize("layout", ["published", "native"])
def test_shards_without_metadata_load(capsys: Any, layouts: dict[str, Path], tmp_path: Path, layout: str) -> None:
    folder, said = shutil.copytree(layouts[layout], tmp_path / "checkpoint"), []
    for change in (lambda folder: None, second_shard("b.safetensors")):
        change(folder)
        answer_program.run([f"model_path={folder}", *TEXT[1:], "question=What?"])
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] != ""


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("processor_config.json", {"num_image_tokens": 17}, "num_image_tokens must be 16, as the vision_config of"),
        ("processor_config.json", {"num_image_tokens": 10**9}, "num_image_tokens must be an integer from 1 to"),
        ("preprocessor_config.json", {"image_size": 10**9}, "image_size must be 64, as the vision_config of"),
    ],
)
def test_a_processor_of_other_sizes_than_the_vision_tower(
    fails: Fails, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, file: str, change: dict[str, Any], message: str
) -> None:
    """It is refused before it makes an image, or the tokens of one, of which memory would see the end."""
    folder = broken_copy(tmp_path / "checkpoint", set_keys(file, **change))
    monkeypatch.setattr(checkpoint_program, "load_model", None)
    arguments = [f"model_path={folder}", *TEXT[1:], f"images=[{WIDE}]", "question=What?"]
    assert message in fails(answer_program.run, *arguments)


def test_another_package_or_module_of_the_name_janus(tmp_path: Path) -> None:
    """The registry's is an async queue. Both in one process, as importing takes seconds."""
    for file in ("package/janus/__init__.py", "module/janus.py"):
        (tmp_path / file).parent.mkdir(parents=True)
        (tmp_path / file).write_text("class Queue: pass\n", encoding="utf-8")
    code = """
import sys
# An editable install of ours would find the submodules of theirs.
sys.meta_path = [f for f in sys.meta_path if '__editable__' not in repr(f)]
from janus_dola.programs import main
for folder in ("package", "module"):
    sys.path.insert(0, folder)
    sys.modules.pop("janus", None)
    try:
        main()
    except SystemExit as exit_:
        print(exit_.code, sys.modules["janus"].__file__)
"""
    result = subprocess.run(
        [sys.executable, "-c", code, *TEXT, "question=What?"],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
    )
    assert result.stdout.splitlines() == [
        f"2 {tmp_path / file}" for file in ("package/janus/__init__.py", "module/janus.py")
    ], result.stderr
    line = r"error: janus\.\w+ is missing: the package 'janus' here is another one .*\n"
    assert re.fullmatch(line * 2, result.stderr)


def test_code_beside_the_weights_is_not_run(capsys: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = broken_copy(tmp_path / "checkpoint", lambda folder: None)
    for name in ("evil.py", "custom_generate/generate.py"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("import os\nos.mkdir('ran')\n")
    names = {"config": "AutoConfig", "processor_config": "AutoProcessor", "preprocessor_config": "AutoImageProcessor"}
    for file, auto in (names | {"tokenizer_config": "AutoTokenizer"}).items():
        set_keys(f"{file}.json", auto_map={auto: "evil.Evil", "AutoModelForCausalLM": "evil.Evil"})(folder)
    monkeypatch.chdir(tmp_path)
    answer_program.run([*TEXT, "question=What?"])
    want = capsys.readouterr().out
    answer_program.run([f"model_path={folder}", *TEXT[1:], "question=What?"])
    assert capsys.readouterr().out == want
    assert not (tmp_path / "ran").exists()
