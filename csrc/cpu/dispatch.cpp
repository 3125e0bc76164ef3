// SPDX-License-Identifier: Apache-2.0
#include "cpu/dispatch.h"

namespace fusedrnn::cpu {

template <class T>
const Kernels<T>* kernels_of(Isa isa) {
  switch (isa) {
#ifdef FUSEDRNN_HAS_PORTABLE
    case Isa::portable:
      return kernels_portable(T());
#endif
#ifdef FUSEDRNN_HAS_PORTABLE_FMA
    case Isa::portable_fma:
      return kernels_portable_fma(T());
#endif
#ifdef FUSEDRNN_HAS_AVX2
    case Isa::avx2:
      return kernels_avx2(T());
#endif
#ifdef FUSEDRNN_HAS_AVX512
    case Isa::avx512:
      return kernels_avx512(T());
#endif
#ifdef FUSEDRNN_HAS_NEON
    case Isa::neon:
      return kernels_neon(T());
#endif
    default:
      return nullptr;
  }
}

template <class T>
const Kernels<T>& kernels() {
  static const Kernels<T>& table = *kernels_of<T>(chosen());
  return table;
}

const Kernels<float>* bfloat16_kernels() {
  static const Bfloat16Isa isa = chosen_bfloat16();
  switch (isa) {
#ifdef FUSEDRNN_HAS_AVX512_BF16
    case Bfloat16Isa::avx512_bf16:
      return kernels_avx512_bf16(float());
#endif
#ifdef FUSEDRNN_HAS_AMX_BF16
    case Bfloat16Isa::amx_bf16:
      return kernels_amx_bf16(float());
#endif
    default:
      return nullptr;
  }
}

template const Kernels<float>* kernels_of(Isa);
template const Kernels<double>* kernels_of(Isa);
template const Kernels<float>& kernels();
template const Kernels<double>& kernels();

}  // namespace fusedrnn::cpu
