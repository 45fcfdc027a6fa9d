#!/bin/bash
# The GPU's program from outside: runs resumed bit for bit, checkpoints that go from GPU to CPU and back, tuned plans, what does not fit.
# Needs ./train_gpt2cu, ./train_gpt2 and a GPU.
set -u
gpu=$(realpath ./train_gpt2cu) cpu=$(realpath ./train_gpt2)
. "$(dirname "$0")/testing.sh"
# The losses of two runs stay together: close DIRECTORY DIRECTORY TOLERANCE
close() {
    paste <(sed -E 's/.*"loss": ([^,]*),.*/\1/' "$1/log.jsonl") <(sed -E 's/.*"loss": ([^,]*),.*/\1/' "$2/log.jsonl") |
        awk -v t="$3" '{ d = $1 - $2; if (d < 0) d = -d; n++; if (!(d <= t * $2)) bad = 1 } END { exit !(n > 0 && !bad) }'
}
documents 120 80 >text.txt
small=(--data text.txt --layers 2 --heads 2 --channels 64 --max-seq 64 --batch 4 --val-batches 2 --sample-every 0 --lr 2e-3 --warmup 0 --schedule constant)

for attention in causal infini:segment=16 lightning mla; do
    for dtype in bf16 float32; do
        name="$attention, $dtype"
        good "$name: twelve steps" "$gpu" train "${small[@]}" --attention $attention --dtype $dtype --steps 12 --dropout 0.1 --out whole
        good "$name: six steps" "$gpu" train "${small[@]}" --attention $attention --dtype $dtype --steps 6 --dropout 0.1 --out parts
        good "$name: six more" "$gpu" train --out parts --resume --steps 12
        # At step 6 the run in parts ended, and validated: only the losses of training are compared.
        expect "$name: a resumed run has the same bits" test "$(losses whole/log.jsonl | sed -E 's/, "val_loss": [^,]*//')" = "$(losses parts/log.jsonl | sed -E 's/, "val_loss": [^,]*//')"
        rm -rf whole parts
    done
    good "$attention: six steps on the GPU" "$gpu" train "${small[@]}" --attention $attention --dtype float32 --steps 6 --out there
    cp -r there back
    good "$attention: a GPU's checkpoint goes on on the CPU" "$cpu" train --out there --resume --steps 12
    good "$attention: and on the GPU" "$gpu" train --out back --resume --steps 12
    expect "$attention: with the same losses" close there back 1e-4
    good "$attention: the CPU's goes on on the GPU" "$gpu" train --out there --resume --steps 14
    good "$attention: text" "$gpu" generate --checkpoint there --prompt "the red" --tokens 20
    expect "$attention: some of it" test -s out.txt
    rm -rf there back
done

good "carried memory" "$gpu" train "${small[@]}" --attention infini:segment=16 --carry-memory --dtype float32 --steps 6 --out memory_gpu
good "carried memory on the CPU" "$cpu" train "${small[@]}" --attention infini:segment=16 --carry-memory --steps 6 --out memory_cpu
expect "the same losses with carried memory" close memory_gpu memory_cpu 1e-3
good "documents apart, recomputed, accumulated" "$gpu" train "${small[@]}" --attention mla --doc-mask --recompute 2 --total-batch 1024 --steps 4 --dtype float32 --out masked_gpu
good "documents apart on the CPU" "$cpu" train "${small[@]}" --attention mla --doc-mask --total-batch 1024 --steps 4 --out masked_cpu
expect "the same losses with documents apart" close masked_gpu masked_cpu 1e-4
good "evaluation" "$gpu" eval --checkpoint masked_gpu --data text.txt
head -c 3000 text.txt | tr -d '<|>' >plain.txt
for key in key cat box; do echo "{\"context\": \"the red $key is in the\", \"choices\": [\" box\", \" dog on\", \"zq\"], \"label\": 0}"; done >choices.jsonl
# same NAME OPTIONS...: the GPU's loss and choices are the CPU's
same() {
    local name=$1; shift
    good "$name" "$gpu" eval --dtype float32 --choices choices.jsonl --data plain.txt "$@"; cp out.txt gpu.txt
    good "$name on the CPU" "$cpu" eval --choices choices.jsonl --data plain.txt "$@"
    expect "$name: the same choices" test -n "$(grep multiple gpu.txt)" -a "$(grep multiple gpu.txt)" = "$(grep multiple out.txt)"
    expect "$name: the same loss" awk 'FNR == 1 { loss[++n] = $2 } END { d = loss[1] - loss[2]; exit !(n == 2 && d <= 1e-4 && d >= -1e-4) }' gpu.txt out.txt
}
same "evaluation" --checkpoint masked_gpu
same "a sliding window" --checkpoint masked_gpu --stride 7
same "a memory carried through a text" --checkpoint memory_gpu --carry-memory

good "tuned products" "$gpu" train "${small[@]}" --tune --steps 4 --out tuned
expect "their plans are kept" test -s tuned/matmul_plans.txt
good "and used by a resumed run" "$gpu" train --out tuned --resume --steps 8
sed 1s/[0-9]/9/ tuned/matmul_plans.txt >plans.txt && mv plans.txt tuned/matmul_plans.txt
error "another machine's plans" 3 "plans" "$gpu" train --out tuned --resume --steps 9
error "what does not fit" 3 "GB too much.*(recompute|batch)" "$gpu" train "${small[@]}" --layers 100 --heads 25 --channels 1600 --batch 256 --steps 1
error "an unknown type" 2 "fp8.*bf16, float32" "$gpu" train "${small[@]}" --dtype fp8
CUDA_VISIBLE_DEVICES= error "no GPU" 3 "train_gpt2" "$gpu" train "${small[@]}" --steps 1

finish
