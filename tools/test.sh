#!/usr/bin/env bash
# Runs every test that needs no GPU. Arguments go to pytest: bash tools/test.sh -k linear -x
#
# Two files of tests run at a time; -n 0 runs all in one process, for --pdb.
# $MLORA_VENV names the environment (.venv-test unless set), $PYTHON the interpreter that makes it.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${MLORA_VENV:-$root/.venv-test}

bash "$root/tools/venv.sh" "$venv" "${MLORA_EXTRAS:-test}"
venv=$(cd "$venv" && pwd)
cd "$root"
# The tests start several ranks each: one thread a rank. No GPU, no model hub, no window.
export OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES="" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false MPLBACKEND=Agg
exec "$venv/bin/python" -m pytest tests --ignore=tests/gpu -n 2 --dist loadfile --no-loadscope-reorder "$@"
