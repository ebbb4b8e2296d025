#!/usr/bin/env bash
# Run a stage on every worker of a Cloud TPU slice, through gcloud. The same command continues what was interrupted.
#
#   launch/tpu_vm.sh --tpu=<name> [options --] <stage> --config=<file> [--config.<key>=<value> ...]
#   launch/tpu_vm.sh --tpu=pod --zone=us-west4-a --install=HEAD -- distill --config=configs/dream_7b.py
#
# --tpu=<name>       the TPU VM, which exists (README.md says how to ask for one)
# --zone, --project  gcloud's own settings unless given: CLOUDSDK_COMPUTE_ZONE, CLOUDSDK_CORE_PROJECT
# --install=<rev>    first put this commit, such as HEAD, and all that it needs on every worker
# --folder=cdlm_jax  where it is, in the workers' home
# --restarts=0       how often to start again after an exit status of 75: preempted, but saved
# --dry-run          print the commands and run none
#
# Ctrl-C and SIGTERM are passed on to the workers, which save and end.
# Exit status: that of the first worker which ended with another than 0; 75 if it was preempted and saved.

set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

preempted=75
tpu='' zone='' project='' install='' folder=cdlm_jax restarts=0
parse "$@"
take tpu zone project install folder restarts
[[ $tpu ]] || refuse "needs --tpu=<name>"
for option in tpu zone project install; do expect "$option" '([A-Za-z0-9_][A-Za-z0-9._:/~^-]*)?' 'a name'; done
expect folder '[A-Za-z0-9_.][A-Za-z0-9_./-]*' 'a folder without spaces'
expect restarts '0|[1-9][0-9]{0,5}' 'a number from 0 to 999999'
where=(--worker=all ${zone:+"--zone=$zone"} ${project:+"--project=$project"})

workers() {
  run gcloud compute tpus tpu-vm ssh "$tpu" "${where[@]}" "--command=$1"
}

if [[ $install ]]; then
  archive=build/cdlm_jax-$tpu.tar.gz
  run mkdir -p "$root/build"
  run git -C "$root" archive --format=tar.gz "--output=$archive" "$install"
  run gcloud compute tpus tpu-vm scp "$root/$archive" "$tpu:cdlm_jax.tar.gz" "${where[@]}"
  # The images' own Python may be older than 3.11: uv brings one.
  fetch_uv='curl -LsSf https://astral.sh/uv/install.sh | sh'
  workers "mkdir -p $folder && tar -xzf cdlm_jax.tar.gz -C $folder && cd $folder && $fetch_uv &&\
 ~/.local/bin/uv venv --allow-existing --python=3.12 && ~/.local/bin/uv pip install '.[tpu]'"
fi
program=.venv/bin/cdlm
command="cd $folder && exec $(show "$program" "${stage[@]}" --distributed)"
if [[ $dry_run ]]; then
  workers "$command"
  exit 0
fi

stopped=''
trap 'stopped=1' TERM INT HUP
for ((attempt = 1; ; attempt++)); do
  workers "$command" & # in the background, where Ctrl-C does not cut the connection
  pid=$! told='' status=0
  while kill -0 "$pid" 2>/dev/null; do
    if [[ $stopped && ! $told ]]; then
      told=1
      workers "pkill -TERM -f '[.]venv/bin/cdlm'" || true # the brackets: not the shell that runs this line
    fi
    sleep 1 || true
  done
  wait "$pid" || status=$?
  if ((status != preempted || attempt > restarts)) || [[ $stopped ]]; then exit "$status"; fi
  say "preempted and saved: starting again, $attempt of $restarts"
done
