"""Engines of vLLM in this process, on models that are made here: its CPU attention has no heads of 16."""

import atexit
import gc
import json
import os
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm.sampling_params")  # "vllm" would be this folder, where tests are on the path
os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "TORCHDYNAMO_DISABLE": "1",
} | dict(os.environ)

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from vllm import LLM

LAYERS = 12
VOCAB = 512
# Every bucket's layers, so that requests may ask for any of them.
SERVER = {"candidate_layers": list(range(1, LAYERS))}


def new_folder() -> Path:
    """A folder for as long as this process runs."""
    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


@cache
def llama(layers: int = LAYERS) -> tuple[Path, Any]:
    """A LLaMA with heads of 32 and weights large enough for layers to disagree: its folder, and itself in float32."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=176,
        num_hidden_layers=layers,
        num_attention_heads=2,
        max_position_embeddings=2048,
        initializer_range=0.15,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config).eval()
    folder = new_folder()
    model.save_pretrained(folder)
    return folder, model


def serve(folder: Path, dola: dict[str, Any] | None = None, **arguments: Any) -> LLM:
    """Starts an engine, in float32 and eager unless it is told otherwise."""
    gc.collect()  # the last engine: were it collected later, it would close the process groups of this one
    defaults: dict[str, Any] = {
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 512,
        "max_num_seqs": 8,
        "max_logprobs": -1,
        "logprobs_mode": "processed_logprobs",
        "additional_config": {} if dola is None else {"dola": dola},
    }
    return LLM(str(folder), **(defaults | arguments))


def architecture(name: str) -> dict[str, Any]:
    """Arguments for a model of ours without a tokenizer."""
    return {"hf_overrides": {"architectures": [name]}, "skip_tokenizer_init": True}


def run(llm: Any, requests: list[tuple[Any, Any]], arrivals: list[int] | None = None) -> list[Any]:
    """Outputs of (prompt, params), each added before the step that `arrivals` says."""
    engine, outputs, step = llm.llm_engine, {}, 0
    waiting = sorted(range(len(requests)), key=lambda i: arrivals[i] if arrivals else 0)
    while waiting or engine.has_unfinished_requests():
        while waiting and (not arrivals or arrivals[waiting[0]] <= step):
            i = waiting.pop(0)
            engine.add_request(str(i), *requests[i])
        for output in engine.step():
            if output.finished:
                outputs[int(output.request_id)] = output
        step += 1
    return [outputs[i] for i in range(len(requests))]


@cache
def janus() -> tuple[Path, Path]:
    """The golden checkpoint with heads of 32: in the published layout, and exported."""
    from janus_dola.programs.export import run as export

    published = new_folder() / "published"
    shutil.copytree(Path(__file__).parents[1] / "golden" / "tiny_janus", published)
    config = json.loads((published / "config.json").read_text(encoding="utf-8"))
    config["language_config"] |= {"num_attention_heads": 2, "num_key_value_heads": 2}
    (published / "config.json").write_text(json.dumps(config), encoding="utf-8")
    exported = published.with_name("exported")
    export([f"out={exported}", f"model_path={published}"])
    return published, exported
