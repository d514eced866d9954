// One element of the update. CuPy builds the CUDA kernel from this text, and kernels.c builds the
// CPU's loop. T is the parameter's type. The NumPy code in rmsprop_warmup.py gives the same bits.
T g = grad;
if (weight_decay_rate != 0) {
    g = grad + weight_decay_rate * param;
}
const T mean_square = mu2 * m + one_minus_mu2 * (g * g);  // [W1]
T scale = alpha_sgd;
if (alpha_rmsprop != 0) {
    scale = alpha_rmsprop / (sqrt(mean_square) + eps) + alpha_sgd;
}
const T step = mu1 * delta - scale * g;  // [W2]
param = param + lr * step;  // [W3]
m = mean_square;
delta = step;
