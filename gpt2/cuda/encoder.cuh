// The encoder: rows of two tables by token and by position, and the gradients of the tables.
//
//     forward    out_n = wte[token_n] + wpe[position_n]
//     backward   dwte[v] += Σ dout_n over the n with token_n = v       dwpe[p] += Σ dout_n over the n with position_n = p
//
// Shapes: out, dout (N,C), wte (Vp,C), wpe (max_seq,C). How these kernels came about: dev/cuda/encoder.cu.
//
// The backward pass scatters, and one token may be a tenth of the batch. Adding with atomics would sum in any order.
//
// Positions count up in each sequence, so the rows of one position are known: one in each sequence that is long enough. A block adds them up.
//
// For the tokens the row numbers are sorted by token: then each table row's sum is a *run* of neighbours in the sorted list. Runs have all lengths; a block
// takes a *piece* of 64 entries whatever runs it cuts, and its warps share out the runs in it. A run inside one piece is added to the table at once; of a run
// that pieces cut, each piece leaves its part, and a second kernel adds the parts in order.
//
//     sorted tokens    1 1 1 4 | 4 4 4 4 | 4 4 7 9 | 9 9 9 9        | between pieces (of 4 entries here)
//     goes to          table T | H       | H   t T | H              t: the table, T: tail of its piece, H: head of its piece
//     second kernel    token 4: tail 0 + head 1 + head 2            token 9: tail 2 + head 3
#pragma once

#include <cub/device/device_radix_sort.cuh>

#include "common.cuh"
#include "numbers.cuh"

namespace gpu {

// ---- forward -----------------------------------------------------------------------------------------------------------------------------------------------

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

// out (N,C); tokens, position (N) on the device; wte (Vp,C), wpe (max_seq,C) or null. cpu::encoder_forward.
inline void encoder_forward(cudaStream_t stream, floatX* out, const int* tokens, const int* position, const floatX* wte, const floatX* wpe /*or null*/,
                            int64_t N, int64_t C) {
    constexpr int W = Packed<floatX>::size;
    bool vectors = C % W == 0 && aligned16(out) && aligned16(wte) && aligned16(wpe);
    (vectors ? encoder_forward3<W> : encoder_forward3<1>)(stream, out, tokens, position, wte, wpe, N, C);
}

// ---- backward ----------------------------------------------------------------------------------------------------------------------------------------------

constexpr int ENCODER_PIECE = 64;  // entries of the sorted list that one block adds up

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

// A block takes one piece, a warp 32·W channels of one run in it at a time. head, tail (pieces,C) are written only where a run is cut.
template <int W>
__global__ void __launch_bounds__(256)
    encoder_backward_kernel4(float* __restrict__ dtable, float* __restrict__ head, float* __restrict__ tail, const floatX* __restrict__ dout,
                             const int* __restrict__ sorted, const int* __restrict__ order, int N, int C) {
    constexpr int PIECE = ENCODER_PIECE, BATCH = 8;                            // rows in flight
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
    int piece = blockIdx.x, pieces = gridDim.x, begin = piece * ENCODER_PIECE;
    if (piece + 1 == pieces) return;
    int end = begin + ENCODER_PIECE, run = sorted[end];
    if (sorted[end - 1] != run || (begin > 0 && sorted[begin - 1] == run)) return;  // not cut; or it began before this piece

    int last = piece;  // the last piece that begins with this run; a thread looks at one piece
    for (int found = 256; found == 256; last += found) {
        int q = last + 1 + threadIdx.x;
        found = __syncthreads_count(q < pieces && sorted[q * ENCODER_PIECE] == run);
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

// Bytes of scratch memory that encoder_backward takes.
inline int64_t encoder_backward_scratch(int64_t N, int64_t C) {
    int64_t parts = ceil_div(N, ENCODER_PIECE) * C * (int64_t)sizeof(float), list = N * (int64_t)sizeof(int);
    return scratch_bytes({list, list, parts, parts, list, sort_rows_temporary(N)});
}

// dwte (V,C) += rows of dout (N,C) by token, dwpe (max_seq,C; or null) += rows of dout by position. tokens (N) in [0,V); positions count from 0 in each of
// the num_seqs sequences, whose longest has max_len tokens: cu_seqlens (num_seqs+1). cpu::encoder_backward.
inline void encoder_backward(cudaStream_t stream, float* dwte, float* dwpe /*or null*/, const floatX* dout, const int* tokens, const int* cu_seqlens,
                             int num_seqs, int max_len, int64_t N, int64_t C, int64_t V, Scratch scratch) {
    constexpr int W = Packed<floatX>::size;
    if (N == 0) return;
    int64_t pieces = ceil_div(N, ENCODER_PIECE);
    bool vectors = C % W == 0 && aligned16(dwte) && aligned16(dout);
    unsigned chunks = (unsigned)ceil_div(C, 32 * (vectors ? W : 1));
    if (dwpe && max_len > 0) {
        dim3 grid((unsigned)max_len, chunks);
        (vectors ? encoder_position_kernel4<W> : encoder_position_kernel4<1>)<<<grid, 256, 0, stream>>>(dwpe, dout, cu_seqlens, num_seqs, (int)C);
        LAUNCH_CHECK();
    }
    int *sorted = scratch.take<int>(N), *order = scratch.take<int>(N);
    float *head = scratch.take<float>(pieces * C), *tail = scratch.take<float>(pieces * C);
    sort_rows(stream, sorted, order, tokens, N, V, scratch);
    (vectors ? encoder_backward_kernel4<W> : encoder_backward_kernel4<1>)<<<(unsigned)pieces, 256, 0, stream>>>(dwte, head, tail, dout, sorted, order, (int)N,
                                                                                                                (int)C);
    LAUNCH_CHECK();
    dim3 grid((unsigned)pieces, (unsigned)ceil_div(C, 32 * (vectors ? 4 : 1)));
    (vectors ? encoder_join_kernel4<4> : encoder_join_kernel4<1>)<<<grid, 256, 0, stream>>>(dwte, head, tail, sorted, (int)N, (int)C);
    LAUNCH_CHECK();
}

}  // namespace gpu
