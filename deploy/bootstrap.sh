#!/bin/sh
# Creates the virtual environment. Debian ships python3 without the venv module, so this says (or, as root, does) what is missing.
set -eu
python=$1
venv=$2
if ! command -v "$python" >/dev/null 2>&1; then
  echo "No '$python' found. Install Python 3.11 or newer, or name one: make install PYTHON=/path/to/python3" >&2
  exit 1
fi
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
  echo "'$python' is $("$python" --version). Python 3.11 or newer is needed: make install PYTHON=/path/to/python3.11" >&2
  exit 1
fi
if ! "$python" -c 'import ensurepip, venv' >/dev/null 2>&1; then
  if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then
    echo "Python's venv module is missing: installing Debian's python3-venv"
    apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y python3-venv >/dev/null
  else
    echo "Python's venv module is missing. On Debian: sudo apt-get install python3-venv" >&2
    exit 1
  fi
fi
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
echo "Installing the pinned packages into $venv (some minutes the first time)"
