/* The update of all parameters in one launch, by rmsprop_warmup_gpu.py. T is the parameters' type.
   Each block of threads updates CHUNK elements of one parameter. */

struct Row {
    const T *grads;
    T *params, *ms, *deltas;
    long long size, first_block;
    T values[8];
};

extern "C" __global__ void rmsprop_warmup_all(const Row *rows, int n)
{
    const long long block = blockIdx.x;
    int k = 0, end = n; /* the block's row is row k or a later one before row end */
    while (end - k > 1) {
        const int middle = (k + end) / 2;
        if (rows[middle].first_block <= block)
            k = middle;
        else
            end = middle;
    }
    const Row row = rows[k];
    const T lr = row.values[0], alpha_sgd = row.values[1], alpha_rmsprop = row.values[2],
            mu1 = row.values[3], mu2 = row.values[4], one_minus_mu2 = row.values[5],
            eps = row.values[6], weight_decay_rate = row.values[7];
    const long long start = (block - row.first_block) * CHUNK;
    const long long stop = row.size - start < CHUNK ? row.size : start + CHUNK;
    for (long long i = start + threadIdx.x; i < stop; i += blockDim.x) {
        const T grad = row.grads[i];
        T param = row.params[i], m = row.ms[i], delta = row.deltas[i];
#include "rmsprop_warmup_element.h"
        row.params[i] = param, row.ms[i] = m, row.deltas[i] = delta;
    }
}
