"""The same answers from vLLM's compiled decoder, and from two tensor-parallel ranks, in processes of their own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from engines import SERVER, architecture, llama, run, serve
from llama_requests import KEYS, check, params, prompts, wanted

CASES = {
    "compiled": ({"enforce_eager": False}, {"TORCHDYNAMO_DISABLE": "0"}),
    "two ranks": (
        {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"},
        {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_CPU_OMP_THREADS_BIND": "0|1"},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_the_answers_are_the_wrappers(name: str) -> None:
    environment = os.environ | CASES[name][1] | {"PYTHONPATH": str(Path(__file__).parents[1])}
    ran = subprocess.run([sys.executable, __file__, name], env=environment, capture_output=True, text=True, timeout=900)
    assert ran.returncode == 0, ran.stderr[-3000:]


def main(name: str) -> None:
    folder, model = llama(6)  # every layer costs time to compile
    SERVER["candidate_layers"] = list(range(1, 6))
    llm = serve(folder, SERVER, **CASES[name][0], **architecture("DoLaLlamaForCausalLM"))
    asked = [({"prompt_token_ids": prompt}, params(own)) for prompt, own in zip(prompts(11), KEYS, strict=True)]
    for output, (prompt, _), own in zip(run(llm, asked), asked, KEYS, strict=True):
        check(output, wanted(model, prompt["prompt_token_ids"], own))


if __name__ == "__main__":
    main(sys.argv[1])
