#!/usr/bin/env bash
# Checks style and types, then runs every test on this machine's CPU: bash tests/run.sh [arguments of pytest]
# `-m slow` runs the long tests instead, `-m ""` all of them. `--lint` alone checks style and types only.
# Three tests run at once, a file after another in each process, for most of them wait; -n 0 runs one after another, and
# is needed for --pdb and -s. PYTHON=python3.13 chooses the interpreter that makes .venv.
set -euo pipefail

# shellcheck source=launch/venv.sh
source "$(cd "$(dirname "${BASH_SOURCE[0]}")/../launch" && pwd)/venv.sh"

lint() {
  "$PY" -m ruff format --check --quiet . || fail "run .venv/bin/ruff format . and commit what it changes."
  "$PY" -m ruff check --quiet .
  "$PY" -m mypy --no-error-summary
}

ensure_venv test
cd "$ROOT"
lint
[[ "${1:-}" == --lint ]] && exit
JAX_PLATFORMS=cpu exec "$PY" -m pytest -n 3 --dist loadfile --no-loadscope-reorder "$@"
