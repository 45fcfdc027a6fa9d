#!/usr/bin/env bash
# make run: trains a small GPT on our stories and shows what it learnt.   dev/run.sh ATTENTION [options of ./train_gpt2 train]
# Each run gets a directory of its own, runs/ATTENTION, runs/ATTENTION-2, ...: nothing is overwritten.
#
# The shape is smaller than the preset's million parameters: in two minutes on two cores what counts is how many stories a model sees (dev/LOG.md,
# data/README.md). Windows of 1024 bytes hold several stories; --doc-mask keeps them apart.
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
layers=2
case $attention in *[*,]*) layers=4 ;; esac # a pattern needs layers to stand in
for ((i = 1; i < $#; i++)); do
    [ "${!i}" = --out ] && next=$((i + 1)) && out=${!next}
done
segment=()
case $attention in *infini*) segment=(--segment 64) ;; esac # stories are short: with the default of 256 most would end before the memory is written
./train_gpt2 train --preset tiny --layers $layers --heads 4 --channels 64 --max-seq 1024 --batch 4 --doc-mask --lr 0.012 --min-lr 0.0005 --warmup 50 --steps 1500 \
    --val-every 500 --val-batches 16 --attention "$attention" ${segment[@]+"${segment[@]}"} --data data/stories/train.txt --val-data data/stories/val.txt \
    --out "$out" "$@"
compgen -G "$out/step_*" >/dev/null || exit 0
echo
./train_gpt2 eval --checkpoint "$out" --data data/stories/val.txt --recall
echo
echo "Go on with:"
echo "  ./train_gpt2 generate --checkpoint $out --prompt \"Ann hid the silver key in the blue box. Where is the silver key?\""
echo "  make run ATTENTION=\"$attention\" RUN_ARGS=\"--steps 6000\""
