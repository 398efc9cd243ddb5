#!/bin/sh
# Makes the work pool and its queues, or brings them up to date: safe to run again.
set -eu
template=$(mktemp)
sed "s|DIFFUSION_IMAGE|$DIFFUSION_IMAGE|" "$(dirname "$0")/base-job-template.json" > "$template"
prefect work-pool create kubernetes --type kubernetes --base-job-template "$template" --overwrite

# A queue exists already when this is run again; then only its limit is set.
queue() {
  prefect work-queue create "$1" --pool kubernetes --limit "$2" ||
    prefect work-queue set-concurrency-limit "$1" "$2" --pool kubernetes
}
queue training 2
queue generation 4
prefect work-queue set-concurrency-limit default 8 --pool kubernetes
