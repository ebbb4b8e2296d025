# shellcheck shell=bash
# What the launchers share: their options, checks, and running or printing a command. Sourced, not run.

# shellcheck disable=SC2034 # used where this file is sourced
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

say() {
  echo "${0##*/}: $1" >&2
}

refuse() {
  say "$1"
  exit 2
}

# The comment at the top of the launcher.
usage() {
  sed -n '2,/^[^#]*$/s/^# \{0,1\}//p' "$0"
}

# parse "$@": words before the stage go to `own`, the stage and all after it to `stage`; --dry-run may stand anywhere.
parse() {
  local word
  own=() stage=() dry_run=''
  for word in "$@"; do
    [[ $word != *[[:cntrl:]]* ]] || refuse "got an argument with a line break or another control character"
    if [[ $word == --dry-run ]]; then
      dry_run=1
    elif ((${#stage[@]})) || [[ $word != -* ]]; then
      stage+=("$word")
    elif [[ $word == --help ]]; then
      usage
      exit 0
    elif [[ $word != -- ]]; then
      own+=("$word")
    fi
  done
  check_stage "${stage[@]:-}"
}

# check_stage <stage> <argument>...: what would otherwise be refused by every process of a machine already paid for.
check_stage() {
  local word config=''
  for word in "${@:2}"; do
    case $word in
      --coordinator* | --num_processes* | --process_id* | --distributed*) refuse "$word is given by the launcher" ;;
      --config=?*) config=1 ;;
      --*) ;;
      *) refuse "unexpected argument '$word'; arguments of a stage are --name=value" ;;
    esac
  done
  case $1 in
    pretrain | collect | distill) [[ $config ]] || refuse "$1 needs --config=<file>" ;;
    evaluate | generate) ;;
    *) refuse "got stage '$1', allowed: pretrain, collect, distill, evaluate, generate" ;;
  esac
}

# take name...: put each --some-name=value of `own` into the variable some_name, one of these.
take() {
  local _word _name # one of the options may be called `name`
  for _word in ${own[@]+"${own[@]}"}; do
    _name=${_word%%=*}
    _name=${_name#--}
    _name=${_name//-/_}
    if [[ $_word != --*=* || " $* " != *" $_name "* ]]; then
      refuse "got $_word, allowed: $(printf -- '--%s=..., ' "${@//_/-}")--dry-run, --help"
    fi
    printf -v "$_name" %s "${_word#*=}"
  done
}

# expect name pattern what: the option's value matches the regular expression.
expect() {
  [[ ${!1} =~ ^($2)$ ]] || refuse "got --${1//_/-}=${!1}, expected $3"
}

# show command...: one line that a shell reads back as the same words.
show() {
  local line
  printf -v line '%q ' "$@"
  echo "${line% }"
}

run() {
  if [[ $dry_run ]]; then show "$@"; else "$@"; fi
}
