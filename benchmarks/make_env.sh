#!/usr/bin/env bash
# Build the peers' environment: benchmarks/make_env.sh [FOLDER], .venv-bench by default. Does nothing if it is complete.
set -euo pipefail
root="$(cd "$(dirname "$0")/.." && pwd)"
env="${1:-$root/.venv-bench}"
complete() { "$env/bin/python" -c "import trl, vllm, peft" >/dev/null 2>&1; }
complete && exit 0
"${PYTHON:-python3}" -m venv "$env"
"$env/bin/pip" install --quiet -r "$root/benchmarks/requirements.txt"
"$env/bin/pip" uninstall --quiet -y torchvision torchaudio torchcodec
complete || { echo "the peers' environment $env does not import trl, vllm and peft; delete it and try again" >&2; exit 1; }
