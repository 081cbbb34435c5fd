// The pieces of a training step between its matrix products, in one pass each, forward and backward, in fp32 or bf16.
//
// What each computes is said in plain.py, which is what it is held against. Everything is computed in fp32; `compiled.py` calls the
// functions at the end. Compiled by GCC or Clang for the processor at hand: vectors are those of their language extension, 16 numbers
// each, which become whatever registers there are. Every sum has an order of its own that no number of threads changes.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

namespace {

constexpr int W = 16;  // numbers in a vector
typedef float Floats __attribute__((vector_size(4 * W)));
typedef int32_t Ints __attribute__((vector_size(4 * W)));
typedef uint32_t Words __attribute__((vector_size(4 * W)));
typedef uint16_t Halves __attribute__((vector_size(2 * W)));
typedef uint8_t Bytes __attribute__((vector_size(W)));

struct Half {  // bfloat16
    uint16_t bits;
};

inline Floats load(const float* at) {
    Floats x;
    std::memcpy(&x, at, sizeof x);
    return x;
}

inline Floats load(const Half* at) {
    Halves half;
    std::memcpy(&half, at, sizeof half);
    return (Floats)(__builtin_convertvector(half, Words) << 16);
}

inline void store(float* at, Floats x) { std::memcpy(at, &x, sizeof x); }

// Rounded to the nearest, ties to even; what is no number stays none.
inline Halves halved(Floats x) {
#ifdef __AVX512BF16__
    return (Halves)_mm512_cvtneps_pbh((__m512)x);
#else
    Words bits = (Words)x;
    Words rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    Words number = (Words)(x == x);
    return __builtin_convertvector((rounded & number) | (0x7fc0u & ~number), Halves);
#endif
}

inline void store(Half* at, Floats x) {
    Halves half = halved(x);
    std::memcpy(at, &half, sizeof half);
}

inline float wide(float x) { return x; }
inline float wide(Half x) {
    uint32_t bits = uint32_t(x.bits) << 16;
    float y;
    std::memcpy(&y, &bits, sizeof y);
    return y;
}
inline void put(float* at, float x) { *at = x; }
inline void put(Half* at, float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    at->bits = x == x ? uint16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16) : 0x7fc0;
}

inline Floats all(float x) { return x - Floats{}; }
inline Floats larger(Floats a, Floats b) { return a > b ? a : b; }
inline Floats smaller(Floats a, Floats b) { return a < b ? a : b; }

inline float sum(Floats x) {
    float s = 0;
    for (int i = 0; i < W; i++) s += x[i];
    return s;
}

inline float largest(Floats x) {
    float s = x[0];
    for (int i = 1; i < W; i++) s = std::max(s, x[i]);
    return s;
}

// e^x to 2 units in the last place: Cody and Waite's reduction, the polynomial of Cephes' expf. What is no number stays none.
inline Floats exponential(Floats exponent) {
    Floats x = smaller(larger(exponent, all(-87.3f)), all(88.0f));
    const Floats magic = all(12582912.0f);
    Floats shifted = x * 1.44269504088896341f + magic;
    Floats n = shifted - magic;
    Floats r = x - n * 0.693359375f + n * 2.12194440e-4f;
    Floats p = all(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    Floats power = (Floats)((Ints)p + ((Ints)shifted << 23));
    return exponent == exponent ? power : exponent;
}

inline Floats sigmoid(Floats x) { return 1.0f / (1.0f + exponential(-x)); }

// Of a matrix's elements: from one row to the next, and along the sums of a product.
struct Strides {
    long row, inner;
};

// C (rows, columns) [+]= A (rows, inner) B (inner, columns); B and C in rows, columns a multiple of W.
template <int M, int V, class C>
inline void tile(const float* a, Strides by, const float* b, long b_row, C* c, long c_row, long inner, bool add) {
    Floats sums[M][V];
    for (int m = 0; m < M; m++)
        for (int v = 0; v < V; v++) sums[m][v] = add ? load(c + m * c_row + v * W) : Floats{};
    for (long k = 0; k < inner; k++) {
        Floats line[V];
        for (int v = 0; v < V; v++) line[v] = load(b + k * b_row + v * W);
        for (int m = 0; m < M; m++) {
            float x = a[m * by.row + k * by.inner];
            for (int v = 0; v < V; v++) sums[m][v] += x * line[v];
        }
    }
    for (int m = 0; m < M; m++)
        for (int v = 0; v < V; v++) store(c + m * c_row + v * W, sums[m][v]);
}

template <int M, class C>
inline void band(const float* a, Strides by, const float* b, long b_row, C* c, long c_row, long columns, long inner, bool add) {
    long n = 0;
    for (; n + 2 * W <= columns; n += 2 * W) tile<M, 2>(a, by, b + n, b_row, c + n, c_row, inner, add);
    if (n < columns) tile<M, 1>(a, by, b + n, b_row, c + n, c_row, inner, add);
}

template <class C>
void product(const float* a, Strides by, const float* b, long b_row, C* c, long c_row, long rows, long columns, long inner, bool add) {
    long m = 0;
    for (; m + 6 <= rows; m += 6) band<6>(a + m * by.row, by, b, b_row, c + m * c_row, c_row, columns, inner, add);
    for (; m + 2 <= rows; m += 2) band<2>(a + m * by.row, by, b, b_row, c + m * c_row, c_row, columns, inner, add);
    if (m < rows) band<1>(a + m * by.row, by, b, b_row, c + m * c_row, c_row, columns, inner, add);
}

constexpr long BLOCK = 30;  // queries at a time

inline long up(long n) { return (n + W - 1) / W * W; }

// Rows that are joined, and how their tokens attend (`_Shape` in compiled.py).
struct Shape {
    const int64_t *lengths, *starts;  // of each row; of its own tokens, behind those that all rows share
    const float *cosines, *sines;     // (longest row, width); null: nothing is turned
    int64_t count, shared, real, tokens, queries, keys, width, window;  // window 0: there is none
    float scale;
    int threads;

    long token(long row, long place) const { return place < shared ? place : starts[row] + place - shared; }
    long stacked() const { return (queries + 2 * keys) * width; }
    const float* cosine(long place) const { return cosines ? cosines + place * width : nullptr; }
    const float* sine(long place) const { return sines ? sines + place * width : nullptr; }
};

template <class T>
inline void widened(const T* x, long n, float* y) {
    for (long i = 0; i < n; i += W) store(y + i, load(x + i));
}

// A head's vector in fp32, turned by its place: pairs (i, i + width / 2) by an angle each.
template <class T>
inline void turned(const T* x, const float* cosines, const float* sines, long width, float* y) {
    if (!cosines) return widened(x, width, y);
    long half = width / 2;
    for (long i = 0; i < half; i++) {
        float a = wide(x[i]), b = wide(x[half + i]);
        y[i] = a * cosines[i] - b * sines[i];
        y[half + i] = b * cosines[half + i] + a * sines[half + i];
    }
}

template <class T>
inline void turned_back(const float* x, const float* cosines, const float* sines, long width, T* y) {
    if (!cosines) {
        for (long i = 0; i < width; i += W) store(y + i, load(x + i));
        return;
    }
    long half = width / 2;
    for (long i = 0; i < half; i++) {
        float a = x[i], b = x[half + i];
        put(y + i, a * cosines[i] + b * sines[i]);
        put(y + half + i, b * cosines[half + i] - a * sines[half + i]);
    }
}

inline void transposed(const float* x, long rows, long columns, long padded, float* y) {
    for (long j = 0; j < columns; j++) {
        for (long i = 0; i < rows; i++) y[j * padded + i] = x[i * columns + j];
        for (long i = rows; i < padded; i++) y[j * padded + i] = 0;
    }
}

// Scores of queries at places from `first` to the probabilities of the keys that each sees, in place.
void softmax(float* scores, long queries, long first, long padded, float scale, long window) {
    Floats order;
    for (int i = 0; i < W; i++) order[i] = i;
    for (long q = 0; q < queries; q++) {
        float* line = scores + q * padded;
        float end = first + q + 1, begin = window > 0 ? std::max(0.0f, end - window) : 0;
        Floats most = all(-INFINITY);
        for (long j = 0; j < padded; j += W) {
            Floats at = order + float(j), x = load(line + j) * scale;
            x = (at < end) & (at >= begin) ? x : all(-INFINITY);
            most = larger(most, x);
            store(line + j, x);
        }
        float top = largest(most);
        Floats total{};
        for (long j = 0; j < padded; j += W) {
            Floats at = order + float(j), e = exponential(load(line + j) - top);
            e = (at < end) & (at >= begin) ? e : Floats{};
            total += e;
            store(line + j, e);
        }
        float inverse = 1 / sum(total);
        for (long j = 0; j < padded; j += W) store(line + j, load(line + j) * inverse);
    }
}

// Memory of a thread, kept from call to call.
struct Scratch {
    std::vector<float> held;
    size_t at = 0;

    void start(size_t numbers) {
        if (held.size() < numbers) held.resize(numbers);
        at = 0;
    }
    float* take(size_t numbers) {
        at += numbers;
        return held.data() + at - numbers;
    }
};
thread_local Scratch scratch;

// Keys, turned, and values of a row (length, width), and the keys' transpose (width, length filled up).
template <class T>
void read(const T* y, const Shape& s, long row, long key, float* k, float* k_columns, float* v) {
    long length = s.lengths[row];
    for (long i = 0; i < length; i++) {
        const T* token = y + s.token(row, i) * s.stacked() + (s.queries + key) * s.width;
        turned(token, s.cosine(i), s.sine(i), s.width, k + i * s.width);
        widened(token + s.keys * s.width, s.width, v + i * s.width);
    }
    transposed(k, length, s.width, up(length), k_columns);
}

template <class T>
void attend(const T* y, T* answer, const Shape& s) {
    long width = s.width, groups = s.queries / s.keys, out = s.queries * width;
#pragma omp parallel for schedule(dynamic) num_threads(s.threads) collapse(2)
    for (long row = 0; row < s.count; row++)
        for (long key = 0; key < s.keys; key++) {
            long length = s.lengths[row], whole = up(length) * width;
            scratch.start(3 * whole + BLOCK * (2 * width + up(length)));
            float *k = scratch.take(whole), *k_columns = scratch.take(whole), *v = scratch.take(whole);
            float *q = scratch.take(BLOCK * width), *o = scratch.take(BLOCK * width), *p = scratch.take(BLOCK * up(length));
            read(y, s, row, key, k, k_columns, v);
            for (long head = key * groups; head < (key + 1) * groups; head++)
                for (long i = row ? s.shared : 0; i < length; i += BLOCK) {
                    long n = std::min(BLOCK, length - i), seen = i + n, columns = up(seen);
                    for (long m = 0; m < n; m++) {
                        const T* token = y + s.token(row, i + m) * s.stacked();
                        turned(token + head * width, s.cosine(i + m), s.sine(i + m), width, q + m * width);
                    }
                    product(q, {width, 1}, k_columns, up(length), p, columns, n, columns, width, false);
                    softmax(p, n, i, columns, s.scale, s.window);
                    product(p, {columns, 1}, v, width, o, width, n, width, seen, false);
                    for (long m = 0; m < n; m++) {
                        T* place = answer + s.token(row, i + m) * out + head * width;
                        for (long d = 0; d < width; d += W) store(place + d, load(o + m * width + d));
                    }
                }
        }
    // Tokens of no row: numbers like others, for what looks at all tokens.
    for (long i = s.real; i < s.tokens; i++) std::memcpy((void*)(answer + i * out), answer, out * sizeof(T));
}

// Of the probabilities' gradients (n, columns) those of the scores, in place.
void softmax_back(const float* p, float* of_p, long n, long columns, float scale) {
    for (long m = 0; m < n; m++) {
        const float* line = p + m * columns;
        float* of_line = of_p + m * columns;
        Floats total{};
        for (long j = 0; j < columns; j += W) total += load(line + j) * load(of_line + j);
        float share = sum(total);
        for (long j = 0; j < columns; j += W) store(of_line + j, load(line + j) * (load(of_line + j) - share) * scale);
    }
}

// Gradients of a row's keys and values; those of shared tokens go to `of_shared` (count, shared, keys and values), to be summed.
template <class T>
void put_keys(const float* of_k, const float* of_v, T* of_y, float* of_shared, const Shape& s, long row, long key) {
    for (long i = 0; i < s.lengths[row]; i++) {
        const float *k = of_k + i * s.width, *v = of_v + i * s.width;
        if (i < s.shared) {
            float* place = of_shared + ((row * s.shared + i) * 2 * s.keys + key) * s.width;
            turned_back(k, s.cosine(i), s.sine(i), s.width, place);
            widened(v, s.width, place + s.keys * s.width);
        } else {
            T* place = of_y + s.token(row, i) * s.stacked() + (s.queries + key) * s.width;
            turned_back(k, s.cosine(i), s.sine(i), s.width, place);
            for (long d = 0; d < s.width; d += W) store(place + s.keys * s.width + d, load(v + d));
        }
    }
}

template <class T>
void attend_back(const T* y, const T* of_answer, T* of_y, float* of_shared, const Shape& s) {
    long width = s.width, groups = s.queries / s.keys, all = s.stacked(), out = s.queries * width, pairs = 2 * s.keys * width;
#pragma omp parallel for schedule(dynamic) num_threads(s.threads) collapse(2)
    for (long row = 0; row < s.count; row++)
        for (long key = 0; key < s.keys; key++) {
            long length = s.lengths[row], padded = up(length), whole = padded * width;
            scratch.start(6 * whole + BLOCK * (3 * width + 2 * padded));
            float *k = scratch.take(whole), *k_columns = scratch.take(whole), *v = scratch.take(whole), *v_columns = scratch.take(whole);
            float *of_k = scratch.take(whole), *of_v = scratch.take(whole);
            float *q = scratch.take(BLOCK * width), *of_q = scratch.take(BLOCK * width), *of_o = scratch.take(BLOCK * width);
            float *p = scratch.take(BLOCK * padded), *of_p = scratch.take(BLOCK * padded);
            read(y, s, row, key, k, k_columns, v);
            transposed(v, length, width, padded, v_columns);
            std::fill(of_k, of_k + whole, 0.0f);
            std::fill(of_v, of_v + whole, 0.0f);
            for (long head = key * groups; head < (key + 1) * groups; head++)
                for (long i = row ? s.shared : 0; i < length; i += BLOCK) {
                    long n = std::min(BLOCK, length - i), seen = i + n, columns = up(seen);
                    for (long m = 0; m < n; m++) {
                        long token = s.token(row, i + m);
                        turned(y + token * all + head * width, s.cosine(i + m), s.sine(i + m), width, q + m * width);
                        widened(of_answer + token * out + head * width, width, of_o + m * width);
                    }
                    product(q, {width, 1}, k_columns, padded, p, columns, n, columns, width, false);
                    softmax(p, n, i, columns, s.scale, s.window);
                    product(of_o, {width, 1}, v_columns, padded, of_p, columns, n, columns, width, false);
                    product(p, {1, columns}, of_o, width, of_v, width, seen, width, n, true);
                    softmax_back(p, of_p, n, columns, s.scale);
                    product(of_p, {1, columns}, q, width, of_k, width, seen, width, n, true);
                    product(of_p, {columns, 1}, k, width, of_q, width, n, width, seen, false);
                    for (long m = 0; m < n; m++) {
                        T* place = of_y + s.token(row, i + m) * all + head * width;
                        turned_back(of_q + m * width, s.cosine(i + m), s.sine(i + m), width, place);
                    }
                }
            put_keys(of_k, of_v, of_y, of_shared, s, row, key);
        }
    for (long i = 0; i < s.shared; i++)
        for (long d = 0; d < pairs; d += W) {
            Floats total{};
            for (long row = 0; row < s.count; row++) total += load(of_shared + (row * s.shared + i) * pairs + d);
            store(of_y + i * all + s.queries * width + d, total);
        }
    std::memset((void*)(of_y + s.real * all), 0, (s.tokens - s.real) * all * sizeof(T));
}

template <class X, class Y>
void normalize(const X* x, const Y* weight, Y* y, float* inverse, long rows, long width, float epsilon, int threads) {
#pragma omp parallel for num_threads(threads)
    for (long r = 0; r < rows; r++) {
        const X* line = x + r * width;
        Floats squares{};
        for (long i = 0; i < width; i += W) {
            Floats a = load(line + i);
            squares += a * a;
        }
        float f = inverse[r] = 1 / std::sqrt(sum(squares) / width + epsilon);
        for (long i = 0; i < width; i += W) store(y + r * width + i, load(line + i) * f * load(weight + i));
    }
}

template <class X, class Y>
void normalize_back(const X* x, const Y* weight, const float* inverse, const Y* of_y, X* of_x, long rows, long width, int threads) {
#pragma omp parallel for num_threads(threads)
    for (long r = 0; r < rows; r++) {
        const X* line = x + r * width;
        const Y* of_line = of_y + r * width;
        Floats total{};
        for (long i = 0; i < width; i += W) total += load(of_line + i) * load(weight + i) * load(line + i);
        float f = inverse[r], share = sum(total) / width * f * f;
        for (long i = 0; i < width; i += W)
            store(of_x + r * width + i, (load(of_line + i) * load(weight + i) - load(line + i) * share) * f);
    }
}

// gate and up (rows, 2 width) -> silu(gate) * up (rows, width).
template <class T>
void gate(const T* both, T* inner, long rows, long width, int threads) {
#pragma omp parallel for num_threads(threads)
    for (long r = 0; r < rows; r++) {
        const T *gate = both + 2 * r * width, *up = gate + width;
        for (long i = 0; i < width; i += W) {
            Floats g = load(gate + i);
            store(inner + r * width + i, g * sigmoid(g) * load(up + i));
        }
    }
}

template <class T>
void gate_back(const T* both, const T* of_inner, T* of_both, long rows, long width, int threads) {
#pragma omp parallel for num_threads(threads)
    for (long r = 0; r < rows; r++) {
        const T *gate = both + 2 * r * width, *up = gate + width, *of = of_inner + r * width;
        T *of_gate = of_both + 2 * r * width, *of_up = of_gate + width;
        for (long i = 0; i < width; i += W) {
            Floats g = load(gate + i), s = sigmoid(g), d = load(of + i);
            store(of_up + i, d * g * s);
            store(of_gate + i, d * load(up + i) * s * (1.0f + g * (1.0f - s)));
        }
    }
}

// Sizes are compared as integers, whose order is theirs, and in which what is no number is the largest.
template <class T>
void quantize(const T* x, uint8_t* codes, T* scales, long rows, long width, int threads) {
#pragma omp parallel for num_threads(threads)
    for (long r = 0; r < rows; r++) {
        const T* line = x + r * width;
        Ints most{};
        for (long i = 0; i < width; i += W) {
            Ints size = (Ints)load(line + i) & 0x7fffffff;
            most = size > most ? size : most;
        }
        int32_t bits = most[0];
        for (int i = 1; i < W; i++) bits = std::max(bits, most[i]);
        float largest;
        std::memcpy(&largest, &bits, sizeof largest);
        put(scales + r, std::max(largest / 126, 1e-30f));
        float inverse = 1 / wide(scales[r]);
        for (long i = 0; i < width; i += W) {
            // Beyond 2^23 a float is an integer: its last byte is the code, rounded.
            Words number = (Words)(load(line + i) * inverse + (12582912.0f + 128.0f));
            Bytes code = __builtin_convertvector(number & 0xffu, Bytes);
            std::memcpy(codes + r * width + i, &code, sizeof code);
        }
    }
}

template <class T>
void scale(T* y, const T* scales, long rows, long width, int threads) {
#pragma omp parallel for num_threads(threads)
    for (long r = 0; r < rows; r++)
        for (long i = 0; i < width; i += W) store(y + r * width + i, load(y + r * width + i) * wide(scales[r]));
}

// One of the pairs of a layer, A (rank, inputs) and B (outputs, rank): where they stand among all pairs' numbers (`_Pair` in compiled.py).
struct Pair {
    int64_t a, b, rank, output, outputs;
    float scale;
};

// The pairs of a layer; A of one stands behind A of the other (`_Layer` in compiled.py).
struct Layer {
    const Pair* pairs;
    int64_t count, inputs, outputs, ranks, filled;  // ranks: of all pairs; filled: numbers of a line that has room for each pair's vectors
};

constexpr long TOKENS = 12;   // at a time, where a layer goes through its tokens
constexpr long COLUMNS = 96;  // at a time, where it goes through its inputs or outputs
constexpr long LINES = 256;   // tokens whose columns are held in fp32

template <class T>
inline void block(const T* x, long row, long rows, long columns, float* y) {
    for (long r = 0; r < rows; r++) widened(x + r * row, columns, y + r * columns);
}

// Memory of the thread that calls, for what all threads read.
float* panel(size_t numbers) {
    thread_local std::vector<float> held;
    if (held.size() < numbers) held.resize(numbers);
    return held.data();
}

// h = s x A' (tokens, filled), y += h B'.
template <class T>
void add_pairs(const T* x, T* y, float* h, const float* numbers, const Layer& layer, long tokens, int threads) {
    long inputs = layer.inputs, filled = layer.filled, ups = 0;
    for (long p = 0; p < layer.count; p++) ups += layer.pairs[p].rank * layer.pairs[p].outputs;
    float *down = panel(inputs * filled + ups), *first_up = down + inputs * filled;
#pragma omp parallel num_threads(threads)
    {
        float* of_pair = first_up;
        for (long p = 0, at = 0; p < layer.count; at += layer.pairs[p++].rank) {
            const Pair& pair = layer.pairs[p];
#pragma omp for schedule(static) nowait
            for (long j = 0; j < inputs; j++)
                for (long i = 0; i < pair.rank; i++) down[j * filled + at + i] = numbers[pair.a + i * inputs + j] * pair.scale;
#pragma omp for schedule(static) nowait
            for (long j = 0; j < pair.outputs; j += W)
                for (long i = 0; i < pair.rank; i++)
                    for (long k = j; k < j + W; k++) of_pair[i * pair.outputs + k] = numbers[pair.b + k * pair.rank + i];
            of_pair += pair.rank * pair.outputs;
        }
#pragma omp for schedule(static)
        for (long j = 0; j < inputs; j++)
            for (long i = layer.ranks; i < filled; i++) down[j * filled + i] = 0;
#pragma omp for schedule(static)
        for (long t = 0; t < tokens; t += TOKENS) {
            long n = std::min(TOKENS, tokens - t);
            scratch.start(TOKENS * inputs);
            float *wide = scratch.take(TOKENS * inputs), *lines = h + t * filled;
            block(x + t * inputs, inputs, n, inputs, wide);
            product(wide, {inputs, 1}, down, filled, lines, filled, n, filled, inputs, false);
            const float* up_at = first_up;
            for (long p = 0, at = 0; p < layer.count; at += layer.pairs[p++].rank) {
                const Pair& pair = layer.pairs[p];
                T* place = y + t * layer.outputs + pair.output;
                product(lines + at, {filled, 1}, up_at, pair.outputs, place, layer.outputs, n, pair.outputs, pair.rank, true);
                up_at += pair.rank * pair.outputs;
            }
        }
    }
}

// The gradients of A and B, added to all pairs' (`found`), and dx += s dy B A.
template <class T>
void add_pairs_back(const T* x, const float* h, const T* of_y, T* of_x, float* found, const float* numbers, const Layer& layer, long tokens,
                    int threads) {
    long inputs = layer.inputs, filled = layer.filled, ups = 0;
    for (long p = 0; p < layer.count; p++) ups += layer.pairs[p].outputs * up(layer.pairs[p].rank);
    float *first_up = panel(ups + tokens * filled), *of_h = first_up + ups;
#pragma omp parallel num_threads(threads)
    {
        float* of_pair = first_up;
        for (long p = 0; p < layer.count; p++) {
            const Pair& pair = layer.pairs[p];
            long wide = up(pair.rank);
#pragma omp for schedule(static) nowait
            for (long j = 0; j < pair.outputs; j++) {
                for (long i = 0; i < pair.rank; i++) of_pair[j * wide + i] = numbers[pair.b + j * pair.rank + i] * pair.scale;
                for (long i = pair.rank; i < wide; i++) of_pair[j * wide + i] = 0;
            }
            of_pair += pair.outputs * wide;
        }
#pragma omp barrier
#pragma omp for schedule(static)
        for (long t = 0; t < tokens; t += TOKENS) {
            long n = std::min(TOKENS, tokens - t);
            scratch.start(TOKENS * layer.outputs);
            float *wide = scratch.take(TOKENS * layer.outputs), *lines = of_h + t * filled;
            const float* up_at = first_up;
            // What is written behind a pair's ranks, the next one overwrites.
            for (long p = 0, at = 0; p < layer.count; at += layer.pairs[p++].rank) {
                const Pair& pair = layer.pairs[p];
                long columns = up(pair.rank);
                block(of_y + t * layer.outputs + pair.output, layer.outputs, n, pair.outputs, wide);
                product(wide, {pair.outputs, 1}, up_at, columns, lines + at, filled, n, columns, pair.outputs, false);
                up_at += pair.outputs * columns;
            }
            if (of_x)
                product(lines, {filled, 1}, numbers + layer.pairs[0].a, inputs, of_x + t * inputs, inputs, n, inputs, layer.ranks, true);
        }
        for (long p = 0, at = 0; p < layer.count; at += layer.pairs[p++].rank) {
            const Pair& pair = layer.pairs[p];
            long columns = up(pair.rank);
#pragma omp for schedule(static) nowait
            for (long j = 0; j < pair.outputs; j += COLUMNS) {
                long c = std::min(COLUMNS, pair.outputs - j);
                scratch.start(LINES * COLUMNS + COLUMNS * columns);
                float *wide = scratch.take(LINES * COLUMNS), *sums = scratch.take(COLUMNS * columns);
                for (long t = 0; t < tokens; t += LINES) {
                    long n = std::min(LINES, tokens - t);
                    block(of_y + t * layer.outputs + pair.output + j, layer.outputs, n, c, wide);
                    product(wide, {1, c}, h + t * filled + at, filled, sums, columns, c, columns, n, t > 0);
                }
                for (long m = 0; m < c; m++)
                    for (long i = 0; i < pair.rank; i++) found[pair.b + (j + m) * pair.rank + i] += sums[m * columns + i];
            }
        }
#pragma omp for schedule(static)
        for (long k = 0; k < inputs; k += COLUMNS) {
            long c = std::min(COLUMNS, inputs - k);
            scratch.start(LINES * COLUMNS);
            float* wide = scratch.take(LINES * COLUMNS);
            for (long t = 0; t < tokens; t += LINES) {
                long n = std::min(LINES, tokens - t);
                block(x + t * inputs + k, inputs, n, c, wide);
                product(of_h + t * filled, {1, filled}, wide, c, found + layer.pairs[0].a + k, inputs, layer.ranks, c, n, true);
            }
        }
    }
}

// Call with a number of the precision that is meant: compiled.py says 1 for bf16, 0 for fp32.
template <class F>
void typed(int half, F call) {
    if (half) call(Half{});
    else call(0.0f);
}

}  // namespace

extern "C" {

void slmops_normalize(int half_x, int half_y, const void* x, const void* weight, void* y, float* inverse, float epsilon, long rows,
                      long width, int threads) {
    typed(half_x, [&](auto of_x) {
        typed(half_y, [&](auto of_y) {
            using X = decltype(of_x);
            using Y = decltype(of_y);
            normalize((const X*)x, (const Y*)weight, (Y*)y, inverse, rows, width, epsilon, threads);
        });
    });
}

void slmops_normalize_back(int half_x, int half_y, const void* x, const void* weight, const float* inverse, const void* of_y, void* of_x,
                           long rows, long width, int threads) {
    typed(half_x, [&](auto one) {
        typed(half_y, [&](auto other) {
            using X = decltype(one);
            using Y = decltype(other);
            normalize_back((const X*)x, (const Y*)weight, inverse, (const Y*)of_y, (X*)of_x, rows, width, threads);
        });
    });
}

void slmops_gate(int half, const void* both, void* inner, long rows, long width, int threads) {
    typed(half, [&](auto t) {
        using T = decltype(t);
        gate((const T*)both, (T*)inner, rows, width, threads);
    });
}

void slmops_gate_back(int half, const void* both, const void* of_inner, void* of_both, long rows, long width, int threads) {
    typed(half, [&](auto t) {
        using T = decltype(t);
        gate_back((const T*)both, (const T*)of_inner, (T*)of_both, rows, width, threads);
    });
}

void slmops_attend(int half, const void* y, void* answer, const Shape* shape) {
    typed(half, [&](auto t) {
        using T = decltype(t);
        attend((const T*)y, (T*)answer, *shape);
    });
}

void slmops_attend_back(int half, const void* y, const void* of_answer, void* of_y, float* of_shared, const Shape* shape) {
    typed(half, [&](auto t) {
        using T = decltype(t);
        attend_back((const T*)y, (const T*)of_answer, (T*)of_y, of_shared, *shape);
    });
}

void slmops_quantize(int half, const void* x, uint8_t* codes, void* scales, long rows, long width, int threads) {
    typed(half, [&](auto t) {
        using T = decltype(t);
        quantize((const T*)x, codes, (T*)scales, rows, width, threads);
    });
}

void slmops_scale(int half, void* y, const void* scales, long rows, long width, int threads) {
    typed(half, [&](auto t) {
        using T = decltype(t);
        scale((T*)y, (const T*)scales, rows, width, threads);
    });
}

void slmops_add_pairs(int half, const void* x, void* y, float* h, const float* numbers, const Layer* layer, long tokens, int threads) {
    typed(half, [&](auto t) {
        using T = decltype(t);
        add_pairs((const T*)x, (T*)y, h, numbers, *layer, tokens, threads);
    });
}

void slmops_add_pairs_back(int half, const void* x, const float* h, const void* of_y, void* of_x, float* found, const float* numbers,
                           const Layer* layer, long tokens, int threads) {
    typed(half, [&](auto t) {
        using T = decltype(t);
        add_pairs_back((const T*)x, h, (const T*)of_y, (T*)of_x, found, numbers, *layer, tokens, threads);
    });
}
}
