#!/usr/bin/env bash
# SAEs on the residual stream after every tenth layer of Llama 3 70B, one on each GPU;
# the LM in eight shards.
# Hardware: 8 GPUs. Memory: 53 GiB per GPU (--dry_run), and what the LM's forward needs. Tokens: 512 M.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec accelerate launch --config_file accelerate_configs/8gpu_zero3.yaml train_sae.py \
    meta-llama/Meta-Llama-3-70B HuggingFaceFW/fineweb --data_args name=sample-10BT --streaming \
    --max_examples 250000 --ctx_len 2048 --batch_size 2 --layer_stride 10 \
    --expansion_factor 16 --distribute_modules --mixed_precision bf16 "$@"
