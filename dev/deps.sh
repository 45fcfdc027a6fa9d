#!/bin/sh
# What the build needs, and how to get it.   dev/deps.sh check    is everything here? Otherwise say what is missing and install it, as below.
#                                            dev/deps.sh install  install, whether or not something is missing
# As root the packages are installed; otherwise you are asked first, if there is somebody to ask; else the exact command is printed.
# With CBLAS=none the built-in matrix product serves, and no BLAS is asked for.
set -u
CXX=${CXX:-g++}
missing=""
need() { missing="$missing $1"; }

compiles() { printf '%s\n' "$1" | "$CXX" -std=c++17 -x c++ ${2:-} - -o /dev/null >/dev/null 2>&1; }
parses() { printf '%s\n' "$1" | "$CXX" -std=c++17 -x c++ ${2:-} -fsyntax-only - >/dev/null 2>&1; }

look() {
    missing=""
    if ! command -v "$CXX" >/dev/null 2>&1; then
        need compiler
    elif ! compiles '#include <omp.h>
int main() { return omp_get_max_threads() < 0; }' -fopenmp; then
        need openmp
    fi
    command -v pkg-config >/dev/null 2>&1 || need pkg-config
    if [ "${CBLAS:-}" != none ] && [ "$(uname -s)" != Darwin ]; then
        PKG_CONFIG_PATH="$(dev/blas.sh path)" pkg-config --exists "${CBLAS:-openblas}" 2>/dev/null || need "${CBLAS:-openblas}"
    fi
    if command -v "$CXX" >/dev/null 2>&1; then
        parses '#include <CLI/CLI.hpp>' "$(pkg-config --cflags CLI11 2>/dev/null)" || need CLI11
        parses '#include <nlohmann/json.hpp>' "$(pkg-config --cflags nlohmann_json 2>/dev/null)" || need nlohmann-json
        parses '#include <doctest/doctest.h>' "$(pkg-config --cflags doctest 2>/dev/null)" || need doctest
        pkg-config --exists libpcre2-8 2>/dev/null || need PCRE2
    else
        need CLI11; need nlohmann-json; need doctest; need PCRE2
    fi
}

# The name of a piece in each package manager.
name() {
    case "$1:$2" in
        apt:compiler) echo g++ ;;            dnf:compiler) echo gcc-c++ ;;          brew:compiler) echo gcc ;;          conda:compiler) echo gxx ;;
        apt:openmp) echo g++ ;;              dnf:openmp) echo gcc-c++ libgomp ;;    brew:openmp) echo libomp ;;         conda:openmp) echo gxx ;;
        apt:pkg-config) echo pkg-config ;;   dnf:pkg-config) echo pkgconf-pkg-config ;; brew:pkg-config) echo pkgconf ;; conda:pkg-config) echo pkg-config ;;
        apt:openblas) echo libopenblas-openmp-dev ;; dnf:openblas) echo openblas-devel ;; brew:openblas) echo openblas ;; conda:openblas) echo 'openblas=*=openmp*' ;;
        apt:CLI11) echo libcli11-dev ;;      dnf:CLI11) echo cli11-devel ;;         brew:CLI11) echo cli11 ;;           conda:CLI11) echo cli11 ;;
        apt:nlohmann-json) echo nlohmann-json3-dev ;; dnf:nlohmann-json) echo json-devel ;; brew:nlohmann-json) echo nlohmann-json ;; conda:nlohmann-json) echo nlohmann_json ;;
        apt:doctest) echo doctest-dev ;;     dnf:doctest) echo doctest-devel ;;     brew:doctest) echo doctest ;;       conda:doctest) echo doctest ;;
        apt:PCRE2) echo libpcre2-dev ;;      dnf:PCRE2) echo pcre2-devel ;;         brew:PCRE2) echo pcre2 ;;           conda:PCRE2) echo pcre2 ;;
    esac
}

install() {
    pieces=$1
    case " $pieces " in *" ${CBLAS:-openblas} "*)
        if [ "${CBLAS:-openblas}" != openblas ] && command -v pkg-config >/dev/null 2>&1; then
            echo "pkg-config finds no '$CBLAS': install it, or take CBLAS=openblas or CBLAS=none" >&2
            exit 1
        fi ;;
    esac
    if command -v apt-get >/dev/null 2>&1; then pm=apt; command="apt-get install -y --no-install-recommends"; root=yes
    elif command -v dnf >/dev/null 2>&1; then pm=dnf; command="dnf install -y"; root=yes
    elif command -v brew >/dev/null 2>&1; then pm=brew; command="brew install"; root=no
    elif command -v conda >/dev/null 2>&1; then pm=conda; command="conda install -y -c conda-forge"; root=no
    else
        echo "Missing:$pieces. Install them with your package manager, then run make again." >&2
        exit 1
    fi
    packages=""
    for p in $pieces; do packages="$packages $(name $pm "$p")"; done
    command="$command$packages"
    [ $pm = apt ] && command="apt-get update && DEBIAN_FRONTEND=noninteractive $command"
    if [ $root = yes ] && [ "$(id -u)" != 0 ]; then command="sudo sh -c '$command'"; fi
    if [ $root = no ] || [ "$(id -u)" != 0 ]; then
        if [ -t 0 ]; then
            printf 'Missing:%s\nInstall by: %s\nShall I? [y/N] ' "$pieces" "$command" >&2
            read -r answer
            case "$answer" in y* | Y*) ;; *) echo "Not installed." >&2; exit 1 ;; esac
        else
            printf 'Missing:%s. Run this, then make again:\n  %s\n' "$pieces" "$command" >&2
            exit 1
        fi
    fi
    echo "Installing:$pieces" >&2
    echo "  $command" >&2
    sh -c "$command" >/tmp/deps.$$.log 2>&1 || { cat /tmp/deps.$$.log >&2; rm -f /tmp/deps.$$.log; echo "The command above failed; nothing was built." >&2; exit 1; }
    rm -f /tmp/deps.$$.log
}

cd "$(dirname "$0")/.." || exit 1
case "${1:-check}" in
    check)
        look
        [ -z "$missing" ] && exit 0
        install "$missing"
        look
        [ -z "$missing" ] || { echo "Still missing:$missing" >&2; exit 1; }
        ;;
    install)
        blas=openblas
        [ "${CBLAS:-}" = none ] && blas=
        install "compiler pkg-config $blas CLI11 nlohmann-json doctest PCRE2" ;;
    *) echo "usage: dev/deps.sh check|install" >&2; exit 2 ;;
esac
