#!/usr/bin/env bash
# Run a stage as several processes on this machine. The same command continues what was interrupted.
#
#   launch/local.sh [options --] <stage> --config=<file> [--config.<key>=<value> ...]
#   launch/local.sh --processes=2 --devices=2 -- distill --config=configs/tiny.py --config.distill.steps=20
#
# --processes=2    each gets --coordinator, --num_processes and --process_id
# --devices=0      run on the CPU with so many devices per process, for tests and trials; 0: what JAX finds
# --gpus=0         show each process so many GPUs of its own; 0: all of them
# --restarts=0     how often to start again after an exit status of 75: preempted, but saved
# --grace=120      seconds from SIGTERM to SIGKILL, for saving
# --port=<n>       of the coordinator; a random one unless given
# --program=cdlm   also as the environment variable PROGRAM
# --dry-run        print the commands and run none
#
# SIGTERM and Ctrl-C let the processes save and end. One that fails ends the others, for they only work together.
# Exit status: 0; 75 if preempted and saved; else that of the process which failed first. Needs bash 4.4.

set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

preempted=75
processes=2 devices=0 gpus=0 restarts=0 grace=120 port=$((20000 + RANDOM % 10000)) program=${PROGRAM:-cdlm}
parse "$@"
take processes devices gpus restarts grace port program
expect processes '[1-9][0-9]{0,3}' 'a number from 1 to 9999'
for option in devices gpus restarts grace; do expect "$option" '0|[1-9][0-9]{0,5}' 'a number from 0 to 999999'; done
expect port '[1-9][0-9]{3}|[1-5][0-9]{4}' 'a port from 1000 to 59999'
((devices == 0 || gpus == 0)) || refuse "got --devices=$devices and --gpus=$gpus, allowed: one of them"
[[ $dry_run ]] || command -v -- "$program" >/dev/null || refuse "no program '$program': install it or set --program"

start() {
  local id command
  pids=()
  for ((id = 0; id < processes; id++)); do
    command=()
    if ((devices)); then
      local flag=--xla_force_host_platform_device_count=$devices
      command=(env JAX_PLATFORMS=cpu "XLA_FLAGS=${XLA_FLAGS:+$XLA_FLAGS }$flag")
    elif ((gpus)); then
      command=(env "CUDA_VISIBLE_DEVICES=$(seq -s, $((id * gpus)) $((id * gpus + gpus - 1)))")
    fi
    command+=("$program" "${stage[@]}")
    command+=("--coordinator=localhost:$port" "--num_processes=$processes" "--process_id=$id")
    if [[ $dry_run ]]; then
      show "${command[@]}"
    else
      "${command[@]}" &
      pids[id]=$!
    fi
  done
}

# Wait for all, ending them when one has failed or a signal came. `status`: the first failure, else 75 if any, else 0.
finish() {
  local id code end_at='' told=''
  status=0
  while ((${#pids[@]})); do
    for id in "${!pids[@]}"; do
      ! kill -0 "${pids[id]}" 2>/dev/null || continue
      code=0
      wait "${pids[id]}" || code=$?
      unset "pids[id]"
      ((code)) || continue
      say "process $id ended with status $code"
      ((code == preempted)) && end_at=$((SECONDS + 5)) || end_at=$SECONDS # after 75 the others are about to end too
      if ((status == 0 || (status == preempted && code != preempted))); then status=$code; fi
    done
    if [[ ! $told && ($stopped || ($end_at && $SECONDS -ge $end_at)) ]]; then
      told=$SECONDS
      kill -TERM "${pids[@]}" 2>/dev/null || true
    elif [[ $told && $((SECONDS - told)) -ge $grace ]]; then
      kill -KILL "${pids[@]}" 2>/dev/null || true
    fi
    sleep 0.2 || true # Ctrl-C ends the sleep too
  done
}

stopped=''
trap 'stopped=1' TERM INT HUP
for ((attempt = 1; ; attempt++)); do
  start
  [[ ! $dry_run ]] || exit 0
  finish
  if ((status != preempted || attempt > restarts)) || [[ $stopped ]]; then exit "$status"; fi
  say "preempted and saved: starting again, $attempt of $restarts"
done
