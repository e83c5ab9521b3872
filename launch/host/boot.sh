#!/bin/sh
# Startup script of every host of a slice; run as root at each boot, by any POSIX sh.
# launch/cloud/boot.py appends what it needs: nothing is fetched, so the guard runs even if the bucket is closed.
set -u
umask 077
HOME="${HOME:-/root}"
PATH="$PATH:/snap/bin"
export HOME PATH

# boot RUN URL NAME: unpacks the agent and the limits from standard input, and keeps a guard running.
boot() {
  folder="${TPU_STATE:-/var/lib/tpu}/$1"
  unit="tpu-guard-$1"
  mkdir -p "$folder"
  read -r request
  printf '%s\n' "$request" >"$folder/request.json.new"
  mv "$folder/request.json.new" "$folder/request.json"
  base64 -d | gunzip >"$folder/$3.new"
  mv "$folder/$3.new" "$folder/$3"
  if systemctl is-active --quiet "$unit" 2>/dev/null; then
    return 0
  fi
  # A trainer that takes all memory must not take the guard with it.
  if systemd-run --unit="$unit" --property=Restart=always --property=RestartSec=5 \
    --property=OOMScoreAdjust=-1000 --property=KillMode=process --setenv=HOME="$HOME" --setenv=PATH="$PATH" \
    python3 "$folder/$3" "$2" guard 2>>"$folder/guard.log"; then
    return 0
  fi
  # No systemd: a loop restarts the guard; its words are expanded by the inner shell.
  # shellcheck disable=SC2016
  setsid sh -c 'while :; do python3 "$0" "$1" guard; sleep 5; done' "$folder/$3" "$2" \
    >>"$folder/guard.log" 2>&1 </dev/null &
}
