/* exp and log in float64, without a fused operation: the same bits everywhere. */

static inline uint64_t bits_of(double value)
{
    uint64_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static inline double from_bits(uint64_t bits)
{
    double value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* exp(x) = 2**n * exp(r), where n is the integer nearest to x / log(2), so that |r| < 0.347: there
   the series up to r**13 / 13! leaves 1e-17. Beyond 200, where a float32 is infinite or 0, x counts
   as 200. The error is below 1e-15 of the result. */
static inline double exp_of(double x)
{
    x = x > 200 ? 200 : x < -200 ? -200 : x; /* NaN stays */
    const double shifted = x * 0x1.71547652b82fep0 + 0x1.8p52; /* its last bits are n */
    const double n = shifted - 0x1.8p52;
    const double r = (x - n * 0x1.62e42feep-1) - n * 0x1.a39ef35793c76p-33; /* log(2) in two parts */
    double sum = 1.0 / 6227020800;
    sum = sum * r + 1.0 / 479001600;
    sum = sum * r + 1.0 / 39916800;
    sum = sum * r + 1.0 / 3628800;
    sum = sum * r + 1.0 / 362880;
    sum = sum * r + 1.0 / 40320;
    sum = sum * r + 1.0 / 5040;
    sum = sum * r + 1.0 / 720;
    sum = sum * r + 1.0 / 120;
    sum = sum * r + 1.0 / 24;
    sum = sum * r + 1.0 / 6;
    sum = sum * r + 1.0 / 2;
    sum = sum * r + 1;
    sum = sum * r + 1;
    return sum * from_bits((bits_of(shifted) + 1023) << 52);
}

/* log(x) = n * log(2) + log(m), where x = 2**n * m and m is in [sqrt(1/2), sqrt(2)). With
   s = (m - 1) / (m + 1), log(m) = 2 * (s + s**3 / 3 + s**5 / 5 + ...), and |s| < 0.172: the series
   up to s**19 / 19 leaves 1e-17. x is a float32, or a sum of exponentials, and never subnormal
   as a float64. The error is below 1e-15 of the result, and 1e-16 near 1. */
static inline double log_of(double x)
{
    if (!(x > 0))
        return x == 0 ? -INFINITY : NAN;
    if (x == INFINITY)
        return x;
    const uint64_t half = 0x3fe6a09e667f3bcd; /* sqrt(1/2) */
    const int64_t n = (int64_t)(bits_of(x) - half) >> 52;
    const double m = from_bits(bits_of(x) - ((uint64_t)n << 52));
    const double s = (m - 1) / (m + 1), z = s * s;
    double sum = 1.0 / 19;
    for (int k = 17; k >= 3; k -= 2)
        sum = sum * z + 1.0 / k;
    return n * 0x1.62e42feep-1 + (2 * s + (2 * s * (sum * z) + n * 0x1.a39ef35793c76p-33));
}

void exp_float32(int64_t n, const float *x, float *y)
{
    for (int64_t i = 0; i < n; i++)
        y[i] = exp_of(x[i]);
}

void log_float32(int64_t n, const float *x, float *y)
{
    for (int64_t i = 0; i < n; i++)
        y[i] = log_of(x[i]);
}
