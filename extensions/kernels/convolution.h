/* Convolution: implicit matrix products, which read the pixels of an image where they lie. */

/* A convolution's shapes: x [N, H, W, C], y [N, OH, OW, K], weights [K, C, ky, kx]. */
#define GEOMETRY                                                                            \
    int64_t N, int64_t H, int64_t W, int64_t C, int64_t K, int64_t ky, int64_t kx, int64_t sy, \
        int64_t sx, int64_t py, int64_t px
#define OUTPUT_SIDES                                                                        \
    const int64_t OH = (H + 2 * py - ky) / sy + 1, OW = (W + 2 * px - kx) / sx + 1
#define ROWS_AT_ONCE 1024

#undef CHAIN
#define CHAIN 64

/* c[i] = sum over t, then l, of a[i][t * tap + l] * b[t * len + l], for HEIGHT rows and WIDTH
   vectors at once: `taps` runs of `len` products each. It is a sum of chains of fused multiply-adds
   from 0, because the error of one long chain is larger. A run is cut into pieces of up to 64
   products. A chain takes whole pieces, also of several runs, until it has 64 products or more.
   `valid` of the columns exist. The caches fetch the lines of c meanwhile. */
#undef PRODUCT
#define PRODUCT(F, HEIGHT, WIDTH)                                                           \
    INLINE void NAME(F)(const float *const *a, int64_t taps, int64_t tap, int64_t len,      \
                        const float *b, float *const *c, int64_t valid)                     \
    {                                                                                       \
        vf sum[HEIGHT][WIDTH], total[HEIGHT][WIDTH];                                        \
        int64_t done = 0, chains = 0;                                                       \
        UNROLL for (int i = 0; i < HEIGHT; i++)                                             \
            UNROLL for (int v = 0; v < WIDTH; v++) {                                        \
                sum[i][v] = EACH_IS(0.0f);                                                  \
                __builtin_prefetch(c[i] + v * VL, 1);                                       \
            }                                                                               \
        for (int64_t t = 0; t < taps; t++)                                                  \
            for (int64_t start = 0; start < len; start += CHAIN) {                          \
                const int64_t n = len - start < CHAIN ? len - start : CHAIN;                \
                const float *p[HEIGHT];                                                     \
                if (done >= CHAIN) {                                                        \
                    UNROLL for (int i = 0; i < HEIGHT; i++)                                 \
                        UNROLL for (int v = 0; v < WIDTH; v++) {                            \
                            if (chains)                                                     \
                                sum[i][v] = total[i][v] + sum[i][v];                        \
                            total[i][v] = sum[i][v];                                        \
                            sum[i][v] = EACH_IS(0.0f);                                      \
                        }                                                                   \
                    done = 0, chains++;                                                     \
                }                                                                           \
                UNROLL for (int i = 0; i < HEIGHT; i++) p[i] = a[i] + t * tap + start;      \
                for (int64_t l = 0; l < n; l++, b += WIDTH * VL) {                          \
                    vf w[WIDTH];                                                            \
                    UNROLL for (int v = 0; v < WIDTH; v++) w[v] = LOAD(b + v * VL);         \
                    UNROLL for (int i = 0; i < HEIGHT; i++) {                               \
                        const vf s = EACH_IS(p[i][l]);                                      \
                        UNROLL for (int v = 0; v < WIDTH; v++)                              \
                            sum[i][v] = FMA(s, w[v], sum[i][v]);                            \
                    }                                                                       \
                }                                                                           \
                done += n;                                                                  \
            }                                                                               \
        UNROLL for (int i = 0; i < HEIGHT; i++) {                                           \
            float row[WIDTH * VL];                                                          \
            float *to = valid == WIDTH * VL ? c[i] : row;                                   \
            UNROLL for (int v = 0; v < WIDTH; v++) {                                        \
                if (chains)                                                                 \
                    sum[i][v] = total[i][v] + sum[i][v];                                    \
                STORE(to + v * VL, sum[i][v]);                                              \
            }                                                                               \
            if (valid < WIDTH * VL)                                                         \
                memcpy(c[i], row, valid * sizeof(float));                                   \
        }                                                                                   \
    }
PRODUCT(product2, TILE2, 2)
PRODUCT(product1, TILE1, 1)

/* g[i] += sum over p of a[p][i] * b[p]: one chain from 0, whose end is added to g. The rows of a are
   `lda` apart; those of b begin at off[p], or are packed if off is null. */
#undef OUTER
#define OUTER(F, HEIGHT, WIDTH, B)                                                          \
    INLINE void NAME(F)(int64_t n, const float *a, int64_t lda, const float *b,             \
                        const int64_t *off, float *g, int64_t ldg, int64_t rows)            \
    {                                                                                       \
        vf sum[HEIGHT][WIDTH];                                                              \
        (void)off;                                                                          \
        UNROLL for (int i = 0; i < HEIGHT; i++)                                             \
            UNROLL for (int v = 0; v < WIDTH; v++) sum[i][v] = EACH_IS(0.0f);               \
        for (int64_t p = 0; p < n; p++, a += lda) {                                         \
            vf w[WIDTH];                                                                    \
            UNROLL for (int v = 0; v < WIDTH; v++) w[v] = LOAD((B) + v * VL);               \
            UNROLL for (int i = 0; i < HEIGHT; i++) {                                       \
                const vf s = EACH_IS(a[i]);                                                 \
                UNROLL for (int v = 0; v < WIDTH; v++) sum[i][v] = FMA(s, w[v], sum[i][v]); \
            }                                                                               \
        }                                                                                   \
        UNROLL for (int i = 0; i < HEIGHT; i++)                                             \
            if (i < rows)                                                                   \
                UNROLL for (int v = 0; v < WIDTH; v++)                                      \
                    STORE(g + i * ldg + v * VL, LOAD(g + i * ldg + v * VL) + sum[i][v]);    \
    }
OUTER(outer_packed2, GTILE2, 2, b + p * 2 * VL)
OUTER(outer_packed1, GTILE1, 1, b + p * VL)
OUTER(outer_direct2, GTILE2, 2, b + off[p])
OUTER(outer_direct1, GTILE1, 1, b + off[p])

/* Copies the images with zeros around them. */
static void NAME(pad)(int64_t N, int64_t H, int64_t W, int64_t C, int64_t top, int64_t bottom,
                      int64_t left, int64_t right, const float *x, float *out)
{
    const int64_t row = (W + left + right) * C;
    for (int64_t n = 0; n < N; n++) {
        memset(out, 0, top * row * sizeof *out);
        out += top * row;
        for (int64_t y = 0; y < H; y++, x += W * C, out += row) {
            memset(out, 0, left * C * sizeof *out);
            memcpy(out + left * C, x, W * C * sizeof *out);
            memset(out + (left + W) * C, 0, right * C * sizeof *out);
        }
        memset(out, 0, bottom * row * sizeof *out);
        out += bottom * row;
    }
}

/* The pixels (n, j, i) of N x J x I, of which one begins at n * of_n + j * of_j + i * of_i. */
typedef struct {
    int64_t of_n, of_j, of_i;
} NAME(steps);

/* The rows that the second-level cache keeps while all M columns of B pass. */
static int64_t NAME(block_of)(int64_t taps, int64_t len, int64_t M)
{
    const int64_t height = M > VL ? TILE2 : TILE1;
    int64_t block = (taps > 1 ? 1 << 17 : 1 << 16) / (taps * len) / height * height;
    block = block < 4 * height ? 4 * height : block;
    return block > ROWS_AT_ONCE ? ROWS_AT_ONCE / height * height : block;
}

/* The memory for copies of a block's rows. They are copied if a tile has more rows than a set of the
   first-level cache has lines, and the rows are so far apart that all fall into one set. */
static int64_t NAME(copies_of)(int64_t taps, int64_t len, int64_t step, int64_t M)
{
    const int clash = TILE2 > 8 && taps == 1 && step % 1024 == 0;
    return clash ? NAME(block_of)(taps, len, M) * (len + 16) : 0;
}

/* out = rows * B, for each pixel. A row is `taps` pieces of `len` values, which begin `tap` apart.
   B is [M / width][taps * len][width], for tiles of this width; M columns exist. */
static void NAME(multiply)(int64_t N, int64_t J, int64_t I, const float *in, NAME(steps) from,
                           int64_t taps, int64_t tap, int64_t len, const float *B, int64_t M,
                           float *copies, float *out, NAME(steps) to)
{
    const int64_t height = M > VL ? TILE2 : TILE1, width = M > VL ? 2 * VL : VL, P = N * J * I;
    const int64_t block = NAME(block_of)(taps, len, M);
    const float *a[ROWS_AT_ONCE + 16];
    float *c[ROWS_AT_ONCE], nowhere[2 * VL];
    int64_t n = 0, j = 0, i = 0;
    for (int64_t start = 0; start < P; start += block) {
        const int64_t m = P - start < block ? P - start : block;
        for (int64_t k = 0; k < m; k++) {
            a[k] = in + n * from.of_n + j * from.of_j + i * from.of_i;
            if (copies)
                a[k] = memcpy(copies + k * (len + 16), a[k], len * sizeof *copies);
            c[k] = out + n * to.of_n + j * to.of_j + i * to.of_i;
            if (++i == I) {
                i = 0;
                if (++j == J)
                    j = 0, n++;
            }
        }
        for (int64_t k = m; k < round_up(m, height); k++)
            a[k] = a[0];
        const float *b = B;
        for (int64_t f = 0; f < M; f += width, b += taps * len * width) {
            const int64_t valid = M - f < width ? M - f : width;
            for (int64_t k = 0; k < m; k += height) {
                float *row[16];
                for (int64_t q = 0; q < height; q++)
                    row[q] = k + q < m ? c[k + q] + f : nowhere;
                if (M > VL)
                    NAME(product2)(a + k, taps, tap, len, b, row, valid);
                else
                    NAME(product1)(a + k, taps, tap, len, b, row, valid);
            }
        }
    }
}

#undef COLUMNS
#define COLUMNS 128

/* B [K / width][tap][C][width] = w [K, C, tap], with zeros beyond K. Up to 128 values of each row
   are copied first, to rows that do not push each other out of the cache. */
static void NAME(pack_weights)(int64_t C, int64_t K, int64_t taps, const float *w, int64_t width,
                               float *B)
{
    const int64_t pitch = COLUMNS + 16, row = C * taps;
    float copy[2 * VL * (COLUMNS + 16)] = {0};
    for (int64_t f = 0; f < K; f += width, w += width * row, B += row * width) {
        const int64_t valid = K - f < width ? K - f : width;
        if (valid < width)
            memset(copy, 0, sizeof copy);
        int64_t c = 0, t = 0;
        for (int64_t start = 0; start < row; start += COLUMNS) {
            const int64_t n = row - start < COLUMNS ? row - start : COLUMNS;
            for (int64_t i = 0; i < valid; i++)
                memcpy(copy + i * pitch, w + i * row + start, n * sizeof *copy);
            for (int64_t q = 0; q < n; q++) {
                float *b = B + (t * C + c) * width;
                for (int64_t i = 0; i < width; i++)
                    b[i] = copy[i * pitch + q];
                if (++t == taps)
                    t = 0, c++;
            }
        }
    }
}

/* y = x * w. A sum's order: rows of the kernel, its columns, channels; see PRODUCT. */
int NAME(convolution)(GEOMETRY, const float *x, const float *w, float *y)
{
    OUTPUT_SIDES;
    const int64_t Hp = H + 2 * py, Wp = W + 2 * px, taps = ky * kx, padded = py || px;
    const int64_t width = K > VL ? 2 * VL : VL, weights = round_up(K, width) * taps * C;
    const int64_t copied = NAME(copies_of)(taps, C, sx * C, K);
    void *memory;
    float *B = allocate(weights + copied + (padded ? N * Hp * Wp * C : 0), &memory);
    if (!B)
        return 1;
    float *copies = copied ? B + weights : 0, *X = B + weights + copied;
    NAME(pack_weights)(C, K, taps, w, width, B);
    if (padded)
        NAME(pad)(N, H, W, C, py, py, px, px, x, X);
    const float *in = padded ? X : x;
    if (taps == 1 && sy == 1 && sx == 1) /* one row of all pixels */
        NAME(multiply)(1, 1, N * Hp * Wp, in, (NAME(steps)){0, 0, C}, 1, 0, C, B, K, copies, y,
                       (NAME(steps)){0, 0, K});
    else
        NAME(multiply)(N, OH, OW, in, (NAME(steps)){Hp * Wp * C, sy * Wp * C, sx * C}, ky, Wp * C,
                       kx * C, B, K, copies, y, (NAME(steps)){OH * OW * K, OW * K, K});
    free(memory);
    return 0;
}

/* Along one axis, the pixels q of x with q % stride == r get gradients through the taps that are
   `last`, last - stride, ...: `n` of them, of which the first meets the pixel q / stride + `first`
   of y. */
typedef struct {
    int64_t n, last, first;
} NAME(meeting);

static NAME(meeting) NAME(meeting_of)(int64_t r, int64_t k, int64_t s, int64_t p)
{
    NAME(meeting) found = {0, 0, 0};
    for (int64_t q = 0; q < k; q++)
        if ((r + p - q) % s == 0)
            found.n++, found.last = q;
    found.first = (r + p - found.last) / s;
    return found;
}

/* The zeros that y needs before and after it, along one axis. */
static void NAME(zeros_around)(int64_t size, int64_t out, int64_t k, int64_t s, int64_t p,
                               int64_t *before, int64_t *after)
{
    *before = *after = 0;
    for (int64_t r = 0; r < s && r < size; r++) {
        const NAME(meeting) m = NAME(meeting_of)(r, k, s, p);
        const int64_t end = m.first + m.n + (size - 1 - r) / s - out;
        if (m.n && -m.first > *before)
            *before = -m.first;
        if (m.n && end > *after)
            *after = end;
    }
}

/* gx: by remainder of the stride, a convolution of gy. A sum's order: gy's rows, columns,
   channels; see PRODUCT. */
int NAME(convolution_gx)(GEOMETRY, const float *gy, const float *w, float *gx)
{
    OUTPUT_SIDES;
    int64_t top, bottom, left, right;
    NAME(zeros_around)(H, OH, ky, sy, py, &top, &bottom);
    NAME(zeros_around)(W, OW, kx, sx, px, &left, &right);
    const int64_t Hp = OH + top + bottom, Wp = OW + left + right, padded = Hp > OH || Wp > OW;
    const int64_t width = C > VL ? 2 * VL : VL, weights = round_up(C, width) * ky * kx * K;
    const int64_t copied = NAME(copies_of)(ky * kx, K, K, C);
    void *memory;
    float *B = allocate(weights + copied + (padded ? N * Hp * Wp * K : 0), &memory);
    if (!B)
        return 1;
    float *copies = copied ? B + weights : 0, *Y = B + weights + copied;
    if (padded)
        NAME(pad)(N, OH, OW, K, top, bottom, left, right, gy, Y);
    const float *in = padded ? Y : gy;
    for (int64_t ry = 0; ry < sy && ry < H; ry++)
        for (int64_t rx = 0; rx < sx && rx < W; rx++) {
            const NAME(meeting) my = NAME(meeting_of)(ry, ky, sy, py);
            const NAME(meeting) mx = NAME(meeting_of)(rx, kx, sx, px);
            const int64_t J = (H - ry + sy - 1) / sy, I = (W - rx + sx - 1) / sx;
            float *out = gx + (ry * W + rx) * C;
            if (!my.n || !mx.n) { /* pixels that no tap meets */
                for (int64_t n = 0; n < N; n++)
                    for (int64_t j = 0; j < J; j++)
                        for (int64_t i = 0; i < I; i++)
                            memset(out + ((n * H + j * sy) * W + i * sx) * C, 0, C * sizeof *out);
                continue;
            }
            const int64_t taps = my.n * mx.n;
            for (int64_t c = 0; c < C; c += width)
                for (int64_t q = 0; q < K; q++)
                    for (int64_t t = 0; t < taps; t++) {
                        const int64_t ty = my.last - sy * (t / mx.n), tx = mx.last - sx * (t % mx.n);
                        const int64_t valid = C - c < width ? C - c : width;
                        float *b = B + c * taps * K + (t * K + q) * width;
                        const float *from = w + ((q * C + c) * ky + ty) * kx + tx;
                        if (ky * kx == 1 && valid == width) {
                            for (int64_t i = 0; i < width; i += VL)
                                STORE(b + i, LOAD(from + i));
                            continue;
                        }
                        for (int64_t i = 0; i < valid; i++)
                            b[i] = from[i * ky * kx];
                        for (int64_t i = valid; i < width; i++)
                            b[i] = 0;
                    }
            NAME(multiply)(N, J, I, in + ((my.first + top) * Wp + mx.first + left) * K,
                           (NAME(steps)){Hp * Wp * K, Wp * K, K}, my.n, Wp * K, mx.n * K, B, C, copies,
                           out,
                           (NAME(steps)){H * W * C, sy * W * C, sx * C});
        }
    free(memory);
    return 0;
}

/* Copies n of `width` values from each row, and zeros after them: no result depends on these, but
   whatever was there may be subnormal, and slow. */
static void NAME(pack)(int64_t rows, int64_t n, int64_t width, const float *in, const int64_t *off,
                       int64_t step, float *out)
{
    for (int64_t q = 0; q < rows; q++, out += width) {
        const float *from = in + (off ? off[q] : q * step);
        if (n == width) {
            for (int64_t i = 0; i < width; i += VL)
                STORE(out + i, LOAD(from + i));
            continue;
        }
        memcpy(out, from, n * sizeof *out);
        memset(out + n, 0, (width - n) * sizeof *out);
    }
}

#undef PIXELS
#define PIXELS 128

/* gw. A sum's order: blocks of 128 pixels of y, one after the other, each summed from 0. Up to 256
   channels, x is read where it lies: beyond, its rows are too far apart for the caches. In the copy
   with zeros around it, a vector may go beyond the row: no result depends on the rest. */
int NAME(convolution_gw)(GEOMETRY, const float *x, const float *gy, float *gw)
{
    OUTPUT_SIDES;
    const int64_t Hp = H + 2 * py, Wp = W + 2 * px, P = N * OH * OW, row = kx * C, padded = py || px;
    const int two = row > VL && (row % (2 * VL) == 0 || row % (2 * VL) > VL);
    const int64_t height = two ? GTILE2 : GTILE1, width = two ? 2 * VL : VL;
    const int64_t line = round_up(row, width), a_size = height * PIXELS, b_size = width * PIXELS;
    const int64_t size = K * ky * line, pixels = N * Hp * Wp * C;
    void *memory;
    float *A = allocate(a_size + b_size + size + (padded ? pixels + width : 0), &memory);
    if (!A)
        return 1;
    const int in_place = ky * kx == 1 && line == row;
    float *B = A + a_size, *G = in_place ? gw : B + b_size, *X = B + b_size + size;
    if (padded) {
        NAME(pad)(N, H, W, C, py, py, px, px, x, X);
        memset(X + pixels, 0, width * sizeof *X);
    }
    const float *in = padded ? X : x;
    memset(G, 0, size * sizeof *G);
    int64_t off[PIXELS], n = 0, j = 0, i = 0;
    for (int64_t start = 0; start < P; start += PIXELS) {
        const int64_t m = P - start < PIXELS ? P - start : PIXELS, rest = K % height;
        for (int64_t q = 0; q < m; q++) {
            off[q] = ((n * Hp + j * sy) * Wp + i * sx) * C;
            if (++i == OW) {
                i = 0;
                if (++j == OH)
                    j = 0, n++;
            }
        }
        if (rest)
            NAME(pack)(m, rest, height, gy + start * K + K - rest, 0, K, A);
        for (int64_t t = 0; t < ky; t++)
            for (int64_t c = 0; c < row; c += width) {
                const int64_t valid = row - c < width ? row - c : width;
                const int direct = C <= 256 && (valid == width || padded);
                if (!direct)
                    NAME(pack)(m, valid, width, in + t * Wp * C + c, off, 0, B);
                const float *b = direct ? in + t * Wp * C + c : B;
                for (int64_t f = 0; f < K; f += height) {
                    const int64_t rows = K - f < height ? K - f : height;
                    const float *a = rows == height ? gy + start * K + f : A;
                    const int64_t lda = rows == height ? K : height;
                    float *g = G + (f * ky + t) * line + c;
                    if (direct && two)
                        NAME(outer_direct2)(m, a, lda, b, off, g, ky * line, rows);
                    else if (direct)
                        NAME(outer_direct1)(m, a, lda, b, off, g, ky * line, rows);
                    else if (two)
                        NAME(outer_packed2)(m, a, lda, b, off, g, ky * line, rows);
                    else
                        NAME(outer_packed1)(m, a, lda, b, off, g, ky * line, rows);
                }
            }
    }
    for (int64_t f = 0; f < K && !in_place; f++)
        for (int64_t ty = 0; ty < ky; ty++)
            for (int64_t tx = 0; tx < kx; tx++)
                for (int64_t c = 0; c < C; c++)
                    gw[((f * C + c) * ky + ty) * kx + tx] = G[(f * ky + ty) * line + tx * C + c];
    free(memory);
    return 0;
}
