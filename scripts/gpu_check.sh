#!/usr/bin/env bash
# Check and measure everything that needs a GPU, but a run beside Sparsify's (--only run); the result
# is benchmarks/results/gpu.json. Flags are passed on to benchmarks/gpu_check.py.
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
install tests/requirements.txt .venv/installed_for_tests.txt
exec .venv/bin/python benchmarks/gpu_check.py "$@"
