// The instruction set in use: chosen once at load, or named for tests.
#pragma once

#include <string>
#include <vector>

namespace qemb::cpu {

std::vector<std::string> available_isas();  // worst first
std::string current_isa();
void set_isa(const std::string& name);  // throws std::invalid_argument for one that this machine lacks

}  // namespace qemb::cpu
