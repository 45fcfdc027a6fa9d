#!/usr/bin/env bash
# Real English from Debian packages, 60 MB of plain text: the King James Bible, Webster's dictionary of 1913 (GCIDE), FOLDOC, the Jargon File, the Devil's
# Dictionary, Perl's manual.     data/real_text.sh [DIRECTORY]     one file a source, in data/real by default
# The packages are downloaded and unpacked in a temporary folder; nothing is installed.
set -euo pipefail
out=$(mkdir -p "${1:-data/real}" && cd "${1:-data/real}" && pwd)
command -v apt-get >/dev/null || { echo "error: apt-get is not here: run this on Debian or Ubuntu, or train on texts of your own" >&2; exit 3; }
work=$(mktemp -d)
chmod 755 "$work"  # apt downloads as a user of its own
trap 'rm -rf "$work"' EXIT
cd "$work"
apt-get download bible-kjv bible-kjv-text dict-gcide dict-foldoc dict-jargon dict-devil perl-doc >/dev/null ||
    { echo "error: apt-get could not download the packages: is there a network, and has apt-get update been run?" >&2; exit 3; }
for package in *.deb; do dpkg -x "$package" .; done
for dictionary in usr/share/dictd/*.dict.dz; do
    gzip -dc <"$dictionary" >"$out/$(basename "$dictionary" .dict.dz).txt"
done
usr/bin/bible -p usr/lib -f Gen1:1-Rev22:21 >"$out/bible.txt"
for pod in usr/share/perl/*/pod/*.pod; do
    sed -E 's/[A-Z]<+ ?([^<>]*) ?>+/\1/g; s/^=(head[1-4]|item|over|back|cut|pod|encoding|for|begin|end) ?//' "$pod"
done >"$out/perl.txt"
wc -c "$out"/*.txt
