#!/usr/bin/env bash
# What sharing projections costs, with error bars: models trained on the same data in the same order, several seeds
# each, evaluated alike, and a report of it.
#
#   bash examples/compare_variants.sh [--output DIR] [flags of tools/compare_variants.py]
#
# Without flags: eight variants of one shape and five with QKV's parameters, three seeds, a GPT-2 of 1 M parameters
# on State of the Union speeches (about an hour and a quarter on 2 CPU cores). Larger, on your data:
#
#   bash examples/compare_variants.sh --output runs/comparison --seeds 3 --train-data-path data/c4_train_text_document \
#     --valid-data-path data/c4_validation_text_document --tokenizer-model data/tokenizer --processes 8 --steps 5000 \
#     -- --num-layers 12 --hidden-size 768 --num-attention-heads 12 --seq-length 1024 \
#     --max-position-embeddings 1024 --global-batch-size 256 --bf16
#
# As many run at once as the machine has GPUs, or cores, for (--at-once N). Interrupted, the same command goes on;
# more seeds or models join what is there. Report: DIR/report/report.html and report.md.
# VENV and PYTHON choose the virtual environment, as in quickstart.sh.

set -euo pipefail
out=comparison flags=()
while [ $# -gt 0 ]; do
    case $1 in
        -h | --help)
            sed -n '2,/^$/s/^# \{0,1\}//p' "$0"
            exit 0
            ;;
        --output)
            [ $# -ge 2 ] || { echo "error: --output: needs a value" >&2; exit 2; }
            out=$2
            shift 2
            ;;
        --)
            flags+=("$@")
            break
            ;;
        *)
            flags+=("$1")
            shift
            ;;
    esac
done

root=$(cd "$(dirname "$0")/.." && pwd)
venv=${VENV:-$root/.venv}
case $venv in /*) ;; *) venv=$PWD/$venv ;; esac
make --no-print-directory -C "$root" install VENV="$venv"
"$venv/bin/python" "$root/tools/compare_variants.py" --folder "$out" "${flags[@]}"
"$venv/bin/python" "$root/tools/report.py" "$out" --output-dir "$out/report"
