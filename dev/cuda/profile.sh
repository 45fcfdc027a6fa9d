#!/usr/bin/env bash
# Where a training step's milliseconds go, by kernel family: one step of GPT-2 124M under Nsight Compute, which times every kernel alone.
#     dev/cuda/profile.sh [options of train_gpt2cu train]      e.g. --attention mla --batch 32
# To look at one kernel:  ncu --set full -k regex:softmax_forward -c 1 ./train_gpt2cu train ...      On a timeline, with NVTX ranges:
#     nsys profile --trace=cuda,nvtx ./train_gpt2cu train ... --steps 5
set -eu
command -v ncu >/dev/null || { echo "error: ncu is not here: it comes with the CUDA toolkit (Nsight Compute); nsys profile --trace=cuda,nvtx shows the same on a timeline" >&2; exit 1; }
data=${DATA:-data/stories/train.txt}
[ -e "$data" ] || { echo "error: no data in '$data': make corpus, or give DATA=a text or token shard" >&2; exit 1; }
csv=build/cuda/profile.csv
ncu --csv --clock-control none --metrics gpu__time_duration.sum ./train_gpt2cu train --preset gpt2-124M --batch 64 --seq 1024 --data "$data" --steps 1 \
    --val-every 0 --sample-every 0 --save-every 0 "$@" >"$csv" 2>build/cuda/profile.err || { tail -3 "$csv" build/cuda/profile.err; exit 1; }
# A kernel belongs to the first family whose expression its name matches: cuBLASLt's kernels have names of their own.
python3 - "$csv" <<'P'
import csv, re, sys
families = [("bias gradients", r"bias_backward"), ("matrix products", r"matmul_kernel|nvjet|cutlass|gemm|cublas|splitK|cublasLt"), ("softmax forward", r"softmax_forward"), ("softmax backward", r"softmax_backward|softmax_bwd"),
            ("decode", r"decode"), ("lightning gate", r"lightning_gate"), ("lightning", r"lightning"), ("infini", r"infini"), ("mla", r"mla"), ("rope", r"rope"),
            ("LayerNorm, RMSNorm", r"gpu::norm_"), ("classifier", r"classifier|mean_loss"), ("encoder", r"encoder|Radix|DeviceScan|count_up"), ("AdamW, norm", r"adamw|global_norm"),
            ("GELU, SiLU", r"gelu|silu"), ("residual, dropout", r"residual|dropout")]
times, counts, other = {}, {}, {}
rows = [r for r in csv.reader(l for l in open(sys.argv[1]) if l.startswith('"'))]
head = rows[0]
name, unit, value = head.index("Kernel Name"), head.index("Metric Unit"), head.index("Metric Value")
for r in rows[1:]:
    if len(r) <= value: continue
    us = float(r[value].replace(",", "")) * {"ns": 1e-3, "nsecond": 1e-3, "us": 1, "usecond": 1, "ms": 1e3, "msecond": 1e3}.get(r[unit], 1)
    family = next((f for f, e in families if re.search(e, r[name])), "other")
    if family == "other": other[r[name][:60]] = other.get(r[name][:60], 0) + us
    times[family] = times.get(family, 0) + us
    counts[family] = counts.get(family, 0) + 1
total = sum(times.values())
print("| family | kernels | ms | % |\n| --- | --- | --- | --- |")
for f in sorted(times, key=times.get, reverse=True): print(f"| {f} | {counts[f]} | {times[f] / 1e3:.2f} | {100 * times[f] / total:.1f} |")
print(f"| all | {sum(counts.values())} | {total / 1e3:.2f} | 100 |")
for n, us in sorted(other.items(), key=lambda x: -x[1])[:8]: print(f"other: {n} {us / 1e3:.2f} ms")
P
