#!/usr/bin/env bash
# Runs the suite at the ends of the version window, each in a fresh environment of its own:
#   python3.11  the newest packages that still take Python 3.11
#   newest      the newest packages on Python 3.13, or else 3.12
#   colab       what Colab's TPU machines have; installing this project must change none of it
# tests/versions.sh NAME... runs only those. Of an absent interpreter the run is skipped.
set -uo pipefail
cd "$(dirname "$0")/.."

COLAB="jax==0.7.2 jaxlib==0.7.2 flax==0.11.2 optax==0.2.8 orbax-checkpoint==0.12.4 grain==0.2.18
  tensorflow-datasets==4.9.10 numpy==2.1.3 matplotlib tqdm rich"

# The first of the interpreters that runs: a shim of pyenv may be on PATH and not run.
interpreter() {
  local python
  for python in "$@"; do
    "$python" --version >/dev/null 2>&1 && echo "$python" && return
  done
  return 1
}

install_newest() {
  "$1/bin/pip" install --quiet --upgrade ".[test]"
}

install_colab() {
  local pip=$1/bin/pip
  # shellcheck disable=SC2086
  "$pip" install --quiet $COLAB &&
    "$pip" freeze >"$1/constraints.txt" &&
    "$pip" install --quiet --dry-run --report "$1/report.json" . &&
    "$1/bin/python" - "$1/report.json" <<'PYTHON' &&
import importlib.metadata, json, re, sys

def canonical(name):
    return re.sub("[-_.]+", "-", name).lower()

present = {canonical(d.name) for d in importlib.metadata.distributions()}
wanted = {canonical(p["metadata"]["name"]) for p in json.load(open(sys.argv[1]))["install"]}
if changed := sorted(present & wanted):
    sys.exit("pip install . would change what Colab has: " + ", ".join(changed))
PYTHON
    "$pip" install --quiet --constraint "$1/constraints.txt" ".[test]"
}

# check NAME HOW INTERPRETER...: fills $line with what came of it; 0 if it passed or was skipped.
check() {
  local name=$1 how=$2 env=.venv-versions/$1 python status
  shift 2
  echo "== $name"
  if ! python=$(interpreter "$@"); then
    line="$name: skipped, no $* here"
    return 0
  fi
  if ! { "$python" -m venv --clear "$env" && "install_$how" "$env"; }; then
    line="$name: FAILED to install"
    return 1
  fi
  "$env/bin/pytest" -m "not slow" | tee "$env/pytest.log"
  status=$?
  line="$name: $("$env/bin/python" -c '
import platform, flax, jax
print(f"Python {platform.python_version()}, jax {jax.__version__}, flax {flax.__version__}")
'): $(tail -n 1 "$env/pytest.log")"
  return "$status"
}

summary=() failed=0
for name in "${@:-python3.11 newest colab}"; do
  :
done
