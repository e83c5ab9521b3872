#!/usr/bin/env bash
# From a bare machine with Python 3.11+ to a trained, evaluated model on one CPU, through the path that a pod uses.
#
#   bash launch/smoke.sh            set up what is missing, then train, or resume a run that was stopped
#   bash launch/smoke.sh --fresh    delete the last smoke run first
#   bash launch/smoke.sh --config.total_epochs=2 ...    further flags go to the trainer
set -euo pipefail

# shellcheck source=launch/venv.sh
source "$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)/venv.sh"

workdir="$ROOT/runs/smoke"
data="$ROOT/data/digits"
export JAX_PLATFORMS=cpu

case "${1:-}" in
  -h | --help)
    sed -n '2,6s/^# \{0,1\}//p' "$0"
    exit 0
    ;;
  --fresh)
    shift
    rm -rf "$workdir"
    ;;
esac

ensure_venv smoke

if [[ ! -f "$data/manifest.json" ]]; then
  echo "Writing scikit-learn's handwritten digits as JPEG records to data/digits ..."
  "$PY" -m input_pipeline.prepare --digits --out "$data" --shards 4 --val-shards 1 ||
    fail "the data set could not be prepared; see above."
fi

code=0
"$PY" -m trainer --config="$ROOT/configs/smoke.py" --workdir="$workdir" --config.data.path="$data" "$@" || code=$?
case "$code" in
  0) ;;
  75)
    echo "Stopped; 'bash launch/smoke.sh' resumes, 'bash launch/smoke.sh --fresh' starts again."
    exit "$code"
    ;;
  *) fail "the run failed with code $code; its last messages are above. 'bash launch/smoke.sh --fresh' starts again." ;;
esac

"$PY" - "$workdir" "$ROOT" <<'PYTHON'
import json, pathlib, sys

workdir, root = map(pathlib.Path, sys.argv[1:])
final = json.loads((workdir / "final.json").read_text())
seconds = final["wall_seconds"]
print(f"""
The model reads {100 * final['top1']:.1f} % of {final['examples']} unseen digits after {final['epochs']:.0f} epochs:
{seconds['total']:.0f} s, of which {seconds['compile']:.0f} s to compile, {seconds['step']:.0f} s to train, {seconds['eval']:.0f} s to evaluate.

  checkpoints       {workdir}/checkpoints
  TensorBoard files {workdir}/events
  report            {workdir}/report.html
  all figures       {workdir}/final.json

Next:
  bash {root}/launch/smoke.sh --fresh --config.model.depth=20       a deeper network, from the start
  {root}/.venv/bin/python -m trainer --mode=eval --config={root}/configs/smoke.py --workdir={workdir} --config.data.path={root}/data/digits
  bash {root}/tests/run.sh                                          every test
""")
PYTHON
