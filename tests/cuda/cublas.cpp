// cuBLAS's functions that are called in a captured stream, with the types of its manual, on this computer's
// memory. A call counts the workspace and the stream that its handle, three numbers, was given before.

#include <cstddef>
#include <cstdint>

namespace {

struct Handle {
  std::int64_t stream, workspace, products;
};

template <class S>
int gemm(Handle* handle, int op_a, int op_b, int m, int n, int k, const S* alpha, const S* a, int lda, const S* b,
         int ldb, const S* beta, S* c, int ldc) {
  if (handle->workspace == 0) return 7;  // CUBLAS_STATUS_INVALID_VALUE
  handle->products++;
  for (int i = 0; i < m; i++)
    for (int j = 0; j < n; j++) {
      S sum = 0;
      for (int l = 0; l < k; l++)
        sum += (op_a ? a[l + std::size_t(i) * lda] : a[i + std::size_t(l) * lda]) *
               (op_b ? b[j + std::size_t(l) * ldb] : b[l + std::size_t(j) * ldb]);
      S& at = c[i + std::size_t(j) * ldc];
      at = *alpha * sum + (*beta == 0 ? 0 : *beta * at);
    }
  return 0;
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT int cublasSetStream_v2(Handle* handle, void* stream) {
  handle->stream = std::int64_t(stream);
  handle->workspace = 0;  // as in cuBLAS
  return 0;
}

EXPORT int cublasSetWorkspace_v2(Handle* handle, void* workspace, std::size_t bytes) {
  handle->workspace = std::int64_t(workspace);
  return bytes < (std::size_t(4) << 20);
}

EXPORT int cublasSgemm_v2(Handle* handle, int op_a, int op_b, int m, int n, int k, const float* alpha, const float* a,
                          int lda, const float* b, int ldb, const float* beta, float* c, int ldc) {
  return gemm(handle, op_a, op_b, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
}

EXPORT int cublasDgemm_v2(Handle* handle, int op_a, int op_b, int m, int n, int k, const double* alpha, const double* a,
                          int lda, const double* b, int ldb, const double* beta, double* c, int ldc) {
  return gemm(handle, op_a, op_b, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
}

// Of float32 (0) in TF32 (77) with the default algorithm (-1) alone.
EXPORT int cublasGemmEx(Handle* handle, int op_a, int op_b, int m, int n, int k, const void* alpha, const void* a,
                        int a_type, int lda, const void* b, int b_type, int ldb, const void* beta, void* c, int c_type,
                        int ldc, int compute, int algorithm) {
  if (a_type != 0 || b_type != 0 || c_type != 0 || compute != 77 || algorithm != -1) return 15;
  return gemm(handle, op_a, op_b, m, n, k, static_cast<const float*>(alpha), static_cast<const float*>(a), lda,
              static_cast<const float*>(b), ldb, static_cast<const float*>(beta), static_cast<float*>(c), ldc);
}
