#!/usr/bin/env bash
# The run-book of a machine with a GPU: bench/gpu.sh build|test|sanitize|bench|search|all [--dry]
# bench/gpu.sh --help says what each does; PYTHON names the Python that has torch [python3].
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec "${PYTHON:-python3}" -m bench.gpu "$@"
