// Infini-attention's memory (attention.h, section 4; gpt2/cuda/infini.cuh has the equations): write, what the memory is behind every full segment; retrieve,
// reading it and the gate; backward, of the gate, of the queries, and of the memory from the last segment to the first, which finds in dq, dk, dv what local
// attention has left there. Local attention is not in here: infini_core.cu has both.
//
// GPT-2 124M with N = 65536 tokens: a row of q, k, v, D or A is 1536 bytes in bf16, so each of them takes 101 MB, 34 µs at the 3.0 TB/s of an H100. A memory of
// all heads is 200 KB in float32: 6 MB in all with segments of 2048 tokens, 13 MB with 1024, 51 MB with 256.
//   write     k, v in, memories out: 202 MB and the memories, 70-85 µs; 2·hs·C FLOPs a token, 6.4 GFLOP, 9 µs at 690 TFLOP/s
//   retrieve  q, D, memories in, A out: 302 MB and the memories, 105-120 µs; as many FLOPs
//   backward  q, k, v, D, dA in, dq, dk, dv in and out: 1.1 GB and the memories, 330-370 µs; 10·hs·C FLOPs a token, 32 GFLOP, 47 µs
// All of it is bound by memory, if tensor cores do the products: float32 arithmetic alone would take 6.4 GFLOP at 60 TFLOP/s, as long as the bytes, and
// exponentials come on top.
//
//   1  as the equations stand: write, a thread a column of M, which walks through all tokens of its sequence; retrieve and backward of a read, a thread a
//      number of the result; backward through the memory, a thread a column. Expected: tens of milliseconds, since 24 blocks do the walking at 32768 tokens
//      a sequence, and Φ is computed again for every number that it goes into. Its backward pass does not know the delta rule
//   2  all segments at once, then sums over the few numbers of a memory in their order; under the delta rule affine maps in theirs. Tiles of tokens in
//      shared memory: Φ once a tile, each number of M read from the caches serves 16 tokens. Expected: some milliseconds, bound by float32 multiply-adds and
//      loads from shared memory. In use for float32 and for head sizes that are not multiples of 8 (infini_any_size.cuh)
//   3  tensor cores; rows come through cp.async while the ones before are worked on, every row once. Expected: 1.3 times the limits above in write and
//      retrieve. Backward writes dn and reads it, q and the memories again for dq: 1.4 GB, 470 µs. In use where the next one is not (infini_tensor_cores.cuh)
//   4  Hopper's bulk copies and products, 64 numbers a head (infini_hopper.cuh). Blocks of neighbouring heads and rows are neighbours: 3 keeps 64 rows in each
//      of 384 places of the tensors on their way at a time and gets 66 % of the bandwidth where its blocks are far apart. The gate's and the queries' backward
//      passes are one: dn is never stored, since dn·Mᵀ = g/den·(dA·Mᵀ), and that product also gives dA·R = (dA·Mᵀ)·Φ(q)/den without Φ(q)M. Where there are
//      sequences enough, a block walks through one and keeps the sum over its segments in registers, which saves reading and writing all memories once more in
//      either direction. Expected: write 80-90, retrieve 110-125, backward 380-410 µs. Delta's maps: 3 waits for every load in turn; here those to come are on
//      their way, and the columns stay in shared memory: 100-170 µs become 20-60. In use
//      Φ takes half the instructions that it did; write's blocks are small enough for six a multiprocessor, so that 768 of them are one wave; the sum over
//      segments has eight loads on their way and is launched while write still runs; retrieve's pieces are as long as full waves allow (a block begins by
//      loading the memory: some two tiles' time). Without arithmetic, but with its memories, write takes 73, 77 and 89 µs at the three shapes, retrieve 112
//      and 109; rows alone 71 and 102. Expected: write 79, 86, 93, retrieve 118
//   5  backward in one kernel, where each query head has its own kv head (infini_backward_hopper.cuh). A block walks through a head of a sequence from its end
//      to its start, so that the memories' gradients stay in registers: 4 writes and reads them (77 MB that need not be moved, with segments of 256), adds them
//      up in a kernel of its own, and waits for the slowest block twice. Under the delta rule k and v are read once instead of three times, and no affine map
//      is formed: dM += Φ(k)ᵀdn as the tokens come. Copies alone take as long as all of 4: nothing is to be gained in its arithmetic. Where sequences are few,
//      four blocks share one under the delta rule; for the other: 6. Expected: 418 and 421 µs at segments of 1024 and 256 become 370 and 350,
//      delta's 650 the same. In use
//      Under the delta rule one warpgroup's chains of products take longer than the copies: two take turns with a block's tiles. Expected: 425 and 387 µs at
//      segments of 2048 and 1024 become 370-390
//      Delta's write likewise, from a sequence's start to its end (infini_write_hopper.cuh): k and v are read once instead of twice, and M goes from segment to
//      segment within a block, or four where sequences are few. Expected: 180, 181 and 242 µs become 81, 83 and 98; were 122, 94 and 95 while each tile waited for
//      M. Now a segment's affine map is gathered in registers, tiles wait for z alone, and what blocks tell one another is on its way while they work. Expected:
//      81, 80 and 95
//   6  backward of the linear rule where sequences are few (infini_ranges_hopper.cuh). 4's two kernels take 193 and 228 µs of the 156 and 195 that their bytes
//      take, and a kernel between them adds up. Here all tiles are divided evenly among as many blocks as there are multiprocessors, each for two neighbouring
//      heads, whose tiles lie side by side; the sums over segments are plain sums, so that parts of them can be added up in any order by those who need them,
//      and the second kernel fetches its first tiles while the first one still runs. Copies alone take 162 and 207 µs in this pattern. Memories are fetched a
//      segment ahead: loads that stand behind the block's own tiles take 12 µs to arrive. Expected: 424 µs become 380. In use
#include "ladder.h"

#include "../../gpt2/cuda/infini.cuh"

using namespace gpu;

// --------------------------------------------------------------------------------------------------------------------------------------------------
// Version 1

__device__ static float feature(floatX x) { return to_float(x) > 0 ? to_float(x) + 1 : expf(to_float(x)); }

// The segment of token n.
__device__ static const InfiniSegment& segment_of(const InfiniPass& p, int64_t n) {
    int low = 0, high = p.max_segments;
    while (high - low > 1) {
        int middle = (low + high) / 2;
        (p.cu_q[middle] <= n ? low : high) = middle;
    }
    return p.segments[low];
}

// A block a sequence and kv head, a thread a column.
__global__ void infini_write_kernel1(InfiniPass p) {
    int s = blockIdx.x / p.kv_heads, kv = blockIdx.x % p.kv_heads, hs = p.hs;
    for (int i = p.sequences[s].first_segment; i < p.sequences[s + 1].first_segment; i++) {
        const InfiniSegment segment = p.segments[i];
        if (segment.write < 0) return;
        const float* before = p.memory(segment, kv);
        float *z = p.memories + p.memory_at(segment.write, kv), *M = z + hs;
        for (int c = threadIdx.x; c < hs; c += blockDim.x) {
            z[c] = before ? before[c] : p.z_start;
            for (int r = 0; r < hs; r++) M[r * hs + c] = before ? before[hs + r * hs + c] : 0;
            for (int t = 0; t < segment.k_len; t++) {
                const floatX *k = p.keys + (segment.key_row + t) * p.key_stride + kv * hs, *v = k + p.kv_channels();
                float u = to_float(v[c]);
                if (p.delta && before) {
                    float n = 0, den = INFINI_EPSILON;
                    for (int r = 0; r < hs; r++) {
                        n += feature(k[r]) * before[hs + r * hs + c];
                        den += feature(k[r]) * before[r];
                    }
                    u -= n / den;
                }
                z[c] += feature(k[c]);
                for (int r = 0; r < hs; r++) M[r * hs + c] += feature(k[r]) * u;
            }
        }
        __syncthreads();
    }
}

// (Φ(q)M)_c and Φ(q)·z + ε
__device__ static float2 numerator_and_denominator(const floatX* q, const float* memory, int c, int hs) {
    float2 sum = {0, INFINI_EPSILON};
    for (int r = 0; r < hs; r++) {
        float f = feature(q[r]);
        sum.x += f * memory[hs + r * hs + c];
        sum.y += f * memory[r];
    }
    return sum;
}

// A thread a number of A.
__global__ void infini_retrieve_kernel1(InfiniPass p, const float* beta, const floatX* D, floatX* A) {
    int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x, n = i / p.channels();
    if (n >= p.num_tokens) return;
    int h = (int)(i % p.channels()) / p.hs, c = (int)(i % p.hs);
    const InfiniSegment& segment = segment_of(p, n);
    const float* memory = p.memory(segment, p.kv_head(h));
    float g = memory || p.gated_first ? infini_gate(beta[h]) : 0, R = 0;
    if (memory) {
        float2 x = numerator_and_denominator(p.qkv + n * p.qkv_stride() + h * p.hs, memory, c, p.hs);
        R = x.x / x.y;
    }
    A[i] = from_float<floatX>(g * R + (1 - g) * to_float(D[i]));
}

// A thread a token and head. dbetas (N,NH): each one's part of dβ.
__global__ void infini_gate_backward_kernel1(InfiniPass p, const float* beta, const floatX* D, const floatX* dA, floatX* dn, float* dden, float* dbetas) {
    int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x, n = i / p.heads;
    if (n >= p.num_tokens) return;
    int h = (int)(i % p.heads), hs = p.hs;
    const InfiniSegment& segment = segment_of(p, n);
    const float* memory = p.memory(segment, p.kv_head(h));
    dbetas[i] = 0;
    if (!memory && !p.gated_first) return;
    float g = infini_gate(beta[h]), dA_R = 0, dA_D = 0, den = 1;
    for (int c = 0; c < hs; c++) {
        int64_t at = n * p.channels() + h * hs + c;
        float d = to_float(dA[at]);
        if (memory) {
            float2 x = numerator_and_denominator(p.qkv + n * p.qkv_stride() + h * hs, memory, c, hs);
            den = x.y;
            dA_R += d * x.x / den;
            dn[at] = from_float<floatX>(g * d / den);
        }
        dA_D += d * to_float(D[at]);
    }
    if (memory) dden[h * p.num_tokens + n] = -g * dA_R / den;
    dbetas[i] = g * (1 - g) * (dA_R - dA_D);
}
__global__ void infini_beta_kernel1(InfiniPass p, const float* dbetas, float* dbeta) {
    __shared__ float shared[32];
    float sum = 0;
    for (int64_t n = threadIdx.x; n < p.num_tokens; n += blockDim.x) sum += dbetas[n * p.heads + blockIdx.x];
    sum = block_sum(sum, shared);
    if (threadIdx.x == 0) dbeta[blockIdx.x] += sum;
}

// A thread a number of dq.
__global__ void infini_query_backward_kernel1(InfiniPass p, const float* beta, const floatX* dn, const float* dden, floatX* dqkv) {
    int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x, n = i / p.channels();
    if (n >= p.num_tokens) return;
    int h = (int)(i % p.channels()) / p.hs, r = (int)(i % p.hs), hs = p.hs;
    const InfiniSegment& segment = segment_of(p, n);
    const float* memory = p.memory(segment, p.kv_head(h));
    int64_t at = n * p.qkv_stride() + h * hs + r;
    float d = 0;
    if (memory) {
        d = dden[h * p.num_tokens + n] * memory[r];
        for (int c = 0; c < hs; c++) d += to_float(dn[n * p.channels() + h * hs + c]) * memory[hs + r * hs + c];
    }
    dqkv[at] = from_float<floatX>(p.keep(p.gate(segment, beta[h])) * to_float(dqkv[at]) + d * min(1.f, feature(p.qkv[at])));
}

// The gradient of every memory that is read, from the last to the first; a block a sequence and kv head, a thread a column.
__global__ void infini_memory_backward_kernel1(InfiniPass p, const floatX* dn, const float* dden, float* dmemories) {
    int s = blockIdx.x / p.kv_heads, kv = blockIdx.x % p.kv_heads, hs = p.hs;
    for (int i = p.sequences[s + 1].first_segment - 1; i >= p.sequences[s].first_segment; i--) {
        const InfiniSegment segment = p.segments[i];
        if (segment.read < 0) return;
        float *dz = dmemories + p.memory_at(segment.read, kv), *dM = dz + hs;
        const float* after = segment.last ? nullptr : dmemories + p.memory_at(segment.write, kv);
        for (int c = threadIdx.x; c < hs; c += blockDim.x) {
            dz[c] = after ? after[c] : 0;
            for (int r = 0; r < hs; r++) dM[r * hs + c] = after ? after[hs + r * hs + c] : 0;
            for (int h = kv * p.heads_per_kv(); h < (kv + 1) * p.heads_per_kv(); h++)
                for (int64_t n = segment.row; n < segment.row + segment.q_len; n++) {
                    const floatX* q = p.qkv + n * p.qkv_stride() + h * hs;
                    float d = to_float(dn[n * p.channels() + h * hs + c]);
                    dz[c] += feature(q[c]) * dden[h * p.num_tokens + n];
                    for (int r = 0; r < hs; r++) dM[r * hs + c] += feature(q[r]) * d;
                }
        }
    }
}

// A thread a number of dk and of dv.
__global__ void infini_write_backward_kernel1(InfiniPass p, const float* beta, const float* dmemories, floatX* dqkv) {
    int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x, n = i / p.kv_channels();
    if (n >= p.num_tokens) return;
    int kv = (int)(i % p.kv_channels()) / p.hs, c = (int)(i % p.hs), hs = p.hs;
    const InfiniSegment& segment = segment_of(p, n);
    int64_t k = n * p.qkv_stride() + p.channels() + kv * hs, v = k + p.kv_channels();
    float dk = 0, dv = 0, keep = p.keep(p.gate(segment, beta[kv]));
    if (segment.write >= 0 && !segment.last) {
        const float *dz = dmemories + p.memory_at(segment.write, kv), *dM = dz + hs;
        dk = dz[c];
        for (int j = 0; j < hs; j++) {
            dk += to_float(p.qkv[v + j]) * dM[c * hs + j];
            dv += feature(p.qkv[k + j]) * dM[j * hs + c];
        }
    }
    dqkv[k + c] = from_float<floatX>(keep * to_float(dqkv[k + c]) + dk * min(1.f, feature(p.qkv[k + c])));
    dqkv[v + c] = from_float<floatX>(keep * to_float(dqkv[v + c]) + dv);
}

// --------------------------------------------------------------------------------------------------------------------------------------------------
// A batch on the device, and what the versions do with it

struct Layer {
    AttentionConfig config;
    std::vector<int> lengths, cu = {0};
    std::vector<gpu::TokenPlace> place;
    int64_t N = 0;
    int max_len = 0;

    Layer(const char* options, int heads, int hs, const std::vector<int>& lengths) : lengths(lengths) {
        ModelConfig model;
        model.layers = 1;
        model.heads = heads;
        model.channels = heads * hs;
        parse_attention(model, options, {}, "none");
        config = model.attention[0];
        for (int s = 0; s < (int)lengths.size(); s++) {
            for (int t = 0; t < lengths[s]; t++) place.push_back({s, t});
            cu.push_back(cu.back() + lengths[s]);
            max_len = std::max(max_len, lengths[s]);
        }
        N = cu.back();
    }
    int num_seqs() const { return (int)lengths.size(); }
};

// Device memory of random numbers, whatever its size: a million of them again and again.
template <class T>
static void fill(DeviceArray<T>& array, uint64_t seed, double std, double mean = 0) {
    DeviceArray<T> numbers(random_numbers(std::min<int64_t>(array.size, 1 << 20), seed, std, mean));
    for (int64_t i = 0; i < array.size; i += numbers.size)
        CUDA_CHECK(cudaMemcpy(array + i, numbers, std::min(numbers.size, array.size - i) * sizeof(T), cudaMemcpyDeviceToDevice));
}

struct Device {
    InfiniPass pass;
    DeviceArray<int> cu;
    DeviceArray<gpu::TokenPlace> place;
    DeviceArray<floatX> qkv, dn;
    DeviceArray<float> memories, dden, dmemories, dbetas;
    DeviceArray<char> scratch;
    Scratch rest;

    // lanes: how many sequences start from a state.
    Device(const Layer& layer, int64_t lanes)
        : pass(infini_shape(layer.config, layer.N, layer.num_seqs(), layer.max_len, lanes, layer.N + lanes * layer.config["segment"])),
          cu(layer.cu),
          place((int64_t)layer.place.size()),
          qkv(layer.N * pass.qkv_stride()),
          dn(layer.N * pass.channels()),
          memories(pass.max_memories * infini_memory_size(layer.config)),
          dden(layer.N * pass.heads),
          dmemories(memories.size),
          dbetas(layer.N * pass.heads),
          scratch(infini_tables_bytes(pass) + infini_write_scratch(pass) + infini_read_backward_scratch(pass)) {
        if (layer.N > 0) CUDA_CHECK(cudaMemcpy(place, layer.place.data(), layer.place.size() * sizeof(gpu::TokenPlace), cudaMemcpyHostToDevice));
        rest = {scratch.data, scratch.size};
    }
    void begin(cudaStream_t stream, const InfiniSource& source) { infini_begin(stream, pass, cu, place, source, qkv, memories, rest); }

    // The pass with the kernels of a version; false: there are none for it.
    bool with(int version, InfiniPass* p) const {
        *p = pass;
        if (version < 3) p->tensor_cores = false;
        if (version < 4) p->hopper = false;
        if (version < 5) p->sequence_blocks = p->write_blocks = 0;
        if (version < 6) p->ranges = 0;
        return version < 3 || (version == 3 ? pass.tensor_cores : pass.hopper);
    }

    bool write(int version, cudaStream_t stream) const {
        InfiniPass p;
        if (!with(version, &p) || (version == 1 && p.delta && p.max_len > 4096)) return false;
        if ((version == 4 && p.delta) || (version == 5 && p.write_blocks == 0) || version == 6) return false;
        if (version > 1) {
            infini_write(stream, p, rest);
        } else if (p.num_seqs > 0) {
            infini_write_kernel1<<<p.num_seqs * p.kv_heads, 64, 0, stream>>>(p);
            LAUNCH_CHECK();
        }
        return true;
    }
    bool retrieve(int version, cudaStream_t stream, const float* beta, const floatX* D, floatX* A) const {
        InfiniPass p;
        if (version >= 5 || !with(version, &p)) return false;
        if (version > 1) {
            infini_retrieve(stream, p, beta, D, A);
        } else {
            infini_retrieve_kernel1<<<(unsigned)ceil_div(p.num_tokens * p.channels(), 256), 256, 0, stream>>>(p, beta, D, A);
            LAUNCH_CHECK();
        }
        return true;
    }
    bool backward(int version, cudaStream_t stream, const float* beta, float* dbeta, const floatX* D, const floatX* dA, floatX* dqkv) const {
        InfiniPass p;
        if (!with(version, &p) || (version == 1 && p.delta) || (version == 5 && p.sequence_blocks == 0) || (version == 6 && p.ranges == 0)) return false;
        if (version > 1) {
            infini_gradients(stream, p, beta, dbeta, D, dA, dn, dden, dqkv, dmemories, rest);
            return true;
        }
        infini_gate_backward_kernel1<<<(unsigned)ceil_div(p.num_tokens * p.heads, 128), 128, 0, stream>>>(p, beta, D, dA, dn, dden, dbetas);
        LAUNCH_CHECK();
        infini_beta_kernel1<<<p.heads, 256, 0, stream>>>(p, dbetas, dbeta);
        LAUNCH_CHECK();
        infini_query_backward_kernel1<<<(unsigned)ceil_div(p.num_tokens * p.channels(), 256), 256, 0, stream>>>(p, beta, dn, dden, dqkv);
        LAUNCH_CHECK();
        infini_memory_backward_kernel1<<<p.num_seqs * p.kv_heads, 64, 0, stream>>>(p, dn, dden, dmemories);
        LAUNCH_CHECK();
        infini_write_backward_kernel1<<<(unsigned)ceil_div(p.num_tokens * p.kv_channels(), 256), 256, 0, stream>>>(p, beta, dmemories, dqkv);
        LAUNCH_CHECK();
        return true;
    }
};

// --------------------------------------------------------------------------------------------------------------------------------------------------
// Checks

// What a pass of the CPU works on: every sequence starts from a state of its own if `carried`, some with pending tokens, some with a memory.
struct Reference {
    std::vector<cpu::TokenPlace> place;
    std::vector<std::vector<float>> states;
    std::vector<std::vector<float>> blocks;  // the same; cpu::infini_pass completes their rows
    std::vector<float> qkv, beta, memories;
    cpu::InfiniPass pass;
    int64_t memory_size;

    Reference(const Layer& layer, bool carried) {
        const AttentionConfig& a = layer.config;
        int64_t size = infini_state(a).per_sequence, rows = INFINI_MEMORY + infini_memory_size(a);
        memory_size = infini_memory_size(a);
        qkv = random_numbers(layer.N * qkv_size(a), 1);
        beta = random_numbers(a.heads, 2);
        for (const gpu::TokenPlace& p : layer.place) place.push_back({p.seq, p.pos});
        std::vector<float*> block;
        for (int s = 0; s < layer.num_seqs(); s++) {
            if (carried) {
                std::vector<float> state = random_numbers(size, 100 + s);
                state[INFINI_PENDING] = (float)(s * 37 % a["segment"]);
                state[INFINI_WRITTEN] = s % 3 != 1;
                for (int64_t i = INFINI_MEMORY; i < rows; i++)  // z of a memory is positive
                    if ((i - INFINI_MEMORY) % (a.head_size() * (a.head_size() + 1)) < a.head_size()) state[i] = 5 + std::fabs(state[i]);
                states.push_back(state);
                blocks.push_back(state);
            }
        }
        for (int s = 0; s < layer.num_seqs(); s++) block.push_back(carried ? blocks[s].data() : nullptr);
        cpu::AttentionContext ctx{};
        ctx.config = &a;
        ctx.num_seqs = layer.num_seqs();
        ctx.cu_seqlens = layer.cu.data();
        ctx.place = place.data();
        memories.resize((layer.N / a["segment"] + layer.num_seqs()) * memory_size);
        pass = cpu::infini_pass(ctx, qkv.data(), block, memories.data());
        int64_t written = 0;
        for (const cpu::InfiniSegment& s : pass.segments) written += s.write != nullptr;
        memories.resize(written * memory_size);  // which moves nothing
        cpu::infini_write(pass);
    }
};

// keep(row, column)·start + gradients, and start: random numbers as large as the gradients of each part of a row, so that an error in either shows.
static void add_start(std::vector<float>& gradient, std::vector<float>& start, int64_t stride, const std::vector<int64_t>& parts,
                      const std::function<float(int64_t, int64_t)>& keep) {
    start = random_numbers((int64_t)gradient.size(), 7);
    for (size_t k = 0; k + 1 < parts.size(); k++) {
        double sum = 0, n = 0;
        for (size_t i = 0; i < gradient.size(); i++)
            if ((int64_t)i % stride >= parts[k] && (int64_t)i % stride < parts[k + 1]) sum += gradient[i] * gradient[i], n++;
        float rms = sum > 0 ? (float)std::sqrt(sum / n) : 1;
        for (size_t i = 0; i < gradient.size(); i++)
            if ((int64_t)i % stride >= parts[k] && (int64_t)i % stride < parts[k + 1]) {
                start[i] = round_to_working_type(rms * start[i]);
                gradient[i] += keep((int64_t)i / stride, (int64_t)i % stride) * start[i];
            }
    }
}

static std::vector<float> columns(const std::vector<float>& x, int64_t stride, int64_t begin, int64_t end) {
    std::vector<float> y;
    for (int64_t row = 0; row < (int64_t)x.size(); row += stride) y.insert(y.end(), x.begin() + row + begin, x.begin() + row + end);
    return y;
}

static void check(Ladder& ladder, const char* options, int heads, int hs, const std::vector<int>& lengths, bool carried) {
    Layer layer(options, heads, hs, lengths);
    Reference r(layer, carried);
    const AttentionConfig& a = layer.config;
    int64_t N = layer.N, C = a.channels, stride = qkv_size(a), KVhs = infini_row_size(a) / 2;
    std::string shape = format("%s NH=%d hs=%d", options, heads, hs) + (carried ? " carried" : "");
    for (size_t s = 0; s < lengths.size(); s++) shape += format("%s%d", s ? "," : " T=", lengths[s]);

    Device device(layer, carried ? layer.num_seqs() : 0);
    DeviceArray<float> beta(r.beta), dbeta(a.heads), carry(carried ? layer.num_seqs() * infini_state(a).per_sequence : 0);
    DeviceArray<floatX> D(random_numbers(N * C, 3)), A(N * C), dA(N * C), dqkv(N * stride);
    device.qkv.copy_from(r.qkv);
    std::vector<float> all_states;
    for (const std::vector<float>& state : r.states) all_states.insert(all_states.end(), state.begin(), state.end());
    DeviceArray<float> states(all_states);
    std::vector<const float*> pointers;
    for (size_t s = 0; s < r.states.size(); s++) pointers.push_back(states + s * r.states[s].size());
    DeviceArray<const float*> memory_from((int64_t)pointers.size());
    InfiniSource source{};
    if (carried) {
        CUDA_CHECK(cudaMemcpy(memory_from, pointers.data(), pointers.size() * sizeof(float*), cudaMemcpyHostToDevice));
        source = {nullptr, memory_from, carry, true};
    }
    device.begin(ladder.stream, source);
    CUDA_CHECK(cudaStreamSynchronize(ladder.stream));

    auto read_memories = [&] {
        std::vector<float> x = device.memories.to_host();
        x.resize(r.memories.size());
        return x;
    };
    auto poison = [&] { CUDA_CHECK(cudaMemset(device.memories, 0xff, device.memories.size * sizeof(float))); };
    ladder.check("write " + shape, {{"memories", r.memories, read_memories, poison, TOLERANCE, 1e-6}}, [&](int v) { return device.write(v, ladder.stream); });

    // From here on the CPU's memories.
    std::vector<float> memories = r.memories;
    memories.resize(device.memories.size);
    device.memories.copy_from(memories);
    std::vector<float> d = D.to_host(), expected(N * C);
    cpu::infini_retrieve(r.pass, r.beta.data(), d.data(), expected.data());
    ladder.check("retrieve " + shape, {output("A", A, expected)}, [&](int v) { return device.retrieve(v, ladder.stream, beta, D, A); });
    ladder.check("retrieve in place " + shape, {accumulated("A", A, d, expected)}, [&](int v) { return device.retrieve(v, ladder.stream, beta, A, A); });

    std::vector<float> da = random_numbers(N * C, 4), dd = da, dn(N * C), dden(N * a.heads), db(a.heads), dqkv_expected(N * stride), dqkv_start, db_start;
    cpu::infini_gate_backward(r.pass, r.beta.data(), db.data(), d.data(), dd.data(), dn.data(), dden.data());
    cpu::infini_query_backward(r.pass, dn.data(), dden.data(), dqkv_expected.data());
    cpu::infini_memory_backward(r.pass, dn.data(), dden.data(), dqkv_expected.data());
    std::vector<int64_t> parts = {0, C, C + KVhs, stride};
    std::vector<float> ones(N * C, 1), keep = ones;  // 1−g, where what local attention has left is still to be multiplied by it
    if (KVhs == C) {
        std::vector<float> nowhere(N * C), no_dden(N * a.heads), no_db(a.heads);
        cpu::infini_gate_backward(r.pass, r.beta.data(), no_db.data(), d.data(), keep.data(), nowhere.data(), no_dden.data());
    }
    add_start(dqkv_expected, dqkv_start, stride, parts, [&](int64_t n, int64_t c) { return KVhs == C ? keep[n * C + c % C] : 1; });
    add_start(db, db_start, a.heads, {0, a.heads}, [](int64_t, int64_t) { return 1; });
    dA.copy_from(da);
    std::vector<Output> outputs = {accumulated("dbeta", dbeta, db_start, db)};
    const char* names[] = {"dq", "dk", "dv"};
    for (int k = 0; k < 3; k++)
        outputs.push_back({names[k], columns(dqkv_expected, stride, parts[k], parts[k + 1]),
                           [&, k] { return columns(dqkv.to_host(), stride, parts[k], parts[k + 1]); },
                           [&] {
                               dqkv.copy_from(dqkv_start);
                               for (auto* x : {&device.dmemories, &device.dden}) CUDA_CHECK(cudaMemset(*x, 0xff, x->size * sizeof(float)));
                               CUDA_CHECK(cudaMemset(device.dn, 0xff, device.dn.size * sizeof(floatX)));
                           },
                           TOLERANCE, 1e-6});
    if (KVhs != C) {
        DeviceArray<floatX> dD(N * C);
        ladder.check("dD " + shape, {output("dD", dD, dd)}, [&](int v) {
            if (v == 2) infini_local_gradient(ladder.stream, device.pass, beta, dA, dD);
            return v == 2;
        });
    }
    ladder.check("backward " + shape, outputs, [&](int v) { return device.backward(v, ladder.stream, beta, dbeta, D, dA, dqkv); });
}

// --------------------------------------------------------------------------------------------------------------------------------------------------
// Times

static void time(Ladder& ladder, const char* update, int B, int T, int S) {
    constexpr int heads = 12, hs = 64;
    std::string options = format("infini:segment=%d:memory-update=%s", S, update), shape = format("%s B=%d NH=%d T=%d hs=%d S=%d", update, B, heads, T, hs, S);
    Layer layer(options.c_str(), heads, hs, std::vector<int>(B, T));
    Device device(layer, 0);
    int64_t N = layer.N, C = heads * hs;
    DeviceArray<float> beta(random_numbers(heads, 2)), dbeta(heads);
    DeviceArray<floatX> D(N * C), A(N * C), dA(N * C), dqkv(N * qkv_size(layer.config));
    fill(device.qkv, 1, 1);
    fill(D, 3, 1);
    fill(dA, 4, 1);
    fill(dqkv, 5, 1e-3);
    fill(dbeta, 6, 1);
    fill(device.memories, 7, 1, 10);
    device.begin(ladder.stream, {});
    double row = (double)N * C * sizeof(floatX), product = 2.0 * N * C * hs, memories = (double)B * (T / S) * infini_memory_size(layer.config) * 4;
    // A sequence's first segment finds no memory: q, and on the way back D, dA and dq, need not be looked at; nor k and v of its last.
    double later = 1 - (double)S / T;
    ladder.time("write " + shape, {product * (device.pass.delta ? 2 : 1), 2 * row + memories}, [&](int v) { return device.write(v, ladder.stream); });
    ladder.time("retrieve " + shape, {product, (2 + later) * row + later * memories}, [&](int v) { return device.retrieve(v, ladder.stream, beta, D, A); });
    ladder.time("backward " + shape, {product * (device.pass.delta ? 9 : 5), (4 + 7 * later) * row + later * memories},
                [&](int v) { return device.backward(v, ladder.stream, beta, dbeta, D, dA, dqkv); });
}

int main(int argc, char** argv) {
    Ladder ladder("infini_memory",
                  {"as the equations stand", "all segments at once, tiles in shared memory, float32 arithmetic (in use)", "tensor cores (in use)",
                   "Hopper: bulk copies, the gate and the queries in one pass (in use)",
                   "in one kernel: backward, a sequence from its end to its start, and delta's write, from its start to its end (in use)",
                   "backward of the linear rule where sequences are few: all queries, then all keys (in use)"},
                  argc, argv);
    const std::vector<int> ragged = {3, 0, 1, 17, 7, 8, 40}, longer = {130, 0, 64, 257, 1};
    check(ladder, "infini:segment=1", 1, 64, {1}, false);
    check(ladder, "infini:segment=7", 3, 20, ragged, false);
    check(ladder, "infini:segment=7:memory-update=delta", 3, 20, ragged, false);
    check(ladder, "infini:segment=1:first-segment=gated", 2, 64, {5, 0, 1, 33}, false);
    check(ladder, "infini:segment=1:memory-update=delta", 2, 64, {5, 0, 1, 20}, false);
    check(ladder, "infini:segment=7:kv-heads=1:memory-init=zero:first-segment=gated", 4, 80, ragged, false);
    check(ladder, "infini:segment=7:kv-heads=2:memory-update=delta", 4, 80, ragged, false);
    check(ladder, "infini:segment=16", 2, 32, longer, false);
    check(ladder, "infini:segment=64:kv-heads=4", 12, 64, longer, false);
    check(ladder, "infini:segment=64:kv-heads=4:memory-update=delta:memory-init=zero:first-segment=gated", 12, 64, longer, false);
    check(ladder, "infini:segment=64:memory-update=delta", 2, 32, longer, false);
    check(ladder, "infini:segment=256:first-segment=gated", 2, 128, {700, 256, 1}, false);
    check(ladder, "infini:segment=256:memory-update=delta", 2, 128, {700, 513}, false);
    check(ladder, "infini:segment=100:memory-update=delta", 1, 136, {350}, false);
    check(ladder, "infini:segment=5:memory-update=delta", 1, 516, {17}, false);
    check(ladder, "infini:segment=7:kv-heads=1:memory-update=delta", 2, 20, ragged, true);
    check(ladder, "infini:segment=64:kv-heads=2", 4, 64, {100, 3, 200, 0, 64, 150}, true);
    check(ladder, "infini:segment=64:kv-heads=2:memory-update=delta", 4, 64, {100, 3, 200, 0, 64, 150}, true);
    check(ladder, "infini:segment=256", 12, 64, {1000, 1024}, false);
    // Enough sequences for backward in one kernel: two blocks a multiprocessor, one, four blocks a sequence.
    const std::vector<int> many = {130, 0, 257, 200, 256, 64, 129, 250, 193, 255, 1, 256, 90}, some = {257, 250, 200, 256, 257, 255, 192, 257, 240};
    check(ladder, "infini:segment=64", 12, 64, many, false);
    check(ladder, "infini:segment=64:memory-update=delta:first-segment=gated", 12, 64, many, false);
    check(ladder, "infini:segment=100", 12, 64, some, false);
    check(ladder, "infini:segment=100:memory-update=delta", 12, 64, some, false);
    // Few sequences: ranges that begin and end anywhere, within a segment or behind several.
    check(ladder, "infini:segment=64", 24, 64, {700, 0, 1, 650}, false);
    check(ladder, "infini:segment=64", 40, 64, {500, 300}, true);
    check(ladder, "infini:segment=128:first-segment=gated", 42, 64, {513, 300}, false);
    check(ladder, "infini:segment=512", 2, 64, {3000, 1500}, false);
    check(ladder, "infini:segment=64:memory-update=delta", 20, 64, {100, 130, 200, 0, 64, 150, 190, 200}, true);
    check(ladder, "infini:segment=300:memory-update=delta", 12, 64, {700, 650}, false);
    check(ladder, "infini:segment=256:memory-update=delta", 20, 64, {300, 700}, true);
    check(ladder, "infini:segment=256:memory-update=delta:kv-heads=2", 4, 64, {1000, 0, 3, 256, 515}, true);
    check(ladder, "infini:segment=700:memory-update=delta", 2, 64, {2200, 700}, false);
    for (const char* update : {"linear", "delta"}) {
        time(ladder, update, 2, 32768, 2048);
        time(ladder, update, 8, 8192, 1024);
        time(ladder, update, 64, 1024, 256);
    }
    return ladder.finish();
}
