// The ladders of LayerNorm and RMSNorm, forward and backward.
//
//     forward     x̂ = (x − m)·r,  y = x̂⊙w + b          LayerNorm: m, r from the row's mean and variance; RMSNorm: m = 0, b = 0, r from its mean square
//     backward    t = dy⊙w,  dx = (or +=) r·(t − mean(t) − x̂·mean(t⊙x̂))        without mean(t) for RMSNorm;    dw += Σ_n dy⊙x̂,  db += Σ_n dy
//
// Some ten operations a number: memory is the limit. Forward reads x and writes y, backward reads dy and x (and dx, if it adds to it) and writes dx.
// In bf16 at 3.0 TB/s:
//     LayerNorm  N=65536 C=768     forward 201 MB = 67 µs     backward, adding to dx    403 MB = 134 µs
//     LayerNorm  N=65536 C=1600    forward 419 MB = 140 µs    backward, adding to dx    839 MB = 280 µs
//     RMSNorm    N=65536 C=768     forward 201 MB = 67 µs     backward, overwriting dx  302 MB = 101 µs
//     RMSNorm    N=65536 C=256     forward 67 MB = 22 µs      backward                  101 MB = 34 µs     (MLA's latents: rows 288 apart)
//
// Forward
//   1. A thread a row. The 32 threads of a warp read 32 rows at once, 2 bytes of each 32 that memory delivers.
//   2. A block a row, sums through a tree in shared memory. Neighbouring threads read neighbours; but each row costs sixteen barriers. Expected: several
//      times faster.
//   3. A warp a row: sums by shuffles, no barrier, no shared memory; a row is read three times, twice from the L1 cache (norm_forward_kernel3 with W = 1).
//   4. 16-byte accesses, and the row stays in registers between its three uses; short rows four at a time (norm_forward_kernel4). Expected: above 80 % of
//      the copy's bandwidth.
//
// Backward
//   1. A thread a row for dx, a thread a column for dw and db: too few threads in both.
//   2. A warp a row for dx; the columns' sums in two stages, first over pieces of the rows (norm_backward_kernel3, norm_columns_kernel3 with W = 1).
//   3. The same by 16-byte accesses (W = 8): fewer instructions. dy and x still come from memory twice: 5/4 of the bytes when it overwrites, 6/4 when it adds.
//   4. One pass. Each thread owns the same eight columns of all rows of its block: w and the sums for dw and db stay in its registers, and dy and x are read
//      once (norm_backward_kernel4). Expected: above 75 % of the copy's bandwidth.
//   5. Version 4 loads nothing while it computes and waits at its barriers, other blocks have to fill that time. Now the next rows are always on their way,
//      through cp.async into shared memory, 147 KB a multiprocessor where Little's law asks for some 20; groups of a block no longer wait for each other;
//      and the partial sums (a fifth of what version 4 leaves) are added up in the same launch (norm_backward_kernel5). Expected: 92 % of the copy's bandwidth
//      for 768 columns. The sums over the columns of dx come with it, which elsewhere cost a pass of their own: they are in registers anyway. So are the sums
//      over rows of one position of all sequences, the gradient of wpe, if a group takes its rows in that order: PositionSums, for the network's first
//      LayerNorm. 6 MB more are read and written for T = 1024 positions (2 µs), and the encoder's backward pass no longer reads dx a second time for them.
#define GPT2_NO_MAIN
#include "../../train_gpt2.cpp"

#include "../../gpt2/cuda/layernorm.cuh"
#include "ladder.h"

using namespace gpu;

constexpr int W = Packed<floatX>::size;

// What the functions of a family take, as norm_forward and norm_backward have it.
struct Forward {
    floatX* y;
    int64_t y_stride;
    float *mean, *rstd;
    const floatX* x;
    int64_t x_stride;
    const floatX *w, *b;
    int64_t N, C;
};
struct Backward {
    floatX* dx;
    int64_t dx_stride;
    bool accumulate;
    float *dw, *db;
    const floatX* dy;
    int64_t dy_stride;
    const floatX* x;
    int64_t x_stride;
    const float *mean, *rstd;
    const floatX* w;
    int64_t N, C;
    float* dx_sums = nullptr;
    PositionSums positions = {};
};

// ---- forward -------------------------------------------------------------------------------------------------------------------------------------------

template <bool CENTRED>
__global__ void norm_forward_kernel1(Forward f) {
    int64_t n = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (n >= f.N) return;
    const floatX* x = f.x + n * f.x_stride;
    float m = 0, squares = 0;
    if (CENTRED) {
        for (int64_t c = 0; c < f.C; c++) m += to_float(x[c]);
        m /= f.C;
    }
    for (int64_t c = 0; c < f.C; c++) squares += (to_float(x[c]) - m) * (to_float(x[c]) - m);
    float r = 1 / sqrtf(squares / f.C + norm_epsilon<CENTRED>);
    for (int64_t c = 0; c < f.C; c++)
        f.y[n * f.y_stride + c] = from_float<floatX>((to_float(x[c]) - m) * r * to_float(f.w[c]) + (CENTRED ? to_float(f.b[c]) : 0));
    if (CENTRED) f.mean[n] = m;
    f.rstd[n] = r;
}

// Sum over a block of 256 threads; every thread gets it.
__device__ float tree_sum(float x, float* shared) {
    shared[threadIdx.x] = x;
    __syncthreads();
    for (int half = 128; half > 0; half /= 2) {
        if (threadIdx.x < half) shared[threadIdx.x] += shared[threadIdx.x + half];
        __syncthreads();
    }
    float sum = shared[0];
    __syncthreads();
    return sum;
}

template <bool CENTRED>
__global__ void norm_forward_kernel2(Forward f) {
    __shared__ float shared[256];
    int64_t n = blockIdx.x;
    const floatX* x = f.x + n * f.x_stride;
    float m = 0, squares = 0;
    if (CENTRED) {
        for (int64_t c = threadIdx.x; c < f.C; c += blockDim.x) m += to_float(x[c]);
        m = tree_sum(m, shared) / f.C;
    }
    for (int64_t c = threadIdx.x; c < f.C; c += blockDim.x) squares += (to_float(x[c]) - m) * (to_float(x[c]) - m);
    float r = 1 / sqrtf(tree_sum(squares, shared) / f.C + norm_epsilon<CENTRED>);
    for (int64_t c = threadIdx.x; c < f.C; c += blockDim.x)
        f.y[n * f.y_stride + c] = from_float<floatX>((to_float(x[c]) - m) * r * to_float(f.w[c]) + (CENTRED ? to_float(f.b[c]) : 0));
    if (threadIdx.x > 0) return;
    if (CENTRED) f.mean[n] = m;
    f.rstd[n] = r;
}

template <bool CENTRED>
static void forward(int version, cudaStream_t stream, const Forward& f) {
    if (version == 1) {
        norm_forward_kernel1<CENTRED><<<(unsigned)ceil_div(f.N, 128), 128, 0, stream>>>(f);
        LAUNCH_CHECK();
    } else if (version == 2) {
        norm_forward_kernel2<CENTRED><<<(unsigned)f.N, 256, 0, stream>>>(f);
        LAUNCH_CHECK();
    } else if (version == 3) {
        norm_forward3<CENTRED, 1>(stream, f.y, f.y_stride, f.mean, f.rstd, f.x, f.x_stride, f.w, f.b, f.N, f.C);
    } else if (CENTRED) {
        layernorm_forward(stream, f.y, f.mean, f.rstd, f.x, f.w, f.b, f.N, f.C);
    } else {
        rmsnorm_forward(stream, f.y, f.y_stride, f.rstd, f.x, f.x_stride, f.w, f.N, f.C);
    }
}

// ---- backward ------------------------------------------------------------------------------------------------------------------------------------------

template <bool CENTRED>
__global__ void norm_backward_kernel1(Backward b) {
    int64_t n = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (n >= b.N) return;
    const floatX *g = b.dy + n * b.dy_stride, *x = b.x + n * b.x_stride;
    float m = CENTRED ? b.mean[n] : 0, r = b.rstd[n], mean_t = 0, mean_tx = 0;
    for (int64_t c = 0; c < b.C; c++) {
        float t = to_float(g[c]) * to_float(b.w[c]);
        mean_t += t;
        mean_tx += t * (to_float(x[c]) - m) * r;
    }
    mean_t = CENTRED ? mean_t / b.C : 0;
    mean_tx /= b.C;
    for (int64_t c = 0; c < b.C; c++) {
        floatX* dx = b.dx + n * b.dx_stride + c;
        float d = r * (to_float(g[c]) * to_float(b.w[c]) - mean_t - (to_float(x[c]) - m) * r * mean_tx);
        *dx = from_float<floatX>(b.accumulate ? to_float(*dx) + d : d);
    }
}

template <bool CENTRED>
__global__ void norm_columns_kernel1(Backward b) {
    int64_t c = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (c >= b.C) return;
    float dw = 0, db = 0;
    for (int64_t n = 0; n < b.N; n++) {
        float g = to_float(b.dy[n * b.dy_stride + c]);
        dw += g * (to_float(b.x[n * b.x_stride + c]) - (CENTRED ? b.mean[n] : 0)) * b.rstd[n];
        db += g;
    }
    b.dw[c] += dw;
    if (CENTRED) b.db[c] += db;
}

// Both in one pass. A thread owns one vector of columns, for all rows of its block: w and the sums for dw, db stay in its registers. blockDim.x threads (whole
// warps) make a row, blockDim.y such groups make a block; each group takes ROWS rows at a time, so that many reads are under way and one barrier serves them
// all. The grid is as large as the GPU holds at once; each group writes one partial row. dx may be dy.
constexpr int NORM_BACKWARD4_THREADS = 512;  // at most: so many vectors a row may have
constexpr int NORM_BACKWARD4_ROWS = 2;       // more would not fit the registers
template <bool CENTRED>
__global__ void __launch_bounds__(NORM_BACKWARD4_THREADS)
    norm_backward_kernel4(floatX* dx, int64_t dx_stride, bool accumulate, float* partial, const floatX* dy, int64_t dy_stride, const floatX* x,
                          int64_t x_stride, const float* mean, const float* rstd, const floatX* w, int64_t N, int C) {
    constexpr int W = Packed<floatX>::size, ROWS = NORM_BACKWARD4_ROWS;
    __shared__ float2 shared[2][NORM_BACKWARD4_THREADS / 32][ROWS];  // [round % 2][warp][row]: Σ t, Σ t⊙x̂
    int lane = threadIdx.x % 32, warps = blockDim.x / 32, first_warp = threadIdx.y * warps, c = threadIdx.x * W;
    bool mine = c < C;
    int64_t group = (int64_t)blockIdx.x * blockDim.y + threadIdx.y, groups = (int64_t)gridDim.x * blockDim.y;
    float share = 1.0f / C;
    Packed<floatX> weight = load_packed_if(mine, w + c);
    Numbers<W> dw, db;

    // All groups of a block make the same number of rounds, because of the barrier: the condition looks at the block's first group.
    int round = 0;
    for (int64_t chunk = group; (chunk - threadIdx.y) * ROWS < N; chunk += groups, round ^= 1) {
        Packed<floatX> g[ROWS], u[ROWS], d[ROWS];
        float m[ROWS], r[ROWS];
#pragma unroll
        for (int i = 0; i < ROWS; i++) {
            int64_t n = chunk * ROWS + i;
            bool there = mine && n < N;
            g[i] = load_packed_if(there, dy + n * dy_stride + c);
            u[i] = load_packed_if(there, x + n * x_stride + c);
            d[i] = load_packed_if(there && accumulate, dx + n * dx_stride + c);
            m[i] = CENTRED && n < N ? mean[n] : 0;
            r[i] = n < N ? rstd[n] : 0;
        }

        // Rows and columns that are not there are zeros and add nothing.
        float t[ROWS] = {}, tx[ROWS] = {};
#pragma unroll
        for (int i = 0; i < ROWS; i++) {
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
            __syncthreads();
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
            int64_t n = chunk * ROWS + i;
            if (!mine || n >= N) continue;
            forget(g[i]), forget(u[i]);
            float mean_t = CENTRED ? t[i] * share : 0, mean_tx = tx[i] * share;
            Packed<floatX> out;
#pragma unroll
            for (int k = 0; k < W; k++) {
                float xhat = (u[i][k] - m[i]) * r[i];
                out.set(k, d[i][k] + r[i] * (g[i][k] * weight[k] - mean_t - xhat * mean_tx));
            }
            store_packed(dx + n * dx_stride + c, out);
        }
    }
    if (!mine) return;
    float* sums = partial + group * norm_sums<CENTRED> * C + c;
    store_numbers<W>(sums, dw);
    if constexpr (CENTRED) store_numbers<W>(sums + C, db);
}

template <bool CENTRED>
static void backward4(cudaStream_t stream, const Backward& b) {
    int threads = (int)round_up(b.C / W, 32), groups = std::max(1, 256 / threads);
    int64_t blocks = std::min<int64_t>({ceil_div(b.N, NORM_BACKWARD4_ROWS * groups), resident_blocks(norm_backward_kernel4<CENTRED>, threads * groups, 0),
                                        norm_partial_rows<CENTRED>(b.C) / groups});
    norm_backward_kernel4<CENTRED><<<(unsigned)blocks, dim3(threads, groups), 0, stream>>>(b.dx, b.dx_stride, b.accumulate, (float*)workspace(), b.dy,
                                                                                           b.dy_stride, b.x, b.x_stride, b.mean, b.rstd, b.w, b.N, (int)b.C);
    LAUNCH_CHECK();
    norm_sum<CENTRED>(stream, b.dw, b.db, blocks * groups, b.C);
}

// False: versions 3 and 4 are for rows on multiples of 16 bytes, version 4 for those a block can have.
template <bool CENTRED>
static bool backward(int version, cudaStream_t stream, const Backward& b) {
    bool aligned = b.C % W == 0 && b.dx_stride % W == 0 && b.dy_stride % W == 0 && b.x_stride % W == 0;
    if (version == 1) {
        norm_columns_kernel1<CENTRED><<<(unsigned)ceil_div(b.C, 128), 128, 0, stream>>>(b);  // first, since dx may overwrite dy
        LAUNCH_CHECK();
        norm_backward_kernel1<CENTRED><<<(unsigned)ceil_div(b.N, 128), 128, 0, stream>>>(b);
        LAUNCH_CHECK();
    } else if (version == 2 || version == 3) {
        if (version == 3 && !aligned) return false;
        (version == 2 ? norm_backward3<CENTRED, 1> : norm_backward3<CENTRED, W>)(stream, b.dx, b.dx_stride, b.accumulate, b.dw, b.db, b.dy, b.dy_stride, b.x,
                                                                                 b.x_stride, b.mean, b.rstd, b.w, b.N, b.C);
    } else if (version == 4) {
        if (!aligned || b.C > NORM_BACKWARD4_THREADS * W) return false;
        backward4<CENTRED>(stream, b);
    } else if (CENTRED) {
        layernorm_backward(stream, b.dx, b.accumulate, b.dw, b.db, b.dy, b.x, b.mean, b.rstd, b.w, b.N, b.C, b.dx_sums, b.positions);
    } else {
        rmsnorm_backward(stream, b.dx, b.dx_stride, b.dw, b.dy, b.dy_stride, b.x, b.x_stride, b.rstd, b.w, b.N, b.C);
    }
    return true;
}

// ---- the ladders ---------------------------------------------------------------------------------------------------------------------------------------

// Rows of x are C + x_gap apart, those of y (and dy) C + y_gap; the numbers in the gaps must stay as they are.
enum Destination { OVERWRITE, ADD, IN_PLACE };
struct Shape {
    int64_t N, C;
    int64_t x_gap = 0, y_gap = 0;
    Destination to = OVERWRITE;
    int64_t T = 0;  // rows are sequences of T, and dx is summed by position; 0: not
    int64_t x_stride() const { return C + x_gap; }
    int64_t y_stride() const { return C + y_gap; }
    std::string name() const {
        std::string s = format("N=%lld C=%lld", (long long)N, (long long)C);
        if (x_gap || y_gap) s += format(" strides %lld %lld", (long long)x_stride(), (long long)y_stride());
        s += to == ADD ? " adding" : to == IN_PLACE ? " in place" : "";
        return T ? s + format(" positions T=%lld", (long long)T) : s;
    }
};

// (N,C) with rows `stride` apart. What is only read has NaN between the rows; what is written has a number there, to be found again.
constexpr float GAP = 3;
static std::vector<float> rows(int64_t N, int64_t C, int64_t stride, const std::vector<float>& numbers, float gap) {
    std::vector<float> x(N * stride, gap);
    for (int64_t n = 0; n < N; n++) std::copy(numbers.begin() + n * C, numbers.begin() + (n + 1) * C, x.begin() + n * stride);
    return x;
}
// To be overwritten.
static std::vector<float> poisoned_rows(int64_t N, int64_t C, int64_t stride) { return rows(N, C, stride, std::vector<float>(N * C, NAN), GAP); }

template <bool CENTRED>
static void check_forward(Ladder& ladder, Shape s) {
    int64_t N = s.N, C = s.C;
    if (s.to == IN_PLACE) s.y_gap = s.x_gap;
    std::vector<float> x = rows(N, C, s.x_stride(), random_numbers(N * C, 1, 2, 0.5), s.to == IN_PLACE ? GAP : NAN), w = random_numbers(C, 2, 0.5, 1),
                       b = random_numbers(C, 3);
    std::vector<float> before = s.to == IN_PLACE ? x : poisoned_rows(N, C, s.y_stride()), reference = before, mean(N), rstd(N);
    if (CENTRED)
        cpu::layernorm_forward(reference.data(), mean.data(), rstd.data(), x.data(), w.data(), b.data(), N, C);
    else
        cpu::rmsnorm_forward(reference.data(), s.y_stride(), rstd.data(), x.data(), s.x_stride(), w.data(), N, C);

    DeviceArray<floatX> d_x(x), d_y(N * s.y_stride()), d_w(w), d_b(b);
    DeviceArray<float> d_mean(N), d_rstd(N);
    std::vector<Output> outputs = {accumulated("y", d_y, before, reference), output("rstd", d_rstd, rstd, 2e-5)};
    if (CENTRED) outputs.push_back(output("mean", d_mean, mean, 2e-5));
    ladder.check(s.name(), outputs, [&](int version) {
        const floatX* from = s.to == IN_PLACE ? d_y : d_x;
        forward<CENTRED>(version, ladder.stream, {d_y, s.y_stride(), d_mean, d_rstd, from, s.x_stride(), d_w, d_b, N, C});
        return true;
    });
}

template <bool CENTRED>
static void check_backward(Ladder& ladder, const Shape& s) {
    int64_t N = s.N, C = s.C;
    std::vector<float> x = rows(N, C, s.x_stride(), random_numbers(N * C, 1, 2, 0.5), NAN);
    std::vector<float> dy = rows(N, C, s.y_stride(), random_numbers(N * C, 2), s.to == IN_PLACE ? GAP : NAN);
    std::vector<float> w = random_numbers(C, 3, 0.5, 1), b(C), y(N * C), mean(N), rstd(N), dw = random_numbers(C, 4), db = random_numbers(C, 5);
    std::vector<float> before = s.to == IN_PLACE ? dy : s.to == ADD ? random_numbers(N * C, 6) : poisoned_rows(N, C, s.y_stride());
    std::vector<float> dx_reference = before, dw_reference = dw, db_reference = db;
    if (CENTRED) {
        cpu::layernorm_forward(y.data(), mean.data(), rstd.data(), x.data(), w.data(), b.data(), N, C);
        if (s.to != ADD) dx_reference.assign(N * C, 0);
        cpu::layernorm_backward(dx_reference.data(), dw_reference.data(), db_reference.data(), dy.data(), x.data(), mean.data(), rstd.data(), w.data(), N, C);
    } else {
        cpu::rmsnorm_forward(y.data(), C, rstd.data(), x.data(), s.x_stride(), w.data(), N, C);
        cpu::rmsnorm_backward(dx_reference.data(), s.y_stride(), dw_reference.data(), dy.data(), s.y_stride(), x.data(), s.x_stride(), rstd.data(), w.data(), N,
                              C);
    }

    DeviceArray<floatX> d_x(x), d_dy(dy), d_dx(N * s.y_stride()), d_w(w);
    DeviceArray<float> d_mean(mean), d_rstd(rstd), d_dw(C), d_db(C);
    // Of one or two channels nearly nothing is left of dx: what remains is rounding.
    std::vector<Output> outputs = {accumulated("dx", d_dx, before, dx_reference, TOLERANCE, C < 4 ? 1e-4 : 1e-6),
                                   accumulated("dw", d_dw, dw, dw_reference, 2e-5)};
    if (CENTRED) outputs.push_back(accumulated("db", d_db, db, db_reference, 2e-5));
    ladder.check(s.name(), outputs, [&](int version) {
        CUDA_CHECK(cudaMemsetAsync(workspace(), 0xff, WORKSPACE_BYTES, ladder.stream));
        const floatX* from = s.to == IN_PLACE ? d_dx : d_dy;
        return backward<CENTRED>(version, ladder.stream,
                                 {d_dx, s.y_stride(), s.to == ADD, d_dw, d_db, from, s.y_stride(), d_x, s.x_stride(), d_mean, d_rstd, d_w, N, C});
    });
    if (!CENTRED) return;
    std::vector<float> sums = random_numbers(C, 7), sums_reference = sums;
    cpu::bias_backward(sums_reference.data(), dx_reference.data(), N, C);
    DeviceArray<float> d_sums(C);
    outputs.push_back(accumulated("dx sums", d_sums, sums, sums_reference, TOLERANCE, C < 4 ? 1e-3 : 1e-6));
    ladder.check(s.name() + " with sums", outputs, [&](int version) {
        CUDA_CHECK(cudaMemsetAsync(workspace(), 0xff, WORKSPACE_BYTES, ladder.stream));
        return version == 5 &&
               backward<CENTRED>(version, ladder.stream, {d_dx, C, s.to == ADD, d_dw, d_db, d_dy, C, d_x, C, d_mean, d_rstd, d_w, N, C, d_sums});
    });
    if (s.T == 0) return;
    std::vector<float> by_position = random_numbers(s.T * C, 8), by_position_reference = by_position;
    for (int64_t i = 0; i < N * C; i++) by_position_reference[i % (s.T * C)] += dx_reference[i];
    DeviceArray<float> d_by_position(s.T * C);
    outputs.back() = accumulated("dx by position", d_by_position, by_position, by_position_reference, 2e-5);
    ladder.check(s.name(), outputs, [&](int version) {
        CUDA_CHECK(cudaMemsetAsync(workspace(), 0xff, WORKSPACE_BYTES, ladder.stream));
        PositionSums positions = {d_by_position, (int)s.T};
        return version == 5 &&
               backward<CENTRED>(version, ladder.stream, {d_dx, C, s.to == ADD, d_dw, d_db, d_dy, C, d_x, C, d_mean, d_rstd, d_w, N, C, nullptr, positions});
    });
}

// For timing: a million random numbers again and again.
static std::vector<float> repeated_numbers(int64_t n, uint64_t seed) {
    std::vector<float> some = random_numbers(std::min<int64_t>(n, 1 << 20), seed), x(n);
    for (int64_t i = 0; i < n; i++) x[i] = some[i % some.size()];
    return x;
}

template <bool CENTRED>
static void time_forward(Ladder& ladder, const Shape& s) {
    int64_t N = s.N, C = s.C;
    DeviceArray<floatX> x(repeated_numbers(N * s.x_stride(), 1)), y(N * s.y_stride()), w(random_numbers(C, 2)), b(random_numbers(C, 3));
    DeviceArray<float> mean(N), rstd(N);
    double numbers = (double)N * C;
    ladder.time(s.name(), {8 * numbers, 2 * numbers * sizeof(floatX)}, [&](int version) {
        forward<CENTRED>(version, ladder.stream, {y, s.y_stride(), mean, rstd, x, s.x_stride(), w, b, N, C});
        return true;
    });
}

template <bool CENTRED>
static void time_backward(Ladder& ladder, const Shape& s) {
    int64_t N = s.N, C = s.C;
    DeviceArray<floatX> x(repeated_numbers(N * s.x_stride(), 1)), dy(repeated_numbers(N * s.y_stride(), 2)), dx(repeated_numbers(N * s.y_stride(), 3));
    DeviceArray<floatX> w(random_numbers(C, 4)), y(N * s.y_stride()), b(random_numbers(C, 5));
    DeviceArray<float> mean(N), rstd(N), dw(random_numbers(C, 6)), db(random_numbers(C, 7)), sums(random_numbers(C, 8)),
        by_position(std::vector<float>(s.T * C));
    forward<CENTRED>(4, ladder.stream, {y, s.y_stride(), mean, rstd, x, s.x_stride(), w, b, N, C});
    double numbers = (double)N * C;
    double bytes = (s.to == ADD ? 4 : 3) * numbers * sizeof(floatX) + 2.0 * s.T * C * sizeof(float);
    ladder.time(s.name(), {16 * numbers, bytes}, [&](int version) {
        if (s.T && version != 5) return false;
        Backward b = {dx, s.y_stride(), s.to == ADD, dw, db, dy, s.y_stride(), x, s.x_stride(), mean, rstd, w, N, C};
        if (CENTRED && s.T)  // version 5 alone does either
            b.positions = {by_position, (int)s.T};
        else if (CENTRED)
            b.dx_sums = sums;
        return backward<CENTRED>(version, ladder.stream, b);
    });
}

int main(int argc, char** argv) {
    const std::vector<const char*> forward_versions = {"a thread a row", "a block a row, shared memory", "a warp a row",
                                                       "16-byte accesses, the row in registers (in use)"};
    const std::vector<const char*> backward_versions = {"a thread a row; a thread a column", "a warp a row; columns in two stages", "16-byte accesses",
                                                        "one pass", "rows on their way through shared memory; one launch; columns of dx (in use)"};
    int failed = 0;
    {
        // Beyond 2048 channels rows do not fit the registers (forward), beyond 4096 a block (backward).
        const std::vector<Shape> shapes = {{1, 1},      {5, 7},    {3, 8},    {33, 40},  {129, 256}, {67, 768},  {301, 257},
                                           {130, 1600}, {9, 2056}, {5, 4096}, {3, 4104}, {6, 5001},  {2, 65536}, {7003, 768}};
        Ladder forward_ladder("layernorm_forward", forward_versions, argc, argv);
        for (const Shape& s : shapes) check_forward<true>(forward_ladder, s);
        for (int64_t C : {768, 1600}) time_forward<true>(forward_ladder, {65536, C});
        failed |= forward_ladder.finish();

        Ladder backward_ladder("layernorm_backward", backward_versions, argc, argv);
        for (Shape s : shapes)
            for (Destination to : {OVERWRITE, ADD}) s.to = to, check_backward<true>(backward_ladder, s);
        // Positions: one, a few, and several for each group; one sequence, odd numbers of them; rows of several warps.
        const std::vector<Shape> by_position = {{1, 8, 0, 0, ADD, 1},         {15, 40, 0, 0, ADD, 5},
                                                {2000, 256, 0, 0, ADD, 2000}, {600, 768, 0, 0, OVERWRITE, 300},
                                                {4400, 768, 0, 0, ADD, 1100}, {231, 1600, 0, 0, ADD, 33}};
        for (const Shape& s : by_position) check_backward<true>(backward_ladder, s);
        for (int64_t C : {768, 1600})
            for (int64_t T : {0, 1024}) time_backward<true>(backward_ladder, {65536, C, 0, 0, ADD, T});
        failed |= backward_ladder.finish();
    }
    {
        const std::vector<Shape> shapes = {{1, 1},           {5, 7, 2, 1},      {3, 8, 8, 0},    {33, 40, 3, 5},   {1029, 256, 32, 32},
                                           {70, 256, 35, 3}, {301, 257, 0, 31}, {67, 768, 0, 8}, {9, 2056, 8, 16}, {3, 4104, 8, 0},
                                           {2, 65536, 1, 0}};
        Ladder forward_ladder("rmsnorm_forward", forward_versions, argc, argv);
        for (Shape s : shapes)
            for (Destination to : {OVERWRITE, IN_PLACE}) s.to = to, check_forward<false>(forward_ladder, s);
        time_forward<false>(forward_ladder, {65536, 768});
        time_forward<false>(forward_ladder, {65536, 256, 32, 32});
        failed |= forward_ladder.finish();

        Ladder backward_ladder("rmsnorm_backward", backward_versions, argc, argv);
        for (Shape s : shapes)
            for (Destination to : {OVERWRITE, IN_PLACE}) s.to = to, check_backward<false>(backward_ladder, s);
        time_backward<false>(backward_ladder, {65536, 768});
        time_backward<false>(backward_ladder, {65536, 256, 32, 32});
        failed |= backward_ladder.finish();
    }
    return failed;
}
