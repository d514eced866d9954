/* All functions for one instruction set; see functions.c, which includes this once per set. */

#define vf NAME(floats)
#define vi NAME(ints)
#define vd NAME(doubles)
typedef float vf __attribute__((vector_size(VL * 4), aligned(4), may_alias));
typedef int32_t vi __attribute__((vector_size(VL * 4), aligned(4), may_alias));
typedef double vd __attribute__((vector_size(VL * 8), aligned(8), may_alias));
#define LOAD(p) (*(const vf *)(p))
#define STORE(p, v) (*(vf *)(p) = (v))

#ifdef PLAIN
INLINE vf fma_of_each(vf a, vf b, vf c)
{
    vf r;
    for (int i = 0; i < VL; i++)
        r[i] = fmaf(a[i], b[i], c[i]);
    return r;
}
#endif

#include "convolution.h"
#include "layers.h"

#undef vf
#undef vi
#undef vd
#undef SET
#undef VL
#undef TILE2
#undef TILE1
#undef GTILE2
#undef GTILE1
#undef FMA
#undef EACH_IS
#undef LOAD
#undef STORE
