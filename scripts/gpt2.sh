#!/usr/bin/env bash
# SAEs on the residual stream after all 12 layers of GPT-2 small.
# Hardware: 1 GPU. Memory: 9 GiB per GPU (--dry_run), and what the LM's forward needs. Tokens: 512 M.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec accelerate launch --config_file accelerate_configs/1gpu.yaml train_sae.py \
    gpt2 Skylion007/openwebtext --streaming --max_examples 500000 \
    --ctx_len 1024 --batch_size 16 --grad_acc_steps 4 --mixed_precision bf16 "$@"
