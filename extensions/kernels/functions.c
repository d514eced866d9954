/* A network's functions on float32, called by ../cpu_functions.py: the same source for several
   instruction sets, with the same bits. For this,

   - each sum has one order, which stands beside its code. It depends neither on the length of a
     vector nor on the memory's alignment: a vector holds different outputs, never parts of one sum;
   - a multiplication is fused with an addition where FMA or fmaf stands, and nowhere else: the
     compiler gets -ffp-contract=off;
   - exp and log are polynomials in float64.

   Arrays of images are [N, H, W, C] (channels last) and packed; weights are [K, C, ky, kx]. No
   function keeps anything: threads share nothing. Those that need memory of their own return
   whether they got none. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define PRAGMA(...) _Pragma(#__VA_ARGS__)
#ifdef __clang__
#define UNROLL PRAGMA(clang loop unroll(full))
#define BEGIN_TARGET(T) PRAGMA(clang attribute push(__attribute__((target(T))), apply_to = function))
#define END_TARGET PRAGMA(clang attribute pop)
#else
#define UNROLL PRAGMA(GCC unroll 16)
#define BEGIN_TARGET(T) PRAGMA(GCC push_options) PRAGMA(GCC target(T))
#define END_TARGET PRAGMA(GCC pop_options)
#endif
#define INLINE static inline __attribute__((always_inline))

/* Memory for `floats` values that begins at a cache line; null if there is none. */
static float *allocate(int64_t floats, void **memory)
{
    *memory = malloc(floats * sizeof(float) + 64);
    return *memory ? (float *)(((uintptr_t)*memory + 63) & ~(uintptr_t)63) : 0;
}

static int64_t round_up(int64_t n, int64_t k)
{
    return (n + k - 1) / k * k;
}

#include "exp_and_log.h"

/* VL is the number of float32 in a vector. The accumulators of a product are a tile of vectors in
   registers. TILE2 and TILE1 are its height where it is two vectors and one vector wide; GTILE2 and
   GTILE1 are those of the gradient by the weights. */
#define NAME(F) NAME_OF(F, SET)
#define NAME_OF(F, S) JOINED(F, S)
#define JOINED(F, S) F##_##S

#if defined(__x86_64__) && defined(__gnu_linux__)
#include <immintrin.h>

BEGIN_TARGET("avx512f,fma")
#define SET avx512
#define VL 16
#define TILE2 14
#define TILE1 14
#define GTILE2 8
#define GTILE1 16
#define FMA(a, b, c) ((vf)_mm512_fmadd_ps((__m512)(a), (__m512)(b), (__m512)(c)))
#define EACH_IS(s) ((vf)_mm512_set1_ps(s))
#include "functions.h"
END_TARGET

BEGIN_TARGET("avx2,fma")
#define SET avx2
#define VL 8
#define TILE2 6
#define TILE1 12
#define GTILE2 6
#define GTILE1 8
#define FMA(a, b, c) ((vf)_mm256_fmadd_ps((__m256)(a), (__m256)(b), (__m256)(c)))
#define EACH_IS(s) ((vf)_mm256_set1_ps(s))
#include "functions.h"
END_TARGET

/* The sets of this processor, the fastest first. */
const char *instruction_sets(void)
{
    const int fma = __builtin_cpu_supports("fma") && __builtin_cpu_supports("avx2");
    if (fma && __builtin_cpu_supports("avx512f"))
        return "avx512 avx2 plain";
    return fma ? "avx2 plain" : "plain";
}
#elif defined(__aarch64__)
#include <arm_neon.h>

#define SET neon
#define VL 4
#define TILE2 8
#define TILE1 8
#define GTILE2 8
#define GTILE1 8
#define FMA(a, b, c) ((vf)vfmaq_f32((float32x4_t)(c), (float32x4_t)(a), (float32x4_t)(b)))
#define EACH_IS(s) ((vf)vdupq_n_f32(s))
#include "functions.h"

const char *instruction_sets(void)
{
    return "neon plain";
}
#else
const char *instruction_sets(void)
{
    return "plain";
}
#endif

#define SET plain
#define VL 4
#define TILE2 4
#define TILE1 8
#define GTILE2 4
#define GTILE1 8
#define FMA(a, b, c) fma_of_each(a, b, c)
#define EACH_IS(s) ((vf){(s), (s), (s), (s)})
#define PLAIN
#include "functions.h"
