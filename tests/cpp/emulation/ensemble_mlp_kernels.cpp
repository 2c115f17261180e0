// The CUDA kernels of the forward pass, compiled once for the tests that run them on the host.

#include "kernels/cuda/ensemble_mlp.cu"
#include "kernels/cuda/ensemble_mlp_fma.cu"
#include "kernels/cuda/ensemble_mlp_mma.cu"
