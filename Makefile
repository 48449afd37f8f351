# Two commands are all there is to know: `make serve` and `make test`. Both install what they
# need into .venv first, and so do the others. `make clean` removes it, as before a change of PYTHON.
# A variable that is set but empty counts as not set.
override PYTHON := $(or $(PYTHON),python3)
override FLOW := $(or $(FLOW),onnx-flow.yml)
override CLIP_MODEL := $(or $(CLIP_MODEL),embedded)
export CLIP_MODEL

EXTRAS := onnx,torch,convert,test,dev
BIN := .venv/bin
# The packages as they are installed, for mypy: executors/ and flows/ inside clip_server/.
TYPED := build/typed
SUPPORTED := import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 14))

.PHONY: serve test test-slow lint bench clean

# The embedded model on ONNX Runtime, on this machine only. FLOW=my.yml CLIP_MODEL=ViT-B-32::openai
serve: .venv/.serve
	$(BIN)/python -m clip_server --host 127.0.0.1 $(FLOW)

test: .venv/.dev
	$(BIN)/python -m pytest -m "not slow"

test-slow: .venv/.dev
	$(BIN)/python -m pytest -m slow

lint: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf $(TYPED) && mkdir -p $(TYPED)/clip_server
	ln -s $(CURDIR)/clip_client $(TYPED)/
	ln -s $(CURDIR)/clip_server/* $(CURDIR)/executors $(CURDIR)/flows $(TYPED)/clip_server/
	cd $(TYPED) && $(CURDIR)/$(BIN)/mypy --config-file $(CURDIR)/pyproject.toml

# Against infinity and clip-as-service, each in an environment of its own: an hour at the first
# time. LEGS="texts --rounds 3" runs one leg, see docs/benchmarks.md.
bench: .venv/.dev
	$(BIN)/python -m benchmarks $(LEGS)

clean:
	rm -rf .venv build dist *.egg-info clip_client/build clip_client/*.egg-info

# A .venv that is half-made, or made with a Python that is not supported, is made again.
ifneq ($(shell $(BIN)/python -c 'import pip; $(SUPPORTED)' 2>/dev/null && echo usable),usable)
.PHONY: $(BIN)/python
endif

# Checked before .venv is made: pip's own words for a wrong Python are long.
$(BIN)/python:
	@$(PYTHON) -c '$(SUPPORTED)' 2>/dev/null || { \
	  echo "Python 3.10 to 3.13 is needed, and $(PYTHON) is" \
	    "$$($(PYTHON) --version 2>/dev/null || echo not found): make serve PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv --clear .venv

.venv/.serve: $(BIN)/python pyproject.toml clip_client/pyproject.toml requirements.lock
	test -e .venv/.dev || $(BIN)/python -m pip install -q -c requirements.lock -e ./clip_client -e '.[onnx]'
	touch $@

.venv/.dev: $(BIN)/python pyproject.toml clip_client/pyproject.toml requirements.lock
	$(BIN)/python -m pip install -q -c requirements.lock -e ./clip_client -e '.[$(EXTRAS)]'
	touch $@
