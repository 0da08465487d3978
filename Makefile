# make demo    two hosts, a Redis under load, one live migration, a picture of the downtime
# make test    all tests; non-zero on any failure
# make bench   every workload beside its stop-copy-restart and its floor
# make lint    ruff and mypy
# make man     manual pages of all commands, in build/man
#
# Each installs what is missing first (root, Debian 12 or like it); a second run finds it done.

ROOT   := $(patsubst %/,%,$(dir $(abspath $(lastword $(MAKEFILE_LIST)))))
PYTHON := $(ROOT)/.venv/bin/python
STAMP  := $(ROOT)/build/setup.stamp
# What goes to pytest and to the bench, as in: make test ARGS="-k redis -x", or ARGS="-n 0" for one at a time
ARGS   ?=

.PHONY: demo test bench lint man setup clean help
.DEFAULT_GOAL := help

help:
	@sed -n 's/^# \(make .*\)/\1/p' $(ROOT)/Makefile

$(STAMP): $(ROOT)/pyproject.toml $(ROOT)/tools/setup.sh
	@$(ROOT)/tools/setup.sh
	@touch $@

setup: $(STAMP)

demo: $(STAMP)
	@cd $(ROOT) && $(PYTHON) tools/demo.py $(ARGS)

test: $(STAMP)
	@cd $(ROOT) && $(PYTHON) -m pytest -q -ra --durations=10 -n auto --dist loadfile $(ARGS)

bench: $(STAMP)
	@cd $(ROOT) && $(PYTHON) tools/bench.py $(ARGS)

lint: $(STAMP)
	@cd $(ROOT) && .venv/bin/ruff format --check . && .venv/bin/ruff check . && .venv/bin/mypy

man: $(STAMP)
	@cd $(ROOT) && $(PYTHON) tools/man.py build/man

clean:
	@rm -rf $(ROOT)/build $(ROOT)/.mypy_cache $(ROOT)/.ruff_cache $(ROOT)/.pytest_cache
