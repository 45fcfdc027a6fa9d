#!/usr/bin/env bash
# make run: trains the small GPT on our stories and shows what it learnt.   dev/run.sh ATTENTION [options of ./train_gpt2 train]
# Each run gets a directory of its own, runs/ATTENTION, runs/ATTENTION-2, ...: nothing is overwritten.
set -eu
attention=$1
shift
name=$(printf '%s' "$attention" | tr -c 'A-Za-z0-9\n' '-')
out=runs/$name
n=2
while [ -e "$out" ]; do
    out=runs/$name-$n
    n=$((n + 1))
done
mkdir -p runs
./train_gpt2 train --preset tiny --attention "$attention" --data data/stories/train.txt --val-data data/stories/val.txt --out "$out" "$@"
echo
./train_gpt2 eval --checkpoint "$out" --data data/stories/val.txt --recall
echo
echo "Go on with:"
echo "  ./train_gpt2 generate --checkpoint $out --prompt \"\$(head -c 120 data/stories/val.txt)\" --tokens 200"
echo "  ./train_gpt2 train --resume --out $out --steps 5000"
