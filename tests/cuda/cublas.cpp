// cuBLAS's functions that are called, with the types of its manual, on this computer's memory. The handle, four
// numbers, says what it was given last: stream, workspace, how many products, and how the last was to compute.

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace {

struct Handle {
  std::int64_t stream, workspace, products, compute;
};

struct Bfloat16 {
  std::uint16_t bits;
  operator float() const {
    const std::uint32_t wide = std::uint32_t(bits) << 16;
    float x;
    std::memcpy(&x, &wide, sizeof x);
    return x;
  }
  Bfloat16& operator=(float x) {  // to nearest, ties to even
    std::uint32_t wide;
    std::memcpy(&wide, &x, sizeof wide);
    bits = std::uint16_t((wide + 0x7fff + (wide >> 16 & 1)) >> 16);
    return *this;
  }
};

template <class S, class Out, class Sum>
int gemm(int op_a, int op_b, int m, int n, int k, const void* alpha, const void* a_, int lda, const void* b_, int ldb,
         const void* beta, void* c_, int ldc) {
  if (lda < (op_a ? k : m) || ldb < (op_b ? n : k) || ldc < m) return 7;  // CUBLAS_STATUS_INVALID_VALUE
  if (*static_cast<const Sum*>(alpha) != 1 || *static_cast<const Sum*>(beta) != 0) return 7;
  const S *a = static_cast<const S*>(a_), *b = static_cast<const S*>(b_);
  for (int i = 0; i < m; i++)
    for (int j = 0; j < n; j++) {
      Sum sum = 0;
      for (int l = 0; l < k; l++)
        sum += Sum(op_a ? a[l + std::size_t(i) * lda] : a[i + std::size_t(l) * lda]) *
               Sum(op_b ? b[j + std::size_t(l) * ldb] : b[l + std::size_t(j) * ldb]);
      static_cast<Out*>(c_)[i + std::size_t(j) * ldc] = sum;
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

// Of float32 (0), float64 (1), float16 (2) and bfloat16 (14), the last two into float32 too; with the default algorithm
// (-1) alone.
EXPORT int cublasGemmEx(Handle* handle, int op_a, int op_b, int m, int n, int k, const void* alpha, const void* a,
                        int a_type, int lda, const void* b, int b_type, int ldb, const void* beta, void* c, int c_type,
                        int ldc, int compute, int algorithm) {
  handle->products++, handle->compute = compute;
  if (a_type != b_type || algorithm != -1 || (a_type == 1) != (compute == 70))
    return 15;  // CUBLAS_STATUS_NOT_SUPPORTED
  if (a_type != 0 && a_type != 1 && compute != 68) return 15;
#define TAKES(type, S, out_type, Out, Sum)  \
  if (a_type == type && c_type == out_type) \
    return gemm<S, Out, Sum>(op_a, op_b, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
  TAKES(0, float, 0, float, float)
  TAKES(1, double, 1, double, double)
  TAKES(2, _Float16, 2, _Float16, float)
  TAKES(2, _Float16, 0, float, float)
  TAKES(14, Bfloat16, 14, Bfloat16, float)
  TAKES(14, Bfloat16, 0, float, float)
  return 15;
}
