# What tests of programs share, to be sourced: a directory of their own, gone at the end with all that is in it, and the count of what passed.
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work" || exit 1
passed=0 failed=0 skipped=0
under_test=()  # what good and error run, if it is always the same program

ok() { passed=$((passed + 1)); }
bad() { failed=$((failed + 1)); echo "FAIL $1"; shift; for line in "$@"; do echo "     $line"; done; }
# expect NAME COMMAND...: the command succeeds
expect() {
    local name=$1; shift
    if "$@"; then ok; else bad "$name" "$*"; fi
}
# good NAME COMMAND...: the program succeeds; what it says stands in out.txt and err.txt
good() {
    local name=$1; shift
    set -- ${under_test[@]+"${under_test[@]}"} "$@"
    if "$@" >out.txt 2>err.txt </dev/null; then ok; else bad "$name" "status $?: $(tail -n 3 err.txt)" "$*"; fi
}
# error NAME STATUS PATTERN COMMAND...: the program ends with that status and one line on standard error which matches the pattern, but for that which says
# what model was read
error() {
    local name=$1 status=$2 pattern=$3 got; shift 3
    set -- ${under_test[@]+"${under_test[@]}"} "$@"
    "$@" >out.txt 2>err.txt </dev/null; got=$?
    if [ $got -eq "$status" ] && [ "$(grep -vc '^[^ ]*: step [0-9]*, [0-9]* parameters$' err.txt)" -eq 1 ] && grep -Eq -- "^error: .*$pattern" err.txt; then ok
    else bad "$name" "status $got, expected $status; pattern '$pattern'; standard error: $(cat err.txt)" "$*"; fi
}
# said NAME PATTERN FILE: what the last program wrote there matches
said() { if grep -aEq -- "$2" "$3"; then ok; else bad "$1" "'$2' is not in: $(head -c 300 "$3")"; fi; }
skip() { skipped=$((skipped + 1)); echo "skipped: $1"; }
finish() { echo "$passed passed, $failed failed, $skipped skipped"; [ $failed -eq 0 ]; exit; }

# documents COUNT WORDS: as many short documents, each of so many words
documents() {
    awk -v n="$1" -v m="$2" 'BEGIN { srand(7); split("the a red key box cat dog is in on under has lost found", w, " ");
        for (d = 0; d < n; d++) { if (d) printf "<|endoftext|>\n"; for (i = 0; i < m; i++) printf "%s%s", w[1 + int(rand() * 13)], (i % 8 == 7) ? ".\n" : " " } }'
}
# Logs of runs without the times.
losses() { sed -E 's/, "ms".*//' "$1"; }
same_losses() { [ -s "$1/log.jsonl" ] && [ "$(losses "$1/log.jsonl")" = "$(losses "$2/log.jsonl")" ]; }
