// What multi-head latent attention (attention.h, section 6) does between its matrix products and the softmax core. Widths as in MlaShape.
//
//     mla_latents    c = RMS(u[:d_c]; gkv)      kr = u[d_c:] rotated      qr of every head rotated
//     mla_assemble   keys, per head [kn | kr], from kv, per head [kn | v], and kr
//     mla_split      back: dkn into dkv      dkr = Σ_heads dkeys[d_nope:], rotated back, into du      dqr rotated back
//
// No product lies between the parts of each, so that each is one launch, and all are copies to the memory: with NH 12, d_nope 64, d_rope 32, d_v 64, d_c 256 in
// bf16, read and written for each token,
//
//     mla_latents    u 576 + c 512 + kr 64 + qr 2·768            = 2688 bytes     65536 tokens at 3.0 TB/s: 59 µs
//                    without queries                             = 1152           25 µs
//     mla_assemble   kn 1536 + kr 64 + keys 2304                 = 3904           85 µs
//     mla_split      dkeys 2304 + dkn 1536 + dkr 64 + dqr 2·768  = 5440           119 µs
//
// On Hopper the product that makes the queries rotates them on its way (RotatedColumns, matmul_hopper.cuh); mla_latents then leaves them alone, and writes the
// rotations that the product reads. Elsewhere it rotates them where they are, 64 of each 192 bytes, which is the slowest part of it.
//
// Assembling could be spared by products that write into rows [kn | (kr) | v] directly, head by head or against a Wukv with rows of zeros between: that is 25 %
// more arithmetic in three products, and what it would win, some 40 µs in each direction, is a few percent of the layer. The layer stays readable instead.
// Values are read by the core where they stand, in kv, and softmax_backward leaves dv in dkv: neither is ever moved.
//
// Kernels are written over V numbers at once: 16 bytes, or one rotated pair (and single numbers elsewhere) for sizes that are not multiples of 16 bytes.
// Kernels 4 and 5 are for 16 bytes alone.
// Earlier versions and times: dev/cuda/mla.cu.
#pragma once

#include <algorithm>
#include <type_traits>

#include "../../attention.h"
#include "common.cuh"
#include "layernorm.cuh"
#include "rope.cuh"

namespace gpu {

namespace mla {

constexpr int PAIR = 2, VECTOR = Packed<floatX>::size;  // V
constexpr int THREADS = 256, TOKENS = 16;               // tokens a block; fewer if their rotations take too much shared memory

// Single numbers where V is a pair: parts without rotation may have odd widths.
template <int V>
constexpr int WIDTH = V == PAIR ? 1 : V;

template <int V>
__device__ inline void load(float (&x)[V], const floatX* p) {
    if constexpr (V == VECTOR) {
        Packed<floatX> packed = load_packed(p);
#pragma unroll
        for (int i = 0; i < V; i++) x[i] = packed[i];
    } else {
#pragma unroll
        for (int i = 0; i < V; i++) x[i] = to_float(p[i]);
    }
}
// `whole`: the address is known to be a multiple of 16 bytes where V is a vector.
template <int V>
__device__ inline void store(floatX* p, const float (&x)[V], bool whole = true) {
    if constexpr (V == VECTOR) {
        if (whole) {
            Packed<floatX> packed;
#pragma unroll
            for (int i = 0; i < V; i++) packed.set(i, x[i]);
            store_packed(p, packed);
            return;
        }
    }
#pragma unroll
    for (int i = 0; i < V; i++) p[i] = from_float<floatX>(x[i]);
}
// rotation: cos and sin of the V/2 pairs.
template <int V>
__device__ inline void rotate(float (&x)[V], const float2* rotation) {
#pragma unroll
    for (int i = 0; i < V; i += 2) {
        float2 r = rotation[i / 2];
        float a = x[i], b = x[i + 1];
        x[i] = a * r.x - b * r.y;
        x[i + 1] = a * r.y + b * r.x;
    }
}

// V numbers of one token and head at a time, for the first `tokens` tokens of a block and `width` numbers of each of `heads` heads: to = change(from), the
// loads of four of them before their stores. from(t, h, i) and to(t, h, i) are addresses, i counts numbers.
template <int V, class From, class To, class Change>
__device__ inline void for_heads(int tokens, int heads, int width, From from, To to, Change change) {
    constexpr int BATCH = 4;
    int per_head = width / V, per_token = heads * per_head, count = tokens * per_token;
    for (int j0 = threadIdx.x; j0 < count; j0 += BATCH * THREADS) {
        float x[BATCH][V];
        int t[BATCH], h[BATCH], i[BATCH];
#pragma unroll
        for (int k = 0; k < BATCH; k++) {
            int j = j0 + k * THREADS, rest = j % per_token;
            t[k] = j / per_token;
            h[k] = rest / per_head;
            i[k] = rest % per_head * V;
            if (j < count) load(x[k], from(t[k], h[k], i[k]));
        }
#pragma unroll
        for (int k = 0; k < BATCH; k++) {
            if (j0 + k * THREADS >= count) break;
            change(x[k], t[k], h[k], i[k]);
            store(to(t[k], h[k], i[k]), x[k]);
        }
    }
}

// The same for 16-byte vectors alone, in two steps, so that a thread's first vectors are on their way while the block does something else: load(), then
// finish() for these and the rest. change(x, t, h, i) may leave x to be stored at to(t, h, i).
constexpr int AHEAD = 4;  // vectors of a thread on their way at once
template <class From>
struct HeadVectors {
    From from;
    int per_head, per_token, count;
    Packed<floatX> x[AHEAD];
    int t[AHEAD], h[AHEAD], i[AHEAD];

    __device__ HeadVectors(int tokens, int heads, int width, From from)
        : from(from), per_head(width / VECTOR), per_token(heads * per_head), count(tokens * per_token) {}
    __device__ void load(int j0) {
#pragma unroll
        for (int k = 0; k < AHEAD; k++) {
            int j = j0 + k * THREADS;
            if (j >= count) break;
            t[k] = j / per_token;
            int rest = j - t[k] * per_token;
            h[k] = rest / per_head;
            i[k] = (rest - h[k] * per_head) * VECTOR;
            x[k] = load_packed(from(t[k], h[k], i[k]));
        }
    }
    template <class Use>
    __device__ void finish(Use use) {
        for (int j0 = threadIdx.x; j0 < count; j0 += AHEAD * THREADS) {
            if (j0 >= AHEAD * THREADS) load(j0);
#pragma unroll
            for (int k = 0; k < AHEAD; k++) {
                if (j0 + k * THREADS >= count) break;
                use(x[k], t[k], h[k], i[k]);
            }
        }
    }
};
__device__ inline void rotate(Packed<floatX>& x, const float2* rotation) {
    float numbers[VECTOR];
#pragma unroll
    for (int i = 0; i < VECTOR; i++) numbers[i] = x[i];
    rotate(numbers, rotation);
#pragma unroll
    for (int i = 0; i < VECTOR; i++) x.set(i, numbers[i]);
}

// rotations (tokens, d_rope/2) of a block's tokens, in shared memory.
__device__ inline void fill_rotations(float2* rotations, const int* position, int tokens, int d_rope, double exponent, int direction) {
    int pairs = d_rope / 2;
    for (int j = threadIdx.x; j < tokens * pairs; j += THREADS) rotations[j] = rope_rotation(position[j / pairs], j % pairs, exponent, direction);
}
inline int tokens_per_block(const MlaShape& d) { return d.d_rope == 0 ? TOKENS : std::max(1, std::min(TOKENS, 12288 / d.d_rope)); }  // 48 KB
inline double exponent(const MlaShape& d) { return d.d_rope ? rope_exponent(d.d_rope) : 0; }

inline bool vectors(const MlaShape& d) { return (d.d_nope | d.d_rope | d.d_v | d.d_c) % VECTOR == 0; }

}  // namespace mla

// ---- latents -----------------------------------------------------------------------------------------------------------------------------------------------

struct MlaLatents {
    const floatX* u;      // (N, d_c+d_rope)
    const floatX* gain;   // (d_c)
    const int* position;  // (N)
    // Where c and kr go: rows c_stride, kr_stride apart. kr may stay where it is in u.
    floatX* c;
    int64_t c_stride;
    floatX* kr;
    int64_t kr_stride;
    float* rstd = nullptr;  // (N) or null
    // Or, if not null, both side by side into the state's row of each token, behind what the state holds.
    const AttentionState* states = nullptr;
    const TokenPlace* place = nullptr;
    // The rope part of every query, row n, head h: from q[n·NH·d_qk + h·d_qk + d_nope] to q_to[n·q_stride + h·q_head], which may be the same place.
    const floatX* q;
    floatX* q_to;
    int64_t q_stride, q_head;
    // Or q is null, since the product that makes the queries rotates them; it asks for the rotations of all positions from 0 on: (positions, d_rope/2).
    float2* rotations = nullptr;
    int positions = 0;
};

// 16 tokens a block: a warp takes one at a time for its norm and kr, then all threads the queries.
template <int V>
__global__ void __launch_bounds__(mla::THREADS) mla_latents_kernel3(MlaShape d, MlaLatents a, int64_t N, int tokens_per_block, double exponent) {
    constexpr int W = mla::WIDTH<V>;
    extern __shared__ float2 mla_rotations[];
    int64_t n0 = (int64_t)blockIdx.x * tokens_per_block;
    int tokens = (int)min((int64_t)tokens_per_block, N - n0), lane = threadIdx.x % 32, pairs = d.d_rope / 2;
    mla::fill_rotations(mla_rotations, a.position + n0, tokens, d.d_rope, exponent, 1);
    __syncthreads();

    for (int t = threadIdx.x / 32; t < tokens; t += mla::THREADS / 32) {
        int64_t n = n0 + t;
        const floatX* u = a.u + n * d.u;
        floatX *c_to = a.c + n * a.c_stride, *kr_to = a.kr + n * a.kr_stride;
        if (a.states) {
            const AttentionState& state = a.states[a.place[n].seq];
            c_to = state.row(state.length + a.place[n].pos);
            kr_to = c_to + d.d_c;
        }
        bool whole = (uintptr_t)c_to % 16 == 0 && (uintptr_t)kr_to % 16 == 0;
        float sum = 0;
        for (int c = lane * W; c < d.d_c; c += 32 * W) {
            float x[W];
            mla::load(x, u + c);
#pragma unroll
            for (int i = 0; i < W; i++) sum += x[i] * x[i];
        }
        float r = 1 / sqrtf(warp_sum(sum) / d.d_c + norm_epsilon<false>);
        for (int c = lane * W; c < d.d_c; c += 32 * W) {
            float x[W], gain[W];
            mla::load(x, u + c);
            mla::load(gain, a.gain + c);
#pragma unroll
            for (int i = 0; i < W; i++) x[i] = x[i] * r * gain[i];
            mla::store(c_to + c, x, whole);
        }
        for (int i = lane * V; i < d.d_rope; i += 32 * V) {
            float x[V];
            mla::load(x, u + d.d_c + i);
            mla::rotate(x, mla_rotations + t * pairs + i / 2);
            mla::store(kr_to + i, x, whole);
        }
        if (lane == 0 && a.rstd) a.rstd[n] = r;
    }

    mla::for_heads<V>(
        tokens, d.NH, d.d_rope, [&](int t, int h, int i) { return a.q + (n0 + t) * d.q + (int64_t)h * d.d_qk + d.d_nope + i; },
        [&](int t, int h, int i) { return a.q_to + (n0 + t) * a.q_stride + h * a.q_head + i; },
        [&](float(&x)[V], int t, int, int i) { mla::rotate(x, mla_rotations + t * pairs + i / 2); });
}

// The same for rows on multiples of 16 bytes that fit a warp's registers: 32·VECTORS vectors. All of a warp's two rows and the first of the queries are on
// their way before the angles are computed.
template <int VECTORS>
__global__ void __launch_bounds__(mla::THREADS) mla_latents_kernel4(MlaShape d, MlaLatents a, int64_t N, int tokens_per_block, double exponent) {
    constexpr int W = mla::VECTOR, WARPS = mla::THREADS / 32, ROWS = mla::TOKENS / WARPS;
    extern __shared__ float2 mla_rotations[];
    int64_t n0 = (int64_t)blockIdx.x * tokens_per_block;
    int tokens = (int)min((int64_t)tokens_per_block, N - n0), lane = threadIdx.x % 32, warp = threadIdx.x / 32, pairs = d.d_rope / 2;
    auto query = [=](int t, int h, int i) { return a.q + (n0 + t) * d.q + (int64_t)h * d.d_qk + d.d_nope + i; };
    mla::HeadVectors<decltype(query)> queries(tokens, d.NH, d.d_rope, query);
    queries.load(threadIdx.x);
    Packed<floatX> u[ROWS][VECTORS], kr[ROWS];
#pragma unroll
    for (int k = 0; k < ROWS; k++) {
        int t = warp + k * WARPS;
        const floatX* row = a.u + (n0 + t) * d.u;
#pragma unroll
        for (int v = 0; v < VECTORS; v++) {
            int c = (v * 32 + lane) * W;
            if (t < tokens && c < d.d_c) u[k][v] = load_packed(row + c);
        }
        if (t < tokens && lane * W < d.d_rope) kr[k] = load_packed(row + d.d_c + lane * W);
    }
    mla::fill_rotations(mla_rotations, a.position + n0, tokens, d.d_rope, exponent, 1);
    __syncthreads();

#pragma unroll
    for (int k = 0; k < ROWS; k++) {
        int t = warp + k * WARPS;
        if (t >= tokens) break;
        int64_t n = n0 + t;
        floatX *c_to = a.c + n * a.c_stride, *kr_to = a.kr + n * a.kr_stride;
        float sum = 0;
#pragma unroll
        for (int v = 0; v < VECTORS; v++)
            if ((v * 32 + lane) * W < d.d_c)
                for (int i = 0; i < W; i++) sum += u[k][v][i] * u[k][v][i];
        float r = 1 / sqrtf(warp_sum(sum) / d.d_c + norm_epsilon<false>);
#pragma unroll
        for (int v = 0; v < VECTORS; v++) {
            int c = (v * 32 + lane) * W;
            if (c >= d.d_c) continue;
            Packed<floatX> gain = load_packed(a.gain + c), out;
#pragma unroll
            for (int i = 0; i < W; i++) out.set(i, u[k][v][i] * r * gain[i]);
            store_packed(c_to + c, out);
        }
        if (lane * W < d.d_rope) {
            mla::rotate(kr[k], mla_rotations + t * pairs + lane * W / 2);
            store_packed(kr_to + lane * W, kr[k]);
        }
        if (lane == 0 && a.rstd) a.rstd[n] = r;
    }
    queries.finish([&](Packed<floatX>& x, int t, int h, int i) {
        mla::rotate(x, mla_rotations + t * pairs + i / 2);
        store_packed(a.q_to + (n0 + t) * a.q_stride + h * a.q_head + i, x);
    });
}

// Without queries, rows as kernel 4 takes them, d_rope <= 64. A warp takes ROWS rows at a time, and a thread with a vector of kr computes its angles itself:
// there is nothing to wait for but memory. θ comes from the host, since 10000^(−2i/d) is most of an angle's arithmetic and of its registers.
struct MlaFrequencies {
    double theta[32];
    explicit MlaFrequencies(const MlaShape& d) {
        for (int i = 0; i < d.d_rope / 2; i++) theta[i] = std::exp2(i * mla::exponent(d));
    }
};
template <int VECTORS>
__global__ void __launch_bounds__(mla::THREADS) mla_latents_kernel5(MlaShape d, MlaLatents a, int64_t N, const __grid_constant__ MlaFrequencies frequencies) {
    constexpr int W = mla::VECTOR, ROWS = 4 / VECTORS;
    const int lane = threadIdx.x % 32, per_row = d.d_rope / W, pairs = d.d_rope / 2, pair = per_row > 0 ? lane % per_row * (W / 2) : 0;
    const int64_t n0 = ((int64_t)blockIdx.x * mla::THREADS + threadIdx.x) / 32 * ROWS, n = per_row > 0 ? n0 + lane / per_row : N;  // the thread's row of kr
    const bool has_kr = n < N && n < n0 + ROWS;
    Packed<floatX> u[ROWS][VECTORS], kr;
#pragma unroll
    for (int k = 0; k < ROWS; k++)
#pragma unroll
        for (int v = 0; v < VECTORS; v++) {
            int c = (v * 32 + lane) * W;
            u[k][v] = load_packed_if(n0 + k < N && c < d.d_c, a.u + (n0 + k) * d.u + c);
        }
    if (has_kr) {
        kr = load_packed(a.u + n * d.u + d.d_c + 2 * pair);
        const int position = a.position[n];
        float2 rotation[W / 2];
#pragma unroll
        for (int i = 0; i < W / 2; i++) rotation[i] = rope_rotation(position, frequencies.theta[pair + i], 1);
        mla::rotate(kr, rotation);
        store_packed(a.kr + n * a.kr_stride + 2 * pair, kr);
    }

    float r[ROWS];
#pragma unroll
    for (int k = 0; k < ROWS; k++) {
        float sum = 0;
#pragma unroll
        for (int v = 0; v < VECTORS; v++) {
#pragma unroll
            for (int i = 0; i < W; i++) sum += u[k][v][i] * u[k][v][i];  // zeros behind the end
            forget(u[k][v]);
        }
        r[k] = rsqrtf(warp_sum(sum) / d.d_c + norm_epsilon<false>);
    }
#pragma unroll
    for (int v = 0; v < VECTORS; v++) {
        int c = (v * 32 + lane) * W;
        if (c >= d.d_c) continue;
        Packed<floatX> gain = load_packed(a.gain + c), out;
#pragma unroll
        for (int k = 0; k < ROWS; k++) {
            if (n0 + k >= N) break;
#pragma unroll
            for (int i = 0; i < W; i++) out.set(i, u[k][v][i] * r[k] * gain[i]);
            store_packed(a.c + (n0 + k) * a.c_stride + c, out);
        }
    }
    if (a.rstd && lane < ROWS && n0 + lane < N) {
#pragma unroll
        for (int k = 0; k < ROWS; k++)
            if (lane == k) a.rstd[n0 + k] = r[k];
    }
    const int64_t count = (int64_t)a.positions * pairs, step = (int64_t)gridDim.x * mla::THREADS;
    for (int64_t j = (int64_t)blockIdx.x * mla::THREADS + threadIdx.x; j < count; j += step)
        a.rotations[j] = rope_rotation((int)(j / pairs), frequencies.theta[j % pairs], 1);
}

__global__ void mla_rotations_kernel(float2* rotations, int64_t count, int pairs, double exponent) {
    int64_t j = (int64_t)blockIdx.x * mla::THREADS + threadIdx.x;
    if (j < count) rotations[j] = rope_rotation((int)(j / pairs), (int)(j % pairs), exponent, 1);
}

template <int V>
inline void mla_latents_launch(cudaStream_t stream, MlaShape d, const MlaLatents& a, int64_t N) {
    int tokens = mla::tokens_per_block(d);
    if (!a.q) d.NH = 0;
    if (int64_t count = (int64_t)a.positions * (d.d_rope / 2)) {
        mla_rotations_kernel<<<(unsigned)ceil_div(count, mla::THREADS), mla::THREADS, 0, stream>>>(a.rotations, count, d.d_rope / 2, mla::exponent(d));
        LAUNCH_CHECK();
    }
    mla_latents_kernel3<V>
        <<<(unsigned)ceil_div(N, tokens), mla::THREADS, (size_t)tokens * d.d_rope * sizeof(float), stream>>>(d, a, N, tokens, mla::exponent(d));
    LAUNCH_CHECK();
}

inline void mla_latents(cudaStream_t stream, const MlaShape& d, const MlaLatents& a, int64_t N) {
    if (N == 0) return;
    bool whole = aligned16(a.u) && aligned16(a.gain) && aligned16(a.q) && aligned16(a.q_to) && (a.q_stride | a.q_head) % mla::VECTOR == 0;
    int vectors = (int)ceil_div(d.d_c, 32 * mla::VECTOR), tokens = mla::tokens_per_block(d);
    bool wide = vectors > 2 || d.d_rope > (a.q ? 32 * mla::VECTOR : 64);
    if (!mla::vectors(d) || !whole) {
        mla_latents_launch<mla::PAIR>(stream, d, a, N);
    } else if (a.states || wide || (a.c_stride | a.kr_stride) % mla::VECTOR != 0 || !aligned16(a.c) || !aligned16(a.kr)) {
        mla_latents_launch<mla::VECTOR>(stream, d, a, N);
    } else if (!a.q) {
        auto kernel = vectors <= 1 ? mla_latents_kernel5<1> : mla_latents_kernel5<2>;
        kernel<<<(unsigned)ceil_div(N, mla::THREADS / 32 * (vectors <= 1 ? 4 : 2)), mla::THREADS, 0, stream>>>(d, a, N, MlaFrequencies(d));
        LAUNCH_CHECK();
    } else {
        auto kernel = vectors <= 1 ? mla_latents_kernel4<1> : mla_latents_kernel4<2>;
        kernel<<<(unsigned)ceil_div(N, tokens), mla::THREADS, (size_t)tokens * d.d_rope * sizeof(float), stream>>>(d, a, N, tokens, mla::exponent(d));
        LAUNCH_CHECK();
    }
}

// ---- keys ------------------------------------------------------------------------------------------------------------------------------------------------

// A thread has one place in the rows of keys, W numbers wide, and copies it for 8 tokens, whose loads are on their way together.
constexpr int MLA_ASSEMBLE_TOKENS = 8;

template <int V>
__global__ void __launch_bounds__(mla::THREADS)
    mla_assemble_kernel3(MlaShape d, floatX* keys, const floatX* kv, const floatX* kr, int64_t kr_stride, int64_t N) {
    constexpr int W = mla::WIDTH<V>;
    int j = blockIdx.y * blockDim.x + threadIdx.x, per_head = d.d_qk / W, h = j / per_head, c = j % per_head * W;
    if (h >= d.NH) return;
    int64_t n0 = (int64_t)blockIdx.x * MLA_ASSEMBLE_TOKENS, stride = c < d.d_nope ? d.kv : kr_stride;
    const floatX* from = (c < d.d_nope ? kv + (int64_t)h * d.d_kv + c : kr + (c - d.d_nope)) + n0 * stride;
    floatX* to = keys + n0 * d.q + (int64_t)j * W;
    using Piece = std::conditional_t<W == mla::VECTOR, int4, floatX>;
    Piece x[MLA_ASSEMBLE_TOKENS];
#pragma unroll
    for (int t = 0; t < MLA_ASSEMBLE_TOKENS; t++)
        if (n0 + t < N) x[t] = *(const Piece*)(from + t * stride);
#pragma unroll
    for (int t = 0; t < MLA_ASSEMBLE_TOKENS; t++)
        if (n0 + t < N) *(Piece*)(to + t * d.q) = x[t];
}

template <int V>
inline void mla_assemble_launch(cudaStream_t stream, const MlaShape& d, floatX* keys, const floatX* kv, const floatX* kr, int64_t kr_stride, int64_t N) {
    int64_t places = d.q / mla::WIDTH<V>, rows = ceil_div(places, mla::THREADS), threads = round_up(ceil_div(places, rows), 32);
    dim3 grid((unsigned)ceil_div(N, MLA_ASSEMBLE_TOKENS), (unsigned)ceil_div(places, threads));
    mla_assemble_kernel3<V><<<grid, (unsigned)threads, 0, stream>>>(d, keys, kv, kr, kr_stride, N);
    LAUNCH_CHECK();
}

// keys (N,NH·d_qk), per head [kn | kr]; kv (N,NH·(d_nope+d_v)), per head [kn | v]; kr (N,d_rope), rotated, rows kr_stride apart.
inline void mla_assemble(cudaStream_t stream, const MlaShape& d, floatX* keys, const floatX* kv, const floatX* kr, int64_t kr_stride, int64_t N) {
    if (N == 0) return;
    if (mla::vectors(d) && kr_stride % mla::VECTOR == 0 && aligned16(keys) && aligned16(kv) && aligned16(kr))
        mla_assemble_launch<mla::VECTOR>(stream, d, keys, kv, kr, kr_stride, N);
    else
        mla_assemble_launch<mla::PAIR>(stream, d, keys, kv, kr, kr_stride, N);
}

// 16 tokens a block. The sum over heads is in float32 and in their order; it is rotated as a sum.
template <int V>
__global__ void __launch_bounds__(mla::THREADS) mla_split_kernel3(MlaShape d, const floatX* dkeys, floatX* dkv, floatX* du, floatX* dq, const int* position,
                                                                  int64_t N, int tokens_per_block, double exponent) {
    constexpr int W = mla::WIDTH<V>;
    extern __shared__ float2 mla_rotations[];
    int64_t n0 = (int64_t)blockIdx.x * tokens_per_block;
    int tokens = (int)min((int64_t)tokens_per_block, N - n0), pairs = d.d_rope / 2;
    mla::fill_rotations(mla_rotations, position + n0, tokens, d.d_rope, exponent, -1);

    auto key_at = [&](int t, int h, int c) { return dkeys + (n0 + t) * d.q + (int64_t)h * d.d_qk + c; };
    mla::for_heads<W>(
        tokens, d.NH, d.d_nope, key_at, [&](int t, int h, int c) { return dkv + (n0 + t) * d.kv + (int64_t)h * d.d_kv + c; },
        [](float(&)[W], int, int, int) {});
    __syncthreads();
    auto query_at = [&](int t, int h, int i) { return dq + (n0 + t) * d.q + (int64_t)h * d.d_qk + d.d_nope + i; };
    mla::for_heads<V>(tokens, d.NH, d.d_rope, query_at, query_at, [&](float(&x)[V], int t, int, int i) { mla::rotate(x, mla_rotations + t * pairs + i / 2); });
    int per_head = d.d_rope / V;
    for (int j = threadIdx.x; j < tokens * per_head; j += mla::THREADS) {
        int t = j / per_head, i = j % per_head * V;
        float sum[V] = {};
#pragma unroll 4
        for (int h = 0; h < d.NH; h++) {
            float x[V];
            mla::load(x, key_at(t, h, d.d_nope + i));
#pragma unroll
            for (int k = 0; k < V; k++) sum[k] += x[k];
        }
        mla::rotate(sum, mla_rotations + t * pairs + i / 2);
        mla::store(du + (n0 + t) * d.u + d.d_c + i, sum);
    }
}

// The same for rows on multiples of 16 bytes. The first queries are on their way before the angles are computed; the rows of dkeys are read as they stand, in
// one sweep, and the parts that are to be summed over heads wait in shared memory: (tokens,NH,d_rope), behind the rotations.
inline size_t mla_split_shared(const MlaShape& d, int tokens) { return (size_t)tokens * d.d_rope * (sizeof(float) + d.NH * sizeof(floatX)); }
__global__ void __launch_bounds__(mla::THREADS) mla_split_kernel4(MlaShape d, const floatX* dkeys, floatX* dkv, floatX* du, floatX* dq, const int* position,
                                                                  int64_t N, int tokens_per_block, double exponent) {
    extern __shared__ int4 mla_shared[];
    float2* rotations = (float2*)mla_shared;
    floatX* parts = (floatX*)(rotations + tokens_per_block * (d.d_rope / 2));
    int64_t n0 = (int64_t)blockIdx.x * tokens_per_block;
    int tokens = (int)min((int64_t)tokens_per_block, N - n0), pairs = d.d_rope / 2;
    auto query = [=](int t, int h, int i) { return dq + (n0 + t) * d.q + (int64_t)h * d.d_qk + d.d_nope + i; };
    auto key = [=](int t, int h, int i) { return dkeys + (n0 + t) * d.q + (int64_t)h * d.d_qk + i; };
    mla::HeadVectors<decltype(query)> queries(tokens, d.NH, d.d_rope, query);
    mla::HeadVectors<decltype(key)> keys(tokens, d.NH, d.d_qk, key);
    queries.load(threadIdx.x);
    keys.load(threadIdx.x);
    mla::fill_rotations(rotations, position + n0, tokens, d.d_rope, exponent, -1);
    keys.finish([&](Packed<floatX>& x, int t, int h, int i) {
        if (i < d.d_nope)
            store_packed(dkv + (n0 + t) * d.kv + (int64_t)h * d.d_kv + i, x);
        else
            store_packed(parts + (t * d.NH + h) * d.d_rope + i - d.d_nope, x);
    });
    __syncthreads();
    queries.finish([&](Packed<floatX>& x, int t, int h, int i) {
        mla::rotate(x, rotations + t * pairs + i / 2);
        store_packed(dq + (n0 + t) * d.q + (int64_t)h * d.d_qk + d.d_nope + i, x);
    });
    for (int j = threadIdx.x; j < tokens * pairs; j += mla::THREADS) {
        int t = j / pairs, i = 2 * (j - t * pairs);
        float sum[2] = {};
#pragma unroll 4
        for (int h = 0; h < d.NH; h++) {
            const floatX* part = parts + (t * d.NH + h) * d.d_rope + i;
            sum[0] += to_float(part[0]);
            sum[1] += to_float(part[1]);
        }
        mla::rotate(sum, rotations + j);
        floatX* to = du + (n0 + t) * d.u + d.d_c + i;
        to[0] = from_float<floatX>(sum[0]);
        to[1] = from_float<floatX>(sum[1]);
    }
}

template <int V>
inline void mla_split_launch(cudaStream_t stream, const MlaShape& d, const floatX* dkeys, floatX* dkv, floatX* du, floatX* dq, const int* position, int64_t N) {
    int tokens = mla::tokens_per_block(d);
    mla_split_kernel3<V><<<(unsigned)ceil_div(N, tokens), mla::THREADS, (size_t)tokens * d.d_rope * sizeof(float), stream>>>(d, dkeys, dkv, du, dq, position, N,
                                                                                                                             tokens, mla::exponent(d));
    LAUNCH_CHECK();
}

// From dkeys (N,NH·d_qk): the kn parts of dkv (N,NH·(d_nope+d_v)) and the kr part of du (N,d_c+d_rope). The rope parts of dq (N,NH·d_qk) are rotated back in
// place. position (N).
inline void mla_split(cudaStream_t stream, const MlaShape& d, const floatX* dkeys, floatX* dkv, floatX* du, floatX* dq, const int* position, int64_t N) {
    if (N == 0) return;
    int tokens = (int)std::min<size_t>(mla::TOKENS, (48 << 10) / std::max<size_t>(1, mla_split_shared(d, 1)));
    if (!mla::vectors(d) || !aligned16(dkeys) || !aligned16(dkv) || !aligned16(du) || !aligned16(dq)) {
        mla_split_launch<mla::PAIR>(stream, d, dkeys, dkv, du, dq, position, N);
    } else if (tokens == 0) {
        mla_split_launch<mla::VECTOR>(stream, d, dkeys, dkv, du, dq, position, N);
    } else {
        mla_split_kernel4<<<(unsigned)ceil_div(N, tokens), mla::THREADS, mla_split_shared(d, tokens), stream>>>(d, dkeys, dkv, du, dq, position, N, tokens,
                                                                                                                mla::exponent(d));
        LAUNCH_CHECK();
    }
}

}  // namespace gpu
