#!/usr/bin/env bash
# From a fresh clone to a fine-tuned model: makes .venv, installs the pinned versions (once), and runs
# tools/quickstart.py, which says what it does. Arguments go to it: bash tools/quickstart.sh --help
#
# $PYTHON names the interpreter that makes .venv (python3 unless set).
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

bash "$root/tools/venv.sh" "$root/.venv" train,peft
cd "$root"
# Megatron warns at import of every optional package that is not there.
exec "$root/.venv/bin/python" -W ignore::UserWarning tools/quickstart.py "$@"
