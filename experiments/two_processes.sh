#!/usr/bin/env bash
# Runs flax-unet train with the given flags as two processes on this computer.
# If one fails, both end, and so does this script, with its exit code.
set -u
python=${PYTHON:-python3}
port=$("$python" -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')
here=$(dirname "$0")
for i in 0 1; do
  "$python" "$here/train.py" "$@" --coordinator "127.0.0.1:$port" --processes 2 --process $i &
  pids[i]=$!
done
trap 'kill "${pids[@]}" 2>/dev/null' INT TERM
code=0
for pid in "${pids[@]}"; do
  wait "$pid" || code=$?
done
exit $code
