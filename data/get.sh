#!/usr/bin/env bash
# Gets a corpus and makes token shards of it:
#
#     data/get.sh NAME [--tokenizer bytes|DIR] [--out DIR] [--shards N]
#
#     NAME              what it is                                  download        checked by                    needs
#     tinyshakespeare   Shakespeare's plays, 1.1 MB                 1.1 MB          SHA-256
#     enwik8            10^8 bytes of Wikipedia                     36 MB           SHA-256                       unzip or gzip
#     tinystories       stories for children by GPT-4, version 2    2.2 GB          the server's SHA-256
#     fineweb-edu       web pages that teach; GPT-2 tokens already  0.2 GB a shard  the server's SHA-256
#     openwebtext       8 million web pages, 38 GB                  12.9 GB         xz's checksums                tar, xz, 60 GB of disk
#     king-james        the King James Bible, 4.4 MB                from Debian     apt                           apt-get, unless `bible` is installed
#     debian            English of Debian's packages, 60 MB: that, Webster's dictionary of 1913, FOLDOC, the Jargon File,
#                       the Devil's Dictionary, Perl's manual       from Debian     apt                           apt-get
#     gpt2              no corpus: GPT-2's encoder.json, vocab.bpe  1.5 MB          SHA-256
#
# --tokenizer: bytes (the default), or a directory with encoder.json and vocab.bpe: data/gpt2 once `data/get.sh gpt2` has run, or what `tokenize train` made.
# --out: where to put it, data/NAME by default: what was downloaded, and a directory of shards for each tokenizer. --shards: of fineweb-edu, 2 by default.
#
# What was begun is taken up again where it stopped, whatever stopped it: FILE.part is a download that is not complete. Needs curl or wget. Takes
# GET_MIRROR/NAME/FILE instead of the source where GET_MIRROR is set. Exit status: 2 for what was typed wrong, 3 for the rest.
set -uo pipefail
export LC_ALL=C
here=$(dirname "$0")
tokenize=${TOKENIZE:-$here/../tokenize}
name='' tokenizer=bytes out='' shards=2 work='' child=''

die() { echo "error: $*" >&2; exit 3; }
wrong() { echo "error: $*" >&2; exit 2; }
need() { command -v "$1" >/dev/null || die "$1 is not here, and $name needs it: install it${2:+ (Debian: apt-get install $2)}"; }

# A program that a signal for us ends, too.
run() { "$@" & child=$!; wait "$child"; local status=$?; child=; return $status; }
finish() { [ -z "$work" ] || { rm -rf "$work"; rmdir "$bin" "$out" 2>/dev/null; }; }
interrupted() {
    [ -z "$child" ] || { kill "$child" 2>/dev/null; wait "$child" 2>/dev/null; }
    echo "interrupted: the same command goes on from here" >&3
    exit 130
}
exec 3>&2  # where a signal finds us, standard error may be elsewhere
trap finish EXIT
trap interrupted INT TERM HUP

# ---- downloads -------------------------------------------------------------------------------------------------------------------------------------

size_of() { if [ -e "$1" ]; then wc -c <"$1" | tr -d ' '; else echo 0; fi; }
sha256() {
    if command -v sha256sum >/dev/null; then sha256sum <"$1"; else shasum -a 256 <"$1"; fi | cut -d ' ' -f 1
}
no_network() {
    die "cannot reach $1: there is no network, it seems. Without one: data/get.sh king-james (Debian's package, where apt has it), or make corpus (stories)"
}

http_status() { sed -n 's/^ *HTTP[^ ]* \([0-9]*\).*/\1/p' "$work/headers" | tail -n 1; }

# transfer URL PART: goes on with what is in PART, and says in $answer how that went: ok; cut (try again); away (no connection); again (from the beginning);
# or what the server or the program has against it.
transfer() {
    local status errors=$work/errors
    : >"$work/headers"
    if command -v curl >/dev/null; then
        local show=--silent
        [ ! -t 2 ] || { show=--progress-bar; errors=/dev/stderr; }
        run curl --fail --location $show --show-error --connect-timeout 10 --speed-limit 100 --speed-time 60 --continue-at - --dump-header "$work/headers" \
            --output "$2" "$1" 2>"$errors"
        status=$?
        case $status in
            0) answer=ok ;;
            6 | 7) answer=away ;;
            16 | 18 | 28 | 52 | 55 | 56 | 92) answer="cut" ;;
            22) answer=$(http_status) ;;
            33) answer=again ;;
            *) answer="nothing that curl can use (its status is $status)" ;;
        esac
        [ "$status" -ne 28 ] || [ -s "$work/headers" ] || answer=away  # it was the connection that took too long
    elif command -v wget >/dev/null; then
        run wget --continue --tries=1 --connect-timeout=10 --read-timeout=60 --no-verbose --server-response --output-document "$2" "$1" 2>"$work/headers"
        status=$?
        case $status in
            0) answer=ok ;;
            4) if grep -qiE "unable to resolve|failed: (Connection|No route|Network)" "$work/headers"; then answer=away; else answer="cut"; fi ;;
            8) answer=$(http_status) ;;
            *) answer="nothing that wget can use (its status is $status)" ;;
        esac
    else
        die "neither curl nor wget is here: install one of them"
    fi
    case $answer in
        416) answer=again ;;  # there is no more than we have, or it is another file now
        5[0-9][0-9]) answer="cut" ;;
    esac
}

# fetch URL FILE [SHA256]: FILE is there only if it is whole.
fetch() {
    local url=$1 file=$2 expected=${3:-} part=$2.part still=0 first=1 host found before
    [ -z "${GET_MIRROR:-}" ] || url=$GET_MIRROR/$name/$(basename "$file")
    host=${url#*://} host=${host%%/*}
    if [ -e "$file" ]; then
        [ -z "$expected" ] || [ "$(sha256 "$file")" = "$expected" ] || die "$file is not what it should be (SHA-256 $expected): remove it, and get it again"
        return
    fi
    echo "getting $url"
    while :; do
        before=$(size_of "$part")
        transfer "$url" "$part"
        case $answer in
            ok) break ;;
            away) [ $first -eq 0 ] || no_network "$host" ;;
            again) rm -f "$part" ;;
            cut) echo "cut off at $(size_of "$part") bytes" >&2 ;;
            *) die "$host answers $answer: $url cannot be had" ;;
        esac
        first=0
        if [ "$(size_of "$part")" -gt "$before" ]; then still=0; else still=$((still + 1)); fi
        [ $still -lt 4 ] || die "$host gives no more than $(size_of "$part") bytes of $url: the same command goes on from there, later"
        sleep 1
    done
    # Hugging Face names the SHA-256 of a large file.
    [ -n "$expected" ] || expected=$(tr -d '\r' <"$work/headers" | sed -n 's/^ *[Xx]-[Ll]inked-[Ee][Tt][Aa][Gg]: *"*\([0-9a-f]\{64\}\)"* *$/\1/p' | tail -n 1)
    found=$(sha256 "$part")
    if [ -n "$expected" ] && [ "$found" != "$expected" ]; then
        rm -f "$part"
        die "what $host gave as $url is not what it should be (SHA-256 $found, expected $expected): it is removed; try again, or another mirror"
    fi
    mv "$part" "$file"
}

# ---- texts and shards ------------------------------------------------------------------------------------------------------------------------------

# shard TEXT NAME: TEXT becomes the shard NAME.
shard() {
    mkdir -p "$bin" || die "cannot create '$bin': choose another --out"
    run "$tokenize" encode --tokenizer "$tokenizer" --documents "$1" -o "$bin/$2" || die "$(basename "$1") could not be tokenised"
}
# pieces N TEXT...: train.txt and val.txt, documents of about 16 KB that end at blank lines where there are some; each Nth goes to val.txt.
pieces() {
    local n=$1
    shift
    : >"$work/train.txt"
    : >"$work/val.txt"
    awk -v n="$n" -v train="$work/train.txt" -v val="$work/val.txt" '
        FNR == 1 || cut { file = ++count % n ? train : val; size = cut = 0; print "<|endoftext|>" > file }
        { print > file; size += length($0) + 1; cut = size >= 16384 && $0 ~ /^[ \t\r]*$/ || size >= 32768 }' "$@" || die "$* could not be cut into pieces"
}
debian_package() {
    command -v apt-get >/dev/null || die "apt-get is not here: run this on Debian or Ubuntu, or take our own stories: make corpus"
    chmod 755 "$work"  # apt downloads as a user of its own
    (cd "$work" && apt-get download "$@") >/dev/null 2>&1 ||
        die "apt-get could not download $*: is there a network or a mirror, and has apt-get update been run? Without, there are our own stories: make corpus"
    for package in "$work"/*.deb; do dpkg -x "$package" "$work" || die "$package could not be unpacked"; done
}
king_james() {
    if command -v bible >/dev/null; then
        command bible -f Gen1:1-Rev22:21 >"$1"
    else
        [ -x "$work/usr/bin/bible" ] || debian_package bible-kjv bible-kjv-text
        "$work/usr/bin/bible" -p "$work/usr/lib" -f Gen1:1-Rev22:21 >"$1"
    fi || die "the program bible gave no text"
}

# ---- what is asked for -----------------------------------------------------------------------------------------------------------------------------

while [ $# -gt 0 ]; do
    case $1 in
        -h | --help) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p;}' "$0"; exit 0 ;;
        --tokenizer | --out | --shards)
            [ $# -ge 2 ] || wrong "$1 needs a value"
            case $1 in --tokenizer) tokenizer=${2%/} ;; --out) out=${2%/} ;; *) shards=$2 ;; esac
            shift ;;
        -*) wrong "unknown option '$1': data/get.sh --help lists what there is" ;;
        *) [ -z "$name" ] || wrong "'$name' and '$1' are both named: name one corpus"; name=$1 ;;
    esac
    shift
done
names="tinyshakespeare, enwik8, tinystories, fineweb-edu, openwebtext, king-james, debian or gpt2"
case $name in
    tinyshakespeare | enwik8 | tinystories | openwebtext | king-james | debian)
        [ -x "$tokenize" ] || die "the program tokenize is not built: make tokenize"
        [ "$tokenizer" = bytes ] || [ -e "$tokenizer/vocab.bpe" ] ||
            wrong "--tokenizer is '$tokenizer': give bytes, or a directory with encoder.json and vocab.bpe (data/get.sh gpt2 gets GPT-2's)" ;;
    fineweb-edu)
        [ "$tokenizer" = bytes ] || wrong "fineweb-edu comes in GPT-2's tokens: leave out --tokenizer"
        case $shards in *[!0-9]* | '' | 0) wrong "--shards is '$shards': give a whole number from 1 to 1000" ;; esac
        [ "$shards" -le 1000 ] || wrong "--shards is '$shards': give a whole number from 1 to 1000"
        tokenizer=gpt2 ;;
    gpt2) ;;
    '') wrong "no corpus: name $names" ;;
    *) wrong "unknown corpus '$name': name $names" ;;
esac
out=${out:-$here/$name} bin=$out/$(basename "$tokenizer")
mkdir -p "$out" || die "cannot create '$out': choose another --out"
if command -v flock >/dev/null; then
    exec 9<"$out" || die "cannot read '$out': choose another --out"
    flock -n 9 || die "another get.sh is at work in '$out': wait for it, or choose another --out"
    rm -rf "$out"/.work.*  # of one that was killed
fi
work=$(mktemp -d "$out/.work.XXXXXX") || die "cannot write into '$out': choose another --out"

train=$bin/train.bin val=$bin/val.bin
if [ "$name" = gpt2 ]; then
    source=https://openaipublic.blob.core.windows.net/gpt-2/encodings/main
    fetch $source/encoder.json "$out/encoder.json" 196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783
    fetch $source/vocab.bpe "$out/vocab.bpe" 1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5
    echo "$out: encoder.json, vocab.bpe"
    echo "next: $here/get.sh tinyshakespeare --tokenizer $out"
    exit 0
elif [ -e "$bin/val.bin" ] && [ "$name" != fineweb-edu ]; then  # it is made last
    [ "$name" != openwebtext ] || train="'$bin/train_*.bin'"
    echo "$bin is there already; remove it to make it again"
else
    case $name in
        tinyshakespeare)
            fetch https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt "$out/input.txt" \
                86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed
            head -c 1003854 "$out/input.txt" >"$work/train.txt"  # nine tenths, as others cut it
            tail -c +1003855 "$out/input.txt" >"$work/val.txt" ;;
        enwik8)
            if [ ! -e "$out/enwik8" ]; then
                fetch https://mattmahoney.net/dc/enwik8.zip "$out/enwik8.zip"
                if command -v unzip >/dev/null; then unzip -p "$out/enwik8.zip" enwik8; else gzip -dc <"$out/enwik8.zip"; fi >"$work/enwik8" ||
                    { rm -f "$out/enwik8.zip"; die "enwik8.zip could not be unpacked: it is removed; get it again"; }
                [ "$(sha256 "$work/enwik8")" = 2b49720ec4d78c3c9fabaee6e4179a5e997302b3a70029f30f2d582218c024a8 ] ||
                    { rm -f "$out/enwik8.zip"; die "what is in enwik8.zip is not enwik8 (SHA-256): it is removed; get it again, or from another mirror"; }
                mv "$work/enwik8" "$out/enwik8"
            fi
            head -c 90000000 "$out/enwik8" >"$work/train.txt"  # as others cut it: 90, 5 and 5 million bytes
            tail -c +90000001 "$out/enwik8" | head -c 5000000 >"$work/val.txt"
            tail -c 5000000 "$out/enwik8" >"$work/test.txt"
            shard "$work/test.txt" test.bin ;;
        tinystories)
            source=https://huggingface.co/datasets/roneneldan/TinyStories/resolve/f54c09fd23315a6f9c86f9dc80f725de7d8f9c64
            for part in train valid; do fetch $source/TinyStoriesV2-GPT4-$part.txt "$out/TinyStoriesV2-GPT4-$part.txt"; done
            ln -s "$(cd "$out" && pwd)/TinyStoriesV2-GPT4-train.txt" "$work/train.txt"
            ln -s "$(cd "$out" && pwd)/TinyStoriesV2-GPT4-valid.txt" "$work/val.txt" ;;
        fineweb-edu)
            source=https://huggingface.co/datasets/karpathy/fineweb-edu-100B-gpt2-token-shards/resolve/main
            files=edu_fineweb_val_000000.bin
            mkdir -p "$bin" || die "cannot create '$bin': choose another --out"
            for i in $(seq 1 "$shards"); do files="$files edu_fineweb_train_$(printf %06d "$i").bin"; done
            for file in $files; do
                fetch "$source/$file" "$bin/$file"
                # llm.c's header: magic, version, tokens; then 2 bytes a token
                read -r magic version tokens < <(head -c 12 "$bin/$file" | od -An -tu4)
                [ "$magic $version $(size_of "$bin/$file")" = "20240520 1 $((1024 + 2 * tokens))" ] ||
                    { rm -f "$bin/$file"; die "$file is no token shard: it is removed; get it again"; }
            done
            train="'$bin/edu_fineweb_train_*.bin'" val=$bin/edu_fineweb_val_000000.bin ;;
        openwebtext)
            need tar tar
            need xz xz-utils
            fetch https://zenodo.org/records/3834942/files/openwebtext.tar.xz "$out/openwebtext.tar.xz"
            echo "unpacking: some hours"
            # Archives of some hundred pages each, within an archive. Each 200th is for validation; a gigabyte of the others makes a shard.
            mkdir "$work/archives"
            run tar -xJf "$out/openwebtext.tar.xz" -C "$work/archives" ||
                die "openwebtext.tar.xz could not be unpacked: make room for it, or remove it and get it again"
            find "$work/archives" -name '*_data.xz' | sort >"$work/list"
            [ -s "$work/list" ] || die "openwebtext.tar.xz does not hold what it should: remove it, and get it again"
            count=0 number=0
            : >"$work/train.txt"
            next_shard() { number=$((number + 1)); shard "$work/train.txt" "train_$(printf %06d $number).bin"; : >"$work/train.txt"; }
            while read -r archive; do
                text=$work/train.txt
                [ $((count % 200)) -ne 0 ] || text=$work/val.txt
                count=$((count + 1))
                mkdir "$work/pages"
                xz -dc "$archive" | tar -xf - -C "$work/pages" ||
                    die "$(basename "$archive") could not be unpacked: remove openwebtext.tar.xz, and get it again"
                find "$work/pages" -type f | sort | tr '\n' '\0' | xargs -0 awk 'FNR == 1 { print "<|endoftext|>" } { print }' >>"$text"
                rm -rf "$work/pages" "$archive"
                [ "$(size_of "$work/train.txt")" -lt 1073741824 ] || next_shard
            done <"$work/list"
            [ ! -s "$work/train.txt" ] || next_shard
            shard "$work/val.txt" val.bin
            train="'$bin/train_*.bin'" ;;
        king-james)
            [ -s "$out/bible.txt" ] || { king_james "$work/bible.txt" && mv "$work/bible.txt" "$out/"; }
            pieces 20 "$out/bible.txt" ;;
        debian)
            if [ ! -s "$out/perl.txt" ]; then
                debian_package bible-kjv bible-kjv-text dict-gcide dict-foldoc dict-jargon dict-devil perl-doc
                king_james "$out/bible.txt"
                for packed in "$work"/usr/share/dictd/*.dict.dz; do
                    text=$out/$(basename "$packed" .dict.dz).txt
                    gzip -dc <"$packed" >"$text"
                done
                for pod in "$work"/usr/share/perl/*/pod/*.pod; do
                    sed -E 's/[A-Z]<+ ?([^<>]*) ?>+/\1/g; s/^=(head[1-4]|item|over|back|cut|pod|encoding|for|begin|end) ?//' "$pod"
                done >"$work/perl.txt"
                mv "$work/perl.txt" "$out/"  # the last one: all are there
            fi
            pieces 50 "$out"/*.txt ;;
    esac
    if [ "$name" != fineweb-edu ] && [ "$name" != openwebtext ]; then
        shard "$work/train.txt" train.bin
        shard "$work/val.txt" val.bin
    fi
fi
echo "$bin: $(cd "$bin" && echo *.bin | cut -c 1-200)"
case $tokenizer in bytes) given=" --tokenizer bytes" ;; gpt2) given= ;; *) given=" --tokenizer $tokenizer" ;; esac
echo "next: ./train_gpt2 train$given --data $train --val-data $val --out runs/$name"
