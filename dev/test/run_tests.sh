#!/usr/bin/env bash
# Runs test programs one after the other and adds up their counts: run_tests.sh PROGRAM...
# Each ends with a line `N passed, N failed`, or doctest's summary of test cases. A program that fails without counting a failure counts as one.
# What passes is shown by its counts only; the whole output of each is in build/test-NAME.log.
set -u
mkdir -p build
passed=0 failed=0
for program in "$@"; do
    name=$(basename "$program")
    log=build/test-$name.log
    case $program in */*) run=$program ;; *) run=./$program ;; esac
    start=$(date +%s)
    "$run" </dev/null >"$log" 2>&1
    status=$?
    counts=$(sed 's/\x1b\[[0-9;]*m//g' "$log" | awk '
        /^[0-9]+ passed, [0-9]+ failed/ { p = $1; f = $3; found = 1 }
        /^\[doctest\] test cases:/ { n = split($0, a, "|"); split(a[2], x, " "); split(a[3], y, " "); p = x[1]; f = y[1]; found = 1 }
        END { if (found) print p, f }')
    read -r p f <<<"${counts:-0 0}"
    if [ $status -ne 0 ] && [ "$f" -eq 0 ] || [ -z "$counts" ]; then f=$((f + 1)); fi
    printf '%-20s %5d passed %3d failed  %4d s\n' "$name" "$p" "$f" $(($(date +%s) - start))
    if [ "$f" -ne 0 ]; then
        echo "---- $log (exit status $status), failures and its end:"
        grep -aE 'FAIL|ERROR|runtime error|Sanitizer' "$log" | head -n 40
        tail -n 15 "$log"
        echo "----"
    fi
    grep -aiE '^skipped|, [1-9][0-9]* skipped' "$log" | sed 's/^/    /'
    passed=$((passed + p)) failed=$((failed + f))
done
echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ]
