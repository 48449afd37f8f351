# Two commands are all there is to know: `make serve` and `make test`. Both install what they
# need into .venv first, and so do the others.
PYTHON ?= python3
FLOW ?= onnx-flow.yml
EXTRAS := onnx,torch,convert,test,dev
BIN := .venv/bin
# The packages as they are installed, for mypy: executors/ and flows/ inside clip_server/.
TYPED := build/typed

export CLIP_MODEL ?= embedded

.PHONY: serve test lint bench clean

# The embedded model on ONNX Runtime, on this machine only. FLOW=my.yml CLIP_MODEL=ViT-B-32::openai
serve: .venv/.serve
	$(BIN)/python -m clip_server --host 127.0.0.1 $(FLOW)

test: .venv/.dev
	$(BIN)/python -m pytest

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

# Checked before .venv is made: pip's own words for a wrong Python are long.
$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 14))' || \
	  { echo "Python 3.10 to 3.13 is needed, and $(PYTHON) is not one:" \
	         "make clean, then make serve PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv --clear .venv

.venv/.serve: $(BIN)/python pyproject.toml clip_client/pyproject.toml requirements.lock
	test -e .venv/.dev || $(BIN)/python -m pip install -q -c requirements.lock -e ./clip_client -e '.[onnx]'
	touch $@

.venv/.dev: $(BIN)/python pyproject.toml clip_client/pyproject.toml requirements.lock
	$(BIN)/python -m pip install -q -c requirements.lock -e ./clip_client -e '.[$(EXTRAS)]'
	touch $@
