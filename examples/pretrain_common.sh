#!/usr/bin/env bash
# Sourced by the pretrain_*.sh scripts: resolves data, output folder and precision, then starts torchrun.
# The sourcing script sets PRESET (a name), PRESET_ARGS (flags) and passes the user's flags on.
#
# Environment: NPROC       processes on this machine, one per GPU (8)
#              DATA_PATH   --output-prefix of tools/preprocess_slimpajama.py, or one .bin/.idx prefix (data/slimpajama)
#              TOKENIZER   tokenizer directory (data/tokenizer)
#              SAVE        parent of the run folders (runs/<preset>)
#              PRECISION   bf16 or fp32 (bf16; fp32 where no GPU is visible)

run_preset() {
    local nproc=${NPROC:-8} data=${DATA_PATH:-data/slimpajama} tokenizer=${TOKENIZER:-data/tokenizer}
    local variant=qkv grouped=0 groups=1 dry_run=0 own_data=0 user=()
    while [ $# -gt 0 ]; do
        case $1 in
            --dry-run) dry_run=1; shift; continue ;;
            --attention-variant) variant=${2:-} ;;
            --attention-variant=*) variant=${1#*=} ;;
            --group-query-attention) grouped=1 ;;
            --num-query-groups) groups=${2:-} ;;
            --num-query-groups=*) groups=${1#*=} ;;
            --data-path | --data-path=* | --train-data-path | --train-data-path=* | --mock-data) own_data=1 ;;
            -h | --help)
                sed -n '2,/^$/s/^# \{0,1\}//p' "$0"
                return 0
                ;;
        esac
        user+=("$1")
        shift
    done
    local python=${PYTHON:-python3} name root
    root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
    # "Q-K=V" and "qk_eq_v" are one variant and get one folder.
    name=$(PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" "$python" -c 'import sys
from megatron_sharedproj.variants import get_variant
try:
    print(get_variant(sys.argv[1]).name)
except ValueError as error:
    sys.exit(f"error: {error}")' "$variant") || return 2
    [ "$grouped" = 0 ] || name+=_g$groups
    local save=${SAVE:-runs/$PRESET}/$name

    local gpu=0 precision=${PRECISION:-}
    if command -v nvidia-smi > /dev/null && nvidia-smi -L > /dev/null 2>&1; then gpu=1; fi
    if [ -z "$precision" ]; then
        precision=bf16
        if [ $gpu = 0 ] && [ $dry_run = 0 ]; then
            precision=fp32
            echo "no GPU is visible: training in fp32 on the CPU"
        elif [ $gpu = 0 ]; then
            echo "# no GPU is visible here: this is the command for a GPU machine; run here, it would be fp32"
        fi
    fi

    local args=("${PRESET_ARGS[@]}" --tokenizer-model "$tokenizer" --save "$save")
    if "$python" -c 'import importlib.util as u, sys; sys.exit(u.find_spec("tensorboard") is None)'; then
        args+=(--tensorboard-dir "$save/tensorboard")
    fi
    case $precision in
        bf16) args+=(--bf16) ;;
        fp32) ;;
        *)
            echo "error: PRECISION=$precision: choose bf16 or fp32" >&2
            return 2
            ;;
    esac
    if [ $own_data = 0 ]; then
        if [ -f "$data.idx" ]; then
            args+=(--data-path "$data" --split "995,5,0")
        else
            args+=(--train-data-path "${data}_train_text_document" --valid-data-path "${data}_validation_text_document")
        fi
    fi
    local command=(torchrun --standalone --nproc-per-node "$nproc" -m megatron_sharedproj.pretrain "${args[@]}" "${user[@]}")

    export CUDA_DEVICE_MAX_CONNECTIONS=1
    if [ $gpu = 0 ] && [ -z "${OMP_NUM_THREADS:-}" ]; then
        OMP_NUM_THREADS=$((($(nproc) + nproc - 1) / nproc))
        export OMP_NUM_THREADS
    fi
    if [ $dry_run = 1 ]; then
        echo "# $PRESET, $variant, $nproc process(es), run folder $save"
        printf '%q ' "${command[@]}"
        echo
        return 0
    fi
    if ! command -v torchrun > /dev/null; then
        echo "error: torchrun is not on the PATH; activate the environment that the package is installed in" >&2
        return 2
    fi
    # Mistakes are reported here in one line; under torchrun its own traceback follows them.
    WORLD_SIZE=$nproc LOCAL_WORLD_SIZE=$nproc "$python" -m megatron_sharedproj.pretrain "${args[@]}" "${user[@]}" --check-only || return $?
    exec "${command[@]}"
}
