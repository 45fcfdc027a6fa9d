"""GPT-2 around the attention layers, its dropout masks, and ten steps of AdamW.

    x = wte[token] (+ wpe[position] when positions are learned), then per block
    x = x + drop(attention(LN1(x)));  x = x + drop(Wproj·GELU(Wfc·LN2(x) + bfc) + bproj)
    logits = LNf(x)·wteᵀ, the first V columns;  loss = mean cross entropy over targets ≥ 0

N tokens are packed; offsets (sequences + 1) say where each sequence begins. Parameters are a
dictionary from name to tensor. A document may be longer than a row: then the file has several
chunks, and what the attention layers remember goes from chunk to chunk without gradients.
"""

from dataclasses import dataclass

import numpy as np
import torch

from layers import FIRST, Place, linear, wide

LAYER_NORM_EPS = 1e-5
EMBEDDING_SITE, ATTENTION_SITE, MLP_SITE = 0, 1, 2


@dataclass
class Config:
    vocab_size: int
    max_seq: int
    layers: int
    heads: int
    channels: int
    positions: str    # learned, rope or none
    attention: list   # per layer a dictionary: "name" and the layer's options

    @property
    def padded_vocab_size(self):
        return (self.vocab_size + 127) // 128 * 128


@dataclass
class Run:
    dropout: float
    seed: int
    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    grad_clip: float
    carry_memory: bool


def parameter_shapes(cfg):
    C = cfg.channels
    shapes = {"wte": (cfg.padded_vocab_size, C)}
    if cfg.positions == "learned":
        shapes["wpe"] = (cfg.max_seq, C)
    for l, spec in enumerate(cfg.attention):
        block = {"ln1.w": (C,), "ln1.b": (C,)}
        block.update({"attn." + n: s for n, s in attention_shapes(cfg, spec).items()})
        block.update({"ln2.w": (C,), "ln2.b": (C,), "mlp.wfc": (4 * C, C), "mlp.bfc": (4 * C,),
                      "mlp.wproj": (C, 4 * C), "mlp.bproj": (C,)})
        shapes.update({f"h.{l}.{n}": s for n, s in block.items()})
    return {**shapes, "lnf.w": (C,), "lnf.b": (C,)}


def attention_shapes(cfg, spec):
    C, NH = cfg.channels, cfg.heads
    if spec["name"] == "lightning":
        return {"wqkv": (3 * C, C), "gain": (C,), "wg": (C, C), "wo": (C, C)}
    if spec["name"] == "mla":
        r_q, d_c = spec["q-lora-rank"], spec["kv-lora-rank"]
        d_nope, d_rope, d_v = spec["qk-nope-dim"], spec["qk-rope-dim"], spec["v-dim"]
        d_qk = d_nope + d_rope
        query = {"wdq": (r_q, C), "gq": (r_q,), "wuq": (NH * d_qk, r_q)} if r_q else {"wq": (NH * d_qk, C)}
        return {**query, "wdkv": (d_c + d_rope, C), "gkv": (d_c,),
                "wukv": (NH * (d_nope + d_v), d_c), "wo": (C, NH * d_v)}
    rows = (NH + 2 * spec["kv-heads"]) * (C // NH)
    shapes = {"wqkv": (rows, C), "bqkv": (rows,), "wo": (C, C), "bo": (C,)}
    return {**shapes, "beta": (NH,)} if spec["name"] == "infini" else shapes


# ----------------------------------------------------------------------------------------------
# Dropout: a weight is kept iff its 32-bit word is ≥ floor(p·2³²), and then scaled by 1/(1−p).
# The words are those of Philox 4x32-10 (Salmon et al., SC 2011) at counters that name the place.


def philox(counter, key):
    """Four words for each counter; counter: four integers or integer arrays, key: two words."""
    c0, c1, c2, c3 = (np.asarray(c, dtype=np.uint64) for c in np.broadcast_arrays(*counter))
    k0, k1 = key
    low, shift = np.uint64(0xFFFFFFFF), np.uint64(32)
    for _ in range(10):
        # 32×32-bit products fit 64 bits.
        p0, p1 = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c1, c2, c3 = ((p1 >> shift) ^ c1 ^ np.uint64(k0), p1 & low,
                          (p0 >> shift) ^ c3 ^ np.uint64(k1), p0 & low)
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c0, c1, c2, c3


class Dropout:
    """The masks of one forward pass; step counts forward passes from 0."""

    def __init__(self, run, cfg, step):
        self.p, self.step, self.cfg = run.dropout, step, cfg
        self.key = (run.seed & 0xFFFFFFFF, run.seed >> 32)

    def weights(self, last, c1, c2, layer):
        """Counter (last>>2, c1, c2, step·L + layer), word last&3 -> 0 or 1/(1−p)."""
        words = philox((last >> 2, c1, c2, self.step * self.cfg.layers + layer), self.key)
        word = np.choose(np.broadcast_arrays(last, c1, c2)[0] & 3, words)
        kept = word >= np.uint64(int(self.p * 2**32))
        return torch.from_numpy(kept / (1 - self.p))

    def attention(self, row, layer, T):
        if self.p == 0:
            return None
        h, i, j = np.ogrid[:self.cfg.heads, :T, :T]
        return self.weights(j, i, row * self.cfg.heads + h, layer)

    def residual(self, x, row, layer, site):
        """x (T, C) of sequence `row`, after dropout."""
        if self.p == 0:
            return x
        i, channel = np.ogrid[:x.shape[0], :x.shape[1]]
        return x * self.weights(channel, i, 2**32 - 1 - (3 * row + site), layer).to(x.dtype)


# ----------------------------------------------------------------------------------------------
# The model


def layer_norm(x, weight, bias):
    u = wide(x)
    centred = u - u.mean(-1, keepdim=True)
    variance = (centred * centred).mean(-1, keepdim=True)
    return (centred / torch.sqrt(variance + LAYER_NORM_EPS) * wide(weight) + wide(bias)).to(x.dtype)


def gelu(x):
    u = wide(x)
    return (0.5 * u * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (u + 0.044715 * u**3)))).to(x.dtype)


def block(x, w, cfg, l, row, dropout, state, forms):
    spec = cfg.attention[l]
    place = Place(cfg.heads, l, cfg.layers, cfg.positions == "rope", dropout.attention(row, l, len(x)))
    attention_weights = {n[5:]: t for n, t in w.items() if n.startswith("attn.")}
    y, state = forms[spec["name"]](layer_norm(x, w["ln1.w"], w["ln1.b"]), attention_weights, spec, place, state)
    x = x + dropout.residual(y, row, l, ATTENTION_SITE)
    hidden = gelu(linear(layer_norm(x, w["ln2.w"], w["ln2.b"]), w["mlp.wfc"], w["mlp.bfc"]))
    y = linear(hidden, w["mlp.wproj"], w["mlp.bproj"])
    return x + dropout.residual(y, row, l, MLP_SITE), state


def sequence_logits(params, cfg, tokens, row, dropout, states, forms):
    """One sequence: tokens (T,) -> logits (T, V), and the layers' new states."""
    x = params["wte"][tokens]
    if cfg.positions == "learned":
        x = x + params["wpe"][:len(tokens)]
    x = dropout.residual(x, row, 0, EMBEDDING_SITE)
    new_states = []
    for l in range(cfg.layers):
        prefix = f"h.{l}."
        w = {n[len(prefix):]: t for n, t in params.items() if n.startswith(prefix)}
        x, state = block(x, w, cfg, l, row, dropout, states[l], forms)
        new_states.append(state)
    x = layer_norm(x, params["lnf.w"], params["lnf.b"])
    return linear(x, params["wte"])[:, :cfg.vocab_size], new_states


def forward(params, cfg, tokens, offsets, dropout, states, forms):
    """One chunk: tokens (N,) -> logits (N, V), states per sequence."""
    logits, new_states = [], []
    for row, (begin, end) in enumerate(zip(offsets[:-1], offsets[1:])):
        state = states[row] if states else [None] * cfg.layers
        if end > begin:
            y, state = sequence_logits(params, cfg, tokens[begin:end], row, dropout, state, forms)
            logits.append(y)
        new_states.append(state)
    return torch.cat(logits), new_states


def cross_entropy(logits, targets):
    counted = targets >= 0
    log_p = torch.log_softmax(wide(logits)[counted], -1)
    return -log_p.gather(1, targets[counted][:, None]).mean()


def detached(state):
    if isinstance(state, torch.Tensor):
        return state.detach()
    if isinstance(state, dict):
        return {k: detached(v) for k, v in state.items()}
    if isinstance(state, list):
        return [detached(s) for s in state]
    return state


def losses_of_chunks(params, cfg, run, batch, first_step=0, forms=FIRST):
    """batch: tokens and targets (chunks, N), offsets -> logits (chunks, N, V), losses (chunks)."""
    states, logits, losses = None, [], []
    for chunk, (tokens, targets) in enumerate(zip(batch["tokens"], batch["targets"])):
        dropout = Dropout(run, cfg, first_step + chunk)
        y, states = forward(params, cfg, tokens, batch["offsets"], dropout, states, forms)
        states = detached(states) if run.carry_memory else None
        logits.append(y)
        losses.append(cross_entropy(y, targets))
    return torch.stack(logits), torch.stack(losses)


def evaluate(params, cfg, run, batch, first_step=0, forms=FIRST):
    """-> logits, losses per chunk, gradients of the chunks' mean loss by name."""
    params = {n: t.detach().clone().requires_grad_() for n, t in params.items()}
    logits, losses = losses_of_chunks(params, cfg, run, batch, first_step, forms)
    losses.mean().backward()
    grads = {n: torch.zeros_like(t) if t.grad is None else t.grad for n, t in params.items()}
    return logits.detach(), losses.detach(), grads


# ----------------------------------------------------------------------------------------------
# AdamW with decoupled decay, after clipping by the norm over all parameters


def clip_scale(grads, clip):
    norm = sum((g * g).sum() for g in grads.values()).sqrt()
    return clip / norm if clip > 0 and norm > clip else 1.0


def rates(name, tensor, cfg, run):
    """Learning rate and decay: Infini's β has a rate of its own; only matrices decay."""
    if name.endswith(".beta"):
        return run.lr * cfg.attention[int(name.split(".")[1])]["gate-lr"], 0.0
    return run.lr, run.weight_decay if tensor.dim() == 2 else 0.0


def adamw_losses(params, cfg, run, batch, steps=10):
    """The loss before each of `steps` updates on the same batch; params stay as they are."""
    params = {n: t.clone() for n, t in params.items()}
    m = {n: torch.zeros_like(t) for n, t in params.items()}
    v = {n: torch.zeros_like(t) for n, t in params.items()}
    chunks, history = len(batch["tokens"]), []
    for t in range(1, steps + 1):
        _, losses, grads = evaluate(params, cfg, run, batch, (t - 1) * chunks)
        history.append(losses.mean().item())
        scale = clip_scale(grads, run.grad_clip)
        for name, p in params.items():
            lr, decay = rates(name, p, cfg, run)
            g = grads[name] * scale
            m[name] = run.beta1 * m[name] + (1 - run.beta1) * g
            v[name] = run.beta2 * v[name] + (1 - run.beta2) * g * g
            m_hat, v_hat = m[name] / (1 - run.beta1**t), v[name] / (1 - run.beta2**t)
            params[name] = p * (1 - lr * decay) - lr * m_hat / (v_hat.sqrt() + run.eps)
    return history
