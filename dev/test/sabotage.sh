#!/bin/bash
# Shows that the layer tests can fail: breaks each gradient statement of attention.h and of gpt2/cpu/layers.h in turn, in a copy, and expects them red.
# What is broken and how: dev/test/sabotage.cpp. All mutants are compiled into one program and chosen by an environment variable: a minute of building
# instead of ten seconds each.
#
#     dev/test/sabotage.sh [--jobs N] [--list] [PATTERN...]      PATTERN: regular expressions, of which a mutant's line must contain one (a function's name)
#
# A mutant runs against the gradient cases of its layer; if these stay green, against all gradient cases, then against all others with a backward pass.
# Prints a line a mutant with the case that caught it (crash: a signal; hang: two minutes; invalid: minus a pointer, which would not compile), and at the
# end `N mutants: N caught, N did not compile, N survived`; exit 1 if any survived, or if the tests fail with no mutant.
set -euo pipefail

main() {  # read to its end before it runs: the file may change meanwhile
    here=$(cd "$(dirname "$0")/../.." && pwd)
    jobs=2 list=no patterns=()
    while [ $# -gt 0 ]; do
        case $1 in
            --jobs) jobs=${2:?--jobs needs a number}; shift ;;
            --list) list=yes ;;
            -*) echo "unknown option '$1': sabotage.sh [--jobs N] [--list] [PATTERN...]" >&2; exit 2 ;;
            *) patterns+=("$1") ;;
        esac
        shift
    done

    dir=$(mktemp -d)
    trap 'rm -rf "$dir"' EXIT
    mkdir -p "$dir/dev/test"
    cp -r "$here/gpt2" "$dir/"
    cp "$here/dev/test/layer_tests.cpp" "$dir/dev/test/"
    CXX=${CXX:-g++}
    $CXX -std=c++17 -O1 "$here/dev/test/sabotage.cpp" -o "$dir/sabotage"
    cd "$here"
    next=$("$dir/sabotage" attention.h 0 "$dir/attention.h" "$dir/list")
    "$dir/sabotage" gpt2/cpu/layers.h "$next" "$dir/gpt2/cpu/layers.h" "$dir/list" >/dev/null
    if [ ${#patterns[@]} -gt 0 ]; then
        printf '%s\n' "${patterns[@]}" >"$dir/patterns"
        grep -E -f "$dir/patterns" "$dir/list" >"$dir/chosen" || { echo "no mutant matches ${patterns[*]}" >&2; exit 2; }
    else
        cp "$dir/list" "$dir/chosen"
    fi
    if [ $list = yes ]; then cat "$dir/chosen"; exit; fi

    $CXX -std=c++17 -O2 -march=native -ffast-math -fno-finite-math-only -fopenmp -w -DREAL=double -DNO_CBLAS "$dir/dev/test/layer_tests.cpp" -o "$dir/tests"
    export dir OMP_WAIT_POLICY=passive
    backward_cases="gradient/ ragged/ poison/ same/"
    export backward_cases
    "$dir/tests" $backward_cases >"$dir/unbroken" || { echo "the tests fail with no mutant:" >&2; grep -v '^ok' "$dir/unbroken" >&2; exit 1; }

    one() {
        IFS=$'\t' read -r number where function what statement <<<"$1"
        local cases=gradient/causal rest status=0 by
        case $function in
            infini_* | add_outer) cases=gradient/infini ;;
            lightning_* | silu_*) cases=gradient/lightning ;;
            mla_*) cases=gradient/mla ;;
        esac
        for rest in "$cases" gradient/ "$backward_cases"; do
            { MUTANT=$number timeout 120 "$dir/tests" --first-failure $rest >"$dir/out.$number" 2>&1; } 2>/dev/null || status=$?
            [ $status = 0 ] || break
        done
        by=$(grep -m1 '^FAIL' "$dir/out.$number" | cut -c7-) || true
        case $status in
            0) verdict='SURVIVED' ;;
            77) verdict='invalid ' ;;
            1) verdict='caught  ' ;;
            124) verdict='caught  ' by='hang' ;;
            *) if [ $status -gt 128 ]; then verdict='caught  ' by='crash'; else echo "cannot run the tests: status $status" >&2; exit 255; fi ;;
        esac
        rm -f "$dir/out.$number"
        printf '%s  %-22s %-28s %-7s %.90s  [%s]\n' "$verdict" "$where" "$function" "$what" "$statement" "$by"
    }
    export -f one
    tr '\n' '\0' <"$dir/chosen" | xargs -0 -P "$jobs" -I{} bash -c 'one "$1"' _ {} | tee "$dir/results"

    count() { grep -c "^$1" "$dir/results" || true; }
    total=$(wc -l <"$dir/results")
    [ "$total" = "$(wc -l <"$dir/chosen")" ] || { echo "only $total mutants were run" >&2; exit 1; }
    survived=$(count SURVIVED)
    echo "$total mutants: $(count caught) caught, $(count invalid) did not compile, $survived survived"
    [ "$survived" = 0 ]
}
main "$@"; exit
