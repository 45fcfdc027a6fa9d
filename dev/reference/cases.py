"""The cases: which models, inputs and options the reference outputs cover.

CASES is the table; build(case) draws its parameters, tokens and targets from a generator seeded
with the case's name, so that adding a case changes no other. Parameters are rounded to bfloat16:
float64 here and bfloat16 or float32 elsewhere then start from the same numbers.
"""

import json
import zlib
from dataclasses import asdict, dataclass, field

import numpy as np
import torch

from model import Config, Run, parameter_shapes

DEFAULTS = {
    "causal": {"kv-heads": None, "window": 0},
    "infini": {"kv-heads": None, "segment": None, "memory-update": "linear", "memory-init": "one",
               "first-segment": "pass", "gate-lr": 30.0},
    "lightning": {"decay": "minimax"},
    "mla": {"q-lora-rank": 0, "kv-lora-rank": None, "qk-nope-dim": None, "qk-rope-dim": None, "v-dim": None},
}
RAGGED = (3, 0, 1, 17, 64)


@dataclass
class Case:
    name: str
    attention: list           # specification strings, unnamed options at their defaults
    channels: int
    heads: int
    lengths: tuple            # of the sequences
    positions: str = ""       # empty: learned iff every layer is causal, else rope
    vocab: int = 29
    spare_positions: int = 0  # rows of wpe that no token reads
    chunks: int = 1
    ignored: float = 0.0      # share of targets that are −1
    run: dict = field(default_factory=dict)
    scale: dict = field(default_factory=dict)  # last part of a parameter's name -> factor, a power of two
    query_bias: tuple = ()    # added to the query part of bqkv, per head


def case(name, attention, C, NH, lengths, **more):
    return Case(name, attention.split(), C, NH, tuple(lengths), **more)


def causal_cases():
    small, grouped = dict(C=8, NH=2, lengths=(13, 13)), dict(C=16, NH=4, lengths=(13, 13))
    return [
        case("causal_hs64", "causal", 64, 1, (67,), run=GENTLE, spare_positions=3),
        case("causal_hs128", "causal", 128, 1, (65,), run=GENTLE, positions="rope"),
        case("causal_b2_t10", "causal causal", 64, 8, (10, 10), vocab=50, run=PLAIN_ADAM),
        case("causal_rope", "causal", **grouped, positions="rope"),
        case("causal_none", "causal", **small, positions="none"),
        case("causal_kv1_rope", "causal:kv-heads=1", **grouped, positions="rope"),
        case("causal_kv2", "causal:kv-heads=2", **grouped),
        case("causal_window1_rope", "causal:window=1", **small, positions="rope"),
        case("causal_window4_rope", "causal:window=4", **small, positions="rope"),
        case("causal_window5_kv2", "causal:window=5:kv-heads=2", **grouped),
        case("causal_window_over_t", "causal:window=40", **small),
        case("causal_dropout", "causal causal", **small, run=dict(dropout=0.1)),
        case("causal_dropout_window_ragged", "causal:window=6:kv-heads=2", 16, 4, (5, 0, 1, 19),
             positions="rope", run=dict(dropout=0.3, seed=7)),
        case("causal_tiny_input", "causal", **small, scale={"wte": 2**-8, "wpe": 2**-8}),
        case("causal_t1", "causal", 8, 2, (1,), spare_positions=2),
        case("causal_ragged", "causal", 8, 2, RAGGED, ignored=0.2),
    ]


def infini_cases():
    small, grouped = dict(C=8, NH=2, lengths=(13, 13)), dict(C=16, NH=4, lengths=(13, 13))
    return [
        case("infini_hs64", "infini:segment=16", 64, 1, (67,), run=GENTLE),
        case("infini_hs128", "infini:segment=32", 128, 1, (65,), run=GENTLE),
        case("infini_b2_t10", "infini:segment=4 infini:segment=4", 64, 8, (10, 10), vocab=50, run=PLAIN_ADAM),
        case("infini_learned", "infini:segment=4", **grouped, positions="learned", spare_positions=3),
        case("infini_none", "infini:segment=4", **small, positions="none"),
        case("infini_kv1", "infini:segment=4:kv-heads=1", **grouped),
        case("infini_kv2_delta", "infini:segment=5:kv-heads=2:memory-update=delta", **grouped),
        *[case(f"infini_{update}_{init}_{first}", f"infini:segment=4:memory-update={update}:"
               f"memory-init={init}:first-segment={first}", **small)
          for update in ("linear", "delta") for init in ("one", "zero") for first in ("pass", "gated")],
        case("infini_segment_over_t", "infini:segment=20", **small),
        case("infini_segment_over_t_gated", "infini:segment=20:first-segment=gated", **small),
        case("infini_segment1", "infini:segment=1", **small),
        case("infini_segment1_delta", "infini:segment=1:memory-update=delta", **small),
        # Φ(q) near ε in head 0; in head 1 it is zero in float32.
        case("infini_tiny_features", "infini:segment=4", **small, query_bias=(-14, -110)),
        case("infini_segment_divides_t", "infini:segment=4", 8, 2, (12, 12)),
        case("infini_dropout", "infini:segment=5 infini:segment=5", **small, run=dict(dropout=0.2)),
        case("infini_t1", "infini:segment=4", 8, 2, (1,)),
        case("infini_ragged", "infini:segment=8", 8, 2, RAGGED, ignored=0.2),
        case("infini_ragged_delta", "infini:segment=16:memory-update=delta", 8, 2, RAGGED, ignored=0.2),
        case("infini_carry", "infini:segment=4 infini:segment=4", 8, 2, (10, 10), chunks=3, run=CARRY),
        case("infini_carry_delta", "infini:segment=5:memory-update=delta:kv-heads=2:first-segment=gated",
             8, 4, (7, 7), chunks=3, run=CARRY),
        case("infini_carry_ragged", "infini:segment=6:memory-init=zero", 8, 2, (5, 0, 1, 9), chunks=4, run=CARRY),
    ]


def lightning_cases():
    small = dict(C=8, NH=4, lengths=(13, 13))
    return [
        case("lightning_hs64", "lightning", 64, 1, (67,), run=GENTLE),
        case("lightning_hs128", "lightning", 128, 1, (65,), run=GENTLE),
        case("lightning_b2_t10", "lightning lightning", 64, 8, (10, 10), vocab=50, run=PLAIN_ADAM),
        case("lightning_minimax", "lightning lightning lightning", **small),
        case("lightning_fla", "lightning:decay=fla lightning:decay=fla", **small),
        case("lightning_none", "lightning:decay=none", 8, 2, (13, 13)),
        case("lightning_heads3", "lightning", 12, 3, (9,)),
        case("lightning_learned", "lightning", 8, 2, (13,), positions="learned"),
        case("lightning_dropout", "lightning lightning", 16, 2, (13, 13), run=dict(dropout=0.1)),
        case("lightning_tiny_output", "lightning", 8, 2, (13,), scale={"wqkv": 2**-4}),
        case("lightning_t1", "lightning", 8, 2, (1,)),
        case("lightning_ragged", "lightning", 8, 2, RAGGED, ignored=0.2),
        case("lightning_carry", "lightning lightning", 8, 2, (10, 10), chunks=3, run=CARRY),
        case("lightning_carry_ragged", "lightning:decay=fla", 8, 2, (5, 0, 1, 9), chunks=3, run=CARRY),
    ]


def mla_spec(r_q, d_c, d_nope, d_rope, d_v):
    return f"mla:q-lora-rank={r_q}:kv-lora-rank={d_c}:qk-nope-dim={d_nope}:qk-rope-dim={d_rope}:v-dim={d_v}"


def mla_cases():
    small, plain = dict(C=8, NH=4, lengths=(13, 13)), mla_spec(0, 6, 4, 2, 4)
    return [
        case("mla_hs64", mla_spec(0, 24, 64, 32, 64), 32, 2, (67,), run=GENTLE),
        case("mla_hs128", mla_spec(16, 16, 128, 64, 128), 32, 2, (65,), run=GENTLE),
        case("mla_b2_t10", mla_spec(0, 32, 8, 4, 8) + " " + mla_spec(24, 32, 8, 4, 8), 64, 8, (10, 10),
             vocab=50, run=PLAIN_ADAM),
        case("mla_query_latent", mla_spec(10, 6, 4, 2, 4), **small),
        case("mla_no_query_latent", plain + " " + mla_spec(0, 10, 6, 4, 8), **small),
        case("mla_no_rope", mla_spec(0, 6, 4, 0, 4), **small),
        case("mla_no_nope", mla_spec(0, 6, 0, 4, 4), **small),
        case("mla_no_nope_query_latent", mla_spec(10, 6, 0, 4, 6), **small),
        case("mla_heads3", mla_spec(8, 12, 4, 2, 6), 12, 3, (9, 9)),
        case("mla_heads5", mla_spec(0, 9, 6, 2, 3), 10, 5, (9,)),
        case("mla_learned", plain, **small, positions="learned", spare_positions=2),
        case("mla_dropout", plain + " " + mla_spec(8, 6, 4, 2, 4), **small, run=dict(dropout=0.25)),
        case("mla_tiny_latents", mla_spec(8, 6, 4, 2, 4), **small, scale={"wdq": 2**-10, "wdkv": 2**-10}),
        case("mla_t1", mla_spec(6, 6, 4, 2, 4), 8, 2, (1,)),
        case("mla_ragged", plain, 8, 2, RAGGED, ignored=0.2),
    ]


def hybrid_cases():
    mla = mla_spec(0, 6, 4, 2, 4)
    return [
        case("hybrid_lightning_causal", "lightning causal", 8, 2, (13, 13)),
        case("hybrid_infini_window", "infini:segment=3 causal:window=4", 8, 2, (13, 13)),
        case("hybrid_mla_infini", mla + " infini:segment=4:memory-update=delta", 8, 2, (13, 13)),
        case("hybrid_all_dropout", f"causal:kv-heads=1 infini:segment=5:gate-lr=1 lightning {mla}", 8, 2, (5, 0, 12),
             ignored=0.1, run=dict(dropout=0.1, seed=2**40 + 3)),
        case("hybrid_carry", f"infini:segment=4 causal lightning {mla}", 8, 2, (7, 7), chunks=3, run=CARRY),
    ]


# Seeds stay under 2^53, so that a parser that keeps numbers as doubles reads them exactly.
USUAL = dict(dropout=0.0, seed=1234567890123456, lr=3e-3, beta1=0.9, beta2=0.95, eps=1e-8,
             weight_decay=0.1, grad_clip=1.0, carry_memory=False)
PLAIN_ADAM = dict(beta2=0.999, eps=1e-6, weight_decay=0.01, grad_clip=0.0, lr=1e-3)
GENTLE = dict(lr=1e-3)  # at the wide layers 3e-3 makes ten steps chaotic
CARRY = dict(carry_memory=True)
CASES = {c.name: c for c in causal_cases() + infini_cases() + lightning_cases() + mla_cases() + hybrid_cases()}


# ----------------------------------------------------------------------------------------------
# From a case to numbers


def resolve(spec, heads):
    """`name:option=value:…` -> dictionary with every option set."""
    name, *settings = spec.split(":")
    options = dict(DEFAULTS[name])
    for setting in settings:
        key, value = setting.split("=")
        assert key in options, f"{name} has no option {key}"
        options[key] = value if isinstance(options[key], str) else float(value) if key == "gate-lr" else int(value)
    if options.get("kv-heads", 0) is None:
        options["kv-heads"] = heads
    assert None not in options.values(), f"{spec}: an option without default is missing"
    return {"name": name, **options}


def specification(options):
    """The inverse of resolve(); a whole gate-lr is written without a point."""
    rest = [f"{k}={v:g}" if isinstance(v, float) else f"{k}={v}" for k, v in options.items() if k != "name"]
    return ":".join([options["name"], *rest])


def draw_parameters(case_, cfg, rng):
    """Large enough that softmax is far from uniform and every gradient counts; norm gains around 1,
    no bias zero, β from −1 to 1.5 over the heads, padding rows of wte zero; then the case's own
    scale and query_bias, which bring the epsilons of norms and memories into play."""
    params = {}
    for name, shape in parameter_shapes(cfg).items():
        n, leaf = rng.standard_normal(shape), name.split(".")[-1]
        if leaf in ("w", "gain", "gq", "gkv"):
            value = 1 + 0.2 * n
        elif leaf == "beta":
            value = np.linspace(-1, 1.5, shape[0]) + 0.1 * n
        elif leaf == "wpe":
            value = 0.3 * n
        elif len(shape) == 1:
            value = 0.2 * n
        else:
            value = n * {"wte": 1.0, "wo": 0.7, "wproj": 0.7, "wfc": 0.9}.get(leaf, 1.2) / shape[1] ** 0.5
        if leaf == "bqkv" and case_.query_bias:
            value[:cfg.channels] += np.repeat(case_.query_bias, cfg.channels // cfg.heads)
        params[name] = torch.from_numpy(value * case_.scale.get(leaf, 1)).bfloat16().double()
    params["wte"][cfg.vocab_size:] = 0
    return params


def draw_batch(case_, rng):
    """tokens, targets (chunks, N): each sequence is a document of chunks·T + 1 tokens, cut into
    chunks; the target is the next token, or −1."""
    columns = []
    for T in case_.lengths:
        document = rng.integers(0, case_.vocab, case_.chunks * T + 1)
        columns.append((document[:-1].reshape(case_.chunks, T), document[1:].reshape(case_.chunks, T)))
    tokens, targets = (np.concatenate([c[side] for c in columns], 1) for side in (0, 1))
    targets[rng.random(targets.shape) < case_.ignored] = -1
    offsets = np.concatenate([[0], np.cumsum(case_.lengths)])
    return {"tokens": torch.from_numpy(tokens), "targets": torch.from_numpy(targets), "offsets": offsets.tolist()}


def build(case_):
    """-> Config, Run, parameters in float64, batch."""
    rng = np.random.default_rng(zlib.crc32(case_.name.encode()))
    attention = [resolve(s, case_.heads) for s in case_.attention]
    positions = case_.positions or ("learned" if all(a["name"] == "causal" for a in attention) else "rope")
    cfg = Config(case_.vocab, max(case_.lengths) + case_.spare_positions, len(attention), case_.heads,
                 case_.channels, positions, attention)
    run = Run(**{**USUAL, **case_.run})
    return cfg, run, draw_parameters(case_, cfg, rng), draw_batch(case_, rng)


def metadata(cfg, run):
    config = asdict(cfg)
    config["padded_vocab_size"] = cfg.padded_vocab_size
    config["attention"] = [specification(a) for a in cfg.attention]
    return {"config": json.dumps(config, sort_keys=True), "run": json.dumps(asdict(run), sort_keys=True)}


def print_table():
    """The table of README.md."""
    print("| case | layers | C | NH | positions | V | sequence lengths | also |\n|---|---|---|---|---|---|---|---|")
    for c in CASES.values():
        cfg, _, _, _ = build(c)
        differing = [k for k in ("dropout", "carry_memory") if k in c.run]
        also = [f"{k} {c.run[k]}" if k == "dropout" else f"{c.chunks} chunks" for k in differing]
        also += ["targets −1"] * (c.ignored > 0) + [f"{n} × {f:g}" for n, f in c.scale.items()]
        also += [f"query bias {c.query_bias}"] * bool(c.query_bias)
        print(f"| {c.name} | {' '.join(c.attention)} | {c.channels} | {c.heads} | {cfg.positions} | {c.vocab} "
              f"| {' '.join(map(str, c.lengths))} | {', '.join(also)} |")


if __name__ == "__main__":
    print_table()
