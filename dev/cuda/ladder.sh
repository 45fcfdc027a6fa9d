#!/usr/bin/env bash
# Runs the ladders and writes their tables into dev/cuda/README.md: ladder.sh PROGRAM...   Exit status 1 if a check failed.
set -u
readme=dev/cuda/README.md new=build/cuda/ladder.md failed=0
{
    echo "<!-- ladder: written by make ladder -->"
    echo
    nvidia-smi --query-gpu=name,driver_version --format=csv,noheader | head -1 | sed 's/^\(.*\)$/Measured '"$(date +%F)"' on \1. Medians with the 10th and 90th percentile, cold L2 cache; the limits are measured in the same run./'
} >"$new"
for program in "$@"; do
    log=build/cuda/$(basename "$program").log
    "$program" >"$log" 2>&1 || failed=1
    grep -aE 'FAIL|error|passed,' "$log"
    grep -avE '^check |passed,' "$log" | sed '/^$/N;/^\n$/D' | sed '1i\\' >>"$new"
done
sed '/<!-- ladder: written/,$d' "$readme" >build/cuda/readme.head
cat build/cuda/readme.head "$new" >"$readme"
[ $failed -eq 0 ]
