#!/usr/bin/env bash
# Make .venv, install, run the tests. Arguments go to pytest: bash scripts/test.sh -k tokenizer
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/venv.sh
python -m pytest "$@"
