// onnxruntime's operator `slmops.Lora`: what the LoRA pairs of one layer add to its product, Y = P + sum (X A') B, in one pass.
//
// X (tokens, inputs), P and Y (tokens, outputs) are fp32. The third input is a whole adapter: bytes, laid out by `packing.py`, which says where
// the pairs of each layer lie; A (rank, inputs) and B (rank, outputs) in fp16, the scale in B. `layer` says which layer a node is. No bytes:
// no adapter, Y is P. Compiled by GCC or Clang for the processor at hand; vectors are those of their language extension. Every sum has an
// order of its own that no number of threads changes, nor the tokens beside it in a prompt.
//
// No header of onnxruntime comes with its wheel. Its C API is a table of functions that only ever grows, and so is the description of an
// operator: what stands here is version 24 of the first and 18 of the second (include/onnxruntime/core/session/onnxruntime_c_api.h).
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <map>
#include <mutex>
#include <utility>
#include <vector>
#ifdef __F16C__
#include <immintrin.h>
#endif

namespace {

constexpr uint32_t API_VERSION = 24, OPERATOR_VERSION = 18;

// What onnxruntime hands out, and takes back.
struct Status;
struct Value;
struct Context;
struct Info;
struct Domain;
struct Options;

struct Base {
    void* const* (*get)(uint32_t version);  // the table; null where it is older
    const char* (*version)();
};

using Api = void* const*;

// A function of the table, by its place there.
enum Place {
    CREATE_STATUS = 0,
    CREATE_DOMAIN = 26,
    ADD_OPERATOR = 27,
    ADD_DOMAIN = 28,
    DATA = 51,
    ATTRIBUTE = 86,  // of 64-bit integers
    INPUT = 90,
    OUTPUT = 91,
    PARALLEL = 274,
    TYPE_AND_SHAPE = 414,
};

template <class R = Status*, class... Arguments>
R call(Api api, Place place, Arguments... arguments) {
    return reinterpret_cast<R (*)(Arguments...)>(api[place])(arguments...);
}

constexpr int INVALID = 2;            // of OrtErrorCode
constexpr int FLOAT = 1, UINT8 = 2;  // of ONNXTensorElementDataType

Status* refused(Api api, const char* why) { return call(api, CREATE_STATUS, INVALID, why); }

struct Operator {
    uint32_t version;
    void* (*create)(const Operator*, const void*, const Info*);
    const char* (*name)(const Operator*);
    const char* (*provider)(const Operator*);
    int (*input_type)(const Operator*, size_t);
    size_t (*inputs)(const Operator*);
    int (*output_type)(const Operator*, size_t);
    size_t (*outputs)(const Operator*);
    void (*compute)(void*, Context*);
    void (*destroy)(void*);
    int (*input_kind)(const Operator*, size_t);
    int (*output_kind)(const Operator*, size_t);
    int (*memory)(const Operator*, size_t);
    int (*variadic[4])(const Operator*);
    Status* (*create_checked)(const Operator*, const void*, const Info*, void**);
    Status* (*compute_checked)(void*, Context*);
    Status* (*shapes)(const Operator*, void*);
    int (*first_version)(const Operator*);
    int (*last_version)(const Operator*);
    size_t (*in_place)(int** inputs, int** outputs);
    void (*forget_in_place)(int*, int*);
    size_t (*aliases)(int** inputs, int** outputs);
    void (*forget_aliases)(int*, int*);
};

constexpr int W = 16;  // numbers in a vector
typedef float Floats __attribute__((vector_size(4 * W)));

inline Floats load(const float* at) {
    Floats x;
    std::memcpy(&x, at, sizeof x);
    return x;
}

inline void store(float* at, Floats x) { std::memcpy(at, &x, sizeof x); }

inline float sum(Floats x) {
    float s = 0;
    for (int i = 0; i < W; i++) s += x[i];
    return s;
}

// A number of fp16: the exponents of fp32 are 112 further.
inline float wide(uint16_t half) {
    uint32_t sign = uint32_t(half & 0x8000u) << 16, bits = uint32_t(half & 0x7fffu) << 13;
    float x;
    std::memcpy(&x, &bits, sizeof x);
    x *= 5.192296858534828e33f;
    uint32_t whole;
    std::memcpy(&whole, &x, sizeof x);
    bits = (bits >= 0x7c00u << 13 ? bits | 0x7f800000u : whole) | sign;  // what is no number stays none
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

inline Floats load(const uint16_t* at) {
#if defined(__AVX512F__)
    return (Floats)_mm512_maskz_cvtph_ps((__mmask16)-1, _mm256_loadu_si256((const __m256i*)at));
#elif defined(__F16C__)
    float x[W];
    for (int i = 0; i < W; i += 8) _mm256_storeu_ps(x + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(at + i))));
    return load(x);
#else
    float x[W];
    for (int i = 0; i < W; i++) x[i] = wide(at[i]);
    return load(x);
#endif
}

// What `packing.py` writes: offsets are of 64 bytes each, from the beginning.
struct Header {
    int32_t magic, layers, pairs, nothing;
};

struct Span {
    int32_t first, count;  // pairs of a layer
};

struct Pair {
    int32_t rank, inputs, outputs, first_output, a, b;
};

constexpr int32_t MAGIC = 0x61726f4c;  // "Lora"
constexpr int64_t UNIT = 64;

// One layer's work: its pairs, and what they multiply.
struct Layer {
    const float* x;
    float* y;
    const uint8_t* bytes;
    const Pair* pairs;
    long count, tokens, inputs, outputs, ranks;
    float* h;  // (ranks,) of one token

    const uint16_t* a(const Pair& p) const { return reinterpret_cast<const uint16_t*>(bytes + p.a * UNIT); }
    const uint16_t* b(const Pair& p) const { return reinterpret_cast<const uint16_t*>(bytes + p.b * UNIT); }
};

// Each pair of a layer, and where its ranks begin among all of the layer's.
template <class F>
inline void each_pair(const Layer& of, F use) {
    long rank = 0;
    for (long p = 0; p < of.count; rank += of.pairs[p++].rank) use(of.pairs[p], rank);
}

// Of M tokens and N ranks: h = x A'. Token by token the same sums, whatever M and N are.
template <int M, int N>
inline void down(const float* x, const uint16_t* a, long inputs, float* h, long h_row) {
    Floats sums[M][N] = {};
    long i = 0;
    for (; i + W <= inputs; i += W) {
        Floats line[N];
        for (int n = 0; n < N; n++) line[n] = load(a + n * inputs + i);
        for (int m = 0; m < M; m++) {
            Floats token = load(x + m * inputs + i);
            for (int n = 0; n < N; n++) sums[m][n] += token * line[n];
        }
    }
    for (int m = 0; m < M; m++)
        for (int n = 0; n < N; n++) {
            float s = sum(sums[m][n]);
            for (long j = i; j < inputs; j++) s += x[m * inputs + j] * wide(a[n * inputs + j]);
            h[m * h_row + n] = s;
        }
}

template <int M>
inline void down(const float* x, const uint16_t* a, long inputs, long first, long last, float* h, long h_row) {
    constexpr int N = M == 1 ? 4 : 2;  // as many sums as there are registers
    long k = first;
    for (; k + N <= last; k += N) down<M, N>(x, a + k * inputs, inputs, h + k, h_row);
    for (; k < last; k++) down<M, 1>(x, a + k * inputs, inputs, h + k, h_row);
}

// Of one token: y += h B for some outputs, four ranks in a stream.
inline void up(const float* h, const uint16_t* b, long rank, long outputs, long first, long last, float* y) {
    for (long k = 0; k < rank; k += 4) {
        const uint16_t* line[4];
        float by[4];
        for (int n = 0; n < 4; n++) line[n] = b + std::min(k + n, rank - 1) * outputs, by[n] = k + n < rank ? h[k + n] : 0;
        long o = first;
        for (; o + W <= last; o += W) {
            Floats x = load(y + o);
            for (int n = 0; n < 4; n++) x += by[n] * load(line[n] + o);
            store(y + o, x);
        }
        for (; o < last; o++)
            for (int n = 0; n < 4; n++) y[o] += by[n] * wide(line[n][o]);
    }
}

// Of M tokens: y += h B, 16 outputs at a time.
template <int M>
inline void ups(const float* h, long h_row, const uint16_t* b, long rank, long outputs, float* y, long y_row) {
    long o = 0;
    for (; o + W <= outputs; o += W) {
        Floats sums[M];
        for (int m = 0; m < M; m++) sums[m] = load(y + m * y_row + o);
        for (long k = 0; k < rank; k++) {
            Floats line = load(b + k * outputs + o);
            for (int m = 0; m < M; m++) sums[m] += h[m * h_row + k] * line;
        }
        for (int m = 0; m < M; m++) store(y + m * y_row + o, sums[m]);
    }
    for (; o < outputs; o++)
        for (int m = 0; m < M; m++)
            for (long k = 0; k < rank; k++) y[m * y_row + o] += h[m * h_row + k] * wide(b[k * outputs + o]);
}

template <int M>
inline void tokens_of(const Layer& of, long first, float* h) {
    each_pair(of, [&](const Pair& pair, long rank) {
        down<M>(of.x + first * of.inputs, of.a(pair), of.inputs, 0, pair.rank, h + rank, of.ranks);
    });
    each_pair(of, [&](const Pair& pair, long rank) {
        ups<M>(h + rank, of.ranks, of.b(pair), pair.rank, pair.outputs, of.y + first * of.outputs + pair.first_output, of.outputs);
    });
}

// The part of n things that is its `part`th of some.
inline long cut(long n, long part, long parts) { return n * part / parts; }

constexpr long PARTS = 4;
// Fewer are read sooner by one thread, which need not wait for another: a layer of the 135M and of the 0.5B shape at rank 16.
constexpr long SHARED_NUMBERS = 1 << 18;

void down_part(void* data, size_t part) {
    const Layer& of = *static_cast<Layer*>(data);
    each_pair(of, [&](const Pair& pair, long rank) {
        down<1>(of.x, of.a(pair), of.inputs, cut(pair.rank, part, PARTS), cut(pair.rank, part + 1, PARTS), of.h + rank, of.ranks);
    });
}

void up_part(void* data, size_t part) {
    const Layer& of = *static_cast<Layer*>(data);
    each_pair(of, [&](const Pair& pair, long rank) {
        long lines = pair.outputs / W, first = cut(lines, part, PARTS) * W, last = part + 1 == PARTS ? pair.outputs : cut(lines, part + 1, PARTS) * W;
        up(of.h + rank, of.b(pair), pair.rank, pair.outputs, first, last, of.y + pair.first_output);
    });
}

constexpr long TOKENS = 8;
long parts_of(long tokens) { return std::min(16l, std::max(1l, tokens / 16)); }

void tokens_part(void* data, size_t part) {
    const Layer& of = *static_cast<Layer*>(data);
    thread_local std::vector<float> held;
    if (held.size() < size_t(TOKENS * of.ranks)) held.resize(TOKENS * of.ranks);
    long parts = parts_of(of.tokens), t = cut(of.tokens, part, parts), last = cut(of.tokens, part + 1, parts);
    for (; t + TOKENS <= last; t += TOKENS) tokens_of<TOKENS>(of, t, held.data());
    for (; t < last; t++) tokens_of<1>(of, t, held.data());
}

typedef void Work(void* data, size_t part);

// Y += (X A') B of all pairs. `parallel` does parts of the work, in any order, and says what failed.
template <class Parallel>
Status* add(Layer& of, Parallel parallel) {
    if (!of.ranks || !of.tokens) return nullptr;
    if (of.tokens > 1) return parallel(&tokens_part, parts_of(of.tokens), &of);
    thread_local std::vector<float> held;
    if (held.size() < size_t(of.ranks)) held.resize(of.ranks);
    of.h = held.data();
    long numbers = 0;
    for (long p = 0; p < of.count; p++) numbers += long(of.pairs[p].rank) * (of.inputs + of.pairs[p].outputs);
    bool alone = numbers < SHARED_NUMBERS;
    for (Work* work : {&down_part, &up_part}) {
        if (alone)
            for (long part = 0; part < PARTS; part++) work(&of, part);
        else if (Status* failed = parallel(work, PARTS, &of))
            return failed;
    }
    return nullptr;
}

// Find a layer's pairs; say what is wrong with the bytes, or with the layer.
const char* find(const uint8_t* bytes, int64_t size, int64_t layer, Layer& of) {
    if (!size) return nullptr;
    const Header& header = *reinterpret_cast<const Header*>(bytes);
    if (size < int64_t(sizeof(Header)) || header.magic != MAGIC || header.layers < 0 || header.pairs < 0) return "Lora: these bytes are no adapter";
    int64_t tables = sizeof(Header) + header.layers * int64_t(sizeof(Span)) + header.pairs * int64_t(sizeof(Pair));
    if (size < tables || layer < 0 || layer >= header.layers) return "Lora: the adapter ends early, or has no such layer";
    const Span* places = reinterpret_cast<const Span*>(bytes + sizeof(Header));
    const Pair* pairs = reinterpret_cast<const Pair*>(places + header.layers);
    const Span& own = places[layer];
    if (own.first < 0 || own.count < 0 || int64_t(own.first) + own.count > header.pairs) return "Lora: the adapter has no such pairs";
    of.bytes = bytes, of.pairs = pairs + own.first, of.count = own.count;
    for (long p = 0; p < of.count; p++) {
        const Pair& pair = of.pairs[p];
        bool fits = pair.rank > 0 && pair.inputs == of.inputs && pair.outputs > 0 && pair.first_output >= 0 &&
                    int64_t(pair.first_output) + pair.outputs <= of.outputs;
        if (!fits) return "Lora: a pair is of another layer's shape";
        for (auto [at, width] : {std::pair<int64_t, int64_t>{pair.a, pair.inputs}, {pair.b, pair.outputs}})
            if (at < 0 || at * UNIT + 2 * width * pair.rank > size) return "Lora: the adapter ends early";
        of.ranks += pair.rank;
    }
    return nullptr;
}

struct Shape {
    const int64_t* sizes;
    size_t count;
    long last() const { return count ? sizes[count - 1] : 0; }
    long rows() const {
        long n = 1;
        for (size_t i = 0; i + 1 < count; i++) n *= sizes[i];
        return n;
    }
};

struct Kernel {
    Api api;  // of the onnxruntime that made it: a process may hold two
    int64_t layer;
};

Status* compute(void* kernel, Context* context) {
    auto [api, layer] = *static_cast<Kernel*>(kernel);
    Shape shapes[3];
    void* data[3];
    for (size_t i = 0; i < 3; i++) {
        const Value* given = nullptr;
        int type = 0;
        if (Status* failed = call(api, INPUT, (const Context*)context, i, &given)) return failed;
        if (Status* failed = call(api, TYPE_AND_SHAPE, given, &type, &shapes[i].sizes, &shapes[i].count)) return failed;
        if (Status* failed = call(api, DATA, (Value*)given, &data[i])) return failed;
    }
    const Shape &x = shapes[0], &product = shapes[1];
    if (x.rows() != product.rows()) return refused(api, "Lora: other tokens came out of the layer than went in");
    Value* answer = nullptr;
    float* y = nullptr;
    if (Status* failed = call(api, OUTPUT, context, size_t(0), product.sizes, product.count, &answer)) return failed;
    if (Status* failed = call(api, DATA, answer, (void**)&y)) return failed;
    if (y != data[1]) std::memcpy(y, data[1], sizeof(float) * product.rows() * product.last());
    Layer of{(const float*)data[0], y, nullptr, nullptr, 0, x.rows(), x.last(), product.last(), 0, nullptr};
    if (const char* wrong = find((const uint8_t*)data[2], shapes[2].last(), layer, of)) return refused(api, wrong);
    return add(of, [api = api, context](Work* work, long parts, void* on) {
        return call(api, PARALLEL, (const Context*)context, work, size_t(parts), size_t(0), on);
    });
}

int zero(const Operator*) { return 0; }
int zero_of(const Operator*, size_t) { return 0; }

int in_place_input[] = {1}, in_place_output[] = {0};

Operator described() {
    Operator made{};
    made.version = OPERATOR_VERSION;
    made.name = [](const Operator*) { return "Lora"; };
    made.provider = [](const Operator*) -> const char* { return nullptr; };  // the CPU's
    made.input_type = [](const Operator*, size_t i) { return i < 2 ? FLOAT : UINT8; };
    made.inputs = [](const Operator*) -> size_t { return 3; };
    made.output_type = [](const Operator*, size_t) { return FLOAT; };
    made.outputs = [](const Operator*) -> size_t { return 1; };
    made.input_kind = made.output_kind = made.memory = zero_of;
    for (auto& one : made.variadic) one = zero;
    made.create_checked = [](const Operator*, const void* api, const Info* info, void** kernel) -> Status* {
        Kernel made{static_cast<Api>(api), 0};
        Status* failed = call(made.api, ATTRIBUTE, info, (const char*)"layer", &made.layer);
        *kernel = failed ? nullptr : new Kernel(made);
        return failed;
    };
    made.compute_checked = compute;
    made.destroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
    made.first_version = made.last_version = [](const Operator*) { return 1; };
    made.in_place = [](int** inputs, int** outputs) -> size_t {
        *inputs = in_place_input, *outputs = in_place_output;
        return 1;
    };
    made.aliases = [](int**, int**) -> size_t { return 0; };
    made.forget_in_place = made.forget_aliases = [](int*, int*) {};
    return made;
}

const Operator LORA = described();

}  // namespace

extern "C" {

// Y += (X A') B of a layer, by one thread: what is held against numpy. Returns what is wrong, or null.
const char* slmops_lora(const float* x, float* y, const uint8_t* bytes, int64_t size, int64_t layer, int64_t tokens, int64_t inputs, int64_t outputs) {
    Layer of{x, y, nullptr, nullptr, 0, tokens, inputs, outputs, 0, nullptr};
    if (const char* wrong = find(bytes, size, layer, of)) return wrong;
    add(of, [](Work* work, long parts, void* on) -> Status* {
        for (long part = 0; part < parts; part++) work(on, part);
        return nullptr;
    });
    return nullptr;
}

Status* RegisterCustomOps(Options* options, const Base* base) {
    Api api = base->get(API_VERSION);
    if (!api) return refused(base->get(1), "Lora: this onnxruntime is older than 1.24");
    static std::mutex busy;
    static std::map<Api, Domain*> domains;  // sessions use one for as long as they live, so it stays
    std::lock_guard<std::mutex> alone(busy);
    Domain*& domain = domains[api];
    if (!domain) {
        Domain* made = nullptr;
        if (Status* failed = call(api, CREATE_DOMAIN, (const char*)"slmops", &made)) return failed;
        if (Status* failed = call(api, ADD_OPERATOR, made, &LORA)) return failed;
        domain = made;
    }
    return call(api, ADD_DOMAIN, options, domain);
}
}
