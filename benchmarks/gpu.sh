#!/usr/bin/env bash
# Tests and benchmarks on one NVIDIA GPU, in parts that take 40 to 90 s each on an H100:
#
#   benchmarks/gpu.sh [--dry] OUT_DIR [PART ...]        the first five if none is named: under five minutes
#
#   tests    the tests that need a GPU, kernels on CUDA tensors among them
#   kernels  fused head, reverse_kl from logits and sample, beside Liger, TRL and cut-cross-entropy where installed
#   rollout  the engine at Qwen3-0.6B's sizes beside stock `generate`; a decode step against the bytes it must read
#   step     the command at the sizes of Qwen3-0.6B from 4B, on random models made here
#   train    the default recipe on real weights where the cache (DISTILL_CACHE) has them
#   attention packed attention forward and backward, beside PyTorch's flash kernels over rows that repeat their prompt
#   decode   the four products of a decode step's layer beside cuBLAS's and PyTorch's
#   compiled phases of a step of the same sizes with compiled layers
#   trl      a step of the same sizes by phases, and beside TRL where it is installed
#
# Each part writes OUT_DIR/PART.json while it runs (`tests` a JUnit PART.xml) and its output to OUT_DIR/PART.txt. One
# that fails does not stop the next; exits 0 only if every part passed. Nothing needs a network; what has to be
# installed is in gpu_packages.txt. --dry runs everything at toy sizes on a CPU, to see that it runs.
# PYTHON names the interpreter (default: .venv's, else python3).
set -euo pipefail
parts=(tests kernels rollout step train)
all="${parts[*]} attention decode compiled trl"
usage="usage: benchmarks/gpu.sh [--dry] OUT_DIR [PART ...], PART one of: $all"
if [ "${1:-}" = --dry ]; then
  export DRY=1
  shift
fi
out=${1:?"$usage"}
shift
for part in "$@"; do
  case " $all " in *" $part "*) ;; *) echo "benchmarks/gpu.sh: there is no part $part. $usage" >&2; exit 2 ;; esac
done
if [ $# -gt 0 ]; then parts=("$@"); fi

mkdir -p "$out"
out=$(cd "$out" && pwd)
cd "$(dirname "$0")/.."
if [ -z "${PYTHON:-}" ]; then
  PYTHON=python3
  if [ -x .venv/bin/python ]; then PYTHON=.venv/bin/python; fi
fi
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
if [ "${DRY:-}" = 1 ]; then export CUDA_VISIBLE_DEVICES=; fi

# Each line of the file: a distribution, and the module it brings.
"$PYTHON" - benchmarks/gpu_packages.txt <<'END'
import importlib.util, os, sys
lines = [line.split("#")[0].split() for line in open(sys.argv[1])]
missing = [line[0] for line in lines if line and importlib.util.find_spec(line[1]) is None]
if missing:
    sys.exit(f"benchmarks/gpu.sh: not installed: {', '.join(missing)}. pip install {' '.join(missing)}")
import torch
if os.environ.get("DRY") != "1" and not torch.cuda.is_available():
    sys.exit("benchmarks/gpu.sh: no CUDA device; --dry runs the parts at toy sizes on a CPU")
END

status=0
run() { # run SECONDS PART PYTEST_ARGUMENT...: one part within its time, its output kept
  local seconds=$1 part=$2 start=$SECONDS code=0
  shift 2
  timeout --kill-after=10 "$seconds" "$PYTHON" -m pytest -q "$@" >"$out/$part.txt" 2>&1 || code=$?
  if [ $code = 0 ]; then echo "$part: passed in $((SECONDS - start)) s"; else
    status=1
    echo "$part: failed (exit $code$(if [ $code = 124 ]; then echo ", out of its $seconds s"; fi)) after $((SECONDS - start)) s, see $out/$part.txt"
  fi
  tail -n 25 "$out/$part.txt"
}
bench() { # bench SECONDS PART PYTEST_ARGUMENT...: a part that is a benchmark
  local part=$2
  run "$@" --benchmark-disable --results "$out/$part.json"
}

cuda_tests=(tests/test_kernels_*.py tests/test_{decode,evaluate,plain_step,trainer,rollout,teachers}.py)
if [ "${DRY:-}" = 1 ]; then cuda_tests=(tests/test_decode.py tests/test_kernels_prefix_attention.py); fi
if "$PYTHON" -c 'import xdist' 2>/dev/null && [ "${DRY:-}" != 1 ]; then cuda_tests+=(-n 12); fi

for part in "${parts[@]}"; do
  case $part in
    tests) run 150 tests "${cuda_tests[@]}" -k "cuda or offsets or 2_to_the_31" --junitxml "$out/tests.xml" ;;
    kernels) bench 150 kernels benchmarks/test_kernels.py -k "not jsd and not forward_kl" ;;
    rollout) bench 120 rollout benchmarks/test_rollout.py -k on_a_gpu ;;
    step) bench 120 step benchmarks/test_command.py -k qwen3 ;;
    attention) bench 60 attention benchmarks/test_prefix_attention.py ;;
    decode) bench 60 decode benchmarks/test_decode_linear.py ;;
    compiled) bench 150 compiled benchmarks/test_step.py -k compiled_on_a_gpu ;;
    trl) bench 150 trl benchmarks/test_step.py -k beside_trl_on_a_gpu ;;
    train) bench 150 train benchmarks/test_command.py -k recipe ;;
  esac
done
exit $status
