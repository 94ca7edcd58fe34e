# Each target sets everything up by itself. ARGS goes to the command: make run ARGS="--minutes 20"
PY = .venv/bin/python
ARGS =

FILE =

.PHONY: memory run test test-slow quality check format clean

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

# Validation loss on tinyshakespeare, on each backend: make quality FILE=tinyshakespeare.txt
quality:
	@./setup.sh dev
	OMP_NUM_THREADS=2 OPENBLAS_NUM_THREADS=2 PIPPIN_TINYSHAKESPEARE=$(FILE) $(PY) -m pytest -m quality -s tests/quality $(ARGS)

# Predicted against measured memory, on torch CPU and MLX; writes docs/memory.json and docs/memory.png.
memory:
	@./setup.sh
	$(PY) tools/benchmark.py memory $(ARGS)

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
