# Two commands do all their own set-up: `make demo` and `make test`.
PYTHON ?= $(if $(filter Windows_NT,$(OS)),python,python3)
# Where torch comes from, if not from the package index, whose build for Linux brings gigabytes of
# CUDA: make test TORCH_INDEX=https://download.pytorch.org/whl/cpu has the one for CPUs.
TORCH_INDEX ?=
# Builds of torch for CPUs bring no Triton; on Linux the tests then get the one that CUDA builds of
# the torch in constraints.txt ask for (tests/test_resolution.py compares).
TRITON := triton==3.7.1; sys_platform == "linux"

VENV := .venv
# bin, or on Windows Scripts
BIN := $(VENV)/$(shell $(PYTHON) -c "import os, sysconfig as s; print(os.path.basename(s.get_path('scripts')))")
INSTALL := $(BIN)/python -m pip install --quiet --constraint constraints.txt
# What is installed: torch alone, with what the demo needs, with what the tests need.
TORCH := $(VENV)/.torch
DEMO := $(VENV)/.demo
DEV := $(VENV)/.dev
# As many processes as cores, a file's tests in one, so that few compile the same kernels, and in
# the files' order, which ends with short ones (the usual order does with the few tests that take
# longest); threads that wait leave the cores to the others. Not `python -m`, which would put this
# folder where others look for the package `kernels` (transformers does).
PYTEST := OMP_WAIT_POLICY=passive $(BIN)/pytest --numprocesses auto --dist loadfile \
	--no-loadscope-reorder
# Modules call the functions, whatever serves those: test_moduleinfo.py is not among them.
KERNEL_TESTS := $(addprefix tests/test_,losses.py extremes.py loss_contract.py loss_properties.py \
	opinfo.py operators.py softmax_options.py linear_cross_entropy.py \
	log_prob_and_entropy.py distillation_loss.py sizes.py fuzz.py fuzz_optimizers.py optimizers.py \
	optimizer_contract.py optim_db.py optim_gradients.py \
	averages.py averages_in_step.py clip.py clipped_step.py lion.py muon.py adafactor.py \
	rounding.py traps.py triton.py rows.py nll.py vocabulary.py \
	formula_losses.py check.py rules.py check_optimizer.py step_in_graph.py outcomes_in_graph.py)

.PHONY: demo test clients versions archives fuzz gpu-check bench docs lint clean

demo: $(DEMO)  ## train a language model with torch and with fastopt, side by side
	$(BIN)/python bench/train.py $(ARGS)

test: $(DEV) lint  ## style, types, and every test, those of the kernels on Triton's interpreter too
	$(PYTEST) --ignore tests/clients $(ARGS)
# Elsewhere there is no Triton.
	$(BIN)/python -c 'import sys; sys.exit(sys.platform == "linux")' || \
		TRITON_INTERPRET=1 $(PYTEST) $(ARGS) $(KERNEL_TESTS)

clients: $(DEV)  ## tests and pages with the frameworks people train with, which it installs
	$(INSTALL) --editable '.[clients]' || \
		echo 'Not all could be installed: the tests of those that are missing are skipped.'
	$(PYTEST) -W default -rs tests/clients tests/test_docs.py $(ARGS)

versions: $(DEV)  ## the kernels' tests with the oldest, the usual and the newest torch
	$(BIN)/python .ci/versions.py $(ARGS)

archives: $(DEV)  ## build wheel and sdist, test what they install on every Python found
	$(BIN)/python .ci/release.py $(ARGS)

fuzz: $(DEV)  ## random calls by the thousand against torch's
	FASTOPT_TEST_SEED=fresh HYPOTHESIS_PROFILE=fuzz $(BIN)/python -m pytest tests/test_fuzz.py tests/test_fuzz_optimizers.py $(ARGS)

gpu-check:  ## on a machine with a GPU: its tests and its benchmark, into one file; installs nothing
	$(PYTHON) bench/gpu_check.py $(ARGS)

bench: $(DEV)  ## every loss and optimizer against torch
	$(BIN)/python bench/run.py $(ARGS)

docs: $(DEV)  ## the pages that are written by the code itself
	$(BIN)/python docs/contract.py
	$(BIN)/python docs/accuracy.py

lint: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
# mypy can't follow the mapping of an editable install, so it checks an installed copy
	rm -rf build
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --target build/installed .
	cd build/installed && ../../$(BIN)/mypy --config-file ../../pyproject.toml -p fastopt

$(TORCH): constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) torch $(addprefix --index-url ,$(TORCH_INDEX))
	touch $@

$(DEMO): $(TORCH) pyproject.toml
	$(INSTALL) --editable '.[demo]'
	touch $@

$(DEV): $(TORCH) pyproject.toml
	$(BIN)/python -c 'import triton' 2>/dev/null || $(INSTALL) '$(TRITON)'
	$(INSTALL) --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info demo
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
