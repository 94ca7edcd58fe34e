# Each target sets everything up by itself. ARGS goes to the command: make run ARGS="--minutes 20"
PY = .venv/bin/python
ARGS =

.PHONY: run test test-slow check format clean

run:
	@./setup.sh
	@$(PY) train.py $(ARGS)

test:
	@./setup.sh dev
	$(PY) -m pytest -n 2 $(ARGS)

# Campaigns of minutes to hours: quality floors, three-seed quick starts, long kill fuzz.
test-slow:
	@./setup.sh dev
	$(PY) -m pytest -m slow $(ARGS)

check:
	@./setup.sh dev
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	.venv/bin/lint-imports
	.venv/bin/codespell

format:
	@./setup.sh dev
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache
