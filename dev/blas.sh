#!/bin/sh
# Which BLAS: pkg-config's name in $CBLAS (default openblas; none: the built-in product).   dev/blas.sh path|cflags|libs
# Debian installs OpenBLAS in several builds side by side; the OpenMP one is taken where it is, since a BLAS with threads of its own beside OpenMP's
# has twice as many threads as cores. Its folder goes into the program (rpath), because the system's default may be another build.
path=""
for d in /usr/lib/*/openblas-openmp/pkgconfig /opt/homebrew/opt/openblas/lib/pkgconfig /usr/local/opt/openblas/lib/pkgconfig; do
    [ -d "$d" ] && path="$path$d:"
done
PKG_CONFIG_PATH="$path${PKG_CONFIG_PATH:-}"
export PKG_CONFIG_PATH
blas=${CBLAS:-openblas}
case "$1" in
    path) echo "$PKG_CONFIG_PATH" ;;
    cflags)
        if [ "$blas" = none ]; then echo -DNO_CBLAS
        elif [ "$(uname -s)" = Darwin ] && [ -z "${CBLAS:-}" ]; then echo -DACCELERATE_NEW_LAPACK
        else pkg-config --cflags "$blas"; fi ;;
    libs)
        if [ "$blas" = none ]; then :
        elif [ "$(uname -s)" = Darwin ] && [ -z "${CBLAS:-}" ]; then echo -framework Accelerate
        else
            echo "$(pkg-config --libs "$blas") -Wl,-rpath,$(pkg-config --variable=libdir "$blas")"
        fi ;;
esac
