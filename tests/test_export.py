"""janus-dola export: a folder that transformers loads, answers as the published layout, and whose generate is DoLa."""

import copy
import json
import os
import pickle
import re
import resource
import shutil
import signal
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import CHECKPOINT, Fails, export, load_model
from helpers import WEIGHTS, copy_without_weights, write_checkpoint
from PIL import Image
from safetensors.torch import load_file, save_file
from torch._dynamo.utils import counters
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    CompileConfig,
    GenerationConfig,
    JanusForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    TextStreamer,
)
from transformers.models.janus.processing_janus import DEFAULT_SYSTEM_PROMPT

from janus.image_generation import build_prompt, generate_images
from janus.models import MultiModalityCausalLM, VLChatProcessor
from janus_dola import DoLaConfig, DoLaJanusWrapper, DoLaTrace
from janus_dola.programs import export as program
from janus_dola.programs.options import ModelConfig, read_config
from janus_dola.programs.prompts import IMAGE_TAG

ROOT = Path(__file__).parents[1]
PUBLISHED = {"demo": ROOT / "demo" / "checkpoint", "golden": CHECKPOINT}
PICTURES = [ROOT / "demo" / "images" / name for name in ("wide.png", "scene.png")]
ROLES = ["<|User|>", "<|Assistant|>"]
BEGIN = f"<｜begin▁of▁sentence｜>{DEFAULT_SYSTEM_PROMPT}"  # the template has it, for servers that render nothing else
SHORT = {"max_new_tokens": 12, "do_sample": False}
STATIC = DoLaConfig(alpha=0.0, candidate_layers=[1])  # its answers are others than the baseline's


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Where transformers copies the folders' code to."""
    with pytest.MonkeyPatch.context() as patch:
        folder = str(tmp_path_factory.mktemp("modules"))
        patch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", folder)
        patch.syspath_prepend(folder)
        yield


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    parent = tmp_path_factory.mktemp("exported")
    return {name: export(path, parent / name) for name, path in PUBLISHED.items()}


def load(folder: Path) -> Any:
    return AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def models(folders: dict[str, Path]) -> dict[str, Any]:
    return {name: load(folder) for name, folder in folders.items()}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> str:
    """DoLa alone."""
    folder = tmp_path_factory.mktemp("small") / "dola"
    program.run([f"out={folder}"])
    return str(folder)


def messages(turns: list[tuple[str, str]], images: list[Any], text_first: bool = False) -> list[dict[str, Any]]:
    """(role, text) as clients of transformers and OpenAI write them; the images are in the user's first turn."""
    given = []
    for i, (role, text) in enumerate(turns):
        content = [{"type": "image", "image": image} for image in images if i == 0]
        content.insert(0 if text_first else len(content), {"type": "text", "text": text})
        given.append({"role": role, "content": content})
    return given


CONVERSATIONS: dict[str, tuple[list[tuple[str, str]], int]] = {
    "no picture": ([("user", "How many shapes are there?")], 0),
    "one picture": ([("user", "  Is there a red circle?\n")], 1),
    "two pictures": ([("user", "Describe the images.")], 2),
    "two turns": ([("user", "What is it?"), ("assistant", " A ring. "), ("user", "Where is it?")], 1),
    "Chinese": ([("user", "图中有几个形状？  中文")], 1),
}


def inputs_of(name: str, folder: Path, case: str, text_first: bool = False) -> tuple[Any, Any]:
    """Of the exported folder's processor, and of the published layout's."""
    turns, n_images = CONVERSATIONS[case]
    images = [Image.open(path).convert("RGB") for path in PICTURES[:n_images]]
    theirs = AutoProcessor.from_pretrained(folder).apply_chat_template(
        messages(turns, images, text_first),
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    given = [{"role": ROLES[role == "assistant"], "content": text} for role, text in turns]
    given[0]["content"] = f"{IMAGE_TAG}\n" * n_images + given[0]["content"]
    given.append({"role": ROLES[1], "content": ""})
    return theirs, VLChatProcessor.from_pretrained(PUBLISHED[name])(conversations=given, images=images)


@pytest.mark.parametrize("case", CONVERSATIONS)
@pytest.mark.parametrize("name", PUBLISHED)
def test_prompts_are_those_of_the_published_processor(folders: dict[str, Path], name: str, case: str) -> None:
    for text_first in (False, True):
        got, want = inputs_of(name, folders[name], case, text_first)
        assert got.input_ids.equal(want.input_ids) and got.attention_mask.equal(want.attention_mask)
        if "pixel_values" in got:
            torch.testing.assert_close(got.pixel_values, want.pixel_values[0], atol=1e-5, rtol=0)
    assert ("pixel_values" in got) == (CONVERSATIONS[case][1] > 0)


def test_several_texts_keep_their_places_and_a_system_message_its_own(folders: dict[str, Path]) -> None:
    processor = AutoProcessor.from_pretrained(folders["demo"])
    image, texts = {"type": "image", "url": "x"}, [{"type": "text", "text": text} for text in ("A", "B")]
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": [texts[0], image, texts[1]]}]
    prompt = processor.apply_chat_template(turns, add_generation_prompt=True)
    assert prompt == f"{BEGIN}Be brief.\n\n<|User|>: A\n{IMAGE_TAG}\nB\n\n<|Assistant|>:"
    with pytest.raises(Exception, match="role must be system, user or assistant, got tool"):
        processor.apply_chat_template([{"role": "tool", "content": "A"}])


def test_roles(tmp_path: Path) -> None:
    folder = export(CHECKPOINT, tmp_path / "roles", 'roles=[User,"the ""assistant"]'.replace('""', "'"))
    prompt = AutoProcessor.from_pretrained(folder).apply_chat_template(
        [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}], add_generation_prompt=True
    )
    assert prompt == BEGIN + "User: Hi\n\nthe 'assistant: Ho<｜end▁of▁sentence｜>the 'assistant:"


def differ(width: int, height: int, size: int, min_size: int = 14) -> bool:
    """What docs/python.md says of transformers' image processor, which rounds where the published one cuts."""
    short = min(width, height) * size / max(width, height)
    return round(short) != int(short) and round(short) > min_size


@pytest.mark.parametrize("name", PUBLISHED)
def test_pixels_differ_where_rounding_does(folders: dict[str, Path], name: str) -> None:
    theirs, ours = AutoProcessor.from_pretrained(folders[name]), VLChatProcessor.from_pretrained(PUBLISHED[name])
    size, found = ours.image_processor.image_size, []
    for width, height in [(97, 97), (97, 40), (30, 83), (120, 119), (400, 5), (71, 50), (256, 192), (100, 65), (7, 3)]:
        pixels = torch.randint(256, (height, width, 3), generator=torch.Generator().manual_seed(width)).byte().numpy()
        image = Image.fromarray(pixels)
        got = theirs.image_processor([image], return_tensors="pt")["pixel_values"][0]
        want = ours.image_processor([image])["pixel_values"][0]
        found.append(not torch.allclose(got, want, atol=1e-5))
        assert found[-1] == differ(width, height, size), (width, height)
    assert 0 < sum(found) < len(found)


@pytest.mark.parametrize("name", PUBLISHED)
def test_it_answers_as_the_published_layout(folders: dict[str, Path], models: dict[str, Any], name: str) -> None:
    """Logits, and tokens of greedy search and beams, with DoLa off and on: by generate as the folder has it."""
    model, published = models[name], MultiModalityCausalLM.from_pretrained(PUBLISHED[name], dtype=torch.float32).eval()
    for case, how in (("two pictures", {}), ("two turns", {"num_beams": 3}), ("no picture", {})):
        given, batch = inputs_of(name, folders[name], case)
        with torch.inference_mode():
            embeds = published.prepare_inputs_embeds(**batch)
            want = published.language_model(inputs_embeds=embeds).logits
            torch.testing.assert_close(model(**given).logits, want, atol=1e-5, rtol=0)
        answers = []
        for use_dola_lm in (False, True):
            keys = {"use_dola_lm": use_dola_lm, "alpha": 0.0, "candidate_layers": [3]}
            ids = model.generate(**given, **keys, **SHORT, **how)[:, given.input_ids.shape[1] :]
            end = {key: getattr(model.generation_config, key) for key in ("eos_token_id", "pad_token_id")}
            answers.append(
                DoLaJanusWrapper(published, DoLaConfig(**keys)).generate(
                    inputs_embeds=embeds, attention_mask=batch.attention_mask, **end, **SHORT, **how
                )
            )
            assert ids.equal(answers[-1])
        assert not answers[0].equal(answers[1])


@pytest.mark.parametrize("name", PUBLISHED)
def test_picture_tokens_are_those_of_the_published_layout(
    folders: dict[str, Path], models: dict[str, Any], name: str
) -> None:
    """generate of the folder leaves them to Janus' own: it called itself without end."""
    ours, published = (
        VLChatProcessor.from_pretrained(PUBLISHED[name]),
        MultiModalityCausalLM.from_pretrained(PUBLISHED[name], dtype=torch.float32),
    )
    prompt = build_prompt(ours, "a red circle")
    sides = {"img_size": 64, "patch_size": 16, "image_token_num_per_image": 16}
    want, _ = generate_images(published.eval(), ours, prompt, temperature=0, parallel_size=1, **sides)
    given = AutoProcessor.from_pretrained(folders[name])(
        text=prompt.removesuffix(ours.image_start_tag), generation_mode="image", return_tensors="pt"
    )
    got = models[name].generate(**given, generation_mode="image", do_sample=False)
    assert got.equal(want) and got.unique().numel() > 1


# custom_generate.


@pytest.fixture(scope="module")
def given(folders: dict[str, Path]) -> Any:
    return inputs_of("demo", folders["demo"], "one picture")[0]


def scores(model: Any, given: Any, **how: Any) -> tuple[Any, torch.Tensor]:
    output = model.generate(**given, **({"max_new_tokens": 6, "do_sample": False} | how), return_dict_in_generate=True,
                            output_scores=True)  # fmt: skip
    return output.sequences, torch.stack(output.scores)


def assert_same(got: Any, want: Any) -> None:
    assert got[0].equal(want[0]) and got[1].equal(want[1])


def test_which_configuration_counts(folders: dict[str, Path], tmp_path: Path, given: Any) -> None:
    """Arguments over the call's generation config, over the folder's."""
    saved = {"alpha": 0.3, "candidate_layers": [2, 4], "bucket_id": 1}
    model = load(export(PUBLISHED["demo"], tmp_path / "demo", *[f"{key}={value}" for key, value in saved.items()]))

    def want(**keys: Any) -> Any:
        return scores(DoLaJanusWrapper(model, DoLaConfig(**saved | keys)), given)

    assert_same(scores(model, given), want())
    assert_same(scores(model, given, alpha=0.5), want(alpha=0.5))
    in_config = GenerationConfig(alpha=0.0, candidate_layers=None, bucket_id=0)
    assert_same(scores(model, given, generation_config=in_config), want(alpha=0.0, candidate_layers=None, bucket_id=0))
    assert_same(
        scores(model, given, generation_config=in_config, bucket_id=2, candidate_layers=[3]),
        want(alpha=0.0, candidate_layers=[3]),
    )
    assert not scores(model, given)[1].equal(scores(model, given, alpha=0.0)[1])
    assert model.generation_config.alpha == 0.3
    with pytest.raises(ValueError, match=r"alpha must be in \[0, 1\], got 7"):
        model.generate(**given, alpha=7)
    with pytest.raises(ValueError, match="alhpa"):
        model.generate(**given, alhpa=0.1)


def test_a_prompt_longer_than_the_positions_is_refused(models: dict[str, Any]) -> None:
    """It answered "right is right is right"."""
    model = models["demo"]
    positions = model.config.get_text_config().max_position_embeddings
    ids = torch.full((2, positions - 2), 5)
    message = rf"too long: the prompt's {positions - 2} tokens and 3 new ones \(max_new_tokens\) are more than the mod"
    in_config = {"generation_config": GenerationConfig(max_new_tokens=3)}
    for args, how in (((ids,), {}), ((), {"input_ids": ids}), ((), {"input_ids": ids, "use_dola_lm": False})):
        for new in ({"max_new_tokens": 3}, in_config):
            with pytest.raises(ValueError, match=message):
                model.generate(*args, **how, **new)


def test_off_is_the_baseline(folders: dict[str, Path], models: dict[str, Any], given: Any) -> None:
    baseline = JanusForConditionalGeneration.from_pretrained(folders["demo"], dtype=torch.float32).eval()
    for how in ({}, {"num_beams": 2}, {"do_sample": True, "temperature": 2.0}):
        results = []
        for model, off in ((models["demo"], {"use_dola_lm": False}), (baseline, {})):
            torch.manual_seed(0)
            results.append(scores(model, given, **off, **how))
        assert_same(*results)


@pytest.mark.parametrize("how", [{"do_sample": True, "temperature": 2.0}, {"num_beams": 2}, {}], ids=str)
def test_it_is_the_wrapper(models: dict[str, Any], given: Any, capsys: Any, how: dict[str, Any]) -> None:
    model, said, traces = models["demo"], [], [DoLaTrace(), DoLaTrace()]
    results = []
    for i, (generator, keys) in enumerate(((model, vars(STATIC)), (DoLaJanusWrapper(model, STATIC), {}))):
        torch.manual_seed(0)
        streamer = None if "num_beams" in how else TextStreamer(_tokenizer(), skip_prompt=True)
        results.append(scores(generator, given, **keys, **how, streamer=streamer, trace=traces[i]))
        said.append(capsys.readouterr().out)
    assert_same(*results)
    assert said[0] == said[1] and bool(said[0]) == ("num_beams" not in how)
    assert traces[0].layers.equal(traces[1].layers) and traces[0].layers.eq(1).any()


def _tokenizer() -> Any:
    return VLChatProcessor.from_pretrained(PUBLISHED["demo"]).tokenizer


def test_it_is_compiled_once_and_what_is_compiled_is_not_copied(tmp_path: Path) -> None:
    """Each call makes a wrapper of its own; the graph outlives them, whatever alpha. Copies of the model are whole."""
    few = {name: weight for name, weight in WEIGHTS.items() if not re.search(r"model\.layers\.(\d\d|[4-9])\.", name)}
    published = changed(tmp_path / "published", few, num_hidden_layers=4)  # PyTorch compiles layer by layer
    model, prompt = load(export(published, tmp_path / "native")), {"input_ids": torch.arange(5, 17)[None]}
    torch._dynamo.reset()
    compile_config = CompileConfig(backend="eager", mode="default", fullgraph=True)
    compile_config._compile_all_devices = True
    static = {"cache_implementation": "static", "compile_config": compile_config, "candidate_layers": [1, 2]}
    want = [scores(model, prompt, candidate_layers=[1, 2], alpha=alpha) for alpha in (0.1, 0.9)]
    counters.clear()
    got = [scores(model, prompt, **static, alpha=0.1)]
    compiled = counters["stats"]["unique_graphs"], counters["frames"]["total"]
    assert compiled[0] == 2 and not counters["graph_break"]  # of the forward pass, and of the formulas
    got += [scores(model, prompt, **static, alpha=0.9)]
    assert (counters["stats"]["unique_graphs"], counters["frames"]["total"]) == compiled
    for (ids, logits), (want_ids, want_logits) in zip(got, want, strict=True):
        assert ids.equal(want_ids)
        torch.testing.assert_close(logits, want_logits, atol=1e-4, rtol=0)
    for copied in (copy.deepcopy(model), copy.deepcopy(model._dola).model):
        assert copied is not model and copied.lm_head.weight is not model.lm_head.weight
        assert copied._dola.model is copied and not copied._dola._compiled and model._dola._compiled
        assert_same(scores(copied, prompt, candidate_layers=[1, 2]), want[0])
    torch._dynamo.reset()


def test_a_wrapper_is_pickled_with_its_model(prompt: dict[str, Any]) -> None:
    model = load_model()  # of its own: transformers may have left hooks on the shared one, which cannot be pickled
    wrapper = pickle.loads(pickle.dumps(DoLaJanusWrapper(model, STATIC)))
    assert wrapper.model is not model and wrapper.config == STATIC
    assert wrapper.generate(**prompt).equal(DoLaJanusWrapper(model, STATIC).generate(**prompt))


TINY: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 5, "num_attention_heads": 4,
    "num_key_value_heads": 2, "initializer_range": 0.3, "eos_token_id": 96, "pad_token_id": 0,
}  # fmt: skip


@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Janus"])
def test_models_that_were_never_exported(family: str, small: str, folders: dict[str, Path], given: Any) -> None:
    torch.manual_seed(0)
    prompt: Any = {
        "input_ids": torch.tensor([[5, 6, 7, 8], [0, 0, 22, 23]]),
        "attention_mask": torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]]),
    }
    if family == "Llama":
        model: Any = LlamaForCausalLM(LlamaConfig(**TINY))
    elif family == "Qwen2":
        model = Qwen2ForCausalLM(Qwen2Config(**TINY))
    else:
        model, prompt = JanusForConditionalGeneration.from_pretrained(folders["demo"], dtype=torch.float32), given
    model = model.eval()
    for config in (DoLaConfig(candidate_layers=[1, 2, 3]), DoLaConfig(alpha=0.5), DoLaConfig(use_dola_lm=False)):
        asked = {"custom_generate": small, "trust_remote_code": True}
        got = scores(model, prompt, **asked, **{k: v for k, v in vars(config).items() if v != vars(DoLaConfig())[k]})
        assert_same(got, scores(DoLaJanusWrapper(model, config), prompt))
    with pytest.raises(ValueError, match="trust_remote_code"):
        model.generate(**prompt, custom_generate=small, trust_remote_code=False)


def test_the_small_folder_is_ready_for_a_hub(small: str) -> None:
    files = {str(file.relative_to(small)) for file in Path(small).rglob("*") if file.is_file()}
    assert files == {"README.md", "custom_generate/generate.py", "custom_generate/requirements.txt"}
    assert "- custom_generate\n" in (Path(small) / "README.md").read_text().split("---")[1]


def test_without_janus_dola_there_is_one_sentence(folders: dict[str, Path], tmp_path: Path) -> None:
    venv.create(tmp_path / "bare", with_pip=False)
    site = Path(sysconfig.get_path("purelib", vars={"base": str(tmp_path / "bare")}))
    (site / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")  # an editable janus_dola is not in it
    code = (
        "from transformers import AutoModelForImageTextToText as Auto\n"
        f"Auto.from_pretrained({str(folders['demo'])!r}, trust_remote_code=True)"
    )
    done = subprocess.run(
        [tmp_path / "bare" / "bin" / "python", "-c", code],
        env=os.environ | {"PYTHONPATH": "", "HF_HOME": str(tmp_path)}, cwd=tmp_path, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        "ImportError: This modeling file requires the following packages that were not found in your environment: "
        "janus_dola. Run `pip install janus_dola`"
    )


# The exporter.


@pytest.mark.parametrize("layout", ["bin-1", "bin-2", "safetensors-2"])
def test_shards(folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str) -> None:
    want = load_file(folders["golden"] / "model.safetensors")
    monkeypatch.setattr(program, "SHARD", 1_000_000)
    folder = export(write_checkpoint(tmp_path / "published", layout, WEIGHTS), tmp_path / "native")
    files = sorted(folder.glob("*.safetensors"))
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    got = [load_file(file) for file in files]
    assert [file.name for file in files] == [
        f"model-{i:05}-of-{len(files):05}.safetensors" for i in range(1, len(files) + 1)
    ]
    for file, part in zip(files, got, strict=True):
        assert {name for name, where in index["weight_map"].items() if where == file.name} == part.keys()
        assert sum(weight.nbytes for weight in part.values()) <= 1_000_000 or len(part) == 1
    assert sum(len(part) for part in got) == len(want) == len(index["weight_map"])
    for name, weight in (item for part in got for item in part.items()):
        assert weight.dtype == want[name].dtype and weight.equal(want[name])
    assert index["metadata"]["total_size"] == sum(weight.nbytes for weight in want.values())
    _, info = JanusForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())


def changed(folder: Path, weights: dict[str, torch.Tensor], **language: Any) -> Path:
    """The golden checkpoint with other weights, and other keys in its language_config."""
    copy_without_weights(folder)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    file = folder / "config.json"
    config = json.loads(file.read_text())
    config["language_config"] |= language
    file.write_text(json.dumps(config))
    return folder


def test_eps_rope_and_tied_embeddings_come_along(model: Any, tmp_path: Path) -> None:
    tied = {name: weight for name, weight in WEIGHTS.items() if name != "language_model.lm_head.weight"}
    rope = {"rope_theta": 500.0, "rope_scaling": {"rope_type": "linear", "factor": 3.0}}
    for i, (weights, language) in enumerate(
        ((WEIGHTS, {"rms_norm_eps": 0.1}), (WEIGHTS, rope), (tied, {"tie_word_embeddings": True}))
    ):
        published = changed(tmp_path / f"published {i}", weights, **language)
        want = MultiModalityCausalLM.from_pretrained(published, dtype=torch.float32).eval()
        got = load(export(published, tmp_path / f"native {i}"))
        ids = torch.randint(480, (2, 40), generator=torch.Generator().manual_seed(0))
        with torch.inference_mode():
            expected = want.language_model(ids).logits
            torch.testing.assert_close(got(input_ids=ids).logits, expected, atol=1e-5, rtol=0)
            assert not torch.allclose(model.language_model(ids).logits, expected, atol=1e-3)


def test_errors(fails: Fails, folders: dict[str, Path], tmp_path: Path) -> None:
    head, out = WEIGHTS["language_model.lm_head.weight"], f"out={tmp_path / 'out'}"
    more = changed(tmp_path / "more", WEIGHTS | {"language_model.model.layers.0.extra.weight": head.clone()})
    less = changed(tmp_path / "less", {name: weight for name, weight in WEIGHTS.items() if "gen_embed" not in name})
    wide = changed(tmp_path / "wide", WEIGHTS | {"gen_embed.weight": head.clone()})
    for keys, message in (
        ([out, f"model_path={more}"], "has weights that transformers' Janus does not: model.language_model.layers.0."),
        ([out, f"model_path={less}"], "lacks the weights model.generation_embeddings.weight; a Janus"),
        ([out, f"model_path={wide}"], "model.generation_embeddings.weight in the shape [512, 64], but"),
        ([out, f"model_path={folders['demo']}"], "must be in the published layout, got transformers' own"),
        ([out, f"model_path={copy_without_weights(tmp_path / 'no')}"], "no' has no weights"),
        ([out, f"model_path={CHECKPOINT}", "candidate_layers=[31]"], "candidate_layers must be in 1...30"),
        ([out, f"model_path={CHECKPOINT}", "alpha=7"], "alpha must be in [0, 1], got 7"),
        ([out, f"model_path={CHECKPOINT}", "generation.max_tokens=7"], "unknown key 'generation.max_tokens'"),
        ([out, f"model_path={CHECKPOINT}", "dtype=bfloat16"], "unknown key 'dtype'"),
        ([out, "alpha=0.3"], "model_path must be given with other keys than out"),
        ([f"out={tmp_path}"], "out must name a folder that does not exist yet, got"),
        ([], "out must name a folder that does not exist yet, got ''"),
    ):  # fmt: skip
        assert message in fails(program.run, *keys), keys
    assert not list(tmp_path.glob("out*"))


def test_killed_half_way_no_folder_looks_finished(tmp_path: Path) -> None:
    """And what is left is not in the way of the next run."""
    code = (
        "import os, signal, sys\nfrom janus_dola.programs import export\nsave = export.save_file\n"
        "def save_and_die(*args, **kwargs):\n    save(*args, **kwargs)\n    os.kill(os.getpid(), signal.SIGKILL)\n"
        "export.save_file = save_and_die\nexport.run(sys.argv[1:])"
    )
    keys = [f"out={tmp_path / 'demo'}", f"model_path={PUBLISHED['demo']}"]
    done = subprocess.run([sys.executable, "-c", code, *keys], cwd=ROOT, check=False)
    assert done.returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert left.name.startswith("demo.") and left.suffix == ".partial"
    program.run(keys)
    assert set(tmp_path.iterdir()) == {left, tmp_path / "demo"}
    assert (tmp_path / "demo" / "config.json").is_file()


def test_nothing_of_the_users_is_deleted_or_written_through(tmp_path: Path) -> None:
    """A folder of the user's by the name of the unfinished one was deleted, and a link of that name written through."""
    (tmp_path / "own.partial").mkdir()
    (tmp_path / "own.partial" / "thesis.txt").write_text("mine")
    program.run([f"out={tmp_path / 'own'}"])
    assert (tmp_path / "own.partial" / "thesis.txt").read_text() == "mine"
    elsewhere = tmp_path / "elsewhere"
    (tmp_path / "link").symlink_to(elsewhere)
    with pytest.raises(ValueError, match="out must name a folder that does not exist yet"):
        program.run([f"out={tmp_path / 'link'}"])
    assert not elsewhere.exists() and (tmp_path / "link").is_symlink()


@pytest.mark.parametrize("empty", [True, False])
def test_of_two_exports_to_one_name_one_says_why_it_stops(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, empty: bool
) -> None:
    """Both wrote into one unfinished folder, and some of what they left was not whole."""
    copy_tree = program.shutil.copytree

    def other_run_first(*args: Any, **kwargs: Any) -> Any:
        (tmp_path / "demo").mkdir()
        if not empty:
            (tmp_path / "demo" / "first.txt").write_text("first")
        return copy_tree(*args, **kwargs)

    monkeypatch.setattr(program.shutil, "copytree", other_run_first)
    with pytest.raises(ValueError, match=r"out must name a folder .* made during this run"):
        program.run([f"out={tmp_path / 'demo'}"])
    assert [path.name for path in tmp_path.iterdir()] == ["demo"]
    assert len(list((tmp_path / "demo").iterdir())) == (not empty)


def test_no_code_of_a_strangers_comes_along(tmp_path: Path) -> None:
    """The README loads the folder with trust_remote_code=True: what auto_map names would run."""
    source = tmp_path / "published"
    shutil.copytree(PUBLISHED["golden"], source)
    trap = {"auto_map": {"AutoTokenizer": ["evil.py--evil.Evil", None], "AutoConfig": "evil.Evil"}, "evil": "code"}
    for file in source.glob("*.json"):
        values = json.loads(file.read_text())
        if isinstance(values, dict) and file.name != "tokenizer.json":
            for part in [values, *(part for part in values.values() if isinstance(part, dict))]:
                if "cls" not in part and file.name != "special_tokens_map.json":
                    part |= trap
            file.write_text(json.dumps(values))
    (source / "evil.py").write_text("raise SystemExit")
    folder = export(source, tmp_path / "native")
    for file in folder.glob("*.json"):
        assert "auto_map" not in file.read_text() and "evil" not in file.read_text(), file
    assert [file.name for file in folder.rglob("*.py")] == ["generate.py"]


def test_it_says_what_it_wrote(tmp_path: Path, capsys: Any) -> None:
    program.run([f"out={tmp_path / 'dola'}"])
    program.run([f"out={tmp_path / 'native'}", f"model_path={CHECKPOINT}"])
    alone, model = capsys.readouterr().err.splitlines()
    assert alone == f"{tmp_path / 'dola'}: DoLa for custom_generate, 0.0 MB"
    size = sum(file.stat().st_size for file in (tmp_path / "native").rglob("*") if file.is_file())
    assert model == f"{tmp_path / 'native'}: transformers' Janus, whose generate is DoLa, {size / 1e6:.1f} MB"


def test_a_full_disk_is_one_line(fails: Fails, tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, hard))
    try:
        error = fails(program.run, f"out={tmp_path / 'demo'}", f"model_path={PUBLISHED['demo']}")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert error.startswith(f"error: out: {str(tmp_path / 'demo')!r} was not written: ")
    assert not list(tmp_path.iterdir())


def test_a_checkpoints_own_configuration_goes_along(tmp_path: Path) -> None:
    keys = ("alpha", "bucket_id", "method")
    for given, want in (([], (0.1, 0, "dola")), (["alpha=0.3"], (0.3, 0, "dola"))):
        folder = export(PUBLISHED["demo"], tmp_path / f"native{len(given)}", *given)
        saved = json.loads((folder / "generation_config.json").read_text())
        assert tuple(saved[key] for key in keys) == want
        assert read_config(ModelConfig, [f"model_path={folder}"]).dola() == DoLaConfig(alpha=want[0], bucket_id=0)


def test_a_config_file_with_other_programs_keys(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(
        f"model_path: {CHECKPOINT}\nalpha: 0.3\nroles: [User, Assistant]\nseed: 3\nstream: true\n"
        "generation: {max_new_tokens: 7, num_beams: 2}\n"
    )
    program.run([f"out={tmp_path / 'native'}", f"config={tmp_path / 'mine.yaml'}", "alpha=0.4"])
    saved = json.loads((tmp_path / "native" / "generation_config.json").read_text())
    assert {key: saved[key] for key in ("alpha", "bucket_id", "max_new_tokens", "num_beams", "do_sample")} == {
        "alpha": 0.4, "bucket_id": 2, "max_new_tokens": 7, "num_beams": 2, "do_sample": False,
    }  # fmt: skip
