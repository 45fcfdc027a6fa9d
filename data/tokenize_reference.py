#!/usr/bin/env python3
"""Texts to token shards with the GPT-2 tokenizer of Hugging Face's `tokenizers`, until our own program can do it.

    data/tokenize_reference.py --vocab encoder.json --merges vocab.bpe --out data/real data/real/*.txt

Each text is cut at blank lines into pieces of about 16 KB, the pieces are shuffled (always the same way), and each is preceded by the end-of-text token.
Every fiftieth piece goes to val.bin, the others to train.bin: llm.c's shards, 256 int32 of header and uint16 tokens.
"""
import argparse, random, struct
import numpy as np
from tokenizers import ByteLevelBPETokenizer

END_OF_TEXT, PIECE = 50256, 16384


def pieces(path):
    piece = []
    size = 0
    for line in open(path, encoding="utf-8", errors="replace"):
        piece.append(line)
        size += len(line)
        if size >= PIECE and not line.strip() or size >= 2 * PIECE:
            yield "".join(piece)
            piece, size = [], 0
    if size:
        yield "".join(piece)


def write_shard(path, tokens):
    header = np.zeros(256, np.int32)
    header[:3] = 20240520, 1, len(tokens)
    with open(path, "wb") as f:
        f.write(header.tobytes() + np.asarray(tokens, np.uint16).tobytes())
    print(f"{path}: {len(tokens)} tokens")


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--vocab", required=True)
    ap.add_argument("--merges", required=True)
    ap.add_argument("--out", default="data/real")
    ap.add_argument("texts", nargs="+")
    a = ap.parse_args()
    tokenizer = ByteLevelBPETokenizer(a.vocab, a.merges)
    all_pieces = [p for path in a.texts for p in pieces(path)]
    random.Random(1).shuffle(all_pieces)
    train, val = [], []
    for i, e in enumerate(tokenizer.encode_batch(all_pieces)):
        (val if i % 50 == 0 else train).extend([END_OF_TEXT] + e.ids)
    write_shard(f"{a.out}/train.bin", train)
    write_shard(f"{a.out}/val.bin", val)


if __name__ == "__main__":
    main()
