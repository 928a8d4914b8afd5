#include "core/isa.h"

#if defined(FASTSEQ_HAVE_AVX2_VNNI)
#include <cpuid.h>
#endif
#if defined(FASTSEQ_HAVE_AVX512_AMX)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace fastseq::core {

namespace scalar {
extern const Kernels table;
}
#if defined(FASTSEQ_HAVE_NEON)
namespace neon {
extern const Kernels table;
}
#endif
#if defined(FASTSEQ_HAVE_AVX2)
namespace avx2 {
extern const Kernels table;
}
#endif
#if defined(FASTSEQ_HAVE_AVX2_VNNI)
namespace avx2_vnni {
extern const ByteKernels table;
}
#endif
#if defined(FASTSEQ_HAVE_AVX512)
namespace avx512 {
extern const Kernels table;
}
#endif
#if defined(FASTSEQ_HAVE_AVX512_VNNI)
namespace avx512_vnni {
extern const ByteKernels table;
}
#endif
#if defined(FASTSEQ_HAVE_AVX512_AMX)
namespace avx512_amx {
extern const ByteKernels table;
}
#endif
#if defined(FASTSEQ_HAVE_AVX512_ON_AVX2)
namespace avx512_on_avx2 {
extern const Kernels table;
}
#endif

namespace {

#if defined(FASTSEQ_HAVE_AVX2)
// __builtin_cpu_supports asks the processor and, through XGETBV, the operating system.
[[maybe_unused]] bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
[[maybe_unused]] bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif

#if defined(FASTSEQ_HAVE_AVX2_VNNI)
// GCC 12 knows no name for it. Its registers are those of AVX2.
bool has_avx_vnni() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return has_avx2() && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1);
}
#endif

#if defined(FASTSEQ_HAVE_AVX512_AMX)
// The system keeps the large registers from a process that has not asked for them.
bool has_amx() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d >> 24 & 1) || !(d >> 25 & 1)) return false;
  constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM
  return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
}
#endif

Choice choose() {
  const Kernels* found[kMostSets];
  const int count = supported(found);
  const char* wanted = std::getenv("FASTSEQ_ISA");
  if (wanted == nullptr || *wanted == '\0') {
    return {found[count - 1], nullptr};
  }
  for (int i = 0; i < count; ++i) {
    if (std::strcmp(found[i]->name, wanted) == 0) return {found[i], nullptr};
  }
  static char error[160];  // written once, under the lock of choice()
  int end = std::snprintf(error, sizeof error, "FASTSEQ_ISA=%.32s cannot run here; these can:", wanted);
  for (int i = 0; i < count; ++i) {
    end += std::snprintf(error + end, sizeof error - end, "%s %s", i ? "," : "", found[i]->name);
  }
  return {found[0], error};
}

// A set with other kernels for bytes.
[[maybe_unused]] Kernels with(const char* name, Kernels k, const ByteKernels& bytes) {
  k.name = name;
  if (bytes.vq_screen) k.vq_screen = bytes.vq_screen;
  k.matrix = bytes.matrix;
  return k;
}

#if defined(FASTSEQ_HAVE_AVX2_VNNI)
const Kernels& avx2_vnni_table() {
  static const Kernels table = with("avx2_vnni", avx2::table, avx2_vnni::table);
  return table;
}
#endif
#if defined(FASTSEQ_HAVE_AVX512_VNNI)
const Kernels& avx512_vnni_table() {
  static const Kernels table = with("avx512_vnni", avx512::table, avx512_vnni::table);
  return table;
}
#endif
#if defined(FASTSEQ_HAVE_AVX512_AMX)
const Kernels& avx512_amx_table() {
  static const Kernels table = with("avx512_amx", avx512_vnni_table(), avx512_amx::table);
  return table;
}
#endif

}  // namespace

int supported(const Kernels** out) {
  int count = 0;
  out[count++] = &scalar::table;
#if defined(FASTSEQ_HAVE_NEON)
  out[count++] = &neon::table;  // every 64-bit ARM processor has it
#endif
#if defined(FASTSEQ_HAVE_AVX512_ON_AVX2)
  if (has_avx2()) out[count++] = &avx512_on_avx2::table;  // before avx2, so that it is never the best
#endif
#if defined(FASTSEQ_HAVE_AVX2)
  if (has_avx2()) out[count++] = &avx2::table;
#endif
#if defined(FASTSEQ_HAVE_AVX2_VNNI)
  if (has_avx_vnni()) out[count++] = &avx2_vnni_table();
#endif
#if defined(FASTSEQ_HAVE_AVX512)
  if (has_avx512()) out[count++] = &avx512::table;
#endif
#if defined(FASTSEQ_HAVE_AVX512_VNNI)
  if (has_avx512() && __builtin_cpu_supports("avx512vnni")) out[count++] = &avx512_vnni_table();
#endif
#if defined(FASTSEQ_HAVE_AVX512_AMX)
  if (has_avx512() && __builtin_cpu_supports("avx512vnni") && has_amx()) out[count++] = &avx512_amx_table();
#endif
  return count;
}

const Choice& choice() {
  static const Choice chosen = choose();  // read once; the same in every copy of the core
  return chosen;
}

}  // namespace fastseq::core
