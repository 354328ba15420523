#!/usr/bin/env bash
# Sourced by the pretrain_*.sh scripts: resolves data, output folder and precision, then starts torchrun.
# The sourcing script sets PRESET (a name), PRESET_ARGS (flags) and passes the user's flags on.
#
# Environment: NPROC       processes on this machine, one per GPU (8)
#              DATA_PATH   --output-prefix of tools/preprocess_slimpajama.py, or one .bin/.idx prefix (data/slimpajama)
#              TOKENIZER   tokenizer directory (data/tokenizer)
#              SAVE        parent of the run folders (runs/<preset>)
#              PRECISION   bf16 or fp32 (bf16; fp32 where no GPU is visible)
#              MAX_RESTARTS  times that torchrun starts all ranks again, from the last checkpoint, when one fails (0)
#              NNODES, RDZV_ENDPOINT, RDZV_ID  several machines: their number, host:port of the first, a name
#                          (examples/slurm sets them)

run_preset() {
    local nproc=${NPROC:-8} data=${DATA_PATH:-data/slimpajama} tokenizer=${TOKENIZER:-data/tokenizer}
    local nnodes=${NNODES:-1} restarts=${MAX_RESTARTS:-0}
    local variant=qkv grouped=0 groups=1 rotary='' matched='' dry_run=0 own_data=0 own_vocab=0 user=()
    while [ $# -gt 0 ]; do
        case $1 in
            --dry-run) dry_run=1; shift; continue ;;
            --attention-variant) variant=${2:-} ;;
            --attention-variant=*) variant=${1#*=} ;;
            --group-query-attention) grouped=1 ;;
            --num-query-groups) groups=${2:-} ;;
            --num-query-groups=*) groups=${1#*=} ;;
            --kv-rotary) rotary=${2:-} ;;
            --kv-rotary=*) rotary=${1#*=} ;;
            --match-parameters-of) matched=${2:-} ;;
            --match-parameters-of=*) matched=${1#*=} ;;
            --data-path | --data-path=* | --train-data-path | --train-data-path=* | --mock-data) own_data=1 ;;
            --tokenizer-model | --tokenizer-model=* | --vocab-file | --vocab-file=* | --vocab-size | --vocab-size=*)
                own_vocab=1
                ;;
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
    [ -z "$rotary" ] || name+=_$rotary
    [ -z "$matched" ] || name+=_matched
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
        bf16)
            args+=(--bf16)
            # Optimizer state divided over the GPUs, and their traffic hidden behind the passes.
            [ $((nnodes * nproc)) = 1 ] ||
                args+=(--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather)
            ;;
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
    local launch=(torchrun --nproc-per-node "$nproc")
    if [ "$nnodes" = 1 ]; then
        launch+=(--standalone)
    else
        launch+=(--nnodes "$nnodes" --rdzv-backend c10d --rdzv-endpoint "${RDZV_ENDPOINT:?}" --rdzv-id "${RDZV_ID:?}")
    fi
    [ "$restarts" = 0 ] || launch+=(--max-restarts "$restarts")
    local command=("${launch[@]}" -m megatron_sharedproj.pretrain "${args[@]}" "${user[@]}")

    export CUDA_DEVICE_MAX_CONNECTIONS=1
    # Seconds that torchrun leaves its ranks to save when it is told to stop (torch 2.9 reads nothing: 30).
    export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-110}
    if [ $gpu = 0 ] && [ -z "${OMP_NUM_THREADS:-}" ]; then
        OMP_NUM_THREADS=$((($(nproc) + nproc - 1) / nproc))
        export OMP_NUM_THREADS
    fi
    if [ $dry_run = 1 ]; then
        local vocabulary=()
        # Without a tokenizer at hand the plan is for GPT-2's vocabulary, the paper's.
        [ $own_vocab = 1 ] || [ -e "$tokenizer" ] || vocabulary=(--vocab-size 50257)
        "$python" "$root/tools/plan_run.py" "${args[@]}" "${vocabulary[@]}" "${user[@]}" \
            --simulate-world-size $((nnodes * nproc)) || return $?
        echo
        echo "# $PRESET, $variant, $((nnodes * nproc)) process(es), run folder $save"
        printf '%q ' "${command[@]}"
        echo
        return 0
    fi
    if ! command -v torchrun > /dev/null; then
        echo "error: torchrun is not on the PATH; activate the environment that the package is installed in" >&2
        return 2
    fi
    # Mistakes are reported here in one line; under torchrun its own traceback follows them.
    WORLD_SIZE=$((nnodes * nproc)) LOCAL_WORLD_SIZE=$nproc "$python" -m megatron_sharedproj.pretrain "${args[@]}" "${user[@]}" --check-only || return $?
    exec "${command[@]}"
}
