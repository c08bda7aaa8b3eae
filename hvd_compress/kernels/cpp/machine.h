// What kind of machine this is built for, and how one build serves several of a kind.

#pragma once

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define HVD_X86 1
#endif

// One version of a function for each kind of machine, chosen when the library is loaded. All give the same bits, since
// the compiler neither contracts nor reorders what is done to floats.
#if defined(HVD_X86) && defined(__linux__) && defined(__GLIBC__) && !defined(__clang__)
#define HVD_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define HVD_CLONES
#endif
