// The residual stream: out = base + Z⊙x over (N,C), Z the branch's dropout mask; without dropout out = base + x.
//
// Two arrays are read and one is written: N = 65536, C = 768 in bf16 302 MB, 101 µs at the 3.0 TB/s of an H100, whatever the dropout. A mask word is a quarter
// of a call of Philox: 10 rounds of two 32×32→64-bit products, some 80 instructions for 4 words; 12.6 million calls are 35 µs of a whole H100's issue slots.
//
//   1  a thread a number, with a call of Philox of its own, of which it uses one word in four: four times the arithmetic, 140 µs of it, more than memory takes
//   2  a thread for the four channels that share a call. Expected: arithmetic well below memory's time; but its four numbers are four accesses of 2 bytes, with
//      an address each. In use for rows that do not start at multiples of 16 bytes
//   3  a warp a row, 16 bytes a lane: place and counters once a row instead of a 64-bit division and a look-up for each call, an eighth of the accesses; Philox
//      runs while the numbers are on their way. Without dropout a thread 16 bytes. Expected: the memory's rate. In use (gpt2/cuda/residual.cuh)
#include "ladder.h"

#include "../../gpt2/cuda/residual.cuh"

using namespace gpu;

__global__ void dropout_add_kernel1(floatX* out, const floatX* base, const floatX* x, DropoutKey key, DropoutSite site, const TokenPlace* place, int64_t N,
                                    int64_t C) {
    int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= N * C) return;
    int64_t n = i / C;
    int c = (int)(i - n * C);
    float z = to_float(x[i]);
    if (key.p > 0) {
        uint32_t who = UINT32_MAX - (uint32_t)(3 * (key.pass->first_row + place[n].seq) + site);
        Philox words = philox(key.seed, c >> 2, place[n].pos, who, key.counter());
        uint32_t word = (c & 3) == 0 ? words.word[0] : (c & 3) == 1 ? words.word[1] : (c & 3) == 2 ? words.word[2] : words.word[3];
        z = word >= key.threshold ? key.scale * z : 0;
    }
    out[i] = from_float<floatX>(base ? to_float(base[i]) + z : z);
}

static bool run(int version, cudaStream_t stream, floatX* out, const floatX* base, const floatX* x, const DropoutKey& key, DropoutSite site,
                const TokenPlace* place, int64_t N, int64_t C) {
    switch (version) {
        case 1:
            dropout_add_kernel1<<<(unsigned)ceil_div(N * C, 256), 256, 0, stream>>>(out, base, x, key, site, place, N, C);
            break;
        case 2:
            if (key.p == 0) return false;
            dropout_add_kernel2<<<(unsigned)ceil_div(N * ceil_div(C, 4), RESIDUAL_THREADS), RESIDUAL_THREADS, 0, stream>>>(out, base, x, key, site, place, N,
                                                                                                                           (int)C);
            break;
        default:
            dropout_add(stream, out, base, x, key, site, place, N, C);
    }
    return true;
}

constexpr uint64_t seed = 0x123456789abcdef;
constexpr uint32_t step = 1234567;
constexpr int64_t first_row = 3000000001;  // counters wrap around as the CPU's do
constexpr int layer = 5, layers = 12;

// What is added: nothing; another array; what stands in `out`.
enum Base { NONE, APART, OUT };
constexpr const char* base_names[] = {"no base", "base", "base = out"};

static void check(Ladder& ladder, const PassCounters* pass, int64_t N, int64_t C) {
    std::vector<cpu::TokenPlace> place;
    std::vector<TokenPlace> device_place;
    for (int64_t n = 0; n < N; n++) {  // sequences of 7 tokens and, between them, of 3
        int k = (int)(n % 10), late = k >= 7;
        place.push_back({(int)(n / 10) * 2 + late, late ? k - 7 : k});
        device_place.push_back({place[n].seq, place[n].pos});
    }
    std::vector<float> x = random_numbers(N * C, 1), base = random_numbers(N * C, 2);
    DeviceArray<floatX> d_x(x), d_base(base), d_out(N * C);
    DeviceArray<TokenPlace> d_place(device_place);
    for (double p : {0.0, 0.1, 0.5})
        for (Base kind : {NONE, APART, OUT}) {
            DropoutKey key = dropout_key(p, seed, layer, layers, pass);
            std::vector<float> out(N * C);
            cpu::dropout_add(out.data(), kind == NONE ? nullptr : base.data(), x.data(), {p, seed, step * layers + layer, first_row}, cpu::DROP_MLP,
                             place.data(), N, C);
            std::string shape = format("N=%ld C=%ld p=%g %s", (long)N, (long)C, p, base_names[kind]);
            const floatX* from = kind == NONE ? nullptr : kind == APART ? d_base.data : d_out.data;
            ladder.check(shape, {kind == OUT ? accumulated("out", d_out, base, out) : output("out", d_out, out)},
                         [&](int version) { return run(version, ladder.stream, d_out, from, d_x, key, DROP_MLP, d_place, N, C); });
            if (kind == OUT) continue;
            ladder.check(shape + " out = x", {accumulated("out", d_out, x, out)},
                         [&](int version) { return run(version, ladder.stream, d_out, from, d_out, key, DROP_MLP, d_place, N, C); });
        }
    // The same one number further on: no row starts at a multiple of 16 bytes.
    int64_t rows = N - 1;
    if (rows == 0) return;
    std::vector<float> shifted(x.begin() + 1, x.end()), before(N * C, 7), out = before;
    cpu::dropout_add(&out[1], nullptr, shifted.data(), {0.1, seed, step * layers + layer, first_row}, cpu::DROP_EMBEDDING, place.data(), rows, C);
    ladder.check(format("N=%ld C=%ld, not aligned", (long)rows, (long)C), {accumulated("out", d_out, before, out)}, [&](int version) {
        return run(version, ladder.stream, d_out + 1, nullptr, d_x + 1, dropout_key(0.1, seed, layer, layers, pass), DROP_EMBEDDING, d_place, rows, C);
    });
}

int main(int argc, char** argv) {
    Ladder ladder("residual", {"a thread a number", "a thread a call of Philox: four channels", "a warp a row, 16 bytes a lane (in use)"}, argc, argv);
    DeviceArray<PassCounters> pass(std::vector<PassCounters>{{step, first_row}});
    int64_t shapes[][2] = {{1, 1}, {5, 6}, {77, 33}, {19, 36}, {33, 64}, {100, 1600}, {1027, 768}};
    for (auto [N, C] : shapes) check(ladder, pass, N, C);

    int64_t N = 65536, C = 768;
    std::vector<float> some = random_numbers(1 << 20, 3), x(N * C);
    for (int64_t i = 0; i < N * C; i++) x[i] = some[i % some.size()];
    DeviceArray<floatX> d_x(x), d_base(x), d_out(N * C);
    std::vector<TokenPlace> place;
    for (int n = 0; n < N; n++) place.push_back({n / 1024, n % 1024});
    DeviceArray<TokenPlace> d_place(place);
    for (double p : {0.0, 0.1})
        ladder.time(format("N=%ld C=%ld p=%g", (long)N, (long)C, p), {0, 3.0 * N * C * sizeof(floatX)}, [&](int version) {
            return run(version, ladder.stream, d_out, d_base, d_x, dropout_key(p, seed, layer, layers, pass), DROP_MLP, d_place, N, C);
        });
    return ladder.finish();
}
