"""The four attention layers, for one sequence at a time, as plainly as they can be written.

Every layer is a function
    y, state = layer(x, w, options, place, state)
with x (T, C) the first LayerNorm's output, w the layer's weights by name, options the layer's
own dictionary, place what the model knows (class Place), and state what the layer hands from
one chunk of a document to the next (None at a document's start; causal and MLA have none).
A linear weight is (out, in): y = x Wᵀ. Symbols: T time, C channels, NH heads, KV heads of keys
and values, hs = C/NH, ⊙ elementwise. Gradients come from autograd, nowhere by hand.

Each layer stands here twice, in forms with different arithmetic: FIRST writes the reference
outputs, SECOND must give the same loss, logits and gradients.
    causal     matrices over the whole sequence     one query and one head at a time
    infini     segment by segment                   token by token
    lightning  token by token                       chunk by chunk, within a chunk quadratic
    mla        keys and values spelled out          absorbed: attention over the latents

The same text runs in float64 (the reference) and in bfloat16 (how far rounding alone goes): with
bfloat16 inputs, softmax, recurrences, memories and statistics are float32, see wide().
"""

from dataclasses import dataclass

import torch

RMS_EPS = 1e-6
INFINI_EPS = 1e-6
SECOND_FORM_CHUNK = 5  # lightning's second form; small, so that every case has several chunks


@dataclass
class Place:
    """Where a layer stands, and what does not belong to it alone."""
    heads: int
    layer: int           # index from 0
    layers: int
    rotate: bool         # causal and Infini apply rotary positions
    keep: object = None  # (NH, T, T) dropout weights Z, 0 or 1/(1-p); None without dropout


def wide(x):
    """Softmax, memories, statistics and long sums are float32 when the storage is bfloat16."""
    return x.float() if x.dtype == torch.bfloat16 else x


def linear(x, weight, bias=None):
    y = x @ weight.T
    return y if bias is None else y + bias


def rms_norm(x, gain):
    u = wide(x)
    r = 1 / torch.sqrt((u * u).mean(-1, keepdim=True) + RMS_EPS)
    return (u * r * wide(gain)).to(x.dtype)


def rotate(x, positions):
    """Rotary positions on the last dimension of x (T, heads, d): pairs (2i, 2i+1), angle
    position * 10000^(-2i/d). An empty dimension stays empty."""
    d = x.shape[-1]
    frequency = 10000.0 ** (-2 * torch.arange(d // 2, dtype=torch.float64) / max(d, 1))
    angle = (positions.double()[:, None] * frequency)[:, None, :]
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)


def softmax_attention(q, k, v, scale, visible, keep=None):
    """q (Tq, NH, d), k (Tk, NH, d), v (Tk, NH, dv), visible (Tq, Tk) -> (Tq, NH, dv)."""
    s = torch.einsum("ihd,jhd->hij", q, k) * scale
    p = torch.softmax(s.masked_fill(~visible, float("-inf")), -1)
    if keep is not None:
        p = p * keep.to(p.dtype)
    return torch.einsum("hij,jhd->ihd", p, v)


def split_qkv(x, w, heads, kv_heads):
    """Rows of Wqkv: NH·hs for q, KV·hs for k, KV·hs for v -> (T, NH|KV, hs) each, widened."""
    T, C = x.shape
    hs = C // heads
    y = wide(linear(x, w["wqkv"], w.get("bqkv")))
    q, k, v = y.split([heads * hs, kv_heads * hs, kv_heads * hs], -1)
    return q.view(T, heads, hs), k.view(T, kv_heads, hs), v.view(T, kv_heads, hs)


def kv_head_of(heads, kv_heads):
    """The kv head that each query head reads."""
    return torch.arange(heads) * kv_heads // heads


# ----------------------------------------------------------------------------------------------
# Causal
#   s_ij = q_i·k_j/√hs for i−window < j ≤ i (window 0: no lower end)
#   y = concat_h((softmax(s) ⊙ Z) v)·Woᵀ + bo


def causal(x, w, options, place, state=None):
    T, C = x.shape
    q, k, v = split_qkv(x, w, place.heads, options["kv-heads"])
    t = torch.arange(T)
    if place.rotate:
        q, k = rotate(q, t), rotate(k, t)
    visible = t[None, :] <= t[:, None]
    if options["window"] > 0:
        visible &= t[None, :] > t[:, None] - options["window"]
    group = kv_head_of(place.heads, options["kv-heads"])
    o = softmax_attention(q, k[:, group], v[:, group], (C // place.heads) ** -0.5, visible, place.keep)
    return linear(o.reshape(T, C).to(x.dtype), w["wo"], w["bo"]), None


def causal_by_query(x, w, options, place, state=None):
    T, C = x.shape
    hs = C // place.heads
    q, k, v = split_qkv(x, w, place.heads, options["kv-heads"])
    rows = []
    for i in range(T):
        first = max(0, i + 1 - options["window"]) if options["window"] > 0 else 0
        row = []
        for h in range(place.heads):
            g = h // (place.heads // options["kv-heads"])
            # Rotating only q, by the distance to each key, gives the same product as rotating both.
            j = torch.arange(first, i + 1)
            q_ij = q[i, h].expand(len(j), hs)[:, None]
            q_ij = (rotate(q_ij, i - j) if place.rotate else q_ij)[:, 0]
            e = torch.exp((q_ij * k[j, g]).sum(-1) / hs ** 0.5)
            p = e / e.sum()
            if place.keep is not None:
                p = p * place.keep[h, i, j]
            row.append((p[:, None] * v[j, g]).sum(0))
        rows.append(torch.cat(row))
    return linear(torch.stack(rows).to(x.dtype), w["wo"], w["bo"]), None


# ----------------------------------------------------------------------------------------------
# Infini-attention, arXiv 2404.07143
#   Φ(x) = ELU(x)+1, g = sigmoid(β) per query head, memory M (hs×hs) and z (hs) per kv head.
#   For each segment of N tokens, in order:
#     R = (Φ(q)M) / (Φ(q)z + ε)              from what earlier segments wrote
#     D = causal attention inside the segment, rotary positions counted from its start
#     A = g⊙R + (1−g)⊙D                      option first-segment=pass: A = D before the first write
#     when it holds N tokens:  M += Φ(k)ᵀU,  z += Σ Φ(k_t)
#       memory-update linear  U = v
#       memory-update delta   U = v − (Φ(k)M)/(Φ(k)z + ε)
#   y = concat_h(A)·Woᵀ + bo.  M starts at 0, z at 1 or 0 (memory-init). The memory sees unrotated q, k.


def phi(x):
    return torch.where(x > 0, x + 1, torch.exp(torch.clamp(x, max=0.0)))


def read_memory(features, M, z):
    """features (t, heads, hs), M (heads, hs, hs), z (heads, hs) -> (t, heads, hs)."""
    numerator = torch.einsum("thd,hde->the", features, M)
    denominator = torch.einsum("thd,hd->th", features, z) + INFINI_EPS
    return numerator / denominator[..., None]


def empty_memory(kv_heads, hs, options, like):
    start = {"one": torch.ones, "zero": torch.zeros}[options["memory-init"]]
    return like.new_zeros(kv_heads, hs, hs), start(kv_heads, hs, dtype=like.dtype)


def infini(x, w, options, place, state=None):
    T, C = x.shape
    hs, N, group = C // place.heads, options["segment"], kv_head_of(place.heads, options["kv-heads"])
    q, k, v = split_qkv(x, w, place.heads, options["kv-heads"])
    if state is None:
        M, z = empty_memory(options["kv-heads"], hs, options, q)
        state = {"M": M, "z": z, "written": False, "k": k[:0], "v": v[:0]}
    M, z, written = state["M"], state["z"], state["written"]
    pending = len(state["k"])  # keys of the open segment, from the chunk before; always < N
    k, v = torch.cat([state["k"], k]), torch.cat([state["v"], v])
    g = torch.sigmoid(wide(w["beta"]))[None, :, None]
    rows = []
    for start in range(0, len(k), N):
        stop, first = min(start + N, len(k)), max(start, pending)
        q_s, k_s, v_s = q[first - pending:stop - pending], k[start:stop], v[start:stop]
        A = infini_local(q_s, k_s[:, group], v_s[:, group], first - start, place, first - pending)
        if written or options["first-segment"] == "gated":
            A = g * read_memory(phi(q_s), M[group], z[group]) + (1 - g) * A
        rows.append(A)
        if stop - start == N:
            U = v_s - read_memory(phi(k_s), M, z) if options["memory-update"] == "delta" else v_s
            M, z = M + torch.einsum("thd,the->hde", phi(k_s), U), z + phi(k_s).sum(0)
            written = True
    tail = len(k) - len(k) % N
    y = linear(torch.cat(rows).reshape(T, C).to(x.dtype), w["wo"], w["bo"])
    return y, {"M": M, "z": z, "written": written, "k": k[tail:], "v": v[tail:]}


def infini_local(q, k, v, offset, place, row):
    """Causal attention inside one segment; the first query stands at `offset` in it, and at `row`
    in the sequence (dropout counts positions in the sequence, not in the segment)."""
    i, j = torch.arange(len(q)) + offset, torch.arange(len(k))
    if place.rotate:
        q, k = rotate(q, i), rotate(k, j)
    keep = None
    if place.keep is not None:
        assert row >= offset, "dropout is not defined here on keys of an earlier chunk"
        keep = place.keep[:, row:row + len(q), row - offset:row - offset + len(k)]
    return softmax_attention(q, k, v, q.shape[-1] ** -0.5, j[None, :] <= i[:, None], keep)


def infini_by_token(x, w, options, place, state=None):
    """One token and one head after the other. M and z serve reading; `new` gathers what the open
    segment's tokens write, and replaces M and z when the segment holds N tokens."""
    T, C = x.shape
    heads, kv_heads, hs = place.heads, options["kv-heads"], C // place.heads
    q, k, v = split_qkv(x, w, heads, kv_heads)
    g = torch.sigmoid(wide(w["beta"]))
    if state is None:
        M, z = empty_memory(kv_heads, hs, options, q)
        state = {"M": M, "z": z, "new_M": M, "new_z": z, "segments": 0, "k": [], "v": []}
    s = dict(state)
    rows = []
    for t in range(T):
        fk = torch.where(k[t] > 0, k[t], torch.expm1(k[t])) + 1
        fq = torch.where(q[t] > 0, q[t], torch.expm1(q[t])) + 1
        s["k"], s["v"] = s["k"] + [k[t]], s["v"] + [v[t]]
        row = []
        for h in range(heads):
            u = h // (heads // kv_heads)
            D = infini_token_local(q[t, h], [key[u] for key in s["k"]], [value[u] for value in s["v"]],
                                   place, h, t)
            R = (fq[h] @ s["M"][u]) / (fq[h] @ s["z"][u] + INFINI_EPS)
            passes = options["first-segment"] == "pass" and s["segments"] == 0
            row.append(D if passes else g[h] * R + (1 - g[h]) * D)
        rows.append(torch.cat(row))
        write = []
        for u in range(kv_heads):
            old = (fk[u] @ s["M"][u]) / (fk[u] @ s["z"][u] + INFINI_EPS)
            write.append(torch.outer(fk[u], v[t, u] - old if options["memory-update"] == "delta" else v[t, u]))
        s["new_M"], s["new_z"] = s["new_M"] + torch.stack(write), s["new_z"] + fk
        if len(s["k"]) == options["segment"]:
            s.update(M=s["new_M"], z=s["new_z"], segments=s["segments"] + 1, k=[], v=[])
    return linear(torch.stack(rows).to(x.dtype), w["wo"], w["bo"]), s


def infini_token_local(q, keys, values, place, h, t):
    """Local attention of one query at sequence position t, the last of the open segment."""
    n = len(keys)
    weights = []
    for j in range(n):
        q_j = rotate(q[None, None], torch.tensor([n - 1 - j]))[0, 0] if place.rotate else q
        weights.append(torch.exp(q_j @ keys[j] / len(q) ** 0.5))
    total = sum(weights)
    kept = [1.0] * n if place.keep is None else place.keep[h, t, t - n + 1:t + 1].tolist()
    return sum(weights[j] / total * kept[j] * values[j] for j in range(n))


# ----------------------------------------------------------------------------------------------
# Lightning attention, arXiv 2401.04658 and 2501.08313
#   q, k, v = SiLU(x·Wqkvᵀ);  S_t = e^{−s}·S_{t−1} + k_tᵀv_t;  o_t = c·q_t S_t, decay s per head
#   y = (RMSNorm(concat_h(o); gain) ⊙ sigmoid(x·Wgᵀ))·Woᵀ


def slopes(options, heads, layer, layers):
    """Decay s of each head."""
    h = torch.arange(heads, dtype=torch.float64)
    if options["decay"] == "minimax":
        return 2 ** (-8 * (h + 1) / heads) * (1 - layer / (layers - 1 + 1e-5) + 1e-5)
    if options["decay"] == "fla":
        return 8 * h / heads * (1 - layer / layers)
    return torch.zeros(heads, dtype=torch.float64)


def lightning_inputs(x, w, options, place):
    hs = x.shape[1] // place.heads
    y = linear(x, w["wqkv"])
    y = (wide(y) * torch.sigmoid(wide(y))).to(x.dtype)
    q, k, v = wide(y).view(len(x), 3, place.heads, hs).unbind(1)
    s = slopes(options, place.heads, place.layer, place.layers).to(q.dtype)
    return q, k, v, s, hs ** -0.5 if options["decay"] == "fla" else 1.0


def lightning_outputs(x, o, w):
    normed = rms_norm(o.reshape(x.shape).to(x.dtype), w["gain"])
    gate = torch.sigmoid(wide(linear(x, w["wg"])))
    return linear((wide(normed) * gate).to(x.dtype), w["wo"])


def lightning(x, w, options, place, state=None):
    q, k, v, s, c = lightning_inputs(x, w, options, place)
    S = q.new_zeros(place.heads, q.shape[2], q.shape[2]) if state is None else state
    decay = torch.exp(-s)[:, None, None]
    rows = []
    for t in range(len(x)):
        S = decay * S + k[t][:, :, None] * v[t][:, None, :]
        rows.append(c * (q[t][:, :, None] * S).sum(1))
    return lightning_outputs(x, torch.stack(rows), w), S


def lightning_by_chunk(x, w, options, place, state=None):
    q, k, v, s, c = lightning_inputs(x, w, options, place)
    S = q.new_zeros(place.heads, q.shape[2], q.shape[2]) if state is None else state
    rows = []
    for q_c, k_c, v_c in zip(*(y.split(SECOND_FORM_CHUNK) for y in (q, k, v))):
        n = len(q_c)
        i = torch.arange(n)
        distance = (i[:, None] - i[None, :]).to(q.dtype)
        exponent = torch.where(distance >= 0, -s[:, None, None] * distance, -torch.inf)
        P = torch.einsum("ihd,jhd->hij", q_c, k_c) * torch.exp(exponent)
        a, b = torch.exp(-s * (i[:, None] + 1)), torch.exp(-s * (n - 1 - i[:, None]))
        rows.append(c * (torch.einsum("hij,jhd->ihd", P, v_c) +
                         torch.einsum("ih,ihd,hde->ihe", a, q_c, S)))
        S = torch.exp(-s * n)[:, None, None] * S + torch.einsum("ih,ihd,ihe->hde", b, k_c, v_c)
    return lightning_outputs(x, torch.cat(rows), w), S


# ----------------------------------------------------------------------------------------------
# Multi-head latent attention, arXiv 2405.04434
#   cq = RMSNorm(x·Wdqᵀ; gq), q = cq·Wuqᵀ  (q-lora-rank 0: q = x·Wqᵀ)   per head [nope | rope]
#   u = x·Wdkvᵀ, c = RMSNorm(u[:d_c]; gkv), kr = rotate(u[d_c:]), one for all heads
#   kv = c·Wukvᵀ                                                        per head [k_nope | v]
#   s_ij = (qn_i·kn_j + qr_i·kr_j)/√(d_nope+d_rope), j ≤ i;  y = concat_h((softmax(s)⊙Z) v)·Woᵀ


def mla_inputs(x, w, options, place):
    """-> qn (T, NH, d_nope), qr (T, NH, d_rope) rotated, c (T, d_c), kr (T, 1, d_rope) rotated."""
    T, t = len(x), torch.arange(len(x))
    d_nope, d_rope = options["qk-nope-dim"], options["qk-rope-dim"]
    if options["q-lora-rank"] > 0:
        q = linear(rms_norm(linear(x, w["wdq"]), w["gq"]), w["wuq"])
    else:
        q = linear(x, w["wq"])
    qn, qr = wide(q).view(T, place.heads, d_nope + d_rope).split([d_nope, d_rope], -1)
    latent, kr = linear(x, w["wdkv"]).split([options["kv-lora-rank"], d_rope], -1)
    return qn, rotate(qr, t), rms_norm(latent, w["gkv"]), rotate(wide(kr)[:, None], t)


def mla(x, w, options, place, state=None):
    T, t = len(x), torch.arange(len(x))
    d_nope, d_rope, d_v = options["qk-nope-dim"], options["qk-rope-dim"], options["v-dim"]
    qn, qr, c, kr = mla_inputs(x, w, options, place)
    kv = wide(linear(c, w["wukv"])).view(T, place.heads, d_nope + d_v)
    q = torch.cat([qn, qr], -1)
    k = torch.cat([kv[..., :d_nope], kr.expand(T, place.heads, d_rope)], -1)
    o = softmax_attention(q, k, kv[..., d_nope:], (d_nope + d_rope) ** -0.5,
                          t[None, :] <= t[:, None], place.keep)
    return linear(o.reshape(T, place.heads * d_v).to(x.dtype), w["wo"]), None


def mla_absorbed(x, w, options, place, state=None):
    """Wuk goes into the query and Wuv behind the softmax, so that only c and kr are attended to."""
    T, d_nope, d_v = len(x), options["qk-nope-dim"], options["v-dim"]
    qn, qr, c, kr = mla_inputs(x, w, options, place)
    wuk, wuv = wide(w["wukv"]).view(place.heads, d_nope + d_v, -1).split([d_nope, d_v], 1)
    rows = []
    for i in range(T):
        latents = wide(c)[:i + 1]
        scores = (qn[i, :, None] @ wuk)[:, 0] @ latents.T + qr[i] @ kr[:i + 1, 0].T
        p = torch.softmax(scores / (d_nope + options["qk-rope-dim"]) ** 0.5, -1)
        if place.keep is not None:
            p = p * place.keep[:, i, :i + 1]
        rows.append((wuv @ (p @ latents)[:, :, None]).flatten())
    return linear(torch.stack(rows).to(x.dtype), w["wo"]), None


FIRST = {"causal": causal, "infini": infini, "lightning": lightning, "mla": mla}
SECOND = {"causal": causal_by_query, "infini": infini_by_token,
          "lightning": lightning_by_chunk, "mla": mla_absorbed}
