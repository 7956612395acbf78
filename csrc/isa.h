// CPU only: loops compiled once per instruction set, of which the best that this processor has is chosen at run time.
//
// By a switch, not by the loader (target_clones): that needs glibc, and a test could not choose. No variant may use fused
// multiply-adds (CMakeLists.txt), and no loop's order of additions depends on the vectors' width, so all give the same
// bits. Other compilers and processors have the plain variant alone.
#ifndef SPO_FAST_ISA_H
#define SPO_FAST_ISA_H

#include <atomic>

#include "spo_fast.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define SPO_X86 1
#define SPO_TARGET_AVX2 __attribute__((target("avx2")))
#define SPO_TARGET_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl")))
#endif

// A lambda for `vectorised`: [&] SPO_LOOP { ... }
#define SPO_LOOP () __attribute__((always_inline))

namespace spo {

extern std::atomic<int> isa;  // a SPO_ISA_ code, never SPO_ISA_BEST

#ifdef SPO_X86

template <class F>
SPO_TARGET_AVX2 void with_avx2(const F &f) {
  f();
}

template <class F>
SPO_TARGET_AVX512 void with_avx512(const F &f) {
  f();
}

#endif

// f() in the variant of `isa`; what f calls must be inlined (SPO_INLINE), or it is compiled as the plain one.
template <class F>
inline void vectorised(const F &f) {
#ifdef SPO_X86
  const int chosen = isa.load(std::memory_order_relaxed);
  if (chosen == SPO_ISA_AVX512) return with_avx512(f);
  if (chosen == SPO_ISA_AVX2) return with_avx2(f);
#endif
  f();
}

}  // namespace spo
#endif
