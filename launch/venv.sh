# shellcheck shell=bash
# Sourced by launch/smoke.sh and tests/run.sh: makes ROOT/.venv and installs this package into it, once.
#
#   ensure_venv EXTRA    sets PY to the Python of ROOT/.venv, with the extra [EXTRA] of setup.cfg installed
#
# PYTHON=... chooses the interpreter: a .venv of another version is made again. Nothing is fetched when what setup.cfg
# asks for is there.

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

fail() {
  echo "$(basename "$0"): $*" >&2
  exit 1
}

# Print PYTHON, or the newest Python that is found; what is newer than the tests' newest comes last.
find_python() {
  local candidates=(python3.13 python3.12 python3.11 python3) python
  if [[ -n "${PYTHON:-}" ]]; then candidates=("$PYTHON"); fi
  for python in "${candidates[@]}"; do
    if "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "$python"
      return
    fi
  done
  fail "Python 3.11 or newer is needed${PYTHON:+, which PYTHON=$PYTHON is not}; install it, or name it with PYTHON=/path/to/python3."
}

# Print the version of a Python, such as 3.13.
version_of() {
  "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null || echo unknown
}

# Remove a .venv that does not have the version of PYTHON, but only one that was filled here.
drop_other_venv() {
  local venv="$1" log="$2" python has wants
  python="$(find_python)"
  has="$(version_of "$venv/bin/python")"
  wants="$(version_of "$python")"
  if [[ "$has" == "$wants" ]]; then return; fi
  [[ -f "$log" ]] ||
    fail "the Python of .venv is $has and PYTHON=$PYTHON is $wants; remove .venv, or unset PYTHON."
  echo "Removing .venv: its Python is $has, and PYTHON=$PYTHON is $wants."
  rm -rf "$venv"
}

ensure_venv() {
  local extra="$1" venv="$ROOT/.venv" log="$ROOT/.venv/install.log" python stamp wanted
  PY="$venv/bin/python"
  if [[ -n "${PYTHON:-}" && -e "$venv" ]]; then drop_other_venv "$venv" "$log"; fi
  stamp="$venv/installed-$extra"
  wanted="$(cat "$ROOT/setup.cfg" "$ROOT/pyproject.toml") $ROOT"
  if [[ -x "$PY" && -f "$stamp" && "$(cat "$stamp")" == "$wanted" ]]; then
    return
  fi

  if [[ ! -x "$PY" ]]; then
    python="$(find_python)"
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
