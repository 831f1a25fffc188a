// In place of dispatch.cc: the kernels for AMX with tiles_in_memory.h, for any CPU that has the rest of what they are compiled for.
#include <stdexcept>

#include "kernels.h"

namespace ernie_kqat {

const Kernels& kernels(const std::string& isa) {
  if (isa == "amx") return amx_kernels();
  if (isa.empty() || isa == "avx512") return avx512_kernels();
  throw std::invalid_argument("no kernels named " + isa);
}

std::vector<std::string> isas() { return {"amx", "avx512"}; }

}  // namespace ernie_kqat
