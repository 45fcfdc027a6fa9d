// The ladder of Lightning attention's recurrence, backward (gpt2/cuda/lightning.cuh): du (N,3C) from do (N,C) and u (N,3C),
//
//     dq_t = c·Σ_{j<=t} λ^{t−j}·(do_t·v_j)·k_j      dk_t = c·Σ_{j>=t} λ^{j−t}·(v_t·do_j)·q_j      dv_t = c·Σ_{j>=t} λ^{j−t}·(k_t·q_j)·do_j
//
// and du = (dq, dk, dv)⊙SiLU'(u). Each of the three is the recurrence of the forward pass with its roles exchanged, dq from the first token to the last, dk and
// dv from the last to the first.
// To be read and written: 14 bytes a token and channel (bf16); and the states that forward has left (versions 7 on), which are counted too: before every 128
// tokens hs/128·2 bytes, 1 at hs 64 and 2 at hs 128. The rows of the table say how many bytes are counted. FLOPs, with chunks of n = 64: five products over
// half of a chunk and five with a state (each of S, dS is made once and used in two or three places), 2·(5·n/2 + 5·hs) = 960 a token and channel at hs 64.
// At 3.0 TB/s and 690 TFLOP/s, without states and with them:
//     B64 T1024, hs 64, C 768     705 MB    235 µs      755 MB    252 µs      48 GFLOP =  70 µs
//     B8  T8192, B2 T32768        the same
//     B1  T262144                 2.8 GB    940 µs      3.0 GB   1007 µs      193 GFLOP = 280 µs
//     B8  T4096, hs 128, C 2048   940 MB    313 µs      1.07 GB   358 µs      107 GFLOP = 156 µs
//
//   1. Token by token: three sweeps of the forward ladder's version 1. Expected: three times its time.
//   2. Chunks, float32 arithmetic: three sweeps of its version 2.
//   3. Tensor cores: three sweeps of its version 3, each of which reads four rows a token and writes one: 30 bytes a token and channel.
//   4. dk and dv by one sweep. Both are made of the same q and do, and their states are transposes of each other: 22 bytes, and one product less.
//      Expected: a quarter faster than version 3.
//   5. Spans where sequences and heads do not fill the GPU: 30 bytes, but by all multiprocessors.
//
//   6. Hopper: dq, dk and dv by one sweep from behind. What dq needs of the past is only S before each chunk; a sweep over k and v leaves it as bf16, to which
//      products round it anyway. At hs 64, bytes a token and channel: 4 + 2 for the states, 8 + 2 + 6 for the sweep, 22 in all, as version 4; but SiLU of each
//      number once, 11 products of 64³ a chunk by wgmma, of operands in shared memory, instead of some 20 by mma.sync and ldmatrix. Version 4's second sweep
//      issues in 39 % of its cycles and keeps memory 54 % busy, with 12 warps a multiprocessor that wait for each other's results. Expected at B64: 120 µs for
//      the states and 330 µs for the sweep. Three blocks a multiprocessor at hs 64; one of 8 warps at hs 128, where the states are twice as large.
//   7. Forward leaves the states: 16 bytes at B64, 268 µs at the rate of copies; and 4 more where D between spans has to be made. Expected: 310 µs at B64, 390
//      at B8 and B2.
//   8. States before every second chunk only: 15 bytes at hs 64, 16 of 18 at hs 128, and as much less in forward. An odd chunk's queries finish with the keys,
//      values and state of the chunk before, which come next anyway, so nothing is read twice; two more products for a pair of chunks, 24 instead of 22.
//      Expected, with memory as busy as in version 7 (2.7 TB/s): 17 µs less at B64, 45 at hs 128. What spans add, for D between them, by two groups of
//      warpgroups and down to weights of 2^−24 rather than 2^−40: 54 µs before, 40 expected.
//   9. Head sizes up to 64: a block has a multiprocessor for itself, its warpgroups have roles (lightning_roles.cuh): D; dV, dK and dQ, each of which
//      makes SiLU and SiLU' of its own tile a chunk ahead. Instead of two blocks that each wait for what they do themselves. A block takes a whole
//      sequence and head, or one range; what is read twice falls as in forward. Expected: 270 µs at B64, 295 at B8 and B2, 1080 at B1.
//  10. Head sizes above 64: roles there too (lightning_wide.cuh): D; dK and dV; dQ. At hs 128 version 8 takes some 12,000 clocks a chunk, because its two
//      warpgroups, 64 columns each, make the products of 64 by 64 tokens twice, and shared memory alone is busy for 8,000: SiLU and SiLU' of everything,
//      factors of products, gradients. Warpgroups of 128 columns, with SiLU of k and v and their SiLU' in registers, and Eᵀ handed on instead of E made
//      again: about 5,000 for shared memory, 3,600 for products, 5,500 for the busiest warpgroup. Memory takes 9,500. Expected: 400 µs.
//
// Versions 9 and 10 are the function that the layer calls; it chooses, between 4 and 5 what they do not take.
#include "lightning_case.h"

#ifndef GPU_FLOAT32
namespace gpu {

namespace lightning_wgmma {
// Calls f(row, piece of 8 columns among the tile's, address) for this thread's pieces of a tile of 64 rows.
template <int HS, class F>
__device__ inline void for_pieces6(uint32_t tile, F f) {
    int piece = threadIdx.x % 8;
#pragma unroll
    for (int i = 0; i < HS / 64; i++)
#pragma unroll
        for (int r = 0; r < CHUNK; r += Shape<HS>::THREADS / 8) {
            int row = r + threadIdx.x / 8;
            f(row, 8 * i + piece, tile + i * PANEL + row * 128 + ((piece ^ row % 8) << 4));
        }
}
}  // namespace lightning_wgmma

// Versions 6 and 7: as kernel 8 (gpt2/cuda/lightning_hopper.cuh), but with a state for each chunk (g.every = 0).
template <int HS>
__global__ void __launch_bounds__(lightning_wgmma::Shape<HS>::THREADS, lightning_wgmma::Shape<HS>::BLOCKS)
    lightning_backward_kernel6(const Lightning g, floatX* du, const __grid_constant__ LightningMaps maps) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    using namespace lightning_wgmma;
    using lightning_mma::power;
    constexpr int PANELS = Shape<HS>::PANELS, TILE = Shape<HS>::TILE, STATE_PANEL = Shape<HS>::STATE_PANEL;
    extern __shared__ __align__(1024) unsigned char lightning_hopper_memory[];
    // u: the raw q, k, v, later SiLU', later the gradients. Q, K, V: SiLU of them.
    uint32_t u = shared_address(lightning_hopper_memory), dO = u + 3 * TILE, Q = dO + TILE, K = Q + TILE, V = K + TILE, S = V + TILE, D = S + Shape<HS>::STATE;
    float* factors = (float*)(lightning_hopper_memory + 7 * TILE + 2 * Shape<HS>::STATE);  // two tables
    uint32_t early = D + Shape<HS>::STATE + 512 * (uint32_t)sizeof(float), late = early + 8;
    int p = __shfl_sync(0xffffffff, threadIdx.x / 128, 0), warp = __shfl_sync(0xffffffff, threadIdx.x / 32 % 4, 0), h = blockIdx.x % g.heads;
    bool leader = threadIdx.x % 128 == 0;
    LightningSpan q;
    if (!g.find(g.block_slot(true), q) || q.n <= 0) return;
    int chunks = (q.n + CHUNK - 1) / CHUNK, first = q.begin + q.first;

    // Copies are started by each warpgroup's leader, of panel p: q, k and, as rows 64·p ..., what the warpgroup needs of S complete `early`, v and d_o `late`.
    auto load_u = [&](int t, int chunk, uint32_t barrier) {
        bulk_load(u + t * TILE + p * PANEL, &maps.u, barrier, 64 * p, t * g.heads + h, first + chunk * CHUNK);
    };
    auto load_q_and_state = [&](int chunk) {
        bool state = g.leaves(q, chunk);
        barrier_arrive_expect(early, 2 * PANEL + (state ? PANELS * PANEL : 0));
        load_u(0, chunk, early);
        if (state) {
#pragma unroll
            for (int i = 0; i < PANELS; i++) bulk_load(S + i * STATE_PANEL + p * PANEL, &maps.states, early, 64 * i, 64 * p, g.state(q, chunk, h), 0);
        }
    };
    auto load_d_o = [&](int chunk) {
        barrier_arrive_expect(late, 2 * PANEL);
        bulk_load(dO + p * PANEL, &maps.d_o, late, 64 * p, h, first + chunk * CHUNK);
    };
    auto load_all = [&](int chunk) {
        load_q_and_state(chunk);
        load_u(1, chunk, early);
        load_d_o(chunk);
        load_u(2, chunk, late);
    };
    auto prefetch = [&](int chunk) {  // to the L2 cache; blocks that share a multiprocessor do better without
#pragma unroll
        for (int t = 0; t < 3; t++) bulk_prefetch(&maps.u, 64 * p, t * g.heads + h, first + chunk * CHUNK);
        bulk_prefetch(&maps.d_o, 64 * p, h, first + chunk * CHUNK);
    };
    auto store = [&](int t, int chunk) {
        bulk_store(&maps.out, u + t * TILE + p * PANEL, 64 * p, t * g.heads + h, first + chunk * CHUNK, 0);
        bulk_store_commit();
    };
    if (threadIdx.x == 0) {
        barrier_init(early, PANELS);
        barrier_init(late, PANELS);
        barrier_init_fence();
    }
    __syncthreads();
    if (leader) load_all(chunks - 1);

    float slope2 = (float)(g.slope(h) * 1.4426950408889634), s[PANELS * 32];  // D: rows 64·p ...
    factor_table(factors, false, slope2, g.scale, threadIdx.x, blockDim.x);
    factor_table(factors + 256, true, slope2, g.scale, threadIdx.x, blockDim.x);
    const float* from = q.index < q.spans - 1 ? g.border(q, q.index, h) : nullptr;
    for_state(s, p, warp, [&](int i, int j, float& x) { x = from && i < g.hs && j < g.hs ? from[i * g.hs + j] : 0; });
    Place place(warp);
    store_state(D + 64 * p * 128, STATE_PANEL, place, s);
    int row = 16 * warp + lightning_mma::lane() / 4;  // and 8 more: this thread's tokens of the outputs
    const float *by_keys = first_factor(factors, warp), *by_queries = first_factor(factors + 256, warp);

    // o⊙SiLU' to SiLU's place.
    auto finish = [&](const float(&o)[32], uint32_t tile) {
#pragma unroll
        for (int n = 0; n < 8; n++)
#pragma unroll
            for (int e = 0; e < 2; e++) {
                uint32_t at = tile + p * PANEL + place(n) + e * 1024, x;
                asm volatile("ld.shared.u32 %0, [%1];" : "=r"(x) : "r"(at) : "memory");
                float2 d = unpack_bf16(x);
                store_shared(at, pack_bf16(o[4 * n + 2 * e] * d.x, o[4 * n + 2 * e + 1] * d.y));
            }
        async_fence();
    };
    auto activate = [&](int t, int n) {
        for_pieces6<HS>(u + t * TILE, [&](int row, int, uint32_t at) {
            uint4 x = load_shared(at), y;
            y.x = silus(x.x, x.x), y.y = silus(x.y, x.y), y.z = silus(x.z, x.z), y.w = silus(x.w, x.w);
            store_shared(at, x);
            store_shared(at + 4 * TILE, row < n ? y : make_uint4(0, 0, 0, 0));
        });
    };

    for (int k = 0; k < chunks; k++) {
        int chunk = chunks - 1 - k, n = min(CHUNK, q.n - CHUNK * chunk);
        bool whole = n == CHUNK, more = chunk > 0;
        if (chunk == 0 && q.index == 0) {  // the state that the sequence starts from
            const float* start = g.start(q.seq, h);
            for (int e = threadIdx.x; e < HS * HS / 2; e += Shape<HS>::THREADS) {
                int i = e / (HS / 2), j = e % (HS / 2) * 2;
                uint32_t x = 0;
                if (start && i < g.hs && j < g.hs) x = pack_bf16(start[i * g.hs + j], start[i * g.hs + j + 1]);
                store_shared(S + j / 64 * STATE_PANEL + i * 128 + ((j % 64 / 8 ^ i % 8) << 4) + j % 8 * 2, x);
            }
        }
        barrier_wait(early, k & 1);
        if (HS == 128 && leader && more) prefetch(chunk - 1);
        activate(0, n);
        activate(1, n);
        barrier_wait(late, k & 1);
        activate(2, n);
        if (!whole)
            for_pieces6<HS>(dO, [&](int row, int, uint32_t at) {
                if (row >= n) store_shared(at, make_uint4(0, 0, 0, 0));
            });
        async_fence();
        __syncthreads();

        // D first; its old value is still in shared memory, where the products below read it.
        uint32_t a[4][4];
        transposed_rows(a, Q + p * PANEL, warp, [&](uint32_t z, int i) {
            float2 y = unpack_bf16(z);
            return pack_bf16(y.x * g.scale * power(slope2, (float)(i + 1)), y.y * g.scale * power(slope2, (float)(i + 2)));
        });
        float decay = exp2f(-slope2 * (float)n);
#pragma unroll
        for (int i = 0; i < PANELS * 32; i++) s[i] *= decay;
        products_begin();
#pragma unroll
        for (int d = 0; d < 4; d++) product<1>(s, a[d], panel_operand_transposed(dO, PANEL) + 128 * d, true);
        products_commit();

        float o[32];
        outputs<HS, true>(o, p, dO, V, K, S, by_queries, g.scale * power(slope2, (float)(row + 1)), g.scale * power(slope2, (float)(row + 9)));
        products_done(s);
        finish(o, u);
        warpgroup_barrier<HS>(p);
        if (leader && whole) store(0, chunk);
        __syncwarp();

        float above = power(slope2, (float)max(n - 1 - row, 0)), below = power(slope2, (float)max(n - 9 - row, 0));
        outputs<HS, true>(o, p, V, dO, Q, D, by_keys, above, below);
        finish(o, u + TILE);
        warpgroup_barrier<HS>(p);
        if (leader && whole) {
            bulk_store_wait();  // q's place is free
            if (more) load_q_and_state(chunk - 1);
            store(1, chunk);
        }
        __syncwarp();

        outputs<HS, false>(o, p, K, Q, dO, D, by_keys, above, below);
        if (leader && whole && more) {
            bulk_store_wait();
            load_u(1, chunk - 1, early);
        }
        __syncwarp();
        finish(o, u + 2 * TILE);
        __syncthreads();  // nobody needs the tiles and states any more
        if (whole) {
            if (leader) {
                store(2, chunk);
                if (more) {
                    load_d_o(chunk - 1);
                    bulk_store_wait();
                    load_u(2, chunk - 1, late);
                }
            }
        } else {
            int64_t C = g.channels();
            for (int t = 0; t < 3; t++)
                for_pieces6<HS>(u + t * TILE, [&](int row, int piece, uint32_t at) {
                    if (row < n && piece * 8 < g.hs)
                        *(uint4*)(du + (int64_t)(first + chunk * CHUNK + row) * 3 * C + t * C + h * g.hs + piece * 8) = load_shared(at);
                });
            async_fence();
            __syncthreads();
            if (leader && more) load_all(chunk - 1);
        }
        store_state(D + 64 * p * 128, STATE_PANEL, place, s);
    }
    if (leader) bulk_store_wait();
#endif
}

}  // namespace gpu

static void backward6(cudaStream_t stream, const LightningCase& c, floatX* du, bool left) {
    Lightning g = c.begin(stream);
    g.every = 0;
    Scratch scratch = c.scratch();
    floatX* states = left ? c.states.data : scratch.take<floatX>(c.states.size);
    LightningHopper hopper(stream, g, c.d_u, states, c.d_d_o, du, {3, (LightningScheme)c.config["scheme"]});
    if (!left) hopper.states(scratch);
    hopper.borders(true, scratch);
    Lightning pass = hopper.d;
    pass.memory_from = g.memory_from;
    hopper.with_size([&](auto HS) {
        using Shape = lightning_wgmma::Shape<HS.value>;
        hopper.launch(lightning_backward_kernel6<HS.value>, Shape::THREADS, 7 * Shape::TILE + 2 * Shape::STATE + 2064, pass, du, hopper.maps);
    });
}
#else
static void backward6(cudaStream_t, const LightningCase&, floatX*, bool) {}
#endif

static LightningMethod method(int version, const AttentionConfig& a) {
    return {std::min(version, 3), version >= 5 ? (LightningScheme)a["scheme"] : SCHEME_SEQUENTIAL, version >= 4, version >= 6, version >= 9};
}
static bool possible(int version, const LightningCase& c) {
    const bool hopper = lightning_hopper(c.shape.hs), wide = hopper && c.shape.hs > 64;
    if (version <= 4) return c.takes(std::min(version, 3));
    return version == 5 || (version == 9 ? !wide : version == 10 ? wide : hopper);
}
static void backward(cudaStream_t stream, const LightningCase& c, floatX* du, int version) {
    if (version == 6 || version == 7)
        backward6(stream, c, du, version == 7);
    else
        c.backward(stream, du, method(version, c.config), version >= 8);
}

// `left`: versions 7 on find the states that forward has left; else the last ones make them themselves.
static void check(Ladder& ladder, const LightningShape& shape, bool left = true) {
    LightningCase c(shape);
    DeviceArray<floatX> o(c.N * c.C), du(c.N * 3 * c.C);
    std::vector<Output> outputs;
    for (int part = 0; part < 3; part++) {
        std::vector<float> reference(c.N * c.C);
        for (int64_t n = 0; n < c.N; n++) std::copy_n(&c.du[(n * 3 + part) * c.C], c.C, &reference[n * c.C]);
        Output out = output(part == 0 ? "dq" : part == 1 ? "dk" : "dv", du, reference);
        out.read = [&c, &du, part] { return c.part_of(du, part); };
        outputs.push_back(out);
        outputs.push_back(c.worst_piece(out));
    }
    if (shape.memory) outputs.push_back(accumulated("memory", c.memories, c.before, c.before));  // is only read
    ladder.check(shape.name() + (left ? "" : ", no states"), outputs, [&](int version) {
        if (!possible(version, c) || (!left && version < 9)) return false;
        c.poison_scratch();
        if (!left) return c.backward(ladder.stream, du, method(version, c.config)), true;
        if (version >= 7) c.leave_states(ladder.stream, o, method(version, c.config), std::min(version - 7, 1));
        backward(ladder.stream, c, du, version);
        return true;
    });
}

static void time(Ladder& ladder, const LightningShape& shape) {
    LightningCase c(shape, true);
    DeviceArray<floatX> o(c.N * c.C), du(c.N * 3 * c.C);
    c.leave_states(ladder.stream, o, method(9, c.config));  // version 7 finds numbers there too
    for (int every : {-1, 0, 1}) {                          // versions 1 to 6 are given no states, 7 those before every chunk
        double numbers = 7 + (every < 0 || !lightning_hopper(shape.hs) ? 0 : shape.hs / (64.0 * (1 << every)));
        std::string name = format("%s, %.0f bytes", shape.name().c_str(), numbers * sizeof(floatX));
        ladder.time(name, {shape.flops(5, 5), numbers * c.N * c.C * sizeof(floatX)}, [&](int version) {
            if ((version <= 6 ? -1 : version == 7 ? 0 : 1) != every || !possible(version, c)) return false;
            if (version == 1 && shape.longest() > 16384) return false;  // token by token: more than 100 ms
            backward(ladder.stream, c, du, version);
            return true;
        });
    }
}

int main(int argc, char** argv) {
    Ladder ladder("lightning_backward",
                  {"token by token, three sweeps", "chunks, float32 arithmetic", "tensor cores", "dk and dv by one sweep", "spans where sequences are few",
                   "wgmma, all by one sweep", "states left by forward", "before every second chunk", "warpgroups with roles, long spans (in use up to hs 64)",
                   "roles, whole rows (in use above)"},
                  argc, argv);
    if (getenv("LADDER_SMALL")) {  // for compute-sanitizer's racecheck
        check(ladder, {"", 1, 64, {200, 70}, true});
        check(ladder, {"", 1, 128, {130, 64}, true});
        return ladder.finish();
    }
    const std::vector<int> ragged = {65, 0, 1, 129, 64, 63, 200, 0};
    for (const char* decay : {"", ":decay=fla", ":decay=none"})
        for (int hs : {64, 80, 96, 128, 20, 32}) check(ladder, {decay, 3, hs, ragged, true});
    for (const char* options : {":scheme=parallel", ":decay=fla:scheme=parallel", ":decay=none:scheme=parallel"})
        for (int hs : {64, 80, 128, 20}) check(ladder, {options, 2, hs, {1000, 0, 513, 512, 1537, 1}, true});
    check(ladder, {":scheme=sequential", 12, 64, {1024, 1024}});
    check(ladder, {":scheme=parallel", 12, 64, {1024, 1024}});
    for (const char* options : {":scheme=parallel", ":decay=none:scheme=parallel"}) check(ladder, {options, 40, 8, {4173, 700, 0, 2000}, true});
    // More sequences and heads than blocks, which go from one head to another.
    std::vector<int> many;
    for (int i = 0; i < 40; i++) many.push_back(1 + i * 37 % 200);
    check(ladder, {":scheme=sequential", 8, 64, many, true});
    check(ladder, {":scheme=sequential", 5, 32, many, true});
    for (int hs : {64, 128}) {
        check(ladder, {"", 3, hs, ragged, true}, false);
        check(ladder, {":scheme=parallel", 2, hs, {1000, 0, 513, 512, 1537, 1}, true}, false);
    }
    check(ladder, {":decay=fla", 1, 8, {1}});
    check(ladder, {"", 1, 256, {100, 70}, true});
    check(ladder, {"", 1, 1000, {70}});

    time(ladder, {"", 12, 64, std::vector<int>(64, 1024)});
    time(ladder, {"", 12, 64, std::vector<int>(8, 8192)});
    time(ladder, {"", 12, 64, std::vector<int>(2, 32768)});
    time(ladder, {"", 12, 64, {262144}});
    time(ladder, {"", 16, 128, std::vector<int>(8, 4096)});
    return ladder.finish();
}
