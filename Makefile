# Each target sets up its own .venv if there is none; nothing else is needed than Python 3.11, make and a C++ compiler.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/pip install --quiet --no-compile --constraint constraints.txt
# What the demo needs is set up for it alone; READY is all that tests, lint and the benches need.
DEMO_READY := $(VENV)/.ready-demo
READY := $(VENV)/.ready
BACKENDS := onnxruntime openvino tensorrt-rtx
SERVING := $(VENV)/serving
DOCS := $(VENV)/docs
# One BLAS thread a worker: two workers with two threads each only get in each other's way.
# A file's tests share a server, an engine, a compiled program: one worker runs them all, in tests/conftest.py's order.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder
WORKSPACE ?= quest-out/emoji-w4a4

PEERS := $(VENV)/peers

.PHONY: demo docs-results test test-slow test-all fuzz kills soak lint docs docs-pages bench bench-image bench-methods bench-sd15 bench-serving clean $(SERVING) $(PEERS)

# Python compiles what it imports, once; pip would compile ten times as much.
unexport PYTHONDONTWRITEBYTECODE

demo: $(DEMO_READY)
	$(BIN)/quest-deploy run --model emoji --bits w4a4 -w $(WORKSPACE) \
	  --backend openvino --backend onnxruntime --build-only tensorrt-rtx --if-available

# What every change needs, the quick tests first; stops at the tenth failure.
test: $(READY)
	$(PYTEST) -m 'not slow' --maxfail 10 $(PYTEST_ARGS)

# Whole chains of commands, servers, compilers.
test-slow: $(READY) $(SERVING)
	$(PYTEST) -m slow $(PYTEST_ARGS)

test-all: test test-slow

# Damaged files, others at every call, until the time is over: read by Python, then by the C++ runtime under the sanitizers.
fuzz: $(READY)
	FUZZ_MINUTES=$(or $(MINUTES),10) $(BIN)/python -m pytest -q -s tests/faults/test_damaged_files.py tests/trt_plugins/test_cpp_readers.py

# A Triton server under hostile requests, beside honest ones.
soak: $(READY) $(SERVING)
	SOAK_MINUTES=$(or $(MINUTES),10) $(BIN)/python -m pytest -q -s tests/quest_deploy/serving/test_hostile_requests.py

# Every command ended at that many moments over all, and on full disks; others at every call, some half an hour.
kills: $(READY)
	KILLS=$(or $(COUNT),200) FULL_DISKS=40 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -s \
	  tests/faults/test_kills.py tests/faults/test_full_disk.py

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache --no-logo
	$(BIN)/clang-format --dry-run --Werror `find trt_plugins -path trt_plugins/build -prune -o -regex '.*\.\(cpp\|h\|cu\|cuh\)' -print`
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.github-issue-forms .github/ISSUE_TEMPLATE/[!c]*.yml
	$(BIN)/hadolint docker/*.Dockerfile
	$(BIN)/pre-commit validate-config

# The site in build/site; a broken link fails (--quiet would hide it from --strict).
# Its environment holds mkdocs alone, which takes seconds to install.
docs: $(DOCS)/.ready
	$(DOCS)/bin/mkdocs build --strict --site-dir build/site

# The pages that are made from the code. A test says when they are out of date.
docs-pages: $(READY)
	$(BIN)/python -m typer quest_deploy.cli.main utils docs --name quest-deploy --output docs/cli.md
	$(BIN)/python scripts/docs/architecture.py
	$(BIN)/python -m scripts.docs.options
	$(BIN)/python -m scripts.docs.faults

$(DOCS)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/pip install --quiet --no-compile --constraint constraints.txt \
	  `$(PYTHON) -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"])'`
	touch $@

# The page of the demo in docs/results/, and its table; on an idle machine.
docs-results: demo
	$(BIN)/quest-deploy benchmark -w $(WORKSPACE) --backend openvino --pipeline
	$(BIN)/python -m scripts.docs.results -w $(WORKSPACE) --write

# Times the demo's engines again, as `make demo` does once.
bench: demo
	$(BIN)/quest-deploy benchmark -w $(WORKSPACE) --backend openvino
	$(BIN)/quest-deploy benchmark -w $(WORKSPACE) --backend onnxruntime

# The methods measured against each other, docs/comparison: times the engines once, then computes the cells that are missing,
# each some minutes on a core; what is computed is kept. COMPARE_ARGS='--jobs 1' leaves a core to others.
bench-methods: COMPARE_ARGS ?= --jobs 2
bench-methods: $(READY)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[all,dev,bench,serving,modelopt]'
	$(BIN)/python -m scripts.bench.methods.speed
	$(BIN)/python -m scripts.bench.methods $(COMPARE_ARGS)

# Everything at Stable Diffusion 1.5's size, docs/sd15/table.md: measures the steps that are missing; about an hour on two cores, 16 GiB.
bench-sd15: $(READY)
	$(BIN)/python -m scripts.bench.bench_sd15 $(BENCH_ARGS)

# Whole images beside other programs, docs/sd15/image.md: measures the rows that are missing; some 75 minutes on two idle cores,
# 16 GiB of memory and 30 GB on disk. BENCH_ARGS='--size small' is a try of minutes, '--only PATTERN' measures some rows.
bench-image: $(READY) $(PEERS)
	$(BIN)/python -m scripts.bench.image $(BENCH_ARGS)

# The other programs, each in an environment of its own. Where one cannot be installed the table says so, and the next run tries again.
# torchvision comes with optimum-intel, which draws without it: PyPI's breaks a torch that is built for CPUs.
$(PEERS): $(PEERS)/optimum/.ready $(PEERS)/sdcpp/.ready

$(PEERS)/%/.ready: scripts/bench/image/peers/%.txt
	$(PYTHON) -m venv --clear $(@D)
	$(@D)/bin/pip install --quiet --no-compile --requirement $< > $(@D).log 2>&1 && \
	  $(@D)/bin/pip uninstall --quiet --yes torchvision >> $(@D).log 2>&1 && touch $@ || \
	  echo '$*: left out, pip could not install it (see $(@D).log)'

# Backends whose packages have no wheels for this machine are left out, and `quest-deploy run --if-available` names them.
$(DEMO_READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed, this is " + sys.version)'
	$(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) --editable '.[all]' || { $(PIP_INSTALL) --editable '.[torch]' && for backend in $(BACKENDS); do \
	  $(PIP_INSTALL) --editable ".[$$backend]" || echo "$$backend: left out, pip could not install it (see above)"; done; }
	touch $@

$(READY): $(DEMO_READY)
	$(PIP_INSTALL) --editable '.[dev,bench,serving]'
	touch $@

# A Triton server under load on both protocols, docs/serving/table.md: about half an hour; BENCH_ARGS='--minutes 1' takes less.
bench-serving: demo $(SERVING)
	$(BIN)/python -m scripts.bench.bench_serving -w $(WORKSPACE) $(BENCH_ARGS)

# Where a Triton server runs: the toolchain's packages, but for the NumPy 1 that this wheel's python backend was built for.
# Where there is no such wheel, the tests that serve are skipped, and the next run tries again.
$(SERVING): $(SERVING)/.ready

$(SERVING)/.ready: $(READY)
	$(BIN)/python -m venv --clear --without-pip $(SERVING)
	$(BIN)/python -c 'import site; print(site.getsitepackages()[0])' \
	  > `$(SERVING)/bin/python -c 'import site; print(site.getsitepackages()[0])'`/toolchain.pth
	$(BIN)/pip --python $(SERVING)/bin/python install --quiet --no-deps nvidia-pytriton==0.7.0 numpy==1.26.4 \
	  && touch $@ || echo 'no Triton server for this machine: the tests that serve on one will be skipped'

clean:
	rm -rf $(VENV) quest-out build *.egg-info
