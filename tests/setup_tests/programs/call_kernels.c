/* Calls the functions of extensions/kernels/ as the package does, where there may be no Python: on
   an emulated processor.

   Usage: call_kernels LIBRARY INPUT OUTPUT. INPUT holds float32 values, 4 times a number. OUTPUT
   gets the results one after the other, in the order of test_compilers.py:results_of. */

#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static void *library;
static FILE *output;

static void *function(const char *name)
{
    void *found = dlsym(library, name);
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

static void *copy_of(const void *data, size_t bytes)
{
    return memcpy(malloc(bytes), data, bytes);
}

/* Two parameters: all values but five, and five. */
static void update(const char *name, const char *values, int64_t n, size_t width)
{
    const double sets[2][8] = {{0.1, 0.7, 0.3, 0.9, 0.99, 1 - 0.99, 1e-8, 0.02},
                               {0.1, 0.7, 0, 0.9, 0.99, 1 - 0.99, 1e-8, 0}};
    void (*call)(int64_t, const int64_t *, void *(*)[4], const double (*)[8]) = function(name);
    for (int s = 0; s < 2; s++) {
        char *data = copy_of(values, 4 * n * width);
        int64_t sizes[2] = {n - 5, 5};
        double both[2][8];
        void *arrays[2][4];
        for (int k = 0; k < 2; k++) {
            memcpy(both[k], sets[s], sizeof both[k]);
            for (int a = 0; a < 4; a++)
                arrays[k][a] = data + (a * n + k * (n - 5)) * width;
        }
        call(2, sizes, arrays, both);
        put(data + n * width, 3 * n * width);
        free(data);
    }
}

static void pack(const char *name, float *values, int64_t n, size_t width)
{
    void (*call)(int64_t, const int64_t *, float **, float, void *, int64_t (*)[4]) = function(name);
    int64_t sizes[2] = {n - 5, 5}, counts[2][4] = {{0}};
    float *in[2] = {values, values + n - 5};
    void *out = malloc(n * width);
    call(2, sizes, in, 1.0f / 1024, out, counts);
    put(out, n * width);
    put(counts, sizeof counts);
    free(out);
}

static void unpack(const char *name, const void *values, int64_t n)
{
    void (*call)(int64_t, const int64_t *, const void *, float, float **, int64_t *) = function(name);
    int64_t sizes[2] = {n - 5, 5}, not_finite[2];
    float *all = malloc(n * sizeof *all), *out[2] = {all, all + n - 5};
    call(2, sizes, values, 1024, out, not_finite);
    put(all, n * sizeof *all);
    put(not_finite, sizeof not_finite);
    free(all);
}

/* Of four rows. The second is apart. */
static void mean(const char *name, const char *values, int64_t n, size_t in, size_t out_width)
{
    void (*call)(int64_t, int64_t, int64_t, const void *, int64_t, const void *, double, void *) =
        function(name);
    void *out = malloc(n * out_width);
    call(n, 4, 1, values + 3 * n * in, n, values, 3, out);
    put(out, n * out_width);
    free(out);
}

static void convert(const char *name, const void *values, const double *start, int64_t n)
{
    void (*call)(int64_t, const void *, void *) = function(name);
    double *out = copy_of(start, n * sizeof *out);
    call(n, values, out);
    put(out, n * sizeof *out);
    free(out);
}

int main(int argc, char **argv)
{
    library = argc == 4 ? dlopen(argv[1], RTLD_NOW) : NULL;
    if (!library) {
        fprintf(stderr, "%s\n", argc == 4 ? dlerror() : "needs LIBRARY INPUT OUTPUT");
        return 1;
    }
    FILE *input = fopen(argv[2], "rb");
    output = fopen(argv[3], "wb");
    if (!input || !output || fseek(input, 0, SEEK_END))
        return 1;
    const int64_t n = ftell(input) / sizeof(float);
    float *values = malloc(n * sizeof *values);
    double *wide = malloc(n * sizeof *wide);
    rewind(input);
    if (fread(values, sizeof *values, n, input) != (size_t)n)
        return 1;
    for (int64_t i = 0; i < n; i++)
        wide[i] = values[i];

    volatile double smallest = 5e-324;
    char normal = smallest * 1 != 0; /* whether loading the library left subnormal numbers alone */
    put(&normal, 1);
    update("rmsprop_warmup_float32", (char *)values, n / 4, sizeof *values);
    update("rmsprop_warmup_float64", (char *)wide, n / 4, sizeof *wide);
    pack("pack_float32_float32", values, n, sizeof(float));
    unpack("unpack_float32_float32", values, n);
    mean("mean_float32_float32", (char *)values, n / 4, sizeof(float), sizeof(float));

    int (*has_float16)(void) = (int (*)(void))dlsym(library, "has_float16");
    char float16 = has_float16 && has_float16();
    put(&float16, 1);
    if (float16) { /* the bytes of the values, two by two, are any float16 values */
        pack("pack_float32_float16", values, n, 2);
        unpack("unpack_float16_float32", values, 2 * n);
        convert("widen_float16", values, wide, n);
        convert("add_float16", values, wide, n);
        mean("mean_float16_float16", (char *)values, n / 2, 2, 2);
        mean("mean_float64_float16", (char *)wide, n / 4, sizeof *wide, 2);
    }
    return fclose(output) != 0;
}
