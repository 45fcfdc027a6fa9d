"""Compares layers.py and model.py with implementations written by others, and with second forms.

    python3 check_neighbours.py [CASE…]     one line per case and neighbour; exit 1 when one is off

Neighbours: transformers GPT2LMHeadModel (whole model), MiniMaxLightningAttention and
DeepseekV3Attention (a layer), torch's scaled_dot_product_attention (a causal layer, and an Infini
layer whose segment holds the sequence), flash-linear-attention's naive_recurrent_simple_gla (the
recurrence). A layer is compared on the case's own weights and a drawn input: output, and the
gradients of input and weights. A difference is ‖a − b‖/‖b‖, the largest over the tensors compared.
MiniMax's and DeepSeek's RMSNorms and fla's recurrence work in float32 whatever their input is, so
agreement ends at about 1e-7 there.
"""

import importlib.util
import sys

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from transformers import DeepseekV3Config, GPT2Config, GPT2LMHeadModel, MiniMaxConfig
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention
from transformers.models.minimax.modeling_minimax import MiniMaxLightningAttention

from cases import CASES, build
from layers import FIRST, SECOND, Place, kv_head_of, slopes
from model import (ATTENTION_SITE, EMBEDDING_SITE, MLP_SITE, Dropout, adamw_losses, clip_scale, evaluate,
                   philox, rates)

EXACT, SINGLE = 1e-11, 3e-6  # agreement expected of float64, and where a neighbour uses float32


def difference(a, b, floor=0.0):
    """‖a − b‖/‖b‖; `floor` stands in for ‖b‖ where that is smaller (a gradient that is zero)."""
    return (torch.linalg.vector_norm(a.double() - b.double()) /
            max(torch.linalg.vector_norm(b.double()).item(), floor, 1e-300)).item()


def largest_difference(tensors, reference):
    floor = 1e-6 * max(torch.linalg.vector_norm(t).item() for t in reference)
    return max(difference(a, b, floor) for a, b in zip(tensors, reference, strict=True))


# ----------------------------------------------------------------------------------------------
# Whole models


def second_forms(cfg, run, params, batch, first):
    """The same model with the layers' other forms: loss, logits, all gradients."""
    logits, losses, grads = evaluate(params, cfg, run, batch, forms=SECOND)
    names = sorted(grads)
    return max(difference(logits, first[0]), difference(losses, first[1]),
               largest_difference([grads[n] for n in names], [first[2][n] for n in names]))


def is_gpt2(cfg, run):
    return run.dropout == 0 and cfg.positions == "learned" and all(
        a["name"] == "causal" and a["kv-heads"] == cfg.heads and a["window"] == 0 for a in cfg.attention)


def gpt2_names(l):
    """Our name -> its name, and whether it stores the transpose."""
    linears = {"attn.wqkv": "attn.c_attn", "attn.wo": "attn.c_proj", "mlp.wfc": "mlp.c_fc", "mlp.wproj": "mlp.c_proj"}
    biases = {"attn.bqkv": "attn.c_attn", "attn.bo": "attn.c_proj", "mlp.bfc": "mlp.c_fc", "mlp.bproj": "mlp.c_proj"}
    norms = {"ln1.w": "ln_1.weight", "ln1.b": "ln_1.bias", "ln2.w": "ln_2.weight", "ln2.b": "ln_2.bias"}
    return {**{f"h.{l}.{a}": (f"transformer.h.{l}.{b}.weight", True) for a, b in linears.items()},
            **{f"h.{l}.{a}": (f"transformer.h.{l}.{b}.bias", False) for a, b in biases.items()},
            **{f"h.{l}.{a}": (f"transformer.h.{l}.{b}", False) for a, b in norms.items()}}


def gpt2(cfg, run, params, batch, first):
    """transformers' GPT-2, one sequence after the other: loss, logits, all gradients."""
    model = GPT2LMHeadModel(GPT2Config(
        vocab_size=cfg.padded_vocab_size, n_positions=cfg.max_seq, n_embd=cfg.channels, n_layer=cfg.layers,
        n_head=cfg.heads, activation_function="gelu_new", resid_pdrop=0, embd_pdrop=0, attn_pdrop=0,
        bos_token_id=None, eos_token_id=None)).double().eval()
    names = {"wte": ("transformer.wte.weight", False), "wpe": ("transformer.wpe.weight", False),
             "lnf.w": ("transformer.ln_f.weight", False), "lnf.b": ("transformer.ln_f.bias", False)}
    for l in range(cfg.layers):
        names.update(gpt2_names(l))
    theirs = dict(model.named_parameters())
    assert {n for n, _ in names.values()} == set(theirs)
    with torch.no_grad():
        for ours, (name, transposed) in names.items():
            theirs[name].copy_(params[ours].T if transposed else params[ours])
    tokens, offsets = batch["tokens"][0], batch["offsets"]
    logits = torch.cat([model(tokens[None, a:b]).logits[0, :, :cfg.vocab_size]
                        for a, b in zip(offsets[:-1], offsets[1:]) if b > a])
    loss = F.cross_entropy(logits, batch["targets"][0], ignore_index=-1)
    loss.backward()
    grads = [theirs[n].grad.T if t else theirs[n].grad for n, t in names.values()]
    return max(difference(first[0][0], logits.detach()), difference(first[1][0], loss.detach()),
               largest_difference([first[2][n] for n in names], grads))


# ----------------------------------------------------------------------------------------------
# Layers: each neighbour is y = f(x, w) on the case's weights, gradients by autograd


def layer_difference(cfg, l, weights, neighbour, T):
    """Our layer l and its neighbour: y, dx and the weights' gradients for a drawn x and dy."""
    rng = np.random.default_rng(T + l)
    x, dy = (torch.from_numpy(rng.standard_normal((T, cfg.channels))) for _ in range(2))
    spec = cfg.attention[l]
    place = Place(cfg.heads, l, cfg.layers, cfg.positions == "rope")
    results = []
    for f in (lambda x, w: FIRST[spec["name"]](x, w, spec, place)[0], lambda x, w: neighbour(x, w, spec, place)):
        inputs = [x.clone().requires_grad_()] + [w.clone().requires_grad_() for w in weights.values()]
        y = f(inputs[0], dict(zip(weights, inputs[1:])))
        y.backward(dy)
        zero = [torch.zeros_like(i) if i.grad is None else i.grad for i in inputs]
        results.append([y.detach(), *zero])
    return largest_difference(*results)


def sdpa(x, w, spec, place):
    """Causal attention by torch; rotary positions as multiplication of complex numbers."""
    T, C = x.shape
    hs, KV = C // place.heads, spec["kv-heads"]
    qkv = F.linear(x, w["wqkv"], w["bqkv"]).view(T, place.heads + 2 * KV, hs).transpose(0, 1)
    q, k, v = qkv[:place.heads], qkv[place.heads:place.heads + KV], qkv[place.heads + KV:]
    if place.rotate:
        angle = torch.outer(torch.arange(T).double(), 10000.0 ** -(torch.arange(0, hs, 2).double() / hs))
        turn = torch.polar(torch.ones_like(angle), angle)
        q, k = (torch.view_as_real(torch.view_as_complex(y.reshape(*y.shape[:2], -1, 2)) * turn).flatten(-2)
                for y in (q, k))
    mask = torch.ones(T, T, dtype=torch.bool).tril()
    if spec.get("window", 0) > 0:
        mask = mask.triu(1 - spec["window"])
    group = kv_head_of(place.heads, KV)
    o = F.scaled_dot_product_attention(q[None], k[None, group], v[None, group], attn_mask=mask)
    return F.linear(o[0].transpose(0, 1).reshape(T, C), w["wo"], w["bo"])


def functional(module, weights, *arguments, **named):
    """A module called with our tensors in place of its parameters, so that gradients reach them."""
    return torch.func.functional_call(module, weights, arguments, named)[0]


def minimax(x, w, spec, place):
    C = x.shape[1]
    hs = C // place.heads
    config = MiniMaxConfig(hidden_size=C, num_attention_heads=place.heads, num_key_value_heads=place.heads,
                           head_dim=hs, num_hidden_layers=place.layers, block_size=7, hidden_act="silu",
                           layer_types=["linear_attention"] * place.layers)
    module = MiniMaxLightningAttention(config, place.layer).double()
    packed = w["wqkv"].view(3, place.heads, hs, C).transpose(0, 1).reshape(3 * C, C)  # q|k|v per head
    weights = {"qkv_proj.weight": packed, "out_proj.weight": w["wo"], "output_gate.weight": w["wg"],
               "norm.weight": w["gain"]}
    assert set(weights) == {n for n, _ in module.named_parameters()}
    return functional(module, weights, x[None], None, None)[0]


def deepseek(x, w, spec, place):
    T, C = x.shape
    d_rope, d_c, r_q = spec["qk-rope-dim"], spec["kv-lora-rank"], spec["q-lora-rank"]
    config = DeepseekV3Config(
        hidden_size=C, num_attention_heads=place.heads, num_key_value_heads=place.heads, q_lora_rank=r_q or None,
        kv_lora_rank=d_c, qk_nope_head_dim=spec["qk-nope-dim"], qk_rope_head_dim=d_rope, v_head_dim=spec["v-dim"],
        attention_bias=False, attn_implementation="sdpa")
    assert config.rope_interleave
    module = DeepseekV3Attention(config, 0).double().eval()
    ours = {"wdq": "q_a_proj", "gq": "q_a_layernorm", "wuq": "q_b_proj", "wq": "q_proj", "wdkv": "kv_a_proj_with_mqa",
            "gkv": "kv_a_layernorm", "wukv": "kv_b_proj", "wo": "o_proj"}
    weights = {f"{ours[n]}.weight": t for n, t in w.items()}
    assert set(weights) == {n for n, _ in module.named_parameters()}
    angle = torch.outer(torch.arange(T).double(), 10000.0 ** -(torch.arange(0, d_rope, 2).double() / max(d_rope, 1)))
    angle = torch.cat([angle, angle], -1)[None]
    mask = torch.ones(T, T, dtype=torch.bool).tril()[None, None]
    return functional(module, weights, x[None], (angle.cos(), angle.sin()), mask)[0]


def fla_recurrence(x, w, spec, place):
    """Only the recurrence is theirs; projections, norm and gate are written out again."""
    T, C = x.shape
    q, k, v = F.silu(F.linear(x, w["wqkv"])).view(1, T, 3, place.heads, C // place.heads).unbind(2)
    g = -slopes(spec, place.heads, place.layer, place.layers).expand(1, T, place.heads)
    scale = None if spec["decay"] == "fla" else 1.0  # None is their own 1/√hs
    o = fla_naive().naive_recurrent_simple_gla(q, k, v, g, scale=scale)[0].reshape(T, C)
    return F.linear(F.rms_norm(o, (C,), w["gain"], 1e-6) * torch.sigmoid(F.linear(x, w["wg"])), w["wo"])


def fla_naive():
    """The package's file of plain PyTorch, loaded by itself: the package wants a GPU."""
    root = importlib.util.find_spec("fla").submodule_search_locations[0]
    spec = importlib.util.spec_from_file_location("fla_naive", root + "/ops/simple_gla/naive.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def layer_neighbours(cfg, l, T):
    """[(name, function, expected agreement)] for layer l of a model whose longest sequence is T."""
    spec = cfg.attention[l]
    if spec["name"] == "causal":
        return [("torch scaled_dot_product_attention", sdpa, EXACT)]
    if spec["name"] == "infini" and spec["segment"] >= T and spec["first-segment"] == "pass":
        return [("torch scaled_dot_product_attention", sdpa, EXACT)]
    if spec["name"] == "lightning":
        fla = [("fla naive_recurrent_simple_gla", fla_recurrence, SINGLE)]
        return fla + [("transformers MiniMaxLightningAttention", minimax, SINGLE)] * (spec["decay"] == "minimax")
    if spec["name"] == "mla":
        return [("transformers DeepseekV3Attention", deepseek, SINGLE)]
    return []


def compare(cfg, run, params, batch, first):
    """Everything that applies to a case: [(neighbour, largest difference, expected agreement)]."""
    found = {"second forms of all layers, whole model": (second_forms(cfg, run, params, batch, first), EXACT)}
    if is_gpt2(cfg, run):
        found["transformers GPT2LMHeadModel, whole model"] = (gpt2(cfg, run, params, batch, first), EXACT)
    offsets = batch["offsets"]
    T = max(b - a for a, b in zip(offsets[:-1], offsets[1:]))
    for l in range(cfg.layers):
        prefix = f"h.{l}.attn."
        weights = {n[len(prefix):]: t for n, t in params.items() if n.startswith(prefix)}
        for name, neighbour, expected in layer_neighbours(cfg, l, T):
            seen = layer_difference(cfg, l, weights, neighbour, T)
            found[name] = max(found.get(name, (0, expected)), (seen, expected))
    if run.dropout > 0:
        found["masks word by word"] = (masks_by_word(cfg, run, T), 1e-15)
    return [(name, *figures) for name, figures in found.items()]


# ----------------------------------------------------------------------------------------------
# Dropout and the optimiser


def philox_in_integers(c, k):
    """The generator once more, in Python's own integers."""
    c, k = list(c), list(k)
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [b >> 32 ^ c[1] ^ k[0], b % 2**32, a >> 32 ^ c[3] ^ k[1], a % 2**32]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return c


def masks_by_word(cfg, run, T):
    """All masks of row 2, step 5, last layer, weight by weight from the definition."""
    row, step, layer, p = 2, 5, cfg.layers - 1, run.dropout
    key, last = (run.seed % 2**32, run.seed // 2**32), step * cfg.layers + layer

    def weight(c0, c1, c2, c3):
        return (philox_in_integers((c0 >> 2, c1, c2, c3), key)[c0 & 3] >= int(p * 2**32)) / (1 - p)

    dropout = Dropout(run, cfg, step)
    Z = [[[weight(j, i, row * cfg.heads + h, last) for j in range(T)] for i in range(T)] for h in range(cfg.heads)]
    worst = difference(dropout.attention(row, layer, T), torch.tensor(Z, dtype=torch.float64))
    for site in (EMBEDDING_SITE, ATTENTION_SITE, MLP_SITE):
        Z = [[weight(c, i, 2**32 - 1 - (3 * row + site), last) for c in range(cfg.channels)] for i in range(T)]
        ours = dropout.residual(torch.ones(T, cfg.channels, dtype=torch.float64), row, layer, site)
        worst = max(worst, difference(ours, torch.tensor(Z, dtype=torch.float64)))
    return worst


def check_philox():
    """Known answers: the two of the Random123 distribution besides zero have all bits set, and digits of π."""
    answers = {
        ((0, 0, 0, 0), (0, 0)): "6627e8d5 e169c58d bc57ac4c 9b00dbd8",
        ((2**32 - 1,) * 4, (2**32 - 1,) * 2): "408f276d 41c83b0e a20bc7c6 6d5451fd",
        ((0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344), (0xa4093822, 0x299f31d0)):
            "d16cfe09 94fdcceb 5001e420 24126ea1",
    }
    for (counter, key), answer in answers.items():
        assert " ".join(f"{int(w):08x}" for w in philox(counter, key)) == answer
        assert " ".join(f"{w:08x}" for w in philox_in_integers(counter, key)) == answer


def torch_adamw(params, cfg, run, batch, steps=10):
    """Ten steps by torch.optim.AdamW; clipping without torch's epsilon, as the model defines it."""
    params = {n: t.clone().requires_grad_() for n, t in params.items()}
    groups = [{"params": [p], "lr": rates(n, p, cfg, run)[0], "weight_decay": rates(n, p, cfg, run)[1]}
              for n, p in params.items()]
    optimizer = torch.optim.AdamW(groups, betas=(run.beta1, run.beta2), eps=run.eps)
    chunks, history = len(batch["tokens"]), []
    for t in range(steps):
        _, losses, grads = evaluate(params, cfg, run, batch, t * chunks)
        history.append(losses.mean().item())
        for n, p in params.items():
            p.grad = grads[n] * clip_scale(grads, run.grad_clip)
        optimizer.step()
    return history


def main(names):
    check_philox()
    print("philox: known answers")
    failures = 0
    for name in names or CASES:
        cfg, run, params, batch = build(CASES[name])
        for neighbour, seen, expected in compare(cfg, run, params, batch, evaluate(params, cfg, run, batch)):
            failures += not seen <= expected  # so that NaN fails
            print(f"{name:32} {neighbour:42} {seen:.1e}  {'ok' if seen <= expected else 'FAIL'}", flush=True)
    for name in ("causal_t1", "infini_carry", "infini_delta_one_gated", "mla_dropout", "lightning_b2_t10"):
        cfg, run, params, batch = build(CASES[name])
        ours, theirs = (torch.tensor(f(params, cfg, run, batch), dtype=torch.float64)
                        for f in (adamw_losses, torch_adamw))
        seen = difference(ours, theirs)
        failures += not seen <= EXACT
        print(f"{name:32} {'torch.optim.AdamW, ten losses':42} {seen:.1e}  {'ok' if seen <= EXACT else 'FAIL'}")
    print(f"transformers {transformers.__version__}, torch {torch.__version__}: {failures} failures")
    return 1 if failures else 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main(sys.argv[1:]))
