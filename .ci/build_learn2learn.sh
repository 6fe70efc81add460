#!/usr/bin/env bash
# build_learn2learn.sh PYTHON FOLDER: put a wheel of learn2learn 0.2.0 for PYTHON into FOLDER.
#
# learn2learn 0.2.0 ships C files that Cython made for older Pythons and that 3.11 cannot compile.
# So: fetch the source distribution, delete them, and let Cython make them anew. Cython 3 refuses
# the sources, hence cython<3; setup.py cythonises only when build_ext stands on its command line.
# Nothing is installed into PYTHON's own environment. A wheel that is there already is kept.
set -euo pipefail

python=$1
wheels=$2
version=0.2.0

fail() {
  echo "learn2learn: $*" >&2
  exit 2
}

tag=$("$python" -c 'import sys; print("cp%d%d" % sys.version_info[:2])')
if compgen -G "$wheels/learn2learn-$version-$tag-*.whl" >/dev/null; then
  exit 0
fi

headers=$("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))')
[[ -f $headers/Python.h ]] ||
  fail "no Python.h in $headers: install the C headers of Python (python3.11-dev or the like)"
compiler=$("$python" -c 'import shlex, sysconfig; print(shlex.split(sysconfig.get_config_var("CC"))[0])')
command -v "${CC:-$compiler}" >/dev/null ||
  fail "no C compiler: ${CC:-$compiler} is not on the path; install gcc"

echo "Building learn2learn $version for $tag (once, about half a minute)."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

"$python" -m venv "$work/env"
build_python=$work/env/bin/python
pip=("$build_python" -m pip -qq --disable-pip-version-check)
# setuptools 70.1 is the first with a bdist_wheel of its own.
"${pip[@]}" install 'cython<3' 'setuptools>=70.1'
# Without build isolation: pip asks setup.py for its metadata, and setup.py for Cython.
"${pip[@]}" download --no-deps --no-binary learn2learn --no-build-isolation \
  --dest "$work" "learn2learn==$version"
tar -xzf "$work/learn2learn-$version.tar.gz" -C "$work"

cd "$work/learn2learn-$version"
rm learn2learn/data/*.c
if ! "$build_python" setup.py build_ext bdist_wheel >"$work/log" 2>&1; then
  tail -n 40 "$work/log" >&2
  fail "the build failed; its last lines stand above"
fi
cd "$OLDPWD"
mkdir -p "$wheels"
mv "$work/learn2learn-$version/dist/"*.whl "$wheels/"
