// Which kernels this CPU can run.
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <stdexcept>

#include "kernels.h"

namespace ernie_kqat {
namespace {

bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
}

// The CPU's word (leaf 7: bit 22 bfloat16, bit 24 tiles, bit 25 INT8), and the kernel's leave to use the tile registers.
bool has_amx() {
  unsigned a, b, c, d;
  if (!has_avx512() || !__builtin_cpu_supports("avx512bf16")) return false;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d >> 22 & 13) != 13) return false;
  constexpr int REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;
  return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
}

std::vector<Kernels> found() {
  std::vector<Kernels> all;
  if (has_amx()) all.push_back(amx_kernels());
  if (has_avx512()) all.push_back(avx512_kernels());
  all.push_back(portable_kernels());
  return all;
}

const std::vector<Kernels>& available() {
  static const std::vector<Kernels> all = found();
  return all;
}

}  // namespace

const Kernels& kernels(const std::string& isa) {
  for (const Kernels& one : available())
    if (isa.empty() || isa == one.name) return one;
  throw std::invalid_argument("this CPU has no kernels named " + isa);
}

std::vector<std::string> isas() {
  std::vector<std::string> names;
  for (const Kernels& one : available()) names.push_back(one.name);
  return names;
}

}  // namespace ernie_kqat
