// Proves every attention layer of attention.h from its table of functions: what a layer must do is checked here once, for all of them and all their options.
//
//   gradient/    every parameter tensor's gradient, dx, and a starting memory's, against differences of the forward pass (double build only)
//   ragged/      a packed batch against each of its sequences alone, forward and backward
//   extend/      decode and prefill in chunks, through pages in any order, against forward
//   memory/      recurrent layers: several passes with the memory carried between them against one long sequence
//   threads/     1 thread against 2, 3 and 5: the same bits (with a CBLAS, whose order of summation is its own: the same to rounding)
//   poison/      what memory held before, and how much more of it there is, changes no bit
//   core/        the softmax core against the double loop, extreme scores, its gradients where no layer goes
//   dropout/     the mask against its definition
//   matmul/      the matrix products and the small vector functions against plain loops
//   same/        layers and options that must agree with one another
//   control/     the comparisons above can fail
//   options/     every option of every layer appears in the table of variants below
//
// Every pass of every case runs on buffers of exactly the size that the layer asked for, filled with NaN, between guard words that are checked afterwards.
//
//     layer_tests [--list] [--first-failure] [NAME...]      runs the cases whose name starts with one of NAME, or all; exit 1 if any fails
//
// Build it twice: with -DREAL=double (the gradients, and tight tolerances), with -DNO_CBLAS (the same bits for any number of threads); and plainly.
#include <unistd.h>

#include <array>
#include <chrono>
#include <climits>
#include <cstdarg>
#include <functional>
#include <memory>
#include <set>

#include "../../attention.h"

#ifdef NO_CBLAS
constexpr bool own_matmul = true;
#else
constexpr bool own_matmul = false;
#endif
constexpr bool is_double = sizeof(real) == 8;
constexpr real NOT_A_NUMBER = std::numeric_limits<real>::quiet_NaN();

typedef std::vector<real> Numbers;

static void set_threads(int n) {
#ifdef _OPENMP
    omp_set_num_threads(n);
#else
    (void)n;
#endif
}

// --------------------------------------------------------------------------------------------------------------------------------------------------
// Results: a case makes many checks, each an error and its tolerance; its line shows the one that came closest to failing.

struct Results {
    int checks = 0, failures = 0;
    double worst = -1, error = 0, tolerance = 0;
    std::string what, messages;
};
static Results results;
static bool first_failure = false;
static void end_after_first_failure();

static void fail(const std::string& message) {
    results.failures++;
    if (results.failures <= 5) results.messages += "      " + message + "\n";
    if (first_failure) end_after_first_failure();
}

static void check(double error, double tolerance, const std::string& what) {
    results.checks++;
    double ratio = tolerance > 0 ? error / tolerance : error;
    if (!(ratio <= results.worst)) {
        results.worst = ratio;
        results.error = error;
        results.tolerance = tolerance;
        results.what = what;
    }
    if (!(error <= tolerance)) fail(format("%s: error %.3g, at most %.3g", what.c_str(), error, tolerance));
}

static void check_that(bool ok, const std::string& what) {
    results.checks++;
    if (!ok) fail(what);
}

// --------------------------------------------------------------------------------------------------------------------------------------------------
// Numbers: random ones, comparisons, guarded memory

struct Random {
    uint64_t seed;
    uint32_t count = 0;
    explicit Random(uint64_t s) : seed(s) {}
    double normal() {
        Philox r = philox(seed, count++, 0, 0, 0);
        double x, y;
        philox_normal(r.word[0], r.word[1], &x, &y);
        return x;
    }
    int below(int n) { return (int)(philox(seed, count++, 1, 0, 0).word[0] % (uint32_t)n); }
    Numbers normals(int64_t n, double std = 1) {
        Numbers v(n);
        for (real& x : v) x = (real)(std * normal());
        return v;
    }
};

static uint64_t seed_of(const std::string& s) {
    uint64_t h = 1469598103934665603u;
    for (unsigned char c : s) h = (h ^ c) * 1099511628211u;
    return h;
}

static double norm(const Numbers& a) {
    double sum = 0;
    for (real x : a) sum += (double)x * x;
    return std::sqrt(sum);
}

// The largest ‖a−b‖/‖b‖ over rows of `width` numbers; rows with a small ‖b‖ are measured against a tenth of the mean row.
static double row_error(const Numbers& a, const Numbers& b, int64_t width) {
    if (a.size() != b.size()) return NOT_A_NUMBER;
    double floor = b.empty() ? 0 : 0.1 * norm(b) / std::sqrt((double)b.size() / width), worst = 0;
    for (size_t r = 0; r < b.size(); r += width) {
        double difference = 0, size = 0;
        for (size_t i = r; i < r + width; i++) {
            difference += ((double)a[i] - b[i]) * ((double)a[i] - b[i]);
            size += (double)b[i] * b[i];
        }
        double scale = std::max(std::sqrt(size), floor), e = difference == 0 ? 0 : std::sqrt(difference) / scale;
        if (!(e <= worst)) worst = e;
        if (!(worst == worst)) return worst;
    }
    return worst;
}

// How many of the numbers differ in any bit; NaN never counts as equal.
static double different_bits(const Numbers& a, const Numbers& b) {
    if (a.size() != b.size()) return NOT_A_NUMBER;
    double n = 0;
    for (size_t i = 0; i < a.size(); i++) n += memcmp(&a[i], &b[i], sizeof(real)) != 0 || !(a[i] == a[i]);
    return n;
}

static Numbers minus(Numbers a, const Numbers& b) {
    assert(a.size() == b.size());
    for (size_t i = 0; i < a.size(); i++) a[i] -= b[i];
    return a;
}

// Exactly n numbers on a 64-byte boundary, filled with `fill`, with guard words before and behind.
struct Buffer {
    static constexpr int guard = 64;
    Numbers block;
    real* data;
    int64_t size;
    static real guard_word() { return (real)-7.25e12; }
    explicit Buffer(int64_t n, real fill = NOT_A_NUMBER) : block(n + 3 * guard, guard_word()), size(n) {
        data = block.data() + guard;
        while ((uintptr_t)data % 64) data++;
        std::fill_n(data, n, fill);
    }
    Buffer(Buffer&&) = default;
    Buffer(const Buffer&) = delete;
    bool intact() const {
        for (const real* p = block.data(); p < block.data() + block.size(); p++)
            if ((p < data || p >= data + size) && *p != guard_word()) return false;
        return true;
    }
    Numbers numbers() const { return Numbers(data, data + size); }
};

// A list of tensors, each in a guarded buffer of its own.
struct Store {
    Tensors tensors;
    std::vector<Buffer> buffers;
    explicit Store(std::vector<TensorSpec> specs, real fill = NOT_A_NUMBER) {
        tensors.add("", std::move(specs));
        for (const TensorSpec& s : tensors.specs) {
            buffers.emplace_back(s.size(), fill);
            tensors.data.push_back(buffers.back().data);
        }
    }
    size_t count() const { return buffers.size(); }
    const char* name(size_t i) const { return tensors.specs[i].name.c_str(); }
    void check_guards(const std::string& what) const {
        for (size_t i = 0; i < count(); i++) check_that(buffers[i].intact(), what + ": wrote outside of " + name(i));
    }
};

// --------------------------------------------------------------------------------------------------------------------------------------------------
// A layer to be tested, and its passes

// One row of the table of variants: a layer with options, in a network of this shape.
struct Variant {
    const char* attention;
    const char* positions;
    int channels, heads;
    int block;  // the length at which the layer's work changes: segment, chunk, tile
    double dropout = 0;
    int layer = 0, layers = 2;

    std::string layer_name() const { return std::string(attention).substr(0, std::string(attention).find(':')); }
    std::string name() const {
        std::string s = format("%s/%s/C%d/NH%d", attention, positions, channels, heads);
        if (dropout > 0) s += format("/dropout=%g", dropout);
        if (layer > 0 || layers != 2) s += format("/layer%dof%d", layer, layers);
        return s;
    }
};

struct Layer {
    AttentionConfig config;
    const AttentionDescription* description;
    const cpu::Attention* functions;
    AttentionStateSize state;
    cpu::DropoutKey dropout;
    Store parameters;

    explicit Layer(const Variant& v) : config(resolved(v)), parameters(attention_description(config.name).parameters(config)) {
        description = &attention_description(config.name);
        functions = &cpu::attention(config.name);
        state = description->state(config);
        dropout.p = v.dropout;
        dropout.seed = 0x123456789abcdefu;
        dropout.counter = 77;
        dropout.first_row = 5;
        Random random(seed_of(v.name()));
        // Large enough that softmax is far from uniform and every gradient counts; no bias zero, gains around 1.
        for (size_t i = 0; i < parameters.count(); i++) {
            const TensorSpec& s = parameters.tensors.specs[i];
            double std = s.shape.size() == 2 ? 1.2 / std::sqrt((double)s.shape[1]) : 0.4;
            for (int64_t k = 0; k < s.size(); k++) parameters.buffers[i].data[k] = (real)((s.shape.size() == 2 ? 0 : s.init_value) + std * random.normal());
        }
    }
    static AttentionConfig resolved(const Variant& v) {
        ModelConfig m;
        m.layers = v.layers;
        m.heads = v.heads;
        m.channels = v.channels;
        parse_attention(m, v.attention, {}, v.positions);
        return m.attention[v.layer];
    }
    int C() const { return config.channels; }
};

struct Batch {
    std::vector<int> lengths, cu;
    std::vector<cpu::TokenPlace> place;
    Batch(const std::vector<int>& l) : lengths(l), cu(1, 0) {
        for (int s = 0; s < (int)l.size(); s++) {
            cu.push_back(cu.back() + l[s]);
            for (int t = 0; t < l[s]; t++) place.push_back({s, t});
        }
        place.reserve(1);  // never null
    }
    int sequences() const { return (int)lengths.size(); }
    int tokens() const { return cu.back(); }
};

// The input of a forward and backward pass, and how its memory is to be prepared.
struct Pass {
    Batch batch;
    Numbers x, residual, dout;
    std::vector<const real*> memory_from, dmemory_to;
    std::vector<real*> memory_to, dmemory_from;
    real fill = NOT_A_NUMBER;
    int spare = 0;          // tokens more than needed that buffers have room for
    bool in_place = false;  // residual and out are the same memory
    int64_t first_row = 0;  // added to the layer's

    Pass(const Layer& layer, const Batch& b, uint64_t seed) : batch(b) {
        Random random(seed);
        int64_t n = (int64_t)b.tokens() * layer.C();
        x = random.normals(n);
        residual = random.normals(n);
        dout = random.normals(n);
    }
    cpu::AttentionContext context(const Layer& layer, Buffer& scratch) const {
        cpu::AttentionContext ctx{};
        ctx.config = &layer.config;
        ctx.num_seqs = batch.sequences();
        ctx.cu_seqlens = batch.cu.data();
        ctx.place = batch.place.data();
        ctx.dropout = layer.dropout;
        ctx.dropout.first_row += first_row;
        ctx.scratch = {scratch.data, scratch.size};
        if (!memory_from.empty()) ctx.memory_from = memory_from.data();
        if (!memory_to.empty()) ctx.memory_to = memory_to.data();
        if (!dmemory_to.empty()) ctx.dmemory_to = dmemory_to.data();
        if (!dmemory_from.empty()) ctx.dmemory_from = dmemory_from.data();
        return ctx;
    }
    Store make_saved(const Layer& layer) const {
        return Store(layer.functions->saved(layer.config, batch.tokens() + spare, memory_from.empty() ? 0 : batch.sequences()), fill);
    }
    Buffer make_scratch(const Layer& layer, bool training = true) const {
        int64_t N = batch.tokens() + spare;
        return Buffer(layer.functions->scratch(layer.config, N, batch.sequences(), N, training), fill);
    }
};

// (N,C) = residual + attention(x)
static Numbers forward(const Layer& layer, const Pass& pass, const Store& saved, bool training = true) {
    Buffer scratch = pass.make_scratch(layer, training), out(pass.x.size(), pass.fill);
    if (pass.in_place) std::copy(pass.residual.begin(), pass.residual.end(), out.data);
    layer.functions->forward(pass.context(layer, scratch), layer.parameters.tensors, saved.tensors, pass.x.data(),
                             pass.in_place ? out.data : pass.residual.data(), out.data);
    check_that(scratch.intact() && out.intact(), "forward wrote outside of its scratch memory or out");
    saved.check_guards("forward");
    return out.numbers();
}

struct Gradients {
    Numbers dx;
    std::vector<Numbers> parameters;
};

// Gradients are added to what is in `start` (or zeros), and what was there is taken off again.
static Gradients backward(const Layer& layer, const Pass& pass, const Store& saved, const std::vector<Numbers>* start = nullptr) {
    Buffer scratch = pass.make_scratch(layer), dx(pass.x.size(), pass.fill);
    Store gradients(layer.parameters.tensors.specs, 0);
    for (size_t i = 0; start && i < gradients.count(); i++) std::copy((*start)[i].begin(), (*start)[i].end(), gradients.buffers[i].data);
    layer.functions->backward(pass.context(layer, scratch), layer.parameters.tensors, gradients.tensors, saved.tensors, pass.x.data(), pass.dout.data(),
                              dx.data);
    check_that(scratch.intact() && dx.intact(), "backward wrote outside of its scratch memory or dx");
    saved.check_guards("backward");
    gradients.check_guards("backward");
    Gradients g;
    g.dx = dx.numbers();
    for (size_t i = 0; i < gradients.count(); i++) {
        g.parameters.push_back(gradients.buffers[i].numbers());
        if (start) g.parameters.back() = minus(g.parameters.back(), (*start)[i]);
    }
    return g;
}

struct Outcome {
    Numbers out;
    Gradients gradients;
};

static Outcome both(const Layer& layer, const Pass& pass) {
    Store saved = pass.make_saved(layer);
    Outcome o;
    o.out = forward(layer, pass, saved);
    o.gradients = backward(layer, pass, saved);
    return o;
}

static void compare_gradients(const Layer& layer, const Gradients& a, const Gradients& b, double tolerance, const std::string& what) {
    check(row_error(a.dx, b.dx, layer.C()), tolerance, what + ", dx");
    for (size_t i = 0; i < b.parameters.size(); i++)
        check(row_error(a.parameters[i], b.parameters[i], std::max<int64_t>(1, (int64_t)b.parameters[i].size())), tolerance,
              what + ", d" + layer.parameters.name(i));
}

static double forward_tolerance() { return is_double ? 1e-10 : 1e-4; }
static double rounding() { return is_double ? 1e-11 : 2e-5; }

// Lengths around the block size K of a layer, in an order that is none.
static std::vector<int> mixed_lengths(int K) { return {3, 0, 1, 17, K, K + 1, 2 * K + 3}; }

// --------------------------------------------------------------------------------------------------------------------------------------------------
// gradient/: loss L = Σ dout⊙(out − residual) (+ Σ dmemory_to⊙memory_to); for each tensor p and a random direction u the sum Σ dp⊙u must be
// dL(p + h·u)/dh at 0, taken from four points. h is small because Infini's ELU has a kink in its second derivative, which some numbers straddle.

static double loss(const Layer& layer, const Pass& pass) {
    Store saved = pass.make_saved(layer);
    Numbers out = forward(layer, pass, saved);
    double sum = 0;
    for (size_t i = 0; i < out.size(); i++) sum += (double)pass.dout[i] * ((double)out[i] - pass.residual[i]);
    for (size_t s = 0; s < pass.dmemory_to.size(); s++)
        for (int64_t i = 0; i < layer.state.per_sequence; i++) sum += (double)pass.dmemory_to[s][i] * pass.memory_to[s][i];
    return sum;
}

static double slope(real* p, const Numbers& u, const std::function<double()>& f) {
    Numbers p0(p, p + u.size());
    auto at = [&](double h) {
        for (size_t i = 0; i < u.size(); i++) p[i] = (real)(p0[i] + h * u[i]);
        return f();
    };
    constexpr double h = 3e-6;
    double near = at(h) - at(-h), far = at(2 * h) - at(-2 * h);
    std::copy(p0.begin(), p0.end(), p);
    return (8 * near - far) / (12 * h);
}

// |Σ dp⊙u − slope| relative to the larger. The floor is for gradients that are exactly zero (a softmax over one key): far below any other, above the
// rounding of the differences.
static void check_slope(double numeric, const Numbers& gradient, const Numbers& u, double floor, const std::string& what) {
    double analytic = 0;
    for (size_t i = 0; i < u.size(); i++) analytic += (double)gradient[i] * u[i];
    check(std::fabs(analytic - numeric) / std::max({std::fabs(analytic), std::fabs(numeric), floor}), 1e-6, what);
}

static void check_gradients(Layer& layer, Pass& pass, const std::string& what) {
    Random random(seed_of(what));
    std::fill(pass.residual.begin(), pass.residual.end(), (real)0);
    double floor = 1e-3 * norm(pass.dout);
    auto f = [&] { return loss(layer, pass); };

    std::vector<Numbers> start;
    for (size_t i = 0; i < layer.parameters.count(); i++) start.push_back(random.normals(layer.parameters.buffers[i].size));
    Store saved = pass.make_saved(layer);
    forward(layer, pass, saved);
    Gradients g = backward(layer, pass, saved, &start);

    for (size_t i = 0; i < layer.parameters.count(); i++) {
        Numbers u = random.normals(layer.parameters.buffers[i].size);
        check_slope(slope(layer.parameters.buffers[i].data, u, f), g.parameters[i], u, floor, what + ", d" + layer.parameters.name(i));
    }
    Numbers u = random.normals((int64_t)pass.x.size());
    check_slope(slope(pass.x.data(), u, f), g.dx, u, floor, what + ", dx");
    for (int s = 0; s < (int)pass.dmemory_from.size(); s++) {
        if (!pass.dmemory_from[s]) continue;
        Numbers dmemory(pass.dmemory_from[s], pass.dmemory_from[s] + layer.state.per_sequence), um = random.normals((int64_t)dmemory.size());
        check_slope(slope(const_cast<real*>(pass.memory_from[s]), um, f), dmemory, um, floor, what + format(", dmemory_from[%d]", s));
    }
}

static std::string lengths_text(const std::vector<int>& lengths) {
    std::string s = "T=";
    for (size_t i = 0; i < lengths.size(); i++) s += format("%s%d", i ? "," : "", lengths[i]);
    return s;
}

static std::vector<std::vector<int>> gradient_lengths(int K) {
    std::set<int> T = {1, 2, K - 1, K, K + 1, 3 * K + 5};
    std::vector<std::vector<int>> list;
    for (int t : T)
        if (t > 0) list.push_back({t});
    list.push_back({3, 0, 1, K + 1});
    return list;
}

static void gradient_case(const Variant& v) {
    Layer layer(v);
    for (const std::vector<int>& lengths : gradient_lengths(v.block)) {
        std::string what = lengths_text(lengths);
        Pass pass(layer, lengths, seed_of(what));
        check_gradients(layer, pass, what);
    }
}

// A memory to start from: what a pass over `length` other tokens left.
static Numbers memory_after(const Layer& layer, int length, uint64_t seed) {
    Pass before(layer, Batch({length}), seed);
    Buffer memory(layer.state.per_sequence);
    before.memory_to = {memory.data};
    Store saved = before.make_saved(layer);
    forward(layer, before, saved);
    check_that(memory.intact(), "forward wrote outside of memory_to");
    return memory.numbers();
}

// Some sequences start from a memory, others do not. With `through`, the loss also depends on the memory that each leaves, and its gradient is handed on.
static void memory_gradient_case(const Variant& v, bool through) {
    Layer layer(v);
    int K = v.block;
    int64_t size = layer.state.per_sequence;
    for (const std::vector<int>& lengths : std::vector<std::vector<int>>{{1}, {2, 1}, {K - 1, K + 1, 2}, {3, 0, 2 * K + 3, K, 1}}) {
        std::string what = lengths_text(lengths);
        int n = (int)lengths.size();
        Pass pass(layer, lengths, seed_of(what));
        Random random(n);
        std::vector<Numbers> from, dto;
        std::vector<Buffer> to, dfrom;
        for (int s = 0; s < n; s++) {
            from.push_back(memory_after(layer, (s + 1) * K + s % 3, s));
            dto.push_back(random.normals(size));
            to.emplace_back(size);
            dfrom.emplace_back(size);
        }
        for (int s = 0; s < n; s++) {
            bool fresh = n > 2 && s == n - 1;
            pass.memory_from.push_back(fresh ? nullptr : from[s].data());
            pass.memory_to.push_back(to[s].data);
            if (!through) continue;
            pass.dmemory_to.push_back(dto[s].data());
            pass.dmemory_from.push_back(fresh ? nullptr : dfrom[s].data);
        }
        check_gradients(layer, pass, what);
        for (int s = 0; s < n; s++) check_that(to[s].intact() && dfrom[s].intact(), "wrote outside of a memory");
    }
}

// --------------------------------------------------------------------------------------------------------------------------------------------------
// ragged/

static void ragged_case(const Variant& v) {
    Layer layer(v);
    int C = v.channels;
    for (const std::vector<int>& lengths : std::vector<std::vector<int>>{mixed_lengths(v.block), {0, 0, 2, 0}, {64, 65, 1, 0}}) {
        Pass all(layer, lengths, 11);
        Outcome packed = both(layer, all), alone;
        for (size_t i = 0; i < layer.parameters.count(); i++) alone.gradients.parameters.push_back(Numbers(layer.parameters.buffers[i].size));
        for (int s = 0; s < all.batch.sequences(); s++) {
            Pass one(layer, Batch({lengths[s]}), 0);
            auto part = [&](const Numbers& a) { return Numbers(a.begin() + (int64_t)all.batch.cu[s] * C, a.begin() + (int64_t)all.batch.cu[s + 1] * C); };
            one.x = part(all.x);
            one.residual = part(all.residual);
            one.dout = part(all.dout);
            one.first_row = s;  // the same dropout
            Outcome o = both(layer, one);
            alone.out.insert(alone.out.end(), o.out.begin(), o.out.end());
            alone.gradients.dx.insert(alone.gradients.dx.end(), o.gradients.dx.begin(), o.gradients.dx.end());
            for (size_t i = 0; i < layer.parameters.count(); i++)
                for (size_t k = 0; k < o.gradients.parameters[i].size(); k++) alone.gradients.parameters[i][k] += o.gradients.parameters[i][k];
        }
        std::string what = lengths_text(lengths);
        check(row_error(minus(packed.out, all.residual), minus(alone.out, all.residual), C), rounding(), what + ", out");
        compare_gradients(layer, packed.gradients, alone.gradients, rounding(), what);
    }
}

// --------------------------------------------------------------------------------------------------------------------------------------------------
// extend/: pages stand in memory in a random order, hold another layer's numbers before ours (offset) and behind, and are NaN until written; the page
// table has poison where no token needs a page yet.

struct PagedStates {
    const Layer& layer;
    int page_size, offset = 5, tail = 3, pages_each;
    int64_t page_numbers;
    std::vector<Buffer> fixed;
    std::unique_ptr<Buffer> pages;
    std::vector<std::vector<int>> tables;
    std::vector<int> order;
    std::vector<cpu::AttentionState> states;

    PagedStates(const Layer& l, const std::vector<int>& lengths, int size, uint64_t seed) : layer(l), page_size(size) {
        Random random(seed);
        int longest = 1, n = (int)lengths.size();
        for (int t : lengths) longest = std::max(longest, t);
        pages_each = l.state.per_token > 0 ? (longest + size - 1) / size : 0;
        page_numbers = offset + size * l.state.per_token + tail;
        pages = std::make_unique<Buffer>(n * pages_each * page_numbers);
        for (int i = 0; i < n * pages_each; i++) order.push_back(i);
        for (int i = (int)order.size() - 1; i > 0; i--) std::swap(order[i], order[random.below(i + 1)]);
        for (int s = 0; s < n; s++) {
            fixed.emplace_back(l.state.per_sequence, 0);
            tables.emplace_back(pages_each, INT_MIN);
            cpu::AttentionState state;
            state.fixed = fixed[s].data;
            state.page_size = size;
            state.rows = pages->data + offset;
            state.page_stride = page_numbers;
            state.per_token = l.state.per_token;
            states.push_back(state);
        }
        for (int s = 0; s < n; s++) states[s].page_table = tables[s].data();
    }
    void make_room(int s, int64_t tokens) {
        for (int64_t p = 0; p < pages_each && p * page_size < tokens; p++) tables[s][p] = order[s * pages_each + p];
    }
    // Nothing may have been written before and behind a page's rows, nor into rows that hold no token.
    void check_untouched() const {
        for (const Buffer& f : fixed) check_that(f.intact(), "extend wrote outside of the fixed state");
        for (size_t s = 0; s < states.size(); s++)
            for (int p = 0; p < pages_each; p++) {
                const real* page = pages->data + order[s * pages_each + p] * page_numbers;
                int64_t used = std::min<int64_t>(page_size, std::max<int64_t>(0, states[s].length - (int64_t)p * page_size)) * layer.state.per_token;
                bool ok = pages->intact();
                for (int64_t i = 0; i < page_numbers; i++)
                    if (i < offset || i >= offset + used) ok = ok && page[i] != page[i];
                check_that(ok, "extend wrote outside of its rows in a page");
            }
    }
};

// One call for the next q_len[k] tokens of sequence which[k]; their output goes into `out`.
static void extend(const Layer& layer, const Pass& all, PagedStates& paged, const std::vector<int>& which, const std::vector<int>& q_len, Numbers& out) {
    int C = layer.C();
    Batch batch(q_len);
    std::vector<cpu::AttentionState> states;
    Numbers x, residual;
    int64_t kv_tokens = 0;
    auto place = [&](int k, int t) { return (all.batch.cu[which[k]] + paged.states[which[k]].length + t) * C; };
    for (int k = 0; k < (int)which.size(); k++) {
        int64_t after = paged.states[which[k]].length + q_len[k], begin = place(k, 0), end = place(k, q_len[k]);
        paged.make_room(which[k], after);
        states.push_back(paged.states[which[k]]);
        kv_tokens += after;
        x.insert(x.end(), all.x.begin() + begin, all.x.begin() + end);
        residual.insert(residual.end(), all.residual.begin() + begin, all.residual.begin() + end);
    }
    Buffer scratch(layer.functions->scratch(layer.config, batch.tokens(), batch.sequences(), kv_tokens, false)), y(batch.tokens() * C);
    cpu::AttentionContext ctx{};
    ctx.config = &layer.config;
    ctx.num_seqs = batch.sequences();
    ctx.cu_seqlens = batch.cu.data();
    ctx.place = batch.place.data();
    ctx.scratch = {scratch.data, scratch.size};
    ctx.states = states.data();
    layer.functions->extend(ctx, layer.parameters.tensors, x.data(), residual.data(), y.data);
    check_that(scratch.intact() && y.intact(), "extend wrote outside of its scratch memory or out");
    for (int k = 0; k < (int)which.size(); k++) {
        std::copy(y.data + batch.cu[k] * C, y.data + batch.cu[k + 1] * C, out.begin() + place(k, 0));
        paged.states[which[k]].length += q_len[k];
    }
}

static void extend_to_end(const Layer& layer, const Pass& all, PagedStates& paged, const std::function<int()>& next, Numbers& out) {
    for (int round = 0;; round++) {
        std::vector<int> which, q_len;
        bool more = false;
        for (int s = 0; s < all.batch.sequences(); s++) {
            int rest = all.batch.lengths[s] - (int)paged.states[s].length, n = std::min(rest, next());
            more = more || rest > 0;
            if (round % 2 && n == 0) continue;  // every other call leaves out the sequences that get nothing, and turns the order round
            which.insert(round % 2 ? which.begin() : which.end(), s);
            q_len.insert(round % 2 ? q_len.begin() : q_len.end(), n);
        }
        if (!more) return;
        if (!which.empty()) extend(layer, all, paged, which, q_len, out);
    }
}

typedef void (*Extend)(const cpu::AttentionContext&, const Tensors&, const real*, const real*, real*);

static void extend_case(const Variant& v, Extend other_extend = nullptr) {
    Layer layer(v);
    cpu::Attention functions = *layer.functions;
    if (other_extend) {
        functions.extend = other_extend;
        functions.scratch = [](const AttentionConfig& a, int64_t N, int64_t num_seqs, int64_t kv_tokens, bool training) {  // room for any way to do it
            return cpu::attention(a.name).scratch(a, N + kv_tokens, num_seqs, N + kv_tokens, training);
        };
    }
    layer.functions = &functions;
    int K = v.block;
    Pass all(layer, mixed_lengths(K), 21);
    Store saved = all.make_saved(layer);
    Numbers expected = minus(forward(layer, all, saved, false), all.residual);
    struct {
        int chunk, page;
    } schedules[] = {{1, 16}, {2, 1}, {7, 64}, {K, 16}, {1 << 20, 64}, {1 << 20, 1}, {0, 1}, {0, 16}, {0, 64}};  // chunk 0: mixed
    for (auto [chunk, page] : schedules) {
        Random random(chunk + page);
        int sizes[] = {0, 1, 2, 3, 4, 7, K - 1, K, K + 1}, c = chunk;
        PagedStates paged(layer, all.batch.lengths, page, page + 1);
        Numbers out(all.x.size(), NOT_A_NUMBER);
        extend_to_end(
            layer, all, paged, [&] { return c ? c : sizes[random.below(9)]; }, out);
        check(row_error(minus(out, all.residual), expected, v.channels), forward_tolerance(), format("chunks of %d, pages of %d", chunk, page));
        paged.check_untouched();
    }
}

// MLA chooses a form of its attention by what it costs: here each is forced in turn, and all of them in one batch.
template <int form>
static void extend_as(const cpu::AttentionContext& ctx, const Tensors& parameters, const real* x, const real* residual, real* out) {
    cpu::mla_extend_as(ctx, parameters, x, residual, out, [](const AttentionConfig&, double n, double P) {
        const MlaForm forms[] = {MlaForm::UNABSORBED, MlaForm::ABSORBED, MlaForm::MERGED};
        return forms[form < 3 ? form : (int)(n + P) % 3];
    });
}

// --------------------------------------------------------------------------------------------------------------------------------------------------
// memory/: sequences of a long batch, read in passes. Sequence 1 has an empty pass in the middle; sequence 2 starts in the second pass.

static void memory_case(const Variant& v) {
    Layer layer(v);
    int K = v.block, C = v.channels, n = 4;
    int64_t size = layer.state.per_sequence;
    const std::vector<std::vector<int>> cuts = {{K + 2, 1, K - 1 + 2 * K}, {2, 0, 2 * K}, {0, K, 3}, {2 * K + 1, K - 1, 1}};
    std::vector<int> lengths;
    for (const auto& c : cuts) lengths.push_back(c[0] + c[1] + c[2]);
    Pass all(layer, lengths, 31);
    Store saved_all = all.make_saved(layer);
    Numbers expected = minus(forward(layer, all, saved_all), all.residual), out(all.x.size(), NOT_A_NUMBER);

    std::vector<Buffer> memory[2];
    for (int p = 0; p < 2; p++)
        for (int s = 0; s < n; s++) memory[p].emplace_back(size);
    std::vector<int> done(n, 0);
    auto read_pass = [&](int p, bool extending) {
        std::vector<int> now;
        for (int s = 0; s < n; s++) now.push_back(cuts[s][p]);
        Pass pass(layer, now, 0);
        auto offset = [&](int s) { return (int64_t)(all.batch.cu[s] + done[s]) * C; };
        for (int s = 0; s < n; s++) {
            std::copy_n(all.x.begin() + offset(s), now[s] * C, pass.x.begin() + pass.batch.cu[s] * C);
            std::copy_n(all.residual.begin() + offset(s), now[s] * C, pass.residual.begin() + pass.batch.cu[s] * C);
            pass.memory_from.push_back(done[s] ? memory[(p + 1) % 2][s].data : nullptr);
            pass.memory_to.push_back(p == 2 ? nullptr : memory[p][s].data);
        }
        if (p == 0) pass.memory_from.clear();  // no array at all: all are empty
        if (p == 2 && n % 2) pass.memory_to.clear();
        Numbers y;
        if (extending) {
            PagedStates paged(layer, now, 16, 3);
            for (int s = 0; s < n; s++) std::copy_n(memory[(p + 1) % 2][s].data, size, paged.fixed[s].data);
            for (int s = 0; s < n; s++) paged.states[s].length = done[s];
            Pass rest = all;
            y.assign(all.x.size(), NOT_A_NUMBER);
            extend_to_end(
                layer, rest, paged, [] { return 2; }, y);
            for (int s = 0; s < n; s++) std::copy_n(y.begin() + offset(s), now[s] * C, out.begin() + offset(s));
            return;
        }
        Store saved = pass.make_saved(layer);
        y = forward(layer, pass, saved);
        for (int s = 0; s < n; s++) {
            std::copy_n(y.begin() + pass.batch.cu[s] * C, now[s] * C, out.begin() + offset(s));
            if (p < 2) check_that(memory[p][s].intact(), "wrote outside of memory_to");
        }
    };
    auto advance = [&](int p) {
        for (int s = 0; s < n; s++) done[s] += cuts[s][p];
    };
    read_pass(0, false);
    advance(0);
    read_pass(1, false);
    advance(1);
    read_pass(2, false);
    check(row_error(minus(out, all.residual), expected, C), forward_tolerance(), "three passes against one");
    if (layer.state.per_token == 0) {
        read_pass(2, true);
        check(row_error(minus(out, all.residual), expected, C), forward_tolerance(), "two passes, then extend");
    }
}

// --------------------------------------------------------------------------------------------------------------------------------------------------
// threads/ and poison/

static void compare_outcomes(const Layer& layer, const Outcome& a, const Outcome& b, bool bits, const std::string& what) {
    if (!bits) {
        check(row_error(a.out, b.out, layer.C()), rounding(), what + ", out");
        compare_gradients(layer, a.gradients, b.gradients, rounding(), what);
        return;
    }
    check(different_bits(a.out, b.out), 0, what + ": numbers that differ in out");
    check(different_bits(a.gradients.dx, b.gradients.dx), 0, what + ": numbers that differ in dx");
    for (size_t i = 0; i < b.gradients.parameters.size(); i++)
        check(different_bits(a.gradients.parameters[i], b.gradients.parameters[i]), 0, what + ": numbers that differ in d" + layer.parameters.name(i));
}

static Numbers extended(const Layer& layer, const Pass& all) {
    PagedStates paged(layer, all.batch.lengths, 16, 1);
    Numbers out(all.x.size(), NOT_A_NUMBER);
    extend_to_end(
        layer, all, paged, [] { return 40; }, out);
    return out;
}

static void threads_case(const Variant& v) {
    Layer layer(v);
    Pass pass(layer, mixed_lengths(v.block), 41);
    Outcome one = both(layer, pass);
    Numbers extended_one = extended(layer, pass);
    for (int threads : {2, 3, 5}) {
        set_threads(threads);
        compare_outcomes(layer, both(layer, pass), one, own_matmul, format("%d threads", threads));
        Numbers e = extended(layer, pass);
        if (own_matmul)
            check(different_bits(e, extended_one), 0, format("%d threads: numbers that differ in extend", threads));
        else
            check(row_error(e, extended_one, layer.C()), rounding(), format("%d threads, extend", threads));
        set_threads(1);
    }
}

static void poison_case(const Variant& v) {
    Layer layer(v);
    Pass pass(layer, mixed_lengths(v.block), 51);
    Outcome nan = both(layer, pass);
    pass.fill = 0;
    compare_outcomes(layer, both(layer, pass), nan, true, "zeros before instead of NaN");
    pass.fill = (real)1e30;
    compare_outcomes(layer, both(layer, pass), nan, true, "1e30 before instead of NaN");
    pass.fill = NOT_A_NUMBER;
    pass.spare = 13;
    compare_outcomes(layer, both(layer, pass), nan, true, "more memory than needed");
    pass.in_place = true;
    compare_outcomes(layer, both(layer, pass), nan, true, "out on top of the residual");
}

// --------------------------------------------------------------------------------------------------------------------------------------------------
// core/: the softmax core against the double loop. q, k, v stand in rows with gaps, which are NaN; d_qk and d_v differ.

struct Core {
    cpu::SoftmaxAttention a{};
    std::vector<int> cu_q{0}, cu_k{0}, drop_seq, drop_pos;
    Numbers q, k, v;
    Core(const std::vector<std::pair<int, int>>& q_k_lengths, int heads, int kv_heads, int d_qk, int d_v, uint64_t seed) {
        for (auto [n_q, n_k] : q_k_lengths) {
            cu_q.push_back(cu_q.back() + n_q);
            cu_k.push_back(cu_k.back() + n_k);
        }
        a.heads = heads;
        a.kv_heads = kv_heads;
        a.d_qk = d_qk;
        a.d_v = d_v;
        a.scale = (real)(1 / std::sqrt((double)d_qk));
        a.num_seqs = (int)q_k_lengths.size();
        a.q_stride = heads * d_qk + 3;
        a.k_head = d_qk + 1;
        a.k_stride = kv_heads * a.k_head + 2;
        a.v_head = d_v + 2;
        a.v_stride = kv_heads * a.v_head;
        Random random(seed);
        auto rows = [&](int n, int64_t stride, int count, int64_t head, int d) {
            Numbers x(n * stride + 64, NOT_A_NUMBER);
            for (int i = 0; i < n; i++)
                for (int h = 0; h < count; h++)
                    for (int c = 0; c < d; c++) x[i * stride + h * head + c] = (real)(1.5 * random.normal());
            return x;
        };
        q = rows(cu_q.back(), a.q_stride, heads, d_qk, d_qk);
        k = rows(cu_k.back(), a.k_stride, kv_heads, a.k_head, d_qk);
        v = rows(cu_k.back(), a.v_stride, kv_heads, a.v_head, d_v);
    }
    const cpu::SoftmaxAttention& core() {
        a.cu_q = cu_q.data();
        a.cu_k = cu_k.data();
        a.q = q.data();
        a.k = k.data();
        a.v = v.data();
        if (!drop_seq.empty()) {
            a.drop_seq = drop_seq.data();
            a.drop_pos = drop_pos.data();
        }
        return a;
    }
    int64_t o_stride() const { return a.heads * a.d_v + 1; }
    void forward(Numbers& o, Numbers& lse) {
        o.assign(cu_q.back() * o_stride(), NOT_A_NUMBER);
        lse.assign((size_t)cu_q.back() * a.heads, NOT_A_NUMBER);
        Buffer scratch(cpu::softmax_forward_scratch(cu_k.back(), a.kv_heads, a.d_qk));
        cpu::softmax_forward(core(), o.data(), o_stride(), lse.data(), {scratch.data, scratch.size});
        check_that(scratch.intact(), "softmax_forward wrote outside of its scratch memory");
    }
    // The definition, with the dropout of the specification.
    void plain(Numbers& o, Numbers& lse) {
        core();
        o.assign(cu_q.back() * o_stride(), NOT_A_NUMBER);
        lse.assign((size_t)cu_q.back() * a.heads, NOT_A_NUMBER);
        for (int s = 0; s < a.num_seqs; s++)
            for (int i = 0; i < a.q_len(s); i++)
                for (int h = 0; h < a.heads; h++) {
                    int at = i + (a.q_at ? a.q_at[s] : a.k_len(s) - a.q_len(s)), g = h / (a.heads / a.kv_heads);
                    int64_t row = cu_q[s] + i;
                    std::vector<double> score(a.k_len(s), -INFINITY), sum(a.d_v);
                    double m = -INFINITY, l = 0;
                    for (int j = 0; j < a.k_len(s); j++) {
                        if (j > at || (a.window && j <= at - a.window)) continue;
                        score[j] = 0;
                        for (int c = 0; c < a.d_qk; c++)
                            score[j] += (double)q[row * a.q_stride + h * a.d_qk + c] * k[(cu_k[s] + j) * a.k_stride + g * a.k_head + c];
                        score[j] *= a.scale;
                        m = std::max(m, score[j]);
                    }
                    for (int j = 0; j < a.k_len(s); j++) {
                        if (score[j] == -INFINITY) continue;
                        double p = std::exp(score[j] - m), z = 1;
                        l += p;
                        if (a.dropout.p > 0) {
                            int64_t b = a.dropout.first_row + (a.drop_seq ? a.drop_seq[s] : s);
                            int start = a.drop_pos ? a.drop_pos[s] : 0;
                            Philox r = philox(a.dropout.seed, (start + j) >> 2, start + at, (uint32_t)(b * a.heads + h), a.dropout.counter);
                            z = r.word[(start + j) & 3] >= (uint32_t)std::floor(a.dropout.p * 4294967296.0) ? 1 / (1 - a.dropout.p) : 0;
                        }
                        for (int c = 0; c < a.d_v; c++) sum[c] += p * z * v[(cu_k[s] + j) * a.v_stride + g * a.v_head + c];
                    }
                    for (int c = 0; c < a.d_v; c++) o[row * o_stride() + h * a.d_v + c] = (real)(l > 0 ? sum[c] / l : 0);
                    lse[row * a.heads + h] = (real)(l > 0 ? m + std::log(l) : -INFINITY);
                }
    }
    void compare(double tolerance, const std::string& what) {
        Numbers o, lse, o_plain, lse_plain;
        forward(o, lse);
        plain(o_plain, lse_plain);
        double worst_o = 0, worst_lse = 0;
        for (int64_t n = 0; n < cu_q.back(); n++)
            for (int h = 0; h < a.heads; h++) {
                double difference = 0, size = 0;
                for (int c = 0; c < a.d_v; c++) {
                    int64_t at = n * o_stride() + h * a.d_v + c;
                    difference += ((double)o[at] - o_plain[at]) * ((double)o[at] - o_plain[at]);
                    size += (double)o_plain[at] * o_plain[at];
                }
                double e = std::sqrt(difference) / (std::sqrt(size) + 1e-2), x = lse[n * a.heads + h], y = lse_plain[n * a.heads + h];
                double el = x == y ? 0 : std::fabs(x - y) / (1 + std::fabs(y));
                if (!(e <= worst_o)) worst_o = e;
                if (!(el <= worst_lse)) worst_lse = el;
            }
        check(worst_o, tolerance, what + ", o");
        check(worst_lse, tolerance, what + ", lse");
        for (int64_t n = 0; n < cu_q.back(); n++)
            check_that(o[n * o_stride() + o_stride() - 1] != o[n * o_stride() + o_stride() - 1], what + ": wrote between rows");
    }
};

static void core_forward_case() {
    double tolerance = is_double ? 1e-12 : 2e-5;
    for (int window : {0, 1, 5, 70})
        for (auto [heads, kv_heads, d_qk, d_v] : {std::array<int, 4>{4, 2, 5, 3}, {3, 3, 8, 33}, {6, 1, 40, 16}}) {
            Core c({{1, 1}, {0, 0}, {2, 7}, {65, 65}, {3, 200}, {4, 130}, {0, 9}, {64, 64}, {70, 133}, {1, 64}}, heads, kv_heads, d_qk, d_v, window + heads);
            c.a.window = window;
            c.compare(tolerance, format("window %d, %d heads on %d, d_qk %d, d_v %d", window, heads, kv_heads, d_qk, d_v));
            c.a.dropout = {0.25, 99, 7, 3};
            c.compare(tolerance, format("the same with dropout, window %d", window));
        }
    // Queries that stand behind the end of the keys or before their beginning; some see nothing: o = 0, lse = −inf.
    std::vector<int> q_at = {0, 5, 80, -2, 0};
    Core c({{4, 9}, {70, 3}, {3, 66}, {5, 4}, {2, 0}}, 2, 1, 4, 6, 5);
    c.a.q_at = q_at.data();
    c.compare(tolerance, "queries anywhere");
    c.a.window = 8;
    c.compare(tolerance, "queries anywhere, window 8");
    Core before({{9, 4}, {70, 2}, {3, 0}, {66, 65}}, 2, 2, 4, 6, 6);
    before.compare(tolerance, "more queries than keys");
}

static void core_extreme_case() {
    for (int rows : {2, 9, 67}) {  // few queries, and tiles
        Core big({{rows, rows}}, 2, 1, 6, 4, rows);
        for (real& x : big.q) x *= 100;
        Numbers o, lse;
        big.compare(is_double ? 1e-10 : 1e-3, format("scores times 100, %d rows", rows));

        // Every score of the first keys is about −5e5: as the only ones they count as any other; beside a usual one they vanish.
        Core low({{rows, rows}}, 1, 1, 1, 4, rows + 1);
        for (int i = 0; i < rows; i++) {
            low.q[i * low.a.q_stride] = 1;
            low.k[i * low.a.k_stride] = i < rows / 2 ? (real)-5e5 : (real)0.5;
        }
        low.a.scale = 1;
        low.compare(is_double ? 1e-12 : 1e-5, format("keys at -5e5, %d rows", rows));
    }
}

static void core_pages_case() {
    for (int n_q : {1, 3, 4, 40})
        for (int page : {1, 16, 64}) {
            Core c({{n_q, 131}, {0, 5}, {n_q, n_q + 600}}, 4, 2, 6, 5, n_q);
            c.a.window = n_q == 40 ? 50 : 0;
            Numbers o, lse, o_pages, lse_pages;
            c.forward(o, lse);
            int64_t row = c.a.k_stride + c.a.v_stride;
            std::vector<cpu::AttentionState> states(3);
            int64_t stride = 1 + page * row, most = (n_q + 600) / page + 2;
            Numbers pages(3 * most * stride, NOT_A_NUMBER);
            std::vector<std::vector<int>> tables(3);
            for (int s = 0; s < 3; s++) {
                for (int p = 0; p * page < c.a.k_len(s); p++) tables[s].push_back((int)(3 * (most - 1 - p) + s));
                tables[s].push_back(INT_MIN);
                states[s].rows = pages.data() + 1;
                states[s].page_table = tables[s].data();
                states[s].page_stride = stride;
                states[s].page_size = page;
                states[s].per_token = row;
                for (int j = 0; j < c.a.k_len(s); j++) {
                    std::copy_n(c.k.begin() + (c.cu_k[s] + j) * c.a.k_stride, c.a.k_stride, states[s].row(j));
                    std::copy_n(c.v.begin() + (c.cu_k[s] + j) * c.a.v_stride, c.a.v_stride, states[s].row(j) + c.a.k_stride);
                }
            }
            c.a.states = states.data();
            c.a.v_offset = c.a.k_stride;
            c.forward(o_pages, lse_pages);
            // Few queries go through softmax_decode, in another order of summation; more of them have the same bits.
            bool few = cpu::few_queries(n_q);
            double n = 0, difference = 0, norm = 0;
            auto compare = [&](real x, real y) {
                n += !(x == y);
                if (x == y) return;  // -inf
                difference += ((double)x - y) * ((double)x - y);
                norm += (double)x * x;
            };
            for (size_t i = 0; i < o.size(); i++)
                if ((int64_t)(i + 1) % c.o_stride()) compare(o[i], o_pages[i]);
            for (size_t i = 0; i < lse.size(); i++) compare(lse[i], lse_pages[i]);
            if (few)
                check(difference > 0 || n > 0 ? std::sqrt(difference / norm) : 0, rounding(), format("%d queries, pages of %d", n_q, page));
            else
                check(n, 0, format("%d queries, pages of %d: numbers that differ", n_q, page));
        }
}

// Backward by differences where no layer takes it: fewer queries than keys, d_qk ≠ d_v with gaps, segments that say where they stand.
static void core_gradient_case() {
    for (int variant = 0; variant < 4; variant++) {
        Core c({{3, 5}, {0, 2}, {66, 130}, {65, 65}, {1, 1}, {4, 2}}, 4, 2, 5, 3, variant);
        if (variant & 1) c.a.window = 9;
        if (variant & 2) {
            c.a.dropout = {0.3, 4, 2, 1};
            c.drop_seq = {0, 0, 0, 1, 1, 2};
            c.drop_pos = {0, 3, 5, 0, 65, 0};
        }
        Random random(variant);
        int64_t rows = c.cu_q.back(), od = c.o_stride();
        Numbers d_o = random.normals(rows * od), o, lse;
        auto f = [&] {
            Numbers y, l;
            c.forward(y, l);
            double sum = 0;
            for (int64_t n = 0; n < rows; n++)
                for (int64_t i = 0; i < od - 1; i++) sum += (double)d_o[n * od + i] * y[n * od + i];
            return sum;
        };
        c.forward(o, lse);
        Buffer dq(c.q.size()), dk(c.k.size()), dv(c.v.size());
        cpu::SoftmaxGradients g{};
        g.o = o.data();
        g.lse = lse.data();
        g.d_o = d_o.data();
        g.o_stride = g.do_stride = od;
        g.dq = dq.data;
        g.dk = dk.data;
        g.dv = dv.data;
        g.dq_stride = c.a.q_stride;
        g.dk_stride = c.a.k_stride;
        g.dk_head = c.a.k_head;
        g.dv_stride = c.a.v_stride;
        g.dv_head = c.a.v_head;
        cpu::softmax_backward(c.core(), g);
        struct {
            const char* name;
            Numbers* p;
            Buffer* d;
        } tensors[] = {{"dq", &c.q, &dq}, {"dk", &c.k, &dk}, {"dv", &c.v, &dv}};
        for (auto& t : tensors) {
            Numbers u = random.normals((int64_t)t.p->size()), gradient = t.d->numbers();
            for (size_t i = 0; i < u.size(); i++)
                if ((*t.p)[i] != (*t.p)[i]) {  // a gap: nothing may have been written
                    check_that(gradient[i] != gradient[i], std::string(t.name) + " written between rows");
                    u[i] = gradient[i] = 0;
                }
            check_slope(slope(t.p->data(), u, f), gradient, u, 1e-3, format("%s, window %d, dropout %g", t.name, c.a.window, c.a.dropout.p));
            check_that(t.d->intact(), std::string(t.name) + " written outside");
        }
    }
}

// --------------------------------------------------------------------------------------------------------------------------------------------------
// helpers/: backward functions of gpt2/cpu/layers.h by differences, each alone

static void helpers_gradient_case() {
    Random random(1);
    int64_t N = 7, C = 5, OC = 70;
    auto weighted = [](const Numbers& w, const Numbers& y) {
        double sum = 0;
        for (size_t i = 0; i < y.size(); i++) sum += (double)w[i] * y[i];
        return sum;
    };
    auto slopes = [&](const char* what, Numbers& p, const Numbers& gradient, const std::function<double()>& f) {
        Numbers u = random.normals((int64_t)p.size());
        check_slope(slope(p.data(), u, f), gradient, u, 1e-3, what);
    };
    {
        Numbers x = random.normals(N * C), w = random.normals(OC * C), b = random.normals(OC), dout = random.normals(N * OC);
        for (bool accumulate : {false, true}) {
            Numbers dx0 = random.normals(N * C), dw0 = random.normals(OC * C), db0 = random.normals(OC), dx = accumulate ? dx0 : Numbers(N * C, NOT_A_NUMBER),
                    dw = dw0, db = db0;
            cpu::linear_backward(dx.data(), accumulate, dw.data(), db.data(), dout.data(), x.data(), w.data(), N, C, OC);
            auto f = [&] {
                Numbers y(N * OC, NOT_A_NUMBER);
                cpu::linear_forward(y.data(), x.data(), w.data(), b.data(), N, C, OC);
                return weighted(dout, y);
            };
            slopes("linear, dx", x, accumulate ? minus(dx, dx0) : dx, f);
            slopes("linear, dw", w, minus(dw, dw0), f);
            slopes("linear, db", b, minus(db, db0), f);
        }
    }
    for (bool in_place : {false, true}) {
        C = 67;
        Numbers u = random.normals(N * C), gain = random.normals(C), dy = random.normals(N * C), rstd(N), y(N * C), du(N * C, NOT_A_NUMBER),
                dgain0 = random.normals(C), dgain = dgain0;
        cpu::rmsnorm_forward(y.data(), C, rstd.data(), u.data(), C, gain.data(), N, C);
        Numbers dout = dy;
        cpu::rmsnorm_backward(in_place ? dy.data() : du.data(), C, dgain.data(), dy.data(), C, u.data(), C, rstd.data(), gain.data(), N, C);
        auto f = [&] {
            Numbers z(N * C, NOT_A_NUMBER);
            cpu::rmsnorm_forward(z.data(), C, nullptr, u.data(), C, gain.data(), N, C);
            return weighted(dout, z);
        };
        slopes("rmsnorm, du", u, in_place ? dy : du, f);
        slopes("rmsnorm, dgain", gain, minus(dgain, dgain0), f);
    }
    {
        std::vector<int> position = {0, 3, 1, cpu::ROPE_KEPT - 1, cpu::ROPE_KEPT, 2, cpu::ROPE_KEPT + 123456};
        Numbers x = random.normals(N * 12), dy = random.normals(N * 12), dx(N * 12, NOT_A_NUMBER);
        cpu::rope(dx.data(), 12, dy.data(), 12, N, 2, 6, position.data(), -1);
        auto f = [&] {
            Numbers y(N * 12, NOT_A_NUMBER);
            cpu::rope(y.data(), 12, x.data(), 12, N, 2, 6, position.data(), 1);
            return weighted(dy, y);
        };
        slopes("rope, dx", x, dx, f);
        Numbers y(N * 12);
        cpu::rope(y.data(), 12, x.data(), 12, N, 2, 6, position.data(), 1);
        double worst = 0;
        for (int64_t n = 0; n < N; n++)
            for (int i = 0; i < 12; i += 2) {  // as complex numbers: y = x·e^{i·position·θ}
                double angle = position[n] * std::pow(10000.0, -(double)(i % 6) / 6), a = x[n * 12 + i], b = x[n * 12 + i + 1];
                worst = std::max({worst, std::fabs(y[n * 12 + i] - (a * std::cos(angle) - b * std::sin(angle))),
                                  std::fabs(y[n * 12 + i + 1] - (a * std::sin(angle) + b * std::cos(angle)))});
            }
        check(worst, 1e-12, "rope against its definition");
    }
}

// --------------------------------------------------------------------------------------------------------------------------------------------------
// dropout/

static void philox_case() {
    Philox r = philox(0, 0, 0, 0, 0);
    check_that(r.word[0] == 0x6627e8d5 && r.word[1] == 0xe169c58d && r.word[2] == 0xbc57ac4c && r.word[3] == 0x9b00dbd8, "philox: key 0, counter 0");
}

static void dropout_mask_case() {
    for (double p : {0.0, 0.1, 0.5, 0.9}) {
        Core c({{40, 200}, {200, 200}}, 3, 1, 1, 1, 1);
        c.a.dropout = {p, 12345, 6, 10};
        const cpu::SoftmaxAttention& a = c.core();
        Numbers z(200);
        double dropped = 0, n = 0, both_heads = 0;
        for (int i = 0; i < 200; i++) {
            Numbers before;
            for (int h = 0; h < 3; h++) {
                cpu::dropout_row(a, 1, h, i, 0, 200, z.data());
                for (int j = 0; j < 200; j++) {
                    dropped += z[j] == 0;
                    n++;
                    if (h) both_heads += z[j] == 0 && before[j] == 0;
                    check_that(z[j] == 0 || std::fabs(z[j] * (1 - p) - 1) < 1e-6, "a kept weight is not 1/(1-p)");
                }
                before = z;
                Numbers piece(50);  // from any column on, the same
                cpu::dropout_row(a, 1, h, i, 77, 50, piece.data());
                for (int j = 0; j < 50; j++) check_that(piece[j] == z[77 + j], "a row's mask depends on where the tile starts");
            }
        }
        double spread = std::sqrt(std::max(p * (1 - p), 1e-12) / n);
        check(std::fabs(dropped / n - p) / spread, 4, format("p %g: standard deviations from it", p));
        if (p > 0) check(std::fabs(both_heads / (n * 2 / 3) - p * p) / std::sqrt(p * p * (1 - p * p) / (n * 2 / 3)), 4, format("p %g: two heads at once", p));
    }
}

// --------------------------------------------------------------------------------------------------------------------------------------------------
// same/ and control/

static void take_parameters(Layer& to, const Layer& from) {
    for (size_t i = 0; i < to.parameters.count(); i++) {
        int k = from.parameters.tensors.find(to.parameters.name(i));
        if (k < 0) continue;
        assert(from.parameters.buffers[k].size == to.parameters.buffers[i].size);
        std::copy_n(from.parameters.buffers[k].data, to.parameters.buffers[i].size, to.parameters.buffers[i].data);
    }
}

// The tensors that both have, after a pass over the same numbers with the weights of `a`.
static void same_case(const Variant& va, const Variant& vb, bool bits = false) {
    Layer a(va), b(vb);
    take_parameters(b, a);
    Pass pass(a, mixed_lengths(va.block), 61);
    Outcome oa = both(a, pass), ob = both(b, pass);
    auto error = [&](const Numbers& x, const Numbers& y, int64_t width) { return bits ? different_bits(x, y) : row_error(x, y, width); };
    double tolerance = bits ? 0 : rounding();
    check(error(minus(ob.out, pass.residual), minus(oa.out, pass.residual), a.C()), tolerance, "out");
    check(error(ob.gradients.dx, oa.gradients.dx, a.C()), tolerance, "dx");
    int shared = 0;
    for (size_t i = 0; i < a.parameters.count(); i++) {
        int k = b.parameters.tensors.find(a.parameters.name(i));
        if (k < 0) continue;
        shared++;
        check(error(ob.gradients.parameters[k], oa.gradients.parameters[i], (int64_t)oa.gradients.parameters[i].size()), tolerance,
              std::string("d") + a.parameters.name(i));
    }
    check_that(shared > 3, "too few parameters in common");
}

// Infini whose segment holds the whole sequence is causal attention: the gate gets no gradient, and a gated first segment is something else.
static void infini_is_causal_case(const char* update) {
    Variant causal = {"causal:kv-heads=2", "rope", 16, 4, 20}, infini = causal;
    std::string s = format("infini:kv-heads=2:segment=200:memory-update=%s", update);
    infini.attention = s.c_str();
    same_case(causal, infini);
    Layer layer(infini);
    Pass pass(layer, mixed_lengths(20), 61);
    Outcome o = both(layer, pass);
    for (size_t i = 0; i < layer.parameters.count(); i++)
        if (std::string(layer.parameters.name(i)).find("beta") != std::string::npos) check(norm(o.gradients.parameters[i]), 0, "gradient of beta");
}

// Lightning's two schemes give the same bits, so that `auto` may choose by the number of threads.
static void lightning_schemes_case(const char* decay) {
    std::string names[2];
    for (int i = 0; i < 2; i++) names[i] = format("lightning:decay=%s:scheme=%s", decay, i ? "parallel" : "sequential");
    Variant one = {names[0].c_str(), "rope", 20, 4, cpu::KT}, other = one;
    other.attention = names[1].c_str();
    same_case(one, other, true);
}

static double outputs_differ(const Variant& va, const Variant& vb, const std::function<void(Layer&)>& change = nullptr) {
    Layer a(va), b(vb);
    take_parameters(b, a);
    if (change) change(b);
    Pass pass(a, mixed_lengths(va.block), 61);
    Store sa = pass.make_saved(a), sb = pass.make_saved(b);
    return row_error(minus(forward(b, pass, sb), pass.residual), minus(forward(a, pass, sa), pass.residual), a.C());
}

static void check_differ(double difference, double tolerance, const std::string& what) {
    check_that(difference >= 10 * tolerance, format("%s: should differ, but by only %.3g", what.c_str(), difference));
}

static void control_case() {
    Variant causal = {"causal", "rope", 16, 4, 20}, window = causal, none = causal, dropped = causal;
    window.attention = "causal:window=19";
    none.positions = "none";
    dropped.dropout = 0.01;
    check(outputs_differ(causal, causal), 0, "the same layer twice");
    check_differ(outputs_differ(causal, window), forward_tolerance(), "a window one shorter than the sequence");
    check_differ(outputs_differ(causal, none), forward_tolerance(), "no positions");
    check_differ(outputs_differ(causal, dropped), forward_tolerance(), "dropout of 1 %");
    for (const char* tensor : {"wqkv", "bqkv", "wo", "bo"}) {
        double d = outputs_differ(causal, causal, [&](Layer& l) {
            int i = l.parameters.tensors.find(tensor);
            l.parameters.buffers[i].data[1] *= (real)1.3;
        });
        check_differ(d, forward_tolerance(), format("one number of %s changed", tensor));
    }
    // A scale of 1/√(hs+1) instead of 1/√hs, made by shrinking the queries' weights.
    double scale = outputs_differ(causal, causal, [&](Layer& l) {
        for (int i : {0, 1}) {
            Buffer& w = l.parameters.buffers[i];
            for (int64_t k = 0; k < w.size / 3; k++) w.data[k] *= (real)std::sqrt(4.0 / 5);
        }
    });
    check_differ(scale, forward_tolerance(), "another scale");
    check_that(!(row_error({NOT_A_NUMBER, 1}, {1, 1}, 2) <= 1e9) && !(row_error({1, 1}, {1, NOT_A_NUMBER}, 2) <= 1e9), "NaN passes for a small error");
    check_that(different_bits({NOT_A_NUMBER}, {NOT_A_NUMBER}) == 1, "NaN passes for equal bits");
    Buffer overrun(5);
    overrun.data[5] = 1;
    check_that(!overrun.intact(), "a guard word was overwritten unnoticed");
}

static void control_infini_case() {
    Variant pass = {"infini:segment=5", "rope", 16, 4, 5}, other = pass;
    for (const char* s :
         {"infini:segment=5:first-segment=gated", "infini:segment=5:memory-update=delta", "infini:segment=5:memory-init=zero", "infini:segment=6"}) {
        other.attention = s;
        check_differ(outputs_differ(pass, other), forward_tolerance(), s);
    }
}

static void control_lightning_case() {
    Variant minimax = {"lightning", "none", 16, 4, 20, 0, 1, 3}, other = minimax;
    for (const char* s : {"lightning:decay=fla", "lightning:decay=none"}) {
        other.attention = s;
        check_differ(outputs_differ(minimax, other), forward_tolerance(), s);
    }
    other = minimax;
    other.layer = 0;
    check_differ(outputs_differ(minimax, other), forward_tolerance(), "another network layer's decay");
}

// The gradient check notices a gradient that is off by one part in 10,000, and one with one element forgotten.
static void control_gradient_case() {
    Random random(3);
    Numbers g = random.normals(500), u = random.normals(500), wrong = g;
    double right = 0;
    for (int i = 0; i < 500; i++) right += (double)g[i] * u[i];
    Results before = results;
    check_slope(right, g, u, 1e-3, "right");
    int ok = results.failures;
    for (real& x : wrong) x *= (real)1.0001;
    bool stop = first_failure;
    first_failure = false;
    check_slope(right, wrong, u, 1e-3, "off");
    wrong = g;
    wrong[7] = 0;
    check_slope(right, wrong, u, 1e-3, "forgotten");
    wrong[7] = NOT_A_NUMBER;
    check_slope(right, wrong, u, 1e-3, "NaN");
    first_failure = stop;
    int found = results.failures - ok;
    results = before;
    check_that(ok == before.failures && found == 3, "a wrong gradient was not noticed");
}

// --------------------------------------------------------------------------------------------------------------------------------------------------
// The table of variants: options, positions, channels, heads, block. Every check above runs on all of them.

static const std::vector<Variant>& variants() {
    constexpr int TILE = cpu::KT, CHUNK = 64;  // CHUNK: LIGHTNING_CHUNK
    static const std::vector<Variant> list = {
        {"causal", "learned", 12, 3, TILE},
        {"causal", "rope", 16, 4, TILE},
        {"causal", "none", 15, 3, TILE},
        {"causal:kv-heads=1", "rope", 16, 4, TILE},
        {"causal:kv-heads=2", "none", 16, 4, TILE},
        {"causal:kv-heads=3:window=70", "rope", 36, 6, TILE},
        {"causal:window=1", "rope", 8, 2, TILE},
        {"causal:window=7:kv-heads=2", "rope", 16, 4, TILE},
        {"causal:window=64", "learned", 5, 1, TILE},
        {"causal:window=100000", "none", 8, 2, TILE},
        {"causal:kv-heads=1", "rope", 80, 2, TILE},  // wide heads: the vectorised products
        {"causal", "learned", 12, 3, TILE, 0.3},
        {"causal:window=9:kv-heads=2", "rope", 16, 4, TILE, 0.1},

        {"infini:segment=4", "rope", 12, 3, 4},
        {"infini:segment=5:kv-heads=2", "none", 16, 4, 5},
        {"infini:segment=7:kv-heads=1", "learned", 15, 3, 7},
        {"infini:segment=1", "rope", 8, 2, 1},
        {"infini:segment=1:memory-update=delta:first-segment=gated", "rope", 8, 2, 1},
        {"infini:segment=4:memory-update=delta", "rope", 12, 3, 4},
        {"infini:segment=5:memory-update=delta:kv-heads=2:memory-init=zero", "rope", 16, 4, 5},
        {"infini:segment=4:memory-init=zero", "none", 8, 2, 4},
        {"infini:segment=4:memory-init=zero:first-segment=gated", "rope", 8, 2, 4},
        {"infini:segment=6:first-segment=gated", "rope", 8, 2, 6},
        {"infini:segment=4:memory-update=delta:first-segment=gated", "rope", 8, 2, 4},
        {"infini:segment=4:memory-update=delta:memory-init=zero:first-segment=gated", "rope", 8, 1, 4},
        {"infini:segment=70:kv-heads=2", "rope", 16, 4, 70},
        {"infini:segment=70:memory-update=delta", "rope", 12, 2, 70},
        {"infini:segment=5:kv-heads=1:memory-update=delta", "rope", 80, 2, 5},
        {"infini:segment=5:kv-heads=2", "rope", 16, 4, 5, 0.3},
        {"infini:segment=70:memory-update=delta", "learned", 12, 3, 70, 0.1},

        {"lightning", "rope", 12, 3, CHUNK},
        {"lightning", "none", 16, 4, CHUNK, 0, 1, 3},
        {"lightning", "learned", 15, 3, CHUNK, 0, 1, 2},
        {"lightning:scheme=sequential", "rope", 16, 4, CHUNK},
        {"lightning:scheme=parallel", "rope", 16, 4, CHUNK},
        {"lightning:decay=fla:scheme=sequential", "rope", 20, 4, CHUNK},
        {"lightning:decay=fla:scheme=parallel", "none", 12, 3, CHUNK, 0, 1, 3},
        {"lightning:decay=none:scheme=parallel", "rope", 8, 1, CHUNK},
        {"lightning:decay=none:scheme=sequential", "rope", 5, 1, CHUNK},
        {"lightning:scheme=parallel", "rope", 80, 2, CHUNK},
        {"lightning", "rope", 12, 3, CHUNK, 0.3},

        {"mla:q-lora-rank=0:kv-lora-rank=6:qk-nope-dim=4:qk-rope-dim=2:v-dim=4", "rope", 12, 3, TILE},
        {"mla:q-lora-rank=10:kv-lora-rank=6:qk-nope-dim=4:qk-rope-dim=2:v-dim=4", "rope", 12, 3, TILE},
        {"mla:q-lora-rank=0:kv-lora-rank=6:qk-nope-dim=4:qk-rope-dim=0:v-dim=5", "none", 8, 2, TILE},
        {"mla:q-lora-rank=0:kv-lora-rank=7:qk-nope-dim=0:qk-rope-dim=4:v-dim=3", "learned", 8, 2, TILE},
        {"mla:q-lora-rank=9:kv-lora-rank=3:qk-nope-dim=0:qk-rope-dim=4:v-dim=6", "rope", 10, 5, TILE},
        {"mla:q-lora-rank=5:kv-lora-rank=40:qk-nope-dim=4:qk-rope-dim=2:v-dim=4", "rope", 12, 3, TILE},
        {"mla:kv-lora-rank=2:qk-nope-dim=6:qk-rope-dim=4:v-dim=8", "rope", 12, 3, TILE},
        {"mla:q-lora-rank=24:kv-lora-rank=33:qk-nope-dim=34:qk-rope-dim=6:v-dim=40", "rope", 24, 2, TILE},
        {"mla", "rope", 24, 3, TILE},
        {"mla:q-lora-rank=8:kv-lora-rank=6:qk-nope-dim=3:qk-rope-dim=4:v-dim=4", "rope", 12, 3, TILE, 0.3},
    };
    return list;
}

// Every option of a layer must take two values at least among the variants, and every choice must appear: a new option without a test fails here.
static void options_case(const AttentionDescription& d) {
    std::map<std::string, std::set<double>> seen;
    std::set<int> positions;
    bool dropout = false;
    int count = 0;
    for (const Variant& v : variants()) {
        if (v.layer_name() != d.name) continue;
        AttentionConfig a = Layer::resolved(v);
        count++;
        for (const auto& o : a.options) seen[o.first].insert(o.second);
        positions.insert((int)a.positions);
        dropout = dropout || v.dropout > 0;
    }
    check_that(count > 0, format("no variant of %s is tested", d.name));
    check_that(positions.size() == 3 && dropout, format("%s: no variant has learned, or rope, or no positions, or dropout; one each is needed", d.name));
    for (const AttentionOption& o : d.options) {
        if (!strcmp(o.name, "gate-lr")) continue;  // the optimiser's
        size_t need = o.choices.empty() ? 2 : o.choices.size();
        check_that(seen[o.name].size() >= need, format("%s: only %zu values of %s are tested", d.name, seen[o.name].size(), o.name));
    }
}

// --------------------------------------------------------------------------------------------------------------------------------------------------

// --------------------------------------------------------------------------------------------------------------------------------------------------
// Matrix products, the built-in one and whichever matmul() takes, against three loops

static void matmul_case(cpu::Transpose ta, cpu::Transpose tb) {
    const int shapes[][3] = {{1, 1, 1}, {3, 5, 7}, {6, 64, 16}, {7, 67, 133}, {13, 67, 300}, {70, 130, 257}, {129, 259, 33}, {5, 4, 0}, {40, 300, 600}};
    Random random(seed_of(format("matmul%d%d", ta, tb)));
    for (const auto& [M, N, K] : shapes)
        for (real beta : {(real)0, (real)1, (real)-0.5}) {
            int lda = (ta == cpu::NO ? K : M) + 3, ldb = (tb == cpu::NO ? N : K) + 1, ldc = N + 2;
            real alpha = beta == 1 ? (real)1 : (real)0.7;
            Numbers A = random.normals((int64_t)lda * (ta == cpu::NO ? M : K)), B = random.normals((int64_t)ldb * (tb == cpu::NO ? K : N)),
                    C = random.normals((int64_t)M * ldc);
            Numbers expected = C, builtin = C;
            for (int i = 0; i < M; i++)
                for (int j = 0; j < N; j++) {
                    double sum = 0;
                    for (int p = 0; p < K; p++)
                        sum += (double)(ta == cpu::NO ? A[i * lda + p] : A[p * lda + i]) * (tb == cpu::NO ? B[p * ldb + j] : B[j * ldb + p]);
                    expected[i * ldc + j] = (real)(alpha * sum + beta * C[i * ldc + j]);
                    if (beta == 0) builtin[i * ldc + j] = NOT_A_NUMBER;  // beta 0 overwrites
                }
            Numbers chosen = builtin;
            cpu::matmul_builtin(ta, tb, M, N, K, alpha, A.data(), lda, B.data(), ldb, beta, builtin.data(), ldc);
            cpu::matmul(ta, tb, M, N, K, alpha, A.data(), lda, B.data(), ldb, beta, chosen.data(), ldc);
            double tolerance = (is_double ? 1e-14 : 1e-6) * std::sqrt(K + 1.0);
            for (const Numbers* out : {&builtin, &chosen}) {
                double error = 0;
                for (size_t i = 0; i < out->size(); i++) {
                    double d = std::fabs((double)(*out)[i] - expected[i]) / (1 + std::sqrt((double)K));
                    if (!(d <= error) && !std::isnan(error)) error = d;  // NaN stays
                }
                check(error, tolerance, format("%s %d x %d x %d, beta %g", out == &builtin ? "built-in" : "matmul()", M, N, K, (double)beta));
            }
        }
}

// A text that is decoded among few others has the bits that it has alone.
static void few_rows_case() {
    constexpr int M = cpu::FEW_ROWS, N = 67, K = 133;
    Random random(seed_of("few rows"));
    Numbers A = random.normals(M * K), B = random.normals(N * K), together(M * N), alone(N);
    cpu::matmul(cpu::NO, cpu::YES, M, N, K, 1, A.data(), K, B.data(), K, 0, together.data(), N);
    for (int i = 0; i < M; i++) {
        cpu::matmul(cpu::NO, cpu::YES, 1, N, K, 1, &A[i * K], K, B.data(), K, 0, alone.data(), N);
        check_that(std::equal(alone.begin(), alone.end(), together.begin() + i * N), format("row %d of %d", i, M));
    }
}

static void vector_functions_case() {
    for (double x = -87; x < 88; x += 0.037)
        check(std::fabs(cpu::vexp((real)x) / std::exp((double)(real)x) - 1), is_double ? 1e-14 : 1e-5, format("exp(%g)", x));
    check_that(cpu::vexp((real)-1000) == 0 && cpu::vexp(-std::numeric_limits<real>::infinity()) == 0 && std::isinf(cpu::vexp((real)1000)),
               "exp beyond its range");
    check_that(std::isnan(cpu::vexp(NOT_A_NUMBER)), "exp(NaN) is NaN");
    Random random(7);
    for (int n : {0, 1, 5, 16, 17, 64, 100}) {
        Numbers x = random.normals(n);
        real expected = -9;
        for (real v : x) expected = std::max(expected, v);
        check_that(cpu::largest(n, x.data(), -9) == expected, format("largest of %d", n));
    }
    for (int rows : {1, 15, 16, 33})
        for (int columns : {1, 16, 20, 64}) {
            Numbers from = random.normals((rows + 1) * (columns + 2)), to((size_t)columns * (rows + 5), NOT_A_NUMBER);
            cpu::tile_transpose(rows, columns, from.data(), columns + 2, to.data(), rows + 5);
            bool ok = true;
            for (int r = 0; r < rows; r++)
                for (int c = 0; c < columns; c++) ok = ok && to[c * (rows + 5) + r] == from[r * (columns + 2) + c];
            for (int c = 0; c < columns; c++)
                for (int r = rows; r < rows + 5; r++) ok = ok && std::isnan(to[c * (rows + 5) + r]);
            check_that(ok, format("transpose of %d x %d", rows, columns));
        }
}

struct Case {
    std::string name;
    std::function<void()> run;
};

static bool has(const char* name) {
    for (const AttentionDescription& d : attention_descriptions())
        if (!strcmp(name, d.name)) return true;
    return false;
}

static std::vector<Case> all_cases() {
    std::vector<Case> cases;
    std::vector<Variant> tested;
    for (const Variant& v : variants())
        if (has(v.layer_name().c_str())) tested.push_back(v);
    auto add_variants = [&](const char* check, void (*run)(const Variant&)) {
        for (const Variant& v : tested) cases.push_back({format("%s/%s", check, v.name().c_str()), [=] { run(v); }});
    };
    auto recurrent = [&](const Variant& v) { return attention_description(v.layer_name()).recurrent; };

    if (is_double) {
        cases.push_back({"gradient/helpers", helpers_gradient_case});
        cases.push_back({"gradient/core", core_gradient_case});
        add_variants("gradient", gradient_case);
        for (const Variant& v : tested)
            if (recurrent(v)) cases.push_back({format("gradient/%s/memory", v.name().c_str()), [=] { memory_gradient_case(v, false); }});
        for (const Variant& v : tested)
            if (v.layer_name() == "lightning")
                cases.push_back({format("gradient/%s/through-memory", v.name().c_str()), [=] { memory_gradient_case(v, true); }});
    }
    add_variants("ragged", ragged_case);
    for (const Variant& v : tested)
        if (v.dropout == 0) cases.push_back({"extend/" + v.name(), [=] { extend_case(v); }});
    const std::pair<const char*, Extend> forms[] = {
        {"unabsorbed", extend_as<0>}, {"absorbed", extend_as<1>}, {"merged", extend_as<2>}, {"mixed", extend_as<3>}};
    for (const Variant& v : tested)
        for (const auto& form : forms)
            if (v.dropout == 0 && v.layer_name() == "mla") cases.push_back({"extend/" + v.name() + "/" + form.first, [=] { extend_case(v, form.second); }});
    for (const Variant& v : tested)
        if (recurrent(v) && v.dropout == 0) cases.push_back({"memory/" + v.name(), [=] { memory_case(v); }});
    add_variants("threads", threads_case);
    add_variants("poison", poison_case);
    cases.push_back({"core/forward", core_forward_case});
    cases.push_back({"core/extreme", core_extreme_case});
    cases.push_back({"core/pages", core_pages_case});
    for (cpu::Transpose ta : {cpu::NO, cpu::YES})
        for (cpu::Transpose tb : {cpu::NO, cpu::YES}) cases.push_back({format("matmul/%s%s", ta ? "T" : "N", tb ? "T" : "N"), [=] { matmul_case(ta, tb); }});
    cases.push_back({"matmul/few rows", few_rows_case});
    cases.push_back({"matmul/vectors", vector_functions_case});
    cases.push_back({"dropout/philox", philox_case});
    cases.push_back({"dropout/mask", dropout_mask_case});
    if (has("infini")) {
        cases.push_back({"same/infini-is-causal/linear", [] { infini_is_causal_case("linear"); }});
        cases.push_back({"same/infini-is-causal/delta", [] { infini_is_causal_case("delta"); }});
        cases.push_back({"control/infini", control_infini_case});
    }
    if (has("lightning")) {
        cases.push_back({"control/lightning", control_lightning_case});
        for (const char* decay : {"minimax", "fla", "none"})
            cases.push_back({format("same/lightning-schemes/%s", decay), [=] { lightning_schemes_case(decay); }});
    }
    cases.push_back({"control/forward", control_case});
    if (is_double) cases.push_back({"control/gradient", control_gradient_case});
    for (const AttentionDescription& d : attention_descriptions()) cases.push_back({format("options/%s", d.name), [&d] { options_case(d); }});
    return cases;
}

static int passed = 0, failed = 0;
static std::string running;

static void print_summary() { printf("%d passed, %d failed\n", passed, failed); }

static void end_after_first_failure() {
    printf("FAIL  %s\n%s", running.c_str(), results.messages.c_str());
    failed++;
    print_summary();
    fflush(stdout);
    _Exit(1);
}

static void run_case(const Case& c) {
    results = Results();
    running = c.name;
    auto start = std::chrono::steady_clock::now();
    try {
        c.run();
    } catch (const std::exception& e) {
        fail(e.what());
    }
    double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    bool ok = results.failures == 0 && results.checks > 0;
    (ok ? passed : failed)++;
    std::string worst =
        results.worst >= 0 || results.worst != results.worst ? format(", worst %.2g of %.2g (%s)", results.error, results.tolerance, results.what.c_str()) : "";
    printf("%s  %-78s %5d checks%s  %.2f s\n%s", ok ? "ok  " : "FAIL", c.name.c_str(), results.checks, worst.c_str(), seconds, results.messages.c_str());
    if (results.failures > 5) printf("      ... and %d more\n", results.failures - 5);
    fflush(stdout);
}

int main(int argc, char** argv) {
    // Tests use more threads than there may be cores: those that wait must sleep. OpenMP reads this before main, so the program starts itself again.
    if (!getenv("OMP_WAIT_POLICY") && !setenv("OMP_WAIT_POLICY", "passive", 0)) execvp(argv[0], argv);
    std::vector<std::string> names;
    bool list = false;
    for (int i = 1; i < argc; i++) {
        std::string arg = argv[i];
        if (arg == "--list")
            list = true;
        else if (arg == "--first-failure")
            first_failure = true;
        else if (arg[0] == '-')
            return fprintf(stderr, "unknown option '%s': layer_tests [--list] [--first-failure] [NAME...]\n", argv[i]), EXIT_USAGE;
        else
            names.push_back(arg);
    }
    set_threads(1);
    std::vector<Case> cases = all_cases();
    int chosen = 0;
    for (const Case& c : cases) {
        bool wanted = names.empty();
        for (const std::string& n : names) wanted = wanted || c.name.compare(0, n.size(), n) == 0;
        if (!wanted) continue;
        chosen++;
        if (list)
            printf("%s\n", c.name.c_str());
        else
            run_case(c);
    }
    if (list) return 0;
    if (!chosen) return fprintf(stderr, "no case has such a name: see layer_tests --list\n"), EXIT_USAGE;
    print_summary();
    return failed ? 1 : 0;
}
