// Vec<float> and Vec<double> of the level this file is compiled for, and the activations on them.
//
// A level is chosen by two macros: FUSEDRNN_LEVEL is its bare name, which is also the namespace (so that nothing
// compiled for one instruction set is ever linked for another), and one of FUSEDRNN_LEVEL_PORTABLE, _PORTABLE_FMA,
// _AVX2, _AVX512, _NEON, _CUDA is defined. Compile with -ffp-contract=off: every FMA is written out.
//
// The interface, the same on every level (T is float or double):
//   scalar, lanes, registers           the element type, elements per vector, vector registers of the machine
//   zero() set(x)                      every lane 0, every lane x
//   load(p) store(p)                   all lanes, any alignment
//   whole_lines                        whether a vector is a cache line; only then there are
//   stream(p) fence()                  store past the caches, p aligned; what was streamed, before what follows
//   load(p, count) store(p, count)     the first min(count, lanes); the others read as 0, are not written, not touched
//   + - * / unary -                    true division; -x flips the sign bit
//   fused                              whether the next two round once (all but plain portable)
//   fma(a, b, c) fnma(a, b, c)         c + a*b and c - a*b
//   abs(x) copysign(x, sign)           on the sign bit, NaN included
//   min(bound, x) max(bound, x)        x where it is NaN, for a bound that is a number
//   greater(a, b) greater_equal(a, b)  masks, false where either is NaN
//   select(mask, a, b)                 a where the mask is true, else b
//   zero_where(mask, x)                0 where the mask is true, else x
//   exponent_bits(x)                   the lowest bits of x moved into the exponent's place
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <stddef.h>
#include <stdint.h>

#include "inline.h"

#if defined(FUSEDRNN_LEVEL_AVX512)
#include "avx512.h"
#elif defined(FUSEDRNN_LEVEL_AVX2)
#include "avx2.h"
#elif defined(FUSEDRNN_LEVEL_NEON)
#include "neon.h"
#elif defined(FUSEDRNN_LEVEL_PORTABLE) || defined(FUSEDRNN_LEVEL_PORTABLE_FMA)
#include "portable.h"
#elif defined(FUSEDRNN_LEVEL_CUDA)
#include "scalar.h"
#else
#error "define FUSEDRNN_LEVEL and one FUSEDRNN_LEVEL_..."
#endif

#include "math.h"
