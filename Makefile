# make demo: everything from nothing to a packed 4-bit model.  make test: the same set-up, then the tests.
# TORCH names the PyTorch to install; where pip's default brings CUDA and you want it smaller, point pip at PyTorch's
# CPU wheels with PIP_EXTRA_INDEX_URL or PIP_FIND_LINKS.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
BIN := $(VENV)/bin
SOURCES := $(shell find cpp cmake -type f) CMakeLists.txt pyproject.toml
NATIVE := $(shell find cpp -name '*.cpp' -o -name '*.h' -o -name '*.inl')

.PHONY: demo test sanitize test-arm lint format notebooks clean

demo: $(VENV)/installed
	$(BIN)/potqat demo --out out/demo

test: $(VENV)/installed
	$(BIN)/python -m pytest

sanitize: $(VENV)/installed
	$(BIN)/cmake -S cpp/tests -B build/sanitize
	$(BIN)/cmake --build build/sanitize --parallel 2
	build/sanitize/test_core

# The core on aarch64 in an emulator, on processors with both NEON sets, with sdot alone and with neither, and under the
# sanitizers (whose build is not what users run).
ARM := QEMU_LD_PREFIX=/usr/aarch64-linux-gnu ASAN_OPTIONS=detect_leaks=0 qemu-aarch64
test-arm: $(VENV)/installed
	@for tool in aarch64-linux-gnu-g++ qemu-aarch64; do command -v $$tool >/dev/null || { \
	  echo "make test-arm: there is no $$tool; on Debian, apt-get install g++-aarch64-linux-gnu qemu-user" >&2; exit 1; \
	}; done
	$(BIN)/cmake -S cpp/tests -B build/arm --toolchain $(CURDIR)/cpp/tests/aarch64.cmake -DSANITIZE=OFF
	$(BIN)/cmake --build build/arm --parallel 2
	$(ARM) -cpu max build/arm/test_core neoni8mm,neondot,scalar
	$(ARM) -cpu cortex-a76 build/arm/test_core neondot,scalar
	$(ARM) -cpu cortex-a53 build/arm/test_core scalar
	$(BIN)/cmake -S cpp/tests -B build/arm-sanitize --toolchain $(CURDIR)/cpp/tests/aarch64.cmake
	$(BIN)/cmake --build build/arm-sanitize --parallel 2
	$(ARM) -cpu max build/arm-sanitize/test_core neoni8mm,neondot,scalar

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(NATIVE)

format: $(VENV)/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(NATIVE)

notebooks: $(VENV)/installed
	$(BIN)/python notebooks/run.py

clean:
	rm -rf $(VENV) build out

# torch comes first and alone: potqat is compiled against the torch that is installed.
$(VENV)/installed: $(SOURCES)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "potqat needs Python 3.10 or later")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@
