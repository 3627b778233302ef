#!/usr/bin/env bash
# Run the whole test suite, in two processes; what takes an hour by --faults; by --fake-cuda, runs on a
# GPU that is not there (its torch for CUDA takes 5 GB); or, by --formats, coder files opened by the
# programs that they are for. Flags are passed on to pytest, which then is one process.
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
install tests/requirements.txt .venv/installed_for_tests.txt
environment=.venv
beside() { # the kind of an environment of its own, for what .venv must not hold
    environment=.venv-$1
    [ -d $environment ] || .venv/bin/python -m venv $environment
    install tests/requirements-$1.txt $environment/installed.txt $environment
    # Everything else is that of .venv.
    folder='import sysconfig; print(sysconfig.get_path("purelib"))'
    .venv/bin/python -c "$folder" >"$($environment/bin/python -c "$folder")/others.pth"
}
[[ " $* " == *" --fake-cuda "* ]] && beside cuda
if [[ " $* " == *" --formats "* ]]; then
    beside formats
    alone=requirements-formats-alone.txt
    install tests/$alone $environment/$alone $environment --no-deps
    # Only brought along: built for another torch, it would keep transformers from being imported.
    $environment/bin/python -m pip uninstall --quiet --yes torchvision
fi
# Most tests wait as long as they compute.
[ $# -gt 0 ] || set -- -n 2 --dist loadgroup
exec $environment/bin/python -m pytest "$@"
