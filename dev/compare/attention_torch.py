#!/usr/bin/env python3
"""The attention kernels one would call instead of ours, timed on this GPU: forward and backward medians in milliseconds, as a Markdown table.

    attention_torch.py [softmax] [infini] [lightning]      (needs PyTorch with CUDA; flash-linear-attention for lightning)

softmax: torch's scaled_dot_product_attention through FlashAttention-2 and through cuDNN, each also in its deterministic mode, since ours is deterministic.
infini: the whole-sequence form under torch.compile. lightning: flash-linear-attention's chunk_lightning_attn. bf16, normal random numbers, causal; backward is
the time of forward and backward less that of forward. The same shapes are timed by the ladder (dev/cuda/README.md): run both on one machine, one after the other.
"""
import sys
import warnings

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from triton.testing import do_bench


def median(f):
    return do_bench(f, warmup=30, rep=150, return_mode="median")


def tensors(*shapes):
    return [torch.randn(s, device="cuda", dtype=torch.bfloat16, requires_grad=True) for s in shapes]


def row(shape, peer, f, inputs):
    """One line of the table."""
    try:
        out = f()
        gradient = torch.randn_like(out)
        forward = median(f)
        both = median(lambda: torch.autograd.grad(f(), inputs, gradient))
        print(f"| {shape} | {peer} | {forward:.3f} | {both - forward:.3f} |", flush=True)
    except RuntimeError as e:
        print(f"| {shape} | {peer} | not supported: {str(e).splitlines()[0][:50]} | |", flush=True)


def softmax():
    for B, H, T, d, dv in [(64, 12, 1024, 64, 64), (8, 12, 8192, 64, 64), (2, 12, 32768, 64, 64), (8, 16, 4096, 128, 128), (64, 12, 1024, 96, 64), (4, 16, 8192, 192, 128)]:
        q, k, v = tensors((B, H, T, d), (B, H, T, d), (B, H, T, dv))
        shape = f"B{B} H{H} T{T} D{d}" + (f"/{dv}" if d != dv else "")
        for name, backend in (("FlashAttention-2", SDPBackend.FLASH_ATTENTION), ("cuDNN", SDPBackend.CUDNN_ATTENTION)):
            for deterministic in (False, True):
                torch.use_deterministic_algorithms(deterministic, warn_only=True)
                with sdpa_kernel(backend):
                    row(shape, name + ", deterministic" * deterministic, lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True), (q, k, v))
    torch.use_deterministic_algorithms(False)


def infini_core(q, k, v, beta, segment):
    """Linear update, the normaliser starts at 1, every segment gated; q, k, v (B,H,T,hs)."""
    B, H, T, hs = q.shape
    S = T // segment
    qs, ks, vs = (x.view(B, H, S, segment, hs) for x in (q, k, v))
    as_batch = lambda x: x.transpose(1, 2).reshape(B * S, H, segment, hs)
    local = F.scaled_dot_product_attention(as_batch(qs), as_batch(ks), as_batch(vs), is_causal=True).view(B, S, H, segment, hs).transpose(1, 2)
    sq, sk = F.elu(qs) + 1, F.elu(ks) + 1
    written, counted = torch.einsum("bhsnd,bhsne->bhsde", sk, vs).float(), sk.sum(3).float()
    M, z = (written.cumsum(2) - written).to(q.dtype), (counted.cumsum(2) - counted + 1).to(q.dtype)
    retrieved = torch.einsum("bhsnd,bhsde->bhsne", sq, M) / torch.einsum("bhsnd,bhsd->bhsn", sq, z)[..., None]
    gate = torch.sigmoid(beta).view(1, H, 1, 1, 1)
    return (gate * retrieved + (1 - gate) * local).reshape(B, H, T, hs)


def infini():
    compiled = torch.compile(infini_core)
    for B, H, T, hs, segment in [(2, 12, 32768, 64, 2048), (8, 12, 8192, 64, 1024), (64, 12, 1024, 64, 256)]:
        q, k, v, beta = tensors((B, H, T, hs), (B, H, T, hs), (B, H, T, hs), (H,))
        row(f"B{B} H{H} T{T} D{hs} S{segment}", "torch.compile", lambda: compiled(q, k, v, beta, segment), (q, k, v, beta))


def lightning():
    try:
        from fla.ops.lightning_attn import chunk_lightning_attn
    except ImportError as e:
        return print(f"| lightning | flash-linear-attention does not import ({e}) | | |")
    for B, H, T, hs in [(64, 12, 1024, 64), (8, 12, 8192, 64), (2, 12, 32768, 64), (1, 12, 262144, 64), (8, 16, 4096, 128)]:
        q, k, v = tensors((B, T, H, hs), (B, T, H, hs), (B, T, H, hs))
        row(f"B{B} H{H} T{T} D{hs}", "flash-linear-attention", lambda: chunk_lightning_attn(q, k, v, layer_idx=1, num_layers=12)[0], (q, k, v))


if __name__ == "__main__":
    torch.manual_seed(0)
    parts = {"softmax": softmax, "infini": infini, "lightning": lightning}
    wanted = sys.argv[1:] or list(parts)
    if set(wanted) - set(parts):
        sys.exit(f"usage: attention_torch.py [{'] ['.join(parts)}]")
    warnings.filterwarnings("ignore")
    print(f"torch {torch.__version__}, {torch.cuda.get_device_name()}\n\n| shape | peer | forward ms | backward ms |\n| --- | --- | --- | --- |")
    for name in wanted:
        parts[name]()
