#!/usr/bin/env bash
# SAEs on the residual stream after all 30 layers of SmolLM2-135M.
# Hardware: 1 GPU. Memory: 13 GiB per GPU (--dry_run), and what the LM's forward needs. Tokens: 512 M.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec accelerate launch --config_file accelerate_configs/1gpu.yaml train_sae.py \
    HuggingFaceTB/SmolLM2-135M EleutherAI/SmolLM2-135M-10B --streaming --max_examples 250000 \
    --ctx_len 2048 --batch_size 8 --grad_acc_steps 4 --mixed_precision bf16 "$@"
