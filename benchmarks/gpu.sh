#!/usr/bin/env bash
# Runs the CUDA tests and all CUDA benchmarks, and writes their results as JSON:  benchmarks/gpu.sh OUT_DIR
# PYTHON names the interpreter (default: .venv's, else python3). Exits 0 only if every part passed.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:?"usage: benchmarks/gpu.sh OUT_DIR"}
mkdir -p "$out"
out=$(cd "$out" && pwd)
if [ -z "${PYTHON:-}" ]; then
  PYTHON=python3
  if [ -x .venv/bin/python ]; then PYTHON=.venv/bin/python; fi
fi
"$PYTHON" -c 'import torch, sys; sys.exit(None if torch.cuda.is_available() else "benchmarks/gpu.sh: no CUDA device")'

status=0
run() { # run SECONDS NAME COMMAND...: one part within its time, its output kept
  local seconds=$1 name=$2
  shift 2
  if timeout "$seconds" "$@" >"$out/$name.txt" 2>&1; then echo "$name: passed"; else
    echo "$name: failed (exit $?), see $out/$name.txt"
    status=1
  fi
  tail -n 25 "$out/$name.txt"
}

run 210 tests "$PYTHON" -m pytest -q tests -k "cuda or offsets or 2_to_the_31"
for file in benchmarks/test_*.py; do
  name=$(basename "$file" .py)
  limit=80
  if [ "$name" = test_kernels ]; then limit=180; fi
  run "$limit" "$name" "$PYTHON" -m pytest -q "$file" \
    --results "$out/$name.json" --benchmark-json "$out/$name.pytest-benchmark.json"
done
run 60 decode_attention "$PYTHON" -m benchmarks.decode_attention
exit $status
