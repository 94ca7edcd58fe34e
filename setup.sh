#!/bin/sh
# Makes the environment in .venv: `./setup.sh` for users, `./setup.sh dev` for tests and checks.
# Needs uv, or Python 3.10 to 3.14. Installs nothing outside .venv; does nothing when all is in place.
set -eu
cd "$(dirname "$0")"
kind=${1:-user}
say() { printf ' setup      %s\n' "$1"; }
fail() { printf 'P502 %s\n' "$1" >&2; [ -z "${2:-}" ] || printf '  try: %s\n' "$2" >&2; exit 2; }

extras=""
if [ "$kind" = dev ]; then extras="[dev]"; fi
if [ "$kind" = dev ] && [ "$(uname -s)" = Linux ]; then extras="[dev,mlx-cpu]"; fi
constraints=""
if [ "$(uname -s)" = Linux ]; then constraints="-c constraints-ci.txt"; fi

stamp=.venv/.pippin-$kind
want=$(cat pyproject.toml constraints-ci.txt setup.sh | cksum)
if [ -x .venv/bin/python ] && [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$want" ]; then exit 0; fi

good() { "$1" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 15))' 2>/dev/null; }
start=$(date +%s)
if command -v uv >/dev/null 2>&1; then
  [ -x .venv/bin/python ] || uv venv --quiet --python '>=3.10,<3.15' .venv
  say "installing packages with uv (the first time takes minutes)"
  # shellcheck disable=SC2086
  uv pip install --quiet --python .venv/bin/python $constraints -e ".$extras"
else
  if [ ! -x .venv/bin/python ] || ! good .venv/bin/python; then
    python=""
    for name in python3 python3.13 python3.12 python3.11 python3.10 python3.14 python; do
      if command -v "$name" >/dev/null 2>&1 && good "$name"; then python=$name; break; fi
    done
    if [ -z "$python" ]; then
      found=$(python3 --version 2>&1 || echo "no python3")
      fail "Pippin needs Python 3.10 or newer, or uv; found: $found." \
        "brew install python@3.12   or   curl -LsSf https://astral.sh/uv/install.sh | sh"
    fi
    if [ "$(uname -s)" = Darwin ] && [ "$(/usr/sbin/sysctl -n hw.optional.arm64 2>/dev/null)" = 1 ] &&
      [ "$("$python" -c 'import platform; print(platform.machine())')" = x86_64 ]; then
      fail "this Python is an Intel build running under Rosetta; MLX and MPS need an arm64 Python." \
        "brew install python@3.12   or   curl -LsSf https://astral.sh/uv/install.sh | sh"
    fi
    say "making .venv with $("$python" --version 2>&1)"
    "$python" -m venv .venv || fail "python -m venv failed; on Debian: apt install python3-venv"
  fi
  say "installing packages (the first time takes minutes)"
  # shellcheck disable=SC2086
  .venv/bin/python -m pip install --quiet --disable-pip-version-check $constraints -e ".$extras" ||
    fail "pip could not install the packages; its message is above." "./setup.sh $kind"
fi
printf '%s' "$want" > "$stamp"
say "ready in $(($(date +%s) - start)) s: .venv"
