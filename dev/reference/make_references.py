"""Writes outputs/CASE.safetensors for the named cases, or for all of them.

    python3 make_references.py [CASE…]
    python3 make_references.py --distances [CASE…]   only the `bf16` figures of files that are there

One line a case: size, loss, gradient norm, how far bfloat16 runs (the largest distance of nine, see
rounding_distances) and a float32 run of the same text are from float64, and the largest differences
from the forms and implementations compared with. A case that disagrees with one of those is not
written, and the exit status is 1. README.md says what is in a file.
"""

import json
import pathlib
import struct
import sys
import time
import zlib

import safetensors.torch
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from cases import CASES, build, metadata
from check_neighbours import check_philox, compare, difference
from model import adamw_losses, evaluate

OUTPUTS = pathlib.Path(__file__).parent / "outputs"
DRAWS = 8  # bfloat16 runs with stochastic rounding


def distances(params, cfg, run, batch, reference, dtype):
    """The same model in another type: relative differences of loss, logits and every gradient.
    A gradient that is all but zero is measured against a millionth of the whole gradient's norm."""
    logits, losses, grads = evaluate({n: p.to(dtype) for n, p in params.items()}, cfg, run, batch)
    floor = 1e-6 * gradient_norm(reference[2])
    found = {"loss": difference(losses.double().mean(), reference[1].mean()),
             "logits": difference(logits, reference[0])}
    found.update({f"grad.{n}": difference(grads[n], g, floor) for n, g in reference[2].items()})
    return {n: float(f"{d:.2e}") for n, d in found.items()}


class StochasticRounding(TorchDispatchMode):
    """Inside, forwards and backwards, every operation that returns bfloat16 computes in float32 and rounds
    each number up or down at random, the likelier the nearer. Numbers that bfloat16 holds stay as they are,
    so copies, gathers and zeros need no exception."""

    def __init__(self, seed):
        super().__init__()
        self.random = torch.Generator().manual_seed(seed)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        inputs = args, kwargs or {}
        # A view computes nothing, and must go on sharing its memory.
        if func.is_view or not any(is_bf16(x) for x in tree_leaves(inputs)):
            return func(*inputs[0], **inputs[1])
        wide_args, wide_kwargs = tree_map(widened, inputs)
        exact = func(*wide_args, **wide_kwargs)
        # Once more as it was called, for types and memory: an operation in place returns its argument, which
        # is overwritten here. `exact` comes first, from copies made before that.
        out = func(*inputs[0], **inputs[1])
        for y, e in zip(tree_leaves(out), tree_leaves(exact), strict=True):
            if is_bf16(y):
                y.copy_(self.rounded(e))
        return out

    def rounded(self, x):
        """bfloat16 is the upper half of a float32: add a random lower half, and cut."""
        noise = torch.randint(2**16, x.shape, dtype=torch.int32, generator=self.random)
        return ((x.view(torch.int32) + noise) & -2**16).view(torch.float32)


def is_bf16(x):
    return x is torch.bfloat16 or isinstance(x, torch.Tensor) and x.dtype == torch.bfloat16


def widened(x):
    return x if not is_bf16(x) else x.float() if isinstance(x, torch.Tensor) else torch.float32


def rounding_distances(case, params, cfg, run, batch, reference):
    """What rounding to bfloat16 alone can do: the largest distances seen in the ordinary run and in DRAWS runs
    with stochastic rounding. One run is one draw of a random variable; in a small ill-conditioned case the next
    program, no worse, lands at twice its distance."""
    runs = [distances(params, cfg, run, batch, reference, torch.bfloat16)]
    for draw in range(DRAWS):
        with StochasticRounding(zlib.crc32(f"{case.name} {draw}".encode())):
            runs.append(distances(params, cfg, run, batch, reference, torch.bfloat16))
    return {n: max(r[n] for r in runs) for n in runs[0]}


def gradient_norm(grads):
    return torch.stack([g.norm() for g in grads.values()]).norm().item()


def assert_equal_to_causal(params, cfg, run, batch, reference):
    """Infini whose segment holds the sequence is causal attention with the same weights."""
    as_causal = [{"name": "causal", "kv-heads": a["kv-heads"], "window": 0} for a in cfg.attention]
    cfg = type(cfg)(**{**cfg.__dict__, "attention": as_causal})
    logits, losses, grads = evaluate(params, cfg, run, batch)
    seen = max(difference(logits, reference[0]), *(difference(grads[n], g) for n, g in reference[2].items()
                                                   if not n.endswith(".beta")))
    assert seen <= 1e-12 and all((g == 0).all() for n, g in reference[2].items() if n.endswith(".beta"))
    return seen


def is_causal_in_effect(case, cfg):
    return case.chunks == 1 and all(a["name"] == "infini" and a["segment"] >= max(case.lengths) and
                                    a["first-segment"] == "pass" for a in cfg.attention)


def checks(case, cfg, run, params, batch, reference):
    """-> text for the metadata, short text for the terminal, names that disagree."""
    found = compare(cfg, run, params, batch, reference)
    if is_causal_in_effect(case, cfg):
        found.append(("causal layers with the same weights, whole model",
                      assert_equal_to_causal(params, cfg, run, batch, reference), 1e-12))
    bad = [name for name, seen, expected in found if not seen <= expected]
    text = "; ".join(f"{name}: largest relative difference {seen:.0e}" for name, seen, _ in found)
    return text, " ".join(f"{name.split()[1]}={seen:.0e}" for name, seen, _ in found), bad


# ----------------------------------------------------------------------------------------------
# The file: length of the header, header in JSON, tensors without gaps


def encode(tensor, dtype):
    """-> bytes, little endian"""
    if dtype == "BF16":
        assert torch.equal(tensor.bfloat16().double(), tensor)
        return tensor.bfloat16().view(torch.int16).numpy().astype("<i2").tobytes()
    return tensor.numpy().astype({"F64": "<f8", "F32": "<f4", "I32": "<i4"}[dtype]).tobytes()


def write_safetensors(path, tensors, strings):
    """tensors: name -> (tensor, dtype), written widest type first, so that all lie aligned."""
    width = {"F64": 8, "F32": 4, "I32": 4, "BF16": 2}
    header, data = {"__metadata__": strings}, b""
    for name, (tensor, dtype) in sorted(tensors.items(), key=lambda item: (-width[item[1][1]], item[0])):
        encoded = encode(tensor, dtype)
        header[name] = {"dtype": dtype, "shape": list(tensor.shape),
                        "data_offsets": [len(data), len(data) + len(encoded)]}
        data += encoded
    write_with_header(path, header, data)


def write_with_header(path, header, data):
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def rewrite_distances(case):
    """New `bf16` figures in a file that is there, whose tensors stay byte for byte."""
    began = time.time()
    path = OUTPUTS / f"{case.name}.safetensors"
    stored = path.read_bytes()
    begin = 8 + struct.unpack("<Q", stored[:8])[0]
    header = json.loads(stored[8:begin])
    cfg, run, params, batch = build(case)
    reference = evaluate(params, cfg, run, batch)
    if difference(reference[0], safetensors.torch.load(stored)["logits"]) > 1e-6:
        print(f"{case.name:29} FAIL the file holds other logits")
        return ["logits"]
    before = json.loads(header["__metadata__"]["bf16"])
    bf16 = rounding_distances(case, params, cfg, run, batch, reference)
    header["__metadata__"]["bf16"] = json.dumps(bf16)
    write_with_header(path, header, stored[begin:])
    print(f"{case.name:29} bf16 logits {before['logits']:.1e} -> {bf16['logits']:.1e} worst "
          f"{max(before.values()):.1e} -> {max(bf16.values()):.1e} {time.time() - began:.1f}s", flush=True)
    return []


def make(case):
    began = time.time()
    cfg, run, params, batch = build(case)
    reference = logits, losses, grads = evaluate(params, cfg, run, batch)
    text, short, bad = checks(case, cfg, run, params, batch, reference)
    bf16 = rounding_distances(case, params, cfg, run, batch, reference)
    f32 = distances(params, cfg, run, batch, reference, torch.float32)
    history = adamw_losses(params, cfg, run, batch)
    f32["losses"] = float(f"{float32_losses(params, cfg, run, batch, history):.2e}")
    tensors = {"tokens": (batch["tokens"], "I32"), "targets": (batch["targets"], "I32"),
               "cu_seqlens": (torch.tensor(batch["offsets"]), "I32"), "logits": (logits, "F32"),
               "loss": (losses, "F32"), "losses": (torch.tensor(history, dtype=torch.float64), "F64")}
    tensors.update({f"param.{n}": (p, "BF16") for n, p in params.items()})
    tensors.update({f"grad.{n}": (g, "F32") for n, g in grads.items()})
    if not all(torch.isfinite(t.double()).all() for t, _ in tensors.values()):
        bad.append("finite values")
    path = OUTPUTS / f"{case.name}.safetensors"
    if not bad:
        write_safetensors(path, tensors, {**metadata(cfg, run), "bf16": json.dumps(bf16), "float32": json.dumps(f32),
                                          "checked": text})
    worst = max((d, n) for n, d in bf16.items())
    print(f"{case.name:29} {path.stat().st_size if not bad else 0:8d} B loss {history[0]:.4f} -> {history[-1]:.4f} "
          f"|grad| {gradient_norm(grads):5.2f} bf16 logits {bf16['logits']:.1e} worst {worst[1]} {worst[0]:.1e} "
          f"f32 worst {max(f32.values()):.0e} losses {f32['losses']:.0e} {short} {time.time() - began:.1f}s"
          + "".join(f" FAIL {name}" for name in bad), flush=True)
    return bad


def float32_losses(params, cfg, run, batch, history):
    """How far ten float32 steps stray from float64: the largest relative difference of a loss."""
    single = adamw_losses({n: p.float() for n, p in params.items()}, cfg, run, batch)
    return max(abs(a - b) / b for a, b in zip(single, history))


def main(arguments):
    names = [a for a in arguments if a != "--distances"]
    do = rewrite_distances if "--distances" in arguments else make
    unknown = [n for n in names if n not in CASES]
    if unknown:
        print(f"no case named {unknown[0]}; the cases: {' '.join(CASES)}", file=sys.stderr)
        return 2
    OUTPUTS.mkdir(exist_ok=True)
    check_philox()
    failed = [n for n in names or CASES if do(CASES[n])]
    total = sum(p.stat().st_size for p in OUTPUTS.glob("*.safetensors"))
    print(f"{len(names or CASES)} cases, {len(failed)} failed; {total} bytes in {OUTPUTS.name}/")
    return 1 if failed else 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main(sys.argv[1:]))
