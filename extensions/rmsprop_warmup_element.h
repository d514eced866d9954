// One element of the update. CuPy makes the CUDA kernel from this text, kernels.c the CPU's loop;
// T is the parameter's type. NumPy's statements in rmsprop_warmup.py give the same bits.
m = mu2 * m + one_minus_mu2 * (grad * grad);  // [W1]
T scale = alpha_sgd;
if (alpha_rmsprop != 0) {
    scale = alpha_rmsprop / (sqrt(m) + eps) + alpha_sgd;
}
delta = mu1 * delta - scale * grad;  // [W2]
param = param + lr * delta;  // [W3]
