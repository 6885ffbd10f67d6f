#!/usr/bin/env bash
# Validates the kernels on a GPU machine that is lent for minutes: see README.md next to this.
set -euo pipefail
cd "$(dirname "$0")/../.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
# One cache of compiled kernels for all processes, which the next call finds.
export TORCHINDUCTOR_CACHE_DIR="${TORCHINDUCTOR_CACHE_DIR:-$PWD/build/validate/inductor}"
export TRITON_CACHE_DIR="${TRITON_CACHE_DIR:-$PWD/build/validate/triton}"
exec "${PYTHON:-python3}" -m tests.gpu.validate "$@"
