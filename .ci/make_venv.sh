#!/bin/sh
# make_venv.sh VENV [PYTHON]: see to it that VENV is a working environment of Python 3.11 to 3.14.
#
# Without PYTHON the first of python3.11, python3.12, python3.13, python3.14, python3 that works is
# taken. 3.11 and 3.12 come first, and one with C headers before one without: learn2learn, which the
# tests compare with, is compiled, and builds with these two alone. VENV/.python is written when, and
# only when, the environment is new, so that make knows what to install again.
set -eu

venv=$1
python=${2:-}

fail() {
  echo "$*" >&2
  exit 2
}

# A name on the path proves nothing (pyenv's shims stand there for versions that are not active),
# and Debian ships venv without ensurepip.
works() {
  "$1" -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))' \
    >/dev/null 2>&1
}

has_headers() {
  "$1" -c 'import os, sys, sysconfig
sys.exit(not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))' \
    >/dev/null 2>&1
}

version() {
  "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])'
}

if [ -n "$python" ] && ! works "$python"; then
  fail "PYTHON=$python does not run, or is not Python 3.11 to 3.14 with venv: give another"
fi

# Scripts and editable installs hold absolute paths: an environment that was moved is no use.
here=$(pwd -P)/$venv
if works "$venv/bin/python" && [ "$(cat "$venv/.python" 2>/dev/null || echo "$here")" = "$here" ]; then
  if [ -n "$python" ] && [ "$(version "$python")" != "$(version "$venv/bin/python")" ]; then
    fail "PYTHON=$python is $(version "$python"), but $venv has $(version "$venv/bin/python"): run \`make clean\` first"
  fi
  [ ! -f "$venv/.python" ] || exit 0
  # Made by other means: keep it, but it must have pip.
  "$venv/bin/python" -m pip --version >/dev/null 2>&1 || "$venv/bin/python" -m ensurepip >/dev/null
else
  if [ ! -f "$venv/.python" ] && "$venv/bin/python" -c '' 2>/dev/null; then
    fail "$venv was not made by make and is not Python 3.11 to 3.14: move it away, or run \`make clean\`"
  fi
  if [ -z "$python" ]; then
    for candidate in python3.11 python3.12 python3.13 python3.14 python3; do
      works "$candidate" || continue
      [ -n "$python" ] || python=$candidate
      if has_headers "$candidate"; then
        python=$candidate
        break
      fi
    done
    [ -n "$python" ] || fail "no working Python 3.11 to 3.14 with venv found: install one, or name it (make ... PYTHON=/path/to/python3.11)"
  fi
  echo "Making $venv with $python ($(version "$python"))."
  "$python" -m venv --clear "$venv"
fi
echo "$here" >"$venv/.python"
