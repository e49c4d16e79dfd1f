#!/usr/bin/env bash
# Makes or updates a virtual environment with this project in it (editable) and the pinned versions.
#
#   bash tools/venv.sh FOLDER EXTRAS        e.g.  bash tools/venv.sh .venv train,peft
#
# $PYTHON names the interpreter (python3 unless set). Nothing is installed when FOLDER's stamp shows that it was
# made from the same pyproject.toml, constraints, extras and Python.
set -euo pipefail

folder=${1:?usage: venv.sh FOLDER EXTRAS}
extras=${2:?usage: venv.sh FOLDER EXTRAS}
python=${PYTHON:-python3}
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

command -v "$python" >/dev/null || {
    echo "error: no interpreter '$python': install Python 3.11 or 3.12, or set PYTHON to one" >&2
    exit 1
}
version=$("$python" -c 'import sys; print("%d.%d.%d" % sys.version_info[:3])')
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "error: '$python' is Python $version, mlora needs 3.11 or newer: set PYTHON to one" >&2
    exit 1
}

stamp=$(
    "$python" - "$version $extras $root" "$root/pyproject.toml" "$root/tools/constraints.txt" <<'PY'
import hashlib, pathlib, sys
digest = hashlib.sha256(sys.argv[1].encode())
for path in sys.argv[2:]:
    digest.update(pathlib.Path(path).read_bytes())
print(digest.hexdigest())
PY
)
if [[ -f $folder/mlora.stamp && $(<"$folder/mlora.stamp") == "$stamp" ]]; then
    echo "== environment: $folder is up to date (Python $version)"
    exit 0
fi
if [[ -e $folder && ! -f $folder/pyvenv.cfg && -n $(ls -A "$folder") ]]; then
    echo "error: $folder exists and is no virtual environment: move it away or name another folder" >&2
    exit 1
fi

echo "== environment: installing megatron-mlora[$extras] into $folder (Python $version; the first time, torch takes minutes)"
began=$SECONDS
rm -f "$folder/mlora.stamp"
if [[ ! -x $folder/bin/python || $("$folder/bin/python" -c 'import sys; print("%d.%d.%d" % sys.version_info[:3])') != "$version" ]]; then
    "$python" -m venv --clear "$folder"
fi
"$folder/bin/python" -m pip install -qq --disable-pip-version-check \
    --editable "${root}[$extras]" --constraint "$root/tools/constraints.txt"
echo "$stamp" >"$folder/mlora.stamp"
echo "== environment: installed in $((SECONDS - began)) s"
