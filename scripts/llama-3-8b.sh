#!/usr/bin/env bash
# SAEs on the residual stream after every fourth layer of Llama 3 8B, one on each GPU.
# Hardware: 8 GPUs. Memory: 33 GiB per GPU (--dry_run), and what the LM's forward needs. Tokens: 1024 M.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec accelerate launch --config_file accelerate_configs/8gpu.yaml train_sae.py \
    meta-llama/Meta-Llama-3-8B HuggingFaceFW/fineweb --data_args name=sample-10BT --streaming \
    --max_examples 500000 --ctx_len 2048 --batch_size 2 --layer_stride 4 --distribute_modules \
    --mixed_precision bf16 "$@"
