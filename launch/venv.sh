# shellcheck shell=bash
# Sourced by launch/smoke.sh and tests/run.sh: makes ROOT/.venv and installs this package into it, once.
#
#   ensure_venv EXTRA    sets PY to the Python of ROOT/.venv, with the extra [EXTRA] of setup.cfg installed
#
# PYTHON=... chooses the interpreter that makes .venv. Nothing is fetched if the requirements of setup.cfg are met.

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

fail() {
  echo "$(basename "$0"): $*" >&2
  exit 1
}

ensure_venv() {
  local extra="$1" venv="$ROOT/.venv" log="$ROOT/.venv/install.log" python stamp wanted
  PY="$venv/bin/python"
  stamp="$venv/installed-$extra"
  wanted="$(cat "$ROOT/setup.cfg" "$ROOT/pyproject.toml") $ROOT"
  if [[ -x "$PY" && -f "$stamp" && "$(cat "$stamp")" == "$wanted" ]]; then
    return
  fi

  if [[ ! -x "$PY" ]]; then
    for python in ${PYTHON:-python3.13 python3.12 python3.11 python3}; do
      if "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then break; fi
      python=""
    done
    [[ -n "$python" ]] || fail "Python 3.11 or newer is needed and was not found; install it, or name it with PYTHON=/path/to/python3."
    "$python" -c 'import ensurepip, venv' 2>/dev/null ||
      fail "$python has no venv module; install it (Debian, Ubuntu: apt-get install python3-venv)."
    echo "Making .venv with $("$python" --version) ..."
    "$python" -m venv "$venv" || fail "could not make $venv."
  fi
  echo "Installing resnet-pod[$extra] into .venv (a minute or two, once) ..."
  if ! "$PY" -m pip install --disable-pip-version-check -e "${ROOT}[$extra]" >"$log" 2>&1; then
    tail -n 5 "$log" >&2
    fail "pip could not install the packages of setup.cfg; the network may be down. Its output is in $log; run this again once that is fixed."
  fi
  printf '%s' "$wanted" >"$stamp"
}
