// Packed attention backward on NVIDIA GPUs from sm_80. Two kernels that each make the scores again,
// so that every gradient is a sum in one block's registers: no atomics, the same bits twice.
//
//   dq    a block takes 64 queries and walks over the keys they see:  p = 2^(s - lse),
//         dp = dout V^T, ds = p (dp - delta), dq += ds K; also delta = sum_d out dout - dlse, kept
//         for the other kernel, and the bias gradient, a sum of ds by distance;
//   dk/dv a block takes 64 keys and walks over the queries that see them, scores transposed, so
//         that weights never leave the registers:  dv += p^T dout, dk += ds^T Q.
//
// Each is compiled on its own, as they take the longest of all sources.
#pragma once

#include "attention_problem.cuh"

namespace fastenc::cuda {

// varlen_attention_dkdv_bwd.cu; after the kernel of dq on the same stream, which leaves delta.
void launch_dkdv(const Launcher& launcher, const char* op, const AttentionCall& call,
                 const AttentionGradArgs& grads);

}  // namespace fastenc::cuda
