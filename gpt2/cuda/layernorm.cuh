// LayerNorm and RMSNorm over the channels of each row. RMSNorm is LayerNorm without the mean and without b, so both are one family of kernels: CENTRED says
// which (true: LayerNorm).
//
//     forward     x̂ = (x − m)·r,   y = x̂⊙w + b
//                     LayerNorm: m = mean(x), r = 1/√(mean((x − m)²) + 1e-5)        RMSNorm: m = 0, b = 0, r = 1/√(mean(x²) + 1e-6)
//     backward    t = dy⊙w,   dx = (or +=) r·(t − mean(t) − x̂·mean(t⊙x̂)),   dw += Σ_n dy⊙x̂,   db += Σ_n dy
//                     RMSNorm: without mean(t), which comes from m, and without db
//
// Shapes: x, y, dx, dy (N,C) with rows a stride apart, w, b (C), mean, rstd (N) float32, dw, db (C) float32. C up to 65536.
// These are all bound by memory: a pass should read each row once and write it once, in bf16 4·C bytes a row forward, 6·C backward, 8·C where dx is added to
// (65536 rows of 768 at 3.0 TB/s: 67, 101, 134 µs). How the kernels came about: dev/cuda/layernorm.cu.
//
// Rows that start on multiples of 16 bytes and fit take the kernels 4 and 5, which keep what they read in registers. All others take the kernels 3 (a warp a
// row, read again for each use), by 16-byte accesses where these are possible, by single numbers where not.
#pragma once

#include <algorithm>

#include "bias.cuh"
#include "common.cuh"
#include "numbers.cuh"
#include "tensor_cores.cuh"

namespace gpu {

template <bool CENTRED>
constexpr float norm_epsilon = CENTRED ? 1e-5f : 1e-6f;

__device__ inline Packed<floatX> load_packed_if(bool there, const floatX* p) {  // zeros if not there
    int4 bits = make_int4(0, 0, 0, 0);
    if (there) bits = *(const int4*)p;
    return *(Packed<floatX>*)&bits;
}

// To the compiler x is another number from here on. It would otherwise keep what it has computed from the first use (float32, twice the registers) for the
// second.
__device__ inline void forget(Packed<floatX>& x) {
    int4& bits = *(int4*)&x;
    asm("" : "+r"(bits.x), "+r"(bits.y), "+r"(bits.z), "+r"(bits.w));
}

// ---- forward -----------------------------------------------------------------------------------------------------------------------------------------------

// A warp a row. y may be x.
template <bool CENTRED, int W>
__global__ void norm_forward_kernel3(floatX* y, int64_t y_stride, float* mean, float* rstd, const floatX* x, int64_t x_stride, const floatX* w, const floatX* b,
                                     int64_t N, int C) {
    int lane = threadIdx.x % 32;
    int64_t n = ((int64_t)blockIdx.x * blockDim.x + threadIdx.x) / 32;
    if (n >= N) return;
    const floatX* row = x + n * x_stride;
    float m = 0, squares = 0;
    if constexpr (CENTRED) {
        for (int c = lane * W; c < C; c += 32 * W) {
            Numbers<W> u = load_numbers<W>(row + c);
            for (int k = 0; k < W; k++) m += u[k];
        }
        m = warp_sum(m) / C;
    }
    for (int c = lane * W; c < C; c += 32 * W) {
        Numbers<W> u = load_numbers<W>(row + c);
        for (int k = 0; k < W; k++) squares += (u[k] - m) * (u[k] - m);
    }
    float r = rsqrtf(warp_sum(squares) / C + norm_epsilon<CENTRED>);
    for (int c = lane * W; c < C; c += 32 * W) {
        Numbers<W> u = load_numbers<W>(row + c), weight = load_numbers<W>(w + c), bias;
        if constexpr (CENTRED) bias = load_numbers<W>(b + c);
        for (int k = 0; k < W; k++) u[k] = (u[k] - m) * r * weight[k] + bias[k];
        store_numbers<W>(y + n * y_stride + c, u);
    }
    if (lane == 0 && mean) mean[n] = m;
    if (lane == 0 && rstd) rstd[n] = r;
}

// A warp takes ROWS rows of at most 32·VECTORS vectors of 16 bytes, and holds them in registers: for short rows several, so that enough reads are under way
// at once. y may be x.
template <bool CENTRED, int ROWS, int VECTORS>
__global__ void __launch_bounds__(256) norm_forward_kernel4(floatX* y, int64_t y_stride, float* mean, float* rstd, const floatX* x, int64_t x_stride,
                                                            const floatX* __restrict__ w, const floatX* __restrict__ b, int64_t N, int C) {
    constexpr int W = Packed<floatX>::size;
    int lane = threadIdx.x % 32;
    int64_t n0 = ((int64_t)blockIdx.x * blockDim.x + threadIdx.x) / 32 * ROWS;
    if (n0 >= N) return;

    Packed<floatX> u[ROWS][VECTORS];
#pragma unroll
    for (int i = 0; i < ROWS; i++)
#pragma unroll
        for (int v = 0; v < VECTORS; v++) {
            int c = (v * 32 + lane) * W;
            u[i][v] = load_packed_if(n0 + i < N && c < C, x + (n0 + i) * x_stride + c);
        }

    float m[ROWS] = {}, r[ROWS] = {};
    if constexpr (CENTRED) {
#pragma unroll
        for (int i = 0; i < ROWS; i++) {
#pragma unroll
            for (int v = 0; v < VECTORS; v++)
                for (int k = 0; k < W; k++) m[i] += u[i][v][k];  // zeros beyond the end of the row
            m[i] = warp_sum(m[i]) / C;
        }
    }
#pragma unroll
    for (int i = 0; i < ROWS; i++) {
        float squares = 0;
#pragma unroll
        for (int v = 0; v < VECTORS; v++) {
            if ((v * 32 + lane) * W >= C) continue;
            for (int k = 0; k < W; k++) squares += (u[i][v][k] - m[i]) * (u[i][v][k] - m[i]);
        }
        r[i] = rsqrtf(warp_sum(squares) / C + norm_epsilon<CENTRED>);
    }

#pragma unroll
    for (int v = 0; v < VECTORS; v++) {
        int c = (v * 32 + lane) * W;
        if (c >= C) continue;
        Packed<floatX> weight = load_packed(w + c), bias, out;
        if constexpr (CENTRED) bias = load_packed(b + c);
#pragma unroll
        for (int i = 0; i < ROWS; i++) {
            if (n0 + i >= N) continue;
            for (int k = 0; k < W; k++) {
                float xhat = (u[i][v][k] - m[i]) * r[i];
                if constexpr (CENTRED)
                    out.set(k, xhat * weight[k] + bias[k]);
                else
                    out.set(k, xhat * weight[k]);
            }
            store_packed(y + (n0 + i) * y_stride + c, out);
        }
    }
#pragma unroll
    for (int i = 0; i < ROWS; i++) {
        if (lane != 0 || n0 + i >= N) continue;
        if (mean) mean[n0 + i] = m[i];
        if (rstd) rstd[n0 + i] = r[i];
    }
}

template <bool CENTRED, int W>
inline void norm_forward3(cudaStream_t stream, floatX* y, int64_t y_stride, float* mean, float* rstd, const floatX* x, int64_t x_stride, const floatX* w,
                          const floatX* b, int64_t N, int64_t C) {
    norm_forward_kernel3<CENTRED, W><<<(unsigned)ceil_div(N, 8), 256, 0, stream>>>(y, y_stride, mean, rstd, x, x_stride, w, b, N, (int)C);
    LAUNCH_CHECK();
}

template <bool CENTRED>
inline void norm_forward(cudaStream_t stream, floatX* y, int64_t y_stride, float* mean, float* rstd, const floatX* x, int64_t x_stride, const floatX* w,
                         const floatX* b, int64_t N, int64_t C) {
    constexpr int W = Packed<floatX>::size;
    bool aligned = C % W == 0 && y_stride % W == 0 && x_stride % W == 0 && aligned16(y) && aligned16(x) && aligned16(w) && aligned16(b);
    int64_t vectors = ceil_div(C, 32 * W);  // a lane has
    if (!aligned || vectors > 8) {
        (aligned ? norm_forward3<CENTRED, W> : norm_forward3<CENTRED, 1>)(stream, y, y_stride, mean, rstd, x, x_stride, w, b, N, C);
        return;
    }
    auto kernel = vectors == 1 ? norm_forward_kernel4<CENTRED, 4, 1> : vectors <= 4 ? norm_forward_kernel4<CENTRED, 1, 4> : norm_forward_kernel4<CENTRED, 1, 8>;
    int rows = 8 * (vectors == 1 ? 4 : 1);  // a block of 8 warps takes
    kernel<<<(unsigned)ceil_div(N, rows), 256, 0, stream>>>(y, y_stride, mean, rstd, x, x_stride, w, b, N, (int)C);
    LAUNCH_CHECK();
}

// y (N,C), mean, rstd (N; may be null); x (N,C), w, b (C). cpu::layernorm_forward.
inline void layernorm_forward(cudaStream_t stream, floatX* y, float* mean, float* rstd, const floatX* x, const floatX* w, const floatX* b, int64_t N,
                              int64_t C) {
    norm_forward<true>(stream, y, C, mean, rstd, x, C, w, b, N, C);
}

// y (N,C) with rows y_stride apart, rstd (N; may be null); u (N,C) with rows u_stride apart, gain (C). y may be u. cpu::rmsnorm_forward.
inline void rmsnorm_forward(cudaStream_t stream, floatX* y, int64_t y_stride, float* rstd /*or null*/, const floatX* u, int64_t u_stride, const floatX* gain,
                            int64_t N, int64_t C) {
    norm_forward<false>(stream, y, y_stride, nullptr, rstd, u, u_stride, gain, nullptr, N, C);
}

// ---- backward ----------------------------------------------------------------------------------------------------------------------------------------------
// dw and db are sums over all rows: partial rows (dw; db) in the workspace, each over some of the rows, then their sum. Kernels 3 take a second launch for it.

template <bool CENTRED>
constexpr int norm_sums = CENTRED ? 2 : 1;  // dw, db: a partial row has norm_sums·C numbers

// dw, db += Σ over the partial rows. A block takes 8 columns (32 bytes, the least that memory moves): thread (y, x) adds the rows y, y+128, ... of column x.
template <bool CENTRED>
__global__ void __launch_bounds__(1024) norm_sum_kernel(float* dw, float* db, const float* __restrict__ partial, int rows, int C) {
    int columns = norm_sums<CENTRED> * C;
    __shared__ float shared[8][33];
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, column = blockIdx.x * 8 + lane % 8;
    float sum = 0;
    if (column < columns) {
#pragma unroll 4
        for (int row = threadIdx.x / 8; row < rows; row += 128) sum += partial[(int64_t)row * columns + column];
    }
    // Four lanes of each warp hold the same column.
    sum += __shfl_xor_sync(0xffffffff, sum, 8);
    sum += __shfl_xor_sync(0xffffffff, sum, 16);
    if (lane < 8) shared[lane][warp] = sum;
    __syncthreads();
    if (warp >= 8) return;
    sum = warp_sum(shared[warp][lane]);
    column = blockIdx.x * 8 + warp;
    if (lane == 0 && column < columns) *(column < C ? dw + column : db + column - C) += sum;
}

// Rows alone: a warp a row, read once for the means and once more for dx. dx may be dy.
template <bool CENTRED, int W>
__global__ void norm_backward_kernel3(floatX* dx, int64_t dx_stride, bool accumulate, const floatX* dy, int64_t dy_stride, const floatX* x, int64_t x_stride,
                                      const float* mean, const float* rstd, const floatX* w, int64_t N, int C) {
    int lane = threadIdx.x % 32;
    int64_t n = ((int64_t)blockIdx.x * blockDim.x + threadIdx.x) / 32;
    if (n >= N) return;
    const floatX *g_row = dy + n * dy_stride, *x_row = x + n * x_stride;
    float m = CENTRED ? mean[n] : 0, r = rstd[n], mean_t = 0, mean_tx = 0;
    for (int c = lane * W; c < C; c += 32 * W) {
        Numbers<W> g = load_numbers<W>(g_row + c), u = load_numbers<W>(x_row + c), weight = load_numbers<W>(w + c);
        for (int k = 0; k < W; k++) {
            float t = g[k] * weight[k];
            mean_t += t;
            mean_tx += t * ((u[k] - m) * r);
        }
    }
    mean_t = CENTRED ? warp_sum(mean_t) / C : 0;
    mean_tx = warp_sum(mean_tx) / C;
    for (int c = lane * W; c < C; c += 32 * W) {
        Numbers<W> g = load_numbers<W>(g_row + c), u = load_numbers<W>(x_row + c), weight = load_numbers<W>(w + c), d;
        if (accumulate) d = load_numbers<W>(dx + n * dx_stride + c);
        for (int k = 0; k < W; k++) d[k] += r * (g[k] * weight[k] - mean_t - (u[k] - m) * r * mean_tx);
        store_numbers<W>(dx + n * dx_stride + c, d);
    }
}

// Columns alone: a thread takes W columns of one piece of `rows` rows; blockIdx.y is the piece and its partial row.
template <bool CENTRED, int W>
__global__ void norm_columns_kernel3(float* partial, const floatX* dy, int64_t dy_stride, const floatX* x, int64_t x_stride, const float* mean,
                                     const float* rstd, int64_t N, int C, int64_t rows) {
    int c = (blockIdx.x * blockDim.x + threadIdx.x) * W;
    if (c >= C) return;
    int64_t begin = blockIdx.y * rows, end = min(begin + rows, N);
    Numbers<W> dw, db;
    for (int64_t n = begin; n < end; n++) {
        Numbers<W> g = load_numbers<W>(dy + n * dy_stride + c), u = load_numbers<W>(x + n * x_stride + c);
        float m = CENTRED ? mean[n] : 0, r = rstd[n];
        for (int k = 0; k < W; k++) {
            dw[k] += g[k] * ((u[k] - m) * r);
            db[k] += g[k];
        }
    }
    float* sums = partial + (int64_t)blockIdx.y * norm_sums<CENTRED> * C + c;
    store_numbers<W>(sums, dw);
    if constexpr (CENTRED) store_numbers<W>(sums + C, db);
}

// Where the rows are sequences of T tokens, one behind the other: sums (T,C) += Σ over the sequences of dx's rows, position by position.
struct PositionSums {
    float* sums = nullptr;
    int T = 1;
};

// Both in one pass. A thread owns one vector of columns, for all rows of its group: w and the sums for dw, db and the columns of dx stay in its registers.
// blockDim.x threads (whole warps) make a row, blockDim.y such groups a block, one block fills a multiprocessor. A group takes ROWS rows at a time, so that one
// barrier of its warps serves them all; what it reads of the next rows is on its way into shared memory meanwhile, STAGES deep: each thread fetches what it
// will itself use, so that needs no barrier. At the end the groups' sums are added up, and all blocks' (bias.cuh). dx may be dy.
//
// The rows that a group takes at a time are neighbours. With PositionSums they are those of one position in neighbouring sequences: the group goes through all
// sequences with the position's sum in its registers, adds it to the table, and goes on to its next position. All groups go through the sequences side by
// side, so that together they still read memory from its beginning to its end.
constexpr int NORM_BACKWARD_THREADS = 640;  // at most: so many vectors a row may have
constexpr int NORM_BACKWARD_ROWS = 2, NORM_BACKWARD_STAGES = 3;
template <bool CENTRED>
__global__ void __launch_bounds__(NORM_BACKWARD_THREADS, 1)
    norm_backward_kernel5(floatX* dx, int64_t dx_stride, bool accumulate, ColumnSums sums, PositionSums positions, float* partial, const floatX* dy,
                          int64_t dy_stride, const floatX* x, int64_t x_stride, const float* mean, const float* rstd, const floatX* w, int64_t N, int C) {
    constexpr int W = Packed<floatX>::size, ROWS = NORM_BACKWARD_ROWS, STAGES = NORM_BACKWARD_STAGES;
    extern __shared__ int4 ring[];                                  // [stage][row][dy, x, dx if it is added to][thread]
    __shared__ float2 shared[2][NORM_BACKWARD_THREADS / 32][ROWS];  // [round % 2][warp][row]: Σ t, Σ t⊙x̂
    int lane = threadIdx.x % 32, warps = blockDim.x / 32, first_warp = threadIdx.y * warps, c = threadIdx.x * W, arrays = 2 + accumulate;
    int threads = blockDim.x * blockDim.y, thread = threadIdx.y * blockDim.x + threadIdx.x;
    bool mine = c < C;
    int groups = gridDim.x * blockDim.y, rows = (int)N;
    float share = 1.0f / C;
    Packed<floatX> weight = load_packed_if(mine, w + c);
    Numbers<W> dw, db, dx_sum;

    // In work at a time are the rows first, first + apart, ...; `ahead` is the first of those to be fetched next, or `rows` if there are no more. Positions are
    // dealt out to the blocks one by one, so that all have equally many.
    bool by_position = CENTRED && positions.sums;
    int apart = by_position ? positions.T : 1, step = ROWS * (by_position ? positions.T : groups);
    int position = threadIdx.y * gridDim.x + blockIdx.x, ahead = ROWS * (blockIdx.x * blockDim.y + threadIdx.y);
    if (by_position) ahead = position < positions.T ? position : rows;
    auto advance = [&] {
        ahead += step;
        if (ahead < rows) return;
        position += groups;
        ahead = by_position && position < positions.T ? position : rows;
    };

    auto slot = [&](int stage, int i, int array) { return ring + ((stage * ROWS + i) * arrays + array) * threads + thread; };
    auto fetch = [&](int first, int stage) {
#pragma unroll
        for (int i = 0; i < ROWS; i++) {
            int n = first + i * apart;
            bool there = mine && n < rows;
            if (!there) n = 0;
            copy_async16(shared_address(slot(stage, i, 0)), dy + n * dy_stride + (mine ? c : 0), there);
            copy_async16(shared_address(slot(stage, i, 1)), x + n * x_stride + (mine ? c : 0), there);
            if (accumulate) copy_async16(shared_address(slot(stage, i, 2)), dx + n * dx_stride + (mine ? c : 0), there);
        }
        copy_async_commit();
    };
    float next_m[ROWS], next_r[ROWS];
    auto fetch_statistics = [&](int first) {
#pragma unroll
        for (int i = 0; i < ROWS; i++) {
            int n = first + i * apart;
            next_m[i] = CENTRED && n < rows ? mean[n] : 0;
            next_r[i] = n < rows ? rstd[n] : 0;
        }
    };

    static_assert(STAGES == 3, "first, second, ahead");
    int first = ahead;
    fetch(first, 0);
    fetch_statistics(first);
    advance();
    int second = ahead;
    fetch(second, 1);
    int round = 0, stage = 0;
    for (; first < rows; first = second, second = ahead, round ^= 1) {
        advance();
        fetch(ahead, stage == 0 ? STAGES - 1 : stage - 1);
        float m[ROWS], r[ROWS];
        for (int i = 0; i < ROWS; i++) m[i] = next_m[i], r[i] = next_r[i];
        fetch_statistics(second);
        copy_async_wait<STAGES - 1>();

        // Rows and columns that are not there are zeros and add nothing.
        Packed<floatX> g[ROWS], u[ROWS];
        float t[ROWS] = {}, tx[ROWS] = {};
#pragma unroll
        for (int i = 0; i < ROWS; i++) {
            g[i] = *(Packed<floatX>*)slot(stage, i, 0);
            u[i] = *(Packed<floatX>*)slot(stage, i, 1);
#pragma unroll
            for (int k = 0; k < W; k++) {
                float xhat = (u[i][k] - m[i]) * r[i], tk = g[i][k] * weight[k];
                t[i] += tk;
                tx[i] += tk * xhat;
                dw[k] += g[i][k] * xhat;
                db[k] += g[i][k];
            }
            if (CENTRED) t[i] = warp_sum(t[i]);
            tx[i] = warp_sum(tx[i]);
        }
        if (warps > 1) {
            // Two buffers in turn: who writes one of them again has passed the barrier of the round between, so all have read it.
            for (int i = 0; i < ROWS; i++)
                if (lane == 0) shared[round][first_warp + threadIdx.x / 32][i] = make_float2(t[i], tx[i]);
            named_barrier(1 + threadIdx.y, blockDim.x);
            for (int i = 0; i < ROWS; i++) t[i] = tx[i] = 0;
            for (int k = 0; k < warps; k++)
                for (int i = 0; i < ROWS; i++) {
                    float2 part = shared[round][first_warp + k][i];
                    t[i] += part.x;
                    tx[i] += part.y;
                }
        }

#pragma unroll
        for (int i = 0; i < ROWS; i++) {
            int n = first + i * apart;
            if (!mine || n >= rows) continue;
            forget(g[i]), forget(u[i]);
            float mean_t = CENTRED ? t[i] * share : 0, mean_tx = tx[i] * share;
            Packed<floatX> before, out;
            if (accumulate) before = *(Packed<floatX>*)slot(stage, i, 2);
#pragma unroll
            for (int k = 0; k < W; k++) {
                float xhat = (u[i][k] - m[i]) * r[i], d = r[i] * (g[i][k] * weight[k] - mean_t - xhat * mean_tx);
                if (accumulate) d += before[k];
                dx_sum[k] += d;
                out.set(k, d);
            }
            store_packed(dx + n * dx_stride + c, out);
        }
        if (++stage == STAGES) stage = 0;
        if (by_position && mine && first + step >= rows) {  // these were the last sequences
            float* to = positions.sums + (int64_t)(first % positions.T) * C + c;
            Numbers<W> before = load_numbers<W>(to);
            for (int k = 0; k < W; k++) dx_sum[k] += before[k];
            store_numbers<W>(to, dx_sum);
            dx_sum = {};
        }
    }

    // The ring serves for the groups' sums, (groups, columns).
    int columns = norm_sums<CENTRED> * C + (sums.third ? C : 0);
    float* group_sums = (float*)ring;
    copy_async_wait_all();
    __syncthreads();
    if (mine) {
        float* to = group_sums + threadIdx.y * columns + c;
        store_numbers<W>(to, dw);
        if constexpr (CENTRED) {
            store_numbers<W>(to + C, db);
            if (sums.third) store_numbers<W>(to + 2 * C, dx_sum);
        }
    }
    __syncthreads();
    for (int j = thread; j < columns; j += threads) {
        float total = 0;
#pragma unroll 4
        for (int y = 0; y < blockDim.y; y++) total += group_sums[y * columns + j];
        partial[(int64_t)blockIdx.x * columns + j] = total;
    }
    add_partial_rows(sums, partial, gridDim.x, columns, C);
}

template <bool CENTRED>
inline void norm_sum(cudaStream_t stream, float* dw, float* db, int64_t partial_rows, int64_t C) {
    norm_sum_kernel<CENTRED><<<(unsigned)ceil_div(norm_sums<CENTRED> * C, 8), 1024, 0, stream>>>(dw, db, (const float*)workspace(), (int)partial_rows, (int)C);
    LAUNCH_CHECK();
}
template <bool CENTRED>
inline int64_t norm_partial_rows(int64_t C) {  // that fit the workspace
    return WORKSPACE_BYTES / (norm_sums<CENTRED> * C * (int64_t)sizeof(float));
}

template <bool CENTRED, int W>
inline void norm_backward3(cudaStream_t stream, floatX* dx, int64_t dx_stride, bool accumulate, float* dw, float* db, const floatX* dy, int64_t dy_stride,
                           const floatX* x, int64_t x_stride, const float* mean, const float* rstd, const floatX* w, int64_t N, int64_t C) {
    // First the columns, since dx may overwrite dy.
    int64_t rows = ceil_div(N, std::min<int64_t>({norm_partial_rows<CENTRED>(C), 512, ceil_div(N, 16)})), pieces = ceil_div(N, rows);
    dim3 grid((unsigned)ceil_div(C, 128 * W), (unsigned)pieces);
    norm_columns_kernel3<CENTRED, W><<<grid, 128, 0, stream>>>((float*)workspace(), dy, dy_stride, x, x_stride, mean, rstd, N, (int)C, rows);
    LAUNCH_CHECK();
    norm_sum<CENTRED>(stream, dw, db, pieces, C);
    norm_backward_kernel3<CENTRED, W>
        <<<(unsigned)ceil_div(N, 8), 256, 0, stream>>>(dx, dx_stride, accumulate, dy, dy_stride, x, x_stride, mean, rstd, w, N, (int)C);
    LAUNCH_CHECK();
}

// Threads that a row of norm_backward_kernel5 takes, and how many rows (groups) a block has room for; 0 groups: the row is too long.
struct NormBackwardShape {
    int row, thread_bytes, groups;
    NormBackwardShape(int64_t C, bool accumulate) {
        row = (int)round_up(ceil_div(C, Packed<floatX>::size), 32);
        thread_bytes = NORM_BACKWARD_STAGES * NORM_BACKWARD_ROWS * (2 + accumulate) * 16;
        groups = (int)std::min<int64_t>(NORM_BACKWARD_THREADS, ((int64_t)device_properties().sharedMemPerBlockOptin - 8192) / thread_bytes) / row;
    }
};

// dx_sums: Σ_n dx_n is added to it as well, or null. positions: dx is summed by position instead. Both for LayerNorm alone.
template <bool CENTRED>
inline void norm_backward(cudaStream_t stream, floatX* dx, int64_t dx_stride, bool accumulate, float* dw, float* db, float* dx_sums, PositionSums positions,
                          const floatX* dy, int64_t dy_stride, const floatX* x, int64_t x_stride, const float* mean, const float* rstd, const floatX* w,
                          int64_t N, int64_t C) {
    constexpr int W = Packed<floatX>::size;
    if (N == 0) return;
    bool aligned =
        C % W == 0 && dx_stride % W == 0 && dy_stride % W == 0 && x_stride % W == 0 && aligned16(dx) && aligned16(dy) && aligned16(x) && aligned16(w);
    NormBackwardShape shape(C, accumulate);
    if (!aligned || shape.groups == 0) {
        assert(!positions.sums);
        (aligned ? norm_backward3<CENTRED, W> : norm_backward3<CENTRED, 1>)(stream, dx, dx_stride, accumulate, dw, db, dy, dy_stride, x, x_stride, mean, rstd,
                                                                            w, N, C);
        if (dx_sums) bias_backward(stream, dx_sums, dx, N, C, dx_stride);
        return;
    }
    int groups = shape.groups;
    int64_t each = ceil_div(positions.T, (int64_t)device_properties().multiProcessorCount);  // positions a block has
    if (positions.sums) {
        assert(!dx_sums && N % positions.T == 0 && aligned16(positions.sums));
        groups = (int)ceil_div(each, ceil_div(each, groups));  // as few as manage in as many turns as all would take
    }
    int threads = shape.row * groups, bytes = threads * shape.thread_bytes;
    allow_shared_memory(norm_backward_kernel5<CENTRED>, bytes);
    int64_t blocks = positions.sums ? ceil_div(positions.T, each)
                                    : std::min(ceil_div(N, NORM_BACKWARD_ROWS * groups), resident_blocks(norm_backward_kernel5<CENTRED>, threads, bytes));
    launch_together(norm_backward_kernel5<CENTRED>, blocks, dim3(shape.row, groups), bytes, stream, dx, dx_stride, accumulate, ColumnSums{dw, db, dx_sums},
                    positions, (float*)workspace(), dy, dy_stride, x, x_stride, mean, rstd, w, N, C);
}

// dx (N,C) = (accumulate: +=) ..., dw, db (C) +=; dy, x (N,C), mean, rstd (N) as the forward pass left them, w (C). cpu::layernorm_backward.
// dx_sums (C) or null: += Σ_n dx_n, of dx as it is in the end. Where dx is the gradient of a linear layer's output, this is the layer's bias gradient.
// positions: instead of that, the sums of dx by position. Where dx is the gradient of the encoder's output, this is the gradient of wpe.
inline void layernorm_backward(cudaStream_t stream, floatX* dx, bool accumulate, float* dw, float* db, const floatX* dy, const floatX* x, const float* mean,
                               const float* rstd, const floatX* w, int64_t N, int64_t C, float* dx_sums = nullptr, PositionSums positions = {}) {
    norm_backward<true>(stream, dx, C, accumulate, dw, db, dx_sums, positions, dy, C, x, C, mean, rstd, w, N, C);
}
// Whether layernorm_backward should be asked for the sums of T positions: its kernel must take rows of C, and each multiprocessor have some positions in work.
inline bool layernorm_sums_positions(int64_t T, int64_t C) {
    return C % Packed<floatX>::size == 0 && NormBackwardShape(C, true).groups > 0 && T >= 3 * device_properties().multiProcessorCount;
}

// du (N,C) with rows du_stride apart, dgain (C) +=; dy, u (N,C) with strides, rstd (N) as the forward pass left it, gain (C). du may be dy.
// cpu::rmsnorm_backward.
inline void rmsnorm_backward(cudaStream_t stream, floatX* du, int64_t du_stride, float* dgain, const floatX* dy, int64_t dy_stride, const floatX* u,
                             int64_t u_stride, const float* rstd, const floatX* gain, int64_t N, int64_t C) {
    norm_backward<false>(stream, du, du_stride, false, dgain, nullptr, nullptr, PositionSums{}, dy, dy_stride, u, u_stride, nullptr, rstd, gain, N, C);
}

}  // namespace gpu
