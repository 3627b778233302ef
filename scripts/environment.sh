# Sourced by the other scripts: enter the repository and make .venv hold requirements.txt.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python="${PYTHON:-python3}"
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "error: Python 3.11 or newer is needed; set PYTHON to one" >&2
    exit 2
fi
[ -d .venv ] || "$python" -m venv .venv
install() { # requirements, the copy that says they are installed, where (.venv), flags of pip
    local environment="${3:-.venv}"
    cmp -s "$1" "$2" && return
    echo "Installing $1 into $environment (a minute or two)"
    "$environment/bin/python" -m pip install --quiet --disable-pip-version-check "${@:4}" -r "$1"
    cp "$1" "$2"
}
install requirements.txt .venv/installed.txt
