# Each target sets up its own .venv if there is none; nothing else is needed than Python 3.11 and make.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
WORKSPACE ?= quest-out/tiny-w4a4

.PHONY: demo test lint bench bench-methods bench-sd15 clean

demo: $(READY)
	$(BIN)/quest-deploy run --model tiny --bits w4a4 -w $(WORKSPACE) --backend openvino --backend onnxruntime --build-only tensorrt-rtx

# One BLAS thread a worker: two workers with two threads each only get in each other's way.
test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 $(PYTEST_ARGS)

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# Times the demo's engines again, as `make demo` does once.
bench: demo
	$(BIN)/quest-deploy benchmark -w $(WORKSPACE) --backend openvino
	$(BIN)/quest-deploy benchmark -w $(WORKSPACE) --backend onnxruntime

# The methods measured against each other, docs/comparison/table.md: computes the cells that are missing, each up to five minutes on a core.
bench-methods: $(READY)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[cpu,dev,bench,modelopt]'
	$(BIN)/quest-deploy compare --model tiny $(COMPARE_ARGS)

# Everything at Stable Diffusion 1.5's size, docs/sd15/table.md: measures the steps that are missing; about an hour on two cores, 16 GiB.
bench-sd15: $(READY)
	$(BIN)/python scripts/bench_sd15.py $(BENCH_ARGS)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed, this is " + sys.version)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[cpu,dev,bench]'
	touch $(READY)

clean:
	rm -rf $(VENV) quest-out build *.egg-info
