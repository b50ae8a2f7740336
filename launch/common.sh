#!/usr/bin/env bash
# What the launch scripts share. Sourced, not run.
#
# DRY_RUN=1, or --dry-run as a script's first argument, prints every command instead of running it.

DRY_RUN=${DRY_RUN:-0}

# Ends the script with a message and the exit code of a wrong command line.
die() {
  printf '%s: %s\n' "$(basename "$0")" "$*" >&2
  exit 2
}

# Prints a command as a shell would take it.
show() {
  printf '%q ' "$@" | sed 's/ $//'
  printf '\n'
}

# Runs a command, or prints it.
run() {
  if [ "$DRY_RUN" = 1 ]; then show "$@"; else "$@"; fi
}

# Prints the comment at the head of the script as its help.
usage() {
  awk 'NR > 1 && /^#/ {sub(/^# ?/, ""); print; next} NR > 1 {exit}' "$0"
}

# A variable that must be set, with what it is for.
need() {
  [ -n "${!1:-}" ] || die "set $1: $2"
}
