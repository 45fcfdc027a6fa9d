"""Compares ./tokenize with OpenAI's tiktoken on random and adversarial strings, with GPT-2's vocabulary or one of our own.

    pip install tiktoken==0.14.0 numpy
    python3 check_tokenizer.py DIR [--strings 10000000] [--text FILE...] [--seed 1]    exit 1 at the first batch with a difference
    python3 check_tokenizer.py DIR --sample 2500 --text FILE > ../test/data/gpt2_tokens.jsonl    short ones, with their tokens
    python3 check_tokenizer.py DIR --speed FILE...       tokens a second, both, one after the other

DIR holds encoder.json and vocab.bpe. Strings are valid UTF-8 of code points that Python's Unicode tables have assigned: PCRE2's
and tiktoken's are as new or newer. Every assigned code point comes once in each of some surroundings; the rest is drawn: ASCII,
mixed scripts, runs, pieces of texts with something put in, tokens of the vocabulary one behind another, bits of <|endoftext|>.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
import unicodedata
from pathlib import Path

import numpy as np
import tiktoken
from tiktoken.load import data_gym_to_mergeable_bpe_ranks
from tiktoken_ext.openai_public import r50k_pat_str

SEPARATOR, BATCH = "<|endoftext|>", 200_000
PROGRAM = Path(__file__).resolve().parents[2] / "tokenize"


def reference(directory):
    ranks = data_gym_to_mergeable_bpe_ranks(f"{directory}/vocab.bpe", f"{directory}/encoder.json")
    return tiktoken.Encoding("gpt2", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens={SEPARATOR: len(ranks)})


def ours(directory, path, *options):
    """Tokens of a file, and what ./tokenize says."""
    with tempfile.NamedTemporaryFile(suffix=".bin") as out:
        command = [PROGRAM, "encode", "--tokenizer", directory, path, "-o", out.name, *options]
        said = subprocess.run(command, check=True, capture_output=True, text=True)
        return np.fromfile(out.name, np.uint16, offset=1024), said.stdout.strip()


# ----------------------------------------------------------------------------------------------
# Strings

SPACES = [chr(c) for c in (9, 10, 11, 12, 13, 32, 0x85, 0xA0, 0x1680, *range(0x2000, 0x200B), 0x2028, 0x2029, 0x202F, 0x205F, 0x3000)]
NO_SPACES = [chr(c) for c in (0x1C, 0x1D, 0x1E, 0x1F, 0x180E, 0x200B, 0x200C, 0x200D, 0x2060, 0xFEFF)]  # \s of some programs
PIECES = ["'s", "'S", "'t", "'re", "'Re", "'ve", "'m", "'ll", "'lL", "'d", "\u2019s", "''", " '", "' ", "'", "<|endoftext|", "<|", "|>", "endoftext", "\r\n",
          "  ", "\n\n", " \n", "\n ", "\u00e9", "e\u0301", "\u00df", "\u4e2d\u6587", "\u0645\u0631\u062d\u0628\u0627", "\u0928\u092e\u0938\u094d\u0924\u0947",
          "\U0001f469\u200d\U0001f680", "\U0001f1e9\U0001f1ea", "\u00bd", "\u2167", "\u0661\u0662", "\U0001d7d8", "\u3007", "\x00", "\x7f", "\ue000",
          "\uffff", "\U0010fffd"]
AROUND = ["{0}", " {0}", "a{0}", "{0}a", "1{0}1", "{0}{0}", "  {0}", "{0} ", "'{0}", "{0}'s", "!{0}!", "\n{0}\n",
          "x {0} y", "\u00e9{0}", "{0}\u4e2d", "\u3000{0}"]


def assigned():
    return [chr(c) for c in range(0x110000) if unicodedata.category(chr(c)) not in ("Cn", "Cs")]


class Strings:
    def __init__(self, seed, texts, tokens):
        self.random = random.Random(seed)
        self.assigned = assigned()
        self.known = set(self.assigned)
        by_class = {}
        for c in self.assigned:
            by_class.setdefault(unicodedata.category(c), []).append(c)
        self.classes = [v for k, v in sorted(by_class.items()) if k != "Co"]
        self.texts = texts
        self.tokens = tokens
        self.ascii = [chr(c) for c in range(128)] + list(" '") * 40 + list("strevmld") * 6 + list("0123456789\n") * 3
        self.kinds = [self.ascii_string, self.mixed, self.scripts, self.runs, self.slice, self.slice, self.join_tokens, self.join_pieces]

    def ascii_string(self):
        return "".join(self.random.choices(self.ascii, k=self.random.randrange(1, 30)))

    def mixed(self):
        r = self.random
        pools = (self.assigned, SPACES, NO_SPACES, self.ascii, r.choice(self.classes), r.choice(self.classes))
        return "".join([r.choice(r.choice(pools)) for _ in range(r.randrange(1, 16))])

    def scripts(self):
        r = self.random
        start = r.randrange(len(self.assigned) - 200)
        pool = self.assigned[start:start + r.randrange(2, 200)] + [" "] * r.randrange(20)
        return "".join(r.choices(pool, k=r.randrange(1, 40)))

    def runs(self):
        r = self.random
        return "".join([r.choice((r.choice(SPACES), r.choice(self.ascii), r.choice(self.assigned), r.choice(PIECES))) * int(2 ** r.uniform(0, 6))
                        for _ in range(r.randrange(1, 5))])

    def slice(self):
        r = self.random
        text = r.choice(self.texts)
        at = r.randrange(len(text))
        s = text[at:at + r.randrange(1, 60)]
        for _ in range(r.randrange(3)):
            at = r.randrange(len(s) + 1)
            s = s[:at] + r.choice((r.choice(PIECES), r.choice(SPACES), r.choice(self.assigned))) + s[at + r.randrange(2):]
        return s

    def join_tokens(self):
        s = b"".join(self.random.choices(self.tokens, k=self.random.randrange(1, 12))).decode("utf-8", "ignore")
        return "".join(c for c in s if c in self.known)

    def join_pieces(self):
        return "".join(self.random.choices(PIECES, k=self.random.randrange(1, 10)))

    def draw(self):
        s = self.random.choice(self.kinds)()
        return s if s and SEPARATOR not in s else self.draw()  # a separator means something in a corpus

    def all(self):
        for form in AROUND:
            for c in self.assigned:
                yield form.format(c)
        while True:
            yield self.draw()


# ----------------------------------------------------------------------------------------------


def compare(directory, encoding, strings, number):
    known, different = 0, []
    begun = time.time()
    while known < number and not different:
        batch = [next(strings) for _ in range(min(BATCH, number - known))]
        expected = []
        for s in batch:
            expected.append(encoding.eot_token)
            expected.extend(encoding.encode_ordinary(s))
        with tempfile.NamedTemporaryFile() as f:
            f.write((SEPARATOR + "\n").join(batch).encode())
            f.flush()
            got, _ = ours(directory, f.name, "--documents")
        if not np.array_equal(got, np.array(expected, np.uint16)):
            documents = np.split(got, np.flatnonzero(got == encoding.eot_token)[1:])
            for s, tokens in zip(batch, documents):
                if tokens[1:].tolist() != encoding.encode_ordinary(s):
                    different.append((s, tokens[1:].tolist(), encoding.encode_ordinary(s)))
            if len(documents) != len(batch):
                different.append((f"{len(batch)} strings", len(documents), "documents"))
        known += len(batch)
        print(f"\r{known} strings, {time.time() - begun:.0f} s", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    for s, a, b in different[:20]:
        print(f"different: {s!r}\n  ours     {a}\n  tiktoken {b}")
    print(f"{known} strings, {len(different)} differences")
    return not different


def speed(directory, encoding, files):
    for file in files:
        data = Path(file).read_bytes()
        texts = [data.decode("utf-8", "replace")]
        if len(data) > 1 << 20:  # in pieces of a megabyte, so that its two threads share the work
            texts = [texts[0][i:i + (1 << 20)] for i in range(0, len(texts[0]), 1 << 20)]
        for threads in (1, 2):
            begun = time.perf_counter()
            encoding.encode_ordinary_batch(texts, num_threads=threads)
            theirs = len(data) / 1e6 / (time.perf_counter() - begun)
            print(f"{file}, {threads} threads: tiktoken {theirs:.1f} MB/s; ours: {ours(directory, file, '--threads', str(threads))[1].split(': ')[1]}")


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("directory")
    ap.add_argument("--strings", type=int, default=10_000_000)
    ap.add_argument("--text", nargs="*", default=[])
    ap.add_argument("--seed", type=int, default=1)
    ap.add_argument("--sample", type=int)
    ap.add_argument("--speed", nargs="+")
    a = ap.parse_args()
    encoding = reference(a.directory)
    print(f"tiktoken {tiktoken.__version__}, Unicode {unicodedata.unidata_version} (Python)", file=sys.stderr)
    if a.speed:
        return speed(a.directory, encoding, a.speed)
    good = set(assigned())
    texts = ["".join(c for c in Path(f).read_text(encoding="utf-8", errors="ignore") if c in good) for f in a.text] or ["The quick brown fox, isn't it?"]
    strings = Strings(a.seed, texts, [encoding.decode_single_token_bytes(i) for i in range(encoding.eot_token)])
    if a.sample:
        for i in range(a.sample):
            text = strings.random.choice(AROUND).format(strings.random.choice(strings.assigned)) if i % 4 == 0 else strings.draw()[:30]
            print(json.dumps({"text": text, "ids": encoding.encode_ordinary(text)}, separators=(",", ":"), ensure_ascii=False))
        return
    sys.exit(not compare(a.directory, encoding, strings.all(), a.strings))


if __name__ == "__main__":
    main()
