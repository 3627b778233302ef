#!/usr/bin/env bash
# Run the whole test suite, what takes an hour by --faults, or, by --fake-cuda, runs on a GPU that is
# not there (its torch for CUDA takes 5 GB). Flags are passed on to pytest.
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
install tests/requirements.txt .venv/installed_for_tests.txt
environment=.venv
if [[ " $* " == *" --fake-cuda "* ]]; then
    environment=.venv-cuda
    [ -d $environment ] || .venv/bin/python -m venv $environment
    install tests/requirements-cuda.txt $environment/installed.txt $environment
    # Everything but torch and what comes with it is that of .venv.
    folder='import sysconfig; print(sysconfig.get_path("purelib"))'
    .venv/bin/python -c "$folder" >"$($environment/bin/python -c "$folder")/others.pth"
fi
exec $environment/bin/python -m pytest "$@"
