/* Batch normalization, ReLU, max pooling, averages, biases, and the loss. */

#define WIDE(v) __builtin_convertvector(v, vd)
#define NOT_BELOW_0(v) ((vf)((vi)(v) & ~((v) <= 0))) /* 0 where v < 0; NaN stays */
#define IF_ABOVE_0(y, v) ((vf)((vi)(v) & ((y) > 0)))

/* VECTORS for each vector, and SINGLES for each value that is left, of P rows of C: o is its place. */
#define EACH(VECTORS, SINGLES)                                                              \
    for (int64_t p = 0; p < P; p++) {                                                       \
        int64_t c = 0;                                                                      \
        for (; c + VL <= C; c += VL) {                                                      \
            const int64_t o = p * C + c;                                                    \
            VECTORS;                                                                        \
        }                                                                                   \
        for (; c < C; c++) {                                                                \
            const int64_t o = p * C + c;                                                    \
            SINGLES;                                                                        \
        }                                                                                   \
    }

#define ROWS 32

/* Per channel, two sums over the rows of [P, C]: blocks of 32 rows are summed in float32, each from
   0, and the blocks in float64, one after the other. Four vectors at once have pages and cache lines
   in common. */
#define VECTORS_OF(U, TERMS)                                                                \
    for (; c + U * VL <= C; c += U * VL) {                                                  \
        vf s[U], q[U];                                                                      \
        UNROLL for (int u = 0; u < U; u++) s[u] = q[u] = EACH_IS(0.0f);                     \
        for (int64_t p = start; p < end; p++)                                               \
            UNROLL for (int u = 0; u < U; u++) {                                            \
                const int64_t o = p * C + c + u * VL;                                       \
                TERMS(LOAD, FMA, vf, s[u], q[u], c + u * VL)                                \
            }                                                                               \
        UNROLL for (int u = 0; u < U; u++) {                                                \
            *(vd *)(sums + c + u * VL) += WIDE(s[u]);                                       \
            *(vd *)(sums + C + c + u * VL) += WIDE(q[u]);                                   \
        }                                                                                   \
    }
#define SUMS(TERMS)                                                                         \
    memset(sums, 0, 2 * C * sizeof *sums);                                                  \
    for (int64_t start = 0; start < P; start += ROWS) {                                     \
        const int64_t end = P - start < ROWS ? P : start + ROWS;                            \
        int64_t c = 0;                                                                      \
        VECTORS_OF(4, TERMS)                                                                \
        VECTORS_OF(1, TERMS)                                                                \
        for (; c < C; c++) {                                                                \
            float s = 0, q = 0;                                                             \
            for (int64_t p = start; p < end; p++) {                                         \
                const int64_t o = p * C + c;                                                \
                TERMS(*, fmaf, float, s, q, c)                                              \
            }                                                                               \
            sums[c] += s;                                                                   \
            sums[C + c] += q;                                                               \
        }                                                                                   \
    }

#define OF_VALUES(AT, FUSED, type, s, q, c)                                                 \
    const type v = AT(x + o) - AT(k + c);                                                   \
    s += v;                                                                                 \
    q = FUSED(v, v, q);
#define OF_GRADIENTS(AT, FUSED, type, s, q, c)                                              \
    const type g = AT(gy + o);                                                              \
    s += g;                                                                                 \
    q = FUSED(g, AT(x + o) - AT(k + c), q);

static void NAME(sums_of_values)(int64_t P, int64_t C, const float *x, const float *k, double *sums)
{
    SUMS(OF_VALUES)
}

static void NAME(sums_of_gradients)(int64_t P, int64_t C, const float *x, const float *k,
                                    const float *gy, double *sums)
{
    SUMS(OF_GRADIENTS)
}

/* y = (x - k) * scale + shift, where k, scale and shift [3, C] come from the statistics. */
static void NAME(normalize)(int64_t P, int64_t C, const float *x, const double *mean,
                            const double *inv_std, const float *gamma, const float *beta,
                            float *coefficients, float *y)
{
    float *k = coefficients, *scale = k + C, *shift = scale + C;
    for (int64_t c = 0; c < C; c++) {
        k[c] = mean[c];
        scale[c] = gamma[c] * inv_std[c];
        shift[c] = beta[c] - (mean[c] - k[c]) * (gamma[c] * inv_std[c]);
    }
    EACH(STORE(y + o, FMA(LOAD(x + o) - LOAD(k + c), LOAD(scale + c), LOAD(shift + c))),
         y[o] = fmaf(x[o] - k[c], scale[c], shift[c]))
}

/* y = (x - mean) / sqrt(var + eps) * gamma + beta, with the statistics of x, which are kept in
   `saved`: mean and 1 / sqrt(var + eps), [2, C]. The sums are of x - k, where k is the mean of 16
   rows at even distances, so that they hardly cancel. The running statistics (or null) become
   decay * running + (1 - decay) * new, with the variance times P / (P - 1). */
int NAME(batch_normalization)(int64_t P, int64_t C, double eps, double decay, const float *x,
                              const float *gamma, const float *beta, float *running_mean,
                              float *running_var, double *saved, float *y)
{
    void *memory;
    float *coefficients = allocate(8 * C, &memory), *k = coefficients;
    double *sums = (double *)(coefficients + round_up(3 * C, 2));
    if (!k)
        return 1;
    memset(sums, 0, C * sizeof *sums);
    for (int64_t i = 0; i < 16; i++)
        for (int64_t c = 0; c < C; c++)
            sums[c] += x[P * i / 16 * C + c];
    for (int64_t c = 0; c < C; c++)
        k[c] = sums[c] / 16;
    NAME(sums_of_values)(P, C, x, k, sums);
    double *mean = saved, *inv_std = saved + C;
    for (int64_t c = 0; c < C; c++) {
        const double d = sums[c] / P, square = sums[C + c] / P - d * d;
        const double var = square < 0 ? 0 : square; /* NaN stays */
        mean[c] = k[c] + d;
        inv_std[c] = 1 / sqrt(var + eps);
        if (running_mean) {
            running_mean[c] = decay * running_mean[c] + (1 - decay) * mean[c];
            running_var[c] = decay * running_var[c] + (1 - decay) * (var * P / (P > 1 ? P - 1 : 1));
        }
    }
    NAME(normalize)(P, C, x, mean, inv_std, gamma, beta, coefficients, y);
    free(memory);
    return 0;
}

/* The same with given statistics. */
int NAME(fixed_batch_normalization)(int64_t P, int64_t C, double eps, const float *x,
                                    const float *gamma, const float *beta, const float *mean,
                                    const float *var, float *y)
{
    void *memory;
    float *coefficients = allocate(8 * C, &memory);
    if (!coefficients)
        return 1;
    double *wide = (double *)(coefficients + round_up(3 * C, 2));
    for (int64_t c = 0; c < C; c++) {
        wide[c] = mean[c];
        wide[C + c] = 1 / sqrt(var[c] + eps);
    }
    NAME(normalize)(P, C, x, wide, wide + C, gamma, beta, coefficients, y);
    free(memory);
    return 0;
}

/* The gradients of batch_normalization. With z = (x - mean) * inv_std: gbeta = sum gy,
   ggamma = sum gy * z, gx = gamma * inv_std * (gy - (z * ggamma + gbeta) / P). */
int NAME(batch_normalization_gradients)(int64_t P, int64_t C, const float *x, const float *gamma,
                                        const double *saved, const float *gy, float *gx,
                                        float *ggamma, float *gbeta)
{
    void *memory;
    float *k = allocate(8 * C, &memory), *a = k + C, *b = a + C, *d = b + C;
    if (!k)
        return 1;
    double *sums = (double *)(k + 4 * C);
    const double *mean = saved, *inv_std = saved + C;
    for (int64_t c = 0; c < C; c++)
        k[c] = mean[c];
    NAME(sums_of_gradients)(P, C, x, k, gy, sums);
    for (int64_t c = 0; c < C; c++) {
        const double rest = mean[c] - k[c], scale = gamma[c] * inv_std[c];
        const double product = (sums[C + c] - rest * sums[c]) * inv_std[c];
        const double slope = -scale * inv_std[c] * product / P;
        ggamma[c] = product;
        gbeta[c] = sums[c];
        a[c] = scale;
        b[c] = slope;
        d[c] = -scale * sums[c] / P - slope * rest;
    }
    EACH(STORE(gx + o, FMA(LOAD(a + c), LOAD(gy + o),
                           FMA(LOAD(b + c), LOAD(x + o) - LOAD(k + c), LOAD(d + c)))),
         gx[o] = fmaf(a[c], gy[o], fmaf(b[c], x[o] - k[c], d[c])))
    free(memory);
    return 0;
}

/* ---- ReLU */

void NAME(relu)(int64_t C, const float *x, float *y)
{
    const int64_t P = 1;
    EACH(STORE(y + o, NOT_BELOW_0(LOAD(x + o))), y[o] = x[o] <= 0 ? 0 : x[o])
}

void NAME(relu_gx)(int64_t C, const float *y, const float *gy, float *gx)
{
    const int64_t P = 1;
    EACH(STORE(gx + o, IF_ABOVE_0(LOAD(y + o), LOAD(gy + o))), gx[o] = y[o] > 0 ? gy[o] : 0)
}

/* ---- max pooling */

/* y and the pixel of its maximum, the first in the order of the window's rows and columns. A NaN
   counts as the largest. A window lies at least partly on the image. */
void NAME(max_pooling)(int64_t N, int64_t H, int64_t W, int64_t C, int64_t ky, int64_t kx, int64_t sy,
                       int64_t sx, int64_t py, int64_t px, const float *x, float *y, int32_t *at)
{
    OUTPUT_SIDES;
    for (int64_t n = 0; n < N; n++)
        for (int64_t j = 0; j < OH; j++)
            for (int64_t i = 0; i < OW; i++, y += C, at += C) {
                int32_t first = -1; /* all bits */
                for (int64_t t = 0; t < ky * kx; t++) {
                    const int64_t row = j * sy + t / kx - py, column = i * sx + t % kx - px;
                    if (row < 0 || row >= H || column < 0 || column >= W)
                        continue;
                    const int32_t pixel = (n * H + row) * W + column;
                    const float *v = x + pixel * C;
                    int64_t c = 0;
                    for (; c + VL <= C; c += VL) {
                        const vf old = LOAD(y + c), new = LOAD(v + c);
                        const vi larger = first | (~(new <= old) & (old == old));
                        vi *place = (vi *)(at + c);
                        STORE(y + c, (vf)(((vi)new & larger) | ((vi)old & ~larger)));
                        *place = (larger & pixel) | (*place & ~larger);
                    }
                    for (; c < C; c++) {
                        const int larger = first | (!(v[c] <= y[c]) & (y[c] == y[c]));
                        y[c] = larger ? v[c] : y[c];
                        at[c] = larger ? pixel : at[c];
                    }
                    first = 0;
                }
            }
}

/* A pixel's gradients are added in the order of y's pixels. */
void NAME(max_pooling_gx)(int64_t pixels_of_x, int64_t pixels, int64_t C, const float *gy,
                          const int32_t *at, float *gx)
{
    memset(gx, 0, pixels_of_x * C * sizeof *gx);
    for (int64_t p = 0; p < pixels; p++, gy += C, at += C)
        for (int64_t c = 0; c < C; c++)
            gx[at[c] * C + c] += gy[c];
}

/* ---- averages over an image, and biases */

/* y [N, C] = factor * sum of the P pixels of x [N, P, C], one after the other in float64. */
int NAME(sum_pixels)(int64_t N, int64_t P, int64_t C, double factor, const float *x, float *y)
{
    double *sum = malloc(C * sizeof *sum + 1);
    if (!sum)
        return 1;
    for (int64_t n = 0; n < N; n++, y += C) {
        memset(sum, 0, C * sizeof *sum);
        for (int64_t p = 0; p < P; p++, x += C)
            for (int64_t c = 0; c < C; c++)
                sum[c] += x[c];
        for (int64_t c = 0; c < C; c++)
            y[c] = factor * sum[c];
    }
    free(sum);
    return 0;
}

/* gx [N, P, C] = factor * gy [N, C] */
void NAME(spread)(int64_t N, int64_t P, int64_t C, double factor, const float *gy, float *gx)
{
    for (int64_t n = 0; n < N; n++, gy += C)
        for (int64_t p = 0; p < P; p++, gx += C)
            for (int64_t c = 0; c < C; c++)
                gx[c] = factor * gy[c];
}

/* y [P, K] += b [K] */
void NAME(add_bias)(int64_t P, int64_t K, const float *b, float *y)
{
    for (int64_t p = 0; p < P; p++, y += K)
        for (int64_t k = 0; k < K; k++)
            y[k] += b[k];
}

/* ---- softmax cross entropy */

/* The loss is -factor times the sum of log(softmax(x)[n, t[n]]) over n, one after the other, without
   those whose t is `ignored`. Each image's own, without the factor, is put into losses [N], and
   softmax(x) into y. Sums over classes go from the first to the last. All is float64, until it is
   stored. */
void NAME(softmax_cross_entropy)(int64_t N, int64_t K, int32_t ignored, double factor,
                                 const float *x, const int32_t *t, float *y, float *loss,
                                 float *losses)
{
    double total = 0;
    for (int64_t n = 0; n < N; n++, x += K, y += K) {
        float largest = x[0];
        double sum = 0;
        for (int64_t k = 1; k < K; k++)
            largest = x[k] > largest ? x[k] : largest;
        for (int64_t k = 0; k < K; k++)
            sum += exp_of((double)x[k] - largest);
        for (int64_t k = 0; k < K; k++)
            y[k] = exp_of((double)x[k] - largest) / sum;
        const double own = t[n] == ignored ? 0 : (double)x[t[n]] - largest - log_of(sum);
        total += own;
        losses[n] = 0 - own;
    }
    *loss = -factor * total;
}

/* gx = factor * (y - 1 where the class is t), 0 where t is ignored. */
void NAME(softmax_cross_entropy_gx)(int64_t N, int64_t K, int32_t ignored, double factor,
                                    const float *y, const int32_t *t, float *gx)
{
    for (int64_t n = 0; n < N; n++)
        for (int64_t k = 0; k < K; k++, y++, gx++)
            *gx = t[n] == ignored ? 0 : factor * ((double)*y - (k == t[n]));
}

#undef WIDE
#undef NOT_BELOW_0
#undef IF_ABOVE_0
#undef EACH
#undef ROWS
#undef VECTORS_OF
#undef SUMS
#undef OF_VALUES
#undef OF_GRADIENTS
