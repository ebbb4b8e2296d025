#!/usr/bin/env bash
# Run a stage on a TPU slice of a GKE cluster, through JobSet. The same command continues what was interrupted.
#
#   launch/gke.sh --image=<image> --claim=<claim> [options --] <stage> --config=<file> [--config.<key>=<value> ...]
#   launch/gke.sh --image=gcr.io/me/cdlm --claim=disk --topology=4x4 -- distill --config=configs/dream_7b.py
#
# --image=<image>     a container with cdlm and jax[tpu], whose working folder holds the config files
# --claim=<claim>     a PersistentVolumeClaim that all pods can write; mounted at /shared
# --accelerator=tpu-v5-lite-podslice    or tpu-v5p-slice, tpu-v6e-slice, tpu7x
# --topology=4x4      of the slice
# --chips-per-host=4  so that topology / chips is the number of pods
# --name=cdlm         of the JobSet; an earlier one of this name is ended first
# --restarts=20       how often all pods may start again after a preemption
# --grace=120         seconds from SIGTERM to SIGKILL, for saving
# --namespace         of Kubernetes; the current one unless given
# --cluster, --location, --project      fetch credentials for this cluster first; kubectl's current one unless given
# --dry-run           print the commands and run none

set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

image='' claim='' accelerator=tpu-v5-lite-podslice topology=4x4 chips_per_host=4 name=cdlm restarts=20 grace=120
namespace='' cluster='' location='' project=''
parse "$@"
take image claim accelerator topology chips_per_host name restarts grace namespace cluster location project
label='[a-z0-9]([-a-z0-9]{0,38}[a-z0-9])?'
expect image '[A-Za-z0-9][A-Za-z0-9._/:@-]*' 'the name of a container image'
expect claim '[a-z0-9][a-z0-9.-]*' 'the name of a PersistentVolumeClaim'
expect accelerator 'tpu-v5-lite-podslice|tpu-v5p-slice|tpu-v6e-slice|tpu7x' \
  'tpu-v5-lite-podslice, tpu-v5p-slice, tpu-v6e-slice or tpu7x'
expect topology '[1-9][0-9]?x[1-9][0-9]?(x[1-9][0-9]?)?' 'two or three numbers such as 4x4 or 2x2x4'
expect chips_per_host '1|4|8' '1, 4 or 8'
expect name "$label" 'up to 40 of a-z, 0-9 and -'
expect namespace "($label)?" 'up to 40 of a-z, 0-9 and -'
for option in restarts grace; do expect "$option" '0|[1-9][0-9]{0,5}' 'a number from 0 to 999999'; done
[[ -z $cluster || $location ]] || refuse "got --cluster=$cluster without --location"
chips=$((${topology//x/*}))
((chips % chips_per_host == 0)) ||
  refuse "got --topology=$topology, $chips chips, expected a multiple of --chips-per-host=$chips_per_host"

# A JSON string, which YAML reads too. Kubernetes fills in $(NAME) in arguments, and reads $$ as $.
quoted() {
  local text=$1 backslash=\\ quote=\" dollar=\$
  text=${text//"$backslash"/"$backslash$backslash"}
  text=${text//"$quote"/"$backslash$quote"}
  echo "\"${text//"$dollar"/"$dollar$dollar"}\""
}

fill() {
  manifest=${manifest//"\${$1}"/"$2"}
}

arguments=''
for word in "${stage[@]}" --distributed; do arguments+="${arguments:+, }$(quoted "$word")"; done
manifest=$(<"$root/launch/jobset.yaml")
fill NAME "$name"
fill IMAGE "$image"
fill CLAIM "$claim"
fill ACCELERATOR "$accelerator"
fill TOPOLOGY "$topology"
fill HOSTS $((chips / chips_per_host))
fill CHIPS "$chips_per_host"
fill RESTARTS "$restarts"
fill GRACE "$grace"
fill ARGS "[$arguments]"

kubectl=(kubectl ${namespace:+"--namespace=$namespace"})
if [[ $cluster ]]; then
  run gcloud container clusters get-credentials "$cluster" "--location=$location" ${project:+"--project=$project"}
fi
run "${kubectl[@]}" delete jobset "$name" --ignore-not-found --cascade=foreground
if [[ $dry_run ]]; then
  printf "%s <<'EOF'\n%s\nEOF\n" "$(show "${kubectl[@]}" apply --filename=-)" "$manifest"
else
  "${kubectl[@]}" apply --filename=- <<<"$manifest"
fi
first=jobset.sigs.k8s.io/jobset-name=$name,batch.kubernetes.io/job-completion-index=0
say "to follow it: $(show "${kubectl[@]}" logs --follow "--selector=$first")"
