"""Models exchanged with other programs: fixtures for the tests, and a check with the programs themselves.

    python3 exchange.py fixtures                   write outputs/exchange again (dev/test/exchange_tests.cpp reads it)
    python3 exchange.py check [TRAIN_GPT2 [DIR]]   one line per check; exit 1 when one is off

Needs transformers; for GGUF the package gguf, and xllamacpp if llama.cpp itself is to run. The check
makes small models with the program (default ../../train_gpt2), converts them, and compares what
transformers and llama.cpp make of them with the program's own figures; and the other way round.
DIR holds GPT-2's encoder.json and vocab.bpe, for a check of them too.
"""

import json
import os
import struct
import subprocess
import sys
import tempfile

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import DeepseekV3Config, GPT2Config, GPT2LMHeadModel, GPT2Model, MiniMaxConfig
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention
from transformers.models.minimax.modeling_minimax import MiniMaxLightningAttention

OUTPUTS = os.path.join(os.path.dirname(os.path.abspath(__file__)), "outputs", "exchange")
TEXT = "Whoever takes a model elsewhere finds it there as it was."
failures = 0


def report(what, seen, allowed):
    global failures
    good = seen <= allowed  # so that NaN fails
    failures += not good
    print(f"{what:70} {seen:.1e} of {allowed:.0e}  {'ok' if good else 'FAIL'}", flush=True)


# ----------------------------------------------------------------------------------------------
# Fixtures


def random_gpt2():
    """Larger weights than GPT-2's first ones, so that every part of the model shows in the logits."""
    torch.manual_seed(6)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=300, n_positions=32, n_embd=24, n_layer=2, n_head=3,
                                       bos_token_id=299, eos_token_id=299)).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(0.3 * torch.randn_like(p) + (".weight" in name and "ln_" in name))
    return model


def fixtures():
    """gpt2: one file, float32. gpt2_parts: in parts, bfloat16, without the prefix. logits: of both, in float64."""
    model = random_gpt2()
    model.save_pretrained(os.path.join(OUTPUTS, "gpt2"))
    half = random_gpt2().to(torch.bfloat16)
    half.transformer.save_pretrained(os.path.join(OUTPUTS, "gpt2_parts"), max_shard_size="20KB")
    tokens = torch.randint(0, 300, (14,), generator=torch.Generator().manual_seed(6))
    with torch.no_grad():
        logits = [m.double()(tokens[None]).logits[0].float().contiguous() for m in (model, half)]
    save_file({"tokens": tokens.int(), "gpt2": logits[0], "gpt2_parts": logits[1]}, os.path.join(OUTPUTS, "logits.safetensors"))
    for directory in ("gpt2", "gpt2_parts"):
        generation = os.path.join(OUTPUTS, directory, "generation_config.json")
        if os.path.exists(generation):
            os.remove(generation)


# ----------------------------------------------------------------------------------------------
# The program


class Program:
    def __init__(self, path):
        self.path = path

    def run(self, *arguments):
        done = subprocess.run([self.path, *map(str, arguments)], capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{' '.join(map(str, arguments))}: {done.stderr.strip()}")
        return done.stdout

    def make(self, out, *options):
        """A checkpoint of the program with larger weights than its first ones, so that every part of the model shows in the loss."""
        with open("corpus.txt", "w") as f:
            f.write(TEXT * 20)
        self.run("train", "--data", "corpus.txt", "--out", out, "--layers", 3, "--channels", 48, "--heads", 4, "--max-seq", 64,
                 "--batch", 2, "--steps", 1, "--sample-every", 0, "--val-every", 0, *options)
        path = os.path.join(out, "step_00000001", "model.safetensors")
        tensors = load_file(path)
        torch.manual_seed(len(out))
        for name, t in tensors.items():
            t.copy_(torch.randn_like(t) * (0.2 if t.dim() == 2 else 0.3) + (name.endswith((".w", "gain", ".gq", ".gkv"))))
        tensors["wte"][257:] = 0
        save_file(tensors, path)

    def convert(self, model, to, out, *options):
        self.run("convert", "--checkpoint", model, "--to", to, "--out", out, *options)

    def loss(self, model):
        """Of TEXT as one window, by bytes."""
        with open("text.txt", "w") as f:
            f.write(TEXT)
        return float(self.run("eval", "--checkpoint", model, "--data", "text.txt").split()[1])


def text_tokens():
    return torch.tensor([256, *TEXT.encode()])


def checkpoint_tensors(run):
    return load_file(os.path.join(run, "step_00000001", "model.safetensors"))


# ----------------------------------------------------------------------------------------------
# Checks


def check_transformers(program):
    """Ours there: loss. Theirs here: loss, and back again bit for bit."""
    program.make("causal", "--attention", "causal")
    program.convert("causal", "hf", "causal_hf")
    model, info = GPT2LMHeadModel.from_pretrained("causal_hf", output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    assert model.config.vocab_size == 257
    tokens = text_tokens()
    with torch.no_grad():
        loss = F.cross_entropy(model.eval()(tokens[None, :-1]).logits[0], tokens[1:]).item()
    report("ours loads in transformers and has our loss", abs(loss - program.loss("causal")), 2e-6)
    for dtype, name in (("bf16", torch.bfloat16), ("float16", torch.float16)):
        program.convert("causal", "hf", f"causal_{dtype}", "--dtype", dtype)
        narrow = GPT2LMHeadModel.from_pretrained(f"causal_{dtype}", dtype="auto")
        assert narrow.dtype == name
        wrong = sum(not torch.equal(a, b.to(name)) for a, b in zip(narrow.state_dict().values(), model.state_dict().values()))
        report(f"in {dtype}, rounded as torch rounds: tensors that differ", wrong, 0)
    theirs = random_gpt2()
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        theirs = theirs.to(dtype)
        name = f"random_{dtype}"[13:]
        theirs.save_pretrained(name, max_shard_size="30KB")
        program.convert(name, "attn", name + "_attn")
        program.convert(name + "_attn", "llmc" if dtype != torch.float16 else "attn", name + "_2")  # llm.c has no float16
        program.convert(name + "_2", "hf", name + "_3")
        back = load_file(os.path.join(name + "_3", "model.safetensors"))
        same = all(torch.equal(t, back[n]) for n, t in theirs.state_dict().items() if n != "lm_head.weight")
        report(f"theirs, ours, llm.c's, theirs, {dtype}: other bits", not same, 0)


def check_llmc(program):
    """The file by its description, and the loss of the model read back."""
    tensors = checkpoint_tensors("causal")
    for dtype, version in (("float32", 3), ("bf16", 5)):
        program.convert("causal", "llmc", f"causal_{dtype}.bin", "--dtype", dtype)
        with open(f"causal_{dtype}.bin", "rb") as f:
            data = f.read()
        assert struct.unpack("<8i", data[:32]) == (20240326, version, 64, 257, 3, 4, 48, 384)
        values = torch.frombuffer(bytearray(data[1024:]), dtype=torch.float32 if version == 3 else torch.bfloat16)
        layers = ["ln1.w", "ln1.b", "attn.wqkv", "attn.bqkv", "attn.wo", "attn.bo", "ln2.w", "ln2.b", "mlp.wfc", "mlp.bfc",
                  "mlp.wproj", "mlp.bproj"]
        order = ["wte", "wpe", *[f"h.{l}.{n}" for n in layers for l in range(3)], "lnf.w", "lnf.b"]
        expected = torch.cat([tensors[n].flatten() for n in order]).to(values.dtype)
        report(f"llm.c's file, {dtype}: tensors out of their places", not torch.equal(values, expected), 0)
        # The files do not say that tokens are bytes.
        program.convert(f"causal_{dtype}.bin", "attn", f"causal_{dtype}_back", "--tokenizer", "bytes")
        report(f"llm.c's file, {dtype}, read back: change of the loss", abs(program.loss(f"causal_{dtype}_back") - program.loss("causal")),
               0 if version == 3 else 5e-3)


def check_gguf(program):
    import gguf
    tensors = checkpoint_tensors("causal")
    names = {"wte": "token_embd.weight", "wpe": "position_embd.weight", "lnf.w": "output_norm.weight", "lnf.b": "output_norm.bias"}
    for l in range(3):
        for ours, theirs in {"ln1": "attn_norm", "ln2": "ffn_norm"}.items():
            names[f"h.{l}.{ours}.w"], names[f"h.{l}.{ours}.b"] = f"blk.{l}.{theirs}.weight", f"blk.{l}.{theirs}.bias"
        for ours, theirs in {"attn.?qkv": "attn_qkv", "attn.?o": "attn_output", "mlp.?fc": "ffn_up", "mlp.?proj": "ffn_down"}.items():
            names[f"h.{l}.{ours.replace('?', 'w')}"] = f"blk.{l}.{theirs}.weight"
            names[f"h.{l}.{ours.replace('?', 'b')}"] = f"blk.{l}.{theirs}.bias"
    assert set(names) == set(tensors)
    types = {"float32": torch.float32, "float16": torch.float16, "bf16": torch.bfloat16}
    for dtype, torch_type in types.items():
        program.convert("causal", "gguf", f"causal_{dtype}.gguf", "--dtype", dtype)
        reader = gguf.GGUFReader(f"causal_{dtype}.gguf")
        fields = {k: f.contents() for k, f in reader.fields.items() if not k.startswith("tokenizer.ggml.merges")}
        assert fields["general.architecture"] == "gpt2" and fields["gpt2.block_count"] == 3 and fields["gpt2.attention.head_count"] == 4
        assert fields["gpt2.embedding_length"] == 48 and fields["gpt2.feed_forward_length"] == 192 and fields["gpt2.context_length"] == 64
        assert len(fields["tokenizer.ggml.tokens"]) == 257 and fields["tokenizer.ggml.tokens"][ord(" ")] == "\u0120"
        read = {}
        for t in reader.tensors:
            values = gguf.quants.dequantize(t.data, t.tensor_type)
            assert list(reversed(t.shape.tolist())) == list(values.shape)
            read[t.name] = torch.from_numpy(np.array(values))
        assert set(read) == {*names.values(), "output.weight"} and torch.equal(read["output.weight"], read["token_embd.weight"])
        wrong = 0
        for ours, theirs in names.items():
            t = tensors[ours][:257] if ours == "wte" else tensors[ours]
            wrong += not torch.equal(read[theirs], t.to(torch_type).float() if t.dim() == 2 else t)
        report(f"GGUF in {dtype}, by the gguf package's reader: tensors that differ", wrong, 0)


def check_llama_cpp(program):
    """The likeliest next bytes behind a text, asked for as text: llama.cpp makes tokens of it. It keeps keys and values in float16."""
    try:
        import xllamacpp
    except ImportError:
        return print("xllamacpp is not installed: llama.cpp itself did not run")
    params = xllamacpp.CommonParams()
    params.model.path = "causal_float32.gguf"
    params.n_ctx, params.n_parallel, params.warmup = 64, 1, False
    prompt = TEXT[:40]
    answer = xllamacpp.Server(params).handle_completions({"prompt": prompt, "max_tokens": 1, "temperature": 0, "logprobs": 5})
    theirs = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
    model = GPT2LMHeadModel.from_pretrained("causal_hf").eval()
    with torch.no_grad():
        ours = F.log_softmax(model(torch.tensor([[256, *prompt.encode()]])).logits[0, -1], -1).topk(5)
    assert [t["id"] for t in theirs] == ours.indices.tolist()
    report("llama.cpp: the five likeliest bytes are ours, their log-probabilities off by",
           np.max([abs(t["logprob"] - p) for t, p in zip(theirs, ours.values.tolist())]), 1e-2)


def attention_module(entry, tensors):
    """The module that attention.json describes, with its weights, as a function of x (T,C)."""
    kind = {"DeepseekV3Attention": (DeepseekV3Config, DeepseekV3Attention),
            "MiniMaxLightningAttention": (MiniMaxConfig, MiniMaxLightningAttention)}[entry["module"]]
    config = kind[0](**entry["config"], attn_implementation="sdpa")
    module = kind[1](config, entry["layer"]).eval()
    weights = {n[len(entry["prefix"]):]: t.float() for n, t in tensors.items() if n.startswith(entry["prefix"])}
    module.load_state_dict(weights, strict=False)
    assert set(weights) == {n for n, _ in module.named_parameters()}

    def mla(x):
        T, d = len(x), config.qk_rope_head_dim
        theta = config.rope_parameters["rope_theta"]
        angle = torch.outer(torch.arange(T).float(), theta ** -(torch.arange(0, d, 2).float() / max(d, 1)))
        angle = torch.cat([angle, angle], -1)[None]
        mask = torch.ones(T, T, dtype=torch.bool).tril()[None, None]
        return module(x[None], (angle.cos(), angle.sin()), mask)[0][0]

    return mla if entry["module"] == "DeepseekV3Attention" else lambda x: module(x[None], None, None)[0][0]


def check_attention(program):
    """A whole model of ours whose attention is done by transformers' modules: its loss."""
    for name, options in {"mla": ("--attention", "mla"), "mla_latent": ("--attention", "mla", "--q-lora-rank", 20, "--v-dim", 10),
                          "lightning": ("--attention", "lightning"), "hybrid": ("--attention", "lightning*2,mla")}.items():
        program.make(name, *options)
        for dtype in ("float32", "bf16"):
            source = name if dtype == "float32" else f"{name}_narrow"
            if dtype == "bf16":
                program.convert(name, "attn", source, "--dtype", "bf16")
            program.convert(source, "hf-attention", f"{name}_{dtype}_modules")
            tensors = load_file(os.path.join(f"{name}_{dtype}_modules", "model.safetensors"))
            with open(os.path.join(f"{name}_{dtype}_modules", "attention.json")) as f:
                entries = json.load(f)
            w = load_file(os.path.join(source, "model.safetensors")) if dtype == "bf16" else checkpoint_tensors(name)
            w = {n: t.float() for n, t in w.items()}
            norm = lambda x, n: F.layer_norm(x, x.shape[-1:], w[n + ".w"], w[n + ".b"], 1e-5)
            tokens = text_tokens()
            with torch.no_grad():
                x = w["wte"][tokens[:-1]]
                for l in range(3):
                    x = x + attention_module(entries[l], tensors)(norm(x, f"h.{l}.ln1"))
                    h = F.gelu(F.linear(norm(x, f"h.{l}.ln2"), w[f"h.{l}.mlp.wfc"], w[f"h.{l}.mlp.bfc"]), approximate="tanh")
                    x = x + F.linear(h, w[f"h.{l}.mlp.wproj"], w[f"h.{l}.mlp.bproj"])
                loss = F.cross_entropy(F.linear(norm(x, "lnf"), w["wte"][:257]), tokens[1:]).item()
            report(f"{name}, {dtype}: {entries[-1]['module']} and others give our loss", abs(loss - program.loss(source)), 2e-6)


def check_vocabulary(program, files):
    """GPT-2's own vocabulary goes along: transformers' tokenizer gives the same ids, and llama.cpp's file has the same tokens and merges."""
    import gguf
    from transformers import GPT2Tokenizer
    model = GPT2LMHeadModel(GPT2Config(n_positions=16, n_embd=8, n_layer=1, n_head=1))
    model.save_pretrained("vocabulary")
    program.convert("vocabulary", "attn", "vocabulary_attn", "--tokenizer", files)
    program.convert("vocabulary_attn", "hf", "vocabulary_hf")
    program.convert("vocabulary_hf", "gguf", "vocabulary.gguf")
    tokenizer = GPT2Tokenizer.from_pretrained("vocabulary_hf")
    text = " It's 3 o'clock,\n\tna\u00efve caf\u00e9s \U0001f600\u4e2d\u6587 "
    ids = tokenizer(text)["input_ids"]
    fields = gguf.GGUFReader("vocabulary.gguf").fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    assert tokens == [tokenizer.convert_ids_to_tokens(i) for i in range(50257)]
    assert fields["tokenizer.ggml.bos_token_id"].contents() == 50256 == tokenizer.eos_token_id
    with open(os.path.join(files, "vocab.bpe"), encoding="utf-8") as f:
        assert fields["tokenizer.ggml.merges"].contents() == f.read().split("\n")[1:50001]
    report(f"GPT-2's vocabulary goes along ({len(ids)} tokens of a text)", tokenizer.decode(ids) != text, 0)


def check(path, files=None):
    program = Program(os.path.abspath(path))
    files = files and os.path.abspath(files)
    with tempfile.TemporaryDirectory() as directory:
        os.chdir(directory)
        check_transformers(program)
        check_llmc(program)
        check_attention(program)
        check_gguf(program)
        check_llama_cpp(program)
        if files:
            check_vocabulary(program, files)
    print(f"{failures} failures")
    return 1 if failures else 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1:] == ["fixtures"]:
        sys.exit(fixtures())
    if sys.argv[1:2] != ["check"]:
        sys.exit(__doc__)
    sys.exit(check(*(sys.argv[2:] or [os.path.join(os.path.dirname(__file__), "..", "..", "train_gpt2")])))
