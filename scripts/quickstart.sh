#!/usr/bin/env bash
# Train SAEs at three hookpoints of the demo LM, on its own training text, and write a page of their
# features. Flags are passed on to the training.
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

[ -f demo/text/train.jsonl ] || .venv/bin/python demo/make_text.py demo/text
config=accelerate_configs/cpu.yaml
if .venv/bin/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    config=accelerate_configs/1gpu.yaml
fi
cores="$(.venv/bin/python -c 'import os; print(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())')"

# A fresh name per start, so that a second quickstart does not meet the first one's run.
.venv/bin/accelerate launch --config_file "$config" --num_cpu_threads_per_process "$cores" \
    train_sae.py demo/lm demo/text/train.jsonl \
    --hookpoints layers.1 layers.3 layers.4.mlp \
    --ctx_len 256 --batch_size 16 --grad_acc_steps 16 --max_examples 5632 \
    --expansion_factor 16 --k 32 \
    --run_name "quickstart-$(date +%Y%m%d-%H%M%S)" "$@" | tee .venv/quickstart.txt

# A dry run, or --help, leaves no run to look at.
run="$(sed -n 's/^run  *//p' .venv/quickstart.txt)"
[ -z "$run" ] || .venv/bin/python -m sae features "$run" --out "$run/report.html"
