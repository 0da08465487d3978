# make demo    two hosts, a Redis under load, one live migration, a picture of the downtime
# make demo-fleet  four hosts with agents: an uneven load is evened out, a host is emptied, the controller is killed
# make demo-web  a web server with short connections, there and back; ARGS="--delay 25" for a round trip of 50 ms
# make test    all tests; non-zero on any failure
# make coverage  the same, and which lines they do not reach
# make bench   every workload beside its stop-copy-restart and its floor; how the downtime grows with what there is;
#              how long planning takes for 100 to 10,000 hosts
# make bench-fleet  planning time, distance from the exact placement, a day under our rule and the others'
# make lint    ruff and mypy
# make fuzz    hostile images and peers (ARGS="SECONDS SEED KIND", 60 for each kind if not told)
# make man     manual pages of all commands, in build/man
#
# make test-kernel     the patched kernel in guests: selftests, both engines, live migrations between guests
# make lab             a shell in two networked guests with the patched kernel
# make bench-kernel    both engines side by side in one guest
# make fuzz-kernel     hostile images for the restart path, with KASAN and lockdep (ARGS=SECONDS)
#
# Each installs what is missing first (root, Debian 12 or like it); a second run finds it done.

ROOT   := $(patsubst %/,%,$(dir $(abspath $(lastword $(MAKEFILE_LIST)))))
PYTHON := $(ROOT)/.venv/bin/python
STAMP  := $(ROOT)/build/setup.stamp
# What goes to pytest and to the bench, as in: make test ARGS="-k redis -x", or ARGS="-n 0" for one at a time
ARGS   ?=
# Tests wait a good part of their time, so there is one worker more than processors.
TESTS  := -m pytest -q -ra --durations=10 -n $(shell expr $$(nproc) + 1) --dist loadfile

.PHONY: demo demo-fleet demo-web test coverage bench bench-fleet fuzz lint man setup clean help test-kernel bench-kernel fuzz-kernel lab setup-kernel
.DEFAULT_GOAL := help

help:
	@sed -n 's/^# \(make .*\)/\1/p' $(ROOT)/Makefile

$(STAMP): $(ROOT)/pyproject.toml $(ROOT)/tools/setup.sh
	@$(ROOT)/tools/setup.sh
	@touch $@

setup: $(STAMP)

demo: $(STAMP)
	@cd $(ROOT) && $(PYTHON) tools/demo.py $(ARGS)

demo-fleet: $(STAMP)
	@cd $(ROOT) && $(PYTHON) tools/demo_fleet.py $(ARGS)

demo-web: $(STAMP)
	@cd $(ROOT) && $(PYTHON) tools/demo_web.py $(ARGS)

test: $(STAMP)
	@cd $(ROOT) && $(PYTHON) $(TESTS) $(ARGS)

coverage: $(STAMP)
	@cd $(ROOT) && $(PYTHON) $(TESTS) --cov --cov-report=term-missing $(ARGS)

bench: $(STAMP)
	@cd $(ROOT) && $(PYTHON) tools/bench.py $(ARGS)
	@$(if $(ARGS),,cd $(ROOT) && $(PYTHON) tools/bench_engine.py)
	@$(if $(ARGS),,cd $(ROOT) && $(PYTHON) tools/bench_fleet.py --only planning)

fuzz: $(STAMP)
	@cd $(ROOT) && $(PYTHON) -m tests.fuzz $(ARGS)

bench-fleet: $(STAMP)
	@cd $(ROOT) && $(PYTHON) tools/bench_fleet.py $(ARGS)

# What a kernel build and the guests need beyond that.
setup-kernel: $(STAMP)
	@$(ROOT)/tools/setup-kernel.sh

test-kernel: setup-kernel
	@$(ROOT)/kernel-patches/scripts/build all
	@cd $(ROOT) && MIGRATOR_TEST_KERNEL=1 $(PYTHON) -m pytest -q -ra --durations=10 -n 2 --dist loadfile \
		--no-loadscope-reorder --timeout 3600 tests/vm $(ARGS)

lab: setup-kernel
	@cd $(ROOT) && $(PYTHON) -m tests.vm.shell $(ARGS)

bench-kernel: setup-kernel
	@cd $(ROOT) && $(PYTHON) -m tests.vm.bench $(ARGS)

fuzz-kernel: setup-kernel
	@cd $(ROOT) && $(PYTHON) -m tests.vm.fuzz $(ARGS)

lint: $(STAMP)
	@cd $(ROOT) && .venv/bin/ruff format --check . && .venv/bin/ruff check . && .venv/bin/mypy

man: $(STAMP)
	@cd $(ROOT) && $(PYTHON) tools/man.py build/man

clean:
	@rm -rf $(ROOT)/build $(ROOT)/.mypy_cache $(ROOT)/.ruff_cache $(ROOT)/.pytest_cache
