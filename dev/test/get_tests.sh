#!/bin/bash
# data/get.sh against a web server of our own, which cuts connections, sends wrong bytes, redirects, knows no ranges, is busy, slow, or not there.
# Usage: dev/test/get_tests.sh     Needs ./tokenize (or $TOKENIZE), and python3 (the server) and curl, or skips the downloads.
set -u
root=$(cd "$(dirname "$0")/../.." && pwd)
get=$root/data/get.sh shared=$root/../shared/data
TOKENIZE=$(realpath "${TOKENIZE:-$root/tokenize}")
export TOKENIZE no_proxy=127.0.0.1
. "$(dirname "$0")/testing.sh"
server='' started=()
trap '[ -z "$server" ] || kill "$server"; rm -rf "$work"' EXIT
# ended NAME STATUS PATTERN RUN: the run of that name ended with this status, and its standard error is one line that matches
ended() {
    local status; status=$(cat "$4.status")
    if [ "$status" -eq "$2" ] && [ "$(wc -l <"$4.err")" -eq 1 ] && grep -Eq -- "$3" "$4.err"; then ok
    else bad "$1" "status $status, expected $2; pattern '$3'; standard error: $(cat "$4.err")"; fi
}
# get RUN ARGUMENTS...
get() {
    local run=$1; shift
    "$get" "$@" >"$run.out" 2>"$run.err" </dev/null
    echo $? >"$run.status"
}
error() { local name=$1 status=$2 pattern=$3; shift 3; get error "$@"; ended "$name" "$status" "^error: .*$pattern" error; }

error "no corpus" 2 "no corpus: name tinyshakespeare"
error "an unknown one" 2 "unknown corpus 'pile'" pile
error "an unknown option" 2 "unknown option '--fast'" tinystories --fast
error "no value" 2 "--out needs a value" tinystories --out
error "two corpora" 2 "both named" tinystories enwik8
error "a tokenizer that is none" 2 "--tokenizer is 'gone': give bytes" tinystories --tokenizer gone
error "shards" 2 "--shards is '0'" fineweb-edu --shards 0
expect "help" eval '"$get" --help | grep -q "king-james .*Debian"'
if ! command -v python3 >/dev/null || ! command -v curl >/dev/null; then
    skip "downloads: they need python3, for the server, and curl"
    finish
fi

# --- what the server has: the same files in every directory, which is how it behaves ----------------------------------------------------------------------
mkdir files
awk 'BEGIN { for (i = 0; i < 3000; i++) printf "%sA story of %d words and %d.\n", i % 20 ? "" : "<|endoftext|>\n", i * 7919 % 1e6, i * i }' \
    >files/TinyStoriesV2-GPT4-train.txt
head -c 5000 files/TinyStoriesV2-GPT4-train.txt >files/TinyStoriesV2-GPT4-valid.txt
int32() { local v; for v in "$@"; do printf '%b' "$(printf '\\x%02x' $((v & 255)) $((v >> 8 & 255)) $((v >> 16 & 255)) $((v >> 24 & 255)))"; done; }
for file in val_000000 train_000001; do { int32 20240520 1 3; head -c 1012 /dev/zero; printf abcdef; } >files/edu_fineweb_$file.bin; done
{ int32 20240520 1 4; head -c 1012 /dev/zero; printf abcdef; } >files/edu_fineweb_train_000002.bin
for file in input.txt enwik8.zip encoder.json vocab.bpe; do printf 'not that' >files/$file; done
cat >server.py <<'END'
import hashlib, http.server, os, re, socketserver, sys, time
seen = {}
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        behaviour, name = self.path.split("/")[1], self.path.split("/")[-1]
        with open("requests", "a") as log: log.write(self.path + " " + self.headers.get("Range", "-") + "\n")
        count = seen[self.path] = seen.get(self.path, 0) + 1
        data = open("files/" + name, "rb").read()
        if behaviour == "moved":
            self.send_response(302)
            self.send_header("Location", self.path.replace("/moved/", "/good/"))
            self.end_headers()
            return
        if behaviour == "lost" or behaviour == "never" or (behaviour == "busy" and count < 3):
            self.send_error(404 if behaviour == "lost" else 503)
            return
        asked = re.match(r"bytes=(\d+)-", self.headers.get("Range", ""))
        begin = int(asked[1]) if asked and behaviour != "whole" else 0
        if begin >= len(data) > 0 and begin > 0:
            self.send_error(416)
            return
        self.send_response(206 if begin else 200)
        if begin: self.send_header("Content-Range", f"bytes {begin}-{len(data) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(data) - begin))
        if behaviour in ("named", "wrong"):
            self.send_header("X-Linked-Etag", '"' + hashlib.sha256(data).hexdigest() + '"')
        self.end_headers()
        if behaviour == "wrong": data = bytes(len(data))
        part = data[begin:]
        if behaviour == "cut" or (behaviour == "whole" and count == 1): part = part[:len(data) // 2 + 1]
        if behaviour == "slow":
            for i in range(0, len(part), 5000):
                self.wfile.write(part[i:i + 5000])
                time.sleep(0.1)
            return
        self.wfile.write(part)
    def log_message(self, *_): pass
class Server(socketserver.ThreadingMixIn, http.server.HTTPServer):
    daemon_threads = True
    def handle_error(self, *_): pass
server = Server(("127.0.0.1", 0), Handler)
with open("port.tmp", "w") as f: f.write(str(server.server_address[1]))
os.rename("port.tmp", "port")
server.serve_forever()
END
python3 server.py 2>server.log &
server=$!
for _ in $(seq 100); do [ -e port ] && break; sleep 0.05; done
[ -e port ] || { echo "FAIL the server did not start: $(cat server.log)"; failed=1; finish; }
site=http://127.0.0.1:$(cat port)
from() { GET_MIRROR=$site/$1 get "${@:2}"; }
no_rest() { [ -z "$(find "$1" -name '*.part' -o -name '.work*' 2>/dev/null)" ]; }

# --- downloads, all at the same time ------------------------------------------------------------------------------------------------------------------------
for how in good cut moved whole busy named wrong lost never; do from $how $how tinystories --out $how & started+=($!); done
for what in tinyshakespeare enwik8 gpt2; do from good not-$what $what --out not-$what & started+=($!); done
from good fineweb fineweb-edu --shards 1 --out fineweb & started+=($!)
from good fineweb2 fineweb-edu --shards 2 --out fineweb2 & started+=($!)
GET_MIRROR=http://127.0.0.1:1 get away tinystories --out away & started+=($!)
wait "${started[@]}"
for how in good cut moved whole busy named; do
    expect "$how: ends well" [ "$(cat $how.status)" = 0 ]
    expect "$how: the very file" cmp -s files/TinyStoriesV2-GPT4-train.txt $how/TinyStoriesV2-GPT4-train.txt
    expect "$how: leaves nothing else" no_rest $how
    # 150 separators of 13 bytes and a line feed are a token each
    expect "$how: a shard" [ "$(wc -c <$how/bytes/train.bin)" -eq $((1024 + 2 * ($(wc -c <files/TinyStoriesV2-GPT4-train.txt) - 13 * 150))) ]
    expect "$how: what to type next" grep -q "^next: .*train --tokenizer bytes --data $how/bytes/train.bin --val-data $how/bytes/val.bin" $how.out
done
expect "cut: went on where it was cut" [ "$(grep -c "^/cut/.*train.txt bytes=[1-9]" requests)" -eq 1 ]
expect "cut: said so" grep -q "^cut off at [0-9]* bytes" cut.err
expect "whole: asked for the rest, and took the whole" [ "$(grep -c "^/whole/.*train.txt -" requests)" -eq 2 ]
ended "wrong bytes" 3 "^error: .*wrong/.*SHA-256 .*removed" wrong
expect "wrong bytes: nothing stays" [ ! -e wrong ]
ended "not there" 3 "^error: 127.0.0.1:[0-9]* answers 404: .*cannot be had" lost
expect "always busy" eval '[ "$(cat never.status)" = 3 ] && tail -n 1 never.err | grep -q "^error: .*gives no more than 0 bytes"'
ended "no server" 3 "^error: cannot reach 127.0.0.1:1: there is no network.*king-james.*make corpus" away
expect "no server: nothing stays" [ ! -e away ]
ended "not Shakespeare" 3 "^error: .*not what it should be" not-tinyshakespeare
ended "not GPT-2's" 3 "^error: .*not what it should be" not-gpt2
expect "no zip file" eval '[ "$(cat not-enwik8.status)" = 3 ] && tail -n 1 not-enwik8.err | grep -q "^error: .*removed" && [ ! -e not-enwik8 ]'
expect "shards" cmp -s files/edu_fineweb_train_000001.bin fineweb/gpt2/edu_fineweb_train_000001.bin
expect "shards: what to type next" grep -q -- "--data 'fineweb/gpt2/edu_fineweb_train_\*.bin' --val-data fineweb/gpt2/edu_fineweb_val_000000.bin" fineweb.out
ended "a shard that is cut short" 3 "^error: edu_fineweb_train_000002.bin is no token shard" fineweb2
from good good tinystories --out good
expect "once more: nothing is done again" grep -q "good/bytes is there already" good.out

# --- interrupted: what is there of the file stays, and is gone on from; nothing else does --------------------------------
GET_MIRROR=$site/slow "$get" tinystories --out slow >slow.out 2>slow.err &
job=$!
for _ in $(seq 100); do [ -s slow/TinyStoriesV2-GPT4-train.txt.part ] && break; sleep 0.05; done
kill -TERM $job; wait $job; status=$?
had=$(wc -c <slow/TinyStoriesV2-GPT4-train.txt.part)
expect "interrupted" [ $status -eq 130 ]
expect "interrupted: says so" grep -q "^interrupted: " slow.err
expect "interrupted: only the part stays" [ "$(ls -A slow)" = TinyStoriesV2-GPT4-train.txt.part ]
from good slow tinystories --out slow
expect "interrupted: goes on" grep -q "^/good/.*train.txt bytes=$had-" requests
expect "interrupted: the very file" cmp -s files/TinyStoriesV2-GPT4-train.txt slow/TinyStoriesV2-GPT4-train.txt
if command -v flock >/dev/null; then
    flock slow "$get" tinystories --out slow >error.out 2>error.err; echo $? >error.status
    ended "two at the same time" 3 "^error: another get.sh is at work in 'slow'" error
fi

# --- OpenWebText's archives within an archive --------------------------------
if command -v xz >/dev/null; then
    mkdir openwebtext
    for i in $(seq 0 4); do
        mkdir pages
        printf 'page %d\n' "$i" >pages/0-a.txt
        printf 'another' >pages/1-b.txt
        tar -cJf openwebtext/urlsf_subset00-${i}_data.xz -C pages 0-a.txt 1-b.txt
        rm -r pages
    done
    tar -cJf files/openwebtext.tar.xz openwebtext
    from good web openwebtext --out web
    expect "openwebtext" [ "$(cat web.status)" = 0 ]
    "$TOKENIZE" decode --tokenizer bytes web/bytes/train_000001.bin -o text.txt >decode.out 2>&1
    pages=$(for i in 1 2 3 4; do printf '<|endoftext|>page %d<|endoftext|>another' $i; done)  # decode begins with the first document
    expect "openwebtext: pages are documents" [ "<|endoftext|>$(tr -d '\n' <text.txt)" = "$pages" ]
    expect "openwebtext: shards" grep -q "^next: .*--data 'web/bytes/train_\*.bin' --val-data web/bytes/val.bin" web.out
else
    skip "openwebtext: it needs xz"
fi

# --- the true files, if they are here --------------------------------
if [ -e "$shared/tinyshakespeare.txt" ]; then
    cp "$shared/tinyshakespeare.txt" files/input.txt
    cp "$shared"/gpt2/* files/
    from cut gpt2 gpt2 --out gpt2
    expect "gpt2" eval 'cmp -s gpt2/vocab.bpe "$shared/gpt2/vocab.bpe" && cmp -s gpt2/encoder.json "$shared/gpt2/encoder.json"'
    from cut shakespeare tinyshakespeare --tokenizer gpt2 --out shakespeare
    # 301966 and 36059 tokens are known for these two parts; each has an end of text before it
    expect "tinyshakespeare to train on" [ "$(wc -c <shakespeare/gpt2/train.bin)" -eq $((1024 + 2 * 301967)) ]
    expect "tinyshakespeare to validate on" [ "$(wc -c <shakespeare/gpt2/val.bin)" -eq $((1024 + 2 * 36060)) ]
else
    skip "tinyshakespeare and GPT-2's files: $shared is not here"
fi
finish
