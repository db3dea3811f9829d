#!/usr/bin/env bash
# Make .venv, install, run the tests on the cores there are. Arguments go to pytest: bash scripts/test.sh -k tokenizer
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/venv.sh
# more than four processes wait for the longest file of tests; -n 0 takes one alone, as --pdb needs it
processes=$(PYTHONPATH=scripts python -c 'from common.forked import cores; print(min(4, cores()))')
python -m pytest -n "$processes" --dist loadfile "$@"
