// The ladders of what multi-head latent attention does between its products (gpt2/cuda/mla.cuh): three copies to the memory with a norm, rotations and a sum
// over heads on the way.
//
//     mla_latents    c = RMS(u[:d_c]; gkv)      kr = u[d_c:] rotated      qr of every head rotated
//     mla_assemble   keys, per head [kn | kr], from kv, per head [kn | v], and kr
//     mla_split      back: dkn into dkv      dkr = Σ_heads dkeys[d_nope:], rotated back, into du      dqr rotated back
//
// Bytes a token in bf16 with NH 12, d_nope 64, d_rope 32, d_v 64, d_c 256, and the time of 65536 tokens at 3.0 TB/s:
//
//     mla_latents    u 576 + c 512 + kr 64 + qr 2·768            = 2688 bytes     59 µs
//     mla_assemble   kn 1536 + kr 64 + keys 2304                 = 3904           85 µs
//     mla_split      dkeys 2304 + dkn 1536 + dkr 64 + dqr 2·768  = 5440           119 µs
//
// FLOPs do not matter, except for the angles: 10000^(−2i/d) and a reduction by 2π in double for each token and pair, some 150 operations.
//
//   1 naive: a kernel for each equation, a thread for each number or pair; every pair of every head computes its own angle, every norm is one thread's.
//   2 one kernel for each of the three: angles once a token, in shared memory, for the key and all heads; a warp a norm. Expected: the double
//     arithmetic shrinks by the number of heads, and with it most of the rotations' time; accesses of 2 bytes remain.
//   3 16 bytes an access, and several on their way before the first is used. Expected: 80 % of the copy bandwidth.
//   4 (latents, split) what a thread reads first is on its way before the block computes its angles: version 3 has nothing under way then, and three times a
//     block, between its parts. split reads the rows of dkeys in one sweep, 192 neighbouring bytes a head, not first 128 and later 64 of each. Expected:
//     latents 75 µs, split 130. More cannot be had in this place: 64 of each 192 bytes of the queries are read and written in place, and memory does
//     that at 2.1 TB/s at best: 48 µs of the 74 that the latents' copies take without arithmetic. (Reading these 64 bytes takes 21, writing them to rows of
//     their own 14: pieces of 128 bytes, or whole rows, are what memory likes to write.)
//   5 (latents) without the queries, which the product that makes them rotates on Hopper (dev/cuda/matmul.cu); the rotations that it reads are written here. A
//     thread that has a piece of kr computes its own angles, so that no warp waits for another. Expected: 85 % of the copy bandwidth for what is left, 29 µs.
#include "../../gpt2/cuda/mla.cuh"

#include "ladder.h"

using namespace gpu;

// ---- version 1 --------------------------------------------------------------------------------------------------------------------------------------------

__global__ void rmsnorm_kernel1(MlaShape d, MlaLatents a, int64_t N) {
    int64_t n = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (n >= N) return;
    float sum = 0;
    for (int c = 0; c < d.d_c; c++) {
        float x = to_float(a.u[n * d.u + c]);
        sum += x * x;
    }
    float r = 1 / sqrtf(sum / d.d_c + 1e-6f);
    for (int c = 0; c < d.d_c; c++) a.c[n * a.c_stride + c] = from_float<floatX>(to_float(a.u[n * d.u + c]) * r * to_float(a.gain[c]));
    a.rstd[n] = r;
}

// Pair i of head h of token n, heads head_stride apart.
__global__ void rope_kernel1(floatX* y, int64_t y_stride, int64_t y_head, const floatX* x, int64_t x_stride, int64_t x_head, int64_t N, int heads, int d_rope,
                             const int* position, int direction, double exponent) {
    int64_t j = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    int pairs = d_rope / 2, i = (int)(j % pairs), h = (int)(j / pairs % heads);
    int64_t n = j / pairs / heads;
    if (n >= N) return;
    float2 r = rope_rotation(position[n], i, exponent, direction);
    float a = to_float(x[n * x_stride + h * x_head + 2 * i]), b = to_float(x[n * x_stride + h * x_head + 2 * i + 1]);
    y[n * y_stride + h * y_head + 2 * i] = from_float<floatX>(a * r.x - b * r.y);
    y[n * y_stride + h * y_head + 2 * i + 1] = from_float<floatX>(a * r.y + b * r.x);
}

__global__ void assemble_kernel1(MlaShape d, floatX* keys, const floatX* kv, const floatX* kr, int64_t kr_stride, int64_t N) {
    int64_t j = (int64_t)blockIdx.x * blockDim.x + threadIdx.x, n = j / d.q;
    if (n >= N) return;
    int h = (int)(j % d.q / d.d_qk), c = (int)(j % d.d_qk);
    keys[j] = c < d.d_nope ? kv[n * d.kv + h * d.d_kv + c] : kr[n * kr_stride + c - d.d_nope];
}

__global__ void split_kernel1(MlaShape d, const floatX* dkeys, floatX* dkv, floatX* du, int64_t N) {
    int64_t j = (int64_t)blockIdx.x * blockDim.x + threadIdx.x, n = j / d.q;
    if (n >= N) return;
    int h = (int)(j % d.q / d.d_qk), c = (int)(j % d.d_qk);
    if (c < d.d_nope) {
        dkv[n * d.kv + h * d.d_kv + c] = dkeys[j];
    } else if (h == 0) {
        float sum = 0;
        for (int head = 0; head < d.NH; head++) sum += to_float(dkeys[n * d.q + head * d.d_qk + c]);
        du[n * d.u + d.d_c + c - d.d_nope] = from_float<floatX>(sum);
    }
}

void rope1(cudaStream_t stream, floatX* y, int64_t y_stride, int64_t y_head, const floatX* x, int64_t x_stride, int64_t x_head, int64_t N, int heads,
           int d_rope, const int* position, int direction) {
    if (d_rope == 0) return;
    rope_kernel1<<<(unsigned)ceil_div(N * heads * d_rope / 2, 256), 256, 0, stream>>>(y, y_stride, y_head, x, x_stride, x_head, N, heads, d_rope, position,
                                                                                      direction, rope_exponent(d_rope));
    LAUNCH_CHECK();
}

bool latents(int version, cudaStream_t stream, const MlaShape& d, const MlaLatents& a, int64_t N) {
    if (version == 2) mla_latents_launch<mla::PAIR>(stream, d, a, N);
    if (version == 3 && !mla::vectors(d)) return false;
    if (version == 3) {
        bool whole = aligned16(a.q_to) && (a.q_stride | a.q_head) % mla::VECTOR == 0;
        if (whole) mla_latents_launch<mla::VECTOR>(stream, d, a, N);
        return whole;
    }
    if (version == 4 && !a.q) return false;
    if (version == 4 || version == 5) mla_latents(stream, d, a, N);
    if (version > 1) return true;
    if (a.states) return false;
    rmsnorm_kernel1<<<(unsigned)ceil_div(N, 256), 256, 0, stream>>>(d, a, N);
    LAUNCH_CHECK();
    rope1(stream, a.kr, a.kr_stride, 0, a.u + d.d_c, d.u, 0, N, 1, d.d_rope, a.position, 1);
    if (!a.q) {
        int64_t count = (int64_t)a.positions * d.d_rope / 2;
        mla_rotations_kernel<<<(unsigned)ceil_div(count, mla::THREADS), mla::THREADS, 0, stream>>>(a.rotations, count, d.d_rope / 2, mla::exponent(d));
        LAUNCH_CHECK();
        return true;
    }
    rope1(stream, a.q_to, a.q_stride, a.q_head, a.q + d.d_nope, d.q, d.d_qk, N, d.NH, d.d_rope, a.position, 1);
    return true;
}

bool assemble(int version, cudaStream_t stream, const MlaShape& d, floatX* keys, const floatX* kv, const floatX* kr, int64_t kr_stride, int64_t N) {
    if (version == 1) assemble_kernel1<<<(unsigned)ceil_div(N * d.q, 256), 256, 0, stream>>>(d, keys, kv, kr, kr_stride, N);
    if (version == 2) mla_assemble_launch<mla::PAIR>(stream, d, keys, kv, kr, kr_stride, N);
    if (version == 3) mla_assemble(stream, d, keys, kv, kr, kr_stride, N);
    LAUNCH_CHECK();
    return version <= 3;
}

bool split(int version, cudaStream_t stream, const MlaShape& d, const floatX* dkeys, floatX* dkv, floatX* du, floatX* dq, const int* position, int64_t N) {
    if (version == 2) mla_split_launch<mla::PAIR>(stream, d, dkeys, dkv, du, dq, position, N);
    if (version == 3 && !mla::vectors(d)) return false;
    if (version == 3) mla_split_launch<mla::VECTOR>(stream, d, dkeys, dkv, du, dq, position, N);
    if (version == 4) mla_split(stream, d, dkeys, dkv, du, dq, position, N);
    if (version > 1) return true;
    split_kernel1<<<(unsigned)ceil_div(N * d.q, 256), 256, 0, stream>>>(d, dkeys, dkv, du, N);
    LAUNCH_CHECK();
    rope1(stream, du + d.d_c, d.u, 0, du + d.d_c, d.u, 0, N, 1, d.d_rope, position, -1);
    rope1(stream, dq + d.d_nope, d.q, d.d_qk, dq + d.d_nope, d.q, d.d_qk, N, d.NH, d.d_rope, position, -1);
    return true;
}

// ---- cases ------------------------------------------------------------------------------------------------------------------------------------------------

AttentionConfig config(int heads, int d_nope, int d_rope, int d_v, int d_c) {
    AttentionConfig a;
    a.name = "mla";
    a.heads = heads;
    a.channels = 8 * heads;
    a.options = {{"q-lora-rank", 0}, {"kv-lora-rank", d_c}, {"qk-nope-dim", d_nope}, {"qk-rope-dim", d_rope}, {"v-dim", d_v}};
    return a;
}

// Sequences of these lengths, standing behind `past` tokens.
struct Tokens {
    std::vector<cpu::TokenPlace> place;
    std::vector<TokenPlace> device_place;
    std::vector<int> cu = {0}, position;
    explicit Tokens(const std::vector<int>& lengths, int past) {
        for (int s = 0; s < (int)lengths.size(); s++) {
            for (int i = 0; i < lengths[s]; i++) {
                place.push_back({s, past + i});
                device_place.push_back({s, i});
                position.push_back(past + i);
            }
            cu.push_back((int)place.size());
        }
    }
    cpu::AttentionContext context(const AttentionConfig& a) const {
        cpu::AttentionContext ctx{};
        ctx.config = &a;
        ctx.num_seqs = (int)cu.size() - 1;
        ctx.cu_seqlens = cu.data();
        ctx.place = place.data();
        return ctx;
    }
};

std::string shape_of(const MlaShape& d, int64_t N) {
    return format("N %lld, NH %d, d_nope %d, d_rope %d, d_v %d, d_c %d", (long long)N, d.NH, d.d_nope, d.d_rope, d.d_v, d.d_c);
}

void check(Ladder& latent, Ladder& assembly, Ladder& splitting, const AttentionConfig& a, const std::vector<int>& lengths, int past) {
    MlaShape d(a);
    Tokens tokens(lengths, past);
    int64_t N = (int64_t)tokens.position.size();
    cpu::AttentionContext ctx = tokens.context(a);
    DeviceArray<int> position(tokens.position);
    DeviceArray<TokenPlace> place(tokens.device_place);
    std::vector<float> u = random_numbers(N * d.u, 1, 2), q = random_numbers(N * d.q, 2), gain = random_numbers(d.d_c, 3, 0.2, 1);
    std::vector<float> wukv = random_numbers(d.kv * d.d_c, 4, 1 / std::sqrt((double)d.d_c));

    // Forward. In training c is an array of its own, kr and qr stay where they are; extend writes [c | kr] into pages, and for the absorbed form qr elsewhere.
    std::vector<float> u_after = u, q_after = q, c(N * d.d_c), rstd(N), kv(N * d.kv), keys(N * d.q);
    cpu::mla_rope(ctx, d, q_after.data(), u_after.data() + d.d_c, 1);
    cpu::rmsnorm_forward(c.data(), d.d_c, rstd.data(), u.data(), d.u, gain.data(), N, d.d_c);
    DeviceArray<floatX> device_u(u), device_q(q), device_gain(gain), device_c(c.size());
    DeviceArray<float> device_rstd(rstd.size());
    MlaLatents l{};
    l.u = device_u;
    l.gain = device_gain;
    l.position = position;
    l.c = device_c;
    l.c_stride = d.d_c;
    l.kr = device_u + d.d_c;
    l.kr_stride = d.u;
    l.rstd = device_rstd;
    l.q = device_q;
    l.q_to = device_q + d.d_nope;
    l.q_stride = d.q;
    l.q_head = d.d_qk;
    latent.check(
        shape_of(d, N),
        {output("c", device_c, c), output("rstd", device_rstd, rstd), accumulated("kr", device_u, u, u_after), accumulated("qr", device_q, q, q_after)},
        [&](int version) { return latents(version, latent.stream, d, l, N); });

    // Without the queries, but with the rotations of all positions; nothing is written behind these.
    if (d.d_rope > 0) {
        int positions = tokens.position.empty() ? 1 : *std::max_element(tokens.position.begin(), tokens.position.end()) + 1;
        DeviceArray<float> rotations(positions * d.d_rope + 2);
        std::vector<float> expected(rotations.size, -1), unwritten(rotations.size, -1);
        for (int64_t p = 0; p < positions; p++)
            for (int i = 0; i < d.d_rope; i += 2) {
                double angle = p * std::pow(10000.0, -(double)i / d.d_rope);
                expected[p * d.d_rope + i] = (float)std::cos(angle);
                expected[p * d.d_rope + i + 1] = (float)std::sin(angle);
            }
        MlaLatents e = l;
        e.q = nullptr;
        e.rotations = (float2*)rotations.data;
        e.positions = positions;
        latent.check(shape_of(d, N) + ", without queries",
                     {output("c", device_c, c), output("rstd", device_rstd, rstd), accumulated("kr", device_u, u, u_after),
                      accumulated("rotations", rotations, unwritten, expected, 1e-6)},
                     [&](int version) { return latents(version, latent.stream, d, e, N); });
    }

    constexpr int page_size = 3;
    int num_seqs = ctx.num_seqs, longest = *std::max_element(lengths.begin(), lengths.end()), pages = (longest + past) / page_size + 1;
    int64_t page = round_up(1 + page_size * d.u, 8);
    for (int offset : {0, 1}) {  // rows in pages that may stand on 16 bytes, and rows that do not
        DeviceArray<floatX> pool(num_seqs * pages * page), q_to(N * d.NH * d.u);
        std::vector<float> pool_after(pool.size, -1), q_to_after(q_to.size, -1);
        std::vector<int> table;
        std::vector<AttentionState> states;
        for (int p = 0; p < num_seqs * pages; p++) table.push_back(num_seqs * pages - 1 - p);
        DeviceArray<int> tables(table);
        for (int s = 0; s < num_seqs; s++) states.push_back({past, nullptr, pool + offset, tables + s * pages, page, page_size, d.u});
        DeviceArray<AttentionState> device_states(states);
        for (int64_t n = 0; n < N; n++) {
            int j = tokens.place[n].pos;
            float* row = &pool_after[table[tokens.place[n].seq * pages + j / page_size] * page + offset + j % page_size * d.u];
            std::copy_n(&c[n * d.d_c], d.d_c, row);
            std::copy_n(u_after.data() + n * d.u + d.d_c, d.d_rope, row + d.d_c);
            for (int h = 0; h < d.NH; h++)
                std::copy_n(q_after.data() + n * d.q + h * d.d_qk + d.d_nope, d.d_rope, q_to_after.data() + (n * d.NH + h) * d.u + d.d_c);
        }
        device_u.copy_from(u);
        device_q.copy_from(q);
        MlaLatents e = l;
        e.states = device_states;
        e.place = place;
        e.rstd = nullptr;
        e.q_to = q_to + d.d_c;
        e.q_stride = d.NH * d.u;
        e.q_head = d.u;
        std::vector<float> untouched(pool.size, -1), untouched_q(q_to.size, -1);
        latent.check(shape_of(d, N) + ", into pages", {accumulated("rows", pool, untouched, pool_after), accumulated("qr", q_to, untouched_q, q_to_after)},
                     [&](int version) { return latents(version, latent.stream, d, e, N); });
    }

    // Keys: exact copies, of what the CPU's product gives after rounding.
    cpu::mla_keys_forward(d, wukv.data(), c.data(), d.d_c, u_after.data() + d.d_c, kv.data(), keys.data(), N);
    for (float* x : {kv.data(), keys.data(), u_after.data()})
        for (int64_t i = 0; i < (x == kv.data() ? N * d.kv : x == keys.data() ? N * d.q : N * d.u); i++) x[i] = round_to_working_type(x[i]);
    DeviceArray<floatX> device_kv(kv), device_kr(u_after), device_keys(keys.size());
    assembly.check(shape_of(d, N), {output("keys", device_keys, keys, 0, 0)},
                   [&](int version) { return assemble(version, assembly.stream, d, device_keys, device_kv, device_kr + d.d_c, d.u, N); });

    // Backward. The v parts of dkv and the c part of du are not touched.
    std::vector<float> dkeys = random_numbers(N * d.q, 5), dkv = random_numbers(N * d.kv, 6), dq = random_numbers(N * d.q, 7), du(N * d.u, 0.5f);
    std::vector<float> dkv_after = dkv, dq_after = dq, du_after = du, dwukv(d.kv * d.d_c);
    cpu::mla_keys_backward(d, wukv.data(), c.data(), dkeys.data(), dkv_after.data(), du_after.data(), dwukv.data(), N);
    cpu::mla_rope(ctx, d, dq_after.data(), du_after.data() + d.d_c, -1);
    for (int64_t n = 0; n < N; n++) std::fill_n(&du_after[n * d.u], d.d_c, 0.5f);
    DeviceArray<floatX> device_dkeys(dkeys), device_dkv(dkv), device_dq(dq), device_du(du);
    splitting.check(shape_of(d, N),
                    {accumulated("dkv", device_dkv, dkv, dkv_after), accumulated("du", device_du, du, du_after), accumulated("dq", device_dq, dq, dq_after)},
                    [&](int version) { return split(version, splitting.stream, d, device_dkeys, device_dkv, device_du, device_dq, position, N); });
}

void time(Ladder& latent, Ladder& assembly, Ladder& splitting, const AttentionConfig& a, int64_t N, int T) {
    MlaShape d(a);
    std::vector<int> position(N);
    for (int64_t n = 0; n < N; n++) position[n] = (int)(n % T);
    DeviceArray<int> device_position(position);
    DeviceArray<floatX> u(N * d.u), q(N * d.q), keys(N * d.q), kv(N * d.kv), gain(random_numbers(d.d_c, 1)), c(N * d.d_c), piece(random_numbers(1 << 20, 2));
    DeviceArray<float> rstd(N);
    for (DeviceArray<floatX>* x : {&u, &q, &keys, &kv})
        for (int64_t i = 0; i < x->size; i += piece.size)
            CUDA_CHECK(cudaMemcpy(*x + i, piece, std::min(piece.size, x->size - i) * sizeof(floatX), cudaMemcpyDeviceToDevice));
    MlaLatents l{};
    l.u = u;
    l.gain = gain;
    l.position = device_position;
    l.c = c;
    l.c_stride = d.d_c;
    l.kr = u + d.d_c;
    l.kr_stride = d.u;
    l.rstd = rstd;
    l.q = q;
    l.q_to = q + d.d_nope;
    l.q_stride = d.q;
    l.q_head = d.d_qk;
    double x = (double)N * sizeof(floatX), nope = x * d.NH * d.d_nope, rope = x * d.NH * d.d_rope;
    latent.time("latents: " + shape_of(d, N), {0, x * (d.u + d.d_c + d.d_rope) + 2 * rope},
                [&](int version) { return version < 5 && latents(version, latent.stream, d, l, N); });
    DeviceArray<float2> rotations((int64_t)T * d.d_rope / 2);
    l.q = nullptr;
    l.rotations = rotations;
    l.positions = T;
    latent.time("the same without queries", {0, x * (d.u + d.d_c + d.d_rope)}, [&](int version) { return latents(version, latent.stream, d, l, N); });
    assembly.time("assemble: " + shape_of(d, N), {0, 2 * nope + rope + x * d.d_rope},
                  [&](int version) { return assemble(version, assembly.stream, d, keys, kv, u + d.d_c, d.u, N); });
    splitting.time("split: " + shape_of(d, N), {0, 2 * nope + rope + x * d.d_rope + 2 * rope},
                   [&](int version) { return split(version, splitting.stream, d, keys, kv, u, q, device_position, N); });
}

int main(int argc, char** argv) {
    Ladder latent("mla_latents",
                  {"naive: norm, kr and queries apart", "one kernel, angles once a token", "16-byte accesses", "loads before angles (in use)",
                   "without the queries, where their product rotates them (in use)"},
                  argc, argv);
    Ladder assembly("mla_assemble", {"naive: a thread a number", "8 tokens a thread", "16-byte accesses (in use)"}, argc, argv);
    Ladder splitting("mla_split",
                     {"naive: copy and sum, kr and queries apart", "one kernel, angles once a token", "16-byte accesses",
                      "rows of dkeys in one sweep, loads before angles (in use)"},
                     argc, argv);
    struct {
        int heads, d_nope, d_rope, d_v, d_c;
    } shapes[] = {{3, 5, 6, 7, 9},     {2, 0, 4, 3, 1},    {4, 6, 0, 5, 17},     {4, 16, 8, 8, 24},
                  {5, 24, 16, 8, 264}, {1, 8, 32, 32, 40}, {2, 64, 64, 64, 128}, {12, 64, 32, 64, 256}};
    for (auto& s : shapes) {
        AttentionConfig a = config(s.heads, s.d_nope, s.d_rope, s.d_v, s.d_c);
        check(latent, assembly, splitting, a, {1}, 0);
        check(latent, assembly, splitting, a, {5, 0, 1, 17, 20}, 7);
    }
    AttentionConfig a = config(12, 64, 32, 64, 256);
    check(latent, assembly, splitting, a, {300, 700}, 1000);
    time(latent, assembly, splitting, a, 65536, 1024);
    return latent.finish() | assembly.finish() | splitting.finish();
}
