# shellcheck shell=bash
# Sourced by quickstart.sh and test.sh: `use_venv core|test` goes to the repository root and makes
# sure that .venv there holds raddino_jax (with its test extra), installed as setup.cfg now asks.
# $python is then its interpreter. PYTHON=/path/to/python chooses the one that .venv is made with.

python=.venv/bin/python

say() { echo "raddino_jax: $*" >&2; }
fail() { say "$*"; exit 1; }

supported() { "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' &>/dev/null; }

find_python() {
  # Every match on the PATH is tried, since the first may be a shim that only says "command not found".
  local names=(python3.13 python3.12 python3.11 python3 python) name path bare=""
  [ -z "${PYTHON:-}" ] || names=("$PYTHON")
  for name in "${names[@]}"; do
    while IFS= read -r path; do
      supported "$path" || continue
      "$path" -c 'import ensurepip, venv' &>/dev/null && { echo "$path"; return; }
      bare=$path
    done < <(type -aP "$name")
  done
  [ -z "$bare" ] || fail "$bare has no venv module (on Debian and Ubuntu: apt-get install python3-venv)"
  fail "no Python 3.11, 3.12 or 3.13 on the PATH (looked for ${names[*]}; PYTHON=/path/to/python names another)"
}

# .venv/unfinished marks a .venv whose making or filling was killed: pip could take a half-written
# package for an installed one, so such a .venv is started afresh.
make_venv() {
  local base log
  if [ -n "$(ls -A .venv 2>/dev/null)" ] && ! compgen -G ".venv/unfinished" >/dev/null &&
    ! compgen -G ".venv/installed-*" >/dev/null; then
    fail "$PWD/.venv was made by others and has no pip or no Python 3.11 to 3.13: move it away"
  fi
  base=$(find_python) || exit
  say "making .venv with $("$base" --version 2>&1) ($base)"
  { mkdir -p .venv && find .venv/ -mindepth 1 -delete && : >.venv/unfinished; } 2>/dev/null ||
    fail "cannot write to $PWD/.venv (permissions or disk space)"
  # The real path: .venv may be a link to a larger disk, which the venv module refuses.
  log=$("$base" -m venv "$(cd .venv && pwd -P)" 2>&1) || fail "cannot make .venv: $(reason "$log")"
}

install() {
  local target=. log whole=true
  [ "$1" = core ] || target=".[$1]"
  [ ! -e .venv/unfinished ] || whole=false
  : >.venv/unfinished || fail "cannot write to $PWD/.venv (permissions or disk space)"
  say "installing into .venv (one or two minutes, 1.3 GB or more)"
  if ! log=$(PIP_USER=0 "$python" -m pip install -q --disable-pip-version-check -e "$target" 2>&1); then
    # An update that pip gave up by itself leaves the packages as they were.
    if $whole; then rm -f .venv/unfinished; fi
    fail "cannot install: $(reason "$log") (all of it: cd '$PWD' && $python -m pip install -e '$target')"
  fi
  # The test extra holds the core.
  { echo "$stamp" >.venv/installed-core && echo "$stamp" >".venv/installed-$1"; } ||
    fail "cannot write to $PWD/.venv (permissions or disk space)"
  rm -f .venv/unfinished
}

reason() {
  local free=0
  read -r _ _ _ free _ < <(df -Pk . | tail -n 1) || true
  case $1 in
    *"No space left"* | *"Disk quota"*) echo "no space left on the disk" ;;
    *"establish a new connection"* | *"timed out"* | *ProxyError* | *SSLError* | *NameResolution*)
      echo "the package index cannot be reached (network, proxy or certificate)" ;;
    *) if [ "$free" -lt 50000 ]; then echo "no space left on the disk"; else tail -n 1 <<<"$1"; fi ;;
  esac
}

ready() {
  [ ! -e .venv/unfinished ] && supported "$python" && [ "$(cat ".venv/installed-$1" 2>/dev/null)" = "$stamp" ]
}

use_venv() {
  CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." || exit
  # A moved checkout installs again: an editable install holds the path.
  stamp="$PWD $(cat setup.cfg pyproject.toml | cksum)"
  if ready "$1"; then return; fi
  # One at a time, where the system has flock; the lock lies on the folder and ends with the process.
  exec 9<.
  if command -v flock >/dev/null && ! flock -n 9; then
    say "waiting for another installation into $PWD/.venv"
    flock 9 || true
  fi
  if ! ready "$1"; then
    if [ -e .venv/unfinished ] || ! supported "$python" || ! "$python" -c 'import pip' 2>/dev/null; then make_venv; fi
    install "$1"
  fi
  exec 9<&-
}
