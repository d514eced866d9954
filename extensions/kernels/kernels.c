/* The CPU's inner loops, called by kernels/__init__.py. They are compiled with -ffp-contract=off: a
   fused multiply-add would round once where NumPy rounds twice. */

#include <float.h>
#include <stdint.h>
#include <string.h>
#include <tgmath.h>

#if defined(__FAST_MATH__) || (defined(__GCC_IEC_559) && __GCC_IEC_559 == 0) || FLT_EVAL_METHOD
#error "this compiler's float arithmetic is not NumPy's"
#endif

/* One copy of a function per instruction set. Loading the library selects the processor's copy. The
   functions are static: Clang before 18 exports them under other names. */
#if defined(__x86_64__) && defined(__gnu_linux__) && __has_attribute(target_clones)
#define VECTORIZED __attribute__((target_clones("avx512f", "avx2", "default"))) static
#else
#define VECTORIZED static
#endif

#define PARAMETERS(T)                                                                       \
    int64_t size, const T *grads, T lr, T alpha_sgd, T alpha_rmsprop, T mu1, T mu2,         \
        T one_minus_mu2, T eps, T weight_decay_rate, T *params, T *ms, T *deltas
#define FOR_EACH_ELEMENT                                                                    \
    _Pragma("GCC ivdep") for (int64_t i = 0; i < size; i++)                                 \
    {                                                                                       \
        const T grad = grads[i];                                                            \
        T param = params[i], m = ms[i], delta = deltas[i];
#define END                                                                                 \
        params[i] = param, ms[i] = m, deltas[i] = delta;                                    \
    }

VECTORIZED void update_float32(PARAMETERS(float))
{
    typedef float T;
    FOR_EACH_ELEMENT
#include "../rmsprop_warmup_element.h"
    END
}

VECTORIZED void update_float64(PARAMETERS(double))
{
    typedef double T;
    FOR_EACH_ELEMENT
#include "../rmsprop_warmup_element.h"
    END
}

/* Updates all parameters in one call, because each call from Python takes microseconds. `arrays`
   holds the gradient, the parameter, m and delta of each parameter. `values` holds its
   hyper-parameters, in the order of PARAMETERS. */
#define UPDATE_ALL(NAME, T, UPDATE)                                                         \
    void NAME(int64_t n, const int64_t *sizes, T *const (*arrays)[4], const double (*values)[8]) \
    {                                                                                       \
        for (int64_t k = 0; k < n; k++) {                                                   \
            T *const *a = arrays[k];                                                        \
            const double *v = values[k];                                                    \
            UPDATE(sizes[k], a[0], v[0], v[1], v[2], v[3], v[4], v[5], v[6], v[7], a[1], a[2], \
                   a[3]);                                                                   \
        }                                                                                   \
    }

UPDATE_ALL(rmsprop_warmup_float32, float, update_float32)
UPDATE_ALL(rmsprop_warmup_float64, double, update_float64)

/* ---- float32 on the wire */

/* Like UPDATE_ALL, these process all parameters in one call. On the wire, the arrays of the
   parameters lie one after the other. */
#define PACK_ALL(NAME, WIRE, PACK)                                                          \
    void NAME(int64_t n, const int64_t *sizes, const float *const *in, float scale, WIRE *out, \
              int64_t (*counts)[4])                                                         \
    {                                                                                       \
        for (int64_t k = 0; k < n; out += sizes[k++])                                       \
            PACK(sizes[k], in[k], scale, out, counts[k]);                                   \
    }
#define UNPACK_ALL(NAME, WIRE, UNPACK)                                                      \
    void NAME(int64_t n, const int64_t *sizes, const WIRE *in, float scale, float *const *out, \
              int64_t *not_finite)                                                          \
    {                                                                                       \
        for (int64_t k = 0; k < n; in += sizes[k++])                                        \
            not_finite[k] = UNPACK(sizes[k], in, scale, out[k]);                            \
    }

#define BLOCK 1024 /* values: a block stays in the first-level cache */

static inline int32_t magnitude_of(float value)
{
    union { float number; int32_t bits; } u = {.number = value};
    return u.bits & 0x7fffffff;
}

#define INFINITE_FLOAT 0x7f800000 /* the bits of an infinite float32, without its sign */

/* out = scale * in. Adds to counts the number of nonzero values of in, and the numbers of nonzero,
   infinite and NaN values of out. */
VECTORIZED void pack_float32(int64_t size, const float *in, float scale, float *out,
                             int64_t *counts)
{
    for (int64_t start = 0; start < size; start += BLOCK) {
        const int64_t n = size - start < BLOCK ? size - start : BLOCK;
        int32_t nonzero = 0, sent = 0, not_finite = 0, nan = 0;
        for (int64_t i = start; i < start + n; i++) {
            const float value = scale * in[i];
            const int32_t magnitude = magnitude_of(value);
            out[i] = value;
            nonzero += magnitude_of(in[i]) != 0;
            sent += magnitude != 0;
            not_finite += magnitude >= INFINITE_FLOAT;
            nan += magnitude > INFINITE_FLOAT;
        }
        counts[0] += nonzero, counts[1] += sent, counts[2] += not_finite - nan, counts[3] += nan;
    }
}

/* out = scale * in. Returns the number of infinite or NaN values of in. */
VECTORIZED int64_t unpack_float32(int64_t size, const float *in, float scale, float *out)
{
    int64_t not_finite = 0;
    for (int64_t start = 0; start < size; start += BLOCK) {
        const int64_t n = size - start < BLOCK ? size - start : BLOCK;
        int32_t count = 0;
        for (int64_t i = start; i < start + n; i++) {
            count += magnitude_of(in[i]) >= INFINITE_FLOAT;
            out[i] = scale * in[i];
        }
        not_finite += count;
    }
    return not_finite;
}

PACK_ALL(pack_float32_float32, float, pack_float32)
UNPACK_ALL(unpack_float32_float32, float, unpack_float32)

/* Row r of the sum: `own` if r is `place`, or else a row that was received. */
#define ROW(r) ((r == place ? own : in + (r - (r > place)) * stride) + start)

/* out = float32(sum of the rows / divisor), summed in float64. `own` may be out. The received rows
   begin at `in`, and their beginnings are `stride` values apart. */
VECTORIZED void mean_float32(int64_t size, int64_t rows, int64_t place, const float *own,
                             int64_t stride, const float *in, double divisor, float *out)
{
    double sum[BLOCK];
    for (int64_t start = 0; start < size; start += BLOCK) {
        const int64_t n = size - start < BLOCK ? size - start : BLOCK;
        for (int64_t r = 0; r < rows; r++) {
            const float *row = ROW(r);
            for (int64_t i = 0; i < n; i++)
                sum[i] = r ? sum[i] + row[i] : row[i];
        }
        for (int64_t i = 0; i < n; i++)
            out[start + i] = sum[i] / divisor;
    }
}

void mean_float32_float32(int64_t size, int64_t rows, int64_t place, const float *own,
                          int64_t stride, const float *in, double divisor, float *out)
{
    mean_float32(size, rows, place, own, stride, in, divisor, out);
}

/* ---- float16, with instructions that x86-64 processors have had since 2013. On other processors,
   NumPy converts. */

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>

#define HALF __attribute__((target("avx2,f16c")))
#define LARGE (1 << 17) /* values: a cache does not keep so many until they are needed */

/* Compilers ask for AVX2 (and for the system's support of it), but not all of them for F16C. */
int has_float16(void)
{
    unsigned a, b, c = 0, d;
    return __builtin_cpu_supports("avx2") && __get_cpuid(1, &a, &b, &c, &d) && c & bit_F16C;
}

static inline HALF void to_float16(int64_t size, const float *in, uint16_t *out)
{
    int64_t i = 0;
    for (; i + 8 <= size; i += 8)
        _mm_storeu_si128((__m128i *)(out + i), _mm256_cvtps_ph(_mm256_loadu_ps(in + i), 0));
    for (; i < size; i++)
        out[i] = _cvtss_sh(in[i], 0);
}

static inline HALF void from_float16(int64_t size, const uint16_t *in, float *out)
{
    int64_t i = 0;
    for (; i + 8 <= size; i += 8)
        _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(in + i))));
    for (; i < size; i++)
        out[i] = _cvtsh_ss(in[i]);
}

/* memcpy past the caches: the destination is not read into them before it is written. */
static inline HALF void stream(void *out, const void *in, int64_t bytes)
{
    char *to = out;
    const char *from = in, *end = from + bytes;
    int64_t head = -(uintptr_t)to & 31;
    head = head < bytes ? head : bytes;
    memcpy(to, from, head);
    for (to += head, from += head; from + 32 <= end; to += 32, from += 32)
        _mm256_stream_si256((__m256i *)to, _mm256_loadu_si256((const __m256i *)from));
    memcpy(to, from, end - from);
}

#define INFINITE 0x7c00 /* the bits of an infinite float16, without its sign */

/* out = float16(scale * in). Adds to counts the number of nonzero values of in, and the numbers of
   nonzero, infinite and NaN values of out. A block is counted while it is still in the first-level
   cache. */
HALF void pack_float16(int64_t size, const float *in, float scale, uint16_t *out, int64_t *counts)
{
    float block[BLOCK];
    for (int64_t start = 0; start < size; start += BLOCK) {
        const int64_t n = size - start < BLOCK ? size - start : BLOCK;
        int32_t nonzero = 0;
        int16_t sent = 0, not_finite = 0, nan = 0; /* counts up to n fit */
        for (int64_t i = 0; i < n; i++) {
            nonzero += in[start + i] != 0;
            block[i] = scale * in[start + i];
        }
        to_float16(n, block, out + start);
        for (int64_t i = 0; i < n; i++) {
            const int16_t magnitude = out[start + i] & 0x7fff;
            sent += magnitude != 0;
            not_finite += magnitude >= INFINITE;
            nan += magnitude > INFINITE;
        }
        counts[0] += nonzero, counts[1] += sent, counts[2] += not_finite - nan, counts[3] += nan;
    }
}

/* out = scale * float32(in). Returns the number of infinite or NaN values of in. */
HALF int64_t unpack_float16(int64_t size, const uint16_t *in, float scale, float *out)
{
    float block[BLOCK];
    int64_t not_finite = 0;
    for (int64_t start = 0; start < size; start += BLOCK) {
        const int64_t n = size - start < BLOCK ? size - start : BLOCK;
        int16_t count = 0;
        from_float16(n, in + start, block);
        for (int64_t i = 0; i < n; i++) {
            block[i] *= scale;
            count += (int16_t)(in[start + i] & 0x7fff) >= INFINITE;
        }
        not_finite += count;
        if (size < LARGE)
            memcpy(out + start, block, n * sizeof *block);
        else
            stream(out + start, block, n * sizeof *block);
    }
    _mm_sfence();
    return not_finite;
}

PACK_ALL(pack_float32_float16, uint16_t, pack_float16)
UNPACK_ALL(unpack_float16_float32, uint16_t, unpack_float16)

/* One loop over blocks that stay in the first-level cache. STATEMENT runs for each float i of a
   block of n floats that begins at start. */
#define FOR_EACH_FLOAT16(STATEMENT)                                                         \
    float block[BLOCK];                                                                     \
    for (int64_t start = 0; start < size; start += BLOCK) {                                 \
        const int64_t n = size - start < BLOCK ? size - start : BLOCK;                      \
        from_float16(n, in + start, block);                                                 \
        for (int64_t i = 0; i < n; i++)                                                     \
            STATEMENT;                                                                      \
    }

HALF void widen_float16(int64_t size, const uint16_t *in, double *out)
{
    FOR_EACH_FLOAT16(out[start + i] = block[i])
}

HALF void add_float16(int64_t size, const uint16_t *in, double *sum)
{
    FOR_EACH_FLOAT16(sum[start + i] += block[i])
}

/* The float16 nearest to a float64, ties to even, as a float64. The shift is 1.5 * 2**52 times the
   float16's unit in the last place. A float64 of this size has no bits below the unit, so the
   addition rounds. The unit is 2**-10 of the value's power of two, and at least 2**-24. */
static inline double to_half(double value)
{
    union { double number; uint64_t bits; } power = {.number = value}, half, sign = {.number = value};
    power.bits &= 0x7ff0000000000000;
    double shift = power.number * 0x1.8p42;
    shift = shift > 0x1.8p28 ? shift : 0x1.8p28;
    shift = shift < 0x1.8p58 ? shift : 0x1.8p58; /* infinity stays infinite */
    half.number = (value + shift) - shift;
    half.bits |= sign.bits & 0x8000000000000000; /* sign of -0 and of values that round to it */
    return half.number;
}

/* out = float16(sum of the rows / divisor), summed as in mean_float32_float32. WIDEN converts the n
   values of a row that begin at `row` to float32 or float64 values `v`. */
#define MEAN(NAME, T, V, WIDEN)                                                             \
    HALF void NAME(int64_t size, int64_t rows, int64_t place, const T *own, int64_t stride, \
                   const T *in, double divisor, uint16_t *out)                              \
    {                                                                                       \
        double sum[BLOCK];                                                                  \
        float block[BLOCK];                                                                 \
        for (int64_t start = 0; start < size; start += BLOCK) {                             \
            const int64_t n = size - start < BLOCK ? size - start : BLOCK;                  \
            for (int64_t r = 0; r < rows; r++) {                                            \
                const T *row = ROW(r);                                                      \
                const V *v = WIDEN;                                                         \
                for (int64_t i = 0; i < n; i++)                                             \
                    sum[i] = r ? sum[i] + v[i] : v[i];                                      \
            }                                                                               \
            for (int64_t i = 0; i < n; i++)                                                 \
                block[i] = to_half(sum[i] / divisor);                                       \
            to_float16(n, block, out + start);                                              \
        }                                                                                   \
    }

MEAN(mean_float16_float16, uint16_t, float, (from_float16(n, row, block), block))
MEAN(mean_float64_float16, double, double, row)
#endif
