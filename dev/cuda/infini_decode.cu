// Infini-attention for one new token of each text (attention.cuh, section 4; gpt2/cuda/infini_decode.cuh): what a decode step does between a layer's two
// projections. Local attention over the pending tokens of the segment, reading of the memory, the gate; the new token's key and value join the state, and with
// the last token of a segment they all become part of the memory.
//
// GPT-2 124M with segments of 256, bytes of a text and layer: 200 KB of memory, 6 KB of each pending token; with the last token of a segment these 1.57 MB are
// read again and the memory is written. At the 3.0 TB/s of an H100 1, 128, 255 pending tokens of 256 texts take 18, 84, 150 µs; of one text 1 to 2 MB, less
// than a microsecond: there it is the way to memory and back, several times one behind another, that takes time. A key is used for 4 FLOPs a number.
// The end of a segment is 2·S·hs·C FLOPs a text (6.4 GFLOP for 256, 13 with delta): 0.1 and 0.2 ms in float32 arithmetic, one step in S.
//
//   1  as the equations stand: a block a kv head; a thread a key, turned by angles of its own; a thread a column. Expected: keys are read with rows 6 KB apart
//      from thread to thread, 32 lines at a time, sines in double precision for each key: 10 times the limits
//   2  a key to 16 lanes, which go on with their keys as if they were alone, several loads on their way; the query turns instead of the keys, always by the
//      same angle. Expected: with many texts 1.2 times the limit; one text has 12 blocks, 131 KB each, some 4 µs
//   3  a cluster of blocks to a kv head where texts are few, which meet in shared memory. Expected: one text 3 µs, of which 1 to read. In use
//
// Blocks of 128 threads, 5 on a multiprocessor: what a block does before its first and behind its last key, some thousand instructions a warp and one way to
// memory after another, is half of its time where few tokens are pending.
#include "ladder.h"

#include "../../gpt2/cuda/infini_decode.cuh"

using namespace gpu;

// --------------------------------------------------------------------------------------------------------------------------------------------------
// Version 1

__global__ void infini_step_kernel1(InfiniPass p, infini_decode::Step step) {
    using infini_rows::feature;
    extern __shared__ float weights[];  // (segment)
    __shared__ float sums[2][32];
    int kv = blockIdx.x % p.kv_heads, s = blockIdx.x / p.kv_heads, hs = p.hs, n = p.cu_seqlens[s];
    if (p.cu_seqlens[s + 1] == n) return;
    int position = step.position[n], pending = position % p.segment;
    bool written = position >= p.segment;
    float *state = step.states[s].fixed, *z = state + INFINI_MEMORY + kv * p.memory_size(), *M = z + hs;
    float* keys = state + INFINI_MEMORY + p.kv_heads * p.memory_size() + kv * hs;
    const floatX* token = p.qkv + n * p.qkv_stride();
    for (int c = threadIdx.x; c < hs; c += blockDim.x) {
        keys[pending * p.row_size() + c] = to_float(token[p.channels() + kv * hs + c]);
        keys[pending * p.row_size() + p.kv_channels() + c] = to_float(token[p.channels() + p.kv_channels() + kv * hs + c]);
    }
    for (int h = kv * p.heads_per_kv(); h < (kv + 1) * p.heads_per_kv(); h++) {
        const floatX* q = token + h * hs;
        __syncthreads();
        float top = -INFINITY, sum = 0;
        for (int j = threadIdx.x; j <= pending; j += blockDim.x) {
            const float* k = keys + j * p.row_size();
            float product = 0;
            for (int i = 0; i < hs; i += 2) {
                float2 by = step.rotate ? infini_decode::rotation((pending - j) * step.turns[i / 2]) : float2{1, 0};
                float a = to_float(q[i]), b = to_float(q[i + 1]);
                product += (a * by.x - b * by.y) * k[i] + (a * by.y + b * by.x) * k[i + 1];
            }
            weights[j] = product / sqrtf((float)hs);
            top = fmaxf(top, weights[j]);
        }
        top = block_max(top, sums[0]);
        for (int j = threadIdx.x; j <= pending; j += blockDim.x) sum += weights[j] = expf(weights[j] - top);
        sum = block_sum(sum, sums[1]);
        float g = written || p.gated_first ? infini_gate(step.beta[h]) : 0;
        for (int c = threadIdx.x; c < hs; c += blockDim.x) {
            float o = 0, read = 0, den = INFINI_EPSILON;
            for (int j = 0; j <= pending; j++) o += weights[j] * keys[j * p.row_size() + p.kv_channels() + c];
            for (int i = 0; written && i < hs; i++) {
                read += feature(to_float(q[i])) * M[i * hs + c];
                den += feature(to_float(q[i])) * z[i];
            }
            step.A[(int64_t)n * p.channels() + h * hs + c] = from_float<floatX>((1 - g) * o / sum + g * read / den);
        }
    }
    __syncthreads();
    if (threadIdx.x == 0 && kv == 0) {
        state[INFINI_PENDING] = (float)((pending + 1) % p.segment);
        state[INFINI_WRITTEN] = written || pending + 1 == p.segment;
    }
    if (pending + 1 < p.segment) return;
    if (p.delta && written) {
        for (int t = 0; t < p.segment; t++)
            for (int c = threadIdx.x; c < hs; c += blockDim.x) {
                const float* k = keys + t * p.row_size();
                float read = 0, den = INFINI_EPSILON;
                for (int i = 0; i < hs; i++) {
                    read += feature(k[i]) * M[i * hs + c];
                    den += feature(k[i]) * z[i];
                }
                keys[t * p.row_size() + p.kv_channels() + c] -= read / den;
            }
        __syncthreads();
    }
    for (int c = threadIdx.x; c < hs; c += blockDim.x) {
        if (!written) z[c] = p.z_start;
        for (int i = 0; i < hs; i++) {
            float sum = written ? M[i * hs + c] : 0;
            for (int t = 0; t < p.segment; t++) sum += feature(keys[t * p.row_size() + i]) * keys[t * p.row_size() + p.kv_channels() + c];
            M[i * hs + c] = sum;
        }
        for (int t = 0; t < p.segment; t++) z[c] += feature(keys[t * p.row_size() + c]);
    }
}

static bool run_step(int version, cudaStream_t stream, InfiniPass p, const int* cu_seqlens, const int* position, const gpu::AttentionState* states,
                     const floatX* qkv, const float* beta, floatX* A, bool rotate) {
    if (version > 1) {
        infini_step(stream, p, cu_seqlens, position, states, qkv, beta, A, rotate, false, version == 2 ? 1 : 0);
        return true;
    }
    p.cu_seqlens = cu_seqlens;
    p.qkv = qkv;
    infini_decode::Step step = infini_step_arguments(p, position, states, beta, A, rotate, 1);
    infini_step_kernel1<<<p.num_seqs * p.kv_heads, 128, round_up(p.segment, 4) * sizeof(float), stream>>>(p, step);
    LAUNCH_CHECK();
    return true;
}

// --------------------------------------------------------------------------------------------------------------------------------------------------

static AttentionConfig make_config(const std::string& options, const char* positions, int heads, int hs) {
    ModelConfig model;
    model.layers = 1;
    model.heads = heads;
    model.channels = heads * hs;
    parse_attention(model, options.c_str(), {}, positions);
    return model.attention[0];
}

// Tokens of some texts, one behind another.
struct Texts {
    std::vector<int> cu = {0};
    std::vector<cpu::TokenPlace> place;
    void add(int length) {
        for (int t = 0; t < length; t++) place.push_back({(int)cu.size() - 1, t});
        cu.push_back(cu.back() + length);
    }
};

// The CPU's layer between its projections, over texts from their beginning: A of all tokens, and the states that they leave.
static std::vector<float> reference(const AttentionConfig& a, const Texts& texts, const std::vector<float>& qkv, const std::vector<float>& beta,
                                    std::vector<std::vector<float>>* states) {
    int64_t N = texts.cu.back(), count = (int64_t)texts.cu.size() - 1;
    std::vector<float> memories((N / a["segment"] + count) * infini_memory_size(a)), A(N * a.channels), lse(N * a.heads),
        scratch(cpu::infini_scratch(a, N, count, N, true));
    cpu::AttentionContext ctx{};
    ctx.config = &a;
    ctx.num_seqs = (int)count;
    ctx.cu_seqlens = texts.cu.data();
    ctx.place = texts.place.data();
    ctx.scratch = {scratch.data(), (int64_t)scratch.size()};
    cpu::InfiniPass pass = cpu::infini_pass(ctx, qkv.data(), std::vector<float*>(count), memories.data());
    cpu::infini_local_forward(ctx, pass, A.data(), lse.data());
    cpu::infini_write(pass);
    cpu::infini_retrieve(pass, beta.data(), A.data(), A.data());
    states->assign(count, std::vector<float>(infini_state(a).per_sequence));
    for (int s = 0; s < count; s++) cpu::infini_leave(ctx, pass, s, (*states)[s].data());
    return A;
}
// What counts of a state: the memory if there is one, the pending tokens.
static std::vector<float> what_counts(const AttentionConfig& a, const float* state) {
    int64_t memory = INFINI_MEMORY + infini_memory_size(a), pending = (int64_t)state[INFINI_PENDING];
    std::vector<float> x(state, state + INFINI_MEMORY);
    if (state[INFINI_WRITTEN] > 0) x.insert(x.end(), state + INFINI_MEMORY, state + memory);
    if (pending > 0 && pending < a["segment"]) x.insert(x.end(), state + memory, state + memory + pending * infini_row_size(a));
    return x;
}

// Texts that begin with `past` tokens each and go on for `steps` steps, now one and now another of them pausing, against the CPU's pass over all tokens at
// once.
static void check(Ladder& ladder, const char* options, const char* positions, int heads, int hs, const std::vector<int>& past, int steps) {
    AttentionConfig a = make_config(options, positions, heads, hs);
    const int64_t C = a.channels, stride = qkv_size(a), size = infini_state(a).per_sequence;
    const int count = (int)past.size();
    std::string shape = format("%s %s NH=%d hs=%d steps=%d past", options, positions, heads, hs, steps);
    for (int t : past) shape += format(" %d", t);
    auto active = [&](int s, int step) { return count == 1 || (s + step) % 3 != 2; };

    Texts before, all;
    for (int s = 0; s < count; s++) {
        int taken = 0;
        for (int i = 0; i < steps; i++) taken += active(s, i);
        before.add(past[s]);
        all.add(past[s] + taken);
    }
    std::vector<float> qkv = random_numbers(all.cu.back() * stride, 1), beta = random_numbers(heads, 2), qkv_before;
    for (int s = 0; s < count; s++) qkv_before.insert(qkv_before.end(), qkv.begin() + all.cu[s] * stride, qkv.begin() + (all.cu[s] + past[s]) * stride);
    std::vector<std::vector<float>> start, finish;
    reference(a, before, qkv_before, beta, &start);
    std::vector<float> A = reference(a, all, qkv, beta, &finish), expected, states;

    // Rows in the order in which the steps take them.
    std::vector<int> cu, position, done = past, first;
    std::vector<float> rows;
    for (int i = 0; i < steps; i++) {
        first.push_back((int)position.size());
        for (int s = 0, n = 0; s <= count; s++) {
            cu.push_back(n);
            if (s == count || !active(s, i)) continue;
            int64_t token = all.cu[s] + done[s];
            position.push_back(done[s]++);
            rows.insert(rows.end(), qkv.begin() + token * stride, qkv.begin() + (token + 1) * stride);
            expected.insert(expected.end(), A.begin() + token * C, A.begin() + (token + 1) * C);
            n++;
        }
    }
    first.push_back((int)position.size());
    for (const std::vector<float>& state : finish) {
        std::vector<float> x = what_counts(a, state.data());
        states.insert(states.end(), x.begin(), x.end());
    }

    DeviceArray<float> device_states(count * size), device_beta(beta);
    DeviceArray<floatX> device_rows(rows), device_A((int64_t)expected.size());
    DeviceArray<int> device_cu(cu), device_position(position);
    std::vector<gpu::AttentionState> table(count);
    for (int s = 0; s < count; s++) table[s].fixed = device_states + s * size;
    DeviceArray<gpu::AttentionState> device_table(count);
    CUDA_CHECK(cudaMemcpy(device_table, table.data(), count * sizeof table[0], cudaMemcpyHostToDevice));

    Output state = {"states",
                    states,
                    [&] {
                        std::vector<float> all = device_states.to_host(), some;
                        for (int s = 0; s < count; s++) {
                            std::vector<float> x = what_counts(a, &all[s * size]);
                            some.insert(some.end(), x.begin(), x.end());
                        }
                        return some;
                    },
                    [&] {  // what does not count may be anything
                        std::vector<float> all(count * size, NAN);
                        int64_t memory = INFINI_MEMORY + infini_memory_size(a);
                        for (int s = 0; s < count; s++) {
                            std::vector<float> x = what_counts(a, start[s].data());
                            bool written = x[INFINI_WRITTEN] > 0;
                            std::copy_n(x.begin(), written ? memory : INFINI_MEMORY, all.begin() + s * size);
                            std::copy(x.begin() + (written ? memory : INFINI_MEMORY), x.end(), all.begin() + s * size + memory);
                        }
                        device_states.copy_from(all);
                    },
                    2e-6,
                    1e-6};
    if (a["memory-update"] == 1) state.tolerance = 1e-5;
    ladder.check(shape, {output("A", device_A, expected), state}, [&](int version) {
        for (int i = 0; i < steps; i++) {
            int64_t n = first[i + 1] - first[i];
            InfiniPass p = infini_shape(a, n, count, 1, count, n);
            if (!run_step(version, ladder.stream, p, device_cu + i * (count + 1), device_position + first[i], device_table, device_rows + first[i] * stride,
                          device_beta, device_A + first[i] * C, a.positions == Positions::ROPE))
                return false;
        }
        return true;
    });
}

static void time(Ladder& ladder, const char* update, int texts, int pending) {
    constexpr int heads = 12, hs = 64, S = 256;
    AttentionConfig a = make_config(format("infini:segment=%d:memory-update=%s", S, update), "rope", heads, hs);
    const int64_t stride = qkv_size(a), size = infini_state(a).per_sequence, memory = infini_memory_size(a);
    static DeviceArray<float> states(256 * size);
    static bool filled = false;
    if (!filled) {
        DeviceArray<float> numbers(random_numbers(1 << 20, 1, 1, 3));
        for (int64_t i = 0; i < states.size; i += numbers.size)
            CUDA_CHECK(cudaMemcpy(states + i, numbers, std::min(numbers.size, states.size - i) * sizeof(float), cudaMemcpyDeviceToDevice));
        filled = true;
    }
    DeviceArray<floatX> rows(random_numbers(texts * stride, 2)), A(texts * heads * hs);
    DeviceArray<float> beta(random_numbers(heads, 3));
    std::vector<int> cu(texts + 1);
    for (int s = 0; s <= texts; s++) cu[s] = s;
    DeviceArray<int> device_cu(cu), position(std::vector<int>(texts, S + pending));
    std::vector<gpu::AttentionState> table(texts);
    for (int s = 0; s < texts; s++) table[s].fixed = states + s * size;
    DeviceArray<gpu::AttentionState> device_table(texts);
    CUDA_CHECK(cudaMemcpy(device_table, table.data(), texts * sizeof table[0], cudaMemcpyHostToDevice));
    bool full = pending == S - 1;
    double keys = (double)pending * infini_row_size(a);
    Work work = {texts * (2.0 * heads * hs * (2 * pending + hs) + (full ? 2.0 * S * hs * heads * hs * (a["memory-update"] ? 2 : 1) : 0)),
                 texts * 4.0 * (memory + keys + (full ? memory + keys : 0)) + texts * 2.0 * (stride + heads * hs)};
    ladder.time(format("%s texts=%d NH=%d hs=%d S=%d pending=%d%s", update, texts, heads, hs, S, pending, full ? ", the segment's end" : ""), work,
                [&](int version) {
                    InfiniPass p = infini_shape(a, texts, texts, 1, texts, texts);
                    return run_step(version, ladder.stream, p, device_cu, position, device_table, rows, beta, A, true);
                });
}

int main(int argc, char** argv) {
    Ladder ladder("infini_decode",
                  {"as the equations stand, a block a kv head", "16 lanes a key, loads ahead, the query turns", "clusters where texts are few (in use)"}, argc,
                  argv);
    check(ladder, "infini:segment=16", "rope", 2, 64, {0}, 50);
    check(ladder, "infini:segment=40:memory-update=delta", "rope", 3, 64, {0, 39, 17, 90}, 95);
    check(ladder, "infini:segment=24:kv-heads=2:first-segment=gated", "none", 4, 20, {5, 0, 23, 48}, 60);
    check(ladder, "infini:segment=33:kv-heads=1:memory-update=delta:memory-init=zero", "rope", 5, 10, {5, 70}, 80);
    check(ladder, "infini:segment=100:kv-heads=2", "rope", 4, 128, {99, 250, 0}, 130);
    check(ladder, "infini:segment=64:memory-update=delta:first-segment=gated", "rope", 2, 96, {10, 130}, 70);
    check(ladder, "infini:segment=1:memory-update=delta", "rope", 2, 64, {3, 0}, 5);
    check(ladder, "infini:segment=256", "rope", 12, 64, {250, 0, 700, 511, 1023}, 30);
    check(ladder, "infini:segment=2000", "rope", 12, 64, {1990}, 20);
    // So many keys that q is turned anew (EXACT), in the kernel's other forms.
    check(ladder, "infini:segment=600:kv-heads=2", "rope", 4, 64, {590}, 20);
    check(ladder, "infini:segment=400:memory-update=delta", "rope", 2, 96, {380}, 30);
    check(ladder, "infini:segment=300:kv-heads=1", "rope", 2, 128, {290}, 20);
    for (int texts : {1, 16, 256}) {
        for (int pending : {1, 128, 254, 255}) time(ladder, "linear", texts, pending);
        time(ladder, "delta", texts, 255);
    }
    return ladder.finish();
}
