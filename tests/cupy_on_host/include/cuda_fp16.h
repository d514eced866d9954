// Includes what CUDA's own header declares, as far as kernels here need it.
#pragma once
typedef float16 half;
typedef float16 __half;
inline half __float2half_rn(float value) { return half(value); }
inline half __float2half(float value) { return half(value); }
inline float __half2float(half value) { return value; }
