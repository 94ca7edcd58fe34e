#!/bin/sh
# Makes the environment in .venv: `./setup.sh` for users, `./setup.sh dev` for tests and checks.
# Needs uv, or Python 3.10 to 3.14. Installs nothing outside .venv; does nothing when all is in place.
# For users it ends with short self-tests of the backends that are here, and the next command.
set -eu
cd "$(dirname "$0")"
usage="usage: ./setup.sh         makes .venv for users and tests the backends that are here
       ./setup.sh dev     the same with what tests and checks need"
case "$#${1:-}" in
  0 | 1user | 1dev) kind=${1:-user} ;;
  1-h | 1--help) printf '%s\n' "$usage"; exit 0 ;;
  *)
    printf 'P012 ./setup.sh takes one word or none, and not "%s".\n' "$*" >&2
    printf '  available: user, dev\n  try: ./setup.sh --help\n  nothing was started.\n' >&2
    exit 2
    ;;
esac
say() { printf ' setup      %s\n' "$1"; }
# Under make the next command follows by itself.
next() { [ -n "${MAKELEVEL:-}" ] || printf ' next       %s\n' ".venv/bin/python train.py"; }
fail() { printf 'P502 %s\n' "$1" >&2; [ -z "${2:-}" ] || printf '  try: %s\n' "$2" >&2; exit 2; }

extras=""
constraints=""
if [ "$kind" = dev ]; then extras="[dev]"; fi
if [ "$(uname -s)" = Linux ]; then
  if [ "$kind" = dev ]; then extras="[dev,mlx-cpu]"; fi
  # The tested torch. With an NVIDIA GPU a user gets the newest one, whose CUDA packages are gigabytes.
  if [ "$kind" = dev ] || ! command -v nvidia-smi >/dev/null 2>&1; then
    constraints="-c constraints-ci.txt"
  fi
fi

stamp=.venv/.pippin-$kind
want=$(cat pyproject.toml constraints-ci.txt setup.sh | cksum)
if [ -x .venv/bin/python ] && [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$want" ]; then
  if [ "$kind" = user ]; then next; fi
  exit 0
fi

get_python="brew install python@3.12   or   curl -LsSf https://astral.sh/uv/install.sh | sh"
good() { "$1" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 15))' 2>/dev/null; }
# An Intel Python on Apple silicon, which has no MLX and no MPS.
rosetta() {
  [ "$(uname -s)" = Darwin ] &&
    [ "$(PATH="$PATH:/usr/sbin" sysctl -n hw.optional.arm64 2>/dev/null)" = 1 ] &&
    [ "$("$1" -c 'import platform; print(platform.machine())')" = x86_64 ]
}
refuse_rosetta() {
  if rosetta "$1"; then
    fail "this Python is an Intel build running under Rosetta; MLX and MPS need an arm64 Python." \
      "$get_python"
  fi
}

start=$(date +%s)
if [ -f .venv/pyvenv.cfg ] && { ! good .venv/bin/python || rosetta .venv/bin/python; }; then
  say "the Python of .venv cannot be used any more: making .venv anew"
  rm -rf .venv
fi
if command -v uv >/dev/null 2>&1; then
  if [ ! -x .venv/bin/python ]; then
    uv venv --quiet --python '>=3.10,<3.15' .venv ||
      fail "uv could not make .venv; its message is above." "./setup.sh $kind"
  fi
  refuse_rosetta .venv/bin/python
  say "installing packages with uv (the first time takes minutes)"
  # shellcheck disable=SC2086
  uv pip install --quiet --python .venv/bin/python $constraints -e ".$extras" ||
    fail "uv could not install the packages; its message is above." "./setup.sh $kind"
else
  if [ ! -x .venv/bin/python ]; then
    python=""
    for name in python3 python3.13 python3.12 python3.11 python3.10 python3.14 python; do
      if command -v "$name" >/dev/null 2>&1 && good "$name"; then python=$name; break; fi
    done
    if [ -z "$python" ]; then
      found=$(python3 --version 2>&1 || echo "no python3")
      fail "Pippin needs Python 3.10 or newer, or uv; found: $found." "$get_python"
    fi
    refuse_rosetta "$python"
    say "making .venv with $("$python" --version 2>&1)"
    "$python" -m venv .venv || fail "python -m venv failed; on Debian: apt install python3-venv"
  fi
  say "installing packages (the first time takes minutes)"
  # shellcheck disable=SC2086
  .venv/bin/python -m pip install --quiet --disable-pip-version-check $constraints -e ".$extras" ||
    fail "pip could not install the packages; its message is above." "./setup.sh $kind"
fi
if [ "$kind" = user ]; then
  say "testing the backends that are here"
  # The stamp is not written before this passes, so the next call tests again.
  .venv/bin/python tools/setup_verification.py --quick || {
    printf 'P402 a self-test failed on this machine, so training could be wrong without a sign.\n' >&2
    printf '  try: .venv/bin/python tools/setup_verification.py   (all tests, with what to do)\n' >&2
    exit 1
  }
fi
printf '%s' "$want" > "$stamp"
say "ready in $(($(date +%s) - start)) s: .venv"
if [ "$kind" = user ]; then next; fi
