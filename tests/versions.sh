#!/usr/bin/env bash
# Runs the test suite at both ends of the supported version range, each in a fresh environment:
#   python3.11  the newest packages that support Python 3.11
#   newest      the newest packages, on Python 3.13, or 3.12 if that is missing
#   colab       the packages of Colab's TPU machines; installing this project must not change them
# tests/versions.sh NAME... runs only these. If the interpreter is missing, a run is skipped.
set -uo pipefail
cd "$(dirname "$0")/.."

COLAB=(jax==0.7.2 jaxlib==0.7.2 flax==0.11.2 optax==0.2.8 orbax-checkpoint==0.12.4 grain==0.2.18
  tensorflow-datasets==4.9.10 numpy==2.1.3 matplotlib tqdm rich)

# Fails if, according to pip's report, an installed package would be installed again.
KEEPS='
import importlib.metadata, json, re, sys
names = lambda found: {re.sub("[-_.]+", "-", metadata["name"]).lower() for metadata in found}
present = names(d.metadata for d in importlib.metadata.distributions())
wanted = names(package["metadata"] for package in json.load(sys.stdin)["install"])
if changed := present & wanted:
    sys.exit(f"pip install . would change packages of Colab: {sorted(changed)}")
'
VERSIONS='
import flax, jax, platform
print(f"Python {platform.python_version()}, jax {jax.__version__}, flax {flax.__version__}")
'

# Prints the first interpreter that works: a pyenv shim may be on PATH and yet fail to run.
interpreter() {
  local python
  for python in "$@"; do
    "$python" --version >/dev/null 2>&1 && echo "$python" && return
  done
  return 1
}

install() { # NAME ENVIRONMENT
  local pip="$2/bin/pip" constraints="$2/constraints.txt"
  touch "$constraints"
  if [ "$1" = colab ]; then
    "$pip" install --quiet "${COLAB[@]}" &&
      "$pip" freeze >"$constraints" &&
      "$pip" install . --dry-run --quiet --report - | "$2/bin/python" -c "$KEEPS" || return
  fi
  "$pip" install --quiet --constraint "$constraints" --editable ".[test]"
}

check() { # NAME INTERPRETER...
  local name=$1 env=.venv-versions/$1 python versions result=0
  shift
  echo "== $name"
  if ! python=$(interpreter "$@"); then
    summary+=("$name: skipped, none of these interpreters works: $*")
  elif ! { "$python" -m venv --clear "$env" && install "$name" "$env"; }; then
    summary+=("$name: FAILED to install")
    failed=1
  else
    "$env/bin/pytest" -n 2 --dist loadfile -m "not slow" | tee "$env/pytest.log" || result=$?
    versions=$("$env/bin/python" -c "$VERSIONS")
    summary+=("$name: $versions: exit code $result: $(tail -n 1 "$env/pytest.log")")
    [ "$result" = 0 ] || failed=1
  fi
}

summary=() failed=0
[ $# -gt 0 ] || set -- python3.11 newest colab
for name in "$@"; do
  case $name in
    python3.11) check "$name" python3.11 ;;
    newest) check "$name" python3.13 python3.12 ;;
    colab) check "$name" python3.13 ;;
    *) echo "unknown environment $name: choose python3.11, newest or colab" && exit 2 ;;
  esac
done
echo
printf '%s\n' "${summary[@]}"
exit "$failed"
