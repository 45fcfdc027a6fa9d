#!/bin/bash
# The program from outside: every error with its exit status and its one line, runs resumed bit for bit, nothing lost or overwritten, help that tells
# the truth, text that is text. Usage: dev/test/program_tests.sh [PROGRAM]   (default $TRAIN_GPT2, or ./train_gpt2)
set -u
program=$(realpath "${1:-${TRAIN_GPT2:-./train_gpt2}}")
root=$(cd "$(dirname "$0")/../.." && pwd)
. "$(dirname "$0")/testing.sh"
under_test=("$program")
mounted=
trap '[ -n "$mounted" ] && umount "$mounted"; rm -rf "$work"' EXIT
listing() { find "$1" -type f -exec cksum {} + | sort; }

# A text of about 40 KB in short documents, and shards.
documents 120 80 >text.txt
head -c 9000 text.txt >val.txt
int32() { local v; for v in "$@"; do printf '%b' "$(printf '\\x%02x' $((v & 255)) $((v >> 8 & 255)) $((v >> 16 & 255)) $((v >> 24 & 255)))"; done; }
shard() { # FILE TOKENS CLAIMED LARGEST
    { int32 20240520 1 "$3"; head -c 1012 /dev/zero
      printf '%b' "$(awk -v n="$2" -v m="$4" 'BEGIN { for (i = 0; i < n; i++) { v = i == n - 1 ? m : (i * 7919) % m; printf "\\x%02x\\x%02x", v % 256, int(v / 256) } }')"; } >"$1"
}
shard tokens.bin 600 600 50256
shard large.bin 600 600 60000
shard short.bin 600 700 50256
shard empty.bin 0 0 1

small=(--layers 2 --heads 2 --channels 16 --max-seq 32 --batch 4 --val-batches 2 --sample-every 0 --threads 1)
run=(train --data text.txt "${small[@]}")

# --- what is typed wrong: 2 -----------------------------------------------------------------------------------------------------------------------------
error "no command" 2 "train, eval, generate, info or convert"
error "unknown command" 2 "unknown command 'fly': choose train, eval, generate, info or convert" fly
error "option of no command" 2 "unknown option '--fly': [^ ]* --help" --fly
error "unknown option" 2 "unknown option '--fly': [^ ]* train --help" train --fly
error "unknown option with a value" 2 "unknown option '--fly'" train --fly 3
error "stray argument" 2 "unknown argument 'text.txt': [^ ]* train --help" train text.txt
error "option of another command" 2 "unknown option '--top-k'" train --top-k 3
error "missing value" 2 "--steps needs a value; train_gpt2 train --help" train --steps
error "no data" 2 "--data" train
error "unknown attention" 2 "'magic'.*causal" "${run[@]}" --attention magic
error "unknown option of an attention" 2 "'wings'.*kv-heads" "${run[@]}" --attention causal:wings=3
error "repeats beyond the depth" 2 "'causal\*9'" "${run[@]}" --attention "causal*9"
error "list longer than the depth" 2 "3 layers" "${run[@]}" --attention causal,causal,causal
error "kv-heads that do not divide the heads" 2 "kv-heads" "${run[@]}" --kv-heads 3
error "heads that do not divide the channels" 2 "3 heads.*16 channels" "${run[@]}" --heads 3
error "seq beyond the positions" 2 "--seq 33.*--max-seq" "${run[@]}" --seq 33
error "total-batch no multiple" 2 "--total-batch 100.*128 tokens: give 128$" "${run[@]}" --total-batch 100
error "min-lr above lr" 2 "--min-lr" "${run[@]}" --lr 0.1 --min-lr 0.2
error "carry-memory without a memory" 2 "--carry-memory.*'causal'" "${run[@]}" --carry-memory
error "resume and overwrite" 2 "exclude each other" "${run[@]}" --out r --resume --overwrite
error "resume without out" 2 "--out" "${run[@]}" --resume
error "overwrite without out" 2 "--out" "${run[@]}" --overwrite
error "eval without checkpoint" 2 "--checkpoint" eval --data text.txt
error "eval without data" 2 "--data" eval --checkpoint x
error "generate without checkpoint" 2 "--checkpoint" generate
for c in preset positions tokenizer schedule; do error "unknown $c" 2 "--$c is 'nonsense': choose one of" train --$c nonsense; done
for v in -1 0 x 1.5 "" " 3" 99999999999999999999 nan 0x 3x; do error "layers '$v'" 2 "--layers is '$v': give a whole number from 1 to 1000" train --layers "$v"; done
for v in -1 x nan inf "" 1e999 1,5; do error "lr '$v'" 2 "--lr is '$v': give a number from 0 to 1000" train --lr "$v"; done
error "dropout 1" 2 "--dropout is '1'" train --dropout 1
error "beta1 1" 2 "--beta1 is '1'" train --beta1 1
error "top-p 0" 2 "--top-p is '0'" generate --top-p 0
error "negative temperature" 2 "--temperature is '-1'" generate --temperature -1
error "window that is no number" 2 "window of causal is 'x'" "${run[@]}" --window x
error "window that is too large" 2 "window of causal is '2e9': give a whole number from 0 to 1073741824" "${run[@]}" --window 2e9
for option in out val-data init-from tokenizer; do error "empty --$option" 2 "--$option is '': give it a value, or leave it out" "${run[@]}" --$option ""; done
error "empty --prompts" 2 "--prompts is ''" generate --prompts ""

# --- what is wrong with files: 3 ------------------------------------------------------------------------------------------------------------------------
error "data that is not there" 3 "'gone.txt'" train --data gone.txt
error "a pattern of texts" 3 "no token shard.*by itself" train --data "[tv]*.txt"
error "data that is a directory" 3 "'/tmp'" train --data /tmp
: >nothing.txt
error "empty text" 3 "'nothing.txt' is empty" train --data nothing.txt
printf 'too short' >short.txt
error "corpus shorter than a batch" 3 "too few for one batch" train --data short.txt "${small[@]}"
error "empty shard" 3 "'empty.bin'.*empty" train --data empty.bin "${small[@]}"
error "truncated shard" 3 "'short.bin'.*cut short" train --data short.bin "${small[@]}"
error "token outside the vocabulary" 3 "token (5|60)[0-9]*.*outside the vocabulary" train --data large.bin --val-data large.bin "${small[@]}" --channels 2 --layers 1 --steps 9
error "ids for a text" 3 "tokenizer" "${run[@]}" --tokenizer ids
error "bytes for a shard" 3 "outside the vocabulary of 257" train --data tokens.bin "${small[@]}" --tokenizer bytes --steps 1
error "resume without a run" 3 "no run in 'r'.*--resume" "${run[@]}" --out r --resume
error "checkpoint that is not there" 3 "'gone': No such file" eval --checkpoint gone --data text.txt
expect "errors made no directory" [ ! -e r ]
error "out within a file" 3 "text.txt" "${run[@]}" --steps 1 --out text.txt/run
error "out that is a file" 3 "text.txt" "${run[@]}" --steps 1 --out text.txt
if [ -d /proc/self ]; then error "unwritable directory" 3 "'/proc/run'" "${run[@]}" --steps 1 --out /proc/run; fi

# --- runs -------------------------------------------------------------------------------------------------------------------------------------------------
steps=(--steps 8 --save-every 4 --val-every 3)
good "a run" "${run[@]}" "${steps[@]}" --out a
expect "its checkpoints" [ "$(ls a)" = "$(printf 'config.json\nlog.jsonl\nstep_00000004\nstep_00000008')" ]
expect "a log line a step" [ "$(wc -l <a/log.jsonl)" -eq 8 ]
expect "validation where it is due" [ "$(grep -c val_loss a/log.jsonl)" -eq 3 ]
expect "the bigram model" grep -q "bigram" out.txt
listing a >before.txt
error "a run is not overwritten" 2 "'a' holds a run.*--resume.*--overwrite" "${run[@]}" "${steps[@]}" --out a
expect "nothing changed" [ "$(listing a)" = "$(cat before.txt)" ]
good "the same command" "${run[@]}" "${steps[@]}" --out b
expect "gives the same losses" same_losses a b
expect "and the same model" cmp -s a/step_00000008/model.safetensors b/step_00000008/model.safetensors
good "another seed" "${run[@]}" "${steps[@]}" --out c --seed 2
expect "gives others" eval '! same_losses a c'

# The last value wins, and --steps 0 writes the initial checkpoint.
good "repeated options" "${run[@]}" --steps 5 --steps 0 --out zero --out zero2 --save-every 0 --save-every 1
expect "the last value wins" [ -e zero2/step_00000000/state.json -a ! -e zero ]
good "save-every 0" "${run[@]}" --steps 2 --save-every 0 --out unsaved
expect "saves nothing" [ "$(ls unsaved)" = "$(printf 'config.json\nlog.jsonl')" ]
error "resume without a checkpoint" 3 "no complete checkpoint" "${run[@]}" --out unsaved --resume

# Overwriting replaces the run and nothing else, and only when the new run is ready.
cp -r a o; echo precious >o/notes.txt; echo precious >o/step_00000004/notes.txt
listing o >before.txt
error "overwrite with a mistake" 3 "gone.txt" "${run[@]}" --data gone.txt --out o --overwrite
expect "keeps the run" [ "$(listing o)" = "$(cat before.txt)" ]
good "overwrite" "${run[@]}" --steps 1 --out o --overwrite
expect "keeps foreign files" [ "$(cat o/notes.txt o/step_00000004/notes.txt)" = "$(printf 'precious\nprecious')" ]
expect "replaces the run" [ "$(wc -l <o/log.jsonl)" -eq 1 -a ! -e o/step_00000008 -a -e o/step_00000001/state.json ]
mkdir foreign; echo '{}' >foreign/config.json
error "foreign config.json" 3 "another --out" "${run[@]}" --out foreign --overwrite
rm foreign/config.json; echo keep >foreign/log.jsonl
error "foreign log.jsonl" 3 "config.json" "${run[@]}" --out foreign --overwrite
expect "is kept" [ "$(cat foreign/log.jsonl)" = keep ]

# resumed NAME OPTIONS...: a run cut off behind step 4 goes on to the same losses. The log keeps lines of later steps, as when a run is killed.
resumed() {
    local name=$1; shift
    rm -rf whole cut
    good "$name: whole" "${run[@]}" "${steps[@]}" "$@" --out whole
    cp -r whole cut; rm -r cut/step_00000008; mkdir cut/step_00000008.tmp; echo half >cut/step_00000008.tmp/model.safetensors.tmp
    head -n 6 whole/log.jsonl >cut/log.jsonl; printf '{"step": 7, "lo' >>cut/log.jsonl
    good "$name: resume" train --out cut --resume
    expect "$name: the same losses" same_losses whole cut
    expect "$name: the same model" cmp -s whole/step_00000008/model.safetensors cut/step_00000008/model.safetensors
    expect "$name: the same optimizer" cmp -s whole/step_00000008/optimizer.safetensors cut/step_00000008/optimizer.safetensors
    expect "$name: the same state" cmp -s whole/step_00000008/state.json cut/step_00000008/state.json
    expect "$name: nothing half" [ ! -e cut/step_00000008.tmp ]
}
resumed "resume"
resumed "resume with accumulation and dropout" --total-batch 384 --dropout 0.2
resumed "resume with documents apart" --doc-mask --schedule wsd --grad-clip 0.1
resumed "resume with two threads" --threads 2
if "$program" train --help | grep -q "^ *--segment"; then
    resumed "resume with carried memory" --attention infini --segment 8 --carry-memory
    resumed "resume with carried memory, accumulation and dropout" --attention infini:segment=8,causal --carry-memory --total-batch 256 --dropout 0.1
    # 40 KB in 4 lanes of 32 tokens a step are 280 steps: with one lane's end inside, memories start again
    cp val.txt tiny_lanes.txt
    resumed "resume behind the end of the lanes" --data tiny_lanes.txt --val-data val.txt --attention infini --segment 8 --carry-memory --batch 64
else
    skip "carried memory: this program has no attention with a memory"
fi
# Validation and samples leave training alone: its memories, its dropout, its batches.
memory=(--dropout 0.1)
"$program" train --help | grep -q "^ *--segment" && memory+=(--attention infini,causal --segment 8 --carry-memory)
good "a run that looks" "${run[@]}" "${memory[@]}" --steps 6 --val-every 1 --sample-every 2 --save-every 2 --out looks
good "a run that does not" "${run[@]}" "${memory[@]}" --steps 6 --val-every 0 --sample-every 0 --save-every 0 --out blind
expect "the same training losses" [ "$(losses looks/log.jsonl | sed 's/"val_loss": [^,]*, //')" = "$(losses blind/log.jsonl)" ]
good "nothing left to do" train --out whole --resume
good "more steps" train --out whole --resume --steps 10 --schedule "$(sed -n 's/.*"schedule": "\(.*\)".*/\1/p' whole/config.json)"
expect "ten lines" [ "$(wc -l <whole/log.jsonl)" -eq 10 ]
good "the same options again" "${run[@]}" --out a --resume --attention causal --lr 4e-3
for contradiction in "--layers 3" "--lr 0.5" "--batch 8" "--seed 3" "--dropout 0.5" "--attention causal:window=4" "--window 4" "--preset gpt2-124M" "--positions rope" "--total-batch 256" "--doc-mask"; do
    # shellcheck disable=SC2086
    error "resume with $contradiction" 2 "${contradiction/:*/}.*'a'" train --out a --resume $contradiction
done
error "resume with other data" 3 "tokens" train --out a --resume --data val.txt --val-data val.txt
error "steps behind the checkpoint" 2 "--steps 3" train --out a --resume --steps 3

# Killed at any moment, there is always a whole checkpoint, and the run goes on.
"$program" "${run[@]}" --steps 100000 --save-every 1 --val-every 0 --out killed >/dev/null 2>&1 &
for i in $(seq 1200); do [ -e killed/step_00000003 ] && break; sleep 0.05; done
kill -9 $!; wait $! 2>/dev/null
good "resume behind a kill" train --out killed --resume --steps $(($(wc -l <killed/log.jsonl) + 5)) --save-every 2
good "the checkpoint is whole" eval --checkpoint killed --data val.txt
"$program" "${run[@]}" --steps 100000 --save-every 100000 --val-every 0 --out stopped >stopped.txt 2>&1 &
for i in $(seq 1200); do [ -s stopped/log.jsonl ] && break; sleep 0.05; done
error "two runs in one directory" 3 "another run" "${run[@]}" --out stopped --resume
kill -TERM $!; wait $!; status=$?
expect "SIGTERM ends the run with 0" [ $status -eq 0 ]
expect "a line how to go on" grep -q -- "--out stopped --resume" stopped.txt
last=$(wc -l <stopped/log.jsonl)
expect "a checkpoint of the last step" [ -e "stopped/step_$(printf %08d "$last")/state.json" ]

cp -r a diverge
error "a run that diverges" 1 "diverged at step" "${run[@]}" --steps 50 --lr 1000 --schedule constant --warmup 0 --grad-clip 0 --positions none --out diverging --save-every 1
expect "keeps its checkpoints" [ -n "$(ls -d diverging/step_* 2>/dev/null)" ]

# --- no space -----------------------------------------------------------------------------------------------------------------------------------------------
mkdir full
if mount -t tmpfs -o size=400k none full 2>/dev/null; then
    mounted=$work/full
    error "disk full" 3 "No space left.*make room" "${run[@]}" --steps 100 --save-every 1 --val-every 0 --out full/run
    expect "no half checkpoint" [ -z "$(find full/run -name '*.tmp')" ]
    newest=$(ls -d full/run/step_* | tail -n 1)
    good "the newest checkpoint is whole" eval --checkpoint "$newest" --data val.txt
    umount full; mounted=
else
    skip "disk full on a file system of its own: it cannot be mounted here"
fi
(ulimit -f 20; exec "$program" "${run[@]}" --steps 2 --out limited) >out.txt 2>err.txt
expect "file size limit: status 3" [ $? -eq 3 ]
expect "file size limit: one line" [ "$(wc -l <err.txt)" -eq 1 ]
expect "file size limit: no half checkpoint" [ -z "$(find limited -name 'step_*')" ]
"$program" info >/dev/full 2>err.txt
expect "full standard output" [ $? -eq 3 ]

# --- damaged checkpoints -------------------------------------------------------------------------------------------------------------------------------------
for file in model.safetensors optimizer.safetensors state.json; do
    size=$(stat -c %s a/step_00000008/$file)
    for bytes in 0 1 7 8 100 $((size / 2)) $((size - 3)); do
        rm -rf damaged; cp -r a damaged; truncate -s "$bytes" damaged/step_00000008/$file
        error "$file cut to $bytes bytes" 3 "$file'" train --out damaged --resume --steps 9
    done
done
rm -rf damaged; cp -r a damaged; good "another shape" "${run[@]}" --layers 1 --steps 1 --out one
cp one/step_00000001/model.safetensors damaged/step_00000008/
error "a checkpoint of another model" 3 "model.safetensors'.*of another model" eval --checkpoint damaged --data val.txt
rm -rf damaged; cp -r a damaged; rm damaged/step_00000008/state.json
good "an incomplete newest step" eval --checkpoint damaged --data val.txt
expect "the one before it is taken" grep -q "step_00000004" err.txt
rm -rf damaged; cp -r a damaged; sed -i 's/"layers": 2/"layers": 7/' damaged/step_00000008/state.json
error "state.json of another model" 3 "state.json|safetensors" eval --checkpoint damaged --data val.txt
rm -rf damaged; cp -r a damaged; echo '{"program": "attn.cpp", "options": {"layers": "many"}}' >damaged/config.json
error "damaged config.json" 3 "config.json" train --out damaged --resume
rm -rf damaged; cp -r a damaged; mv damaged/step_00000008 elsewhere
good "a step's directory alone" eval --checkpoint elsewhere --data val.txt

# --- evaluation, recall, generation ---------------------------------------------------------------------------------------------------------------------------
good "eval" eval --checkpoint a --data val.txt
expect "loss, perplexity, bits" grep -Eq "^loss [0-9.]+ \| perplexity [0-9.]+ \| bits per byte [0-9.]+" out.txt
error "recall without questions" 3 "val.questions.jsonl" eval --checkpoint a --data val.txt --recall
awk 'BEGIN { for (i = 0; i < 40; i++) printf "{\"prompt\": \"the key is in the\", \"answer\": \" box\", \"distance\": %d, \"guess\": 0.25}\n", 16 + i * 3;
    s = sprintf("%200s", ""); printf "{\"prompt\": \"%s\", \"answer\": \" box\", \"distance\": 200, \"guess\": 0.25}\n", s }' >val.questions.jsonl
good "recall" eval --checkpoint a --data val.txt --recall
expect "a table by distance" grep -Eq "^ +16-31 +6 +[0-9.]+% +25.0%" out.txt
expect "too long ones are named" grep -q "^1 questions are longer" out.txt
good "recall alone" eval --checkpoint a --data val.questions.jsonl --recall
expect "no loss then" eval '! grep -q "^loss" out.txt'
good "recall in training" "${run[@]}" --val-data val.txt "${steps[@]}" --out asked
expect "is in the log" [ "$(grep -c '"recall"' asked/log.jsonl)" -eq 3 ]
echo '{"prompt": "x"}' >bad.questions.jsonl
error "bad question" 3 "line 1 of 'bad.questions.jsonl'" eval --checkpoint a --data bad.questions.jsonl --recall

generate() { "$program" generate --checkpoint a --prompt "the key" --tokens 24 "$@" 2>err.txt; }
generate --seed 1 >g1.txt; generate --seed 1 >g2.txt; generate --seed 2 >g3.txt
expect "the same seed, the same text" cmp -s g1.txt g2.txt
expect "another seed, another text" eval '! cmp -s g1.txt g3.txt'
generate --temperature 0 --seed 1 >g4.txt; generate --temperature 0 --seed 2 >g5.txt; generate --top-k 1 >g6.txt; generate --top-p 0.0000001 >g7.txt
expect "greedy needs no seed" cmp -s g4.txt g5.txt
expect "top-k 1 is greedy" cmp -s g4.txt g6.txt
expect "a tiny top-p is greedy" cmp -s g4.txt g7.txt
generate --min-p 1 >g7.txt
expect "min-p 1 is greedy" cmp -s g4.txt g7.txt
generate --temperature 0 --repetition-penalty 100 >g7.txt
expect "a penalty changes the text" eval '! cmp -s g4.txt g7.txt'
expect "says how fast it was" grep -Eq "^prefill 8 tokens, [0-9]+ tokens/s \| decode [0-9]+ tokens, [0-9]+ tokens/s \| state [0-9.]+ [KM]B: .* a token, and .* a sequence$" err.txt
state=$(grep -o "[0-9.]* [a-zA-Z]* a token, and [0-9.]* [a-zA-Z]* a sequence" err.txt)
expect "state bytes are those of info" eval '"$program" info "${small[@]:0:8}" | grep -q "decode state  *$state"'
generate --temperature 0 --stop "$(cut -c 5-7 g4.txt | head -1)" >g7.txt
expect "it stops" [ "$(wc -c <g7.txt)" -lt "$(wc -c <g4.txt)" ]
printf 'the cat\nthe key\nthe' >prompts.txt
"$program" generate --checkpoint a --prompts prompts.txt --samples 2 --tokens 24 --seed 1 --parallel 3 >many.txt 2>err.txt
expect "six texts" [ "$(grep -c '^--- prompt [123], sample [12]$' many.txt)" -eq 6 ]
"$program" generate --checkpoint a --prompts - --samples 2 --tokens 24 --seed 1 --jsonl <prompts.txt >many.jsonl 2>err.txt
expect "six lines" [ "$(grep -Ec '^\{"prompt":[012],"sample":[01],"text":".*","ended":"(tokens|end of text|positions)"\}$' many.jsonl)" -eq 6 ]
error "no such prompts" 3 "cannot read 'nowhere.txt'.*check the path" generate --checkpoint a --prompts nowhere.txt
: >none.txt
error "no prompts" 3 "no prompt in 'none.txt'" generate --checkpoint a --prompts none.txt
error "two kinds of prompts" 2 "--prompt and --prompts" generate --checkpoint a --prompt x --prompts prompts.txt
error "no samples" 2 "--samples is '0'" generate --checkpoint a --samples 0

# Pages: the same texts however few there are; texts that fit into none end, and say so.
many() { "$program" generate --checkpoint a --prompts prompts.txt --samples 3 --tokens 20 --seed 1 --page-size 4 "$@" 2>err.txt; }
many >plenty.txt; many --pages 9 >few.txt
expect "texts that had to wait are the same" cmp -s plenty.txt few.txt
expect "and it says that they had to" grep -Eq "\| put back to wait [1-9][0-9]* times$" err.txt
many --pages 4 >few.txt; status=$?
expect "texts cut short: 0" [ $status -eq 0 ]
expect "texts cut short are named" grep -Eq "^stopped [1-9] of 9 texts: the state is full: 4 pages of 4 tokens; give more --pages$" err.txt
"$program" generate --checkpoint a --prompts prompts.txt --page-size 3 --pages 1 --jsonl --tokens 5 >few.jsonl 2>err.txt
expect "as JSON too" [ "$(grep -c '"text":"","ended":"memory"' few.jsonl)" -eq 3 ]
error "no text fits" 3 "no text could begin: the state is full: 1 page of 4 tokens; give more --pages" generate --checkpoint a --prompt "the key" --page-size 4 --pages 1
error "page size 0" 2 "--page-size is '0'" generate --checkpoint a --page-size 0

# Conversations.
printf 'the key\n, a\n\nbehind the end' | "$program" generate --checkpoint a --interactive --tokens 6 --temperature 0 >answers.txt 2>err.txt; status=$?
expect "nothing is read twice" grep -Eq "^prefill (12|13) tokens" err.txt  # the end of text, 7 bytes, the answer's last, a line feed unless it is one, 3 bytes
first=$(generate --tokens 6 --temperature 0; printf .); first=${first%.}
case $first in *$'\n') line=', a' ;; *) line=$'\n, a' ;; esac
second=$(generate --tokens 6 --temperature 0 --prompt "the key$first$line"; printf .); second=${second%.}
expect "a conversation ends with 0" [ $status -eq 0 ]
expect "its answers are those of one text" [ "$(cat answers.txt; printf .)" = "$first"$'\n'"$second"$'\n.' ]
printf 'the key is in the box\nand on\n' | "$program" generate --checkpoint a --interactive --tokens 6 >answers.txt 2>err.txt; status=$?
expect "the end of the positions ends it" [ $status -eq 0 -a "$(grep -c '32 positions are used up' err.txt)" -eq 1 ]
for other in "--prompt x" "--prompts prompts.txt" "--jsonl" "--samples 2"; do
    # shellcheck disable=SC2086
    error "interactive with $other" 2 "--interactive and ${other%% *} are both given" generate --checkpoint a --interactive $other
done
for seed in 1 2 3 4 5 6; do generate --temperature 50 --tokens 20 --seed $seed >g.txt; expect "valid UTF-8" iconv -f utf8 -t utf8 g.txt -o /dev/null; done
good "nothing to begin with, nothing to stop at" generate --checkpoint a --prompt "" --stop "" --tokens 2
good "tokens 0" generate --checkpoint a --tokens 0
expect "writes nothing" [ ! -s out.txt ]
good "all positions" generate --checkpoint a --tokens 500 --temperature 50 --prompt "the key is in" --seed 5
expect "says why it stopped" grep -Eq "32 positions are used up|ended its text" err.txt
error "a prompt beyond the positions" 2 "positions: shorten --prompt" generate --checkpoint a --prompt "the key is in the box and the cat is under the dog"
good "rotary positions go on" "${run[@]}" --positions rope --steps 1 --out rope
good "rotary positions go on" generate --checkpoint rope --tokens 100 --temperature 0
expect "for a hundred tokens" [ "$(wc -c <out.txt)" -ge 100 -o -n "$(grep ended err.txt)" ]
long=(--tokens 100 --temperature 0 --prompt "the key" --repetition-penalty 0.5)  # never an end of text
good "texts without end" generate --checkpoint rope --tokens 3000 --temperature 50 --endless --window 40
expect "go on behind an end" eval '[ "$(grep -aoF "<|endoftext|>" out.txt | wc -l)" -ge 2 ] && ! grep -q stopped err.txt'
good "to the end of the memory" generate --checkpoint rope "${long[@]}" --page-size 4 --pages 5
expect "which is named" grep -q "^stopped: the state is full: 5 pages of 4 tokens; give more --pages, or a --window that slides$" err.txt
good "with a window beyond it" generate --checkpoint rope "${long[@]}" --page-size 4 --pages 5 --window 13
expect "nothing stops it" eval '! grep -q "state is full" err.txt'
good "a window that is too large" generate --checkpoint rope "${long[@]}" --page-size 4 --pages 5 --window 33
expect "is named" grep -q "5 pages of 4 tokens; give more --pages, or a smaller --window$" err.txt
error "a window over learned positions" 2 "--window 8: the model's 32 positions are learned.*--positions rope" generate --checkpoint a --window 8
if "$program" train --help | grep -q "^ *--qk-rope-dim"; then
    good "mla" "${run[@]}" --attention mla --steps 1 --out mla
    good "mla" generate --checkpoint mla --tokens 3
    expect "says in which form it attends" grep -q "^mla: the beginning un-absorbed; .*absorbed" err.txt
    error "odd rotary part" 2 "qk-rope-dim.* 3" "${run[@]}" --attention mla --qk-rope-dim 3
fi

# ctrl-C ends an answer, and where none is being written the program. (A background job starts with it ignored.)
mkfifo lines
"$program" generate --checkpoint rope --interactive --temperature 0 --repetition-penalty 0.5 --tokens 2147483647 --page-size 16 --window 64 <lines >answers.txt 2>err.txt &
talk=$!
exec 3>lines
grown() { local i; for i in $(seq 400); do [ "$(wc -c <answers.txt)" -gt "$1" ] && return; sleep 0.05; done; false; }
echo the >&3
expect "an answer begins" grown 20
kill -INT $talk; sleep 0.3; size=$(wc -c <answers.txt); sleep 0.2
expect "ctrl-C ends it" [ "$(wc -c <answers.txt)" -eq "$size" ]
echo key >&3
expect "the next line is answered" grown $((size + 20))
kill -INT $talk; sleep 0.3; exec 3>&-; wait $talk; status=$?
expect "the end of input ends the conversation" [ $status -eq 0 ]
expect "nothing was read twice" grep -Eq "^prefill [89] tokens" err.txt
"$program" generate --checkpoint rope --interactive --tokens 3 <lines >answers.txt 2>err.txt &
talk=$!
exec 3>lines
echo the >&3
expect "a short answer" grown 3
sleep 0.3; kill -INT $talk; wait $talk; status=$?
expect "ctrl-C ends the program where there is no answer" [ $status -eq 130 ]
exec 3>&-
good "a shard" train --data tokens.bin "${small[@]}" --channels 4 --layers 1 --steps 1 --batch 2 --out ids
good "ids are written as numbers" generate --checkpoint ids --prompt "5 6 7" --tokens 4
expect "ids" grep -Eq "^([0-9]+ )+$" out.txt
error "ids are read as numbers" 2 "'hello'" generate --checkpoint ids --prompt hello
error "eval with the other tokenizer" 3 "tokenizer" eval --checkpoint ids --data val.txt

# shellcheck disable=SC2046
{ int32 20240801 7 300; head -c 1012 /dev/zero; int32 $(seq 100000 90 126910); } >wide.bin
wide=("${small[@]}" --channels 4 --layers 1 --batch 2)
error "a vocabulary that is too small" 3 "token 1[0-9]{5} at position [0-9]+ of 'wide.bin' is outside the vocabulary of 50257" train --data wide.bin "${wide[@]}" --steps 9
good "tokens of 32 bits" train --data wide.bin --tokenizer ids:131072 "${wide[@]}" --steps 1 --out wide
good "evaluated" eval --checkpoint wide --data wide.bin
expect "all of them" grep -q "| 299 tokens$" out.txt

# --- evaluation -----------------------------------------------------------------------------------------------------------------------------------------------
evaluated() { "$program" eval --checkpoint "$@" 2>/dev/null; }
close() { awk -v a="$1" -v b="$2" 'BEGIN { d = (a - b) / b; exit !(a > 0 && b > 0 && d <= 2e-6 && d >= -2e-6) }'; }
loss() { sed -n 's/^loss \([0-9.]*\) .*/\1/p'; }
head -c 700 text.txt | tr -d '<|>' >plain.txt
expect "windows side by side" [ -n "$(evaluated a --data plain.txt)" -a "$(evaluated a --data plain.txt)" = "$(evaluated a --data plain.txt --stride 32)" ]
expect "windows that overlap score as many tokens" eval 'evaluated a --data plain.txt --stride 5 | grep -Eq "bits per byte [0-9.]+ \| $(wc -c <plain.txt) tokens$"'
expect "otherwise" [ "$(evaluated a --data plain.txt --stride 5 | loss)" != "$(evaluated a --data plain.txt | loss)" ]
error "a stride beyond the window" 2 "--stride 33 is more than the 32 tokens" eval --checkpoint a --data plain.txt --stride 33
error "a stride and a memory" 2 "--stride and --carry-memory are both given" eval --checkpoint a --data plain.txt --stride 3 --carry-memory
error "no memory to carry" 2 "--carry-memory.*'causal' has none" eval --checkpoint a --data plain.txt --carry-memory
# Memory carried from window to window is one long window.
for attention in infini:segment=16 lightning; do
    good "$attention" "${run[@]}" --attention $attention --max-seq 1024 --seq 32 --lr 1e-2 --steps 8 --val-every 0 --out carried --overwrite
    rm -rf long; cp -r carried long
    sed -i 's/"seq": 32/"seq": 1024/' long/step_00000008/state.json
    whole=$(evaluated long --data plain.txt | loss)
    expect "$attention: --carry-memory is one long window" close "$(evaluated carried --data plain.txt --carry-memory | loss)" "$whole"
    expect "$attention: windows without it are not" [ "$(evaluated carried --data plain.txt | loss)" != "$whole" ]
done
cat >choices.jsonl <<'END'
{"context": "the red", "choices": [" key", "zq"], "label": 0}
{"context": "", "choices": ["~", "the", "\u0001\u0002"], "label": 1}
{"context": "the red key is in the box and the cat is under the dog", "choices": [" on", "XYZ"], "label": 1}
END
ids() { local c; for c in "$@"; do printf '%b' "$(printf '\\x%02x\\x%02x' $((c & 255)) $((c >> 8)))"; done; }
text_ids() { printf '%s' "$1" | od -An -v -tu1; }
example() { # NUMBER LABEL CHOICES, CONTEXT, CHOICE...
    local words="$1 $2 $3 ${#4} $(text_ids "$4")" c
    for c in "${@:5}"; do words="$words ${#c} $(text_ids "$c")"; done
    # shellcheck disable=SC2086
    set -- $words
    ids 65535 $((2 * $# + 4)) "$@"
}
{ int32 20240522 1 3 1000; head -c 1008 /dev/zero
  example 0 0 2 "the red" " key" "zq"; example 1 1 3 "" "~" "the" $'\1\2'
  example 2 1 2 "the red key is in the box and the cat is under the dog" " on" "XYZ"; } >choices.bin
expect "multiple choice" eval 'evaluated a --choices choices.jsonl | grep -Eq "^multiple choice [0-9.]+% \| [0-3] right of 3 \| guessing 44.44% \| 1 contexts shortened"'
expect "in llm.c's format" [ -n "$(evaluated a --choices choices.bin)" -a "$(evaluated a --choices choices.bin)" = "$(evaluated a --choices choices.jsonl)" ]
expect "beside a text" [ "$(evaluated a --data plain.txt --choices choices.bin | wc -l)" -eq 2 ]
error "choices that are not there" 3 "'gone'" eval --checkpoint a --choices gone
error "choices that are none" 3 "line 1 of 'plain.txt' is no multiple choice" eval --checkpoint a --choices plain.txt
head -c 1150 choices.bin >cut.bin
error "choices cut short" 3 "'cut.bin' cannot be used.*example 2" eval --checkpoint a --choices cut.bin
error "no data and no choices" 2 "--choices" eval --checkpoint a
error "words for a model of ids" 3 "reads token ids" eval --checkpoint ids --choices choices.jsonl

# --- help and info --------------------------------------------------------------------------------------------------------------------------------------------
options() { "$program" "$1" --help | grep -oE "^ +(-h,)?--[a-z0-9-]+" | grep -oE -- "--[a-z0-9-]+" | sort; }
train_options="preset attention layers heads channels kv-heads window positions dropout data val-data steps batch seq total-batch lr min-lr warmup schedule weight-decay grad-clip
    val-every val-batches sample-every save-every out resume overwrite seed threads max-seq tokenizer carry-memory doc-mask beta1 beta2 eps init-from"
for option in $train_options; do expect "train --help names --$option" eval "options train | grep -qx -- --$option"; done
for command in train eval generate info convert; do
    good "$command --help" $command --help
    for option in $(options $command); do
        "$program" $command $option --zzz >/dev/null 2>err.txt   # a flag makes --zzz the culprit, an option swallows it; neither is unknown itself
        expect "$command knows $option of its help" eval "! grep -q \"unknown option '$option'\" err.txt"
    done
done
expect "make CBLAS=none" eval 'env -u MAKEFLAGS -u CBLAS make -C "$root" -nB CBLAS=none train_gpt2 | grep -q -- -DNO_CBLAS'
expect "eval --help" [ "$(options eval | tr -d '\n')" = "--carry-memory--checkpoint--choices--data--help--recall--stride--threads--tokenizer" ]
expect "generate --help" [ "$(options generate | tr -d '\n')" = "--checkpoint--endless--help--interactive--jsonl--min-p--page-size--pages--parallel--prompt--prompts--repetition-penalty--samples--seed--stop--temperature--threads--tokenizer--tokens--top-k--top-p--window" ]
good "info" info
expect "the published size" eval '"$program" info --preset gpt2-124M | grep -q "124,475,904"'  # 124,439,808 and 47 rows of padding
good "info of the largest" info --preset gpt2-1558M
for option in layers heads channels max-seq kv-heads window positions attention; do expect "info --help names --$option" eval "options info | grep -qx -- --$option"; done

finish
