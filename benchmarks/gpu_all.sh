#!/usr/bin/env bash
# Builds, tests, sanitizes and measures the kernels, training and generation on one GPU: under 35 minutes in all.
#
#   bash benchmarks/gpu_all.sh [--output FOLDER] [STAGE ...]
#
# Stages: build, test, sanitize, bench, train, generate (all, in this order, without arguments). A stage that is done is skipped
# when the script runs again with the same folder; the benchmark goes on where it was stopped. Each command of a
# stage stops by itself after STAGE_SECONDS (default 470); a stage that failed or ran out of time is named at
# the end (exit code 1), and the ones behind it run all the same. PYTHON chooses the interpreter, which needs a torch with CUDA,
# pytest and setuptools; what it measured is left in FOLDER (default benchmarks/results) as dated CSV files.
set -euo pipefail
cd "$(dirname "$0")/.."

output=benchmarks/results
stages=()
while [ $# -gt 0 ]; do
  case "$1" in
    --output) output=${2:?--output needs a folder}; shift 2 ;;
    build | test | sanitize | bench | train | generate) stages+=("$1"); shift ;;
    *) echo "error: $1: choose from --output FOLDER, build, test, sanitize, bench, train, generate" >&2; exit 2 ;;
  esac
done
[ ${#stages[@]} -gt 0 ] || stages=(build test sanitize bench train generate)

python=${PYTHON:-python3}
seconds=${STAGE_SECONDS:-470}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
"$python" -c 'import torch' 2> /dev/null || { echo "error: $python has no torch; set PYTHON" >&2; exit 2; }
"$python" -c 'import sys, torch; sys.exit(0 if torch.cuda.is_available() else "error: no GPU is visible to torch")'

mkdir -p "$output"
done_folder="$output/.gpu_all"
mkdir -p "$done_folder"
commit=$(git rev-parse --short HEAD 2> /dev/null || echo unknown)
name=$("$python" -c 'import torch; print(torch.cuda.get_device_name().lower().replace(" ", "-"))')
csv="$output/attention-$name-$commit.csv"

build() {
  SHAREDPROJ_BUILD=cuda "$python" setup.py -q build_ext --inplace
  "$python" -m megatron_sharedproj.env | tee "$output/environment-$name-$commit.txt"
  "$python" -c 'from megatron_sharedproj.ops import extension as e; import sys; sys.exit(e.MISSING or 0)'
}

# Training and generation need Megatron-Core; the kernels don't.
has_engine() {
  "$python" -c 'import megatron.core' 2> /dev/null || { echo "megatron-core is not installed: $1 left out"; return 1; }
}

test_stage() {
  local files=(tests/ops/test_gpu_kernels.py)
  if has_engine "the training tests are"; then
    files+=(tests/training/test_low_precision.py tests/distributed/test_gpu_layouts.py)
  fi
  timeout "$seconds" "$python" -m pytest -m gpu -p no:cacheprovider "${files[@]}"
}

sanitize() {
  local tool
  if ! command -v compute-sanitizer > /dev/null; then
    echo "compute-sanitizer is not on the PATH: left out"
    return
  fi
  for tool in memcheck racecheck initcheck; do
    echo "compute-sanitizer $tool"
    timeout "$((seconds / 3))" compute-sanitizer --tool "$tool" --error-exitcode 3 \
      "$python" benchmarks/sanitize.py | tail -3
  done
}

bench() {
  timeout "$seconds" "$python" tools/benchmark_attention.py --device cuda --preset gpu --resume \
    --output "$csv" --plot "${csv%.csv}.png"
}

train() {
  has_engine "training is" || return 0
  timeout "$seconds" "$python" benchmarks/train_throughput.py --budget-seconds 60 \
    --output "$output/training-$name-$commit.csv" --plot "$output/training-$name-$commit.png"
  # The formulas beside the allocator's peak.
  timeout "$seconds" "$python" tools/profile.py memory --model 300m --micro-batch-size 6 --format csv \
    --output "$output/memory-$name-$commit.csv"
}

generate() {
  has_engine "generation is" || return 0
  timeout "$seconds" "$python" benchmarks/generation.py --dtype bf16 --budget-seconds 6 \
    --output "$output/generation-$name-$commit.csv" --plot "$output/generation-$name-$commit.png"
}

failed=()
for stage in "${stages[@]}"; do
  stamp="$done_folder/$stage-$commit"
  if [ -e "$stamp" ]; then
    echo "== $stage: done before ($stamp)"
    continue
  fi
  echo "== $stage ($(date +%H:%M:%S))"
  start=$SECONDS
  # Not as a condition: bash would not stop at a stage's first error there.
  set +e
  (
    set -e
    case "$stage" in test) test_stage ;; *) "$stage" ;; esac
  )
  status=$?
  set -e
  case "$status" in
    0) touch "$stamp" ;;
    124) failed+=("$stage (out of time after STAGE_SECONDS=$seconds)") ;;
    130) exit 130 ;;
    *) failed+=("$stage (exit code $status)") ;;
  esac
  echo "== $stage: $((SECONDS - start)) s"
  [ "$stage" != build ] || [ "$status" = 0 ] || break # nothing else runs without it
done
[ ${#failed[@]} = 0 ] || { printf 'error: %s\n' "${failed[@]}" >&2; exit 1; }
