#!/usr/bin/env python3
"""PyTorch beside our trainer: the causal GPT-2 of a run, from the run's own initial checkpoint, on the same batches, with the same optimiser.

    ./train_gpt2cu train --preset gpt2-124M --data data/real/train.bin --steps 0 --out runs/causal ...     writes step_00000000
    ./train_gpt2cu train --resume --out runs/causal --steps 300
    dev/compare/train_torch.py runs/causal --steps 300 --out runs/torch/log.jsonl      one line a step: {"step": 1, "loss": ...}

bf16 autocast over float32 weights, SDPA, fused AdamW. Options (batch, learning rate, schedule, ...) are read from the run's config.json.
"""
import argparse, json, math, os
import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file


def philox(key, c0, c1, c2, c3):
    """gpt2/philox.h"""
    k0, k1 = key & 0xFFFFFFFF, key >> 32
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & 0xFFFFFFFF, (p0 >> 32) ^ c3 ^ k1, p0 & 0xFFFFFFFF
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c0, c1, c2, c3


def permute(i, size, seed, epoch):
    """gpt2/dataloader.h"""
    half = 1
    while half < 31 and 1 << 2 * half < size:
        half += 1
    mask = (1 << half) - 1
    while True:
        left, right = i >> half & mask, i & mask
        for r in range(8):
            left, right = right, (left ^ philox(seed, right, r, epoch, 0x73687566)[0]) & mask
        i = left << half | right
        if i < size:
            return i


class Loader:
    """The batches of gpt2/dataloader.h, one shard, shuffled, no documents kept apart."""

    def __init__(self, path, B, T, seed):
        self.tokens = np.fromfile(path, np.uint16, offset=1024).astype(np.int64)
        self.B, self.T, self.seed = B, T, seed
        self.windows = (len(self.tokens) - 1) // T

    def batch(self, number):
        rows = []
        for sample in range(number * self.B, (number + 1) * self.B):
            epoch, w = divmod(sample, self.windows)
            shift = philox(self.seed, 0, 0, epoch, 0x73686966)[0] % ((len(self.tokens) - 1) % self.T + 1)
            at = shift + permute(w, self.windows, self.seed, epoch) * self.T
            rows.append(self.tokens[at : at + self.T + 1])
        rows = torch.from_numpy(np.stack(rows)).cuda()
        return rows[:, :-1], rows[:, 1:]


def forward(p, heads, layers, vocab, x, y):
    T = x.shape[1]
    h = p["wte"][x] + p["wpe"][:T]
    for l in range(layers):
        g = lambda name: p[f"h.{l}.{name}"]
        a = F.layer_norm(h, h.shape[-1:], g("ln1.w"), g("ln1.b"))
        q, k, v = (t.view(*t.shape[:2], heads, -1).transpose(1, 2) for t in F.linear(a, g("attn.wqkv"), g("attn.bqkv")).chunk(3, -1))
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        h = h + F.linear(o, g("attn.wo"), g("attn.bo"))
        a = F.layer_norm(h, h.shape[-1:], g("ln2.w"), g("ln2.b"))
        h = h + F.linear(F.gelu(F.linear(a, g("mlp.wfc"), g("mlp.bfc")), approximate="tanh"), g("mlp.wproj"), g("mlp.bproj"))
    logits = F.linear(F.layer_norm(h, h.shape[-1:], p["lnf.w"], p["lnf.b"]), p["wte"])[..., :vocab]
    return F.cross_entropy(logits.float().flatten(0, 1), y.flatten())


def learning_rate(o, steps, step):
    """gpt2/schedule.h: linear warm-up, then a half cosine from lr to min-lr."""
    if step <= o["warmup"]:
        return o["lr"] * step / o["warmup"]
    t = (step - o["warmup"]) / max(1, steps - o["warmup"])
    return o["min-lr"] + (o["lr"] - o["min-lr"]) * 0.5 * (1 + math.cos(math.pi * min(t, 1)))


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("run")
    ap.add_argument("--steps", type=int, required=True)
    ap.add_argument("--out", required=True)
    ap.add_argument("--compile", action="store_true")
    a = ap.parse_args()
    config = json.load(open(f"{a.run}/config.json"))
    o, m = config["options"], config["model"]
    assert o["schedule"] == "cosine" and o["dropout"] == 0 and all(s.startswith("causal") for s in m["attention"])
    assert o["total-batch"] == o["batch"] * o["seq"], "accumulation is not done here"
    p = {n: t.cuda().requires_grad_() for n, t in load_file(f"{a.run}/step_00000000/model.safetensors").items()}
    groups = [{"params": [t for t in p.values() if (t.dim() > 1) == matrix], "weight_decay": o["weight-decay"] if matrix else 0} for matrix in (True, False)]
    optimizer = torch.optim.AdamW(groups, lr=o["lr"], betas=(o["beta1"], o["beta2"]), eps=o["eps"], fused=True)
    loader = Loader(o["data"], o["batch"], o["seq"], o["seed"])
    f = torch.compile(forward) if a.compile else forward
    os.makedirs(os.path.dirname(a.out) or ".", exist_ok=True)
    with open(a.out, "w") as out:
        for step in range(1, a.steps + 1):
            x, y = loader.batch(step - 1)
            with torch.autocast("cuda", torch.bfloat16):
                loss = f(p, m["heads"], m["layers"], m["vocab_size"], x, y)
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(p.values(), o["grad-clip"] or float("inf"))
            for g in optimizer.param_groups:
                g["lr"] = learning_rate(o, a.steps, step)
            optimizer.step()
            optimizer.zero_grad()
            out.write(json.dumps({"step": step, "loss": loss.item(), "grad_norm": norm.item(), "tokens": step * x.numel()}) + "\n")


if __name__ == "__main__":
    main()
