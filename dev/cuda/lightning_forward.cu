// The ladder of Lightning attention's recurrence, forward (gpt2/cuda/lightning.cuh):
//
//     q, k, v = SiLU(u)      S_t = λ·S_{t−1} + k_tᵀv_t      o_t = c·q_t·S_t      u (N,3C), o (N,C) bf16, S (hs,hs) float32 for each sequence and head
//
// To be read and written: 8 bytes a token and channel; and the states that backward starts from (versions 6 to 8), which are counted too: as bf16 before every
// 128 tokens hs/128·2 bytes, 1 at hs 64 and 2 at hs 128. (Backward would read k and v once more to make them, 4 bytes, and SiLU and the products with them.)
// The rows of the table say how many bytes are counted; what spans read a second time is not. In chunks of n = 64 tokens, two products over half of a chunk and
// two with the state, FLOPs a token and channel: 2·(2·n/2 + 2·hs) = 384 at hs 64, 640 at hs 128: 48 and 80 for each byte, where an H100 does 230 in the time it
// takes to copy one. So memory is the limit; at 3.0 TB/s, without states and with them:
//     B64 T1024, hs 64, C 768     403 MB    134 µs      453 MB    151 µs      and 19 GFLOP = 28 µs at 690 TFLOP/s
//     B8  T8192, B2 T32768        the same
//     B1  T262144                 1.6 GB    537 µs      1.8 GB    604 µs      77 GFLOP = 112 µs
//     B8  T4096, hs 128, C 2048   537 MB    179 µs      671 MB    224 µs      43 GFLOP =  62 µs
// Beside that every one of the 3·N·C numbers goes through SiLU: with tanh one operation of the special function unit, of which the GPU does 3.7e12 a second,
// 41 µs at N 65536, C 768; and some ten instructions of a thread are spent on each number altogether, of which it does 3e13: 50 µs.
//
//   1. As the formula reads. A block a sequence and head, a thread a column of S, which stands in shared memory: for each token all of S is read and written,
//      between two barriers. Expected: milliseconds, mostly latency.
//   2. Chunks, float32 arithmetic: what was a chain of n steps becomes four products of matrices, whose operands stand in shared memory, 4 by 4 numbers of the
//      result a thread. Expected: bound by shared memory at a third of what float32 units could do, 2 to 3 ms at B64.
//   3. Tensor cores (bf16). S stays in registers as accumulators of the matrix instructions, a chunk is on its way while the one before is worked on, and each
//      row is read once. Expected: half to two thirds of the limit at B64 T1024, where 768 blocks fill the GPU; but with B1 only 12 multiprocessors have work.
//   4. Spans (the parallel scheme), where sequences and heads do not fill the GPU: k and v are read twice, 6/4 of the bytes, by all multiprocessors.
//      Expected: the same as version 3 at B64 and with hs 128, and about twice the limit at the other shapes. (What a span adds to the state is a sum with
//      weights λ^distance; the first pass reads only the chunks whose weights are 2^−40 or more, with MiniMax's slopes two thirds of all.)
//   5. Hopper's wgmma, whose operands stand in shared memory: no ldmatrix, and a third of the instructions. Tiles come by bulk copies a chunk ahead. Expected:
//      5 % at hs 64, where memory is busy already (version 3: 78 % of its cycles), but a fifth at hs 128, where version 3 has 8 warps a multiprocessor, which
//      issue in 38 % of the cycles.
//   6. Leaves S before each chunk as bf16, what backward's one sweep needs: hs/64·2 bytes more a token and channel, 10/8 at hs 64, 12/8 at hs 128. A loss here,
//      for a gain there.
//   7. The state before every second chunk: 9/8 and 10/8 of the bytes. Expected: 17 µs less at B64, 45 at hs 128. What spans add (versions 5 to 7) by two
//      groups of warpgroups, which take a span's chunks in turn, with weights counted from the span's end rather than chunk by chunk; and of weights only
//      those of 2^−24 and more, as exact as float32 is, rather than 2^−40 (now 2^−16, see chunks_that_count). Expected: 60 µs before, 40 now, at B8 and B2.
//
//   8. Head sizes up to 64: a block has a multiprocessor for itself, its warpgroups have roles (lightning_roles.cuh), and seven stages of tiles are on
//      their way. Version 7 needs three blocks a multiprocessor, and so 384 spans at B8 and B2; these read 63 and 79 MB twice, and to sum them up takes
//      50 µs. With one block 96 sequences and heads need no spans, and 11 ranges of a sequence read 33 to 41 MB twice. Expected: a chunk in 1.2 µs, and
//      with it 160 µs at B8, 175 at B2, 620 at B1. Later: ranges of 128-token spans, so that blocks have equal work; sums over tails, without blocks that find
//      nothing to do; weights of 2^−16 and more: a third fewer bytes read twice. Expected: 10 µs less at B2.
//      Then all blocks in step (Pace), because their average end was 12 to 20 µs before the last one's. Expected: most of that, 160 at B8.
//
// Kernels 1 to 3 serve what 5 does not take (and other GPUs). The last version is the function that the layer calls; it chooses.
#include "lightning_case.h"

static LightningMethod method(int version, const AttentionConfig& a) {
    return {std::min(version, 3), version >= 4 ? (LightningScheme)a["scheme"] : SCHEME_SEQUENTIAL, true, version >= 5, version >= 8};
}
// LightningCase::forward()'s `every`.
static int leaves(int version) { return version <= 5 ? -1 : version == 6 ? 0 : 1; }
static bool possible(int version, const LightningCase& c) {
    return version <= 3 ? c.takes(version) : version == 4 || version == 8 || lightning_hopper(c.shape.hs);
}

static void check(Ladder& ladder, const LightningShape& shape) {
    LightningCase c(shape);
    DeviceArray<floatX> o(c.N * c.C);
    std::vector<Output> outputs = {output("o", o, c.o)};
    outputs.push_back(c.worst_piece(outputs[0]));
    if (shape.memory) outputs.push_back(accumulated("memory", c.memories, c.before, c.after));
    ladder.check(shape.name(), outputs, [&](int version) {
        if (!possible(version, c)) return false;
        c.poison_scratch();
        c.forward(ladder.stream, o, method(version, c.config), leaves(version));
        return true;
    });
}

// Decoding: states are brought up to date in place.
static void check_extend(Ladder& ladder, LightningShape shape) {
    LightningCase c(shape);
    std::vector<float> after(c.before.size()), o(c.N * c.C);
    std::vector<AttentionState> states(c.S);
    cpu::AttentionContext ctx{};
    ctx.config = &c.config;
    ctx.num_seqs = c.S;
    ctx.cu_seqlens = c.cu.data();
    cpu::Lightning g = cpu::make_lightning(ctx);
    after = c.before;
    for (int s = 0; s < c.S; s++) {
        states[s] = {};
        states[s].fixed = c.memories + s * c.size;
        for (int i = g.first[s]; i < g.first[s + 1]; i++) g.chunks[i].S = g.chunks[i].S_next = after.data() + s * c.size;
    }
    g.sequential = true;
    cpu::lightning_recurrence_forward(g, c.u.data(), o.data());

    DeviceArray<AttentionState> d_states(states);
    DeviceArray<floatX> d_o(c.N * c.C);
    std::vector<Output> outputs = {output("o", d_o, o), accumulated("states", c.memories, c.before, after)};
    outputs.push_back(c.worst_piece(outputs[0]));
    ladder.check("extend " + shape.name(), outputs, [&](int version) {
        if (version < 4) return false;
        c.poison_scratch();
        Lightning pass = c.pass();
        pass.states = d_states;
        lightning_recurrence_extend(ladder.stream, pass, c.d_u, d_o, c.scratch(), method(version, c.config));
        return true;
    });
}

static void time(Ladder& ladder, const LightningShape& shape) {
    LightningCase c(shape, true);
    DeviceArray<floatX> o(c.N * c.C);
    for (int every : {-1, 0, 1}) {  // versions 1 to 5 leave no states, 6 leaves them before every chunk
        double numbers = 4 + (every < 0 || !lightning_hopper(shape.hs) ? 0 : shape.hs / (64.0 * (1 << every)));
        std::string name = format("%s, %.0f bytes", shape.name().c_str(), numbers * sizeof(floatX));
        ladder.time(name, {shape.flops(2, 2), numbers * c.N * c.C * sizeof(floatX)}, [&](int version) {
            if (leaves(version) != every || !possible(version, c)) return false;
            if (version == 1 && shape.longest() > 32768) return false;  // token by token: more than 100 ms
            c.forward(ladder.stream, o, method(version, c.config), every);
            return true;
        });
    }
}

int main(int argc, char** argv) {
    Ladder ladder("lightning_forward",
                  {"token by token, a thread a column of S", "chunks, float32 arithmetic", "tensor cores, S in registers", "spans where sequences are few",
                   "wgmma, bulk copies", "states left for backward", "before every second chunk", "warpgroups with roles, long spans (in use)"},
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
    check(ladder, {":decay=fla", 1, 8, {1}});
    check(ladder, {"", 1, 256, {100, 70}, true});
    check(ladder, {"", 1, 1000, {70}});
    check_extend(ladder, {"", 3, 64, {1, 0, 65, 1, 1}});
    check_extend(ladder, {":decay=fla", 3, 20, {1, 1, 2, 0}});
    check_extend(ladder, {"", 2, 301, {1, 1}});
    check_extend(ladder, {":decay=none:scheme=parallel", 2, 96, {1, 1300, 0, 600}});

    time(ladder, {"", 12, 64, std::vector<int>(64, 1024)});
    time(ladder, {"", 12, 64, std::vector<int>(8, 8192)});
    time(ladder, {"", 12, 64, std::vector<int>(2, 32768)});
    time(ladder, {"", 12, 64, {262144}});
    time(ladder, {"", 16, 128, std::vector<int>(8, 4096)});
    return ladder.finish();
}
