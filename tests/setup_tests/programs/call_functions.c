/* Calls a network's functions of extensions/kernels/, where there may be no Python: on an emulated
   processor.

   Usage: call_functions LIBRARY OUTPUT. For each instruction set of the processor, OUTPUT.SET gets
   the results one after the other. */

#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static void *library;
static FILE *output;
static const char *set;
static uint32_t state;

static void *function(const char *name)
{
    char full[99];
    snprintf(full, sizeof full, set ? "%s_%s" : "%s%s", name, set ? set : "");
    void *found = dlsym(library, full);
    if (!found) {
        fprintf(stderr, "%s\n", dlerror());
        exit(1);
    }
    return found;
}

static void put(const void *data, size_t bytes)
{
    if (fwrite(data, 1, bytes, output) != bytes)
        exit(1);
}

/* Values between -4 and 4, with all bits of their fraction. */
static float *values(int64_t n)
{
    float *array = malloc(n * sizeof *array + 1);
    for (int64_t i = 0; i < n; i++) {
        state = state * 1664525u + 1013904223u;
        array[i] = (float)((int32_t)state >> 8) / (float)(1 << 21);
    }
    return array;
}

static void convolve(const int64_t *g)
{
    typedef int call(int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t,
                     int64_t, int64_t, const float *, const float *, float *);
    const int64_t OH = (g[1] + 2 * g[9] - g[5]) / g[7] + 1, OW = (g[2] + 2 * g[10] - g[6]) / g[8] + 1;
    const int64_t n = g[0] * g[1] * g[2] * g[3], m = g[0] * OH * OW * g[4];
    const int64_t weights = g[4] * g[3] * g[5] * g[6];
    float *x = values(n), *w = values(weights), *y = values(m);
    const char *names[] = {"convolution_gx", "convolution_gw", "convolution"};
    float *arrays[][3] = {{y, w, values(n)}, {x, y, values(weights)}, {x, w, y}};
    const int64_t sizes[] = {n, weights, m};
    for (int k = 0; k < 3; k++) {
        call *f = function(names[k]);
        if (f(g[0], g[1], g[2], g[3], g[4], g[5], g[6], g[7], g[8], g[9], g[10], arrays[k][0],
              arrays[k][1], arrays[k][2]))
            exit(1);
        put(arrays[k][2], sizes[k] * sizeof(float));
    }
}

static void normalize(int64_t P, int64_t C)
{
    int (*forward)(int64_t, int64_t, double, double, const float *, const float *, const float *,
                   float *, float *, double *, float *) = function("batch_normalization");
    int (*backward)(int64_t, int64_t, const float *, const float *, const double *, const float *,
                    float *, float *, float *) = function("batch_normalization_gradients");
    int (*fixed)(int64_t, int64_t, double, const float *, const float *, const float *, const float *,
                 const float *, float *) = function("fixed_batch_normalization");
    void (*relu)(int64_t, const float *, float *) = function("relu");
    void (*relu_gx)(int64_t, const float *, const float *, float *) = function("relu_gx");
    float *x = values(P * C), *gamma = values(C), *beta = values(C), *mean = values(C);
    float *var = values(C), *y = values(P * C), *gx = values(P * C);
    double *saved = malloc(2 * C * sizeof *saved);
    if (forward(P, C, 1e-5, 0.25, x, gamma, beta, mean, var, saved, y))
        exit(1);
    put(y, P * C * sizeof *y), put(mean, C * sizeof *mean), put(var, C * sizeof *var);
    put(saved, 2 * C * sizeof *saved);
    relu(P * C, y, gx), put(gx, P * C * sizeof *gx);
    relu_gx(P * C, y, x, gx), put(gx, P * C * sizeof *gx);
    if (backward(P, C, x, gamma, saved, y, gx, mean, beta))
        exit(1);
    put(gx, P * C * sizeof *gx), put(mean, C * sizeof *mean), put(beta, C * sizeof *beta);
    for (int64_t c = 0; c < C; c++)
        var[c] *= var[c];
    if (fixed(P, C, 1e-3, x, gamma, beta, mean, var, y))
        exit(1);
    put(y, P * C * sizeof *y);
}

static void pool(int64_t C)
{
    void (*forward)(int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t,
                    int64_t, const float *, float *, int32_t *) = function("max_pooling");
    void (*backward)(int64_t, int64_t, int64_t, const float *, const int32_t *, float *) =
        function("max_pooling_gx");
    float *x = values(2 * 9 * 8 * C), *y = values(2 * 5 * 4 * C), *gx = values(2 * 9 * 8 * C);
    int32_t *at = malloc(2 * 5 * 4 * C * sizeof *at);
    forward(2, 9, 8, C, 3, 3, 2, 2, 1, 1, x, y, at);
    put(y, 2 * 5 * 4 * C * sizeof *y), put(at, 2 * 5 * 4 * C * sizeof *at);
    backward(2 * 9 * 8, 2 * 5 * 4, C, y, at, gx), put(gx, 2 * 9 * 8 * C * sizeof *gx);
}

static void finish(int64_t N, int64_t P, int64_t C)
{
    int (*sum)(int64_t, int64_t, int64_t, double, const float *, float *) = function("sum_pixels");
    void (*spread)(int64_t, int64_t, int64_t, double, const float *, float *) = function("spread");
    void (*bias)(int64_t, int64_t, const float *, float *) = function("add_bias");
    void (*loss)(int64_t, int64_t, int32_t, double, const float *, const int32_t *, float *, float *,
                 float *) = function("softmax_cross_entropy");
    void (*gx)(int64_t, int64_t, int32_t, double, const float *, const int32_t *, float *) =
        function("softmax_cross_entropy_gx");
    float *x = values(N * P * C), *y = values(N * C), *z = values(N * C), *b = values(C), value;
    int32_t *t = malloc(N * sizeof *t);
    for (int64_t n = 0; n < N; n++)
        t[n] = n % (C + 1) - 1;
    if (sum(N, P, C, 1.0 / P, x, y))
        exit(1);
    bias(N, C, b, y), put(y, N * C * sizeof *y);
    loss(N, C, -1, 1.0 / N, y, t, z, &value, x), put(&value, sizeof value), put(x, N * sizeof *x);
    put(z, N * C * sizeof *z);
    gx(N, C, -1, 1.0 / 3, z, t, y), put(y, N * C * sizeof *y);
    spread(N, P, C, 1.0 / P, y, x), put(x, N * P * C * sizeof *x);
}

static void exponents(void)
{
    void (*f)(int64_t, const float *, float *) = function("exp_float32");
    void (*g)(int64_t, const float *, float *) = function("log_float32");
    float *x = values(100000), *y = values(100000);
    f(100000, x, y), put(y, 100000 * sizeof *y);
    for (int i = 0; i < 100000; i++)
        x[i] *= x[i];
    g(100000, x, y), put(y, 100000 * sizeof *y);
}

static void all(void)
{
    const int64_t geometries[][11] = {
        {1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0},      {2, 5, 4, 17, 33, 3, 3, 1, 1, 1, 1},
        {3, 9, 8, 16, 32, 3, 3, 2, 2, 1, 1},    {2, 7, 10, 15, 31, 2, 3, 2, 1, 0, 2},
        {2, 7, 6, 8, 16, 1, 1, 2, 2, 0, 0},     {1, 11, 13, 3, 16, 7, 7, 2, 2, 3, 3},
        {1, 9, 9, 4, 4, 2, 2, 3, 3, 0, 0},      {2, 3, 2, 2, 7, 5, 5, 4, 4, 3, 3},
        {1, 4, 5, 260, 9, 3, 1, 1, 1, 1, 0},    {1, 19, 17, 5, 40, 1, 1, 1, 1, 1, 1},
        {2, 3, 9, 2, 3, 2, 2, 9, 9, 2, 2},      {2, 6, 6, 64, 64, 3, 3, 1, 1, 1, 1},
        {2, 5, 4, 1024, 40, 1, 1, 1, 1, 0, 0},  {2, 9, 8, 512, 1024, 1, 1, 2, 2, 0, 0},
    };
    for (size_t k = 0; k < sizeof geometries / sizeof *geometries; k++)
        convolve(geometries[k]);
    normalize(77, 35), normalize(1, 3), normalize(640, 16), normalize(70, 83);
    pool(3), pool(40);
    finish(5, 7, 10), finish(2, 1, 33);
}

int main(int n, char **arguments)
{
    if (n != 3)
        return 2;
    if (!(library = dlopen(arguments[1], RTLD_NOW))) {
        fprintf(stderr, "%s\n", dlerror());
        return 1;
    }
    char *sets = strdup(((const char *(*)(void))function("instruction_sets"))());
    for (char *next = strtok(sets, " "); next; next = strtok(0, " ")) {
        char path[4096];
        snprintf(path, sizeof path, "%s.%s", arguments[2], next);
        if (!(output = fopen(path, "wb")))
            return 1;
        state = 1;
        set = 0, exponents();
        set = next, all();
        if (fclose(output))
            return 1;
    }
    return 0;
}
