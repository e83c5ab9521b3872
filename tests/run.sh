#!/usr/bin/env bash
# Runs every test on this machine's CPU: bash tests/run.sh [arguments of pytest]
# `-m slow` runs the long ones instead, `-m ""` all of them.
set -euo pipefail

# shellcheck source=launch/venv.sh
source "$(cd "$(dirname "${BASH_SOURCE[0]}")/../launch" && pwd)/venv.sh"
ensure_venv test
cd "$ROOT"
JAX_PLATFORMS=cpu exec "$PY" -m pytest "$@"
