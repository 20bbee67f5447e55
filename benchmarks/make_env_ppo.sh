#!/usr/bin/env bash
# Build the environment of the last TRL with PPO: benchmarks/make_env_ppo.sh [FOLDER], .venv-trlppo by default. Does
# nothing if it is complete.
set -euo pipefail
root="$(cd "$(dirname "$0")/.." && pwd)"
env="${1:-$root/.venv-trlppo}"
complete() { "$env/bin/python" -W ignore -c "import peft, trl.experimental.ppo" >/dev/null 2>&1; }
complete && exit 0
"${PYTHON:-python3}" -m venv "$env"
"$env/bin/pip" install --quiet -r "$root/benchmarks/requirements-ppo.txt"
complete || { echo "the environment $env does not import trl.experimental.ppo; delete it and try again" >&2; exit 1; }
