# Every target is a verb of the command line; `make help` prints what is below.
SHELL := /bin/sh
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory

PYTHON ?= $(shell command -v python3.11 || command -v python3 || echo python3.11)
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
RECIPE ?= digits
# Two files at a time: tests wait for servers more than they compute. `make test PYTEST_ARGS=` is one after the other.
PYTEST_ARGS ?= -n 2 --dist loadfile --no-loadscope-reorder
MODEL ?= $(basename $(notdir $(RECIPE)))

# Options that a target passes on when they are given: make archive RECIPE=cifar10 DATA=cifar10.zip EPOCHS=5
recipe_options = --recipe '$(RECIPE)' $(if $(DATA),--data '$(DATA)') $(if $(EPOCHS),--epochs $(EPOCHS)) $(if $(SEED),--seed $(SEED))
format_option = $(if $(FORMAT),--format $(FORMAT))
profile_option = $(if $(PROFILE),--profile $(PROFILE))
version_option = $(if $(VERSION),--version $(VERSION))
model_option = $(if $(filter command line environment,$(origin MODEL) $(origin RECIPE)),--model '$(MODEL)')
policy_option = $(if $(POLICY),--policy '$(POLICY)')

.PHONY: help setup serve stop status watch predict explain exporter token train export archive rollout rollback releases reconcile release retrain collector ingest labels feedback forget drift prune demo-loop soak loadtest tune test sweep lint bench clean

help: ## print this
	@awk 'BEGIN {FS = ":.*## "} /^[a-z-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))
	@echo
	@echo "  variables: RECIPE=digits DATA=folder-or-zip EPOCHS= SEED= FORMAT=onnx|eager PROFILE=latency|throughput VERSION= MODEL= IMAGE= GRPC=1"
	@echo "             POLICY=file.toml DRY_RUN=1 RESUME=1 WAIT=1 NEW=folder-or-zip EVERY=1h RATE= SECONDS= GRPC_SHARE= TARGET= MINUTES="

setup: $(STAMP) ## make the virtual environment (the other targets do it themselves)

$(STAMP): pyproject.toml requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info[:2] == (3, 11) else "Python 3.11 is needed, $(PYTHON) is " + sys.version.split()[0] + ": make PYTHON=/path/to/python3.11 ...")'
	@test -x $(BIN)/python || { echo "making $(VENV) and installing into it (once; about 6 GB, a few minutes)"; $(PYTHON) -m venv $(VENV); }
	@$(BIN)/python -m pip install $(if $(wildcard $(VENV)/lib/python3.11/site-packages/torch),--quiet) --disable-pip-version-check --requirement requirements.lock
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@$(BIN)/marwright activate --venv $(VENV)
	@touch $@

serve: $(STAMP) ## train, export, archive, start TorchServe, wait for a real answer
	@$(BIN)/marwright serve $(recipe_options) $(format_option) $(profile_option) $(version_option)

stop: $(STAMP) ## stop TorchServe; returns when it has ended
	@$(BIN)/marwright stop

status: $(STAMP) ## what is built, what is released, what answers
	@$(BIN)/marwright status

predict: $(STAMP) ## ask the running server: make predict IMAGE=cat.png [GRPC=1] [MODEL=cifar10]
	@$(if $(IMAGE),,echo "error: which picture? make predict IMAGE=cat.png"; exit 2;) \
	$(BIN)/marwright predict '$(IMAGE)' $(model_option) $(if $(GRPC),--grpc) $(if $(TOP_K),--top-k $(TOP_K)) $(version_option)

explain: $(STAMP) ## why it answers so, as explained.html: make explain IMAGE=cat.png [OUT=cat.html] [MODEL=cifar10] [METHOD=occlusion]
	@$(if $(IMAGE),,echo "error: which picture? make explain IMAGE=cat.png"; exit 2;) \
	$(BIN)/marwright explain --image '$(IMAGE)' $(model_option) $(if $(GRPC),--grpc) $(version_option) $(if $(OUT),--out '$(OUT)') $(if $(METHOD),--method $(METHOD)) $(if $(TARGET),--target '$(TARGET)')

watch: $(STAMP) ## live view of versions, workers, rates, latencies, and the rollout that runs; Ctrl-C or LOOKS=1 ends it
	@$(BIN)/marwright watch $(model_option) $(if $(LOOKS),--looks $(LOOKS))

exporter: $(STAMP) ## for Prometheus (deploy/prometheus.yml): what the journal says beside what the server does
	@$(BIN)/marwright exporter

token: $(STAMP) ## print a valid inference token (KIND=management for the other)
	@$(BIN)/marwright token $(KIND)

train: $(STAMP) ## train a recipe: make train RECIPE=cifar10 DATA=cifar10.zip
	@$(BIN)/marwright train $(recipe_options) $(if $(RESTART),--no-resume)

export: $(STAMP) ## export a run as an artifact
	@$(BIN)/marwright export $(recipe_options) $(format_option)

archive: $(STAMP) ## package a run into model_store/
	@$(BIN)/marwright archive $(recipe_options) $(format_option) $(profile_option) $(version_option)

rollout: $(STAMP) ## bring the newest version (or VERSION=) to answer, behind the gate; RESUME=1, DRY_RUN=1, WAIT=1
	@$(BIN)/marwright rollout $(VERSION) $(model_option) $(policy_option) $(if $(RESUME),--resume) $(if $(DRY_RUN),--dry-run) $(if $(WAIT),--wait)

rollback: $(STAMP) ## return to the version that answered before
	@$(BIN)/marwright rollback $(model_option) $(policy_option)

releases: $(STAMP) ## what answered, what answers now, and why
	@$(BIN)/marwright releases $(model_option)

reconcile: $(STAMP) ## make the running server what the journal says, retire what is due
	@$(BIN)/marwright reconcile $(policy_option)

release: $(STAMP) ## make a version answer, without proof: make release VERSION=1.1 [MODEL=cifar10]
	@$(if $(VERSION),,echo "error: which version? make release VERSION=1.1"; exit 2;) $(BIN)/marwright release '$(VERSION)' --model '$(MODEL)'

retrain: $(STAMP) ## learn from newly labelled examples and roll out: make retrain NEW=folder-or-zip [EVERY=1h]
	@$(BIN)/marwright retrain $(recipe_options) $(if $(NEW),--new '$(NEW)') $(if $(EVERY),--every $(EVERY)) $(if $(METHOD),--method $(METHOD)) $(if $(DRY_RUN),--dry-run) $(policy_option)

collector: $(STAMP) ## take labels at POST /predictions/feedback (a model of its own, loaded where a server runs)
	@$(BIN)/marwright feedback collector

ingest: $(STAMP) ## take what the workers captured, and the labels they were sent, into the database
	@$(BIN)/marwright feedback ingest

labels: $(STAMP) ## take labels from a file or a folder: make labels FROM=labels.csv
	@$(if $(FROM),,echo "error: from where? make labels FROM=labels.csv"; exit 2;) $(BIN)/marwright feedback import '$(FROM)' $(model_option)

feedback: $(STAMP) ## requests, labels, label lag, class balance, live accuracy of each version
	@$(BIN)/marwright feedback status $(model_option)

forget: $(STAMP) ## remove every trace of a request: make forget REQUEST=id
	@$(if $(REQUEST),,echo "error: which request? make forget REQUEST=id"; exit 2;) $(BIN)/marwright feedback forget --request '$(REQUEST)'

drift: $(STAMP) ## whether requests are still what the model has learned from, as drift.html too
	@$(BIN)/marwright drift $(model_option) $(policy_option) --html drift.html

prune: $(STAMP) ## remove archives, runs and requests that nobody needs any more
	@$(BIN)/marwright prune $(policy_option)

demo-loop: $(STAMP) ## the whole loop on a live server of its own, in a few minutes: demo-loop.html
	@$(BIN)/marwright demo

soak: $(STAMP) ## half an hour of the loop with random kills, and a ledger of every label: make soak [MINUTES=30]
	@$(BIN)/python benchmarks/soak.py run $(if $(MINUTES),--minutes $(MINUTES))

loadtest: $(STAMP) ## open-loop load, every answer checked: make loadtest RATE=200 SECONDS=30 GRPC_SHARE=0.5
	@rm -f loadtest.csv; $(BIN)/marwright loadtest $(model_option) $(if $(RATE),--rate $(RATE)) $(if $(SECONDS),--seconds $(SECONDS)) $(if $(GRPC_SHARE),--grpc-share $(GRPC_SHARE)) --out loadtest.csv; \
	status=$$?; $(BIN)/marwright loadreport loadtest.csv --html loadtest.html; exit $$status

tune: $(STAMP) ## batch size, delay, workers, threads, format by load on this machine: make tune MODEL=cifar10 [TARGET=p99=20ms] [MINUTES=5] [WRITE=1]
	@$(BIN)/marwright tune --model '$(MODEL)' $(if $(TARGET),--target '$(TARGET)') $(if $(MINUTES),--minutes $(MINUTES)) $(if $(WRITE),--write) --html tune.html

test: $(STAMP) ## ruff, mypy and the whole test suite, the real server included
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy
	@$(BIN)/pytest $(PYTEST_ARGS)

sweep: $(STAMP) ## kill the tool at every point of a rollout and a rollback, and resume it (half an hour)
	@$(BIN)/python -m tests.sweep

lint: $(STAMP) ## ruff and mypy alone
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

bench: $(STAMP) ## measure, then make docs/performance.md: make bench DATA=cifar10.zip [BENCH="serving levers"]; all of it takes hours
	@$(BIN)/python benchmarks/performance.py run $(BENCH) $(if $(DATA),--data '$(DATA)')

clean: ## remove caches; never model_store/, runs/ or the journal
	@rm -rf .mypy_cache .ruff_cache .pytest_cache .hypothesis build *.egg-info
	@find . -path ./$(VENV) -prune -o -name __pycache__ -type d -print0 | xargs -0 rm -rf
