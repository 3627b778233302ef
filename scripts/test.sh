#!/usr/bin/env bash
# Run the whole test suite. Flags are passed on to pytest.
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
exec .venv/bin/python -m pytest "$@"
