# Sourced by quickstart.sh and test.sh: makes .venv, installs requirements.txt into it once, puts it first in PATH.
# PYTHON names the interpreter .venv is made with (default python3; 3.11 or newer).

PYTHON=${PYTHON:-python3}
check_python() {  # check_python INTERPRETER REMEDY: end the script unless it is new enough
  "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && return
  echo "error: Python 3.11 or newer is needed; $1 is $("$1" --version 2>/dev/null || echo "not there"). $2" >&2
  exit 2
}
if [ -x .venv/bin/python ]; then
  check_python .venv/bin/python "Remove .venv and start again."
else
  check_python "$PYTHON" "Name a newer one: PYTHON=python3.12 bash $0"
fi
if [ ! -x .venv/bin/python ] || [ ! -x .venv/bin/pip ]; then
  echo "Making .venv with $("$PYTHON" --version)"
  "$PYTHON" -m venv .venv || { echo "error: $PYTHON cannot make a virtual environment; on Debian and Ubuntu install python3-venv." >&2; exit 2; }
fi
export PATH="$PWD/.venv/bin:$PATH" PIP_DISABLE_PIP_VERSION_CHECK=1
# the stamp is written last, so an installation that was interrupted is taken up again
wanted=$(python -c 'import hashlib; print(hashlib.sha256(open("requirements.txt", "rb").read()).hexdigest())')
if [ "$(cat .venv/requirements.sha256 2>/dev/null)" != "$wanted" ]; then
  echo "Installing requirements.txt (about a minute)"
  python -m pip install -q -r requirements.txt
  echo "$wanted" > .venv/requirements.sha256
fi
