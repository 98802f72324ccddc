// QEMB_CHECK: argument errors in the user's words. std::invalid_argument arrives in Python as ValueError.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace qemb {

template <class... Parts>
std::string concat(const Parts&... parts) {
    std::ostringstream out;
    (out << ... << parts);
    return out.str();
}

}  // namespace qemb

#define QEMB_CHECK(condition, ...) \
    do { \
        if (!(condition)) throw std::invalid_argument(::qemb::concat(__VA_ARGS__)); \
    } while (0)
