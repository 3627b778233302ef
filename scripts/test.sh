#!/usr/bin/env bash
# Run the whole test suite, or what takes an hour by --faults. Flags are passed on to pytest.
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
install tests/requirements.txt .venv/installed_for_tests.txt
exec .venv/bin/python -m pytest "$@"
