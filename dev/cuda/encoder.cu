// The encoder's ladder: table lookup, and the gradients of the tables.
//
//     forward    out_n = wte[token_n] + wpe[position_n]
//     backward   dwte[v] += Σ dout_n over the n with token_n = v       dwpe[p] += Σ dout_n over the n with position_n = p
//
// No arithmetic to speak of; what counts is bytes. Forward must write out (N,C) and read each row of the tables that occurs once (repeated ones come from the
// L2 cache); backward must read dout once, and read and write each table row that occurs, in float32. N = 65536 tokens of C = 768 channels in
// bf16, a vocabulary of 50304 of which a Zipf-like text of this length uses 15000 words: forward 126 MB = 42 µs at 3.0 TB/s, backward 202 MB = 67 µs.
//
// Forward
//   1. A thread a number, found by division. Threads of a warp read neighbours, but each fetches the token and divides 64-bit numbers for itself.
//   2. A warp a row: token and position are read once, no division. Expected: the division's time, a factor of two or so.
//   3. 16 bytes a thread and access (encoder_forward_kernel3 with W = 8 instead of 1): an eighth of the instructions, so that memory and not the issue of
//      instructions is the limit. Expected: close to the copy's bandwidth.
//
// Backward. Floating-point atomics are out: their order, and so the result, would change from run to run.
//   1. Gather instead of scatter: a block for each table row looks through the whole list of tokens for its own. V·N comparisons: milliseconds, nearly all of
//      it for rows that never occur.
//   2. Sort the row numbers by token (cub's radix sort is stable, so the order of summation is fixed): a block for each run of equal tokens. Expected: the
//      sort costs some 40 µs, the search is gone; but the most frequent word, a tenth of the batch, is one block's work while the others wait.
//   3. Pieces of 64 entries of the sorted list, whatever runs they cut, eight rows in flight: equal work for all. Parts of cut runs are joined by a second
//      kernel (encoder_backward_kernel3, encoder_join_kernel3). Expected: also when all tokens are the same, bandwidth (with dout read twice, once a table:
//      101 µs), and the two sorts, some 60 µs.
#define GPT2_NO_MAIN
#include "../../train_gpt2.cpp"

#include "../../gpt2/cuda/encoder.cuh"
#include "ladder.h"

using namespace gpu;

// ---- forward -------------------------------------------------------------------------------------------------------------------------------------------

__global__ void encoder_forward_kernel1(floatX* out, const int* tokens, const int* position, const floatX* wte, const floatX* wpe, int64_t N, int64_t C) {
    int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= N * C) return;
    int64_t n = i / C, c = i % C;
    out[i] = from_float<floatX>(to_float(wte[tokens[n] * C + c]) + (wpe ? to_float(wpe[position[n] * C + c]) : 0));
}

static void forward(int version, cudaStream_t stream, floatX* out, const int* tokens, const int* position, const floatX* wte, const floatX* wpe, int64_t N,
                    int64_t C) {
    if (version == 1) {
        encoder_forward_kernel1<<<(unsigned)ceil_div(N * C, 256), 256, 0, stream>>>(out, tokens, position, wte, wpe, N, C);
        LAUNCH_CHECK();
    } else if (version == 2) {
        encoder_forward3<1>(stream, out, tokens, position, wte, wpe, N, C);
    } else {
        encoder_forward(stream, out, tokens, position, wte, wpe, N, C);
    }
}

// ---- backward ------------------------------------------------------------------------------------------------------------------------------------------

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

static void backward(int version, cudaStream_t stream, float* dtable, const floatX* dout, const int* keys, int64_t N, int64_t C, int64_t bound,
                     Scratch scratch) {
    if (version == 1) {
        encoder_backward_kernel1<<<(unsigned)bound, 256, 0, stream>>>(dtable, dout, keys, N, C);
    } else {
        int *sorted = scratch.take<int>(N), *order = scratch.take<int>(N);
        sort_rows(stream, sorted, order, keys, N, bound, scratch);
        encoder_backward_kernel2<<<dim3((unsigned)N, (unsigned)ceil_div(C, 256)), 256, 0, stream>>>(dtable, dout, sorted, order, N, C);
    }
    LAUNCH_CHECK();
}

static void backward(int version, cudaStream_t stream, float* dwte, float* dwpe, const floatX* dout, const int* tokens, const int* position, int64_t N,
                     int64_t C, int64_t V, int64_t max_seq, Scratch scratch) {
    if (version == 3) {
        encoder_backward(stream, dwte, dwpe, dout, tokens, position, N, C, V, max_seq, scratch);
        return;
    }
    backward(version, stream, dwte, dout, tokens, N, C, V, scratch);
    if (dwpe) backward(version, stream, dwpe, dout, position, N, C, max_seq, scratch);
}

// ---- the ladders ---------------------------------------------------------------------------------------------------------------------------------------

enum Text { ZIPF, ONE_TOKEN };
struct Shape {
    int64_t N, C, V, T;  // positions count from 0 to T−1 again and again; T = 0: no wpe
    Text text;
    std::string name() const {
        return format("N=%lld C=%lld V=%lld T=%lld%s", (long long)N, (long long)C, (long long)V, (long long)T, text == ONE_TOKEN ? " one token" : "");
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
static std::vector<int> make_positions(const Shape& s) {
    std::vector<int> position(s.N);
    for (int64_t n = 0; n < s.N; n++) position[n] = s.T ? (int)(n % s.T) : 0;
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
    std::vector<int> tokens = make_tokens(s), position = make_positions(s);
    std::vector<float> dout = random_numbers(s.N * s.C, 1), dwte = random_numbers(s.V * s.C, 2), dwpe = random_numbers(s.T * s.C, 3);
    std::vector<float> dwte_reference = dwte, dwpe_reference = dwpe;
    cpu::encoder_backward(dwte_reference.data(), s.T ? dwpe_reference.data() : nullptr, dout.data(), tokens.data(), position.data(), s.N, s.C);

    DeviceArray<int> d_tokens(tokens), d_position(position);
    DeviceArray<floatX> d_dout(dout);
    DeviceArray<float> d_dwte(s.V * s.C), d_dwpe(s.T * s.C);
    DeviceArray<char> memory(encoder_backward_scratch(s.N, s.C, s.V));
    std::vector<Output> outputs = {accumulated("dwte", d_dwte, dwte, dwte_reference, 2e-5)};
    if (s.T) outputs.push_back(accumulated("dwpe", d_dwpe, dwpe, dwpe_reference, 2e-5));
    ladder.check(s.name(), outputs, [&](int version) {
        CUDA_CHECK(cudaMemsetAsync(memory, 0xff, memory.size, ladder.stream));  // nothing may hang on what is in it
        backward(version, ladder.stream, d_dwte, s.T ? d_dwpe.data : nullptr, d_dout, d_tokens, d_position, s.N, s.C, s.V, s.T, {memory, memory.size});
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
    std::vector<int> tokens = make_tokens(s), position = make_positions(s);
    DeviceArray<int> d_tokens(tokens), d_position(position);
    DeviceArray<floatX> dout(repeated_numbers(s.N * s.C, 1));
    DeviceArray<float> dwte(std::vector<float>(s.V * s.C)), dwpe(std::vector<float>(s.T * s.C));
    DeviceArray<char> memory(encoder_backward_scratch(s.N, s.C, s.V));
    double rows = (double)(distinct(tokens) + distinct(position));
    ladder.time(s.name(), {2.0 * s.N * s.C, (double)s.N * s.C * sizeof(floatX) + rows * s.C * 2 * sizeof(float)}, [&](int version) {
        if (version < 3 && s.text == ONE_TOKEN) return false;  // all of it one block's work: a tenth of a second and more
        backward(version, ladder.stream, dwte, dwpe, dout, d_tokens, d_position, s.N, s.C, s.V, s.T, {memory, memory.size});
        return true;
    });
}

int main(int argc, char** argv) {
    const std::vector<Shape> shapes = {
        {1, 1, 3, 0, ZIPF},     {5, 7, 11, 3, ZIPF},        {64, 8, 5, 64, ZIPF},        {65, 33, 4, 13, ZIPF},         {200, 40, 50, 7, ZIPF},
        {130, 129, 1, 1, ZIPF}, {1000, 257, 300, 50, ZIPF}, {700, 1600, 300, 100, ZIPF}, {20011, 40, 30, 0, ONE_TOKEN}, {4099, 768, 1000, 1024, ZIPF},
    };
    const Shape gpt2 = {65536, 768, 50304, 1024, ZIPF}, one_token = {65536, 768, 50304, 1024, ONE_TOKEN};

    Ladder forward_ladder("encoder_forward", {"a thread a number", "a warp a row", "16-byte accesses"}, argc, argv);
    for (const Shape& s : shapes) check_forward(forward_ladder, s);
    time_forward(forward_ladder, gpt2);
    int failed = forward_ladder.finish();

    Ladder backward_ladder("encoder_backward",
                           {"a block a table row, which searches its tokens", "sorted by token: a block a run", "pieces of the sorted list"}, argc, argv);
    for (const Shape& s : shapes) check_backward(backward_ladder, s);
    time_backward(backward_ladder, gpt2);
    time_backward(backward_ladder, one_token);
    return backward_ladder.finish() | failed;
}
