#!/usr/bin/env bash
# SAEs on the residual stream after all 26 layers of Gemma 2 2B, three or four on each GPU.
# Hardware: 8 GPUs. Memory: 28 GiB per GPU (--dry_run), and what the LM's forward needs. Tokens: 1024 M.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec accelerate launch --config_file accelerate_configs/8gpu.yaml train_sae.py \
    google/gemma-2-2b HuggingFaceFW/fineweb --data_args name=sample-10BT --streaming \
    --max_examples 500000 --ctx_len 2048 --batch_size 2 --distribute_modules \
    --mixed_precision bf16 "$@"
