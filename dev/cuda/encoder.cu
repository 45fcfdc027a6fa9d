// The encoder's ladder: table lookup, and the gradients of the tables.
//
//     forward    out_n = wte[token_n] + wpe[position_n]
//     backward   dwte[v] += Σ dout_n over the n with token_n = v       dwpe[p] += Σ dout_n over the n with position_n = p
//
// No arithmetic to speak of; what counts is bytes. Forward must write out (N,C) and read each row of the tables that occurs once (repeated ones come from the
// L2 cache); backward must read dout once, and read and write each table row that occurs, in float32. N = 65536 tokens of C = 768 channels in
// bf16, a vocabulary of 50304 of which a Zipf-like text of this length uses 15000 words: forward 126 MB = 42 µs at 3.0 TB/s, backward 202 MB = 67 µs.
// The two tables want the rows of dout in two orders: read twice from memory that is 303 MB = 101 µs; and putting 65536 tokens in order takes the GPU some
// 40 µs, in which hardly a byte moves.
//
// Forward
//   1. A thread a number, found by division. Threads of a warp read neighbours, but each fetches the token and divides 64-bit numbers for itself.
//   2. A warp a row: token and position are read once, no division. Expected: the division's time, a factor of two or so.
//   3. 16 bytes a thread and access (encoder_forward_kernel3 with W = 8 instead of 1): an eighth of the instructions, so that memory and not the issue of
//      instructions is the limit. Expected: close to the copy's bandwidth.
//   4. A warp of version 3 fetches its token, then a third of the row, stores that, and so on: one after the other. Now a thread has two vectors, wherever
//      rows begin and end, and all that it reads is on its way together (encoder_forward_kernel4). Expected: 45 µs.
//
// Backward. Floating-point atomics are out: their order, and so the result, would change from run to run.
//   1. Gather instead of scatter: a block for each table row looks through the whole list of tokens for its own. V·N comparisons: milliseconds, nearly all of
//      it for rows that never occur.
//   2. Sort the row numbers by token (cub's radix sort is stable, so the order of summation is fixed): a block for each run of equal tokens. Expected: the
//      sort costs some 40 µs, the search is gone; but the most frequent word, a tenth of the batch, is one block's work while the others wait.
//   3. Pieces of 64 entries of the sorted list, whatever runs they cut, eight rows in flight: equal work for all. Parts of cut runs are joined by a second
//      kernel (encoder_backward_kernel3, encoder_join_kernel3). Expected: also when all tokens are the same, bandwidth (with dout read twice, once a table:
//      101 µs), and the two sorts, some 60 µs.
//   4. Positions need no sort: they count up in each sequence, so the rows of position p are known (encoder_position_kernel4). That saves a sort, 38 µs, and
//      the reading of keys. And in version 3 a warp that comes to the end of a run waits for the table's old row, fifteen times a piece, one after the other;
//      now the runs of a piece are shared out among eight warps, and the old row is on its way together with the rows of dout (encoder_backward_kernel4).
//      And the second kernel no longer looks for the end of a run by halving, ten reads one after the other, but all its threads at once
//      (encoder_join_kernel4). Expected: 38 µs for the sort, 65 for the tokens, 10 for joining, 35 for the positions: 150 instead of 312.
//   5. The host sorts, while the GPU is busy with the steps before (encoder_plan: 0.4 ms of one core): 38 µs less. One kernel goes from slice to slice of 128
//      columns: the 17 MB that the positions have read the tokens find in the L2 cache, so dout comes from memory once: 33 µs less. Rows of dout and of the
//      table are on their way through shared memory, four entries a warp, without holding registers. The block that leaves the last part of a cut run adds
//      them up, so that there is no second kernel: 10 µs less (encoder_backward_kernel5). Expected: 80 µs.
//      What is left: the tokens alone move all that must move but for 6 MB (dout gathered from memory, the table in and out), and take 76 µs, as much as 85 %
//      of the copy's rate allow; the positions alone take 41, both 87: the 100 MB that pass between the L2 cache and the multiprocessors a second time are
//      not free. Half of all accesses go to the cache's other half, and the way there is busy 84 % of the time. Adding to the table's rows without reading
//      them (red.global.add.v4.f32: one addend an address, so one result) spares a sixth of that traffic, but only 1 µs.
//   6. The kernel that makes dout has its numbers in registers: the backward pass of the network's first LayerNorm. Where all sequences are of one length it
//      sums them by position on its way (PositionSums in layernorm.cuh), and kernel 5 is left with the tokens: 193 MB = 64 µs. Expected: 11 µs less here, and
//      2 more there for the table's 6 MB. Ragged batches, and dropout between the two, stay with version 5.
//      The tokens alone no longer need slices that the cache holds, but little is gained without: whole rows, 768 columns a warp, 72 µs instead of 74; slices
//      of a row side by side 75; adding to the table without reading it 73; the dearest pieces first, so that no block is late, nothing or less than nothing.
#define GPT2_NO_MAIN
#include "../../train_gpt2.cpp"

#include <cub/device/device_radix_sort.cuh>

#include "../../gpt2/cuda/encoder.cuh"
#include "../../gpt2/cuda/layernorm.cuh"
#include "ladder.h"

using namespace gpu;

// ---- forward -------------------------------------------------------------------------------------------------------------------------------------------

__global__ void encoder_forward_kernel1(floatX* out, const int* tokens, const int* position, const floatX* wte, const floatX* wpe, int64_t N, int64_t C) {
    int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= N * C) return;
    int64_t n = i / C, c = i % C;
    out[i] = from_float<floatX>(to_float(wte[tokens[n] * C + c]) + (wpe ? to_float(wpe[position[n] * C + c]) : 0));
}

// A warp a row.
template <int W>
__global__ void encoder_forward_kernel3(floatX* __restrict__ out, const int* __restrict__ tokens, const int* __restrict__ position,
                                        const floatX* __restrict__ wte, const floatX* __restrict__ wpe, int64_t N, int C) {
    int64_t n = ((int64_t)blockIdx.x * blockDim.x + threadIdx.x) / 32;
    if (n >= N) return;
    const floatX* token = wte + (int64_t)tokens[n] * C;
    const floatX* place = wpe ? wpe + (int64_t)position[n] * C : nullptr;
    for (int c = threadIdx.x % 32 * W; c < C; c += 32 * W) {
        Numbers<W> x = load_numbers<W>(token + c), y;
        if (place) y = load_numbers<W>(place + c);
        for (int k = 0; k < W; k++) x[k] += y[k];
        store_numbers<W>(out + n * C + c, x);
    }
}

template <int W>
inline void encoder_forward3(cudaStream_t stream, floatX* out, const int* tokens, const int* position, const floatX* wte, const floatX* wpe, int64_t N,
                             int64_t C) {
    encoder_forward_kernel3<W><<<(unsigned)ceil_div(N, 8), 256, 0, stream>>>(out, tokens, position, wte, wpe, N, (int)C);
    LAUNCH_CHECK();
}

static void forward(int version, cudaStream_t stream, floatX* out, const int* tokens, const int* position, const floatX* wte, const floatX* wpe, int64_t N,
                    int64_t C) {
    if (version == 1) {
        encoder_forward_kernel1<<<(unsigned)ceil_div(N * C, 256), 256, 0, stream>>>(out, tokens, position, wte, wpe, N, C);
        LAUNCH_CHECK();
    } else if (version < 4) {
        constexpr int W = Packed<floatX>::size;
        (version == 3 && C % W == 0 ? encoder_forward3<W> : encoder_forward3<1>)(stream, out, tokens, position, wte, wpe, N, C);
    } else {
        encoder_forward(stream, out, tokens, position, wte, wpe, N, C);
    }
}

// ---- backward ------------------------------------------------------------------------------------------------------------------------------------------

constexpr int PIECE = 64;  // entries of the sorted list that a block of versions 3 and 4 adds up

// Temporary memory of the sort: as for 31-bit keys, which need the most.
inline int64_t sort_rows_temporary(int64_t N) {
    size_t bytes = 0;
    const unsigned* keys = nullptr;
    const int* rows = nullptr;
    CUDA_CHECK(cub::DeviceRadixSort::SortPairs(nullptr, bytes, keys, (unsigned*)nullptr, rows, (int*)nullptr, (int)N, 0, 31));
    return (int64_t)bytes;
}

template <class T>
__global__ void count_up_kernel(T* x, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) x[i] = i;
}

// order (N): the row numbers 0 ... N−1 by their key, rows of equal keys in their own order (radix sort is stable); sorted (N): the keys in that order.
// keys (N) in [0, bound).
inline void sort_rows(cudaStream_t stream, int* sorted, int* order, const int* keys, int64_t N, int64_t bound, Scratch scratch) {
    int* rows = scratch.take<int>(N);
    size_t bytes = (size_t)sort_rows_temporary(N);
    void* temporary = scratch.take<char>((int64_t)bytes);
    int bits = 1;
    while (((int64_t)1 << bits) < bound) bits++;
    count_up_kernel<<<(unsigned)ceil_div(N, 256), 256, 0, stream>>>(rows, (int)N);
    LAUNCH_CHECK();
    CUDA_CHECK(cub::DeviceRadixSort::SortPairs(temporary, bytes, (const unsigned*)keys, (unsigned*)sorted, rows, order, (int)N, 0, bits, stream));
}

// Block v: each of its threads looks at one of 256 entries at a time; if one of them is v, all threads look for it, and add its row channel by channel.
__global__ void encoder_backward_kernel1(float* dtable, const floatX* dout, const int* keys, int64_t N, int64_t C) {
    int v = blockIdx.x;
    for (int64_t n0 = 0; n0 < N; n0 += blockDim.x) {
        int64_t n = n0 + threadIdx.x;
        if (!__syncthreads_or(n < N && keys[n] == v)) continue;
        for (n = n0; n < N && n < n0 + blockDim.x; n++) {
            if (keys[n] != v) continue;
            for (int64_t c = threadIdx.x; c < C; c += blockDim.x) dtable[v * C + c] += to_float(dout[n * C + c]);
        }
    }
}

// Block i: if a run begins at entry i of the sorted list, its sum; blockIdx.y are 256 channels.
__global__ void encoder_backward_kernel2(float* dtable, const floatX* dout, const int* sorted, const int* order, int64_t N, int64_t C) {
    int64_t i = blockIdx.x, c = (int64_t)blockIdx.y * blockDim.x + threadIdx.x;
    int run = sorted[i];
    if (c >= C || (i > 0 && sorted[i - 1] == run)) return;
    float sum = 0;
    for (; i < N && sorted[i] == run; i++) sum += to_float(dout[order[i] * C + c]);
    dtable[run * C + c] += sum;
}

// A warp takes 32·W channels of one piece. head, tail (pieces,C) are written only where a run is cut.
template <int W>
__global__ void __launch_bounds__(256)
    encoder_backward_kernel3(float* __restrict__ dtable, float* __restrict__ head, float* __restrict__ tail, const floatX* __restrict__ dout,
                             const int* __restrict__ sorted, const int* __restrict__ order, int N, int C) {
    constexpr int BATCH = 8;  // rows in flight
    int chunks = (int)ceil_div(C, 32 * W);
    int64_t task = ((int64_t)blockIdx.x * blockDim.x + threadIdx.x) / 32, piece = task / chunks;
    int c = ((int)(task % chunks) * 32 + threadIdx.x % 32) * W;
    if (piece * PIECE >= N || c >= C) return;
    int begin = (int)piece * PIECE, end = (int)min((piece + 1) * PIECE, (int64_t)N);

    int run = sorted[begin];
    bool began_before = begin > 0 && sorted[begin - 1] == run;
    Numbers<W> sum;
    for (int i0 = begin; i0 < end; i0 += BATCH) {
        int key[BATCH];
        Numbers<W> row[BATCH];
#pragma unroll
        for (int j = 0; j < BATCH; j++) {
            if (i0 + j >= end) continue;
            key[j] = sorted[i0 + j];
            row[j] = load_numbers<W>(dout + (int64_t)order[i0 + j] * C + c);
        }
#pragma unroll
        for (int j = 0; j < BATCH; j++) {
            if (i0 + j >= end) continue;
            if (key[j] != run) {  // the run ends here
                float* to = began_before ? head + piece * C + c : dtable + (int64_t)run * C + c;
                if (!began_before) {
                    Numbers<W> old = load_numbers<W>(to);
                    for (int k = 0; k < W; k++) sum[k] += old[k];
                }
                store_numbers<W>(to, sum);
                sum = {};
                run = key[j];
                began_before = false;
            }
            for (int k = 0; k < W; k++) sum[k] += row[j][k];
        }
    }
    bool goes_on = end < N && sorted[end] == run;
    float* to = began_before ? head + piece * C + c : goes_on ? tail + piece * C + c : dtable + (int64_t)run * C + c;
    if (!began_before && !goes_on) {
        Numbers<W> old = load_numbers<W>(to);
        for (int k = 0; k < W; k++) sum[k] += old[k];
    }
    store_numbers<W>(to, sum);
}

// Block (piece, 32·W channels): if a run begins in this piece and is cut at its end, its parts are added: this piece's tail and the heads of all pieces that
// the run reaches. Warp w takes the parts w, w+8, ...
template <int W>
__global__ void __launch_bounds__(256) encoder_join_kernel3(float* __restrict__ dtable, const float* __restrict__ head, const float* __restrict__ tail,
                                                            const int* __restrict__ sorted, int N, int C) {
    constexpr int WARPS = 8;
    __shared__ float parts[WARPS][32 * W];
    int piece = blockIdx.x, pieces = gridDim.x, begin = piece * PIECE;
    if (piece + 1 == pieces) return;
    int end = begin + PIECE, run = sorted[end];
    if (sorted[end - 1] != run || (begin > 0 && sorted[begin - 1] == run)) return;  // not cut; or it began before this piece

    int last = piece + 1, beyond = pieces;  // the last piece that begins with this run
    while (beyond - last > 1) {
        int middle = (last + beyond) / 2;
        (sorted[middle * PIECE] == run ? last : beyond) = middle;
    }

    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, c = (blockIdx.y * 32 + lane) * W;
    Numbers<W> sum;
    if (c < C) {
        if (warp == 0) sum = load_numbers<W>(tail + (int64_t)piece * C + c);
#pragma unroll 4
        for (int q = piece + 1 + warp; q <= last; q += WARPS) {
            Numbers<W> part = load_numbers<W>(head + (int64_t)q * C + c);
            for (int k = 0; k < W; k++) sum[k] += part[k];
        }
    }
    for (int k = 0; k < W; k++) parts[warp][k * 32 + lane] = sum[k];
    __syncthreads();
    if (warp > 0 || c >= C) return;
    Numbers<W> total = load_numbers<W>(dtable + (int64_t)run * C + c);
    for (int w = 0; w < WARPS; w++)
        for (int k = 0; k < W; k++) total[k] += parts[w][k * 32 + lane];
    store_numbers<W>(dtable + (int64_t)run * C + c, total);
}

// A block takes one piece, a warp 32·W channels of one run in it at a time. head, tail (pieces,C) are written only where a run is cut.
template <int W>
__global__ void __launch_bounds__(256)
    encoder_backward_kernel4(float* __restrict__ dtable, float* __restrict__ head, float* __restrict__ tail, const floatX* __restrict__ dout,
                             const int* __restrict__ sorted, const int* __restrict__ order, int N, int C) {
    constexpr int BATCH = 8;                                                   // rows in flight
    __shared__ int keys[PIECE + 2], rows[PIECE], starts[PIECE + 1], num_runs;  // keys[i + 1] is entry i's
    int64_t piece = blockIdx.x;
    int begin = (int)piece * PIECE, count = min(PIECE, N - begin), t = threadIdx.x, lane = t % 32;
    if (t < PIECE + 2) {
        int i = begin + t - 1;
        keys[t] = i >= 0 && i < N ? sorted[i] : -1;
    } else if (t >= 96 && t - 96 < count) {
        rows[t - 96] = order[begin + t - 96];
    }
    __syncthreads();
    if (t < 32) {  // lane i looks at entries i and 32 + i
        unsigned first = __ballot_sync(0xffffffff, lane < count && (lane == 0 || keys[lane] != keys[lane + 1]));
        unsigned second = __ballot_sync(0xffffffff, lane + 32 < count && keys[lane + 32] != keys[lane + 33]), before = (1u << lane) - 1;
        if (first >> lane & 1) starts[__popc(first & before)] = lane;
        if (second >> lane & 1) starts[__popc(first) + __popc(second & before)] = lane + 32;
        if (lane == 0) {
            num_runs = __popc(first) + __popc(second);
            starts[num_runs] = count;
        }
    }
    __syncthreads();

    int chunks = (int)ceil_div(C, 32 * W);
    for (int task = t / 32; task < num_runs * chunks; task += 8) {
        int run = task / chunks, c = (task % chunks * 32 + lane) * W, i0 = starts[run], end = starts[run + 1], key = keys[i0 + 1];
        if (c >= C) continue;
        bool began_before = i0 == 0 && keys[0] == key, goes_on = end == count && keys[count + 1] == key;
        float* to = began_before ? head + piece * C + c : goes_on ? tail + piece * C + c : dtable + (int64_t)key * C + c;
        Numbers<W> sum;
        if (!began_before && !goes_on) sum = load_numbers<W>(to);
        for (; i0 < end; i0 += BATCH) {
            Numbers<W> row[BATCH];  // zeros behind the end
#pragma unroll
            for (int j = 0; j < BATCH; j++)
                if (i0 + j < end) row[j] = load_numbers<W>(dout + (int64_t)rows[i0 + j] * C + c);
#pragma unroll
            for (int j = 0; j < BATCH; j++)
                for (int k = 0; k < W; k++) sum[k] += row[j][k];
        }
        store_numbers<W>(to, sum);
    }
}

// Block (piece, 32·W channels): if a run begins in this piece and is cut at its end, its parts are added: this piece's tail and the heads of all pieces that
// the run reaches. Warp w takes the parts w, w+8, ...
template <int W>
__global__ void __launch_bounds__(256) encoder_join_kernel4(float* __restrict__ dtable, const float* __restrict__ head, const float* __restrict__ tail,
                                                            const int* __restrict__ sorted, int N, int C) {
    constexpr int WARPS = 8;
    __shared__ float parts[WARPS][32 * W];
    int piece = blockIdx.x, pieces = gridDim.x, begin = piece * PIECE;
    if (piece + 1 == pieces) return;
    int end = begin + PIECE, run = sorted[end];
    if (sorted[end - 1] != run || (begin > 0 && sorted[begin - 1] == run)) return;  // not cut; or it began before this piece

    int last = piece;  // the last piece that begins with this run; a thread looks at one piece
    for (int found = 256; found == 256; last += found) {
        int q = last + 1 + threadIdx.x;
        found = __syncthreads_count(q < pieces && sorted[q * PIECE] == run);
    }

    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, c = (blockIdx.y * 32 + lane) * W;
    Numbers<W> sum;
    if (c < C) {
        if (warp == 0) sum = load_numbers<W>(tail + (int64_t)piece * C + c);
#pragma unroll 4
        for (int q = piece + 1 + warp; q <= last; q += WARPS) {
            Numbers<W> part = load_numbers<W>(head + (int64_t)q * C + c);
            for (int k = 0; k < W; k++) sum[k] += part[k];
        }
    }
    for (int k = 0; k < W; k++) parts[warp][k * 32 + lane] = sum[k];
    __syncthreads();
    if (warp > 0 || c >= C) return;
    Numbers<W> total = load_numbers<W>(dtable + (int64_t)run * C + c);
    for (int w = 0; w < WARPS; w++)
        for (int k = 0; k < W; k++) total[k] += parts[w][k * 32 + lane];
    store_numbers<W>(dtable + (int64_t)run * C + c, total);
}

// dwpe[p] += Σ over the sequences longer than p of row p of dout's. Block (position, 32·W channels): warp w takes the sequences w, w+8, ...
template <int W>
__global__ void __launch_bounds__(256)
    encoder_position_kernel4(float* __restrict__ dwpe, const floatX* __restrict__ dout, const int* __restrict__ cu_seqlens, int num_seqs, int C) {
    constexpr int WARPS = 8, BATCH = 8;
    __shared__ float parts[WARPS][32 * W];
    int position = blockIdx.x, lane = threadIdx.x % 32, warp = threadIdx.x / 32, c = (blockIdx.y * 32 + lane) * W;
    Numbers<W> sum;
    if (c < C) {
        for (int s0 = warp; s0 < num_seqs; s0 += WARPS * BATCH) {
            int row[BATCH];
#pragma unroll
            for (int j = 0; j < BATCH; j++) {
                int s = s0 + j * WARPS, begin = s < num_seqs ? cu_seqlens[s] : 0, end = s < num_seqs ? cu_seqlens[s + 1] : 0;
                row[j] = begin + position < end ? begin + position : -1;
            }
            Numbers<W> x[BATCH];  // zeros for sequences that are too short
#pragma unroll
            for (int j = 0; j < BATCH; j++)
                if (row[j] >= 0) x[j] = load_numbers<W>(dout + (int64_t)row[j] * C + c);
#pragma unroll
            for (int j = 0; j < BATCH; j++)
                for (int k = 0; k < W; k++) sum[k] += x[j][k];
        }
    }
    for (int k = 0; k < W; k++) parts[warp][k * 32 + lane] = sum[k];
    __syncthreads();
    for (int i = threadIdx.x; i < 32 * W; i += 256) {
        int channel = blockIdx.y * 32 * W + i;
        if (channel >= C) continue;
        float total = 0;
        for (int w = 0; w < WARPS; w++) total += parts[w][i % W * 32 + i / W];
        dwpe[(int64_t)position * C + channel] += total;
    }
}

// The rows in the order of their keys.
struct Sorted {
    int *keys, *order;
    Sorted(cudaStream_t stream, const int* unsorted, int64_t N, int64_t bound, Scratch& scratch) {
        keys = scratch.take<int>(N), order = scratch.take<int>(N);
        sort_rows(stream, keys, order, unsorted, N, bound, scratch);
    }
};

static void backward2(cudaStream_t stream, float* dtable, const floatX* dout, const int* keys, int64_t N, int64_t C, int64_t bound, Scratch scratch) {
    Sorted sorted(stream, keys, N, bound, scratch);
    encoder_backward_kernel2<<<dim3((unsigned)N, (unsigned)ceil_div(C, 256)), 256, 0, stream>>>(dtable, dout, sorted.keys, sorted.order, N, C);
}

static void backward3(cudaStream_t stream, float* dtable, const floatX* dout, const int* keys, int64_t N, int64_t C, int64_t bound, Scratch scratch) {
    constexpr int W = Packed<floatX>::size;
    bool vectors = C % W == 0;
    Sorted sorted(stream, keys, N, bound, scratch);
    int64_t pieces = ceil_div(N, PIECE), warps = pieces * ceil_div(C, 32 * (vectors ? W : 1));
    float *head = scratch.take<float>(pieces * C), *tail = scratch.take<float>(pieces * C);
    (vectors ? encoder_backward_kernel3<W> : encoder_backward_kernel3<1>)<<<(unsigned)ceil_div(warps, 8), 256, 0, stream>>>(
        dtable, head, tail, dout, sorted.keys, sorted.order, (int)N, (int)C);
    dim3 grid((unsigned)pieces, (unsigned)ceil_div(C, 32 * (vectors ? 4 : 1)));
    (vectors ? encoder_join_kernel3<4> : encoder_join_kernel3<1>)<<<grid, 256, 0, stream>>>(dtable, head, tail, sorted.keys, (int)N, (int)C);
}

static void backward4(cudaStream_t stream, float* dwte, float* dwpe, const floatX* dout, const int* tokens, const int* cu_seqlens, int num_seqs, int max_len,
                      int64_t N, int64_t C, int64_t V, Scratch scratch) {
    constexpr int W = Packed<floatX>::size;
    bool vectors = C % W == 0;
    if (dwpe) {
        dim3 grid((unsigned)max_len, (unsigned)ceil_div(C, 32 * (vectors ? W : 1)));
        (vectors ? encoder_position_kernel4<W> : encoder_position_kernel4<1>)<<<grid, 256, 0, stream>>>(dwpe, dout, cu_seqlens, num_seqs, (int)C);
    }
    Sorted sorted(stream, tokens, N, V, scratch);
    int64_t pieces = ceil_div(N, PIECE);
    float *head = scratch.take<float>(pieces * C), *tail = scratch.take<float>(pieces * C);
    (vectors ? encoder_backward_kernel4<W> : encoder_backward_kernel4<1>)<<<(unsigned)pieces, 256, 0, stream>>>(dwte, head, tail, dout, sorted.keys,
                                                                                                                sorted.order, (int)N, (int)C);
    dim3 grid((unsigned)pieces, (unsigned)ceil_div(C, 32 * (vectors ? 4 : 1)));
    (vectors ? encoder_join_kernel4<4> : encoder_join_kernel4<1>)<<<grid, 256, 0, stream>>>(dwte, head, tail, sorted.keys, (int)N, (int)C);
}

// Of all versions.
static int64_t backward_scratch(int64_t N, int64_t C) {
    int64_t list = N * (int64_t)sizeof(int), parts = ceil_div(N, PIECE) * C * (int64_t)sizeof(float);
    return std::max(encoder_backward_scratch(N, C), scratch_bytes({list, list, list, sort_rows_temporary(N), parts, parts}));
}

// dwpe may be null.
static void backward(int version, cudaStream_t stream, float* dwte, float* dwpe, const floatX* dout, const int* tokens, const int* position, int* plan,
                     const int* cu_seqlens, int num_seqs, int64_t N, int64_t C, int64_t V, int64_t T, Scratch scratch) {
    switch (version) {
        case 1:
            encoder_backward_kernel1<<<(unsigned)V, 256, 0, stream>>>(dwte, dout, tokens, N, C);
            if (dwpe) encoder_backward_kernel1<<<(unsigned)T, 256, 0, stream>>>(dwpe, dout, position, N, C);
            break;
        case 2:
            backward2(stream, dwte, dout, tokens, N, C, V, scratch);
            if (dwpe) backward2(stream, dwpe, dout, position, N, C, T, scratch);
            break;
        case 3:
            backward3(stream, dwte, dout, tokens, N, C, V, scratch);
            if (dwpe) backward3(stream, dwpe, dout, position, N, C, T, scratch);
            break;
        case 4:
            backward4(stream, dwte, dwpe, dout, tokens, cu_seqlens, num_seqs, (int)T, N, C, V, scratch);
            break;
        default:  // version 6 has dwpe already
            encoder_backward(stream, dwte, version == 5 ? dwpe : nullptr, dout, tokens, plan, cu_seqlens, num_seqs, (int)T, N, C, scratch);
    }
    LAUNCH_CHECK();
}

// ---- the ladders ---------------------------------------------------------------------------------------------------------------------------------------

enum Text { ZIPF, ONE_TOKEN };
struct Shape {
    int64_t N, C, V, T;  // sequences of T tokens, the last one shorter; T = 0: no wpe
    Text text;
    bool ragged = false;  // lengths T, 0, T/2, T, 0 ...
    bool positions_by_norm() const { return T > 0 && !ragged && N % T == 0 && C % Packed<floatX>::size == 0; }
    std::string name() const {
        return format("N=%lld C=%lld V=%lld T=%lld%s", (long long)N, (long long)C, (long long)V, (long long)T,
                      text == ONE_TOKEN ? " one token"
                      : ragged          ? " ragged"
                                        : "");
    }
};

// N words of a vocabulary of V, the word of rank k with probability ~ 1/(k+1): the first is a tenth of the text or so. Ranks are scattered over the numbers.
static std::vector<int> make_tokens(const Shape& s) {
    std::vector<double> below(s.V);
    double total = 0;
    for (int64_t k = 0; k < s.V; k++) below[k] = total += 1.0 / (k + 1);
    std::vector<int> tokens(s.N);
    for (int64_t n = 0; n < s.N; n++) {
        double u = philox(7, (uint32_t)n, 0, 0, 0x5a495046).word[0] / 4294967296.0 * total;
        int64_t rank = std::min<int64_t>(std::upper_bound(below.begin(), below.end(), u) - below.begin(), s.V - 1);
        tokens[n] = (int)(s.text == ONE_TOKEN ? s.V - 1 : rank * 7919 % s.V);
    }
    return tokens;
}
static std::vector<int> make_cu_seqlens(const Shape& s) {
    std::vector<int> cu(1, 0);
    for (int64_t k = 0; cu.back() < s.N; k++) {
        int64_t length = s.T == 0 ? s.N : !s.ragged || k % 3 == 0 ? s.T : k % 3 == 1 ? 0 : s.T / 2;
        cu.push_back((int)std::min(cu.back() + length, s.N));
    }
    return cu;
}
static std::vector<int> make_positions(const Shape& s) {
    std::vector<int> cu = make_cu_seqlens(s), position(s.N);
    for (size_t k = 0; k + 1 < cu.size(); k++)
        for (int n = cu[k]; n < cu[k + 1]; n++) position[n] = s.T ? n - cu[k] : 0;
    return position;
}
static int64_t distinct(std::vector<int> x) {
    std::sort(x.begin(), x.end());
    return std::unique(x.begin(), x.end()) - x.begin();
}
// For timing: a million random numbers again and again.
static std::vector<float> repeated_numbers(int64_t n, uint64_t seed) {
    std::vector<float> some = random_numbers(std::min<int64_t>(n, 1 << 20), seed), x(n);
    for (int64_t i = 0; i < n; i++) x[i] = some[i % some.size()];
    return x;
}

// The LayerNorm in front of the encoder's backward pass, of which version 6 is a part: dx += ..., and dx is the encoder's dout.
struct NormBefore {
    int64_t N, C;
    DeviceArray<floatX> dy, x, w{std::vector<float>(C, 1)};
    DeviceArray<float> mean{std::vector<float>(N, 0)}, rstd{std::vector<float>(N, 1)}, dw{std::vector<float>(C)}, db{std::vector<float>(C)};
    NormBefore(int64_t N, int64_t C, const std::vector<float>& dy, const std::vector<float>& x) : N(N), C(C), dy(dy), x(x) {}
    void backward(cudaStream_t stream, floatX* dx, PositionSums positions) const {
        layernorm_backward(stream, dx, true, dw, db, dy, x, mean, rstd, w, N, C, nullptr, positions);
    }
};

static void check_forward(Ladder& ladder, const Shape& s) {
    std::vector<int> tokens = make_tokens(s), position = make_positions(s);
    std::vector<float> wte = random_numbers(s.V * s.C, 1), wpe = random_numbers(s.T * s.C, 2), reference(s.N * s.C);
    cpu::encoder_forward(reference.data(), tokens.data(), position.data(), wte.data(), s.T ? wpe.data() : nullptr, s.N, s.C);

    DeviceArray<int> d_tokens(tokens), d_position(position);
    DeviceArray<floatX> d_wte(wte), d_wpe(wpe), out(s.N * s.C);
    ladder.check(s.name(), {output("out", out, reference)}, [&](int version) {
        forward(version, ladder.stream, out, d_tokens, d_position, d_wte, s.T ? d_wpe.data : nullptr, s.N, s.C);
        return true;
    });
}

static void check_backward(Ladder& ladder, const Shape& s) {
    std::vector<int> tokens = make_tokens(s), position = make_positions(s), cu = make_cu_seqlens(s);
    std::vector<float> dout = random_numbers(s.N * s.C, 1), dwte = random_numbers(s.V * s.C, 2), dwpe = random_numbers(s.T * s.C, 3);
    std::vector<float> dwte_reference = dwte, dwpe_reference = dwpe;
    cpu::encoder_backward(dwte_reference.data(), s.T ? dwpe_reference.data() : nullptr, dout.data(), tokens.data(), position.data(), s.N, s.C);

    DeviceArray<int> d_tokens(tokens), d_position(position), d_cu(cu), plan(encoder_plan(tokens, s.V, s.C));
    DeviceArray<floatX> d_dout(dout);
    DeviceArray<float> d_dwte(s.V * s.C), d_dwpe(s.T * s.C);
    DeviceArray<char> memory(backward_scratch(s.N, s.C));
    std::vector<Output> outputs = {accumulated("dwte", d_dwte, dwte, dwte_reference, 2e-5)};
    if (s.T) outputs.push_back(accumulated("dwpe", d_dwpe, dwpe, dwpe_reference, 2e-5));
    // With dy = 0 it leaves dout as it is.
    NormBefore norm(s.N, s.C, std::vector<float>(s.N * s.C), dout);
    ladder.check(s.name(), outputs, [&](int version) {
        CUDA_CHECK(cudaMemsetAsync(memory, 0xff, memory.size, ladder.stream));  // nothing may hang on what is in it
        if (version == 6) {
            if (!s.positions_by_norm()) return false;
            norm.backward(ladder.stream, d_dout, {d_dwpe, (int)s.T});
        }
        backward(version, ladder.stream, d_dwte, s.T ? d_dwpe.data : nullptr, d_dout, d_tokens, d_position, plan, d_cu, (int)cu.size() - 1, s.N, s.C, s.V, s.T,
                 {memory, memory.size});
        return true;
    });
}

static void time_forward(Ladder& ladder, const Shape& s) {
    std::vector<int> tokens = make_tokens(s), position = make_positions(s);
    DeviceArray<int> d_tokens(tokens), d_position(position);
    DeviceArray<floatX> wte(repeated_numbers(s.V * s.C, 1)), wpe(repeated_numbers(s.T * s.C, 2)), out(s.N * s.C);
    double rows = (double)(s.N + distinct(tokens) + distinct(position));
    ladder.time(s.name(), {(double)s.N * s.C, rows * s.C * sizeof(floatX)}, [&](int version) {
        forward(version, ladder.stream, out, d_tokens, d_position, wte, wpe, s.N, s.C);
        return true;
    });
}

static void time_backward(Ladder& ladder, const Shape& s) {
    std::vector<int> tokens = make_tokens(s), position = make_positions(s), cu = make_cu_seqlens(s);
    DeviceArray<int> d_tokens(tokens), d_position(position), d_cu(cu), plan(encoder_plan(tokens, s.V, s.C));
    DeviceArray<floatX> dout(repeated_numbers(s.N * s.C, 1));
    DeviceArray<float> dwte(std::vector<float>(s.V * s.C)), dwpe(std::vector<float>(s.T * s.C));
    DeviceArray<char> memory(backward_scratch(s.N, s.C));
    auto run = [&](int version) {
        backward(version, ladder.stream, dwte, dwpe, dout, d_tokens, d_position, plan, d_cu, (int)cu.size() - 1, s.N, s.C, s.V, s.T, {memory, memory.size});
    };
    double numbers = (double)s.N * s.C, dout_bytes = numbers * sizeof(floatX), row_bytes = 2.0 * s.C * sizeof(float);  // of a table: read and written
    double token_bytes = dout_bytes + distinct(tokens) * row_bytes, position_bytes = distinct(position) * row_bytes;
    ladder.time(s.name(), {2 * numbers, token_bytes + position_bytes}, [&](int version) {
        if (version == 6 || (version < 3 && s.text == ONE_TOKEN)) return false;  // not all of it; all of it one block's work, a tenth of a second and more
        run(version);
        return true;
    });
    ladder.time(s.name() + ", positions left to layernorm_backward", {numbers, token_bytes}, [&](int version) {
        if (version == 6) run(version);
        return version == 6;
    });
    // What a training step has of both.
    NormBefore norm(s.N, s.C, repeated_numbers(s.N * s.C, 2), repeated_numbers(s.N * s.C, 3));
    ladder.time(s.name() + ", with layernorm_backward", {18 * numbers, 4 * dout_bytes + token_bytes + position_bytes}, [&](int version) {
        if (version < 5) return false;
        norm.backward(ladder.stream, dout, version == 5 ? PositionSums{} : PositionSums{dwpe, (int)s.T});
        run(version);
        return true;
    });
}

int main(int argc, char** argv) {
    const std::vector<Shape> shapes = {
        {1, 1, 3, 0, ZIPF},
        {5, 7, 11, 3, ZIPF},
        {64, 8, 5, 64, ZIPF},
        {65, 33, 4, 13, ZIPF},
        {200, 40, 50, 7, ZIPF},
        {130, 129, 1, 1, ZIPF},
        {1000, 257, 300, 50, ZIPF},
        {700, 1600, 300, 100, ZIPF},
        {20011, 40, 30, 0, ONE_TOKEN},
        {4099, 768, 1000, 1024, ZIPF},
        {4096, 768, 1000, 1024, ZIPF},
        {3001, 264, 100, 37, ZIPF, true},
        {2000, 13, 40, 500, ZIPF, true},
    };
    const Shape gpt2 = {65536, 768, 50304, 1024, ZIPF}, one_token = {65536, 768, 50304, 1024, ONE_TOKEN};

    Ladder forward_ladder("encoder_forward", {"a thread a number", "a warp a row", "16-byte accesses", "all reads of a thread at once (in use)"}, argc, argv);
    for (const Shape& s : shapes) check_forward(forward_ladder, s);
    time_forward(forward_ladder, gpt2);
    int failed = forward_ladder.finish();

    Ladder backward_ladder("encoder_backward",
                           {"a block a table row, which searches its tokens", "sorted by token: a block a run", "pieces of the sorted list",
                            "positions without sorting; runs shared out", "sorted on the host; slices that stay in the L2 cache (in use for ragged batches)",
                            "positions left to layernorm_backward (in use)"},
                           argc, argv);
    for (const Shape& s : shapes) check_backward(backward_ladder, s);
    time_backward(backward_ladder, gpt2);
    time_backward(backward_ladder, one_token);
    return backward_ladder.finish() | failed;
}
