# Two commands do all their own set-up: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# As many processes as cores, a file's tests in one, so that few compile the same kernels;
# threads that wait leave the cores to the others. Not `python -m`, which would put this folder
# where others look for the package `kernels` (transformers does).
PYTEST := OMP_WAIT_POLICY=passive $(BIN)/pytest --numprocesses auto --dist loadfile
KERNEL_TESTS := $(addprefix tests/test_,losses.py loss_contract.py loss_properties.py \
	opinfo.py moduleinfo.py sizes.py fuzz.py fuzz_optimizers.py optimizers.py optimizer_contract.py \
	optim_db.py optim_gradients.py traps.py triton.py)

.PHONY: demo test clients archives fuzz gpu-check bench docs lint clean

demo: $(STAMP)  ## train a language model with torch and with fastopt, side by side
	$(BIN)/python bench/train.py $(ARGS)

test: $(STAMP) lint  ## style, types, and every test, those of the kernels on Triton's interpreter too
	$(PYTEST) --ignore tests/clients $(ARGS)
	TRITON_INTERPRET=1 $(PYTEST) $(ARGS) $(KERNEL_TESTS)

clients: $(STAMP)  ## tests and pages with the frameworks people train with, which it installs
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[clients]' || \
		echo 'Not all could be installed: the tests of those that are missing are skipped.'
	$(PYTEST) -W default -rs tests/clients tests/test_docs.py $(ARGS)

archives: $(STAMP)  ## build wheel and sdist, test what they install on every Python found
	$(BIN)/python .ci/release.py $(ARGS)

fuzz: $(STAMP)  ## random calls by the thousand against torch's
	HYPOTHESIS_PROFILE=fuzz $(BIN)/python -m pytest tests/test_fuzz.py tests/test_fuzz_optimizers.py $(ARGS)

gpu-check:  ## on a machine with a GPU: its tests and its benchmark, into one file; installs nothing
	$(PYTHON) bench/gpu_check.py $(ARGS)

bench: $(STAMP)  ## every loss and optimizer against torch
	$(BIN)/python bench/run.py $(ARGS)

docs: $(STAMP)  ## the pages that are written by the code itself
	$(BIN)/python docs/contract.py
	$(BIN)/python docs/accuracy.py

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
# mypy can't follow the mapping of an editable install, so it checks an installed copy
	rm -rf build
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --target build/installed .
	cd build/installed && ../../$(BIN)/mypy --config-file ../../pyproject.toml -p fastopt

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $(STAMP)

clean:
	rm -rf $(VENV) build dist *.egg-info demo
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
