#!/usr/bin/env bash
# A TPU pod from its creation to its end, by queued resources; all hosts get every command.
#
#   launch/tpu_pod.sh [--dry-run] create              ask for the pod, and wait until it is there
#   launch/tpu_pod.sh [--dry-run] setup               copy this repository to every host, install it
#   launch/tpu_pod.sh [--dry-run] run --config=... --workdir=gs://bucket/run [...]
#   launch/tpu_pod.sh [--dry-run] logs                follow the output of host 0
#   launch/tpu_pod.sh [--dry-run] watch --config=... --workdir=... [...]
#                                                     run to the end; after a preemption make the
#                                                     pod anew and go on from the last checkpoint
#   launch/tpu_pod.sh [--dry-run] delete
#
# Settings, from the environment: POD (name), ZONE, TYPE (such as v5litepod-256), VERSION (runtime,
# default by type), PROJECT (default gcloud's), SPOT=1 for capacity that may be taken away,
# SLICES (default 1). The workdir must be where every host can reach it: a bucket mounted at the
# same place, or a network file system. The run of one workdir is one run however often it starts.
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
action=$1
shift

need POD "a name for the pod"
need ZONE "the zone, such as us-west4-a"
where=(--zone "$ZONE")
if [ -n "${PROJECT:-}" ]; then where+=(--project "$PROJECT"); fi
poll=${POLL_SECONDS:-30}

runtime() {
  case ${TYPE:-} in
  v5litepod*) echo v2-alpha-tpuv5-lite ;;
  v5p*) echo v2-alpha-tpuv5 ;;
  v6e*) echo v2-alpha-tpuv6e ;;
  v4*) echo tpu-ubuntu2204-base ;;
  *) die "set VERSION: the runtime of TYPE=${TYPE:-} is not known here" ;;
  esac
}

# Runs a command line on every host.
everywhere() {
  run gcloud compute tpus tpu-vm ssh "$POD" "${where[@]}" --worker=all --command "$1"
}

state() {
  gcloud compute tpus queued-resources describe "$POD" "${where[@]}" \
    --format='value(state.state)' 2>/dev/null || echo ABSENT
}

create() {
  need TYPE "the accelerator, such as v5litepod-256"
  local version more=()
  version=${VERSION:-$(runtime)}
  if [ "${SPOT:-0}" = 1 ]; then more+=(--spot); fi
  if [ "${SLICES:-1}" != 1 ]; then more+=(--node-count "$SLICES" --node-prefix "$POD"); else more+=(--node-id "$POD"); fi
  run gcloud compute tpus queued-resources create "$POD" "${where[@]}" \
    --accelerator-type "$TYPE" --runtime-version "$version" "${more[@]}"
  if [ "$DRY_RUN" = 1 ]; then return; fi
  local now
  until now=$(state) && [ "$now" = ACTIVE ]; do
    case $now in
    FAILED | SUSPENDED | ABSENT) die "the request is $now: delete it and create it again" ;;
    esac
    echo "$(date +%T) $POD is $now" >&2
    sleep "$poll"
  done
}

setup() {
  run gcloud compute tpus tpu-vm scp --recurse "${where[@]}" --worker=all \
    tokjax configs launch setup.cfg pyproject.toml constraints.txt README.md "$POD:tokjax-source/"
  everywhere "cd tokjax-source && python3 -m venv .venv && .venv/bin/pip install -q -c constraints.txt -e '.[tpu]'"
}

# The command line that starts training on a host, in the background, once.
training() {
  local words
  words=$(show "$@")
  case $words in *\'*) die "an argument holds a single quote, which does not reach the hosts: $words" ;; esac
  echo "cd tokjax-source && { [ ! -f run.pid ] || ! kill -0 \$(cat run.pid) 2>/dev/null; } &&" \
    "{ rm -f run.code; TOKJAX_CLUSTER=tpu nohup sh -c '.venv/bin/python -u -m tokjax.train $words; echo \$? > run.code' > run.log 2>&1 & echo \$! > run.pid; }"
}

start() {
  [ $# -gt 0 ] || die "give the arguments of python -m tokjax.train"
  local line
  line=$(training "$@") || exit $?
  everywhere "$line"
}

logs() {
  run gcloud compute tpus tpu-vm ssh "$POD" "${where[@]}" --worker=0 --command "tail -n 100 -F tokjax-source/run.log"
}

delete() {
  run gcloud compute tpus queued-resources delete "$POD" "${where[@]}" --force --quiet
}

# The exit code of the run on host 0; empty while it runs.
finished() {
  gcloud compute tpus tpu-vm ssh "$POD" "${where[@]}" --worker=0 \
    --command "cat tokjax-source/run.code 2>/dev/null || true" 2>/dev/null || true
}

watch() {
  [ $# -gt 0 ] || die "give the arguments of python -m tokjax.train"
  if [ "$DRY_RUN" = 1 ]; then
    create
    setup
    start "$@"
    echo "# every $poll s, where the pod is gone: delete, create, setup and run again"
    delete
    return
  fi
  local now code
  while true; do
    now=$(state)
    case $now in
    ACTIVE)
      code=$(finished)
      case $code in
      0)
        echo "finished"
        return
        ;;
      # Running (then this does nothing), stopped after saving, or another host was lost.
      '' | 75 | 8 | 134) start "$@" ;;
      *) die "the run ended with exit code $code: see launch/tpu_pod.sh logs" ;;
      esac
      ;;
    ABSENT)
      create
      setup
      start "$@"
      ;;
    SUSPENDED | SUSPENDING | FAILED)
      echo "$(date +%T) $POD is $now: it is made anew" >&2
      delete
      create
      setup
      start "$@"
      ;;
    *) echo "$(date +%T) $POD is $now" >&2 ;;
    esac
    sleep "$poll"
  done
}

case $action in
create) create ;;
setup) setup ;;
run) start "$@" ;;
logs) logs ;;
watch) watch "$@" ;;
delete) delete ;;
*) die "unknown action '$action': create, setup, run, logs, watch or delete" ;;
esac
