#!/usr/bin/env bash
# Makes a node ready: checks the shared folder and the token, makes the Python environment, and has every shell load
# environment.sh. Run on each node by `ray up`; harmless to run again.
set -euo pipefail
source_folder="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
. "$source_folder/cluster/environment.sh"

refuse() { echo "stemtune: $(hostname): $*" >&2; exit 2; }

mkdir -p "$STEMTUNE_SWEEPS" 2>/dev/null && [ -w "$STEMTUNE_SWEEPS" ] ||
    refuse "cannot write to $STEMTUNE_SWEEPS; mount the shared folder here, or change STEMTUNE_SHARED in cluster/environment.sh"

token="${RAY_AUTH_TOKEN_PATH:-$HOME/.ray/auth_token}"
[ -s "$token" ] || refuse "there is no token in $token; make one with: (umask 077; ray get-auth-token --generate)"
chmod 600 "$token"
[ ! -e "$HOME/.mlflow/credentials" ] || chmod 600 "$HOME/.mlflow/credentials"

# The same packages in the same versions everywhere: constraints.txt names them. Several nodes may share one home.
wanted="$(cat "$source_folder/pyproject.toml" "$source_folder/constraints.txt" | sha256sum | cut -d' ' -f1)"
{ exec 9>"$STEMTUNE_VENV.lock"; } 2>/dev/null && flock 9 || true
if [ -x "$STEMTUNE_VENV/bin/python" ] && [ ! -e "$STEMTUNE_VENV/.stemtune" ]; then
    echo "using the environment that is there: $STEMTUNE_VENV"
elif [ "$(cat "$STEMTUNE_VENV/.stemtune" 2>/dev/null)" != "$wanted" ]; then
    echo "making $STEMTUNE_VENV (minutes, about 6 GB)"
    python="$(command -v python3.13 || command -v python3.12 || command -v python3.11 || command -v python3)" ||
        refuse "there is no Python; install Python 3.11 or newer"
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        refuse "$python is older than Python 3.11; install a newer one, the same on every node"
    mkdir -p "$STEMTUNE_VENV" && touch "$STEMTUNE_VENV/.stemtune"
    "$python" -m venv "$STEMTUNE_VENV"
    "$STEMTUNE_VENV/bin/python" -m pip install --quiet --disable-pip-version-check \
        -c "$source_folder/constraints.txt" -e "$source_folder" ||
        refuse "the packages could not be installed into $STEMTUNE_VENV"
    echo "$wanted" >"$STEMTUNE_VENV/.stemtune"
fi

line=". $source_folder/cluster/environment.sh"
grep -qxF "$line" "$HOME/.bashrc" 2>/dev/null || echo "$line" >>"$HOME/.bashrc"
python -c 'import ray, stemtune' || refuse "$STEMTUNE_VENV cannot import ray and stemtune"
