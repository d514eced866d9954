// What NVRTC and CuPy give every kernel, for g++. No kernel here may share memory or wait for the
// other threads of its block: the threads run one after the other.
#include <algorithm>
#include <assert.h>
#include <math.h>
#include <stddef.h>
#include <stdint.h>

using std::isfinite;
using std::isinf;
using std::isnan;
using std::max;
using std::min;

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct Dim3 {
    unsigned x, y, z;
};
static Dim3 threadIdx, blockIdx, blockDim, gridDim;

// IEEE 754's half precision, rounded once, to even.
inline uint16_t half_bits(double value)
{
    const double size = fabs(value);
    uint16_t bits = 0x7e00;
    if (size >= 65520) {
        bits = 0x7c00;
    } else if (size < 0x1p-14) {
        bits = nearbyint(size * 0x1p24);
    } else if (size == size) {
        int exponent;
        frexp(size, &exponent);
        bits = ((exponent + 13) << 10) + nearbyint(ldexp(size, 11 - exponent));
    }
    return bits | (std::signbit(value) ? 0x8000 : 0);
}

inline float half_value(uint16_t bits)
{
    const int exponent = bits >> 10 & 31;
    const float fraction = bits & 1023;
    float size = exponent == 31 ? (fraction ? NAN : INFINITY)
        : exponent ? ldexpf(1024 + fraction, exponent - 25) : ldexpf(fraction, -24);
    return bits & 0x8000 ? -size : size;
}

// CuPy's type of elements.
struct float16 {
    uint16_t bits;
    float16() {}
    template <class T> float16(T value) : bits(half_bits(value)) {}
    operator float() const { return half_value(bits); }
    template <class T> float16 &operator+=(T other) { return *this = float16(*this + other); }
    template <class T> float16 &operator-=(T other) { return *this = float16(*this - other); }
    template <class T> float16 &operator*=(T other) { return *this = float16(*this * other); }
    template <class T> float16 &operator/=(T other) { return *this = float16(*this / other); }
};

inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
template <class T> T rsqrt(T x) { return 1 / sqrt(x); }
template <class T> T __ldg(const T *pointer) { return *pointer; }
template <class T> T atomicAdd(T *target, T value) { T old = *target; *target += value; return old; }
template <class T> T atomicOr(T *target, T value) { T old = *target; *target |= value; return old; }
template <class T> T atomicExch(T *target, T value) { T old = *target; *target = value; return old; }

// CuPy's arguments of elementwise kernels.
template <class T> struct CArray {
    T *data;
    ptrdiff_t n;
    T &operator[](ptrdiff_t i) const { return data[i]; }
    ptrdiff_t size() const { return n; }
};
struct Indexer {
    ptrdiff_t n;
    ptrdiff_t size() const { return n; }
};
