#!/usr/bin/env bash
# Trains on the NVIDIA GPUs of this host, alone or as one of several hosts.
#
#   launch/gpu_host.sh [--dry-run] --config=... --workdir=... [...]
#   COORDINATOR=node0:1234 HOSTS=4 HOST=2 launch/gpu_host.sh --config=... --workdir=... [...]
#
# With several hosts, run it once on each: HOST counts from 0, COORDINATOR is a free port of host 0,
# and the workdir lies on a file system that all share. PRESET chooses the flags below: throughput
# (default), memory, or none.
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

# --- XLA flags ------------------------------------------------------------------------------------
# throughput: collectives run beside the computation that does not need them. The latency-hiding
#   scheduler orders the program for that; pipelining moves the collectives of one layer into the
#   loop's step before it (all-gather, all-reduce) or behind it (reduce-scatter).
overlap=(
  --xla_gpu_enable_latency_hiding_scheduler=true
  --xla_gpu_enable_pipelined_all_gather=true
  --xla_gpu_enable_pipelined_reduce_scatter=true
  --xla_gpu_enable_pipelined_all_reduce=true
  --xla_gpu_enable_while_loop_double_buffering=true
)
# memory: none of that, because overlapping keeps more buffers alive; and JAX takes memory as it
#   needs it instead of three quarters at the start, which is slower but tells what is used.
preset=${PRESET:-throughput}
settings=(XLA_PYTHON_CLIENT_MEM_FRACTION="${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92}")
case $preset in
throughput) settings+=("XLA_FLAGS=${XLA_FLAGS:+$XLA_FLAGS }${overlap[*]}") ;;
memory) settings+=(XLA_PYTHON_CLIENT_PREALLOCATE=false) ;;
none) ;;
*) die "unknown PRESET=$preset: choose throughput, memory or none" ;;
esac
# --------------------------------------------------------------------------------------------------

if [ "${HOSTS:-1}" != 1 ]; then
  need COORDINATOR "host:port of host 0"
  need HOST "the number of this host, from 0"
  settings+=(
    "TOKJAX_COORDINATOR=$COORDINATOR" "TOKJAX_PROCESS_COUNT=$HOSTS" "TOKJAX_PROCESS_INDEX=$HOST"
    "TOKJAX_HOSTS=$HOSTS"
  )
fi
run env "${settings[@]}" python -m tokjax.train "$@"
