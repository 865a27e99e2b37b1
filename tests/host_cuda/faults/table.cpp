#include "faults.h"

namespace faults {

std::map<std::string, Fault>& table() {
  static std::map<std::string, Fault> faults;
  return faults;
}

}  // namespace faults
