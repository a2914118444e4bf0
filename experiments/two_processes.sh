#!/usr/bin/env bash
# Runs flax-unet train with the given flags as two processes on this computer.
# If one fails, both end, and so does this script, with its exit code.
set -u
set -m  # a group for each process, so that Ctrl-C reaches them once, from here
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
  wait "$pid"
  ended=$?
  while kill -0 "$pid" 2>/dev/null; do  # a signal has ended `wait`, and not the process
    wait "$pid"
    ended=$?
  done
  [ $ended -eq 0 ] || code=$ended
done
exit $code
