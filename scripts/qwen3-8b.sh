#!/usr/bin/env bash
# Transcoders with a skip connection on eight MLPs of Qwen3 8B, one on each GPU.
# Hardware: 8 GPUs. Memory: 33 GiB per GPU (--dry_run), and what the LM's forward needs. Tokens: 1024 M.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec accelerate launch --config_file accelerate_configs/8gpu.yaml train_sae.py \
    Qwen/Qwen3-8B HuggingFaceFW/fineweb --data_args name=sample-10BT --streaming \
    --max_examples 500000 --ctx_len 2048 --batch_size 2 --distribute_modules \
    --hookpoints "layers.[48].mlp" "layers.1[26].mlp" "layers.2[048].mlp" layers.32.mlp \
    --transcode --skip_connection --mixed_precision bf16 "$@"
