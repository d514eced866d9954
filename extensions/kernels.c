/* The CPU's inner loops, for kernels.py. Compiled with -ffp-contract=off: a fused multiply-add would
   round once where NumPy rounds twice. */

#include <stdint.h>
#include <tgmath.h>

/* One copy for each instruction set; the processor's is chosen when the library is loaded. */
#if defined(__x86_64__) && defined(__gnu_linux__)
#define VECTORIZED __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define VECTORIZED
#endif

const char *source_digest(void) { return SOURCE_DIGEST; }

#define PARAMETERS(T)                                                                       \
    int64_t size, const T *grads, T lr, T alpha_sgd, T alpha_rmsprop, T mu1, T mu2,         \
        T one_minus_mu2, T eps, T *params, T *ms, T *deltas
#define FOR_EACH_ELEMENT                                                                    \
    _Pragma("GCC ivdep") for (int64_t i = 0; i < size; i++)                                 \
    {                                                                                       \
        const T grad = grads[i];                                                            \
        T param = params[i], m = ms[i], delta = deltas[i];
#define END                                                                                 \
        params[i] = param, ms[i] = m, deltas[i] = delta;                                    \
    }

VECTORIZED void rmsprop_warmup_float32(PARAMETERS(float))
{
    typedef float T;
    FOR_EACH_ELEMENT
#include "rmsprop_warmup_element.h"
    END
}

VECTORIZED void rmsprop_warmup_float64(PARAMETERS(double))
{
    typedef double T;
    FOR_EACH_ELEMENT
#include "rmsprop_warmup_element.h"
    END
}
