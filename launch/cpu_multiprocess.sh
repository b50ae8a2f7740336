#!/usr/bin/env bash
# Runs one training run as N processes on the CPU of this machine: the stand-in for a pod.
#
#   launch/cpu_multiprocess.sh [--dry-run] N --config=... --workdir=... [...]
#
# Every line of output is led by the number of its process. When one process fails it is named, the
# others end within HEARTBEAT seconds (default 10), and its exit code is returned. SIGTERM or Ctrl-C
# is passed on to one process, which makes all of them save at the same step. DEVICES (default 1) is
# the number of devices of each process; PORT is the coordinator's (default: a free one).
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=launch/common.sh
. launch/common.sh

if [ "${1:-}" = --dry-run ]; then
  DRY_RUN=1
  shift
fi
if [ $# = 0 ] || [ "$1" = --help ]; then
  usage
  exit 0
fi
count=$1
shift
case $count in
'' | *[!0-9]* | 0) die "the first argument is the number of processes, not '$count'" ;;
esac
[ $# -gt 0 ] || die "give the arguments of python -m tokjax.train behind the number of processes"

port=${PORT:-$(python -c 'import socket; s = socket.socket(); s.bind(("localhost", 0)); print(s.getsockname()[1])')}
devices=${DEVICES:-1}

# The environment of process $1 and the command behind it.
place() {
  printf '%s\n' env JAX_PLATFORMS=cpu \
    "XLA_FLAGS=${XLA_FLAGS:+$XLA_FLAGS }--xla_force_host_platform_device_count=$devices" \
    "TOKJAX_COORDINATOR=localhost:$port" "TOKJAX_PROCESS_COUNT=$count" \
    "TOKJAX_PROCESS_INDEX=$1" TOKJAX_HOSTS=1 "TOKJAX_HEARTBEAT_S=${HEARTBEAT:-10}" python -u -m tokjax.train
}

if [ "$DRY_RUN" = 1 ]; then
  for ((i = 0; i < count; i++)); do
    mapfile -t command < <(place "$i")
    show "${command[@]}" "$@"
  done
  exit 0
fi

pids=()
for ((i = 0; i < count; i++)); do
  mapfile -t command < <(place "$i")
  "${command[@]}" "$@" > >(sed -u "s/^/[$i] /") 2>&1 &
  pids+=($!)
done
trap 'kill -TERM "${pids[0]}" 2>/dev/null || true' TERM INT

failed=0
for ((left = count; left > 0; )); do
  code=0
  wait -n -p ended || code=$?
  [ -n "${ended:-}" ] || continue # a signal came, no process ended
  left=$((left - 1))
  for ((i = 0; i < count; i++)); do
    [ "${pids[$i]}" = "$ended" ] || continue
    if [ "$code" != 0 ] && [ "$failed" = 0 ]; then
      failed=$code
      [ "$code" = 75 ] || echo "process $i of $count ended with exit code $code" >&2
    fi
  done
done
exit "$failed"
