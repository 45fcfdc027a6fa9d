#!/bin/bash
# tokenize from outside: errors with their exit status and their one line, no half files, the same shards whatever reads them and with however many threads;
# and models that take a vocabulary along.   dev/test/tokenize_tests.sh   (programs: $TOKENIZE, or ./tokenize; $TRAIN_GPT2, or ./train_gpt2)
set -u
tokenize=$(realpath "${TOKENIZE:-./tokenize}") program=$(realpath "${TRAIN_GPT2:-./train_gpt2}")
. "$(dirname "$0")/testing.sh"
encode=("$tokenize" encode --tokenizer) decode=("$tokenize" decode --tokenizer)
number() { od -An -td4 -j"$2" -N4 "$1" | tr -d ' '; }

# A text of about 300 KB in documents, with some bytes that are no characters; and any bytes.
documents 300 200 >text.txt
printf 'caf\303\251 \344\270\255\346\226\207 \377\376 x\343\200' >>text.txt
LC_ALL=C awk 'BEGIN { srand(3); for (i = 0; i < 5000; i++) printf "%c", int(rand() * 256) }' >bytes.txt
printf '<|endoftext|>\n\n<|endoftext|><|endoftext|>' >>bytes.txt
grep -av endoftext text.txt >val.txt

# --- training a vocabulary ------------------------------------------------------------------------------------------------------------------------------
good "a vocabulary" "$tokenize" train --vocab 300 text.txt -o own
said "says what to type next" "^next: .*tokenize encode --tokenizer own" out.txt
good "the same by one thread" "$tokenize" train --threads 1 --vocab 300 text.txt -o again
expect "is the same" cmp own/vocab.bpe again/vocab.bpe
expect "two lines for two merges" [ "$("$tokenize" train --vocab 259 text.txt -o small >/dev/null && wc -l <small/vocab.bpe)" -eq 3 ]
error "a vocabulary is not overwritten" 2 "'own' holds a vocabulary" "$tokenize" train --vocab 300 text.txt -o own
error "vocabulary too small" 2 "--vocab" "$tokenize" train --vocab 256 text.txt -o x
error "vocabulary of words" 2 "--vocab" "$tokenize" train --vocab many text.txt -o x
error "a text that is not there" 3 "'gone.txt'" "$tokenize" train --vocab 300 gone.txt -o x
expect "no vocabulary was begun" [ ! -e x ]
printf 'abcabc' >short.txt
good "a text that is too short for the vocabulary" "$tokenize" train --vocab 300 short.txt -o short
said "is told" "a vocabulary of 259 rather than 300" out.txt

# --- encoding and decoding ------------------------------------------------------------------------------------------------------------------------------
for tokenizer in bytes own; do
    for text in text bytes val short; do
        good "$tokenizer: encode $text" "${encode[@]}" $tokenizer $text.txt -o $text.bin
        good "$tokenizer: decode $text" "${decode[@]}" $tokenizer $text.bin -o back.txt
        expect "$tokenizer: $text comes back" cmp $text.txt back.txt
        for threads in 1 3; do
            good "$tokenizer: $threads threads" "${encode[@]}" $tokenizer $text.txt -o other.bin --threads $threads
            expect "$tokenizer: give the same" cmp $text.bin other.bin
        done
    done
    good "$tokenizer: documents" "${encode[@]}" $tokenizer --documents text.txt -o documents.bin
    good "$tokenizer: decoded" "${decode[@]}" $tokenizer documents.bin -o back.txt
    expect "$tokenizer: come back" cmp text.txt back.txt
    good "$tokenizer: from a pipe" bash -c "cat text.txt | '$tokenize' encode --tokenizer $tokenizer --documents - -o other.bin"
    expect "$tokenizer: the same" cmp documents.bin other.bin
    good "$tokenizer: to a pipe" bash -c "'$tokenize' decode --tokenizer $tokenizer documents.bin -o - | cmp - text.txt"
done
"${encode[@]}" own text.txt -o text.bin 2>err.txt >out.txt
said "a separator that is taken for text is mentioned" "--documents" err.txt
expect "a shard of llm.c's" [ "$(number text.bin 0) $(number text.bin 4) $(number text.bin 12)" = "20240520 1 0" ]
expect "its size" [ "$(stat -c %s text.bin)" -eq $((1024 + 2 * $(number text.bin 8))) ]
good "two files" "${encode[@]}" bytes --documents short.txt short.txt -o two.bin
expect "are two documents" [ "$(number two.bin 8)" -eq 14 ]

# --- errors ---------------------------------------------------------------------------------------------------------------------------------------------
before=$(ls)
error "no command" 2 "no command: give encode, decode or train" "$tokenize"
error "unknown command" 2 "'fly': choose encode, decode or train" "$tokenize" fly
error "unknown option" 2 "unknown option '--fly': tokenize encode --help" "${encode[@]}" own text.txt -o x --fly
error "no tokenizer" 2 "--tokenizer" "$tokenize" encode text.txt -o x
error "no output" 2 "--out" "${encode[@]}" own text.txt
error "an empty name for it" 2 "--out is ''" "${encode[@]}" own text.txt -o ""
error "two shards" 2 "'val.bin' is one shard too many" "${decode[@]}" own text.bin val.bin -o x
error "unknown tokenizer" 2 "'magic'.*bytes.*vocab.bpe" "${encode[@]}" magic text.txt -o x
error "ids for a text" 2 "'ids'" "${encode[@]}" ids text.txt -o x
error "a directory without a vocabulary" 3 "encoder.json" "${encode[@]}" . text.txt -o x
error "a text that is not there" 3 "'gone.txt'" "${encode[@]}" own gone.txt -o x
error "a text that is a directory" 3 "'own'" "${encode[@]}" own own -o x
error "an empty text" 3 "/dev/null.*no text" "${encode[@]}" own /dev/null -o x
error "a vocabulary of nothing" 3 "/dev/null.*no text" "$tokenize" train --vocab 300 /dev/null -o x
error "an output that cannot be" 3 "gone/x" "${encode[@]}" own text.txt -o gone/x
error "a text over itself" 2 "'./text.txt' is both" "${encode[@]}" own text.txt -o ./text.txt
error "a text is no shard" 3 "'text.txt'.*shard" "${decode[@]}" own text.txt -o x
head -c 2000 text.bin >cut.bin
error "a shard cut short" 3 "'cut.bin'.*cut short" "${decode[@]}" own cut.bin -o x
rm cut.bin
error "another vocabulary" 3 "outside the vocabulary of 259" "${decode[@]}" small text.bin -o x
error "a disk that is full" 3 "cannot write" bash -c "ulimit -f 20; exec '$tokenize' encode --tokenizer own text.txt -o x"
mkfifo pipe
error "a pipe is not replaced" 3 "'pipe' is not a regular file" "${encode[@]}" own text.txt -o pipe
error "a directory neither" 3 "'own' is not a regular file" "${decode[@]}" own text.bin -o own
expect "it is a pipe still" [ -p pipe ]
{ exec 3>pipe; head -c 200000 text.txt >&3; sleep 3; } &
"${encode[@]}" own pipe -o x 2>err.txt >out.txt &
writer=$!
sleep 0.5
kill -TERM $writer
wait $writer; status=$?
kill %1 2>/dev/null; wait 2>/dev/null
expect "a signal ends it as it would anything" [ $status -eq 143 ]
rm pipe
expect "nothing was left behind" diff <(echo "$before") <(ls)

# --- models ---------------------------------------------------------------------------------------------------------------------------------------------
small=(--layers 1 --heads 2 --channels 16 --max-seq 32 --batch 4 --val-batches 2 --sample-every 0 --threads 1)
good "train with a vocabulary" "$program" train --tokenizer own --data text.txt "${small[@]}" --steps 4 --save-every 2 --out run
"${encode[@]}" own --documents text.txt -o text.bin >out.txt
good "from shards" "$program" train --tokenizer own --data text.bin "${small[@]}" --steps 4 --save-every 2 --out run2
expect "the same model" cmp run/step_00000004/model.safetensors run2/step_00000004/model.safetensors
expect "its vocabulary goes along" cmp own/vocab.bpe run/step_00000002/vocab.bpe
mv own moved
good "generate without the directory" "$program" generate --checkpoint run --prompt "the red key" --tokens 20
good "eval, in bits per byte" "$program" eval --checkpoint run --data val.txt
said "of text" "bits per byte" out.txt
good "resume without it" "$program" train --out run --resume --steps 6
good "resume with it, by another name" "$program" train --out run --resume --tokenizer moved --steps 8
error "resume with another vocabulary" 2 "--tokenizer small.*another" "$program" train --out run --resume --tokenizer small --steps 8
error "resume with bytes" 2 "--tokenizer bytes" "$program" train --out run --resume --tokenizer bytes --steps 8
cp again/encoder.json run/step_00000008/encoder.json
good "the same vocabulary" "$program" generate --checkpoint run --tokens 2
cp small/encoder.json small/vocab.bpe run/step_00000008/
error "another vocabulary in the checkpoint" 3 "another vocabulary" "$program" generate --checkpoint run/step_00000008 --tokens 2
rm run/step_00000008/vocab.bpe
error "none" 3 "vocab.bpe" "$program" generate --checkpoint run/step_00000008 --tokens 2
error "a vocabulary for another shard" 3 "outside the vocabulary of 259" "$program" train --tokenizer small --data text.bin "${small[@]}" --steps 1
good "overwritten whole" "$program" train --tokenizer moved --data text.txt "${small[@]}" --steps 2 --out run --overwrite
expect "nothing of the old" [ "$(ls run)" = "$(printf 'config.json\nlog.jsonl\nstep_00000002')" ]

finish
