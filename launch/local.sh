#!/usr/bin/env bash
# Trains on the devices of this machine, and goes on after an interruption.
#
#   launch/local.sh [--dry-run] --config=configs/quickstart.py --workdir=runs/first [...]
#
# The arguments are those of python -m tokjax.train. A run that SIGTERM stopped (exit code 75) is
# started again up to RETRIES times (default 0).
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

left=${RETRIES:-0}
while true; do
  code=0
  run python -m tokjax.train "$@" || code=$?
  if [ "$code" != 75 ] || [ "$left" -le 0 ]; then exit "$code"; fi
  left=$((left - 1))
  echo "stopped after saving; starting again, $left more times allowed" >&2
done
