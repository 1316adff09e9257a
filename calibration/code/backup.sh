#!/usr/bin/env bash
# Incremental backups with hard links: unchanged files cost nothing, every day's folder is complete.
set -euo pipefail

usage() {
    cat <<TEXT
usage: ${0##*/} [-k DAYS] [-n] SOURCE TARGET
  -k DAYS  keep this many days (default 30)
  -n       dry run: print what would be done
TEXT
}

keep=30
dry_run=
while getopts 'k:nh' option; do
    case $option in
        k) keep=$OPTARG ;;
        n) dry_run=1 ;;
        h) usage; exit 0 ;;
        *) usage >&2; exit 2 ;;
    esac
done
shift $((OPTIND - 1))
if (( $# != 2 )); then
    usage >&2
    exit 2
fi
source=${1%/}
target=${2%/}
today=$(date +%F)

log() { printf '%s %s\n' "$(date +%T)" "$*" >&2; }

run() {
    if [[ $dry_run ]]; then
        printf '%q ' "$@"
        printf '\n'
    else
        "$@"
    fi
}

[[ -d $source ]] || { log "no such folder: $source"; exit 1; }
run mkdir -p "$target"

exec 9>"$target/.lock"
if ! flock --nonblock 9; then
    log "another backup is running"
    exit 75
fi

previous=$(find "$target" -mindepth 1 -maxdepth 1 -type d -name '????-??-??' ! -name "$today" | sort | tail -n 1)
arguments=(--archive --delete --numeric-ids --info=stats1)
if [[ -n $previous ]]; then
    arguments+=(--link-dest="$previous")
    log "linking unchanged files to ${previous##*/}"
fi

partial="$target/.partial-$today"
run rsync "${arguments[@]}" --exclude='.cache/' --exclude='node_modules/' "$source/" "$partial/"
if [[ -d $target/$today ]]; then
    run rm -rf "${target:?}/$today"
fi
run mv "$partial" "$target/$today"
run ln -sfn "$today" "$target/latest"

find "$target" -mindepth 1 -maxdepth 1 -type d -name '????-??-??' -printf '%f\n' | sort | head -n "-$keep" |
while IFS= read -r old; do
    log "removing $old"
    run rm -rf "${target:?}/$old"
done

used=$(df --output=pcent "$target" | tail -n 1 | tr -dc '0-9')
if (( used > 90 )); then
    log "warning: the disk is ${used} % full"
fi
log "done"
