#!/usr/bin/env bash
# Train a Llama-shaped model of a billion parameters on 8 GPUs of 40 GB: rotary positions, RMSNorm, SwiGLU, no
# biases, an output matrix of its own. The shape is TinyLlama's (arXiv 2401.02385) with a key/value head for every
# query head; batch and tokens are those of pretrain_1b.sh, so that the two compare.
#
# 576 sequences of 2048, 1,179,648 tokens a step; 8,477 steps, 9,999,876,096 tokens. By the formulas (--dry-run
# prints them for any flags): 18.7 GiB a GPU (qkv; K=V 17.4), and on 8 A100s 22.1 hours (K=V 20.6) at an
# assumed MFU of 40%. Not measured here: no GPU was at hand.
#
#   bash examples/pretrain_1b_llama.sh --attention-variant qkv
#   bash examples/pretrain_1b_llama.sh --attention-variant qk_eq_v --kv-rotary rotate_values
#   bash examples/pretrain_1b_llama.sh --attention-variant qk_eq_v --kv-rotary separate_rope_head --rotary-percent 0.5
#   bash examples/pretrain_1b_llama.sh --group-query-attention --num-query-groups 4 --dry-run    (TinyLlama's groups)
#
# A variant that ties key and value needs --kv-rotary: rotate_keys, rotate_values, partial or separate_rope_head
# (README, rotary positions). Any flag of `python -m megatron_sharedproj.pretrain --help` may follow and wins over
# the preset's. NPROC, DATA_PATH, TOKENIZER, SAVE and PRECISION are taken from the environment (see
# pretrain_common.sh). A run folder that has a checkpoint is resumed.

set -euo pipefail
# shellcheck source=examples/pretrain_common.sh
. "$(dirname "$0")/pretrain_common.sh"

PRESET=1b_llama
PRESET_ARGS=(
    --num-layers 22 --hidden-size 2048 --num-attention-heads 32 --ffn-hidden-size 5632
    --seq-length 2048 --max-position-embeddings 2048 --position-embedding-type rope --rotary-base 10000
    --normalization RMSNorm --norm-epsilon 1e-5 --swiglu --disable-bias-linear
    --untie-embeddings-and-output-weights
    --attention-dropout 0.0 --hidden-dropout 0.0 --init-method-std 0.02
    --micro-batch-size 2 --global-batch-size 576 --train-iters 8477
    --lr 4e-4 --min-lr 4e-5 --lr-decay-style cosine --lr-warmup-iters 1000
    --adam-beta1 0.9 --adam-beta2 0.95 --weight-decay 0.1 --clip-grad 1.0 --seed 42
    --eval-interval 500 --eval-iters 9 --log-interval 10 --save-interval 1000 --log-throughput
)
run_preset "$@"
